"""Lanes: threads that take a batch, infer, and deliver the results; and how one engine replaces another.

    batcher ──▶ lane 0 … n-1 ──▶ the engine in use
                            └──▶ the engine before it, for frames that were prepared for its input

A GPU needs two or three lanes with large batches, a CPU one lane per core with one picture each. `make_frame`
and `infer_frames` do the same for single pictures (`visionedge detect`, POST /api/v1/detect), without a
batcher.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from visionedge.engine.batcher import Batch, Batcher
from visionedge.engine.device.faults import RETRIED_FAULTS, EngineError, EngineUnavailableError
from visionedge.engine.interface import Engine, EngineInfo
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Frame, FrameResult, InputSpec, Picture, Timing, utc_now
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.runtime.process_limits import bounded_cores
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

_LOG_INTERVAL_NS = 1_000_000_000
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineWithSelection:
    """An engine, its model, and which of its rows count. A batch is computed with exactly one of these."""

    engine: Engine
    selection: Selection
    model: Model
    spec: InputSpec
    """The model's input."""

    @staticmethod
    def of(engine: Engine, selection: Selection) -> "EngineWithSelection":
        """With the model of the engine."""
        model = engine.info().model
        return EngineWithSelection(engine, selection, model, model.input)


def count_lanes(info: EngineInfo) -> int:
    """How many threads keep an engine busy: the plan's lanes, and one more for a process on the CPU.

    While a batch is on its way to the process or back, a core is idle unless another batch is there: one
    more thread gave up to 25 % more frames/s on two cores. The plan for a GPU has such a lane already.
    """
    hides_transfer = info.process is not None and info.device.effective == "cpu"
    return info.plan.lanes + (1 if hides_transfer else 0)


class Lane:
    """One lane: `run` is a thread's target and ends when the batcher or the pool is closed.

    `deliver` is called for each result, in the order of a camera's frames, by one lane at a time for a
    camera; it must not block. All lanes of a pool share `errors`.
    """

    def __init__(
        self,
        batcher: Batcher,
        pool: "LanePool",
        deliver: Callable[[FrameResult], None],
        *,
        number: int = 0,
        errors: "BatchErrorLog | None" = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._batcher = batcher
        self._pool = pool
        self._deliver = deliver
        self._number = number
        self._errors = errors or BatchErrorLog(clock)
        self._clock = clock

    def run(self) -> None:
        """Take, infer, deliver, until closed. A batch that fails is counted; the lane goes on."""
        while (engine := self._pool.wait_until_needed(self._number)) is not None:
            if (batch := self._batcher.take(max_count=engine.plan.max_batch)) is None:
                return
            self._hand_on(batch.released)
            for part in batch.split_by_input():  # more than one part only while a model is being replaced
                self._finish(part)

    def _finish(self, batch: Batch) -> None:
        """Compute a batch, again if a remote device lost it, give it back, and deliver what can be."""
        left: Batch | None = batch
        results: list[FrameResult] | None = []
        try:
            while left is not None and (results := self._compute(left, retrying=left is not batch)) is None:
                if left is not batch:
                    self._pool.pause()  # no engine answers at all
                left, released = self._batcher.drop_stale(left)
                self._hand_on(released)
        finally:
            if left is not None:
                self._hand_on(self._batcher.done(left, results or ()))

    def _compute(self, batch: Batch, *, retrying: bool) -> list[FrameResult] | None:
        """The results of a batch, none if it failed; None: to be computed again, as long as it is fresh."""
        try:
            with self._pool.use(batch.frames[0].spec) as running:
                pictures = self._pool.resize(batch.frames)
                return list(_infer(batch.frames, pictures, running, self._clock, batch.taken_ns))
        except EngineUnavailableError as error:  # the supervisor has reported it
            again = error.fault in RETRIED_FAULTS or (retrying and error.fault is None)
            return None if again and not self._pool.closed else []
        except EngineError as error:
            if error.fault in RETRIED_FAULTS and not self._pool.closed:
                return None
            self._errors.add(error)
            return []

    def _hand_on(self, results: Sequence[FrameResult]) -> None:
        """Deliver results, and those whose turn comes by that."""
        while results:
            delivered = 0
            try:
                for result in results:
                    self._deliver(result)
                    delivered += 1
            finally:
                results = self._batcher.confirm(results, delivered)


def make_frame(picture: Picture, engine: Engine, sequence: int = 1) -> Frame:
    """The picture as a frame of no camera, at the input size of the engine's model."""
    captured_ns, captured_utc = time.monotonic_ns(), utc_now()
    image, placement = fit_to_input(picture, engine.info().model.input)
    height_px, width_px = picture.shape[:2]
    size = width_px, height_px
    return Frame("", sequence, 1, captured_ns, captured_utc, *size, image, placement, lambda: picture)


def infer_frames(frames: list[Frame], engine: Engine, selection: Selection) -> list[FrameResult]:
    """Compute frames as one batch, on the calling thread.

    Raises:
        EngineError: the engine failed on them.
    """
    running = EngineWithSelection.of(engine, selection)
    pictures = [frame.input_picture() for frame in frames]
    return list(_infer(frames, pictures, running, time.monotonic_ns))


def _infer(
    frames: Sequence[Frame],
    pictures: Sequence[Picture],
    running: EngineWithSelection,
    clock: Callable[[], int],
    taken_ns: int | None = None,
) -> Iterator[FrameResult]:
    """Compute frames as one batch, and give their results one after the other, each timed when it is made.

    `pictures` are those of the frames at the model's input size. `taken_ns` is when the batch was taken;
    None: now.

    Raises:
        EngineError: the engine failed on them, or gave another number of results.
    """
    engine, selection, model = running.engine, running.selection, running.model
    started_ns = clock()
    least_score = min(selection.of_camera(frame.camera).least_score for frame in frames)
    inference = engine.infer(pictures, least_score)
    precision = engine.info().choice.precision
    infer_ns = clock() - started_ns
    if len(inference.rows) != len(frames):
        raise EngineError(f"the engine gave {len(inference.rows)} results for {len(frames)} pictures")
    for frame, rows in zip(frames, inference.rows, strict=True):
        detections, candidates = selection.apply_to_camera(frame.camera, rows, frame.placement)
        timing = Timing(
            wait_ns=(started_ns if taken_ns is None else taken_ns) - frame.captured_ns,
            infer_ns=infer_ns,
            total_ns=clock() - frame.captured_ns,
            batch_size=len(frames),
        )
        yield FrameResult(
            frame,
            detections,
            timing,
            inference.device,
            model.name,
            model.labels,
            candidates,
            precision=precision,
        )


class LanePool:
    """The engine in use, and as many lanes as keep it busy, on vital threads of the group.

    `swap_engine`, `select`, `start_lanes` and `drain_previous` belong to one thread; `use` may be called by
    any.
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
        # A batch of a GPU is resized by all cores; the threads start when they are needed.
        self._resizers = ThreadPoolExecutor(bounded_cores(), thread_name_prefix="resize")
        # All below changes under the condition.
        self._current: EngineWithSelection | None = None
        self._previous: EngineWithSelection | None = None
        self._uses: Counter[int] = Counter()
        self._closed = False

    def __repr__(self) -> str:
        current, previous = self._current, self._previous
        return (
            f"<LanePool {current.model.name if current else 'empty'} lanes={self._lanes}"
            f" previous={previous.model.name if previous else None}>"
        )

    def pause(self) -> None:
        """Wait for a moment, or until the engine changes."""
        with self._changed:
            self._changed.wait(_POLL_S)

    @property
    def closed(self) -> bool:
        """Whether all lanes end."""
        return self._closed

    def swap_engine(self, engine: Engine, selection: Selection) -> None:
        """Compute with this engine from the next batch on.

        The previous engine computes the frames that were prepared for it, until `drain_previous` returns;
        call this before another engine is swapped in.
        """
        with self._changed:
            self._previous = self._current
            self._current = EngineWithSelection.of(engine, selection)
        self.start_lanes()

    def select(self, selection: Selection) -> None:
        """Use another selection from the next batch on."""
        with self._changed:
            if self._current is not None:
                self._current = replace(self._current, selection=selection)

    def start_lanes(self) -> None:
        """Start the lanes that the engine needs; to be called whenever its plan or device has changed."""
        with self._changed:
            lane_count = 0
            if self._current is not None and not self._closed:
                lane_count = count_lanes(self._current.engine.info())
            self._changed.notify_all()
        for number in range(self._lanes, lane_count):
            lane = Lane(self._batcher, self, self._deliver, number=number, errors=self._errors)
            self._thread_group.start(f"lane:{number}", lane.run, vital=True)
        self._lanes = max(self._lanes, lane_count)

    def drain_previous(self, timeout_s: float) -> None:
        """Wait until no frame needs the previous engine, at most `timeout_s`; then forget the engine."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while self._previous is not None and time.monotonic() < until_s and self._needs(self._previous):
                self._changed.wait(_POLL_S)
            self._previous = None

    def close(self) -> None:
        """Let all lanes end; the owner of the batcher closes it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._resizers.shutdown()

    def resize(self, frames: Sequence[Frame]) -> list[Picture]:
        """The pictures of frames at the model's input size.

        Raises:
            EngineError: one of them cannot be resized.
        """
        pending: dict[int, Future[Picture]] = {}
        try:
            if len(frames) > 1:  # else the lane itself resizes, and needs no lock
                with self._changed:
                    pending = {
                        index: self._resizers.submit(frame.input_picture)
                        for index, frame in enumerate(frames)
                        if index > 0 and callable(frame.image) and not self._closed
                    }
            return [
                pending[index].result() if index in pending else frame.input_picture()
                for index, frame in enumerate(frames)
            ]
        except Exception as error:  # whatever a picture raises must not end a lane
            raise EngineError(f"a picture cannot be resized: {type(error).__name__}: {error}") from error

    def wait_until_needed(self, lane: int) -> EngineInfo | None:
        """Wait until the engine needs the lane of this number; its info, or None once the pool is closed."""
        with self._changed:
            while not self._closed:
                if self._current is not None:
                    info = self._current.engine.info()
                    if lane < count_lanes(info):
                        return info
                self._changed.wait()
            return None

    @contextmanager
    def use(self, spec: InputSpec | None = None) -> Iterator[EngineWithSelection]:
        """The engine for frames that were prepared for `spec` (None: the engine in use); kept open meanwhile.

        Raises:
            EngineUnavailableError: there is none yet.
            EngineError: the engine for this input is gone.
        """
        with self._changed:
            running = self._find(spec)
            self._uses[id(running.engine)] += 1
        try:
            yield running
        finally:
            with self._changed:
                self._uses[id(running.engine)] -= 1
                self._changed.notify_all()

    def _find(self, spec: InputSpec | None) -> EngineWithSelection:
        if self._current is None:
            raise EngineUnavailableError("the engine is warming up")
        for running in (self._current, self._previous):
            if running is not None and spec in (None, running.spec):
                return running
        raise EngineError(f"no engine takes pictures prepared for {spec} any more")

    def _needs(self, previous: EngineWithSelection) -> bool:
        """Whether a frame waits for the previous engine, or is computed there."""
        spec = previous.spec
        # Frames for an input that both engines have go to the engine in use.
        waits = (
            self._current is not None and spec != self._current.spec and self._batcher.has_frames_for(spec)
        )
        return waits or self._uses[id(previous.engine)] > 0


class BatchErrorLog:
    """Logs the errors of batches, at most one a second, with the number of those in between. Thread-safe."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_ns: int | None = None
        self._suppressed = 0

    def add(self, error: Exception) -> None:
        """Count an error, and log it unless one was logged within the last second."""
        with self._lock:
            now_ns = self._clock()
            if self._logged_ns is not None and now_ns - self._logged_ns < _LOG_INTERVAL_NS:
                self._suppressed += 1
                return
            self._logged_ns, suppressed, self._suppressed = now_ns, self._suppressed, 0
        log.error("a batch failed%s: %s", f" (and {suppressed} before it)" if suppressed else "", error)
