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

from visionedge.engine.device.devices import USABLE, Assignment, Effective, Reason, Verdict, lost
from visionedge.engine.device.faults import Fault
from visionedge.engine.device.session import EngineAwayError, EngineError
from visionedge.engine.interface import EngineNews, ProcessStatus, Recovery
from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.protocol import Facts
from visionedge.engine.process.recovery_policy import (
    ChangeOver,
    Compare,
    Dismiss,
    GiveUp,
    Ladder,
    Policy,
    Prepare,
    Probe,
    Serve,
    Step,
    Steps,
    Stop,
    Tell,
)
from visionedge.engine.process.shared_memory import Arena
from visionedge.engine.process.worker import Limits, StillbornError, Worker
from visionedge.engine.process.worker_pool import (
    UNWANTED,
    Children,
    Comparison,
    Probing,
    Recent,
    Told,
    compare_candidate,
    is_the_model,
)
from visionedge.errors import DeviceError, ModelError, UnavailableError
from visionedge.runtime.threads import Crew

# What lanes see of the engine's processes: the one that serves, what is known of it, why there is none.


@dataclass(frozen=True, slots=True)
class Serving:
    """A child that computes, and what it told of itself."""

    worker: Worker
    facts: Facts


class Stage:
    """One thread says which child serves, any may look or `lose` it; all changes under one condition."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._serving: Serving | None = None
        self._known: Facts | None = None
        self._child: Worker | None = None
        self._down = "the engine is warming up"
        self._served = 0
        self._unplanned_before = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Stage {self._down if self._serving is None else self._serving.worker}>"

    def awaits(self, worker: Worker) -> None:
        """This child is being opened, to serve."""
        with self._changed:
            self._child = worker

    def serve(self, worker: Worker, facts: Facts) -> None:
        """This child computes from now on; batches that the one before computes are its own."""
        with self._changed:
            self._forget()
            self._serving, self._known, self._child = Serving(worker, facts), facts, worker
            self._served += 1
            self._changed.notify_all()

    def know(self, facts: Facts) -> None:
        """Something else is true of the child that computes."""
        with self._changed:
            self._known = facts
            if self._serving is not None:
                self._serving = replace(self._serving, facts=facts)

    def leave(self, down: str) -> None:
        """None computes any more, for this reason."""
        with self._changed:
            self._forget()
            self._child = None
            self.explain(down)

    def explain(self, down: str) -> None:
        """Why none computes."""
        if not self._closed:
            self._down = down

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._forget()
            self._closed, self._down = True, "the engine is closed"
            self._changed.notify_all()

    def _forget(self) -> None:
        if self._serving is not None:
            self._unplanned_before += self._serving.worker.unplanned_shapes
        self._serving = None

    # --- for any thread -------------------------------------------------------------------------------------

    def lose(self, worker: Worker) -> None:
        """This child is of no use any more: whoever comes next waits, instead of failing at once."""
        with self._changed:
            if self._serving is not None and self._serving.worker is worker:
                self._forget()
                self._down = f"the engine's process {worker.pid} was lost"

    def serving(self, timeout_s: float) -> Serving:
        """The child that computes, waited for a moment.

        Raises:
            EngineAwayError: there is none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._serving is not None or self._closed, timeout_s)
            if self._serving is None:
                raise EngineAwayError(self._down)
            return self._serving

    @property
    def facts(self) -> Facts:
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

MOST_REFUSED = 8
"""When so many batches in a row are refused, and none between them is computed, the device is to blame."""

_LOUD = frozenset({"engine-lost", "device-lost", "device-held", "parity-refused"})


class Conductor:
    """`run` is the target of a thread that is vital to `crew`; `close` may be called by any.

    `first` is done when the first engine computes, or fails with the reason why none can.
    """

    def __init__(
        self,
        order: protocol.Order,
        arena: Arena,
        crew: Crew,
        *,
        limits: Limits,
        ladder: Ladder,
        stage: Stage,
        on_change: Callable[[EngineNews], None],
        prober: Callable[[Effective], Verdict] | None = None,
    ) -> None:
        self.first: Future[None] = Future()
        self.recent = Recent()
        self._order = order
        self._crew = crew
        self._children = Children(arena, limits, crew, self._told())
        self._ladder = ladder
        self._stage = stage
        self._on_change = on_change
        self._probing = Probing(crew, prober)
        self._mail: queue.SimpleQueue[Callable[[], Steps]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._main: Worker | None = None
        self._candidate: Worker | None = None
        self._prepared: protocol.Facts | None = None
        self._first_device: Effective | None = None
        self._error: Exception | None = None
        self._refused_in_a_row = 0
        self._unusable: dict[Effective, Verdict] = {}
        self._faults = dict.fromkeys(Fault, 0)
        self._change_overs = 0
        self._outlook = (ladder.outlook(0.0), 0.0)

    def _told(self) -> Told:
        """What becomes of children comes by mail."""

        def by_mail(letter: Callable[[Worker, T], Steps]) -> Callable[[Worker, T], None]:
            return lambda worker, what: self._mail.put(partial(letter, worker, what))

        return Told(
            by_mail(self._ready), by_mail(self._not_opened), by_mail(self._narrowed), by_mail(self._gone)
        )

    # --- for any thread -------------------------------------------------------------------------------------

    def report(self, worker: Worker, error: EngineError) -> None:
        """A batch failed on a child."""
        if error.fault is not None:
            self._mail.put(partial(self._faulted, worker, error.fault, str(error)))

    def follow(self, fallback: Policy) -> None:
        """From now on do this without the device that was asked for."""
        self._mail.put(partial(self._followed, fallback))

    def well(self) -> None:
        """A batch was computed."""
        self._refused_in_a_row = 0

    @property
    def recovery(self) -> Recovery:
        """What happened so far, and where the way back stands."""
        outlook, taken_s = self._outlook
        if outlook.next_in_s is not None:
            outlook = replace(outlook, next_in_s=max(0.0, outlook.next_in_s - (time.monotonic() - taken_s)))
        faults = {str(fault): count for fault, count in self._faults.items()}
        return Recovery(outlook, faults, self._probing.counts, self._change_overs)

    def close(self) -> None:
        """End every child; batches in progress fail."""
        self._closing.set()
        self._stage.close()
        self._probing.close()
        self.recent.close()
        main = self._main
        if main is not None:
            main.leave()
        self._children.close()
        self._mail.put(list)  # wakes the thread: no steps

    # --- the thread that decides ----------------------------------------------------------------------------

    def run(self) -> None:
        """Conduct until closed."""
        steps = self._ladder.begin()
        while not self._closing.is_set():
            self._do(steps)
            self._outlook = (self._ladder.outlook(time.monotonic()), time.monotonic())
            steps = self._next()
        if not self.first.done():
            self.first.set_exception(EngineError("the engine is closed"))

    def _next(self) -> Steps:
        """What to do after the next letter, or when something is due."""
        due_s = self._ladder.due_s()
        left_s = None if due_s is None else due_s - time.monotonic()
        if left_s is None or left_s > 0:  # else not even a flood of letters may delay it
            with contextlib.suppress(queue.Empty):
                return self._mail.get(timeout=left_s)()
        return self._ladder.tick(time.monotonic())

    def _do(self, steps: Steps) -> None:
        for step in steps:
            self._do_step(step)

    def _do_step(self, step: Step) -> None:
        match step:
            case Serve(device, because):
                self._serve(device, because)
            case Stop(words):
                self._stop(words)
            case Probe(device):
                self._probing.ask(device, self._asked)
            case Prepare(device):
                self._prepare(device)
            case Compare():
                self._compare()
            case Dismiss():
                self._dismiss()
            case ChangeOver():
                self._change_over()
            case Tell(code, words, ends):
                self._tell(EngineNews(code, words, UnavailableError.exit_code if ends else None))
            case GiveUp(verdict):
                self._give_up(verdict)

    # --- steps ----------------------------------------------------------------------------------------------

    def _serve(self, device: Effective | None, because: Verdict | None) -> None:
        order = self._order
        if device is not None:
            # Nothing is measured now, as frames wait; one that follows the first there goes on as that did.
            measuring = device == self._first_device
            order = replace(order, only=Assignment(device, because or USABLE), measuring=measuring)
        try:
            self._main = self._children.start(order)
        except OSError as error:
            self._mail.put(partial(self._main_failed, StillbornError(_no_process(error), crashed=False)))
        else:
            self._stage.awaits(self._main)

    def _prepare(self, device: Effective) -> None:
        because = next((v for other, v in self._unusable.items() if other != device), USABLE)
        order = replace(self._order, only=Assignment(device, because))
        try:
            self._candidate, self._prepared = self._children.start(order), None
        except OSError as error:
            self._mail.put(partial(self._candidate_failed, StillbornError(_no_process(error), crashed=False)))

    def _stop(self, words: str) -> None:
        worker, self._main = self._main, None
        self._stage.leave(f"the engine is restarting: {words}")
        if worker is not None:
            worker.end(words)

    def _asked(self, device: Effective, verdict: Verdict) -> None:
        """On the thread that asked."""
        self._mail.put(partial(self._probed, device, verdict))

    def _compare(self) -> None:
        main, candidate = self._main if self._ladder.serving else None, self._candidate
        assert candidate is not None  # noqa: S101 - the ladder compares what was prepared
        self._crew.start("engine-comparing", partial(self._held_against, main, candidate))

    def _held_against(self, main: Worker | None, candidate: Worker) -> None:
        """On a thread of its own: compute the newest pictures on both."""
        if is_the_model(main, self.recent.suspects):
            self._mail.put(partial(self._excused, candidate))
            return
        looks = self._order.inference.parity != "off"
        seen = compare_candidate(self._order.model, main if looks else None, candidate, self.recent)
        self._mail.put(partial(self._compared, candidate, seen))

    def _dismiss(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            candidate.end(UNWANTED)

    def _change_over(self) -> None:
        candidate, self._candidate, old = self._candidate, None, self._main
        assert candidate is not None  # noqa: S101 - the ladder changes over to what was compared
        assert self._prepared is not None  # noqa: S101 - as above
        self._main = candidate
        self._change_overs += 1
        self._take(candidate, self._prepared)
        if old is not None:
            self._crew.start("engine-retiring", old.retire)

    def _take(self, worker: Worker, facts: protocol.Facts) -> None:
        """Lanes compute with this child from now on."""
        self._refused_in_a_row = 0
        self._order = replace(self._order, plans={**self._order.plans, facts.device.effective: facts.plan})
        self._stage.serve(worker, facts)
        if facts.device.effective != "cpu" and self._order.inference.fallback == "degrade":
            self._children.keep_spare()  # for the CPU, should the device be lost
        if not self.first.done():
            self._first_device = facts.device.effective
            self.first.set_result(None)

    def _tell(self, news: EngineNews) -> None:
        if news.code == "engine-back" and self._main is not None:
            took_s = time.monotonic() - self._main.began_s
            words = f"the engine is back after {took_s:.1f} s, process {self._main.pid}"
            news = replace(news, message=f"{words}; {self._stage.facts.device.describe()}")
        if news.code in ("device-lost", "device-held"):
            self._stage.explain(news.message)
        log.log(logging.ERROR if news.code in _LOUD else logging.INFO, "%s", news.message)
        self._on_change(news)

    def _give_up(self, verdict: Verdict | None) -> None:
        if not self.first.done():
            self.first.set_exception(self._final(verdict))
        self._closing.wait()  # whoever opened it closes it

    def _final(self, verdict: Verdict | None) -> Exception:
        """The error that `open` raises."""
        error, path = self._error or EngineError("the engine is closed"), self._order.model.path
        if not isinstance(error, StillbornError):
            return error
        if verdict is not None:
            return DeviceError(f"{path}: {error}", verdict.code)
        return ModelError(f"{path}: {error}") if error.crashed else EngineError(f"{path}: {error}")

    # --- letters --------------------------------------------------------------------------------------------

    def _ready(self, worker: Worker, facts: protocol.Facts) -> Steps:
        if worker is self._candidate:
            self._prepared = facts
            return self._ladder.prepared(time.monotonic())
        if worker is not self._main:
            worker.end(UNWANTED)
            return []
        self._take(worker, facts)
        device = facts.device
        verdict = Verdict(device.code, device.reason)
        return self._ladder.opened(device.effective, verdict, time.monotonic())

    def _followed(self, fallback: Policy) -> Steps:
        inference = self._order.inference.model_copy(update={"fallback": fallback})
        self._order = replace(self._order, inference=inference)
        steps = self._ladder.follow(fallback)
        if fallback == "degrade" and self._ladder.serving not in (None, "cpu"):
            self._children.keep_spare()
        return steps

    def _not_opened(self, worker: Worker, error: Exception) -> Steps:
        if worker is self._candidate:
            return self._candidate_failed(error)
        return self._main_failed(error) if worker is self._main else []

    def _main_failed(self, error: Exception) -> Steps:
        self._main, self._error = None, error
        if self.first.done():
            log.warning("the engine could not be started again: %s; trying again until it starts", error)
        died, code = isinstance(error, StillbornError), _code(error)
        killed = isinstance(error, StillbornError) and error.killed
        return self._ladder.refused(str(error), time.monotonic(), died=died, killed=killed, code=code)

    def _candidate_failed(self, error: Exception) -> Steps:
        self._candidate = None
        log.info("the device is not usable yet: %s", error)
        verdict = Verdict(_code(error) or Reason.ENGINE_DIED, str(error))
        return self._ladder.candidate_lost(verdict, time.monotonic())

    def _gone(self, worker: Worker, why: str) -> Steps:
        if worker is self._candidate:
            self._candidate = None
            return self._ladder.candidate_lost(lost(worker.fault, why), time.monotonic())
        if worker is not self._main:
            return []
        self._main = None
        self._faults[worker.fault] += 1
        self._stage.leave(f"the engine is restarting: its process {why}")
        words = f"the engine's process {worker.pid} {why}"
        return self._ladder.ended(worker.fault, words, time.monotonic())

    def _narrowed(self, worker: Worker, plan: Plan) -> Steps:
        if worker is self._candidate:
            self._prepared = replace(self._prepared, plan=plan) if self._prepared else None
        if worker is not self._main:
            return []
        self._faults[Fault.OUT_OF_MEMORY] += 1
        self._stage.know(replace(self._stage.facts, plan=plan))
        words = f"larger batches do not fit into memory: {plan.max_batch} at once is the most from now on"
        return [Tell("plan-narrowed", words)]

    def _faulted(self, worker: Worker, fault: Fault, words: str) -> Steps:
        if worker is not self._main:
            return []  # its loss was told
        self._faults[fault] += 1
        if fault is Fault.REFUSED:
            self._refused_in_a_row += 1
            if self._refused_in_a_row < MOST_REFUSED:
                return []
        return self._ladder.fault(fault, words, time.monotonic())

    def _probed(self, device: Effective, verdict: Verdict) -> Steps:
        before = self._unusable.pop(device, None)
        if verdict.code is not Reason.OK:
            self._unusable[device] = verdict
            if verdict != before:  # told again when it is another reason
                log.info("%s is not usable yet: %s (%s)", device, verdict.reason, verdict.code)
        return self._ladder.probed(device, verdict, time.monotonic())

    def _excused(self, worker: Worker) -> Steps:
        """The device is not to blame for rows that are no numbers: the next candidate is not held to them."""
        self.recent.suspects = []
        self._order = replace(self._order, checks_numbers=False)
        words = "the output of the model contains NaN or infinity for some pictures, on the CPU as well"
        log.warning("%s", words)
        return self._compared(worker, Comparison(None, words, Verdict(Reason.WRONG_ROWS, words)))

    def _compared(self, worker: Worker, seen: Comparison) -> Steps:
        if worker is not self._candidate or self._prepared is None:
            return []
        if seen.lost is not None:
            self._dismiss()
            return self._ladder.candidate_lost(seen.lost, time.monotonic())
        refusal, words = None, seen.words
        if seen.likeness is not None:
            proof = self._prepared.proof
            proof = replace(proof, likenesses=(*proof.likenesses, seen.likeness))
            self._prepared = replace(self._prepared, proof=proof)
            refusal = seen.likeness.refusal
        if refusal is not None and self._order.inference.parity == "warn":
            log.warning("the device computes otherwise than the CPU: %s", refusal)
            refusal = None
        return self._ladder.compared(refusal, words, time.monotonic())


def _code(error: Exception) -> Reason | None:
    return Reason(error.code) if isinstance(error, DeviceError) else None


def _no_process(error: OSError) -> str:
    return f"could not be started ({error.strerror})"
