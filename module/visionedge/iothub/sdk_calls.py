"""Calls that may never return, made on threads that we can afford to lose.

The SDK has no time limits: any of its calls may block for ever. So each runs on a daemon thread that
belongs to nobody; the caller waits for it with a deadline of its own, and when that passes, leaves the
thread behind and uses another.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Literal, TypeVar, cast

from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

T = TypeVar("T")


class CallTimeoutError(Exception):
    """A call did not return in time; its thread is left behind."""


class StuckError(Exception):
    """So many threads are left behind that another would only be lost, too."""


class _Job(Generic[T]):
    def __init__(self, function: Callable[[], T], late: Callable[[T], object]) -> None:
        self.function = function
        self.late = late
        self.done = False
        self.given_up = False
        self.value: T | None = None
        self.error: Exception | None = None


class _Worker:
    """One thread's inbox; None in it ends the thread."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self.alive = True


class AbandonableCalls:
    """Runs one call at a time, on one thread as long as that thread comes back.

    `limit` threads may be out at once; with more, `call` raises `StuckError`. A thread that comes back in the
    end finishes by itself and counts no longer.
    """

    def __init__(self, thread_group: ThreadGroup, name: str, *, limit: int = 5) -> None:
        self._thread_group = thread_group
        self._name = name
        self._limit = limit
        self._changed = threading.Condition()
        self._worker: _Worker | None = None
        self._hung: list[_Worker] = []
        self._started = 0
        self._final_deadline_ns: int | None = None
        self.abandoned = 0

    def __repr__(self) -> str:
        return f"<Losable {self._name} out={self.hung()} abandoned={self.abandoned}>"

    def hung(self) -> int:
        """How many threads were left behind and have not come back."""
        with self._changed:
            return self._count_hung()

    def set_final_deadline(self, until_ns: int) -> None:
        """No call, the one in progress included, is waited for after this monotonic moment."""
        with self._changed:
            self._final_deadline_ns = until_ns
            self._changed.notify_all()

    def call(
        self,
        what: str,
        function: Callable[[], T],
        timeout_s: float,
        late: Callable[[T], object] = lambda _value: None,
    ) -> T:
        """Run `function` and give its result or raise its error.

        A result that comes after all, when nobody waits for it any more, is given to `late` on that thread.

        Raises:
            OverdueError: it did not come back within `timeout_s` (or the cap).
            StuckError: too many threads are out already.
        """
        job = _Job(function, late)
        worker = self._ready_worker()
        worker.inbox.put(cast("_Job[object]", job))
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        with self._changed:
            while not job.done:
                end_ns = (
                    deadline_ns
                    if self._final_deadline_ns is None
                    else min(deadline_ns, self._final_deadline_ns)
                )
                left_s = (end_ns - time.monotonic_ns()) / 1e9
                if left_s <= 0:
                    job.given_up = True
                    self._abandon(worker)
                    raise CallTimeoutError(f"{what} did not return within its time ({timeout_s:g} s at most)")
                self._changed.wait(left_s)
        if job.error is not None:
            raise job.error
        return cast("T", job.value)

    def close(self) -> None:
        """Let the idle thread end."""
        with self._changed:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.inbox.put(None)

    def _count_hung(self) -> int:
        self._hung = [worker for worker in self._hung if worker.alive]
        return len(self._hung)

    def _ready_worker(self) -> _Worker:
        with self._changed:
            if self._worker is not None:
                return self._worker
            if self._count_hung() >= self._limit:
                raise StuckError(f"{self._limit} calls into the SDK never came back")
            self._started += 1
            name = f"{self._name}-{self._started}"
            worker = self._worker = _Worker()
        self._thread_group.start(name, lambda: self._work(worker))
        return worker

    def _abandon(self, worker: _Worker) -> None:
        self.abandoned += 1
        self._hung.append(worker)
        self._worker = None
        worker.inbox.put(None)

    def _work(self, worker: _Worker) -> None:
        while (job := worker.inbox.get()) is not None:
            self._do(job)
        with self._changed:
            worker.alive = False
            self._changed.notify_all()

    def _do(self, job: _Job[object]) -> None:
        try:
            job.value = job.function()
        except Exception as error:  # noqa: BLE001 - it belongs to the caller, who gets it below
            job.error = error
        with self._changed:
            job.done = True
            late = job.given_up and job.error is None
            self._changed.notify_all()
        if late:
            try:
                job.late(job.value)
            except Exception as error:  # noqa: BLE001 - nobody waits for it
                log.debug("what came too late from %s did not end well: %s", self._name, error)


# What the hub client does when the SDK or the hub fails, rung by rung, and how long each may take.
#
# overdue   a call did not return within its deadline: its thread is left behind, another one goes on
# silent    no answer to the twin's round trip, although messages may still be taken
# rebuild   the connection is thrown away with its client, and a new client is made on a new thread
# poison    one message has cost too many connections that were well otherwise: it is given up
# stuck     so many threads are lost that another would be, too: after a while the module ends with
#           `EXIT_STUCK`, for edgeAgent to start it again in a process that is not poisoned


EXIT_STUCK = 75
"""The exit code of the last rung: the SDK hangs for good in this process (EX_TEMPFAIL: try again)."""

HubFault = Literal["overdue", "silent", "rebuild", "poison", "stuck"]
HubState = Literal["starting", "connecting", "connected", "waiting", "stuck", "closed"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the calls into the SDK may take, and what else of the client is a matter of time or count.

    One hang costs at most the longest of them and the farewell; the SDK's own limits, where it has any, are
    30 and 60 s. `renew_s` is well before the end of a token (an hour), `probe_s` lies between two round trips
    of the twin.
    """

    build_s: float = 20.0
    connect_s: float = 20.0
    send_s: float = 20.0
    probe_s: float = 60.0
    request_s: float = 20.0
    disconnect_s: float = 5.0
    renew_s: float = 2700.0
    first_wait_s: float = 1.0
    max_wait_s: float = 15.0
    stuck_s: float = 60.0
    max_hung_threads: int = 6
    poison_tries: int = 10
    poison_pause_s: float = 5.0


@dataclass(frozen=True, slots=True)
class HubStatus:
    """What the client does; `dropped` by reason, `last_error` without secrets, `rungs` as counted so far.

    `abandoned` counts the calls that were given up, `out` those threads of them that have not come back.
    """

    state: HubState
    connected: bool
    sent: int
    queued: int
    queued_bytes: int
    dropped: Mapping[str, int]
    last_error: str | None
    rebuilds: int
    abandoned: int
    hung: int
    faults: Mapping[str, int]


class FaultCounter:
    """Counts the rungs. What led to each is logged by the client, once as long as it stays the same."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Ladder {dict(self._counts)}>"

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each rung was climbed since the start."""
        return MappingProxyType(dict(self._counts))

    def record(self, fault: HubFault) -> None:
        """Count a rung."""
        self._counts[fault] += 1
