"""Where the files that come with the package lie: the bundled model and the demo clip."""

from pathlib import Path

from visionedge.errors import UnavailableError

_PACKAGE = Path(__file__).resolve().parents[1]


def bundled(relative: str) -> Path:
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
