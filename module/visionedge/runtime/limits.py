"""Bounds for work that others ask for: places, memory and threads. Event loop only.

What is over a limit is refused with `BusyError`, so that a caller gets an answer now and nothing piles up.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from visionedge.errors import BusyError
from visionedge.runtime.threads import TimedJoinExecutor

T = TypeVar("T")


class ConcurrencyLimit:
    """At most `limit` holders at once, and at most `per_client` of them for one client."""

    def __init__(self, limit: int, message: str, *, per_client: int | None = None) -> None:
        self._limit = limit
        self._per_client = limit if per_client is None else per_client
        self._message = message
        self._clients: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<ConcurrencyLimit taken={self.taken} limit={self._limit}>"

    @property
    def taken(self) -> int:
        """How many places are held."""
        return self._clients.total()

    @contextmanager
    def acquire(self, client: str = "") -> Iterator[None]:
        """Hold a place.

        Raises:
            BusyError: no place is free, or this client holds all that it may.
        """
        if self.taken >= self._limit:
            raise BusyError(self._message)
        if self._clients[client] >= self._per_client:
            raise BusyError(f"{self._message} from this address")
        self._clients[client] += 1
        try:
            yield
        finally:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]


class MemoryBudget:
    """At most `limit_bytes` for all work at once; work waits up to `wait_s` for its part.

    Work that needs more than the whole budget gets the whole budget, and so runs alone.
    """

    def __init__(self, limit_bytes: int, wait_s: float, message: str) -> None:
        self._limit_bytes = limit_bytes
        self._wait_s = wait_s
        self._message = message
        self._wakes: set[asyncio.Future[None]] = set()
        self.taken_bytes = 0

    def __repr__(self) -> str:
        return f"<MemoryBudget taken_bytes={self.taken_bytes} waiting={len(self._wakes)}>"

    @asynccontextmanager
    async def hold(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold a part of the budget.

        Raises:
            BusyError: it was not free in time.
        """
        size_bytes = min(size_bytes, self._limit_bytes)
        try:
            async with asyncio.timeout(self._wait_s):
                while self.taken_bytes + size_bytes > self._limit_bytes:
                    await self._wait_for_release()
        except TimeoutError:
            raise BusyError(self._message) from None
        self.taken_bytes += size_bytes
        try:
            yield
        finally:
            self.taken_bytes -= size_bytes
            for wake in self._wakes:
                if not wake.done():
                    wake.set_result(None)

    async def _wait_for_release(self) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wakes.add(wake)
        try:
            await wake
        finally:
            self._wakes.discard(wake)


class DetachedTasks:
    """Work that runs to its end, with all that it holds, also when its caller is cancelled."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<DetachedTasks tasks={len(self._tasks)}>"

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(retrieve_error)
        return await asyncio.shield(task)

    async def close(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the work that runs, then cancel it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in tuple(self._tasks):
            task.cancel()


class BoundedExecutor:
    """A few threads for blocking work; at most `limit` jobs run or wait. `busy` is said beyond them."""

    def __init__(
        self,
        threads: int = 2,
        limit: int = 32,
        name: str = "http",
        busy: str = "too many pictures are being worked on",
    ) -> None:
        self._executor = TimedJoinExecutor(threads, name)
        self._limit = limit
        self._busy = busy
        self._jobs = 0

    def __repr__(self) -> str:
        return f"<BoundedExecutor jobs={self._jobs} limit={self._limit}>"

    @property
    def is_full(self) -> bool:
        """Whether one more job would be refused."""
        return self._jobs >= self._limit

    async def run(self, job: Callable[[], T]) -> T:
        """The result of the job. It counts until it is done, also when the caller is cancelled.

        Raises:
            BusyError: too many jobs run or wait.
        """
        if self.is_full:
            raise BusyError(self._busy)
        future = asyncio.get_running_loop().run_in_executor(self._executor, job)
        self._jobs += 1
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def _done(self, future: "asyncio.Future[T]") -> None:
        self._jobs -= 1
        retrieve_error(future)

    def close(self, *, wait: bool = True) -> list[str]:
        """Drop the jobs that wait and end the threads; returns the names of those that still run.

        With `wait` it blocks until they have ended, for 2 s at most.
        """
        self._executor.shutdown(wait=wait, cancel_futures=True)
        return self._executor.alive()


def retrieve_error(future: "asyncio.Future[Any]") -> None:
    """Read the error of a future whose caller may be cancelled: asyncio logs errors that are never read."""
    if not future.cancelled():
        future.exception()
