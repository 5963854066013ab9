"""Whether a device computes what the CPU does: told from rows, with what floats may differ by."""

from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device_parity import ParityResult, SpeedCheck, check_against_cpu, compare_rows
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.model.model import load_model
from visionedge.model.postprocess import Rows

IMAGES = pictures(3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    model = load_model(TinyDetector().save(tmp_path_factory.mktemp("model") / "tiny.onnx"))
    return open_engine(model, InferenceConfig(device="cpu"))


@pytest.fixture(scope="module")
def expected(engine: LocalEngine) -> Rows:
    return engine.infer(IMAGES).rows


def test_equal_rows_agree_in_any_order(engine: LocalEngine, expected: Rows) -> None:
    shuffled = np.random.default_rng(1).permuted(expected, axis=1)
    order = np.random.default_rng(1).permutation(expected.shape[1])
    for rows in (expected, expected[:, order]):
        seen = compare_rows(engine.info().model, expected, rows, "frames")
        assert (seen.rows, seen.refusal, seen.pictures) == (1.0, None, 3)
        assert seen.boxes.matched == 1.0
    assert compare_rows(engine.info().model, expected, shuffled, "frames").refusal is not None


@pytest.mark.parametrize("seed", range(5))
def test_float_rounding_differences_agree(engine: LocalEngine, expected: Rows, seed: int) -> None:
    """More than ten bits of mantissa, as TF32 has, ever come to."""
    random = np.random.default_rng(seed)
    rows = expected.copy()
    rows[..., :4] += random.normal(0, 0.1, rows[..., :4].shape).astype(np.float32)
    rows[..., 4] *= 1 + random.normal(0, 2e-3, rows.shape[:2]).astype(np.float32)
    assert compare_rows(engine.info().model, expected, rows, "pictures").refusal is None


def spoil(how: Callable[[Rows], object]) -> Callable[[Rows], Rows]:
    def spoiled(rows: Rows) -> Rows:
        copy = rows.copy()
        how(copy)
        return copy

    return spoiled


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param(spoil(lambda rows: rows.fill(0.0)), id="zeros"),
        pytest.param(spoil(lambda rows: rows.fill(np.nan)), id="no numbers"),
        pytest.param(spoil(lambda rows: rows[..., 0].fill(np.inf)), id="an infinite edge"),
        pytest.param(spoil(lambda rows: np.add(rows[..., :4], 9, out=rows[..., :4])), id="moved"),
        pytest.param(spoil(lambda rows: np.add(rows[..., 5], 1, out=rows[..., 5])), id="other classes"),
        pytest.param(spoil(lambda rows: np.multiply(rows[..., 4], 0.5, out=rows[..., 4])), id="unsure"),
        pytest.param(lambda rows: rows[[1, 2, 0]], id="pictures in another order"),
        pytest.param(
            lambda rows: np.repeat(rows[:, :1], rows.shape[1], axis=1), id="one row again and again"
        ),
    ],
)
def test_a_device_with_other_results_is_refused(
    engine: LocalEngine, expected: Rows, spoiled: Callable[[Rows], Rows]
) -> None:
    seen = compare_rows(engine.info().model, expected, spoiled(expected), "frames")
    assert seen.refusal is not None
    assert ParityResult.from_document(seen.document()).refusal == seen.refusal


def test_without_rows_nothing_is_judged(engine: LocalEngine, expected: Rows) -> None:
    nothing = expected.copy()
    nothing[..., 4] = 1e-4
    seen = compare_rows(engine.info().model, nothing, nothing[:, ::-1], "frames")
    assert (seen.rows, seen.refusal) == (None, None)
    assert seen.message == "on 3 frames neither it nor the CPU detected anything"
    assert compare_rows(engine.info().model, nothing, expected, "frames").refusal is not None, (
        "only one of them saw nothing"
    )


def test_a_parity_document_reads_back_unchanged(engine: LocalEngine, expected: Rows) -> None:
    seen = compare_rows(engine.info().model, expected, expected, "frames")
    assert ParityResult.from_document(seen.document()) == seen
    assert seen.document()["refusal"] is None


@pytest.mark.parametrize(
    ("device_ms", "cpu_ms", "doubted"),
    [(1.0, 20.0, False), (10.0, 20.0, False), (14.0, 20.0, True), (30.0, 20.0, True)],
)
def test_a_device_not_faster_than_a_cpu_core_is_reported(
    device_ms: float, cpu_ms: float, doubted: bool
) -> None:
    doubt = SpeedCheck(device_ms, cpu_ms).doubt("cuda")
    assert (doubt is not None) is doubted
    if doubt is not None:
        assert doubt.startswith(f"cuda takes {device_ms:.1f} ms for a picture, one core of the CPU 20.0 ms")


def test_an_engine_is_compared_with_the_cpu_and_timed(engine: LocalEngine) -> None:
    """By a clock that goes on by one millisecond at each look."""
    ticks = count(step=1_000_000)
    session = engine._session
    assert session is not None
    device_check = check_against_cpu(
        engine.info().model,
        lambda images: engine.infer(images).rows,
        session,
        IMAGES,
        max_batch=engine.info().plan.max_batch,
        clock=ticks.__next__,
    )
    assert device_check.speed_check == SpeedCheck(1.0 / engine.info().plan.max_batch, 1.0)
    assert [(seen.source, seen.rows) for seen in device_check.parity_results] == [("pictures", 1.0)]
