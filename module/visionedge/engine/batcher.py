"""The batcher: the newest frame of every camera waits here until a lane takes it.

A batch forms by itself: while the lanes are busy, frames gather, and the next lane takes all of them. Camera
threads call `put` and `wait_taken`, lanes `take` and `done`, the service the rest. There is one lock, held
for assignments only; `put` never blocks.

At every moment, for every camera:

    offered = analysed + failed + replaced + stale + gated + discarded + waiting + in_flight
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from visionedge.frames.types import Frame, InputSpec


class Outcome(StrEnum):
    """How a batch ended."""

    ANALYSED = "analysed"
    FAILED = "failed"


class DropReason(StrEnum):
    """Why a frame was not analysed.

    replaced: a newer frame came before a lane took it; stale: too old when its turn came; gated: held back by
    the motion gate; failed: the engine failed on its batch; discarded: its camera or the module was closed.
    """

    REPLACED = "replaced"
    STALE = "stale"
    GATED = "gated"
    FAILED = "failed"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of different cameras, taken together. The lane that took it must call `done`."""

    frames: tuple[Frame, ...]
    taken_ns: int

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
    """The frames of a camera, counted; `waiting` and `in_flight` are 0 or 1."""

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
    in_flight: Frame | None = None
    open: bool = True
    offered: int = 0
    analysed: int = 0
    dropped: Counter[DropReason] = field(default_factory=Counter)


class Batcher:
    """One slot per camera, at most one frame of a camera in flight, cameras in turns.

    `max_batch` bounds a batch. A frame that is older than `max_age_ns` when its turn comes is dropped. A
    batch never waits for more frames: they gather while the lanes are busy.
    """

    def __init__(self, max_batch: int, max_age_ns: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._max_batch = max_batch
        self._max_age_ns = max_age_ns
        self._clock = clock
        # In the order of turns: a camera whose frame was taken moves to the end.
        self._slots: dict[str, _Slot] = {}
        self._batch_sizes: Counter[int] = Counter()
        self._closed = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # lanes wait here for a frame

    def __repr__(self) -> str:
        slots = list(self._slots.values())
        return (
            f"<Batcher {'closed' if self._closed else 'open'} cameras={sum(s.open for s in slots)}"
            f" waiting={sum(s.frame is not None for s in slots)}"
            f" in_flight={sum(s.in_flight is not None for s in slots)}"
            f" batches={self._batch_sizes.total()}>"
        )

    def open(self, camera: str) -> None:
        """Accept frames of a camera from now on; its counters go on."""
        with self._work:
            if camera not in self._slots:
                self._slots[camera] = _Slot(threading.Condition(self._lock))
            self._slots[camera].open = True

    def close_camera(self, camera: str) -> None:
        """Accept no more frames of a camera; a waiting one is discarded, one in flight is finished."""
        with self._work:
            self._close_slot(self._slots[camera])

    def forget(self, camera: str) -> None:
        """Delete the counters of a closed camera, unless it has a frame in flight."""
        with self._work:
            slot = self._slots.get(camera)
            if slot is not None and not slot.open and slot.in_flight is None:
                del self._slots[camera]

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
            if slot.in_flight is None:
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
        """Wait for frames and take up to `max_count` of them; None when closed, or after `timeout_s`."""
        max_count = self._max_batch if max_count is None else min(max_count, self._max_batch)
        deadline_ns = None if timeout_s is None else time.monotonic_ns() + round(timeout_s * 1e9)
        with self._work:
            while not self._closed:
                now_ns = self._clock()
                if ready := self._ready_frames(now_ns):
                    return self._form_batch(ready[:max_count], now_ns)
                left_s = None if deadline_ns is None else (deadline_ns - time.monotonic_ns()) / 1e9
                if left_s is not None and left_s <= 0:
                    return None
                self._work.wait(left_s)
        return None

    def done(self, batch: Batch, outcome: Outcome) -> None:
        """Give a batch back after its results were delivered: frames of its cameras may be taken again."""
        with self._work:
            for frame in batch.frames:
                slot = self._slots[frame.camera]
                slot.in_flight = None
                if outcome is Outcome.ANALYSED:
                    slot.analysed += 1
                else:
                    slot.dropped[DropReason.FAILED] += 1
                if slot.frame is not None:
                    self._work.notify()

    def drop_stale(self, batch: Batch) -> Batch | None:
        """Drop the frames of a taken batch that are too old by now; the batch of the others, or None.

        The batch that is returned is another object, and the lane must call `done` for it alone.
        """
        fresh: list[Frame] = []
        with self._work:
            oldest_ns = self._clock() - self._max_age_ns
            for frame in batch.frames:
                if frame.captured_ns >= oldest_ns:
                    fresh.append(frame)
                    continue
                slot = self._slots[frame.camera]
                slot.in_flight = None
                slot.dropped[DropReason.STALE] += 1
                if slot.frame is not None:
                    self._work.notify()
        return Batch(tuple(fresh), batch.taken_ns) if fresh else None

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
                for frame in (slot.frame, slot.in_flight)
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
                    in_flight=int(slot.in_flight is not None),
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
            if slot.frame is None or slot.in_flight is not None:
                continue
            if now_ns - slot.frame.captured_ns > self._max_age_ns:
                slot.frame = None
                slot.dropped[DropReason.STALE] += 1
                slot.emptied.notify_all()
            else:
                ready.append(slot.frame)
        return ready

    def _form_batch(self, frames: list[Frame], now_ns: int) -> Batch:
        for frame in frames:
            slot = self._slots.pop(frame.camera)
            slot.frame, slot.in_flight = None, frame
            slot.emptied.notify_all()
            self._slots[frame.camera] = slot
        self._batch_sizes[len(frames)] += 1
        # One `put` wakes one lane; wake another one for the frames that this lane did not take.
        if any(slot.frame is not None and slot.in_flight is None for slot in self._slots.values()):
            self._work.notify()
        return Batch(tuple(frames), now_ns)

    def _close_slot(self, slot: _Slot) -> None:
        slot.open = False
        if slot.frame is not None:
            slot.frame = None
            slot.dropped[DropReason.DISCARDED] += 1
            slot.emptied.notify_all()
