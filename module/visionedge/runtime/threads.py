"""Threads and queues: every thread of the module is started here, is named, and is joined at the end.

`ThreadGroup` runs long-lived threads, `TimedJoinExecutor` short jobs. `LoopQueue` is the only way for results
and events from threads to the asyncio loop.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from visionedge.errors import UnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

PROCESS_LIMIT = "too few processes or threads are allowed here (ulimit -u, or the container's pids limit)"

OnThreadExit = Callable[[str, BaseException | None], None]
"""Called on a vital thread that ended: its name, and its exception (None: it returned)."""


class ThreadGroup:
    """The threads of the module.

    A `vital` thread must run until `stopping`: if its target returns or raises before, `on_thread_exit` is
    called once, on that thread. A vital thread that `may_return` calls it only for an exception.
    """

    def __init__(self, on_thread_exit: OnThreadExit) -> None:
        self._on_thread_exit = on_thread_exit
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def __repr__(self) -> str:
        return f"<ThreadGroup alive={self.alive()}>"

    def start(
        self, name: str, target: Callable[[], None], *, vital: bool = False, may_return: bool = False
    ) -> threading.Thread:
        """Start a daemon thread that runs `target`; an exception is logged.

        Raises:
            UnavailableError: the machine or the container allows no more threads.
        """
        thread = threading.Thread(
            target=self._run, args=(name, target, vital, may_return), name=name, daemon=True
        )
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()]
            try:
                thread.start()
            except RuntimeError as error:
                raise UnavailableError(f"the thread {name} cannot be started: {PROCESS_LIMIT}") from error
            self._threads.append(thread)
        return thread

    def _run(self, name: str, target: Callable[[], None], vital: bool, may_return: bool) -> None:
        error: BaseException | None = None
        try:
            target()
        except BaseException as caught:  # logged, and reported for vital threads
            error = caught
            log.exception("thread %s: ended by an exception", name)
        ended_well = error is None and may_return
        if vital and not ended_well and not self.stopping.is_set():
            self._on_thread_exit(name, error)

    def alive(self) -> list[str]:
        """Return the names of the threads that still run."""
        with self._lock:
            return [t.name for t in self._threads if t.is_alive()]

    def join(self, timeout_s: float) -> list[str]:
        """Wait for all threads, `timeout_s` in total; return the names of those that still run."""
        self.stopping.set()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.alive()


class TimedJoinExecutor(ThreadPoolExecutor):
    """A thread pool whose shutdown does not wait for a job that hangs.

    `shutdown` joins the threads for `join_s` at most. The interpreter would wait at its exit for threads that
    are still `alive`, so the process must then end with `os._exit` (see `non_daemon_threads`).
    """

    def __init__(self, threads: int, name: str, join_s: float = 2.0) -> None:
        super().__init__(threads, thread_name_prefix=name, initializer=self._started)
        self._join_s = join_s
        self._all: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"<TimedJoinExecutor alive={self.alive()}>"

    def _started(self) -> None:
        self._all.append(threading.current_thread())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Join the threads for `join_s` at most; with `cancel_futures` drop the queued jobs."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        deadline_s = time.monotonic() + (self._join_s if wait else 0.0)
        for thread in tuple(self._all):
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def alive(self) -> list[str]:
        """Return the names of the threads that still run."""
        return [thread.name for thread in tuple(self._all) if thread.is_alive()]


def non_daemon_threads(others: Collection[threading.Thread] = ()) -> list[str]:
    """Return the names of threads, except `others`, for which the interpreter would wait at its exit."""
    known = {threading.main_thread(), *others}
    return [each.name for each in threading.enumerate() if each not in known and not each.daemon]


async def run_on_thread(thread_group: ThreadGroup, name: str, work: Callable[[], T]) -> T:
    """Run blocking work on a thread of its own, which cannot delay the end of the module.

    Raises the exception of the work.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def set_outcome(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # work gave it

    def post_outcome(result: T | None, error: BaseException | None) -> None:
        # The loop may be closed already when an abandoned thread finishes.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(set_outcome, result, error)

    def target() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            post_outcome(None, error)
        else:
            post_outcome(result, None)

    thread_group.start(name, target)
    return await done


GROUP_S = 0.02
"""The results of this time are handled together. The first one after a pause is handled at once.

Inference fills the caches of the processor, so code that has not run for some ms is slow: the first result
costs two to three times as much as one directly after it.
"""


class LoopQueue(Generic[T]):
    """A bounded queue from threads to the asyncio loop.

    Any thread may `put`, which never blocks; one reader calls `drain`. `wake` is called, outside the lock,
    by the first `put` after a drain; usually ``lambda: loop.call_soon_threadsafe(…)``. A full queue drops its
    oldest item and counts it in `dropped`.
    """

    def __init__(self, wake: Callable[[], None], limit: int = 1024) -> None:
        self._wake = wake
        self._limit = limit
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self._is_awake = False  # the reader will drain without another wake
        self.dropped = 0

    def __repr__(self) -> str:
        return f"<LoopQueue waiting={len(self._items)} limit={self._limit} dropped={self.dropped}>"

    def put(self, item: T) -> None:
        """Append an item; called by lanes, cameras and hub threads."""
        with self._lock:
            if len(self._items) >= self._limit:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            must_wake, self._is_awake = not self._is_awake, True
        if must_wake:
            self._wake()

    def drain(self, *, stay_awake: bool = False) -> list[T]:
        """Remove and return all items, oldest first.

        `stay_awake`: if there were some, the reader will drain again without a wake.
        """
        with self._lock:
            items = list(self._items)
            self._items.clear()
            self._is_awake = stay_awake and bool(items)
        return items
