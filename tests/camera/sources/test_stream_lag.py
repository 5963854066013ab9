"""How far behind a live stream is: growing queues are seen, and nothing else is taken for one."""

import numpy as np
import pytest

from visionedge.camera.timing import StreamLag

STEP_S = 0.04


def test_a_stream_in_time_has_no_lag() -> None:
    backlog, rng = StreamLag(), np.random.default_rng(1)
    late_s = [
        backlog.late_s(n * STEP_S, 1000 + n * STEP_S + rng.uniform(0, 0.03), 0.035) for n in range(5000)
    ]
    assert max(late_s) < 0.05


def test_a_growing_queue_has_the_lag_of_its_content() -> None:
    """Each picture takes a tenth longer than it should, and none has to be waited for."""
    backlog = StreamLag()
    late_s = [backlog.late_s(n * STEP_S, 1000 + n * STEP_S * 1.1, 0.0001) for n in range(1000)]
    assert late_s[-1] == pytest.approx(999 * STEP_S * 0.1, rel=0.05)


@pytest.mark.parametrize("drift", [-2e-4, 2e-4])
def test_a_slight_clock_drift_of_the_camera_is_not_lag(drift: float) -> None:
    """For an hour, and although the machine is so busy that no wait is ever seen."""
    backlog = StreamLag()
    late_s = [backlog.late_s(n * STEP_S, 1000 + n * STEP_S * (1 + drift), 0.0) for n in range(90_000)]
    assert max(late_s) < 0.01


def test_a_burst_after_a_stall_is_not_skipped() -> None:
    """The network held back three seconds, then gave them all at once."""
    backlog = StreamLag()
    for number in range(100):
        backlog.late_s(number * STEP_S, 1000 + number * STEP_S, 0.039)
    burst = [
        backlog.late_s((100 + n) * STEP_S, 1000 + 100 * STEP_S + 3 + n * 1e-3, 3.0 * (n == 0))
        for n in range(70)
    ]
    assert max(burst) < 0.1  # what had to be waited for has nothing in front of it


@pytest.mark.parametrize("leap_s", [-1000.0, 1000.0])
def test_a_jump_of_the_stream_clock_resets_the_lag(leap_s: float) -> None:
    backlog = StreamLag()
    for number in range(100):
        backlog.late_s(number * STEP_S, 1000 + number * STEP_S, 0.0)
    late_s = [backlog.late_s(leap_s + n * STEP_S, 1000 + n * STEP_S, 0.0) for n in range(100, 200)]
    assert max(late_s) < 0.01


def test_guessed_times_give_no_lag_while_reads_wait() -> None:
    """MJPEG over HTTP has no times of its own: FFmpeg counts 25 per second, and only 10 come."""
    backlog = StreamLag()
    late_s = [backlog.late_s(n * 0.04, 1000 + n * 0.1, 0.095) for n in range(1000)]
    assert max(late_s) < 0.01


def test_lag_that_cannot_be_reduced_is_forgotten() -> None:
    backlog = StreamLag()
    backlog.late_s(0.0, 1000.0, 0.0)
    assert backlog.late_s(1.0, 1005.0, 0.0) > 3
    backlog.reset()
    assert backlog.late_s(2.0, 1007.0, 0.0) == 0
