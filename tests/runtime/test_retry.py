"""Waits between attempts: doubled up to a limit, shortened at random."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.camera.camera import RECONNECT_POLICY
from visionedge.runtime.retry import Backoff, RetryPolicy


def test_retry_waits_of_a_camera_double_from_1_to_30_s() -> None:
    backoff = Backoff(RECONNECT_POLICY, random_fraction=lambda: 0.0)
    assert [backoff.next_wait_s() for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]
    backoff.reset()
    assert backoff.next_wait_s() == 1


@given(st.floats(0, 1))
def test_jitter_shortens_a_wait_of_a_camera_by_a_quarter_at_most(random_fraction: float) -> None:
    backoff = Backoff(RECONNECT_POLICY, random_fraction=lambda: random_fraction)
    for whole_s in (1, 2, 4, 8, 16, 30, 30):
        assert 0.75 * whole_s <= backoff.next_wait_s() <= whole_s


@pytest.mark.parametrize(("failed_attempts", "wait_s"), [(1, 0.5), (2, 1), (3, 2), (10, 60), (100_000, 60)])
def test_any_number_of_failures_gives_a_wait(failed_attempts: int, wait_s: float) -> None:
    """Years of failures must not overflow."""
    assert RetryPolicy(0.5, 60).wait_s(failed_attempts) == wait_s
