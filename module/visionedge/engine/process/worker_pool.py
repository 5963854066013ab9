"""The worker processes of an engine (started, followed to their end, one spare), and the probes of devices.

What happens to a worker is reported as an event, from the thread that follows it.
"""

import contextlib
import logging
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from visionedge.engine.device.devices import (
    DeviceVerdict,
    EffectiveDevice,
    ProbeOutput,
    ReasonCode,
    probe_device,
    run_probe,
)
from visionedge.engine.device.remote import ReplicaStatus
from visionedge.engine.interface import EngineInfo
from visionedge.engine.plan import Plan
from visionedge.engine.process.protocol import EngineUpdate, StartRequest
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.worker import Worker, WorkerLimits
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
class ReplicasChanged:
    """The servers of a worker's remote device, or their counts, changed."""

    worker: Worker
    replicas: tuple[ReplicaStatus, ...]


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The process of a worker that was ready has ended, for this reason."""

    worker: Worker
    reason: str


WorkerEvent = WorkerReady | WorkerStartFailed | PlanReduced | ReplicasChanged | WorkerExited


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
        reason = worker.wait_until_exit(partial(self._report_update, worker))
        self._on_event(WorkerExited(worker, reason))

    def _report_update(self, worker: Worker, update: EngineUpdate) -> None:
        changed = PlanReduced(worker, update) if isinstance(update, Plan) else ReplicasChanged(worker, update)
        self._on_event(changed)


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
