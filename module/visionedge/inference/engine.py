"""The engine: bytes in, rows out, on the best device that works, and honest about which that is."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionedge.config import InferenceConfig
from visionedge.errors import DeviceError, ModelError, VisionedgeError
from visionedge.frames import Picture, utc_now
from visionedge.inference.detections import Rows
from visionedge.inference.devices import (
    PROVIDERS,
    REMEDIES,
    DeviceState,
    Effective,
    Reason,
    Verdict,
    classify,
    effective_of,
    has_driver,
    probe,
    provider_options,
    wishes,
)
from visionedge.inference.graph import compile_model
from visionedge.inference.model import Model
from visionedge.inference.plan import Plan, make_plan, usable_cores
from visionedge.inference.runtime import import_onnxruntime, load_cuda_libraries

log = logging.getLogger(__name__)

# An arena that grows by what is asked, not by doubling: other processes share the GPU. Shapes are fixed, so
# the exhaustive search for convolution algorithms runs once for each bucket, at warm-up.
_CUDA_OPTIONS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
}
OPTIONS: Mapping[Effective, Mapping[str, str]] = {
    "tensorrt": {"device_id": "0"},
    "cuda": _CUDA_OPTIONS,
    "cpu": {},
}


class EngineError(VisionedgeError):
    """A batch could not be computed; the next one may."""


class Engine:
    """A compiled model on a device, warmed up. Any number of lanes may call `infer` at the same time.

    `unplanned_shapes` counts runs with a batch size that was not warmed up; it must stay 0.
    """

    def __init__(self, model: Model, session: Any, device: DeviceState, plan: Plan) -> None:
        self.model = model
        self.device = device
        self.unplanned_shapes = 0
        self._session = session
        self._input = session.get_inputs()[0].name
        self._warm: set[int] = set()
        self._rows: int | None = None
        self._lock = threading.Lock()
        self.plan = self._warmed_up(plan)

    def __repr__(self) -> str:
        state = "closed" if self._session is None else "open"
        return f"<Engine {state} {self.model.name} on {self.device.effective} buckets={self.plan.buckets}>"

    @property
    def rows(self) -> int:
        """K: how many rows `infer` gives for each picture."""
        return self._rows or 0

    def infer(self, images: Picture) -> NDArray[np.float32]:
        """Compute pictures at the model's input size: uint8 (n, H, W, 3) BGR to rows float32 (n, K, 6).

        A row is left, top, right, bottom (input pixels), score, class; by falling score. Any n will do: it
        is cut and padded to the sizes of the plan.

        Raises:
            EngineError: the pictures are of another shape, the engine is closed, or the device failed.
        """
        spec = self.model.input
        if images.shape[1:] != (spec.height_px, spec.width_px, 3) or images.dtype != np.uint8:
            raise EngineError(
                f"{self.model.name} takes uint8 pictures of {spec.width_px} x {spec.height_px},"
                f" not {images.dtype} {images.shape[1:]}"
            )
        most = self.plan.max_batch
        parts = [self._bucket(images[start : start + most]) for start in range(0, len(images), most)]
        if not parts:
            return np.zeros((0, self.rows, 6), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Let go of the session; batches that run are finished."""
        self._session = None

    def _bucket(self, images: Picture) -> Rows:
        size = self.plan.bucket(len(images))
        if size not in self._warm:
            with self._lock:
                self.unplanned_shapes += 1
        return self._run(images, size)

    def _run(self, images: Picture, size: int) -> Rows:
        """Run pictures padded to `size`; the rows of the real ones, their shape checked."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed")
        batch = images
        if len(images) < size:
            batch = np.zeros((size, *images.shape[1:]), np.uint8)
            batch[: len(images)] = images
        try:
            (rows,) = session.run(None, {self._input: np.ascontiguousarray(batch)})
        except Exception as error:
            raise EngineError(
                f"{self.model.name} failed on {self.device.effective}: {words_of(error)}"
            ) from error
        if (
            rows.ndim != 3
            or len(rows) != size
            or rows.shape[2] != 6
            or self._rows not in (None, rows.shape[1])
        ):
            raise EngineError(f"{self.model.name} gave {rows.shape} for a batch of {size}")
        given: Rows = rows[: len(images)]
        return given

    def _warmed_up(self, plan: Plan) -> Plan:
        """Run every bucket of a plan; what is left of it when the model refuses the larger ones.

        Raises:
            EngineError: not even the smallest runs.
            ModelError: it gives no numbers.
        """
        spec = self.model.input
        size = (plan.max_batch, spec.height_px, spec.width_px, 3)
        noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        for bucket in plan.buckets:
            try:
                rows = self._run(noise[:bucket], bucket)
            except EngineError as error:
                if not self._warm:
                    raise
                log.warning("%s: batches of %d and more are left out: %s", self.model.name, bucket, error)
                reason = f"{plan.reason}; batches of {bucket} and more failed"
                return dataclasses.replace(plan, buckets=tuple(sorted(self._warm)), reason=reason)
            if not np.isfinite(rows).all():
                raise ModelError(f"{self.model.path}: gives no numbers (NaN or infinity) for a plain picture")
            self._rows = rows.shape[1]
            self._warm.add(bucket)
        return plan


def open_engine(
    model: Model,
    inference: InferenceConfig,
    *,
    prober: Callable[[Effective], Verdict] = probe,
    cores: int | None = None,
) -> Engine:
    """Compile a model and open it on the best device that works, warmed up. Takes seconds.

    Raises:
        DeviceError: `cuda` or `tensorrt` was demanded with fallback off, and is not usable.
        ModelError: the model cannot be compiled or run.
        UnavailableError: onnxruntime itself is not there.
    """
    opening = _Opening(model, inference, compile_model(model), usable_cores() if cores is None else cores)
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
    """What is needed to open one graph on one device after the other."""

    model: Model
    inference: InferenceConfig
    graph: bytes
    cores: int

    def verdict_on(self, device: Effective, prober: Callable[[Effective], Verdict]) -> Verdict:
        """Whether a device other than the CPU is worth a session."""
        # The list says what was compiled in: absence is the truth, presence is not, so that is probed.
        if PROVIDERS[device] not in import_onnxruntime().get_available_providers():
            return Verdict(Reason.NO_GPU_BUILD, f"this onnxruntime was built without {PROVIDERS[device]}")
        return prober(device)

    def attempt(self, device: Effective, verdict: Verdict) -> Engine | Verdict:
        """The engine on this device, or why it is not there."""
        try:
            session = self._session(device)
            effective = effective_of(session.get_providers())
            if effective != device:
                return Verdict(Reason.PROVIDER_REFUSED, f"its session came up on {effective} only")
            return self._engine(session, device, verdict)
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions have no common base but this
            return classify(words_of(error, limit=4000), driver_present=has_driver())

    def on_cpu(self, verdict: Verdict) -> Engine:
        """The engine on the CPU, which always works or it is the model's fault."""
        try:
            return self._engine(self._session("cpu"), "cpu", verdict)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{self.model.path}: cannot be run: {words_of(error)}") from error

    def _engine(self, session: Any, device: Effective, verdict: Verdict) -> Engine:
        state = DeviceState(self.inference.device, device, verdict.code, verdict.reason, utc_now())
        plan = make_plan(device, self.inference.max_batch, self.model.reading.input.batch, self.cores)
        return Engine(self.model, session, state, plan)

    def _session(self, device: Effective) -> Any:
        onnxruntime = import_onnxruntime()
        if device != "cpu":
            load_cuda_libraries(onnxruntime)
        options = onnxruntime.SessionOptions()
        # One thread each: lanes bring the parallelism, and a GPU needs none.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        below = wishes("cpu" if device == "cpu" else device)
        providers = [provider_options(PROVIDERS[name], OPTIONS[name]) for name in below]
        session = onnxruntime.InferenceSession(self.graph, options, providers=providers, enable_fallback=0)
        session.disable_fallback()
        return session


def words_of(error: BaseException, limit: int = 300) -> str:
    """What onnxruntime says, in one line, without its codes."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rsplit("[ONNXRuntimeError] : ", 1)[-1][:limit]


def _announced(engine: Engine) -> Engine:
    level = logging.WARNING if engine.device.degraded else logging.INFO
    log.log(level, "engine: %s; %s; %s", engine.model.name, engine.device.describe(), engine.plan.reason)
    return engine
