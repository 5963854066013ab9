"""The batcher: the newest frame of every camera waits here until a lane takes it.

A batch forms by itself: while the lanes are busy, frames gather, and the next lane takes all of them. Idle
lanes take further frames of a camera while others of it are computed; its results are handed on in order of
sequence. Camera threads call `put` and `wait_taken`, lanes `take`, `done` and `confirm`, the service the
rest. There is one lock, held for assignments only; `put` never blocks.

At every moment, for every camera:

    offered = analysed + failed + replaced + stale + gated + discarded + waiting + in_flight
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from visionedge.engine.reorder_buffer import ReorderBuffer
from visionedge.frames.types import Frame, FrameResult, InputSpec


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
    """Frames of different cameras, taken together. The lane that took it must call `done`.

    `released`: instead of frames, results that wait no longer for an earlier one. The lane must deliver them
    and call `confirm`.
    """

    frames: tuple[Frame, ...]
    taken_ns: int
    released: tuple[FrameResult, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    def split_by_input(self) -> tuple["Batch", ...]:
        """The batch by the input of its frames; more than one part only while a model changes."""
        by_spec: dict[InputSpec | None, list[Frame]] = {}
        for frame in self.frames:
            by_spec.setdefault(frame.spec, []).append(frame)
        if len(by_spec) == 1:
            return (self,)
        return tuple(Batch(tuple(frames), self.taken_ns) for frames in by_spec.values())


@dataclass(frozen=True, slots=True)
class CameraStatistics:
    """The frames of a camera, counted; `waiting` is 0 or 1.

    `in_flight`: frames that a lane took and that are not counted otherwise yet.
    """

    offered: int
    analysed: int
    waiting: int
    in_flight: int
    dropped: Mapping[DropReason, int]


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

    @property
    def is_ready(self) -> bool:
        """Whether a lane may take the frame."""
        return self.frame is not None and self.in_flight.has_room


class Batcher:
    """One slot per camera. Cameras with the fewest frames in flight come first, in turns.

    `max_batch` bounds a batch. A frame that is older than `max_age_ns` when its turn comes is dropped; a
    result waits as long for earlier ones. A batch never waits for more frames: they gather while the lanes
    are busy.
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
        self._work = threading.Condition(self._lock)  # lanes wait here for a frame

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
        with self._work:
            if camera not in self._slots:
                self._slots[camera] = _Slot(threading.Condition(self._lock))
            self._slots[camera].open = True

    def close_camera(self, camera: str) -> None:
        """Accept no more frames of a camera; a waiting one is discarded, those in flight are finished."""
        with self._work:
            self._close_slot(self._slots[camera])

    def forget(self, camera: str) -> None:
        """Delete the counters of a closed camera, unless it has frames in flight."""
        with self._work:
            slot = self._slots.get(camera)
            if slot is not None and not slot.open and not len(slot.in_flight):
                del self._slots[camera]
                self._early.discard(camera)

    def put(self, frame: Frame) -> bool:
        """Offer a frame; return whether it replaced an older one that waited.

        A frame of a closed camera is discarded.

        Raises:
            KeyError: the camera was never opened.
        """
        with self._work:
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
                self._work.notify()
        return replaced is not None

    def count_gated(self, camera: str) -> None:
        """Count a frame that the motion gate held back before it was prepared for the engine."""
        with self._work:
            slot = self._slots[camera]
            slot.offered += 1
            slot.dropped[DropReason.GATED] += 1

    def wait_taken(self, camera: str, timeout_s: float) -> bool:
        """Wait until a lane has taken the camera's frame; False after `timeout_s`.

        For files that are read as fast as they are analysed. True at once for a closed camera.
        """
        with self._work:
            slot = self._slots[camera]
            return slot.emptied.wait_for(lambda: slot.frame is None, timeout_s)

    def take(self, timeout_s: float | None = None, max_count: int | None = None) -> Batch | None:
        """Wait for frames and take up to `max_count` of them; None when closed, or after `timeout_s`.

        The batch has results instead of frames if some have waited too long for an earlier one.
        """
        max_count = self._max_batch if max_count is None else min(max_count, self._max_batch)
        deadline_ns = None if timeout_s is None else time.monotonic_ns() + round(timeout_s * 1e9)
        with self._work:
            while not self._closed:
                now_ns = self._clock()
                if self._early and (released := self._release(tuple(self._early), now_ns)):
                    return Batch((), now_ns, tuple(released))
                if ready := self._ready_frames(now_ns):
                    return self._form_batch(ready[:max_count], now_ns)
                left_s = None if deadline_ns is None else (deadline_ns - time.monotonic_ns()) / 1e9
                if left_s is not None and left_s <= 0:
                    return None
                self._work.wait(self._seconds_to_release(now_ns, left_s))
        return None

    def done(self, batch: Batch, results: Sequence[FrameResult]) -> list[FrameResult]:
        """Give a batch back with its results; its frames without a result have failed.

        Returns the results whose turn it is, of this batch and of others. The lane must deliver them in this
        order and call `confirm`.
        """
        found = {(result.frame.camera, result.frame.sequence): result for result in results}
        with self._work:
            now_ns = self._clock()
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
        with self._work:
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
                self._work.notify()
                return []
            return self._advance(cameras, self._clock())

    def drop_stale(self, batch: Batch) -> tuple[Batch | None, list[FrameResult]]:
        """Drop the frames of a taken batch that are too old by now.

        Returns the batch of the others, or None, and the results whose turn it is, as `done` does. The batch
        is another object, and the lane must call `done` for it alone.
        """
        fresh: list[Frame] = []
        with self._work:
            now_ns = self._clock()
            for frame in batch.frames:
                if now_ns - frame.captured_ns <= self._max_age_ns:
                    fresh.append(frame)
                    continue
                slot = self._slots[frame.camera]
                slot.in_flight.remove(frame)
                slot.dropped[DropReason.STALE] += 1
            released = self._advance((frame.camera for frame in batch.frames), now_ns)
        return (Batch(tuple(fresh), batch.taken_ns) if fresh else None), released

    def limit(self, max_batch: int, max_age_ns: int) -> None:
        """Set the limits of batches and ages."""
        with self._work:
            self._max_batch, self._max_age_ns = max_batch, max_age_ns

    def has_frames_for(self, spec: InputSpec) -> bool:
        """Whether a frame that was prepared for this input waits or is in flight."""
        with self._work:
            return any(
                frame is not None and frame.spec == spec
                for slot in self._slots.values()
                for frame in (slot.frame, *slot.in_flight.frames())
            )

    def close(self) -> None:
        """Discard waiting frames and wake all threads; `take` gives None from now on."""
        with self._work:
            self._closed = True
            for slot in self._slots.values():
                self._close_slot(slot)
            self._work.notify_all()

    def statistics(self) -> BatcherStatistics:
        """A consistent snapshot."""
        with self._work:
            cameras = {
                camera: CameraStatistics(
                    offered=slot.offered,
                    analysed=slot.analysed,
                    waiting=int(slot.frame is not None),
                    in_flight=len(slot.in_flight),
                    dropped={reason: slot.dropped[reason] for reason in DropReason},
                )
                for camera, slot in self._slots.items()
            }
            return BatcherStatistics(dict(sorted(cameras.items())), dict(sorted(self._batch_sizes.items())))

    # --- with the lock held, assignments only ---------------------------------------------------------------

    def _ready_frames(self, now_ns: int) -> list[Frame]:
        """The frames that can be taken now, in the order of turns; frames that are too old are dropped."""
        ready = []
        for slot in self._slots.values():
            if slot.frame is None or not slot.is_ready:
                continue
            if now_ns - slot.frame.captured_ns > self._max_age_ns:
                slot.frame = None
                slot.dropped[DropReason.STALE] += 1
                slot.emptied.notify_all()
            else:
                ready.append(slot.frame)
        # Stable: cameras with as many frames in flight stay in the order of turns.
        return sorted(ready, key=lambda frame: len(self._slots[frame.camera].in_flight))

    def _form_batch(self, frames: list[Frame], now_ns: int) -> Batch:
        for frame in frames:
            slot = self._slots.pop(frame.camera)
            slot.frame = None
            slot.in_flight.add(frame)
            slot.emptied.notify_all()
            self._slots[frame.camera] = slot
        self._batch_sizes[len(frames)] += 1
        # One `put` wakes one lane; wake another one for the frames that this lane did not take.
        if any(slot.is_ready for slot in self._slots.values()):
            self._work.notify()
        return Batch(tuple(frames), now_ns)

    def _advance(self, cameras: Iterable[str], now_ns: int) -> list[FrameResult]:
        """Release results of cameras after a change, and wake a lane if there is a reason."""
        cameras = tuple(dict.fromkeys(cameras))
        released = self._release(cameras, now_ns)
        # Lanes that wait must learn of a new time limit, and of a slot that can be emptied again.
        if any(camera in self._early or self._slots[camera].is_ready for camera in cameras):
            self._work.notify()
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

    def _seconds_to_release(self, now_ns: int, left_s: float | None) -> float | None:
        """How long a lane may wait: until a result has waited too long, but at most `left_s`."""
        since_ns = [self._slots[camera].in_flight.waiting_since_ns for camera in self._early]
        known_ns = [each for each in since_ns if each is not None]
        if not known_ns:
            return left_s
        release_s = max(0.0, (min(known_ns) + self._max_age_ns - now_ns) / 1e9)
        return release_s if left_s is None else min(release_s, left_s)

    def _close_slot(self, slot: _Slot) -> None:
        slot.open = False
        if slot.frame is not None:
            slot.frame = None
            slot.dropped[DropReason.DISCARDED] += 1
            slot.emptied.notify_all()
