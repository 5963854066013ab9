"""The last test of a candidate: it must agree with the worker on the CPU about the newest frames."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.devices import DeviceVerdict, ReasonCode, classify_device_loss
from visionedge.engine.device.faults import EngineError, Fault
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.device_parity import ParityResult, compare_rows
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows

log = logging.getLogger(__name__)

COMPARED_PICTURES = 4
"""How many pictures are compared."""

GATHER_TIMEOUT_S = 2.0
"""How long to wait for frames. Without any, the check that the candidate made when it opened counts."""


class ComparedWorker(Protocol):
    """The part of a `Worker` that a comparison needs."""

    def compute(self, pictures: PictureBatch, min_score: float | None) -> Rows:
        """Pictures to rows float32 (n, k, 6)."""


class RecentPictures:
    """Copies of the newest pictures that were computed, made only while `gather` waits. Thread-safe.

    `suspect_pictures` are those of the last batch whose rows held NaN or infinity: the device may be faulty,
    or the model yields them by itself.
    """

    def __init__(self, max_count: int = COMPARED_PICTURES) -> None:
        self._max_count = max_count
        self._changed = threading.Condition()
        self._kept: list[NDArray[np.uint8]] | None = None
        self.suspect_pictures: list[NDArray[np.uint8]] = []

    def record_invalid_output(self, pictures: PictureBatch) -> None:
        """Keep pictures for which a device gave NaN or infinity."""
        self.suspect_pictures = [np.array(picture) for picture in pictures[: self._max_count]]

    def offer(self, pictures: PictureBatch) -> None:
        """Pictures were computed; they are copied only while `gather` waits."""
        if self._kept is None:
            return
        with self._changed:
            if self._kept is not None:
                missing = self._max_count - len(self._kept)
                self._kept += [np.array(picture) for picture in pictures[:missing]]
                self._changed.notify_all()

    def gather(self, timeout_s: float) -> list[NDArray[np.uint8]]:
        """The next pictures, as many as are computed in time."""
        with self._changed:
            self._kept = []
            self._changed.wait_for(
                lambda: self._kept is None or len(self._kept) >= self._max_count, timeout_s
            )
            kept, self._kept = self._kept, None
            return kept or []

    def close(self) -> None:
        """End the wait of `gather`."""
        with self._changed:
            self._kept = None
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class CandidateComparison:
    """What was found. `parity_result` is None if nothing could be compared; `loss`: the candidate failed."""

    parity_result: ParityResult | None
    message: str
    loss: DeviceVerdict | None = None


def is_model_fault(serving: ComparedWorker | None, suspect_pictures: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether the model yields NaN or infinity for these pictures on the CPU too."""
    if serving is None or not suspect_pictures:
        return False
    try:
        return not np.isfinite(serving.compute(suspect_pictures, None)).all()
    except EngineError:
        return False  # the worker cannot answer now


def compare_candidate(
    model: Model,
    serving: ComparedWorker | None,
    candidate: ComparedWorker,
    recent: RecentPictures,
    timeout_s: float = GATHER_TIMEOUT_S,
) -> CandidateComparison:
    """Wait for pictures and compute them on both workers. Never raises: the supervisor waits for a result."""
    pictures = [] if serving is None else recent.gather(timeout_s)
    if serving is None or not pictures:
        return CandidateComparison(None, "there was no frame to compare")
    try:
        return _compare(model, serving, candidate, pictures)
    except Exception as error:
        log.exception("the candidate could not be compared")
        loss = DeviceVerdict(ReasonCode.DEVICE_FAILED, f"it could not be compared: {error}")
        return CandidateComparison(None, str(error), loss)


def _compare(
    model: Model, serving: ComparedWorker, candidate: ComparedWorker, pictures: Sequence[NDArray[np.uint8]]
) -> CandidateComparison:
    try:
        expected = serving.compute(pictures, None)
    except EngineError as error:
        return CandidateComparison(None, f"the CPU could not compute the frames: {error}")
    try:
        rows = candidate.compute(pictures, None)
    except EngineError as error:
        loss = classify_device_loss(error.fault or Fault.DIED, str(error))
        return CandidateComparison(None, str(error), loss)
    parity_result = compare_rows(model, expected, rows, "frames")
    return CandidateComparison(parity_result, parity_result.message)
