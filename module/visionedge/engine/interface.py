"""What an engine is, wherever it runs: in this process (`LocalEngine`) or in its own (`EngineClient`).

An engine has three members: `infer` computes a batch, `info` gives a snapshot of everything that status,
metrics and reports show, and `close` ends it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Union

from visionedge.engine.device.devices import (
    DeviceState,
    DeviceVerdict,
    EffectiveDevice,
    RequestedDevice,
    RequestedRuntime,
    Runtime,
)
from visionedge.engine.device.remote import RemoteSettings, ReplicaStatus
from visionedge.engine.device.session import NodePlacement, PictureBatch
from visionedge.engine.device_parity import DeviceCheck
from visionedge.engine.engine_choice import EngineChoice
from visionedge.engine.plan import Plan
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows

if TYPE_CHECKING:
    from visionedge.config.schema import InferenceConfig

FallbackPolicy = Literal["degrade", "hold", "exit"]
"""Without the requested device: the CPU computes, nothing computes until it is back, or the module ends."""

ParityPolicy = Literal["refuse", "warn", "off"]
"""A device that differs from the CPU is not used, is used with a warning, or is not compared at all."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """See the section `inference` in docs/configuration.md: the fields have the same names."""

    device: RequestedDevice
    fallback: FallbackPolicy
    parity: ParityPolicy
    iou: float
    max_batch: int
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"]
    latency_budget_ms: float | None
    remote: RemoteSettings | None = None
    runtime: RequestedRuntime = "auto"

    @staticmethod
    def of(inference: Union["InferenceConfig", "EngineSettings"]) -> "EngineSettings":
        """The settings in a configuration."""
        if isinstance(inference, EngineSettings):
            return inference
        return EngineSettings(
            inference.device,
            inference.fallback,
            inference.parity,
            inference.iou,
            inference.max_batch,
            inference.precision,
            inference.latency_budget_ms,
            RemoteSettings.of(inference.remote)
            if inference.device == "remote" and inference.remote is not None
            else None,
            inference.runtime,
        )


EngineEventCode = Literal[
    "engine-lost",
    "engine-back",
    "device-lost",
    "device-held",
    "device-back",
    "parity-refused",
    "plan-narrowed",
]
"""The codes of the events of an engine. docs/messages.md lists the same."""

RecoveryStage = Literal["settled", "waiting", "probing", "opening", "comparing"]
"""The stages of the recovery of a device; settled: no recovery is in progress."""


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """A change of the engine that is published. `exit_code`: the module must end with this code.

    `model`: the name of its model in `models`, or `DEFAULT_MODEL`.
    """

    code: EngineEventCode
    message: str
    exit_code: int | None = None
    model: str = DEFAULT_MODEL


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The engine's process. `pid` is None while there is none; `down` is why nothing is computed now."""

    pid: int | None
    restarts: int
    down: str | None


@dataclass(frozen=True, slots=True)
class RecoveryState:
    """The recovery of a lost device: `reason` of the last failed attempt, `retry_at_s` of the next one.

    `retry_at_s` is a value of `time.monotonic()`; None while no attempt is scheduled.
    """

    stage: RecoveryStage
    failed_attempts: int
    reason: DeviceVerdict | None
    retry_at_s: float | None


@dataclass(frozen=True, slots=True)
class RecoveryStatistics:
    """Counters since the start: faults by kind, probes of devices by result, recoveries that succeeded."""

    recovery_state: RecoveryState
    faults: Mapping[str, int]
    probes: Mapping[str, int]
    device_recoveries: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """A snapshot of everything about an engine that others show: status, twin, metrics, bench.

    `max_rows` is K, the largest number of rows for a picture. `notes` are options that the device or the
    graph refused, with the reason. `unplanned_shapes` counts runs with a batch size that was not warmed up;
    it must stay 0. `runtime` is the library that computes. `process` and `recovery` are None for an engine in
    this process. `replicas` are the servers of a remote device, with their counts since the start.
    """

    model: Model
    device: DeviceState
    choice: EngineChoice
    plan: Plan
    node_placement: NodePlacement
    device_check: DeviceCheck
    notes: tuple[str, ...]
    max_rows: int
    unplanned_shapes: int = 0
    runtime: Runtime = "onnxruntime"
    process: ProcessStatus | None = None
    recovery: RecoveryStatistics | None = None
    replicas: tuple[ReplicaStatus, ...] = ()

    def as_substitute_for(self, requested: "EngineInfo") -> "EngineInfo":
        """This engine, shown while it computes in place of the requested one, which stays open.

        The requested device, the reason why it is not used, and its recovery are those of the requested
        engine.
        """
        process = self.process
        if process is not None and requested.process is not None:
            process = replace(process, restarts=process.restarts + requested.process.restarts)
        return replace(
            self,
            device=replace(requested.device, effective=self.device.effective),
            unplanned_shapes=self.unplanned_shapes + requested.unplanned_shapes,
            process=process,
            recovery=requested.recovery,
            replicas=requested.replicas,
        )


class Inference(NamedTuple):
    """The rows float32 (n, k, 6) of n pictures, and the device that computed them."""

    rows: Rows
    device: EffectiveDevice


class Engine(Protocol):
    """Computes batches of pictures. Any number of threads may call `infer` and `info`."""

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        """Detect objects in pictures of the model's input size, uint8 (H, W, 3) BGR each.

        Gives rows float32 (n, k, 6), by falling score: left, top, right, bottom in input pixels, score,
        class; and the device that computed them, which may differ from that of the last batch. Rows below
        `min_score` may be left out; without it k is `max_rows`.

        Raises:
            EngineError: this batch failed; the next one may work.
            EngineUnavailableError: no engine computes now; its supervisor has reported the reason.
        """

    def info(self) -> EngineInfo:
        """A snapshot; cheap enough to be taken for each batch.

        Raises:
            EngineError: the engine has never been ready.
        """

    def close(self) -> None:
        """Free the device and end what was started; batches in progress may fail."""
