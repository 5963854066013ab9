"""The page of `bench http`."""

from collections.abc import Mapping
from typing import Any

from visionedge.ops.bench.http import caution
from visionedge.ops.bench.pages import ReportPage, ReportSection, ReportTile, render_page
from visionedge.ops.bench.plots import LineSeries, plot_lines
from visionedge.ops.bench.system_load import describe_other_load

BenchReport = Mapping[str, Any]


def http_page(report: BenchReport) -> str:
    """The report of `bench_http` as an HTML document."""
    load, http, pipeline = report["load"], report["http"], report["pipeline"]
    latency = http["latencyMs"]
    kept = "?" if pipeline["kept"] is None else f"{pipeline['kept']:.1%}"
    return render_page(
        ReportPage(
            kind="http",
            title=f"{load['rate']:g} requests a second from {load['clients']} clients",
            lead=f"99 % of the answers came within {latency['p99']:.1f} ms of their moment, and the pipeline"
            f" kept {kept} of its frames.",
            tiles=(
                ReportTile("answers/s", f"{http['responsesPerSecond']:.0f}", "median of the rounds"),
                ReportTile("latency", f"{latency['p50']:.1f} ms", f"99 % within {latency['p99']:.1f} ms"),
                ReportTile("pipeline", kept, "frames/s with clients to those beside clients that ask nobody"),
            ),
            sections=(_pipeline(pipeline), _latency(http)),
            machine=report["machine"],
            caution=f"{caution(report)} {describe_other_load(report)}".strip(),
            load=f"{load['rounds']} rounds of {load['seconds']:g} s each way, {load['cameras']} cameras",
        )
    )


def _pipeline(pipeline: BenchReport) -> ReportSection:
    series = [
        LineSeries("without clients", list(enumerate(pipeline["withoutClients"], 1)), 0),
        LineSeries("beside clients that ask nobody", list(enumerate(pipeline["withLoopbackClients"], 1)), 2),
        LineSeries("with clients", list(enumerate(pipeline["withClients"], 1)), 1),
    ]
    return ReportSection(
        "What the clients cost the pipeline",
        "Three kinds of stretches take turns. The clients run on the same machine and take their part of it:"
        " those that do as much and ask nobody show how large that is.",
        (plot_lines("Frames per second in each round", ("round", "frames/s"), series),),
    )


def _latency(http: BenchReport) -> ReportSection:
    series = [
        LineSeries(name, [(number, each[name]) for number, each in enumerate(http["rounds"], 1)], color)
        for color, name in enumerate(("p50", "p95", "p99"))
    ]
    return ReportSection(
        "Latency of the answers",
        "From the moment that a request was due, waiting for a connection included.",
        (plot_lines("Latency in each round", ("round", "ms"), series),),
    )
