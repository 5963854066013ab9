"""Why an RTSP camera did not open, in words that help: one line for each thing that cameras refuse."""

import hashlib
import re
import socket
import ssl
from collections.abc import Callable

import pytest
import trustme

from scripted_http import ScriptedServer, Serve, always, answer
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.runtime.redaction import redact

SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=c\r\nt=0 0\r\nm=audio 0 RTP/AVP 0\r\na=control:track0\r\n"
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:track1\r\n"
)
MD5 = 'Digest realm="cam", nonce="n", algorithm=MD5'
SHA256 = 'Digest realm="cam", nonce="n", algorithm=SHA-256'

Admits = Callable[[str], bool]
"""Whether a request with this head has the right login."""


def rtsp(
    statuses: dict[str, str] | None = None,
    *,
    sdp: str = SDP,
    asked: tuple[str, ...] = (),
    admits: Admits = lambda _head: True,
) -> Serve:
    """A camera that answers some methods with a status of their own, and describes one video."""

    def serve(_server: ScriptedServer, connection: socket.socket, head: str) -> None:
        method, number = head.split(maxsplit=1)[0], re.search(r"CSeq: *(\d+)", head)
        status, more, body = (statuses or {}).get(method, "200 OK"), "", ""
        if asked and method != "OPTIONS" and not admits(head):
            status = "401 Unauthorized"
            more = "".join(f"WWW-Authenticate: {challenge}\r\n" for challenge in asked)
        elif method == "DESCRIBE" and status == "200 OK":
            more, body = "Content-Type: application/sdp\r\n", sdp
        elif method == "SETUP":
            more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
        lines = f"RTSP/1.0 {status}\r\nCSeq: {number[1] if number else 0}\r\n{more}"
        connection.sendall(f"{lines}Content-Length: {len(body)}\r\n\r\n{body}".encode())

    return serve


def knows(hashed: str) -> Admits:
    """Lets in a client that answers with this hash for user:ge@heim."""

    def admits(head: str) -> bool:
        shown = head.partition("Authorization: Digest")[2].partition("\r\n")[0]
        said = dict(re.findall(r'(\w+)="?([^",]*)"?', shown))

        def digest(*words: str) -> str:
            return hashlib.new(hashed, ":".join(words).encode()).hexdigest()

        account = digest("user", "cam", "ge@heim")
        expected = digest(account, "n", digest(head.split(maxsplit=1)[0], said.get("uri", "")))
        return said.get("response") == expected and (hashed == "md5") == ("SHA" not in shown)

    return admits


def either(head: str) -> bool:
    return knows("md5")(head) or knows("sha256")(head)


def why(
    server: ScriptedServer, *, scheme: str = "rtsp", login: str = "", limits: SourceLimits | None = None
) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(parse_camera_uri(server.url("/cam", login, scheme)), limits)
    text = str(caught.value)
    assert "heim" not in text
    assert redact(text) == text, "a remedy that is masked is none"
    assert "\n" not in text
    return text


@pytest.mark.parametrize("library", ["auto", "opencv"])
@pytest.mark.parametrize(
    ("statuses", "reason"),
    [
        ({"SETUP": "461 Unsupported Transport"}, "(461); set transport: auto or udp"),
        ({"SETUP": "453 Not Enough Bandwidth"}, "too many viewers (453 to SETUP); close some"),
        ({"PLAY": "453 Not Enough Bandwidth"}, "too many viewers (453 to PLAY)"),
        ({"SETUP": "500 Oops"}, "the camera refuses SETUP (500 Internal Server Error)"),
        ({"PLAY": "455 Oops"}, "the camera refuses PLAY (455 Method Not Valid in This State)"),
        ({"DESCRIBE": "404 Oops"}, "not found on the server (404); check the path"),
        ({"DESCRIBE": "454 Oops"}, "the camera refuses DESCRIBE (454 Session Not Found)"),
        ({"OPTIONS": "501 Oops", "DESCRIBE": "503 Oops"}, "refuses DESCRIBE (503 Service Unavailable)"),
        ({"DESCRIBE": "302 Moved"}, "redirects to an invalid address; check the path"),
        ({"SETUP": "302 Moved"}, "redirects (302) to an address that does not open"),
    ],
)
def test_a_refusal_is_reported_with_its_status(
    statuses: dict[str, str], reason: str, library: DecoderLibrary
) -> None:
    with ScriptedServer(rtsp(statuses)) as server:
        assert reason in why(server, limits=SourceLimits(library=library))


def test_a_camera_that_refuses_udp_gets_the_advice_to_use_tcp() -> None:
    with ScriptedServer(rtsp({"SETUP": "461 Unsupported Transport"})) as server:
        assert "set transport: auto or tcp" in why(server, limits=SourceLimits(transport="udp"))


@pytest.mark.parametrize(
    ("asked", "admits", "login", "reason"),
    [
        ((MD5,), knows("md5"), "", "login required (401); write USER:PASSWORD@ before 127.0.0.1"),
        ((MD5,), knows("md5"), "user:wrong@", "login refused (401); check user name and password"),
        ((SHA256,), knows("sha256"), "user:wrong@", "login refused (401); check user name and password"),
        (
            (SHA256,),
            knows("sha256"),
            "user:ge%40heim@",
            "asks for SHA-256 (digest), and the decoder supports only MD5",
        ),
        ((MD5, SHA256), either, "user:ge%40heim@", "asks for MD5 and SHA-256 (digest)"),
        ((MD5, SHA256), knows("md5"), "user:ge%40heim@", "asks for MD5 and SHA-256 (digest)"),
        (("Bearer",), knows("md5"), "user:ge%40heim@", "unsupported kind of login (bearer)"),
    ],
)
def test_a_wrong_login_and_an_unsupported_login_are_distinguished(
    asked: tuple[str, ...], admits: Admits, login: str, reason: str
) -> None:
    with ScriptedServer(rtsp(asked=asked, admits=admits)) as server:
        assert reason in why(server, login=login)


def test_a_login_is_not_sent_before_it_is_requested() -> None:
    """Neither by the decoder nor by the question that follows."""
    with ScriptedServer(rtsp({"SETUP": "500 Oops"})) as server:
        why(server, login="user:ge%40heim@")
        assert not any("Authorization" in head for head in server.requests)


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (
            lambda _s, connection, _h: connection.shutdown(socket.SHUT_RDWR),
            "closed the connection without an answer",
        ),
        (always(answer(b"", status="400 Bad Request")), "speaks HTTP, not RTSP; use http://"),
        (always(b"SSH-2.0-dropbear\r\n"), "does not speak RTSP; check the port"),
    ],
)
def test_a_server_of_another_protocol_is_reported(serve: Serve, reason: str) -> None:
    with ScriptedServer(serve) as server:
        assert reason in why(server)


def test_a_camera_without_a_video_stream_is_reported() -> None:
    only_audio = SDP.partition("m=video")[0]
    with ScriptedServer(rtsp(sdp=only_audio)) as server:
        assert "not a readable video" in why(server)


@pytest.fixture(scope="module")
def tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_tls_port_is_reported(scheme: str, tls: ssl.SSLContext) -> None:
    with ScriptedServer(rtsp(), tls=tls) as server:
        assert f"speaks TLS; use {scheme}s://" in why(server, scheme=scheme)


@pytest.mark.parametrize("scheme", ["rtsps", "https"])
def test_a_port_without_tls_is_reported(scheme: str) -> None:
    """It waits for the end of a request that never comes, so only the limit ends it."""
    serve = rtsp() if scheme == "rtsps" else always(answer(b"", status="400 Bad Request"))
    with ScriptedServer(serve) as server:
        reason = why(server, scheme=scheme, limits=SourceLimits(open_timeout_s=0.5))
    assert f"does not speak TLS; use {scheme[:-1]}://" in reason


@pytest.mark.parametrize("library", ["auto", "opencv"])
def test_a_proxy_of_the_environment_is_not_used_for_rtsps(
    library: DecoderLibrary, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg takes `http_proxy` for any connection with TLS."""
    with ScriptedServer(always(answer(b"", status="503 Oops"))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url(""))
        with ScriptedServer(rtsp({"SETUP": "500 Oops"}), tls=tls) as server:
            why(server, scheme="rtsps", limits=SourceLimits(library=library))
            assert sum("SETUP" in head for head in server.requests) > 1
        assert proxy.requests == []


@pytest.mark.parametrize("library", ["auto", "opencv"])
def test_an_answer_of_2_gb_is_not_kept_in_memory(library: DecoderLibrary) -> None:
    """FFmpeg would reserve what the answer claims, and fill it as fast as the camera sends."""
    sent = 0

    def serve(server: ScriptedServer, connection: socket.socket, head: str) -> None:
        nonlocal sent
        number = re.search(r"CSeq: *(\d+)", head)
        claims = (
            f"RTSP/1.0 200 OK\r\nCSeq: {number[1] if number else 0}\r\nContent-Length: 2000000000\r\n\r\n"
        )
        connection.sendall(claims.encode())
        block = bytes(1 << 20)
        while not server.ended.is_set():
            connection.sendall(block)
            sent += len(block)

    with ScriptedServer(serve) as server:
        why(server, limits=SourceLimits(open_timeout_s=1.0, library=library))
    assert sent < 150 << 20
