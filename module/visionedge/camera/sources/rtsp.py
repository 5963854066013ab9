"""Asks an RTSP camera ourselves: where it redirects to before a decoder opens it, and what it refuses.

A decoder follows redirects to any host, and does not say why it could not open a camera.
"""

import re
import socket
import time
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from visionedge.camera.sources.network import Challenge, HttpLogin, connect, parse_challenges

_MAX_BODY_BYTES = 65536
_MAX_LINE_BYTES = 4096
_MAX_LINES = 64

RtspStep = Literal["DESCRIBE", "SETUP", "PLAY"]


@dataclass(frozen=True, slots=True)
class RtspResult:
    """The last answer: of which step, its status, what login was asked for, and whether ours was right.

    `media` says whether the camera described a video at all, `location` where it redirects to.
    """

    step: RtspStep
    status: int
    challenges: list[Challenge] = field(default_factory=list)
    login_accepted: bool = False
    media: bool = True
    location: str = ""


class NoRtspReplyError(Exception):
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


def probe_rtsp(target: str, timeout_s: float, transport: str, certificates: str | None = None) -> RtspResult:
    """Describe, set up and play; the first step that is refused, or the last.

    Raises:
        OSError: no connection.
        SilentError: no RTSP answer.
    """
    parts = urlsplit(target)
    connection = connect(parts, timeout_s, tls=parts.scheme.lower() == "rtsps", certificates=certificates)
    with connection:
        return _RtspSession(connection, parts, timeout_s, time.monotonic() + 3 * timeout_s).play_through(
            transport
        )


def send_describe(connection: socket.socket, parts: SplitResult, deadline_s: float) -> RtspResult:
    """The answer to DESCRIBE alone, whatever its status, with the login of the address where it is asked for.

    Raises:
        OSError: the connection broke, or (TimeoutError) no whole answer came before `deadline_s`.
        SilentError: no RTSP answer.
    """
    return _RtspSession(connection, parts, deadline_s - time.monotonic(), deadline_s).describe_reply()


class _RtspSession:
    """One conversation, over before `deadline_s`; each wait takes `wait_s` at most."""

    def __init__(
        self, connection: socket.socket, parts: SplitResult, wait_s: float, deadline_s: float
    ) -> None:
        self._connection, self._wait_s, self._deadline_s = connection, wait_s, deadline_s
        self._received = bytearray()
        host = parts.netloc.rpartition("@")[2]
        self._url = parts._replace(scheme=parts.scheme.lower(), netloc=host, fragment="").geturl()
        user = parts.username
        self._login = None if user is None else HttpLogin(unquote(user), unquote(parts.password or ""))
        self._tls = parts.scheme.lower() == "rtsps"
        self._challenges: list[Challenge] = []
        self._login_sent = False
        self._cseq = 0

    def play_through(self, transport: str) -> RtspResult:
        describe_reply = self._describe()
        control = _video_control(describe_reply.body)
        if describe_reply.status != 200 or control is None:
            return self._refusal("DESCRIBE", describe_reply.status, media=control is not None)
        base = next(iter(describe_reply.all("content-base")), self._url)
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

    def describe_reply(self) -> RtspResult:
        reply = self._describe()
        where = next(iter(reply.all("location")), "")
        media = _video_control(reply.body) is not None
        return self._refusal("DESCRIBE", reply.status, media=media, location=where)

    def _describe(self) -> _Reply:
        reply = self._request("DESCRIBE", self._url, {"Accept": "application/sdp"})
        if reply.status == 401:
            self._challenges = parse_challenges(reply.all("www-authenticate"))
            reply = self._retry_with_login(reply)
        return reply

    def _retry_with_login(self, describe_reply: _Reply) -> _Reply:
        """The answer to our login; each challenge is tried, as some cameras satisfy only one of theirs."""
        # A server that offers a digest as well is never sent the password itself.
        basic = all(challenge.scheme != "digest" for challenge in self._challenges)
        for challenge in self._challenges:
            if self._login is not None and self._login.accept([challenge], basic=basic):
                self._login_sent = True
                describe_reply = self._request("DESCRIBE", self._url, {"Accept": "application/sdp"})
                if describe_reply.status != 401:
                    break
        return describe_reply

    def _refusal(self, step: RtspStep, status: int, *, media: bool = True, location: str = "") -> RtspResult:
        return RtspResult(step, status, self._challenges, self._login_sent and status != 401, media, location)

    def _request(self, method: str, url: str, headers: dict[str, str]) -> _Reply:
        self._cseq += 1
        lines = [f"{method} {url} RTSP/1.0", f"CSeq: {self._cseq}", "User-Agent: visionedge"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self._login_sent and self._login is not None:
            lines.append(f"Authorization: {self._login.header(method, url)}")
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a line break in the address")
        self._connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1", "replace"))
        return self._read_reply()

    def _read_reply(self) -> _Reply:
        first = self._read_line()
        words = first.split()
        if len(words) < 2 or not words[0].startswith(b"RTSP/") or not re.fullmatch(rb"[0-9]{3}", words[1]):
            raise NoRtspReplyError(first[:16])
        headers: list[tuple[str, str]] = []
        for _ in range(_MAX_LINES):
            line = self._read_line().decode("latin-1").strip()
            if not line:
                break
            name, _, value = line.partition(":")
            headers.append((name.strip().lower(), value.strip()))
        length = next((value for name, value in headers if name == "content-length"), "0")
        # Nothing follows a redirect on this connection, so its body need not be waited for.
        bare = words[1].startswith(b"3") or not re.fullmatch(r"[0-9]{1,15}", length)
        body = self._read_bytes(0 if bare else min(int(length), _MAX_BODY_BYTES))
        return _Reply(int(words[1]), headers, body.decode("latin-1"))

    def _read_line(self) -> bytes:
        """The next line with its end, or what came of it: before the connection ended, or of a long one."""
        while (size := self._received.find(b"\n") + 1) == 0 and len(self._received) < _MAX_LINE_BYTES:
            if not self._receive_more():
                break
        return self._read_bytes(size or min(len(self._received), _MAX_LINE_BYTES))

    def _read_bytes(self, size: int) -> bytes:
        """So many bytes, or fewer where the connection ended."""
        while len(self._received) < size and self._receive_more():
            pass
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _receive_more(self) -> bool:
        """Wait for more; False where the connection has ended."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(min(self._wait_s, left_s))
        chunk = self._connection.recv(4096)
        self._received += chunk
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
