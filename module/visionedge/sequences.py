"""Sequence numbers that never repeat for a camera, whatever happened to the module before."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

_AHEAD = 100_000
"""More frames than a camera gives between two calls of `remember`."""


class Sequences:
    """Where each camera's numbers start.

    The first number of a run is the time in milliseconds since 1970, so that it rises above all earlier runs
    even where nothing could be kept (no camera gives 1,000 frames a second for ever). The clock of a virtual
    machine can go back, so the last numbers are kept in `path` as well: where the clock is behind them, a run
    starts well above them.
    """

    def __init__(self, path: Path, wall_clock_s: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall_clock_s = wall_clock_s
        self._kept = self._read()

    def _read(self) -> dict[str, int]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(name): int(last) for name, last in kept.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning(
                "%s cannot be read (%s): sequence numbers start from the clock", self._path.name, error
            )
            return {}

    def first(self, camera: str) -> int:
        """The number of the camera's first frame in this run."""
        kept = self._kept.get(camera)
        now = int(self._wall_clock_s() * 1000)
        # Not the larger of the two: a run that is killed before it could keep anything would be given the
        # same number above the kept one as the next run.
        return now if kept is None or now > kept else kept + _AHEAD

    def remember(self, last: Mapping[str, int]) -> None:
        """Keep the last numbers on disk (atomically); called off the loop, every few seconds and at the end.

        Raises:
            OSError: the folder cannot be written; the clock alone protects the numbers then.
        """
        self._kept |= last
        text = json.dumps(self._kept, sort_keys=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self._path)
