"""Camera URIs and the masking of secrets."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.errors import ConfigError
from visionedge.uris import keep_secret, parse_camera_uri, redact


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("rtsp://192.0.2.5/stream1", "rtsp"),
        ("RTSPS://camera.local:322/x", "rtsp"),
        ("https://camera.local/video.mjpg", "http"),
        ("v4l2:///dev/video0", "v4l2"),
        ("demo:", "demo"),
        ("clip.mp4", "file"),
        ("C:\\clips\\clip.mp4", "file"),
    ],
)
def test_each_kind_of_uri_is_known(uri: str, kind: str) -> None:
    """Every form the contract names is understood."""
    assert parse_camera_uri(uri).kind == kind


def test_a_folder_is_told_from_a_file(tmp_path: Path) -> None:
    """A path that is a folder is a folder of pictures."""
    assert parse_camera_uri(str(tmp_path)).kind == "folder"
    assert parse_camera_uri(f"file://{tmp_path}").kind == "folder"


@pytest.mark.parametrize(
    "uri", ["foo://x", "rtsp:///nohost", "rtsp://h:notaport/", "", "v4l2:video0", "http://"]
)
def test_a_wrong_uri_is_one_line(uri: str) -> None:
    """A wrong URI is refused with one line that never holds its secrets."""
    with pytest.raises(ConfigError) as caught:
        parse_camera_uri(uri)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://admin:hunter2@192.0.2.5/s",
        "rtsp://admin:hunter2@cam@192.0.2.5/s",
        "rtsp://admin:a/hunter2#x@192.0.2.5/s",
        "rtsp://192.0.2.5/s?user=admin&password=hunter2&channel=1",
        "rtsp://192.0.2.5/user=admin_password=hunter2_channel=1",
        "http://h/x?access_token=hunter2&a=1",
        "Authorization: Bearer hunter2",
        "SharedAccessSignature sr=hub&sig=hunter2&se=1",
        "HostName=h;SharedAccessKey=hunter2==;DeviceId=d",
    ],
)
def test_secrets_are_masked_in_any_text(text: str) -> None:
    """Users, passwords, tokens and keys never survive."""
    shown = redact(f"cannot open '{text}': refused")
    assert "hunter2" not in shown
    assert "***" in shown
    assert shown.endswith("refused")


@given(
    st.text(
        st.characters(codec="ascii", exclude_characters=" \"'<>", categories=["L", "N", "P", "S"]), min_size=6
    )
)
def test_no_password_survives_whatever_its_characters(password: str) -> None:
    """Unescaped separators in a password do not carry it past the mask."""
    assert f":{password}@" not in redact(f"open rtsp://me:{password}@host/x failed")


@pytest.mark.parametrize("text", ["http://host:8080/a/b.jpg?x=1", "12 frames/s at 10:30", "a@b.example"])
def test_harmless_text_is_left_alone(text: str) -> None:
    """Hosts, paths and plain words stay readable."""
    assert redact(text) == text


def test_a_name_that_no_disk_could_hold_is_still_a_file() -> None:
    """Impossible names are told when they are opened, not with a traceback."""
    assert parse_camera_uri("x" * 5000).kind == "file"


@pytest.mark.parametrize("filler", ["a.", "a-", "token", "key."])
def test_a_long_text_is_masked_without_ado(filler: str) -> None:
    """Each name is looked at once, not once from each of its parts."""
    text = filler * 5_000
    assert redact(f"{text} {text}token=hunter2&x") == f"{text} {text}token=***&x"


def test_half_a_character_in_a_secret_is_no_error() -> None:
    """JSON may hold it, so a twin may."""
    keep_secret(["\ud800hunter2"])
    assert redact("with \ud800hunter2 in it") == "with *** in it"
