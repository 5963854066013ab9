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
from visionedge.engine.device.session import EngineError, EngineUnavailableError
from visionedge.engine.interface import SupportsInfer
from visionedge.frames.types import FrameResult, InputSpec, Timing
from visionedge.model.postprocess import Selection
from visionedge.runtime.threads import ThreadGroup

# Lanes: threads that take a batch, run it, and hand each result on.


log = logging.getLogger(__name__)

_LOG_INTERVAL_NS = 1_000_000_000


class BatchErrorLog:
    """Errors of batches, logged at most once a second with the number of those in between. Thread-safe."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_ns: int | None = None
        self._suppressed = 0

    def add(self, error: Exception) -> None:
        """Note an error, and log it unless one was logged within the last second."""
        with self._lock:
            now_ns = self._clock()
            if self._logged_ns is not None and now_ns - self._logged_ns < _LOG_INTERVAL_NS:
                self._suppressed += 1
                return
            self._logged_ns, suppressed, self._suppressed = now_ns, self._suppressed, 0
        log.error("a batch failed%s: %s", f" (and {suppressed} before it)" if suppressed else "", error)


@dataclass(frozen=True, slots=True)
class EngineWithSelection:
    """An engine, and which of its rows count. A batch is computed with one pair, never with parts of two."""

    engine: SupportsInfer
    selection: Selection


class ActiveEngine(Protocol):
    """What a lane asks of whoever knows the engine in use (`lineup.Lineup`)."""

    def wanted(self, lane: int) -> bool:
        """Wait until there is work for this lane; False when there will be none any more."""

    @property
    def max_batch(self) -> int:
        """The largest batch worth taking."""

    def use(self, spec: InputSpec | None) -> AbstractContextManager[EngineWithSelection]:
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
        active: ActiveEngine,
        deliver: Callable[[FrameResult], None],
        *,
        number: int = 0,
        errors: BatchErrorLog | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._batcher = batcher
        self._active = active
        self._number = number
        self._deliver = deliver
        self._errors = errors or BatchErrorLog(clock)
        self._clock = clock

    def run(self) -> None:
        """Take, infer, deliver, until the batcher is closed. A failed batch is counted, no more."""
        while self._active.wanted(self._number):
            batch = self._batcher.take(max_count=self._active.max_batch)
            if batch is None:
                return
            for part in batch.split_by_input():
                self._serve(part)

    def _serve(self, batch: Batch) -> None:
        outcome = Outcome.FAILED
        try:
            with self._active.use(batch.frames[0].spec) as running:
                self._compute(batch, running.engine, running.selection)
            outcome = Outcome.ANALYSED
        except EngineUnavailableError:
            pass  # nothing that has not been told
        except EngineError as error:
            self._errors.add(error)
        finally:
            # Only now may a frame of these cameras be taken again: results stay in order.
            self._batcher.done(batch, outcome)

    def _compute(self, batch: Batch, engine: SupportsInfer, selection: Selection) -> None:
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
            self._deliver(
                FrameResult(frame, detections, timing, device, engine.model.name, engine.model.labels)
            )


_POLL_S = 0.05


class LanePool:
    """Runs as many lanes as keep the engine in use busy, on threads of `crew`; these are vital.

    `adopt`, `select` and `follow` belong to one thread. `using` may be called by any, `settle` blocks.
    """

    def __init__(
        self, batcher: Batcher, thread_group: ThreadGroup, deliver: Callable[[FrameResult], None]
    ) -> None:
        self._batcher = batcher
        self._thread_group = thread_group
        self._deliver = deliver
        self._errors = BatchErrorLog()
        self._lanes = 0
        self._changed = threading.Condition()
        # All below changes under the condition.
        self._current: EngineWithSelection | None = None
        self._previous: EngineWithSelection | None = None
        self._uses: Counter[int] = Counter()
        self._closed = False

    def __repr__(self) -> str:
        now, previous = self._current, self._previous
        return (
            f"<Lineup {now.engine.model.name if now else 'empty'} lanes={self._lanes}"
            f" before={previous.engine.model.name if previous else None}>"
        )

    def swap_engine(self, engine: SupportsInfer, selection: Selection) -> None:
        """Compute with this engine from the next batch on.

        The one before serves the frames that were prepared for it until `settle` has let go of it; it must be
        settled before another is adopted.
        """
        with self._changed:
            self._previous, self._current = self._current, EngineWithSelection(engine, selection)
        self.start_lanes()

    def select(self, selection: Selection) -> None:
        """Let other rows count, from the next batch on."""
        with self._changed:
            if self._current is not None:
                self._current = EngineWithSelection(self._current.engine, selection)

    def start_lanes(self) -> None:
        """Have the lanes that the engine wants; to be called when that has changed."""
        with self._changed:
            wanted = 0 if self._current is None or self._closed else self._current.engine.concurrency
            self._changed.notify_all()
        for number in range(self._lanes, wanted):
            lane = Lane(self._batcher, self, self._deliver, number=number, errors=self._errors)
            self._thread_group.start(f"lane:{number}", lane.run, vital=True)
        self._lanes = max(self._lanes, wanted)

    def drain_previous(self, timeout_s: float) -> None:
        """Wait until nothing needs the engine before any more, at most so long; then it is forgotten."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while self._previous is not None and time.monotonic() < until_s and self._needed(self._previous):
                self._changed.wait(_POLL_S)
            self._previous = None

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
                lambda: (
                    self._closed or (self._current is not None and lane < self._current.engine.concurrency)
                )
            )
            return not self._closed

    @property
    def max_batch(self) -> int:
        """The largest batch that the engine in use likes."""
        now = self._current
        return 1 if now is None else now.engine.plan.max_batch

    @contextmanager
    def use(self, spec: InputSpec | None = None) -> Iterator[EngineWithSelection]:
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

    def _for(self, spec: InputSpec | None) -> EngineWithSelection:
        if self._current is None:
            raise EngineUnavailableError("the engine is warming up")
        for running in (self._current, self._previous):
            if running is not None and spec in (None, running.engine.model.input):
                return running
        raise EngineError(f"no engine takes pictures prepared as {spec} any more")

    def _needed(self, previous: EngineWithSelection) -> bool:
        spec = previous.engine.model.input
        # Frames for an input that both take go to the engine in use.
        waits = (
            self._current is not None
            and spec != self._current.engine.model.input
            and self._batcher.has_frames_for(spec)
        )
        return waits or self._uses[id(previous.engine)] > 0
