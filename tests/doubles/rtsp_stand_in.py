"""An RTSP server in a thread, for what ready-made ones lack: digest logins, UDP, MJPEG, and rubbish.

with RtspStandIn("libx265", login=("user", "secret")) as server:
    uri = server.uri("user:secret@")        # 25 numbered pictures per second for 8 s, to each client

FFmpeg packs the pictures for RTP; what is sent over which transport is written here.
"""

import hashlib
import re
import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import cv2
import pytest

from clips import numbered_picture
from visionedge.frames.types import Picture

FPS = 25
_PICTURES = 8 * FPS
_NONCE, _REALM = "5eed", "cam"
DIGEST_ASKED = f'Digest realm="{_REALM}", nonce="{_NONCE}"'
"""What a server says that wants a digest."""

_RTCP = range(72, 77)
"""What the second byte of a control packet is, without its first bit."""

_SDP_MEDIA = {
    "libx264": ("96", "a=rtpmap:96 H264/90000\r\n"),
    "libx265": ("96", "a=rtpmap:96 H265/90000\r\n"),
    "mjpeg": ("26", ""),
}
_OPTIONS = {
    "libx264": {"tune": "zerolatency", "g": "5"},
    "libx265": {"preset": "ultrafast", "tune": "zerolatency", "x265-params": "log-level=none:keyint=5"},
    "mjpeg": {},
}

Headers = dict[str, str]
Send = Callable[[bool, bytes], None]
"""(whether it is control, packet)"""


class RtspStandIn:
    """`login` is demanded as a digest; while `rubbish` is set there is nothing in the packets.

    `udp_only`: whoever wants packets over TCP is refused. `one_visitor`: who comes while another client is
    connected waits until that one has gone. Each answer comes after `late_s`. `moved` says for a path where
    it redirects to, with `status`; a test fills it once the server's own address is known.
    """

    def __init__(
        self,
        codec: str = "libx264",
        *,
        login: tuple[str, str] | None = None,
        udp_only: bool = False,
        host: str = "127.0.0.1",
        one_visitor: bool = False,
        status: str = "302 Moved",
        late_s: float = 0.0,
    ) -> None:
        self.status, self.late_s = status, late_s
        self.moved: dict[str, str] = {}
        self.asked: list[tuple[str, str, Headers]] = []
        """Method, path and headers of each request."""
        self.visits = 0
        self.codec, self.login, self.udp_only = codec, login, udp_only
        self.rubbish = threading.Event()
        self.transports: list[str] = []
        """How each client that was set up wanted its packets: ``tcp`` or ``udp``."""
        self.ended = threading.Event()
        self.packets = _packed(codec)
        stand_in = self

        class Visit(_Visit):
            server_side = stand_in

        self._server: socketserver.TCPServer
        if one_visitor:
            self._server = socketserver.TCPServer((host, 0), Visit)
        else:
            threading_server = socketserver.ThreadingTCPServer((host, 0), Visit)
            threading_server.daemon_threads = True
            self._server = threading_server
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "RtspStandIn":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def uri(self, login: str = "", path: str = "/cam") -> str:
        """The address, with ``user:password@`` where given."""
        host, port = self._server.server_address[:2]
        return f"rtsp://{login}{host!s}:{port}{path}"


class _Visit(socketserver.BaseRequestHandler):
    """One client's connection."""

    server_side: RtspStandIn

    def handle(self) -> None:
        """Answer what is asked until the client hangs up."""
        self._sending = threading.Lock()
        self._send: Send | None = None
        self._gone = threading.Event()
        data = b""
        self.server_side.visits += 1
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as self._line:
            while not self.server_side.ended.is_set():
                chunk = self.request.recv(4096)
                if not chunk:
                    break
                data += chunk
                while (found := _request(data)) is not None:
                    method, uri, headers, data = found
                    self._answer(method, uri, headers)
        self._gone.set()

    def _answer(self, method: str, uri: str, headers: Headers) -> None:
        side = self.server_side
        path = urlsplit(uri).path
        side.asked.append((method, path, headers))
        side.ended.wait(side.late_s)
        if method != "OPTIONS" and not self._admits(method, headers):
            self._reply(headers, {"WWW-Authenticate": DIGEST_ASKED}, status="401 Unauthorized")
        elif method == "DESCRIBE" and path in side.moved:
            self._reply(headers, {"Location": side.moved[path]}, status=side.status)
        elif method == "DESCRIBE":
            self._reply(
                headers, {"Content-Type": "application/sdp", "Content-Base": f"{uri}/"}, _sdp(side.codec)
            )
        elif method == "SETUP" and side.udp_only and "interleaved" in headers["transport"]:
            self._reply(headers, {}, status="461 Unsupported Transport")
        elif method == "SETUP":
            self._reply(headers, {"Transport": self._set_up(headers["transport"]), "Session": "1"})
        elif method == "PLAY":
            self._reply(headers, {"Session": "1"})
            threading.Thread(target=self._play, daemon=True).start()
        else:
            self._reply(headers, {"Public": "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN", "Session": "1"})

    def _admits(self, method: str, headers: Headers) -> bool:
        login = self.server_side.login
        return login is None or digest_shown(method, headers.get("authorization", ""), *login)

    def _reply(self, asked: Headers, more: Headers, body: str = "", status: str = "200 OK") -> None:
        headers = {"CSeq": asked["cseq"], **more, "Content-Length": str(len(body))}
        lines = [f"RTSP/1.0 {status}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
        with self._sending:
            self.request.sendall("\r\n".join(lines).encode())

    def _set_up(self, transport: str) -> str:
        ports = re.search(r"client_port=(\d+)-(\d+)", transport)
        if ports is None:
            self.server_side.transports.append("tcp")
            self._send = self._interleaved
            return "RTP/AVP/TCP;unicast;interleaved=0-1"
        self.server_side.transports.append("udp")
        self._line.bind(("127.0.0.1", 0))
        self._send = lambda control, data: self._to(int(ports[2 if control else 1]), data)
        port = self._line.getsockname()[1]
        return f"RTP/AVP;unicast;client_port={ports[1]}-{ports[2]};server_port={port}-{port + 1}"

    def _interleaved(self, control: bool, data: bytes) -> None:
        with self._sending:
            self.request.sendall(b"$" + bytes([int(control)]) + len(data).to_bytes(2, "big") + data)

    def _to(self, port: int, data: bytes) -> None:
        self._line.sendto(data, ("127.0.0.1", port))

    def _play(self) -> None:
        assert self._send is not None
        with suppress(OSError):
            for packets in self.server_side.packets:
                for packet in packets:
                    control = packet[1] & 0x7F in _RTCP
                    empty = self.server_side.rubbish.is_set() and not control
                    self._send(control, _emptied(packet) if empty else packet)
                if self._gone.wait(1 / FPS) or self.server_side.ended.is_set():
                    return


def _emptied(packet: bytes) -> bytes:
    """A packet as long, of an H.264 slice that says nothing."""
    return packet[:12] + b"\x01" + bytes(len(packet) - 13)


def _request(data: bytes) -> tuple[str, str, Headers, bytes] | None:
    """Method, address, headers (lower-case names) and what comes after; control packets are skipped."""
    while data[:1] == b"$" and len(data) >= 4:
        data = data[4 + int.from_bytes(data[2:4], "big") :]
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.decode().split("\r\n")
    method, uri, _ = first.split(" ", 2)
    return method, uri, {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, rest


def digest_shown(method: str, authorization: str, user: str, password: str) -> bool:
    """Whether the answer to `DIGEST_ASKED` is right, as RFC 2617 has it."""
    said = dict(re.findall(r'(\w+)="([^"]*)"', authorization))

    def digest(*words: str) -> str:
        return hashlib.md5(":".join(words).encode()).hexdigest()  # noqa: S324 - the protocol's own

    expected = digest(digest(user, _REALM, password), _NONCE, digest(method, said.get("uri", "")))
    return (said.get("username"), said.get("nonce"), said.get("response")) == (user, _NONCE, expected)


def _sdp(codec: str) -> str:
    number, more = _SDP_MEDIA[codec]
    return (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=cam\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
        f"m=video 0 RTP/AVP {number}\r\n{more}a=control:track1\r\n"
    )


class _Packets:
    """What FFmpeg's RTP muxer writes to: a packet each time."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.waiting.append(bytes(data))
        return len(data)

    def taken(self) -> list[bytes]:
        packets, self.waiting = self.waiting, []
        return packets


def _packed(codec: str) -> list[list[bytes]]:
    """The RTP packets of each numbered picture."""
    av: Any = pytest.importorskip("av")
    written, packets = _Packets(), []
    with av.open(written, "w", format="rtp", options={"packetsize": "1200"}) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.options = _OPTIONS[codec]
        stream.width, stream.height = 160, 120
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(_PICTURES):
            container.mux(_coded(av, stream, numbered_picture(number), number))
            packets.append(written.taken())
    return packets


def _coded(av: Any, stream: Any, picture: Picture, number: int) -> Any:
    if stream.codec_context.name != "mjpeg":
        return stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24"))
    # RTP leaves the tables of a JPEG out, so they have to be the usual ones, which FFmpeg's encoder has not.
    packet = av.Packet(cv2.imencode(".jpg", picture)[1].tobytes())
    packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, FPS)
    packet.is_keyframe = True
    return packet
