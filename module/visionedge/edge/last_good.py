"""The last desired properties that were in force, on disk: what the module starts with without a hub."""

import json
import logging
import os
from pathlib import Path

from visionedge.edge.wish import Wish

log = logging.getLogger(__name__)

FILE_NAME = "desired.json"

_SCHEMA = "visionedge/desired/1"


class LastGood:
    """One file, readable for its owner alone: it holds the secrets of cameras as they are.

    It belongs to one module of one hub (`owner`); what another one left is not used.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self._path = path
        self._owner = owner

    def __repr__(self) -> str:
        return f"<LastGood {self._path.name}>"

    def read(self) -> Wish | None:
        """What was kept; None where there is nothing of use, which is logged if there is a file."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["schema"] != _SCHEMA or kept["owner"] != self._owner:
                log.warning("%s is another module's: it is not used", self._path)
                return None
            return Wish(int(kept["version"]), dict(kept["desired"]))
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s)", self._path, error.strerror)
        except (ValueError, TypeError, KeyError):
            log.warning("%s is damaged: it is not used", self._path)  # the file's text may be a secret
        return None

    def keep(self, wish: Wish) -> None:
        """Replace what was kept, at once and for good. Blocks.

        Raises:
            OSError: the folder cannot be written; what was kept before stays.
        """
        kept = {"schema": _SCHEMA, "owner": self._owner, "version": wish.version, "desired": wish.document}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)  # one that was left half-written may have other rights
        made = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(made, "w", encoding="utf-8") as file:
            json.dump(kept, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
