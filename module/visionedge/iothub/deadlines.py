"""Calls that may never return, made on threads that we can afford to lose.

The SDK has no time limits: any of its calls may block for ever. So each runs on a daemon thread that
belongs to nobody; the caller waits for it with a deadline of its own, and when that passes, leaves the
thread behind and uses another.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from visionedge.runtime.threads import Crew

log = logging.getLogger(__name__)

T = TypeVar("T")


class OverdueError(Exception):
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


class Losable:
    """Runs one call at a time, on one thread as long as that thread comes back.

    `limit` threads may be out at once; with more, `call` raises `StuckError`. A thread that comes back in the
    end finishes by itself and counts no longer.
    """

    def __init__(self, crew: Crew, name: str, *, limit: int = 5) -> None:
        self._crew = crew
        self._name = name
        self._limit = limit
        self._changed = threading.Condition()
        self._worker: _Worker | None = None
        self._out: list[_Worker] = []
        self._started = 0
        self._cap_ns: int | None = None
        self.abandoned = 0

    def __repr__(self) -> str:
        return f"<Losable {self._name} out={self.out()} abandoned={self.abandoned}>"

    def out(self) -> int:
        """How many threads were left behind and have not come back."""
        with self._changed:
            return self._still_out()

    def cap(self, until_ns: int) -> None:
        """No call, the one in progress included, is waited for after this monotonic moment."""
        with self._changed:
            self._cap_ns = until_ns
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
                end_ns = deadline_ns if self._cap_ns is None else min(deadline_ns, self._cap_ns)
                left_s = (end_ns - time.monotonic_ns()) / 1e9
                if left_s <= 0:
                    job.given_up = True
                    self._leave_behind(worker)
                    raise OverdueError(f"{what} did not return within its time ({timeout_s:g} s at most)")
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

    def _still_out(self) -> int:
        self._out = [worker for worker in self._out if worker.alive]
        return len(self._out)

    def _ready_worker(self) -> _Worker:
        with self._changed:
            if self._worker is not None:
                return self._worker
            if self._still_out() >= self._limit:
                raise StuckError(f"{self._limit} calls into the SDK never came back")
            self._started += 1
            name = f"{self._name}-{self._started}"
            worker = self._worker = _Worker()
        self._crew.start(name, lambda: self._work(worker))
        return worker

    def _leave_behind(self, worker: _Worker) -> None:
        self.abandoned += 1
        self._out.append(worker)
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
