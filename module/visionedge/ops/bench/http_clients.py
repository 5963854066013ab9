"""The HTTP clients of `bench http`, run as ``python -m visionedge.ops.bench.http_clients``.

Each client keeps one connection open and sends its requests at fixed times: a request that is due while an
earlier one is unanswered waits, and its waiting counts as latency. A `ClientLoad` comes as a line of JSON on
stdin. The process prints ``ready`` when all clients are connected, starts at a line ``go``, and prints its
`ClientResults` as JSON.
"""

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_CONNECT_S = 5.0
_CHUNK_BYTES = 1 << 16
_HEAD_END = b"\r\n\r\n"
_LOOPBACK_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
"""About as long as a frame object."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


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


class LoadClients:
    """All clients of a load."""

    def __init__(self, load: ClientLoad) -> None:
        self._load = load
        self._requests = [request.encode() for request in load.requests]
        self._context = ssl.create_default_context() if load.tls else None
        self._connections: list[Connection | None] = []
        self._peers: list[socket.socket] = []

    async def connect(self) -> None:
        """Open all connections.

        Raises:
            OSError: the connection is refused.
        """
        self._connections = [await self._open() for _ in range(self._load.clients)]

    async def run(self) -> ClientResults:
        """Send all requests on schedule, and wait for the responses."""
        load, results = self._load, ClientResults()
        used_s, began_s = _cpu_s(), time.monotonic()
        clients = [asyncio.create_task(self._client(n, began_s, results)) for n in range(load.clients)]
        _, late = await asyncio.wait(clients, timeout=load.seconds + load.limit_s)
        for client in late:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if missing := round(load.rate * load.seconds) - results.statuses.total():
            results.statuses["no answer"] += missing
        results.cpu_s = _cpu_s() - used_s
        return results

    async def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            if connection is not None:
                connection[1].close()
                with contextlib.suppress(OSError):
                    await connection[1].wait_closed()
        for peer in self._peers:
            asyncio.get_running_loop().remove_reader(peer)
            peer.close()

    async def _client(self, number: int, began_s: float, results: ClientResults) -> None:
        load = self._load
        for index in range(number, round(load.rate * load.seconds), load.clients):
            due_s = began_s + index / load.rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            status = await self._request(number, self._requests[index % len(self._requests)])
            results.statuses[status] += 1
            results.latencies_ms.append((time.monotonic() - due_s) * 1000)

    async def _request(self, number: int, request: bytes) -> str:
        """The status of the response, or why there is none; the next request then connects again."""
        try:
            connection = self._connections[number] = self._connections[number] or await self._open()
            connection[1].write(request)
            return await read_response(connection[0])
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
            if (lost := self._connections[number]) is not None:
                lost[1].close()
            self._connections[number] = None
            return "closed" if isinstance(error, EOFError) else type(error).__name__

    async def _open(self) -> Connection:
        if not self._load.loopback:
            opening = asyncio.open_connection(self._load.host, self._load.port, ssl=self._context)
            return await asyncio.wait_for(opening, _CONNECT_S)
        ours, peer = socket.socketpair()
        peer.setblocking(False)
        self._peers.append(peer)
        asyncio.get_running_loop().add_reader(peer, _answer, peer)
        return await asyncio.open_connection(sock=ours)


async def read_response(reader: asyncio.StreamReader) -> str:
    """Read one response and return its status.

    Raises:
        EOFError: the connection was closed.
        ValueError: the response has no length.
    """
    head = (await reader.readuntil(_HEAD_END)).lower()
    status = head[9:12].decode("ascii", "replace")
    _, found, rest = head.partition(b"\r\ncontent-length:")
    if found:
        await reader.readexactly(int(rest.partition(b"\r\n")[0]))
    elif status not in ("204", "304"):
        raise ValueError("a response without a length")
    return status


def _answer(peer: socket.socket) -> None:
    """The other end of a loopback client: answers every request at once."""
    if peer.recv(_CHUNK_BYTES):
        peer.send(_LOOPBACK_RESPONSE)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def main() -> None:
    """Read the load, connect, wait for `go`, run, and print the results."""
    clients = LoadClients(ClientLoad(**json.loads(sys.stdin.readline())))
    await clients.connect()
    print("ready", flush=True)  # noqa: T201 - the protocol with the parent
    if sys.stdin.readline():
        json.dump((await clients.run()).document(), sys.stdout)
    await clients.close()


if __name__ == "__main__":
    asyncio.run(main())
