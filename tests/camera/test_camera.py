"""The camera's life: connect, live, lost, back again, end, stop; on scripted sources and a jumping clock."""

import logging
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from camera_doubles import (
    SPEC,
    FakeClock,
    FrameRecorder,
    ScriptedOpener,
    ScriptedSource,
    StatusRecorder,
    running,
)
from clips import make_clip, make_picture, number_of, numbered_picture
from visionedge.camera.camera import Camera, CameraDependencies
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Frame, Picture

URI = "rtsp://user:geheim@192.0.2.1/x?token=geheim"
LOST = SourceError("the server closed the connection")


class CameraHarness:
    """A camera on scripted sources, run in this thread until its end or so many waits."""

    def __init__(self, *sources: ScriptedSource | Exception, uri: str = URI) -> None:
        self.clock = FakeClock()
        self.basket = FrameRecorder()
        self.changes = StatusRecorder()
        self.opener = ScriptedOpener(*sources)
        self.uri = uri

    def camera(self, **options: float | bool | None) -> Camera:
        fps = options.get("fps")
        first = options.get("first_sequence", 1)
        assert first is not None
        return Camera(
            "dock",
            self.uri,
            SPEC,
            self.basket,
            fps=None if fps is None else float(fps),
            first_sequence=int(first),
            paced=bool(options.get("paced", True)),
            clock=self.clock,
            on_change=self.changes,
            dependencies=CameraDependencies(
                opener=self.opener, wait=self.clock.wait, random_fraction=lambda: 0.0
            ),
        )

    def play(self, **options: float | bool | None) -> Camera:
        camera = self.camera(**options)
        camera.run()
        return camera


def live(*steps: float | Exception, clock: FakeClock | None = None) -> ScriptedSource:
    return ScriptedSource(steps, live=True, clock=clock)


def sequences(frames: list[Frame]) -> list[tuple[int, int]]:
    return [(f.epoch, f.sequence) for f in frames]


def test_frames_carry_sequence_epoch_time_and_both_pictures() -> None:
    harness = CameraHarness(ScriptedSource([0.0, 0.5]))
    camera = harness.play()
    frame = harness.basket.frames[1]
    assert (frame.camera, frame.sequence, frame.epoch) == ("dock", 2, 1)
    assert frame.captured_ns == 1_500_000_000
    assert (frame.width_px, frame.height_px) == (160, 120)
    np.testing.assert_array_equal(frame.full_picture(), numbered_picture(1))
    np.testing.assert_array_equal(frame.input_picture(), fit_to_input(numbered_picture(1), SPEC)[0])
    assert frame.placement == SPEC.place(160, 120)
    assert camera.status().state == "ended"


def test_a_lost_source_returns_with_the_next_epoch_and_continues_the_sequence() -> None:
    harness = CameraHarness(live(0.1, 0.1, LOST), LOST, live(0.1))
    camera = harness.play(first_sequence=41)
    assert sequences(harness.basket.frames) == [(1, 41), (1, 42), (2, 43)]
    assert harness.changes.states == ["live", "reconnecting", "live", "ended"]
    assert camera.next_sequence == 44


def test_waits_grow_and_start_short_again_after_a_healthy_minute() -> None:
    harness = CameraHarness()
    short = [live(0.1, LOST, clock=harness.clock) for _ in range(3)]
    long = live(0.1, 61.0, LOST, clock=harness.clock)
    harness.opener = ScriptedOpener(*short, long, LOST, live())
    harness.play()
    assert harness.clock.waits_s == [1, 2, 4, 1, 2]


def test_a_camera_that_was_never_reached_is_failed_and_retried() -> None:
    harness = CameraHarness(*[LOST] * 50)
    harness.clock.stop_after_waits = 50
    harness.play()
    assert harness.opener.opened == 50
    assert harness.clock.waits_s[:6] == [1, 2, 4, 8, 16, 30]
    assert harness.changes.states == ["failed", "stopped"]
    assert harness.changes.statuses[0].last_error == "the server closed the connection"
    assert harness.changes.statuses[0].epoch == 0


def test_a_lost_camera_has_the_time_of_the_next_attempt_only_while_it_waits() -> None:
    """In s from now; None while it tries, and once it has ended."""
    clock, trying, waiting = FakeClock(), [], []
    sources = ScriptedOpener(LOST, LOST, live(0.1))

    def opened(uri: CameraUri, limits: SourceLimits) -> ScriptedSource:
        trying.append(camera.status().next_try_s)
        return sources(uri, limits)

    def wait(event: threading.Event, timeout_s: float) -> bool:
        waiting.append(camera.status().next_try_s)
        clock.wait(event, timeout_s / 4)
        waiting.append(camera.status().next_try_s)
        return clock.wait(event, timeout_s * 3 / 4)

    camera = Camera(
        "dock",
        URI,
        SPEC,
        FrameRecorder(),
        clock=clock,
        dependencies=CameraDependencies(opener=opened, wait=wait, random_fraction=lambda: 0.0),
    )
    camera.run()
    assert waiting == [1.0, 0.75, 2.0, 1.5]
    assert trying == [None, None, None]
    assert (camera.status().state, camera.status().next_try_s) == ("ended", None)


def test_an_opened_source_without_a_picture_starts_no_epoch() -> None:
    harness = CameraHarness(live(LOST), live(LOST), live(0.1))
    harness.play()
    assert sequences(harness.basket.frames) == [(1, 1)]
    assert harness.changes.states == ["failed", "live", "ended"]


def test_success_clears_the_last_error() -> None:
    harness = CameraHarness(LOST, live(0.1))
    assert harness.play().status().last_error is None


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("bug"), np.exceptions.AxisError("x"), OSError(5, "io")]
)
def test_any_error_is_a_lost_source_and_never_a_dead_thread(error: Exception) -> None:
    harness = CameraHarness(live(0.1, error), live(0.1))
    harness.play()
    assert sequences(harness.basket.frames) == [(1, 1), (2, 2)]
    assert (harness.changes.statuses[1].last_error or "").startswith(type(error).__name__)


def test_sources_are_always_closed() -> None:
    sources = [live(0.1, LOST), live(LOST), live(0.1)]
    harness = CameraHarness(*sources)
    harness.play()
    assert [s.closed for s in sources] == [True] * 3


def test_errors_status_and_log_never_show_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    harness = CameraHarness(RuntimeError(f"line one of {URI}\nline two"), live(0.1))
    camera = harness.play()
    statuses = repr(harness.changes.statuses)
    assert "geheim" not in statuses + repr(camera) + caplog.text
    assert "user" not in statuses
    assert "\n" not in (harness.changes.statuses[0].last_error or "")
    assert camera.status().uri == "rtsp://***@192.0.2.1/x?token=***"


def test_a_change_is_logged_once_and_retries_are_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    harness = CameraHarness(live(0.1, LOST), *[LOST] * 9, live(0.1))
    harness.play()
    lines = [r.message for r in caplog.records]
    assert len(lines) == 4
    assert "camera dock: the server closed the connection; retrying in 1 s" in lines[1]
    # 1 + 2 + 4 + 8 + 16 and five times 30 s.
    assert "live again after 181.0 s, 160 x 120 px" in lines[2]


def test_an_invalid_uri_fails_with_the_reason() -> None:
    harness = CameraHarness(uri="gopher://192.0.2.1")
    harness.clock.stop_after_waits = 2
    camera = harness.play()
    assert "unknown scheme 'gopher:'" in (camera.status().last_error or "")
    assert harness.changes.states == ["failed", "stopped"]


def test_an_error_of_a_listener_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    def listener(_status: object) -> None:
        raise ValueError("not my day")

    harness = CameraHarness(live(0.1))
    dependencies = CameraDependencies(opener=harness.opener, wait=harness.clock.wait)
    Camera(
        "dock", URI, SPEC, harness.basket, clock=harness.clock, on_change=listener, dependencies=dependencies
    ).run()
    assert len(harness.basket.frames) == 1
    assert "camera dock: reporting the state live failed" in caplog.text


class _UnconvertibleSource(ScriptedSource):
    """Its pictures come, and none of them can be converted."""

    def read(self) -> DecodedPicture | None:
        decoded = super().read()
        if decoded is None:
            return None

        def damaged() -> Picture:
            raise DamagedPictureError("its pictures cannot be converted")

        return WholePicture(damaged, 160, 120, decoded.position_s)


@pytest.mark.parametrize("is_live", [False, True])
def test_a_camera_without_convertible_pictures_is_never_live_and_keeps_its_reason(*, is_live: bool) -> None:
    """A file reports it at its end, a stream after some time; neither flaps."""
    harness = CameraHarness()
    sources = [_UnconvertibleSource([1.0] * 20, live=is_live, clock=harness.clock) for _ in range(3)]
    harness.opener = ScriptedOpener(*sources, live(0.1))
    camera = harness.play(paced=False)
    assert harness.changes.states == ["failed", "live", "ended"]
    assert harness.changes.statuses[0].last_error == "its pictures cannot be converted"
    assert harness.changes.statuses[0].epoch == 0
    assert camera.status().epoch == 1


def test_files_play_at_their_own_rate_and_delays_do_not_accumulate() -> None:
    harness = CameraHarness(ScriptedSource([n * 0.1 for n in range(50)]))
    harness.play()
    times_ns = [f.captured_ns for f in harness.basket.frames]
    assert times_ns == [1_000_000_000 + n * 100_000_000 for n in range(50)]


def test_with_a_lower_rate_only_due_pictures_are_converted() -> None:
    source = ScriptedSource([n * 0.1 for n in range(20)])
    harness = CameraHarness(source)
    camera = harness.play(fps=5)
    assert [number_of(f.full_picture()) for f in harness.basket.frames] == list(range(0, 20, 2))
    assert [f.sequence for f in harness.basket.frames] == list(range(1, 11))
    assert source.converted == 10
    assert camera.status().frames_read == 20


class SlotCounter:
    """Allocates an array for each picture that is resized, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def allocate(self) -> Picture:
        self.count += 1
        return np.zeros((SPEC.height_px, SPEC.width_px, 3), np.uint8)


def play_counted(*, gate: GateSettings | None = None) -> tuple[CameraHarness, SlotCounter, Camera]:
    """Play 40 pictures, 10 per second, whose slots are counted."""
    harness, slots = CameraHarness(ScriptedSource([n * 0.1 for n in range(40)])), SlotCounter()
    camera = Camera(
        "dock",
        URI,
        SPEC,
        harness.basket,
        clock=harness.clock,
        gate=gate,
        allocate=slots.allocate,
        dependencies=CameraDependencies(opener=harness.opener, wait=harness.clock.wait),
    )
    camera.run()
    return harness, slots, camera


def test_a_picture_is_resized_when_its_frame_is_taken_or_once_a_second_to_look_at_it() -> None:
    harness, slots, _camera = play_counted()
    assert len(harness.basket.frames) == 40
    assert slots.count == 4
    frame = harness.basket.frames[5]
    np.testing.assert_array_equal(frame.input_picture(), fit_to_input(numbered_picture(5), SPEC)[0])
    assert frame.placement == fit_to_input(numbered_picture(5), SPEC)[1]
    assert slots.count == 5


def test_a_picture_that_was_looked_at_is_not_resized_again() -> None:
    """The motion gate looks at all pictures; 40 of them are resized, gated ones too."""
    harness, slots, _camera = play_counted(gate=GateSettings())
    for frame in harness.basket.frames:
        np.testing.assert_array_equal(
            frame.input_picture(), fit_to_input(numbered_picture(frame.sequence - 1), SPEC)[0]
        )
    assert slots.count == 40 == len(harness.basket.frames) + harness.basket.gated


def test_a_live_camera_is_thinned_by_the_clock() -> None:
    harness = CameraHarness()
    harness.opener = ScriptedOpener(live(*[0.1] * 20, clock=harness.clock))
    harness.play(fps=5)
    assert [number_of(f.full_picture()) for f in harness.basket.frames] == list(range(0, 20, 2))


def test_a_flat_out_file_waits_for_the_sink_and_not_for_the_clock() -> None:
    harness = CameraHarness(ScriptedSource([n * 0.1 for n in range(5)]))
    answers = iter([False, False, True, True, True, True, True])
    harness.basket = FrameRecorder(lambda _camera: next(answers))
    harness.play(paced=False)
    assert harness.basket.asked == 7
    assert harness.clock.waits_s == []
    assert len(harness.basket.frames) == 5


def test_a_flat_out_live_camera_is_not_delayed() -> None:
    harness = CameraHarness(live(0.1, 0.1))
    harness.play(paced=False)
    assert harness.basket.asked == 0


def test_status_has_rate_age_size_and_decoder() -> None:
    harness = CameraHarness(ScriptedSource([n * 0.1 for n in range(30)]))
    camera = harness.camera()
    before = camera.status()
    assert (before.state, before.fps, before.age_ms, before.epoch) == ("connecting", 0.0, None, 0)
    camera.run()
    harness.clock.now_ns += 50_000_000
    status = camera.status()
    assert status.fps == pytest.approx(10)
    assert status.age_ms == pytest.approx(50)
    assert (status.width, status.height, status.decoder) == (160, 120, "scripted")
    assert (status.frames_read, status.epoch, status.state) == (30, 1, "ended")
    assert status.since_ns == 1_000_000_000 + 2_900_000_000


def test_repr_shows_the_state_in_one_line() -> None:
    camera = CameraHarness(live(0.1)).play()
    assert repr(camera) == "<Camera dock ended epoch=1 read=1 next=2 error=None>"


def test_a_replacing_camera_continues_the_counts() -> None:
    harness = CameraHarness(live(0.1))
    dependencies = CameraDependencies(opener=harness.opener)
    Camera("dock", URI, SPEC, harness.basket, first_sequence=7, last_epoch=3, dependencies=dependencies).run()
    assert sequences(harness.basket.frames) == [(4, 7)]


def test_stop_ends_a_long_wait_at_once() -> None:
    changes = StatusRecorder()
    opener = ScriptedOpener(*[LOST] * 9)
    camera = Camera(
        "dock",
        URI,
        SPEC,
        FrameRecorder(),
        on_change=changes,
        dependencies=CameraDependencies(opener=opener, random_fraction=lambda: 0.0),
    )
    with running(camera):
        changes.wait_for("failed")
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 0.5
    assert camera.status().state == "stopped"


def test_stop_ends_a_file_between_two_pictures_at_once(tmp_path: Path) -> None:
    for number in range(3):
        make_picture(tmp_path / f"{number}.png", number)
    basket = FrameRecorder()
    camera = Camera("dock", str(tmp_path), SPEC, basket, fps=0.01)
    with running(camera):
        basket.wait_for(lambda frames: len(frames) == 1)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 0.5
    assert len(basket.frames) == 1


def test_stop_ends_flat_out_playing_while_the_sink_takes_nothing(tmp_path: Path) -> None:
    basket = FrameRecorder(lambda _camera: threading.Event().wait(0.01))
    camera = Camera("dock", str(make_clip(tmp_path / "c.mp4")), SPEC, basket, paced=False)
    with running(camera, end_limit_s=1.0):
        basket.wait_for(lambda frames: len(frames) == 1)
    assert camera.status().state == "stopped"


def test_stop_does_not_wait_for_a_hanging_open() -> None:
    """A source that opens later is closed, and none of its pictures is delivered."""
    hanging, opening = threading.Event(), threading.Event()
    source = live(0.1)

    def opener(_uri: object, _limits: object) -> ScriptedSource:
        opening.set()
        assert hanging.wait(10)
        return source

    basket, closed = FrameRecorder(), threading.Event()
    source.close = closed.set  # type: ignore[method-assign]  # to be notified
    camera = Camera("dock", URI, SPEC, basket, dependencies=CameraDependencies(opener=opener))
    with running(camera, end_limit_s=0.5):
        assert opening.wait(5)
    assert camera.status().state == "stopped"
    hanging.set()
    assert closed.wait(5)
    assert basket.frames == []


def test_a_camera_that_opens_slowly_gets_more_time_each_attempt() -> None:
    harness = CameraHarness()
    given_s: list[float] = []

    def opener(_uri: object, limits: SourceLimits) -> ScriptedSource:
        given_s.append(limits.open_timeout_s)
        harness.clock.now_ns += round(limits.open_timeout_s * 1e9)
        raise LOST

    harness.clock.stop_after_waits = 5
    dependencies = CameraDependencies(opener=opener, wait=harness.clock.wait)
    Camera("dock", URI, SPEC, harness.basket, clock=harness.clock, dependencies=dependencies).run()
    assert given_s == [4, 20, 20, 20, 20]


def test_stop_before_run_opens_nothing() -> None:
    harness = CameraHarness(live(0.1))
    camera = harness.camera()
    camera.stop()
    camera.run()
    assert harness.opener.opened == 0
    assert harness.changes.states == ["stopped"]


def test_a_real_file_plays_to_its_end_at_its_own_rate(tmp_path: Path) -> None:
    changes = StatusRecorder()
    basket = FrameRecorder()
    clip = make_clip(tmp_path / "c.mp4", pictures=12, fps=20)
    with running(Camera("dock", str(clip), SPEC, basket, on_change=changes)) as camera:
        changes.wait_for("ended")
    assert [number_of(f.full_picture()) for f in basket.frames] == list(range(12))
    played_s = (basket.frames[-1].captured_ns - basket.frames[0].captured_ns) / 1e9
    # Never faster than it should; how much slower depends on the machine.
    assert 0.545 <= played_s < 5
    assert camera.status().last_error is None


@pytest.mark.parametrize("fps", [None, 5.0])
def test_a_file_with_b_pictures_ends_without_an_error(tmp_path: Path, fps: float | None) -> None:
    """Its last pictures come out of the decoder together, and are played at their own times."""
    changes, basket = StatusRecorder(), FrameRecorder()
    options = {"bf": "3", "g": "12", "x264-params": "b-adapt=0"}
    clip = make_clip(tmp_path / "b.mp4", pictures=20, fps=20, options=options)
    with running(Camera("dock", str(clip), SPEC, basket, fps=fps, on_change=changes)) as camera:
        changes.wait_for("ended")
    assert changes.states == ["live", "ended"]
    assert camera.status().last_error is None
    numbers = [number_of(f.full_picture()) for f in basket.frames]
    if fps is None:
        assert numbers == list(range(20))
    else:  # a quarter of the distance is allowed for, see `Due`
        assert all(3 <= later - earlier <= 5 for earlier, later in pairwise(numbers))
    played_s = (basket.frames[-1].captured_ns - basket.frames[0].captured_ns) / 1e9
    assert played_s >= (numbers[-1] - numbers[0]) / 20 - 0.005


def test_a_file_that_appears_later_is_played(tmp_path: Path) -> None:
    changes = StatusRecorder()
    clip = tmp_path / "late.mp4"
    tries = threading.Semaphore(0)

    def wait(event: threading.Event, timeout_s: float) -> bool:
        tries.release()
        return event.wait(min(timeout_s, 0.05))

    camera = Camera(
        "dock",
        str(clip),
        SPEC,
        FrameRecorder(),
        on_change=changes,
        dependencies=CameraDependencies(wait=wait),
    )
    with running(camera):
        assert "does not exist" in (changes.wait_for("failed").last_error or "")
        assert tries.acquire(timeout=5)
        make_clip(tmp_path / "made.mp4", pictures=3).rename(clip)
        changes.wait_for("ended")


def test_the_demo_clip_continues_over_its_end_in_the_same_epoch() -> None:
    """Played without waiting, so that the end of the clip comes within the test."""
    basket = FrameRecorder()
    with running(Camera("demo", "demo:", SPEC, basket, paced=False)) as camera:
        frames = basket.wait_for(lambda frames: len(frames) > 420)
        assert camera.status().state == "live"
    assert {f.epoch for f in frames} == {1}
