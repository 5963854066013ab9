"""The engine in a process of its own, which the module can afford to lose.

    cameras ── pictures ──▶ shared memory ──┐
    lanes ──── block numbers ──────────────▶ child: gather, run ──── few rows ──▶ lanes

A thread watches over the child: when it dies, hangs or is killed, another one is started, and until that is
ready batches fail.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from visionedge.config import InferenceConfig
from visionedge.inference import wire
from visionedge.inference.any_engine import ProcessStatus
from visionedge.inference.contest import Choice
from visionedge.inference.detections import Rows
from visionedge.inference.devices import DeviceState
from visionedge.inference.engine import check_pictures
from visionedge.inference.model import Model
from visionedge.inference.plan import Plan
from visionedge.inference.session import EngineAwayError, EngineError, NodePlaces, Pictures
from visionedge.inference.shared import Arena
from visionedge.inference.worker import Limits, Worker
from visionedge.threads import Crew

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 30.0
_HEALTHY_S = 60.0
_END_S = 2.0


@dataclass(frozen=True, slots=True)
class EngineNews:
    """The child was lost, or another one is ready: for events."""

    code: Literal["engine-lost", "engine-back"]
    message: str


def _ignore(_news: EngineNews) -> None:
    """Nobody wants to hear of it."""


class EngineProcess:
    """An engine (`any_engine.AnyEngine`) in a child; pictures that lie in `arena` are not copied to it.

    `open` and `close` once, on any thread; any number of threads may call `infer`. `on_change` is called from
    the thread that watches over the child, which is vital to `crew`; the crew is for this engine alone.
    """

    def __init__(
        self,
        model: Model,
        inference: InferenceConfig,
        arena: Arena,
        *,
        data: Path | None = None,
        crew: Crew | None = None,
        limits: Limits | None = None,
        on_change: Callable[[EngineNews], None] = _ignore,
    ) -> None:
        self.model = model
        self._order = wire.Order(model, inference, data, logging.getLogger().getEffectiveLevel())
        self._arena = arena
        self._crew = crew or Crew(lambda _name, _error: None)
        self._limits = limits or Limits()
        self._on_change = on_change
        self._first: Future[None] = Future()
        self._closing = threading.Event()
        self._changed = threading.Condition()
        # All below changes under the condition. The child is there from its first moment, the worker (the
        # same) only while it computes.
        self._child: Worker | None = None
        self._worker: Worker | None = None
        self._facts: wire.Facts | None = None
        self._down = "the engine is warming up"
        self._starts = 0
        self._unplanned_before = 0

    def __repr__(self) -> str:
        status = self.process
        return f"<EngineProcess {self.model.name} {status.down or 'ready'} restarts={status.restarts}>"

    def open(self) -> None:
        """Start the child and wait until its engine is warmed up; takes seconds, or minutes for TensorRT.

        Raises:
            DeviceError, ModelError, UnavailableError: as `startup.open_engine`.
            EngineError: the child died over it, or `close` was called meanwhile.
        """
        self._crew.start("engine", self._watch, vital=True)
        try:
            self._first.result()
        except BaseException:
            self.close()
            raise

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Compute pictures in the child; see `engine.Engine.infer`. Waits a moment for one that is not there.

        Raises:
            EngineError: as in this process; or the child was lost, and no other is ready yet.
        """
        check_pictures(pictures, self.model.input, self.model.name)
        with self._changed:
            self._changed.wait_for(
                lambda: self._worker is not None or self._closing.is_set(), self._limits.absent_s
            )
            worker, down = self._worker, self._down
        if worker is None:
            raise EngineAwayError(down)
        return worker.compute(pictures, least_score)

    def close(self) -> None:
        """End the child and its thread; batches in progress fail."""
        self._crew.stopping.set()
        self._closing.set()
        with self._changed:
            child, self._worker, self._down = self._child, None, "the engine is closed"
            self._changed.notify_all()
        if child is not None:
            child.leave()
        self._crew.join(_END_S)

    @property
    def device(self) -> DeviceState:
        """Where the child computes, or did when it was last there, and why there."""
        return self._known.device

    @property
    def plan(self) -> Plan:
        """Its lanes and batch sizes."""
        return self._known.plan

    @property
    def precision(self) -> Choice:
        """The precision it computes in."""
        return self._known.precision

    @property
    def places(self) -> NodePlaces:
        """Where the nodes of its graph lie."""
        return self._known.places

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that were refused."""
        return self._known.notes

    @property
    def rows(self) -> int:
        """K: the most rows for a picture."""
        return self._known.rows

    @property
    def unplanned_shapes(self) -> int:
        """Over all children there were; must stay 0."""
        with self._changed:
            worker = self._worker
            return self._unplanned_before + (worker.unplanned_shapes if worker else 0)

    @property
    def process(self) -> ProcessStatus:
        """How the child is."""
        with self._changed:
            pid = self._child.pid if self._child else None
            down = None if self._worker else self._down
            return ProcessStatus(pid, max(0, self._starts - 1), down)

    @property
    def _known(self) -> wire.Facts:
        if self._facts is None:
            raise EngineError(self._down)
        return self._facts

    # --- the thread that watches ----------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have a child until closed: another at once, and ever later when none stays."""
        pause_s = 0.0
        while not self._closing.is_set():
            lived_s = self._one_life()
            if lived_s >= _HEALTHY_S:
                pause_s = 0.0
            self._closing.wait(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s or 1.0)
        if not self._first.done():  # closed before it began
            self._first.set_exception(EngineError(self._down))

    def _one_life(self) -> float:
        """Start a child, and wait for its end; for how long it was ready, in s."""
        began_s = time.monotonic()
        try:
            worker = Worker(self._order, self._arena, self._limits, self._crew)
            with self._changed:
                self._child = worker
            if self._closing.is_set():
                worker.leave()
            facts = worker.opened()
        except Exception as error:  # noqa: BLE001 - raised by `open`, or tried again
            self._failed(error)
            return 0.0
        self._adopt(worker, facts, time.monotonic() - began_s)
        ready_s = time.monotonic()
        self._lose(worker, worker.wait())
        return time.monotonic() - ready_s

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._child = None
        if not self._first.done():
            self._first.set_exception(error)
            self._closing.wait()  # `open` raises it, and closes
        elif not self._closing.is_set():
            log.warning("the engine could not be started again: %s; it is tried again and again", error)

    def _adopt(self, worker: Worker, facts: wire.Facts, took_s: float) -> None:
        with self._changed:
            self._worker, self._facts = worker, facts
            self._order = replace(
                self._order, plans={**self._order.plans, facts.device.effective: facts.plan}
            )
            self._starts += 1
            again = self._starts > 1
            self._changed.notify_all()
        if again:
            words = f"the engine is back after {took_s:.1f} s, process {worker.pid}"
            log.info("%s", words)
            self._on_change(EngineNews("engine-back", f"{words}; {facts.device.describe()}"))
        else:
            self._first.set_result(None)

    def _lose(self, worker: Worker, why: str) -> None:
        with self._changed:
            self._child = self._worker = None
            self._unplanned_before += worker.unplanned_shapes
            if self._closing.is_set():
                return
            self._down = f"the engine is restarting: its process {why}"
        words = f"the engine's process {worker.pid} {why}; another one is started"
        log.error("%s", words)
        self._on_change(EngineNews("engine-lost", words))
