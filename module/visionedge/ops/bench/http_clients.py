"""The HTTP clients of `bench http`, run as ``python -m visionedge.ops.bench.http_clients``.

They must use little processor time, because they run beside the module that is measured: one thread, open
connections, requests that are encoded once, and of a response only its status and its length are parsed. A
`ClientLoad` comes as a line of JSON on stdin. The process prints ``ready`` when all clients are connected,
starts at a line ``go``, and prints its `ClientResults` as JSON.
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
_LOOPBACK_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
"""About as long as a frame object."""


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """`rate` requests per second from `clients` connections together, taken in turn from `requests`.

    `requests` are complete request heads. A response that is missing `limit_s` after the last request counts
    as ``no answer``. With `loopback` the clients do the same work over socket pairs, without a server.
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
    """Latencies in ms from when each request was due, statuses with counts, and processor time."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"latencies_ms": self.latencies_ms, "statuses": dict(self.statuses), "cpu_s": self.cpu_s}


def parse_response(data: bytes) -> tuple[str, int] | None:
    """The status of a response and its length in bytes, head included; None while it is incomplete.

    Raises:
        ValueError: the response has no length.
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
        raise ValueError("a response without a length")
    length = int(head[at + len(_LENGTH) : head.index(b"\r\n", at + 2)])
    whole = end + len(_HEAD_END) + length
    return (status, whole) if len(data) >= whole else None


class LoadClient:
    """One connection with one request at a time: a later request waits, which counts as latency."""

    def __init__(self, connect: Callable[[], socket.socket], selector: selectors.BaseSelector) -> None:
        self._connect = connect
        self._selector = selector
        self._socket: socket.socket | None = None
        self._data = b""
        self.waiting: deque[tuple[float, bytes]] = deque()
        """(when it is due in s, the request); the first one has been sent."""

    def open(self) -> None:
        """Connect.

        Raises:
            OSError: the connection is refused.
        """
        self._socket = self._connect()
        self._selector.register(self._socket, selectors.EVENT_READ, self)
        self._data = b""

    def submit(self, due_s: float, request: bytes, results: ClientResults) -> None:
        """Send a request, or queue it behind the request that has been sent."""
        self.waiting.append((due_s, request))
        if len(self.waiting) == 1:
            self._send(results)

    def receive(self, results: ClientResults) -> None:
        """Read from the connection, and send the next request after a complete response."""
        assert self._socket is not None  # noqa: S101 - the selector has it
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
        """Close the connection."""
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
        """Close a failed connection; the next request opens another."""
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
    """The other end of a loopback client's socket pair: answers every request."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def receive(self, _results: ClientResults) -> None:
        """Read a request and answer it."""
        if self._socket.recv(_CHUNK_BYTES):
            self._socket.send(_LOOPBACK_RESPONSE)


class LoadClients:
    """All connected clients of a load."""

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
        """Send all requests on schedule, and wait for the responses."""
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
        """Close the connection."""
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
    """Read the load, connect, wait for `go`, run, and print the results."""
    clients = LoadClients(ClientLoad(**json.loads(sys.stdin.readline())))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline():
        json.dump(clients.run().document(), sys.stdout)
    clients.close()


if __name__ == "__main__":
    main()
