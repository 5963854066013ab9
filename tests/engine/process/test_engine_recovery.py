"""The engine process with every scripted fault of a device: its events and the recovery.

The device is simulated: a session on the CPU that claims to be CUDA and fails as scripted.
"""

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fault_script import FaultScript
from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.faults import EngineError, EngineUnavailableError
from visionedge.engine.interface import EngineEvent, ProcessStatus, RecoveryStatistics
from visionedge.engine.local_engine import open_engine
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.errors import DeviceError
from visionedge.model.model import Model, load_model

pytestmark = pytest.mark.system

IMAGES = pictures(4)
_PACE_S = 0.02  # so that lanes leave some of the machine to children that open


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(TinyDetector().save(tmp_path_factory.mktemp("model") / "tiny.onnx"))


@pytest.fixture(scope="module")
def frame_pool(model: Model) -> Iterator[SharedFramePool]:
    made = SharedFramePool(model.input, 16)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(model: Model) -> np.ndarray:
    """The rows of `IMAGES`."""
    engine = open_engine(model, InferenceConfig(device="cpu"))
    rows = engine.infer(IMAGES).rows
    engine.close()
    return rows


class EngineHarness:
    """An engine with a simulated device, and its events; closed at the end of the test."""

    def __init__(
        self, model: Model, frame_pool: SharedFramePool, faults: FaultScript, **inference: object
    ) -> None:
        config = InferenceConfig.model_validate({"device": "auto", **inference})
        self.news: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.engine = EngineClient(model, config, frame_pool, on_change=self.news.put, inject=faults.path)

    def __enter__(self) -> "EngineHarness":
        self.engine.open()
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.close()

    def next_event(self, code: str) -> EngineEvent:
        """Wait for the next event, which must have this code."""
        news = self.news.get(timeout=60)
        assert news.code == code, news
        return news

    @property
    def spare(self) -> int | None:
        """The process that only waits for an order."""
        spare = self.engine._supervisor._workers._spare
        return None if spare is None else spare.pid

    @property
    def state(self) -> tuple[str, str]:
        """The device that computes and the reason code."""
        device = self.engine.info().device
        return device.effective, device.code

    @property
    def process(self) -> ProcessStatus:
        process = self.engine.info().process
        assert process is not None
        return process

    @property
    def recovery(self) -> RecoveryStatistics:
        recovery = self.engine.info().recovery
        assert recovery is not None
        return recovery


class LoadThreads:
    """Two threads that compute without end; `failed` counts the batches that did not come to anything."""

    def __init__(self, engine: EngineClient, expected: np.ndarray) -> None:
        self._engine = engine
        self._expected = expected
        self._stop = threading.Event()
        self.failed = 0
        self.wrong = 0
        self.done = 0
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(count,)) for count in (1, 3)]

    def __enter__(self) -> "LoadThreads":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 10) -> None:
        """Wait until so many more batches are computed."""
        with self._changed:
            until = self.done + count
            assert self._changed.wait_for(lambda: self.done >= until, 60)

    def _run(self, count: int) -> None:
        while not self._stop.is_set():
            try:
                self._stop.wait(_PACE_S)
                rows = self._engine.infer(IMAGES[:count]).rows
            except EngineError:
                self.failed += 1
                continue
            with self._changed:
                self.done += 1
                self.wrong += not np.array_equal(rows, self._expected[:count])
                self._changed.notify_all()


LOSSES = {
    "cuda": {
        "sticky": ("cuda-error", "sticky", "CUDA failure 700: an illegal memory access was encountered"),
        "refused": ("device-failed", "refused", "NOT_IMPLEMENTED"),
        "nan": ("wrong-rows", "garbage", "output contains NaN or infinity"),
    },
    "openvino-gpu": {
        "sticky": ("device-failed", "sticky", "[GPU] clFlush, error code: -5 CL_OUT_OF_RESOURCES"),
        "gone": ("device-failed", "device-gone", "no supported devices found"),
    },
}


@pytest.mark.parametrize("device", LOSSES)
def test_after_a_fault_the_cpu_takes_over_until_the_device_returns(
    model: Model,
    frame_pool: SharedFramePool,
    expected: np.ndarray,
    tmp_path: Path,
    *,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    """One engine, fault after fault, two lanes all the time: no row is wrong, none lost at the return."""
    caplog.set_level(logging.INFO)
    faults, losses = FaultScript(tmp_path, device=device), LOSSES[device]
    with (
        EngineHarness(model, frame_pool, faults, device=device) as opened,
        LoadThreads(opened.engine, expected) as lanes,
    ):
        lanes.more()
        assert opened.state == (device, "ok")
        for number, (name, (code, fault, words)) in enumerate(losses.items(), 1):
            if number == 2:
                assert opened.spare is not None
                os.kill(opened.spare, signal.SIGKILL)  # which costs time, no more
            faults.begin(name, "absent")
            lost = opened.next_event("device-lost")
            assert words in lost.message
            assert lost.message.endswith("; the CPU takes over")
            back = opened.next_event("engine-back")
            assert f"effective cpu: {opened.engine.info().device.reason} ({code})" in back.message
            assert opened.state == ("cpu", code)
            lanes.more()
            failed = lanes.failed
            faults.end(name, "absent")
            opened.next_event("device-back")
            lanes.more()
            assert opened.state == (device, "ok")
            assert lanes.failed == failed, "no batch is lost on the way back"
            recovery = opened.recovery
            assert recovery.faults[fault] >= 1
            assert recovery.device_recoveries == number
            frames = opened.engine.info().device_check.parity_results[-1]
            assert (frames.source, frames.pictures, frames.rows) == ("frames", 4, 1.0)
        assert opened.engine.info().unplanned_shapes == 0
    assert lanes.wrong == 0
    assert opened.news.empty()
    logged = [r.getMessage() for r in caplog.records if "is lost:" in r.getMessage()]
    assert len(logged) == len(losses)
    assert "hostname" not in caplog.text


def test_a_batch_that_runs_out_of_memory_is_computed_in_smaller_ones(
    model: Model, frame_pool: SharedFramePool, expected: np.ndarray, tmp_path: Path
) -> None:
    """The process stays, the plan is narrowed, nothing fails; if no picture fits, the device is lost."""
    faults = FaultScript(tmp_path)
    with EngineHarness(model, frame_pool, faults) as opened:
        pid = opened.process.pid
        faults.begin("memory")
        np.testing.assert_array_equal(opened.engine.infer(IMAGES).rows, expected)
        assert "batch size limited to 2" in opened.next_event("plan-narrowed").message
        assert opened.engine.info().plan.buckets == (1, 2)
        assert "did not fit into memory" in opened.engine.info().plan.reason
        np.testing.assert_array_equal(opened.engine.infer(IMAGES).rows, expected)
        assert (opened.process.pid, opened.process.restarts) == (pid, 0)
        assert opened.news.empty()
        spare = opened.spare
        assert spare is not None
        faults.begin("no-memory", "absent")
        with pytest.raises(EngineError):
            opened.engine.infer(IMAGES[:1])
        assert "out of memory" in opened.next_event("device-lost").message
        opened.next_event("engine-back")
        assert (opened.process.pid, opened.spare) == (spare, None), "it was started before"
        assert opened.state == ("cpu", "out-of-memory")
        assert opened.engine.info().unplanned_shapes == 0


def test_a_candidate_that_disagrees_with_the_cpu_is_rejected_until_it_agrees(
    model: Model, frame_pool: SharedFramePool, expected: np.ndarray, tmp_path: Path
) -> None:
    """Reported once for any number of attempts. A candidate that cannot be opened is not reported."""
    faults = FaultScript(tmp_path)
    faults.begin("absent")
    with EngineHarness(model, frame_pool, faults) as opened, LoadThreads(opened.engine, expected) as lanes:
        assert opened.state == ("cpu", "no-device")
        faults.begin("absent-session")
        faults.end("absent")
        _until(lambda: opened.recovery.probes.get("ok", 0) >= 2)
        assert opened.news.empty()
        faults.begin("wrong")
        faults.end("absent-session")
        assert "of its strongest rows match the CPU's" in opened.next_event("parity-refused").message
        tries = opened.recovery.recovery_state.failed_attempts
        _until(lambda: opened.recovery.recovery_state.failed_attempts > tries)
        faults.end("wrong")
        opened.next_event("device-back")
        lanes.more()
        assert opened.state == ("cuda", "ok")
        assert lanes.failed == 0
    assert lanes.wrong == 0


@pytest.mark.parametrize(
    ("parity", "state"),
    [("refuse", ("cpu", "parity-refused")), ("warn", ("cuda", "ok")), ("off", ("cuda", "ok"))],
)
def test_at_the_start_a_device_is_compared_with_the_cpu(
    model: Model, frame_pool: SharedFramePool, tmp_path: Path, parity: str, state: tuple[str, str]
) -> None:
    """`inference.parity` decides about a device with other results."""
    faults = FaultScript(tmp_path, first_s=60.0)
    faults.begin("wrong")
    with EngineHarness(model, frame_pool, faults, parity=parity) as opened:
        assert opened.state == state
        info = opened.engine.info()
        seen, notes = info.device_check.parity_results, " ".join(info.notes)
        assert [parity_result.refusal is None for parity_result in seen] == (
            [False] if parity == "warn" else []
        )
        assert ("of its strongest rows match the CPU's" in notes) is (parity == "warn")


def test_hold_computes_nothing_until_the_device_is_available(
    model: Model, frame_pool: SharedFramePool, expected: np.ndarray, tmp_path: Path
) -> None:
    """At the start and after a loss; the reason is reported."""
    faults = FaultScript(tmp_path)
    faults.begin("absent")
    opened = EngineHarness(model, frame_pool, faults, device="cuda", fallback="hold")
    opening = threading.Thread(target=opened.engine.open)
    opening.start()
    assert "waiting for it (inference.fallback: hold)" in opened.next_event("device-held").message
    with pytest.raises(EngineUnavailableError, match="no CUDA-capable device is detected"):
        opened.engine.info()
    faults.end("absent")
    opened.next_event("device-back")
    opening.join()
    np.testing.assert_array_equal(opened.engine.infer(IMAGES).rows, expected)
    faults.begin("sticky", "absent")
    with pytest.raises(EngineError):
        opened.engine.infer(IMAGES)
    assert "waiting for it" in opened.next_event("device-lost").message
    with pytest.raises(EngineUnavailableError, match="cuda is lost: CUDA failure 700"):
        opened.engine.infer(IMAGES)
    assert opened.process.pid is None
    opened.engine.close()


def test_exit_ends_with_3_when_the_device_is_lost(
    model: Model, frame_pool: SharedFramePool, tmp_path: Path
) -> None:
    faults = FaultScript(tmp_path)
    with EngineHarness(model, frame_pool, faults, fallback="exit") as opened:
        assert opened.spare is None, "there is nothing to take over with"
        faults.begin("crashed")
        with pytest.raises(EngineUnavailableError):
            opened.engine.infer(IMAGES)
        lost = opened.next_event("device-lost")
        assert lost.exit_code == 3
        assert "died of signal 11 (SIGSEGV)" in lost.message


def test_a_device_that_crashes_its_process_at_the_start_falls_back_to_the_cpu(
    model: Model, frame_pool: SharedFramePool, expected: np.ndarray, tmp_path: Path
) -> None:
    """The module starts degraded and probes the device."""
    faults = FaultScript(tmp_path, first_s=60.0)
    faults.begin("crashes-opening")
    with EngineHarness(model, frame_pool, faults) as opened:
        assert opened.state == ("cpu", "engine-died")
        assert opened.recovery.recovery_state.stage == "waiting"
        np.testing.assert_array_equal(opened.engine.infer(IMAGES).rows, expected)
    with pytest.raises(DeviceError) as caught:
        EngineHarness(model, frame_pool, faults, fallback="exit", device="cuda").engine.open()
    assert (caught.value.exit_code, caught.value.code) == (3, "engine-died")


def _until(condition: Callable[[], bool], tries: int = 600) -> None:
    """Poll for a change without an event."""
    pause = threading.Event()
    for _ in range(tries):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError("never")
