"""The engine's processes: started and followed to their ends, and a spare that only waits for an order."""

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
from visionedge.engine.device.faults import Fault
from visionedge.engine.device.session import EngineError, PictureBatch
from visionedge.engine.device_parity import ParityResult, compare_rows
from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.worker import Worker, WorkerLimits
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.threads import ThreadGroup

NOT_NEEDED = "is not needed any more"


@dataclass(frozen=True, slots=True)
class WorkerEvents:
    """Whom a child's life is told to; called from a thread that follows it."""

    on_ready: Callable[[Worker, protocol.EngineInfo], None]
    on_start_failed: Callable[[Worker, Exception], None]
    on_plan_reduced: Callable[[Worker, Plan], None]
    on_exit: Callable[[Worker, str], None]


class WorkerPool:
    """One thread starts children, and lives as long as they do; any may `close`.

    Before a child can open anything it takes a second or two to start. The spare one has done that already.
    """

    def __init__(
        self,
        frame_pool: SharedFramePool,
        limits: WorkerLimits,
        thread_group: ThreadGroup,
        events: WorkerEvents,
    ) -> None:
        self._arena = frame_pool
        self._limits = limits
        self._thread_group = thread_group
        self._events = events
        self._spare: Worker | None = None
        self._live_workers: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, start_request: protocol.StartRequest) -> Worker:
        """A child that opens what it is ordered to, and a thread that follows it to its end.

        Raises:
            OSError: there is no room for another process.
        """
        worker = self._usable_spare() or self._spawn()
        worker.begin(start_request)
        self._thread_group.start(f"engine-child:{worker.pid}", partial(self._follow, worker))
        return worker

    def keep_spare(self) -> None:
        """Have a child ready for the next order."""
        spare = self._usable_spare()
        if spare is None:
            with contextlib.suppress(OSError):  # then it takes longer, no more
                spare = self._spawn()
        with self._lock:
            if not self._closed:
                self._spare, spare = spare, None
        if spare is not None:
            spare.discard()

    def _usable_spare(self) -> Worker | None:
        """The spare one, which is nobody's spare from now on."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None or spare.alive:
            return spare
        spare.discard()
        return None

    def close(self) -> None:
        """Kill them all."""
        with self._lock:
            self._closed = True
            alive = list(self._live_workers)
        for worker in alive:
            worker.end(NOT_NEEDED)
        spare = self._usable_spare()
        if spare is not None:
            spare.discard()

    def _spawn(self) -> Worker:
        worker = Worker(self._arena, self._limits, self._thread_group)
        with self._lock:
            self._live_workers = {other for other in self._live_workers if other.alive} | {worker}
            closed = self._closed
        if closed:
            worker.end(NOT_NEEDED)
        return worker

    def _follow(self, worker: Worker) -> None:
        try:
            info = worker.opened()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to who decides
            self._events.on_start_failed(worker, error)
            return
        self._events.on_ready(worker, info)
        self._events.on_exit(worker, worker.wait(partial(self._events.on_plan_reduced, worker)))


# Asking a device whether it is usable, in a process of its own, while frames are computed elsewhere.


log = logging.getLogger(__name__)


class DeviceProber:
    """Asks one device at a time on a thread of `crew`, and counts the answers. Any thread may `close`."""

    def __init__(
        self, thread_group: ThreadGroup, prober: Callable[[EffectiveDevice], DeviceVerdict] | None = None
    ) -> None:
        self._thread_group = thread_group
        self._prober = prober or partial(probe_device, run=self._run)
        self._process: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._counts = dict.fromkeys(ReasonCode, 0)

    def ask(self, device: EffectiveDevice, then: Callable[[EffectiveDevice, DeviceVerdict], None]) -> None:
        """Ask; `then` is called from the thread that asked."""

        def asked() -> None:
            try:
                verdict = self._prober(device)
            except Exception as error:
                log.exception("%s could not be asked", device)
                verdict = DeviceVerdict(ReasonCode.PROBE_CRASHED, f"it could not be asked: {error}")
            self._counts[verdict.code] += 1
            then(device, verdict)

        self._thread_group.start("engine-probe", asked)

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each answer came."""
        return {str(code): count for code, count in self._counts.items() if count}

    def close(self) -> None:
        """End the process that is being asked."""
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


# The last test of a candidate: the newest pictures, computed by it and by the engine that serves.


COMPARED_PICTURES = 4
"""How many pictures are compared."""

GATHER_TIMEOUT_S = 2.0
"""How long they are waited for; where cameras give none, what the candidate showed at its opening counts."""


class ComparedWorker(Protocol):
    """A child, as far as it is asked here (`worker.Worker`)."""

    def compute(self, pictures: PictureBatch, min_score: float | None) -> Rows:
        """Pictures to rows float32 (n, k, 6)."""


class RecentPictures:
    """The newest pictures that were computed, kept while somebody wants them. Thread-safe.

    `suspects` are those of the last batch that came to no numbers: the device may be to blame, or the model.
    """

    def __init__(self, max_count: int = COMPARED_PICTURES) -> None:
        self._most = max_count
        self._changed = threading.Condition()
        self._kept: list[NDArray[np.uint8]] | None = None
        self.suspect_pictures: list[NDArray[np.uint8]] = []

    def record_invalid_output(self, pictures: PictureBatch) -> None:
        """For these a device gave rows that are no numbers."""
        self.suspect_pictures = [np.array(picture) for picture in pictures[: self._most]]

    def offer(self, pictures: PictureBatch) -> None:
        """Pictures were computed; they are copied if they are wanted."""
        if self._kept is None:
            return
        with self._changed:
            if self._kept is not None:
                room = self._most - len(self._kept)
                self._kept += [np.array(picture) for picture in pictures[:room]]
                self._changed.notify_all()

    def gather(self, timeout_s: float) -> list[NDArray[np.uint8]]:
        """The next ones, as many as come in time."""
        with self._changed:
            self._kept = []
            self._changed.wait_for(lambda: self._kept is None or len(self._kept) >= self._most, timeout_s)
            kept, self._kept = self._kept, None
            return kept or []

    def close(self) -> None:
        """Let nobody wait."""
        with self._changed:
            self._kept = None
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class CandidateComparison:
    """What came of it: the result of the comparison, or why there is none; `loss`.

    The candidate failed meanwhile.
    """

    parity_result: ParityResult | None
    message: str
    loss: DeviceVerdict | None = None


def is_model_fault(serving: ComparedWorker | None, suspect_pictures: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether the CPU gives no numbers for these pictures either."""
    if serving is None or not suspect_pictures:
        return False
    try:
        return not np.isfinite(serving.compute(suspect_pictures, None)).all()
    except EngineError:
        return False  # it says nothing now


def compare_candidate(
    model: Model,
    serving: ComparedWorker | None,
    candidate: ComparedWorker,
    recent: RecentPictures,
    timeout_s: float = GATHER_TIMEOUT_S,
) -> CandidateComparison:
    """Wait for pictures and compute them on both. Never raises: an answer is waited for."""
    pictures = [] if serving is None else recent.gather(timeout_s)
    if serving is None or not pictures:
        return CandidateComparison(None, "there was no frame to compare")
    try:
        return _compare(model, serving, candidate, pictures)
    except Exception as error:
        log.exception("the candidate could not be compared")
        return CandidateComparison(
            None, str(error), DeviceVerdict(ReasonCode.DEVICE_FAILED, f"it could not be compared: {error}")
        )


def _compare(
    model: Model, serving: ComparedWorker, candidate: ComparedWorker, pictures: Sequence[NDArray[np.uint8]]
) -> CandidateComparison:
    try:
        expected = serving.compute(pictures, None)
    except EngineError as error:
        return CandidateComparison(None, f"the CPU could not be asked: {error}")
    try:
        rows = candidate.compute(pictures, None)
    except EngineError as error:
        return CandidateComparison(
            None, str(error), classify_device_loss(error.fault or Fault.DIED, str(error))
        )
    seen = compare_rows(model, expected, rows, "frames")
    return CandidateComparison(seen, seen.message)
