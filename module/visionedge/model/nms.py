"""Greedy non-maximum suppression, class by class."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def suppress(boxes: Floats, scores: Floats, class_ids: NDArray[np.integer], iou: float) -> NDArray[np.intp]:
    """The indices of the boxes that stay, by falling score.

    A box goes where one of its class with a higher score (of equal ones the earlier) overlaps it by more
    than `iou`. `boxes` is (n, 4): left, top, right, bottom in any unit; `scores` and `class_ids` are (n,).
    """
    order = np.argsort(-scores, kind="stable")
    sorted_boxes, sorted_ids = boxes[order].astype(np.float64), class_ids[order]
    rivals = (overlaps(sorted_boxes) > iou) & (sorted_ids[:, None] == sorted_ids[None, :])
    return order[_kept(rivals)]


def _kept(rivals: NDArray[np.bool_]) -> list[int]:
    """The rows that no kept row before them is a rival of; each is one long number here, a bit for a box."""
    rows = np.packbits(rivals, axis=1, bitorder="little")
    gone, kept = 0, []
    for index, row in enumerate(rows):
        if not gone >> index & 1:
            kept.append(index)
            gone |= int.from_bytes(row.tobytes(), "little")
    return kept


def overlaps(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each box with each, (n, n); 0 where the union has no area."""
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    width = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    height = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    areas = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    union = areas[:, None] + areas - shared
    iou: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou
