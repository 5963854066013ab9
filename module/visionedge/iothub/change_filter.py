"""Which frames are worth sending: the objects before each camera are matched over time and debounced.

A detector's weak boxes come and go from frame to frame. So a box counts as there, or as gone, or as another
class, only when that has held for `change_s`. Every duration is measured with the capture times of the
frames, so a camera with 30 frames a second and one with a picture every 5 s are judged by the same rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionedge.frames.types import FrameResult

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, relative to the picture."""

_SAME_CLASS_IOU = 0.3
_OTHER_CLASS_IOU = 0.5
_SPEED_PER_S = 0.5
"""How far an object moves in a second at most, as a share of the picture: a person close to the camera."""

_FORGET_NS = 3_600 * 1_000_000_000


@dataclass(slots=True)
class _SceneObject:
    """A box that is matched from frame to frame.

    `sent_label` and `sent_box` are those in the last frame that was sent; None where that did not show it.
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
        """Forget what had begun to hold: the camera was away, and nothing was seen meanwhile."""
        self.held_ns, self.missed_since_ns, self.relabelled_ns = 0, None, 0

    def seen(self, box: Box, label: str, now_ns: int, passed_ns: int, hold_ns: int) -> bool:
        """It is in this frame; whether it now counts as there, or as another class, and that was not sent."""
        # Only the time between two frames that both show it is known to be held.
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
        """Count how long it has been seen as another class than its own."""
        if label == self.label:
            self.relabelled_ns = max(0, self.relabelled_ns - passed_ns)
        elif label == self.seen_label:
            self.relabelled_ns += held_ns
        elif self.seen_label != self.label:
            self.relabelled_ns = 0
        self.seen_label = label

    def missed(self, now_ns: int, passed_ns: int, hold_ns: int) -> bool:
        """It is not in this frame; whether it now counts as gone, and was sent as there."""
        if self.missed_since_ns is None:
            self.missed_since_ns = now_ns
        # A dropout takes back the time it lasts, not all: a box that is seen in most frames does appear.
        self.held_ns = max(0, self.held_ns - passed_ns)
        if not self.present or not self.away(now_ns, hold_ns):
            return False
        self.present, self.held_ns = False, 0
        return self.sent_label is not None

    def away(self, now_ns: int, hold_ns: int) -> bool:
        """Whether it has been missing for as long as it takes to count as gone."""
        return self.missed_since_ns is not None and now_ns - self.missed_since_ns >= hold_ns

    @property
    def needed(self) -> bool:
        """Whether anything still depends on it."""
        return self.present or self.missed_since_ns is None or self.held_ns > 0 or self.sent_label is not None

    def moved(self, threshold: float) -> bool:
        """Whether an edge is further from where it was sent than the threshold."""
        if self.sent_box is None or not self.present:
            return False
        return any(abs(now - sent) > threshold for now, sent in zip(self.box, self.sent_box, strict=True))


class _CameraScene:
    """The objects before one camera, and what the last frame that was sent showed of them."""

    def __init__(self) -> None:
        self.objects: list[_SceneObject] = []
        self.now_ns = 0
        self._epoch: int | None = None
        self._changed = False
        self._sent_ns: int | None = None

    def advance(self, result: FrameResult, hold_ns: int) -> None:
        """Take in the next frame of the camera."""
        now_ns, boxes, labels = result.frame.captured_ns, _boxes(result), _labels(result)
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
        # Without a time to hold, what is seen is there.
        self.objects.append(_SceneObject(label, box, self.now_ns, hold_ns == 0, label))
        self._changed |= hold_ns == 0

    def worth_sending(self, move_threshold: float, heartbeat_ns: int, hold_ns: int) -> bool:
        """Whether the frame that was taken in last should be sent."""
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
        """Whether this frame shows just what is there, and the last one that was sent did not.

        A frame is sent as it was seen: it may have shown a box that flickers, or missed one that is there.
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
        """The frame that was taken in last goes out."""
        self._sent_ns, self._changed = self.now_ns, False
        for each in self.objects:
            in_view = each.missed_since_ns is None
            each.sent_label = each.seen_label if in_view else None
            each.sent_box = each.box if in_view else None
        self.objects = [each for each in self.objects if each.needed]


class ChangeFilter:
    """Follows what each camera sees, and says which of its frames are worth sending.

    A frame is worth sending when there was none yet; when an object appeared, left or became another class,
    and that held for `change_s`; when the last one is `heartbeat_s` old; and, at most once in `change_s`,
    when an edge of a box has moved by more than `move_threshold` (a share of the picture) since then, or when
    the last frame showed, or did not show, a box that flickers.
    """

    def __init__(
        self, *, move_threshold: float = 0.05, heartbeat_s: float = 60.0, change_s: float = 1.0
    ) -> None:
        self._scenes: dict[str, _CameraScene] = {}
        self.apply(move_threshold=move_threshold, heartbeat_s=heartbeat_s, change_s=change_s)

    def __repr__(self) -> str:
        return f"<ChangeFilter cameras={sorted(self._scenes)} objects={len(self)}>"

    def __len__(self) -> int:
        """How many objects are followed, of all cameras."""
        return sum(len(scene.objects) for scene in self._scenes.values())

    def apply(self, *, move_threshold: float, heartbeat_s: float, change_s: float) -> None:
        """Compare otherwise from now on, with the same frames that were sent."""
        self._move_threshold = move_threshold
        self._heartbeat_ns = round(heartbeat_s * 1e9)
        self._hold_ns = round(change_s * 1e9)

    def observe(self, result: FrameResult) -> bool:
        """Take in a frame, each once and in the order of their capture; whether it is worth sending."""
        scene = self._scenes.get(result.frame.camera)
        if scene is None:
            self._forget(result.frame.captured_ns)
            scene = self._scenes[result.frame.camera] = _CameraScene()
        scene.advance(result, self._hold_ns)
        return scene.worth_sending(self._move_threshold, self._heartbeat_ns, self._hold_ns)

    def sent(self, result: FrameResult) -> None:
        """The frame that was observed last of its camera is sent; later ones are compared with it."""
        self._scenes[result.frame.camera].sent()

    def _forget(self, now_ns: int) -> None:
        """Drop cameras without a frame for an hour: they were taken out of the configuration."""
        for name, scene in list(self._scenes.items()):
            if now_ns - scene.now_ns > _FORGET_NS:
                del self._scenes[name]


def _boxes(result: FrameResult) -> list[Box]:
    return [tuple(row) for row in result.detections.boxes.tolist()]


def _labels(result: FrameResult) -> list[str]:
    """The class of each box as its word: ids change their meaning with the model."""
    words, ids = result.labels, result.detections.class_ids.tolist()
    return [words[each] if 0 <= each < len(words) else f"class-{each}" for each in ids]


def _matches(
    objects: Sequence[_SceneObject], boxes: Sequence[Box], labels: Sequence[str], now_ns: int
) -> dict[int, int]:
    """Which box of a frame is which object, by their indices: the best pair first, then the next best."""
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
    """How well each object (row) fits each box (column); 0 where they cannot be the same.

    Best is overlap within a class, with objects that are there before those that only begin to be; then
    overlap across classes (the detector wavers); then a box of the class that the object can have moved to
    since it was seen, which alone connects the pictures of a slow camera.
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
    # The parts do not overlap: 4 to 6, 2 to 3, and below 2 (the diagonal of the picture is 1.42 long).
    by_distance = np.where(distance <= reach, 2 - distance, 0.0)
    within = np.where(overlap >= _SAME_CLASS_IOU, 4 + overlap + present, by_distance)
    across = np.where(overlap >= _OTHER_CLASS_IOU, 2 + overlap, 0.0)
    return np.where(same, within, across)


def _iou(before: NDArray[np.float64], now: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each box with each."""
    low = np.maximum(before[:, None, :2], now[:, :2])
    size = np.maximum(np.minimum(before[:, None, 2:], now[:, 2:]) - low, 0)
    shared = size[..., 0] * size[..., 1]
    union = _areas(before)[:, None] + _areas(now) - shared
    return np.asarray(shared / np.maximum(union, 1e-12))


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
