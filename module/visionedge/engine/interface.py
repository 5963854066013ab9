"""What an engine is, wherever it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from visionedge.engine.device.devices import DeviceState, DeviceVerdict, EffectiveDevice
from visionedge.engine.device.session import NodePlacement, PictureBatch
from visionedge.engine.device_parity import DeviceCheck
from visionedge.engine.plan import Plan
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import PrecisionChoice

EngineEventCode = Literal[
    "engine-lost",
    "engine-back",
    "device-lost",
    "device-held",
    "device-back",
    "parity-refused",
    "plan-narrowed",
]
"""What is told of an engine. Closed: docs/messages.md lists the same."""


RecoveryStage = Literal["settled", "waiting", "probing", "opening", "comparing"]
"""Of the way back; settled: there is nothing to look for."""


@dataclass(frozen=True, slots=True)
class RecoveryState:
    """Where the way back stands: how often it was tried in vain, the last reason, when it is tried again."""

    stage: RecoveryStage
    failed_attempts: int
    reason: DeviceVerdict | None
    retry_in_s: float | None


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The process of an engine: `pid` None while there is none, `down` why it computes nothing just now."""

    pid: int | None
    restarts: int
    down: str | None


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something about the engine changed: for events. `exit_code`: the module is to end with it."""

    code: EngineEventCode
    message: str
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class RecoveryStatistics:
    """What went wrong so far, by kind of fault; probes, by what they came to; how often a device came back.

    `outlook` is where the way back of a device stands.
    """

    recovery_state: RecoveryState
    faults: Mapping[str, int]
    probes: Mapping[str, int]
    device_recoveries: int


class Inference(NamedTuple):
    """The rows float32 (n, k, 6) of n pictures, and the device that really computed them."""

    rows: Rows
    device: EffectiveDevice


class SupportsInfer(Protocol):
    """What whoever has pictures asks of an engine."""

    @property
    def model(self) -> Model:
        """What it computes."""

    @property
    def device(self) -> DeviceState:
        """Where it computes, and why there."""

    @property
    def plan(self) -> Plan:
        """The lanes and batch sizes it was warmed up for."""

    @property
    def concurrency(self) -> int:
        """How many threads keep it busy: its plan's lanes, and one more where a batch has a way to go."""

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Rows:
        """Pictures uint8 (H, W, 3) to rows float32 (n, k, 6), those below the least score may be left out."""

    def compute(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        """The same, and where: the device may change between two batches."""


class Engine(SupportsInfer, Protocol):
    """An engine wherever it runs: in this process (`Engine`) or in its own (`process.EngineProcess`)."""

    @property
    def precision(self) -> PrecisionChoice:
        """The precision it computes in, and why in that."""

    @property
    def node_placement(self) -> NodePlacement:
        """Where the nodes of its graph lie."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that its device or this graph refused, each with the reason."""

    @property
    def device_check(self) -> DeviceCheck:
        """How its device was held against the CPU."""

    @property
    def rows(self) -> int:
        """K: the most rows `infer` gives for a picture."""

    @property
    def unplanned_shapes(self) -> int:
        """Runs with a batch size that was not warmed up; must stay 0."""

    @property
    def process(self) -> ProcessStatus | None:
        """Its own process; None where it runs in this one."""

    @property
    def recovery(self) -> RecoveryStatistics | None:
        """How it deals with a device that fails; None where it runs in this process."""

    def close(self) -> None:
        """Let go of everything."""


# An engine that computes in place of another for a while, and knows from that what was asked for.


class SubstituteEngine:
    """See `Engine`: `engine` computes; what was asked for, and why it is not there, is known to `of`.

    `of` stays open, and whoever made the two closes both.
    """

    def __init__(self, engine: Engine, of: Engine) -> None:
        self._engine = engine
        self._of = of

    def __repr__(self) -> str:
        return f"<StandIn {self._engine!r} of {self._of!r}>"

    @property
    def model(self) -> Model:
        """What it computes."""
        return self._engine.model

    @property
    def device(self) -> DeviceState:
        """What was asked for and why it is not there, and where it really computes."""
        return replace(self._of.device, effective=self._engine.device.effective)

    @property
    def plan(self) -> Plan:
        """Its own lanes and batch sizes."""
        return self._engine.plan

    @property
    def concurrency(self) -> int:
        """How many threads keep it busy."""
        return self._engine.concurrency

    @property
    def precision(self) -> PrecisionChoice:
        """The precision it computes in."""
        return self._engine.precision

    @property
    def node_placement(self) -> NodePlacement:
        """Where its nodes lie."""
        return self._engine.node_placement

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that were refused."""
        return self._engine.notes

    @property
    def device_check(self) -> DeviceCheck:
        """How its own device was held against the CPU."""
        return self._engine.device_check

    @property
    def rows(self) -> int:
        """K: the most rows for a picture."""
        return self._engine.rows

    @property
    def unplanned_shapes(self) -> int:
        """Of both; must stay 0."""
        return self._engine.unplanned_shapes + self._of.unplanned_shapes

    @property
    def process(self) -> ProcessStatus | None:
        """Its own process, and what the two have seen of restarts."""
        own, other = self._engine.process, self._of.process
        if own is None or other is None:
            return own
        return replace(own, restarts=own.restarts + other.restarts)

    @property
    def recovery(self) -> RecoveryStatistics | None:
        """How the other looks for a device that was lost: this one looks for none."""
        return self._of.recovery

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Rows:
        """Compute pictures; see `Engine.infer`."""
        return self._engine.infer(pictures, min_score)

    def compute(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        """The same, and the device that computed them."""
        return self._engine.compute(pictures, min_score)

    def close(self) -> None:
        """Let go of the engine that computes."""
        self._engine.close()
