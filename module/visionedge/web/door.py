"""The door: the newest frame for programs that ask for it again and again.

Such a program keeps its connection and sends the same bytes each time. Here they are looked up as a whole and
answered with bytes that were made once for a result: a fourth of what the application needs for it, and on a
busy machine what HTTP takes is taken from inference. Anything else goes to the application, with its
connection, and for good.
"""

import asyncio
import re
import socket
import time
from collections.abc import Callable
from email.utils import formatdate

from aiohttp import web

from visionedge.web.answers import Lock, RequestError, bears, error_answer, set_common_headers
from visionedge.web.api import Api

_QUESTION = re.compile(rb"GET (/api/v1/cameras/([a-z0-9-]{1,64})/frame) HTTP/1\.1\r\n((?:[^\r\n]+\r\n)*)\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e]*)")
_MEANS_MORE = frozenset(
    {b"connection", b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"trailer"}
)
"""With one of these a request is not over with its head, or its connection does not go on as it is."""

_MOST_BYTES = 4096
_MOST_KNOWN = 256


def question(head: bytes, token: bytes | None) -> str | None:
    """The camera whose newest frame these bytes ask for, and nothing more; None where they may mean more."""
    found = _QUESTION.fullmatch(head) if len(head) <= _MOST_BYTES else None
    if found is None:
        return None
    shown: list[bytes] = []
    for line in found[3].splitlines():
        header = _HEADER.fullmatch(line)
        if header is None:
            return None
        name = header[1].lower()
        if name in _MEANS_MORE and (name, header[2].strip().lower()) != (b"connection", b"keep-alive"):
            return None
        if name == b"authorization":
            shown.append(header[2])
    if token is not None and (len(shown) != 1 or not bears(shown[0].decode("ascii"), token)):
        return None
    return found[2].decode("ascii")


class Door:
    """Makes the protocol of each connection; `application` makes that of those that want more. Loop only."""

    def __init__(self, api: Api, lock: Lock, application: Callable[[], asyncio.Protocol]) -> None:
        self.application = application
        self.visitors: set[Visitor] = set()
        self._api = api
        self._lock = lock
        # Heads that were understood, each taken apart once; where this token is wanted they have shown it.
        self._token = lock.token
        self._known: dict[bytes, str] = {}
        # By camera, with the number of its frame: the result itself would hold its picture in memory.
        self._kept: dict[str, tuple[int, _Parts]] = {}
        self._date = (0, b"")

    def __repr__(self) -> str:
        return f"<Door visitors={len(self.visitors)} known={len(self._known)}>"

    def __call__(self) -> "Visitor":
        return Visitor(self)

    def answer(self, head: bytes) -> bytes | None:
        """The answer to these bytes; None where the application has to give it."""
        if self._token != self._lock.token:
            self._token = self._lock.token
            self._known.clear()
        camera = self._known.get(head)
        if camera is None:
            camera = question(head, self._token)
            if camera is None:
                return None
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[head] = camera
        start, body = self._parts(camera)
        return b"%s%s\r\n\r\n%s" % (start, self._now(), body)

    def close(self) -> None:
        """Hang up on all that are still at the door."""
        for visitor in tuple(self.visitors):
            visitor.leave()

    def _parts(self, camera: str) -> "_Parts":
        try:
            result = self._api.newest(camera)
        except RequestError as problem:
            return _parts_of(error_answer("", problem))
        kept = self._kept.get(camera)
        if kept is not None and kept[0] == result.frame.sequence:
            return kept[1]
        parts = _parts_of(self._api.framed(result))
        if len(self._kept) >= _MOST_KNOWN:
            self._kept.clear()
        self._kept[camera] = (result.frame.sequence, parts)
        return parts

    def _now(self) -> bytes:
        """The date of an answer, which changes once a second."""
        now_s = int(time.time())
        if now_s != self._date[0]:
            self._date = (now_s, formatdate(now_s, usegmt=True).encode("ascii"))
        return self._date[1]


_Parts = tuple[bytes, bytes]
"""An answer up to its date, and its body."""


def _parts_of(response: web.Response) -> _Parts:
    set_common_headers(response.headers)
    body = response.body
    assert isinstance(body, bytes)  # noqa: S101 - it is JSON, made here
    lines = [f"HTTP/1.1 {response.status} {response.reason}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    lines += [f"Content-Length: {len(body)}", "Date: "]
    return "\r\n".join(lines).encode("latin-1"), body


class Visitor(asyncio.Protocol):
    """A connection as long as it asks for newest frames and nothing else."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream it is one
        self._transport = transport
        self._door.visitors.add(self)
        # Nobody else would ever notice that the other machine is gone.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        transport = self._transport
        assert transport is not None  # noqa: S101 - data come after the connection
        answer = self._door.answer(data)
        if answer is not None:
            transport.write(answer)
            return
        self._door.visitors.discard(self)
        successor = self._door.application()
        transport.set_protocol(successor)
        successor.connection_made(transport)
        successor.data_received(data)

    def pause_writing(self) -> None:
        """It does not take its answers: it gets no more until it does."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It took them."""
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._door.visitors.discard(self)

    def leave(self) -> None:
        """Hang up; what was written still goes out."""
        if self._transport is not None:
            self._transport.close()
