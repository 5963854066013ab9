"""Where an RTSP camera may redirect to, and that FFmpeg is not left to follow it anywhere."""

import socket
import ssl
from contextlib import closing
from pathlib import Path

import pytest
import trustme

from fake_rtsp_server import FakeRtspServer
from scripted_http import ScriptedServer, always
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.camera.sources.redirects import copy_login, resolve_rtsp_redirects
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.runtime.redaction import redact

LOGIN = ("user", "ge@heim")
SHOWN = "user:ge%40heim@"

both = pytest.mark.parametrize("library", ["pyav", "opencv"])


def opens(uri: str, limits: SourceLimits) -> bool:
    """Whether it gives a picture."""
    with closing(open_source(parse_camera_uri(uri), limits)) as source:
        return source.read() is not None


def why(uri: str, limits: SourceLimits) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(parse_camera_uri(uri), limits)
    text = str(caught.value)
    assert "heim" not in text
    assert redact(text) == text, "a remedy that is masked is none"
    return text


def paths(server: FakeRtspServer, method: str = "DESCRIBE") -> list[str]:
    return [path for asked, path, _ in server.asked if asked == method]


@both
@pytest.mark.parametrize("status", ["301 Moved", "302 Moved", "303 See", "305 Proxy", "307 Moved"])
def test_a_redirect_within_the_host_is_followed_for_any_status(
    status: str, library: DecoderLibrary
) -> None:
    with FakeRtspServer(status=status) as server:
        server.redirects["/old"] = server.uri(path="/cam")
        assert opens(server.uri(path="/old"), SourceLimits(library=library))
        assert paths(server).count("/old") == 1, "FFmpeg was given the address that it leads to"


@both
def test_the_login_is_sent_within_the_host_and_to_another_port(library: DecoderLibrary) -> None:
    """A path alone is an address, too."""
    with FakeRtspServer(login=LOGIN) as second, FakeRtspServer(login=LOGIN) as server:
        server.redirects = {"/old": "/older", "/older": second.uri()}
        assert opens(server.uri(SHOWN, "/old"), SourceLimits(library=library))


@both
def test_another_host_is_not_contacted_if_only_the_own_host_is_allowed(library: DecoderLibrary) -> None:
    with FakeRtspServer(host="127.0.0.2") as other, FakeRtspServer() as server:
        server.redirects["/cam"] = other.uri()
        reason = why(server.uri(), SourceLimits(library=library))
        assert "points to another host, 127.0.0.2; use its address, or set followRedirects: any" in reason
        assert other.connections == 0
        assert server.connections == 1


@both
def test_a_redirect_to_another_host_is_followed_if_allowed(library: DecoderLibrary) -> None:
    with FakeRtspServer(host="127.0.0.2") as other, FakeRtspServer(login=LOGIN) as server:
        server.redirects["/cam"] = other.uri("someone:else@")
        assert opens(server.uri(SHOWN), SourceLimits(library=library, redirects="any"))
        assert not any("authorization" in headers for _, _, headers in other.asked)


@both
def test_another_host_that_requests_a_login_gets_none(library: DecoderLibrary) -> None:
    """FFmpeg would keep the login of the first address."""
    with FakeRtspServer(host="127.0.0.2", login=LOGIN) as other, FakeRtspServer(login=LOGIN) as server:
        server.redirects["/cam"] = other.uri()
        assert "(401)" in why(server.uri(SHOWN), SourceLimits(library=library, redirects="any"))
        assert other.connections > 0
        assert not any("authorization" in headers for _, _, headers in other.asked)


@both
@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"])
def test_a_link_local_address_is_never_followed(host: str, library: DecoderLibrary) -> None:
    with FakeRtspServer() as server:
        server.redirects["/cam"] = f"rtsp://{host}/latest"
        assert "points to another host" in why(server.uri(), SourceLimits(library=library))
        reason = why(server.uri(), SourceLimits(library=library, redirects="any"))
        assert "a link-local or loopback address, which is never followed" in reason
        assert paths(server, "OPTIONS") == [], "FFmpeg was not let in"


@both
def test_a_redirect_loop_ends_after_five_redirects_and_is_reported(library: DecoderLibrary) -> None:
    with FakeRtspServer() as server:
        server.redirects = {"/cam": server.uri(path="/other"), "/other": server.uri()}
        assert "redirect loop; check the path" in why(server.uri(), SourceLimits(library=library))
        assert len(server.asked) == 6


@both
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("http://127.0.0.1/cam", "an address of kind 'http:', which is not followed"),
        ("file:///etc/passwd", "an address of kind 'file:', which is not followed"),
        ("rtsp://[x/", "redirects to an invalid address"),
        ("rtsp://127.0.0.1:x/", "redirects to an invalid address"),
        ("", "redirects to an invalid address"),
        ("rtsp://127.0.0.1:1/cam", "connection refused by 127.0.0.1:1"),
    ],
)
def test_a_redirect_without_a_valid_target_is_reported(where: str, reason: str, library: DecoderLibrary) -> None:
    with FakeRtspServer() as server:
        server.redirects["/cam"] = where
        assert reason in why(server.uri(), SourceLimits(library=library))
        assert paths(server, "OPTIONS") == [], "FFmpeg was not let in"


def test_a_camera_that_redirects_to_itself_and_then_is_silent_is_not_passed_to_ffmpeg() -> None:
    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        if len(server.requests) == 1:
            here = server.url("/cam", scheme="rtsp")
            connection.sendall(f"RTSP/1.0 302 Moved\r\nCSeq: 1\r\nLocation: {here}\r\n\r\n".encode())
        else:
            connection.shutdown(socket.SHUT_RDWR)

    with ScriptedServer(serve) as server:
        assert "closed the connection without an answer" in why(
            server.url("/cam", scheme="rtsp"), SourceLimits(library="pyav")
        )
        assert not any(head.startswith("OPTIONS rtsp:") for head in server.requests)


@both
def test_a_camera_that_allows_one_connection_opens(library: DecoderLibrary) -> None:
    with FakeRtspServer(single_client=True, login=LOGIN) as server:
        assert opens(server.uri(SHOWN), SourceLimits(library=library))


@both
def test_a_camera_that_is_slow_to_answer_opens(library: DecoderLibrary) -> None:
    with FakeRtspServer(reply_delay_s=0.2) as server:
        assert opens(server.uri(), SourceLimits(library=library, open_timeout_s=20))


@both
def test_a_redirect_to_tls_is_verified_if_certificates_are(library: DecoderLibrary, tmp_path: Path) -> None:
    """OpenCV cannot check them itself, so it does not get the address."""
    good, other = trustme.CA(), trustme.CA()
    for name, authority in (("good", good), ("other", other)):
        authority.cert_pem.write_to_path(tmp_path / name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    good.issue_cert("127.0.0.1").configure_cert(context)
    found = always(b"RTSP/1.0 404 Not Found\r\nCSeq: 1\r\n\r\n")
    with ScriptedServer(found, tls=context) as secure, FakeRtspServer() as server:
        server.redirects["/cam"] = secure.url("/cam", scheme="rtsps")
        trusting = SourceLimits(library=library, certificates=str(tmp_path / "good"))
        expected = "only PyAV checks certificates" if library == "opencv" else "not found on the server"
        assert expected in why(server.uri(), trusting)
        wary = SourceLimits(library=library, certificates=str(tmp_path / "other"))
        assert "is not trusted" in why(server.uri(), wary)
        assert paths(server, "OPTIONS") == [], "FFmpeg was not let in"


@both
def test_a_normal_camera_gets_one_request_before_it_is_opened(library: DecoderLibrary) -> None:
    with FakeRtspServer() as server:
        assert opens(server.uri(), SourceLimits(library=library))
        methods = [method for method, _, _ in server.asked if method != "TEARDOWN"]
        assert methods == ["DESCRIBE", "OPTIONS", "DESCRIBE", "SETUP", "PLAY"]
        assert server.connections == 2


def test_a_camera_that_uses_the_whole_time_limit_is_not_passed_to_ffmpeg() -> None:
    """It might redirect FFmpeg as soon as we have gone."""

    def serve(server: ScriptedServer, _connection: socket.socket, _head: str) -> None:
        server.ended.wait(10)

    with ScriptedServer(serve) as server:
        uri = server.url("/cam", scheme="rtsp")
        reason = why(uri, SourceLimits(library="pyav", open_timeout_s=0.5))
        assert "no picture within 0.5 s" in reason
        assert not any(head.startswith("OPTIONS rtsp:") for head in server.requests)


def test_a_camera_that_answers_byte_by_byte_times_out() -> None:
    """Each byte comes soon after the one before it."""

    def serve(server: ScriptedServer, connection: socket.socket, _head: str) -> None:
        while not server.ended.wait(0.02):
            connection.sendall(b"R")

    with ScriptedServer(serve) as server:
        uri = parse_camera_uri(server.url("/cam", scheme="rtsp"))
        assert resolve_rtsp_redirects(uri, SourceLimits(open_timeout_s=0.3)).describe_reply is None


@both
def test_a_wrong_password_is_sent_once_by_the_check_and_once_by_the_decoder(library: DecoderLibrary) -> None:
    """Some cameras lock a user out after a few logins that fail."""
    with FakeRtspServer(login=LOGIN) as server:
        reason = why(server.uri("user:wrong@"), SourceLimits(library=library))
        assert "login refused (401); check user name and password" in reason
        shown = [headers for _, _, headers in server.asked if "visionedge" in headers.get("user-agent", "")]
        assert sum("authorization" in headers for headers in shown) == 1


@pytest.mark.parametrize(
    ("url", "target", "expected"),
    [
        ("rtsp://cam/new", "rtsp://u:p@cam/old", "rtsp://u:p@cam/new"),
        ("rtsp://cam:8554/new", "rtsp://u:p@cam/old", "rtsp://u:p@cam:8554/new"),
        ("rtsps://cam/new", "rtsp://u:p@cam/old", "rtsps://u:p@cam/new"),
        ("rtsp://cam/new", "rtsps://u:p@cam/old", "rtsp://cam/new"),
        ("rtsp://x:y@other/new", "rtsp://u:p@cam/old", "rtsp://other/new"),
        ("rtsp://x:y@cam/new", "rtsp://cam/old", "rtsp://cam/new"),
    ],
)
def test_the_login_is_sent_only_to_its_own_host_and_never_from_tls_to_plain_text(url: str, target: str, expected: str) -> None:
    assert copy_login(url, target) == expected
