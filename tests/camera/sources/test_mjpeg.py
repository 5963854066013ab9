"""MJPEG over HTTP with the faults of real cameras: every browser shows them, and so do we."""

import socket
import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camera_doubles import SPEC, FrameRecorder, StatusRecorder, running
from clips import number_of, numbered_picture
from scripted_http import ScriptedServer, Serve
from visionedge.camera.camera import Camera
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.images import JpegScanner
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError

PICTURES = [cv2.imencode(".jpg", numbered_picture(number))[1].tobytes() for number in range(24)]
MIX = "multipart/x-mixed-replace; boundary="


def part(
    number: int,
    *,
    boundary: str = "--frame",
    end: str = "\r\n",
    kind: str = "image/jpeg",
    length: int | None = 0,
    data: Callable[[bytes], bytes] = lambda jpeg: jpeg,
) -> bytes:
    """One part; `length` is by how much its length is wrong, None leaves it out."""
    jpeg = data(PICTURES[number % 24])
    head = f"{boundary}{end}Content-Type: {kind}{end}"
    head += "" if length is None else f"Content-Length: {max(0, len(jpeg) + length)}{end}"
    return f"{head}{end}".encode() + jpeg + end.encode()


def stream(
    make: Callable[[int], bytes],
    content_type: str = MIX + "frame",
    *,
    first: bytes = b"",
    status: str = "HTTP/1.1 200 OK",
    more: str = "",
    chunked: bool = False,
) -> Serve:
    """Parts without end, 100 per second."""

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        head = f"{status}\r\n" + (f"Content-Type: {content_type}\r\n" if content_type else "") + more
        head += "Transfer-Encoding: chunked\r\n" if chunked else ""
        connection.sendall(f"{head}\r\n".encode() + first)
        number = 0
        while not server.ended.wait(0.01):
            data = make(number)
            for torn in (data[:7], data[7 : len(data) // 2], data[len(data) // 2 :]):
                connection.sendall(b"%x\r\n%b\r\n" % (len(torn), torn) if chunked else torn)
            number += 1

    return serve


def beat(number: int) -> bytes:
    """Two pictures, then a part of text to keep the connection alive."""
    return (
        part(number) if number % 3 else b"--frame\r\nContent-Type: text/plain\r\n\r\nbeat\r\n" + part(number)
    )


def with_thumbnail(jpeg: bytes) -> bytes:
    """With a whole JPEG within its EXIF data, as most cameras that are photo cameras send it."""
    exif = b"Exif\0\0" + PICTURES[23]
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


QUIRKS: dict[str, Serve] = {
    "as it should be": stream(part),
    "no lengths": stream(lambda n: part(n, length=None)),
    "dashes in the header": stream(part, MIX + "--frame"),
    "no dashes in the body": stream(lambda n: part(n, boundary="frame")),
    "no boundary before the first": stream(lambda n: part(n).split(b"\r\n", 1)[1] + b"--frame\r\n"),
    "no boundary at all": stream(lambda n: part(n).split(b"\r\n", 1)[1]),
    "the boundary twice": stream(lambda n: b"--frame\r\n" + part(n)),
    "another boundary": stream(lambda n: part(n, boundary="--ipcamera")),
    "no boundary in the header": stream(part, "multipart/x-mixed-replace"),
    "a preamble": stream(part, first=b"\r\nThis is a multi-part message\r\n\r\n"),
    "bare line feeds": stream(lambda n: part(n, end="\n", length=None)),
    "a length too small": stream(lambda n: part(n, length=-200)),
    "a length too large": stream(lambda n: part(n, length=200)),
    "a length of 2 GB": stream(lambda n: part(n, length=2_000_000_000)),
    "image/jpg": stream(lambda n: part(n, kind="image/jpg")),
    "octet-stream": stream(lambda n: part(n, kind="application/octet-stream")),
    "heartbeats": stream(beat),
    "chunks": stream(part, chunked=True),
    "ICY": stream(part, status="ICY 200 OK"),
    "HTTP/1.0": stream(part, status="HTTP/1.0 200"),
    "no type": stream(part, ""),
    "text/html": stream(part, "text/html"),
    "a length of the whole": stream(part, more="Content-Length: 0\r\n"),
    "bare pictures": stream(lambda n: PICTURES[n % 24], "image/jpeg"),
    "x-motion-jpeg": stream(lambda n: PICTURES[n % 24], "video/x-motion-jpeg"),
    "without end markers": stream(lambda n: part(n, data=lambda jpeg: jpeg[:-2], length=None)),
    "a thumbnail in each": stream(lambda n: part(n, data=with_thumbnail)),
    "filled up with zeros": stream(lambda n: part(n, data=lambda jpeg: jpeg + bytes(512))),
}


@pytest.mark.parametrize("library", ["auto", "opencv"])
@pytest.mark.parametrize("quirk", QUIRKS)
def test_small_protocol_errors_are_tolerated(quirk: str, library: DecoderLibrary) -> None:
    """Each picture comes once, in order and as it was sent, over one connection."""
    with ScriptedServer(QUIRKS[quirk]) as server:
        source = open_source(parse_camera_uri(server.url()), SourceLimits(library=library))
        shown: list[tuple[int, int]] = []
        while len(shown) < 8 and (decoded := source.read()) is not None:
            shown.append((number_of(decoded.picture()), decoded.source_frames))
        source.close()
        assert source.live
        assert len(server.requests) == 1
    numbers = [number for number, _ in shown]
    assert numbers == [(numbers[0] + n) % 24 for n in range(8)]
    assert {source_frames for _, source_frames in shown} == {1}


def test_only_a_damaged_picture_is_skipped() -> None:
    """Cut off in the middle, it would be half grey."""

    def cut(number: int) -> bytes:
        size = 0 if number % 4 else len(PICTURES[0]) // 2
        return part(number, data=lambda jpeg: jpeg[:-size] if size else jpeg, length=None)

    basket = FrameRecorder()
    with ScriptedServer(stream(cut)) as server, running(Camera("dock", server.url(), SPEC, basket)):
        frames = basket.wait_for(lambda f: len(f) >= 9)
    assert [number_of(f.full_picture()) for f in frames[:9]] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert {frame.epoch for frame in frames} == {1}


def test_an_endless_part_does_not_fill_the_memory() -> None:
    """256 MB that call themselves one picture: bounded to a small part of that, and said."""
    limits = SourceLimits(picture_timeout_s=0.5, first_picture_s=0.5)

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: " + MIX.encode() + b"frame\r\n\r\n--frame\r\n")
        connection.sendall(b"Content-Length: 2000000000\r\n\r\n" + PICTURES[0][:-2])
        block = bytes(1 << 20)
        while not server.ended.is_set():
            connection.sendall(block)

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url()), limits)
        tracemalloc.start()
        try:
            with pytest.raises(SourceError, match="no JPEG picture in the stream"):
                source.read()
            assert tracemalloc.get_traced_memory()[1] < 100 << 20
        finally:
            tracemalloc.stop()
            source.close()


def test_a_slow_camera_is_not_silent() -> None:
    """Its distance between pictures is four times the limit for silence, and it is never lost."""
    limits = SourceLimits(silence_s=0.1, first_picture_s=5.0)

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: " + MIX.encode() + b"frame\r\n\r\n")
        for number in range(24):
            if server.ended.wait(0.4):
                return
            connection.sendall(part(number))

    with ScriptedServer(serve) as server:
        source = open_source(parse_camera_uri(server.url()), limits)
        shown = [number_of(decoded.picture()) for _ in range(4) if (decoded := source.read()) is not None]
        source.close()
    assert shown == [0, 1, 2, 3]


def test_a_stream_that_the_camera_closes_is_lost_and_opened_again() -> None:
    def serve(_server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: " + MIX.encode() + b"frame\r\n\r\n")
        connection.sendall(b"".join(part(number) for number in range(5)))
        socket.socket.shutdown(connection, socket.SHUT_RDWR)

    basket, changes = FrameRecorder(), StatusRecorder()
    with (
        ScriptedServer(serve) as server,
        running(Camera("dock", server.url(), SPEC, basket, on_change=changes)),
    ):
        lost = changes.wait_for("reconnecting")
        basket.wait_for(lambda f: f[-1].epoch == 2 if f else False)
    assert (lost.last_error or "").endswith("closed the connection")


def test_pictures_that_are_too_old_are_skipped_and_counted() -> None:
    """The newest picture, not the oldest that lies in a buffer."""
    with ScriptedServer(stream(part)) as server:
        source = open_source(parse_camera_uri(server.url()), SourceLimits(late_s=0.0))
        first = source.read()
        assert first is not None
        number = number_of(first.picture())
        server.ended.wait(0.2)  # time for some to come
        later = source.read()
        assert later is not None
        assert later.source_frames > 1
        assert (number_of(later.picture()) - number) % 24 == later.source_frames % 24
        source.close()


@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.data())
def test_pictures_are_found_for_any_chunk_boundaries(numbers: list[int], data: st.DataObject) -> None:
    """In any pieces and with anything between them that is no picture itself."""
    junk = st.binary(max_size=40).map(lambda text: text.replace(b"\xff", b""))
    text = b"".join(data.draw(junk) + PICTURES[number] for number in numbers)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    scanner, found = JpegScanner(1 << 20), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        scanner.feed(text[begin:end])
        while (picture := scanner.take()) is not None:
            found.append(picture)
    assert found == [PICTURES[number] for number in numbers]


@given(st.binary(max_size=3000), st.integers(1, 500))
def test_random_bytes_do_not_break_the_scanner(noise: bytes, step: int) -> None:
    """For any bytes it keeps to its bound, and finds the picture after them or takes it for their rest."""
    scanner = JpegScanner(4096)
    for at in range(0, len(noise), step):
        scanner.feed(noise[at : at + step])
        while scanner.take() is not None:
            pass
    scanner.feed(bytes(70_000) + PICTURES[0])
    scanner.take()
    assert scanner.buffered_bytes <= 80_000 + len(PICTURES[0])


def test_a_grey_picture_is_not_damaged() -> None:
    """What stands in for missing parts is a grey that pictures may have, too."""
    grey = cv2.imencode(".jpg", np.full((64, 64, 3), 128, np.uint8))[1].tobytes()
    with ScriptedServer(stream(lambda n: part(n, data=lambda _jpeg: grey))) as server:
        source = open_source(parse_camera_uri(server.url()))
        decoded = source.read()
        assert decoded is not None
        assert int(decoded.picture()[32, 32, 0]) == 128
        source.close()
