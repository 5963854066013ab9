"""A server that sends scripted bytes, also invalid HTTP, as some cameras do."""

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

Serve = Callable[["ScriptedServer", socket.socket, str], None]
"""Serves one request: (server, connection, head of the request)."""


class ScriptedServer:
    """``with ScriptedServer(serve) as server:``; `requests` holds the head of each request.

    `serve` is called for each request of a connection; it may close it.
    """

    def __init__(
        self, serve: Serve, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, port: int = 0
    ) -> None:
        self._serve, self._tls = serve, tls
        self.requests: list[str] = []
        self.ended = threading.Event()
        self._changed = threading.Condition()
        self._listener = socket.create_server((host, port))
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, name="scripted", daemon=True)]
        self._connections: list[socket.socket] = []

    def __enter__(self) -> "ScriptedServer":
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        for item in (self._listener, *self._connections):
            with suppress(OSError):
                socket.socket.shutdown(item, socket.SHUT_RDWR)
        self._listener.close()
        for thread in tuple(self._threads):
            thread.join(10)

    def url(self, path: str = "/stream", login: str = "", scheme: str = "http") -> str:
        """The address of a path."""
        return f"{scheme}://{login}{self.host}:{self.port}{path}"

    def wait_requests(self, count: int, timeout_s: float = 15.0) -> list[str]:
        """Wait for `count` requests; returns them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, timeout_s), self.requests
            return list(self.requests)

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _talk(self, plain: socket.socket) -> None:
        with suppress(OSError), plain:
            connection = plain if self._tls is None else self._tls.wrap_socket(plain, server_side=True)
            with connection:
                while (head := _head(connection)) and not self.ended.is_set():
                    with self._changed:
                        self.requests.append(head)
                        self._changed.notify_all()
                    self._serve(self, connection, head)


def answer(
    body: bytes,
    content_type: str = "image/jpeg",
    *,
    status: str = "200 OK",
    more: str = "",
    length: bool = True,
) -> bytes:
    """The bytes of an answer."""
    head = f"HTTP/1.1 {status}\r\n"
    head += f"Content-Type: {content_type}\r\n" if content_type else ""
    head += f"Content-Length: {len(body)}\r\n" if length else ""
    return f"{head}{more}\r\n".encode() + body


def always(data: bytes, *, close: bool = True) -> Serve:
    """The same answer to each request."""

    def serve(_server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(data)
        if close:
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    return serve


def in_turn(*answers: bytes) -> Serve:
    """One answer after the other; the last one repeats."""

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        connection.sendall(answers[min(len(server.requests), len(answers)) - 1])

    return serve


def _head(connection: socket.socket) -> str:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(4096)
        if not chunk:
            return ""
        data += chunk
    return data.decode("latin-1")
