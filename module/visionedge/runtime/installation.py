"""Where the files that come with the package lie: the bundled model and the demo clip."""

import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from visionedge.errors import UnavailableError

_PACKAGE = Path(__file__).resolve().parents[1]


def find_bundled_file(relative: str) -> Path:
    """The path of a bundled file such as ``media/demo.mp4``.

    An installed wheel carries them inside the package, a checkout has them beside ``module/``.

    Raises:
        UnavailableError: the file is in neither place.
    """
    for folder in (_PACKAGE / "_bundled", _PACKAGE.parents[1]):
        path = folder / relative
        if path.is_file():
            return path
    raise UnavailableError(
        f"the bundled file {relative} is missing; install visionedge again or use a complete checkout"
    )


# The optional packages: how to install the ones that an extra names, in the environment that runs now.


Extra = Literal["av", "eval", "report"]


def describe_extra(name: str) -> str:
    """An extra and how it is installed, for texts that do not depend on the machine."""
    return (
        f"the extra '{name}' (in a clone: pip install -e '.[{name}]';"
        f" from a wheel: pip install 'FILE.whl[{name}]')"
    )


def build_install_command(extra: Extra) -> str:
    """A command line that installs the packages of an extra, from a clone and from a wheel alike.

    visionedge is on no package registry, so pip finds nothing under that name. The packages
    themselves are, with the versions that this installation names.
    """
    wanted = " ".join(shlex.quote(requirement) for requirement in _requirements(extra))
    python = shlex.quote(sys.executable or "python3")
    return f"{python} -m pip install {wanted or shlex.quote(f'.[{extra}]')}"


def _requirements(extra: Extra) -> list[str]:
    """The pinned packages of the extra; none where visionedge runs from its sources, without metadata."""
    try:
        lines = metadata.requires("visionedge") or []
    except metadata.PackageNotFoundError:
        return []
    parts = (line.partition(";") for line in lines)
    return [package.strip() for package, _, marker in parts if _names_extra(marker, extra)]


def _names_extra(marker: str, extra: Extra) -> bool:
    return "".join(marker.split()).replace('"', "'") == f"extra=='{extra}'"
