"""The engine in a process of its own, so that the module survives a crash of a device or its driver.

    cameras ── pictures ─────▶ shared memory ──┐
    lanes ──── block numbers ────────────────▶ worker: gather, run ──── few rows ──▶ lanes

The supervisor restarts the process when it dies, hangs or fails: on the CPU if the device is the cause, and
on the device again once that is usable. Until another worker is ready, batches fail.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import DeviceVerdict, EffectiveDevice
from visionedge.engine.device.faults import FATAL_FAULTS, EngineError, EngineUnavailableError, Fault
from visionedge.engine.device.remote import RemoteSettings, probe_remote
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.interface import EngineEvent, EngineInfo, EngineSettings, FallbackPolicy, Inference
from visionedge.engine.local_engine import check_pictures
from visionedge.engine.process.protocol import StartRequest
from visionedge.engine.process.recovery_policy import RecoveryPolicy
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.engine.process.supervisor import ActiveWorker, SupervisionTuning, Supervisor
from visionedge.engine.process.worker import WorkerDrainedError, WorkerLimits
from visionedge.model.model import Model
from visionedge.runtime.threads import ThreadGroup

_CLOSE_TIMEOUT_S = 2.0


class EngineClient:
    """An `Engine` in a worker process; pictures that lie in `frame_pool` are not copied to it.

    Call `open` and `close` once, on any thread; any number of threads may call `infer`. `on_change` is called
    on the supervisor's thread, which is vital to `thread_group`; the group belongs to this engine alone.
    `wait_for_device`: with `inference.fallback: hold`, `open` waits for the device. `inject` is a script of
    faults, for tests.
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
        on_change: Callable[[EngineEvent], None] = lambda _event: None,
        wait_for_device: bool = True,
        inject: Path | None = None,
    ) -> None:
        self._model, self._input = model, model.input
        self._thread_group = thread_group or ThreadGroup(lambda _name, _error: None)
        tuning = (
            SupervisionTuning(limits or WorkerLimits()) if inject is None else _read_scripted_tuning(inject)
        )
        self._limits = tuning.limits
        self._active = ActiveWorker()
        settings = EngineSettings.of(inference)
        self._supervisor = Supervisor(
            StartRequest(
                model,
                settings,
                data,
                logging.getLogger().getEffectiveLevel(),
                inject=inject,
            ),
            frame_pool,
            self._thread_group,
            limits=self._limits,
            recovery_policy=RecoveryPolicy(
                inference.device,
                inference.fallback,
                tuning.timing,
                wait_for_device=wait_for_device,
                runtime=settings.runtime,
            ),
            active=self._active,
            on_change=on_change,
            prober=_make_remote_prober(settings.remote) or tuning.prober,
        )

    def __repr__(self) -> str:
        return f"<EngineClient {self._model.name} {self._active.down or 'ready'}>"

    def open(self) -> None:
        """Start the worker and wait until its engine is warmed up; takes seconds, or minutes for TensorRT.

        With `inference.fallback: hold` it waits until the demanded device is there, for as long as this
        takes.

        Raises:
            DeviceError, ModelError, UnavailableError: as `open_engine` raises them.
            EngineError: the process died, or `close` was called meanwhile.
        """
        self._thread_group.start("engine", self._supervisor.run, vital=True)
        try:
            self._supervisor.first.result()
        except BaseException:
            self.close()
            raise

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        """Compute pictures in the worker; see `Engine.infer`. While none serves, waits for one for a second.

        Raises:
            EngineError: the batch failed in the worker.
            EngineUnavailableError: the worker is lost; the supervisor reports it.
        """
        check_pictures(pictures, self._input, self._model.name)
        while True:
            worker = self._active.wait(self._limits.worker_wait_s)
            try:
                rows = worker.compute(pictures, min_score)
            except WorkerDrainedError:
                continue  # another worker serves already
            except EngineUnavailableError as error:
                self._active.mark_lost(worker)
                if worker.device == "remote":  # it only passes pictures on: they are not the cause
                    raise EngineUnavailableError(str(error), Fault.UNREACHABLE) from None
                raise
            except EngineError as error:
                if error.fault is Fault.INVALID_OUTPUT:
                    self._supervisor.recent.record_invalid_output(pictures)
                if error.fault in FATAL_FAULTS:
                    self._active.mark_lost(worker)
                self._supervisor.report_failure(worker, error)
                if error.fault in FATAL_FAULTS:
                    raise EngineUnavailableError(str(error), error.fault) from None
                raise
            self._supervisor.record_success()
            self._supervisor.recent.offer(pictures)
            return Inference(rows, worker.device)

    def info(self) -> EngineInfo:
        """A snapshot; see `Engine.info`."""
        return self._active.info()

    def set_fallback(self, fallback: FallbackPolicy) -> None:
        """Apply another `inference.fallback` from now on; also while the first engine opens."""
        self._supervisor.set_fallback(fallback)

    def close(self) -> None:
        """End the workers and their threads; batches in progress fail."""
        self._thread_group.stopping.set()
        self._supervisor.close()
        self._thread_group.join(_CLOSE_TIMEOUT_S)


def _make_remote_prober(remote: RemoteSettings | None) -> Callable[[EffectiveDevice], DeviceVerdict] | None:
    """How a remote device is probed; None: the usual way."""
    return None if remote is None else lambda _device: probe_remote(remote)


def _read_scripted_tuning(script: Path) -> SupervisionTuning:
    from visionedge.engine.process import fault_injection  # not in the images

    return fault_injection.make_tuning(fault_injection.read_fault_script(script))
