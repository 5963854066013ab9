"""The engine: bytes in, rows out, on the best device that works, and honest about which that is."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from visionedge.config import InferenceConfig
from visionedge.errors import DeviceError, ModelError
from visionedge.frames import InputSpec, utc_now
from visionedge.inference.any_engine import ProcessStatus
from visionedge.inference.cache import ready
from visionedge.inference.contest import Choice
from visionedge.inference.detections import Rows
from visionedge.inference.devices import (
    PROVIDERS,
    REMEDIES,
    DeviceState,
    Effective,
    Reason,
    Verdict,
    classify,
    has_driver,
    probe,
    wishes,
)
from visionedge.inference.model import Model
from visionedge.inference.picking import Candidate, pick, plain
from visionedge.inference.plan import Plan, batch_sizes, make_plan, usable_cores
from visionedge.inference.planner import PlanCache, PlanKey, measure
from visionedge.inference.runtime import import_onnxruntime
from visionedge.inference.session import (
    EngineError,
    NodePlaces,
    Pictures,
    Session,
    open_session,
    words_of,
)
from visionedge.inference.variants import demanded

log = logging.getLogger(__name__)


class Runs(Protocol):
    """What the engine asks of a session (`session.Session`)."""

    rows: int
    places: NodePlaces
    notes: tuple[str, ...]

    def run(self, pictures: Pictures, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`."""

    def keep(self, sizes: Collection[int]) -> None:
        """Let go of the memory of other batch sizes."""

    def close(self) -> None:
        """Let go of it."""


class Engine:
    """A compiled model on a device, warmed up. Any number of lanes may call `infer` at the same time.

    `unplanned_shapes` counts runs with a batch size that was not warmed up; it must stay 0.
    """

    def __init__(
        self, model: Model, session: Runs, device: DeviceState, plan: Plan, precision: Choice | None = None
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision or plain("as the model is")
        self.unplanned_shapes = 0
        self.process: ProcessStatus | None = None
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

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Compute pictures at the model's input size, uint8 (H, W, 3) BGR each: rows float32 (n, k, 6).

        A row is left, top, right, bottom (input pixels), score, class; by falling score. Any n will do: it
        is cut and padded to the sizes of the plan. With `least_score` only as many rows are given as some
        picture has at that score or above; without it k is K.

        Raises:
            EngineError: the pictures are of another shape, the engine is closed, or the device failed.
        """
        check_pictures(pictures, self.model.input, self.model.name)
        most = self.plan.max_batch
        parts = [self._bucket(pictures[start : start + most]) for start in range(0, len(pictures), most)]
        if not parts:
            return np.zeros((0, self.rows, 6), np.float32)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return rows if least_score is None else above(rows, least_score)

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

    def _bucket(self, pictures: Pictures) -> Rows:
        size = self.plan.bucket(len(pictures))
        if size not in self._warm:
            with self._lock:
                self.unplanned_shapes += 1
        return self._run(pictures, size)

    def _run(self, pictures: Pictures, size: int) -> Rows:
        """Run pictures padded to `size`; the rows of the real ones."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed")
        try:
            return session.run(pictures, size)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"{self.model.name} failed on {self.device.effective}: {words_of(error)}"
            ) from error

    def _warmed_up(self, plan: Plan) -> Plan:
        """Run every bucket of a plan; what is left of it when the model refuses the larger ones.

        Raises:
            EngineError: not even the smallest runs.
            ModelError: it gives no numbers.
        """
        pictures = noise(self.model.input, plan.max_batch)
        for bucket in plan.buckets:
            try:
                rows = self._run(pictures[:bucket], bucket)
            except EngineError as error:
                if not self._warm:
                    raise
                log.warning("%s: batches of %d and more are left out: %s", self.model.name, bucket, error)
                reason = f"{plan.reason}; batches of {bucket} and more failed"
                return dataclasses.replace(plan, buckets=tuple(sorted(self._warm)), reason=reason)
            if not np.isfinite(rows).all():
                raise ModelError(f"{self.model.path}: gives no numbers (NaN or infinity) for a plain picture")
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


def open_engine(
    model: Model,
    inference: InferenceConfig,
    *,
    data: Path | None = None,
    plans: Mapping[str, Plan] | None = None,
    measuring: bool = True,
    prober: Callable[[Effective], Verdict] = probe,
    cores: int | None = None,
) -> Engine:
    """Compile a model and open it on the best device that works, warmed up. Takes seconds.

    `data` is the folder where compiled graphs and measured plans are kept; None keeps nothing, and then the
    plan is that of a rule and not measured. `plans` are those to use as they are, by device. Without
    `measuring`, which takes seconds, a plan that was measured before is used, or the rule.

    Raises:
        DeviceError: `cuda` or `tensorrt` was demanded with fallback off, and is not usable.
        ModelError: the model cannot be compiled or run.
        UnavailableError: onnxruntime itself is not there.
    """
    cores = usable_cores() if cores is None else cores
    opening = _Opening(model, *ready(model, data), inference, cores, data, plans or {}, measuring)
    first: Verdict | None = None
    for device in wishes(inference.device):
        if device == "cpu":
            break
        verdict = opening.verdict_on(device, prober)
        if verdict.code is Reason.OK:
            opened = opening.attempt(device, first or Verdict(Reason.OK, "usable"))
            if isinstance(opened, Engine):
                return _announced(opened)
            verdict = opened
            opening.on_cpu(verdict).close()  # a model that the CPU cannot run either is to blame itself
        if not inference.fallback and inference.device != "auto":
            raise _unusable(device, verdict)
        first = first or verdict
    return _announced(opening.on_cpu(first or Verdict(Reason.ASKED_CPU, "the CPU was asked for")))


def _unusable(device: Effective, verdict: Verdict) -> DeviceError:
    return DeviceError(
        f"device {device} was demanded with fallback off and is not usable: {verdict.reason}"
        f" ({verdict.code}); {REMEDIES[verdict.code]}",
        verdict.code,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Opening:
    """What is needed to open one graph on one device after the other; `original` is the model as given."""

    original: Model
    model: Model
    graph: bytes
    inference: InferenceConfig
    cores: int
    data: Path | None
    plans: Mapping[str, Plan]
    measuring: bool

    def verdict_on(self, device: Effective, prober: Callable[[Effective], Verdict]) -> Verdict:
        """Whether a device other than the CPU is worth a session."""
        # The list says what was compiled in: absence is the truth, presence is not, so that is probed.
        if PROVIDERS[device] not in import_onnxruntime().get_available_providers():
            return Verdict(Reason.NO_GPU_BUILD, f"this onnxruntime was built without {PROVIDERS[device]}")
        return prober(device)

    def attempt(self, device: Effective, verdict: Verdict) -> Engine | Verdict:
        """The engine on this device, or why it is not there."""
        try:
            session = self._open(self.graph, device)
            if session.device != device:
                session.close()
                return Verdict(Reason.PROVIDER_REFUSED, f"its session came up on {session.device} only")
            return self._engine(session, device, verdict)
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions have no common base but this
            return classify(words_of(error, limit=4000), driver_present=has_driver())

    def on_cpu(self, verdict: Verdict) -> Engine:
        """The engine on the CPU, which always works or it is the model's fault."""
        try:
            return self._engine(self._open(self.graph, "cpu"), "cpu", verdict)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{self.model.path}: cannot be run: {words_of(error)}") from error

    def _open(self, graph: bytes, device: Effective) -> Session:
        return open_session(graph, device, max_batch=self.inference.max_batch, data=self.data)

    def _engine(self, session: Session, device: Effective, verdict: Verdict) -> Engine:
        state = DeviceState(self.inference.device, device, verdict.code, verdict.reason, utc_now())
        chosen, why = self._picked(session, device)

        def engine(plan: Plan) -> Engine:
            return Engine(self.model, chosen.session, state, plan, why)

        if (given := self.plans.get(device)) is not None:
            return engine(given)
        fixed = chosen.model.reading.input.batch
        rule = make_plan(device, self.inference.max_batch, fixed, self.cores)
        return engine(rule) if self.data is None else self._measured(engine, chosen, rule, self.data)

    def _picked(self, session: Session, device: Effective) -> tuple[Candidate[Session], Choice]:
        """The network in the precision that was asked for, or the fastest one here, and why that."""
        fp32, wanted = Candidate(self.model, self.graph, session), self.inference.precision
        if wanted == "fp32":
            return fp32, plain("fp32 was asked for")
        if wanted != "auto":
            variant = demanded(self.original, wanted, self.data)
            session.close()
            model, graph = ready(variant.of(self.original), self.data)
            return Candidate(model, graph, self._open(graph, device)), Choice(wanted, "it was asked for", {})
        if self.data is None or not self.measuring:
            return fp32, plain("nothing was measured")
        return pick(
            fp32,
            self.original,
            device=device,
            data=self.data,
            open_session=lambda graph: self._open(graph, device),
            run_of=self._run_of,
        )

    def _run_of(self, candidate: Candidate[Session]) -> Callable[[], object]:
        size = candidate.model.reading.input.batch or 1
        pictures = noise(self.model.input, size)
        return lambda: candidate.session.run(pictures, size)

    def _measured(
        self, open_with: Callable[[Plan], Engine], chosen: Candidate[Session], rule: Plan, data: Path
    ) -> Engine:
        """The engine with the plan that was measured here, now or earlier."""
        budget_ms, fixed = self.inference.latency_budget_ms, chosen.model.reading.input.batch
        device, most, plans = chosen.session.device, self.inference.max_batch, PlanCache(data / "plans")
        key = PlanKey.of(
            chosen.graph, device=device, cores=self.cores, max_batch=most, latency_budget_ms=budget_ms
        )
        if (kept := plans.load(key)) is not None:
            return open_with(Plan.of(kept))
        if not self.measuring:
            return open_with(rule)
        sizes = batch_sizes(most) if fixed is None else rule.buckets
        engine = open_with(dataclasses.replace(rule, buckets=sizes, reason=""))
        pictures = noise(self.model.input, engine.plan.max_batch)
        measured = measure(
            lambda batch: engine.infer(pictures[:batch]),
            device=device,
            max_batch=engine.plan.max_batch,
            fixed_batch=fixed,
            cores=self.cores,
            latency_budget_ms=budget_ms,
        )
        measured = dataclasses.replace(measured, reason=measured.reason + engine.plan.reason)
        plans.store(key, measured)
        engine.replan(Plan.of(measured))
        return engine


def _announced(engine: Engine) -> Engine:
    level = logging.WARNING if engine.device.degraded else logging.INFO
    precision = f"{engine.precision.precision}: {engine.precision.reason}"
    words = (engine.model.name, engine.device.describe(), precision, engine.plan.reason)
    log.log(level, "engine: %s; %s; %s; %s", *words)
    if fallen := engine.places.on_cpu:
        some = ", ".join(fallen[:8]) + (" …" if len(fallen) > 8 else "")
        log.warning("%d nodes of %s are computed on the CPU: %s", len(fallen), engine.model.name, some)
    return engine
