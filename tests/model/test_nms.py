"""Suppression: equal to a slow reference, idempotent, and class by class."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from visionedge.model.postprocess import suppress_non_maxima

Boxes = NDArray[np.float32]
Case = tuple[Boxes, NDArray[np.float32], NDArray[np.int32], float]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Boxes on a coarse grid, so that equal boxes, equal scores, touching and empty ones all come up."""
    corner, side = st.integers(0, 8), st.integers(0, 6)
    found = draw(
        st.lists(st.tuples(corner, corner, side, side, st.integers(0, 4), st.integers(0, 2)), max_size=14)
    )
    table = np.array(found, np.float32).reshape(-1, 6)
    boxes = np.concatenate([table[:, :2], table[:, :2] + table[:, 2:4]], axis=1)
    return (
        boxes,
        (table[:, 4] / 4).astype(np.float32),
        table[:, 5].astype(np.int32),
        draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
    )


def overlap(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    union = areas - width * height
    return width * height / union if union > 0 else 0.0


def slow(boxes: Boxes, scores: NDArray[np.float32], ids: NDArray[np.int32], iou: float) -> list[int]:
    """One box after the other, in plain Python."""
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i)):
        rivals = [k for k in kept if ids[k] == ids[index]]
        if all(overlap(boxes[k].tolist(), boxes[index].tolist()) <= iou for k in rivals):
            kept.append(index)
    return kept


@given(cases())
def test_nms_keeps_the_boxes_of_a_slow_reference(case: Case) -> None:
    assert suppress_non_maxima(*case).tolist() == slow(*case)


@given(cases())
def test_nms_is_idempotent(case: Case) -> None:
    boxes, scores, ids, iou = case
    kept = suppress_non_maxima(boxes, scores, ids, iou)
    assert suppress_non_maxima(boxes[kept], scores[kept], ids[kept], iou).tolist() == list(range(len(kept)))


def test_the_better_of_two_overlapping_boxes_stays_and_other_classes_are_unaffected() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10]], np.float32)
    scores, ids = np.array([0.5, 0.9, 0.6], np.float32), np.array([0, 0, 1], np.int32)
    assert suppress_non_maxima(boxes, scores, ids, 0.5).tolist() == [1, 2]


def test_boxes_that_overlap_exactly_as_much_as_allowed_both_stay() -> None:
    """The limit is what may be shared; only more is too much."""
    boxes = np.array([[0, 0, 2, 1], [1, 0, 3, 1]], np.float32)  # a third of the union
    scores, ids = np.array([0.9, 0.8], np.float32), np.zeros(2, np.int32)
    assert len(suppress_non_maxima(boxes, scores, ids, 1 / 3)) == 2
    assert len(suppress_non_maxima(boxes, scores, ids, 0.33)) == 1
