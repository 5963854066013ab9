"""Reports as pages: self-contained, well-formed, in light and dark, with the content of the document."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from visionedge.ops.bench.report import plot_lines, render_page

MACHINE = {
    "measuredAt": "2026-11-22T10:00:00.000Z",
    "visionedge": "0.1.0",
    "python": "3.11.7",
    "cpu": "A <fast> processor & more",
    "cores": 4,
    "usableCores": 2,
    "loadAverage": 0.25,
    "effectiveDevice": "cpu",
    "packages": {"onnxruntime": "1.31.1"},
}


def line(lanes: int, batch: int, speed: float) -> dict[str, Any]:
    return {
        "lanes": lanes,
        "batch": batch,
        "framesPerSecond": speed,
        "framesPerSecondAll": [speed * 0.9, speed, speed * 1.1],
        "batchMs": lanes * batch * 1000 / speed,
        "cpuMs": 11.5,
    }


def engine_report() -> dict[str, Any]:
    rows = [line(1, 1, 85), line(1, 8, 88), line(2, 1, 163), line(2, 8, 158)]
    tried = {"framesPerSecond": 160.0, "batchMs": 12.0, "cpuMs": 11.0, "rounds": 5, "note": ""}
    left_out = {"framesPerSecond": None, "batchMs": None, "cpuMs": None, "rounds": 0, "note": "at most 90"}
    return {
        "schema": "visionedge/bench-engine/1",
        "machine": MACHINE,
        "load": {"seconds": 0.4, "rounds": 3},
        "model": {"name": "nano", "head": "nanodet", "width": 416, "height": 320, "fixedBatch": None},
        "device": "requested auto, effective cpu",
        "plan": {
            "choice": {"lanes": 2, "batch": 1},
            "buckets": [1],
            "reason": "measured in 2.9 s: 2 lanes x batch 1 gave 160.0 frames/s",
            "table": [{"lanes": 2, "batch": 1, **tried}, {"lanes": 1, "batch": 8, **left_out}],
            "fits": [],
        },
        "table": rows,
        "choice": {"lanes": 2, "batch": 1, "shareOfBest": 1.0},
        "best": {"lanes": 2, "batch": 1},
        "bare": [{**line(2, 1, 166), "engineToBare": 0.982, "engineToBareByCpu": 0.99}],
        "onePicture": {
            "originalMs": 11.2,
            "compiledMs": 11.7,
            "plainMs": 15.1,
            "compiledToOriginal": 1.044,
            "compiledToOriginalByCpu": 1.04,
            "compiledToPlain": 0.775,
            "compiledToPlainByCpu": 0.77,
        },
        "candidates": [
            {
                "runtime": "openvino",
                "precision": "bf16",
                "options": "plain",
                "note": "",
                "framesPerSecond": 260.0,
                "batchMs": 7.5,
                "cpuMs": 7.4,
                "timesAsFast": 1.604,
                "timesAsFastByCpu": 1.61,
            },
            {"runtime": "openvino", "precision": "int8", "options": "plain", "note": "its results differ"},
        ],
        "unplannedShapes": 0,
    }


def side(speed: float) -> dict[str, Any]:
    return {
        "framesPerSecond": speed,
        "framesPerSecondAll": [speed, speed + 1, speed - 1],
        "cpuMsPerFrame": 21.5,
        "latencyMs": {"p50": 31.0, "p95": 44.0, "p99": 61.0},
        "stagesMs": {"wait": 5.0, "infer": 12.0},
        "dropped": {"stale": 3},
        "detectionsPerFrame": 4.25,
    }


def pipeline_report(*, baseline: bool) -> dict[str, Any]:
    both = {
        "baseline": {"threads": 2, "decode": "numpy", **side(80)},
        "ratio": {"framesPerSecond": 1.5, "cpuMsPerFrame": 0.8},
        "ceiling": {"alone": {"framesPerSecond": 140.0, "speedToCeiling": 0.86}},
    }
    return {
        "schema": "visionedge/bench-pipeline/1",
        "machine": MACHINE,
        "load": {"source": "demo:", "cameras": 4, "fps": None, "seconds": 8.0, "rounds": 3},
        "model": "nano",
        "device": "requested auto, effective cpu",
        "plan": {"lanes": 2, "buckets": [1]},
        "precision": "fp32",
        "pipeline": side(120),
        **(both if baseline else {}),
    }


def http_report() -> dict[str, Any]:
    return {
        "schema": "visionedge/bench-http/3",
        "machine": MACHINE,
        "load": {"clients": 16, "rate": 200.0, "cameras": 4, "seconds": 5.0, "rounds": 2},
        "http": {"responsesPerSecond": 199.5, "latencyMs": {"p50": 1.5, "p95": 4.0, "p99": 9.5}},
        "pipeline": {
            "withClients": [70.5, 71.0],
            "withoutClients": [72.0, 72.5],
            "kept": None,
        },
    }


TEXT = "a report as on stdout"

PAGES = [
    pytest.param(render_page(engine_report(), TEXT), id="engine"),
    pytest.param(render_page(pipeline_report(baseline=True), TEXT), id="pipeline with baseline"),
    pytest.param(render_page(pipeline_report(baseline=False), TEXT), id="pipeline"),
    pytest.param(render_page(http_report(), TEXT), id="http"),
]


class PageParser(HTMLParser):
    """Follows the tags of a page, and gathers its text and its addresses."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.extend(value for name, value in attrs if name == "id" and value)
        self.addresses.extend(value or "" for name, value in values.items() if name in ("src", "href"))
        self.addresses.extend(value or "" for name, value in values.items() if name == "xlink:href")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "pre"):
            self.words.append(data)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_well_formed_and_its_ids_are_its_own(page: str) -> None:
    reader = PageParser(page)
    assert (reader.open, reader.wrong) == ([], [])
    assert len(reader.ids) == len(set(reader.ids))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    reader = PageParser(page)
    assert all(address.startswith("#") and address[1:] in reader.ids for address in reader.addresses)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in reader.ids}
    assert not re.search(r"<script|<link|<img|@import|javascript:", page)


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_of_a_plot_is_defined_for_light_and_dark(page: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert plots
    for plot in plots:
        assert not re.findall(r"#[0-9a-f]{3,6}\b", plot), "a colour that is no variable"
        assert "var(--series-0)" in plot
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    light, dark = (set(re.findall(r"(--[a-z0-9-]+):", part)) for part in _schemes(page))
    assert used <= light
    assert light == dark


def _schemes(page: str) -> tuple[str, str]:
    light, _, rest = page.partition("@media (prefers-color-scheme: dark)")
    return light, rest.partition("* {")[0]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_machine_and_time_of_the_measurement(page: str) -> None:
    text = " ".join(PageParser(page).words)
    for words in ("A <fast> processor & more", "2026-11-22T10:00:00.000Z", "onnxruntime 1.31.1"):
        assert words in text


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_the_text_of_the_report(page: str) -> None:
    """With its cautions, as on stdout."""
    assert f'<pre class="text">{TEXT}</pre>' in page


def text_of(report: dict[str, Any]) -> str:
    return " ".join(PageParser(render_page(report, TEXT)).words)


def test_the_page_of_the_engine_has_its_figures() -> None:
    text = text_of(engine_report())
    for words in ("163", "0.982", "1.044", "CPU ms", "lanes: 2", "bare, 2"):
        assert words in text


def test_the_rows_of_the_plan_are_highlighted() -> None:
    rows = re.findall(r'<tr class="marked">(.*?)</tr>', render_page(engine_report(), TEXT))
    assert rows
    assert all(row.startswith("<td>2</td><td>1</td>") for row in rows)


def test_a_part_without_figures_has_no_table() -> None:
    less: dict[str, Any] = {"onePicture": {}, "candidates": [], "bare": []}
    text = text_of(engine_report() | less)
    for heading in ("One picture", "Engines, bare", "The bare runtime"):
        assert heading not in text


def test_the_page_of_an_engine_shows_the_other_engines() -> None:
    text = text_of(engine_report())
    assert "Engines, bare and in turns" in text
    assert re.search(r"openvino bf16 plain .*260.* 1\.604 1\.610", text)
    assert "openvino int8 plain its results differ" in text


def test_the_page_of_the_pipeline_has_both_sides() -> None:
    both, alone = text_of(pipeline_report(baseline=True)), text_of(pipeline_report(baseline=False))
    for words in (
        "120",
        "frames per second 1.500",
        "plain loop",
        "dropped, stale 3",
        "latency ms, p95 44.0",
    ):
        assert words in both
    assert "plain loop" not in alone


def test_the_page_of_http_shows_the_pipeline_with_and_without_clients() -> None:
    text = text_of(http_report())
    for words in ("no clients", "with clients 70.5, 71.0", "latency ms, p99 9.500"):
        assert words in text


def test_the_page_contains_the_whole_report() -> None:
    (document,) = re.findall(r"<pre>(.*?)</pre>", render_page(http_report(), TEXT), re.DOTALL)
    assert json.loads(unescape(document)) == http_report()


@pytest.mark.parametrize(("highest", "ticks"), [(0.0, 6), (88.0, 6), (163.0, 5), (240.0, 6), (400.0, 5)])
def test_a_plot_has_five_or_six_round_ticks_from_0(highest: float, ticks: int) -> None:
    plot = plot_lines("round", {"pipeline": [(1, highest / 2), (2, highest)]})
    values = [float(value) for value in re.findall(r'class="end"[^>]*>([^<]*)<', plot)]
    assert len(values) == ticks
    assert values[0] == 0
    assert values[-1] >= highest


def test_foreign_text_is_escaped() -> None:
    bad = "<script>alert(1)</script>"
    report = engine_report() | {"device": bad, "machine": MACHINE | {"cpu": bad, "packages": {bad: bad}}}
    report["plan"] |= {"reason": bad}
    report["table"][0] |= {bad: bad, "lanes": bad}
    html = render_page(report, bad)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10
