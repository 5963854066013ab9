"""`bench scene`: tracker and rules on recorded boxes, the report, and mistakes in the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from visionedge.__main__ import main
from visionedge.ops.bench.compare import collect_figures
from visionedge.ops.bench.scene import make_boxes, parse_boxes, read_scene

SHORT = ("--seconds", "0.05", "--rounds", "3")


def frame_line(confidences: tuple[float, ...] = (0.9, 0.2), **changes: Any) -> str:
    """A frame object with a box for each score, as `detect --json` writes it."""
    rows = [
        {
            "label": "dog" if number else "person",
            "classId": 16 if number else 0,
            "confidence": confidence,
            "box": {"left": 0.1 * number, "top": 0.2, "width": 0.1, "height": 0.3},
        }
        for number, confidence in enumerate(confidences)
    ]
    document = {
        "schema": "visionedge/frame/1",
        "source": "yard.mp4",
        "sequence": 1,
        "epoch": 1,
        "capturedAt": "2026-11-30T10:00:00.000Z",
        "width": 640,
        "height": 480,
        "model": "tiny",
        "device": "cpu",
        "timing": {"waitMs": 0.0, "inferMs": 1.0, "totalMs": 1.0, "batchSize": 1},
        "detections": rows,
    }
    return json.dumps(document | changes)


def test_the_report_has_the_times_of_the_parts_and_of_the_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["--boxes", "synthetic", *SHORT, "--json", "-", "--html", str(page)]
    assert main(["bench", "scene", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "visionedge/bench-scene/1"
    assert (report["load"]["boxes"], report["load"]["boxesPerFrame"]) == ("synthetic", 10)
    assert (report["load"]["zones"], report["load"]["lines"]) == (2, 1)
    assert (report["model"], report["tracksPerFrame"] > 9) == (None, True)
    for part in ("tracker", "rules", "camera", "loop"):
        figures = report[part]
        assert set(figures) == {"meanMs", "p50Ms", "p95Ms", "p99Ms", "framesPerSecond", "framesPerSecondAll"}
        assert 0 < figures["p50Ms"] <= figures["p95Ms"] <= figures["p99Ms"]
        assert len(figures["framesPerSecondAll"]) == 3
    share = report["coreShare"]
    assert share["loop"] == pytest.approx(0.16 * report["loop"]["meanMs"], abs=1e-3)
    assert share["allThreads"] >= share["loop"]
    assert page.read_text().startswith("<!doctype html>")
    assert list(collect_figures(report)) == ["frames/s of the scene"]


def test_recorded_boxes_and_the_rules_of_a_configuration_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes, scene = tmp_path / "boxes.jsonl", tmp_path / "vision.yaml"
    boxes.write_text("\n".join(frame_line((0.9, 0.8, 0.2)) for _ in range(20)))
    scene.write_text(
        "cameras:\n  plain: {uri: 'demo:'}\n  dock:\n    uri: 'demo:'\n"
        "    lines: {a: {start: [0, 0], end: [1, 1]}, b: {start: [0, 1], end: [1, 0]}}\n"
    )
    words = ["--boxes", str(boxes), "--scene", str(scene), "--boxes-per-frame", "2", *SHORT]
    assert main(["bench", "scene", *words, "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert f"2 boxes and 2 tracks in a frame of {boxes}, zones: 0, lines: 2" in out
    assert "16 cameras with 10 frames/s need" in out


@pytest.mark.system
def test_without_a_file_the_model_runs_on_the_bundled_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path))
    assert main(["bench", "scene", *SHORT, "--rounds", "1", "--device", "cpu", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["load"]["boxes"]) == ("yolox-nano-416", "media/demo.mp4")
    assert 9.9 <= report["load"]["boxesPerFrame"] <= 10  # a few frames have fewer
    assert report["eventsPerFrame"] > 0


def test_boxes_are_read_with_their_labels_and_sorted_by_confidence() -> None:
    boxes = parse_boxes([frame_line((0.2, 0.9)), frame_line(())], "boxes.jsonl")
    assert (boxes.width_px, boxes.height_px) == (640, 480)
    assert [len(each) for each in boxes.frames] == [2, 0]
    assert [boxes.labels[index] for index in boxes.frames[0].class_ids] == ["dog", "person"]


def test_synthetic_boxes_are_equal_at_each_run() -> None:
    one, other = make_boxes(7, 10.0), make_boxes(7, 10.0)
    assert {len(each) for each in one.frames} == {7}
    assert all((a.boxes == b.boxes).all() for a, b in zip(one.frames, other.frames, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        "no JSON\n",
        frame_line() + "\n\n" + frame_line(),
        frame_line(width=0),
        frame_line((float("nan"),)),
        frame_line().replace('"classId": 16', '"classId": 99999999999'),
    ],
)
def test_a_file_without_frame_objects_is_a_mistake_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "boxes.jsonl"
    file.write_text(text)
    assert main(["bench", "scene", "--boxes", str(file), *SHORT]) == 2
    problem = capsys.readouterr().err.strip()
    assert str(file) in problem
    assert "frame object" in problem
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--boxes", "missing.jsonl"), "missing.jsonl cannot be read: No such file or directory"),
        (("--boxes", "binary.jsonl"), "binary.jsonl is not a text file"),
        (("--scene", "missing.yaml"), "missing.yaml"),
        (("--scene", "plain.yaml"), "--scene plain.yaml: no camera has zones, lines or tracking"),
        (("--scene", "wrong.yaml"), "cameras.dock.lines.door.end"),
    ],
)
def test_mistakes_are_named_in_a_line_and_end_with_2(
    words: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary.jsonl").write_bytes(b"\xff\xfe")
    Path("plain.yaml").write_text("cameras: {dock: {uri: 'demo:'}}")
    Path("wrong.yaml").write_text(
        "cameras: {dock: {uri: 'demo:', lines: {door: {start: [0, 0], end: [2, 0]}}}}"
    )
    assert main(["bench", "scene", "--boxes", "synthetic", *SHORT, *words]) == 2
    assert problem in capsys.readouterr().err


def test_the_default_scene_has_two_zones_and_a_line() -> None:
    camera = read_scene("default", {})
    assert (len(camera.zones), len(camera.lines), camera.is_tracked) == (2, 1, True)
