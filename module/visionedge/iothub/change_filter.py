"""The change filter: which frames are worth sending. Objects of each camera are matched over time and
debounced.

Weak boxes of a detector appear and disappear from frame to frame. So an object counts as present, gone, or of
another class only when that has lasted for `change_s`. All durations are measured with the capture times of
frames, so the rules are the same for a camera with 30 frames a second and one with a picture every 5 s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
        return any(abs(now - sent) > threshold for now, sent in zip(self.box, self.sent_box, strict=True))


class _CameraScene:
    """The objects of one camera, and how the last frame that was sent showed them."""

    def __init__(self) -> None:
        self.objects: list[_SceneObject] = []
        self.now_ns = 0
        self._epoch: int | None = None
        self._changed = False
        self._sent_ns: int | None = None

    def advance(self, result: FrameResult, hold_ns: int) -> None:
        """Match the next frame of the camera."""
        now_ns, boxes, labels = result.frame.captured_ns, _boxes(result), result.label_detections()
        passed_ns = max(0, now_ns - self.now_ns)
        if result.frame.epoch != self._epoch:
            passed_ns = 0
            for each in self.objects:
                each.restart()
        self.now_ns, self._epoch = now_ns, result.frame.epoch
        matches = _matches(self.objects, boxes, labels, now_ns)
        for index, each in enumerate(self.objects):
            if (row := matches.get(index)) is None:
                self._changed |= each.missed(now_ns, passed_ns, hold_ns)
            else:
                self._changed |= each.seen(boxes[row], labels[row], now_ns, passed_ns, hold_ns)
        self.objects = [each for each in self.objects if each.needed]
        for row in range(len(boxes)):
            if row not in matches.values():
                self._add(boxes[row], labels[row], hold_ns)

    def _add(self, box: Box, label: str, hold_ns: int) -> None:
        # With `change_s` of 0 an object is present at once.
        self.objects.append(_SceneObject(label, box, self.now_ns, hold_ns == 0, label))
        self._changed |= hold_ns == 0

    def worth_sending(self, move_threshold: float, heartbeat_ns: int, hold_ns: int) -> bool:
        """Whether the last frame should be sent."""
        if self._sent_ns is None or self._changed:
            return True
        waited_ns = self.now_ns - self._sent_ns
        if waited_ns >= heartbeat_ns:
            return True
        if waited_ns < hold_ns:
            return False
        in_view = [each for each in self.objects if each.missed_since_ns is None]
        return any(each.moved(move_threshold) for each in in_view) or self._corrects(hold_ns)

    def _corrects(self, hold_ns: int) -> bool:
        """Whether this frame shows exactly the present objects, and the last frame that was sent did not.

        A frame is sent as it was detected, so it can show an object that is not present, or miss a present
        one.
        """
        wrong = any(
            each.sent_label != each.label
            if each.present
            else each.sent_label is not None and each.away(self.now_ns, hold_ns)
            for each in self.objects
        )
        return wrong and all(
            each.present == (each.missed_since_ns is None)
            and (not each.present or each.seen_label == each.label)
            for each in self.objects
        )

    def sent(self) -> None:
        """The last frame is sent."""
        self._sent_ns, self._changed = self.now_ns, False
        for each in self.objects:
            in_view = each.missed_since_ns is None
            each.sent_label = each.seen_label if in_view else None
            each.sent_box = each.box if in_view else None
        self.objects = [each for each in self.objects if each.needed]


class ChangeFilter:
    """Follows the objects of each camera, and decides which frames are worth sending.

    A frame is worth sending
    - if it is the first one of its camera;
    - if an object appeared, disappeared or changed its class, and that has lasted for `change_s`;
    - if the last frame was sent `heartbeat_s` ago;
    - at most once in `change_s`: if an edge of a box has moved by more than `move_threshold` (a fraction of
      the picture) since the last frame sent, or if that frame did not show exactly the present objects.
    """

    def __init__(
        self, *, move_threshold: float = 0.05, heartbeat_s: float = 60.0, change_s: float = 1.0
    ) -> None:
        self._scenes: dict[str, _CameraScene] = {}
        self.apply(move_threshold=move_threshold, heartbeat_s=heartbeat_s, change_s=change_s)

    def __repr__(self) -> str:
        return f"<ChangeFilter cameras={sorted(self._scenes)} objects={len(self)}>"

    def __len__(self) -> int:
        """The number of objects that are followed, of all cameras."""
        return sum(len(scene.objects) for scene in self._scenes.values())

    def apply(self, *, move_threshold: float, heartbeat_s: float, change_s: float) -> None:
        """Change the settings; the objects and the frames sent so far are kept."""
        self._move_threshold = move_threshold
        self._heartbeat_ns = round(heartbeat_s * 1e9)
        self._hold_ns = round(change_s * 1e9)

    def observe(self, result: FrameResult) -> bool:
        """Match a frame, each once and in the order of capture; returns whether it is worth sending."""
        scene = self._scenes.get(result.frame.camera)
        if scene is None:
            self._forget(result.frame.captured_ns)
            scene = self._scenes[result.frame.camera] = _CameraScene()
        scene.advance(result, self._hold_ns)
        return scene.worth_sending(self._move_threshold, self._heartbeat_ns, self._hold_ns)

    def sent(self, result: FrameResult) -> None:
        """The last observed frame of its camera is sent; later frames are compared with it."""
        self._scenes[result.frame.camera].sent()

    def _forget(self, now_ns: int) -> None:
        """Forget cameras without a frame for an hour: they were removed from the configuration."""
        for name, scene in list(self._scenes.items()):
            if now_ns - scene.now_ns > _FORGET_NS:
                del self._scenes[name]


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
