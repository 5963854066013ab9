"""The connections of the HTTP server: accept them, bound them, time them out, and answer malformed requests.

asyncio's own server is not used: it logs a traceback for each connection that gets no file descriptor, and at
`::` it listens for IPv6 only.
"""

import asyncio
import contextlib
import errno
import logging
import re
import socket
from enum import Enum
from typing import Any

from aiohttp import StreamReader, hdrs, web
from aiohttp.http_exceptions import (
    BadHttpMethod,
    BadStatusLine,
    HttpProcessingError,
    InvalidURLError,
    LineTooLong,
)

from visionedge.runtime.logs import LogLimiter
from visionedge.runtime.process_limits import descriptor_limit
from visionedge.web.responses import RequestError, error_response, set_common_headers, to_request_error

log = logging.getLogger(__name__)

CONNECTIONS_AT_ONCE = 512
HEAD_LIMIT_S = 10.0
"""A client has this long from its first byte (or from connecting) to the end of a request's head."""

IDLE_LIMIT_S = 60.0
"""A kept connection without a request, or whose client reads nothing of its answer, is closed after this."""

SWEEP_S = 1.0

_BACKLOG = 1024
"""The number of connections that the system keeps until they are accepted; further clients wait for 1 s."""

_ACCEPTS_AT_ONCE = 32
_PAUSE_S = 0.5
_IPV6_ANY = "::"

# A request that cannot be parsed has no path, but clients of /v2 expect errors in the shape of that protocol.
_V2 = re.compile(rb"[A-Z]{1,16} /v2[/? ]")
_MALFORMED_BODY = "a client sent a malformed body"

SocketAddress = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


class _Phase(Enum):
    HEAD = "head"
    ANSWERING = "answering"
    KEEP_ALIVE = "kept"


class Connections:
    """The open connections, at most `limit`. Loop only.

    At the limit a new connection replaces the one that has been idle longest; a connection whose request is
    being answered is never closed for a new one.
    """

    def __init__(self, server: web.Server, limit: int = CONNECTIONS_AT_ONCE) -> None:
        self._server = server
        self._limit = limit
        self._open: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self.limiter = LogLimiter(log)

    def __repr__(self) -> str:
        return f"<Connections open={len(self._open)} limit={self._limit}>"

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> "Connection":
        """The protocol object of a connection that is about to be made; it counts from here on."""
        loop = asyncio.get_running_loop()
        connection = Connection(self, self._server, loop=loop, access_log=None, auto_decompress=False)
        self._open.add(connection)
        if self._sweep is None:
            self._schedule()
        return connection

    def check_free_space(self) -> bool:
        """Whether one more connection may be opened; closes idle ones where that helps."""
        while len(self._open) >= self._limit:
            if not self.drop_idlest():
                return False
            self.limiter.warning(f"{self._limit} connections are open: closing those that are idle longest")
        return True

    def drop_idlest(self) -> bool:
        """Close the connection that has been idle longest; False where none is idle."""
        idle = [each for each in self._open if not each.is_answering]
        if idle:
            idlest = min(idle, key=lambda each: each.since_s)
            idlest.abort()
            self._open.discard(idlest)
        return bool(idle)

    def lost(self, connection: "Connection") -> None:
        """Forget a connection that has ended or could not be made."""
        self._open.discard(connection)

    def close(self) -> None:
        """Stop watching the time limits; aiohttp ends the connections."""
        if self._sweep is not None:
            self._sweep.cancel()

    def _schedule(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._drop_overdue)

    def _drop_overdue(self) -> None:
        self._sweep = None
        for connection in tuple(self._open):
            if connection.is_overdue():
                connection.abort()
        if self._open:
            self._schedule()


class Connection(web.RequestHandler):
    """aiohttp's connection, with time limits, and with all errors in the one shape."""

    def __init__(self, connections: Connections, server: web.Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._connections = connections
        self._raw: asyncio.Transport | None = None
        self._phase = _Phase.HEAD
        self._unsent_bytes = 0
        self._body: StreamReader | None = None
        self._is_v2 = False
        self._is_aborted = False
        self.since_s = self._loop.time()
        """When the phase began, or when the client last read a part of an answer."""

    @property
    def is_answering(self) -> bool:
        """Whether a request is being answered; else the connection waits for its client."""
        return self._phase is _Phase.ANSWERING

    def begin(self, request: web.Request) -> None:
        """The head of a request has arrived."""
        self._phase = _Phase.ANSWERING
        self._body = request.content

    def end(self) -> None:
        """The answer is made; its last bytes may not be sent yet."""
        self._enter(_Phase.KEEP_ALIVE)

    def is_overdue(self) -> bool:
        """Whether the client has used up its time."""
        if self._raw is None or self.is_answering:
            return False
        now_s = self._loop.time()
        unsent_bytes = self._raw.get_write_buffer_size()
        if unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self.since_s = unsent_bytes, now_s
        limit_s = HEAD_LIMIT_S if self._phase is _Phase.HEAD else IDLE_LIMIT_S
        return now_s - self.since_s >= limit_s

    def abort(self) -> None:
        """Close without waiting until the client has read what was sent."""
        self._is_aborted = True
        if self._raw is not None:
            self._raw.abort()

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self.since_s = self._loop.time()

    # Called by asyncio and aiohttp.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream has no other
        self._raw = transport
        self._enter(_Phase.HEAD)
        super().connection_made(transport)
        if self._is_aborted:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """See `asyncio.Protocol`."""
        self._raw = None
        self._connections.lost(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if data and self._phase is not _Phase.ANSWERING:
            if self._phase is _Phase.KEEP_ALIVE:
                self._enter(_Phase.HEAD)
            self._is_v2 = _V2.match(data) is not None
        super().data_received(data)
        if self._messages and self._body is not None and not self._body.is_eof():
            self._refuse_body(self._body)

    def _refuse_body(self, body: StreamReader) -> None:
        """Fail the reader of a body: a message after a body that has not ended is the error of that body."""
        self._messages.clear()
        body.set_exception(web.RequestPayloadError("malformed"))
        self.close()
        self._warn(_MALFORMED_BODY)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to bytes that are not a request, or to an error outside the application's middleware."""
        if isinstance(exc, HttpProcessingError):
            problem = malformed_request_error(exc)
            self._warn(f"{request.remote} sent bytes that are not an HTTP request: {problem}")
        elif request.writer.output_size > 0 and isinstance(exc, ConnectionError | asyncio.CancelledError):
            problem = RequestError(status, "the client has gone")
        elif isinstance(exc, UnicodeEncodeError) and hdrs.EXPECT in request.headers:
            # aiohttp quotes the header in its answer, and fails where the header is not text.
            problem = to_request_error(web.HTTPExpectationFailed(), request)
        else:
            failure = exc if isinstance(exc, Exception) else RuntimeError(message or "no answer was made")
            problem = to_request_error(failure, request)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is already sent")
        response = error_response("/v2" if self._is_v2 else request.path, problem)
        set_common_headers(response.headers)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Give errors that aiohttp raises outside the application's middleware the one shape."""
        if isinstance(resp, web.HTTPException):
            resp = error_response(request.path, to_request_error(resp, request))
            set_common_headers(resp.headers)
            resp.force_close()
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *_args: Any, **kw: Any) -> None:
        """Log an error of aiohttp, limited in rate and without its message, which may quote the client."""
        error = kw.get("exc_info")
        if isinstance(error, HttpProcessingError | web.RequestPayloadError | ConnectionError):
            self._warn(_MALFORMED_BODY)
        else:
            self._connections.limiter.warning("an HTTP connection failed", error=error)

    def _warn(self, text: str) -> None:
        self._connections.limiter.warning(text)


_TOO_LONG = "the request line or a header is longer than 8190 bytes"
_ERRORS_BY_TYPE: dict[type[HttpProcessingError], tuple[int, str]] = {
    LineTooLong: (431, _TOO_LONG),
    BadHttpMethod: (400, "the request does not begin with an HTTP method"),
    InvalidURLError: (400, "the address in the request line cannot be read"),
    BadStatusLine: (400, "the request line cannot be read"),
}
_ERRORS_BY_PREFIX: dict[str, tuple[int, str]] = {
    "Received HTTPS": (400, "this port speaks HTTP, not HTTPS"),
    "Missing 'Host'": (400, "the request has no Host header"),
    "Duplicate '": (400, "a header that may be given once is given twice"),
    "Too many headers": (431, "the request has too many headers"),
}


def malformed_request_error(error: HttpProcessingError) -> RequestError:
    """The error for bytes that are not a request. aiohttp's own message is not shown: it quotes the bytes."""
    text = error.message
    by_text = (known for beginning, known in _ERRORS_BY_PREFIX.items() if text.startswith(beginning))
    by_kind = (known for kind, known in _ERRORS_BY_TYPE.items() if isinstance(error, kind))
    status, message = [*by_text, *by_kind, (400, "the head or the chunks of the request are malformed")][0]
    return RequestError(status, message)


# --- listening ----------------------------------------------------------------------------------------------


def compute_max_connections() -> int:
    """At most half of the process's file descriptors."""
    return min(CONNECTIONS_AT_ONCE, descriptor_limit() // 2)


class HttpListener:
    """Accepts connections at one host and port: ``await HttpListener.open(…)`` … ``close()``. Loop only.

    It leaves a reserve of file descriptors to the rest of the module: near the limit it closes the connection
    that has been idle longest, or stops accepting for 0.5 s.
    """

    def __init__(self, sockets: list[socket.socket], connections: Connections) -> None:
        self._sockets = sockets
        self._connections = connections
        self._limit = descriptor_limit()
        self._reserve = max(32, self._limit // 16)
        self._limiter = LogLimiter(log)
        self._resume: asyncio.TimerHandle | None = None
        self._accepting: set[asyncio.Task[None]] = set()
        self._listen()

    def __repr__(self) -> str:
        state = "paused" if self._resume else "listening"
        return f"<HttpListener port={self.port} {state}>"

    @staticmethod
    async def open(host: str, port: int, connections: Connections) -> "HttpListener":
        """Listen at every address of the host.

        Raises:
            OSError: the address cannot be listened on.
        """
        addresses = await _addresses(host, port)
        return HttpListener(_open_sockets(addresses, port), connections)

    @property
    def port(self) -> int:
        """The port it listens on, also when 0 was given."""
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening; open connections stay."""
        if self._resume is not None:
            self._resume.cancel()
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.remove_reader(each.fileno())
            each.close()

    def _listen(self) -> None:
        self._resume = None
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.add_reader(each.fileno(), self._accept, each)

    def _pause(self, reason: str) -> None:
        self._limiter.warning(f"HTTP accepts no new connections for {_PAUSE_S:g} s: {reason}")
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.remove_reader(each.fileno())
        self._resume = loop.call_later(_PAUSE_S, self._listen)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, _peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._free_descriptor(error.strerror or str(error))
                return
            if not self._connections.check_free_space():
                connection.close()
                self._pause("all connections are in use")
                return
            is_scarce = connection.fileno() >= self._limit - self._reserve
            self._serve(connection)
            if is_scarce:
                # The system assigns the lowest free descriptor, so nearly all are in use.
                self._free_descriptor(f"nearly all of {self._limit} file descriptors are in use")
                return

    def _free_descriptor(self, reason: str) -> None:
        """Close an idle connection before the next one is accepted; pause where none is idle."""
        if not self._connections.drop_idlest():
            self._pause(reason)

    def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._connect(connection, self._connections.begin()))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _connect(self, connection: socket.socket, protocol: Connection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:
            connection.close()
            self._connections.lost(protocol)
            self._limiter.warning(f"an HTTP connection could not be accepted: {error.strerror}")


async def _addresses(host: str, port: int) -> list[SocketAddress]:
    """The addresses of a host without duplicates, in the order of the system."""
    host = host.removeprefix("[").removesuffix("]")
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _open_sockets(addresses: list[SocketAddress], port: int) -> list[socket.socket]:
    """Listening sockets. An address that this machine does not have is skipped if another one works."""
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        for family, address in addresses:
            # With port 0 all addresses get the port that the first one got.
            shared_port = int(sockets[0].getsockname()[1]) if sockets and port == 0 else port
            try:
                sockets.append(_open_listening_socket(family, (address[0], shared_port, *address[2:])))
            except OSError as error:
                # A port that is free at one address may be taken at another.
                is_other = port == 0 and bool(sockets) and error.errno == errno.EADDRINUSE
                if not is_other and error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                continue
            opened.callback(sockets[-1].close)
        if not sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no such address")
        opened.pop_all()
        return sockets


def _open_listening_socket(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` means all addresses, those of IPv4 included.
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != _IPV6_ANY))
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
