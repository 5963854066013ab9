"""The page of `bench engine`."""

from collections.abc import Mapping
from typing import Any

from visionedge.engine.plan import LatencyFit, OperatingPoint
from visionedge.ops.bench.engine import caution
from visionedge.ops.bench.pages import ReportPage, ReportSection, ReportTile, render_page, render_table
from visionedge.ops.bench.plots import LimitMark, LineSeries, plot_bars, plot_lines
from visionedge.ops.bench.system_load import describe_other_load

BenchReport = Mapping[str, Any]

_ONE_PICTURE_TITLES = {"original": "Network alone", "compiled": "Compiled graph", "plain": "Network + numpy"}


def engine_page(report: BenchReport) -> str:
    """The report of `bench_engine` as an HTML document."""
    return render_page(
        ReportPage(
            kind="engine",
            title=f"{report['model']['name']} on {report['machine']['cpu']}",
            lead=_lead(report),
            tiles=tuple(_tiles(report)),
            sections=(
                _speeds(report),
                _durations(report),
                *_limit(report),
                *_one_picture(report),
                *_precisions(report),
                _plan(report),
            ),
            machine=report["machine"],
            caution=f"{caution(report)} {describe_other_load(report)}".strip(),
            load=f"{report['load']['rounds']} rounds, {report['load']['seconds']:g} s each time, in turns",
        )
    )


def _chosen(report: BenchReport) -> Mapping[str, Any]:
    choice = report["choice"]
    found: Mapping[str, Any] = next(row for row in report["table"] if _pair(row) == _pair(choice))
    return found


def _pair(row: Mapping[str, Any]) -> OperatingPoint:
    return OperatingPoint(row["lanes"], row["batch"])


def _lead(report: BenchReport) -> str:
    row = _chosen(report)
    model = report["model"]
    return (
        f"The plan runs {_pair(row)} and computes {row['framesPerSecond']:.1f} pictures of"
        f" {model['width']} x {model['height']} a second. {_device(report['device'])}"
    )


def _device(sentence: str) -> str:
    return f"Device: {sentence}."


def _tiles(report: BenchReport) -> list[ReportTile]:
    row, one = _chosen(report), report["onePicture"]
    tiles = [
        ReportTile("the plan", f"{row['framesPerSecond']:.1f} /s", str(_pair(row))),
        ReportTile(
            "plan to best pair", f"{report['choice']['shareOfBest']:.3f}", f"best: {_pair(report['best'])}"
        ),
    ]
    bare = next((each for each in report["bare"] if _pair(each) == _pair(row)), None)
    if bare is not None:
        tiles.append(
            ReportTile("engine to session.run", f"{bare['engineToBare']:.3f}", "from as many threads")
        )
    if "compiledToOriginal" in one:
        tiles.append(
            ReportTile("compiled to original", f"{one['compiledToOriginal']:.3f}", "time for one picture")
        )
    return tiles


def _speeds(report: BenchReport) -> ReportSection:
    chosen = _chosen(report)
    series = [
        LineSeries(
            _lanes(lanes),
            [(row["batch"], row["framesPerSecond"]) for row in rows],
            number,
            highlight=(chosen["batch"], chosen["framesPerSecond"]) if lanes == chosen["lanes"] else None,
        )
        for number, (lanes, rows) in enumerate(_by_lanes(report).items())
    ]
    colors = {lanes: number for number, lanes in enumerate(_by_lanes(report))}
    limits = [
        LimitMark("bare session.run", row["batch"], row["framesPerSecond"], colors[row["lanes"]])
        for row in report["bare"]
    ]
    labels = ("pictures in a batch", "frames/s")
    plot = plot_lines("Frames per second by batch size", labels, series, limits=limits)
    rows = report["table"]
    cells = [
        (
            str(row["lanes"]),
            str(row["batch"]),
            f"{row['framesPerSecond']:.1f}",
            f"{min(row['framesPerSecondAll']):.1f} to {max(row['framesPerSecondAll']):.1f}",
            f"{row['batchMs']:.2f}",
            f"{row['cpuMs']:.2f}",
        )
        for row in rows
    ]
    heads = ("lanes", "batch", "frames/s", "over the rounds", "ms a batch", "CPU ms a picture")
    marked = [number for number, row in enumerate(rows) if row is chosen]
    return ReportSection(
        "Speed by lanes and batch",
        "A lane is a thread that computes one batch after the other. The ring marks the plan, the dashes are"
        " what session.run gives by itself from as many threads. Medians over the rounds.",
        (plot, render_table(heads, cells, marked=marked)),
    )


def _durations(report: BenchReport) -> ReportSection:
    fits = {
        fit["lanes"]: LatencyFit(fit["lanes"], fit["msPerPicture"], fit["msFixed"]) for fit in report["fits"]
    }
    series: list[LineSeries] = []
    for number, (lanes, rows) in enumerate(_by_lanes(report).items()):
        series.append(LineSeries(_lanes(lanes), [(row["batch"], row["batchMs"]) for row in rows], number))
        if lanes in fits:
            fitted = [(row["batch"], fits[lanes].batch_ms(row["batch"])) for row in rows]
            series.append(LineSeries("", fitted, number, fitted=True))
    words = "; ".join(
        f"{_lanes(lanes)} {fit.ms_per_picture:.2f} ms a picture + {fit.ms_fixed:.2f} ms"
        for lanes, fit in fits.items()
    )
    return ReportSection(
        "How long a batch takes",
        f"Fitted (dashed) as a time for each picture and one for each batch: {words}."
        if words
        else "Only one batch size could be run, so there is nothing to fit.",
        (plot_lines("Duration of a batch by its size", ("pictures in a batch", "ms"), series, even=False),),
    )


def _limit(report: BenchReport) -> list[ReportSection]:
    if not report["bare"]:
        return []
    cells = [
        (
            str(_pair(row)),
            f"{next(r['framesPerSecond'] for r in report['table'] if _pair(r) == _pair(row)):.1f}",
            f"{row['framesPerSecond']:.1f}",
            f"{row['engineToBare']:.3f}",
            f"{row['engineToBareByCpu']:.3f}",
        )
        for row in report["bare"]
    ]
    text = (
        "The same compiled graph through onnxruntime's own session.run, with nothing around it, is as fast as"
        " an engine can be. The ratio is the median of the rounds' ratios."
    )
    heads = ("", "engine, /s", "session.run, /s", "engine / bare", "by processor time")
    return [ReportSection("The limit", text, (render_table(heads, cells, words={0}),))]


def _one_picture(report: BenchReport) -> list[ReportSection]:
    one = report["onePicture"]
    if "compiledToPlain" not in one:
        return []
    values = {
        words: (one[f"{kind}Ms"], 0 if kind == "compiled" else None)
        for kind, words in _ONE_PICTURE_TITLES.items()
    }
    return [
        ReportSection(
            "What compiling costs and saves",
            "One picture, one thread. The network alone takes floats and gives raw maps; the compiled graph"
            f" takes bytes and gives finished rows, in {one['compiledToOriginal']:.3f} of its time."
            f" Getting the same rows with numpy takes {1 / one['compiledToPlain']:.2f} times as long.",
            (plot_bars("Milliseconds for one picture", "ms", values), _one_picture_table(one)),
        )
    ]


def _one_picture_table(one: Mapping[str, Any]) -> str:
    cells = [
        (words, f"{one[f'compiledTo{kind}']:.3f}", f"{one[f'compiledTo{kind}ByCpu']:.3f}")
        for kind, words in (("Original", "to the network alone"), ("Plain", "to the network + numpy"))
    ]
    return render_table(
        ("compiled graph, ratio of times", "as it was", "by processor time"), cells, words={0}
    )


def _precisions(report: BenchReport) -> list[ReportSection]:
    rows = report["precisions"]
    if not rows:
        return []
    cells = [
        (
            row["precision"],
            f"{row['ms']:.2f}",
            f"{row['fp32Ms']:.2f}",
            f"{row['timesAsFast']:.2f}",
            f"{row['timesAsFastByCpu']:.2f}",
        )
        for row in rows
    ]
    heads = ("", "ms a batch", "ms in fp32", "times as fast", "by processor time")
    text = (
        "Variants of the model whose reports let them be used here, on one thread, in turns with fp32. The"
        " module takes one by itself (inference.precision: auto) where it is 1.1 times as fast or more and"
        " sees the same."
    )
    return [ReportSection("Other precisions", text, (render_table(heads, cells, words={0}),))]


def _plan(report: BenchReport) -> ReportSection:
    plan = report["plan"]
    cells = [
        (
            str(_pair(row)),
            "" if row["framesPerSecond"] is None else f"{row['framesPerSecond']:.1f}",
            "" if row["batchMs"] is None else f"{row['batchMs']:.2f}",
            str(row["rounds"]),
            row["note"],
        )
        for row in plan["table"]
    ]
    marked = [n for n, row in enumerate(plan["table"]) if _pair(row) == _pair(plan["choice"])]
    body = render_table(
        ("", "frames/s", "ms a batch", "rounds", "left out because"), cells, marked=marked, words={0, 4}
    )
    return ReportSection(
        "What the plan saw",
        f"At start-up the module looks for itself, in seconds: {plan['reason']}.",
        (body,),
    )


def _by_lanes(report: BenchReport) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in report["table"]:
        found.setdefault(row["lanes"], []).append(row)
    return found


def _lanes(lanes: int) -> str:
    return "1 lane" if lanes == 1 else f"{lanes} lanes"
