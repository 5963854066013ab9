"""`visionedge bench pipeline`: the real cameras, batcher, engine and lanes under load, beside a plain loop.

Machines are noisy, so what is compared is interleaved in rounds of one run and told as medians and ratios.
"""

import os
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visionedge.capture.camera import Camera, Means
from visionedge.capture.decoded import Limits, Source
from visionedge.capture.source import open_source
from visionedge.capture.video import LoopedSource
from visionedge.config import InferenceConfig
from visionedge.errors import SourceError, VisionedgeError
from visionedge.frames import Result
from visionedge.inference.batcher import Batcher
from visionedge.inference.detections import Selection
from visionedge.inference.engine import Engine, open_engine
from visionedge.inference.lanes import Lane
from visionedge.inference.model import Model, load_model
from visionedge.ops.bench_report import machine
from visionedge.ops.plain_loop import PlainLoop
from visionedge.threads import Crew
from visionedge.uris import CameraUri, parse_camera_uri

_WARM_UP_S = 1.0
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Load:
    """What to run: `fps` None is flat out, each camera as fast as its frames are taken.

    `data` is the folder of compiled graphs and measured plans; without it the plan is that of a rule.
    """

    model: Path
    source: str
    cameras: int = 4
    fps: float | None = None
    seconds: float = 8.0
    rounds: int = 3
    baseline: bool = False
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


def bench_pipeline(load: Load, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        SourceError: the source cannot be read, or no frame came through.
        ModelError, DeviceError: the engine cannot be had.
    """
    model = load_model(load.model)
    selection = Selection.of(model, load.inference.confidence, load.inference.iou)
    with closing(open_source(parse_camera_uri(load.source))):
        pass  # a wrong source is told before the engine warms up
    with closing(open_engine(model, load.inference, data=load.data)) as engine:
        tell(f"{engine.device.describe()}; {engine.plan.reason}")
        plain = _best_plain(load, engine, selection, tell) if load.baseline else None
        ours: list[Run] = []
        theirs: list[Run] = []
        for number in range(load.rounds):
            ours.append(_pipeline_run(load, engine, selection))
            tell(f"round {number + 1}/{load.rounds}: pipeline {ours[-1].frames_per_s:.1f} frames/s")
            if plain is not None:
                theirs.append(_plain_run(plain, load.seconds))
                tell(f"round {number + 1}/{load.rounds}: plain loop {theirs[-1].frames_per_s:.1f} frames/s")
        return _report(load, engine, ours, theirs, plain)


# --- the pipeline -------------------------------------------------------------------------------------------


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


def _pipeline_run(load: Load, engine: Engine, selection: Selection) -> Run:
    tally = _Tally()
    with _running(load, engine, selection, tally) as (batcher, broken):
        broken.wait(_WARM_UP_S)
        tally.take()
        before, cpu_s, began_s = _dropped(batcher), _cpu_s(), time.monotonic()
        broken.wait(load.seconds)
        rows, took_s, cpu_s = tally.take(), time.monotonic() - began_s, _cpu_s() - cpu_s
        dropped = _dropped(batcher) - before
    return _run(rows, took_s, cpu_s, dropped)


@contextmanager
def _running(
    load: Load, engine: Engine, selection: Selection, tally: _Tally
) -> Iterator[tuple[Batcher, threading.Event]]:
    """Cameras, batcher and lanes at work, and an event that tells of a death; all are gone afterwards."""
    broken = threading.Event()
    crew = Crew(lambda _name, _error: broken.set())
    batcher = Batcher(engine.plan.max_batch, int(load.inference.max_age_seconds * 1e9))
    cameras = [_camera(load, f"bench-{number}", engine.model, batcher) for number in range(load.cameras)]
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


def _camera(load: Load, name: str, model: Model, batcher: Batcher) -> Camera:
    return Camera(
        name,
        load.source,
        model.input,
        batcher,
        fps=load.fps,
        paced=load.fps is not None,
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


# --- the plain loop -----------------------------------------------------------------------------------------


def _best_plain(load: Load, engine: Engine, selection: Selection, tell: Callable[[str], None]) -> PlainLoop:
    """The plain loop at its best thread setting: whoever compares with a bad setting fools himself."""
    cores = os.cpu_count() or 1
    trials: list[tuple[float, PlainLoop]] = []
    for threads in sorted({1, cores, 0}):
        loop = PlainLoop(
            engine.model,
            selection,
            source=load.source,
            cameras=load.cameras,
            threads=threads,
            device=engine.device.effective,
        )
        speed = _plain_run(loop, max(1.0, load.seconds / 4)).frames_per_s
        tell(f"plain loop, {threads or 'default'} threads: {speed:.1f} frames/s")
        trials.append((speed, loop))
    best = max(trials, key=lambda trial: trial[0])[1]
    for _, loop in trials:
        if loop is not best:
            loop.close()
    return best


def _plain_run(loop: PlainLoop, seconds: float) -> Run:
    loop.step()  # the first frame warms up
    rows: list[tuple[int, int, int, int]] = []
    cpu_s, began_s = _cpu_s(), time.monotonic()
    while time.monotonic() - began_s < seconds:
        began_ns = time.monotonic_ns()
        infer_ns, found = loop.step()
        rows.append((0, infer_ns, time.monotonic_ns() - began_ns, found))
    return _run(rows, time.monotonic() - began_s, _cpu_s() - cpu_s, Counter())


# --- figures ------------------------------------------------------------------------------------------------


def _run(rows: list[tuple[int, int, int, int]], took_s: float, cpu_s: float, dropped: Counter[str]) -> Run:
    if not rows:
        raise SourceError("no frame came through in the time given; give --seconds more, or another --source")
    table = np.array(rows, np.float64)
    wait, infer, total = table[:, 0] / 1e6, table[:, 1] / 1e6, table[:, 2] / 1e6
    return Run(
        frames_per_s=len(rows) / took_s,
        cpu_ms_per_frame=cpu_s * 1000 / len(rows),
        latency_ms={f"p{q}": float(np.percentile(total, q)) for q in (50, 95, 99)},
        stages_ms={"wait": float(np.median(wait)), "infer": float(np.median(infer))},
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        detections_per_frame=float(table[:, 3].mean()),
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _report(
    load: Load, engine: Engine, ours: list[Run], theirs: list[Run], plain: PlainLoop | None
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "schema": "visionedge/bench-pipeline/1",
        "machine": machine(engine.device),
        "load": {
            "source": load.source,
            "cameras": load.cameras,
            "fps": load.fps,
            "seconds": load.seconds,
            "rounds": load.rounds,
        },
        "model": engine.model.name,
        "device": engine.device.describe(),
        "plan": {"lanes": engine.plan.lanes, "buckets": list(engine.plan.buckets)},
        "pipeline": _medians(ours),
    }
    if plain is not None:
        report["baseline"] = {"threads": plain.threads, "decode": plain.decode, **_medians(theirs)}
        report["ratio"] = {
            "framesPerSecond": round(_median(ours, "frames_per_s") / _median(theirs, "frames_per_s"), 3),
            "cpuMsPerFrame": round(
                _median(ours, "cpu_ms_per_frame") / _median(theirs, "cpu_ms_per_frame"), 3
            ),
        }
    return report


def _medians(runs: list[Run]) -> dict[str, Any]:
    return {
        "framesPerSecond": round(_median(runs, "frames_per_s"), 3),
        "framesPerSecondAll": [round(run.frames_per_s, 2) for run in runs],
        "cpuMsPerFrame": round(_median(runs, "cpu_ms_per_frame"), 3),
        "latencyMs": _middle([run.latency_ms for run in runs]),
        "stagesMs": _middle([run.stages_ms for run in runs]),
        "dropped": dict(sum((Counter(run.dropped) for run in runs), Counter())),
        "detectionsPerFrame": round(_median(runs, "detections_per_frame"), 3),
    }


def _middle(figures: list[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(f[key] for f in figures), 3) for key in figures[0]}


def _median(runs: list[Run], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def words(report: dict[str, Any]) -> str:
    """The report for people."""
    load = report["load"]
    lines = [f"{report['model']}, {load['cameras']} cameras of {load['source']}, {report['device']}"]
    names = [name for name in ("pipeline", "baseline") if name in report]
    lines.extend(f"  {name:<9} {_figures(report[name])}" for name in names)
    if ratio := report.get("ratio"):
        speed, cost = ratio["framesPerSecond"], ratio["cpuMsPerFrame"]
        lines.append(f"  ratio     {speed:8.2f} x frames/s  {cost:6.2f} x CPU per frame")
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, Any]) -> str:
    latency = "  ".join(f"{key} {value:.1f}" for key, value in figures["latencyMs"].items())
    return (
        f"{figures['framesPerSecond']:8.1f} frames/s  {figures['cpuMsPerFrame']:6.2f} CPU ms/frame  "
        f"latency ms {latency}  dropped {figures['dropped'] or 'none'}"
    )
