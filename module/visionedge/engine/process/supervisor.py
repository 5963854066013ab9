"""Conducts the engine's processes by the recovery ladder: one that serves, at most one candidate beside it.

Everything is decided on one thread. Other threads wait for a child, a probe or a comparison, and send what
came of it to that thread's mailbox.
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
from typing import TypeVar

from visionedge.engine.device.devices import (
    USABLE,
    DeviceAssignment,
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    classify_device_loss,
)
from visionedge.engine.device.faults import Fault
from visionedge.engine.device.session import EngineError, EngineUnavailableError
from visionedge.engine.interface import EngineEvent, ProcessStatus, RecoveryStatistics
from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.protocol import EngineInfo
from visionedge.engine.process.recovery_policy import (
    CompareCandidate,
    FallbackPolicy,
    GiveUp,
    ProbeDevice,
    PublishEvent,
    RecoveryPolicy,
    StartCandidate,
    StartEngine,
    Step,
    Steps,
    StopCandidate,
    StopEngine,
    SwitchToCandidate,
)
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.worker import Worker, WorkerLimits, WorkerStartError
from visionedge.engine.process.worker_pool import (
    NOT_NEEDED,
    CandidateComparison,
    DeviceProber,
    RecentPictures,
    WorkerEvents,
    WorkerPool,
    compare_candidate,
    is_model_fault,
)
from visionedge.errors import DeviceError, ModelError, UnavailableError
from visionedge.runtime.threads import ThreadGroup

# What lanes see of the engine's processes: the one that serves, what is known of it, why there is none.


@dataclass(frozen=True, slots=True)
class ServingWorker:
    """A child that computes, and what it told of itself."""

    worker: Worker
    info: EngineInfo


class ActiveWorker:
    """One thread says which child serves, any may look or `lose` it; all changes under one condition."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._serving: ServingWorker | None = None
        self._known: EngineInfo | None = None
        self._child: Worker | None = None
        self._down = "the engine is warming up"
        self._served = 0
        self._unplanned_before = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Stage {self._down if self._serving is None else self._serving.worker}>"

    def set_opening(self, worker: Worker) -> None:
        """This child is being opened, to serve."""
        with self._changed:
            self._child = worker

    def serve(self, worker: Worker, info: EngineInfo) -> None:
        """This child computes from now on; batches that the one before computes are its own."""
        with self._changed:
            self._retire_serving()
            self._serving, self._known, self._child = ServingWorker(worker, info), info, worker
            self._served += 1
            self._changed.notify_all()

    def update_info(self, info: EngineInfo) -> None:
        """Something else is true of the child that computes."""
        with self._changed:
            self._known = info
            if self._serving is not None:
                self._serving = replace(self._serving, info=info)

    def leave(self, down: str) -> None:
        """None computes any more, for this reason."""
        with self._changed:
            self._retire_serving()
            self._child = None
            self.set_down_reason(down)

    def set_down_reason(self, down: str) -> None:
        """Why none computes."""
        if not self._closed:
            self._down = down

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._retire_serving()
            self._closed, self._down = True, "the engine is closed"
            self._changed.notify_all()

    def _retire_serving(self) -> None:
        if self._serving is not None:
            self._unplanned_before += self._serving.worker.unplanned_shapes
        self._serving = None

    # --- for any thread -------------------------------------------------------------------------------------

    def mark_lost(self, worker: Worker) -> None:
        """This child is of no use any more: whoever comes next waits, instead of failing at once."""
        with self._changed:
            if self._serving is not None and self._serving.worker is worker:
                self._retire_serving()
                self._down = f"the engine's process {worker.pid} was lost"

    def serving(self, timeout_s: float) -> ServingWorker:
        """The child that computes, waited for a moment.

        Raises:
            EngineAwayError: there is none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._serving is not None or self._closed, timeout_s)
            if self._serving is None:
                raise EngineUnavailableError(self._down)
            return self._serving

    @property
    def info(self) -> EngineInfo:
        """What is known of the child that computes, or of the last one.

        Raises:
            EngineError: there was none yet.
        """
        if self._known is None:
            raise EngineError(self._down)
        return self._known

    @property
    def unplanned_shapes(self) -> int:
        """Over all children there were."""
        with self._changed:
            now = 0 if self._serving is None else self._serving.worker.unplanned_shapes
            return self._unplanned_before + now

    @property
    def process(self) -> ProcessStatus:
        """How the child is."""
        with self._changed:
            pid = None if self._child is None else self._child.pid
            down = self._down if self._serving is None else None
            return ProcessStatus(pid, max(0, self._served - 1), down)


log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_REFUSED_BATCHES = 8
"""When so many batches in a row are refused, and none between them is computed, the device is to blame."""

_ERROR_EVENTS = frozenset({"engine-lost", "device-lost", "device-held", "parity-refused"})


class Supervisor:
    """`run` is the target of a thread that is vital to `crew`; `close` may be called by any.

    `first` is done when the first engine computes, or fails with the reason why none can.
    """

    def __init__(
        self,
        start_request: protocol.StartRequest,
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
        self._workers = WorkerPool(frame_pool, limits, thread_group, self._worker_events())
        self._policy = recovery_policy
        self._active = active
        self._on_change = on_change
        self._prober = DeviceProber(thread_group, prober)
        self._events: queue.SimpleQueue[Callable[[], Steps]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._main: Worker | None = None
        self._candidate: Worker | None = None
        self._prepared: protocol.EngineInfo | None = None
        self._first_device: EffectiveDevice | None = None
        self._error: Exception | None = None
        self._consecutive_refusals = 0
        self._unusable: dict[EffectiveDevice, DeviceVerdict] = {}
        self._faults = dict.fromkeys(Fault, 0)
        self._change_overs = 0
        self._recovery_state = (recovery_policy.recovery_state(0.0), 0.0)

    def _worker_events(self) -> WorkerEvents:
        """What becomes of children comes by mail."""

        def enqueue(handler: Callable[[Worker, T], Steps]) -> Callable[[Worker, T], None]:
            return lambda worker, what: self._events.put(partial(handler, worker, what))

        return WorkerEvents(
            enqueue(self._on_ready),
            enqueue(self._on_start_failed),
            enqueue(self._on_plan_reduced),
            enqueue(self._on_exit),
        )

    # --- for any thread -------------------------------------------------------------------------------------

    def report_failure(self, worker: Worker, error: EngineError) -> None:
        """A batch failed on a child."""
        if error.fault is not None:
            self._events.put(partial(self._on_fault, worker, error.fault, str(error)))

    def set_fallback(self, fallback: FallbackPolicy) -> None:
        """From now on do this without the device that was asked for."""
        self._events.put(partial(self._on_fallback_changed, fallback))

    def record_success(self) -> None:
        """A batch was computed."""
        self._consecutive_refusals = 0

    @property
    def recovery(self) -> RecoveryStatistics:
        """What happened so far, and where the way back stands."""
        recovery_state, taken_s = self._recovery_state
        if recovery_state.retry_in_s is not None:
            recovery_state = replace(
                recovery_state, retry_in_s=max(0.0, recovery_state.retry_in_s - (time.monotonic() - taken_s))
            )
        faults = {str(fault): count for fault, count in self._faults.items()}
        return RecoveryStatistics(recovery_state, faults, self._prober.counts, self._change_overs)

    def close(self) -> None:
        """End every child; batches in progress fail."""
        self._closing.set()
        self._active.close()
        self._prober.close()
        self.recent.close()
        main = self._main
        if main is not None:
            main.leave()
        self._workers.close()
        self._events.put(list)  # wakes the thread: no steps

    # --- the thread that decides ----------------------------------------------------------------------------

    def run(self) -> None:
        """Conduct until closed."""
        steps = self._policy.begin()
        while not self._closing.is_set():
            self._do(steps)
            self._recovery_state = (self._policy.recovery_state(time.monotonic()), time.monotonic())
            steps = self._next()
        if not self.first.done():
            self.first.set_exception(EngineError("the engine is closed"))

    def _next(self) -> Steps:
        """What to do after the next letter, or when something is due."""
        due_s = self._policy.due_s()
        left_s = None if due_s is None else due_s - time.monotonic()
        if left_s is None or left_s > 0:  # else not even a flood of letters may delay it
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=left_s)()
        return self._policy.tick(time.monotonic())

    def _do(self, steps: Steps) -> None:
        for step in steps:
            self._do_step(step)

    def _do_step(self, step: Step) -> None:
        match step:
            case StartEngine(device, verdict):
                self._serve(device, verdict)
            case StopEngine(message):
                self._stop(message)
            case ProbeDevice(device):
                self._prober.ask(device, self._on_probe_result)
            case StartCandidate(device):
                self._prepare(device)
            case CompareCandidate():
                self._compare()
            case StopCandidate():
                self._stop_candidate()
            case SwitchToCandidate():
                self._switch_to_candidate()
            case PublishEvent(code, message, ends):
                self._publish(EngineEvent(code, message, UnavailableError.exit_code if ends else None))
            case GiveUp(verdict):
                self._give_up(verdict)

    # --- steps ----------------------------------------------------------------------------------------------

    def _serve(self, device: EffectiveDevice | None, verdict: DeviceVerdict | None) -> None:
        start_request = self._start_request
        if device is not None:
            # Nothing is measured now, as frames wait; one that follows the first there goes on as that did.
            measuring = device == self._first_device
            start_request = replace(
                start_request, only=DeviceAssignment(device, verdict or USABLE), measuring=measuring
            )
        try:
            self._main = self._workers.start(start_request)
        except OSError as error:
            self._events.put(
                partial(self._main_failed, WorkerStartError(_describe_spawn_error(error), crashed=False))
            )
        else:
            self._active.set_opening(self._main)

    def _prepare(self, device: EffectiveDevice) -> None:
        verdict = next((v for other, v in self._unusable.items() if other != device), USABLE)
        start_request = replace(self._start_request, only=DeviceAssignment(device, verdict))
        try:
            self._candidate, self._prepared = self._workers.start(start_request), None
        except OSError as error:
            self._events.put(
                partial(self._candidate_failed, WorkerStartError(_describe_spawn_error(error), crashed=False))
            )

    def _stop(self, message: str) -> None:
        worker, self._main = self._main, None
        self._active.leave(f"the engine is restarting: {message}")
        if worker is not None:
            worker.end(message)

    def _on_probe_result(self, device: EffectiveDevice, verdict: DeviceVerdict) -> None:
        """On the thread that asked."""
        self._events.put(partial(self._on_probed, device, verdict))

    def _compare(self) -> None:
        main, candidate = self._main if self._policy.serving else None, self._candidate
        assert candidate is not None  # noqa: S101 - the ladder compares what was prepared
        self._thread_group.start("engine-comparing", partial(self._run_comparison, main, candidate))

    def _run_comparison(self, main: Worker | None, candidate: Worker) -> None:
        """On a thread of its own: compute the newest pictures on both."""
        if is_model_fault(main, self.recent.suspect_pictures):
            self._events.put(partial(self._on_model_fault, candidate))
            return
        looks = self._start_request.inference.parity != "off"
        seen = compare_candidate(self._start_request.model, main if looks else None, candidate, self.recent)
        self._events.put(partial(self._on_compared, candidate, seen))

    def _stop_candidate(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            candidate.end(NOT_NEEDED)

    def _switch_to_candidate(self) -> None:
        candidate, self._candidate, old = self._candidate, None, self._main
        assert candidate is not None  # noqa: S101 - the ladder changes over to what was compared
        assert self._prepared is not None  # noqa: S101 - as above
        self._main = candidate
        self._change_overs += 1
        self._activate(candidate, self._prepared)
        if old is not None:
            self._thread_group.start("engine-retiring", old.drain)

    def _activate(self, worker: Worker, info: protocol.EngineInfo) -> None:
        """Lanes compute with this child from now on."""
        self._consecutive_refusals = 0
        self._start_request = replace(
            self._start_request, plans={**self._start_request.plans, info.device.effective: info.plan}
        )
        self._active.serve(worker, info)
        if info.device.effective != "cpu" and self._start_request.inference.fallback == "degrade":
            self._workers.keep_spare()  # for the CPU, should the device be lost
        if not self.first.done():
            self._first_device = info.device.effective
            self.first.set_result(None)

    def _publish(self, event: EngineEvent) -> None:
        if event.code == "engine-back" and self._main is not None:
            took_s = time.monotonic() - self._main.began_s
            message = f"the engine is back after {took_s:.1f} s, process {self._main.pid}"
            event = replace(event, message=f"{message}; {self._active.info.device.describe()}")
        if event.code in ("device-lost", "device-held"):
            self._active.set_down_reason(event.message)
        log.log(logging.ERROR if event.code in _ERROR_EVENTS else logging.INFO, "%s", event.message)
        self._on_change(event)

    def _give_up(self, verdict: DeviceVerdict | None) -> None:
        if not self.first.done():
            self.first.set_exception(self._make_start_error(verdict))
        self._closing.wait()  # whoever opened it closes it

    def _make_start_error(self, verdict: DeviceVerdict | None) -> Exception:
        """The error that `open` raises."""
        error, path = self._error or EngineError("the engine is closed"), self._start_request.model.path
        if not isinstance(error, WorkerStartError):
            return error
        if verdict is not None:
            return DeviceError(f"{path}: {error}", verdict.code)
        return ModelError(f"{path}: {error}") if error.crashed else EngineError(f"{path}: {error}")

    # --- letters --------------------------------------------------------------------------------------------

    def _on_ready(self, worker: Worker, info: protocol.EngineInfo) -> Steps:
        if worker is self._candidate:
            self._prepared = info
            return self._policy.prepared(time.monotonic())
        if worker is not self._main:
            worker.end(NOT_NEEDED)
            return []
        self._activate(worker, info)
        device = info.device
        verdict = DeviceVerdict(device.code, device.reason)
        return self._policy.opened(device.effective, verdict, time.monotonic())

    def _on_fallback_changed(self, fallback: FallbackPolicy) -> Steps:
        inference = self._start_request.inference.model_copy(update={"fallback": fallback})
        self._start_request = replace(self._start_request, inference=inference)
        steps = self._policy.set_fallback(fallback)
        if fallback == "degrade" and self._policy.serving not in (None, "cpu"):
            self._workers.keep_spare()
        return steps

    def _on_start_failed(self, worker: Worker, error: Exception) -> Steps:
        if worker is self._candidate:
            return self._candidate_failed(error)
        return self._main_failed(error) if worker is self._main else []

    def _main_failed(self, error: Exception) -> Steps:
        self._main, self._error = None, error
        if self.first.done():
            log.warning("the engine could not be started again: %s; trying again until it starts", error)
        died, code = isinstance(error, WorkerStartError), _reason_code(error)
        killed = isinstance(error, WorkerStartError) and error.killed
        return self._policy.refused(str(error), time.monotonic(), died=died, killed=killed, code=code)

    def _candidate_failed(self, error: Exception) -> Steps:
        self._candidate = None
        log.info("the device is not usable yet: %s", error)
        verdict = DeviceVerdict(_reason_code(error) or ReasonCode.ENGINE_DIED, str(error))
        return self._policy.candidate_lost(verdict, time.monotonic())

    def _on_exit(self, worker: Worker, why: str) -> Steps:
        if worker is self._candidate:
            self._candidate = None
            return self._policy.candidate_lost(classify_device_loss(worker.fault, why), time.monotonic())
        if worker is not self._main:
            return []
        self._main = None
        self._faults[worker.fault] += 1
        self._active.leave(f"the engine is restarting: its process {why}")
        message = f"the engine's process {worker.pid} {why}"
        return self._policy.ended(worker.fault, message, time.monotonic())

    def _on_plan_reduced(self, worker: Worker, plan: Plan) -> Steps:
        if worker is self._candidate:
            self._prepared = replace(self._prepared, plan=plan) if self._prepared else None
        if worker is not self._main:
            return []
        self._faults[Fault.OUT_OF_MEMORY] += 1
        self._active.update_info(replace(self._active.info, plan=plan))
        message = f"larger batches do not fit into memory: {plan.max_batch} at once is the most from now on"
        return [PublishEvent("plan-narrowed", message)]

    def _on_fault(self, worker: Worker, fault: Fault, message: str) -> Steps:
        if worker is not self._main:
            return []  # its loss was told
        self._faults[fault] += 1
        if fault is Fault.REFUSED:
            self._consecutive_refusals += 1
            if self._consecutive_refusals < MAX_REFUSED_BATCHES:
                return []
        return self._policy.fault(fault, message, time.monotonic())

    def _on_probed(self, device: EffectiveDevice, verdict: DeviceVerdict) -> Steps:
        before = self._unusable.pop(device, None)
        if verdict.code is not ReasonCode.OK:
            self._unusable[device] = verdict
            if verdict != before:  # told again when it is another reason
                log.info("%s is not usable yet: %s (%s)", device, verdict.reason, verdict.code)
        return self._policy.probed(device, verdict, time.monotonic())

    def _on_model_fault(self, worker: Worker) -> Steps:
        """The device is not to blame for rows that are no numbers: the next candidate is not held to them."""
        self.recent.suspect_pictures = []
        self._start_request = replace(self._start_request, checks_finite=False)
        message = "the output of the model contains NaN or infinity for some pictures, on the CPU as well"
        log.warning("%s", message)
        return self._on_compared(
            worker, CandidateComparison(None, message, DeviceVerdict(ReasonCode.INVALID_OUTPUT, message))
        )

    def _on_compared(self, worker: Worker, seen: CandidateComparison) -> Steps:
        if worker is not self._candidate or self._prepared is None:
            return []
        if seen.loss is not None:
            self._stop_candidate()
            return self._policy.candidate_lost(seen.loss, time.monotonic())
        refusal, message = None, seen.message
        if seen.parity_result is not None:
            device_check = self._prepared.device_check
            device_check = replace(
                device_check, parity_results=(*device_check.parity_results, seen.parity_result)
            )
            self._prepared = replace(self._prepared, device_check=device_check)
            refusal = seen.parity_result.refusal
        if refusal is not None and self._start_request.inference.parity == "warn":
            log.warning("the device computes otherwise than the CPU: %s", refusal)
            refusal = None
        return self._policy.compared(refusal, message, time.monotonic())


def _reason_code(error: Exception) -> ReasonCode | None:
    return ReasonCode(error.code) if isinstance(error, DeviceError) else None


def _describe_spawn_error(error: OSError) -> str:
    return f"could not be started ({error.strerror})"
