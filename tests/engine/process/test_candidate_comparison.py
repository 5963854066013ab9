"""A candidate beside the worker on the CPU: both compute the newest frames, and there is always a result."""

import threading

import numpy as np
import pytest

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import ReasonCode
from visionedge.engine.device.faults import EngineError, EngineUnavailableError, Fault
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.process.worker_pool import RecentPictures, compare_candidate, is_model_fault
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


class StubWorker:
    """Answers with rows, or fails."""

    def __init__(self, answer: Rows | EngineError) -> None:
        self._answer = answer

    def compute(self, _pictures: PictureBatch, min_score: float | None) -> Rows:
        assert min_score is None, "all rows are compared"
        if isinstance(self._answer, EngineError):
            raise self._answer
        return self._answer


class StubRecentPictures(RecentPictures):
    """Some pictures are there at once."""

    def __init__(self, *images: np.ndarray) -> None:
        super().__init__()
        self._images = list(images)

    def gather(self, timeout_s: float) -> list[np.ndarray]:
        assert timeout_s > 0
        return self._images


def test_a_candidate_and_the_cpu_compute_the_same_pictures(engine: LocalEngine, expected: Rows) -> None:
    same, other = StubWorker(expected), StubWorker(np.zeros_like(expected))
    seen = compare_candidate(engine.info().model, same, same, StubRecentPictures(*IMAGES))
    assert seen.parity_result is not None
    assert seen.parity_result.refusal is None
    seen = compare_candidate(engine.info().model, same, other, StubRecentPictures(*IMAGES))
    assert seen.parity_result is not None
    assert seen.parity_result.refusal is not None


def test_without_frames_or_a_cpu_answer_a_successful_open_is_enough(engine: LocalEngine, expected: Rows) -> None:
    """So it is never waited for in vain."""
    same, gone = StubWorker(expected), StubWorker(EngineUnavailableError("the engine is restarting"))
    for serving, images in ((None, StubRecentPictures(*IMAGES)), (same, StubRecentPictures()), (gone, StubRecentPictures(*IMAGES))):
        seen = compare_candidate(engine.info().model, serving, same, images)
        assert (seen.parity_result, seen.loss) == (None, None)
        assert seen.message


def test_a_candidate_that_fails_the_comparison_is_lost(engine: LocalEngine, expected: Rows) -> None:
    failing = StubWorker(EngineError("CUDA failure 700: an illegal memory access was encountered", Fault.STICKY))
    seen = compare_candidate(engine.info().model, StubWorker(expected), failing, StubRecentPictures(*IMAGES))
    assert seen.loss is not None
    assert seen.loss.code is ReasonCode.CUDA_ERROR


def test_every_comparison_ends_with_an_answer(
    engine: LocalEngine, expected: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of another shape, say: that is told, and the candidate is not used."""
    seen = compare_candidate(engine.info().model, StubWorker(expected), StubWorker(expected[:1]), StubRecentPictures(*IMAGES))
    assert seen.loss is not None
    assert seen.loss.code is ReasonCode.DEVICE_FAILED
    assert "could not be compared" in caplog.text


def test_nan_rows_on_the_cpu_too_are_blamed_on_the_model(expected: Rows) -> None:
    suspect_pictures = [IMAGES[0]]
    assert is_model_fault(StubWorker(np.full_like(expected, np.nan)), suspect_pictures)
    assert not is_model_fault(StubWorker(expected), suspect_pictures)
    assert not is_model_fault(StubWorker(EngineUnavailableError("gone")), suspect_pictures)
    assert not is_model_fault(None, suspect_pictures)
    assert not is_model_fault(StubWorker(np.full_like(expected, np.nan)), [])


def test_pictures_are_kept_only_while_they_are_requested() -> None:
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


def test_a_stopping_module_ends_the_wait_for_pictures() -> None:
    recent = RecentPictures()
    thread = threading.Thread(target=recent.gather, args=(60,))
    thread.start()
    while thread.is_alive():
        recent.close()
    assert recent.gather(0) == []
