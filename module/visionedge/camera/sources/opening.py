"""Opening network streams with OpenCV, which opens one at a time in the whole process.

While one VideoCapture opens, all others wait, in every thread. So a server must have answered before its
stream is opened (`rtsp_redirects` asks RTSP servers), streams that took long before come last, and the time
inside is bounded.
"""

import heapq
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import SplitResult, urlsplit

from visionedge.camera.sources.connecting import PORTS

_HEAD_MOST_BYTES = 65_536


class Turns:
    """Lets one in at a time: the lowest rank first, and among equals the one that has waited longest."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []
        self._tickets = itertools.count()
        self._taken = False

    def __repr__(self) -> str:
        return f"<Turns taken={self._taken} waiting={len(self._waiting)}>"

    @contextmanager
    def turn(self, rank: float) -> Iterator[None]:
        """Wait for the turn, and keep it while the body runs."""
        with self._changed:
            mine = (rank, next(self._tickets))
            heapq.heappush(self._waiting, mine)
            self._changed.wait_for(lambda: not self._taken and self._waiting[0] == mine)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


def answers(target: str, limit_s: float) -> bool:
    """Whether a server gives a whole answer when it is asked for this HTTP address.

    No login is sent: an answer that asks for one is an answer. What HTTP promises has to begin as well.

    Args:
        target: the URI, with its secrets.
        limit_s: for the connection, and again for the answer.
    """
    parts = urlsplit(target)
    scheme = parts.scheme.lower()
    try:
        address = (parts.hostname or "", parts.port or PORTS[scheme])
        with socket.create_connection(address, limit_s) as plain:
            if scheme == "http":
                return _asked(plain, parts, limit_s)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False  # as the decoder: cameras sign their own certificates
            context.verify_mode = ssl.CERT_NONE
            with context.wrap_socket(plain, server_hostname=parts.hostname) as secure:
                return _asked(secure, parts, limit_s)
    except (OSError, ValueError):
        return False


def _asked(connection: socket.socket, parts: SplitResult, limit_s: float) -> bool:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    if any("\r" in line or "\n" in line for line in lines):
        return False
    connection.sendall("\r\n".join([*lines, "User-Agent: visionedge", "", ""]).encode("latin-1", "replace"))
    end_s = time.monotonic() + limit_s
    answer = b""
    while not _is_whole(answer):
        connection.settimeout(max(0.001, end_s - time.monotonic()))
        chunk = connection.recv(4096)
        if not chunk:
            return answer != b""
        answer += chunk
    return True


def _is_whole(answer: bytes) -> bool:
    """Whether an answer has come as far as it says that there is something, or refuses."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if len(head) > _HEAD_MOST_BYTES:
        return True
    promises = head.startswith(b"HTTP/") and head.split()[1:2] == [b"200"]
    return bool(end) and (not promises or body != b"")
