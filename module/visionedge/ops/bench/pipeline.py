"""`visionedge bench pipeline`: the real cameras, batcher, engine and lanes under load.

`bench_pipeline` runs a load and returns the report as a JSON document; `format_report` makes text of it. With
`baseline` the plain loop and the ceiling of the machine (see `baseline`) are measured in the same rounds, and
all comparisons are medians of the rounds' ratios, because a machine's speed varies from second to second.
The same holds for a run with tracker, zones and lines (`scene`).
"""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.engine.interface import Engine
from visionedge.errors import ConfigError
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.baseline import (
    Ceiling,
    PlainLoop,
    build_ceiling_document,
    measure_baseline_agreement,
)
from visionedge.ops.bench.machine import describe_machine, format_camera_count
from visionedge.ops.bench.pipeline_run import (
    PipelineLoad,
    PipelineRun,
    ResultRecord,
    RunCost,
    SyntheticSpec,
    cpu_s,
    open_engine_process,
    rss_mib,
    run_pipeline,
    summarize_run,
)
from visionedge.runtime.measurement import median_ratio, run_in_rounds

_TITLES = {"pipeline": "pipeline", "scene": "pipeline with the scene", "baseline": "plain loop"}


def bench_pipeline(load: PipelineLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report as a document. `progress` gets a line for each step.

    Raises:
        ConfigError: the plain loop cannot play the source.
        SourceError: the source cannot be read, or no frame came through.
        ModelError, DeviceError: the engine cannot be opened.
    """
    model = load_model(load.model)
    selection = Selection.of(model, load.inference.confidence, load.inference.iou)
    _check_source(load)
    with open_engine_process(load, model) as (engine, frame_pool), ExitStack() as stack:
        info = engine.info()
        progress(f"{info.device.describe()}; {info.plan.reason}")
        sides: dict[str, Callable[[], Any]] = {
            "pipeline": lambda: run_pipeline(load, engine, frame_pool, selection)
        }
        if load.scene is not None:
            sides["scene"] = lambda: run_pipeline(load, engine, frame_pool, selection, with_scene=True)
        plain = None
        if load.baseline:
            device = info.device.effective
            plain = stack.enter_context(closing(_best_plain(load, model, device, selection, progress)))
            sides["baseline"] = partial(_plain_run, plain, load.seconds, load.slo_ms)
            # The ceiling is that of the original network in fp32 on a CPU.
            if device == "cpu" and info.precision.precision == "fp32":
                measure = partial(Ceiling(model, load.source).measure, max(0.5, load.seconds / 4))
                sides["ceiling"] = lambda: (measure(1), measure(info.plan.lanes))

        def after_round(number: int, results: Mapping[str, Sequence[Any]]) -> None:
            for name in [name for name in _TITLES if name in results]:
                speed = results[name][-1].frames_per_second
                progress(f"round {number}/{load.rounds}: {_TITLES[name]} {speed:.1f} frames/s")

        results = run_in_rounds(sides, load.rounds, after_round)
        report = _report(load, engine, results, plain)
        if plain is not None:
            report["baselineAgreement"] = measure_baseline_agreement(load.source, engine, selection, plain)
        return report


def _check_source(load: PipelineLoad) -> None:
    """Report what is wrong with a source before the engine warms up."""
    if SyntheticSpec.parse(load.source) is None:
        with closing(open_source(parse_camera_uri(load.source))):
            return
    if load.baseline:
        raise ConfigError([f"--source {load.source}: the plain loop of --baseline needs a video file"])


def _best_plain(
    load: PipelineLoad, model: Model, device: str, selection: Selection, progress: Callable[[str], None]
) -> PlainLoop:
    """The plain loop with its fastest thread setting: a slower setting would flatter the pipeline."""

    def open_loop(threads: int) -> PlainLoop:
        source, cameras = load.source, load.cameras
        return PlainLoop(model, selection, source=source, cameras=cameras, threads=threads, device=device)

    # The fastest loop goes on as it is: opened again, it would be measured cold.
    trials: list[tuple[float, PlainLoop]] = []
    for threads in sorted({1, os.cpu_count() or 1, 0}):
        loop = open_loop(threads)
        speed = _plain_run(loop, max(1.0, load.seconds / 4), load.slo_ms).frames_per_second
        progress(f"plain loop, {threads or 'default'} threads: {speed:.1f} frames/s")
        trials.append((speed, loop))
    best = max(trials, key=lambda trial: trial[0])[1]
    for _, loop in trials:
        if loop is not best:
            loop.close()
    return best


def _plain_run(loop: PlainLoop, seconds: float, slo_ms: float) -> PipelineRun:
    loop.step()  # the first frame warms up
    rows: list[ResultRecord] = []
    used_s, began_s = cpu_s(), time.monotonic()
    while time.monotonic() - began_s < seconds:
        began_ns = time.monotonic_ns()
        infer_ns, found = loop.step()
        rows.append(ResultRecord("plain", began_ns, time.monotonic_ns(), infer_ns, found))
    return summarize_run(rows, RunCost(time.monotonic() - began_s, cpu_s() - used_s, {}, rss_mib()), slo_ms)


# --- figures ------------------------------------------------------------------------------------------------


def _report(
    load: PipelineLoad, engine: Engine, results: Mapping[str, list[Any]], plain: PlainLoop | None
) -> dict[str, Any]:
    info, runs = engine.info(), results["pipeline"]
    report: dict[str, Any] = {
        "schema": "visionedge/bench-pipeline/1",
        "machine": describe_machine(info.device),
        "load": {
            "source": load.source,
            "cameras": load.cameras,
            "fps": load.fps,
            "sloMs": load.slo_ms,
            "seconds": load.seconds,
            "rounds": load.rounds,
            "precision": load.inference.precision,
        },
        "model": info.model.name,
        "device": info.device.describe(),
        "plan": {"lanes": info.plan.lanes, "buckets": list(info.plan.buckets)},
        "runtime": info.runtime,
        "precision": info.precision.precision,
        "pipeline": _summarize_rounds(runs),
    }
    if load.scene is not None:
        report["load"] |= {"zones": len(load.scene.zones), "lines": len(load.scene.lines)}
        report["scene"] = _summarize_rounds(results["scene"])
        report["sceneRatio"] = _ratio(results["scene"], runs) | {
            "framesPerSecondAll": _ratios(results["scene"], runs, lambda run: run.frames_per_second),
            "cpuMsPerFrameAll": _ratios(results["scene"], runs, lambda run: run.cpu_ms_per_frame),
        }
    if plain is not None:
        settings = {"threads": plain.threads, "decode": plain.decode}
        report["baseline"] = _summarize_rounds(results["baseline"]) | settings
        report["ratio"] = _ratio(runs, results["baseline"])
    if "ceiling" in results:
        report["ceiling"] = build_ceiling_document(results["ceiling"], runs)
    return report


def _ratios(
    ours: Sequence[PipelineRun], theirs: Sequence[PipelineRun], figure: Callable[[PipelineRun], float]
) -> list[float]:
    """The ratio of a figure in each round: their spread is the noise."""
    return [round(figure(a) / figure(b), 4) for a, b in zip(ours, theirs, strict=True)]


def _ratio(ours: Sequence[PipelineRun], theirs: Sequence[PipelineRun]) -> dict[str, float]:
    return {
        "framesPerSecond": round(median_ratio(ours, theirs, lambda run: run.frames_per_second), 3),
        "cpuMsPerFrame": round(median_ratio(ours, theirs, lambda run: run.cpu_ms_per_frame), 3),
    }


def _summarize_rounds(runs: Sequence[PipelineRun]) -> dict[str, Any]:
    """The medians of the rounds, the sums of dropped frames, and the figures of each round."""
    rounds = [_medians([run.dump()]) for run in runs]
    dropped = sum((Counter(run.dropped) for run in runs), Counter[str]())
    return _medians(rounds) | {
        "framesPerSecondAll": [figures["framesPerSecond"] for figures in rounds],
        "rssMiB": max(figures["rssMiB"] for figures in rounds),
        "dropped": dict(dropped),
        "rounds": rounds,
    }


def _medians(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every figure of equal documents."""
    return {
        key: _medians([document[key] for document in documents])
        if isinstance(value, Mapping)
        else round(statistics.median(document[key] for document in documents), 4)
        for key, value in documents[0].items()
        if key != "dropped"
    }


# --- text ---------------------------------------------------------------------------------------------------


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    load = report["load"]
    references = "; the plain loop in fp32" if "baseline" in report and report["precision"] != "fp32" else ""
    lines = [
        f"{report['model']} in {report['precision']}, {format_camera_count(load['cameras'])} of"
        f" {load['source']}, {report['device']}{references}"
    ]
    lines.extend(
        f"  {title:<24} {_figures(report[name])}" for name, title in _TITLES.items() if name in report
    )
    if load["fps"] is not None:
        lines.append(_format_latency_bound(report["pipeline"], load["fps"]))
    if ratio := report.get("sceneRatio"):
        speed, cost = (
            f"{ratio[key]:.3f} x {words} ({min(ratio[f'{key}All']):.3f} to {max(ratio[f'{key}All']):.3f})"
            for key, words in (("framesPerSecond", "frames/s"), ("cpuMsPerFrame", "CPU per frame"))
        )
        lines.append(f"  {'ratio with to without':<24} {speed}  {cost}")
    if ratio := report.get("ratio"):
        speed, cost = ratio["framesPerSecond"], ratio["cpuMsPerFrame"]
        title = "ratio to the plain loop"
        lines.append(f"  {title:<24} {speed:8.2f} x frames/s  {cost:6.2f} x CPU per frame")
    if ceiling := report.get("ceiling"):
        lines.extend(_format_ceiling(ceiling))
    if agreement := report.get("baselineAgreement"):
        lines.append(
            f"  the plain loop finds {agreement['matched']:.1%} of {agreement['boxes']} boxes on"
            f" {agreement['pictures']} pictures too; the scores differ by {agreement['scoreShift']:.3f}"
        )
    return "\n".join(lines) + "\n"


def _format_latency_bound(ours: Mapping[str, Any], fps: float) -> str:
    """Latency beside its bound under overload: the running batch, the frame's own batch and one interval."""
    batch_ms = ours["stagesMs"]["infer"]
    return (
        f"  latency p99 {ours['latencyMs']['p99']:.0f} ms; two batches and a frame's interval are"
        f" {2 * batch_ms + 1000 / fps:.0f} ms"
    )


def _format_ceiling(ceiling: Mapping[str, Any]) -> list[str]:
    """The ceiling and the pipeline's ratio to it, for one thread and for one thread per lane."""
    at_once = ceiling["atOnce"]
    more = (
        f"; measured {at_once['measuredPerSecond']:.1f} frames/s, the pipeline {at_once['toMeasured']:.2f} x"
    )
    sides = {"one thread": (ceiling["alone"], ""), f"{at_once['threads']} at once": (at_once, more)}
    return [
        f"  {f'ceiling, {title}':<24} {side['framesPerSecond']:8.1f} frames/s  "
        f"{side['decodeCpuMs'] + side['runCpuMs']:6.2f} CPU ms/frame  (decoding {side['decodeCpuMs']:.2f},"
        f" session.run {side['runCpuMs']:.2f}); the pipeline has {side['speedToCeiling']:.2f} x the frames/s"
        f" at {side['cpuToBare']:.2f} x the CPU{rest}"
        for title, (side, rest) in sides.items()
    ]


def _figures(figures: Mapping[str, Any]) -> str:
    latency = "  ".join(f"{key} {value:.1f}" for key, value in figures["latencyMs"].items())
    return (
        f"{figures['framesPerSecond']:8.1f} frames/s  {figures['cpuMsPerFrame']:6.2f} CPU ms/frame  "
        f"latency ms {latency}  age p99 {figures['ageMs']['p99']:.0f}  fairness {figures['fairness']:.3f}  "
        f"goodput {figures['goodputPerSecond']:.1f}/s  {figures['rssMiB']:.0f} MiB  "
        f"dropped {', '.join(f'{n} {reason}' for reason, n in figures['dropped'].items()) or 'none'}"
    )
