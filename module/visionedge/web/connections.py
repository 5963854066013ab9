"""The connections of the HTTP server: so many, none that holds its place without using it, and what is
answered to bytes that are no request.
"""

import asyncio
import logging
import re
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
from visionedge.web.responses import RequestError, error_response, set_common_headers, to_request_error

log = logging.getLogger(__name__)

CONNECTIONS_AT_ONCE = 512
HEAD_LIMIT_S = 10.0
"""A client has this long from its first byte (or from connecting) to the end of a request's head."""
IDLE_LIMIT_S = 60.0
"""A kept connection without a request, or one whose client takes nothing of its answer, ends after this."""
SWEEP_S = 1.0


_V2 = re.compile(rb"[A-Z]{1,16} /v2[/? ]")
"""A request that cannot be read has no path, but the clients of this protocol want errors in its shape."""
_MALFORMED_BODY = "a client sent a malformed body"


class _Phase(Enum):
    HEAD = "head"
    ANSWERING = "answering"
    KEEP_ALIVE = "kept"


class Connections:
    """The open connections. Loop only.

    When there are `most`, a new one takes the place of the one that has waited longest for its client. Those
    whose request is being answered keep their places.
    """

    def __init__(self, server: web.Server, limit: int = CONNECTIONS_AT_ONCE) -> None:
        self._server = server
        self._limit = limit
        self._open: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self.limiter = LogLimiter(log)

    def __repr__(self) -> str:
        return f"<Connections open={len(self._open)} most={self._limit}>"

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> "Connection":
        """The protocol of a connection that is about to be made; it has a place from here on."""
        loop = asyncio.get_running_loop()
        connection = Connection(self, self._server, loop=loop, access_log=None, auto_decompress=False)
        self._open.add(connection)
        if self._sweep is None:
            self._schedule()
        return connection

    def check_free_space(self) -> bool:
        """Whether there is room for one more, also by closing connections that wait for their clients."""
        while len(self._open) >= self._limit:
            if not self.drop_idlest():
                return False
            self.limiter.warning(f"{self._limit} connections are open: closing those that are idle longest")
        return True

    def drop_idlest(self) -> bool:
        """Close the connection that has waited longest for its client; False where none waits."""
        idle = [each for each in self._open if not each.is_answering]
        if idle:
            idlest = min(idle, key=lambda each: each.since_s)
            idlest.abort()
            self._open.discard(idlest)
        return bool(idle)

    def lost(self, connection: "Connection") -> None:
        """It has ended, or could not be made."""
        self._open.discard(connection)

    def close(self) -> None:
        """Watch no more; aiohttp ends the connections."""
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
    """aiohttp's connection, with time limits, and with errors in the shape of all others."""

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
        """When the phase began, or its client last took something of an answer."""

    @property
    def is_answering(self) -> bool:
        """Whether a request is being answered; else the client is waited for."""
        return self._phase is _Phase.ANSWERING

    def begin(self, request: web.Request) -> None:
        """A request has come whole but for its body."""
        self._phase = _Phase.ANSWERING
        self._body = request.content

    def end(self) -> None:
        """Its answer is made; its last bytes may still have to go out."""
        self._enter(_Phase.KEEP_ALIVE)

    def is_overdue(self) -> bool:
        """Whether the client has had all the time it gets."""
        if self._raw is None or self.is_answering:
            return False
        now_s = self._loop.time()
        unsent_bytes = self._raw.get_write_buffer_size()
        if unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self.since_s = unsent_bytes, now_s
        limit_s = HEAD_LIMIT_S if self._phase is _Phase.HEAD else IDLE_LIMIT_S
        return now_s - self.since_s >= limit_s

    def abort(self) -> None:
        """Hang up without waiting for the client to take what was written."""
        self._is_aborted = True
        if self._raw is not None:
            self._raw.abort()

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self.since_s = self._loop.time()

    # --- what aiohttp and asyncio call ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream it is one
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
        """A message behind a body that has not ended can only be that body's error: tell who reads it."""
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
        """The answer to what is no request, or to one that failed beyond the application's own fence."""
        if isinstance(exc, HttpProcessingError):
            problem = malformed_request_error(exc)
            self._warn(f"{request.remote} sent bytes that are not an HTTP request: {problem}")
        elif request.writer.output_size > 0 and isinstance(exc, ConnectionError | asyncio.CancelledError):
            problem = RequestError(status, "the client has gone")
        elif isinstance(exc, UnicodeEncodeError) and hdrs.EXPECT in request.headers:
            # aiohttp quotes the header in its refusal, and fails where that is no text.
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
        """Errors that aiohttp raises before the application's own fence get the shape of all others."""
        if isinstance(resp, web.HTTPException):
            resp = error_response(request.path, to_request_error(resp, request))
            set_common_headers(resp.headers)
            resp.force_close()
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *_args: Any, **kw: Any) -> None:
        """What aiohttp could not place anywhere; its own words may quote the client's."""
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
    """What is wrong with bytes that are no request, in our own words: those of aiohttp quote the bytes."""
    text = error.message
    by_text = (known for beginning, known in _ERRORS_BY_PREFIX.items() if text.startswith(beginning))
    by_kind = (known for kind, known in _ERRORS_BY_TYPE.items() if isinstance(error, kind))
    status, message = [*by_text, *by_kind, (400, "the head or the chunks of the request are malformed")][0]
    return RequestError(status, message)
