"""Plots for a report's page: SVG drawn by matplotlib, in the page's own colours and letters.

matplotlib knows fixed colours only, so it draws in stand-ins, each of which is then replaced by a variable of
the page's style: one drawing suits light and dark.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from visionedge.errors import UnavailableError
from visionedge.runtime.installation import build_install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = ("ink", "faint", "line", "card", "muted", *(f"series-{number}" for number in range(6)))
_PLACEHOLDER_COLORS = {name: f"#01{number:02x}f1" for number, name in enumerate(_NAMES)}
_SERIES = tuple(_PLACEHOLDER_COLORS[f"series-{number}"] for number in range(6))
_INK, _FAINT, _LINE, _CARD, _MUTED = (_PLACEHOLDER_COLORS[name] for name in _NAMES[:5])
_WIDTH_IN = 8.4


@dataclass(frozen=True, slots=True)
class LineSeries:
    """A series of points (x, y); `fitted` is drawn thin, without points. `ring` marks one of the points."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    fitted: bool = False
    highlight: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class LimitMark:
    """A short dash at (x, y): as far as it can go."""

    label: str
    x: float
    y: float
    color: int


def import_matplotlib() -> Any:
    """matplotlib, imported only here.

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


def plot_lines(
    caption: str,
    labels: tuple[str, str],
    series: Sequence[LineSeries],
    *,
    limits: Sequence[LimitMark] = (),
    even: bool = True,
) -> str:
    """Lines over a few steps; `labels` are those of x and y. `even` puts the steps at even distances."""

    def draw(axes: "Axes") -> None:
        ticks = sorted({x for line in series for x, _ in line.points})
        place = {x: float(index) if even else x for index, x in enumerate(ticks)}
        for line in series:
            _draw_line(axes, line, place)
        for limit in limits:
            x, color = place[limit.x], _color(limit.color)
            axes.hlines(limit.y, x - 0.14, x + 0.14, color=color, linewidth=2.2)
        for label in dict.fromkeys(limit.label for limit in limits):
            axes.plot([], [], color=_FAINT, linewidth=2.2, label=label)
        axes.set_xticks(list(place.values()), [f"{tick:g}" for tick in ticks])
        margin = 0.4 if even else 0.05 * (ticks[-1] - ticks[0]) or 0.4
        axes.set_xlim(min(place.values()) - margin, max(place.values()) + margin)
        tops = [y for line in series for _, y in line.points] + [limit.y for limit in limits]
        axes.set_ylim(0, 1.08 * max(tops))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)

    return _render_figure(caption, draw, height_in=3.1)


def _draw_line(axes: "Axes", line: LineSeries, place: Mapping[float, float]) -> None:
    xs, ys = [place[x] for x, _ in line.points], [y for _, y in line.points]
    color = _color(line.color)
    if line.fitted:
        axes.plot(xs, ys, color=color, linewidth=1, linestyle=(0, (4, 3)))
        return
    axes.plot(xs, ys, color=color, linewidth=2, marker="o", markersize=5, label=line.label)
    if line.highlight is not None:
        x, y = line.highlight
        axes.plot(
            [place[x]], [y], "o", color=_INK, markersize=13, markerfacecolor="none", markeredgewidth=1.4
        )


def plot_bars(caption: str, x_label: str, values: Mapping[str, tuple[float, int | None]]) -> str:
    """Horizontal bars, one for each name: (value, number of its colour; None is a muted one)."""

    def draw(axes: "Axes") -> None:
        names = list(values)[::-1]
        widths = [values[name][0] for name in names]
        colors = [_color(values[name][1]) for name in names]
        drawn = axes.barh(names, widths, color=colors, height=0.62)
        axes.bar_label(drawn, [f"{width:.1f}" for width in widths], padding=5, color=_INK, fontsize=10)
        axes.set_xlim(0, max(widths) * 1.14 or 1)
        axes.set_xlabel(x_label)
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.grid(axis="x")

    return _render_figure(caption, draw, height_in=0.75 + 0.42 * len(values))


def plot_grouped_bars(
    caption: str, y_label: str, names: Sequence[str], series: Mapping[str, tuple[Sequence[float], int]]
) -> str:
    """Bars side by side: for each of `names` one bar of each series, (values, number of its colour)."""

    def draw(axes: "Axes") -> None:
        width = 0.72 / len(series)
        for number, (label, (values, color)) in enumerate(series.items()):
            places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(names))]
            drawn = axes.bar(places, values, width * 0.94, color=_color(color), label=label)
            axes.bar_label(drawn, [f"{value:.1f}" for value in values], padding=3, color=_FAINT, fontsize=9)
        axes.set_xticks(range(len(names)), names)
        axes.margins(y=0.14)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)

    return _render_figure(caption, draw, height_in=2.9)


def _color(number: int | None) -> str:
    return _MUTED if number is None else _SERIES[number % len(_SERIES)]


def _render_figure(caption: str, draw: Callable[["Axes"], None], *, height_in: float) -> str:
    """A drawing as a figure of the page."""
    mpl = import_matplotlib()
    with mpl.rc_context(_style()):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name, color in _PLACEHOLDER_COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    # The page's own letters, whatever matplotlib reckoned with.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # Ids are the page's, and every drawing numbers its own from one.
    prefix = hashlib.sha256(caption.encode()).hexdigest()[:8]
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>p{prefix}-", svg)
    return f'<figure role="img" aria-label="{escape(caption)}">{svg}</figure>'


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",  # letters stay letters, in the page's own type
        "svg.hashsalt": "visionedge",
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": _INK,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _FAINT,
        "axes.labelsize": 10,
        "axes.linewidth": 1,
        "grid.color": _LINE,
        "grid.linewidth": 0.8,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _FAINT,
        "ytick.labelcolor": _FAINT,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "legend.labelcolor": _INK,
    }
