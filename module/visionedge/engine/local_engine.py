"""The engine in this process, and how it is opened: on the best device that works.

`open_engine` compiles the model, tries the devices in order, picks the precision, compares the device with
the CPU, and measures the plan. `LocalEngine` then computes batches: uint8 pictures in, float32 rows out.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionedge.engine.autotune import (
    FINAL_TIME_BUDGET_S,
    autotune_plan,
    make_noise_pictures,
)
from visionedge.engine.autotune import TIME_BUDGET_S as PLAN_TIME_BUDGET_S
from visionedge.engine.candidate_parity import make_sample_pictures
from visionedge.engine.candidates import CandidateGraph, CandidateSource, EngineSelector, OpenCandidate
from visionedge.engine.device.backend import DEVICE_BACKEND, DeviceBackend
from visionedge.engine.device.devices import (
    PROVIDERS,
    USABLE,
    DeviceAssignment,
    DeviceState,
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    Runtime,
    classify_device_loss,
    classify_start_error,
    device_preference,
    find_remedy,
)
from visionedge.engine.device.faults import (
    FATAL_FAULTS,
    EngineError,
    Fault,
    classify_fault,
    describe_error,
    shorten_error_text,
)
from visionedge.engine.device.remote import (
    RemoteError,
    RemoteSession,
    ReplicaStatus,
    add_remote,
    describe_destination,
)
from visionedge.engine.device.session import DeviceSession, PictureBatch
from visionedge.engine.device_parity import DeviceCheck, check_against_cpu
from visionedge.engine.engine_choice import TIME_BUDGET_S, EngineCandidate, EngineChoice, Progress
from visionedge.engine.interface import EngineInfo, EngineSettings, Inference
from visionedge.engine.plan import (
    OperatingPoint,
    Plan,
    PlanCache,
    PlanKey,
    list_batch_sizes,
    make_default_plan,
)
from visionedge.errors import DeviceError, ModelError, UnavailableError
from visionedge.frames.types import InputSpec, utc_now
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.process_limits import usable_cores

log = logging.getLogger(__name__)


if TYPE_CHECKING:
    from visionedge.config.schema import InferenceConfig


class LocalEngine:
    """A compiled model on a device, warmed up. Any number of threads may call `infer` at the same time.

    When memory does not suffice for a batch, its size and all larger sizes are removed from the plan,
    `on_plan_reduced` is called, and the pictures are computed in smaller batches. `checks_finite`: NaN or
    infinity in the rows is a fault of the device.
    """

    def __init__(
        self,
        model: Model,
        session: DeviceSession,
        device: DeviceState,
        plan: Plan,
        choice: EngineChoice | None = None,
    ) -> None:
        self.checks_finite = device.effective != "cpu"
        self._input = model.input
        self.on_plan_reduced: Callable[[Plan], None] = lambda _plan: None
        self._session: DeviceSession | None = session
        self._warm: set[int] = set()
        self._lock = threading.Lock()
        self._info = EngineInfo(
            model,
            device,
            choice or EngineChoice(EngineCandidate(session.runtime, "fp32"), "as the model is"),
            plan,
            session.node_placement,
            DeviceCheck(),
            session.notes,
            session.rows,
            runtime=session.runtime,
        )
        self._update(plan=self._warm_up(plan))

    def __repr__(self) -> str:
        state, info = "closed" if self._session is None else "open", self._info
        return (
            f"<LocalEngine {state} {info.model.name} on {info.device.effective} buckets={info.plan.buckets}>"
        )

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        """Compute pictures; see `Engine.infer`. Any number will do: it is cut and padded to the plan's sizes.

        Raises:
            EngineError: the pictures have another shape, the engine is closed, or the device failed.
        """
        info = self._info
        check_pictures(pictures, self._input, info.model.name)
        parts: list[Rows] = []
        start = 0
        while start < len(pictures):
            plan = self._info.plan
            part = pictures[start : start + plan.max_batch]
            size = plan.bucket(len(part))
            try:
                parts.append(self._run_bucket(part, size))
            except EngineError as error:
                if error.fault is not Fault.OUT_OF_MEMORY or not self._reduce_plan(size, error):
                    raise
            else:
                start += len(part)
        if not parts:
            return Inference(np.zeros((0, info.max_rows, 6), np.float32), info.device.effective)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Inference(rows if min_score is None else trim_rows(rows, min_score), info.device.effective)

    def info(self) -> EngineInfo:
        """A snapshot; see `Engine.info`."""
        session = self._session
        if isinstance(session, RemoteSession):
            return dataclasses.replace(self._info, replicas=session.statuses())
        return self._info

    def close(self) -> None:
        """Free the session; batches in progress are finished."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def set_plan(self, plan: Plan) -> None:
        """Use another plan, all of whose sizes were warmed up; no batch may be running."""
        self._update(plan=plan)
        self._warm &= set(plan.buckets)
        if self._session is not None:
            self._session.keep_only(plan.buckets)

    def watch_replicas(self, on_change: Callable[[tuple[ReplicaStatus, ...]], None]) -> None:
        """Call this when the replicas of a remote device change; see `RemoteSession.watch`."""
        if isinstance(self._session, RemoteSession):
            self._session.watch(on_change)

    def set_device_check(self, device_check: DeviceCheck, doubts: Iterable[str]) -> None:
        """Show how the device compares with the CPU, and add the doubts to the notes."""
        self._update(device_check=device_check, notes=(*self._info.notes, *doubts))

    def add_note(self, note: str) -> None:
        """Show an option that was refused, with the reason."""
        self._update(notes=(*self._info.notes, note))

    def _update(self, **changes: Any) -> None:
        self._info = dataclasses.replace(self._info, **changes)

    def _run_bucket(self, pictures: PictureBatch, size: int) -> Rows:
        if size not in self._warm:
            with self._lock:
                self._update(unplanned_shapes=self._info.unplanned_shapes + 1)
        return self._run(pictures, size)

    def _run(self, pictures: PictureBatch, size: int) -> Rows:
        """Run pictures padded to `size`; the rows of the pictures, without those of the padding."""
        session, name, device = self._session, self._info.model.name, self._info.device.effective
        if session is None:
            raise EngineError("the engine is closed")
        try:
            rows = session.run(pictures, size)
        except EngineError:
            raise
        except Exception as error:
            fault = classify_fault(f"{type(error).__name__}: {error}", on_gpu=device != "cpu")
            message = shorten_error_text(str(error)) or type(error).__name__
            raise EngineError(f"{name} failed on {device}: {message}", fault) from error
        if self.checks_finite and not np.isfinite(rows).all():
            raise EngineError(
                f"{name} failed on {device}: output contains NaN or infinity", Fault.INVALID_OUTPUT
            )
        return rows

    def _reduce_plan(self, size: int, error: EngineError) -> bool:
        """Remove batches of `size` and more from the plan; False where no smaller one is left."""
        with self._lock:
            plan = self._info.plan
            if plan.max_batch < size:
                return True  # another thread has done it
            smaller = tuple(bucket for bucket in plan.buckets if bucket < size)
            if not smaller or self._session is None:
                return False
            reason = f"{plan.reason}; batches of {size} and more did not fit into memory"
            plan = dataclasses.replace(plan, buckets=smaller, reason=reason)
            self._update(plan=plan)
            if self._info.device.effective != "cpu":  # on the CPU no run may be in progress for this
                self._session.keep_only(smaller)
        log.warning("out of memory for %d pictures at once: %s; using smaller batches", size, error)
        self.on_plan_reduced(plan)
        return True

    def _warm_up(self, plan: Plan) -> Plan:
        """Run every bucket of a plan; the plan without the larger buckets if the model refuses them.

        Raises:
            EngineError: not even the smallest runs.
            ModelError: its output contains NaN or infinity.
        """
        model = self._info.model
        pictures = make_noise_pictures(model.input, plan.max_batch)
        for bucket in plan.buckets:
            try:
                rows = self._run(pictures[:bucket], bucket)
            except EngineError as error:
                if not self._warm or error.fault in FATAL_FAULTS:
                    raise
                log.warning("%s: batches of %d and more are not used: %s", model.name, bucket, error)
                reason = f"{plan.reason}; batches of {bucket} and more failed"
                return dataclasses.replace(plan, buckets=tuple(sorted(self._warm)), reason=reason)
            if not np.isfinite(rows).all():
                raise ModelError(f"{model.path}: output contains NaN or infinity for a noise picture")
            self._warm.add(bucket)
        return plan


def check_pictures(pictures: PictureBatch, spec: InputSpec, name: str) -> None:
    """Check the shape and type of pictures.

    Raises:
        EngineError: a picture does not have the model's input size.
    """
    shape = (spec.height_px, spec.width_px, 3)
    for picture in pictures:
        if picture.shape != shape or picture.dtype != np.uint8:
            raise EngineError(
                f"{name} takes uint8 pictures of {spec.width_px} x {spec.height_px},"
                f" not {picture.dtype} {picture.shape}"
            )


def trim_rows(rows: Rows, min_score: float) -> Rows:
    """The first k rows of each picture (n, k, 6), where k is the largest number with at least this score."""
    counted = np.flatnonzero((rows[..., 4] >= min_score).any(axis=0))
    return rows[:, : int(counted[-1]) + 1 if len(counted) else 0]


def open_engine(
    model: Model,
    inference: "InferenceConfig | EngineSettings",
    *,
    data: Path | None = None,
    plans: Mapping[str, Plan] | None = None,
    choices: Mapping[str, EngineChoice] | None = None,
    measuring: bool = True,
    cores: int | None = None,
    only: DeviceAssignment | None = None,
    backend: DeviceBackend = DEVICE_BACKEND,
    level: int = logging.INFO,
) -> LocalEngine:
    """Compile a model and open it on the best device that works, warmed up. Takes seconds.

    `data` is the folder for compiled graphs, measured engines and plans; with None nothing is cached or
    measured. `plans` and `choices` are used as they are, by device. Without `measuring`, which takes up to
    15 s, a cached engine and plan are used, else onnxruntime and the default plan. `only` is the one device
    to open, whatever the configuration says. `level` is that of the log line "engine ready", unless the
    device is degraded.

    Raises:
        DeviceError: a device was demanded without fallback to the CPU, or by `only`, and is not usable.
        ModelError: the model cannot be compiled or run.
        UnavailableError: onnxruntime is not installed.
    """
    cores = usable_cores() if cores is None else cores
    settings = EngineSettings.of(inference)
    if settings.remote is not None:
        backend = add_remote(backend, settings.remote, model.original_sha256)
    opening = _EngineOpener(
        model,
        *load_or_compile_with_batch(model, data),
        settings,
        cores,
        data,
        plans or {},
        choices or {},
        measuring,
        backend,
    )
    return _log_opened(opening.best() if only is None else opening.only(only), level)


def _make_device_error(device: EffectiveDevice, verdict: DeviceVerdict) -> DeviceError:
    return DeviceError(
        f"device {device} was demanded with fallback to the CPU off and is not usable: {verdict.reason}"
        f" ({verdict.code}); {find_remedy(device, verdict.code)}",
        verdict.code,
    )


def _is_fine(verdict: DeviceVerdict) -> bool:
    """Whether a verdict on the CPU reports no lost device."""
    return verdict.code in (ReasonCode.OK, ReasonCode.CPU_REQUESTED, ReasonCode.NO_GPU_BUILD)


def _explain_missing_runtime(device: EffectiveDevice) -> str:
    if device == "openvino-gpu":
        return "the package openvino is not installed"
    return f"this onnxruntime was built without {PROVIDERS[device]}"


@dataclasses.dataclass(frozen=True, slots=True)
class _EngineOpener:
    """Opens one graph on one device after the other; `original` is the model as it was given."""

    original: Model
    model: Model
    graph: bytes
    settings: EngineSettings
    cores: int
    data: Path | None
    plans: Mapping[str, Plan]
    choices: Mapping[str, EngineChoice]
    measuring: bool
    backend: DeviceBackend

    def best(self) -> LocalEngine:
        """The engine on the best device that works.

        Raises:
            DeviceError: a device was demanded without fallback to the CPU, and is not usable.
        """
        first: DeviceVerdict | None = None
        absent = {ReasonCode.NO_GPU_BUILD} if self.settings.device == "auto" else set()
        for device in device_preference(self.settings.device)[:-1]:
            verdict = self.verdict_on(device)
            if verdict.code is ReasonCode.OK:
                # With `auto` a GPU that no wheel serves is not missed where another one computes.
                opened = self.attempt(device, first if first and first.code not in absent else USABLE)
                if isinstance(opened, LocalEngine):
                    return opened
                verdict = opened
                self.on_cpu(verdict).close()  # raises ModelError if the CPU cannot run the model either
            if self.settings.fallback != "degrade" and self.settings.device != "auto":
                raise _make_device_error(device, verdict)
            first = first or verdict
        return self.on_cpu(first or DeviceVerdict(ReasonCode.CPU_REQUESTED, "the CPU was requested"))

    def only(self, assigned: DeviceAssignment) -> LocalEngine:
        """The engine on this device.

        Raises:
            DeviceError: the device is not usable.
        """
        if assigned.device == "cpu":
            return self.on_cpu(assigned.verdict)
        opened = self.attempt(assigned.device, assigned.verdict)
        if isinstance(opened, DeviceVerdict):
            raise DeviceError(f"{assigned.device}: {opened.reason}", opened.code)
        return opened

    def verdict_on(self, device: EffectiveDevice) -> DeviceVerdict:
        """Whether a session on a device other than the CPU should be tried."""
        if not self.backend.has_provider(device):
            return DeviceVerdict(ReasonCode.NO_GPU_BUILD, _explain_missing_runtime(device))
        return self.backend.probe_device(device)

    def attempt(self, device: EffectiveDevice, verdict: DeviceVerdict) -> LocalEngine | DeviceVerdict:
        """The engine on this device, or the reason why it could not be opened."""
        try:
            session = self._open(self.graph, device)
            if session.device != device:
                session.close()
                return DeviceVerdict(
                    ReasonCode.PROVIDER_REFUSED, f"its session started on {session.device} only"
                )
            return self._check_device(self._engine(session, device, verdict))
        except ModelError:
            raise
        except RemoteError as error:
            return error.verdict
        except EngineError as error:
            if error.fault in (Fault.INVALID_OUTPUT, Fault.OUT_OF_MEMORY):
                return classify_device_loss(error.fault, str(error))
            return classify_start_error(device, str(error))
        except Exception as error:  # noqa: BLE001 - the runtimes' exceptions have no common base but this
            return classify_start_error(device, describe_error(error, limit=4000))

    def _check_device(self, engine: LocalEngine) -> LocalEngine | DeviceVerdict:
        """The engine, or why it is refused: its results differ from those of onnxruntime on the CPU."""
        policy, info = self.settings.parity, engine.info()
        if policy == "off":
            return engine
        cpu = self._open(self.graph, "cpu")
        try:
            images = np.stack([sample.image for sample in make_sample_pictures(self.model.input)[::2]])
            check = check_against_cpu(
                info.model, lambda batch: engine.infer(batch).rows, cpu, images, max_batch=info.plan.max_batch
            )
        finally:
            cpu.close()
        if info.device.effective == "cpu":  # a second runtime: how fast it is says nothing about a device
            check = dataclasses.replace(check, speed_check=None)
        (seen,), speed_check = check.parity_results, check.speed_check
        doubts = [seen.refusal, None if speed_check is None else speed_check.doubt(info.device.effective)]
        engine.set_device_check(check, [doubt for doubt in doubts if doubt is not None])
        if seen.refusal is not None and policy == "refuse":
            engine.close()
            if info.device.effective == "cpu":
                words = f"OpenVINO's results differ from onnxruntime's: {seen.refusal}"
                return DeviceVerdict(ReasonCode.RUNTIME_REFUSED, words)
            return DeviceVerdict(
                ReasonCode.PARITY_REFUSED, f"its results differ from the CPU: {seen.refusal}"
            )
        return engine

    def on_cpu(self, verdict: DeviceVerdict) -> LocalEngine:
        """The engine on the CPU, in the requested runtime if it works.

        Raises:
            DeviceError: a runtime was demanded without fallback, and is not usable.
            ModelError: the CPU cannot run the model.
            UnavailableError: bf16 was demanded, and is not to be had here.
        """
        refused: DeviceVerdict | None = None
        if verdict.code is ReasonCode.RUNTIME_REFUSED and self.settings.runtime != "onnxruntime":
            return self._without_openvino(verdict).on_cpu(verdict)
        if self._wants_openvino():
            opened = self._on_cpu_in_openvino(verdict)
            if isinstance(opened, LocalEngine):
                return opened
            if self.settings.fallback != "degrade":
                raise DeviceError(
                    "runtime openvino was demanded with fallback to onnxruntime off and is not usable:"
                    f" {opened.reason} ({opened.code}); {find_remedy('cpu', opened.code)}",
                    opened.code,
                )
            refused = opened
        engine = self._on_cpu_in_onnxruntime(refused if refused and _is_fine(verdict) else verdict)
        if refused is not None:
            engine.add_note(f"OpenVINO is not used: {refused.reason} ({refused.code})")
        return engine

    def _without_openvino(self, verdict: DeviceVerdict) -> "_EngineOpener":
        """The same, without a choice of OpenVINO from before it failed; bf16 needs it, so fp32 it is."""
        precision = "fp32" if self.settings.precision == "bf16" else self.settings.precision
        chosen = EngineChoice(EngineCandidate("onnxruntime", "fp32"), verdict.reason)
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, runtime="onnxruntime", precision=precision),
            choices={**self.choices, "cpu": chosen},
        )

    def _wants_openvino(self) -> bool:
        """Whether the CPU is to compute with OpenVINO: it is requested, or the only one that has bf16."""
        if self.settings.runtime == "auto" and self.settings.precision == "bf16":
            return "bf16" in self.backend.find_precisions("cpu", "openvino")
        return self.settings.runtime == "openvino"

    def _on_cpu_in_openvino(self, verdict: DeviceVerdict) -> LocalEngine | DeviceVerdict:
        """The engine in OpenVINO, or the reason why it is not used."""
        if "openvino" not in self.backend.find_runtimes("cpu"):
            return DeviceVerdict(ReasonCode.RUNTIME_MISSING, _explain_missing_runtime("openvino-gpu"))
        try:
            session = self._open(self.graph, "cpu", "openvino")
            return self._check_device(self._engine(session, "cpu", verdict))
        except (ModelError, UnavailableError):
            raise
        except Exception as error:  # noqa: BLE001 - OpenVINO's exceptions have no common base but this
            return DeviceVerdict(ReasonCode.RUNTIME_REFUSED, f"OpenVINO refused: {describe_error(error)}")

    def _on_cpu_in_onnxruntime(self, verdict: DeviceVerdict) -> LocalEngine:
        try:
            return self._engine(self._open(self.graph, "cpu"), "cpu", verdict)
        except (ModelError, UnavailableError):
            raise
        except Exception as error:
            raise ModelError(f"{self.model.path}: cannot be run: {describe_error(error)}") from error

    def _open(self, graph: bytes, device: EffectiveDevice, runtime: Runtime = "onnxruntime") -> DeviceSession:
        """Open a graph in fp32, with the plain options of a device."""
        return self.backend.open(
            graph,
            device,
            max_batch=self.settings.max_batch,
            data=self.data,
            runtime="openvino" if device == "openvino-gpu" else runtime,
        )

    def _open_candidate(self, graph: CandidateGraph, device: EffectiveDevice) -> DeviceSession:
        return self.backend.open(
            graph.graph,
            device,
            max_batch=self.settings.max_batch,
            data=self.data,
            runtime=graph.candidate.runtime,
            precision=graph.computed_precision,
            options=graph.candidate.options,
        )

    def _engine(self, session: DeviceSession, device: EffectiveDevice, verdict: DeviceVerdict) -> LocalEngine:
        state = DeviceState(self.settings.device, device, verdict.code, verdict.reason, utc_now())
        if isinstance(session, RemoteSession):
            why = EngineChoice(
                EngineCandidate("onnxruntime", "fp32"),
                "the servers decide; inference.precision is that of the CPU",
            )
            return LocalEngine(self.model, session, state, session.make_plan(self.settings.max_batch), why)
        progress = Progress(TIME_BUDGET_S)
        selector = self._selector(session, device, progress)
        opened, choice = selector.select()
        try:
            return self._with_plan(opened, choice, state, progress)
        except Exception as error:
            if opened.session is session:
                raise
            opened.session.close()
            log.warning("%s cannot be used: %s", choice.candidate, describe_error(error))
            reason = f"{choice.candidate} is not used: {describe_error(error)}"
            plain = self._open(self.graph, device, session.runtime)
            selector = self._selector(plain, device, progress)
            return self._with_plan(*selector.use_plain(reason), state, progress)

    def _selector(
        self, session: DeviceSession, device: EffectiveDevice, progress: Progress
    ) -> EngineSelector:
        is_reference = device == "cpu" and session.runtime == "onnxruntime"
        return EngineSelector(
            CandidateSource(
                self.original,
                self.model,
                self.graph,
                device,
                session.runtime,
                self.backend,
                self.settings,
                self.data,
            ),
            session,
            lambda graph: self._open_candidate(graph, device),
            lambda: session if is_reference else self._open(self.graph, "cpu"),
            self.cores,
            self.measuring,
            self.choices.get(device),
            progress,
        )

    def _with_plan(
        self, opened: OpenCandidate, choice: EngineChoice, state: DeviceState, progress: Progress
    ) -> LocalEngine:
        """The engine with the given plan, a measured one, or the default."""

        def engine(plan: Plan) -> LocalEngine:
            return LocalEngine(self.model, opened.session, state, plan, choice)

        if (given := self.plans.get(state.effective)) is not None:
            return engine(given)
        fixed = opened.graph.model.interpretation.input.batch
        rule = make_default_plan(state.effective, self.settings.max_batch, fixed, self.cores)
        if self.data is None:
            return engine(rule)
        return self._autotune(engine, opened, rule, PlanCache(self.data / "plans"), progress)

    def _autotune(
        self,
        open_with: Callable[[Plan], LocalEngine],
        opened: OpenCandidate,
        rule: Plan,
        plans: PlanCache,
        progress: Progress,
    ) -> LocalEngine:
        """The engine with the plan that was measured on this machine, now or earlier."""
        budget_ms, fixed = self.settings.latency_budget_ms, opened.graph.model.interpretation.input.batch
        device, max_count = opened.session.device, self.settings.max_batch
        key = PlanKey.of(
            opened.graph.graph,
            device=opened.graph.describe_device(device),
            cores=self.cores,
            max_batch=max_count,
            latency_budget_ms=budget_ms,
        )
        if (kept := plans.load(key)) is not None:
            return open_with(Plan.of(kept))
        if not self.measuring:
            return open_with(rule)
        sizes = list_batch_sizes(max_count) if fixed is None else rule.buckets
        engine = open_with(dataclasses.replace(rule, buckets=sizes, reason=""))
        warm = engine.info().plan
        pictures = make_noise_pictures(self.model.input, warm.max_batch)
        log.info("measuring this machine for the fastest number of lanes and batch size: about 5 s, once")
        left_s = progress.left_s - FINAL_TIME_BUDGET_S
        measured = autotune_plan(
            lambda batch: engine.infer(pictures[:batch]),
            device=device,
            max_batch=warm.max_batch,
            fixed_batch=fixed,
            cores=self.cores,
            latency_budget_ms=budget_ms,
            spend_s=min(PLAN_TIME_BUDGET_S, max(0.0, left_s)),
            on_trial=lambda: progress.tick("lanes and batch size"),
            has_own_threads=opened.session.runtime == "openvino",
        )
        measured = dataclasses.replace(measured, reason=measured.reason + warm.reason)
        plans.store(key, measured)
        engine.set_plan(Plan.of(measured))
        return engine


_RUNTIME_REASONS = (ReasonCode.RUNTIME_MISSING, ReasonCode.RUNTIME_REFUSED)


def format_ready_line(info: EngineInfo) -> str:
    """The model, its device and its plan in one short line.

    ``engine ready: yolox-nano on cpu (fp32), 2 lanes x batch 1, 14.2 ms; no GPU: onnxruntime without CUDA``
    """
    device, plan = info.device, info.plan
    point = OperatingPoint(plan.lanes, plan.max_batch)
    runtime = "OpenVINO, " if info.runtime == "openvino" else ""
    precision = f"{runtime}{info.choice.precision}"
    parts = [f"engine ready: {info.model.name} on {device.effective} ({precision}), {point}"]
    table = plan.measured.table if plan.measured else ()
    parts += [
        f"{line.batch_ms:.1f} ms" for line in table if line.point == point and line.batch_ms is not None
    ]
    return ", ".join(parts) + _format_gpu_reason(device)


def _format_gpu_reason(device: DeviceState) -> str:
    if device.code in (ReasonCode.OK, ReasonCode.CPU_REQUESTED):
        return ""
    if device.code is ReasonCode.NO_GPU_BUILD and not device.degraded:
        return "; no GPU: onnxruntime without CUDA"
    why = "" if device.code in _RUNTIME_REASONS else f"{device.requested} was requested: "
    return f"; {why}{device.reason} ({device.code})"


def _log_opened(engine: LocalEngine, level: int) -> LocalEngine:
    info = engine.info()
    device = info.device.effective
    log.log(logging.WARNING if info.device.degraded else level, "%s", format_ready_line(info))
    if device == "remote":
        log.info("%s", describe_destination(info.replicas))
    choice = f"{info.choice.candidate}: {info.choice.reason}"
    details = (info.model.name, info.device.describe(), choice, info.plan.reason)
    log.debug("engine: %s; %s; %s; %s", *details)
    for parity_result in info.device_check.parity_results:
        log.info("parity of %s with the CPU: %s", device, parity_result.message)
        if parity_result.refusal is not None:
            log.warning("%s differs from the CPU: %s", device, parity_result.refusal)
    if (speed_check := info.device_check.speed_check) and (doubt := speed_check.doubt(device)):
        log.warning("%s", doubt)
    if on_cpu := info.node_placement.on_cpu:
        some = ", ".join(on_cpu[:8]) + (" …" if len(on_cpu) > 8 else "")
        log.warning("%d nodes of %s are computed on the CPU: %s", len(on_cpu), info.model.name, some)
    return engine
