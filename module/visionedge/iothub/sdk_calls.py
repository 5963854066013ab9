"""Calls that may never return, each with a deadline.

The SDK has no time limits: each of its calls may block for ever. So a call runs on a daemon thread, and the
caller waits for it with a deadline. When the deadline passes, the thread is abandoned and the next call uses
another one.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

T = TypeVar("T")


class CallTimeoutError(Exception):
    """A call did not return in time; its thread is abandoned."""


class StuckError(Exception):
    """Too many abandoned threads still hang, so no new thread is started."""


class _Job(Generic[T]):
    def __init__(self, function: Callable[[], T], late: Callable[[T], object]) -> None:
        self.function = function
        self.late = late
        self.done = False
        self.given_up = False
        self.value: T | None = None
        self.error: Exception | None = None


class _Worker:
    """A thread's inbox; None ends the thread."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self.alive = True


class AbandonableCalls:
    """Runs one call at a time, on the same thread as long as it returns.

    At most `limit` threads may hang at once; then `call` raises `StuckError`. An abandoned thread whose call
    returns ends by itself and does not count any more.
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
        return f"<AbandonableCalls {self._name} hung={self.hung()} abandoned={self.abandoned}>"

    def hung(self) -> int:
        """The number of abandoned threads that have not returned."""
        with self._changed:
            return self._count_hung()

    def set_final_deadline(self, until_ns: int) -> None:
        """Wait for no call after this monotonic time, including the one in progress."""
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
        """Run `function`; returns its result or raises its error.

        A result that comes after the deadline is passed to `late`, on the abandoned thread. `what` names the
        call in errors.

        Raises:
            CallTimeoutError: the call did not return within `timeout_s`, or before the final deadline.
            StuckError: too many threads hang already.
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
                    raise CallTimeoutError(f"{what} did not return in time (limit {timeout_s:g} s)")
                self._changed.wait(left_s)
        if job.error is not None:
            raise job.error
        return cast("T", job.value)

    def close(self) -> None:
        """End the idle thread."""
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
                raise StuckError(f"{self._limit} calls of the IoT Hub SDK have not returned")
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
        except Exception as error:  # noqa: BLE001 - raised again in `call`
            job.error = error
        with self._changed:
            job.done = True
            late = job.given_up and job.error is None
            self._changed.notify_all()
        if late:
            try:
                job.late(job.value)
            except Exception as error:  # noqa: BLE001 - there is no caller any more
                log.debug("%s: cleaning up a late result failed: %s", self._name, error)
