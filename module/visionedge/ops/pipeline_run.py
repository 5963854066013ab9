"""One measured stretch of a load: real cameras, batcher, engine and lanes, and what it cost."""

import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from visionedge.capture.camera import Camera, Means
from visionedge.capture.decoded import Limits, Source
from visionedge.capture.source import open_source
from visionedge.capture.video import LoopedSource
from visionedge.config import InferenceConfig
from visionedge.errors import SourceError, VisionedgeError
from visionedge.frames import Result
from visionedge.inference.any_engine import AnyEngine
from visionedge.inference.batcher import Batcher
from visionedge.inference.detections import Selection
from visionedge.inference.engine import open_engine
from visionedge.inference.lanes import Lane
from visionedge.inference.model import Model
from visionedge.inference.plan import Plan
from visionedge.inference.process import EngineProcess
from visionedge.inference.shared import Arena, blocks_for
from visionedge.threads import Crew
from visionedge.uris import CameraUri

_WARM_UP_S = 1.0
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Load:
    """What to run: `fps` None is flat out, each camera as fast as its frames are taken.

    The engine runs in a process of its own unless `in_process`; with `compare_process` it is measured in both
    ways. `data` is the folder of compiled graphs and measured plans; without it the plan is that of a rule.
    """

    model: Path
    source: str
    cameras: int = 4
    fps: float | None = None
    seconds: float = 8.0
    rounds: int = 3
    baseline: bool = False
    in_process: bool = False
    compare_process: bool = False
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One measured stretch. Latencies are from capture to result, in ms."""

    frames_per_s: float
    cpu_ms_per_frame: float
    latency_ms: Mapping[str, float]
    stages_ms: Mapping[str, float]
    dropped: Mapping[str, int]
    detections_per_frame: float


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine that is open, in its own process where there is an arena."""

    engine: AnyEngine
    arena: Arena | None = None

    def close(self) -> None:
        """Let go of both."""
        self.engine.close()
        if self.arena is not None:
            self.arena.close()


def rig_of(load: Load, model: Model, *, own_process: bool, like: AnyEngine | None = None) -> Rig:
    """Open an engine for a load, on the plan of another one where that is given.

    Raises:
        ModelError, DeviceError: it cannot be had.
    """
    plans: dict[str, Plan] = {like.device.effective: like.plan} if like else {}
    if not own_process:
        return Rig(open_engine(model, load.inference, data=load.data, plans=plans))
    arena = Arena(model.input, blocks_for(load.cameras))
    engine = EngineProcess(model, load.inference, arena, data=load.data)
    try:
        engine.open()
    except BaseException:
        arena.close()
        raise
    return Rig(engine, arena)


class _Tally:
    """Collects results; lanes deliver, the measurer resets and reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: list[tuple[int, int, int, int]] = []

    def deliver(self, result: Result) -> None:
        timing = result.timing
        row = (timing.wait_ns, timing.infer_ns, timing.total_ns, len(result.detections))
        with self._lock:
            self._results.append(row)

    def take(self) -> list[tuple[int, int, int, int]]:
        with self._lock:
            results, self._results = self._results, []
        return results


def pipeline_run(load: Load, rig: Rig, selection: Selection) -> Run:
    """Let the load run for its seconds.

    Raises:
        SourceError: no frame came through.
        VisionedgeError: a thread died, or did not end.
    """
    tally = _Tally()
    with _running(load, rig, selection, tally) as (batcher, broken):
        broken.wait(_WARM_UP_S)
        tally.take()
        before, cpu, began_s = _dropped(batcher), cpu_s(rig.engine), time.monotonic()
        broken.wait(load.seconds)
        rows, took_s, cpu = tally.take(), time.monotonic() - began_s, cpu_s(rig.engine) - cpu
        dropped = _dropped(batcher) - before
    return run_of(rows, took_s, cpu, dropped)


@contextmanager
def _running(
    load: Load, rig: Rig, selection: Selection, tally: _Tally
) -> Iterator[tuple[Batcher, threading.Event]]:
    """Cameras, batcher and lanes at work, and an event that tells of a death; all are gone afterwards."""
    broken, engine = threading.Event(), rig.engine
    crew = Crew(lambda _name, _error: broken.set())
    batcher = Batcher(engine.plan.max_batch, int(load.inference.max_age_seconds * 1e9))
    cameras = [_camera(load, f"bench-{number}", rig, batcher) for number in range(load.cameras)]
    for number in range(engine.plan.lanes):
        crew.start(f"lane:{number}", Lane(batcher, engine, selection, tally.deliver).run, vital=True)
    for camera in cameras:
        batcher.open(camera.name)
        crew.start(f"camera:{camera.name}", camera.run)
    try:
        yield batcher, broken
    finally:
        for camera in cameras:
            camera.stop()
        batcher.close()
        left = crew.join(_STOP_S)
    if broken.is_set() or left:
        raise VisionedgeError(f"the bench broke; see the log ({', '.join(left) or 'a thread died'})")


def _camera(load: Load, name: str, rig: Rig, batcher: Batcher) -> Camera:
    return Camera(
        name,
        load.source,
        rig.engine.model.input,
        batcher,
        fps=load.fps,
        paced=load.fps is not None,
        allocate=rig.arena.allocate if rig.arena else None,
        means=Means(opener=_looped),
    )


def _looped(uri: CameraUri, limits: Limits) -> Source:
    source = open_source(uri, limits)
    if source.live:
        return source
    source.close()
    return LoopedSource(lambda: open_source(uri, limits))


def _dropped(batcher: Batcher) -> Counter[str]:
    total: Counter[str] = Counter()
    for camera in batcher.statistics().cameras.values():
        total.update({str(reason): count for reason, count in camera.dropped.items()})
    return total


def run_of(rows: list[tuple[int, int, int, int]], took_s: float, used_s: float, dropped: Counter[str]) -> Run:
    """The figures of a stretch: a row is wait, infer and total in ns, and detections.

    Raises:
        SourceError: there is none.
    """
    if not rows:
        raise SourceError("no frame came through in the time given; give --seconds more, or another --source")
    table = np.array(rows, np.float64)
    wait, infer, total = table[:, 0] / 1e6, table[:, 1] / 1e6, table[:, 2] / 1e6
    return Run(
        frames_per_s=len(rows) / took_s,
        cpu_ms_per_frame=used_s * 1000 / len(rows),
        latency_ms={f"p{q}": float(np.percentile(total, q)) for q in (50, 95, 99)},
        stages_ms={"wait": float(np.median(wait)), "infer": float(np.median(infer))},
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        detections_per_frame=float(table[:, 3].mean()),
    )


def cpu_s(engine: AnyEngine | None = None) -> float:
    """The processor time of this process so far, with that of an engine's own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    child = engine.process if engine else None
    return used.ru_utime + used.ru_stime + (_child_s(child.pid) if child and child.pid else 0.0)


def _child_s(pid: int) -> float:
    """User and system time of a process, as the kernel tells it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
