"""A small RTSP client: asks a camera for redirects before it is opened, and for the reason of a refusal.

A decoder follows redirects to any host, and does not report why it could not open a camera.
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
    """The answer to the last step: its status, the challenges, and whether the login was accepted.

    `media`: the camera described a video. `location`: the address of a redirect.
    """

    step: RtspStep
    status: int
    challenges: list[Challenge] = field(default_factory=list)
    login_accepted: bool = False
    media: bool = True
    location: str = ""


class NoRtspReplyError(Exception):
    """The server closed the connection (`reply` is empty), or answered something that is not RTSP."""

    def __init__(self, reply: bytes) -> None:
        super().__init__("no RTSP answer")
        self.reply = reply


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: list[tuple[str, str]]
    body: str

    def get_all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


def probe_rtsp(target: str, timeout_s: float, transport: str, certificates: str | None = None) -> RtspResult:
    """Send DESCRIBE, SETUP and PLAY; return the answer to the first refused step, or to the last one.

    Raises:
        OSError: no connection.
        NoRtspReplyError: no RTSP answer.
    """
    parts = urlsplit(target)
    connection = connect(parts, timeout_s, tls=parts.scheme.lower() == "rtsps", certificates=certificates)
    with connection:
        return _RtspSession(connection, parts, timeout_s, time.monotonic() + 3 * timeout_s).play_through(
            transport
        )


def send_describe(connection: socket.socket, parts: SplitResult, deadline_s: float) -> RtspResult:
    """Send DESCRIBE and return the answer, with any status; the login is sent if the camera asks for it.

    Raises:
        OSError: the connection broke, or (TimeoutError) no complete answer came before `deadline_s`.
        NoRtspReplyError: no RTSP answer.
    """
    return _RtspSession(connection, parts, deadline_s - time.monotonic(), deadline_s).describe_reply()


class _RtspSession:
    """One RTSP session; ends before `deadline_s`, and each read waits for `wait_s` at most."""

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
        base = next(iter(describe_reply.get_all("content-base")), self._url)
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
        session = next(iter(set_up.get_all("session")), "").partition(";")[0]
        return self._refusal("PLAY", self._request("PLAY", self._url, {"Session": session}).status)

    def describe_reply(self) -> RtspResult:
        reply = self._describe()
        where = next(iter(reply.get_all("location")), "")
        media = _video_control(reply.body) is not None
        return self._refusal("DESCRIBE", reply.status, media=media, location=where)

    def _describe(self) -> _Reply:
        reply = self._request("DESCRIBE", self._url, {"Accept": "application/sdp"})
        if reply.status == 401:
            self._challenges = parse_challenges(reply.get_all("www-authenticate"))
            reply = self._retry_with_login(reply)
        return reply

    def _retry_with_login(self, describe_reply: _Reply) -> _Reply:
        """Try the login with each challenge, as some cameras accept only one of theirs."""
        # A server that also offers digest never gets the password in clear.
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
        # The connection ends after a redirect, so its body is not read.
        bare = words[1].startswith(b"3") or not re.fullmatch(r"[0-9]{1,15}", length)
        body = self._read_bytes(0 if bare else min(int(length), _MAX_BODY_BYTES))
        return _Reply(int(words[1]), headers, body.decode("latin-1"))

    def _read_line(self) -> bytes:
        """Return the next line, or a part of it if the connection ended or the line is too long."""
        while (size := self._received.find(b"\n") + 1) == 0 and len(self._received) < _MAX_LINE_BYTES:
            if not self._receive_more():
                break
        return self._read_bytes(size or min(len(self._received), _MAX_LINE_BYTES))

    def _read_bytes(self, size: int) -> bytes:
        """Return `size` bytes, or fewer if the connection ended."""
        while len(self._received) < size and self._receive_more():
            pass
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _receive_more(self) -> bool:
        """Wait for more data; False if the connection has ended."""
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
    """Return the control address of the first video in a description; None without a video."""
    media = re.search(r"^m=video\b.*?(?=^m=|\Z)", sdp, re.MULTILINE | re.DOTALL)
    if media is None:
        return None
    control = re.search(r"^a=control:\s*(\S+)", media[0], re.MULTILINE)
    return control[1] if control else ""
