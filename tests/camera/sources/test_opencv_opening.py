"""With OpenCV a stream that hangs in opening must not keep the others from it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from camera_doubles import SPEC, FrameRecorder, StatusRecorder, running
from clips import make_clip
from rtsp_server import RtspServer
from visionedge.camera.camera import Camera
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.opencv import PriorityLock, answers_http


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """The address (HOST:PORT) of a server that answers so; None: it accepts and says nothing."""
    over = threading.Event()
    held: list[socket.socket] = []

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            if answer is not None:
                connection.recv(4096)
                connection.sendall(answer)
            held.append(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()
            for connection in held:
                connection.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_accepts_and_sends_nothing_counts_as_unresponsive(scheme: str) -> None:
    with listening(None) as address:
        assert not answers_http(f"{scheme}://u:p@{address}/x?y=1", 0.2)


@pytest.mark.parametrize(
    "reply",
    [
        b"?",
        b"RTSP/1.0 400 Bad Request\r\nCSeq: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nServer",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n",
    ],
)
def test_a_server_that_hangs_later_or_does_not_use_http_counts_as_unresponsive(reply: bytes) -> None:
    with listening(reply) as address:
        assert not answers_http(f"http://{address}/x", 0.2)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\n\r\n--f",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_server_that_refuses_over_http_counts_as_responsive(reply: bytes) -> None:
    with listening(reply) as address:
        assert answers_http(f"http://{address}/x", 5)


def test_a_server_that_disconnects_or_is_absent_counts_as_unresponsive() -> None:
    with listening(b"") as address:
        pass
    assert not answers_http(f"http://{address}/x", 0.2)


def test_the_lowest_rank_opens_first_and_equal_ranks_in_order() -> None:
    turns, order, inside, leave = PriorityLock(), [], threading.Event(), threading.Event()

    def first() -> None:
        with turns.hold(0):
            inside.set()
            assert leave.wait(5)

    def later(rank: float, name: str) -> None:
        with turns.hold(rank):
            order.append(name)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(5)
    for rank, name in ((20.0, "slow"), (4.0, "a"), (4.0, "b"), (20.0, "slower")):
        threads.append(threading.Thread(target=later, args=(rank, name)))
        threads[-1].start()
        while f"waiting={len(threads) - 1}" not in repr(turns):
            pass
    leave.set()
    for thread in threads:
        thread.join(5)
    assert order == ["a", "b", "slow", "slower"]


def test_a_turn_ends_with_an_error_too() -> None:
    turns = PriorityLock()
    with pytest.raises(ValueError, match="within"), turns.hold(0):
        raise ValueError("within")
    with turns.hold(0):
        assert "taken=True" in repr(turns)
    assert "taken=False" in repr(turns)


def test_a_good_camera_opens_beside_many_unresponsive_ones(tmp_path: Path) -> None:
    """They are given no chance to hold OpenCV's lock: it is live before the first of them is given up."""
    make_clip(tmp_path / "cam.mp4", pictures=50, fps=25)
    limits = SourceLimits(library="opencv", open_timeout_s=30)
    basket, changes = FrameRecorder(), StatusRecorder()
    with ExitStack() as stack:
        for number in range(4):
            uri = f"rtsp://{stack.enter_context(listening(None))}/x"
            dead = Camera(f"dead{number}", uri, SPEC, basket, limits=limits, on_change=changes)
            stack.enter_context(running(dead))
        server = stack.enter_context(RtspServer(tmp_path))
        good = Camera("good", server.uri("cam.mp4"), SPEC, basket, limits=limits)
        stack.enter_context(running(good))
        basket.wait_for(lambda f: len(f) > 3, 20)
        assert changes.states == []
