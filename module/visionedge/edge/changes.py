"""Which frames are worth telling: those that differ from the last one told of the same camera."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionedge.frames import Result

Boxes = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Sight:
    """What a frame showed: boxes (n, 4) by label."""

    captured_ns: int
    boxes: dict[str, Boxes]


class ChangeFilter:
    """Remembers, per camera, the last frame told.

    A frame is worth telling when there is none yet, when the labels or the count of one differ, when a box
    moved, and when the last told frame is `heartbeat_s` old. A box moved when no box of its label has all
    four edges within `move_threshold` (a share of the picture) of one that was told, or the other way round.
    """

    def __init__(self, *, move_threshold: float = 0.05, heartbeat_s: float = 60.0) -> None:
        self._last: dict[str, _Sight] = {}
        self.apply(move_threshold=move_threshold, heartbeat_s=heartbeat_s)

    def __repr__(self) -> str:
        return f"<ChangeFilter cameras={sorted(self._last)}>"

    def apply(self, *, move_threshold: float, heartbeat_s: float) -> None:
        """Compare otherwise from now on, with the same frames that were told."""
        self._threshold = move_threshold
        self._heartbeat_ns = round(heartbeat_s * 1e9)

    def worth_telling(self, result: Result) -> bool:
        """Whether this frame differs from the last one told; changes nothing."""
        last = self._last.get(result.frame.camera)
        if last is None or result.frame.captured_ns - last.captured_ns >= self._heartbeat_ns:
            return True
        boxes = _by_label(result)
        if boxes.keys() != last.boxes.keys():
            return True
        return any(_moved(last.boxes[label], now, self._threshold) for label, now in boxes.items())

    def told(self, result: Result) -> None:
        """Remember this frame as the last one told of its camera."""
        self._last[result.frame.camera] = _Sight(result.frame.captured_ns, _by_label(result))


def _by_label(result: Result) -> dict[str, Boxes]:
    """The boxes of each class, keyed by its word: ids change their meaning with the model."""
    found = result.detections
    boxes: dict[str, Boxes] = {}
    for class_id in np.unique(found.class_ids).tolist():
        known = 0 <= class_id < len(result.labels)
        label = result.labels[class_id] if known else f"class-{class_id}"
        rows = found.boxes[found.class_ids == class_id]
        boxes[label] = np.concatenate([boxes[label], rows]) if label in boxes else rows
    return boxes


def _moved(before: Boxes, now: Boxes, threshold: float) -> bool:
    if len(before) != len(now):
        return True
    # (before, now): how far the edge that moved most has gone.
    distance = np.abs(before[:, None, :] - now[None, :, :]).max(axis=2)
    return bool((distance.min(axis=1) > threshold).any() or (distance.min(axis=0) > threshold).any())
