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
from visionedge.engine.device.faults import FATAL_FAULTS, Fault
from visionedge.engine.device.session import EngineError, EngineUnavailableError, NodePlacement, PictureBatch
from visionedge.engine.device_parity import DeviceCheck
from visionedge.engine.interface import EngineEvent, Inference, ProcessStatus, RecoveryStatistics
from visionedge.engine.local_engine import check_pictures
from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.recovery_policy import FallbackPolicy, RecoveryPolicy
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.supervisor import ActiveWorker, Supervisor
from visionedge.engine.process.worker import SupervisionTuning, Worker, WorkerDrainedError, WorkerLimits
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import PrecisionChoice
from visionedge.runtime.threads import ThreadGroup

_CLOSE_TIMEOUT_S = 2.0


def _read_scripted_tuning(script: Path) -> SupervisionTuning:
    from visionedge.engine.process import fault_injection  # not in the images

    return fault_injection.make_tuning(fault_injection.read_fault_script(script))


def _ignore(_news: EngineEvent) -> None:
    """Nobody wants to hear of it."""


class EngineClient:
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
        frame_pool: SharedFramePool,
        *,
        data: Path | None = None,
        thread_group: ThreadGroup | None = None,
        limits: WorkerLimits | None = None,
        on_change: Callable[[EngineEvent], None] = _ignore,
        wait_for_device: bool = True,
        inject: Path | None = None,
    ) -> None:
        self.model = model
        self._thread_group = thread_group or ThreadGroup(lambda _name, _error: None)
        tuning = (
            SupervisionTuning(limits or WorkerLimits()) if inject is None else _read_scripted_tuning(inject)
        )
        self._limits = tuning.limits
        self._active = ActiveWorker()
        self._supervisor = Supervisor(
            protocol.StartRequest(
                model, inference, data, logging.getLogger().getEffectiveLevel(), inject=inject
            ),
            frame_pool,
            self._thread_group,
            limits=self._limits,
            recovery_policy=RecoveryPolicy(
                inference.device, inference.fallback, tuning.timing, wait_for_device=wait_for_device
            ),
            active=self._active,
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
        self._thread_group.start("engine", self._supervisor.run, vital=True)
        try:
            self._supervisor.first.result()
        except BaseException:
            self.close()
            raise

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Rows:
        """Compute pictures in the child; see `engine.Engine.infer`. Waits a moment for one that is not there.

        Raises:
            EngineError: as in this process; or the child was lost, and no other is ready yet.
        """
        return self.compute(pictures, min_score).rows

    def compute(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        """The same, and the device of the child that computed them."""
        check_pictures(pictures, self.model.input, self.model.name)
        while True:
            serving = self._active.serving(self._limits.worker_wait_s)
            try:
                rows = serving.worker.compute(pictures, min_score)
            except WorkerDrainedError:
                continue  # another one serves already
            except EngineUnavailableError:
                self._active.mark_lost(serving.worker)
                raise
            except EngineError as error:
                if error.fault is Fault.INVALID_OUTPUT:
                    self._supervisor.recent.record_invalid_output(pictures)
                self._failed(serving.worker, error)
                raise
            self._supervisor.record_success()
            self._supervisor.recent.offer(pictures)
            return Inference(rows, serving.info.device.effective)

    def _failed(self, worker: Worker, error: EngineError) -> None:
        """A batch failed on a child.

        Raises:
            EngineAwayError: the child is of no use any more, which is told once by whoever conducts it.
        """
        if error.fault in FATAL_FAULTS:
            self._active.mark_lost(worker)
        self._supervisor.report_failure(worker, error)
        if error.fault in FATAL_FAULTS:
            raise EngineUnavailableError(str(error), error.fault) from None

    def set_fallback(self, fallback: FallbackPolicy) -> None:
        """From now on do this without the device that was asked for; also while the first engine opens."""
        self._supervisor.set_fallback(fallback)

    def close(self) -> None:
        """End the children and their threads; batches in progress fail."""
        self._thread_group.stopping.set()
        self._supervisor.close()
        self._thread_group.join(_CLOSE_TIMEOUT_S)

    @property
    def device(self) -> DeviceState:
        """Where the child computes, or did when it was last there, and why there."""
        return self._active.info.device

    @property
    def plan(self) -> Plan:
        """Its lanes and batch sizes."""
        return self._active.info.plan

    @property
    def concurrency(self) -> int:
        """How many threads keep it busy.

        While a batch is on its way to the child or back, a core has nothing to do, unless one more is there:
        that gave up to a quarter more frames on two cores. A GPU's plan has a lane for that already.
        """
        return self.plan.lanes + (1 if self.device.effective == "cpu" else 0)

    @property
    def precision(self) -> PrecisionChoice:
        """The precision it computes in."""
        return self._active.info.precision

    @property
    def node_placement(self) -> NodePlacement:
        """Where the nodes of its graph lie."""
        return self._active.info.node_placement

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that were refused."""
        return self._active.info.notes

    @property
    def device_check(self) -> DeviceCheck:
        """How its device was held against the CPU."""
        return self._active.info.device_check

    @property
    def rows(self) -> int:
        """K: the most rows for a picture."""
        return self._active.info.rows

    @property
    def unplanned_shapes(self) -> int:
        """Over all children there were; must stay 0."""
        return self._active.unplanned_shapes

    @property
    def process(self) -> ProcessStatus:
        """How the child is."""
        return self._active.process

    @property
    def recovery(self) -> RecoveryStatistics:
        """What failed so far, and where the way back to the device stands."""
        return self._supervisor.recovery
