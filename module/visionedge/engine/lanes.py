"""The engine in use and its lanes, and how another engine takes over without a frame lost or doubled.

batcher ──▶ lane 0 … n-1 ──▶ the engine in use
                        └──▶ the one before it, for frames that were prepared for another input
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from visionedge.engine.batcher import Batcher
from visionedge.engine.device.session import EngineAwayError, EngineError
from visionedge.engine.interface import Computes
from visionedge.engine.lanes_part import Complaints, Lane, Running
from visionedge.frames.types import InputSpec, Result
from visionedge.model.postprocess import Selection
from visionedge.runtime.threads import Crew

_LOOK_AGAIN_S = 0.05


class Lineup:
    """Runs as many lanes as keep the engine in use busy, on threads of `crew`; these are vital.

    `adopt`, `select` and `follow` belong to one thread. `using` may be called by any, `settle` blocks.
    """

    def __init__(self, batcher: Batcher, crew: Crew, deliver: Callable[[Result], None]) -> None:
        self._batcher = batcher
        self._crew = crew
        self._deliver = deliver
        self._complaints = Complaints()
        self._lanes = 0
        self._changed = threading.Condition()
        # All below changes under the condition.
        self._now: Running | None = None
        self._before: Running | None = None
        self._uses: Counter[int] = Counter()
        self._closed = False

    def __repr__(self) -> str:
        now, before = self._now, self._before
        return (
            f"<Lineup {now.engine.model.name if now else 'empty'} lanes={self._lanes}"
            f" before={before.engine.model.name if before else None}>"
        )

    def adopt(self, engine: Computes, selection: Selection) -> None:
        """Compute with this engine from the next batch on.

        The one before serves the frames that were prepared for it until `settle` has let go of it; it must be
        settled before another is adopted.
        """
        with self._changed:
            self._before, self._now = self._now, Running(engine, selection)
        self.follow()

    def select(self, selection: Selection) -> None:
        """Let other rows count, from the next batch on."""
        with self._changed:
            if self._now is not None:
                self._now = Running(self._now.engine, selection)

    def follow(self) -> None:
        """Have the lanes that the engine wants; to be called when that has changed."""
        with self._changed:
            wanted = 0 if self._now is None or self._closed else self._now.engine.callers
            self._changed.notify_all()
        for number in range(self._lanes, wanted):
            lane = Lane(self._batcher, self, self._deliver, number=number, complaints=self._complaints)
            self._crew.start(f"lane:{number}", lane.run, vital=True)
        self._lanes = max(self._lanes, wanted)

    def settle(self, timeout_s: float) -> None:
        """Wait until nothing needs the engine before any more, at most so long; then it is forgotten."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while self._before is not None and time.monotonic() < until_s and self._needed(self._before):
                self._changed.wait(_LOOK_AGAIN_S)
            self._before = None

    def close(self) -> None:
        """Let all lanes end; the batcher is closed by whoever owns it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- for the lanes, and for whoever computes beside them ------------------------------------------------

    def wanted(self, lane: int) -> bool:
        """Wait until the engine wants so many lanes; False once closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._now is not None and lane < self._now.engine.callers)
            )
            return not self._closed

    @property
    def max_batch(self) -> int:
        """The largest batch that the engine in use likes."""
        now = self._now
        return 1 if now is None else now.engine.plan.max_batch

    @contextmanager
    def using(self, spec: InputSpec | None = None) -> Iterator[Running]:
        """The engine for frames prepared for `spec` (None: the one in use), which is not closed meanwhile.

        Raises:
            EngineError: there is none.
        """
        with self._changed:
            running = self._for(spec)
            self._uses[id(running.engine)] += 1
        try:
            yield running
        finally:
            with self._changed:
                self._uses[id(running.engine)] -= 1
                self._changed.notify_all()

    def _for(self, spec: InputSpec | None) -> Running:
        if self._now is None:
            raise EngineAwayError("the engine is warming up")
        for running in (self._now, self._before):
            if running is not None and spec in (None, running.engine.model.input):
                return running
        raise EngineError(f"no engine takes pictures prepared as {spec} any more")

    def _needed(self, before: Running) -> bool:
        spec = before.engine.model.input
        # Frames for an input that both take go to the engine in use.
        waits = self._now is not None and spec != self._now.engine.model.input and self._batcher.holds(spec)
        return waits or self._uses[id(before.engine)] > 0
