"""The engine: bytes in, rows out, on one device. `startup` opens it."""

import dataclasses
import logging
import threading
from collections.abc import Callable

import numpy as np

from visionedge.engine.device.devices import DeviceState
from visionedge.engine.device.faults import FATAL, Fault, fault_of, words_in
from visionedge.engine.device.seam import Runs
from visionedge.engine.device.session import EngineError, Pictures
from visionedge.engine.device_parity import Proof
from visionedge.engine.interface import Computed, ProcessStatus, Recovery
from visionedge.engine.plan import Plan
from visionedge.engine.precision_choice import plain
from visionedge.errors import ModelError
from visionedge.frames.types import InputSpec
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import Choice

log = logging.getLogger(__name__)


class Engine:
    """A compiled model on a device, warmed up. Any number of lanes may call `infer` at the same time.

    `unplanned_shapes` counts runs with a batch size that was not warmed up; it must stay 0. When memory does
    not suffice for a batch, its size and all above are left out of the plan, `on_plan` is told, and the
    pictures are computed in smaller ones. `checks_numbers`: rows that are none (NaN or infinity) are a fault
    of the device.
    """

    def __init__(
        self, model: Model, session: Runs, device: DeviceState, plan: Plan, precision: Choice | None = None
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision or plain("as the model is")
        self.unplanned_shapes = 0
        self.process: ProcessStatus | None = None
        self.recovery: Recovery | None = None
        self.proof = Proof()
        self.checks_numbers = device.effective != "cpu"
        self.on_plan: Callable[[Plan], None] = lambda _plan: None
        self._session: Runs | None = session
        self.places = session.places
        self.notes = session.notes
        self.rows = session.rows
        self._warm: set[int] = set()
        self._lock = threading.Lock()
        self.plan = self._warmed_up(plan)

    def __repr__(self) -> str:
        state = "closed" if self._session is None else "open"
        return f"<Engine {state} {self.model.name} on {self.device.effective} buckets={self.plan.buckets}>"

    @property
    def callers(self) -> int:
        """How many threads keep it busy: the lanes of its plan."""
        return self.plan.lanes

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Compute pictures at the model's input size, uint8 (H, W, 3) BGR each: rows float32 (n, k, 6).

        A row is left, top, right, bottom (input pixels), score, class; by falling score. Any n will do: it
        is cut and padded to the sizes of the plan. With `least_score` only as many rows are given as some
        picture has at that score or above; without it k is K.

        Raises:
            EngineError: the pictures are of another shape, the engine is closed, or the device failed.
        """
        check_pictures(pictures, self.model.input, self.model.name)
        parts: list[Rows] = []
        start = 0
        while start < len(pictures):
            plan = self.plan
            part = pictures[start : start + plan.max_batch]
            size = plan.bucket(len(part))
            try:
                parts.append(self._sized(part, size))
            except EngineError as error:
                if error.fault is not Fault.OUT_OF_MEMORY or not self._narrow(size, error):
                    raise
            else:
                start += len(part)
        if not parts:
            return np.zeros((0, self.rows, 6), np.float32)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return rows if least_score is None else above(rows, least_score)

    def compute(self, pictures: Pictures, least_score: float | None = None) -> Computed:
        """The same, and the device."""
        return Computed(self.infer(pictures, least_score), self.device.effective)

    def close(self) -> None:
        """Let go of the session; batches that run are finished."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def replan(self, plan: Plan) -> None:
        """Go on with another plan, all of whose sizes were warmed up; no batch may be running."""
        self.plan = plan
        self._warm &= set(plan.buckets)
        if self._session is not None:
            self._session.keep(plan.buckets)

    def _sized(self, pictures: Pictures, size: int) -> Rows:
        if size not in self._warm:
            with self._lock:
                self.unplanned_shapes += 1
        return self._run(pictures, size)

    def _run(self, pictures: Pictures, size: int) -> Rows:
        """Run pictures padded to `size`; the rows of the real ones."""
        session, device = self._session, self.device.effective
        if session is None:
            raise EngineError("the engine is closed")
        try:
            rows = session.run(pictures, size)
        except EngineError:
            raise
        except Exception as error:
            fault = fault_of(f"{type(error).__name__}: {error}", on_gpu=device != "cpu")
            words = words_in(str(error)) or type(error).__name__
            raise EngineError(f"{self.model.name} failed on {device}: {words}", fault) from error
        if self.checks_numbers and not np.isfinite(rows).all():
            raise EngineError(f"{self.model.name} gave rows that are no numbers on {device}", Fault.GARBAGE)
        return rows

    def _narrow(self, size: int, error: EngineError) -> bool:
        """Leave batches of `size` and more out of the plan; False where there is no smaller one."""
        with self._lock:
            plan = self.plan
            if plan.max_batch < size:
                return True  # another lane did it
            smaller = tuple(bucket for bucket in plan.buckets if bucket < size)
            if not smaller or self._session is None:
                return False
            reason = f"{plan.reason}; batches of {size} and more did not fit into memory"
            self.plan = dataclasses.replace(plan, buckets=smaller, reason=reason)
            if self.device.effective != "cpu":  # elsewhere runs would have to be stopped for that
                self._session.keep(smaller)
        log.warning("batches of %d pictures and more are left out: %s", size, error)
        self.on_plan(self.plan)
        return True

    def _warmed_up(self, plan: Plan) -> Plan:
        """Run every bucket of a plan; what is left of it when the model refuses the larger ones.

        Raises:
            EngineError: not even the smallest runs.
            ModelError: its output contains NaN or infinity.
        """
        pictures = noise(self.model.input, plan.max_batch)
        for bucket in plan.buckets:
            try:
                rows = self._run(pictures[:bucket], bucket)
            except EngineError as error:
                if not self._warm or error.fault in FATAL:
                    raise
                log.warning("%s: batches of %d and more are left out: %s", self.model.name, bucket, error)
                reason = f"{plan.reason}; batches of {bucket} and more failed"
                return dataclasses.replace(plan, buckets=tuple(sorted(self._warm)), reason=reason)
            if not np.isfinite(rows).all():
                raise ModelError(f"{self.model.path}: output contains NaN or infinity for a plain picture")
            self._warm.add(bucket)
        return plan


def noise(spec: InputSpec, count: int) -> Pictures:
    """Pictures that mean nothing, the same each time; for warming up and measuring."""
    size = (count, spec.height_px, spec.width_px, 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def check_pictures(pictures: Pictures, spec: InputSpec, name: str) -> None:
    """Refuse pictures that are not as the model wants them.

    Raises:
        EngineError: what is wanted, and what was given.
    """
    shape = (spec.height_px, spec.width_px, 3)
    for picture in pictures:
        if picture.shape != shape or picture.dtype != np.uint8:
            raise EngineError(
                f"{name} takes uint8 pictures of {spec.width_px} x {spec.height_px},"
                f" not {picture.dtype} {picture.shape}"
            )


def above(rows: Rows, least_score: float) -> Rows:
    """As many rows (n, k, 6) of each picture as some picture has at this score or above."""
    counted = np.flatnonzero((rows[..., 4] >= least_score).any(axis=0))
    return rows[:, : int(counted[-1]) + 1 if len(counted) else 0]
