"""A track in the scene, and the path of its anchors, bounded: the evidence of events is made of it."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from visionedge.scene.events import Box, ScenePicture
from visionedge.scene.rules import Position

MAX_PATH_POINTS = 64
"""The most points of the path in the evidence of an event."""

_UNITS = 1e6
"""Positions have six decimals."""


class ConfirmedTrack(Protocol):
    """A confirmed track in a picture, as the tracker gives it.

    `box`: left, top, width and height, 0-1 of the picture. `detection`: its index in the picture, None if the
    track was not seen in it; then it takes part in no rule.
    """

    @property
    def track_id(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def confidence(self) -> float: ...
    @property
    def box(self) -> Box: ...
    @property
    def detection(self) -> int | None: ...


class Trail:
    """The path of one anchor: the newest positions, and some of all before, at most twice 64."""

    __slots__ = ("_recent", "_sparse", "_stride", "_until_next", "before", "now")

    def __init__(self) -> None:
        self.before: Position | None = None
        self.now: Position = Position(0, 0.0, 0.0, 0.0)
        self._recent: deque[Position] = deque(maxlen=MAX_PATH_POINTS)
        self._sparse: list[Position] = []
        self._stride = self._until_next = 1

    def add(self, position: Position) -> None:
        self.before = self.now if self._recent else None
        self.now = position
        self._recent.append(position)
        self._until_next -= 1
        if self._until_next:
            return
        self._sparse.append(position)
        if len(self._sparse) == MAX_PATH_POINTS:
            self._sparse = self._sparse[::2]
            self._stride *= 2
        self._until_next = self._stride

    def select(self, passed: Sequence[Position], last: Position, limit: int) -> list[Position]:
        """The path from the first of `passed` to `last`, all of `passed` in it; at most `limit` positions."""
        first_sequence = passed[0].sequence
        found = {
            each.sequence: each
            for each in (*self._sparse, *self._recent)
            if first_sequence <= each.sequence <= last.sequence
        }
        needed = {each.sequence: each for each in (*passed, last)}
        others = sorted(found.keys() - needed.keys())
        room = limit - len(needed)
        if len(others) > room:
            others = [others[number * len(others) // room] for number in range(room)]
        return sorted((*needed.values(), *(found[sequence] for sequence in others)))


class TrackState:
    """A track, and the paths of the anchors that its zones and lines use."""

    __slots__ = ("box", "confidence", "label", "started_s", "track_id", "trails")

    def __init__(self, track: ConfirmedTrack, started_s: float) -> None:
        self.track_id = track.track_id
        self.label = track.label
        self.started_s = started_s
        self.confidence = track.confidence
        self.box = track.box
        self.trails = {"bottom-center": Trail(), "center": Trail()}

    def move(self, track: ConfirmedTrack, picture: ScenePicture, anchors: Iterable[str]) -> None:
        self.confidence, self.box = track.confidence, track.box
        left, top, width, height = track.box
        # Rounded before the rules see them, so that the evidence has the very numbers that were compared.
        x = round(min(1.0, max(0.0, left + width / 2)) * _UNITS) / _UNITS
        size = (width + height / picture.aspect) / 2
        for anchor in anchors:
            down = top + (height if anchor == "bottom-center" else height / 2)
            y = round(min(1.0, max(0.0, down)) * _UNITS) / _UNITS
            self.trails[anchor].add(Position(picture.sequence, picture.at_s, x, y, size))
