"""The worker that serves, as the callers of `infer` and `info` see it: which one, and why there is none."""

import threading
from dataclasses import replace
from typing import Any

from visionedge.engine.device.faults import EngineUnavailableError
from visionedge.engine.interface import EngineInfo, ProcessStatus, RecoveryStatistics
from visionedge.engine.process.worker import Worker


class ActiveWorker:
    """The supervisor's thread changes it; any thread may call `mark_lost`, `wait`, `info` and `down`.

    A snapshot is made at each change, so that `info` costs nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All below changes under the condition.
        self._serving: Worker | None = None
        self._process: Worker | None = None
        self._opened: EngineInfo | None = None
        self._snapshot: EngineInfo | None = None
        self._recovery: RecoveryStatistics | None = None
        self._down = "the engine is warming up"
        self._served = 0
        self._unplanned_before = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<ActiveWorker {self._down if self._serving is None else self._serving}>"

    # --- for the supervisor ---------------------------------------------------------------------------------

    def set_opening(self, worker: Worker) -> None:
        """This worker opens its engine, to serve."""
        with self._changed:
            self._process = worker
            self._update_snapshot()

    def set_serving(self, worker: Worker, info: EngineInfo) -> None:
        """This worker computes from now on; the one before finishes its own batches."""
        with self._changed:
            self._retire_serving()
            self._serving = self._process = worker
            self._opened = info
            self._served += 1
            self._update_snapshot()
            self._changed.notify_all()

    def update(self, **changes: Any) -> None:
        """These fields of the engine's info are different from now on."""
        with self._changed:
            if self._opened is not None:
                self._opened = replace(self._opened, **changes)
            self._update_snapshot()

    def set_recovery(self, recovery: RecoveryStatistics) -> None:
        """Show this state of the recovery."""
        with self._changed:
            self._recovery = recovery
            self._update_snapshot()

    def clear(self, down: str) -> None:
        """No worker computes any more, for this reason."""
        with self._changed:
            self._retire_serving()
            self._process = None
            self._set_down(down)

    def set_down_reason(self, down: str) -> None:
        """The reason why no worker computes."""
        with self._changed:
            self._set_down(down)

    def close(self) -> None:
        """End all waits: nothing computes any more."""
        with self._changed:
            self._retire_serving()
            self._set_down("the engine is closed")
            self._closed = True
            self._changed.notify_all()

    # --- for any thread -------------------------------------------------------------------------------------

    def mark_lost(self, worker: Worker) -> None:
        """This worker is lost: the next callers wait for another one, instead of failing at once."""
        with self._changed:
            if self._serving is worker:
                self._retire_serving()
                self._set_down(f"the engine's process {worker.pid} was lost")

    def wait(self, timeout_s: float) -> Worker:
        """The worker that computes.

        Raises:
            EngineUnavailableError: there is none within the time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._serving is not None or self._closed, timeout_s)
            if self._serving is None:
                raise EngineUnavailableError(self._down)
            return self._serving

    def info(self) -> EngineInfo:
        """The engine of the worker that computes, or of the last one.

        Raises:
            EngineUnavailableError: none has been ready yet.
        """
        snapshot = self._snapshot
        if snapshot is None:
            raise EngineUnavailableError(self._down)
        unplanned = self._count_unplanned()
        return (
            snapshot
            if snapshot.unplanned_shapes == unplanned
            else replace(snapshot, unplanned_shapes=unplanned)
        )

    @property
    def down(self) -> str | None:
        """Why no worker computes; None while one does."""
        return self._down if self._serving is None else None

    # --- with the condition held ----------------------------------------------------------------------------

    def _set_down(self, down: str) -> None:
        if not self._closed:
            self._down = down
        self._update_snapshot()

    def _retire_serving(self) -> None:
        if self._serving is not None:
            self._unplanned_before += self._serving.unplanned_shapes
        self._serving = None

    def _count_unplanned(self) -> int:
        serving = self._serving
        return self._unplanned_before + (0 if serving is None else serving.unplanned_shapes)

    def _update_snapshot(self) -> None:
        if self._opened is None:
            return
        pid = None if self._process is None else self._process.pid
        self._snapshot = replace(
            self._opened,
            unplanned_shapes=self._count_unplanned(),
            process=ProcessStatus(pid, self._served - 1, self.down),
            recovery=self._recovery,
        )
