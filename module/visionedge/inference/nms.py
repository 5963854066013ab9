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
    stays = np.ones(len(order), bool)
    for index in range(len(order)):
        if stays[index]:
            stays[index + 1 :] &= ~rivals[index, index + 1 :]
    return order[stays]


def overlaps(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each box with each, (n, n); 0 where the union has no area."""
    lower = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    upper = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.clip(upper - lower, 0, None).prod(axis=2)
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    union = areas[:, None] + areas[None, :] - shared
    iou: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou
