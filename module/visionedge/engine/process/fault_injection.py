"""Faults by script, for tests: a session on the CPU that pretends to be a GPU, and fails as the script says.

    device: cuda                      the device that sessions pretend to be; sessions on the CPU never fail
    timing: {firstSeconds: 0.5}       the waits of the recovery policy, shorter for tests
    limits: {runSeconds: 2}
    faults:
      - {at: run, when: {batch: 40}, raise: "CUDA failure 700: an illegal memory access was encountered"}
      - {at: run, when: {file: /tmp/now}, hang: true}
      - {at: probe, when: {file: /tmp/gone}, raise: "CUDA failure 100: no CUDA-capable device is detected"}

`visionedge run --inject FILE` exists only if this file does and VISIONEDGE_INJECT_FAULTS=1 is set. The wheel,
and so the images, do not contain this file.
"""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from visionedge.config.documents import read_document
from visionedge.engine.device.backend import DeviceBackend, open_session
from visionedge.engine.device.devices import (
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    Runtime,
    classify_start_error,
)
from visionedge.engine.device.faults import FATAL_FAULTS, classify_fault
from visionedge.engine.device.session import DeviceSession, NodePlacement, PictureBatch
from visionedge.engine.process.recovery_policy import RecoveryTiming
from visionedge.engine.process.supervisor import SupervisionTuning
from visionedge.engine.process.worker import WorkerLimits
from visionedge.errors import ConfigError
from visionedge.model.postprocess import Rows


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, strict=True, validate_by_name=True
    )


class FaultCondition(_Part):
    """When a fault happens: all given conditions must hold. Seconds and runs count from the opening.

    `batch`: at this run; `every`: at each n-th run; `after`, `until`: in this time; `file`: while this file
    exists; `min_batch`: in runs of at least this many pictures. Runs of the warm-up count.
    """

    batch: int | None = None
    every: int | None = None
    after: float | None = None
    until: float | None = None
    file: str | None = None
    min_batch: int = 1

    def is_met(self, run: int, seconds: float, size: int) -> bool:
        """Whether the fault happens at run number `run` with `size` pictures."""
        return (
            self.batch in (None, run)
            and (self.every is None or run % self.every == 0)
            and (self.after is None or seconds >= self.after)
            and (self.until is None or seconds < self.until)
            and (self.file is None or Path(self.file).exists())
            and size >= self.min_batch
        )


class ScriptedFault(_Part):
    """One fault: where, when, and what. `rows` replaces the right ones; `wrong`: moved boxes."""

    at: Literal["open", "run", "probe"] = "run"
    when: FaultCondition = FaultCondition()
    raises: str | None = Field(default=None, alias="raise")
    hang: bool = False
    signal: Literal["SIGKILL", "SIGSEGV", "SIGABRT"] | None = None
    slow_seconds: float = 0.0
    rows: Literal["nan", "zeros", "wrong"] | None = None


class ScriptedTiming(_Part):
    """`RecoveryTiming`, with other waits."""

    first_seconds: float = 5.0
    max_wait_seconds: float = 300.0
    window_seconds: float = 30.0
    healthy_seconds: float = 600.0


class ScriptedLimits(_Part):
    """`WorkerLimits`, with other limits."""

    run_seconds: float = 30.0
    open_seconds: float = 1800.0


class FaultScript(_Part):
    """The whole file."""

    device: Literal["cuda", "tensorrt", "openvino-gpu"] = "cuda"
    timing: ScriptedTiming = ScriptedTiming()
    limits: ScriptedLimits = ScriptedLimits()
    faults: tuple[ScriptedFault, ...] = Field(default=(), strict=False)


def read_fault_script(path: Path) -> FaultScript:
    """Read a script.

    Raises:
        ConfigError: it cannot be read, or is invalid.
    """
    try:
        return FaultScript.model_validate(read_document(path))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise ConfigError(
            [f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems]
        ) from None


def make_device_backend(script: FaultScript) -> DeviceBackend:
    """A backend with the script's device."""
    probing = _FaultPoint(script, "probe")

    def opened(
        graph: bytes,
        device: EffectiveDevice,
        *,
        max_batch: int,
        data: Path | None,
        runtime: Runtime = "onnxruntime",
        precision: str = "fp32",
    ) -> DeviceSession:
        if device != script.device:
            return open_session(
                graph, device, max_batch=max_batch, data=data, runtime=runtime, precision=precision
            )
        for fault in _FaultPoint(script, "open").due(1):
            _trigger(fault)
        return FaultySession(open_session(graph, "cpu", max_batch=max_batch, data=data), script)

    def probed(device: EffectiveDevice) -> DeviceVerdict:
        if device != script.device:
            return DeviceVerdict(ReasonCode.NO_DEVICE, f"{device} is not the device of the script")
        for fault in probing.due(1):
            time.sleep(fault.slow_seconds)
            if fault.hang:
                return DeviceVerdict(ReasonCode.PROBE_TIMEOUT, "a first session did not start in time")
            if fault.raises is not None:
                return classify_start_error(device, fault.raises, lambda: True)
        return DeviceVerdict(ReasonCode.OK, "usable")

    return DeviceBackend(
        has_provider=lambda device: device == script.device, probe_device=probed, open=opened
    )


def make_tuning(script: FaultScript) -> SupervisionTuning:
    """The script's waits and limits, and its results of probes."""
    waits, times = script.timing, script.limits
    timing = RecoveryTiming(
        waits.first_seconds, waits.max_wait_seconds, waits.window_seconds, waits.healthy_seconds, jitter=0.0
    )
    limits = WorkerLimits(run_s=times.run_seconds, open_s=times.open_seconds)
    return SupervisionTuning(limits, timing, make_device_backend(script).probe_device)


def _trigger(fault: ScriptedFault) -> None:
    """Let the fault happen in this process.

    Raises:
        RuntimeError: with the text of the script.
    """
    time.sleep(fault.slow_seconds)
    if fault.signal is not None:
        # To this thread: sent to the process, it could arrive after the batch is computed.
        signal.raise_signal(signal.Signals[fault.signal])
    if fault.hang:
        threading.Event().wait()
    if fault.raises is not None:
        raise RuntimeError(fault.raises)


class _FaultPoint:
    """A point at which faults happen, with its clock and its count of runs. Thread-safe."""

    def __init__(
        self,
        script: FaultScript,
        at: Literal["open", "run", "probe"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._faults = [fault for fault in script.faults if fault.at == at]
        self._clock = clock
        self._began_s = clock()
        self._runs = itertools.count(1)

    def due(self, size: int) -> list[ScriptedFault]:
        """Count a run with `size` pictures; the faults that happen in it, in the script's order."""
        run, seconds = next(self._runs), self._clock() - self._began_s
        return [fault for fault in self._faults if fault.when.is_met(run, seconds, size)]


class FaultySession:
    """A `DeviceSession` on the CPU that pretends to be on the script's device."""

    def __init__(self, inner: DeviceSession, script: FaultScript) -> None:
        self._inner = inner
        self._fault_point = _FaultPoint(script, "run")
        self._failed_with: str | None = None
        self.device: EffectiveDevice = script.device
        self.runtime: Runtime = "openvino" if script.device == "openvino-gpu" else "onnxruntime"

    @property
    def rows(self) -> int:
        """As the real one."""
        return self._inner.rows

    @property
    def node_placement(self) -> NodePlacement:
        """As the real one."""
        return self._inner.node_placement

    @property
    def notes(self) -> tuple[str, ...]:
        """With a note that the device is simulated."""
        return (*self._inner.notes, f"{self.device} is simulated, with faults by script")

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        """Compute on the CPU, unless a fault is due. A fatal fault makes all later runs fail, as on a GPU."""
        if self._failed_with is not None:
            raise RuntimeError(self._failed_with)
        due = self._fault_point.due(size)
        for fault in due:
            if fault.raises is not None and classify_fault(fault.raises, on_gpu=True) in FATAL_FAULTS:
                self._failed_with = fault.raises
            _trigger(fault)
        rows = self._inner.run(pictures, size)
        for fault in due:
            rows = _corrupt_rows(rows, fault.rows)
        return rows

    def keep_only(self, sizes: Collection[int]) -> None:
        """Does nothing: runs may be in progress, as on a GPU."""

    def close(self) -> None:
        """Close the real one."""
        self._inner.close()


def _corrupt_rows(rows: Rows, how: Literal["nan", "zeros", "wrong"] | None) -> Rows:
    if how == "nan":
        return np.full_like(rows, np.nan)
    if how == "zeros":
        return np.zeros_like(rows)
    if how == "wrong":
        rows = rows.copy()
        rows[..., :4] += 25.0
    return rows
