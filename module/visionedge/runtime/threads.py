"""The one place where threads are made: named, watched, and counted at the end."""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

OnThreadExit = Callable[[str, BaseException | None], None]
"""Told, from the dying thread, the name of a thread that had to live, and of what it died."""


class ThreadGroup:
    """The threads of the module.

    A thread that is `vital` must live until `stopping`: if its target returns or raises before that,
    `on_thread_exit` is called once, from that thread, with its name and the error (None for a plain return).
    One that is vital and `may_return` ends the module only by an error: its owner tells it when to end.
    """

    def __init__(self, on_thread_exit: OnThreadExit) -> None:
        self._on_thread_exit = on_thread_exit
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def __repr__(self) -> str:
        return f"<Crew alive={self.alive()}>"

    def start(
        self, name: str, target: Callable[[], None], *, vital: bool = False, may_return: bool = False
    ) -> threading.Thread:
        """Start a daemon thread that runs `target` and never lets an exception escape unseen."""
        thread = threading.Thread(
            target=self._run, args=(name, target, vital, may_return), name=name, daemon=True
        )
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()]
            self._threads.append(thread)
            thread.start()
        return thread

    def _run(self, name: str, target: Callable[[], None], vital: bool, may_return: bool) -> None:
        error: BaseException | None = None
        try:
            target()
        except BaseException as caught:  # the last fence: told, never lost
            error = caught
            log.exception("thread %s died", name)
        ended_well = error is None and may_return
        if vital and not ended_well and not self.stopping.is_set():
            self._on_thread_exit(name, error)

    def alive(self) -> list[str]:
        """The names of the threads that still run."""
        with self._lock:
            return [t.name for t in self._threads if t.is_alive()]

    def join(self, timeout_s: float) -> list[str]:
        """Wait for all threads, `timeout_s` in all; the names of those that are still there."""
        self.stopping.set()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.alive()


class TimedJoinExecutor(ThreadPoolExecutor):
    """A pool of threads whose end does not wait for a job that hangs.

    `shutdown` joins the threads for `join_s` at most. Those that still run then are `left`: the interpreter
    would wait for them when it ends, so the process has to end by `os._exit` (see `unfinished`).
    """

    def __init__(self, threads: int, name: str, join_s: float = 2.0) -> None:
        super().__init__(threads, thread_name_prefix=name, initializer=self._started)
        self._join_s = join_s
        self._all: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"<Executor alive={self.left()}>"

    def _started(self) -> None:
        self._all.append(threading.current_thread())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop the jobs that wait for a thread if asked for; join the threads, for a bounded time."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        deadline_s = time.monotonic() + (self._join_s if wait else 0.0)
        for thread in tuple(self._all):
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def left(self) -> list[str]:
        """The names of the threads that are alive."""
        return [thread.name for thread in tuple(self._all) if thread.is_alive()]


def non_daemon_threads(others: Collection[threading.Thread] = ()) -> list[str]:
    """The names of the threads, but for `others`, for which the interpreter would wait at its end."""
    known = {threading.main_thread(), *others}
    return [each.name for each in threading.enumerate() if each not in known and not each.daemon]


async def run_on_thread(thread_group: ThreadGroup, name: str, work: Callable[[], T]) -> T:
    """Run blocking work on a thread of its own, which the module can end without.

    Raises whatever the work raises.
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
        # A thread that was left behind may still speak when the loop is closed; nobody listens then.
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


# The door from the threads to the asyncio loop: results and events go out here, and nowhere else.


class LoopQueue(Generic[T]):
    """A bounded queue that wakes its reader once each time it turns non-empty.

    Any thread may `put` (it never blocks); one reader calls `drain`. When it is full the oldest item goes
    first and is counted in `dropped`. `wake` is called outside the lock; a service gives
    ``lambda: loop.call_soon_threadsafe(…)``.
    """

    def __init__(self, wake: Callable[[], None], limit: int = 1024) -> None:
        self._wake = wake
        self._limit = limit
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self.dropped = 0

    def __repr__(self) -> str:
        return f"<Outbox waiting={len(self._items)} limit={self._limit} dropped={self.dropped}>"

    def put(self, item: T) -> None:
        """Hand an item over; called by lanes, cameras and hub threads."""
        with self._lock:
            turned = not self._items
            if len(self._items) >= self._limit:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
        if turned:
            self._wake()

    def drain(self) -> list[T]:
        """All items, oldest first; the box is empty afterwards."""
        with self._lock:
            items = list(self._items)
            self._items.clear()
        return items
