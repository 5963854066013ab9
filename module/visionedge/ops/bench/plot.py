"""A line plot for a report's page: SVG drawn by matplotlib, in the colours and the font of the page.

matplotlib has fixed colours only, so it draws in placeholder colours, and each is then replaced by a variable
of the page's style: one drawing suits light and dark.
"""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from visionedge.errors import UnavailableError
from visionedge.runtime.installation import build_install_command

Points = Sequence[tuple[float, float]]
"""The points (x, y) of a line."""

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
