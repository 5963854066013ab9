"""`visionedge bench pipeline --events`: from the capture of a frame to its scene event in an HTTP client.

The pipeline's capacity is measured first. Then a module runs with as many cameras as need `LOAD_SHARE` of it;
each has lines, so that events are frequent. A client in a process of its own reads them as server-sent
events. `bench_events` returns the report as a JSON document; `format_report` makes text of it.
"""

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from visionedge.config.load import parse_config
from visionedge.config.schema import CameraConfig
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.event_reader import EventAges
from visionedge.ops.bench.http import start_module
from visionedge.ops.bench.machine import describe_machine, format_camera_count
from visionedge.ops.bench.pipeline_run import (
    PipelineLoad,
    SyntheticSpec,
    open_engine_process,
    run_pipeline,
)
from visionedge.ops.module_client import fetch_status
from visionedge.runtime.child_process import start_child

LOAD_SHARE = 0.8
ALLOWANCE_MS = 60.0
"""Beyond one frame interval: what an event may need from capture to the client."""

_MAX_FPS = 10.0
"""The rate of the bundled clip."""

_WARM_UP_S = 3.0
_READER_LIMIT_S = 30.0
_QUANTILES = (50, 95, 99)
_LINES = {
    **{f"x{n}": {"start": [n / 10, 0], "end": [n / 10, 1], "minSeconds": 0} for n in range(1, 10)},
    **{f"y{n}": {"start": [0, n / 10], "end": [1, n / 10], "minSeconds": 0} for n in range(3, 10)},
}


@dataclass(frozen=True, slots=True)
class EventRound:
    """The events of one round, and the frames that the module analysed and dropped meanwhile."""

    ages: EventAges
    took_s: float
    analysed: int
    dropped: Mapping[str, int]

    def percentile_ms(self, q: int) -> float:
        """A percentile of the ages; NaN without events."""
        return float(np.percentile(self.ages.ages_ms, q)) if self.ages.ages_ms else math.nan


def make_event_scene() -> CameraConfig:
    """A camera with lines all over the picture; a crossing counts in the frame that shows it."""
    return parse_config({"cameras": {"bench": {"uri": "demo:", "lines": _LINES}}}).cameras["bench"]


def bench_events(load: PipelineLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    `load.fps` is the most frames per second of a camera (default 10); `load.cameras` counts for the capacity.

    Raises:
        ConfigError: the source is synthetic.
        SourceError, ModelError, DeviceError: see `bench_pipeline`.
        VisionedgeError: the module or the client failed.
    """
    if SyntheticSpec.parse(load.source) is not None:
        raise ConfigError([f"--source {load.source}: --events needs a video file"])
    load = replace(load, scene=load.scene or make_event_scene())
    capacity = _measure_capacity(load)
    cameras, fps = share_load(LOAD_SHARE * capacity, load.fps or _MAX_FPS)
    progress(
        f"capacity {capacity:.1f} frames/s; starting a module with {format_camera_count(cameras)},"
        f" {fps:.2f} frames/s each"
    )
    rounds: list[EventRound] = []
    with _run_module(load, cameras, fps) as url:
        time.sleep(_WARM_UP_S)
        for number in range(1, load.rounds + 1):
            rounds.append(_measure_round(url, load.seconds))
            events, p99 = len(rounds[-1].ages.ages_ms), rounds[-1].percentile_ms(99)
            progress(f"round {number}/{load.rounds}: {events} events, p99 {p99:.1f} ms")
        device = fetch_status(url, None)["engine"].get("effective")
    return build_report(load, rounds, capacity=capacity, cameras=cameras, fps=fps) | {
        "machine": describe_machine() | {"effectiveDevice": device}
    }


def share_load(frames_per_second: float, max_fps: float) -> tuple[int, float]:
    """The fewest cameras with at most `max_fps` that have so many frames together, and their rate."""
    cameras = max(1, math.ceil(round(frames_per_second / max_fps, 6)))
    return cameras, frames_per_second / cameras


def _measure_capacity(load: PipelineLoad) -> float:
    model = load_model(load.model)
    selection = Selection.of(model, load.inference.confidence, load.inference.iou)
    with open_engine_process(load, model) as (engine, frame_pool):
        unlimited = replace(load, fps=None)
        return run_pipeline(unlimited, engine, frame_pool, selection, with_scene=True).frames_per_second


@contextmanager
def _run_module(load: PipelineLoad, cameras: int, fps: float) -> Iterator[str]:
    """A module with these cameras and a data folder of its own: its address."""
    scene = (load.scene or make_event_scene()).model_dump(by_alias=True, exclude_unset=True, mode="json")
    camera = {**scene, "uri": load.source, "fps": round(fps, 3), "loop": True}
    document = {
        "cameras": {f"bench-{number}": camera for number in range(cameras)},
        "model": {"path": str(load.model.resolve())},
        "inference": load.inference.model_dump(by_alias=True, exclude_unset=True, mode="json"),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        data = {"VISIONEDGE_DATA": str(Path(folder) / "data")}
        with start_module(("--config", str(path)), data) as (url, _pid):
            yield url


def _measure_round(url: str, seconds: float) -> EventRound:
    before, began_s = _count_frames(url), time.monotonic()
    ages = _read_ages(url, seconds)
    took_s, after = time.monotonic() - began_s, _count_frames(url)
    return EventRound(ages, took_s, after[0] - before[0], after[1] - before[1])


def _count_frames(url: str) -> tuple[int, Counter[str]]:
    """The frames so far: analysed, and dropped by reason."""
    cameras = fetch_status(url, None)["cameras"]
    dropped = sum((Counter(camera["dropped"]) for camera in cameras), Counter[str]())
    return sum(int(camera["framesAnalysed"]) for camera in cameras), dropped


def _read_ages(url: str, seconds: float) -> EventAges:
    child = start_child("visionedge.ops.bench.event_reader", url, str(seconds), text=True)
    try:
        text, _ = child.communicate(timeout=seconds + _READER_LIMIT_S)
        document = json.loads(text)
    except (TimeoutError, ValueError) as error:
        raise VisionedgeError(f"the client of the events failed: {type(error).__name__}") from None
    finally:
        child.kill()
        child.wait()
    if "error" in document:
        raise VisionedgeError(f"the client of the events failed: {document['error']}")
    return EventAges(**document)


# --- figures ------------------------------------------------------------------------------------------------


def build_report(
    load: PipelineLoad, rounds: Sequence[EventRound], *, capacity: float, cameras: int, fps: float
) -> dict[str, Any]:
    """The report without its machine.

    Raises:
        VisionedgeError: there were no events.
    """
    ages_ms = [age for each in rounds for age in each.ages.ages_ms]
    if not ages_ms:
        raise VisionedgeError("no scene event came; use more --seconds, or a --source in which objects move")
    speeds = [round(each.analysed / each.took_s, 2) for each in rounds]
    latency = {f"p{q}": round(float(np.percentile(ages_ms, q)), 2) for q in _QUANTILES}
    bound_ms = round(1000 / fps + ALLOWANCE_MS, 2)
    return {
        "schema": "visionedge/bench-events/1",
        "load": {
            "source": load.source,
            "cameras": cameras,
            "fps": round(fps, 3),
            "zones": len(load.scene.zones) if load.scene else 0,
            "lines": len(load.scene.lines) if load.scene else 0,
            "seconds": load.seconds,
            "rounds": load.rounds,
        },
        "model": load.model.stem,
        "capacity": round(capacity, 2),
        "events": {
            "count": len(ages_ms),
            "perSecond": round(len(ages_ms) / sum(each.took_s for each in rounds), 2),
            "latencyMs": latency,
            "boundMs": bound_ms,
            "withinBound": latency["p99"] <= bound_ms,
            "afterClockSteps": sum(each.ages.after_clock_steps for each in rounds),
            "rounds": [_describe_round(each) for each in rounds],
        },
        "module": {
            "framesPerSecond": median(speeds),
            "framesPerSecondAll": speeds,
            "loadShare": round(median(speeds) / capacity, 3),
            "dropped": dict(sum((Counter(each.dropped) for each in rounds), Counter[str]())),
        },
    }


def _describe_round(measured: EventRound) -> dict[str, Any]:
    quantiles = {
        f"p{q}": round(measured.percentile_ms(q), 2) if measured.ages.ages_ms else None for q in _QUANTILES
    }
    return {"count": len(measured.ages.ages_ms), **quantiles}


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    load, events, module = report["load"], report["events"], report["module"]
    latency = "  ".join(f"{key} {value:.1f}" for key, value in events["latencyMs"].items())
    verdict = "within" if events["withinBound"] else "NOT within"
    dropped = ", ".join(f"{count} {reason}" for reason, count in module["dropped"].items()) or "none"
    lines = [
        f"{format_camera_count(load['cameras'])} of {load['source']} with {load['fps']:g} frames/s and"
        f" {load['lines']} lines each; {module['framesPerSecond']:.1f} frames/s, {module['loadShare']:.2f} of"
        f" the capacity; dropped {dropped}",
        f"  {events['count']} scene events, {events['perSecond']:.1f}/s; capture to client ms  {latency}",
        f"  p99 is {verdict} one frame interval and {ALLOWANCE_MS:.0f} ms ({events['boundMs']:.1f} ms)",
    ]
    if events["afterClockSteps"]:
        lines.append(f"  {events['afterClockSteps']} events do not count, because the clock was set")
    return "\n".join(lines) + "\n"
