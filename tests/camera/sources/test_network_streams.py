"""Cameras over the network, against real servers on loopback: RTSP, MJPEG and files over HTTP."""

import asyncio
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import pytest
from aiohttp import web

from camera_doubles import SPEC, FrameRecorder, StatusRecorder, running
from clips import make_clip, number_of, numbered_picture
from rtsp_server import RtspServer, free_port
from fake_rtsp_server import DIGEST_CHALLENGE, digest_is_valid
from visionedge.camera.camera import Camera, CameraDependencies
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.frames.types import Frame

LOGIN = "user:ge%40heim@"
AUTHORIZATION = "Basic " + b64encode(b"user:ge@heim").decode()

SOON = CameraDependencies(wait=lambda event, timeout_s: event.wait(min(timeout_s, 0.2)))
"""Tries again soon, so that a test need not wait for the back-off (its own tests do)."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a looping clip of 25 pictures per second."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "cam.mp4", pictures=50, fps=25)
    return folder


class HttpCameraServer:
    """An HTTP camera in a thread: MJPEG at `/stream`, `/locked` and `/digest` (a login), and `/files/…`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.silent = threading.Event()
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mjpeg", daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application()
        app.router.add_get("/stream", self._stream)
        app.router.add_get("/locked", self._locked)
        app.router.add_get("/digest", self._digest)
        app.router.add_static("/files", self._folder)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _locked(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != AUTHORIZATION:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="cam"'})
        return await self._stream(request)

    async def _digest(self, request: web.Request) -> web.StreamResponse:
        """Only those who answer the question of the server as RFC 2617 says get in."""
        shown = request.headers.get("Authorization", "")
        if not digest_is_valid("GET", shown, "user", "ge@heim"):
            return web.Response(status=401, headers={"WWW-Authenticate": DIGEST_CHALLENGE})
        return await self._stream(request)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "multipart/x-mixed-replace; boundary=frame"})
        await response.prepare(request)
        with suppress(ConnectionResetError):  # the viewer has gone
            await self._write_pictures(response)
        return response

    async def _write_pictures(self, response: web.StreamResponse) -> None:
        number = 0
        while not self._stop.is_set():
            if not self.silent.is_set():
                jpeg = cv2.imencode(".jpg", numbered_picture(number))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                await response.write(head.encode() + jpeg + b"\r\n")
                number += 1
            await asyncio.sleep(0.04)


@contextmanager
def serving(folder: Path, port: int | None = None) -> Iterator[HttpCameraServer]:
    server = HttpCameraServer(folder, port or free_port())
    server.start()
    try:
        yield server
    finally:
        server.close()


def has_epoch(frames: list[Frame], camera: str, epoch: int) -> bool:
    return any(f.camera == camera and f.epoch == epoch for f in frames)


def count(frames: list[Frame], camera: str) -> int:
    return sum(f.camera == camera for f in frames)


def test_after_a_killed_server_a_camera_returns_with_the_next_epoch_and_others_never_pause(clips: Path) -> None:
    """Two RTSP cameras and a file at once; the server of one is killed and started again."""
    basket, changes = FrameRecorder(), StatusRecorder()
    with RtspServer(clips) as dock, RtspServer(clips) as yard:
        long_file = make_clip(clips / "long.mp4", pictures=600, fps=25)
        cameras = [
            Camera("dock", dock.uri("cam.mp4"), SPEC, basket, on_change=changes, dependencies=SOON),
            Camera("yard", yard.uri("cam.mp4"), SPEC, basket),
            Camera("file", str(long_file), SPEC, basket),
        ]
        with running(cameras[0]), running(cameras[1]), running(cameras[2]):
            basket.wait_for(lambda f: all(has_epoch(f, c.name, 1) for c in cameras))
            dock.kill()
            changes.wait_for("reconnecting")
            before = len(basket.frames)
            # Still down, and the others bring picture after picture.
            basket.wait_for(lambda f: min(count(f[before:], c) for c in ("yard", "file")) > 10)
            assert cameras[0].status().state == "reconnecting"
            dock.start()
            frames = basket.wait_for(lambda f: has_epoch(f, "dock", 2))
    assert changes.states[:3] == ["live", "reconnecting", "live"]
    assert {f.epoch for f in frames if f.camera != "dock"} == {1}
    for name in ("dock", "yard", "file"):
        numbers = [f.sequence for f in frames if f.camera == name]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_halted_server_is_lost_within_the_read_limit_and_stop_is_prompt(clips: Path) -> None:
    basket, changes = FrameRecorder(), StatusRecorder()
    limits = SourceLimits(open_timeout_s=1.0, read_timeout_s=1.0)
    with RtspServer(clips) as server:
        camera = Camera(
            "dock",
            server.uri("cam.mp4", LOGIN),
            SPEC,
            basket,
            on_change=changes,
            limits=limits,
            dependencies=SOON,
        )
        with running(camera, end_limit_s=0.7):
            basket.wait_for(lambda f: len(f) > 20)
            server.halt()
            lost = changes.wait_for("reconnecting")
            # Next it hangs in opening, as the halted server still accepts connections.
        server.resume()
    assert lost.last_error is not None
    assert "no picture for 1 s" in lost.last_error
    assert "heim" not in repr(changes.statuses)
    assert camera.status().state == "stopped"


def test_an_rtsp_stream_with_b_pictures_gives_its_last_pictures_and_is_opened_again(clips: Path) -> None:
    """The pictures that the decoder still holds at the end of the stream come before the loss."""
    make_clip(clips / "b.mp4", pictures=30, fps=25, options={"bf": "2", "g": "10"})
    basket, changes = FrameRecorder(), StatusRecorder()
    with RtspServer(clips) as server:
        uri = server.uri("b.mp4").replace("play_count=0", "play_count=1")
        camera = Camera("dock", uri, SPEC, basket, on_change=changes, dependencies=SOON)
        with running(camera):
            assert changes.wait_for("reconnecting").last_error is not None
            basket.wait_for(lambda f: has_epoch(f, "dock", 2))
    assert "ZeroDivisionError" not in repr(changes.statuses)
    first = [f for f in basket.frames if f.epoch == 1]
    assert number_of(first[-1].full_picture()) == 29 % 24


def test_a_missing_rtsp_path_is_reported(clips: Path) -> None:
    with RtspServer(clips) as server, pytest.raises(SourceError, match=r"none\.mp4.*: not found .*404"):
        open_source(parse_camera_uri(server.uri("none.mp4")))


@pytest.mark.parametrize("path", ["locked", "digest"])
def test_an_mjpeg_camera_with_a_login_is_live(tmp_path: Path, path: str) -> None:
    basket = FrameRecorder()
    with serving(tmp_path) as server:
        camera = Camera("dock", f"http://{LOGIN}127.0.0.1:{server.port}/{path}", SPEC, basket)
        with running(camera):
            frames = basket.wait_for(lambda f: len(f) > 10)
            assert camera.status().state == "live"
    shown = [number_of(f.full_picture()) for f in frames[:10]]
    assert shown == [(shown[0] + n) % 24 for n in range(10)]


def test_a_silent_or_closed_mjpeg_camera_is_lost_and_returns(tmp_path: Path) -> None:
    basket, changes = FrameRecorder(), StatusRecorder()
    limits = SourceLimits(silence_s=0.6)
    port = free_port()
    with serving(tmp_path, port) as server:
        uri = f"http://127.0.0.1:{port}/stream"
        camera = Camera("dock", uri, SPEC, basket, on_change=changes, limits=limits, dependencies=SOON)
        with running(camera):
            basket.wait_for(lambda f: count(f, "dock") > 4)  # only a rate that is known makes silence a loss
            server.silent.set()
            assert "no picture for 0.6 s" in (changes.wait_for("reconnecting").last_error or "")
            server.silent.clear()
            basket.wait_for(lambda f: has_epoch(f, "dock", 2))
            server.close()
            with serving(tmp_path, port):
                basket.wait_for(lambda f: has_epoch(f, "dock", 3))


def test_a_file_over_http_is_played_to_its_end(tmp_path: Path) -> None:
    changes, basket = StatusRecorder(), FrameRecorder()
    make_clip(tmp_path / "c.mp4", pictures=6, fps=25)
    with serving(tmp_path) as server:
        uri = f"http://127.0.0.1:{server.port}/files/c.mp4"
        with running(Camera("dock", uri, SPEC, basket, on_change=changes)):
            changes.wait_for("ended")
    assert [number_of(f.full_picture()) for f in basket.frames] == list(range(6))


@pytest.mark.parametrize(
    ("path", "login", "reason"),
    [
        ("locked", "", r"login required \(401\); write USER:PASSWORD@ before 127\.0\.0\.1"),
        ("locked", "user:wrong@", r"login refused \(401\); check user name and password"),
        ("nothing", "", r"not found on the server \(404\)"),
        ("files/notes.txt", "", r"the answer is text \(text/plain\), not a picture or video"),
    ],
)
def test_the_reason_of_an_http_refusal_is_reported(tmp_path: Path, path: str, login: str, reason: str) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    with serving(tmp_path) as server, pytest.raises(SourceError, match=reason) as caught:
        open_source(parse_camera_uri(f"http://{login}127.0.0.1:{server.port}/{path}"))
    assert "wrong" not in str(caught.value)


def test_a_closed_port_and_an_unknown_host_are_distinguished() -> None:
    with pytest.raises(SourceError, match=r"connection refused by .* \(camera off, or another port\?\)"):
        open_source(parse_camera_uri(f"rtsp://127.0.0.1:{free_port()}/x"))
    with pytest.raises(SourceError, match=r"unknown host name no-such-host\.invalid"):
        open_source(parse_camera_uri("http://no-such-host.invalid/x"))


def test_a_server_that_never_answers_takes_at_most_the_open_limit(clips: Path) -> None:
    with RtspServer(clips) as server:
        server.halt()
        began_s = time.monotonic()
        with pytest.raises(SourceError, match=r"no picture within 0\.5 s"):
            open_source(parse_camera_uri(server.uri("cam.mp4")), SourceLimits(open_timeout_s=0.5))
        assert time.monotonic() - began_s < 2
        server.resume()
