"""Tracks and pictures for tests of the scene, and a run that collects its events."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

from visionedge.config.load import parse_config
from visionedge.config.schema import CameraConfig
from visionedge.scene.events import Box, SceneEvent, ScenePicture
from visionedge.scene.scene import KeptRule, Scene, SceneChanges

START = datetime(2026, 11, 30, 10, 0, tzinfo=UTC)
SQUARE = [[0.3, 0.3], [0.3, 0.7], [0.7, 0.7], [0.7, 0.3]]
"""A zone in the middle of the picture."""

DOOR = {"start": [0.5, 0.2], "end": [0.5, 0.8]}
"""A line from the top to the bottom: the right half of the picture is on its left."""

Place = tuple[float, float]
Path = Callable[[float], Place | None]
"""Where the feet of a track are at a time in seconds; None: it is not seen."""


@dataclass(frozen=True, slots=True)
class PathTrack:
    """A confirmed track with its feet at a place."""

    track_id: int
    label: str
    box: Box
    detection: int | None = 0
    confidence: float = 0.9


def track_at(track_id: int, place: Place | None, label: str = "person") -> PathTrack:
    """A track of 4 % of the width and 10 % of the height; without a place it is not seen in the picture."""
    if place is None:
        return PathTrack(track_id, label, (0.0, 0.0, 0.0, 0.0), None)
    x, y = place
    return PathTrack(track_id, label, (x - 0.02, y - 0.1, 0.04, 0.1))


HELMET = {"model": "helmet"}
"""A second stage whose model says of a track whether it wears a helmet."""


def camera_config(**keys: Any) -> CameraConfig:
    """A camera with these keys, checked as a document is; rules with attributes need `then=HELMET`."""
    models = {"helmet": {"path": "helmet.onnx"}, "vest": {"path": "vest.onnx"}}
    return parse_config({"models": models, "cameras": {"dock": {"uri": "demo:", **keys}}}).cameras["dock"]


class SceneRun:
    """A scene that is fed picture by picture; collects its events and everything that is to be stored."""

    def __init__(
        self, config: CameraConfig, kept: Mapping[str, KeptRule] | None = MappingProxyType({})
    ) -> None:
        self.scene = Scene("dock", kept)
        self.events: list[SceneEvent] = []
        self.changes: list[SceneChanges] = []
        self.sequence = 0
        self.at_s = 1_000.0
        self.now = START
        self.epoch = 1
        self.attributes: dict[int, Mapping[str, str]] = {}
        self.model = "yolox-nano-416"
        self.configure(config)

    def restart(self, kept: Mapping[str, KeptRule] | None, config: CameraConfig) -> None:
        """A new process: sequences and track ids go on."""
        self.scene = Scene("dock", kept)
        self.at_s += 60
        self.epoch += 1
        self.configure(config)

    def configure(self, config: CameraConfig) -> None:
        self._take(self.scene.configure(config, self.now))

    def picture(
        self, tracks: Iterable[PathTrack] = (), ended: Iterable[int] = (), after_s: float = 0.1
    ) -> None:
        """The next picture, `after_s` later."""
        self.sequence += 1
        self.at_s += after_s
        self.now += timedelta(seconds=after_s)
        picture = ScenePicture(
            self.sequence, self.epoch, self.at_s, self.now, 4 / 3, self.model, "cpu", 640, 480
        )
        self._take(self.scene.update(picture, tracks, ended, self.attributes))

    def walk(self, places: Sequence[Place | None], track_id: int = 1, after_s: float = 0.1) -> None:
        """Pictures in which one track is at these places."""
        for place in places:
            self.picture([track_at(track_id, place)], after_s=after_s)

    def play(self, paths: Mapping[int, Path], fps: float, duration_s: float) -> None:
        """Tracks that follow paths for a time, at a rate."""
        for number in range(round(duration_s * fps)):
            at_s = number / fps
            self.picture([track_at(id_, path(at_s)) for id_, path in paths.items()], after_s=1 / fps)

    def _take(self, changes: SceneChanges) -> None:
        self.changes.append(changes)
        self.events += changes.events

    @property
    def types(self) -> list[str]:
        """The types of the events so far; of crossings the direction."""
        return [event.direction or event.type for event in self.events]

    def counts(self) -> Counter[str]:
        """How often each type came."""
        return Counter(self.types)
