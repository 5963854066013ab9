"""How alike two precisions are said to be, against a slow count, and what is refused."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionedge.frames.types import Detections
from visionedge.model.parity import (
    MIN_BOXES,
    SMALL_BOX_MATCH_IOU,
    ApComparison,
    Parity,
    Tolerance,
    compare_detections,
)

Box = tuple[float, float, float, float, float, int]
"""left, top, right, bottom, score, class."""

GOOD = Parity(pictures=8, boxes=100, matched=0.95, score_shift=0.01, max_score_shift=0.1)


def detections(*boxes: Box) -> Detections:
    ordered = sorted(boxes, key=lambda box: -box[4])
    return Detections(
        np.array([box[:4] for box in ordered], np.float32).reshape(-1, 4),
        np.array([box[4] for box in ordered], np.float32),
        np.array([box[5] for box in ordered], np.int32),
    )


def slow_iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union


def slow_partners(some: list[Box], others: list[Box]) -> int:
    """How many pairs can be made at most, each box used once: every way to make them is tried."""
    if not some:
        return 0
    first, *rest = some
    ways = [slow_partners(rest, others)]
    for index, other in enumerate(others):
        sure = max(first[4], other[4]) >= 0.3 and min(first[4], other[4]) >= 0.15
        if sure and first[5] == other[5] and slow_iou(first, other) >= 0.9:
            ways.append(1 + slow_partners(rest, others[:index] + others[index + 1 :]))
    return max(ways)


def as_float32(value: float) -> float:
    return float(np.float32(value))


coordinates = st.sampled_from([0.1, 0.102, 0.12, 0.5, 0.505, 0.52, 0.9]).map(as_float32)
boxes = st.builds(
    lambda x, y, score, kind: (x, y, as_float32(x + 0.3), as_float32(y + 0.4), score, kind),
    coordinates,
    coordinates,
    st.sampled_from([0.05, 0.14, 0.2, 0.29, 0.31, 0.6]).map(as_float32),
    st.integers(0, 1),
)


@settings(deadline=None)
@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=5))
def test_each_box_matches_at_most_one_other(some: list[Box], others: list[Box]) -> None:
    """No more boxes are matched than pairs can be made, and at least half as many."""
    parity = compare_detections([detections(*some)], [detections(*others)])
    counting = sum(box[4] >= 0.3 for box in (*some, *others))
    most = slow_partners(some, others)
    matched = round(parity.matched * parity.boxes)
    assert parity.boxes == counting
    assert most / 2 <= matched <= 2 * most


@settings(deadline=None)
@given(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6))
def test_parity_is_symmetric(some: list[Box], others: list[Box]) -> None:
    """Losses and inventions count the same, and so do shifts."""
    forth, back = (
        compare_detections([detections(*a)], [detections(*b)]) for a, b in ((some, others), (others, some))
    )
    assert (forth.boxes, forth.matched, forth.max_score_shift) == (
        back.boxes,
        back.matched,
        back.max_score_shift,
    )
    assert forth.score_shift == pytest.approx(back.score_shift)


@settings(deadline=None)
@given(st.lists(boxes, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_parity_does_not_depend_on_the_order_of_boxes(some: list[Box], order: random.Random) -> None:
    """Boxes of one score may stand anyhow."""
    shuffled = order.sample(some, len(some))
    assert compare_detections([detections(*some)], [detections(*shuffled)]).matched in (0.0, 1.0)


@settings(deadline=None)
@given(st.lists(boxes, min_size=1, max_size=6))
def test_equal_detections_agree_fully(some: list[Box]) -> None:
    """Nothing is unmatched and no score moves."""
    parity = compare_detections([detections(*some)], [detections(*some)])
    assert parity.score_shift == parity.max_score_shift == 0
    assert parity.matched == (1.0 if parity.boxes else 0.0)


def test_equal_boxes_match_by_the_nearest_score() -> None:
    """A model that suppresses nothing may give one box twice; neither is taken for the other."""
    place = (0.1, 0.1, 0.4, 0.4)
    twice = [detections((*place, 0.9, 0), (*place, 0.4, 0)), detections((*place, 0.8, 0), (*place, 0.5, 0))]
    parity = compare_detections(twice[:1], twice[1:])
    assert (parity.boxes, parity.matched) == (4, 1.0)
    assert parity.max_score_shift == pytest.approx(0.1)


def test_one_box_does_not_match_two() -> None:
    """One of the two has been lost."""
    place = (0.1, 0.1, 0.4, 0.4)
    parity = compare_detections(
        [detections((*place, 0.9, 0), (*place, 0.8, 0))], [detections((*place, 0.8, 0))]
    )
    assert (parity.boxes, parity.score_shift) == (3, 0)
    assert parity.matched == pytest.approx(2 / 3)


def test_the_nearer_box_matches() -> None:
    """Of two that overlap enough the better one, though the other has the same score."""
    near, far = (0.1, 0.1, 0.4, 0.4), (0.1, 0.1, 0.4, 0.415)
    parity = compare_detections([detections((*near, 0.6, 0))], [detections((*far, 0.6, 0), (*near, 0.5, 0))])
    assert parity.boxes == 3
    assert parity.matched == pytest.approx(2 / 3)
    assert parity.score_shift == pytest.approx(0.1)


def test_a_score_shift_is_reported_with_both_scores() -> None:
    """0.6 here and 0.5 there is a shift of 0.1."""
    parity = compare_detections(
        [detections((0.1, 0.1, 0.4, 0.4, 0.6, 0))], [detections((0.1, 0.1, 0.4, 0.4, 0.5, 0))]
    )
    assert (parity.boxes, parity.matched) == (2, 1.0)
    assert parity.score_shift == pytest.approx(0.1) == pytest.approx(parity.max_score_shift)


def test_a_box_that_only_the_variant_finds_counts_against_it() -> None:
    """Inventions are as bad as losses."""
    parity = compare_detections([detections()], [detections((0.1, 0.1, 0.4, 0.4, 0.6, 0))])
    assert (parity.boxes, parity.matched) == (1, 0.0)


def with_ap(loss: float) -> Parity:
    return dataclasses.replace(GOOD, ap=ApComparison(64, 0.30, 0.30 - loss, 0.45, 0.45 - loss))


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        (dataclasses.replace(GOOD, boxes=MIN_BOXES - 1), "at least 10 are needed"),
        (dataclasses.replace(GOOD, matched=0.8), "only 80.0% of the boxes agree"),
        (dataclasses.replace(GOOD, score_shift=0.2), "scores moved by 0.200 on average"),
        (with_ap(0.02), "it loses 0.0200 of AP 0.3000"),
    ],
)
def test_a_variant_that_differs_too_much_is_refused_with_the_figure(parity: Parity, words: str) -> None:
    """Each limit by itself."""
    refusal = parity.refusal(Tolerance())
    assert refusal is not None
    assert words in refusal


def test_a_variant_that_agrees_is_not_refused() -> None:
    """With labels or without; and a wider tolerance takes more."""
    assert GOOD.refusal(Tolerance()) is None
    assert with_ap(0.005).refusal(Tolerance()) is None
    assert dataclasses.replace(GOOD, matched=0.8).refusal(Tolerance(unmatched=0.25)) is None


def test_small_boxes_have_a_larger_tolerance() -> None:
    """At an IoU of 0.8 they are one thing for those that ask for 0.75; the report says what was asked for."""
    pair = [detections((0.1, 0.1, 0.2, 0.2, 0.6, 0))], [detections((0.1, 0.1, 0.2, 0.225, 0.6, 0))]
    assert compare_detections(*pair).matched == 0.0
    small = compare_detections(*pair, iou=SMALL_BOX_MATCH_IOU)
    assert (small.matched, small.document()["iou"]) == (1.0, 0.75)


def test_on_other_pictures_the_score_tolerance_is_twice_as_large() -> None:
    """And no more boxes may be lost."""
    moved = dataclasses.replace(GOOD, score_shift=0.08)
    assert moved.refusal(Tolerance()) is not None
    assert moved.refusal(Tolerance().for_other_pictures()) is None
    assert dataclasses.replace(GOOD, score_shift=0.18).refusal(Tolerance().for_other_pictures()) is not None
    assert dataclasses.replace(GOOD, matched=0.8).refusal(Tolerance().for_other_pictures()) is not None


@pytest.mark.parametrize("parity", [GOOD, with_ap(0.005), dataclasses.replace(GOOD, iou=SMALL_BOX_MATCH_IOU)])
def test_a_report_reads_back_as_it_was_written(parity: Parity) -> None:
    """With and without AP."""
    assert Parity.from_document(parity.document()) == parity


@pytest.mark.parametrize("key", ["matched", "boxes", "ap"])
def test_a_damaged_report_is_ignored(key: str) -> None:
    """A missing key, or a share above 1, is an error and no parity."""
    document = GOOD.document()
    del document[key]
    with pytest.raises(KeyError):
        Parity.from_document(document)
    with pytest.raises(ValueError, match="not from 0 to 1"):
        Parity.from_document({**GOOD.document(), "matched": 1.5})
