"""The report of a benchmark as a file: its JSON document, and one HTML page for every kind of report.

The page shows the text of the report, a plot, and each part of the document as a table. It has no script,
loads nothing, and is light or dark as the reader's system is. At its end stands the whole document.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from visionedge.errors import ConfigError, SourceError

Report = Mapping[str, Any]

Points = Sequence[tuple[float, float]]
"""The points (x, y) of a line."""

# The headings of parts whose key alone does not say enough.
_HEADINGS = {
    "load": "What was run",
    "table": "Speed by lanes and batch",
    "bare": "The bare runtime, without the engine",
    "choice": "The plan and the best pair",
    "onePicture": "One picture on one thread",
    "candidates": "Engines, bare and in turns",
    "baseline": "Plain loop",
    "ratio": "Pipeline to plain loop",
    "ceiling": "Ceiling: cores / (decoding + the bare runtime), without a pipeline",
    "baselineAgreement": "Boxes that the plain loop finds too",
    "scene": "Pipeline with tracker, zones and lines",
    "sceneRatio": "With the scene to without",
    "camera": "A camera's scene: tracker, zones and lines, masks",
    "loop": "In the loop of the module: the same, with the changes for the disk",
    "coreShare": "Share of a core",
    "events": "Scene events, from the capture of their frame to the client",
    "http": "Responses; latency counts from when a request was due",
}
_WITHOUT_TABLE = ("schema", "machine")


def render_page(report: Report, text: str) -> str:
    """The report as a self-contained HTML document; `text` is the report as on stdout, cautions included."""
    kind = str(report["schema"]).removeprefix("visionedge/bench-").partition("/")[0]
    title = f"visionedge bench {kind}"
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    parts = {key: value for key, value in report.items() if key not in _WITHOUT_TABLE}
    single = {key: value for key, value in parts.items() if not isinstance(value, Mapping | list)}
    tables = [(_HEADINGS.get(key, _title(key)), value) for key, value in parts.items() if key not in single]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{title}</h1>\n<pre class="text">{escape(text)}</pre>\n'
        f"{plot_lines(*_plot_of(report, kind))}\n"
        + "".join(_section(heading, value, report) for heading, value in [*tables, ("Also", single)])
        + f"{_footer(report)}\n</main>\n</body>\n</html>\n"
    )


def _section(heading: str, value: Any, report: Report) -> str:
    """A list of objects with a row for each, or an object with a row for each of its figures."""
    if not value:
        return ""
    if isinstance(value, Mapping):
        body = _table(["figure", "value"], list(_flat(value).items()))
    else:
        rows = [_flat(row) for row in value]
        heads = list(dict.fromkeys(name for row in rows for name in row))
        body = _table(
            heads,
            [[row.get(name) for name in heads] for row in rows],
            [_is_planned(r, report) for r in value],
        )
    return f"<section><h2>{escape(heading)}</h2>{body}</section>\n"


def _is_planned(row: Report, report: Report) -> bool:
    """Whether a row of `bench engine` has the lanes and the batch of the plan."""
    return all(row.get(key) == report.get("choice", {}).get(key, "") for key in ("lanes", "batch"))


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


def _footer(report: Report) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_format_value(fact))}</dd>"
        for name, fact in _flat(report["machine"]).items()
    )
    document = escape(json.dumps(report, indent=2))
    return (
        f"<footer><dl>{rows}</dl>"
        f"<details><summary>The report as JSON</summary><pre>{document}</pre></details></footer>"
    )


# --- the plot -----------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 490, 24, 190
"""The edges of the plot's area; the names of the lines are to the right of it."""

_COLOURS = 6


def _plot_of(report: Report, kind: str) -> tuple[str, Mapping[str, Points]]:
    """The name of the x axis, and the lines by name: frames/s by batch and lanes, or by round."""
    if kind == "engine":
        lines: dict[str, list[tuple[float, float]]] = {}
        for key, name in (("table", "lanes: {}"), ("bare", "bare, {}")):
            for row in report[key]:
                points = lines.setdefault(name.format(row["lanes"]), [])
                points.append((row["batch"], row["framesPerSecond"]))
        return "pictures in a batch", lines
    if kind == "http":
        names = {"no clients": "withoutClients", "clients": "withClients"}
        given = {name: report["pipeline"][key] for name, key in names.items()}
    elif kind == "scene":
        given = {"in the loop": report["loop"]["framesPerSecondAll"]}
    else:
        names = {
            "pipeline": "pipeline",
            "with the scene": "scene",
            "plain loop": "baseline",
            "module": "module",
        }
        given = {name: report[key]["framesPerSecondAll"] for name, key in names.items() if key in report}
    return "round", {name: list(enumerate(values, 1)) for name, values in given.items()}


def plot_lines(x_name: str, series: Mapping[str, Points]) -> str:
    """Frames/s as lines by their names, over x values at equal distances, as an SVG."""
    xs = sorted({x for points in series.values() for x, _ in points})
    highest = max((y for points in series.values() for _, y in points), default=0) or 1
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * factor for factor in (0.2, 0.5, 1, 2) if highest <= 5 * power * factor)
    steps = math.ceil(highest / step)

    def x_px(x: float) -> float:
        return _LEFT + (xs.index(x) + 0.5) * (_RIGHT - _LEFT) / len(xs)

    def y_px(y: float) -> float:
        return _BOTTOM - y / (steps * step) * (_BOTTOM - _TOP)

    parts = [f'<text x="{_LEFT}" y="{_TOP - 8}">frames/s</text>']
    for value in (number * step for number in range(steps + 1)):
        parts += [f'<path class="grid" d="M{_LEFT} {y_px(value):.1f}H{_RIGHT}"/>']
        parts += [f'<text class="end" x="{_LEFT - 6}" y="{y_px(value) + 4:.1f}">{value:g}</text>']
    parts += [f'<text class="middle" x="{x_px(x):.1f}" y="{_BOTTOM + 16}">{x:g}</text>' for x in xs]
    parts += [f'<text class="middle" x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 34}">{escape(x_name)}</text>']
    for number, (name, points) in enumerate(series.items()):
        colour, name_px = f"var(--series-{number % _COLOURS})", _TOP + 18 * number
        places = [f"{x_px(x):.1f} {y_px(y):.1f}" for x, y in points]
        parts += [f'<path class="line" style="stroke:{colour}" d="M{"L".join(places)}"/>']
        parts += [f'<path class="point" style="stroke:{colour}" d="M{place}h0"/>' for place in places]
        parts += [f'<path class="point" style="stroke:{colour}" d="M{_RIGHT + 14} {name_px - 4}h0"/>']
        parts += [f'<text class="name" x="{_RIGHT + 24}" y="{name_px}">{escape(name)}</text>']
    size = f"0 0 {_WIDTH} {max(_HEIGHT, _TOP + 18 * len(series))}"
    return (
        f'<svg role="img" aria-label="frames/s by {escape(x_name)}" viewBox="{size}">{"".join(parts)}</svg>'
    )


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


def write_text(text: str, path: str) -> None:
    """Write a text to a file, or to stdout for ``-``.

    Raises:
        SourceError: the file cannot be written.
    """
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
