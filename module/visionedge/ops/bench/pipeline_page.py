"""The page of `bench pipeline`."""

from collections.abc import Mapping
from typing import Any

from visionedge.ops.bench.pages import ReportPage, ReportSection, ReportTile, render_page, render_table
from visionedge.ops.bench.plots import LineSeries, plot_bars, plot_grouped_bars, plot_lines
from visionedge.ops.bench.report import format_camera_count
from visionedge.ops.bench.system_load import describe_other_load

BenchReport = Mapping[str, Any]

_SIDE_TITLES = {"pipeline": "visionedge", "baseline": "plain loop"}


def pipeline_page(report: BenchReport) -> str:
    """The report of `bench_pipeline` as an HTML document."""
    load = report["load"]
    return render_page(
        ReportPage(
            kind="pipeline",
            title=f"{format_camera_count(load['cameras'])} through {report['model']}",
            lead=_lead(report),
            tiles=tuple(_tiles(report)),
            sections=(_speeds(report), _latency(report), _cost(report), _stages(report)),
            machine=report["machine"],
            caution=describe_other_load(report),
            load=f"{load['rounds']} rounds of {load['seconds']:g} s, {load['source']}, "
            + ("flat out" if load["fps"] is None else f"{load['fps']:g} frames/s from each camera"),
        )
    )


def _sides(report: BenchReport) -> dict[str, Mapping[str, Any]]:
    """What was run, by its key."""
    return {key: report[key] for key in _SIDE_TITLES if key in report}


def _lead(report: BenchReport) -> str:
    ours = report["pipeline"]
    latency_ms = ours["latencyMs"]["p50"]
    text = f"{ours['framesPerSecond']:.1f} frames a second, analysed {latency_ms:.0f} ms after capture"
    if ratio := report.get("ratio"):
        text += (
            f": {ratio['framesPerSecond']:.2f} times what a plain OpenCV and onnxruntime loop does here, for"
            f" {ratio['cpuMsPerFrame']:.2f} of its processor time a frame"
        )
    return f"{text}. Device: {report['device']}."


def _tiles(report: BenchReport) -> list[ReportTile]:
    ours = report["pipeline"]
    latency_ms = ours["latencyMs"]
    tiles = [
        ReportTile("frames/s", f"{ours['framesPerSecond']:.1f}", "median of the rounds"),
        ReportTile("latency", f"{latency_ms['p50']:.0f} ms", f"95 % within {latency_ms['p95']:.0f} ms"),
        ReportTile("CPU a frame", f"{ours['cpuMsPerFrame']:.1f} ms", "decoding included"),
    ]
    if ratio := report.get("ratio"):
        tiles.append(
            ReportTile("to the plain loop", f"{ratio['framesPerSecond']:.2f} x", "frames/s, same run")
        )
    if ceiling := report.get("ceiling"):
        alone = ceiling["alone"]
        words = f"{alone['framesPerSecond']:.0f}: bare decoding and bare session.run"
        tiles.append(ReportTile("of the ceiling", f"{alone['speedToCeiling']:.2f}", words))
    return tiles


def _speeds(report: BenchReport) -> ReportSection:
    sides = _sides(report)
    series = [
        LineSeries(_SIDE_TITLES[key], list(enumerate(side["framesPerSecondAll"], 1)), number)
        for number, (key, side) in enumerate(sides.items())
    ]
    text = "Both take turns in one run, so that a busy moment of the machine is one for both."
    return ReportSection(
        "Frames per second, round by round",
        text if len(sides) > 1 else "",
        (plot_lines("Frames per second in each round", ("round", "frames/s"), series),),
    )


def _latency(report: BenchReport) -> ReportSection:
    sides = _sides(report)
    names = list(report["pipeline"]["latencyMs"])
    words = {"p50": "half of the frames", "p95": "95 %", "p99": "99 %"}
    series = {
        _SIDE_TITLES[key]: ([side["latencyMs"][name] for name in names], number)
        for number, (key, side) in enumerate(sides.items())
    }
    return ReportSection(
        "Latency",
        "From the moment a picture is decoded until its result is there. That of the plain loop begins when"
        " it reads a frame: its cameras take turns, and nobody counts how long the others wait.",
        (plot_grouped_bars("Latency percentiles", "ms", [words.get(name, name) for name in names], series),),
    )


def _cost(report: BenchReport) -> ReportSection:
    sides = _sides(report)
    values = {
        _SIDE_TITLES[key]: (side["cpuMsPerFrame"], number) for number, (key, side) in enumerate(sides.items())
    }
    heads = ("", "frames/s", "CPU ms a frame", "p50 ms", "p95 ms", "p99 ms", "detections a frame", "dropped")
    cells = [
        (
            _SIDE_TITLES[key],
            f"{side['framesPerSecond']:.1f}",
            f"{side['cpuMsPerFrame']:.2f}",
            *(f"{side['latencyMs'][name]:.1f}" for name in ("p50", "p95", "p99")),
            f"{side['detectionsPerFrame']:.2f}",
            ", ".join(f"{count} {reason}" for reason, count in side["dropped"].items()) or "none",
        )
        for key, side in sides.items()
    ]
    return ReportSection(
        "What a frame costs",
        "Processor time of the whole process for each analysed frame, decoding included.",
        (
            plot_bars("CPU milliseconds for each frame", "CPU ms a frame", values),
            render_table(heads, cells, words={0}),
        ),
    )


def _stages(report: BenchReport) -> ReportSection:
    plan = report["plan"]
    stages = report["pipeline"]["stagesMs"]
    words = {
        "late": "behind schedule",
        "decode": "decoding, to the model's size",
        "wait": "waiting for its turn",
        "infer": "in the engine",
        "deliver": "suppressing, handing on",
    }
    values = {words.get(name, name): (value, 0) for name, value in stages.items()}
    sizes = ", ".join(map(str, plan["buckets"]))
    return ReportSection(
        "Where the time goes",
        f"Medians of the pipeline's frames. The plan: lanes {plan['lanes']}, batch sizes {sizes}.",
        (plot_bars("Milliseconds by stage", "ms", values),),
    )
