"""Asks an RTSP camera step by step what it refuses, after a decoder could not open it and did not say why."""

import re
import time
from dataclasses import dataclass, field
from io import BufferedRWPair
from typing import Literal
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from visionedge.capture.connecting import connect
from visionedge.capture.http_login import Challenge, Login, challenges_in

_BODY_MOST_BYTES = 65536
_LINES_MOST = 64

Step = Literal["DESCRIBE", "SETUP", "PLAY"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The last answer: of which step, its status, what login was asked for, and whether ours was right.

    `media` says whether the camera described a video at all.
    """

    step: Step
    status: int
    challenges: list[Challenge] = field(default_factory=list)
    login_right: bool = False
    media: bool = True


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
    with connection, connection.makefile("rwb") as stream:
        return _Talk(stream, parts, time.monotonic() + 3 * timeout_s).through(transport)


class _Talk:
    """One conversation, over before `deadline_s`."""

    def __init__(self, stream: BufferedRWPair, parts: SplitResult, deadline_s: float) -> None:
        self._stream, self._deadline_s = stream, deadline_s
        host = parts.netloc.rpartition("@")[2]
        self._url = parts._replace(scheme=parts.scheme.lower(), netloc=host, fragment="").geturl()
        user = parts.username
        self._login = None if user is None else Login(unquote(user), unquote(parts.password or ""))
        self._tls = parts.scheme.lower() == "rtsps"
        self._challenges: list[Challenge] = []
        self._shown = False
        self._number = 0

    def through(self, transport: str) -> Refusal:
        described = self._request("DESCRIBE", self._url, {"Accept": "application/sdp"})
        if described.status == 401:
            self._challenges = challenges_in(described.all("www-authenticate"))
            described = self._logged_in(described)
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

    def _refusal(self, step: Step, status: int, *, media: bool = True) -> Refusal:
        return Refusal(step, status, self._challenges, self._shown and status != 401, media)

    def _request(self, method: str, url: str, headers: dict[str, str]) -> _Reply:
        self._number += 1
        lines = [f"{method} {url} RTSP/1.0", f"CSeq: {self._number}", "User-Agent: visionedge"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self._shown and self._login is not None:
            lines.append(f"Authorization: {self._login.header(method, url)}")
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a line break in the address")
        self._stream.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace"))
        self._stream.flush()
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
        size = min(int(length), _BODY_MOST_BYTES) if re.fullmatch(r"[0-9]{1,15}", length) else 0
        return _Reply(int(words[1]), headers, self._stream.read(size).decode("latin-1"))

    def _line(self) -> bytes:
        if time.monotonic() > self._deadline_s:
            raise TimeoutError
        return self._stream.readline(4096)


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
