"""A JSON state file with a schema number, safe with versions of the module before and after this one.

A file with a higher number belongs to a newer version: it is neither written nor renamed. This version keeps
its state in another file beside it, `NAME.N.json` with its own number N. When the newer version runs again,
it reads that file too, and deletes it after its first write.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from visionedge.runtime.files import DamagedStateFileError, read_json, set_aside, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = re.compile(r"(visionedge/[a-z-]+)/([1-9]\d{0,3})")


class StateFile:
    """A state file, and what other versions keep beside it. The methods block on the disk.

    Args:
        path: the file.
        schema: what this version writes, such as `visionedge/sequences/1`.

    Attributes:
        path: as given.
        lost: why a damaged file was set aside; None if none was.
        newer: that the file belongs to a newer version, and what to do; None if it does not.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        self.lost: str | None = None
        self.newer: str | None = None
        self._schema = schema
        self._name, self._number = _split(schema)

    def __repr__(self) -> str:
        return f"<StateFile {self._used.name}>"

    @property
    def _used(self) -> Path:
        """The file that this version writes."""
        return self.path if self.newer is None else self._beside(self._number)

    def read(self, parse: Callable[[Any], T]) -> list[T]:
        """What `parse` makes of each document that is kept, the newest first; empty without any.

        A file that is damaged, or for which `parse` raises `DamagedStateFileError`, is set aside; that of a
        newer version, whose form may be another one, stays. An error of the disk is logged.
        """
        found = [self._read(path, parse) for path in (*self._others(), self.path)]
        return [document for documents in found for document in documents]

    def _read(self, path: Path, parse: Callable[[Any], T]) -> list[T]:
        is_newer = False
        try:
            document = read_json(path)
            number = self._find_number(document)
            is_newer = number > self._number
            if is_newer and path == self.path:
                self._report_newer(number)
            return [parse(document)]
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s cannot be read: %s; starting without it", path, error.strerror)
        except DamagedStateFileError as error:
            if not is_newer:
                self._set_aside(path, str(error))
        return []

    def _find_number(self, document: Any) -> int:
        """The number in the schema of a document; 0 without one, as in the first version.

        Raises:
            DamagedStateFileError: it is that of another kind of file.
        """
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema is None:
            return 0
        name, number = _split(schema)
        if name != self._name:
            raise DamagedStateFileError("its schema is unknown")
        return number

    def _report_newer(self, number: int) -> None:
        self.newer = (
            f"{self.path.name} was written by a newer version of visionedge (schema {number}, this version"
            f" reads up to {self._number}): it stays as it is, and this version uses"
            f" {self._beside(self._number).name}; install the newer version again to use it"
        )
        log.warning("%s", self.newer)

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace what is kept, durably; `schema` is added. `read` was called before.

        Raises:
            OSError: it cannot be written; the file stays as it was.
        """
        write_json(self._used, {"schema": self._schema, **content})
        for path in self._others(below=self._number if self.newer else self._number + 1):
            with contextlib.suppress(OSError):
                path.unlink()

    def set_aside(self, why: str) -> None:
        """Rename what this version reads, as it cannot be used for the reason `why`; a newer file stays."""
        for path in {self._used, *self._others(below=self._number + 1)}:
            if path.exists():
                self._set_aside(path, why)

    def _set_aside(self, path: Path, why: str) -> None:
        self.lost = why
        try:
            set_aside(path)
        except OSError as error:
            self.lost = f"{why}; renaming it failed: {error.strerror or error}"
        log.warning("%s cannot be used: %s; it was set aside", path, self.lost)

    def _beside(self, number: int) -> Path:
        return path_of_version(self.path, number)

    def _others(self, below: int | None = None) -> list[Path]:
        """The files of single versions, lowest number first, which is the newest.

        Each version deletes those of lower versions when it writes, so one that is there was written later.
        """
        return [
            self._beside(number) for number in list_versions(self.path) if below is None or number < below
        ]


def path_of_version(path: Path, number: int) -> Path:
    """Where a version keeps its state if a newer one owns the file at `path`: `NAME.1.json`."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def list_versions(path: Path) -> list[int]:
    """The versions that have such a file beside `path`, lowest first; raises nothing."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.([1-9]\d{{0,3}}){re.escape(path.suffix)}")
    with contextlib.suppress(OSError):
        found = (pattern.fullmatch(each.name) for each in path.parent.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)
    return []


def _split(schema: object) -> tuple[str, int]:
    """The name and the number of a schema.

    Raises:
        DamagedStateFileError: it is none.
    """
    found = _SCHEMA.fullmatch(schema) if isinstance(schema, str) else None
    if found is None:
        raise DamagedStateFileError("its schema is unknown")
    return found[1], int(found[2])
