"""The optional packages: the commands that install them work where visionedge is on no registry."""

import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from repository_paths import REPOSITORY
from visionedge.runtime.installation import Extra, build_install_command, describe_extra

TEXTS = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
SOURCES = [*(REPOSITORY / "module").rglob("*.py"), *(REPOSITORY / "tools").glob("*.py")]
OPTIONAL = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["av", "eval", "report"])
def test_the_install_command_names_the_pinned_packages_of_the_extra(extra: Extra) -> None:
    """They are on the registry, for a clone and for a wheel alike, and go where visionedge runs."""
    python, *words = shlex.split(build_install_command(extra))
    assert python == sys.executable
    assert words == ["-m", "pip", "install", *OPTIONAL[extra]]


def test_without_metadata_the_install_command_is_that_of_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert shlex.split(build_install_command("eval"))[-1] == ".[eval]"


@pytest.mark.parametrize("file", [*TEXTS, *SOURCES], ids=lambda file: file.name)
def test_no_text_installs_visionedge_by_its_name(file: Path) -> None:
    """No registry has it: `pip install visionedge[eval]` finds no distribution."""
    assert not re.findall(r"install '?visionedge\[", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_the_install_hint_names_an_existing_extra(name: str) -> None:
    assert describe_extra(name).count(f"[{name}]") == 2
