"""Whether a device computes what the CPU does: told from rows, with what floats may differ by."""

import queue
import threading
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import DeviceVerdict, EffectiveDevice, ReasonCode
from visionedge.engine.device.faults import EngineError, EngineUnavailableError, Fault
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.device_parity import ParityResult, SpeedCheck, check_against_cpu, compare_rows
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.process.candidate_comparison import (
    RecentPictures,
    compare_candidate,
    is_model_fault,
)
from visionedge.engine.process.device_prober import DeviceProber
from visionedge.model.model import load_model
from visionedge.model.postprocess import Rows
from visionedge.runtime.threads import ThreadGroup

IMAGES = pictures(3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    model = load_model(TinyDetector().save(tmp_path_factory.mktemp("model") / "tiny.onnx"))
    return open_engine(model, InferenceConfig(device="cpu"))


@pytest.fixture(scope="module")
def expected(engine: LocalEngine) -> Rows:
    return engine.infer(IMAGES).rows


def test_the_same_rows_agree_in_whatever_order(engine: LocalEngine, expected: Rows) -> None:
    shuffled = np.random.default_rng(1).permuted(expected, axis=1)
    order = np.random.default_rng(1).permutation(expected.shape[1])
    for rows in (expected, expected[:, order]):
        seen = compare_rows(engine.info().model, expected, rows, "frames")
        assert (seen.rows, seen.refusal, seen.pictures) == (1.0, None, 3)
        assert seen.boxes.matched == 1.0
    assert compare_rows(engine.info().model, expected, shuffled, "frames").refusal is not None


@pytest.mark.parametrize("seed", range(5))
def test_what_floats_may_differ_by_is_agreed_with(engine: LocalEngine, expected: Rows, seed: int) -> None:
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
def test_a_device_that_computes_something_else_is_refused(
    engine: LocalEngine, expected: Rows, spoiled: Callable[[Rows], Rows]
) -> None:
    seen = compare_rows(engine.info().model, expected, spoiled(expected), "frames")
    assert seen.refusal is not None
    assert ParityResult.from_document(seen.document()).refusal == seen.refusal


def test_where_nothing_is_seen_nothing_is_judged(engine: LocalEngine, expected: Rows) -> None:
    nothing = expected.copy()
    nothing[..., 4] = 1e-4
    seen = compare_rows(engine.info().model, nothing, nothing[:, ::-1], "frames")
    assert (seen.rows, seen.refusal) == (None, None)
    assert seen.message == "on 3 frames neither it nor the CPU detected anything"
    assert compare_rows(engine.info().model, nothing, expected, "frames").refusal is not None, (
        "only one of them saw nothing"
    )


def test_its_document_comes_back_as_it_was(engine: LocalEngine, expected: Rows) -> None:
    seen = compare_rows(engine.info().model, expected, expected, "frames")
    assert ParityResult.from_document(seen.document()) == seen
    assert seen.document()["refusal"] is None


@pytest.mark.parametrize(
    ("device_ms", "cpu_ms", "doubted"),
    [(1.0, 20.0, False), (10.0, 20.0, False), (14.0, 20.0, True), (30.0, 20.0, True)],
)
def test_a_device_no_faster_than_a_core_of_the_cpu_is_doubted(
    device_ms: float, cpu_ms: float, doubted: bool
) -> None:
    doubt = SpeedCheck(device_ms, cpu_ms).doubt("cuda")
    assert (doubt is not None) is doubted
    if doubt is not None:
        assert doubt.startswith(f"cuda takes {device_ms:.1f} ms for a picture, one core of the CPU 20.0 ms")


def test_an_engine_is_held_against_the_cpu_and_timed(engine: LocalEngine) -> None:
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


# --- the candidate and the newest pictures ------------------------------------------------------------------


class Child:
    """Answers with rows, or fails."""

    def __init__(self, answer: Rows | EngineError) -> None:
        self._answer = answer

    def compute(self, _pictures: PictureBatch, min_score: float | None) -> Rows:
        assert min_score is None, "all rows are compared"
        if isinstance(self._answer, EngineError):
            raise self._answer
        return self._answer


class Frames(RecentPictures):
    """Some pictures are there at once."""

    def __init__(self, *images: np.ndarray) -> None:
        super().__init__()
        self._images = list(images)

    def gather(self, timeout_s: float) -> list[np.ndarray]:
        assert timeout_s > 0
        return self._images


def test_a_candidate_and_the_cpu_compute_the_same_pictures(engine: LocalEngine, expected: Rows) -> None:
    same, other = Child(expected), Child(np.zeros_like(expected))
    seen = compare_candidate(engine.info().model, same, same, Frames(*IMAGES))
    assert seen.parity_result is not None
    assert seen.parity_result.refusal is None
    seen = compare_candidate(engine.info().model, same, other, Frames(*IMAGES))
    assert seen.parity_result is not None
    assert seen.parity_result.refusal is not None


def test_without_frames_or_a_cpu_that_answers_its_opening_counts(engine: LocalEngine, expected: Rows) -> None:
    """So it is never waited for in vain."""
    same, gone = Child(expected), Child(EngineUnavailableError("the engine is restarting"))
    for serving, images in ((None, Frames(*IMAGES)), (same, Frames()), (gone, Frames(*IMAGES))):
        seen = compare_candidate(engine.info().model, serving, same, images)
        assert (seen.parity_result, seen.loss) == (None, None)
        assert seen.message


def test_a_candidate_that_fails_over_them_is_lost(engine: LocalEngine, expected: Rows) -> None:
    failing = Child(EngineError("CUDA failure 700: an illegal memory access was encountered", Fault.STICKY))
    seen = compare_candidate(engine.info().model, Child(expected), failing, Frames(*IMAGES))
    assert seen.loss is not None
    assert seen.loss.code is ReasonCode.CUDA_ERROR


def test_whatever_happens_there_is_an_answer(
    engine: LocalEngine, expected: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of another shape, say: that is told, and the candidate is not used."""
    seen = compare_candidate(engine.info().model, Child(expected), Child(expected[:1]), Frames(*IMAGES))
    assert seen.loss is not None
    assert seen.loss.code is ReasonCode.DEVICE_FAILED
    assert "could not be compared" in caplog.text


def test_a_device_that_cannot_even_be_asked_is_not_usable(caplog: pytest.LogCaptureFixture) -> None:
    def failing(_device: EffectiveDevice) -> DeviceVerdict:
        raise OSError("no more processes")

    answers: queue.SimpleQueue[DeviceVerdict] = queue.SimpleQueue()
    probing = DeviceProber(ThreadGroup(lambda _name, _error: None), failing)
    probing.start("cuda", lambda _device, verdict: answers.put(verdict))
    verdict = answers.get(timeout=20)
    assert (verdict.code, verdict.reason) == (
        ReasonCode.PROBE_CRASHED,
        "could not be probed: no more processes",
    )
    assert probing.counts == {"probe-crashed": 1}
    assert "no more processes" in caplog.text


def test_rows_that_are_no_numbers_on_the_cpu_either_are_the_models_doing(expected: Rows) -> None:
    suspect_pictures = [IMAGES[0]]
    assert is_model_fault(Child(np.full_like(expected, np.nan)), suspect_pictures)
    assert not is_model_fault(Child(expected), suspect_pictures)
    assert not is_model_fault(Child(EngineUnavailableError("gone")), suspect_pictures)
    assert not is_model_fault(None, suspect_pictures)
    assert not is_model_fault(Child(np.full_like(expected, np.nan)), [])


def test_pictures_are_kept_only_while_somebody_wants_them() -> None:
    """As copies: what they lie in is written again."""
    recent, got = RecentPictures(3), threading.Event()
    recent.offer(IMAGES)
    kept: list[np.ndarray] = []

    def gather() -> None:
        kept.extend(recent.gather(20))
        got.set()

    thread = threading.Thread(target=gather)
    thread.start()
    images = IMAGES.copy()
    while not got.is_set():
        recent.offer(images[:2])
    thread.join()
    images.fill(0)
    assert len(kept) == 3
    np.testing.assert_array_equal(kept[1], IMAGES[1])
    recent.record_invalid_output(IMAGES)
    assert len(recent.suspect_pictures) == 3


def test_nobody_waits_for_pictures_of_a_module_that_ends() -> None:
    recent = RecentPictures()
    thread = threading.Thread(target=recent.gather, args=(60,))
    thread.start()
    while thread.is_alive():
        recent.close()
    assert recent.gather(0) == []
