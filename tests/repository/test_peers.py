"""tools/peers.py: the sides do the same work, and the report compares them round by round."""

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from peers import PIPELINE, ClipReaders, PeerRun, format_report, letterbox, main, make_report
from tiny_models import TinyDetector
from visionedge.errors import SourceError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec
from visionedge.ops.bench.baseline import resolve_clip
from visionedge.ops.bench.pipeline_run import PipelineLoad


def test_all_sides_run_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenVINO's are skipped with the reason where the package is missing."""
    model, path = TinyDetector().save(tmp_path / "tiny.onnx"), tmp_path / "peers.json"
    words = [
        "--model",
        str(model),
        "--cameras",
        "2",
        "--rounds",
        "1",
        "--seconds",
        "0.2",
        "--json",
        str(path),
    ]
    assert main(words) == 0
    report = json.loads(path.read_text())
    openvino = {"openvino", "openvino f32"}
    shown, missing = (openvino, set()) if importlib.util.find_spec("openvino") else (set(), openvino)
    assert report["sides"].keys() == {PIPELINE, "predict loop"} | shown
    assert report["skipped"].keys() == missing
    assert report["sides"][PIPELINE]["pipelineToIt"] == 1.0
    assert min(side["framesPerSecond"] for side in report["sides"].values()) > 0
    assert "| predict loop | fp32 |" in capsys.readouterr().out


def test_ratios_are_medians_of_the_rounds() -> None:
    """Not ratios of medians: a slow second slows both sides of its round."""
    ours = [PeerRun(100, 10, 5), PeerRun(40, 10, 5), PeerRun(90, 10, 5)]
    theirs = [PeerRun(50, 20, 5), PeerRun(20, 20, 5), PeerRun(90, 20, 5)]
    load = PipelineLoad(Path("m.onnx"), "/videos/yard.mp4", cameras=4, seconds=5.0, rounds=3)
    details = {PIPELINE: {"precision": "fp32"}, "loop": {"precision": "fp32"}}
    report = make_report(load, "m", {PIPELINE: ours, "loop": theirs}, details, {"openvino": "not here"})
    side = report["sides"]["loop"]
    assert (side["framesPerSecond"], side["pipelineToIt"], side["pipelineToItByCpu"]) == (50, 2.0, 2.0)
    assert report["load"]["source"] == "yard.mp4"
    text = format_report(report)
    assert "| loop | fp32 | 50.0 | 20.00 | 5.0 | 2.00 | 2.00 |" in text
    assert "openvino: skipped, not here" in text


@pytest.mark.parametrize("anchor", ["center", "top-left"])
def test_the_letterbox_is_that_of_the_pipeline(anchor: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    spec = InputSpec(64, 64, anchor="center" if anchor == "center" else "top-left")
    np.testing.assert_array_equal(letterbox(picture, spec), fit_to_input(picture, spec)[0])


def test_readers_take_turns_and_begin_again_at_the_end() -> None:
    clip = resolve_clip("demo:")
    capture = cv2.VideoCapture(clip)
    count = 0
    while capture.grab():
        count += 1
    capture.release()
    readers = ClipReaders(clip, 2)
    first, second = readers.read(), readers.read()
    np.testing.assert_array_equal(first, second)
    for _ in range(2 * count - 2):
        readers.read()
    np.testing.assert_array_equal(readers.read(), first)
    readers.close()


def test_a_file_that_is_no_clip_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match=r"no-such\.mp4"):
        ClipReaders(str(tmp_path / "no-such.mp4"), 1)
    assert main(["--source", str(tmp_path / "no-such.mp4")]) == 1
    assert "no-such.mp4" in capsys.readouterr().err


def test_wrong_arguments_give_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--rounds", "0"], ["--seconds", "-1"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert main(["--precision", "fp99"]) == 2
    assert "Traceback" not in capsys.readouterr().err
