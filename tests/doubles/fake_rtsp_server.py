"""An RTSP server in a thread with features that ready-made ones lack: digest logins, UDP, MJPEG, bad packets.

with FakeRtspServer("libx265", login=("user", "secret")) as server:
    uri = server.uri("user:secret@")        # 25 numbered pictures per second for 8 s, to each client

FFmpeg makes the RTP packets; this file implements RTSP and the transports.
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
DIGEST_CHALLENGE = f'Digest realm="{_REALM}", nonce="{_NONCE}"'
"""The challenge of the server."""

_RTCP = range(72, 77)
"""The second byte of a control packet, without its first bit."""

_SDP_MEDIA = {
    "libx264": ("96", "a=rtpmap:96 H264/90000\r\n"),
    "libx265": ("96", "a=rtpmap:96 H265/90000\r\n"),
    "mjpeg": ("26", ""),
    "h263p": ("96", "a=rtpmap:96 H263-1998/90000\r\n"),
}
_OPTIONS = {
    "libx264": {"tune": "zerolatency", "g": "5"},
    "libx265": {"preset": "ultrafast", "tune": "zerolatency", "x265-params": "log-level=none:keyint=5"},
    "mjpeg": {},
    "h263p": {"g": "5"},
}

Headers = dict[str, str]
Send = Callable[[bool, bytes], None]
"""(whether it is control, packet)"""


class FakeRtspServer:
    """An RTSP server with one numbered clip.

    `login`: a digest login is required. `udp_only`: packets over TCP are refused. `single_client`: a second
    client waits until the first one has gone. Answers come after `reply_delay_s`. `redirects` maps a path
    to the target of a redirect, with `status`; a test fills it once the address of the server is known. While
    the event `corrupted` is set, the packets have no usable content.
    """

    def __init__(
        self,
        codec: str = "libx264",
        *,
        login: tuple[str, str] | None = None,
        udp_only: bool = False,
        host: str = "127.0.0.1",
        single_client: bool = False,
        status: str = "302 Moved",
        reply_delay_s: float = 0.0,
    ) -> None:
        self.status, self.reply_delay_s = status, reply_delay_s
        self.redirects: dict[str, str] = {}
        self.asked: list[tuple[str, str, Headers]] = []
        """Method, path and headers of each request."""
        self.connections = 0
        self.codec, self.login, self.udp_only = codec, login, udp_only
        self.corrupted = threading.Event()
        self.transports: list[str] = []
        """The transport of each SETUP: ``tcp`` or ``udp``."""
        self.ended = threading.Event()
        self.packets = _packetise(codec)
        server = self

        class ClientConnection(_ClientConnection):
            rtsp_server = server

        self._server: socketserver.TCPServer
        if single_client:
            self._server = socketserver.TCPServer((host, 0), ClientConnection)
        else:
            threading_server = socketserver.ThreadingTCPServer((host, 0), ClientConnection)
            threading_server.daemon_threads = True
            self._server = threading_server
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FakeRtspServer":
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


class _ClientConnection(socketserver.BaseRequestHandler):
    """One client's connection."""

    rtsp_server: FakeRtspServer

    def handle(self) -> None:
        """Answer what is asked until the client hangs up."""
        self._sending = threading.Lock()
        self._send: Send | None = None
        self._gone = threading.Event()
        data = b""
        self.rtsp_server.connections += 1
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as self._udp_socket:
            while not self.rtsp_server.ended.is_set():
                chunk = self.request.recv(4096)
                if not chunk:
                    break
                data += chunk
                while (found := _request(data)) is not None:
                    method, uri, headers, data = found
                    self._answer(method, uri, headers)
        self._gone.set()

    def _answer(self, method: str, uri: str, headers: Headers) -> None:
        server = self.rtsp_server
        path = urlsplit(uri).path
        server.asked.append((method, path, headers))
        server.ended.wait(server.reply_delay_s)
        if method != "OPTIONS" and not self._is_authenticated(method, headers):
            self._reply(headers, {"WWW-Authenticate": DIGEST_CHALLENGE}, status="401 Unauthorized")
        elif method == "DESCRIBE" and path in server.redirects:
            self._reply(headers, {"Location": server.redirects[path]}, status=server.status)
        elif method == "DESCRIBE":
            self._reply(
                headers, {"Content-Type": "application/sdp", "Content-Base": f"{uri}/"}, _sdp(server.codec)
            )
        elif method == "SETUP" and server.udp_only and "interleaved" in headers["transport"]:
            self._reply(headers, {}, status="461 Unsupported Transport")
        elif method == "SETUP":
            self._reply(headers, {"Transport": self._set_up(headers["transport"]), "Session": "1"})
        elif method == "PLAY":
            self._reply(headers, {"Session": "1"})
            threading.Thread(target=self._play, daemon=True).start()
        else:
            self._reply(headers, {"Public": "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN", "Session": "1"})

    def _is_authenticated(self, method: str, headers: Headers) -> bool:
        login = self.rtsp_server.login
        return login is None or digest_is_valid(method, headers.get("authorization", ""), *login)

    def _reply(self, asked: Headers, more: Headers, body: str = "", status: str = "200 OK") -> None:
        headers = {"CSeq": asked["cseq"], **more, "Content-Length": str(len(body))}
        lines = [f"RTSP/1.0 {status}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
        with self._sending:
            self.request.sendall("\r\n".join(lines).encode())

    def _set_up(self, transport: str) -> str:
        ports = re.search(r"client_port=(\d+)-(\d+)", transport)
        if ports is None:
            self.rtsp_server.transports.append("tcp")
            self._send = self._send_tcp
            return "RTP/AVP/TCP;unicast;interleaved=0-1"
        self.rtsp_server.transports.append("udp")
        self._udp_socket.bind(("127.0.0.1", 0))
        self._send = lambda control, data: self._send_udp(int(ports[2 if control else 1]), data)
        port = self._udp_socket.getsockname()[1]
        return f"RTP/AVP;unicast;client_port={ports[1]}-{ports[2]};server_port={port}-{port + 1}"

    def _send_tcp(self, control: bool, data: bytes) -> None:
        with self._sending:
            self.request.sendall(b"$" + bytes([int(control)]) + len(data).to_bytes(2, "big") + data)

    def _send_udp(self, port: int, data: bytes) -> None:
        self._udp_socket.sendto(data, ("127.0.0.1", port))

    def _play(self) -> None:
        assert self._send is not None
        with suppress(OSError):
            for packets in self.rtsp_server.packets:
                for packet in packets:
                    control = packet[1] & 0x7F in _RTCP
                    empty = self.rtsp_server.corrupted.is_set() and not control
                    self._send(control, _corrupt(packet) if empty else packet)
                if self._gone.wait(1 / FPS) or self.rtsp_server.ended.is_set():
                    return


def _corrupt(packet: bytes) -> bytes:
    """A packet of the same length with an empty H.264 slice."""
    return packet[:12] + b"\x01" + bytes(len(packet) - 13)


def _request(data: bytes) -> tuple[str, str, Headers, bytes] | None:
    """Method, address, headers (lower-case names) and the rest of the data; control packets are skipped."""
    while data[:1] == b"$" and len(data) >= 4:
        data = data[4 + int.from_bytes(data[2:4], "big") :]
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.decode().split("\r\n")
    method, uri, _ = first.split(" ", 2)
    return method, uri, {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, rest


def digest_is_valid(method: str, authorization: str, user: str, password: str) -> bool:
    """Whether the answer to `DIGEST_CHALLENGE` is correct (RFC 2617)."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', authorization))

    def digest(*words: str) -> str:
        return hashlib.md5(":".join(words).encode()).hexdigest()  # noqa: S324 - the protocol's own

    expected = digest(digest(user, _REALM, password), _NONCE, digest(method, fields.get("uri", "")))
    return (fields.get("username"), fields.get("nonce"), fields.get("response")) == (user, _NONCE, expected)


def _sdp(codec: str) -> str:
    number, more = _SDP_MEDIA[codec]
    return (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=cam\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
        f"m=video 0 RTP/AVP {number}\r\n{more}a=control:track1\r\n"
    )


class _PacketCollector:
    """Collects the packets that FFmpeg's RTP muxer writes."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.waiting.append(bytes(data))
        return len(data)

    def take(self) -> list[bytes]:
        packets, self.waiting = self.waiting, []
        return packets


def _packetise(codec: str) -> list[list[bytes]]:
    """The RTP packets of each numbered picture."""
    av: Any = pytest.importorskip("av")
    written, packets = _PacketCollector(), []
    with av.open(written, "w", format="rtp", options={"packetsize": "1200"}) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.options = _OPTIONS[codec]
        stream.width, stream.height = 160, 120
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(_PICTURES):
            container.mux(_encode(av, stream, numbered_picture(number), number))
            packets.append(written.take())
    return packets


def _encode(av: Any, stream: Any, picture: Picture, number: int) -> Any:
    if stream.codec_context.name != "mjpeg":
        return stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24"))
    # RTP omits the tables of a JPEG, so they must be the standard ones; FFmpeg's encoder uses others.
    packet = av.Packet(cv2.imencode(".jpg", picture)[1].tobytes())
    packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, FPS)
    packet.is_keyframe = True
    return packet
