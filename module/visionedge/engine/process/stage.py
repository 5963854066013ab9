"""What lanes see of the engine's processes: the one that serves, what is known of it, why there is none."""

import threading
from dataclasses import dataclass, replace

from visionedge.engine.device.session import EngineAwayError, EngineError
from visionedge.engine.interface import ProcessStatus
from visionedge.engine.process.protocol import Facts
from visionedge.engine.process.worker import Worker


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
