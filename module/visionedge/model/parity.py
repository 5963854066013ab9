"""Comparison of two precisions of a model: matching boxes, shift of scores, and AP if there are labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionedge.frames.types import Detections
from visionedge.model.postprocess import compute_iou

CONFIDENCE = 0.3
"""Boxes from this score on are compared: the default of `inference.confidence`."""

MIN_BOXES = 10
"""With fewer boxes a comparison is not possible."""

MATCH_IOU = 0.9
"""The least IoU of two boxes that match."""

SMALL_BOX_MATCH_IOU = 0.75
"""The same for small boxes, such as those of the bundled clip, where one pixel is a tenth of a box."""

# A box just above the limit in one precision can be just below it in the other.
MATCH_CONFIDENCE = CONFIDENCE / 2


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits for a variant: share of unmatched boxes, mean shift of scores, loss of AP."""

    unmatched: float = 0.10
    score_shift: float = 0.05
    ap_loss: float = 0.010

    def for_other_pictures(self) -> "Tolerance":
        """For pictures unlike the calibration images: twice the score shift; bad variants still exceed it."""
        return replace(self, score_shift=2 * self.score_shift)


@dataclass(frozen=True, slots=True)
class ApComparison:
    """COCO AP (0.50-0.95) and AP50 of fp32 and of the variant, over so many labelled pictures."""

    pictures: int
    ap_fp32: float
    ap: float
    ap50_fp32: float
    ap50: float


@dataclass(frozen=True, slots=True)
class Parity:
    """A variant compared with fp32. `boxes`: those that either detects at `CONFIDENCE`.

    `matched`: the share of them that the other detects too, with the same class, an IoU of at least `iou`,
    and at least half of `CONFIDENCE`; each box matches once. `score_shift` and `max_score_shift`: the mean
    and largest difference of matched scores.
    """

    pictures: int
    boxes: int
    matched: float
    score_shift: float
    max_score_shift: float
    ap: ApComparison | None = None
    iou: float = MATCH_IOU

    def refusal(self, tolerance: Tolerance) -> str | None:
        """Why the variant is not within the tolerance, in one clause; None if it is."""
        if self.boxes < MIN_BOXES:
            return (
                f"only {self.boxes} boxes were detected on {self.pictures} pictures;"
                f" at least {MIN_BOXES} are needed"
            )
        if 1 - self.matched > tolerance.unmatched:
            return f"only {self.matched:.1%} of the boxes agree, {1 - tolerance.unmatched:.1%} are wanted"
        if self.score_shift > tolerance.score_shift:
            return (
                f"scores moved by {self.score_shift:.3f} on average, {tolerance.score_shift:.3f} are allowed"
            )
        if self.ap is not None and self.ap.ap_fp32 - self.ap.ap > tolerance.ap_loss:
            lost = self.ap.ap_fp32 - self.ap.ap
            return f"it loses {lost:.4f} of AP {self.ap.ap_fp32:.4f}, {tolerance.ap_loss:.4f} are allowed"
        return None

    def document(self) -> dict[str, Any]:
        """The JSON of a report on disk."""
        ap = self.ap
        return {
            "pictures": self.pictures,
            "boxes": self.boxes,
            "confidence": CONFIDENCE,
            "iou": self.iou,
            "matched": round(self.matched, 4),
            "scoreShift": round(self.score_shift, 4),
            "largestScoreShift": round(self.max_score_shift, 4),
            "ap": None
            if ap is None
            else {
                "pictures": ap.pictures,
                "fp32": round(ap.ap_fp32, 4),
                "variant": round(ap.ap, 4),
                "fp32Ap50": round(ap.ap50_fp32, 4),
                "variantAp50": round(ap.ap50, 4),
            },
        }

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "Parity":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: the document has another form.
        """
        ap = document["ap"]
        return Parity(
            int(document["pictures"]),
            int(document["boxes"]),
            _check_share(document["matched"]),
            _check_share(document["scoreShift"]),
            _check_share(document["largestScoreShift"]),
            None
            if ap is None
            else ApComparison(
                int(ap["pictures"]),
                _check_share(ap["fp32"]),
                _check_share(ap["variant"]),
                _check_share(ap["fp32Ap50"]),
                _check_share(ap["variantAp50"]),
            ),
            _check_share(document["iou"]),
        )


def _check_share(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not from 0 to 1")
    return float(value)


def compare_detections(
    reference: Sequence[Detections],
    variant: Sequence[Detections],
    ap: ApComparison | None = None,
    *,
    iou: float = MATCH_IOU,
) -> Parity:
    """Compare the detections of two precisions on the same pictures, from half of `CONFIDENCE` on."""
    pairs = zip(reference, variant, strict=True)
    shifts = np.concatenate(
        [np.zeros(0), *(_compute_score_shifts(some, others, iou) for some, others in pairs)]
    )
    found = shifts[np.isfinite(shifts)]
    return Parity(
        pictures=len(reference),
        boxes=len(shifts),
        matched=len(found) / len(shifts) if len(shifts) else 0.0,
        score_shift=float(found.mean()) if len(found) else 0.0,
        max_score_shift=float(found.max(initial=0.0)),
        ap=ap,
        iou=iou,
    )


def _compute_score_shifts(some: Detections, others: Detections, iou: float) -> NDArray[np.float64]:
    """The score difference of each box from `CONFIDENCE` on, of both sides, to its match; NaN without one."""
    sides = [np.full(len(some), np.nan), np.full(len(others), np.nan)]
    for one, other in _match_boxes(some, others, iou):
        away = abs(float(some.scores[one]) - float(others.scores[other]))
        sides[0][one] = sides[1][other] = away
    counting = [side[seen.scores >= CONFIDENCE] for side, seen in zip(sides, (some, others), strict=True)]
    return np.concatenate(counting)


def _match_boxes(some: Detections, others: Detections, iou: float) -> Iterator[tuple[int, int]]:
    """Pairs of boxes of the same object, each box in one pair at most.

    Pairs with the largest overlap come first, then those with the most similar scores, because models without
    suppression can output one box twice. Remaining ties are decided by the values alone, so that exchanging
    the two sides does not change the pairs.
    """
    same = _compute_match_iou(some, others)
    ways = sorted(
        (
            _match_rank(float(same[one, other]), _sort_values(some, one), _sort_values(others, other)),
            one,
            other,
        )
        for one, other in np.argwhere(same >= iou).tolist()
    )
    taken: tuple[set[int], set[int]] = (set(), set())
    for _, one, other in ways:
        if one not in taken[0] and other not in taken[1]:
            taken[0].add(one)
            taken[1].add(other)
            yield one, other


def _sort_values(seen: Detections, index: int) -> list[float]:
    return [float(seen.scores[index]), *seen.boxes[index].tolist()]


def _match_rank(iou: float, one: list[float], other: list[float]) -> tuple[float, float, list[list[float]]]:
    """The sort key of a pair: the smallest is matched first. Exchanging the sides does not change it."""
    return -iou, abs(one[0] - other[0]), sorted([one, other], reverse=True)


def _compute_match_iou(some: Detections, others: Detections) -> NDArray[np.float64]:
    """IoU of each box with each of the other side, (n, m); 0 for pairs that cannot match.

    Two boxes match only if their classes are equal, one score is at least `CONFIDENCE` and the other at least
    half of it.
    """
    boxes = np.concatenate([some.boxes, others.boxes]).astype(np.float64)
    n = len(some)
    lower = np.minimum(some.scores[:, None], others.scores[None, :])
    upper = np.maximum(some.scores[:, None], others.scores[None, :])
    alike = some.class_ids[:, None] == others.class_ids[None, :]
    fit = alike & (upper >= CONFIDENCE) & (lower >= MATCH_CONFIDENCE)
    result: NDArray[np.float64] = compute_iou(boxes)[:n, n:] * fit
    return result
