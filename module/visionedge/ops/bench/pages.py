"""A report as one page: no script, nothing fetched, light or dark as the reader's machine is.

Every load of `bench` fills the same page; what is in it comes from the report's document alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ReportTile:
    """One large figure at the top: what it is, the figure with its unit, and what it means."""

    label: str
    figure: str
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class ReportSection:
    """A heading, a paragraph, and what is shown below it (HTML: see `table`, and `plots`)."""

    heading: str
    text: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportPage:
    """A whole report. `lead` says the result in a sentence or two; `kind` is the load it is of.

    `caution` is what to know before anybody believes the figures.
    """

    kind: str
    title: str
    lead: str
    tiles: tuple[ReportTile, ...]
    sections: tuple[ReportSection, ...]
    machine: Mapping[str, Any]
    load: str
    caution: str = ""


def render_page(page: ReportPage) -> str:
    """The page as a self-contained HTML document."""
    tiles = "".join(map(_tile, page.tiles))
    sections = "".join(map(_section, page.sections))
    caution = f'<p class="caution">{escape(page.caution)}</p>\n' if page.caution else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(page.title)} · visionedge bench {escape(page.kind)}</title>\n"
        f"<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kind">visionedge bench {escape(page.kind)}</p>\n<h1>{escape(page.title)}</h1>\n'
        f'<p class="lead">{escape(page.lead)}</p>\n{caution}</header>\n'
        f'<div class="tiles">{tiles}</div>\n{sections}\n{_footer(page)}\n</main>\n</body>\n</html>\n'
    )


def _style() -> str:
    return Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


def render_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    marked: Iterable[int] = (),
    words: Collection[int] = (),
) -> str:
    """A table; the rows numbered `marked` stand out, the columns numbered `words` hold no figures."""
    chosen = set(marked)
    kinds = [' class="word"' if column in words else "" for column in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{escape(h)}</th>' for h, kind in zip(heads, kinds, strict=True))
    body = "".join(
        ('<tr class="marked">' if number in chosen else "<tr>")
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tile(tile: ReportTile) -> str:
    meaning = f'<p class="meaning">{escape(tile.meaning)}</p>' if tile.meaning else ""
    label, figure = f"<p>{escape(tile.label)}</p>", f'<p class="figure">{escape(tile.figure)}</p>'
    return f'<div class="tile">{label}{figure}{meaning}</div>'


def _section(section: ReportSection) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    return f"<section><h2>{escape(section.heading)}</h2>{text}{''.join(section.parts)}</section>\n"


def _footer(page: ReportPage) -> str:
    on = page.machine
    packages = ", ".join(f"{name} {version}" for name, version in on["packages"].items())
    when = on["measuredAt"].replace("T", " ").partition(".")[0].removesuffix("Z")
    cores = f"{on['usableCores']} of {on['cores']} cores usable"
    facts = {
        "Measured": f"{when} UTC; {page.load}",
        "Machine": f"{on['cpu']}, {cores}, load average {on['loadAverage']:g} at the end",
        "Software": f"visionedge {on['visionedge']}, Python {on['python']}, {packages}",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<footer><dl>{rows}</dl></footer>"
