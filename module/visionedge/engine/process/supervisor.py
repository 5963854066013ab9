"""The supervisor of the engine's processes: one worker that serves, and at most one candidate beside it.

One thread acts: it takes an event, asks the recovery policy for the steps, and carries them out. Other
threads wait for a worker, a probe or a comparison, and only put an event into the queue of this thread.

    worker pool, prober, comparison, lanes ── events ──▶ supervisor ── policy.handle(event, now) ──▶ steps
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from visionedge.engine.device.devices import (
    USABLE,
    DeviceAssignment,
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    classify_device_loss,
)
from visionedge.engine.device.faults import EngineError, EngineUnavailableError, Fault
from visionedge.engine.device.remote import ReplicaStatus, add_replica_counts
from visionedge.engine.device_parity import (
    CandidateComparison,
    RecentPictures,
    compare_candidate,
    is_model_fault,
)
from visionedge.engine.interface import (
    EngineEvent,
    EngineInfo,
    FallbackPolicy,
    ProcessStatus,
    RecoveryStatistics,
)
from visionedge.engine.plan import Plan
from visionedge.engine.process.protocol import StartRequest
from visionedge.engine.process.recovery_policy import (
    CandidateCompared,
    CandidateFailed,
    CandidateReady,
    CompareCandidate,
    DeviceProbed,
    EngineExited,
    EngineFailed,
    EngineReady,
    EngineStartFailed,
    FallbackChanged,
    GiveUp,
    ProbeDevice,
    PublishEvent,
    RecoveryEvent,
    RecoveryPolicy,
    RecoveryTiming,
    Start,
    StartCandidate,
    StartEngine,
    Step,
    StopCandidate,
    StopEngine,
    SwitchToCandidate,
    TimePassed,
)
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.worker import Worker, WorkerLimits, WorkerStartError
from visionedge.engine.process.worker_pool import (
    NOT_NEEDED,
    DeviceProber,
    PlanReduced,
    ReplicasChanged,
    WorkerEvent,
    WorkerExited,
    WorkerPool,
    WorkerReady,
    WorkerStartFailed,
)
from visionedge.errors import DeviceError, ModelError, UnavailableError
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)


class ActiveWorker:
    """The supervisor's thread changes it; any thread may call `mark_lost`, `wait`, `info` and `down`.

    A snapshot is made at each change, so that `info` costs nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All below changes under the condition.
        self._serving: Worker | None = None
        self._process: Worker | None = None
        self._opened: EngineInfo | None = None
        self._snapshot: EngineInfo | None = None
        self._recovery: RecoveryStatistics | None = None
        self._down = "the engine is warming up"
        self._served = 0
        self._unplanned_before = 0
        self._replicas_before: tuple[ReplicaStatus, ...] = ()
        self._closed = False

    def __repr__(self) -> str:
        return f"<ActiveWorker {self._down if self._serving is None else self._serving}>"

    # --- for the supervisor ---------------------------------------------------------------------------------

    def set_opening(self, worker: Worker) -> None:
        """This worker opens its engine, to serve."""
        with self._changed:
            self._process = worker
            self._update_snapshot()

    def set_serving(self, worker: Worker, info: EngineInfo) -> None:
        """This worker computes from now on; the one before finishes its own batches."""
        with self._changed:
            self._retire_serving()
            self._serving = self._process = worker
            self._opened = info
            self._served += 1
            self._update_snapshot()
            self._changed.notify_all()

    def update(self, **changes: Any) -> None:
        """These fields of the engine's info are different from now on."""
        with self._changed:
            if self._opened is not None:
                self._opened = replace(self._opened, **changes)
            self._update_snapshot()

    def set_recovery(self, recovery: RecoveryStatistics) -> None:
        """Show this state of the recovery."""
        with self._changed:
            self._recovery = recovery
            self._update_snapshot()

    def clear(self, down: str) -> None:
        """No worker computes any more, for this reason."""
        with self._changed:
            self._retire_serving()
            self._process = None
            self._set_down(down)

    def set_down_reason(self, down: str) -> None:
        """The reason why no worker computes."""
        with self._changed:
            self._set_down(down)

    def close(self) -> None:
        """End all waits: nothing computes any more."""
        with self._changed:
            self._retire_serving()
            self._set_down("the engine is closed")
            self._closed = True
            self._changed.notify_all()

    # --- for any thread -------------------------------------------------------------------------------------

    def mark_lost(self, worker: Worker) -> None:
        """This worker is lost: the next callers wait for another one, instead of failing at once."""
        with self._changed:
            if self._serving is worker:
                self._retire_serving()
                self._set_down(f"the engine's process {worker.pid} was lost")

    def wait(self, timeout_s: float) -> Worker:
        """The worker that computes.

        Raises:
            EngineUnavailableError: there is none within the time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._serving is not None or self._closed, timeout_s)
            if self._serving is None:
                raise EngineUnavailableError(self._down)
            return self._serving

    def info(self) -> EngineInfo:
        """The engine of the worker that computes, or of the last one.

        Raises:
            EngineUnavailableError: none has been ready yet.
        """
        snapshot = self._snapshot
        if snapshot is None:
            raise EngineUnavailableError(self._down)
        unplanned = self._count_unplanned()
        return (
            snapshot
            if snapshot.unplanned_shapes == unplanned
            else replace(snapshot, unplanned_shapes=unplanned)
        )

    @property
    def down(self) -> str | None:
        """Why no worker computes; None while one does."""
        return self._down if self._serving is None else None

    # --- with the condition held ----------------------------------------------------------------------------

    def _set_down(self, down: str) -> None:
        if not self._closed:
            self._down = down
        self._update_snapshot()

    def _retire_serving(self) -> None:
        if self._serving is not None:
            self._unplanned_before += self._serving.unplanned_shapes
            if self._opened is not None:
                self._replicas_before = add_replica_counts(self._replicas_before, self._opened.replicas)
                self._opened = replace(self._opened, replicas=())
        self._serving = None

    def _count_unplanned(self) -> int:
        serving = self._serving
        return self._unplanned_before + (0 if serving is None else serving.unplanned_shapes)

    def _update_snapshot(self) -> None:
        if self._opened is None:
            return
        pid = None if self._process is None else self._process.pid
        self._snapshot = replace(
            self._opened,
            unplanned_shapes=self._count_unplanned(),
            process=ProcessStatus(pid, self._served - 1, self.down),
            recovery=self._recovery,
            replicas=add_replica_counts(self._replicas_before, self._opened.replicas),
        )


MAX_REFUSED_BATCHES = 8
"""After this number of refused batches in a row, the device counts as lost."""

_ERROR_EVENTS = frozenset({"engine-lost", "device-lost", "device-held", "parity-refused"})


@dataclass(frozen=True, slots=True)
class SupervisionTuning:
    """Limits and waits, and how a device is probed; None: the usual way."""

    limits: WorkerLimits
    timing: RecoveryTiming | None = None
    prober: Callable[[EffectiveDevice], DeviceVerdict] | None = None


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """The system could not start a process, for the engine that serves or for the candidate."""

    for_candidate: bool
    error: WorkerStartError


@dataclass(frozen=True, slots=True)
class BatchFailed:
    """A batch failed on a worker."""

    worker: Worker
    fault: Fault
    message: str


@dataclass(frozen=True, slots=True)
class ComparisonDone:
    """A candidate was compared with the CPU, or not, because the model itself yields NaN (`model_fault`)."""

    candidate: Worker
    comparison: CandidateComparison
    model_fault: bool = False


SupervisorEvent = WorkerEvent | SpawnFailed | BatchFailed | ComparisonDone | RecoveryEvent


class Supervisor:
    """`run` is the target of a thread that is vital to the group; any thread may call `close`.

    `first` is done when the first engine computes, or fails with the reason why none can.
    """

    def __init__(
        self,
        start_request: StartRequest,
        frame_pool: SharedFramePool,
        thread_group: ThreadGroup,
        *,
        limits: WorkerLimits,
        recovery_policy: RecoveryPolicy,
        active: ActiveWorker,
        on_change: Callable[[EngineEvent], None],
        prober: Callable[[EffectiveDevice], DeviceVerdict] | None = None,
    ) -> None:
        self.first: Future[None] = Future()
        self.recent = RecentPictures()
        self._start_request = start_request
        self._thread_group = thread_group
        self._events: queue.SimpleQueue[SupervisorEvent] = queue.SimpleQueue()
        self._workers = WorkerPool(frame_pool, limits, thread_group, self._events.put)
        self._policy = recovery_policy
        self._active = active
        self._on_change = on_change
        self._prober = DeviceProber(thread_group, prober)
        self._closing = threading.Event()
        self._main: Worker | None = None
        self._candidate: Worker | None = None
        self._candidate_info: EngineInfo | None = None
        self._first_device: EffectiveDevice | None = None
        self._error: Exception | None = None
        self._consecutive_refusals = 0
        self._unusable: dict[EffectiveDevice, DeviceVerdict] = {}
        self._faults = dict.fromkeys(Fault, 0)
        self._device_recoveries = 0

    # --- for any thread -------------------------------------------------------------------------------------

    def report_failure(self, worker: Worker, error: EngineError) -> None:
        """A batch failed on a worker."""
        if error.fault is not None:
            self._events.put(BatchFailed(worker, error.fault, str(error)))

    def record_success(self) -> None:
        """A batch was computed."""
        self._consecutive_refusals = 0

    def set_fallback(self, fallback: FallbackPolicy) -> None:
        """Apply another `inference.fallback` from now on."""
        self._events.put(FallbackChanged(fallback))

    def close(self) -> None:
        """End every worker; batches in progress fail."""
        self._closing.set()
        self._active.close()
        self._prober.close()
        self.recent.close()
        main = self._main
        if main is not None:
            main.request_exit()
        self._workers.close()
        self._events.put(TimePassed())  # wakes the thread

    # --- the thread that acts -------------------------------------------------------------------------------

    def run(self) -> None:
        """Take an event, ask the policy, carry out its steps; until closed."""
        event: SupervisorEvent = Start()
        while not self._closing.is_set():
            self._handle(event)
            event = self._next_event()
        if not self.first.done():
            self.first.set_exception(EngineError("the engine is closed"))

    def _next_event(self) -> SupervisorEvent:
        due_s = self._policy.due_s()
        wait_s = None if due_s is None else due_s - time.monotonic()
        if wait_s is None or wait_s > 0:  # else a flood of events would delay what is due
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=wait_s)
        return TimePassed()

    def _handle(self, event: SupervisorEvent) -> None:
        recovery_event = self._interpret(event)
        if recovery_event is not None:
            steps = self._policy.handle(recovery_event, time.monotonic())
            self._log_failed_start(recovery_event)
            for step in steps:
                self._do(step)
        self._show_recovery()

    def _interpret(self, event: SupervisorEvent) -> RecoveryEvent | None:
        """What an event means for the policy; None where it decides nothing."""
        result: RecoveryEvent | None = None
        match event:
            case WorkerReady(worker, info):
                result = self._on_ready(worker, info)
            case WorkerStartFailed(worker, error):
                result = self._on_start_failed(worker, error)
            case WorkerExited(worker, reason):
                result = self._on_exit(worker, reason)
            case PlanReduced(worker, plan):
                self._on_plan_reduced(worker, plan)
            case ReplicasChanged(worker, replicas):
                self._on_replicas_changed(worker, replicas)
            case SpawnFailed(for_candidate, error):
                result = self._on_candidate_failed(error) if for_candidate else self._on_main_failed(error)
            case BatchFailed():
                result = self._on_batch_failed(event)
            case ComparisonDone():
                result = self._on_compared(event)
            case _:
                self._note(event)
                result = event
        return result

    def _do(self, step: Step) -> None:
        match step:
            case StartEngine(device, verdict):
                self._start_engine(device, verdict)
            case StopEngine(message):
                self._stop_engine(message)
            case ProbeDevice(device):
                self._prober.start(device, lambda *result: self._events.put(DeviceProbed(*result)))
            case StartCandidate(device):
                self._start_candidate(device)
            case CompareCandidate():
                self._compare_candidate()
            case StopCandidate():
                self._stop_candidate()
            case SwitchToCandidate():
                self._switch_to_candidate()
            case PublishEvent(code, message, ends):
                self._publish(EngineEvent(code, message, UnavailableError.exit_code if ends else None))
            case GiveUp(verdict):
                self._give_up(verdict)

    def _show_recovery(self) -> None:
        faults = {str(fault): count for fault, count in self._faults.items()}
        self._active.set_recovery(
            RecoveryStatistics(
                self._policy.recovery_state(), faults, self._prober.counts, self._device_recoveries
            )
        )

    # --- events ---------------------------------------------------------------------------------------------

    def _on_ready(self, worker: Worker, info: EngineInfo) -> RecoveryEvent | None:
        if worker is self._candidate:
            self._candidate_info = info
            return CandidateReady()
        if worker is not self._main:
            worker.kill(NOT_NEEDED)
            return None
        self._activate(worker, info)
        verdict = DeviceVerdict(info.device.code, info.device.reason)
        return EngineReady(info.device.effective, verdict, info.runtime)

    def _on_start_failed(self, worker: Worker, error: Exception) -> RecoveryEvent | None:
        if worker is self._candidate:
            return self._on_candidate_failed(error)
        return self._on_main_failed(error) if worker is self._main else None

    def _on_main_failed(self, error: Exception) -> RecoveryEvent:
        self._main, self._error = None, error
        died = isinstance(error, WorkerStartError)
        killed = isinstance(error, WorkerStartError) and error.killed
        return EngineStartFailed(str(error), died=died, killed=killed, code=_find_reason_code(error))

    def _on_candidate_failed(self, error: Exception) -> RecoveryEvent:
        self._candidate = None
        return CandidateFailed(DeviceVerdict(_find_reason_code(error) or ReasonCode.ENGINE_DIED, str(error)))

    def _on_exit(self, worker: Worker, reason: str) -> RecoveryEvent | None:
        if worker is self._candidate:
            self._candidate = None
            return CandidateFailed(classify_device_loss(worker.fault, reason))
        if worker is not self._main:
            return None
        self._main = None
        self._faults[worker.fault] += 1
        self._active.clear(f"the engine is restarting: its process {reason}")
        return EngineExited(worker.fault, f"the engine's process {worker.pid} {reason}")

    def _on_plan_reduced(self, worker: Worker, plan: Plan) -> None:
        if worker is self._candidate and self._candidate_info is not None:
            self._candidate_info = replace(self._candidate_info, plan=plan)
        if worker is self._main:
            self._faults[Fault.OUT_OF_MEMORY] += 1
            self._active.update(plan=plan)
            message = f"out of memory for larger batches: batch size limited to {plan.max_batch}"
            self._publish(EngineEvent("plan-narrowed", message))

    def _on_replicas_changed(self, worker: Worker, replicas: tuple[ReplicaStatus, ...]) -> None:
        if worker is self._candidate and self._candidate_info is not None:
            self._candidate_info = replace(self._candidate_info, replicas=replicas)
        if worker is self._main:
            self._active.update(replicas=replicas)

    def _on_batch_failed(self, event: BatchFailed) -> RecoveryEvent | None:
        if event.worker is not self._main:
            return None  # its loss is reported already
        self._faults[event.fault] += 1
        if event.fault is Fault.REPLICA_FAILED:
            return None  # other replicas go on
        if event.fault is Fault.REFUSED:
            self._consecutive_refusals += 1
            if self._consecutive_refusals < MAX_REFUSED_BATCHES:
                return None
        return EngineFailed(event.fault, event.message)

    def _on_compared(self, event: ComparisonDone) -> RecoveryEvent | None:
        if event.model_fault:
            # The model itself yields NaN, on the CPU too: do not treat NaN as a fault of the device any more.
            self.recent.suspect_pictures = []
            self._start_request = replace(self._start_request, checks_finite=False)
            log.warning("%s", event.comparison.message)
        if event.candidate is not self._candidate or self._candidate_info is None:
            return None
        comparison = event.comparison
        if comparison.loss is not None:
            self._stop_candidate()
            return CandidateFailed(comparison.loss)
        refusal, parity_result = None, comparison.parity_result
        if parity_result is not None:
            check = self._candidate_info.device_check
            check = replace(check, parity_results=(*check.parity_results, parity_result))
            self._candidate_info = replace(self._candidate_info, device_check=check)
            refusal = parity_result.refusal
        if refusal is not None and self._start_request.settings.parity == "warn":
            log.warning(
                "the device differs from the CPU: %s; used nevertheless (inference.parity: warn)", refusal
            )
            refusal = None
        return CandidateCompared(refusal, comparison.message)

    def _note(self, event: RecoveryEvent) -> None:
        """Remember what later steps need of an event that goes to the policy as it is."""
        if isinstance(event, DeviceProbed):
            before = self._unusable.pop(event.device, None)
            if event.verdict.code is not ReasonCode.OK:
                self._unusable[event.device] = event.verdict
                if event.verdict != before:
                    log.info(
                        "%s is not usable yet: %s (%s)",
                        event.device,
                        event.verdict.reason,
                        event.verdict.code,
                    )
        if isinstance(event, FallbackChanged):
            settings = replace(self._start_request.settings, fallback=event.fallback)
            self._start_request = replace(self._start_request, settings=settings)
            if event.fallback == "degrade" and self._policy.serving not in (None, "cpu"):
                self._workers.keep_spare()

    def _log_failed_start(self, event: RecoveryEvent) -> None:
        due_s = self._policy.due_s()
        retry = "" if due_s is None else f"; retrying in {max(0.0, due_s - time.monotonic()):.0f} s"
        if isinstance(event, EngineStartFailed) and self.first.done():
            log.warning("engine: restart failed (%s)%s", event.message, retry)
        if isinstance(event, CandidateFailed):
            log.info("the device is not usable yet: %s%s", event.verdict.reason, retry)

    # --- steps ----------------------------------------------------------------------------------------------

    def _start_engine(self, device: EffectiveDevice | None, verdict: DeviceVerdict | None) -> None:
        start_request = self._start_request
        if device is not None:
            # Frames wait, so nothing is measured now; the plan of the first device is known.
            start_request = replace(
                start_request,
                only=DeviceAssignment(device, verdict or USABLE),
                measuring=device == self._first_device,
            )
        self._main = self._spawn(start_request, for_candidate=False)
        if self._main is not None:
            self._active.set_opening(self._main)

    def _start_candidate(self, device: EffectiveDevice) -> None:
        verdict = next((v for other, v in self._unusable.items() if other != device), USABLE)
        self._candidate_info = None
        self._candidate = self._spawn(
            replace(self._start_request, only=DeviceAssignment(device, verdict)), for_candidate=True
        )

    def _spawn(self, start_request: StartRequest, *, for_candidate: bool) -> Worker | None:
        try:
            return self._workers.start(start_request)
        except OSError as error:
            why = f"could not be started ({error.strerror})"
            self._events.put(SpawnFailed(for_candidate, WorkerStartError(why, crashed=False)))
            return None

    def _stop_engine(self, message: str) -> None:
        worker, self._main = self._main, None
        self._active.clear(f"the engine is restarting: {message}")
        if worker is not None:
            worker.kill(message)

    def _compare_candidate(self) -> None:
        main, candidate = self._main if self._policy.serving else None, self._candidate
        assert candidate is not None  # noqa: S101 - the policy compares a candidate that is ready
        self._thread_group.start("engine-comparing", partial(self._run_comparison, main, candidate))

    def _run_comparison(self, main: Worker | None, candidate: Worker) -> None:
        """On a separate thread: compute the newest pictures on both."""
        if is_model_fault(main, self.recent.suspect_pictures):
            message = "the output of the model contains NaN or infinity for some pictures, on the CPU, too"
            loss = DeviceVerdict(ReasonCode.INVALID_OUTPUT, message)
            self._events.put(
                ComparisonDone(candidate, CandidateComparison(None, message, loss), model_fault=True)
            )
            return
        compares = self._start_request.settings.parity != "off"
        comparison = compare_candidate(
            self._start_request.model, main if compares else None, candidate, self.recent
        )
        self._events.put(ComparisonDone(candidate, comparison))

    def _stop_candidate(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            candidate.kill(NOT_NEEDED)

    def _switch_to_candidate(self) -> None:
        candidate, self._candidate, old = self._candidate, None, self._main
        assert candidate is not None  # noqa: S101 - the policy switches to a candidate that was compared
        assert self._candidate_info is not None  # noqa: S101 - as above
        self._main = candidate
        self._device_recoveries += 1
        self._activate(candidate, self._candidate_info)
        if old is not None:
            self._thread_group.start("engine-draining", old.drain)

    def _activate(self, worker: Worker, info: EngineInfo) -> None:
        """Lanes compute with this worker from now on."""
        self._consecutive_refusals = 0
        device = info.device.effective
        self._start_request = replace(
            self._start_request, plans={**self._start_request.plans, device: info.plan}
        )
        self._active.set_serving(worker, info)
        if device != "cpu" and self._start_request.settings.fallback == "degrade":
            self._workers.keep_spare()  # for the CPU, if the device is lost
        if not self.first.done():
            self._first_device = device
            self._show_recovery()
            self.first.set_result(None)

    def _publish(self, event: EngineEvent) -> None:
        if event.code == "engine-back" and self._main is not None:
            took_s = time.monotonic() - self._main.started_s
            message = f"the engine is back after {took_s:.1f} s, process {self._main.pid}"
            event = replace(event, message=f"{message}; {self._active.info().device.describe()}")
        if event.code in ("device-lost", "device-held"):
            self._active.set_down_reason(event.message)
        log.log(logging.ERROR if event.code in _ERROR_EVENTS else logging.INFO, "%s", event.message)
        self._show_recovery()  # before anybody reads the status because of the event
        self._on_change(event)

    def _give_up(self, verdict: DeviceVerdict | None) -> None:
        if not self.first.done():
            self.first.set_exception(self._make_start_error(verdict))
        self._closing.wait()  # the owner of the engine closes it

    def _make_start_error(self, verdict: DeviceVerdict | None) -> Exception:
        """The error that `EngineClient.open` raises."""
        error, path = self._error or EngineError("the engine is closed"), self._start_request.model.path
        if not isinstance(error, WorkerStartError):
            return error
        if verdict is not None:
            return DeviceError(f"{path}: {error}", verdict.code)
        return ModelError(f"{path}: {error}") if error.crashed else EngineError(f"{path}: {error}")


def _find_reason_code(error: Exception) -> ReasonCode | None:
    return ReasonCode(error.code) if isinstance(error, DeviceError) else None
