"""Asking a server why a camera did not open: the password is sent only after a challenge."""

import base64
import contextlib

import pytest

from scripted_http import ScriptedServer, in_turn
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.diagnosis import diagnose_rtsp_open
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError

LOGIN = base64.b64encode(b"admin:hunter2x").decode()
BASIC, DIGEST = 'WWW-Authenticate: Basic realm="cam"', 'WWW-Authenticate: Digest realm="cam", nonce="5eed"'


def answer(status: str, *headers: str, protocol: str) -> bytes:
    """The head of an answer."""
    return "\r\n".join([f"{protocol} {status}", "CSeq: 1", *headers, "Content-Length: 0", "", ""]).encode()


def ask(url: str) -> str:
    """Why the camera does not open: over HTTP we open it ourselves, for RTSP the decoder tried before."""
    if url.startswith("rtsp"):
        return diagnose_rtsp_open(url, 0, 4)
    with pytest.raises(SourceError) as caught:
        open_source(parse_camera_uri(url), SourceLimits())
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
@pytest.mark.parametrize(
    "first",
    [
        ("404 Not Found",),
        ("401 Unauthorized",),
        ("401 Unauthorized", DIGEST),
        ("401 Unauthorized", DIGEST, BASIC),
        ("401 Unauthorized", BASIC, DIGEST),
        ("403 Forbidden", BASIC),
        ("500 Internal Server Error", BASIC),
    ],
)
def test_a_login_is_not_sent_without_a_basic_challenge(scheme: str, first: tuple[str, ...]) -> None:
    """For every answer and every order of challenges."""
    protocol = "RTSP/1.0" if scheme == "rtsp" else "HTTP/1.1"
    with ScriptedServer(in_turn(answer(*first, protocol=protocol))) as server:
        ask(server.url("/cam", "admin:hunter2x@", scheme))
        sent = "".join(server.requests)
    assert sent
    assert LOGIN not in sent
    assert "hunter2x" not in sent


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
@pytest.mark.parametrize(
    ("second", "words"),
    [("401 Unauthorized", "login refused"), ("404 Not Found", "not found on the server")],
)
def test_a_basic_challenge_is_answered_once(scheme: str, second: str, words: str) -> None:
    """Only so a wrong password can be distinguished from a wrong path."""
    protocol = "RTSP/1.0" if scheme == "rtsp" else "HTTP/1.1"
    script = in_turn(
        answer("401 Unauthorized", BASIC, protocol=protocol), answer(second, BASIC, protocol=protocol)
    )
    with ScriptedServer(script) as server:
        reason = ask(server.url("/cam", "admin:hunter2x@", scheme))
        sent = list(server.requests)
    assert words in reason
    assert [LOGIN in request for request in sent] == [False, True]


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_a_login_for_tls_is_never_sent_unencrypted(scheme: str) -> None:
    """Also where the port turns out to speak without TLS, and asks for the login."""
    script = in_turn(answer("401 Unauthorized", BASIC, protocol="RTSP/1.0"))
    with ScriptedServer(script) as server:
        with contextlib.suppress(SourceError):
            ask(server.url("/cam", "admin:hunter2x@", scheme))
        sent = "".join(server.requests)
    assert LOGIN not in sent
    assert "hunter2x" not in sent
    assert "Authorization" not in sent
