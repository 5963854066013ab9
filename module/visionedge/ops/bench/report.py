"""The report of a benchmark as a file: its JSON document, and one HTML page for every kind of report.

The page is made from the document alone: `_LAYOUTS` names, for each kind, the title, the large figures, the
plot, and the parts of the document that become tables. The page has no script, loads nothing, and is light or
dark as the reader's system is. At its end stands the whole document.
"""

import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from visionedge.errors import ConfigError, SourceError, UnavailableError
from visionedge.runtime.installation import build_install_command

Report = Mapping[str, Any]

Points = Sequence[tuple[float, float]]
"""The points (x, y) of a line."""

Tile = tuple[str, str, str]
"""A large figure: its label, the figure, and a note; all are format strings over the report."""


@dataclass(frozen=True, slots=True)
class _Table:
    """A part of the report as a table; `plot` puts the plot above it.

    `path` leads to a list of objects, one row each. `columns` are paths to objects, one column each.
    """

    heading: str
    path: str = ""
    text: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    plot: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the page of one kind of report shows. `title`, `lead` and `load` are format strings as well."""

    title: str
    lead: str
    load: str
    tiles: Sequence[Tile]
    tables: Sequence[_Table]
    axes: tuple[str, str]


_LAYOUTS: Mapping[str, _Layout] = {
    "engine": _Layout(
        title="{model[name]} on {machine[cpu]}",
        lead="Device: {device}. Plan: {plan[reason]}.",
        load="{load[rounds]} rounds of {load[seconds]:g} s each, interleaved",
        tiles=(
            ("plan", "{planned[framesPerSecond]:.1f} /s", "{choice[lanes]} lane(s) x batch {choice[batch]}"),
            (
                "plan to best pair",
                "{choice[shareOfBest]:.3f}",
                "best: {best[lanes]} lane(s) x batch {best[batch]}",
            ),
            ("engine to session.run", "{planned[engineToBare]:.3f}", "frames/s, same number of threads"),
            ("compiled to original", "{onePicture[compiledToOriginal]:.3f}", "time for one picture"),
        ),
        tables=(
            _Table(
                "Speed by lanes and batch",
                "table",
                "A lane is a thread that computes one batch after the other. Medians over the rounds.",
                plot=True,
            ),
            _Table(
                "Limit: bare session.run",
                "bare",
                "The same compiled graph in onnxruntime's session.run, without the engine.",
            ),
            _Table(
                "One picture on one thread",
                text="The original network takes floats and returns raw maps. The compiled graph takes bytes"
                " and returns the final rows. Plain: the original network with numpy to the same rows.",
                columns={"one picture": "onePicture"},
            ),
            _Table(
                "Other precisions",
                "precisions",
                "Variants of the model that may be used on this device; one thread, interleaved with fp32.",
            ),
            _Table("Duration of a batch, fitted per number of lanes", "fits"),
            _Table("Measurements of the plan", "plan.table", "The module measures these at its first start."),
        ),
        axes=("pictures in a batch", "frames/s"),
    ),
    "pipeline": _Layout(
        title="{load[cameras]} camera(s) through {model}",
        lead="Device: {device}. Lanes {plan[lanes]}, batch sizes {plan[buckets]}, {precision}.",
        load="{load[rounds]} rounds of {load[seconds]:g} s, {load[source]}",
        tiles=(
            ("frames/s", "{pipeline[framesPerSecond]:.1f}", "median of the rounds"),
            ("latency", "{pipeline[latencyMs][p50]:.0f} ms", "95 % within {pipeline[latencyMs][p95]:.0f} ms"),
            ("CPU per frame", "{pipeline[cpuMsPerFrame]:.1f} ms", "decoding included"),
            ("to the plain loop", "{ratio[framesPerSecond]:.2f} x", "frames/s in the same rounds"),
            (
                "to the ceiling",
                "{ceiling[alone][speedToCeiling]:.2f}",
                "{ceiling[alone][framesPerSecond]:.0f} frames/s: bare decoding and session.run",
            ),
        ),
        tables=(
            _Table(
                "Medians of the rounds",
                text="Latency counts from capture to result.",
                columns={"pipeline": "pipeline", "plain loop": "baseline"},
                plot=True,
            ),
            _Table(
                "Pipeline to plain loop",
                text="Medians of the rounds' ratios. The latency of the plain loop counts from its read.",
                columns={"ratio": "ratio"},
            ),
            _Table(
                "Ceiling",
                text="Cores / (decoding + session.run), both measured without a pipeline.",
                columns={"one thread": "ceiling.alone", "one thread per lane": "ceiling.atOnce"},
            ),
            _Table("Boxes that the plain loop finds too", columns={"agreement": "baselineAgreement"}),
        ),
        axes=("round", "frames/s"),
    ),
    "http": _Layout(
        title="{load[rate]:g} requests per second from {load[clients]} clients",
        lead="99 % of the responses came within {http[latencyMs][p99]:.1f} ms after the request was due.",
        load="{load[rounds]} rounds of {load[seconds]:g} s of each kind, {load[cameras]} camera(s)",
        tiles=(
            ("responses/s", "{http[responsesPerSecond]:.0f}", "median of the rounds"),
            ("latency", "{http[latencyMs][p50]:.1f} ms", "99 % within {http[latencyMs][p99]:.1f} ms"),
            ("pipeline kept", "{pipeline[kept]:.1%}", "frames/s, compared to loopback clients"),
        ),
        tables=(
            _Table(
                "Pipeline",
                text="The clients use processor time of the same machine. Loopback clients do the same work"
                " without the module.",
                columns={"pipeline": "pipeline"},
                plot=True,
            ),
            _Table(
                "Responses", text="Latency counts from when a request was due.", columns={"responses": "http"}
            ),
        ),
        axes=("round", "frames/s"),
    ),
}


def render_page(report: Report, cautions: Iterable[str] = ()) -> str:
    """The report as a self-contained HTML document. `cautions` say why its figures may be wrong."""
    kind = str(report["schema"]).removeprefix("visionedge/bench-").partition("/")[0]
    layout = _LAYOUTS[kind]
    filled = {**report, "planned": _planned(report)}
    title = escape(_fill(layout.title, filled) or kind)
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} · visionedge bench {kind}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kind">visionedge bench {kind}</p>\n<h1>{title}</h1>\n'
        f'<p class="lead">{escape(_fill(layout.lead, filled) or "")}</p>\n'
        + "".join(f'<p class="caution">{escape(caution)}</p>\n' for caution in cautions if caution)
        + f'</header>\n<div class="tiles">{"".join(_tile(tile, filled) for tile in layout.tiles)}</div>\n'
        + "".join(_section(table, report, layout, kind) for table in layout.tables)
        + f"{_footer(report, _fill(layout.load, report) or '')}\n</main>\n</body>\n</html>\n"
    )


def _fill(text: str, report: Report) -> str | None:
    """A format string filled from the report; None if the report has no such figure."""
    try:
        return text.format_map(report)
    except (KeyError, IndexError, TypeError):
        return None


def _tile(tile: Tile, report: Report) -> str:
    label, figure, note = (_fill(text, report) for text in tile)
    if figure is None:
        return ""
    return (
        f'<div class="tile"><p>{escape(label or "")}</p><p class="figure">{escape(figure)}</p>'
        f'<p class="meaning">{escape(note or "")}</p></div>'
    )


def _planned(report: Report) -> dict[str, Any]:
    """The rows of `bench engine` for the plan's lanes and batch, as one object."""
    rows = [*report.get("table", ()), *report.get("bare", ())][::-1]
    return {key: each for row in rows if _is_planned(row, report) for key, each in row.items()}


def _is_planned(row: Report, report: Report) -> bool:
    return all(row.get(key) == report.get("choice", {}).get(key, "") for key in ("lanes", "batch"))


def _section(table: _Table, report: Report, layout: _Layout, kind: str) -> str:
    if table.columns:
        columns = {name: each for name, path in table.columns.items() if (each := _part(report, path))}
        body = render_columns(columns) if columns else ""
    else:
        rows = _part(report, table.path) or ()
        body = render_rows(rows, [_is_planned(row, report) for row in rows]) if rows else ""
    if not body:
        return ""
    text = f"<p>{escape(table.text)}</p>" if table.text else ""
    plot = plot_lines(table.heading, layout.axes, _series(report, kind)) if table.plot else ""
    return f"<section><h2>{escape(table.heading)}</h2>{text}{plot}{body}</section>\n"


def _part(report: Report, path: str) -> Any:
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _series(report: Report, kind: str) -> dict[str, Points]:
    """The lines of the plot by name: frames/s by batch for each number of lanes, or by round."""
    if kind == "engine":
        lines: dict[str, Points] = {}
        for row in report["table"]:
            name = f"lanes: {row['lanes']}"
            lines[name] = [*lines.get(name, ()), (row["batch"], row["framesPerSecond"])]
        for row in report["bare"]:
            lines[f"session.run, {row['lanes']}"] = [(row["batch"], row["framesPerSecond"])]
        return lines
    if kind == "http":
        given = {
            "no clients": report["pipeline"]["withoutClients"],
            "loopback clients": report["pipeline"]["withLoopbackClients"],
            "clients": report["pipeline"]["withClients"],
        }
    else:
        sides = {"pipeline": "pipeline", "plain loop": "baseline"}
        given = {name: report[key]["framesPerSecondAll"] for name, key in sides.items() if key in report}
    return {name: list(enumerate(values, 1)) for name, values in given.items()}


# --- tables -------------------------------------------------------------------------------------------------


def render_rows(rows: Sequence[Report], marked: Sequence[bool]) -> str:
    """A list of objects as one row each; rows of `marked` stand out."""
    flat = [_flat(row) for row in rows]
    heads = list(dict.fromkeys(name for each in flat for name in each))
    return _table(heads, [[each.get(name) for name in heads] for each in flat], marked)


def render_columns(columns: Mapping[str, Report]) -> str:
    """Objects by their titles as one column each, with a row for each of their figures."""
    flat = [_flat(each) for each in columns.values()]
    names = list(dict.fromkeys(name for each in flat for name in each))
    return _table(["figure", *columns], [[name, *(each.get(name) for each in flat)] for name in names])


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], marked: Sequence[bool] = ()) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    kinds = ['<tr class="marked">' if mark else "<tr>" for mark in marked] or ["<tr>"] * len(rows)
    body = "".join(f"{kind}{''.join(map(_cell, row))}</tr>" for kind, row in zip(kinds, rows, strict=True))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The figures of an object and of nested objects, by a readable name; without lists of objects."""
    found: dict[str, Any] = {}
    for key, each in value.items():
        name = f"{prefix}{_title(key)}"
        if isinstance(each, Mapping) and each:
            found |= _flat(each, f"{name}, ")
        elif not (isinstance(each, list) and each and isinstance(each[0], Mapping)):
            found[name] = each
    return found


def _title(key: str) -> str:
    """``cpuMsPerFrame`` as ``CPU ms per frame``."""
    words = re.findall(r"MiB|[A-Z]?[^A-Z]+|[A-Z]+", key)
    units = {"Cpu": "CPU", "cpu": "CPU", "MiB": "MiB", "All": "of all rounds"}
    return " ".join(units.get(word, word.lower()) for word in words)


def _cell(value: Any) -> str:
    kind = ' class="word"' if isinstance(value, str) else ""
    return f"<td{kind}>{escape(_format_value(value))}</td>"


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 20 else f"{value:.3f}"
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    return "" if value is None or value == {} else str(value)


def _footer(report: Report, load: str) -> str:
    machine = report["machine"]
    when = machine["measuredAt"].replace("T", " ").partition(".")[0].removesuffix("Z")
    cores = f"{machine['usableCores']} of {machine['cores']} cores usable"
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    facts = {
        "Measured": f"{when} UTC; {load}",
        "Machine": f"{machine['cpu']}, {cores}, load average {machine['loadAverage']:g} at the end",
        "Software": f"visionedge {machine['visionedge']}, Python {machine['python']}, {packages}",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    document = escape(json.dumps(report, indent=2))
    return (
        f"<footer><dl>{rows}</dl>"
        f"<details><summary>The report as JSON</summary><pre>{document}</pre></details></footer>"
    )


# --- the plot -----------------------------------------------------------------------------------------------
#
# matplotlib has fixed colours only, so the plot is drawn in placeholder colours, which are then replaced by
# variables of the page's style: one drawing suits light and dark.

_NAMES = ("ink", "faint", "line", *(f"series-{number}" for number in range(6)))
_PLACEHOLDERS = {name: f"#01{number:02x}f1" for number, name in enumerate(_NAMES)}
_SERIES = tuple(_PLACEHOLDERS[f"series-{number}"] for number in range(6))
_SIZE_IN = (8.4, 3.1)
_STYLE = {
    "svg.fonttype": "none",  # text stays text, so that the page's font applies
    "svg.hashsalt": "visionedge",
    "font.size": 10.5,
    "axes.edgecolor": _PLACEHOLDERS["line"],
    "axes.labelcolor": _PLACEHOLDERS["faint"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": _PLACEHOLDERS["line"],
    "xtick.color": _PLACEHOLDERS["line"],
    "ytick.color": _PLACEHOLDERS["line"],
    "xtick.labelcolor": _PLACEHOLDERS["faint"],
    "ytick.labelcolor": _PLACEHOLDERS["faint"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _PLACEHOLDERS["ink"],
}


def import_matplotlib() -> Any:
    """matplotlib, imported only for a page.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UnavailableError(
            f"a page with plots needs matplotlib: {build_install_command('report')}; or leave --html out"
        ) from None
    return mpl


def plot_lines(caption: str, labels: tuple[str, str], series: Mapping[str, Points]) -> str:
    """Lines by their names, over x values at equal distances; `labels` are those of x and y."""
    mpl = import_matplotlib()
    with mpl.rc_context(_STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        ticks = sorted({x for points in series.values() for x, _ in points})
        for number, (name, points) in enumerate(series.items()):
            xs, ys = [ticks.index(x) for x, _ in points], [y for _, y in points]
            marker, size = ("o", 5) if len(points) > 1 else ("_", 18)
            color = _SERIES[number % len(_SERIES)]
            axes.plot(xs, ys, color=color, linewidth=2, marker=marker, markersize=size, label=name)
        axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.set_ylim(0, 1.08 * max(y for points in series.values() for _, y in points) or 1)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return f'<figure role="img" aria-label="{escape(caption)}">{_use_page_style(buffer.getvalue())}</figure>'


def _use_page_style(text: str) -> str:
    """The SVG element with the page's variables as colours, and without fonts and metadata of its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name, color in _PLACEHOLDERS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"font-family: [^;\"]*;? ?", "", svg)


# --- files --------------------------------------------------------------------------------------------------


def read_report(path: Path) -> dict[str, Any]:
    """A report that was written by `write_json`.

    Raises:
        ConfigError: the file cannot be read, or holds no report.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    except ValueError:
        document = None
    if not isinstance(document, dict) or not str(document.get("schema", "")).startswith("visionedge/bench-"):
        raise ConfigError([f"{path} is not a report of visionedge bench; write one with --json"])
    return document


def write_json(report: Report, path: Path) -> None:
    """Write a report to a file, or to stdout for ``-``.

    Raises:
        SourceError: the file cannot be written.
    """
    write_text(json.dumps(report, indent=2) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text to a file, or to stdout for ``-``.

    Raises:
        SourceError: the file cannot be written.
    """
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
