"""Clients of a load over HTTP, in a process of their own: ``python -m visionedge.ops.bench.http_clients``.

They shall cost little, so that what is measured is the server: one thread, sockets that stay open, requests
that were written once, and no more of an answer is read than its status and its length. The order comes as a
line of JSON on stdin; ``ready`` goes out when all have connected, and a line ``go`` begins it.
"""

import json
import resource
import selectors
import socket
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_CONNECT_S = 5.0
_CHUNK_BYTES = 1 << 16
_HEAD_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_LOOPBACK_RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
)  # as long as many a frame


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """Whom to ask, and how often: `rate` requests per second in all, taken in turn from `requests`.

    `requests` are the whole heads, as they go out. What is not answered `limit_s` after the end is given up.
    With `nobody` the clients do all the same work, but ask themselves.
    """

    host: str
    port: int
    tls: bool
    clients: int
    rate: float
    seconds: float
    requests: tuple[str, ...]
    limit_s: float = 10.0
    loopback: bool = False


@dataclass(slots=True)
class ClientResults:
    """What came of it: latencies in ms from when each request was due, statuses, and processor time used."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"latencies_ms": self.latencies_ms, "statuses": dict(self.statuses), "cpu_s": self.cpu_s}


def parse_response(data: bytes) -> tuple[str, int] | None:
    """The status of an answer and its length in bytes with its head; None while it is not all there.

    Raises:
        ValueError: it does not say how long it is.
    """
    end = data.find(_HEAD_END)
    if end < 0:
        return None
    head = data[:end].lower() + b"\r\n"
    status = head[9:12].decode("ascii", "replace")
    at = head.find(_LENGTH)
    if at < 0:
        if status in ("204", "304"):
            return status, end + len(_HEAD_END)
        raise ValueError("an answer without a length")
    length = int(head[at + len(_LENGTH) : head.index(b"\r\n", at + 2)])
    whole = end + len(_HEAD_END) + length
    return (status, whole) if len(data) >= whole else None


class LoadClient:
    """One connection. A request that is due while another is under way waits, and is late for it."""

    def __init__(self, connect: Callable[[], socket.socket], selector: selectors.BaseSelector) -> None:
        self._connect = connect
        self._selector = selector
        self._socket: socket.socket | None = None
        self._data = b""
        self.waiting: deque[tuple[float, bytes]] = deque()
        """(when it is due in s, the request); the first one is under way."""

    def open(self) -> None:
        """Connect.

        Raises:
            OSError: nobody listens there.
        """
        self._socket = self._connect()
        self._selector.register(self._socket, selectors.EVENT_READ, self)
        self._data = b""

    def submit(self, due_s: float, request: bytes, results: ClientResults) -> None:
        """Send a request, or let it wait for its turn."""
        self.waiting.append((due_s, request))
        if len(self.waiting) == 1:
            self._send(results)

    def receive(self, results: ClientResults) -> None:
        """Read what has come, and send what waits."""
        assert self._socket is not None  # noqa: S101 - the selector knows it
        try:
            chunk = self._socket.recv(_CHUNK_BYTES)
            if not chunk:
                self._connection_lost("closed", results)
                return
            self._data += chunk
            response = parse_response(self._data)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (OSError, ValueError) as error:
            self._connection_lost(type(error).__name__, results)
            return
        if response is None or not self.waiting:
            return
        self._data = self._data[response[1] :]
        self._record_result(response[0], results)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _send(self, results: ClientResults) -> None:
        try:
            if self._socket is None:
                self.open()
            assert self._socket is not None  # noqa: S101 - it was opened
            self._socket.send(self.waiting[0][1])
        except OSError as error:
            self._connection_lost(type(error).__name__, results)

    def _connection_lost(self, why: str, results: ClientResults) -> None:
        """The connection is lost; the next request opens another."""
        self.close()
        if self.waiting:
            self._record_result(why, results)

    def _record_result(self, status: str, results: ClientResults) -> None:
        due_s, _ = self.waiting.popleft()
        results.statuses[status] += 1
        results.latencies_ms.append((time.monotonic() - due_s) * 1000)
        if self.waiting:
            self._send(results)


class LoopbackPeer:
    """The other end of a connection of clients that ask themselves: answers whatever comes."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def receive(self, _results: ClientResults) -> None:
        """Answer at once."""
        if self._socket.recv(_CHUNK_BYTES):
            self._socket.send(_LOOPBACK_RESPONSE)


class LoadClients:
    """All of them, connected."""

    def __init__(self, load: ClientLoad) -> None:
        self._load = load
        self._requests = [request.encode() for request in load.requests]
        self._selector = selectors.DefaultSelector()
        self._loopback_sockets: list[socket.socket] = []
        connect = self._connect_loopback if load.loopback else lambda: _open_socket(load)
        self._clients = [LoadClient(connect, self._selector) for _ in range(load.clients)]
        for client in self._clients:
            client.open()

    def run(self) -> ClientResults:
        """Ask on schedule until all was answered."""
        load, results = self._load, ClientResults()
        used_s, began_s = _cpu_s(), time.monotonic()
        due = [began_s + number / load.rate for number in range(round(load.rate * load.seconds))]
        number, until_s = 0, began_s + load.seconds + load.limit_s
        while number < len(due) or self._count_waiting():
            now_s = time.monotonic()
            if now_s > until_s:
                results.statuses["no answer"] += self._count_waiting() + len(due) - number
                break
            while number < len(due) and due[number] <= now_s:
                client = self._clients[number % len(self._clients)]
                client.submit(due[number], self._requests[number % len(self._requests)], results)
                number += 1
            next_s = due[number] if number < len(due) else until_s
            for key, _ in self._selector.select(max(0.0, next_s - time.monotonic())):
                key.data.receive(results)
        results.cpu_s = _cpu_s() - used_s
        return results

    def close(self) -> None:
        """Hang up."""
        for client in self._clients:
            client.close()
        for other in self._loopback_sockets:
            other.close()
        self._selector.close()

    def _connect_loopback(self) -> socket.socket:
        ours, other = socket.socketpair()
        for end in (ours, other):
            end.setblocking(False)
        self._loopback_sockets.append(other)
        self._selector.register(other, selectors.EVENT_READ, LoopbackPeer(other))
        return ours

    def _count_waiting(self) -> int:
        return sum(len(client.waiting) for client in self._clients)


def _open_socket(load: ClientLoad) -> socket.socket:
    sock = socket.create_connection((load.host, load.port), _CONNECT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if load.tls:
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname=load.host)
    sock.setblocking(False)
    return sock


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Take the order, connect, wait for the word, ask, tell."""
    clients = LoadClients(ClientLoad(**json.loads(sys.stdin.readline())))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline():
        json.dump(clients.run().document(), sys.stdout)
    clients.close()


if __name__ == "__main__":
    main()
