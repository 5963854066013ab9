"""`make base-digest`: the digest of the newest Python slim image, from a registry, or nothing is written."""

import datetime as dt
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import base_digest
from base_digest import BaseImage, Registry, newest_tag, read_base, render_base
from registry_stand_in import RegistryStandIn, serve_registry

TAGS = [
    *("3.9.24-slim-trixie", "3.12.11-slim-bookworm", "3.13.9-slim-bookworm", "3.13.9-slim-trixie"),
    *("3.13.10-slim-bookworm", "3.15.0a2-slim-trixie", "3.14.0rc3-slim-trixie", "3.13.9-alpine", "latest"),
]
NEWEST = "3.13.10-slim-bookworm"


@pytest.fixture
def registry() -> Iterator[RegistryStandIn]:
    with serve_registry(TAGS) as server:
        yield server


def look_up(image: str, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error line of the tool."""
    code = base_digest.main(["--image", image, "--output", str(output)])
    return code, capsys.readouterr().err


def test_the_newest_stable_tag_is_found_over_all_pages_and_its_digest_is_written(
    registry: RegistryStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The registry asks for a token first, as Docker Hub does."""
    file = tmp_path / "base.txt"
    assert look_up(registry.image, file, capsys) == (0, "")
    found = read_base(file)
    assert found is not None
    assert (found.name, found.tag, found.digest) == (registry.image, NEWEST, registry.digest(NEWEST))
    assert found.looked_up == dt.datetime.now(dt.UTC).date()
    assert found.reference == f"{registry.image}:{NEWEST}@{registry.digest(NEWEST)}"
    assert sum(path.startswith("/token") for path in registry.asked) == 1
    assert "scope=repository%3Alibrary%2Fpython%3Apull" in "".join(registry.asked)


def test_a_registry_without_login_is_asked_without_a_token(
    registry: RegistryStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.wants_token = False
    assert look_up(registry.image, tmp_path / "base.txt", capsys)[0] == 0
    assert not [path for path in registry.asked if path.startswith("/token")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (("stated_digest", f"sha256:{0:064}"), "but the registry says sha256:000"),
        (("challenge", "Basic realm=x"), "wants a login of an unknown kind: Basic"),
        (("challenge", 'Bearer realm="http://192.0.2.1/token"'), "wants a login of an unknown kind"),
        (("challenge", 'Bearer realm="{root}/v2/gone"'), "gives no token: 401"),
        (("next_page", "http://192.0.2.1/tags"), "points to another server"),
        (("tags", ["latest", "3.14.0rc3-slim-trixie"]), "has no tag such as"),
        (("tags", []), "has no tag such as"),
    ],
)
def test_a_digest_that_was_not_looked_up_is_never_written(
    registry: RegistryStandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: tuple[str, object],
    reason: str,
) -> None:
    file = tmp_path / "base.txt"
    file.write_text("as it was")
    setattr(registry, *fault)
    code, error = look_up(registry.image, file, capsys)
    assert code == 1
    assert reason in error
    assert error.startswith("base-digest: no digest was looked up")
    assert error.endswith("base.txt is unchanged\n")
    assert error.count("\n") == 1
    assert file.read_text() == "as it was"


def test_without_a_network_the_file_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    code, error = look_up(f"127.0.0.1:{port}/library/python", tmp_path / "base.txt", capsys)
    assert code == 1
    assert "does not answer" in error
    assert not (tmp_path / "base.txt").exists()


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("python", "docker.io/library/python"),
        ("mirror/python", "docker.io/mirror/python"),
        ("registry.example.com/python", "registry.example.com/python"),
        ("localhost:5000/a/python", "localhost:5000/a/python"),
    ],
)
def test_names_are_read_as_docker_reads_them(image: str, name: str) -> None:
    assert Registry(image).name == name


def test_the_newest_debian_is_preferred_for_the_same_python() -> None:
    assert newest_tag(["3.14.1-slim-trixie", "3.14.1-slim-bookworm"]) == "3.14.1-slim-trixie"
    assert newest_tag(["3.14.1-slim-sid", "3.99.0-slim-trixie", "slim-trixie"]) is None


def test_the_file_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.txt"
    assert read_base(file) is None
    image = BaseImage("docker.io/library/python", NEWEST, f"sha256:{1:064}", dt.date(2026, 11, 30))
    file.write_text(render_base(image))
    assert read_base(file) == image
    file.write_text(render_base(image).replace("sha256:0", "sha256:z"))
    with pytest.raises(ValueError, match="is not a digest"):
        read_base(file)
    file.write_text("tag: x\n")
    with pytest.raises(ValueError, match="looked-up is missing"):
        read_base(file)
