"""Lanes: threads that take a batch, run it, and hand each result on."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from visionedge.engine.batcher import Batch, Batcher, Outcome
from visionedge.engine.device.session import EngineAwayError, EngineError
from visionedge.engine.interface import Computes
from visionedge.frames.types import InputSpec, Result, Timing
from visionedge.model.postprocess import Selection

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
