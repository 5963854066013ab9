"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

from visionedge.errors import ConfigError, VisionedgeError


def write_new(path: Path, text: str, *, replace: bool, secret: bool) -> None:
    """Write a text file at once; one that is `secret` can be read by its owner only.

    Raises:
        ConfigError: there is one already, and `replace` is not wanted.
        VisionedgeError: it cannot be written; nothing is left behind.
    """
    if os.path.lexists(path) and not replace:
        raise ConfigError([f"{path}: is there already; --force replaces it"])
    try:
        fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
        made = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o666)
        try:
            with os.fdopen(made, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name or text cannot be written"
        raise VisionedgeError(f"{path}: cannot be written: {reason}") from None
