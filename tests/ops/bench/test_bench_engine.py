"""`bench engine`: measurements and their report. Tiny models, short trials."""

import json
from pathlib import Path
from typing import Any

import pytest

from slow_models import save_with_variant
from tiny_graphs import Graph
from tiny_models import TinyDetector
from visionedge.__main__ import main
from visionedge.config.schema import InferenceConfig
from visionedge.ops.bench.engine import EngineLoad, bench_engine, format_report

CPU = InferenceConfig.model_validate({"device": "cpu", "maxBatch": 4})


def measured(path: Path, **load: Any) -> tuple[dict[str, Any], list[str]]:
    progress: list[str] = []
    short = {"seconds": 0.005, "rounds": 3, "inference": CPU, **load}
    return bench_engine(EngineLoad(path, **short), progress.append), progress


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = TinyDetector().save(tmp_path_factory.mktemp("bench") / "tiny.onnx")
    found, _ = measured(path, lanes=(1, 2), batches=(1, 4))
    return found


def pairs(rows: list[dict[str, Any]]) -> set[tuple[int, int]]:
    return {(row["lanes"], row["batch"]) for row in rows}


def test_every_requested_pair_is_in_the_table(report: dict[str, Any]) -> None:
    choice = (report["choice"]["lanes"], report["choice"]["batch"])
    assert pairs(report["table"]) == {(1, 1), (1, 4), (2, 1), (2, 4), choice}
    for row in report["table"]:
        assert row["framesPerSecond"] > 0
        assert row["batchMs"] > 0
        assert row["cpuMs"] > 0
        assert len(row["framesPerSecondAll"]) == 3


def test_the_bare_runtime_is_measured_with_the_same_threads_and_batches(
    report: dict[str, Any],
) -> None:
    batch = report["choice"]["batch"]
    assert pairs(report["bare"]) == {pair for pair in pairs(report["table"]) if pair[1] == batch}
    assert all(row["engineToBare"] > 0 for row in report["bare"])
    assert all(row["engineToBareByCpu"] > 0 for row in report["bare"])


def test_the_plan_is_compared_with_the_best_of_the_sweep(report: dict[str, Any]) -> None:
    best = (report["best"]["lanes"], report["best"]["batch"])
    choice = (report["choice"]["lanes"], report["choice"]["batch"])
    assert {best, choice} <= pairs(report["table"])
    assert report["choice"]["shareOfBest"] == 1 if choice == best else report["choice"]["shareOfBest"] > 0
    assert report["plan"]["reason"].startswith("measured in ")


def test_the_compiled_graph_is_compared_with_the_network_and_with_numpy_around_it(
    report: dict[str, Any],
) -> None:
    one = report["onePicture"]
    assert {"originalMs", "compiledMs", "plainMs"} <= one.keys()
    assert one["compiledToPlain"] > 0
    assert one["compiledToOriginalByCpu"] > 0


def test_every_batch_size_is_warmed_up(report: dict[str, Any]) -> None:
    assert report["unplannedShapes"] == 0


def test_the_report_is_a_document_and_a_text(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    text = format_report(report)
    lines = text.splitlines()
    (chosen,) = [line for line in lines if line.startswith(">")]
    assert chosen.endswith("the plan")
    for word in (
        "frames/s",
        "bare onnxruntime fp32",
        "plan/best: ",
        "compiled/original: ",
        "compiled/plain: ",
    ):
        assert word in text


def test_a_model_that_fixes_its_batch_is_run_with_that_one(tmp_path: Path) -> None:
    found, _ = measured(TinyDetector(batch=2).save(tmp_path / "pair.onnx"), lanes=(1,), batches=(1, 2, 4))
    choice = (found["choice"]["lanes"], 2)
    assert pairs(found["table"]) == {(1, 2), choice}
    assert found["onePicture"] == {}
    assert "no plain decoder" in format_report(found)


def test_every_engine_is_timed_alternately_and_the_best_is_the_ceiling(tmp_path: Path) -> None:
    """A variant beside the model, as `model compile` writes it."""
    path = save_with_variant(tmp_path / "tiny.onnx")
    found, _ = measured(path, lanes=(1,), batches=(1,), rounds=1, data=tmp_path / "data")
    fp32, int8 = [row for row in found["candidates"] if row["runtime"] == "onnxruntime"]
    assert (fp32["precision"], int8["precision"]) == ("fp32", "int8")
    in_use = [f"{row['runtime']} {row['precision']}" for row in found["candidates"] if not row["note"]]
    assert in_use == [found["engine"]]
    text = format_report(found)
    assert f"bare {found['engine']}; engine/bare " in text
    assert "engines, bare and in turns:" in text
    assert text.count("; not used: ") == len(found["candidates"]) - 1


def test_a_model_with_one_engine_lists_no_candidates(report: dict[str, Any]) -> None:
    assert report["candidates"] == []
    assert "in turns:" not in format_report(report)


def test_progress_is_reported_per_round(tmp_path: Path) -> None:
    _, progress = measured(TinyDetector().save(tmp_path / "tiny.onnx"), lanes=(1,), batches=(1,), rounds=2)
    assert [line.split(":")[0] for line in progress if line.startswith("round")] == ["round 1/2", "round 2/2"]


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "state"))


SHORT = ("--device", "cpu", "--seconds", "0.005", "--rounds", "1", "--lanes", "1", "--batch", "1,2")


def test_the_command_writes_a_table_a_document_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(TinyDetector().save(tmp_path / "tiny.onnx"))
    document, page = tmp_path / "report.json", tmp_path / "report.html"
    code = main(["bench", "engine", "--model", model, *SHORT, "--json", str(document), "--html", str(page)])
    out, err = capsys.readouterr()
    assert code == 0
    assert "frames/s" in out
    assert "round 1/1" in err
    assert json.loads(document.read_text())["schema"] == "visionedge/bench-engine/1"
    assert page.read_text().startswith("<!doctype html>")


def test_with_json_stdout_has_only_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(TinyDetector().save(tmp_path / "tiny.onnx"))
    assert main(["bench", "engine", "--model", model, *SHORT, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "tiny"


@pytest.mark.parametrize(
    "wrong", [("--batch", "0"), ("--batch", "1,x"), ("--lanes", ""), ("--rounds", "0"), ("--budget", "-1")]
)
def test_wrong_arguments_exit_2(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "engine", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_an_invalid_model_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = Graph()
    graph.output(graph.add("Relu", graph.input("x", "float32", 1, 4)), "y", "float32", 1, 4)
    path = graph.save(tmp_path / "relu.onnx")
    assert main(["bench", "engine", "--model", str(path), *SHORT]) == 2
    assert str(path) in capsys.readouterr().err
