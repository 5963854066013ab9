"""The installation: paths of bundled files (model, demo clip), and how to install optional packages."""

import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from visionedge.errors import UnavailableError

Extra = Literal["av", "eval"]
"""Names of the optional dependencies in pyproject.toml."""

_PACKAGE = Path(__file__).resolve().parents[1]


def find_bundled_file(relative: str) -> Path:
    """Return the path of a bundled file such as ``media/demo.mp4``.

    A wheel has these files inside the package, a checkout beside ``module/``.

    Raises:
        UnavailableError: the file is missing.
    """
    for folder in (_PACKAGE / "_bundled", _PACKAGE.parents[1]):
        path = folder / relative
        if path.is_file():
            return path
    raise UnavailableError(
        f"{relative}: bundled file is missing; install visionedge again, or use a complete checkout"
    )


def describe_extra(name: str) -> str:
    """Return the name of an extra and how to install it, the same on every machine."""
    return (
        f"the extra '{name}' (in a clone: pip install -e '.[{name}]';"
        f" from a wheel: pip install 'FILE.whl[{name}]')"
    )


def build_install_command(extra: Extra) -> str:
    """Return a command line that installs the packages of an extra into the running environment.

    visionedge is not on a package registry, so the command names the packages, with the versions that this
    installation requires.
    """
    wanted = " ".join(shlex.quote(requirement) for requirement in _requirements(extra))
    python = shlex.quote(sys.executable or "python3")
    return f"{python} -m pip install {wanted or shlex.quote(f'.[{extra}]')}"


def _requirements(extra: Extra) -> list[str]:
    """Return the pinned packages of the extra; none if visionedge runs from its sources, without metadata."""
    try:
        lines = metadata.requires("visionedge") or []
    except metadata.PackageNotFoundError:
        return []
    parts = (line.partition(";") for line in lines)
    return [package.strip() for package, _, marker in parts if _names_extra(marker, extra)]


def _names_extra(marker: str, extra: Extra) -> bool:
    return "".join(marker.split()).replace('"', "'") == f"extra=='{extra}'"
