"""`make image`: which arguments and labels Docker gets."""

import datetime as dt
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

import build_image
import visionedge
from base_digest import BaseImage
from build_image import Request, Source, build_command, dockerfile_licenses, public_url, read_source
from repository_paths import REPOSITORY

BASE = BaseImage("docker.io/library/python", "3.13.9-slim-trixie", f"sha256:{1:064}", dt.date(2026, 11, 30))
SOURCE = Source("1.2.3", "abc", "2026-11-30T06:00:00Z", "https://example.com/visionedge")
LICENSES = "(LGPL-3.0-or-later OR GPL-2.0-or-later) AND GPL-2.0-or-later AND MIT"


def options(command: list[str], option: str) -> dict[str, str]:
    """The values of an option that is given as NAME=VALUE, without the prefix of labels."""
    given = [value for name, value in pairwise(command) if name == option]
    return dict(value.removeprefix("org.opencontainers.image.").split("=", 1) for value in given)


def test_the_looked_up_base_is_built_upon_and_named_in_the_labels() -> None:
    command = build_command(Request("gpu", "mine:1"), SOURCE, BASE, LICENSES)
    assert command[:5] == ["build", "--file", "Dockerfile.gpu", "--tag", "mine:1"]
    assert command[-1] == "."
    assert options(command, "--build-arg") == {
        "BASE_IMAGE": f"docker.io/library/python:3.13.9-slim-trixie@sha256:{1:064}",
        "VERSION": "1.2.3",
        "REVISION": "abc",
        "CREATED": "2026-11-30T06:00:00Z",
    }
    assert options(command, "--label") == {
        "source": "https://example.com/visionedge",
        "created": "2026-11-30T06:00:00Z",
        "base.name": "docker.io/library/python:3.13.9-slim-trixie",
        "base.digest": f"sha256:{1:064}",
    }


def test_a_given_base_has_no_digest_of_another_one() -> None:
    command = build_command(Request("cpu", "x", base_image="here/python:3.12"), SOURCE, BASE, LICENSES)
    assert options(command, "--build-arg")["BASE_IMAGE"] == "here/python:3.12"
    labels = options(command, "--label")
    assert labels["base.name"] == "here/python:3.12"
    assert "base.digest" not in labels


def test_what_is_unknown_gives_no_label_and_no_argument() -> None:
    command = build_command(Request("cpu", "x"), Source("1.2.3"), None, LICENSES)
    assert options(command, "--build-arg") == {"VERSION": "1.2.3"}
    assert options(command, "--label") == {}


def test_an_image_without_pyav_does_not_name_the_licences_of_its_libraries() -> None:
    command = build_command(Request("cpu", "x", with_pyav="0"), SOURCE, BASE, LICENSES)
    assert options(command, "--build-arg")["WITH_PYAV"] == "0"
    assert options(command, "--label")["licenses"] == "MIT"
    whole = dockerfile_licenses((REPOSITORY / "Dockerfile.cpu").read_text())
    assert "GPL-2.0-or-later" in whole.split(" AND ")
    assert all(term in whole.split(" AND ") for term in build_image._PYAV_LICENSES)


def test_openvino_is_asked_for_by_a_build_argument() -> None:
    command = build_command(Request("cpu", "x", with_openvino="1"), SOURCE, BASE, LICENSES)
    assert options(command, "--build-arg")["WITH_OPENVINO"] == "1"
    assert "WITH_OPENVINO" not in options(
        build_command(Request("cpu", "x"), SOURCE, BASE, LICENSES), "--build-arg"
    )


def test_openvino_in_the_gpu_image_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_image.main(["--variant", "gpu", "--image", "x", "--with-openvino", "1"])
    assert ended.value.code == 2
    assert "needs VARIANT=cpu" in capsys.readouterr().err


def test_build_flags_reach_docker_as_a_shell_would_split_them() -> None:
    request = Request("cpu", "x", flags="--network host --platform linux/arm64 --secret 'id=pip,src=/a b'")
    command = build_command(request, SOURCE, BASE, LICENSES)
    assert command[-7:-1] == [
        *("--network", "host", "--platform", "linux/arm64", "--secret", "id=pip,src=/a b"),
    ]


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://example.com/us/visionedge.git", "https://example.com/us/visionedge"),
        ("https://user:secret@example.com/us/visionedge.git", "https://example.com/us/visionedge"),
        ("git@example.com:us/visionedge.git", ""),
        ("/srv/git/visionedge", ""),
        ("", ""),
    ],
)
def test_only_an_address_of_the_web_becomes_the_source_and_never_its_login(address: str, url: str) -> None:
    assert public_url(address) == url


def test_the_source_is_the_commit_and_says_if_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "module/visionedge/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text('__version__ = "1.2.3"\n')
    assert read_source(tmp_path, {}) == Source("1.2.3")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x", "--date", "2026-11-30T06:00:00Z")
    found = read_source(tmp_path, {"SOURCE_URL": "https://example.com/visionedge"})
    assert (found.version, found.revision) == ("1.2.3", git("rev-parse", "HEAD"))
    assert found.url == "https://example.com/visionedge"
    assert dt.datetime.fromisoformat(found.created) == dt.datetime.fromisoformat(
        git("log", "-1", "--format=%cI")
    )
    package.write_text('__version__ = "1.2.4"\n')
    assert read_source(tmp_path, {}).revision == f"{found.revision}-dirty"


def test_the_version_of_this_checkout_is_that_of_the_package() -> None:
    assert read_source(REPOSITORY, {}).version == visionedge.__version__
