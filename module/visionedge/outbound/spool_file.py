"""Which file the spool works with: the old one if it is sound and ours, else a new one, else none."""

import logging
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visionedge.outbound.sqlite_store import Bounds, Connect, ForeignFileError, Store, broken, salvage_numbers
from visionedge.runtime.files import is_odd, set_aside

log = logging.getLogger(__name__)

_COMPANIONS = ("-wal", "-shm", "-journal")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the file is, whose messages it holds, and its bounds."""

    path: Path
    owner: str
    bounds: Bounds
    connect: Connect | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What came of opening: a store, or why there is none.

    `aside` says why an old file was put aside; `upto` are then the last numbers that could be read in it.
    """

    store: Store | None
    reason: str | None = None
    aside: str | None = None
    upto: Mapping[str, int] | None = None


def open_store(place: Place, numbers: Mapping[str, int]) -> Opened:
    """Open the file; one that is of no use is put aside and a new one begun, with `numbers`. Blocks."""
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        if any(is_odd(place.path.with_name(place.path.name + end)) for end in ("", *_COMPANIONS)):
            return _begin_anew(place, numbers, "it is no regular file")
        return Opened(_store(place, numbers))
    except ForeignFileError as error:
        return _begin_anew(place, numbers, str(error))
    except sqlite3.Error as error:
        if not broken(error):
            return Opened(None, str(error))
        known = {**numbers, **salvage_numbers(place.path, place.connect)}
        return _begin_anew(place, known, str(error))
    except OSError as error:
        return Opened(None, error.strerror or str(error))


def put_aside(path: Path) -> None:
    """Rename a file, its log included; the last few that were put aside are kept.

    Raises:
        OSError: it stays where it is.
    """
    set_aside(path, _COMPANIONS)


def _store(place: Place, numbers: Mapping[str, int]) -> Store:
    return Store(place.path, place.owner, place.bounds, place.connect, numbers)


def _begin_anew(place: Place, numbers: Mapping[str, int], why: str) -> Opened:
    try:
        put_aside(place.path)
        return Opened(_store(place, numbers), aside=why, upto=numbers)
    except (sqlite3.Error, ForeignFileError) as error:
        return Opened(None, f"{error}; and it was set aside: {why}", why, numbers)
    except OSError as error:
        return Opened(None, f"{why}; it cannot be moved: {error.strerror or error}")
