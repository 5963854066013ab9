"""The engine's processes: started and followed to their ends, and a spare that only waits for an order."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.shared_memory import Arena
from visionedge.engine.process.worker import Limits, Worker
from visionedge.runtime.threads import Crew

UNWANTED = "is not needed any more"


@dataclass(frozen=True, slots=True)
class Told:
    """Whom a child's life is told to; called from a thread that follows it."""

    ready: Callable[[Worker, protocol.Facts], None]
    not_opened: Callable[[Worker, Exception], None]
    narrowed: Callable[[Worker, Plan], None]
    gone: Callable[[Worker, str], None]


class Children:
    """One thread starts children, and lives as long as they do; any may `close`.

    Before a child can open anything it takes a second or two to start. The spare one has done that already.
    """

    def __init__(self, arena: Arena, limits: Limits, crew: Crew, told: Told) -> None:
        self._arena = arena
        self._limits = limits
        self._crew = crew
        self._told = told
        self._spare: Worker | None = None
        self._alive: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, order: protocol.Order) -> Worker:
        """A child that opens what it is ordered to, and a thread that follows it to its end.

        Raises:
            OSError: there is no room for another process.
        """
        worker = self._usable_spare() or self._born()
        worker.begin(order)
        self._crew.start(f"engine-child:{worker.pid}", partial(self._follow, worker))
        return worker

    def keep_spare(self) -> None:
        """Have a child ready for the next order."""
        spare = self._usable_spare()
        if spare is None:
            with contextlib.suppress(OSError):  # then it takes longer, no more
                spare = self._born()
        with self._lock:
            if not self._closed:
                self._spare, spare = spare, None
        if spare is not None:
            spare.bury()

    def _usable_spare(self) -> Worker | None:
        """The spare one, which is nobody's spare from now on."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None or spare.alive:
            return spare
        spare.bury()
        return None

    def close(self) -> None:
        """Kill them all."""
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        for worker in alive:
            worker.end(UNWANTED)
        spare = self._usable_spare()
        if spare is not None:
            spare.bury()

    def _born(self) -> Worker:
        worker = Worker(self._arena, self._limits, self._crew)
        with self._lock:
            self._alive = {other for other in self._alive if other.alive} | {worker}
            closed = self._closed
        if closed:
            worker.end(UNWANTED)
        return worker

    def _follow(self, worker: Worker) -> None:
        try:
            facts = worker.opened()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to who decides
            self._told.not_opened(worker, error)
            return
        self._told.ready(worker, facts)
        self._told.gone(worker, worker.wait(partial(self._told.narrowed, worker)))
