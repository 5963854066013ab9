"""How alike two precisions of a model are: boxes that both see, how far scores moved, AP where known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionedge.frames import Detections
from visionedge.inference.nms import overlaps

CONFIDENCE = 0.3
"""Boxes from this score on count: it is what the module reports unless told otherwise."""

LEAST_BOXES = 10
"""With fewer, pictures say nothing of a variant."""

_SAME_IOU = 0.9
# A box just above the line in one precision may be just below it in the other.
_PARTNER_CONFIDENCE = CONFIDENCE / 2


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a variant may cost: boxes without a partner (share), mean shift of scores, loss of AP."""

    unmatched: float = 0.10
    shift: float = 0.05
    ap_loss: float = 0.010


@dataclass(frozen=True, slots=True)
class Precisions:
    """COCO AP (0.50-0.95) and AP50 of fp32 and of the variant, over so many labelled pictures."""

    pictures: int
    ap_fp32: float
    ap: float
    ap50_fp32: float
    ap50: float


@dataclass(frozen=True, slots=True)
class Parity:
    """A variant beside fp32. `boxes` are those that either sees at `CONFIDENCE`.

    `matched` is the share of them that the other sees too: same class, IoU of 0.9 or more, at half that
    score or above. `shift` and `largest_shift` are how far the scores of matched boxes lie apart.
    """

    pictures: int
    boxes: int
    matched: float
    shift: float
    largest_shift: float
    ap: Precisions | None = None

    def refusal(self, tolerance: Tolerance) -> str | None:
        """Why this is not good enough, in one clause; None where it is."""
        if self.boxes < LEAST_BOXES:
            return (
                f"only {self.boxes} boxes were seen on {self.pictures} pictures, too few to judge by"
                f" ({LEAST_BOXES} at least)"
            )
        if 1 - self.matched > tolerance.unmatched:
            return f"only {self.matched:.1%} of the boxes agree, {1 - tolerance.unmatched:.1%} are wanted"
        if self.shift > tolerance.shift:
            return f"scores moved by {self.shift:.3f} on average, {tolerance.shift:.3f} are allowed"
        if self.ap is not None and self.ap.ap_fp32 - self.ap.ap > tolerance.ap_loss:
            lost = self.ap.ap_fp32 - self.ap.ap
            return f"it loses {lost:.4f} of AP {self.ap.ap_fp32:.4f}, {tolerance.ap_loss:.4f} are allowed"
        return None

    def document(self) -> dict[str, Any]:
        """As the report on disk has it."""
        ap = self.ap
        return {
            "pictures": self.pictures,
            "boxes": self.boxes,
            "confidence": CONFIDENCE,
            "iou": _SAME_IOU,
            "matched": round(self.matched, 4),
            "scoreShift": round(self.shift, 4),
            "largestScoreShift": round(self.largest_shift, 4),
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
    def of_document(document: Mapping[str, Any]) -> "Parity":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        ap = document["ap"]
        return Parity(
            int(document["pictures"]),
            int(document["boxes"]),
            _share(document["matched"]),
            _share(document["scoreShift"]),
            _share(document["largestScoreShift"]),
            None
            if ap is None
            else Precisions(
                int(ap["pictures"]),
                _share(ap["fp32"]),
                _share(ap["variant"]),
                _share(ap["fp32Ap50"]),
                _share(ap["variantAp50"]),
            ),
        )


def _share(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not from 0 to 1")
    return float(value)


def compare(
    reference: Sequence[Detections], variant: Sequence[Detections], ap: Precisions | None = None
) -> Parity:
    """Compare what two precisions see on the same pictures; detections from half of `CONFIDENCE` on."""
    partners: list[NDArray[np.float64]] = []
    for some, others in zip(reference, variant, strict=True):
        same = _same(some, others)
        partners += [_shifts(some, others, same), _shifts(others, some, same.T)]
    shifts = np.concatenate(partners) if partners else np.zeros(0)
    found = shifts[np.isfinite(shifts)]
    return Parity(
        pictures=len(reference),
        boxes=len(shifts),
        matched=len(found) / len(shifts) if len(shifts) else 0.0,
        shift=float(found.mean()) if len(found) else 0.0,
        largest_shift=float(found.max(initial=0.0)),
        ap=ap,
    )


def _same(some: Detections, others: Detections) -> NDArray[np.float64]:
    """IoU of each with each where the class is the same, else 0: (n, m)."""
    boxes = np.concatenate([some.boxes, others.boxes]).astype(np.float64)
    n = len(some)
    result: NDArray[np.float64] = overlaps(boxes)[:n, n:] * (
        some.class_ids[:, None] == others.class_ids[None, :]
    )
    return result


def _shifts(some: Detections, others: Detections, same: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the score of each counting box lies from its partner's; NaN where it has none."""
    counting = some.scores >= CONFIDENCE
    if not len(others):
        return np.full(int(counting.sum()), np.nan)
    candidates = np.where(others.scores >= _PARTNER_CONFIDENCE, same, 0.0)[counting]
    best = candidates.argmax(axis=1)
    matched = candidates.max(axis=1) >= _SAME_IOU
    away = np.abs(some.scores[counting].astype(np.float64) - others.scores[best])
    shifts: NDArray[np.float64] = np.where(matched, away, np.nan)
    return shifts
