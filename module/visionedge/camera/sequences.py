"""Sequence numbers and epochs that never repeat for a camera, whatever happened to the module before."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.runtime.state_file import DamagedError, read_json, set_aside, whole_number, write_json

log = logging.getLogger(__name__)

MOST_NAMES = 10_000
"""Cameras whose last numbers are kept; those that ran longest ago go first."""

KEPT_S = 400 * 86_400

_LARGEST_SEQUENCE = 10**14
"""As milliseconds the year 5138; a larger number is damage, and would soon be more than JSON carries."""

_SCHEMA = "visionedge/sequences/2"
_AHEAD = 100_000
"""More frames than a camera gives between two calls of `remember`."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a camera is: the number of its next frame, and its epoch."""

    sequence: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    position: Position
    used_s: int


class Sequences:
    """Where each camera's numbers start.

    The first number of a run is the time in milliseconds since 1970, so that it rises above all earlier runs
    even where nothing could be kept (no camera gives 1,000 frames a second for ever). The clock of a virtual
    machine can go back, so the last numbers are kept in `path` as well: where the clock is behind them, a run
    starts well above them. `lost` says why the file was set aside, None where it was not.
    """

    def __init__(self, path: Path, wall_clock_s: Callable[[], float] = time.time) -> None:
        self.lost: str | None = None
        self._lock = threading.Lock()
        self.path = path
        self._wall_clock_s = wall_clock_s
        self._kept = self._read()

    def _read(self) -> dict[str, _Kept]:
        try:
            return _positions(read_json(self.path), int(self._wall_clock_s()))
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("%s cannot be read (%s): numbers start from the clock", self.path, error.strerror)
        except DamagedError as error:
            self._set_aside(str(error))
        return {}

    def _set_aside(self, why: str) -> None:
        self.lost = why
        try:
            set_aside(self.path)
        except OSError as error:
            self.lost = f"{why}; it cannot be moved: {error.strerror or error}"
        log.warning("%s is damaged (%s): numbers start from the clock", self.path, self.lost)

    def first(self, camera: str) -> int:
        """The number of the camera's first frame in this run."""
        kept = self._kept.get(camera)
        now = int(self._wall_clock_s() * 1000)
        # Not the larger of the two: a run that is killed before it could keep anything would be given the
        # same number above the kept one as the next run.
        if kept is None or now > kept.position.sequence:
            return now
        return kept.position.sequence + _AHEAD

    def last_epoch(self, camera: str) -> int:
        """The epoch that the camera reached before; 0 where nothing is known."""
        kept = self._kept.get(camera)
        return 0 if kept is None else kept.position.epoch

    def remember(self, last: Mapping[str, Position]) -> None:
        """Keep where the cameras are on disk (atomically); called off the loop, every few seconds.

        What has not been used for `KEPT_S` goes, and the oldest of more than `MOST_NAMES`.

        Raises:
            OSError: the folder cannot be written; the clock alone protects the numbers then.
        """
        with self._lock:  # the last call may come while one before it still waits for the disk
            self._remember(last, int(self._wall_clock_s()))

    def _remember(self, last: Mapping[str, Position], now_s: int) -> None:
        kept = {name: one for name, one in self._kept.items() if now_s - one.used_s <= KEPT_S}
        kept |= {name: _Kept(position, now_s) for name, position in last.items()}
        by_age = sorted(kept, key=lambda name: (name in last, kept[name].used_s), reverse=True)
        self._kept = {name: kept[name] for name in sorted(by_age[:MOST_NAMES])}
        write_json(self.path, {"schema": _SCHEMA, "cameras": {n: _entry(k) for n, k in self._kept.items()}})


def _entry(kept: _Kept) -> dict[str, int]:
    return {"next": kept.position.sequence, "epoch": kept.position.epoch, "usedAt": kept.used_s}


def _positions(document: Any, now_s: int) -> dict[str, _Kept]:
    """What a file says; one of an earlier version has only the numbers, by name.

    Raises:
        DamagedError: it is neither.
    """
    if not isinstance(document, dict):
        raise DamagedError("it is no mapping")
    if "schema" not in document:
        return {name: _Kept(Position(_sequence(last)), now_s) for name, last in document.items()}
    cameras = document.get("cameras")
    if document["schema"] != _SCHEMA or not isinstance(cameras, dict):
        raise DamagedError("its schema is not known here")
    return {name: _position(entry, now_s) for name, entry in cameras.items()}


def _position(entry: Any, now_s: int) -> _Kept:
    if not isinstance(entry, dict):
        raise DamagedError("an entry in it is no mapping")
    position = Position(_sequence(entry.get("next")), whole_number(entry.get("epoch"), 10**9))
    # A time in the future would keep an entry for ever.
    return _Kept(position, min(now_s, whole_number(entry.get("usedAt"))))


def _sequence(value: Any) -> int:
    return whole_number(value, _LARGEST_SEQUENCE)
