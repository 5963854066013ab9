"""What an engine is, wherever it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from visionedge.engine.device.devices import DeviceState, Effective
from visionedge.engine.device.session import NodePlaces, Pictures
from visionedge.engine.device_parity import Proof
from visionedge.engine.plan import Plan
from visionedge.engine.process.recovery_policy import NewsCode, Outlook
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import Choice


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The process of an engine: `pid` None while there is none, `down` why it computes nothing just now."""

    pid: int | None
    restarts: int
    down: str | None


@dataclass(frozen=True, slots=True)
class EngineNews:
    """Something about the engine changed: for events. `exit_code`: the module is to end with it."""

    code: NewsCode
    message: str
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """What went wrong so far, by kind of fault; probes, by what they came to; how often a device came back.

    `outlook` is where the way back of a device stands.
    """

    outlook: Outlook
    faults: Mapping[str, int]
    probes: Mapping[str, int]
    change_overs: int


class Computed(NamedTuple):
    """The rows float32 (n, k, 6) of n pictures, and the device that really computed them."""

    rows: Rows
    device: Effective


class Computes(Protocol):
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
    def callers(self) -> int:
        """How many threads keep it busy: its plan's lanes, and one more where a batch has a way to go."""

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Pictures uint8 (H, W, 3) to rows float32 (n, k, 6), those below the least score may be left out."""

    def compute(self, pictures: Pictures, least_score: float | None = None) -> Computed:
        """The same, and where: the device may change between two batches."""


class AnyEngine(Computes, Protocol):
    """An engine wherever it runs: in this process (`Engine`) or in its own (`process.EngineProcess`)."""

    @property
    def precision(self) -> Choice:
        """The precision it computes in, and why in that."""

    @property
    def places(self) -> NodePlaces:
        """Where the nodes of its graph lie."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that its device or this graph refused, each with the reason."""

    @property
    def proof(self) -> Proof:
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
    def recovery(self) -> Recovery | None:
        """How it deals with a device that fails; None where it runs in this process."""

    def close(self) -> None:
        """Let go of everything."""
