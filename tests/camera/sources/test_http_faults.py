"""What an HTTP camera does wrong while it opens or plays, and files at an address, read in any order."""

import re
import socket
from itertools import count

import cv2
import numpy as np
import pytest

from clips import number_of, numbered_picture
from scripted_http import ScriptedServer, Serve, always, answer
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.http_camera import HttpFile, HttpFileOpener
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError

PICTURES = [cv2.imencode(".jpg", numbered_picture(number))[1].tobytes() for number in range(24)]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
JPEG_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n"


def part(picture: bytes) -> bytes:
    """One part of a stream."""
    return b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + picture + b"\r\n"


def damaged(picture: bytes) -> bytes:
    """A picture whose lower half is missing."""
    return picture[: len(picture) // 2] + b"\xff\xd9"


def stream(*first: bytes) -> Serve:
    """A stream that begins with these pictures and goes on with whole ones."""

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(HEAD + b"".join(map(part, first)))
        for number in count(5):
            if server.ended.wait(0.02):
                return
            connection.sendall(part(PICTURES[number % 24]))

    return serve


def then_silent(data: bytes) -> Serve:
    """These bytes, and nothing more on a connection that stays open."""

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(data)
        server.ended.wait(20)

    return serve


@pytest.mark.parametrize("first", [damaged(PICTURES[0]), b"\xff\xd8no header\xff\xd9"])
def test_a_stream_that_begins_with_a_damaged_picture_gives_the_next_one(first: bytes) -> None:
    with ScriptedServer(stream(first)) as server:
        source = open_source(parse_camera_uri(server.url()))
        decoded = source.read()
        assert decoded is not None
        assert number_of(decoded.picture()) == 5
        assert source.live
        source.close()


def test_a_stream_without_a_picture_says_so_at_its_end() -> None:
    with ScriptedServer(always(HEAD + b"--frame\r\nContent-Type: text/plain\r\n\r\nno camera\r\n")) as server:
        source = open_source(parse_camera_uri(server.url()))
        with pytest.raises(SourceError, match="no JPEG"):
            source.read()
        source.close()


def test_a_stream_of_text_without_end_says_that_it_has_no_picture() -> None:
    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(HEAD)
        while not server.ended.wait(0.01):
            connection.sendall(b"--frame\r\nContent-Type: text/plain\r\n\r\nbusy\r\n")

    limits = SourceLimits(silence_s=0.2, first_picture_s=0.2, picture_timeout_s=0.2)
    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url()), limits)
        with pytest.raises(SourceError, match="no JPEG"):
            source.read()
        source.close()


def test_a_first_picture_that_does_not_end_is_a_timeout() -> None:
    limits = SourceLimits(open_timeout_s=0.5)
    with ScriptedServer(then_silent(JPEG_HEAD + PICTURES[0][:-200])) as server:
        uri = parse_camera_uri(server.url("/a.jpg"))
        with pytest.raises(SourceError, match=r"within 0\.5 s"):
            open_source(uri, limits)


def test_one_picture_on_a_connection_that_stays_open_is_a_slow_stream() -> None:
    with ScriptedServer(then_silent(JPEG_HEAD + PICTURES[7])) as server:
        source = open_source(parse_camera_uri(server.url("/a.jpg")))
        decoded = source.read()
        assert decoded is not None
        assert number_of(decoded.picture()) == 7
        assert source.live
        source.close()


def test_bytes_before_the_first_part_hide_no_stream() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: video/x-motion-jpeg\r\n\r\n" + bytes(600)
    with ScriptedServer(then_silent(head + PICTURES[1] + PICTURES[2])) as server:
        source = open_source(parse_camera_uri(server.url()))
        decoded = source.read()
        assert decoded is not None
        assert number_of(decoded.picture()) == 1
        source.close()


# --- files that FFmpeg reads at an address ------------------------------------------------------------------

CONTENT = np.random.default_rng(3).bytes(200_000)


def content(*, ranges: bool, length: bool = True) -> Serve:
    """A file on a server with or without support of ranges."""

    def serve(_server: ScriptedServer, connection: socket.socket, head: str) -> None:
        asked = re.search(r"range: bytes=(\d+)-", head, re.IGNORECASE)
        at = int(asked[1]) if asked and ranges else 0
        status = "206 Partial Content" if at else "200 OK"
        connection.sendall(answer(CONTENT[at:], "video/mp4", status=status, length=length))
        socket.socket.shutdown(connection, socket.SHUT_RDWR)

    return serve


def read_all(file: HttpFile, size: int) -> bytes:
    """So many bytes, however few each `read` returns."""
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_gives_the_same_bytes_in_whatever_order_it_is_read(ranges: bool) -> None:
    opener_limits, random = SourceLimits(), np.random.default_rng(4)
    with ScriptedServer(content(ranges=ranges)) as server:
        opener = HttpFileOpener(server.url("/clip.mp4"), opener_limits, hides_name=True)
        file = opener.open(opener.name, 0, {})
        assert file.seekable()
        assert file.seek(0, 2) == len(CONTENT)
        assert file.read(10) == b""
        for _ in range(12):
            at, size = int(random.integers(len(CONTENT))), int(random.integers(1, 5000))
            assert file.seek(at) == at
            assert read_all(file, size) == CONTENT[at : at + size]
            assert file.tell() == min(at + size, len(CONTENT))
        at = file.tell()
        assert file.seek(-at, 1) == 0
        assert read_all(file, len(CONTENT)) == CONTENT
        opener.close()


def test_a_step_within_the_bytes_that_came_asks_for_nothing() -> None:
    with ScriptedServer(content(ranges=True)) as server:
        opener = HttpFileOpener(server.url("/clip.mp4"), SourceLimits(), hides_name=True)
        file = opener.open(opener.name, 0, {})
        assert file.read(1) == CONTENT[:1]
        file.seek(3, 1)
        assert file.read(1) == CONTENT[4:5]
        assert len(server.requests) == 1
        opener.close()


def test_a_file_without_a_length_has_no_end_to_go_to() -> None:
    with ScriptedServer(content(ranges=False, length=False)) as server:
        opener = HttpFileOpener(server.url("/clip.ts"), SourceLimits(), hides_name=True)
        file = opener.open(opener.name, 0, {})
        assert not file.seekable()
        with pytest.raises(OSError, match="length"):
            file.seek(0, 2)
        assert read_all(file, len(CONTENT) + 1) == CONTENT
        opener.close()


def test_a_file_that_the_server_refuses_is_remembered_with_its_reason() -> None:
    """FFmpeg skips a segment that it cannot open and does not report it."""
    with ScriptedServer(always(answer(b"", "text/plain", status="403 Forbidden"))) as server:
        opener = HttpFileOpener(server.url("/clip.ts"), SourceLimits(), hides_name=True)
        with pytest.raises(SourceError, match="403 Forbidden"):
            opener.open(opener.name, 0, {})
        assert "403 Forbidden" in str(opener.error)
        opener.close()


def test_a_file_that_stops_in_the_middle_is_a_silent_camera() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 1000\r\n\r\n"
    with ScriptedServer(then_silent(head + bytes(10))) as server:
        opener = HttpFileOpener(server.url("/clip.mp4"), SourceLimits(read_timeout_s=0.3), hides_name=True)
        file = opener.open(opener.name, 0, {})
        assert read_all(file, 10) == bytes(10)
        with pytest.raises(SourceError, match=r"0\.3 s"):
            file.read(10)
        opener.close()
