"""A still picture at an address: fetched again and again, as a camera that is live."""

import hashlib
import re
import socket
import ssl
import threading

import cv2
import numpy as np
import pytest
import trustme

from camera_doubles import SPEC, FrameRecorder, StatusRecorder, running
from clips import number_of, numbered_picture
from scripted_http import ScriptedServer, Serve, always, answer, in_turn
from visionedge.camera.camera import Camera
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.network import HttpLogin, parse_challenges
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError

REALM = r"cam, \"the\" one"
FAST = SourceLimits(pictures_per_s=200)


def jpeg(number: int) -> bytes:
    return cv2.imencode(".jpg", numbered_picture(number))[1].tobytes()


def png(number: int) -> bytes:
    return cv2.imencode(".png", numbered_picture(number))[1].tobytes()


def counting(
    kind: str = "image/jpeg", *, close: bool = True, length: bool = True, as_png: bool = False
) -> Serve:
    """Each request gets the next picture."""

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        number = (len(server.requests) - 1) % 24
        more = "Connection: close\r\n" if close else ""
        data = png(number) if as_png else jpeg(number)
        connection.sendall(answer(data, kind, length=length, more=more))
        if close:
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    return serve


CAMERAS: dict[str, tuple[str, Serve]] = {
    "jpeg": ("/snapshot.jpg", counting()),
    "no suffix": ("/ISAPI/Streaming/channels/101/picture", counting(close=False)),
    "cgi": ("/cgi-bin/snapshot.cgi?chn=0", counting(close=False)),
    "no length": ("/image", counting(length=False)),
    "png": ("/shot.png", counting("image/png", as_png=True)),
    "octet-stream": ("/shot", counting("application/octet-stream")),
    "a PNG that is called a JPEG": ("/shot.jpg", counting("image/jpeg", as_png=True)),
    "no type": ("/shot", counting("")),
    "text/plain": ("/shot", counting("text/plain")),
}


@pytest.mark.parametrize("library", ["auto", "opencv"])
@pytest.mark.parametrize("camera", CAMERAS)
def test_a_still_is_fetched_repeatedly(camera: str, library: DecoderLibrary) -> None:
    path, serve = CAMERAS[camera]
    with ScriptedServer(serve) as server:
        source = open_source(
            parse_camera_uri(server.url(path)), SourceLimits(library=library, pictures_per_s=200)
        )
        shown: list[int] = []
        while len(shown) < 5 and (decoded := source.read()) is not None:
            assert decoded.position_s is None
            shown.append(number_of(decoded.picture()))
        source.close()
    assert shown == [0, 1, 2, 3, 4]
    # The source is polled, so nothing is lost between two polls.
    assert not source.live


def test_a_still_picture_camera_is_live_in_one_epoch() -> None:
    basket, changes = FrameRecorder(), StatusRecorder()
    with ScriptedServer(counting()) as server:
        camera = Camera("dock", server.url("/a.jpg"), SPEC, basket, fps=50, on_change=changes)
        with running(camera, end_limit_s=1.0):
            frames = basket.wait_for(lambda f: len(f) >= 10)
            assert camera.status().state == "live"
    assert {frame.epoch for frame in frames} == {1}
    assert set(changes.states) <= {"live", "stopped"}


def test_an_unchanged_picture_is_neither_a_frame_nor_a_loss() -> None:
    unchanged = answer(b"", "", status="304 Not Modified", more='ETag: "b"\r\n')
    first = answer(jpeg(1), more='ETag: "a"\r\nLast-Modified: Sun, 29 Nov 2026 10:00:00 GMT\r\n')
    second = answer(jpeg(2), more='ETag: "b"\r\n')
    basket = FrameRecorder()
    with ScriptedServer(in_turn(first, unchanged, unchanged, second, unchanged)) as server:
        camera = Camera("dock", server.url("/a.jpg"), SPEC, basket, fps=200)
        with running(camera):
            requests = server.wait_requests(12)
            assert camera.status().state == "live"
            assert [number_of(frame.full_picture()) for frame in basket.frames] == [1, 2]
    assert "If-None-Match" not in requests[0]
    assert 'If-None-Match: "a"\r\nIf-Modified-Since: Sun, 29 Nov 2026 10:00:00 GMT\r\n' in requests[1]
    assert 'If-None-Match: "b"\r\n' in requests[5]


def test_two_failures_are_tolerated_and_the_third_is_reported() -> None:
    busy = answer(b"", "text/plain", status="503 Service Unavailable")
    good = answer(jpeg(3))
    with ScriptedServer(in_turn(good, busy, busy, good, busy)) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg")), FAST)
        for _ in range(2):
            decoded = source.read()
            assert decoded is not None
            assert number_of(decoded.picture()) == 3
        with pytest.raises(SourceError, match=r"the server refuses the request \(503 Service Unavailable"):
            source.read()
        source.close()
        assert len(server.requests) == 7


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        (answer(b"<html>log in</html>", "text/html"), "damaged picture"),
        (answer(jpeg(1)[:-900]), "damaged picture"),
        (answer(b""), "damaged picture"),
        (answer(png(1)[:-40], "image/png"), "damaged picture"),
    ],
)
def test_a_still_that_is_no_longer_a_picture_is_reported(later: bytes, reason: str) -> None:
    with ScriptedServer(in_turn(answer(jpeg(0)), later)) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg")), FAST)
        assert source.read() is not None
        with pytest.raises(SourceError, match=reason):
            source.read()
        source.close()


def test_a_still_that_is_too_large_is_refused() -> None:
    limits = SourceLimits(max_pixels=1000)
    with ScriptedServer(counting()) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg")), limits)
        with pytest.raises(
            SourceError, match=r": 160 x 120 pixels, more than the limit of 0\.001 megapixels"
        ):
            source.read()
        source.close()


def test_a_still_without_an_end_does_not_fill_the_memory() -> None:
    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n\x1a\n")
        while not server.ended.is_set():
            connection.sendall(bytes(1 << 20))

    with ScriptedServer(serve) as server, pytest.raises(SourceError, match="more than 24 MiB; reduce its"):
        open_source(parse_camera_uri(server.url("/a.png")))


def test_a_still_is_turned_upright_as_its_exif_data_says() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 60:] = 255
    plain = cv2.imencode(".jpg", picture)[1].tobytes()
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    turned = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    with ScriptedServer(always(answer(turned))) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg")))
        decoded = source.read()
        assert decoded is not None
        shown = decoded.picture()
        source.close()
    assert shown.shape == (80, 40, 3)
    assert (decoded.width_px, decoded.height_px) == (40, 80)
    assert shown[70].mean() > 250
    assert shown[10].mean() < 5


def test_an_interrupted_poll_ends_at_once() -> None:
    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        if len(server.requests) == 1:
            connection.sendall(answer(jpeg(0)))
        else:
            server.ended.wait()

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg")), FAST)
        assert source.read() is not None
        given: list[object] = ["nothing yet"]
        thread = threading.Thread(target=lambda: given.append(source.read()))
        thread.start()
        server.wait_requests(2)
        source.interrupt()
        thread.join(2)
        assert not thread.is_alive()
        source.close()
    assert given[1:] == [None]


def right(head: str, hashed: str) -> bool:
    """Whether a digest login is right, as RFC 7616 has it."""
    said = dict(re.findall(r'(\w+)="?([^",\r]*)"?', head.partition("Authorization: Digest")[2]))

    def digest(*words: str) -> str:
        return hashlib.new(hashed, ":".join(words).encode()).hexdigest()

    asked = head.split()[1]
    account = digest("user", REALM, "ge@heim")
    expected = digest(account, "n1", said.get("nc", ""), said.get("cnonce", ""), "auth", digest("GET", asked))
    return said.get("response") == expected


@pytest.mark.parametrize(
    ("asked", "hashed"),
    [
        (["MD5"], "md5"),
        (["SHA-256"], "sha256"),
        (["MD5", "SHA-256"], "sha256"),
        (["SHA-256", "MD5"], "sha256"),
    ],
)
def test_the_strongest_offered_digest_is_used(asked: list[str], hashed: str) -> None:
    """In headers of their own or together, in any order."""
    challenges = [f'Digest realm="{REALM}", nonce="n1", qop="auth", algorithm={name}' for name in asked]
    for more in (
        "".join(f"WWW-Authenticate: {text}\r\n" for text in challenges),
        f"WWW-Authenticate: {', '.join(challenges)}\r\n",
    ):
        denied = answer(b"", "", status="401 Unauthorized", more=more)

        def serve(server: ScriptedServer, connection: socket.socket, head: str, no: bytes = denied) -> None:
            connection.sendall(answer(jpeg(len(server.requests))) if right(head, hashed) else no)

        with ScriptedServer(serve) as server:
            target = server.url("/a.jpg?x=1", login="user:ge%40heim@")
            source = open_source(parse_camera_uri(target), FAST)
            for _ in range(3):
                assert source.read() is not None
            source.close()
            assert "Authorization" not in server.requests[0]
            # Nothing is asked for twice: the count of the nonce rises instead.
            assert len(server.requests) == 4
            assert "nc=00000003" in server.requests[3]


def test_a_login_is_sent_only_on_request() -> None:
    with ScriptedServer(counting()) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg", login="user:ge%40heim@")), FAST)
        assert source.read() is not None
        source.close()
        assert not any("Authorization" in head for head in server.requests)


def test_challenges_in_real_formats_are_read() -> None:
    found = parse_challenges(['Basic realm="a, Digest b", charset="UTF-8", NTLM', "digest nonce=x,realm=y"])
    assert [c.scheme for c in found] == ["basic", "ntlm", "digest"]
    assert found[0].parameters == {"realm": "a, Digest b", "charset": "UTF-8"}
    assert found[2].parameters == {"nonce": "x", "realm": "y"}


def test_a_password_for_tls_is_not_sent_as_basic_without_tls() -> None:
    login = HttpLogin("user", "ge@heim")
    assert not login.accept(parse_challenges(['Basic realm="x"']), basic=False)
    assert login.header("GET", "/") is None


def test_a_camera_with_a_certificate_of_its_own_is_read_over_https() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with ScriptedServer(counting(close=False), tls=context) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg", scheme="https")), FAST)
        shown = [number_of(decoded.picture()) for _ in range(3) if (decoded := source.read()) is not None]
        source.close()
    assert shown == [0, 1, 2]
