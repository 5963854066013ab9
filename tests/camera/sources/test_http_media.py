"""Files, playlists and pages over HTTP: what a camera's address may lead to, and where it may not."""

import re
import socket
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from camera_doubles import SPEC, FrameRecorder, running
from clips import make_clip, number_of, numbered_picture
from scripted_http import ScriptedServer, always, answer
from visionedge.camera.camera import Camera
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.runtime.redaction import redact

PAGE = answer(b"<html><form>name, password</form></html>", "text/html")


def moved(where: str) -> bytes:
    return answer(b"", "", status="302 Found", more=f"Location: {where}\r\n")


def why(server: ScriptedServer, limits: SourceLimits | None = None, *, login: str = "") -> str:
    with pytest.raises(SourceError) as caught:
        open_source(parse_camera_uri(server.url("/video.cgi", login)), limits)
    text = str(caught.value)
    assert redact(text) == text, "a remedy that is masked is none"
    return text


@pytest.mark.parametrize("library", ["auto", "opencv"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PAGE, r"the answer is text \(text/html\), not a picture or video \(a login page\?\)"),
        (answer(b'{"error": "login"}', "application/json"), r"the answer is text \(application/json\)"),
        (answer(b"<html>", ""), r"the answer is text \(no content type\)"),
        (answer(b"", "text/plain"), "empty answer"),
        (answer(b"", ""), "empty answer"),
        (answer(b"", "", status="503 Oops"), r"the server refuses the request \(503 Service Unavailable\)"),
        (moved("/video.cgi"), "redirect loop"),
        (moved("rtsp://127.0.0.1/x"), "points to an address of kind 'rtsp:'"),
        (moved("http://127.0.0.2:1/x"), r"points to another host, 127\.0\.0\.2; .* followRedirects: any"),
        (moved("http://[x/"), "redirects to an invalid address"),
        (moved("http://127.0.0.1:x/"), "redirects to an invalid address"),
        (b"HTTP/1.1 " + b"9" * 5000 + b"\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 \xb2\xb2\xb2\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc", "empty answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "empty answer"),
        (b"SSH-2.0-dropbear\r\n", "does not speak HTTP; check the port"),
        (b"RTSP/1.0 400 Bad Request\r\n\r\n", "speaks RTSP, not HTTP; use rtsp://"),
        (b"", "closed the connection without an answer"),
    ],
)
def test_an_answer_that_is_not_a_picture_is_reported(
    data: bytes, reason: str, library: DecoderLibrary
) -> None:
    with ScriptedServer(always(data)) as server:
        assert re.search(reason, why(server, SourceLimits(library=library)))


@pytest.mark.parametrize("library", ["auto", "opencv"])
def test_content_that_is_not_a_video_is_reported_for_any_suffix(library: DecoderLibrary) -> None:
    """FFmpeg takes anything behind `.cgi` for a video, and finds out only when it reads."""
    archive = answer(b"PK\3\4" + bytes(900), "application/octet-stream")
    limits = SourceLimits(library=library)
    with (
        ScriptedServer(always(archive)) as server,
        pytest.raises(SourceError) as caught,
        closing(open_source(parse_camera_uri(server.url("/a.cgi")), limits)) as source,
    ):
        source.read()
    assert "the answer cannot be decoded as video" in str(caught.value)


def test_a_redirect_on_the_same_host_is_followed_with_the_login(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", pictures=3).read_bytes()

    def serve(_server: ScriptedServer, connection: socket.socket, head: str) -> None:
        if "Authorization: Basic dXNlcjpwdw==" not in head:
            denied = 'WWW-Authenticate: Basic realm="x"\r\n'
            connection.sendall(answer(b"", "", status="401 Unauthorized", more=denied))
        elif "/old" in head:
            connection.sendall(moved("/new.mp4"))
        else:
            connection.sendall(ranged(clip, head))

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url("/old", "user:pw@")))
        assert source.read() is not None
        source.close()


def test_a_redirect_to_another_host_is_followed_only_if_allowed_and_without_the_login() -> None:
    def asks(_server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        denied = 'WWW-Authenticate: Basic realm="x"\r\n'
        connection.sendall(answer(b"", "", status="401 Unauthorized", more=denied))

    with (
        ScriptedServer(asks, host="127.0.0.2") as other,
        ScriptedServer(always(moved(other.url()))) as server,
    ):
        assert "points to another host" in why(server, login="user:pw@")
        assert other.requests == []
        assert "(401)" in why(server, SourceLimits(redirects="any"), login="user:pw@")
        assert len(other.requests) == 1
        assert "Authorization" not in other.requests[0]


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest/meta-data", "http://[fe80::1]/x"])
def test_a_link_local_address_is_never_contacted(target: str) -> None:
    """Nothing answers there on a machine without a cloud; what matters is that no picture is looked for."""
    with ScriptedServer(always(moved(target))) as server:
        assert "points to another host" in why(server)
        allowed = why(server, SourceLimits(redirects="any", open_timeout_s=0.5))
    assert "a link-local or loopback address, which is never followed" in allowed


def test_a_proxy_of_the_environment_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cameras are in the local network; a proxy is for what is not."""
    clip = make_clip(tmp_path / "c.mp4", pictures=3).read_bytes()

    def serve(_server: ScriptedServer, connection: socket.socket, head: str) -> None:
        connection.sendall(ranged(clip, head))

    with ScriptedServer(always(PAGE)) as proxy, ScriptedServer(serve) as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        for limits in (SourceLimits(), SourceLimits(library="opencv")):
            source = open_source(parse_camera_uri(server.url("/c.mp4")), limits)
            assert source.read() is not None
            source.close()
        assert proxy.requests == []


@pytest.mark.parametrize("seekable", [True, False])
def test_a_file_is_played_with_or_without_server_ranges(tmp_path: Path, seekable: bool) -> None:
    clip = make_clip(tmp_path / "c.mp4", pictures=20).read_bytes()

    def serve(_server: ScriptedServer, connection: socket.socket, head: str) -> None:
        connection.sendall(ranged(clip, head) if seekable else answer(clip, "video/mp4"))

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url("/c.mp4")))
        shown = []
        while (decoded := source.read()) is not None:
            shown.append(number_of(decoded.picture()))
        source.close()
    assert shown == [number % 24 for number in range(20)]


def ranged(data: bytes, head: str) -> bytes:
    """The answer of a server that knows ranges."""
    wanted = re.search(r"Range: bytes=(\d+)-", head)
    if wanted is None:
        return answer(data, "video/mp4", more="Accept-Ranges: bytes\r\n")
    start = int(wanted[1])
    span = f"Content-Range: bytes {start}-{len(data) - 1}/{len(data)}\r\n"
    return answer(data[start:], "video/mp4", status="206 Partial Content", more=span)


class LivePlaylist:
    """A live playlist: of `segments` of one second, each request names one more."""

    def __init__(self, folder: Path, base: str = "") -> None:
        self.base = base
        self.segments = _segments(folder)
        self.asked = 0

    def __call__(self, _server: ScriptedServer, connection: socket.socket, head: str) -> None:
        name = head.split()[1].rpartition("/")[2]
        if name.endswith(".ts"):
            connection.sendall(answer(self.segments[int(name[:-3])], "video/mp2t"))
            return
        self.asked += 1
        last = min(len(self.segments), 3 + self.asked)
        lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1", "#EXT-X-MEDIA-SEQUENCE:0"]
        for number in range(last):
            lines += ["#EXTINF:1.0,", f"{self.base}{number}.ts"]
        connection.sendall(answer("\n".join([*lines, ""]).encode(), "application/vnd.apple.mpegurl"))


def _segments(folder: Path) -> list[bytes]:
    av: Any = pytest.importorskip("av")
    options = {"hls_time": "1", "hls_list_size": "0"}
    with av.open(str(folder / "live.m3u8"), "w", format="hls", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.options = {"g": "25", "tune": "zerolatency"}
        for number in range(25 * 8):
            picture = av.VideoFrame.from_ndarray(numbered_picture(number), format="bgr24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return [(folder / f"live{number}.ts").read_bytes() for number in range(8)]


@pytest.mark.parametrize("library", ["auto", "opencv"])
def test_a_live_playlist_is_limited_by_its_own_time(tmp_path: Path, library: DecoderLibrary) -> None:
    """Its pictures come a segment at a time; five a second are five of each second, evenly."""
    basket = FrameRecorder()
    limits = SourceLimits(library=library)
    with ScriptedServer(LivePlaylist(tmp_path)) as server:
        camera = Camera("dock", server.url("/live.m3u8"), SPEC, basket, fps=5, limits=limits)
        with running(camera):
            frames = basket.wait_for(lambda f: len(f) >= 11, timeout_s=20)
    numbers = [number_of(frame.full_picture()) for frame in frames[:11]]
    # The second may come a little early, as with any rate that is not quite the camera's.
    assert {(later - number) % 24 for number, later in pairwise(numbers[1:])} == {5}


def test_a_playlist_that_points_to_another_host_is_not_followed_and_is_reported(tmp_path: Path) -> None:
    with ScriptedServer(LivePlaylist(tmp_path), host="127.0.0.2") as other:
        live = LivePlaylist(tmp_path, other.url("/"))
        with ScriptedServer(live) as server:
            with pytest.raises(SourceError, match=r"points to another host, 127\.0\.0\.2"):
                open_source(parse_camera_uri(server.url("/live.m3u8")))
            assert other.requests == []
            source = open_source(parse_camera_uri(server.url("/live.m3u8")), SourceLimits(redirects="any"))
            assert source.read() is not None
            source.close()


def test_a_playlist_without_new_segments_does_not_hang(tmp_path: Path) -> None:
    live = LivePlaylist(tmp_path)
    live.segments = live.segments[:3]
    began_s = time.monotonic()
    with ScriptedServer(live) as server:
        source = open_source(parse_camera_uri(server.url("/live.m3u8")), SourceLimits(read_timeout_s=1.0))
        source.interrupt()
        assert source.read() is None
        source.close()
    assert time.monotonic() - began_s < 10
