"""Asks an RTSP camera ourselves: where it redirects to before a decoder opens it, and what it refuses.

A decoder follows redirects to any host, and does not say why it could not open a camera.
"""

import re
import socket
import time
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from visionedge.camera.sources.network import Challenge, Login, challenges_in, connect

_BODY_MOST_BYTES = 65536
_LINE_MOST_BYTES = 4096
_LINES_MOST = 64

Step = Literal["DESCRIBE", "SETUP", "PLAY"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The last answer: of which step, its status, what login was asked for, and whether ours was right.

    `media` says whether the camera described a video at all, `location` where it redirects to.
    """

    step: Step
    status: int
    challenges: list[Challenge] = field(default_factory=list)
    login_right: bool = False
    media: bool = True
    location: str = ""


class SilentError(Exception):
    """The server hung up, or said what is not RTSP (`words`)."""

    def __init__(self, words: bytes) -> None:
        super().__init__("no RTSP answer")
        self.words = words


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: list[tuple[str, str]]
    body: str

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


def ask(target: str, timeout_s: float, transport: str, certificates: str | None = None) -> Refusal:
    """Describe, set up and play; the first step that is refused, or the last.

    Raises:
        OSError: no connection.
        SilentError: no RTSP answer.
    """
    parts = urlsplit(target)
    connection = connect(parts, timeout_s, tls=parts.scheme.lower() == "rtsps", certificates=certificates)
    with connection:
        return _Talk(connection, parts, timeout_s, time.monotonic() + 3 * timeout_s).through(transport)


def describe(connection: socket.socket, parts: SplitResult, deadline_s: float) -> Refusal:
    """The answer to DESCRIBE alone, whatever its status, with the login of the address where it is asked for.

    Raises:
        OSError: the connection broke, or (TimeoutError) no whole answer came before `deadline_s`.
        SilentError: no RTSP answer.
    """
    return _Talk(connection, parts, deadline_s - time.monotonic(), deadline_s).described()


class _Talk:
    """One conversation, over before `deadline_s`; each wait takes `wait_s` at most."""

    def __init__(
        self, connection: socket.socket, parts: SplitResult, wait_s: float, deadline_s: float
    ) -> None:
        self._connection, self._wait_s, self._deadline_s = connection, wait_s, deadline_s
        self._came = bytearray()
        host = parts.netloc.rpartition("@")[2]
        self._url = parts._replace(scheme=parts.scheme.lower(), netloc=host, fragment="").geturl()
        user = parts.username
        self._login = None if user is None else Login(unquote(user), unquote(parts.password or ""))
        self._tls = parts.scheme.lower() == "rtsps"
        self._challenges: list[Challenge] = []
        self._shown = False
        self._number = 0

    def through(self, transport: str) -> Refusal:
        described = self._describe()
        control = _video_control(described.body)
        if described.status != 200 or control is None:
            return self._refusal("DESCRIBE", described.status, media=control is not None)
        base = next(iter(described.all("content-base")), self._url)
        track = (
            control
            if control.startswith("rtsp")
            else urljoin(base if base.endswith("/") else f"{base}/", control)
        )
        set_up = self._request(
            "SETUP", track, {"Transport": _TRANSPORTS["udp" if transport == "udp" else "tcp"]}
        )
        if set_up.status == 461 and transport == "auto":
            set_up = self._request("SETUP", track, {"Transport": _TRANSPORTS["udp"]})
        if set_up.status != 200:
            return self._refusal("SETUP", set_up.status)
        session = next(iter(set_up.all("session")), "").partition(";")[0]
        return self._refusal("PLAY", self._request("PLAY", self._url, {"Session": session}).status)

    def described(self) -> Refusal:
        reply = self._describe()
        where = next(iter(reply.all("location")), "")
        media = _video_control(reply.body) is not None
        return self._refusal("DESCRIBE", reply.status, media=media, location=where)

    def _describe(self) -> _Reply:
        reply = self._request("DESCRIBE", self._url, {"Accept": "application/sdp"})
        if reply.status == 401:
            self._challenges = challenges_in(reply.all("www-authenticate"))
            reply = self._logged_in(reply)
        return reply

    def _logged_in(self, described: _Reply) -> _Reply:
        """The answer to our login; each challenge is tried, as some cameras satisfy only one of theirs."""
        # A server that offers a digest as well is never sent the password itself.
        basic = all(challenge.scheme != "digest" for challenge in self._challenges)
        for challenge in self._challenges:
            if self._login is not None and self._login.accept([challenge], basic=basic):
                self._shown = True
                described = self._request("DESCRIBE", self._url, {"Accept": "application/sdp"})
                if described.status != 401:
                    break
        return described

    def _refusal(self, step: Step, status: int, *, media: bool = True, location: str = "") -> Refusal:
        return Refusal(step, status, self._challenges, self._shown and status != 401, media, location)

    def _request(self, method: str, url: str, headers: dict[str, str]) -> _Reply:
        self._number += 1
        lines = [f"{method} {url} RTSP/1.0", f"CSeq: {self._number}", "User-Agent: visionedge"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self._shown and self._login is not None:
            lines.append(f"Authorization: {self._login.header(method, url)}")
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a line break in the address")
        self._connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1", "replace"))
        return self._reply()

    def _reply(self) -> _Reply:
        first = self._line()
        words = first.split()
        if len(words) < 2 or not words[0].startswith(b"RTSP/") or not re.fullmatch(rb"[0-9]{3}", words[1]):
            raise SilentError(first[:16])
        headers: list[tuple[str, str]] = []
        for _ in range(_LINES_MOST):
            line = self._line().decode("latin-1").strip()
            if not line:
                break
            name, _, value = line.partition(":")
            headers.append((name.strip().lower(), value.strip()))
        length = next((value for name, value in headers if name == "content-length"), "0")
        # Nothing follows a redirect on this connection, so its body need not be waited for.
        bare = words[1].startswith(b"3") or not re.fullmatch(r"[0-9]{1,15}", length)
        body = self._taken(0 if bare else min(int(length), _BODY_MOST_BYTES))
        return _Reply(int(words[1]), headers, body.decode("latin-1"))

    def _line(self) -> bytes:
        """The next line with its end, or what came of it: before the connection ended, or of a long one."""
        while (size := self._came.find(b"\n") + 1) == 0 and len(self._came) < _LINE_MOST_BYTES:
            if not self._comes_more():
                break
        return self._taken(size or min(len(self._came), _LINE_MOST_BYTES))

    def _taken(self, size: int) -> bytes:
        """So many bytes, or fewer where the connection ended."""
        while len(self._came) < size and self._comes_more():
            pass
        taken = bytes(self._came[:size])
        del self._came[:size]
        return taken

    def _comes_more(self) -> bool:
        """Wait for more; False where the connection has ended."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(min(self._wait_s, left_s))
        chunk = self._connection.recv(4096)
        self._came += chunk
        return chunk != b""


_TRANSPORTS = {
    "tcp": "RTP/AVP/TCP;unicast;interleaved=0-1",
    "udp": "RTP/AVP;unicast;client_port=50000-50001",
}


def _video_control(sdp: str) -> str | None:
    """The address of the first video in a description; None where there is no video."""
    media = re.search(r"^m=video\b.*?(?=^m=|\Z)", sdp, re.MULTILINE | re.DOTALL)
    if media is None:
        return None
    control = re.search(r"^a=control:\s*(\S+)", media[0], re.MULTILINE)
    return control[1] if control else ""
