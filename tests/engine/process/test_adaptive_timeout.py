"""How long a batch may take: by what batches usually take, in time in which this process ran."""

import socket
from collections.abc import Iterator

import pytest

from visionedge.engine.process.worker import MIN_LIMIT_S, AdaptiveTimeout, wait_for_reply


def test_the_timeout_is_ten_times_the_usual_duration_within_bounds() -> None:
    usual = AdaptiveTimeout(30)
    assert usual.limit_s == 30
    for _ in range(5):
        usual.note(0.02)
    assert usual.limit_s == MIN_LIMIT_S
    for _ in range(5):
        usual.note(0.5)
    assert usual.limit_s == pytest.approx(5)
    usual.note(20)
    assert usual.limit_s == 30


def test_one_short_batch_does_not_time_out_longer_ones() -> None:
    """The longest of the last ones counts: batches of one and of eight come in any order."""
    usual = AdaptiveTimeout(30)
    for _ in range(20):
        usual.note(1.0)
        usual.note(0.1)
    assert usual.limit_s > 9


def test_a_configured_limit_below_the_minimum_is_kept() -> None:
    usual = AdaptiveTimeout(0.5)
    for _ in range(9):
        usual.note(0.01)
    assert usual.limit_s == 0.5


class FakeWaits:
    """Slices of a wait: each takes as long as is said, and nothing arrives until they are over."""

    def __init__(self, slices_s: list[float]) -> None:
        self.now_s = 0.0
        self.slices_s = slices_s

    def clock(self) -> float:
        return self.now_s

    def readable(self, _line: socket.socket, timeout_s: float) -> bool:
        if not self.slices_s:
            return True
        self.now_s += max(timeout_s, self.slices_s.pop(0))
        return False


@pytest.fixture
def line() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def test_a_missing_reply_times_out_at_the_limit(line: socket.socket) -> None:
    time = FakeWaits([0.0] * 100)
    with pytest.raises(TimeoutError):
        wait_for_reply(line, 2.0, clock=time.clock, readable=time.readable)
    assert time.now_s == pytest.approx(2.0)


def test_time_in_which_the_module_did_not_run_is_not_counted(line: socket.socket) -> None:
    """Everything is stopped for two minutes and goes on: a healthy child then answers."""
    time = FakeWaits([0.0, 120.0, 0.0])
    wait_for_reply(line, 2.0, clock=time.clock, readable=time.readable)
    assert time.now_s > 120


def test_a_closed_connection_ends_the_wait(line: socket.socket) -> None:
    line.shutdown(socket.SHUT_RDWR)
    wait_for_reply(line, 60.0)
