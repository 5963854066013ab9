"""What an engine is, wherever it runs."""

from dataclasses import dataclass
from typing import Protocol

from visionedge.inference.contest import Choice
from visionedge.inference.detections import Rows
from visionedge.inference.devices import DeviceState
from visionedge.inference.model import Model
from visionedge.inference.plan import Plan
from visionedge.inference.session import NodePlaces, Pictures


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The process of an engine: `pid` None while there is none, `down` why it computes nothing just now."""

    pid: int | None
    restarts: int
    down: str | None


class AnyEngine(Protocol):
    """An engine wherever it runs: in this process (`Engine`) or in its own (`process.EngineProcess`)."""

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
    def precision(self) -> Choice:
        """The precision it computes in, and why in that."""

    @property
    def places(self) -> NodePlaces:
        """Where the nodes of its graph lie."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that its device or this graph refused, each with the reason."""

    @property
    def rows(self) -> int:
        """K: the most rows `infer` gives for a picture."""

    @property
    def unplanned_shapes(self) -> int:
        """Runs with a batch size that was not warmed up; must stay 0."""

    @property
    def process(self) -> ProcessStatus | None:
        """Its own process; None where it runs in this one."""

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Compute pictures; see `Engine.infer`."""

    def close(self) -> None:
        """Let go of everything."""
