"""The token that a module makes when other machines can reach it and none is configured."""

import stat
from pathlib import Path

import pytest

from visionedge.config.load import parse_config
from visionedge.config.made_token import MadeToken
from visionedge.config.schema import HttpConfig
from visionedge.runtime.redaction import redact

REACHABLE = HttpConfig(host="0.0.0.0")


@pytest.mark.parametrize(
    "http",
    [
        HttpConfig(),
        HttpConfig(host="::1"),
        HttpConfig(host="0.0.0.0", token="configured-token"),
        parse_config({"http": {"host": "0.0.0.0", "allowAnonymous": True}}).http,
    ],
)
def test_no_token_is_made_where_none_is_needed(http: HttpConfig, tmp_path: Path) -> None:
    assert MadeToken(tmp_path).lay_under(http, make=True) == http
    assert not list(tmp_path.iterdir())


def test_the_token_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    data = tmp_path / "new"
    made = MadeToken(data).lay_under(REACHABLE, make=True)
    assert made.token is not None
    assert len(made.token) >= 32
    assert made == HttpConfig(host="0.0.0.0", token=made.token)
    assert stat.S_IMODE((data / MadeToken.FILE_NAME).stat().st_mode) == 0o600
    assert MadeToken(data).read() == made.token
    assert MadeToken(data).lay_under(REACHABLE, make=True) == made
    assert made.token not in redact(f"the token {made.token} is wrong")


def test_two_modules_have_different_tokens(tmp_path: Path) -> None:
    first, second = (MadeToken(tmp_path / name).lay_under(REACHABLE, make=True).token for name in "ab")
    assert first != second


def test_a_reader_makes_no_token(tmp_path: Path) -> None:
    assert MadeToken(tmp_path).lay_under(REACHABLE, make=False) == REACHABLE
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_gives_a_token_for_this_run_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    token = MadeToken(blocked)
    made = token.lay_under(REACHABLE, make=True)
    assert made.token is not None
    assert token.lay_under(REACHABLE, make=True) == made
    assert "VISIONEDGE_HTTP_TOKEN" in caplog.text
    assert made.token not in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"two\nlines", b"x" * 500])
def test_a_damaged_file_is_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MadeToken.FILE_NAME).write_bytes(content)
    assert MadeToken(tmp_path).read() is None
    made = MadeToken(tmp_path).lay_under(REACHABLE, make=True)
    assert MadeToken(tmp_path).read() == made.token


def test_a_file_that_cannot_be_used_is_kept_beside_the_new_token(tmp_path: Path) -> None:
    """It may be the token of a newer version."""
    path = tmp_path / MadeToken.FILE_NAME
    path.write_text("x" * 10_000)
    made = MadeToken(tmp_path).lay_under(REACHABLE, make=True)
    assert made.token == MadeToken(tmp_path).read()
    assert path.with_name(f"{MadeToken.FILE_NAME}.aside").read_text() == "x" * 10_000
