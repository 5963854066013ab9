"""An https server for models that does what it is told: well, badly, for ever, not at all."""

import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import trustme


class Request(BaseHTTPRequestHandler):
    """One request; an answer writes to it."""

    server: "_Threads"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer as it was told for this path."""
        self.close_connection = True
        with self.server.changed:
            self.server.seen.append((self.path, dict(self.headers)))
            self.server.changed.notify_all()
        self.server.answers[self.path.partition("?")[0]](self)

    def head(self, status: int, headers: Mapping[str, object]) -> None:
        """Send the status and the headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def until_stopped(self) -> None:
        """Keep the connection and say nothing, until the server ends."""
        self.server.ending.wait()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name it is called by
        """Nothing."""


Answer = Callable[[Request], None]


class _ThreadingServer(ThreadingHTTPServer):
    """A thread for each connection, TLS included: one that does not speak delays no other."""

    daemon_threads = False
    request_queue_size = 20

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.changed = threading.Condition()
        self.ending = threading.Event()
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is what these tests are about."""


class ModelServer:
    """``with ModelServer(folder) as server: server.answers["/m.onnx"] = content(data)``; https, or http.

    `authority` is the file of the certificate that clients have to trust, `seen` has the path and the headers
    of each request.
    """

    def __init__(self, folder: Path, *, tls: bool = True, host: str = "127.0.0.1") -> None:
        self.authority = folder / "authority.pem"
        context = None
        if tls:
            ca = trustme.CA()
            ca.cert_pem.write_to_path(str(self.authority))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            ca.issue_cert(host).configure_cert(context)
        self._server = _ThreadingServer(context)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="model-server")
        self._scheme = "https" if tls else "http"
        self.answers = self._server.answers
        self.seen = self._server.seen

    def __enter__(self) -> "ModelServer":
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait_for_requests(self, count: int) -> None:
        """Wait until so many have come."""
        with self._server.changed:
            assert self._server.changed.wait_for(lambda: len(self.seen) >= count, 20)

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return self._server.server_address[1]

    def url(self, path: str) -> str:
        """The address of a path here."""
        return f"{self._scheme}://127.0.0.1:{self.port}{path}"

    @property
    def environ(self) -> dict[str, str]:
        """What lets a process trust it."""
        return {"SSL_CERT_FILE": str(self.authority)}


def content(data: bytes, *, ranges: bool = True) -> Answer:
    """The file, or the rest of it."""

    def answer(request: Request) -> None:
        asked = request.headers.get("Range")
        if asked is None or not ranges:
            request.head(200, {"Content-Length": len(data)})
            request.wfile.write(data)
            return
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        if first >= len(data):
            request.head(416, {"Content-Length": 0, "Content-Range": f"bytes */{len(data)}"})
            return
        where = f"bytes {first}-{len(data) - 1}/{len(data)}"
        request.head(206, {"Content-Length": len(data) - first, "Content-Range": where})
        request.wfile.write(data[first:])

    return answer


def cut(data: bytes, after_bytes: int) -> Answer:
    """The file announced whole, and the connection closed in the middle of it."""

    def answer(request: Request) -> None:
        request.head(200, {"Content-Length": len(data)})
        request.wfile.write(data[:after_bytes])

    return answer


def endless(request: Request) -> None:
    """Bytes without end, and no word of how many."""
    request.head(200, {"Connection": "close"})
    while not request.server.ending.is_set():
        request.wfile.write(b"x" * 65536)


def hanging(request: Request) -> None:
    """Not even a status."""
    request.until_stopped()


def stalled(data: bytes) -> Answer:
    """Some bytes, then silence."""

    def answer(request: Request) -> None:
        request.head(200, {"Content-Length": len(data) + 1})
        request.wfile.write(data)
        request.until_stopped()

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    """Somewhere else."""
    return lambda request: request.head(status, {"Location": location, "Content-Length": 0})


def status(code: int, **headers: object) -> Answer:
    """Only a status."""
    return lambda request: request.head(code, {"Content-Length": 0, **headers})


def in_turn(*answers: Answer) -> Answer:
    """One after the other; the last one stays."""
    left = list(answers)

    def answer(request: Request) -> None:
        chosen = left.pop(0) if len(left) > 1 else left[0]
        chosen(request)

    return answer


class _TunnelHandler(socketserver.StreamRequestHandler):
    """CONNECT, and bytes both ways until one side ends."""

    server: "ConnectProxy"

    def handle(self) -> None:
        line = self.rfile.readline().decode()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append(line.split()[1])
        host, _, port = line.split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as remote:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            pairs = {self.connection: remote, remote: self.connection}
            while True:
                for ready in select.select(list(pairs), [], [], 30)[0]:
                    block = ready.recv(65536)
                    if not block:
                        return
                    pairs[ready].sendall(block)


class ConnectProxy(socketserver.ThreadingTCPServer):
    """A proxy as companies have them; `asked` is where it was asked to connect."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TunnelHandler)
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="proxy")
        self._thread.start()

    def __exit__(self, *_args: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are no matter."""

    @property
    def url(self) -> str:
        """Its address, as HTTPS_PROXY has it."""
        return f"http://127.0.0.1:{self.server_address[1]}"
