"""The last test of a candidate: the newest pictures, computed by it and by the engine that serves."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.devices import Reason, Verdict, lost
from visionedge.engine.device.faults import Fault
from visionedge.engine.device.session import EngineError, Pictures
from visionedge.engine.device_parity import Likeness, likeness
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows

log = logging.getLogger(__name__)

FRAMES = 4
"""How many pictures are compared."""

GATHER_S = 2.0
"""How long they are waited for; where cameras give none, what the candidate showed at its opening counts."""


class Asked(Protocol):
    """A child, as far as it is asked here (`worker.Worker`)."""

    def compute(self, pictures: Pictures, least_score: float | None) -> Rows:
        """Pictures to rows float32 (n, k, 6)."""


class Recent:
    """The newest pictures that were computed, kept while somebody wants them. Thread-safe.

    `suspects` are those of the last batch that came to no numbers: the device may be to blame, or the model.
    """

    def __init__(self, most: int = FRAMES) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._kept: list[NDArray[np.uint8]] | None = None
        self.suspects: list[NDArray[np.uint8]] = []

    def suspect(self, pictures: Pictures) -> None:
        """For these a device gave rows that are no numbers."""
        self.suspects = [np.array(picture) for picture in pictures[: self._most]]

    def offer(self, pictures: Pictures) -> None:
        """Pictures were computed; they are copied if they are wanted."""
        if self._kept is None:
            return
        with self._changed:
            if self._kept is not None:
                room = self._most - len(self._kept)
                self._kept += [np.array(picture) for picture in pictures[:room]]
                self._changed.notify_all()

    def gather(self, timeout_s: float) -> list[NDArray[np.uint8]]:
        """The next ones, as many as come in time."""
        with self._changed:
            self._kept = []
            self._changed.wait_for(lambda: self._kept is None or len(self._kept) >= self._most, timeout_s)
            kept, self._kept = self._kept, None
            return kept or []

    def close(self) -> None:
        """Let nobody wait."""
        with self._changed:
            self._kept = None
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it: a likeness, or why there is none; `lost`: the candidate failed over it."""

    likeness: Likeness | None
    words: str
    lost: Verdict | None = None


def is_the_model(serving: Asked | None, suspects: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether the CPU gives no numbers for these pictures either."""
    if serving is None or not suspects:
        return False
    try:
        return not np.isfinite(serving.compute(suspects, None)).all()
    except EngineError:
        return False  # it says nothing now


def compare_candidate(
    model: Model, serving: Asked | None, candidate: Asked, recent: Recent, timeout_s: float = GATHER_S
) -> Comparison:
    """Wait for pictures and compute them on both. Never raises: an answer is waited for."""
    pictures = [] if serving is None else recent.gather(timeout_s)
    if serving is None or not pictures:
        return Comparison(None, "there was no frame to compare")
    try:
        return _compared(model, serving, candidate, pictures)
    except Exception as error:
        log.exception("the candidate could not be compared")
        return Comparison(
            None, str(error), Verdict(Reason.DEVICE_FAILED, f"it could not be compared: {error}")
        )


def _compared(
    model: Model, serving: Asked, candidate: Asked, pictures: Sequence[NDArray[np.uint8]]
) -> Comparison:
    try:
        expected = serving.compute(pictures, None)
    except EngineError as error:
        return Comparison(None, f"the CPU could not be asked: {error}")
    try:
        rows = candidate.compute(pictures, None)
    except EngineError as error:
        return Comparison(None, str(error), lost(error.fault or Fault.DIED, str(error)))
    seen = likeness(model, expected, rows, "frames")
    return Comparison(seen, seen.words)
