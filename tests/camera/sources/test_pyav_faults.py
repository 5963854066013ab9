"""PyAV: damaged pictures, a stream that falls behind, and the reason why one is lost."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from clips import make_clip, number_of
from scripted_http import ScriptedServer, answer
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import DamagedPictureError, SourceError

pytest.importorskip("av", reason="PyAV is not installed")

import av

from visionedge.camera.sources import pyav
from visionedge.camera.sources.pyav import PyavSource


class Clock:
    """A clock that a test moves; it can run by itself by `step_s` with each look."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


class Container:
    """A clip whose packets come without waiting, as from a full queue; an error may end it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._container, self._clock = av.open(str(path)), clock
        self.video = self._container.streams.video[0]
        self.duration = self._container.duration
        self.error: Exception | None = None
        self.packets = 5

    def demux(self, stream: Any) -> Iterator[Any]:
        for number, packet in enumerate(self._container.demux(stream)):
            if self.error is not None and number == self.packets:
                raise self.error
            if self.error is None:
                self._clock.now_s -= self._clock.step_s
            yield packet

    def close(self) -> None:
        self._container.close()


def live(path: Path, clock: Clock, limits: SourceLimits, error: Exception | None = None) -> PyavSource:
    """A clip as if a camera sent it now; it may fail after five pictures."""
    container = Container(path, clock)
    container.error = error
    return PyavSource(cast("Any", container), container.video, "dock", live=True, limits=limits, clock=clock)


def number(source: PyavSource) -> int:
    """The number that the next picture shows."""
    decoded = source.read()
    assert decoded is not None
    return number_of(decoded.picture())


# --- damaged pictures ---------------------------------------------------------------------------------------


def damage(path: Path, *numbers: int) -> Path:
    """Overwrite some pictures of an MJPEG clip."""
    data = bytearray(path.read_bytes())
    starts = [found.start() for found in re.finditer(rb"\xff\xd8\xff", bytes(data))]
    for each in numbers:
        size = starts[each + 1] - starts[each] - 8  # of a chunk, without the head of the next one
        data[starts[each] : starts[each] + size] = bytes(size)
    path.write_bytes(data)
    return path


def opened(path: Path) -> PyavSource:
    """A clip as it is played from a file."""
    source = open_source(parse_camera_uri(str(path)))
    assert isinstance(source, PyavSource)
    return source


def test_a_clip_whose_first_picture_is_damaged_begins_with_the_second(tmp_path: Path) -> None:
    path = damage(make_clip(tmp_path / "a.avi", codec="mjpeg"), 0)
    source = opened(path)
    assert number(source) == 1
    source.close()


def test_a_damaged_picture_in_a_clip_is_an_error_of_this_picture_alone(tmp_path: Path) -> None:
    path = damage(make_clip(tmp_path / "a.avi", codec="mjpeg"), 1)
    source = opened(path)
    assert number(source) == 0
    decoded = source.read()
    assert decoded is not None
    with pytest.raises(DamagedPictureError, match="cannot be decoded"):
        decoded.picture()
    assert number(source) == 2
    source.close()


# --- a stream that is late ----------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """20 s with ten pictures a second, each tenth a key picture."""
    return make_clip(tmp_path / "a.mp4", pictures=200, options={"g": "10", "bf": "0"})


def test_a_stream_that_fell_behind_goes_on_with_a_key_picture_of_now(clip: Path) -> None:
    """The pictures between count as skipped, so none is missing in the sum."""
    clock = Clock()
    source = live(clip, clock, SourceLimits(late_s=1))
    covered, numbers = 0, []
    for _ in range(8):
        decoded = source.read()
        assert decoded is not None
        covered += decoded.source_frames
        numbers.append(number_of(decoded.picture()))
        clock.now_s += 0.1
    assert numbers == list(range(8))
    clock.now_s += 3
    decoded = source.read()
    assert decoded is not None
    covered += decoded.source_frames
    assert number_of(decoded.picture()) == 40 % 24
    assert covered == 41
    source.close()


def test_a_stream_that_never_catches_up_gives_late_pictures_all_the_same(clip: Path) -> None:
    """The decoder is too slow for the camera: to skip for ever would be worse."""
    clock = Clock()
    source = live(clip, clock, SourceLimits(late_s=1))
    covered = [1]
    assert source.read() is not None
    clock.step_s = 0.1  # a packet takes several looks, so more time than lies between two pictures
    while (decoded := source.read()) is not None and covered[-1] < 150:
        covered.append(covered[-1] + decoded.source_frames)
    resumed = [later - 1 for earlier, later in pairwise(covered) if later - earlier > 1]
    assert resumed
    assert [index % 10 for index in resumed] == [0] * len(resumed)
    source.close()


# --- the reason of a loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (av.error.ConnectionResetError(104, "Connection reset by peer"), "the camera closed the connection"),
        (av.error.OSError(5, "Input/output error"), "the camera closed the connection"),
        (
            av.error.InvalidDataError(1094995529, "Invalid data", "rtsp://user:secret@cam/"),
            "reading failed: Invalid data",
        ),
    ],
)
def test_the_reason_of_a_loss_is_reported_without_the_address(
    clip: Path, error: Exception, reason: str
) -> None:
    source = live(clip, Clock(), SourceLimits(), error)
    for _ in range(5):
        assert source.read() is not None
    with pytest.raises(SourceError, match=re.escape(f"dock: {reason}")) as raised:
        source.read()
    assert "secret" not in str(raised.value)
    source.close()


def test_a_camera_that_sent_nothing_for_the_time_limit_is_silent(clip: Path) -> None:
    clock = Clock()
    source = live(clip, clock, SourceLimits(read_timeout_s=3), av.error.OSError(5, "Input/output error"))
    for _ in range(5):
        assert source.read() is not None
    clock.step_s = 3.0
    with pytest.raises(SourceError, match="dock: no picture for 3 s"):
        source.read()
    source.close()


def test_a_transport_stream_at_an_address_is_played_to_its_end(tmp_path: Path) -> None:
    """It does not state how many pictures it has; its length in seconds tells whether it ended early."""
    data = make_clip(tmp_path / "a.ts", pictures=40).read_bytes()

    def serve(_server: ScriptedServer, connection: Any, head: str) -> None:
        asked = re.search(r"range: bytes=(\d+)-", head, re.IGNORECASE)
        at = int(asked[1]) if asked else 0
        connection.sendall(answer(data[at:], "video/mp2t", status="206 Partial Content" if at else "200 OK"))

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url("/a.ts")))
        seen = 0
        while (decoded := source.read()) is not None:
            seen += decoded.source_frames
        assert seen == 40
        source.close()


# --- the decoder of a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def _fresh() -> Iterator[None]:
    pyav.find_hardware_decoder.cache_clear()
    yield
    pyav.find_hardware_decoder.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_a_gpu_whose_decoder_cannot_be_used_leaves_decoding_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FFmpeg knows CUDA wherever it was built with it."""

    def create(_codec: object) -> None:
        raise av.error.PermissionError(1, "Operation not permitted")

    refusing = SimpleNamespace(create=create)
    monkeypatch.setattr(pyav, "hwdevices_available", lambda: ["cuda"])
    monkeypatch.setattr(pyav, "HWAccel", lambda *_, **__: refusing)
    assert pyav.find_hardware_decoder() is None


@pytest.mark.usefixtures("_fresh")
def test_an_ffmpeg_without_cuda_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav, "hwdevices_available", lambda: ["vaapi"])
    assert pyav.find_hardware_decoder() is None
