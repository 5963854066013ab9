"""When pictures are due and how long to wait: pure decisions about time."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.camera.timing import (
    FrameRate,
    FrameSampler,
    PlaybackClock,
    Timeline,
    plausible_fps,
)


def test_half_the_rate_is_exactly_every_second_picture() -> None:
    due = FrameSampler(5)
    assert [n for n in range(20) if due.is_due(n * 0.1)] == list(range(0, 20, 2))


def test_no_rate_means_every_picture() -> None:
    due = FrameSampler(None)
    assert all(due.is_due(n * 0.1) for n in range(10))


@given(source_fps=st.integers(2, 60), asked=st.integers(1, 60))
def test_over_ten_seconds_the_rate_is_met_without_drift(source_fps: int, asked: int) -> None:
    due = FrameSampler(asked)
    taken = sum(due.is_due(n / source_fps) for n in range(10 * source_fps))
    assert abs(taken - 10 * min(asked, source_fps)) <= 1


def test_a_camera_at_its_own_rate_loses_no_picture_to_jitter() -> None:
    due = FrameSampler(10)
    jitter_s = [0.0, 0.012, -0.015, 0.02, -0.02, 0.003]
    assert all(due.is_due(n * 0.1 + jitter_s[n % 6]) for n in range(200))


def test_pictures_missed_in_a_gap_are_not_caught_up() -> None:
    due = FrameSampler(1)
    assert due.is_due(0.0)
    assert due.is_due(100.0)
    assert [n for n in range(1, 21) if due.is_due(100 + n * 0.1)] == [8, 18]


def test_pictures_in_one_burst_count_as_one() -> None:
    """After a reconnect the decoder hands out what it had buffered all at once."""
    due = FrameSampler(5)
    assert [due.is_due(7 + n * 0.0002) for n in range(8)] == [True] + [False] * 7


def test_a_paced_picture_waits_for_its_time_and_a_late_one_does_not() -> None:
    pace = PlaybackClock(2.0, 10_000_000_000)
    assert pace.delay_s(2.0, 10_000_000_000) == 0
    assert pace.delay_s(2.5, 10_100_000_000) == pytest.approx(0.4)
    assert pace.delay_s(2.5, 11_000_000_000) == 0
    # Being late once shifts nothing: the next has its time from the beginning.
    assert pace.delay_s(3.5, 11_000_000_000) == pytest.approx(0.5)


def test_a_delay_of_more_than_two_seconds_is_not_caught_up() -> None:
    """After a halted machine goes on, the pictures go on at their own rate, and not all at once."""
    pace = PlaybackClock(0.0, 0)
    assert pace.delay_s(1.0, 3_600_000_000_000) == 0
    assert pace.delay_s(1.5, 3_600_000_000_000) == pytest.approx(0.5)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=50))
def test_media_times_always_rise_for_any_file(raw_s: list[float]) -> None:
    timeline = Timeline(25)
    positions_s = [timeline.advance(r) for r in raw_s]
    assert positions_s[0] == 0
    assert all(0 < b - a <= 10.001 for a, b in pairwise(positions_s))


def test_valid_media_times_are_used_unchanged() -> None:
    timeline = Timeline(25)
    assert [timeline.advance(5 + n * 0.5) for n in range(4)] == pytest.approx([0, 0.5, 1.0, 1.5])


def test_a_jump_in_the_media_time_is_one_ordinary_step() -> None:
    timeline = Timeline(10)
    assert [timeline.advance(t) for t in (0.0, 0.1, 4000.0, 4000.1)] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(("claimed", "taken"), [(30, 30), (0, 25), (-1, 25), (math.nan, 25), (90_000, 25)])
def test_an_impossible_rate_becomes_25_fps(claimed: float, taken: float) -> None:
    assert plausible_fps(claimed) == taken


def test_the_measured_rate_follows_and_falls_when_pictures_stop() -> None:
    rate = FrameRate()
    assert rate.per_s(0) == 0
    for n in range(100):
        rate.add(n * 100_000_000)
    last_ns = 99 * 100_000_000
    assert rate.per_s(last_ns) == pytest.approx(10)
    assert rate.per_s(last_ns + 50_000_000) == pytest.approx(10)
    assert rate.per_s(last_ns + 2_000_000_000) < 8
    assert rate.per_s(last_ns + 6_000_000_000) == 0


def test_skipped_pictures_count_in_the_rate_of_the_source() -> None:
    rate = FrameRate()
    for number in range(11):
        rate.add(number * 200_000_000, 6)
    assert rate.per_s(2_000_000_000) == pytest.approx(30)
