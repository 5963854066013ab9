"""The last desired properties that were in force, on disk: what the module starts with without a hub."""

import logging
from pathlib import Path
from typing import Any

from visionedge.iothub.wish import Wish
from visionedge.runtime.files import DamagedError, read_json, set_aside, whole_number, write_json

log = logging.getLogger(__name__)

FILE_NAME = "desired.json"

_SCHEMA = "visionedge/desired/1"


class LastGood:
    """One file, readable for its owner alone: it holds the secrets of cameras as they are.

    It belongs to one module of one hub (`owner`); what another one left is not used. `lost` says why a file
    was set aside, None where none was.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.lost: str | None = None
        self._path = path
        self._owner = owner

    def __repr__(self) -> str:
        return f"<LastGood {self._path.name}>"

    def read(self) -> Wish | None:
        """What was kept; None where there is nothing of use, which is logged if there is a file.

        A file that is damaged, another module's or of another version is set aside, and `lost` says why.
        """
        try:
            return self._wish(read_json(self._path))
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s)", self._path, error.strerror)
        except DamagedError as error:
            self.set_aside(str(error))
        return None

    def _wish(self, kept: Any) -> Wish:
        if not isinstance(kept, dict) or not isinstance(kept.get("desired"), dict):
            raise DamagedError("it holds no desired properties")
        if kept.get("schema") != _SCHEMA:
            raise DamagedError("its schema is not known here")
        if kept.get("owner") != self._owner:
            raise DamagedError("it belongs to another module")
        return Wish(whole_number(kept.get("version")), kept["desired"])

    def set_aside(self, why: str) -> None:
        """Rename the file, which is of no use for the reason `why`; its text may be a secret."""
        self.lost = why
        try:
            set_aside(self._path)
        except OSError as error:
            self.lost = f"{why}; it cannot be moved: {error.strerror or error}"
        log.warning("%s is not used (%s): it was set aside", self._path, self.lost)

    def keep(self, wish: Wish) -> None:
        """Replace what was kept; when this returns, it outlives a kill and a power cut. Blocks.

        Raises:
            OSError: the folder cannot be written; what was kept before stays.
        """
        write_json(
            self._path,
            {"schema": _SCHEMA, "owner": self._owner, "version": wish.version, "desired": wish.document},
        )
