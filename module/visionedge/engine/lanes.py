"""The engine in use and its lanes, and how another engine takes over without a frame lost or doubled.

batcher ──▶ lane 0 … n-1 ──▶ the engine in use
                        └──▶ the one before it, for frames that were prepared for another input
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from visionedge.engine.batcher import Batch, Batcher, Outcome
from visionedge.engine.device.session import EngineAwayError, EngineError
from visionedge.engine.interface import Computes
from visionedge.frames.types import InputSpec, Result, Timing
from visionedge.model.postprocess import Selection
from visionedge.runtime.threads import Crew

# Lanes: threads that take a batch, run it, and hand each result on.


log = logging.getLogger(__name__)

_QUIET_NS = 1_000_000_000


class Complaints:
    """Errors of batches, logged at most once a second with the number of those in between. Thread-safe."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told_ns: int | None = None
        self._unsaid = 0

    def add(self, error: Exception) -> None:
        """Note an error, and log it unless one was logged within the last second."""
        with self._lock:
            now_ns = self._clock()
            if self._told_ns is not None and now_ns - self._told_ns < _QUIET_NS:
                self._unsaid += 1
                return
            self._told_ns, unsaid, self._unsaid = now_ns, self._unsaid, 0
        log.error("a batch failed%s: %s", f" (and {unsaid} before it)" if unsaid else "", error)


@dataclass(frozen=True, slots=True)
class Running:
    """An engine, and which of its rows count. A batch is computed with one pair, never with parts of two."""

    engine: Computes
    selection: Selection


class EngineInUse(Protocol):
    """What a lane asks of whoever knows the engine in use (`lineup.Lineup`)."""

    def wanted(self, lane: int) -> bool:
        """Wait until there is work for this lane; False when there will be none any more."""

    @property
    def max_batch(self) -> int:
        """The largest batch worth taking."""

    def using(self, spec: InputSpec | None) -> AbstractContextManager[Running]:
        """The engine for frames that were prepared for `spec`; it stays open meanwhile.

        Raises:
            EngineError: there is none.
        """


class Lane:
    """One lane: `run` is a thread's target and ends when the batcher closes.

    `deliver` is called for each result, in the order of a camera's frames; it must not block. Lanes of one
    engine may share `complaints`.
    """

    def __init__(
        self,
        batcher: Batcher,
        in_use: EngineInUse,
        deliver: Callable[[Result], None],
        *,
        number: int = 0,
        complaints: Complaints | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._batcher = batcher
        self._in_use = in_use
        self._number = number
        self._deliver = deliver
        self._complaints = complaints or Complaints(clock)
        self._clock = clock

    def run(self) -> None:
        """Take, infer, deliver, until the batcher is closed. A failed batch is counted, no more."""
        while self._in_use.wanted(self._number):
            batch = self._batcher.take(most=self._in_use.max_batch)
            if batch is None:
                return
            for part in batch.parts():
                self._serve(part)

    def _serve(self, batch: Batch) -> None:
        outcome = Outcome.FAILED
        try:
            with self._in_use.using(batch.frames[0].spec) as running:
                self._compute(batch, running.engine, running.selection)
            outcome = Outcome.ANALYSED
        except EngineAwayError:
            pass  # nothing that has not been told
        except EngineError as error:
            self._complaints.add(error)
        finally:
            # Only now may a frame of these cameras be taken again: results stay in order.
            self._batcher.done(batch, outcome)

    def _compute(self, batch: Batch, engine: Computes, selection: Selection) -> None:
        """Infer and deliver."""
        started_ns = self._clock()
        images = [frame.image for frame in batch.frames]
        rows, device = engine.compute(images, selection.confidence)
        if len(rows) != len(batch):
            raise EngineError(f"the engine gave {len(rows)} results for {len(batch)} pictures")
        infer_ns = self._clock() - started_ns
        for frame, found in zip(batch.frames, rows, strict=True):
            detections = selection.apply(found, frame.placement)
            timing = Timing(
                wait_ns=batch.taken_ns - frame.captured_ns,
                infer_ns=infer_ns,
                total_ns=self._clock() - frame.captured_ns,
                batch_size=len(batch),
            )
            self._deliver(Result(frame, detections, timing, device, engine.model.name, engine.model.labels))


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
