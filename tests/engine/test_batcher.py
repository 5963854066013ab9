"""The batcher: nothing is lost or invented, one frame per camera in flight, order, fairness, freshness."""

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from visionedge.engine.batcher import Batch, Batcher, CameraStatistics, DropReason, Outcome
from visionedge.frames.types import Frame, Placement

CAMERAS = ("dock", "gate", "hall", "yard")
MAX_AGE_NS = 100
PICTURE = np.zeros((2, 2, 3), np.uint8)


class FakeClock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now_ns = 1_000

    def __call__(self) -> int:
        return self.now_ns


def frame(camera: str, sequence: int = 1, captured_ns: int = 1_000) -> Frame:
    whole = Placement(0, 0, 2, 2)
    utc = datetime(2026, 11, 22, tzinfo=UTC)
    return Frame(camera, sequence, 1, captured_ns, utc, 2, 2, PICTURE, whole, lambda: PICTURE)


def batcher(*cameras: str, max_batch: int = 8, clock: Callable[[], int] | None = None) -> Batcher:
    made = Batcher(max_batch, MAX_AGE_NS, clock or FakeClock())
    for camera in cameras:
        made.open(camera)
    return made


def taken(made: Batcher, max_count: int | None = None) -> Batch:
    batch = made.take(timeout_s=0, max_count=max_count)
    assert batch is not None
    return batch


def names(batch: Batch) -> list[str]:
    return [f.camera for f in batch.frames]


def balance(one: CameraStatistics) -> int:
    return one.analysed + sum(one.dropped.values()) + one.waiting + one.in_flight


class BatcherStateMachine(RuleBasedStateMachine):
    """Everything that cameras and lanes can do, in any order, against the law."""

    batches: Bundle[Batch] = Bundle("batches")

    @initialize(max_batch=st.integers(1, 5))
    def begin(self, max_batch: int) -> None:
        self.clock = FakeClock()
        self.max_batch = max_batch
        self.batcher = Batcher(max_batch, MAX_AGE_NS, self.clock)
        self.offered = dict.fromkeys(CAMERAS, 0)
        self.open: set[str] = set()
        self.known: set[str] = set()
        self.waiting: dict[str, Frame] = {}
        self.in_flight: set[str] = set()
        self.served: dict[str, int] = {}
        self.passed_over: dict[str, set[str]] = {camera: set() for camera in CAMERAS}
        self.closed = False

    @rule(camera=st.sampled_from(CAMERAS))
    def open_camera(self, camera: str) -> None:
        self.batcher.open(camera)
        self.known.add(camera)
        if not self.closed:
            self.open.add(camera)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def close_camera(self, data: st.DataObject) -> None:
        camera = data.draw(st.sampled_from(sorted(self.known)))
        self.batcher.close_camera(camera)
        self.open.discard(camera)
        self.waiting.pop(camera, None)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        camera = data.draw(st.sampled_from(sorted(self.known)))
        self.offered[camera] += 1
        new = frame(camera, self.offered[camera], self.clock.now_ns)
        self.batcher.put(new)
        if camera in self.open:
            self.waiting[camera] = new

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def gate(self, data: st.DataObject) -> None:
        camera = data.draw(st.sampled_from(sorted(self.known)))
        self.offered[camera] += 1
        self.batcher.count_gated(camera)

    @rule(ns=st.integers(1, 2 * MAX_AGE_NS))
    def time_goes_by(self, ns: int) -> None:
        self.clock.now_ns += ns

    @rule(target=batches, max_count=st.integers(1, 5))
    def take(self, max_count: int) -> Batch:
        batch = self.batcher.take(timeout_s=0, max_count=max_count)
        idle = {c: f for c, f in self.waiting.items() if c not in self.in_flight}
        for camera, kept in idle.items():
            if self.clock.now_ns - kept.captured_ns > MAX_AGE_NS:
                del self.waiting[camera]
        fresh = {c for c in idle if c in self.waiting}
        if batch is None:
            assert self.closed or not fresh
            return Batch((), 0)
        assert not self.closed
        cameras = names(batch)
        assert len(cameras) == len(set(cameras)) == min(len(fresh), max_count, self.max_batch)
        for one in batch.frames:
            assert one is self.waiting.pop(one.camera), "only the newest frame is served"
            assert one.camera not in self.in_flight
            assert one.sequence > self.served.get(one.camera, 0), "sequences rise"
            self.served[one.camera] = one.sequence
            self.in_flight.add(one.camera)
        self._check_fairness(fresh, set(cameras))
        return batch

    def _check_fairness(self, ready: set[str], served: set[str]) -> None:
        """No camera is served twice while another one waits."""
        for camera in ready - served:
            assert not self.passed_over[camera] & served, f"{camera} was passed over twice"
            self.passed_over[camera] |= served
        for camera in CAMERAS:
            if camera in served or camera not in ready:
                self.passed_over[camera] = set()

    @rule(batch=consumes(batches), outcome=st.sampled_from(Outcome))
    def give_back(self, batch: Batch, outcome: Outcome) -> None:
        self.batcher.done(batch, outcome)
        self.in_flight -= set(names(batch))

    @rule(target=batches, batch=consumes(batches))
    def compute_again(self, batch: Batch) -> Batch:
        """After its device was lost: only what is fresh is left of a batch."""
        left = self.batcher.drop_stale(batch)
        kept = [] if left is None else names(left)
        limit_ns = self.clock.now_ns - MAX_AGE_NS
        assert kept == [one.camera for one in batch.frames if one.captured_ns >= limit_ns]
        self.in_flight -= set(names(batch)) - set(kept)
        return left or Batch((), 0)

    @precondition(lambda self: len(self.known) == len(CAMERAS))
    @rule()
    def close(self) -> None:
        self.batcher.close()
        self.closed = True
        self.open.clear()
        self.waiting.clear()

    @invariant()
    def counts_are_balanced(self) -> None:
        statistics = self.batcher.statistics()
        assert set(statistics.cameras) == self.known
        for camera, one in statistics.cameras.items():
            assert one.offered == self.offered[camera] == balance(one)
            assert one.waiting == (camera in self.waiting)
            assert one.in_flight == (camera in self.in_flight)

    @invariant()
    def repr_shows_the_counts(self) -> None:
        text = repr(self.batcher)
        assert f" waiting={len(self.waiting)} in_flight={len(self.in_flight)} " in text
        assert ("closed" in text) == self.closed


TestRiver = BatcherStateMachine.TestCase
TestRiver.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_newer_frame_replaces_a_waiting_one() -> None:
    made = batcher("dock")
    for sequence in (1, 2, 3):
        made.put(frame("dock", sequence))
    assert [f.sequence for f in taken(made).frames] == [3]
    assert made.statistics().cameras["dock"].dropped[DropReason.REPLACED] == 2


def test_a_replaced_frame_is_freed_without_the_lock() -> None:
    """Freeing a decoded picture lets other threads run, which would wait for the lock."""
    made = batcher("dock")
    seen: list[CameraStatistics] = []

    def put(sequence: int) -> bool:
        kept = frame("dock", sequence)
        picture = replace(kept, image=PICTURE.copy())
        weakref.finalize(picture.input_picture(), lambda: seen.append(made.statistics().cameras["dock"]))
        return made.put(picture)

    assert [put(1), put(2), put(3)] == [False, True, True]
    assert [one.offered for one in seen] == [2, 3]
    assert taken(made).frames[0].sequence == 3
    assert put(4) is False


def test_a_frame_that_is_too_old_is_dropped_at_its_turn() -> None:
    clock = FakeClock()
    made = batcher("dock", clock=clock)
    made.put(frame("dock"))
    clock.now_ns += MAX_AGE_NS + 1
    assert made.take(timeout_s=0) is None
    assert made.statistics().cameras["dock"].dropped[DropReason.STALE] == 1


def test_the_camera_served_last_is_last_in_the_queue() -> None:
    """With room for one at a time, three cameras that always have a frame take turns."""
    made = batcher("dock", "gate", "hall", max_batch=1)
    order = []
    for sequence in range(6):
        for camera in ("dock", "gate", "hall"):
            made.put(frame(camera, sequence))
        batch = taken(made)
        order += names(batch)
        made.done(batch, Outcome.ANALYSED)
    assert order == ["dock", "gate", "hall"] * 2


def test_a_lane_gets_at_most_the_frames_it_asked_for() -> None:
    """A lane on the CPU takes one and leaves the rest to the other lanes."""
    made = batcher("dock", "gate", "hall")
    for camera in ("dock", "gate", "hall"):
        made.put(frame(camera))
    assert [len(taken(made, max_count=1)), len(taken(made, max_count=8))] == [1, 2]
    assert made.statistics().batch_sizes == {1: 1, 2: 1}


def test_a_frame_for_a_closed_camera_is_discarded_and_one_for_an_unknown_camera_is_an_error() -> None:
    made = batcher("dock")
    made.close_camera("dock")
    made.put(frame("dock"))
    assert made.statistics().cameras["dock"].dropped[DropReason.DISCARDED] == 1
    with pytest.raises(KeyError, match="nobody"):
        made.put(frame("nobody"))


# --- real threads -------------------------------------------------------------------------------------------


def started(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def test_a_put_wakes_a_lane_that_waits_and_close_ends_it() -> None:
    made = Batcher(8, 10**12)
    made.open("dock")
    got: list[Batch | None] = []
    first = threading.Event()

    def lane() -> None:
        while (batch := made.take()) is not None:
            got.append(batch)
            made.done(batch, Outcome.ANALYSED)
            first.set()
        got.append(None)

    thread = started(lane)
    made.put(frame("dock", captured_ns=time.monotonic_ns()))
    assert first.wait(5)
    made.close()
    thread.join(5)
    assert [batch if batch is None else names(batch) for batch in got] == [["dock"], None]


def test_a_flat_out_camera_waits_until_its_frame_is_taken_or_the_batcher_is_closed() -> None:
    """Every decoded frame is analysed and none replaced, for any behaviour of the lanes."""
    made = Batcher(1, 10**12)
    made.open("dock")
    count = 200

    def camera() -> None:
        for sequence in range(1, count + 1):
            made.put(frame("dock", sequence, time.monotonic_ns()))
            assert made.wait_taken("dock", 5)

    seen: list[int] = []

    def lane() -> None:
        while (batch := made.take()) is not None:
            seen.extend(f.sequence for f in batch.frames)
            made.done(batch, Outcome.ANALYSED)

    lanes = [started(lane), started(lane)]
    started(camera).join(20)
    made.close()
    for thread in lanes:
        thread.join(5)
    assert seen == list(range(1, count + 1))
    assert made.wait_taken("dock", 0)


def test_waiting_for_a_frame_that_no_lane_takes_returns_false() -> None:
    made = batcher("dock")
    made.put(frame("dock"))
    assert not made.wait_taken("dock", 0.01)


def test_many_cameras_and_lanes_keep_the_invariants_and_the_order() -> None:
    made = Batcher(3, 10**12)
    delivered: dict[str, list[int]] = {camera: [] for camera in CAMERAS}

    def camera(name: str) -> None:
        for sequence in range(1, 301):
            made.put(frame(name, sequence, time.monotonic_ns()))

    def lane() -> None:
        while (batch := made.take()) is not None:
            for one in batch.frames:
                delivered[one.camera].append(one.sequence)
            made.done(batch, Outcome.FAILED if batch.frames[0].sequence % 7 == 0 else Outcome.ANALYSED)

    for name in CAMERAS:
        made.open(name)
    lanes = [started(lane) for _ in range(3)]
    for thread in [started(lambda name=name: camera(name)) for name in CAMERAS]:  # type: ignore[misc]  # bound now
        thread.join(20)
    made.close()
    for thread in lanes:
        thread.join(5)
    for name, one in made.statistics().cameras.items():
        assert one.offered == 300 == balance(one)
        assert (one.waiting, one.in_flight) == (0, 0)
        assert delivered[name] == sorted(delivered[name])
        assert len(delivered[name]) == one.analysed + one.dropped[DropReason.FAILED]
