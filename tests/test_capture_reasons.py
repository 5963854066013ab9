"""Asking a server why a camera did not open: the password is sent to nobody who did not ask for it."""

import base64
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from visionedge.capture.reasons import why_not_open

LOGIN = base64.b64encode(b"admin:hunter2x").decode()
BASIC, DIGEST = 'WWW-Authenticate: Basic realm="cam"', 'WWW-Authenticate: Digest realm="cam", nonce="5eed"'


class Scripted:
    """A server that gives an answer of its script to each connection, and keeps what was sent to it."""

    def __init__(self, answers: Sequence[str]) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received: list[str] = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                self.received.append(connection.recv(65536).decode("latin-1"))
                connection.sendall(answer.encode())

    @contextmanager
    def running(self) -> Iterator["Scripted"]:
        """It, until the block ends; connections that were not made are made up for."""
        self._thread.start()
        try:
            yield self
        finally:
            while self._thread.is_alive():
                with socket.create_connection(("127.0.0.1", self.port)) as connection:
                    connection.sendall(b"end")
                self._thread.join(0.2)
            self._listener.close()


def answer(status: str, *headers: str, protocol: str = "HTTP/1.1") -> str:
    """The head of an answer."""
    return "\r\n".join([f"{protocol} {status}", "CSeq: 1", *headers, "Content-Length: 0", "", ""])


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
@pytest.mark.parametrize(
    ("first", "words"),
    [
        (("404 Not Found",), "not found on the server (404)"),
        (("401 Unauthorized",), "did not open with the login given (401)"),
        (("401 Unauthorized", DIGEST), "did not open with the login given (401)"),
        (("401 Unauthorized", DIGEST, BASIC), "did not open with the login given (401)"),
        (("401 Unauthorized", BASIC, DIGEST), "did not open with the login given (401)"),
        (("403 Forbidden", BASIC), "refused by the server (403 Forbidden)"),
        (("200 OK", BASIC), "nothing that can be decoded"),
    ],
)
def test_a_server_that_asks_for_no_basic_login_gets_none(
    scheme: str, first: tuple[str, ...], words: str
) -> None:
    """Whatever it answers, and in whatever order it offers its challenges."""
    protocol = "RTSP/1.0" if scheme == "rtsp" else "HTTP/1.1"
    with Scripted([answer(*first, protocol=protocol)]).running() as server:
        told = why_not_open(f"{scheme}://admin:hunter2x@127.0.0.1:{server.port}/cam", 0, 4)
        sent = list(server.received)
    assert words in told
    assert len(sent) == 1
    assert "Authorization" not in sent[0]
    assert LOGIN not in sent[0]


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
@pytest.mark.parametrize(
    ("second", "words"),
    [("401 Unauthorized", "does not accept the user name"), ("404 Not Found", "not found on the server")],
)
def test_a_basic_challenge_is_answered_once(scheme: str, second: str, words: str) -> None:
    """Only so a wrong password can be told from a wrong path."""
    protocol = "RTSP/1.0" if scheme == "rtsp" else "HTTP/1.1"
    script = [answer("401 Unauthorized", BASIC, protocol=protocol), answer(second, BASIC, protocol=protocol)]
    with Scripted(script).running() as server:
        told = why_not_open(f"{scheme}://admin:hunter2x@127.0.0.1:{server.port}/cam", 0, 4)
        sent = list(server.received)
    assert words in told
    assert [LOGIN in request for request in sent] == [False, True]


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_a_login_for_tls_is_never_sent_in_clear(scheme: str) -> None:
    """Also where the port turns out to speak without TLS, and asks for the login."""
    with Scripted([answer("401 Unauthorized", BASIC)] * 2).running() as server:
        why_not_open(f"{scheme}://admin:hunter2x@127.0.0.1:{server.port}/cam", 0, 4)
        sent = "".join(server.received)
    assert LOGIN not in sent
    assert "hunter2x" not in sent
    assert "Authorization" not in sent
