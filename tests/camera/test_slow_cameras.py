"""Slow cameras: how seldom pictures come is learnt, and only what is well beyond that is silence."""

import threading

import pytest

from camera_doubles import SPEC, FrameRecorder, StatusRecorder, FakeClock, running
from clips import numbered_picture
from visionedge.camera.camera import Camera, CameraDependencies, CameraProgress
from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.config.addresses import CameraUri

S = 1_000_000_000
FIRST = 20 * S


def _seen(*gaps_s: float) -> tuple[CameraProgress, int]:
    """What is known of a live camera whose pictures came so far apart, and when the last one came."""
    progress, now_ns = CameraProgress(0, 0, 1, state="live", live=True), 5 * S
    progress.begin_connection()
    for gap_s in (0.0, *gaps_s):
        now_ns += round(gap_s * S)
        progress.note(WholePicture(lambda: numbered_picture(0), 160, 120, None), now_ns)
    return progress, now_ns


@pytest.mark.parametrize("gap_s", [3.0, 5.0, 10.0])
def test_a_camera_with_a_picture_every_few_seconds_is_never_stale(gap_s: float) -> None:
    """From its first picture on, when nothing is known of its rate."""
    for count in range(12):
        progress, now_ns = _seen(*[gap_s] * count)
        assert not progress.is_stale(now_ns + round(1.9 * gap_s * S), FIRST)
        assert progress.is_stale(now_ns + round(max(3 * gap_s, 20) * S) + S, FIRST)


def test_pictures_buffered_while_opening_do_not_count_in_the_rate() -> None:
    """They come at once, and the next one in its own time."""
    progress, now_ns = _seen(0.0, 0.001, 0.001)
    assert not progress.is_stale(now_ns + 10 * S, FIRST)
    assert progress.silence_limit_ns(4 * S, FIRST) == FIRST


def test_a_fast_camera_is_stale_after_two_seconds_and_lost_after_the_minimum_silence() -> None:
    progress, now_ns = _seen(*[0.04] * 9)
    assert not progress.is_stale(now_ns + 2 * S, FIRST)
    assert progress.is_stale(now_ns + 2 * S + 1, FIRST)
    assert progress.silence_limit_ns(4 * S, FIRST) == 4 * S


def test_a_camera_with_pauses_gets_three_times_its_longest_pause() -> None:
    progress, _ = _seen(*[0.04] * 5, 3.0, *[0.04] * 5)
    assert progress.silence_limit_ns(4 * S, FIRST) == 9 * S


def test_a_new_connection_is_measured_again() -> None:
    progress, now_ns = _seen(10.0, 10.0)
    progress.begin_connection()
    assert progress.silence_limit_ns(4 * S, FIRST) == FIRST
    assert not progress.is_stale(now_ns + 99 * S, FIRST)


class _HaltingSource:
    """A live source that gives so many pictures, 40 ms apart, and then blocks until it is released."""

    live = True
    decoder = "scripted"

    def __init__(self, clock: FakeClock, pictures: int) -> None:
        self.waiting_since_s: float | None = None
        self.waits, self.released, self.closed = (threading.Event() for _ in range(3))
        self._clock, self._left = clock, pictures

    def read(self) -> DecodedPicture | None:
        if self._left == 0:
            self.waiting_since_s = self._clock() / 1e9
            self.waits.set()
            assert self.released.wait(10)
            self.waiting_since_s = None
        self._left -= 1
        self._clock.now_ns += 40_000_000
        return WholePicture(lambda: numbered_picture(0), 160, 120, None)

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """All are given."""

    def interrupt(self) -> None:
        """It hangs."""

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize(("pictures", "patience_s"), [(0, 20.0), (1, 20.0), (12, 4.0)])
def test_a_silent_source_is_abandoned_at_its_limit_and_not_before(
    pictures: int, patience_s: float
) -> None:
    """A picture that comes too late becomes no frame, and the source is closed."""
    clock, basket, changes = FakeClock(), FrameRecorder(), StatusRecorder()
    halting = _HaltingSource(clock, pictures)
    again = threading.Event()

    def opener(_uri: CameraUri, _limits: SourceLimits) -> _HaltingSource:
        if again.is_set():
            return _HaltingSource(clock, 0)
        again.set()
        return halting

    def wait(event: threading.Event, _timeout_s: float) -> bool:
        return event.wait(10)  # after the loss, until the end of the test

    dependencies = CameraDependencies(opener=opener, wait=wait)
    camera = Camera(
        "dock", "rtsp://h/x", SPEC, basket, clock=clock, on_change=changes, dependencies=dependencies
    )
    with running(camera, end_limit_s=1.0):
        assert halting.waits.wait(5)
        clock.now_ns += round((patience_s - 0.1) * S)
        camera.check_liveness()
        assert not {"reconnecting", "failed"} & set(changes.states)
        clock.now_ns += round(0.2 * S)
        camera.check_liveness()
        lost = changes.wait_for("reconnecting" if pictures else "failed")
        assert f"no picture for {patience_s:g} s" in (lost.last_error or "")
        halting.released.set()
        assert halting.closed.wait(5)
    assert len(basket.frames) == pictures


def test_stop_does_not_wait_for_a_silent_source() -> None:
    clock = FakeClock()
    halting = _HaltingSource(clock, 1)
    camera = Camera(
        "dock",
        "rtsp://h/x",
        SPEC,
        FrameRecorder(),
        clock=clock,
        dependencies=CameraDependencies(lambda _u, _l: halting),
    )
    with running(camera, end_limit_s=1.0):
        assert halting.waits.wait(5)
    assert camera.status().state == "stopped"
    halting.released.set()
    assert halting.closed.wait(5)
