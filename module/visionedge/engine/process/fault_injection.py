"""Faults by script, for tests: a session on the CPU that says it is a GPU, and fails as it is told to.

    device: cuda                      what the sessions pretend to be; those on the CPU are left in peace
    patience: {firstSeconds: 0.5}     the ladder's waits, to be quick
    limits: {runSeconds: 2}
    faults:
      - {at: run, when: {batch: 40}, raise: "CUDA failure 700: an illegal memory access was encountered"}
      - {at: run, when: {file: /tmp/now}, hang: true}
      - {at: probe, when: {file: /tmp/gone}, raise: "CUDA failure 100: no CUDA-capable device is detected"}

`visionedge run --inject FILE` is there only where this file is and VISIONEDGE_INJECT_FAULTS=1 is set. It is
left out of the wheel, and so of the images.
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

from visionedge.config.documents import read_file
from visionedge.engine.device.devices import Effective, Reason, Verdict, classify
from visionedge.engine.device.faults import FATAL, fault_of
from visionedge.engine.device.session import NodePlaces, OnDevice, Pictures, Seam, open_session
from visionedge.engine.process.recovery_policy import Patience
from visionedge.engine.process.worker import Limits, Tuning
from visionedge.errors import ConfigError
from visionedge.model.postprocess import Rows


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, strict=True, validate_by_name=True
    )


class When(_Part):
    """When a fault happens: all that is given must hold. Seconds and runs count from the session's opening.

    `batch`: at this run; `every`: at each so-many-th; `file`: while this file is there; `least_batch`: in
    runs of so many pictures and more. Runs of the warm-up count.
    """

    batch: int | None = None
    every: int | None = None
    after: float | None = None
    until: float | None = None
    file: str | None = None
    least_batch: int = 1

    def holds(self, run: int, seconds: float, size: int) -> bool:
        """Whether it is now, at run number `run` with `size` pictures."""
        return (
            self.batch in (None, run)
            and (self.every is None or run % self.every == 0)
            and (self.after is None or seconds >= self.after)
            and (self.until is None or seconds < self.until)
            and (self.file is None or Path(self.file).exists())
            and size >= self.least_batch
        )


class Failing(_Part):
    """One fault: where, when, and what. `rows` instead of the right ones: `wrong` ones have moved boxes."""

    at: Literal["open", "run", "probe"] = "run"
    when: When = When()
    raises: str | None = Field(default=None, alias="raise")
    hang: bool = False
    signal: Literal["SIGKILL", "SIGSEGV", "SIGABRT"] | None = None
    slow_seconds: float = 0.0
    rows: Literal["nan", "zeros", "wrong"] | None = None


class Waits(_Part):
    """`recovery.Patience`, where it is not the usual one."""

    first_seconds: float = 5.0
    most_seconds: float = 300.0
    window_seconds: float = 30.0
    healthy_seconds: float = 600.0


class Times(_Part):
    """`worker.Limits`, where they are not the usual ones."""

    run_seconds: float = 30.0
    open_seconds: float = 1800.0


class Script(_Part):
    """The whole file."""

    device: Literal["cuda", "tensorrt"] = "cuda"
    patience: Waits = Waits()
    limits: Times = Times()
    faults: tuple[Failing, ...] = Field(default=(), strict=False)


def read_script(path: Path) -> Script:
    """Read a script.

    Raises:
        ConfigError: it cannot be read or understood.
    """
    try:
        return Script.model_validate(read_file(path))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        places = [".".join(str(part) for part in problem["loc"]) for problem in problems]
        raise ConfigError(
            [f"{path}: {place}: {problem['msg']}" for place, problem in zip(places, problems, strict=True)]
        ) from None


def seam_of(script: Script) -> Seam:
    """A seam with the script's device in it."""
    probing = _Stage(script, "probe")

    def opened(graph: bytes, device: Effective, *, max_batch: int, data: Path | None) -> OnDevice:
        if device != script.device:
            return open_session(graph, device, max_batch=max_batch, data=data)
        for fault in _Stage(script, "open").due(1):
            _strike(fault)
        return FailingSession(open_session(graph, "cpu", max_batch=max_batch, data=data), script)

    def probed(device: Effective) -> Verdict:
        if device != script.device:
            return Verdict(Reason.NO_DEVICE, f"{device} is not the device of the script")
        for fault in probing.due(1):
            time.sleep(fault.slow_seconds)
            if fault.hang:
                return Verdict(Reason.PROBE_TIMEOUT, "a first session did not start in time")
            if fault.raises is not None:
                return classify(fault.raises, driver_present=True)
        return Verdict(Reason.OK, "usable")

    return Seam(built_in=lambda device: device == script.device, probe=probed, open=opened)


def tuning_of(script: Script) -> Tuning:
    """The script's waits and limits, and its answers to probes."""
    waits, times = script.patience, script.limits
    patience = Patience(
        waits.first_seconds, waits.most_seconds, waits.window_seconds, waits.healthy_seconds, jitter=0.0
    )
    limits = Limits(run_s=times.run_seconds, open_s=times.open_seconds)
    return Tuning(limits, patience, seam_of(script).probe)


def _strike(fault: Failing) -> None:
    """Let it happen to this process.

    Raises:
        RuntimeError: in the words of the script.
    """
    time.sleep(fault.slow_seconds)
    if fault.signal is not None:
        # To this very thread: sent to the process, it could come after the batch is computed.
        signal.raise_signal(signal.Signals[fault.signal])
    if fault.hang:
        threading.Event().wait()
    if fault.raises is not None:
        raise RuntimeError(fault.raises)


class _Stage:
    """A place where faults happen, with its clock and its count of runs. Thread-safe."""

    def __init__(
        self,
        script: Script,
        at: Literal["open", "run", "probe"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._faults = [fault for fault in script.faults if fault.at == at]
        self._clock = clock
        self._began_s = clock()
        self._runs = itertools.count(1)

    def due(self, size: int) -> list[Failing]:
        """Count a run with so many pictures; the faults that happen to it, in the script's order."""
        run, seconds = next(self._runs), self._clock() - self._began_s
        return [fault for fault in self._faults if fault.when.holds(run, seconds, size)]


class FailingSession:
    """A session that pretends to be on the script's device (`seam.OnDevice`)."""

    def __init__(self, inner: OnDevice, script: Script) -> None:
        self._inner = inner
        self._stage = _Stage(script, "run")
        self._spoiled: str | None = None
        self.device: Effective = script.device

    @property
    def rows(self) -> int:
        """As the real one."""
        return self._inner.rows

    @property
    def places(self) -> NodePlaces:
        """As the real one."""
        return self._inner.places

    @property
    def notes(self) -> tuple[str, ...]:
        """Says that this is no device."""
        return (*self._inner.notes, f"{self.device} is pretended, with faults by script")

    def run(self, pictures: Pictures, size: int) -> Rows:
        """Compute on the CPU, unless a fault is due. What spoils a real process spoils this session, too."""
        if self._spoiled is not None:
            raise RuntimeError(self._spoiled)
        due = self._stage.due(size)
        for fault in due:
            if fault.raises is not None and fault_of(fault.raises, on_gpu=True) in FATAL:
                self._spoiled = fault.raises
            _strike(fault)
        rows = self._inner.run(pictures, size)
        for fault in due:
            rows = _spoiled(rows, fault.rows)
        return rows

    def keep(self, sizes: Collection[int]) -> None:
        """Nothing: runs may be in progress, as on a GPU."""

    def close(self) -> None:
        """Close the real one."""
        self._inner.close()


def _spoiled(rows: Rows, how: Literal["nan", "zeros", "wrong"] | None) -> Rows:
    if how == "nan":
        return np.full_like(rows, np.nan)
    if how == "zeros":
        return np.zeros_like(rows)
    if how == "wrong":
        rows = rows.copy()
        rows[..., :4] += 25.0
    return rows
