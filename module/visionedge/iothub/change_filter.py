"""The change filter: which frames are worth sending. Objects of each camera are matched over time and
debounced.

Weak boxes of a detector appear and disappear from frame to frame. So an object counts as present, gone, or of
another class only when that has lasted for `change_s`. All durations are measured with the capture times of
frames, so the rules are the same for a camera with 30 frames a second and one with a picture every 5 s.

The frames of a camera with tracking are compared by its confirmed tracks: nothing is matched, and boxes
without a track do not count.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from visionedge.frames.types import FrameResult

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the picture's width and height."""

_SAME_CLASS_IOU = 0.3
_OTHER_CLASS_IOU = 0.5
_SPEED_PER_S = 0.5
"""The fastest movement of an object, in pictures a second: a person close to the camera."""

_FORGET_NS = 3_600 * 1_000_000_000

_NO_ATTRIBUTES: Mapping[str, str] = MappingProxyType({})


@dataclass(slots=True)
class _SceneObject:
    """An object that is matched from frame to frame.

    Attributes:
        label: its class; changes when another class was seen for `change_s`.
        box: its last box.
        seen_ns: when it was last detected.
        present: whether it counts as there.
        seen_label: the class in the last frame that showed it.
        held_ns: for how long it has been detected, minus the time it was missing.
        missed_since_ns: since when it is missing; None if the last frame showed it.
        relabelled_ns: for how long it has been detected as `seen_label` instead of `label`.
        sent_label, sent_box: as in the last frame that was sent; None if that frame did not show it.
    """

    label: str
    box: Box
    seen_ns: int
    present: bool
    seen_label: str
    held_ns: int = 0
    missed_since_ns: int | None = None
    relabelled_ns: int = 0
    sent_label: str | None = None
    sent_box: Box | None = None

    def restart(self) -> None:
        """Start all durations again: the camera was disconnected, so the time in between does not count."""
        self.held_ns, self.missed_since_ns, self.relabelled_ns = 0, None, 0

    def seen(self, box: Box, label: str, now_ns: int, passed_ns: int, hold_ns: int) -> bool:
        """The frame shows it. Returns whether it appeared or changed its class, and this was not sent yet."""
        # Only the time between two frames that both show it counts.
        held_ns = passed_ns if self.missed_since_ns is None else 0
        self.held_ns += held_ns
        self.box, self.seen_ns, self.missed_since_ns = box, now_ns, None
        before = self.label if self.present else None
        self._seen_as(label, passed_ns, held_ns)
        if label != self.label and self.relabelled_ns >= hold_ns:
            self.label, self.relabelled_ns = label, 0
        self.present = self.present or self.held_ns >= hold_ns
        return self.present and self.label not in (before, self.sent_label)

    def _seen_as(self, label: str, passed_ns: int, held_ns: int) -> None:
        """Update how long it has been detected as another class than its own."""
        if label == self.label:
            self.relabelled_ns = max(0, self.relabelled_ns - passed_ns)
        elif label == self.seen_label:
            self.relabelled_ns += held_ns
        elif self.seen_label != self.label:
            self.relabelled_ns = 0
        self.seen_label = label

    def missed(self, now_ns: int, passed_ns: int, hold_ns: int) -> bool:
        """The frame does not show it. Returns whether it now counts as gone, and was sent as present."""
        if self.missed_since_ns is None:
            self.missed_since_ns = now_ns
        # Only the missing time is subtracted, so an object that most frames show becomes present.
        self.held_ns = max(0, self.held_ns - passed_ns)
        if not self.present or not self.away(now_ns, hold_ns):
            return False
        self.present, self.held_ns = False, 0
        return self.sent_label is not None

    def away(self, now_ns: int, hold_ns: int) -> bool:
        """Whether it has been missing for at least `hold_ns`."""
        return self.missed_since_ns is not None and now_ns - self.missed_since_ns >= hold_ns

    @property
    def needed(self) -> bool:
        """Whether it must still be followed."""
        return self.present or self.missed_since_ns is None or self.held_ns > 0 or self.sent_label is not None

    def moved(self, threshold: float) -> bool:
        """Whether an edge of its box has moved by more than the threshold since it was sent."""
        if self.sent_box is None or not self.present:
            return False
        return _has_moved(self.box, self.sent_box, threshold)


class _FollowedCamera(ABC):
    """The objects of one camera, and how the last frame that was sent showed them."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._passed_ns = 0
        self._hold_ns = 0
        self._epoch: int | None = None
        self._changed = False
        self._sent_ns: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of objects that are followed."""

    def advance(self, result: FrameResult, hold_ns: int) -> None:
        """Follow the objects to the next frame of the camera."""
        now_ns = result.frame.captured_ns
        self._passed_ns, self._hold_ns = max(0, now_ns - self.now_ns), hold_ns
        self.now_ns = now_ns
        if result.frame.epoch != self._epoch:
            self._epoch, self._passed_ns = result.frame.epoch, 0
            self._restart()
        self._follow(result)

    def worth_sending(self, move_threshold: float, heartbeat_ns: int) -> bool:
        """Whether the last frame should be sent."""
        if self._sent_ns is None or self._changed:
            return True
        waited_ns = self.now_ns - self._sent_ns
        if waited_ns >= heartbeat_ns:
            return True
        if waited_ns < self._hold_ns:
            return False
        return self._moved(move_threshold) or self._corrects()

    def sent(self) -> None:
        """The last frame is sent."""
        self._sent_ns, self._changed = self.now_ns, False
        self._keep_sent()

    @abstractmethod
    def _restart(self) -> None:
        """Start all durations again: the camera was disconnected, so the time in between does not count."""

    @abstractmethod
    def _follow(self, result: FrameResult) -> None:
        """Follow the objects to a frame; sets `_changed`."""

    @abstractmethod
    def _moved(self, threshold: float) -> bool:
        """Whether an object has moved by more than the threshold since the last frame that was sent."""

    @abstractmethod
    def _corrects(self) -> bool:
        """Whether this frame shows exactly the present objects, and the last frame that was sent did not."""

    @abstractmethod
    def _keep_sent(self) -> None:
        """Keep what the frame shows that is sent."""


class _MatchedCamera(_FollowedCamera):
    """A camera without tracking: its boxes are matched from frame to frame."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: list[_SceneObject] = []

    def __len__(self) -> int:
        return len(self.objects)

    def _restart(self) -> None:
        for each in self.objects:
            each.restart()

    def _follow(self, result: FrameResult) -> None:
        now_ns, passed_ns, hold_ns = self.now_ns, self._passed_ns, self._hold_ns
        boxes, labels = _boxes(result), result.label_detections()
        matches = _matches(self.objects, boxes, labels, now_ns)
        for index, each in enumerate(self.objects):
            if (row := matches.get(index)) is None:
                self._changed |= each.missed(now_ns, passed_ns, hold_ns)
            else:
                self._changed |= each.seen(boxes[row], labels[row], now_ns, passed_ns, hold_ns)
        self.objects = [each for each in self.objects if each.needed]
        for row in range(len(boxes)):
            if row not in matches.values():
                self._add(boxes[row], labels[row])

    def _add(self, box: Box, label: str) -> None:
        # With `change_s` of 0 an object is present at once.
        self.objects.append(_SceneObject(label, box, self.now_ns, self._hold_ns == 0, label))
        self._changed |= self._hold_ns == 0

    def _moved(self, threshold: float) -> bool:
        in_view = [each for each in self.objects if each.missed_since_ns is None]
        return any(each.moved(threshold) for each in in_view)

    def _corrects(self) -> bool:
        """See `_FollowedCamera._corrects`.

        A frame is sent as it was detected, so it can show an object that is not present, or miss a present
        one.
        """
        wrong = any(
            each.sent_label != each.label
            if each.present
            else each.sent_label is not None and each.away(self.now_ns, self._hold_ns)
            for each in self.objects
        )
        return wrong and all(
            each.present == (each.missed_since_ns is None)
            and (not each.present or each.seen_label == each.label)
            for each in self.objects
        )

    def _keep_sent(self) -> None:
        for each in self.objects:
            in_view = each.missed_since_ns is None
            each.sent_label = each.seen_label if in_view else None
            each.sent_box = each.box if in_view else None
        self.objects = [each for each in self.objects if each.needed]


@dataclass(slots=True)
class _FollowedTrack:
    """A confirmed track of a camera with tracking, until its end counts.

    Attributes:
        since_ns: when it was confirmed.
        seen_ns: when a frame last showed it.
        box: its mean box over about `change_s`: a large box jitters by more than `move_threshold`.
        is_shown: whether the last frame shows it. Not while it is hidden, or as weak as an unreported box.
        counts: whether it has lasted for `change_s`.
        was_sent: whether a frame that was sent showed it.
        sent_box: as in the newest of these frames; None if the last frame that was sent did not show it.
        attributes, sent_attributes: what second models say of it, now and in the newest of these frames.
    """

    since_ns: int
    seen_ns: int
    box: Box | None = None
    is_shown: bool = False
    counts: bool = False
    was_sent: bool = False
    sent_box: Box | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    sent_attributes: Mapping[str, str] = field(default_factory=dict)

    def show(self, box: Box | None, now_ns: int, hold_ns: int, *, is_shown: bool) -> bool:
        """The track goes on. Returns whether it counts from now on, and the last frame sent lacks it."""
        self.is_shown = is_shown
        if box is None or not is_shown:
            return False
        if self.box is not None and hold_ns:
            share = (now_ns - self.seen_ns) / (now_ns - self.seen_ns + hold_ns)
            box = _move_towards(self.box, box, share)
        self.box, self.seen_ns = box, now_ns
        counted, self.counts = self.counts, self.counts or now_ns - self.since_ns >= hold_ns
        return self.counts and not counted and self.sent_box is None


class _TrackedCamera(_FollowedCamera):
    """A camera with tracking: its tracker says which objects there are."""

    def __init__(self) -> None:
        super().__init__()
        self._tracks: dict[int, _FollowedTrack] = {}
        self._ended: dict[int, _FollowedTrack] = {}

    def __len__(self) -> int:
        return len(self._tracks) + len(self._ended)

    def _restart(self) -> None:
        for track in (*self._tracks.values(), *self._ended.values()):
            track.since_ns = track.seen_ns = self.now_ns

    def _follow(self, result: FrameResult) -> None:
        now_ns, hold_ns, confirmed = self.now_ns, self._hold_ns, result.confirmed_tracks or {}
        shown = dict.fromkeys(result.track_ids or (), _NO_ATTRIBUTES)
        if result.attributes is not None:
            shown = dict(zip(result.track_ids or (), result.attributes, strict=True))
        for track_id in [*self._tracks.keys() - confirmed.keys()]:
            track = self._tracks.pop(track_id)
            if track.was_sent:  # the end of a track that was never sent is no change
                self._ended[track_id] = track
        for track_id, track in [*self._ended.items()]:
            if now_ns - track.seen_ns >= hold_ns:
                self._changed = True
                del self._ended[track_id]
        for track_id, box in confirmed.items():
            track = self._tracks.setdefault(track_id, _FollowedTrack(now_ns, now_ns))
            self._changed |= track.show(box, now_ns, hold_ns, is_shown=track_id in shown)
            track.attributes = shown.get(track_id, track.attributes)

    def _moved(self, threshold: float) -> bool:
        """See `_FollowedCamera._moved`; or a second model says something else of an object."""
        return any(
            _has_moved(track.box, track.sent_box, threshold) or track.attributes != track.sent_attributes
            for track in self._tracks.values()
            if track.counts and track.is_shown
        )

    def _corrects(self) -> bool:
        """See `_FollowedCamera._corrects`; a frame that was sent may lack a track that was hidden in it."""
        counting = [track for track in self._tracks.values() if track.counts]
        return any(track.sent_box is None for track in counting) and all(each.is_shown for each in counting)

    def _keep_sent(self) -> None:
        for track in self._tracks.values():
            track.was_sent |= track.is_shown
            track.sent_box = track.box if track.is_shown else None
            if track.is_shown:
                track.sent_attributes = track.attributes


class ChangeFilter:
    """Follows the objects of each camera, and decides which frames are worth sending.

    A frame is worth sending
    - if it is the first one of its camera;
    - if an object appeared, disappeared or changed its class, and that has lasted for `change_s`;
    - if the last frame was sent `heartbeat_s` ago;
    - at most once in `change_s`: if an edge of a box has moved by more than `move_threshold` (a fraction of
      the picture) since the last frame sent, if a second model says something else of an object, or if that
      frame did not show exactly the present objects.

    The objects of a camera with tracking are its confirmed tracks; one disappears when the tracker ends it.
    """

    def __init__(
        self, *, move_threshold: float = 0.05, heartbeat_s: float = 60.0, change_s: float = 1.0
    ) -> None:
        self._cameras: dict[str, _FollowedCamera] = {}
        self.apply(move_threshold=move_threshold, heartbeat_s=heartbeat_s, change_s=change_s)

    def __repr__(self) -> str:
        return f"<ChangeFilter cameras={sorted(self._cameras)} objects={len(self)}>"

    def __len__(self) -> int:
        """The number of objects that are followed, of all cameras."""
        return sum(map(len, self._cameras.values()))

    def apply(self, *, move_threshold: float, heartbeat_s: float, change_s: float) -> None:
        """Change the settings; the objects and the frames sent so far are kept."""
        self._move_threshold = move_threshold
        self._heartbeat_ns = round(heartbeat_s * 1e9)
        self._hold_ns = round(change_s * 1e9)

    def observe(self, result: FrameResult) -> bool:
        """Match a frame, each once and in the order of capture; returns whether it is worth sending."""
        kind = _MatchedCamera if result.confirmed_tracks is None else _TrackedCamera
        camera = self._cameras.get(result.frame.camera)
        if not isinstance(camera, kind):
            self._forget(result.frame.captured_ns)
            camera = self._cameras[result.frame.camera] = kind()
        camera.advance(result, self._hold_ns)
        return camera.worth_sending(self._move_threshold, self._heartbeat_ns)

    def sent(self, result: FrameResult) -> None:
        """The last observed frame of its camera is sent; later frames are compared with it."""
        self._cameras[result.frame.camera].sent()

    def _forget(self, now_ns: int) -> None:
        """Forget cameras without a frame for an hour: they were removed from the configuration."""
        for name, camera in list(self._cameras.items()):
            if now_ns - camera.now_ns > _FORGET_NS:
                del self._cameras[name]


def _move_towards(box: Box, other: Box, share: float) -> Box:
    """The box that lies this share of the way to the other one."""
    left, top, right, bottom = (a + share * (b - a) for a, b in zip(box, other, strict=True))
    return left, top, right, bottom


def _has_moved(now: Box | None, sent: Box | None, threshold: float) -> bool:
    """Whether an edge of a box has moved by more than the threshold; not if it was not sent."""
    if now is None or sent is None:
        return False
    return any(abs(after - before) > threshold for after, before in zip(now, sent, strict=True))


def _boxes(result: FrameResult) -> list[Box]:
    return [tuple(row) for row in result.detections.boxes.tolist()]


def _matches(
    objects: Sequence[_SceneObject], boxes: Sequence[Box], labels: Sequence[str], now_ns: int
) -> dict[int, int]:
    """The index of the box for each object index: greedily, the pair with the best score first."""
    if not objects or not boxes:
        return {}
    score = _scores(objects, boxes, labels, now_ns)
    rows, columns = np.nonzero(score)
    best_first = np.argsort(-score[rows, columns], kind="stable")
    found: dict[int, int] = {}
    taken: set[int] = set()
    for row, column in zip(rows[best_first].tolist(), columns[best_first].tolist(), strict=True):
        if row not in found and column not in taken:
            found[row] = column
            taken.add(column)
    return found


def _scores(
    objects: Sequence[_SceneObject], boxes: Sequence[Box], labels: Sequence[str], now_ns: int
) -> NDArray[np.float64]:
    """How well each object (row) matches each box (column); 0 if they cannot be the same.

    Best is overlap within a class, present objects first. Then overlap across classes, because the class of
    an object can flicker. Then a box of the same class within the distance that the object can have moved;
    only this rule connects the pictures of a slow camera.
    """
    codes = {label: code for code, label in enumerate(labels)}
    seen_codes = np.array([codes[label] for label in labels])
    same = np.array([codes.get(each.label, -1) for each in objects])[:, None] == seen_codes
    before, now = np.array([each.box for each in objects]), np.array(boxes)
    overlap = _iou(before, now)
    present = np.array([each.present for each in objects])[:, None]
    reach = np.array([(now_ns - each.seen_ns) * 1e-9 * _SPEED_PER_S for each in objects])[:, None]
    apart = ((before[:, :2] + before[:, 2:])[:, None] - (now[:, :2] + now[:, 2:])) / 2
    distance = np.hypot(apart[..., 0], apart[..., 1])
    # The three ranges do not overlap: 4 to 6, 2 to 3, and 0.58 to 2 (the diagonal of the picture is 1.42).
    by_distance = np.where(distance <= reach, 2 - distance, 0.0)
    within = np.where(overlap >= _SAME_CLASS_IOU, 4 + overlap + present, by_distance)
    across = np.where(overlap >= _OTHER_CLASS_IOU, 2 + overlap, 0.0)
    return np.where(same, within, across)


def _iou(before: NDArray[np.float64], now: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each box with each other one."""
    low = np.maximum(before[:, None, :2], now[:, :2])
    size = np.maximum(np.minimum(before[:, None, 2:], now[:, 2:]) - low, 0)
    shared = size[..., 0] * size[..., 1]
    union = _areas(before)[:, None] + _areas(now) - shared
    return np.asarray(shared / np.maximum(union, 1e-12))


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
