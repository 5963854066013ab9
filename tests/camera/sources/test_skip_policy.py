"""Decoding is reduced if fewer pictures are wanted, and never too much: the decision, and real streams."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from clips import make_clip, number_of
from visionedge.camera.sources.base import DecoderLibrary, FrameSource, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.camera.sources.skip_policy import DecodeLevel, SkipPolicy, StreamClockCheck
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.frames.types import InputSpec

SPEC = InputSpec(32, 32)
PLAIN = {"bf": "0", "g": "10", "sc_threshold": "0"}


class SimulatedStream:
    """Plays a stream of so many pictures per second to a `SkipPolicy`, as a decoder would."""

    def __init__(
        self, looked_at_per_s: float | None, *, fps: int = 30, key_every: int = 60, pattern: str = "Pbbb"
    ):
        self.skip_policy = SkipPolicy(looked_at_per_s)
        self.decoded: list[float] = []
        self._fps, self._key_every, self._pattern = fps, key_every, pattern
        self._number = 0

    def play(self, seconds: float, *, key_every: int | None = None) -> Counter[DecodeLevel]:
        """How many packets were played at which level."""
        self._key_every = key_every or self._key_every
        levels: Counter[DecodeLevel] = Counter()
        for _ in range(round(seconds * self._fps)):
            at_s, key = self._number / self._fps, self._number % self._key_every == 0
            referred = key or self._pattern[self._number % len(self._pattern)] != "b"
            wanted = self.skip_policy.packet(at_s, key=key)
            level = self.skip_policy.level
            if wanted and (referred or level is DecodeLevel.ALL):
                self.decoded.append(at_s)
                self.skip_policy.picture(at_s)
            levels[level] += 1
            self._number += 1
        return levels


def test_all_pictures_are_decoded_if_all_are_wanted() -> None:
    stream = SimulatedStream(None)
    assert stream.play(10) == {DecodeLevel.ALL: 300}


def test_non_reference_pictures_are_skipped_if_the_rest_is_enough() -> None:
    stream = SimulatedStream(5)  # one in four is referred to: 7.5 per second
    assert stream.play(20) == {DecodeLevel.REFERENCES: 600}
    assert len(stream.decoded) == 150


def test_everything_is_decoded_if_reference_pictures_are_too_few() -> None:
    stream = SimulatedStream(10)
    levels = stream.play(20)
    assert levels[DecodeLevel.REFERENCES] < 15  # it took two pictures to see
    assert levels[DecodeLevel.ALL] > 585


def test_an_insufficient_level_is_retried_at_growing_intervals() -> None:
    stream = SimulatedStream(10)
    stream.play(30)
    tried = [stream.play(60)[DecodeLevel.REFERENCES] > 0 for _ in range(8)]
    assert 1 <= sum(tried) <= 3


def test_only_key_pictures_are_decoded_if_they_are_frequent_enough() -> None:
    stream = SimulatedStream(0.5)
    stream.play(10)
    assert stream.play(20) == {DecodeLevel.KEYS: 600}
    assert len(stream.decoded) < 100


def test_a_stream_with_rarer_key_pictures_decodes_more_again() -> None:
    """Cameras stretch the distance when nothing moves; a hole of one distance cannot be helped."""
    stream = SimulatedStream(0.5)
    stream.play(20)
    assert stream.skip_policy.level is DecodeLevel.KEYS
    stream.play(12, key_every=180)
    assert stream.play(60)[DecodeLevel.KEYS] == 0


def test_a_jumping_stream_clock_does_no_harm() -> None:
    skip_policy = SkipPolicy(0.5)
    for at_s in (0, 2, 4, 6, 8, 9000, 9002, 9004, 9006, 9008, 100, 102, 104, 106, 108):
        skip_policy.packet(at_s, key=True)
        skip_policy.picture(at_s)
    assert skip_policy.level is DecodeLevel.KEYS


def _wrong(clock: StreamClockCheck, times_s: Iterable[tuple[float, float]]) -> list[bool]:
    """The rating of the stream clock after each packet: (its own time, the time of its arrival)."""
    found = []
    for at_s, now_s in times_s:
        clock.note(at_s, now_s)
        found.append(clock.is_wrong)
    return found


@pytest.mark.parametrize("rate", [1 / 90, 0.2, 0.6, 1.7, 5.0, 90.0])
def test_a_wrong_stream_clock_is_detected_within_ten_seconds(rate: float) -> None:
    times_s = [(5000 + number / 5 * rate, number / 5) for number in range(200)]
    found = _wrong(StreamClockCheck(), times_s)
    assert not any(found[:25])
    assert all(found[50:])


@pytest.mark.parametrize("rate", [0.9, 1.0, 1.1])
def test_an_approximately_correct_stream_clock_is_used(rate: float) -> None:
    assert not any(_wrong(StreamClockCheck(), [(number / 5 * rate, number / 5) for number in range(200)]))


def test_a_stall_and_its_burst_do_not_make_a_stream_clock_wrong() -> None:
    """The stream's own times go on as they should; only the network held the packets back."""
    times_s = [(number / 25, number / 25) for number in range(250)]
    times_s += [(number / 25, 20 + (number - 250) / 500) for number in range(250, 500)]
    times_s += [(number / 25, number / 25 + 0.5) for number in range(500, 1000)]
    assert not any(_wrong(StreamClockCheck(), times_s))


def test_an_initial_burst_does_not_make_a_stream_clock_wrong() -> None:
    times_s = [(number / 25, max(0, number - 200) / 25) for number in range(1000)]
    assert not any(_wrong(StreamClockCheck(), times_s))


def test_a_corrected_stream_clock_is_used_again() -> None:
    clock = StreamClockCheck()
    assert _wrong(clock, [(number / 500, number / 5) for number in range(100)])[-1]
    assert not _wrong(clock, [(0.2 + number / 5, 20 + number / 5) for number in range(100)])[-1]


def test_a_new_stream_clock_is_measured_again() -> None:
    """Key pictures every 22 ms by one clock are every 2 s by the other, which is too seldom."""
    skip_policy = SkipPolicy(5)
    for number in range(10):
        skip_policy.packet(number * 0.022, key=True)
    assert skip_policy.level is DecodeLevel.KEYS
    skip_policy.change_clock()
    for number in range(10):
        skip_policy.packet(1000 + number * 2.0, key=True)
        assert skip_policy.level is not DecodeLevel.KEYS


class _DriftingContainer:
    """A container whose pictures come 25 per second, and whose time stamps run at another rate."""

    duration = None

    def __init__(self, container: Any, rate: float) -> None:
        self.now_s = 0.0
        self._container, self._rate = container, rate

    def clock(self) -> float:
        return self.now_s

    def demux(self, stream: Any) -> Iterator[Any]:
        for packet in self._container.demux(stream):
            self.now_s += 1 / 25
            if packet.size:
                packet.pts, packet.dts = round(packet.pts * self._rate), round(packet.dts * self._rate)
            yield packet

    def close(self) -> None:
        self._container.close()


def _times_until_closed(source: FrameSource, camera: _DriftingContainer) -> Iterator[float]:
    with contextlib.suppress(SourceError):  # a live stream does not end, it is lost
        while source.read() is not None:
            yield camera.now_s


@pytest.mark.parametrize("rate", [1 / 40, 1, 25])
def test_a_live_stream_with_a_wrong_clock_gives_the_wanted_rate(tmp_path: Path, rate: float) -> None:
    """A key picture every 0.4 s is less than five per second; by too slow a clock it is every 10 ms."""
    av: Any = pytest.importorskip("av")
    from visionedge.camera.sources.pyav import PyavSource

    container = av.open(str(make_clip(tmp_path / "c.mkv", pictures=1000, fps=25, options=PLAIN)))
    camera, stream = _DriftingContainer(container, rate), container.streams.video[0]
    limits = SourceLimits(library="pyav", pictures_per_s=5.0)
    source = PyavSource(cast("Any", camera), stream, "a camera", live=True, limits=limits, clock=camera.clock)
    times_s = list(_times_until_closed(source, camera))
    source.close()
    assert camera.now_s > 39
    gaps_s = [later - earlier for earlier, later in pairwise(times_s) if earlier > 10]
    assert len(gaps_s) > 100
    assert max(gaps_s) < 0.25


def _open(path: Path, looked_at_per_s: float | None) -> FrameSource:
    return open_source(
        parse_camera_uri(str(path)), SourceLimits(library="pyav", pictures_per_s=looked_at_per_s)
    )


def _numbers(source: FrameSource) -> list[tuple[int, float, int]]:
    found = []
    while (decoded := source.read()) is not None:
        assert decoded.position_s is not None
        image, _ = decoded.fit_to_input(SPEC)
        found.append((number_of(image[4:-4]), round(decoded.position_s, 3), decoded.source_frames))
    source.close()
    return found


@pytest.fixture(scope="module")
def with_b_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures, 10 per second, in x264's default coding: three B-pictures between two others."""
    options = {"bf": "3", "b-adapt": "0", "g": "12", "sc_threshold": "0", "crf": "10"}
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "b.mp4", pictures=48, options=options)


def test_a_real_stream_is_thinned_and_the_remaining_pictures_are_correct(with_b_pictures: Path) -> None:
    """Each picture at its own time and undamaged, and together they cover the stream."""
    everything = {position_s: number for number, position_s, _ in _numbers(_open(with_b_pictures, None))}
    assert len(everything) == 48
    thinned = _numbers(_open(with_b_pictures, 2.0))
    assert 10 < len(thinned) < 40
    assert all(everything[position_s] == number for number, position_s, _ in thinned)
    assert sum(source_frames for _, _, source_frames in thinned) == 48


def test_a_real_stream_with_enough_key_pictures_gives_only_these(with_b_pictures: Path) -> None:
    """Twelve pictures at ten per second are 1.2 s; four of them are enough to see the rate."""
    numbers = [number for number, _, _ in _numbers(_open(with_b_pictures, 0.5))]
    assert numbers[-1] == 12
    assert len(numbers) < 25


def test_mjpeg_pictures_are_decoded_on_demand(tmp_path: Path) -> None:
    source = _open(make_clip(tmp_path / "c.avi", codec="mjpeg"), None)
    seen = [source.read() for _ in range(6)]
    assert seen[5] is not None
    assert number_of(seen[5].fit_to_input(SPEC)[0][4:-4]) == 5
    source.close()


@pytest.mark.parametrize(
    ("library", "codec"), [("pyav", "libx264"), ("pyav", "mjpeg"), ("opencv", "libx264")]
)
def test_a_loaded_picture_stays_as_it_is_while_others_are_read(
    tmp_path: Path, library: DecoderLibrary, codec: str
) -> None:
    """It is resized later, on another thread, when its decoder has decoded many more."""
    path = make_clip(tmp_path / "c.avi", codec=codec)
    source = open_source(parse_camera_uri(str(path)), SourceLimits(library=library))
    held = []
    while (decoded := source.read()) is not None:
        decoded.load()
        held.append(decoded)
    source.close()
    with ThreadPoolExecutor(2) as threads:
        images = list(threads.map(lambda decoded: decoded.fit_to_input(SPEC)[0], held))
    assert [number_of(image[4:-4]) for image in images] == list(range(20))
    assert [number_of(decoded.picture()) for decoded in held] == list(range(20))


@pytest.mark.parametrize("pattern", ["P", "Pbbb"])
def test_a_new_wanted_rate_is_followed_while_a_stream_plays(pattern: str) -> None:
    """Behind key pictures alone everything waits for the next one; else nothing could be decoded."""
    stream = SimulatedStream(None, pattern=pattern)
    stream.play(10.5)
    stream.skip_policy.set_wanted_rate(0.5)
    stream.play(10)
    assert stream.play(20) == {DecodeLevel.KEYS: 600}

    stream.skip_policy.set_wanted_rate(None)
    before = len(stream.decoded)
    stream.play(5.5)
    assert stream.decoded[before] % 2 == 0  # of key pictures there is one every two seconds
    assert stream.skip_policy.level is DecodeLevel.ALL
    assert len(stream.decoded) - before == round(5.5 * 30) - 45

    stream.skip_policy.set_wanted_rate(25.0)
    assert stream.play(20)[DecodeLevel.KEYS] == 0
