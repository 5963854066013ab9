"""An engine that computes in place of another for a while, and knows from that what was asked for."""

from dataclasses import replace

from visionedge.engine.device.devices import DeviceState
from visionedge.engine.device.session import NodePlaces, Pictures
from visionedge.engine.device_parity import Proof
from visionedge.engine.interface import AnyEngine, Computed, ProcessStatus, Recovery
from visionedge.engine.plan import Plan
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import Choice


class StandIn:
    """See `AnyEngine`: `engine` computes; what was asked for, and why it is not there, is known to `of`.

    `of` stays open, and whoever made the two closes both.
    """

    def __init__(self, engine: AnyEngine, of: AnyEngine) -> None:
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
    def callers(self) -> int:
        """How many threads keep it busy."""
        return self._engine.callers

    @property
    def precision(self) -> Choice:
        """The precision it computes in."""
        return self._engine.precision

    @property
    def places(self) -> NodePlaces:
        """Where its nodes lie."""
        return self._engine.places

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that were refused."""
        return self._engine.notes

    @property
    def proof(self) -> Proof:
        """How its own device was held against the CPU."""
        return self._engine.proof

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
    def recovery(self) -> Recovery | None:
        """How the other looks for a device that was lost: this one looks for none."""
        return self._of.recovery

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Compute pictures; see `Engine.infer`."""
        return self._engine.infer(pictures, least_score)

    def compute(self, pictures: Pictures, least_score: float | None = None) -> Computed:
        """The same, and the device that computed them."""
        return self._engine.compute(pictures, least_score)

    def close(self) -> None:
        """Let go of the engine that computes."""
        self._engine.close()
