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
from dataclasses import dataclass, field, replace

from visionedge.engine.batcher import Batch, Batcher
from visionedge.engine.device.faults import RETRIED_FAULTS, EngineError, EngineUnavailableError
from visionedge.engine.interface import Engine, EngineInfo
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import (
    DEFAULT_MODEL,
    Frame,
    FrameResult,
    InputSpec,
    Picture,
    Timing,
    utc_now,
)
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
    """How many threads keep an engine busy: the plan's lanes, and two more for a process on the CPU.

    While a batch is on its way to the process or back, a core is idle unless another batch is there: one
    more thread gave up to 25 % more frames/s on two cores, and a second one 5 % more, as two lanes may be
    done at the same time. The plan for a GPU has such a lane already.
    """
    hides_transfer = info.process is not None and info.device.effective == "cpu"
    return info.plan.lanes + (2 if hides_transfer else 0)


@dataclass(slots=True, eq=False)
class ModelEngines:
    """The engine of one model, and while another one replaces it, the engine before it.

    All fields change under the condition of the pool. `uses`: batches in computation, by engine. `lanes`: how
    many were started.
    """

    model: str
    current: EngineWithSelection
    previous: EngineWithSelection | None = None
    uses: Counter[int] = field(default_factory=Counter)
    lanes: int = 0
    removed: bool = False


class Lane:
    """One lane: `run` is a thread's target and ends when the batcher or the pool is closed, or its model is
    removed.

    `deliver` is called for each result, in the order of a camera's frames, by one lane at a time for a
    camera; it must not block. All lanes of a pool share `errors`.
    """

    def __init__(
        self,
        batcher: Batcher,
        pool: "LanePool",
        deliver: Callable[[FrameResult], None],
        *,
        model: str = DEFAULT_MODEL,
        number: int = 0,
        errors: "BatchErrorLog | None" = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._batcher = batcher
        self._pool = pool
        self._deliver = deliver
        self._engines = pool.find_engines(model)
        self._number = number
        self._errors = errors or BatchErrorLog(clock)
        self._clock = clock

    def run(self) -> None:
        """Take, infer, deliver, until closed. A batch that fails is counted; the lane goes on."""
        model = self._engines.model
        while (engine := self._pool.wait_until_needed(self._engines, self._number)) is not None:
            on_cpu, max_count = engine.device.effective == "cpu", engine.plan.max_batch
            batch = self._batcher.take(max_count=max_count, model=model, spread=on_cpu)
            if batch is None:
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
            with self._pool.use(batch.frames[0].spec, self._engines.model) as running:
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
    """The engines in use, one for each model, and as many lanes as keep each busy, on vital threads.

    `swap_engine`, `select`, `start_lanes`, `drain_previous` and `remove` belong to one thread; `use` may be
    called by any. `model` is a name in `models`, or `DEFAULT_MODEL`.
    """

    def __init__(
        self, batcher: Batcher, thread_group: ThreadGroup, deliver: Callable[[FrameResult], None]
    ) -> None:
        self._batcher = batcher
        self._thread_group = thread_group
        self._deliver = deliver
        self._errors = BatchErrorLog()
        self._changed = threading.Condition()
        # A batch of a GPU is resized by all cores; the threads start when they are needed.
        self._resizers = ThreadPoolExecutor(bounded_cores(), thread_name_prefix="resize")
        # All below changes under the condition.
        self._engines: dict[str, ModelEngines] = {}
        self._closed = False

    def __repr__(self) -> str:
        engines = [f"{each.current.model.name}*{each.lanes}" for each in self._engines.values()]
        return f"<LanePool {' '.join(engines) or 'empty'}>"

    def pause(self) -> None:
        """Wait for a moment, or until the engine changes."""
        with self._changed:
            self._changed.wait(_POLL_S)

    @property
    def closed(self) -> bool:
        """Whether all lanes end."""
        return self._closed

    def find_engines(self, model: str) -> ModelEngines:
        """The engines of a model.

        Raises:
            KeyError: it has none.
        """
        return self._engines[model]

    def swap_engine(self, engine: Engine, selection: Selection, model: str = DEFAULT_MODEL) -> None:
        """Compute the frames for a model with this engine from the next batch on.

        The previous engine computes the frames that were prepared for it, until `drain_previous` returns;
        call this before another engine is swapped in.
        """
        running = EngineWithSelection.of(engine, selection)
        with self._changed:
            if (engines := self._engines.get(model)) is None:
                self._engines[model] = ModelEngines(model, running)
            else:
                engines.previous, engines.current = engines.current, running
        self.start_lanes()

    def select(self, selection: Selection, model: str = DEFAULT_MODEL) -> None:
        """Use another selection for a model from the next batch on."""
        with self._changed:
            if (engines := self._engines.get(model)) is not None:
                engines.current = replace(engines.current, selection=selection)

    def start_lanes(self) -> None:
        """Start the lanes that the engines need; to be called whenever a plan or a device has changed."""
        with self._changed:
            wanted = {} if self._closed else {each: _count_needed(each) for each in self._engines.values()}
            self._changed.notify_all()
        for engines, count in wanted.items():
            self._batcher.use_lanes(engines.model, count)
            for number in range(engines.lanes, count):
                model = engines.model
                lane = Lane(
                    self._batcher, self, self._deliver, model=model, number=number, errors=self._errors
                )
                name = f"lane:{model}:{number}" if model else f"lane:{number}"
                self._thread_group.start(name, lane.run, vital=True, may_return=True)
            engines.lanes = max(engines.lanes, count)

    def drain_previous(self, timeout_s: float, model: str = DEFAULT_MODEL) -> None:
        """Wait until no frame needs the previous engine, at most `timeout_s`; then forget the engine."""
        if (engines := self._engines.get(model)) is not None:
            with self._changed:
                self._wait_until(lambda: not self._needs_previous(engines), timeout_s)
                engines.previous = None

    def remove(self, model: str, timeout_s: float) -> None:
        """Compute no more frames for a model, and end its lanes; waits until its engine is idle."""
        with self._changed:
            if (engines := self._engines.pop(model, None)) is None:
                return
            engines.removed = True
            self._changed.notify_all()
        self._batcher.remove_model(model)
        with self._changed:
            self._wait_until(lambda: not any(engines.uses.values()), timeout_s)

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s and not condition():
            self._changed.wait(_POLL_S)

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
            if len(frames) > 2:  # else the lane itself resizes, and needs no lock
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

    def wait_until_needed(self, engines: ModelEngines, lane: int) -> EngineInfo | None:
        """Wait until an engine needs the lane of this number; its info, or None once the lane must end."""
        with self._changed:
            while not (self._closed or engines.removed):
                info = engines.current.engine.info()
                if lane < count_lanes(info):
                    return info
                self._changed.wait()
            return None

    @contextmanager
    def use(self, spec: InputSpec | None = None, model: str = DEFAULT_MODEL) -> Iterator[EngineWithSelection]:
        """The engine of a model, for frames that were prepared for `spec`; it stays open meanwhile.

        Without `spec` it is the engine in use.

        Raises:
            EngineUnavailableError: there is none yet.
            EngineError: the engine for this input is gone.
        """
        with self._changed:
            if (engines := self._engines.get(model)) is None:
                raise EngineUnavailableError("the engine is warming up")
            running = _find_engine(engines, spec)
            engines.uses[id(running.engine)] += 1
        try:
            yield running
        finally:
            with self._changed:
                engines.uses[id(running.engine)] -= 1
                self._changed.notify_all()

    def _needs_previous(self, engines: ModelEngines) -> bool:
        """Whether a frame waits for the previous engine of a model, or is computed there."""
        if (previous := engines.previous) is None:
            return False
        # Frames for an input that both engines have go to the engine in use.
        waits = previous.spec != engines.current.spec and self._batcher.has_frames_for(
            previous.spec, engines.model
        )
        return waits or engines.uses[id(previous.engine)] > 0


def _count_needed(engines: ModelEngines) -> int:
    return count_lanes(engines.current.engine.info())


def _find_engine(engines: ModelEngines, spec: InputSpec | None) -> EngineWithSelection:
    for running in (engines.current, engines.previous):
        if running is not None and spec in (None, running.spec):
            return running
    raise EngineError(f"no engine takes pictures prepared for {spec} any more")


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
