"""Results of a camera come out in order, each frame once, and none waits longer than it may."""

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from visionedge.engine.reorder_buffer import ReorderBuffer
from visionedge.frames.types import Detections, Frame, FrameResult, Placement, Timing

MAX_WAIT_NS = 100
PICTURE = np.zeros((2, 2, 3), np.uint8)
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
UTC_NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def frame(sequence: int, captured_ns: int = 0) -> Frame:
    whole = Placement(0, 0, 2, 2)
    return Frame("dock", sequence, 1, captured_ns, UTC_NOON, 2, 2, PICTURE, whole, lambda: PICTURE)


def result(one: Frame, total_ns: int = 10) -> FrameResult:
    return FrameResult(one, NOTHING, Timing(1, 2, total_ns, 1), "cpu", "tiny", ())


def filled(*sequences: int) -> ReorderBuffer:
    made = ReorderBuffer()
    for sequence in sequences:
        made.add(frame(sequence))
    return made


def sequences(results: list[FrameResult]) -> list[int]:
    return [each.frame.sequence for each in results]


class ReorderBufferStateMachine(RuleBasedStateMachine):
    """Frames that are computed, fail or are given up in any order, and deliveries that take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ReorderBuffer()
        self.now_ns = 0
        self.last_sequence = 0
        self.computing: dict[int, Frame] = {}
        self.early: dict[int, int] = {}
        self.delivering: list[int] = []
        self.delivered: list[int] = []
        self.lost = 0

    def _release(self) -> None:
        released = sequences(self.buffer.release(self.now_ns, MAX_WAIT_NS))
        if self.delivering:
            assert released == [], "one delivery at a time"
            return
        newest = max(self.delivered, default=0)
        for overtaken in [each for each in self.computing if newest < each < max(released, default=0)]:
            behind = [self.early[sequence] for sequence in released if sequence > overtaken]
            assert self.now_ns - min(behind) >= MAX_WAIT_NS, f"{overtaken} was overtaken too soon"
        self.delivering = released
        for sequence in released:
            del self.early[sequence]

    @rule(gap=st.integers(1, 3))
    def take(self, gap: int) -> None:
        if not self.buffer.has_room:
            return
        self.last_sequence += gap
        self.computing[self.last_sequence] = frame(self.last_sequence, self.now_ns)
        self.buffer.add(self.computing[self.last_sequence])

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.computing)))
        newest = max([*self.delivered, *self.delivering], default=0)
        kept = self.buffer.complete(result(self.computing.pop(sequence)), self.now_ns)
        assert kept == (sequence > newest), "only a result that was overtaken is refused"
        if kept:
            self.early[sequence] = self.now_ns
        else:
            self.lost += 1
        self._release()

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.computing)))
        self.buffer.remove(self.computing.pop(sequence))
        self.lost += 1
        self._release()

    @precondition(lambda self: self.delivering)
    @rule()
    def deliver(self) -> None:
        self.delivered += self.delivering
        self.delivering = []
        self.buffer.confirm()
        self._release()

    @rule(ns=st.integers(1, MAX_WAIT_NS))
    def time_goes_by(self, ns: int) -> None:
        self.now_ns += ns
        self._release()

    @invariant()
    def the_order_holds(self) -> None:
        given = self.delivered + self.delivering
        assert given == sorted(set(given))

    @invariant()
    def each_frame_is_somewhere(self) -> None:
        in_flight = len(self.computing) + len(self.early) + len(self.delivering)
        assert len(self.buffer) == in_flight
        assert sorted(each.sequence for each in self.buffer.frames()) == sorted(
            [*self.computing, *self.early, *self.delivering]
        )
        assert self.buffer.early == len(self.early)

    @invariant()
    def no_result_waits_without_a_reason(self) -> None:
        """Only for a delivery in progress, or for a frame in computation, and for that not too long."""
        if self.delivering:
            assert self.buffer.waiting_since_ns is None
            return
        for sequence, ready_ns in self.early.items():
            assert any(each < sequence for each in self.computing)
            assert self.now_ns - ready_ns < MAX_WAIT_NS
        assert self.buffer.waiting_since_ns == min(self.early.values(), default=None)

    def teardown(self) -> None:
        """When all frames are computed, nothing is left."""
        for sequence, one in sorted(self.computing.items(), reverse=True):
            del self.computing[sequence]
            if self.buffer.complete(result(one), self.now_ns):
                self.early[sequence] = self.now_ns
        for _ in range(2):
            self.deliver()
        assert len(self.buffer) == 0


TestReorderBuffer = ReorderBufferStateMachine.TestCase
TestReorderBuffer.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_an_early_result_waits_for_the_one_before_it() -> None:
    made = filled(1, 2, 3)
    assert made.complete(result(frame(2)), 5)
    assert made.release(5, MAX_WAIT_NS) == []
    assert made.complete(result(frame(1)), 9)
    assert sequences(made.release(9, MAX_WAIT_NS)) == [1, 2]


def test_a_frame_that_failed_frees_those_behind_it_at_once() -> None:
    made = filled(1, 2)
    made.complete(result(frame(2)), 5)
    made.remove(frame(1))
    assert sequences(made.release(5, MAX_WAIT_NS)) == [2]


def test_a_result_that_waited_too_long_overtakes_and_the_late_one_is_refused() -> None:
    made = filled(1, 2, 3, 4)
    made.complete(result(frame(2)), 0)
    made.complete(result(frame(4)), 50)
    assert sequences(made.release(MAX_WAIT_NS, MAX_WAIT_NS)) == [2]
    made.confirm()
    assert not made.complete(result(frame(1)), 101)
    assert made.complete(result(frame(3)), 101)
    assert sequences(made.release(101, MAX_WAIT_NS)) == [3, 4]


def test_the_wait_for_an_earlier_result_is_part_of_the_total_time() -> None:
    made = filled(1, 2)
    made.complete(result(frame(2), total_ns=10), 5)
    made.complete(result(frame(1), total_ns=30), 25)
    assert [each.timing.total_ns for each in made.release(25, MAX_WAIT_NS)] == [30, 30]


@pytest.mark.parametrize("lanes", [2, 16])
def test_a_lane_that_hangs_does_not_let_results_gather_without_bound(lanes: int) -> None:
    made = filled(1)
    sequence, computed = 1, 0
    while made.has_room and sequence < 1000:
        sequence += 1
        made.add(frame(sequence))
        if sequence > lanes:
            computed += 1
            made.complete(result(frame(computed + 1)), 0)
    assert lanes < len(made) <= 2 * lanes + 10
