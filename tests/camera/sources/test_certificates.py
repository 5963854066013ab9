"""Certificates of cameras: unchecked unless a setting asks for it, and then the password is safe, too."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clips import make_clip
from model_server import ModelServer, content
from visionedge.camera.registry import _certificates_file
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.config.load import parse_config
from visionedge.errors import ConfigError, SourceError

LIMITS = SourceLimits(library="pyav")


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    """A short video."""
    make_clip(tmp_path / "cam.mp4", pictures=10, fps=25)
    return (tmp_path / "cam.mp4").read_bytes()


@pytest.fixture
def server(tmp_path: Path, clip: bytes) -> Iterator[ModelServer]:
    """A camera with a certificate for 127.0.0.1."""
    with ModelServer(tmp_path) as made:
        made.answers["/cam.mp4"] = content(clip)
        yield made


def opened(server: ModelServer, certificates: Path | None, scheme: str = "https") -> None:
    """Open it and let it go."""
    uri = server.url("/cam.mp4").replace("https://", f"{scheme}://admin:hunter2x@")
    limits = replace(LIMITS, certificates=None if certificates is None else str(certificates))
    open_source(parse_camera_uri(uri), limits).close()


def test_a_trusted_certificate_is_accepted(server: ModelServer) -> None:
    """The authority's file is enough."""
    opened(server, server.authority)
    assert server.seen


def test_certificates_are_not_verified_by_default(server: ModelServer) -> None:
    """Cameras sign their own."""
    opened(server, None)


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_another_authority_is_not_trusted_and_gets_no_login(
    server: ModelServer, tmp_path: Path, scheme: str
) -> None:
    """The reason names the setting; neither the decoder nor the question for the reason sends anything."""
    (tmp_path / "other").mkdir()
    with ModelServer(tmp_path / "other") as other, pytest.raises(SourceError) as caught:
        opened(server, other.authority, scheme)
    assert "is not trusted" in str(caught.value)
    assert "tls.caFile" in str(caught.value)
    assert server.seen == []


def test_a_certificate_for_another_host_is_not_trusted(tmp_path: Path, clip: bytes) -> None:
    """Even where its authority is trusted."""
    with ModelServer(tmp_path, host="camera.example") as server:
        server.answers["/cam.mp4"] = content(clip)
        with pytest.raises(SourceError, match=r"not trusted \(.*127\.0\.0\.1"):
            opened(server, server.authority)
        assert server.seen == []


def test_a_missing_certificate_file_is_named(server: ModelServer, tmp_path: Path) -> None:
    """Nothing is opened without a check."""
    with pytest.raises(SourceError, match=r"none\.pem cannot be read; check tls\.caFile"):
        opened(server, tmp_path / "none.pem")


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_opencv_refuses_cameras_whose_certificate_it_cannot_verify(server: ModelServer, scheme: str) -> None:
    """It has no such option."""
    uri = server.url("/cam.mp4").replace("https://", f"{scheme}://")
    limits = replace(LIMITS, library="opencv", certificates=str(server.authority))
    with pytest.raises(SourceError, match="only PyAV checks certificates"):
        open_source(parse_camera_uri(uri), limits)


def test_the_tls_setting_selects_the_trusted_certificates() -> None:
    """A file of one's own, else the authorities of the system; a file alone would have no effect."""
    uri = {"uri": "rtsps://192.0.2.5/s"}

    def trusted(tls: dict[str, object] | None) -> str | None:
        camera = uri if tls is None else {**uri, "tls": tls}
        return _certificates_file(parse_config({"cameras": {"dock": camera}}).cameras["dock"].tls)

    assert trusted(None) is None
    assert trusted({"verify": False}) is None
    assert trusted({"verify": True, "caFile": "/certs/dock.pem"}) == "/certs/dock.pem"
    assert trusted({"verify": True})
    with pytest.raises(
        ConfigError, match=r"cameras\.dock\.tls\.caFile: has no effect without 'verify: true'"
    ):
        trusted({"caFile": "/certs/dock.pem"})
    with pytest.raises(ConfigError, match=r"did you mean 'caFile'"):
        trusted({"verify": True, "cafile": "/certs/dock.pem"})
