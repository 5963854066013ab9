"""Whether a candidate detects the same as onnxruntime in fp32 on the CPU."""

from pathlib import Path

import numpy as np
import pytest

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.candidate_parity import (
    RUNTIME_TOLERANCES,
    OutputDistance,
    check_agreement,
    check_finite,
    check_integers,
    check_rows,
)
from visionedge.engine.engine_choice import CandidateAgreement
from visionedge.engine.local_engine import open_engine
from visionedge.frames.types import Detections
from visionedge.model.model import load_model
from visionedge.model.parity import Tolerance

WIDE = Tolerance(score_shift=0.1)


def seen(count: int, score: float = 0.8, first: int = 0) -> list[Detections]:
    """So many boxes side by side on one picture."""
    left = np.arange(first, first + count)[:, None] * 0.01
    boxes = np.concatenate([left, left * 0, left + 0.009, left * 0 + 0.5], axis=1).astype(np.float32)
    return [Detections(boxes, np.full(count, score, np.float32), np.zeros(count, np.int32))]


def must_not_compare() -> CandidateAgreement:
    raise AssertionError("there were boxes enough")


def test_agreeing_boxes_admit_the_candidate_and_are_reported() -> None:
    found = check_agreement(seen(20), seen(20, 0.79), WIDE, must_not_compare)
    assert found == CandidateAgreement("100% of 40 boxes agree here, scores differ by 0.0100")


def test_disagreeing_boxes_reject_the_candidate_with_the_figure() -> None:
    """Ten of each side have no partner."""
    found = check_agreement(seen(20), seen(20, first=10), WIDE, must_not_compare)
    assert found.refusal == "only 50.0% of the boxes agree, 90.0% are wanted"


def test_the_tolerance_of_the_candidate_counts() -> None:
    others = seen(20, first=4)
    assert check_agreement(seen(20), others, WIDE, must_not_compare).refusal is not None
    assert check_agreement(seen(20), others, Tolerance(unmatched=0.3), must_not_compare).refusal is None


def test_another_runtime_in_fp32_may_differ_less_than_one_in_bf16() -> None:
    moved = seen(20, 0.79)
    assert check_agreement(seen(20), moved, RUNTIME_TOLERANCES["fp32"], must_not_compare).refusal is not None
    assert check_agreement(seen(20), moved, RUNTIME_TOLERANCES["bf16"], must_not_compare).refusal is None
    far = seen(20, 0.7)
    assert check_agreement(seen(20), far, RUNTIME_TOLERANCES["bf16"], must_not_compare).refusal is not None


def test_with_too_few_boxes_the_outputs_are_compared() -> None:
    """A model for other things than the clip shows."""
    outputs = CandidateAgreement("", "they differ")
    assert check_agreement(seen(2), seen(2), WIDE, lambda: outputs) is outputs


@pytest.mark.parametrize(
    ("distance", "refusal"),
    [
        (OutputDistance(quantization=0.15, kernels=0.05), None),
        (
            OutputDistance(quantization=0.15, kernels=0.4),
            "the integer kernels here add a difference of 0.400 to the 0.150 of quantization",
        ),
        (
            OutputDistance(0.1, float("nan")),
            "the integer kernels here add a difference of nan to the 0.100 of quantization",
        ),
        (None, None),
    ],
)
def test_integer_kernels_may_change_the_outputs_less_than_quantization(
    distance: OutputDistance | None, refusal: str | None
) -> None:
    """Without integers the report has to do."""
    found = check_integers(distance)
    assert found.refusal == refusal
    assert bool(found.message) == (refusal is None)


def test_rows_that_move_are_refused_and_equal_ones_are_not(tmp_path: Path) -> None:
    model = load_model(TinyDetector().save(tmp_path / "tiny.onnx"))
    rows = open_engine(model, InferenceConfig(device="cpu")).infer(pictures(3)).rows
    assert check_rows(model, rows, rows).refusal is None
    moved = rows.copy()
    moved[..., :4] += 25
    refusal = check_rows(model, rows, moved).refusal
    assert refusal is not None
    assert "strongest rows match" in refusal


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(wrong: float) -> None:
    rows = np.zeros((2, 5, 6), np.float32)
    assert check_finite(rows) is None
    rows[1, 4, 2] = wrong
    assert check_finite(rows) == CandidateAgreement("", "its output contains NaN or infinity")
