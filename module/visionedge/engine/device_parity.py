"""Whether a device gives the same results as the CPU: the strongest rows, and the boxes that are reported.

A device rounds differently, so nothing is compared bit by bit: differences that do not change the results are
accepted. A device is compared when it is opened, on bundled pictures; and before a lost device is put back to
use, on the newest frames of the cameras.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.devices import DeviceVerdict, ReasonCode, classify_device_loss
from visionedge.engine.device.faults import EngineError, Fault
from visionedge.engine.device.session import DeviceSession, PictureBatch
from visionedge.frames.types import Detections, InputSpec, Placement
from visionedge.model.compiler.trial_run import compute_matching_share
from visionedge.model.model import Model
from visionedge.model.parity import MATCH_CONFIDENCE, MIN_BOXES, Parity, Tolerance, compare_detections
from visionedge.model.postprocess import Rows, to_detections

log = logging.getLogger(__name__)

MAX_COMPARED_ROWS = 10
"""Rows compared for each picture: rows further down have similar scores and may change places."""

MIN_MATCHED_SHARE = 0.8
_MIN_SCORE = 0.01  # rows below this score are noise
_BOX_TOLERANCE_SHARE = 0.02  # of the longer side
_SCORE_TOLERANCE = 0.05
_MIN_SPEEDUP = 1.5
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class ParityResult:
    """A device compared with the CPU on a number of `pictures`: bundled ones, or `frames` of the cameras.

    `rows` is the lowest share of matching rows over all pictures, of the strongest rows of either; None if
    neither detected anything. `boxes` compares the boxes that would be reported.
    """

    source: Literal["pictures", "frames"]
    pictures: int
    rows: float | None
    boxes: Parity

    @property
    def refusal(self) -> str | None:
        """Why the device must not be used, in one clause, or None."""
        if self.rows is not None and self.rows < MIN_MATCHED_SHARE:
            return (
                f"on {self.pictures} {self.source} only {self.rows:.0%} of its strongest rows match the CPU's"
                f" (at least {MIN_MATCHED_SHARE:.0%} must match)"
            )
        if self.boxes.boxes < MIN_BOXES:
            return None  # too few to judge by
        return self.boxes.refusal(Tolerance())

    @property
    def message(self) -> str:
        """The result in one clause."""
        seen = f"on {self.pictures} {self.source} "
        if self.rows is None:
            return f"{seen}neither it nor the CPU detected anything"
        seen += f"{self.rows:.0%} of its strongest rows match the CPU's"
        if self.boxes.boxes:
            seen += f", and {self.boxes.matched:.0%} of {self.boxes.boxes} boxes"
        return seen

    def document(self) -> dict[str, Any]:
        """As status shows it."""
        return {
            "on": self.source,
            "pictures": self.pictures,
            "rows": None if self.rows is None else round(self.rows, 4),
            "boxes": self.boxes.document(),
            "refusal": self.refusal,
        }

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "ParityResult":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: the document is invalid.
        """
        rows = document["rows"]
        return ParityResult(
            "frames" if document["on"] == "frames" else "pictures",
            int(document["pictures"]),
            None if rows is None else float(rows),
            Parity.from_document(document["boxes"]),
        )


@dataclass(frozen=True, slots=True)
class SpeedCheck:
    """The time of a picture in ms: on the device in its largest batch, and on one core of the CPU."""

    device_ms: float
    cpu_ms: float

    def doubt(self, device: str) -> str | None:
        """Why the device is implausibly slow (less than 1.5 times one CPU core), or None."""
        if device == "remote":
            return None  # its figure holds the way of the pictures there and back
        if self.device_ms * _MIN_SPEEDUP < self.cpu_ms:
            return None
        return (
            f"{device} takes {self.device_ms:.1f} ms for a picture, one core of the CPU {self.cpu_ms:.1f} ms:"
            " is the GPU really used?"
        )

    def document(self, device: str) -> dict[str, Any]:
        """As status shows it."""
        return {
            "deviceMs": round(self.device_ms, 3),
            "cpuMs": round(self.cpu_ms, 3),
            "doubt": self.doubt(device),
        }


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """How a device compares with the CPU; empty for the CPU itself, and if nothing was compared."""

    parity_results: tuple[ParityResult, ...] = ()
    speed_check: SpeedCheck | None = None


def check_against_cpu(
    model: Model,
    infer: Callable[[PictureBatch], Rows],
    cpu: DeviceSession,
    images: NDArray[np.uint8],
    *,
    max_batch: int,
    clock: Callable[[], int] = time.monotonic_ns,
) -> DeviceCheck:
    """Compute the same pictures (n, H, W, 3) on a device and on the CPU: a few batches of each.

    `infer` computes any number of pictures on the device, `max_batch` of them at once. Raises what it or the
    session raises.
    """
    batch = model.interpretation.input.batch or 1
    expected, cpu_ms = [], []
    for index in range(len(images)):
        start_ns = clock()
        expected.append(cpu.run(images[index : index + 1], batch))
        cpu_ms.append((clock() - start_ns) / 1e6 / batch)
    seen = compare_rows(model, np.concatenate(expected), infer(images), "pictures")
    full = images[np.arange(max_batch) % len(images)]
    device_ms = measure_median_ms(lambda: infer(full), rounds=_ROUNDS, clock=clock) / max_batch
    return DeviceCheck((seen,), SpeedCheck(device_ms, float(np.median(cpu_ms))))


def measure_median_ms(
    run: Callable[[], object], *, rounds: int, clock: Callable[[], int] = time.monotonic_ns
) -> float:
    """The median time of a run in ms; a first run is not counted."""
    run()
    taken_ns = []
    for _ in range(rounds):
        start_ns = clock()
        run()
        taken_ns.append(clock() - start_ns)
    return float(np.median(taken_ns)) / 1e6


def compare_rows(
    model: Model, expected: Rows, rows: Rows, source: Literal["pictures", "frames"]
) -> ParityResult:
    """Compare the rows of a device (n, K, 6) with those of the CPU for the same pictures."""
    sees = make_postprocessor(model)
    return ParityResult(
        source,
        len(expected),
        _compute_matched_share(model.input, expected, rows),
        compare_detections([sees(one) for one in expected], [sees(one) for one in rows]),
    )


def make_postprocessor(model: Model) -> Callable[[Rows], Detections]:
    """Makes detections of the rows of one picture (K, 6), from `MATCH_CONFIDENCE` on."""
    spec = model.input
    whole = Placement(0.0, 0.0, float(spec.width_px), float(spec.height_px))
    iou = 0.5 if model.interpretation.needs_nms else None
    return lambda rows: to_detections(rows, whole, MATCH_CONFIDENCE, iou, None)


def _compute_matched_share(spec: InputSpec, expected: Rows, rows: Rows) -> float | None:
    """The lowest share of a picture's strongest rows that match any row of the other side."""
    box_px = _BOX_TOLERANCE_SHARE * max(spec.width_px, spec.height_px)
    tolerance = np.array([box_px] * 4 + [_SCORE_TOLERANCE, 0.5])
    shares = []
    for some, others in ((expected, rows), (rows, expected)):
        for one, other in zip(some, others, strict=True):
            strongest = one[np.argsort(-one[:, 4])[:MAX_COMPARED_ROWS]]
            # A row with NaN is kept: it matches nothing.
            strongest = strongest[~(strongest[:, 4] < _MIN_SCORE)]
            if len(strongest):
                shares.append(compute_matching_share(strongest[None], other[None], tolerance))
    return min(shares, default=None)


# --- a candidate, before a device is put back to use --------------------------------------------------------

COMPARED_PICTURES = 4
"""How many frames are compared."""

_GATHER_TIMEOUT_S = 2.0
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

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kept: list[NDArray[np.uint8]] | None = None
        self.suspect_pictures: list[NDArray[np.uint8]] = []

    def record_invalid_output(self, pictures: PictureBatch) -> None:
        """Keep pictures for which a device gave NaN or infinity."""
        self.suspect_pictures = [np.array(picture) for picture in pictures[:COMPARED_PICTURES]]

    def offer(self, pictures: PictureBatch) -> None:
        """Pictures were computed; they are copied only while `gather` waits."""
        if self._kept is None:
            return
        with self._changed:
            if self._kept is not None:
                missing = COMPARED_PICTURES - len(self._kept)
                self._kept += [np.array(picture) for picture in pictures[:missing]]
                self._changed.notify_all()

    def gather(self, timeout_s: float) -> list[NDArray[np.uint8]]:
        """The next pictures, as many as are computed in time."""
        with self._changed:
            self._kept = []
            self._changed.wait_for(
                lambda: self._kept is None or len(self._kept) >= COMPARED_PICTURES, timeout_s
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
) -> CandidateComparison:
    """Wait for pictures and compute them on both workers. Never raises: the supervisor waits for a result."""
    pictures = [] if serving is None else recent.gather(_GATHER_TIMEOUT_S)
    if serving is None or not pictures:
        return CandidateComparison(None, "there was no frame to compare")
    try:
        return _compare_workers(model, serving, candidate, pictures)
    except Exception as error:
        log.exception("the candidate could not be compared")
        loss = DeviceVerdict(ReasonCode.DEVICE_FAILED, f"it could not be compared: {error}")
        return CandidateComparison(None, str(error), loss)


def _compare_workers(
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
