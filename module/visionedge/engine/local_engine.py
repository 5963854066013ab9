"""How an engine is opened: on the best device that works, and honest about which that is."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from visionedge.config.schema import InferenceConfig
from visionedge.engine.autotune import PlanCache, PlanKey, measure
from visionedge.engine.device.devices import (
    PROVIDERS,
    REMEDIES,
    USABLE,
    Assignment,
    DeviceState,
    Effective,
    Reason,
    Verdict,
    classify,
    has_driver,
    lost,
    wishes,
)
from visionedge.engine.device.faults import FATAL, Fault, fault_of, words_in
from visionedge.engine.device.session import REAL, EngineError, OnDevice, Pictures, Runs, Seam, words_of
from visionedge.engine.device_parity import Proof, against_cpu
from visionedge.engine.interface import Computed, ProcessStatus, Recovery
from visionedge.engine.plan import Pair, Plan, batch_sizes, make_plan
from visionedge.engine.precision_choice import (
    Agreement,
    Candidate,
    Trials,
    agreement,
    apart_here,
    pick,
    plain,
)
from visionedge.errors import DeviceError, ModelError
from visionedge.frames.types import Detections, InputSpec, utc_now
from visionedge.model.compiler.build import ready
from visionedge.model.model import Model
from visionedge.model.parity import PARTNER_CONFIDENCE, Tolerance
from visionedge.model.postprocess import Rows, Selection
from visionedge.model.quantization.search import Sample
from visionedge.model.quantization.variants import demanded
from visionedge.runtime.measurement import Choice
from visionedge.runtime.process_limits import usable_cores

# The engine: bytes in, rows out, on one device. `startup` opens it.


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


def open_engine(
    model: Model,
    inference: InferenceConfig,
    *,
    data: Path | None = None,
    plans: Mapping[str, Plan] | None = None,
    measuring: bool = True,
    prober: Callable[[Effective], Verdict] | None = None,
    cores: int | None = None,
    only: Assignment | None = None,
    seam: Seam = REAL,
    level: int = logging.INFO,
) -> Engine:
    """Compile a model and open it on the best device that works, warmed up. Takes seconds.

    `data` is the folder where compiled graphs and measured plans are kept; None keeps nothing, and then the
    plan is that of a rule and not measured. `plans` are those to use as they are, by device. Without
    `measuring`, which takes seconds, a plan that was measured before is used, or the rule. `only` names the
    one device to open, whatever the configuration says. `level` is that of the line that says what came of
    it, where all is as it was asked for.

    Raises:
        DeviceError: `cuda` or `tensorrt` was demanded without the CPU as a way out, and is not usable; or
            `only` is not.
        ModelError: the model cannot be compiled or run.
        UnavailableError: onnxruntime itself is not there.
    """
    if prober is not None:
        seam = dataclasses.replace(seam, probe=prober)
    cores = usable_cores() if cores is None else cores
    opening = _Opening(model, *ready(model, data), inference, cores, data, plans or {}, measuring, seam)
    return _announced(opening.best() if only is None else opening.only(only), level)


def _unusable(device: Effective, verdict: Verdict) -> DeviceError:
    return DeviceError(
        f"device {device} was demanded with fallback to the CPU off and is not usable: {verdict.reason}"
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

    seam: Seam

    def best(self) -> Engine:
        """The engine on the best device that works.

        Raises:
            DeviceError: a device was demanded, and the CPU may not stand in for it.
        """
        first: Verdict | None = None
        for device in wishes(self.inference.device)[:-1]:
            verdict = self.verdict_on(device)
            if verdict.code is Reason.OK:
                opened = self.attempt(device, first or USABLE)
                if isinstance(opened, Engine):
                    return opened
                verdict = opened
                self.on_cpu(verdict).close()  # a model that the CPU cannot run either is to blame itself
            if self.inference.fallback != "degrade" and self.inference.device != "auto":
                raise _unusable(device, verdict)
            first = first or verdict
        return self.on_cpu(first or Verdict(Reason.ASKED_CPU, "the CPU was asked for"))

    def only(self, assigned: Assignment) -> Engine:
        """The engine on this device.

        Raises:
            DeviceError: it does not work there.
        """
        if assigned.device == "cpu":
            return self.on_cpu(assigned.because)
        opened = self.attempt(assigned.device, assigned.because)
        if isinstance(opened, Verdict):
            raise DeviceError(f"{assigned.device}: {opened.reason}", opened.code)
        return opened

    def verdict_on(self, device: Effective) -> Verdict:
        """Whether a device other than the CPU is worth a session."""
        if not self.seam.built_in(device):
            return Verdict(Reason.NO_GPU_BUILD, f"this onnxruntime was built without {PROVIDERS[device]}")
        return self.seam.probe(device)

    def attempt(self, device: Effective, verdict: Verdict) -> Engine | Verdict:
        """The engine on this device, or why it is not there."""
        try:
            session = self._open(self.graph, device)
            if session.device != device:
                session.close()
                return Verdict(Reason.PROVIDER_REFUSED, f"its session came up on {session.device} only")
            return self._proven(self._engine(session, device, verdict))
        except ModelError:
            raise
        except EngineError as error:
            if error.fault in (Fault.GARBAGE, Fault.OUT_OF_MEMORY):
                return lost(error.fault, str(error))
            return classify(str(error), driver_present=has_driver())
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions have no common base but this
            return classify(words_of(error, limit=4000), driver_present=has_driver())

    def _proven(self, engine: Engine) -> Engine | Verdict:
        """The engine, if it computes what the CPU does, or that does not matter; else why it is refused."""
        from visionedge.engine.precision_choice import samples_for  # it brings OpenCV along

        policy, device = self.inference.parity, engine.device.effective
        if policy == "off":
            return engine
        cpu = self._open(self.graph, "cpu")
        try:
            samples = samples_for(self.model.input)[::2]
            engine.proof = against_cpu(engine, cpu, np.stack([sample.image for sample in samples]))
        finally:
            cpu.close()
        (seen,), pace = engine.proof.likenesses, engine.proof.pace
        doubts = [seen.refusal, None if pace is None else pace.doubt(device)]
        engine.notes += tuple(doubt for doubt in doubts if doubt is not None)
        if seen.refusal is not None and policy == "refuse":
            engine.close()
            return Verdict(Reason.PARITY_REFUSED, f"it computes, but not what the CPU does: {seen.refusal}")
        return engine

    def on_cpu(self, verdict: Verdict) -> Engine:
        """The engine on the CPU, which always works or it is the model's fault."""
        try:
            return self._engine(self._open(self.graph, "cpu"), "cpu", verdict)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{self.model.path}: cannot be run: {words_of(error)}") from error

    def _open(self, graph: bytes, device: Effective) -> OnDevice:
        return self.seam.open(graph, device, max_batch=self.inference.max_batch, data=self.data)

    def _engine(self, session: OnDevice, device: Effective, verdict: Verdict) -> Engine:
        state = DeviceState(self.inference.device, device, verdict.code, verdict.reason, utc_now())
        chosen, why = self._picked(session, device)

        def engine(plan: Plan) -> Engine:
            return Engine(self.model, chosen.session, state, plan, why)

        if (given := self.plans.get(device)) is not None:
            return engine(given)
        fixed = chosen.model.reading.input.batch
        rule = make_plan(device, self.inference.max_batch, fixed, self.cores)
        return engine(rule) if self.data is None else self._measured(engine, chosen, rule, self.data)

    def _picked(self, session: OnDevice, device: Effective) -> tuple[Candidate[OnDevice], Choice]:
        """The network in the precision that was asked for, or the fastest one here, and why that."""
        fp32, wanted = Candidate(self.model, self.graph, session), self.inference.precision
        if wanted == "fp32":
            return fp32, plain("fp32 was asked for")
        if wanted != "auto":
            variant = demanded(self.original, wanted, self.data)
            session.close()
            model, graph = ready(variant.of(self.original), self.data)
            return Candidate(model, graph, self._open(graph, device)), Choice(wanted, "it was asked for", {})
        if self.data is None:
            return fp32, plain("nothing was measured")
        trials = Trials(lambda graph: self._open(graph, device), self._run_of, self._judge)
        return pick(
            fp32, self.original, device=device, data=self.data, trials=trials, measuring=self.measuring
        )

    def _run_of(self, candidate: Candidate[OnDevice]) -> Callable[[], object]:
        size = candidate.model.reading.input.batch or 1
        pictures = noise(self.model.input, size)
        return lambda: candidate.session.run(pictures, size)

    def _judge(
        self, fp32: Candidate[OnDevice], variant: Candidate[OnDevice], tolerance: Tolerance
    ) -> Agreement:
        """Whether a variant sees what fp32 sees, on this device."""
        from visionedge.engine.precision_choice import samples_for  # it brings OpenCV along

        samples = samples_for(self.model.input)
        before = [self._seen(fp32, sample) for sample in samples]
        after = [self._seen(variant, sample) for sample in samples]
        return agreement(before, after, tolerance, lambda: apart_here(fp32.model, variant.model, samples))

    def _seen(self, candidate: Candidate[OnDevice], sample: Sample) -> Detections:
        size = candidate.model.reading.input.batch or 1
        rows = candidate.session.run(sample.image[None], size)[0]
        selection = Selection.of(candidate.model, PARTNER_CONFIDENCE, self.inference.iou)
        return selection.apply(rows, sample.placement)

    def _measured(
        self, open_with: Callable[[Plan], Engine], chosen: Candidate[OnDevice], rule: Plan, data: Path
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
        log.info("measuring this machine for the fastest number of lanes and batch size: about 5 s, once")
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


def ready_words(engine: Engine) -> str:
    """What computes where, in one short line.

    ``engine ready: yolox-nano on cpu (fp32), 2 lanes x batch 1, 14.2 ms; no GPU: onnxruntime without CUDA``
    """
    device, plan = engine.device, engine.plan
    pair = Pair(plan.lanes, plan.max_batch)
    parts = [
        f"engine ready: {engine.model.name} on {device.effective} ({engine.precision.precision}), {pair}"
    ]
    table = plan.measured.table if plan.measured else ()
    parts += [f"{line.batch_ms:.1f} ms" for line in table if line.pair == pair and line.batch_ms is not None]
    return ", ".join(parts) + _why_no_gpu(device)


def _why_no_gpu(device: DeviceState) -> str:
    if device.code in (Reason.OK, Reason.ASKED_CPU):
        return ""
    if device.code is Reason.NO_GPU_BUILD and not device.degraded:
        return "; no GPU: onnxruntime without CUDA"
    return f"; {device.requested} was asked for: {device.reason} ({device.code})"


def _announced(engine: Engine, level: int) -> Engine:
    log.log(logging.WARNING if engine.device.degraded else level, "%s", ready_words(engine))
    precision = f"{engine.precision.precision}: {engine.precision.reason}"
    words = (engine.model.name, engine.device.describe(), precision, engine.plan.reason)
    log.debug("engine: %s; %s; %s; %s", *words)
    for likeness in engine.proof.likenesses:
        log.info("parity of %s with the CPU: %s", engine.device.effective, likeness.words)
        if likeness.refusal is not None:
            log.warning("%s computes otherwise than the CPU: %s", engine.device.effective, likeness.refusal)
    if (pace := engine.proof.pace) and (doubt := pace.doubt(engine.device.effective)):
        log.warning("%s", doubt)
    if fallen := engine.places.on_cpu:
        some = ", ".join(fallen[:8]) + (" …" if len(fallen) > 8 else "")
        log.warning("%d nodes of %s are computed on the CPU: %s", len(fallen), engine.model.name, some)
    return engine
