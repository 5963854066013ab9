"""Doctor for a module that runs: one examination at a time, and none oftener than once a minute."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from visionedge.ops.doctor.finding import Document

FRESH_NS = 60_000_000_000


class Visits:
    """Answers from the last examination while it is fresh. Loop only.

    `examine` makes a new one; whoever asks meanwhile waits for the same, and if one of them leaves, the
    others still get it.
    """

    def __init__(
        self, examine: Callable[[], Awaitable[Document]], clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._examine = examine
        self._clock = clock
        self._task: asyncio.Future[Document] | None = None
        self._begun_ns = 0

    async def report(self) -> Document:
        """The newest report; raises what the examination raised."""
        if self._task is None or self._is_old(self._task):
            self._begun_ns = self._clock()
            self._task = asyncio.ensure_future(self._examine())
        return await asyncio.shield(self._task)

    def _is_old(self, task: "asyncio.Future[Document]") -> bool:
        if not task.done():
            return False
        failed = task.cancelled() or task.exception() is not None
        return failed or self._clock() - self._begun_ns >= FRESH_NS
