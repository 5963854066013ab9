"""An HTTP client for cameras: sequential GET requests with login, checked redirects and time limits.

FFmpeg's HTTP client follows redirects and `http_proxy` to any host, and the client of the standard library
refuses answers that cameras give (`ICY 200 OK`, wrong lengths).
"""

import contextlib
import re
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.diagnosis import SourceFault, diagnose_connection_error, not_http
from visionedge.camera.sources.network import HttpLogin, parse_challenges, strip_login
from visionedge.camera.sources.redirects import check_redirect, connect_guarded, resolve_location
from visionedge.errors import SourceError
from visionedge.runtime.redaction import mask_address

_MAX_HEAD_BYTES = 65536
_CHUNK_BYTES = 65536
_MAX_REDIRECTS = 8
_SCHEMES = ("http", "https")
_STATUS = re.compile(r"[1-9][0-9][0-9]")
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,12}")
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_STATUS_LINE_STARTS = (b"HTTP/", b"ICY ")
_URI_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


class ConnectionClosedError(SourceError):
    """The server closed the connection before the end of its answer."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers of an answer; header names in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    protocol: str = "HTTP/1.1"

    def get_all(self, name: str) -> list[str]:
        """Return all values of a header."""
        return [value for key, value in self.headers if key == name]

    def get(self, name: str) -> str:
        """Return the first value of a header; empty if it is missing."""
        return next(iter(self.get_all(name)), "")

    @property
    def content_type(self) -> str:
        """The media type in lower case, without parameters."""
        return self.get("content-type").partition(";")[0].strip().lower()

    @property
    def length(self) -> int | None:
        """Length of the body in bytes; None if it ends with the connection or is chunked."""
        text = self.get("content-length")
        if self.status in (204, 304):
            return 0
        # Cameras invent a length for an endless stream of pictures.
        if self.chunked or not _LENGTH.fullmatch(text) or self.content_type.startswith("multipart/"):
            return None
        return int(text)

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection can be used for another request."""
        connection = self.get("connection").lower()
        return "close" not in connection and (self.protocol == "HTTP/1.1" or "keep-alive" in connection)

    @property
    def chunked(self) -> bool:
        """Whether the body is sent in chunks."""
        return "chunked" in self.get("transfer-encoding").lower()


class _PlainBody:
    """A body of `left` bytes, or up to the end of the connection (None)."""

    def __init__(self, left: int | None) -> None:
        self._left = left
        self.is_finished = left == 0

    def take(self, raw: bytearray) -> bytes:
        size = len(raw) if self._left is None else min(len(raw), self._left)
        data = bytes(raw[:size])
        del raw[:size]
        if self._left is not None:
            self._left -= size
            self.is_finished = self._left == 0
        return data


class _ChunkedBody:
    """A body in chunks."""

    def __init__(self) -> None:
        self._left = 0
        self._first = True
        self.is_finished = False

    def take(self, raw: bytearray) -> bytes:
        data = bytearray()
        while raw and not self.is_finished:
            if self._left == 0 and not self._size(raw):
                break
            size = min(self._left, len(raw))
            data += raw[:size]
            del raw[:size]
            self._left -= size
        return bytes(data)

    def _size(self, raw: bytearray) -> bool:
        """Read the line with the size of the next chunk; False if it is incomplete."""
        start = 0 if self._first else raw.find(b"\n") + 1  # skips the line end of the last chunk
        if not self._first and start == 0:
            return False
        end = raw.find(b"\n", start)
        if end < 0:
            if len(raw) > 1024:
                raise ConnectionClosedError("a chunk without a length")
            return False
        size = bytes(raw[start:end]).partition(b";")[0].strip()
        if not _CHUNK_SIZE.fullmatch(size):
            raise ConnectionClosedError("a chunk without a length")
        self._left = int(size, 16)
        del raw[: end + 1]
        self._first, self.is_finished = False, self._left == 0
        return not self.is_finished


class HttpResponse:
    """An answer: its head, and its body to be read."""

    def __init__(self, head: ResponseHead, url: str, raw: bytearray, connection: socket.socket) -> None:
        self.head, self.url = head, url
        self._raw, self._connection = raw, connection
        self._body = _ChunkedBody() if head.chunked else _PlainBody(head.length)
        self._closed = False

    @property
    def is_finished(self) -> bool:
        """Whether the whole body was read."""
        return self._body.is_finished or (self._closed and not self._raw)

    @property
    def is_complete(self) -> bool:
        """Whether the body was received completely."""
        return self._body.is_finished or (
            self._closed and isinstance(self._body, _PlainBody) and self.head.length is None
        )

    def read(self, timeout_s: float) -> bytes:
        """Return more of the body; empty at its end. `timeout_s` 0: only data that has arrived, perhaps none.

        Raises:
            TimeoutError: no data came within `timeout_s`.
        """
        while not self.is_finished:
            try:
                data = self._body.take(self._raw)
            except ConnectionClosedError:  # the rest cannot be parsed
                self._raw.clear()
                self._closed, data = True, b""
            if self._closed and not data:
                self._raw.clear()  # the start of an incomplete chunk
            if data or self.is_finished:
                return data
            try:
                self._connection.settimeout(timeout_s)
                more = self._connection.recv(_CHUNK_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                return b""
            except TimeoutError:
                raise
            except OSError:
                more = b""
            self._raw += more
            self._closed = not more
        return b""


class HttpClient:
    """Sends GET requests to one camera. One thread uses it; any thread may call `interrupt`.

    Args:
        target: the address with its secrets.
        limits: `open_timeout_s` is for one `get`, including redirects and login.
    """

    def __init__(self, target: str, limits: SourceLimits) -> None:
        self._target, self._limits = target, limits
        self.name = mask_address(target)
        self.origin = urlsplit(target)
        user, password = self.origin.username, self.origin.password
        self._login = None if user is None else HttpLogin(unquote(user), unquote(password or ""))
        self._connection: socket.socket | None = None
        self._peer: tuple[str, str | None, int | None] | None = None
        self._response: HttpResponse | None = None
        self.interrupted = False

    def __repr__(self) -> str:
        return f"<HttpClient {self.name}>"

    @property
    def open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    def get(self, headers: dict[str, str] | None = None, url: str | None = None) -> HttpResponse:
        """Request the camera's own address, or another `url` that the camera named.

        Raises:
            SourceError: no answer, or a redirect that is not followed. A status of 400 or above is an answer.
        """
        deadline_s = time.monotonic() + self._limits.open_timeout_s
        url = self._target if url is None else url
        for _ in range(_MAX_REDIRECTS):
            parts = check_redirect(self.name, self.origin, url, _SCHEMES, self._limits.redirects)
            response = self._exchange(parts, headers or {}, deadline_s)
            if response.head.status == 401 and self._can_authenticate(response.head, parts):
                response = self._exchange(parts, headers or {}, deadline_s)
            where = response.head.get("location")
            if response.head.status not in _REDIRECT_STATUSES or not where:
                return response
            url = resolve_location(url, where)
        raise SourceFault.REDIRECT_LOOP.error(self.name)

    def interrupt(self) -> None:
        """End waiting reads at once; called by any thread."""
        self.interrupted = True
        if (connection := self._connection) is not None:
            # The shutdown of the TLS socket would change state that the reading thread uses.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._peer, self._response = None, None, None

    def _can_authenticate(self, head: ResponseHead, parts: SplitResult) -> bool:
        """Whether the login answers the server's challenge; never for another host."""
        if self._login is None or parts.hostname != self.origin.hostname:
            return False
        challenges = parse_challenges(head.get_all("www-authenticate"))
        return self._login.accept(challenges, basic=self._may_send_password(parts))

    def _may_send_password(self, parts: SplitResult) -> bool:
        """Whether a password may be sent in clear: that of an https address is not sent without TLS."""
        return parts.scheme.lower() in ("https", self.origin.scheme.lower())

    def _exchange(self, parts: SplitResult, headers: dict[str, str], deadline_s: float) -> HttpResponse:
        peer = (parts.scheme.lower(), parts.hostname, parts.port)
        last = self._response
        kept = last is not None and last.is_complete and last.head.keeps_alive and peer == self._peer
        if kept and self._connection is not None:
            # The server may close an idle connection at any time; then a new one is opened.
            with contextlib.suppress(OSError, ConnectionClosedError):
                return self._send_request(self._connection, parts, headers, deadline_s)
        self.close()
        if self.interrupted:
            raise SourceFault.CONNECTION_CLOSED.error(self.name)
        try:
            self._connection, self._peer = self._open_connection(parts, deadline_s), peer
            return self._send_request(self._connection, parts, headers, deadline_s)
        except (OSError, ConnectionClosedError) as error:
            self.close()
            if self.interrupted:
                raise SourceFault.CONNECTION_CLOSED.error(self.name) from None
            limit_s = self._limits.open_timeout_s
            raise SourceError(diagnose_connection_error(self.name, parts, error, limit_s)) from None

    def _open_connection(self, parts: SplitResult, deadline_s: float) -> socket.socket:
        return connect_guarded(
            self.name,
            self.origin,
            parts,
            _remaining_s(deadline_s),
            tls=parts.scheme.lower() == "https",
            certificates=self._limits.certificates,
        )

    def _send_request(
        self, connection: socket.socket, parts: SplitResult, headers: dict[str, str], deadline_s: float
    ) -> HttpResponse:
        self._response = None
        connection.settimeout(_remaining_s(deadline_s))
        connection.sendall(self._request(parts, headers))
        raw = bytearray()
        head = self._head(connection, parts, raw, deadline_s)
        while 100 <= head.status < 200:
            head = self._head(connection, parts, raw, deadline_s)
        self._response = HttpResponse(head, strip_login(parts.geturl()), raw, connection)
        return self._response

    def _request(self, parts: SplitResult, headers: dict[str, str]) -> bytes:
        path = quote(parts.path or "/", safe=_URI_CHARACTERS)
        path += f"?{quote(parts.query, safe=_URI_CHARACTERS)}" if parts.query else ""
        fields = {
            "Host": parts.netloc.rpartition("@")[2],
            "User-Agent": "visionedge",
            "Accept": "*/*",
            **headers,
        }
        if self._login is not None and parts.hostname == self.origin.hostname:
            authorization = self._login.header("GET", path, basic=self._may_send_password(parts))
            if authorization is not None:
                fields["Authorization"] = authorization
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        if any("\r" in line or "\n" in line for line in lines):
            raise SourceError(f"{self.name}: line break in the address; remove it")
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace")

    def _head(
        self, connection: socket.socket, parts: SplitResult, raw: bytearray, deadline_s: float
    ) -> ResponseHead:
        while (end := _end_of_head(raw)) is None:
            if len(raw) > _MAX_HEAD_BYTES or (len(raw) >= 5 and not raw.startswith(_STATUS_LINE_STARTS)):
                raise SourceError(not_http(self.name, parts, bytes(raw[:16])))
            connection.settimeout(_remaining_s(deadline_s))
            more = connection.recv(4096)
            if not more:
                raise ConnectionClosedError("no answer")
            raw += more
        first, *lines = bytes(raw[:end]).decode("latin-1").splitlines()
        del raw[:end]
        words = first.split(None, 2)
        if (
            len(words) < 2
            or not _STATUS.fullmatch(words[1])
            or not first.encode().startswith(_STATUS_LINE_STARTS)
        ):
            raise SourceError(not_http(self.name, parts, first.encode()[:16]))
        pairs = (line.partition(":") for line in lines if ":" in line)
        headers = tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)
        return ResponseHead(int(words[1]), headers, words[0].upper())


def _end_of_head(raw: bytearray) -> int | None:
    ends = [at + len(mark) for mark in (b"\r\n\r\n", b"\n\n") if (at := raw.find(mark)) >= 0]
    return min(ends, default=None)


def _remaining_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
