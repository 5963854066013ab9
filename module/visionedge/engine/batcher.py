"""The batcher: the newest frame of every camera waits here until a lane takes it.

A batch forms by itself: while the lanes are busy, frames gather, and the next lane takes all of them that are
for its model. Idle lanes take further frames of a camera while others of it are computed; its results are
handed on in order of sequence. Camera threads call `put` and `wait_taken`, lanes `take`, `done` and
`confirm`, the service the rest. There is one lock, held for assignments only; `put` never blocks.

Cameras share the engines fairly: each has a virtual time, which grows with every frame that is taken, by the
mean engine time of a picture of its model. The camera with the least one is next. (Start-time fair queueing:
Goyal, Vin, Cheng, SIGCOMM 1996.) So a camera with a slow model is analysed less often than one with a fast
model, and both use the engines for equally long.

At every moment, for every camera:

    offered = analysed + failed + replaced + stale + gated + discarded + waiting + in_flight
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from visionedge.engine.reorder_buffer import ReorderBuffer
from visionedge.frames.types import DEFAULT_MODEL, Frame, FrameResult, InputSpec

_COST_SHARE = 0.05
"""The share of the newest batch in the mean engine time of a picture."""

_MAX_CREDIT_NS = 200_000_000.0
"""A camera that paused, or whose engine failed, is ahead of the others by this engine time at most, not by
all that it missed."""

_OVERDUE_FACTOR, _OVERDUE_NS = 4, 100_000_000
"""A batch that takes so many times its usual time, and this much more, does not hold back other models: its
engine may hang."""


class DropReason(StrEnum):
    """Why a frame was not analysed.

    replaced: a newer frame came before a lane took it; stale: too old when its turn came, or computed too
    late to keep the order; gated: held back by the motion gate; failed: the engine failed on its batch;
    discarded: its camera or the module was closed.
    """

    REPLACED = "replaced"
    STALE = "stale"
    GATED = "gated"
    FAILED = "failed"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of different cameras for one model, taken together. The lane that took it must call `done`.

    `released`: instead of frames, results that wait no longer for an earlier one. The lane must deliver them
    and call `confirm`. `number`: no other batch has the same, but parts of this one.
    """

    frames: tuple[Frame, ...]
    taken_ns: int
    released: tuple[FrameResult, ...] = ()
    number: int = 0

    def __len__(self) -> int:
        return len(self.frames)

    def split_by_input(self) -> tuple["Batch", ...]:
        """The batch by the input of its frames; more than one part only while a model changes."""
        by_spec: dict[InputSpec | None, list[Frame]] = {}
        for frame in self.frames:
            by_spec.setdefault(frame.spec, []).append(frame)
        if len(by_spec) == 1:
            return (self,)
        return tuple(replace(self, frames=tuple(frames)) for frames in by_spec.values())


@dataclass(frozen=True, slots=True)
class CameraStatistics:
    """The frames of a camera, counted; `waiting` is 0 or 1.

    `in_flight`: frames that a lane took and that are not counted otherwise yet. `engine_ns`: the time that
    engines have spent on its pictures; of a batch each picture has an equal part.
    """

    offered: int
    analysed: int
    waiting: int
    in_flight: int
    dropped: Mapping[DropReason, int]
    engine_ns: int = 0


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """A snapshot: the frames of each camera, and the number of batches by size."""

    cameras: Mapping[str, CameraStatistics]
    batch_sizes: Mapping[int, int]


@dataclass(slots=True)
class _Slot:
    emptied: threading.Condition
    """The slot turned empty. One condition per slot: a camera is not woken for the others."""

    frame: Frame | None = None
    in_flight: ReorderBuffer = field(default_factory=ReorderBuffer)
    open: bool = True
    offered: int = 0
    analysed: int = 0
    dropped: Counter[DropReason] = field(default_factory=Counter)
    virtual_ns: float = 0.0
    engine_ns: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether a lane may take the frame."""
        return self.frame is not None and self.in_flight.has_room


@dataclass(slots=True)
class _ModelLanes:
    """The lanes of one model: `needed` of them keep the device busy, `waiting` of them wait for frames now.

    `picture_ns` and `batch_ns`: the mean engine time of a picture and of a batch; 0 before the first one.
    `is_failing`: its last batch had no result, so its batches use nothing of the device.
    """

    work: threading.Condition
    needed: int = 1
    waiting: int = 0
    running: int = 0
    picture_ns: float = 0.0
    batch_ns: float = 0.0
    is_failing: bool = False

    @property
    def share(self) -> float:
        """The part of the device that one more batch uses."""
        return 0.0 if self.is_failing else 1 / self.needed

    def measure(self, infer_ns: int, pictures: int) -> None:
        """Take the engine time of a batch into the means."""
        if self.batch_ns:
            self.picture_ns += _COST_SHARE * (infer_ns / pictures - self.picture_ns)
            self.batch_ns += _COST_SHARE * (infer_ns - self.batch_ns)
        else:
            self.picture_ns, self.batch_ns = infer_ns / pictures, float(infer_ns)


@dataclass(frozen=True, slots=True)
class _RunningBatch:
    """A batch in computation: the part of the device that it uses, and until when it counts."""

    lanes: _ModelLanes
    share: float
    until_ns: float


class Batcher:
    """One slot per camera. The camera that has used the engines least comes first, in turns.

    `max_batch` bounds a batch. A frame that is older than `max_age_ns` when its turn comes is dropped; a
    result waits as long for earlier ones. A batch never waits for more frames: they gather while the lanes
    are busy. With several models, only so many batches are computed at the same time as keep the device busy.
    """

    def __init__(self, max_batch: int, max_age_ns: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._max_batch = max_batch
        self._max_age_ns = max_age_ns
        self._clock = clock
        # In the order of turns: a camera whose frame was taken moves to the end.
        self._slots: dict[str, _Slot] = {}
        self._early: set[str] = set()  # cameras with results that wait for an earlier one
        self._batch_sizes: Counter[int] = Counter()
        self._closed = False
        self._lock = threading.Lock()
        self._models: dict[str, _ModelLanes] = {}
        self._virtual_ns = 0.0  # that of the camera whose frame was taken last
        self._running: dict[int, _RunningBatch] = {}
        self._batches = 0

    def __repr__(self) -> str:
        slots = list(self._slots.values())
        return (
            f"<Batcher {'closed' if self._closed else 'open'} cameras={sum(s.open for s in slots)}"
            f" waiting={sum(s.frame is not None for s in slots)}"
            f" in_flight={sum(len(s.in_flight) for s in slots)}"
            f" batches={self._batch_sizes.total()}>"
        )

    def open(self, camera: str) -> None:
        """Accept frames of a camera from now on; its counters go on."""
        with self._lock:
            if camera not in self._slots:
                slot = _Slot(threading.Condition(self._lock), virtual_ns=self._virtual_ns)
                self._slots[camera] = slot
            self._slots[camera].open = True

    def close_camera(self, camera: str) -> None:
        """Accept no more frames of a camera; a waiting one is discarded, those in flight are finished."""
        with self._lock:
            self._close_slot(self._slots[camera])

    def forget(self, camera: str) -> None:
        """Delete the counters of a closed camera, unless it has frames in flight."""
        with self._lock:
            slot = self._slots.get(camera)
            if slot is not None and not slot.open and not len(slot.in_flight):
                del self._slots[camera]
                self._early.discard(camera)

    def use_lanes(self, model: str, count: int) -> None:
        """From now on, so many lanes take frames for a model."""
        with self._lock:
            if model not in self._models:
                self._models[model] = _ModelLanes(threading.Condition(self._lock))
            self._models[model].needed = max(1, count)
            self._models[model].work.notify_all()

    def remove_model(self, model: str) -> None:
        """Discard the frames that wait for a model; `take` gives None to its lanes."""
        with self._lock:
            lanes = self._models.pop(model, None)
            for slot in self._slots.values():
                if slot.frame is not None and slot.frame.model == model:
                    self._discard(slot)
            if lanes is not None:
                lanes.work.notify_all()
            self._wake_next()

    def charge(self, camera: str, engine_ns: float) -> None:
        """Count engine time that a camera has used beside its frames."""
        with self._lock:
            if (slot := self._slots.get(camera)) is not None:
                slot.virtual_ns += engine_ns
                slot.engine_ns += engine_ns

    def put(self, frame: Frame) -> bool:
        """Offer a frame; return whether it replaced an older one that waited.

        A frame of a closed camera is discarded.

        Raises:
            KeyError: the camera was never opened.
        """
        with self._lock:
            slot = self._slots[frame.camera]
            slot.offered += 1
            if self._closed or not slot.open:
                slot.dropped[DropReason.DISCARDED] += 1
                return False
            # Held until the lock is released: freeing a picture lets other threads run.
            replaced, slot.frame = slot.frame, frame
            if replaced is not None:
                slot.dropped[DropReason.REPLACED] += 1
            if slot.is_ready:
                self._wake_next()
        return replaced is not None

    def count_gated(self, camera: str) -> None:
        """Count a frame that the motion gate held back before it was prepared for the engine."""
        with self._lock:
            slot = self._slots[camera]
            slot.offered += 1
            slot.dropped[DropReason.GATED] += 1

    def wait_taken(self, camera: str, timeout_s: float) -> bool:
        """Wait until a lane has taken the camera's frame; False after `timeout_s`.

        For files that are read as fast as they are analysed. True at once for a closed camera.
        """
        with self._lock:
            slot = self._slots[camera]
            return slot.emptied.wait_for(lambda: slot.frame is None, timeout_s)

    def take(
        self,
        timeout_s: float | None = None,
        max_count: int | None = None,
        model: str = DEFAULT_MODEL,
        *,
        spread: bool = False,
    ) -> Batch | None:
        """Wait for frames for a model and take up to `max_count` of them.

        With `spread` it leaves frames for the lanes that wait: a core that computes is better than a larger
        batch. None when closed, when the model was removed, or after `timeout_s`. The batch has results
        instead of frames if some have waited too long for an earlier one.
        """
        max_count = self._max_batch if max_count is None else min(max_count, self._max_batch)
        deadline_ns = None if timeout_s is None else time.monotonic_ns() + round(timeout_s * 1e9)
        with self._lock:
            if model == DEFAULT_MODEL and model not in self._models:
                self._models[model] = _ModelLanes(threading.Condition(self._lock))
            while not self._closed and (lanes := self._models.get(model)) is not None:
                now_ns = self._clock()
                if self._early and (released := self._release(tuple(self._early), now_ns)):
                    return Batch((), now_ns, tuple(released))
                ready = self._ready_slots(model, now_ns)
                if ready and self._is_next(model):
                    if spread:
                        max_count = min(max_count, math.ceil(len(ready) / (1 + lanes.waiting)))
                    return self._form_batch(model, ready, max_count, now_ns)
                left_s = None if deadline_ns is None else (deadline_ns - time.monotonic_ns()) / 1e9
                if left_s is not None and left_s <= 0:
                    return None
                self._wake_next()
                lanes.waiting += 1
                try:
                    lanes.work.wait(self._seconds_to_act(now_ns, left_s))
                finally:
                    lanes.waiting -= 1
        return None

    def done(self, batch: Batch, results: Sequence[FrameResult]) -> list[FrameResult]:
        """Give a batch back with its results; its frames without a result have failed.

        Returns the results whose turn it is, of this batch and of others. The lane must deliver them in this
        order and call `confirm`.
        """
        found = {(result.frame.camera, result.frame.sequence): result for result in results}
        with self._lock:
            now_ns = self._clock()
            self._end(batch, failed=not results)
            if results:
                self._measure(results)
            for frame in batch.frames:
                slot = self._slots[frame.camera]
                result = found.get((frame.camera, frame.sequence))
                if result is None:
                    slot.in_flight.remove(frame)
                    slot.dropped[DropReason.FAILED] += 1
                elif not slot.in_flight.complete(result, now_ns):
                    slot.dropped[DropReason.STALE] += 1
            return self._advance((frame.camera for frame in batch.frames), now_ns)

    def confirm(self, results: Sequence[FrameResult], delivered: int) -> list[FrameResult]:
        """Count the first `delivered` of the results as analysed, and the others as failed.

        Returns the results whose turn it is now, as `done` does; none if some were not delivered.
        """
        with self._lock:
            for number, result in enumerate(results):
                slot = self._slots[result.frame.camera]
                slot.in_flight.confirm()
                if number < delivered:
                    slot.analysed += 1
                else:
                    slot.dropped[DropReason.FAILED] += 1
            cameras = {result.frame.camera for result in results}
            if delivered < len(results):  # the lane ends; another one takes what waits behind them
                self._early |= cameras
                self._wake_any()
                return []
            return self._advance(cameras, self._clock())

    def drop_stale(self, batch: Batch) -> tuple[Batch | None, list[FrameResult]]:
        """Drop the frames of a taken batch that are too old by now.

        Returns the batch of the others, or None, and the results whose turn it is, as `done` does. The batch
        is another object, and the lane must call `done` for it alone.
        """
        fresh: list[Frame] = []
        with self._lock:
            now_ns = self._clock()
            for frame in batch.frames:
                if now_ns - frame.captured_ns <= self._max_age_ns:
                    fresh.append(frame)
                    continue
                slot = self._slots[frame.camera]
                slot.in_flight.remove(frame)
                slot.dropped[DropReason.STALE] += 1
            if not fresh:
                self._end(batch, failed=True)
            released = self._advance((frame.camera for frame in batch.frames), now_ns)
        return (replace(batch, frames=tuple(fresh)) if fresh else None), released

    def limit(self, max_batch: int, max_age_ns: int) -> None:
        """Set the limits of batches and ages."""
        with self._lock:
            self._max_batch, self._max_age_ns = max_batch, max_age_ns

    def has_frames_for(self, spec: InputSpec, model: str = DEFAULT_MODEL) -> bool:
        """Whether a frame that was prepared for this input of a model waits or is in flight."""
        with self._lock:
            return any(
                frame is not None and frame.spec == spec and frame.model == model
                for slot in self._slots.values()
                for frame in (slot.frame, *slot.in_flight.frames())
            )

    def close(self) -> None:
        """Discard waiting frames and wake all threads; `take` gives None from now on."""
        with self._lock:
            self._closed = True
            for slot in self._slots.values():
                self._close_slot(slot)
            for lanes in self._models.values():
                lanes.work.notify_all()

    def statistics(self) -> BatcherStatistics:
        """A consistent snapshot."""
        with self._lock:
            cameras = {
                camera: CameraStatistics(
                    offered=slot.offered,
                    analysed=slot.analysed,
                    waiting=int(slot.frame is not None),
                    in_flight=len(slot.in_flight),
                    dropped={reason: slot.dropped[reason] for reason in DropReason},
                    engine_ns=round(slot.engine_ns),
                )
                for camera, slot in self._slots.items()
            }
            return BatcherStatistics(dict(sorted(cameras.items())), dict(sorted(self._batch_sizes.items())))

    # --- with the lock held, assignments only ---------------------------------------------------------------

    def _ready_slots(self, model: str, now_ns: int) -> list[_Slot]:
        """The slots whose frames for a model can be taken, in the order of turns; drops frames too old."""
        ready: list[_Slot] = []
        for slot in self._slots.values():
            frame = slot.frame
            if frame is None or frame.model != model or not slot.is_ready:
                continue
            if now_ns - frame.captured_ns > self._max_age_ns:
                slot.frame = None
                slot.dropped[DropReason.STALE] += 1
                slot.emptied.notify_all()
            else:
                ready.append(slot)
        return ready

    def _is_next(self, model: str) -> bool:
        """Whether a lane of this model, for which a frame is ready, may take it now."""
        return len(self._models) == 1 or self._find_next(own=model) == model

    def _find_next(self, own: str | None = None) -> str | None:
        """The model whose frame is next, if the device has room; `own`: a lane of this model asks.

        Models whose lanes all compute do not count.
        """
        first: _Slot | None = None
        for slot in self._slots.values():
            if (frame := slot.frame) is None or not slot.is_ready:
                continue
            lanes = self._models.get(frame.model)
            is_free = lanes is not None and (frame.model == own or lanes.running < lanes.needed)
            if is_free and (first is None or slot.virtual_ns < first.virtual_ns):
                first = slot
        if first is None or first.frame is None:
            return None
        model = first.frame.model
        return model if self._has_room(self._models[model]) else None

    def _find_only(self) -> str | None:
        """The only model, if a lane waits and a frame is ready; cheaper than `_find_next`."""
        ((model, lanes),) = self._models.items()
        if not lanes.waiting:
            return None
        ready = (slot.frame for slot in self._slots.values() if slot.frame is not None and slot.is_ready)
        return model if any(frame.model == model for frame in ready) else None

    def _has_room(self, lanes: _ModelLanes) -> bool:
        """Whether the device has room for one more batch of a model, beside those of all models."""
        now_ns = self._clock()
        used = sum(batch.share for batch in self._running.values() if batch.until_ns > now_ns)
        return not used or used + lanes.share < 1.001

    def _form_batch(self, model: str, ready: list[_Slot], max_count: int, now_ns: int) -> Batch:
        """The frames of those ready slots for a model that have the least virtual times, as a batch."""
        lanes = self._models[model]
        # Stable: cameras with equal times stay in the order of turns.
        ready = sorted(ready, key=lambda slot: slot.virtual_ns)[:max_count]
        self._virtual_ns = max(self._virtual_ns, ready[0].virtual_ns)
        frames = tuple(slot.frame for slot in ready if slot.frame is not None)
        for frame in frames:
            slot = self._slots.pop(frame.camera)
            slot.frame = None
            slot.in_flight.add(frame)
            slot.virtual_ns = max(slot.virtual_ns, self._virtual_ns - _MAX_CREDIT_NS) + lanes.picture_ns
            slot.emptied.notify_all()
            self._slots[frame.camera] = slot
        self._batch_sizes[len(frames)] += 1
        self._batches += 1
        until_ns = now_ns + _OVERDUE_FACTOR * lanes.batch_ns + _OVERDUE_NS
        self._running[self._batches] = _RunningBatch(lanes, lanes.share, until_ns)
        lanes.running += 1
        # One `put` wakes one lane; wake another one for the frames that this lane did not take.
        self._wake_next()
        return Batch(frames, now_ns, number=self._batches)

    def _end(self, batch: Batch, *, failed: bool) -> None:
        """A batch, or a part of it, is not computed any more."""
        if (running := self._running.pop(batch.number, None)) is not None:
            running.lanes.running -= 1
            running.lanes.is_failing = failed

    def _measure(self, results: Sequence[FrameResult]) -> None:
        """Count the engine time of a batch for its cameras, and in the means of its model."""
        infer_ns = results[0].timing.infer_ns
        lanes = self._models.get(results[0].frame.model)
        if lanes is not None:
            lanes.measure(infer_ns, len(results))
        for result in results:
            self._slots[result.frame.camera].engine_ns += infer_ns / len(results)

    def _wake_next(self) -> None:
        """Wake a lane of the model that is next, if one is idle."""
        model = self._find_only() if len(self._models) == 1 else self._find_next()
        if model is not None:
            self._models[model].work.notify()

    def _wake_any(self) -> None:
        """Wake a lane of any model, to release results."""
        for lanes in self._models.values():
            if lanes.waiting:
                lanes.work.notify()
                return

    def _advance(self, cameras: Iterable[str], now_ns: int) -> list[FrameResult]:
        """Release results of cameras after a change, and wake a lane if there is a reason."""
        cameras = tuple(dict.fromkeys(cameras))
        released = self._release(cameras, now_ns)
        # Lanes that wait must learn of a new time limit, and of a slot that can be emptied again.
        if any(camera in self._early for camera in cameras):
            self._wake_any()
        if len(self._models) > 1 or any(self._slots[camera].is_ready for camera in cameras):
            self._wake_next()
        return released

    def _release(self, cameras: Sequence[str], now_ns: int) -> list[FrameResult]:
        """The results of cameras whose turn it is, or that have waited too long."""
        released = []
        for camera in cameras:
            in_flight = self._slots[camera].in_flight
            released += in_flight.release(now_ns, self._max_age_ns)
            if in_flight.early:
                self._early.add(camera)
            else:
                self._early.discard(camera)
        return released

    def _seconds_to_act(self, now_ns: int, left_s: float | None) -> float | None:
        """How long a lane may wait, at most `left_s`: until a result has waited or a batch runs too long."""
        since_ns = [self._slots[camera].in_flight.waiting_since_ns for camera in self._early]
        times_ns = [each + self._max_age_ns for each in since_ns if each is not None]
        if len(self._models) > 1:
            times_ns += [round(each.until_ns) for each in self._running.values() if each.until_ns > now_ns]
        if not times_ns:
            return left_s
        act_s = max(0.0, (min(times_ns) - now_ns) / 1e9)
        return act_s if left_s is None else min(act_s, left_s)

    def _close_slot(self, slot: _Slot) -> None:
        slot.open = False
        if slot.frame is not None:
            self._discard(slot)

    def _discard(self, slot: _Slot) -> None:
        slot.frame = None
        slot.dropped[DropReason.DISCARDED] += 1
        slot.emptied.notify_all()
