"""RTSP as cameras speak it: codecs, transports, digest logins, and packets with nothing in them."""

import pytest

from camera_doubles import SPEC, FrameRecorder, StatusRecorder, running
from clips import number_of
from fake_rtsp_server import FakeRtspServer
from visionedge.camera.camera import Camera, CameraDependencies
from visionedge.camera.sources.base import DecoderLibrary, RtspTransport, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError

LOGIN = ("user", "ge@heim")
SHOWN = "user:ge%40heim@"

SOON = CameraDependencies(wait=lambda event, timeout_s: event.wait(min(timeout_s, 0.2)))
"""Tries again soon, so that a test need not wait for the back-off (its own tests do)."""


@pytest.mark.parametrize(
    ("codec", "transport", "name"),
    [
        ("libx264", "tcp", "h264"),
        ("libx264", "udp", "h264"),
        ("libx265", "tcp", "hevc"),
        ("libx265", "udp", "hevc"),
        ("mjpeg", "tcp", "mjpeg"),
        ("mjpeg", "udp", "mjpeg"),
    ],
)
def test_every_codec_works_over_both_transports(codec: str, transport: RtspTransport, name: str) -> None:
    basket = FrameRecorder()
    with FakeRtspServer(codec) as server:
        camera = Camera("dock", server.uri(), SPEC, basket, limits=SourceLimits(transport=transport))
        with running(camera):
            frames = basket.wait_for(lambda f: len(f) > 10)
            assert camera.status().decoder == f"pyav {name}"
        assert server.transports == [transport]
    shown = [number_of(f.full_picture()) for f in frames[:10]]
    assert shown == [(shown[0] + n) % 24 for n in range(10)]


def test_auto_uses_udp_if_the_server_refuses_tcp() -> None:
    with FakeRtspServer(udp_only=True) as server:
        source = open_source(parse_camera_uri(server.uri()), SourceLimits(transport="auto"))
        assert source.read() is not None
        source.close()
        assert server.transports == ["udp"]


@pytest.mark.parametrize("library", ["pyav", "opencv"])
def test_a_digest_login_is_sent_on_request(library: DecoderLibrary) -> None:
    with FakeRtspServer(login=LOGIN) as server:
        source = open_source(parse_camera_uri(server.uri(SHOWN)), SourceLimits(library=library))
        decoded = source.read()
        assert decoded is not None
        assert (decoded.width_px, decoded.height_px) == (160, 120)
        source.close()


@pytest.mark.parametrize(
    ("login", "reason"),
    [
        ("", r"login required \(401\)"),
        ("user:wrong@", r"login refused \(401\); check user name and password"),
    ],
)
def test_a_wrong_login_is_reported_without_secrets(login: str, reason: str) -> None:
    with FakeRtspServer(login=LOGIN) as server, pytest.raises(SourceError, match=reason) as caught:
        open_source(parse_camera_uri(server.uri(login)))
    assert "wrong" not in str(caught.value)


def test_a_camera_with_undecodable_data_is_lost_and_returns() -> None:
    """Its packets come as ever, so no limit of silence would notice."""
    basket, changes = FrameRecorder(), StatusRecorder()
    limits = SourceLimits(picture_timeout_s=0.5)
    with FakeRtspServer() as server:
        camera = Camera(
            "dock", server.uri(), SPEC, basket, on_change=changes, limits=limits, dependencies=SOON
        )
        with running(camera):
            basket.wait_for(lambda f: len(f) > 5)
            server.corrupted.set()
            lost = changes.wait_for("reconnecting")
            assert lost.last_error is not None
            assert "data without a decodable picture for 0.5 s" in lost.last_error
            server.corrupted.clear()
            frames = basket.wait_for(lambda f: f[-1].epoch == 2)
    numbers = [frame.sequence for frame in frames]
    assert numbers == list(range(1, len(numbers) + 1))
