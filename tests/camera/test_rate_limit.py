"""Cameras are throttled and released while they run: delivered, counted and decoded pictures."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camera_doubles import SPEC, FakeClock, FrameRecorder, ScriptedOpener, ScriptedSource, running
from clips import make_clip, number_of, numbered_picture
from visionedge.camera.camera import Camera, CameraDependencies
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.open import LoopedSource, open_source, open_video
from visionedge.camera.timing import UNTHROTTLED, AdmissionCounts, FrameAdmission, Throttle
from visionedge.config.addresses import parse_camera_uri

STILL = numbered_picture(3)
KEY_EVERY_TEN = {"profile": "baseline", "tune": "zerolatency", "g": "10", "sc_threshold": "0", "crf": "10"}


def play(
    admission: FrameAdmission, first: int, count: int, *, fps: float = 10, source_frames: int = 1
) -> int:
    """Read so many pictures, each of which covers several of the source's; how many were due."""
    moments = [(first + (n + 1) * source_frames) / fps for n in range(count)]
    return sum(admission.admits(at_s, source_frames) for at_s in moments)


def test_a_throttle_lowers_the_delivered_and_not_the_requested_rate() -> None:
    counts = AdmissionCounts()
    admission = FrameAdmission(None, None, counts)
    assert admission.set_throttle(Throttle(fps=2))
    assert admission.fps == 2
    due = play(admission, 0, 100)
    assert due == pytest.approx(20, abs=1)
    assert (counts.demanded, counts.admitted) == (100, due)


def test_a_throttle_above_the_requested_rate_changes_nothing() -> None:
    admission = FrameAdmission(5, None, AdmissionCounts())
    assert not admission.set_throttle(Throttle(fps=8))
    assert admission.fps == 5
    assert play(admission, 0, 100) == 50


def test_undecoded_pictures_count_as_requested() -> None:
    """A key picture every two seconds of a source with 25 per second, of which 5 are requested."""
    counts = AdmissionCounts()
    admission = FrameAdmission(5, None, counts)
    admission.admits(0.0, 1)
    admission.set_throttle(Throttle(fps=0.5))
    assert play(admission, 0, 30, fps=25, source_frames=50) == 30
    assert counts.demanded == pytest.approx(5 * 60, abs=2)
    assert counts.admitted == pytest.approx(30, abs=2)


def test_a_new_rate_keeps_the_distance_to_the_last_picture() -> None:
    """Otherwise every change would cost a picture, and changes come every few seconds."""
    admission = FrameAdmission(None, None, AdmissionCounts())
    admission.set_throttle(Throttle(fps=1))
    admission.admits(0.0, 1)
    admission.set_throttle(Throttle(fps=0.9))
    assert play(admission, 0, 9) == 1
    admission.set_throttle(Throttle(fps=1.0))
    assert play(admission, 9, 9) == 1


@given(st.lists(st.sampled_from([None, 0.5, 2.0, 7.0]), max_size=30), st.integers(1, 30))
def test_delivered_is_at_most_admitted_and_admitted_at_most_requested(
    rates: list[float | None], asked_fps: int
) -> None:
    counts = AdmissionCounts()
    admission = FrameAdmission(asked_fps, None, counts)
    taken, first = 0, 0
    for rate in rates:
        admission.set_throttle(Throttle(fps=rate))
        taken += play(admission, first, 20)
        first += 20
    assert taken == counts.admitted
    assert counts.admitted <= counts.demanded + len(rates)
    assert abs(counts.demanded - first / 10 * min(asked_fps, 10)) <= 1


def still(admission: FrameAdmission, first: int, count: int) -> int:
    """Show pictures on which nothing moves; how many pass."""
    passed = 0
    for number in range(first, first + count):
        if admission.admits(number / 10, 1):
            passed += admission.passes_gate(STILL, round(number * 1e8))
    return passed


def test_a_gate_can_be_added_and_removed_while_pictures_arrive() -> None:
    counts = AdmissionCounts()
    admission = FrameAdmission(None, None, counts)
    assert still(admission, 0, 50) == 50
    admission.set_throttle(Throttle(gate=GateSettings()))
    assert still(admission, 50, 200) < 50
    admitted = counts.admitted
    assert admitted < 100
    admission.set_throttle(UNTHROTTLED)
    assert still(admission, 250, 50) == 50
    assert counts.demanded == 300
    assert counts.admitted >= admitted + 50


def test_pictures_that_a_configured_gate_skips_are_not_requested() -> None:
    counts = AdmissionCounts()
    admission = FrameAdmission(None, GateSettings(), counts)
    admission.set_throttle(Throttle(gate=GateSettings(every_s=0.1)))  # its own one stays
    passed = still(admission, 0, 300)
    assert passed < 60
    assert abs(counts.demanded - passed) <= 4
    assert counts.demanded == counts.admitted


# --- a camera that runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute at 20 pictures per second, a key picture every half second."""
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "long.mp4", pictures=1200, fps=20, options=KEY_EVERY_TEN)


def test_a_throttle_starts_and_ends_without_reopening_the_camera(clip: Path) -> None:
    basket = FrameRecorder()
    with running(Camera("dock", str(clip), SPEC, basket)) as camera:
        basket.wait_for(lambda frames: len(frames) >= 10)
        camera.throttle(Throttle(fps=4))
        first = len(basket.frames)
        frames = basket.wait_for(lambda frames: len(frames) >= first + 6)[first + 1 :]
        gaps_s = [(after.captured_ns - before.captured_ns) / 1e9 for before, after in pairwise(frames)]
        assert sorted(gaps_s)[len(gaps_s) // 2] == pytest.approx(0.25, abs=0.1)

        camera.throttle(UNTHROTTLED)
        last = len(basket.frames)
        basket.wait_for(lambda frames: len(frames) >= last + 20)
        assert camera.epoch == 1
        assert camera.counts.demanded > camera.counts.admitted
        assert camera.counts.admitted >= len(basket.frames)
    numbers = [frame.sequence for frame in basket.frames]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_gate_can_be_added_to_and_removed_from_a_running_camera(tmp_path: Path) -> None:
    """Skipped pictures are counted as gated, and the counters add up."""
    source = make_clip(tmp_path / "still.mp4", pictures=200, fps=40, still=True)
    basket = FrameRecorder()
    camera = Camera("dock", str(source), SPEC, basket)
    with running(camera):
        basket.wait_for(lambda frames: len(frames) >= 10)
        camera.throttle(Throttle(gate=GateSettings(every_s=60)))
        # It has to learn what the camera usually shows, and holds back nothing for two seconds after that.
        gated = basket.wait_for(lambda _frames: basket.gated >= 10)
        camera.throttle(UNTHROTTLED)
        basket.wait_for(lambda frames: len(frames) >= len(gated) + 10)
    assert camera.counts.demanded == len(basket.frames) + basket.gated
    assert camera.epoch == 1


def test_the_source_gets_the_wanted_rate_only_when_it_changes() -> None:
    clock, basket = FakeClock(), FrameRecorder()
    source = ScriptedSource([n / 10 for n in range(40)])
    camera = Camera(
        "dock",
        "demo:",
        SPEC,
        basket,
        fps=5,
        clock=clock,
        throttle=Throttle(fps=2),
        dependencies=CameraDependencies(ScriptedOpener(source), clock.wait),
    )
    camera.run()
    assert source.wanted == [2]
    assert len(basket.frames) == pytest.approx(8, abs=1)


def test_a_source_decodes_half_while_most_frames_are_replaced() -> None:
    admission = FrameAdmission(None, None, AdmissionCounts())

    def offer(count: int, *, one_taken_of: int) -> list[float | None]:
        changed = [admission.note_offered(replaced=number % one_taken_of > 0) for number in range(count)]
        return [admission.wanted_rate(25.0)] * sum(changed)

    assert offer(300, one_taken_of=4) == []
    (half,) = offer(300, one_taken_of=5)
    assert half is not None
    assert 25 / 3 < half < 25 / 2  # every second picture, with some tolerance, and not every third
    assert offer(300, one_taken_of=2) == []
    assert offer(300, one_taken_of=1) == [None]


def test_the_lower_of_all_rates_is_wanted_while_most_frames_are_replaced() -> None:
    admission = FrameAdmission(5.0, None, AdmissionCounts())
    while not admission.note_offered(replaced=True):
        pass
    assert admission.wanted_rate(25.0) == 5.0
    assert admission.wanted_rate(6.0) == pytest.approx(6 / 2.3)
    assert admission.wanted_rate(0.0) == 5.0  # the rate is not known yet


def test_pictures_that_are_not_decoded_while_others_are_replaced_count_as_demanded_only() -> None:
    counts = AdmissionCounts()
    admission = FrameAdmission(None, None, counts)
    while not admission.note_offered(replaced=True):
        pass
    assert sum(admission.admits(number / 5, 2) for number in range(10)) == 10
    assert (counts.demanded, counts.admitted) == (19, 10)


def test_a_camera_tells_its_source_when_most_frames_are_replaced_and_when_not() -> None:
    clock, basket = FakeClock(), FrameRecorder()
    source = ScriptedSource([n / 25 for n in range(300)])
    basket.answer = lambda frames: len(frames) < 150
    camera = Camera(
        "dock",
        "demo:",
        SPEC,
        basket,
        clock=clock,
        dependencies=CameraDependencies(ScriptedOpener(source), clock.wait),
    )
    camera.run()
    assert source.wanted == [pytest.approx(25 / 2.3, rel=0.02), None]
    assert [frame.sequence for frame in basket.frames] == list(range(1, 301))


# --- what is decoded ----------------------------------------------------------------------------------------


def test_decoding_follows_the_wanted_rate_while_a_stream_plays(clip: Path) -> None:
    """Every picture has its correct time, and together they cover the whole stream."""
    source = open_source(parse_camera_uri(str(clip)), SourceLimits(library="pyav"))
    seen: list[tuple[float, int, int]] = []

    def read(count: int) -> list[int]:
        for _ in range(count):
            decoded = source.read()
            assert decoded is not None
            assert decoded.position_s is not None
            seen.append(
                (decoded.position_s, number_of(decoded.fit_to_input(SPEC)[0][8:-8]), decoded.source_frames)
            )
        return [source_frames for _, _, source_frames in seen[-count:]]

    assert set(read(30)) == {1}
    source.set_wanted_rate(1.5)
    read(60)
    assert set(read(20)) == {10}
    source.set_wanted_rate(None)
    read(12)
    assert set(read(30)) == {1}
    source.set_wanted_rate(1.5)
    read(30)
    source.set_wanted_rate(20.0)
    read(12)
    assert set(read(30)) == {1}
    source.close()
    for position_s, number, _ in seen:
        assert number == round(position_s * 20) % 24
    assert sum(source_frames for _, _, source_frames in seen) == round(seen[-1][0] * 20) + 1


def test_a_loop_keeps_the_wanted_rate_over_its_end(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", pictures=60, fps=20, options=KEY_EVERY_TEN)
    source = LoopedSource(lambda: open_video(clip, SourceLimits(library="pyav")))
    source.set_wanted_rate(1.5)
    source_frames = [decoded.source_frames for _ in range(66) if (decoded := source.read()) is not None]
    source.close()
    # Each round begins with half of it until the stream is known, and three key pictures follow.
    assert source_frames[31:33] == source_frames[64:66] == [10, 10]
