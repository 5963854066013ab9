"""The worker processes of an engine: started, followed to their end, and one spare.

What happens to a worker is reported as an event, from the thread that follows it.
"""

import contextlib
import logging
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.devices import (
    DeviceVerdict,
    EffectiveDevice,
    ProbeOutput,
    ReasonCode,
    classify_device_loss,
    probe_device,
    run_probe,
)
from visionedge.engine.device.faults import EngineError, Fault
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.device_parity import ParityResult, compare_rows
from visionedge.engine.interface import EngineInfo
from visionedge.engine.plan import Plan
from visionedge.engine.process.protocol import StartRequest
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.worker import Worker, WorkerLimits
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)


NOT_NEEDED = "is not needed any more"


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has opened its engine."""

    worker: Worker
    info: EngineInfo


@dataclass(frozen=True, slots=True)
class WorkerStartFailed:
    """A worker could not open its engine; its process has ended."""

    worker: Worker
    error: Exception


@dataclass(frozen=True, slots=True)
class PlanReduced:
    """A worker uses smaller batches, because larger ones do not fit into memory."""

    worker: Worker
    plan: Plan


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The process of a worker that was ready has ended, for this reason."""

    worker: Worker
    reason: str


WorkerEvent = WorkerReady | WorkerStartFailed | PlanReduced | WorkerExited


class WorkerPool:
    """One thread starts workers, and lives as long as they do; any thread may call `close`.

    A process takes one or two seconds before it can open anything; the spare one has done this already.
    """

    def __init__(
        self,
        frame_pool: SharedFramePool,
        limits: WorkerLimits,
        thread_group: ThreadGroup,
        on_event: Callable[[WorkerEvent], None],
    ) -> None:
        self._frame_pool = frame_pool
        self._limits = limits
        self._thread_group = thread_group
        self._on_event = on_event
        self._spare: Worker | None = None
        self._live_workers: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, start_request: StartRequest) -> Worker:
        """A worker that opens what is requested, and a thread that follows it to its end.

        Raises:
            OSError: the system cannot start another process.
        """
        worker = self._take_spare() or self._spawn()
        worker.send_start_request(start_request)
        self._thread_group.start(f"engine-child:{worker.pid}", partial(self._follow, worker))
        return worker

    def keep_spare(self) -> None:
        """Have a process ready for the next request."""
        spare = self._take_spare()
        if spare is None:
            with contextlib.suppress(OSError):  # the next start takes longer, that is all
                spare = self._spawn()
        with self._lock:
            if not self._closed:
                self._spare, spare = spare, None
        if spare is not None:
            spare.discard()

    def close(self) -> None:
        """Kill all workers."""
        with self._lock:
            self._closed = True
            alive = list(self._live_workers)
        for worker in alive:
            worker.kill(NOT_NEEDED)
        spare = self._take_spare()
        if spare is not None:
            spare.discard()

    def _take_spare(self) -> Worker | None:
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None or spare.alive:
            return spare
        spare.discard()
        return None

    def _spawn(self) -> Worker:
        worker = Worker(self._frame_pool, self._limits, self._thread_group)
        with self._lock:
            self._live_workers = {other for other in self._live_workers if other.alive} | {worker}
            closed = self._closed
        if closed:
            worker.kill(NOT_NEEDED)
        return worker

    def _follow(self, worker: Worker) -> None:
        try:
            info = worker.wait_until_open()
        except Exception as error:  # noqa: BLE001 - the supervisor decides what any error means
            self._on_event(WorkerStartFailed(worker, error))
            return
        self._on_event(WorkerReady(worker, info))
        reason = worker.wait_until_exit(lambda plan: self._on_event(PlanReduced(worker, plan)))
        self._on_event(WorkerExited(worker, reason))


class DeviceProber:
    """Probes one device at a time on a thread, and counts the results. Any thread may call `close`."""

    def __init__(
        self, thread_group: ThreadGroup, prober: Callable[[EffectiveDevice], DeviceVerdict] | None = None
    ) -> None:
        self._thread_group = thread_group
        self._prober = prober or partial(probe_device, run=self._run)
        self._process: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._counts = dict.fromkeys(ReasonCode, 0)

    def start(
        self, device: EffectiveDevice, on_result: Callable[[EffectiveDevice, DeviceVerdict], None]
    ) -> None:
        """Probe a device; `on_result` is called from the thread that probes."""

        def probe() -> None:
            try:
                verdict = self._prober(device)
            except Exception as error:
                log.exception("%s could not be probed", device)
                verdict = DeviceVerdict(ReasonCode.PROBE_CRASHED, f"could not be probed: {error}")
            self._counts[verdict.code] += 1
            on_result(device, verdict)

        self._thread_group.start("engine-probe", probe)

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each result came, without those that never did."""
        return {str(code): count for code, count in self._counts.items() if count}

    def close(self) -> None:
        """Kill the process of the probe in progress."""
        self._closing.set()
        process = self._process
        if process is not None:
            process.kill()

    def _run(self, provider: str, timeout_s: float) -> ProbeOutput:
        def keep(process: subprocess.Popen[str]) -> None:
            self._process = process
            if self._closing.is_set():
                process.kill()

        try:
            return run_probe(provider, timeout_s, keep)
        finally:
            self._process = None


COMPARED_PICTURES = 4
"""How many pictures are compared."""

GATHER_TIMEOUT_S = 2.0
"""How long to wait for frames. Without any, the check that the candidate made when it opened counts."""


class ComparedWorker(Protocol):
    """The part of a `Worker` that a comparison needs."""

    def compute(self, pictures: PictureBatch, min_score: float | None) -> Rows:
        """Pictures to rows float32 (n, k, 6)."""


class RecentPictures:
    """Copies of the newest pictures that were computed, made only while `gather` waits. Thread-safe.

    `suspect_pictures` are those of the last batch whose rows held NaN or infinity: the device may be faulty,
    or the model yields them by itself.
    """

    def __init__(self, max_count: int = COMPARED_PICTURES) -> None:
        self._max_count = max_count
        self._changed = threading.Condition()
        self._kept: list[NDArray[np.uint8]] | None = None
        self.suspect_pictures: list[NDArray[np.uint8]] = []

    def record_invalid_output(self, pictures: PictureBatch) -> None:
        """Keep pictures for which a device gave NaN or infinity."""
        self.suspect_pictures = [np.array(picture) for picture in pictures[: self._max_count]]

    def offer(self, pictures: PictureBatch) -> None:
        """Pictures were computed; they are copied only while `gather` waits."""
        if self._kept is None:
            return
        with self._changed:
            if self._kept is not None:
                missing = self._max_count - len(self._kept)
                self._kept += [np.array(picture) for picture in pictures[:missing]]
                self._changed.notify_all()

    def gather(self, timeout_s: float) -> list[NDArray[np.uint8]]:
        """The next pictures, as many as are computed in time."""
        with self._changed:
            self._kept = []
            self._changed.wait_for(
                lambda: self._kept is None or len(self._kept) >= self._max_count, timeout_s
            )
            kept, self._kept = self._kept, None
            return kept or []

    def close(self) -> None:
        """End the wait of `gather`."""
        with self._changed:
            self._kept = None
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class CandidateComparison:
    """What was found. `parity_result` is None if nothing could be compared; `loss`: the candidate failed."""

    parity_result: ParityResult | None
    message: str
    loss: DeviceVerdict | None = None


def is_model_fault(serving: ComparedWorker | None, suspect_pictures: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether the model yields NaN or infinity for these pictures on the CPU too."""
    if serving is None or not suspect_pictures:
        return False
    try:
        return not np.isfinite(serving.compute(suspect_pictures, None)).all()
    except EngineError:
        return False  # the worker cannot answer now


def compare_candidate(
    model: Model,
    serving: ComparedWorker | None,
    candidate: ComparedWorker,
    recent: RecentPictures,
    timeout_s: float = GATHER_TIMEOUT_S,
) -> CandidateComparison:
    """Wait for pictures and compute them on both workers. Never raises: the supervisor waits for a result."""
    pictures = [] if serving is None else recent.gather(timeout_s)
    if serving is None or not pictures:
        return CandidateComparison(None, "there was no frame to compare")
    try:
        return _compare(model, serving, candidate, pictures)
    except Exception as error:
        log.exception("the candidate could not be compared")
        loss = DeviceVerdict(ReasonCode.DEVICE_FAILED, f"it could not be compared: {error}")
        return CandidateComparison(None, str(error), loss)


def _compare(
    model: Model, serving: ComparedWorker, candidate: ComparedWorker, pictures: Sequence[NDArray[np.uint8]]
) -> CandidateComparison:
    try:
        expected = serving.compute(pictures, None)
    except EngineError as error:
        return CandidateComparison(None, f"the CPU could not compute the frames: {error}")
    try:
        rows = candidate.compute(pictures, None)
    except EngineError as error:
        loss = classify_device_loss(error.fault or Fault.DIED, str(error))
        return CandidateComparison(None, str(error), loss)
    parity_result = compare_rows(model, expected, rows, "frames")
    return CandidateComparison(parity_result, parity_result.message)
