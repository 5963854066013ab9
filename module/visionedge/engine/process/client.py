"""The engine in a process of its own, which the module can afford to lose.

    cameras ── pictures ──▶ shared memory ──┐
    lanes ──── block numbers ──────────────▶ child: gather, run ──── few rows ──▶ lanes

`conductor` watches over the child: when it dies, hangs or fails, another one takes its place, on the CPU if
the device is to blame, and on the device again once that is well. Until another one is ready batches fail.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import DeviceState
from visionedge.engine.device.faults import FATAL, Fault
from visionedge.engine.device.session import EngineAwayError, EngineError, NodePlaces, Pictures
from visionedge.engine.device_parity import Proof
from visionedge.engine.interface import Computed, EngineNews, ProcessStatus, Recovery
from visionedge.engine.local_engine import check_pictures
from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.recovery_policy import Ladder, Policy
from visionedge.engine.process.shared_memory import Arena
from visionedge.engine.process.supervisor import Conductor, Stage
from visionedge.engine.process.worker import Limits, RetiredError, Tuning, Worker
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import Choice
from visionedge.runtime.threads import Crew

_END_S = 2.0


def _scripted(script: Path) -> Tuning:
    from visionedge.engine.process import fault_injection  # not in the images

    return fault_injection.tuning_of(fault_injection.read_script(script))


def _ignore(_news: EngineNews) -> None:
    """Nobody wants to hear of it."""


class EngineProcess:
    """An engine (`any_engine.AnyEngine`) in a child; pictures that lie in `arena` are not copied to it.

    `open` and `close` once, on any thread; any number of threads may call `infer`. `on_change` is called from
    the thread that conducts the children, which is vital to `crew`; the crew is for this engine alone.
    `waits`: with `inference.fallback: hold` `open` waits for the device. `inject` is a script of faults, for
    tests.
    """

    def __init__(
        self,
        model: Model,
        inference: InferenceConfig,
        arena: Arena,
        *,
        data: Path | None = None,
        crew: Crew | None = None,
        limits: Limits | None = None,
        on_change: Callable[[EngineNews], None] = _ignore,
        waits: bool = True,
        inject: Path | None = None,
    ) -> None:
        self.model = model
        self._crew = crew or Crew(lambda _name, _error: None)
        tuning = Tuning(limits or Limits()) if inject is None else _scripted(inject)
        self._limits = tuning.limits
        self._stage = Stage()
        self._conductor = Conductor(
            protocol.Order(model, inference, data, logging.getLogger().getEffectiveLevel(), inject=inject),
            arena,
            self._crew,
            limits=self._limits,
            ladder=Ladder(inference.device, inference.fallback, tuning.patience, waits=waits),
            stage=self._stage,
            on_change=on_change,
            prober=tuning.prober,
        )

    def __repr__(self) -> str:
        status = self.process
        return f"<EngineProcess {self.model.name} {status.down or 'ready'} restarts={status.restarts}>"

    def open(self) -> None:
        """Start the child and wait until its engine is warmed up; takes seconds, or minutes for TensorRT.

        With `inference.fallback: hold` it waits for a device that was demanded for as long as that takes.

        Raises:
            DeviceError, ModelError, UnavailableError: as `startup.open_engine`.
            EngineError: the child died over it, or `close` was called meanwhile.
        """
        self._crew.start("engine", self._conductor.run, vital=True)
        try:
            self._conductor.first.result()
        except BaseException:
            self.close()
            raise

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """Compute pictures in the child; see `engine.Engine.infer`. Waits a moment for one that is not there.

        Raises:
            EngineError: as in this process; or the child was lost, and no other is ready yet.
        """
        return self.compute(pictures, least_score).rows

    def compute(self, pictures: Pictures, least_score: float | None = None) -> Computed:
        """The same, and the device of the child that computed them."""
        check_pictures(pictures, self.model.input, self.model.name)
        while True:
            serving = self._stage.serving(self._limits.absent_s)
            try:
                rows = serving.worker.compute(pictures, least_score)
            except RetiredError:
                continue  # another one serves already
            except EngineAwayError:
                self._stage.lose(serving.worker)
                raise
            except EngineError as error:
                if error.fault is Fault.GARBAGE:
                    self._conductor.recent.suspect(pictures)
                self._failed(serving.worker, error)
                raise
            self._conductor.well()
            self._conductor.recent.offer(pictures)
            return Computed(rows, serving.facts.device.effective)

    def _failed(self, worker: Worker, error: EngineError) -> None:
        """A batch failed on a child.

        Raises:
            EngineAwayError: the child is of no use any more, which is told once by whoever conducts it.
        """
        if error.fault in FATAL:
            self._stage.lose(worker)
        self._conductor.report(worker, error)
        if error.fault in FATAL:
            raise EngineAwayError(str(error), error.fault) from None

    def follow(self, fallback: Policy) -> None:
        """From now on do this without the device that was asked for; also while the first engine opens."""
        self._conductor.follow(fallback)

    def close(self) -> None:
        """End the children and their threads; batches in progress fail."""
        self._crew.stopping.set()
        self._conductor.close()
        self._crew.join(_END_S)

    @property
    def device(self) -> DeviceState:
        """Where the child computes, or did when it was last there, and why there."""
        return self._stage.facts.device

    @property
    def plan(self) -> Plan:
        """Its lanes and batch sizes."""
        return self._stage.facts.plan

    @property
    def callers(self) -> int:
        """How many threads keep it busy.

        While a batch is on its way to the child or back, a core has nothing to do, unless one more is there:
        that gave up to a quarter more frames on two cores. A GPU's plan has a lane for that already.
        """
        return self.plan.lanes + (1 if self.device.effective == "cpu" else 0)

    @property
    def precision(self) -> Choice:
        """The precision it computes in."""
        return self._stage.facts.precision

    @property
    def places(self) -> NodePlaces:
        """Where the nodes of its graph lie."""
        return self._stage.facts.places

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that were refused."""
        return self._stage.facts.notes

    @property
    def proof(self) -> Proof:
        """How its device was held against the CPU."""
        return self._stage.facts.proof

    @property
    def rows(self) -> int:
        """K: the most rows for a picture."""
        return self._stage.facts.rows

    @property
    def unplanned_shapes(self) -> int:
        """Over all children there were; must stay 0."""
        return self._stage.unplanned_shapes

    @property
    def process(self) -> ProcessStatus:
        """How the child is."""
        return self._stage.process

    @property
    def recovery(self) -> Recovery:
        """What failed so far, and where the way back to the device stands."""
        return self._conductor.recovery
