"""The batcher: nothing is lost or invented, results in order, fairness, freshness."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from visionedge.engine.batcher import Batch, Batcher, CameraStatistics, DropReason
from visionedge.frames.types import DEFAULT_MODEL, Detections, Frame, FrameResult, Placement, Timing

CAMERAS = ("dock", "gate", "hall", "yard")
MAX_AGE_NS = 100
PICTURE = np.zeros((2, 2, 3), np.uint8)
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


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


def results(*frames: Frame) -> list[FrameResult]:
    return [FrameResult(one, NOTHING, Timing(0, 0, 0, 1), "cpu", "tiny", ()) for one in frames]


def sequences(found: Iterable[FrameResult]) -> list[int]:
    return [each.frame.sequence for each in found]


def hand_on(made: Batcher, found: list[FrameResult]) -> list[int]:
    """Deliver results as a lane does; return their sequences."""
    delivered = []
    while found:
        delivered += sequences(found)
        found = made.confirm(found, len(found))
    return delivered


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

    @initialize(max_batch=st.integers(1, 5))
    def begin(self, max_batch: int) -> None:
        self.clock = FakeClock()
        self.max_batch = max_batch
        self.batcher = Batcher(max_batch, MAX_AGE_NS, self.clock)
        self.offered = dict.fromkeys(CAMERAS, 0)
        self.open: set[str] = set()
        self.known: set[str] = set()
        self.waiting: dict[str, Frame] = {}
        self.computing: list[Batch] = []
        self.early: dict[tuple[str, int], int] = {}
        self.delivering: list[list[FrameResult]] = []
        self.in_flight: Counter[str] = Counter()
        self.delivered: dict[str, list[int]] = {camera: [] for camera in CAMERAS}
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

    @rule(max_count=st.integers(1, 5))
    def take(self, max_count: int) -> None:
        batch = self.batcher.take(timeout_s=0, max_count=max_count)
        if batch is not None and batch.released:
            assert not batch.frames
            self._released(batch.released)
            return
        ready = {c: f for c, f in self.waiting.items() if self._has_room(c)}
        for camera, kept in ready.items():
            if not self.closed and self.clock.now_ns - kept.captured_ns > MAX_AGE_NS:
                del self.waiting[camera]
        fresh = {c for c in ready if c in self.waiting}
        if batch is None:
            assert self.closed or not fresh
            return
        assert not self.closed
        cameras = names(batch)
        assert len(cameras) == len(set(cameras)) == min(len(fresh), max_count, self.max_batch)
        self._check_fairness(fresh, set(cameras))
        for one in batch.frames:
            assert one is self.waiting.pop(one.camera), "only the newest frame is served"
            assert one.sequence > self.served.get(one.camera, 0), "sequences rise"
            self.served[one.camera] = one.sequence
            self.in_flight[one.camera] += 1
        self.computing.append(batch)

    def _has_room(self, camera: str) -> bool:
        early = sum(name == camera for name, _ in self.early)
        computing = sum(camera in names(batch) for batch in self.computing)
        return early < computing + 8

    def _check_fairness(self, fresh: set[str], served: set[str]) -> None:
        """No camera is served a second time while another one, without a frame in flight, waits."""
        ready = {camera for camera in fresh if not self.in_flight[camera]}
        assert served <= ready or ready <= served
        for camera in ready - served:
            assert not self.passed_over[camera] & served, f"{camera} was passed over twice"
            self.passed_over[camera] |= served
        for camera in CAMERAS:
            if camera in served or camera not in ready:
                self.passed_over[camera] = set()

    def _released(self, found: Sequence[FrameResult]) -> None:
        """Results that a lane has to deliver: nothing of their cameras is being delivered."""
        if not found:
            return
        busy = {each.frame.camera for on_its_way in self.delivering for each in on_its_way}
        for each in found:
            assert each.frame.camera not in busy, "one delivery of a camera at a time"
            del self.early[each.frame.camera, each.frame.sequence]
        self.delivering.append(list(found))

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        batch = self.computing.pop(data.draw(st.integers(0, len(self.computing) - 1)))
        works = data.draw(st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)))
        found = [one for one, worked in zip(batch.frames, works, strict=True) if worked]
        stale = {camera: self._dropped(camera, DropReason.STALE) for camera in names(batch)}
        for one in found:
            self.early[one.camera, one.sequence] = self.clock.now_ns
        released = self.batcher.done(batch, results(*found))
        for one, worked in zip(batch.frames, works, strict=True):
            refused = self._dropped(one.camera, DropReason.STALE) > stale[one.camera]
            if refused:
                del self.early[one.camera, one.sequence]
            if refused or not worked:
                self.in_flight[one.camera] -= 1
        self._released(released)

    def _dropped(self, camera: str, reason: DropReason) -> int:
        return self.batcher.statistics().cameras[camera].dropped[reason]

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def compute_again(self, data: st.DataObject) -> None:
        """After its device was lost: only what is fresh is left of a batch."""
        batch = self.computing.pop(data.draw(st.integers(0, len(self.computing) - 1)))
        left, released = self.batcher.drop_stale(batch)
        kept = [] if left is None else names(left)
        limit_ns = self.clock.now_ns - MAX_AGE_NS
        assert kept == [one.camera for one in batch.frames if one.captured_ns >= limit_ns]
        self.in_flight -= Counter(set(names(batch)) - set(kept))
        if left is not None:
            self.computing.append(left)
        self._released(released)

    @precondition(lambda self: self.delivering)
    @rule(data=st.data(), fails=st.booleans())
    def deliver(self, data: st.DataObject, fails: bool) -> None:
        found = self.delivering.pop(data.draw(st.integers(0, len(self.delivering) - 1)))
        count = data.draw(st.integers(0, len(found) - 1)) if fails else len(found)
        for each in found[:count]:
            self.delivered[each.frame.camera].append(each.frame.sequence)
        self.in_flight -= Counter(each.frame.camera for each in found)
        released = self.batcher.confirm(found, count)
        assert not (fails and released)
        self._released(released)

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
            assert one.in_flight == self.in_flight[camera]
            assert one.analysed == len(self.delivered[camera])

    @invariant()
    def results_are_delivered_in_order(self) -> None:
        for found in self.delivered.values():
            assert found == sorted(set(found))

    @invariant()
    def repr_shows_the_counts(self) -> None:
        text = repr(self.batcher)
        assert f" waiting={len(self.waiting)} in_flight={self.in_flight.total()} " in text
        assert ("closed" in text) == self.closed

    def teardown(self) -> None:
        """When all lanes have given back what they took, nothing is left, whatever was closed."""
        if not hasattr(self, "batcher"):
            return
        for batch in reversed(self.computing):
            hand_on(self.batcher, self.batcher.done(batch, results(*batch.frames)))
        for found in self.delivering:
            hand_on(self.batcher, self.batcher.confirm(found, len(found)))
        while (left := self.batcher.take(timeout_s=0)) is not None:
            hand_on(self.batcher, list(left.released) or self.batcher.done(left, results(*left.frames)))
        for one in self.batcher.statistics().cameras.values():
            assert one.offered == balance(one)
            assert self.closed or (one.waiting, one.in_flight) == (0, 0)


TestBatcher = BatcherStateMachine.TestCase
TestBatcher.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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


@pytest.mark.parametrize(("waiting", "size"), [(0, 3), (1, 2), (2, 1), (5, 1)])
def test_a_lane_leaves_frames_to_the_lanes_that_wait(waiting: int, size: int) -> None:
    """On a CPU two cores with a picture each are done sooner than one core with both."""
    made = batcher("dock", "gate", "hall")
    made.use_lanes(DEFAULT_MODEL, 6)
    made._models[DEFAULT_MODEL].waiting = waiting
    for camera in ("dock", "gate", "hall"):
        made.put(frame(camera, 1))
    batch = made.take(0, spread=True)
    assert batch is not None
    assert len(batch) == size


def test_the_camera_served_last_is_last_in_the_queue() -> None:
    """With room for one at a time, three cameras that always have a frame take turns."""
    made = batcher("dock", "gate", "hall", max_batch=1)
    order = []
    for sequence in range(6):
        for camera in ("dock", "gate", "hall"):
            made.put(frame(camera, sequence))
        batch = taken(made)
        order += names(batch)
        hand_on(made, made.done(batch, results(*batch.frames)))
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


def test_idle_lanes_take_further_frames_of_a_camera_and_its_results_keep_their_order() -> None:
    made = batcher("dock")
    batches = []
    for sequence in (1, 2, 3):
        made.put(frame("dock", sequence))
        batches.append(taken(made))
    assert made.statistics().cameras["dock"].in_flight == 3
    assert made.done(batches[2], results(*batches[2].frames)) == []
    assert made.done(batches[0], ()) == []
    released = made.done(batches[1], results(*batches[1].frames))
    assert hand_on(made, released) == [2, 3]
    seen = made.statistics().cameras["dock"]
    assert (seen.analysed, seen.dropped[DropReason.FAILED], seen.in_flight) == (2, 1, 0)


def test_a_camera_without_a_frame_in_flight_goes_before_a_second_frame_of_another() -> None:
    made = batcher("dock", "gate", "hall")
    made.put(frame("dock", 1))
    taken(made)
    for camera in ("dock", "gate", "hall"):
        made.put(frame(camera, 2))
    assert names(taken(made, max_count=1)) == ["gate"]
    made.put(frame("gate", 3))
    assert names(taken(made)) == ["hall", "dock", "gate"]


def test_a_fast_camera_takes_no_frame_from_a_slow_one() -> None:
    """Two lanes are always busy. The fast camera has a new frame at each step, the slow one at each fifth."""
    made = batcher("fast", "slow")
    lanes: list[Batch] = []
    for step in range(100):
        made.put(frame("fast", step + 1))
        if step % 5 == 0:
            made.put(frame("slow", step + 1))
        if len(lanes) == 2:
            batch = lanes.pop(0)
            hand_on(made, made.done(batch, results(*batch.frames)))
        lanes.append(taken(made, max_count=1))
    seen = made.statistics().cameras
    assert (seen["slow"].offered, seen["slow"].dropped[DropReason.REPLACED]) == (20, 0)
    assert seen["fast"].analysed + seen["fast"].in_flight == 80


def test_results_of_a_camera_are_delivered_by_one_lane_at_a_time() -> None:
    made = batcher("dock")
    batches = []
    for sequence in (1, 2, 3):
        made.put(frame("dock", sequence))
        batches.append(taken(made))
    first = made.done(batches[0], results(*batches[0].frames))
    assert sequences(first) == [1]
    assert made.done(batches[1], results(*batches[1].frames)) == []
    assert sequences(made.confirm(first, 1)) == [2]


def test_a_result_that_waits_for_a_lane_that_hangs_overtakes_it_and_the_late_one_is_stale() -> None:
    clock = FakeClock()
    made = batcher("dock", clock=clock)
    made.put(frame("dock", 1))
    hanging = taken(made)
    made.put(frame("dock", 2))
    quick = taken(made)
    assert made.done(quick, results(*quick.frames)) == []
    assert made.take(timeout_s=0) is None
    clock.now_ns += MAX_AGE_NS
    assert hand_on(made, list(taken(made).released)) == [2]
    assert made.done(hanging, results(*hanging.frames)) == []
    seen = made.statistics().cameras["dock"]
    assert (seen.analysed, seen.dropped[DropReason.STALE], seen.in_flight) == (1, 1, 0)


def test_results_in_flight_are_delivered_in_order_after_their_camera_and_the_batcher_were_closed() -> None:
    made = batcher("dock")
    made.put(frame("dock", 1))
    first = taken(made)
    made.put(frame("dock", 2))
    second = taken(made)
    made.close_camera("dock")
    made.forget("dock")
    assert made.done(second, results(*second.frames)) == []
    made.close()
    assert hand_on(made, made.done(first, results(*first.frames))) == [1, 2]
    made.forget("dock")
    assert made.statistics().cameras == {}


# --- real threads -------------------------------------------------------------------------------------------


def run_lane(made: Batcher, deliver: Callable[[Frame], None], fails: Callable[[Frame], bool]) -> None:
    """Take, compute and deliver until closed, as a lane does."""
    while (batch := made.take()) is not None:
        computed = results(*(one for one in batch.frames if not fails(one)))
        found = list(batch.released) or made.done(batch, computed)
        while found:
            for each in found:
                deliver(each.frame)
            found = made.confirm(found, len(found))


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
            hand_on(made, made.done(batch, results(*batch.frames)))
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
        run_lane(made, lambda one: seen.append(one.sequence), lambda _one: False)

    lanes = [started(lane), started(lane)]
    started(camera).join(20)
    made.close()
    for thread in lanes:
        thread.join(5)
    assert seen == list(range(1, count + 1))
    assert made.wait_taken("dock", 0)


def test_a_lane_that_waits_for_frames_delivers_what_waited_too_long_for_another_lane() -> None:
    clock = FakeClock()
    made = batcher("dock", clock=clock)
    made.put(frame("dock", 1))
    taken(made)
    made.put(frame("dock", 2))
    quick = taken(made)
    got: list[int] = []

    def take() -> None:
        batch = made.take()
        assert batch is not None
        got.extend(sequences(batch.released))

    lane = started(take)
    made.done(quick, results(*quick.frames))
    clock.now_ns += MAX_AGE_NS
    lane.join(5)
    assert got == [2]


def test_one_flat_out_camera_keeps_all_lanes_busy() -> None:
    """No lane goes on before all of them have a frame."""
    made = Batcher(1, 10**12)
    made.open("dock")
    all_busy = threading.Barrier(3)

    def camera() -> None:
        for sequence in range(1, 31):
            made.put(frame("dock", sequence, time.monotonic_ns()))
            assert made.wait_taken("dock", 5)

    def wait_for_others(_one: Frame) -> bool:
        all_busy.wait(5)
        return False

    seen: list[int] = []
    lanes = [
        started(lambda: run_lane(made, lambda one: seen.append(one.sequence), wait_for_others)) for _ in "abc"
    ]
    started(camera).join(20)
    made.close()
    for thread in lanes:
        thread.join(5)
    assert seen == list(range(1, 31))


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
        run_lane(
            made,
            lambda one: delivered[one.camera].append(one.sequence),
            lambda one: one.sequence % 7 == 0,
        )

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
        assert len(delivered[name]) == one.analysed
