"""The optional packages: how to install the ones that an extra names, in the environment that runs now."""

import shlex
import sys
from importlib import metadata
from typing import Literal

Extra = Literal["av", "eval", "report"]


def extra_in_words(name: str) -> str:
    """An extra and how it is installed, for texts that do not depend on the machine."""
    return (
        f"the extra '{name}' (in a clone: pip install -e '.[{name}]';"
        f" from a wheel: pip install 'FILE.whl[{name}]')"
    )


def install_command(extra: Extra) -> str:
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
    return [package.strip() for package, _, marker in parts if _names(marker, extra)]


def _names(marker: str, extra: Extra) -> bool:
    return "".join(marker.split()).replace('"', "'") == f"extra=='{extra}'"
