"""`make figures`: its commands, and the figures read from the reports."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import figures
from figures import Load, lines_of, loads, main, table
from visionedge.__main__ import build_parser

ENGINE: dict[str, Any] = {
    "choice": {"shareOfBest": 0.98},
    "bare": [
        {"engineToBare": 0.99, "engineToBareByCpu": 1.0},
        {"engineToBare": 0.95, "engineToBareByCpu": 0.98},
    ],
    "onePicture": {"compiledToOriginal": 1.01, "compiledToPlain": 0.91},
    "candidates": [{"precision": "fp32", "timesAsFast": 1.0}, {"precision": "int8", "timesAsFast": 1.8}],
}
PIPELINE: dict[str, Any] = {
    "load": {"fps": None},
    "precision": "fp32",
    "ratio": {"framesPerSecond": 1.4},
    "ceiling": {
        "alone": {"speedToCeiling": 0.9, "cpuToBare": 1.0},
        "atOnce": {"toMeasured": 0.9, "cpuToBare": 1.2},
    },
    "baselineAgreement": {"matched": 0.95},
}


def seen(reports: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    return {line["what"]: (line["seen"], line["met"]) for line in lines_of(reports)}


def test_every_figure_is_compared_with_its_limit() -> None:
    found = seen({"engine, bundled": ENGINE})
    assert found["plan/best"] == (0.98, True)
    assert found["engine/bare session.run, the least"] == (0.95, False)
    assert found["the same by processor time"] == (0.98, True)
    assert found["compiled/(numpy + original + numpy)"] == (0.91, False)
    assert found["int8 to fp32 (1.7 meant for VNNI)"] == (1.8, True)


def test_figures_missing_from_a_report_are_omitted() -> None:
    """No plain decoder for a head, and no int8 where the plan chose none."""
    assert "compiled/original, time" not in seen({"engine, model": ENGINE | {"onePicture": {}}})
    assert "int8 to fp32 (1.7 meant for VNNI)" not in seen({"engine, model": ENGINE | {"candidates": []}})
    in_integers = "the same with int8 chosen, the loop in fp32"
    assert in_integers not in seen({"pipeline, bundled": PIPELINE})
    chosen = PIPELINE | {"precision": "int8", "ratio": {"framesPerSecond": 2.5}}
    assert seen({"pipeline, bundled": chosen})[in_integers] == (2.5, True)


def test_a_share_is_shown_in_percent() -> None:
    report = {"pipeline": {"serverShare": 0.012}, "http": {"latencyMs": {"p99": 25.0}}}
    found = seen({"http": report})
    assert found["the module's share of the cores, %"] == (1.2, True)
    assert found["latency p99, ms"] == (25.0, False)


def test_the_table_names_benchmarks_that_could_not_run() -> None:
    reports = {"engine, bundled": ENGINE, "decode": {"error": "tools/decode_cost.py ended with exit code 3"}}
    text = table(lines_of(reports), reports)
    assert "| engine, bundled | plan/best | >= 0.95 | 0.98 | yes |" in text
    assert "decode: tools/decode_cost.py ended with exit code 3" in text


@pytest.mark.parametrize("load", loads("yolox.onnx", "vtest.avi", "large.mp4"), ids=lambda load: load.name)
def test_every_command_exists(load: Load) -> None:
    if load.name == "decode":
        assert Path(*load.words).is_file()
    else:
        given = build_parser().parse_args(["bench", *load.words, "--json", "report.json"])
        assert isinstance(given, argparse.Namespace)
    assert figures.figures(load.name)


def test_the_document_contains_the_reports_and_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        figures, "run", lambda load, _folder: ENGINE if load.name.startswith("engine") else {}
    )
    out = tmp_path / "figures.json"
    assert main(["--only", "engine", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["reports"] == {"engine, bundled": ENGINE}
    assert len(document["figures"]) == 6
    assert capsys.readouterr().out.startswith("| load | figure |")
