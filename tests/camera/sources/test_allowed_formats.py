"""A camera opens only the usual containers and codecs, with both decoders; a setting allows more."""

import socket
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camera_doubles import SPEC, FrameRecorder
from fake_rtsp_server import FakeRtspServer
from scripted_http import ScriptedServer, always, answer
from visionedge.camera.camera import RECONNECT_POLICY, Camera, CameraDependencies
from visionedge.camera.sources.allowed_formats import recognise_container
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.config.load import parse_config
from visionedge.errors import ConfigError, SourceError, UnsupportedFormatError

LIBRARIES: tuple[DecoderLibrary, ...] = ("pyav", "opencv")

# File, encoder, pixel format, container if not that of the suffix.
ALLOWED = [
    *((f"h264.{suffix}", "libx264", "yuv420p", None) for suffix in ("mp4", "mkv", "avi", "ts", "mov", "flv")),
    *((f"hevc.{suffix}", "libx265", "yuv420p", None) for suffix in ("mp4", "mkv", "ts")),
    *((f"mjpeg.{suffix}", "mjpeg", "yuvj420p", None) for suffix in ("avi", "mkv", "mov", "mjpeg")),
    *((f"av1.{suffix}", "libsvtav1", "yuv420p", None) for suffix in ("mp4", "mkv", "webm")),
    *((f"vp8.{suffix}", "libvpx", "yuv420p", None) for suffix in ("webm", "mkv")),
    *((f"vp9.{suffix}", "libvpx-vp9", "yuv420p", None) for suffix in ("webm", "mp4", "ivf")),
    *((f"mpeg2.{suffix}", "mpeg2video", "yuv420p", None) for suffix in ("ts", "mkv", "mp4", "avi", "vob")),
    *((f"mpeg4.{suffix}", "mpeg4", "yuv420p", None) for suffix in ("mp4", "avi", "mkv", "ts")),
    ("dv.avi", "dvvideo", "yuv420p", None),
    ("dv.mov", "dvvideo", "yuv420p", None),
    ("dv.dv", "dvvideo", "yuv420p", None),
    ("prores.mov", "prores_ks", "yuv422p10le", None),
    ("prores.mkv", "prores_ks", "yuv422p10le", None),
    ("raw.avi", "rawvideo", "yuyv422", None),
    ("raw.mkv", "rawvideo", "yuyv422", None),
    ("raw.mov", "rawvideo", "yuyv422", None),
    ("raw.y4m", "wrapped_avframe", "yuv420p", "yuv4mpegpipe"),
    ("bare.h264", "libx264", "yuv420p", None),
    ("bare.hevc", "libx265", "yuv420p", None),
    ("png.mp4", "png", "rgb24", None),
]
REFUSED_CODECS = [
    ("magicyuv.avi", "magicyuv", "yuv420p", "magicyuv"),
    *((f"ffv1.{suffix}", "ffv1", "yuv420p", "ffv1") for suffix in ("avi", "mkv", "mp4")),
    ("huffyuv.avi", "huffyuv", "yuv422p", "huffyuv"),
    ("utvideo.avi", "utvideo", "yuv420p", "utvideo"),
    ("cinepak.avi", "cinepak", "rgb24", "cinepak"),
    ("wmv.avi", "wmv2", "yuv420p", "wmv2"),
    ("snow.avi", "snow", "yuv420p", "snow"),
    ("jpeg2000.mp4", "jpeg2000", "yuv420p", "jpeg2000"),
    ("jpeg2000.avi", "jpeg2000", "yuv420p", "jpeg2000"),
    ("mpeg1.mp4", "mpeg1video", "yuv420p", "mpeg1video"),
    ("mpeg1.mkv", "mpeg1video", "yuv420p", "mpeg1video"),
    ("zmbv.avi", "zmbv", "bgr0", "zmbv"),
    ("dnxhd.mov", "dnxhd", "yuv422p", "dnxhd"),
    ("flv1.flv", "flv", "yuv420p", "flv1"),
    ("screen.flv", "flashsv", "bgr24", "flashsv"),
    ("svq1.mov", "svq1", "yuv410p", "svq1"),
]
REFUSED_CONTAINERS = [
    ("a.gif", "gif", "rgb8", "gif"),
    ("h264.nut", "libx264", "yuv420p", "nut"),
    ("h264.asf", "libx264", "yuv420p", "asf"),
    ("h264.mxf", "libx264", "yuv420p", "mxf"),
    ("a.apng", "apng", "rgb24", "apng"),
]

_RATES = {"mpeg1video": 25, "mpeg2video": 25, "dvvideo": 25, "dnxhd": 25}
_SIZES = {"dvvideo": (720, 576), "dnxhd": (1920, 1080)}


def _write(
    path: Path, codec: str, pix_fmt: str, container: str | None = None, *, sound: bool = False
) -> Path:
    av: Any = pytest.importorskip("av")
    width_px, height_px = _SIZES.get(codec, (176, 144))
    rate = _RATES.get(codec, 25 if path.suffix == ".mxf" else 10)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, pix_fmt
        preset = "12" if codec == "libsvtav1" else "ultrafast"
        stream.codec_context.options = {"strict": "experimental", "preset": preset}
        if codec == "dnxhd":
            stream.bit_rate = 120_000_000
        voice = file.add_stream("aac", rate=48_000) if sound else None
        for number in range(12):
            picture = np.full((height_px, width_px, 3), 20 + 9 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(format=pix_fmt)
            file.mux(stream.encode(frame))
            if voice is not None:
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                tone.sample_rate, tone.pts = 48_000, number * 1024
                file.mux(voice.encode(tone))
        file.mux(stream.encode())
        if voice is not None:
            file.mux(voice.encode())
    return path


def _first_picture(path: Path, limits: SourceLimits) -> float:
    """Open a file, and return the mean of its first picture."""
    return _first_picture_of(str(path), limits)


def _first_picture_of(address: str, limits: SourceLimits) -> float:
    source = open_source(parse_camera_uri(address), limits)
    try:
        decoded = source.read()
        assert decoded is not None
        return float(decoded.picture().mean())
    finally:
        source.close()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", ALLOWED, ids=lambda case: case[0])
def test_the_usual_codecs_and_containers_are_opened(
    tmp_path: Path, library: DecoderLibrary, case: tuple[str, str, str, str | None]
) -> None:
    name, codec, pix_fmt, container = case
    clip = _write(tmp_path / name, codec, pix_fmt, container)
    if codec == "dvvideo" and library == "opencv":  # allowed, but DV is interlaced
        with pytest.raises(SourceError, match="OpenCV cannot convert"):
            _first_picture(clip, SourceLimits(library=library))
        return
    assert _first_picture(clip, SourceLimits(library=library)) == pytest.approx(20, abs=4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", REFUSED_CODECS, ids=lambda case: case[0])
def test_another_codec_is_refused_by_its_name_and_allowed_by_the_setting(
    tmp_path: Path, library: DecoderLibrary, case: tuple[str, str, str, str]
) -> None:
    name, codec, pix_fmt, refused = case
    clip = _write(tmp_path / name, codec, pix_fmt)
    with pytest.raises(UnsupportedFormatError) as error:
        _first_picture(clip, SourceLimits(library=library))
    assert str(error.value) == (
        f"{clip}: the codec {refused} is not allowed; "
        f"add it to the camera's extraCodecs, or use H.264 or H.265"
    )
    _first_picture(clip, SourceLimits(library=library, extra_codecs=(refused,)))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", REFUSED_CONTAINERS, ids=lambda case: case[0])
def test_another_container_is_refused_by_its_name_and_allowed_by_the_setting(
    tmp_path: Path, library: DecoderLibrary, case: tuple[str, str, str, str]
) -> None:
    name, codec, pix_fmt, refused = case
    clip = _write(tmp_path / name, codec, pix_fmt)
    with pytest.raises(UnsupportedFormatError) as error:
        _first_picture(clip, SourceLimits(library=library))
    assert str(error.value) == (
        f"{clip}: the container {refused} is not allowed; "
        f"add it to the camera's extraContainers, or convert it"
    )
    more = SourceLimits(library=library, extra_containers=(refused,), extra_codecs=(codec,))
    _first_picture(clip, more)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_sound_is_skipped_and_not_refused(tmp_path: Path, library: DecoderLibrary, suffix: str) -> None:
    clip = _write(tmp_path / f"sound.{suffix}", "libx264", "yuv420p", sound=True)
    assert _first_picture(clip, SourceLimits(library=library)) == pytest.approx(20, abs=4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_file_with_sound_of_an_allowed_and_video_of_another_codec_is_refused(
    tmp_path: Path, library: DecoderLibrary
) -> None:
    clip = _write(tmp_path / "sound.mkv", "ffv1", "yuv420p", sound=True)
    with pytest.raises(UnsupportedFormatError, match="the codec ffv1 is not allowed"):
        _first_picture(clip, SourceLimits(library=library))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("tag", [b"H264", b"XVID", b"MJPG", b"avc1", b"\x1b\0\0\0", b"\0\0\0\0"])
def test_a_codec_cannot_hide_behind_the_tag_of_another(
    tmp_path: Path, library: DecoderLibrary, tag: bytes
) -> None:
    """The decoder that opens, if one does, belongs to the tag, and cannot decode the data."""
    clip = _write(tmp_path / "m.avi", "magicyuv", "yuv420p")
    clip.write_bytes(clip.read_bytes().replace(b"MAGY", tag).replace(b"magy", tag))
    with pytest.raises(SourceError):
        _first_picture(clip, SourceLimits(library=library))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_codec_cannot_hide_behind_the_description_of_an_mp4(
    tmp_path: Path, library: DecoderLibrary
) -> None:
    """The tag is mp4v, MPEG-4's own; another field of the file names JPEG 2000."""
    clip = _write(tmp_path / "j.mp4", "jpeg2000", "yuv420p")
    assert b"mp4v" in clip.read_bytes()
    with pytest.raises(UnsupportedFormatError, match="the codec jpeg2000 is not allowed"):
        _first_picture(clip, SourceLimits(library=library))


def _references(target: Path) -> dict[str, str]:
    return {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{target}\n#EXT-X-ENDLIST\n",
        "concat.txt": f"ffconcat version 1.0\nfile {target}\n",
        "concat.mkv": f"ffconcat version 1.0\nfile '{target}'\n",
        "stream.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        f'<AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>{target}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
        "imf.xml": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
    }


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", list(_references(Path("x"))))
def test_a_file_that_names_others_opens_none_of_them(
    tmp_path: Path, library: DecoderLibrary, name: str
) -> None:
    target = _write(tmp_path / "target.ts", "libx264", "yuv420p")
    (tmp_path / name).write_text(_references(target)[name])
    with pytest.raises(SourceError):
        _first_picture(tmp_path / name, SourceLimits(library=library))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["concat:target.ts", "%03d.mp4", "subfile,,start,0,end,0,,:target.ts", "-"])
def test_the_name_of_a_file_is_not_an_instruction(
    tmp_path: Path, library: DecoderLibrary, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "target.ts", "libx264", "yuv420p")
    _write(tmp_path / "001.mp4", "libx264", "yuv420p")
    with pytest.raises(SourceError):
        _first_picture(tmp_path / name, SourceLimits(library=library))
    _write(tmp_path / "clip.mp4", "libx264", "yuv420p").rename(tmp_path / name)
    if not name.startswith("%"):  # FFmpeg takes a picture's name with a number as a series
        assert _first_picture(tmp_path / name, SourceLimits(library=library)) == pytest.approx(20, abs=4)


def test_data_without_a_container_are_not_recognised() -> None:
    assert recognise_container(b"") is None
    assert recognise_container(bytes(4096)) is None
    assert recognise_container(struct.pack(">64I", *range(64))) is None


def test_the_settings_are_names_of_a_camera_or_of_all() -> None:
    config = parse_config({"cameraDefaults": {"extraCodecs": ["ffv1"]}, "cameras": {"a": {"uri": "demo:"}}})
    assert config.cameras["a"].extra_codecs == ("ffv1",)
    for wrong in ("FFV1", "ffv1,gif", "", "a|b;c"):
        with pytest.raises(ConfigError, match="extraContainers"):
            parse_config({"cameras": {"a": {"uri": "demo:", "extraContainers": [wrong]}}})


def test_a_refused_camera_has_the_reason_and_is_seldom_tried_again(tmp_path: Path) -> None:
    clip = _write(tmp_path / "m.avi", "magicyuv", "yuv420p")
    waits: list[float] = []

    def wait(stop: threading.Event, wait_s: float) -> bool:
        waits.append(wait_s)
        if len(waits) == 3:
            stop.set()
        return stop.is_set()

    camera = Camera("m", str(clip), SPEC, FrameRecorder(), dependencies=CameraDependencies(wait=wait))
    camera.run()
    status = camera.status()
    assert waits == [RECONNECT_POLICY.max_wait_s] * 3
    assert status.last_error is not None
    assert "the codec magicyuv is not allowed" in status.last_error


# --- over the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_codec_of_an_rtsp_camera_is_refused_too(library: DecoderLibrary) -> None:
    with FakeRtspServer("h263p") as server:
        uri = parse_camera_uri(server.uri())
        with pytest.raises(UnsupportedFormatError, match="the codec h263 is not allowed"):
            open_source(uri, SourceLimits(library=library))
        source = open_source(uri, SourceLimits(library=library, extra_codecs=("h263",)))
        assert source.read() is not None
        source.close()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "case",
    [
        ("m.avi", "magicyuv", "yuv420p", "the codec magicyuv is not allowed"),
        ("f.mkv", "ffv1", "yuv420p", "the codec ffv1 is not allowed"),
        ("a.gif", "gif", "rgb8", "the container gif is not allowed"),
    ],
    ids=lambda case: case[0],
)
def test_a_file_over_http_is_refused_too(
    tmp_path: Path, library: DecoderLibrary, case: tuple[str, str, str, str]
) -> None:
    name, codec, pix_fmt, refused = case
    data = _write(tmp_path / name, codec, pix_fmt).read_bytes()
    with (
        ScriptedServer(always(answer(data, "video/mp4"))) as server,
        pytest.raises(UnsupportedFormatError, match=refused),
    ):
        open_source(parse_camera_uri(server.url("/x.mp4")), SourceLimits(library=library))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_playlist_with_sound_and_subtitles_of_their_own_plays(
    tmp_path: Path, library: DecoderLibrary
) -> None:
    files = {
        "/video.ts": _write(tmp_path / "v.ts", "libx264", "yuv420p").read_bytes(),
        "/sound.aac": _write_sound(tmp_path / "s.aac").read_bytes(),
        "/words.vtt": b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n",
        "/video.m3u8": _segment_list("video.ts"),
        "/sound.m3u8": _segment_list("sound.aac"),
        "/words.m3u8": _segment_list("words.vtt"),
        "/all.m3u8": b"#EXTM3U\n"
        b'#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="a",DEFAULT=YES,AUTOSELECT=YES,URI="sound.m3u8"\n'
        b'#EXT-X-MEDIA:TYPE=SUBTITLES,GROUP-ID="s",NAME="s",DEFAULT=YES,AUTOSELECT=YES,URI="words.m3u8"\n'
        b'#EXT-X-STREAM-INF:BANDWIDTH=100000,AUDIO="a",SUBTITLES="s"\nvideo.m3u8\n',
    }

    def serve(_server: ScriptedServer, connection: socket.socket, head: str) -> None:
        name = head.split()[1]
        kind = "application/vnd.apple.mpegurl" if name.endswith("m3u8") else "application/octet-stream"
        connection.sendall(answer(files[name], kind))

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url("/all.m3u8")), SourceLimits(library=library))
        decoded = source.read()
        assert decoded is not None
        assert float(decoded.picture().mean()) == pytest.approx(20, abs=4)
        source.close()


def _segment_list(name: str) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{name}\n#EXT-X-ENDLIST\n".encode()


def _write_sound(path: Path) -> Path:
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        voice = file.add_stream("aac", rate=48_000)
        for number in range(56):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            tone.sample_rate, tone.pts = 48_000, number * 1024
            file.mux(voice.encode(tone))
        file.mux(voice.encode())
    return path


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_playlist_over_http_opens_no_local_file(tmp_path: Path, library: DecoderLibrary) -> None:
    target = _write(tmp_path / "v.ts", "libx264", "yuv420p")
    for named in (f"file://{target}", str(target), f"concat:{target}", f"crypto+file://{target}"):
        playlist = answer(_segment_list(named), "application/vnd.apple.mpegurl")
        with ScriptedServer(always(playlist)) as server, pytest.raises(SourceError):
            _first_picture_of(server.url("/x.m3u8"), SourceLimits(library=library, open_timeout_s=2))
