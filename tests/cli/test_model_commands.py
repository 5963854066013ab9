"""`visionedge model`: its help, and `compile`, whose file is a model as any other."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from clips import make_picture
from command_line import CommandLine
from tiny_models import TinyDetector, pictures
from visionedge.model.compiler.build import CACHE_FOLDER

TINY = TinyDetector(batch=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _own_state(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(data))


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.mark.parametrize("arguments", [(), ("inspect",), ("compile",), ("eval",)])
def test_help_has_examples_and_exit_codes(visionedge: CommandLine, arguments: tuple[str, ...]) -> None:
    outcome = visionedge("model", *arguments, "--help")
    assert outcome.code == 0
    assert "examples:" in outcome.out
    assert "exit codes" in outcome.out


def test_the_help_of_compile_describes_inputs_and_outputs(visionedge: CommandLine) -> None:
    """Whoever gets such a file has only this and its metadata."""
    frames = visionedge("model", "compile", "--help").out
    for part in (
        "uint8 [N, H, W, 3]",
        "float32 [N, K, 6]",
        "left, top, right, bottom",
        "visionedge.compiled",
    ):
        assert part in frames


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("inspect",),
        ("compile", "m.onnx"),
        ("compile", "m.onnx", "-o", "x", "--rows", "0"),
        ("eval", "m.onnx", "--coco", "c.json"),
        ("eval", "m.onnx", "--coco", "c.json", "--images", "d", "--limit", "none"),
    ],
)
def test_wrong_arguments_give_a_one_line_error_and_exit_2(visionedge: CommandLine, arguments: tuple[str, ...]) -> None:
    outcome = visionedge("model", *arguments)
    assert outcome.code == 2
    assert len(outcome.complaints) == 1


def test_a_compiled_file_runs_in_plain_onnxruntime(visionedge: CommandLine, tmp_path: Path) -> None:
    """And gives what a slow reference gives of the original."""
    out = tmp_path / "fast.onnx"
    outcome = visionedge("model", "compile", TINY.save(tmp_path / "tiny.onnx"), "-o", out, "--rows", "40")
    assert (outcome.code, outcome.out) == (0, "")
    assert "uint8 [N,48,64,3] BGR -> float32 [N,40,6], nanodet" in outcome.err
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    images = pictures(2)
    (rows,) = session.run(None, {session.get_inputs()[0].name: images})
    expected = np.array(TINY.rows(images, 40))
    np.testing.assert_allclose(rows, expected, atol=1e-2)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_compiled_file_can_be_used_as_a_model(visionedge: CommandLine, tmp_path: Path) -> None:
    """detect gives the same boxes with it, to the last bit but time."""
    picture = make_picture(tmp_path / "a.png")
    path, out = TINY.save(tmp_path / "tiny.onnx"), tmp_path / "fast.onnx"
    assert visionedge("model", "compile", path, "-o", out).code == 0
    frames = [
        json.loads(visionedge("detect", picture, "--json", "--confidence", "0.01", "--model", model).out)
        for model in (path, out)
    ]
    assert frames[0]["detections"] == frames[1]["detections"] != []
    assert frames[1]["model"] == "fast"
    facts = json.loads(visionedge("model", "inspect", out, "--json").out)
    assert (facts["head"], facts["compiled"]["rows"]) == ("nanodet", 320)
    assert facts["evidence"][0].startswith("was compiled by visionedge")


def test_a_compiled_graph_is_cached(visionedge: CommandLine, tmp_path: Path, data: Path) -> None:
    """inspect, detect and compile share one entry in the data folder."""
    path = TINY.save(tmp_path / "tiny.onnx")
    assert visionedge("model", "inspect", path).code == 0
    (entry,) = (data / CACHE_FOLDER).iterdir()
    before = entry.read_bytes()
    assert visionedge("model", "compile", path, "-o", tmp_path / "out.onnx").code == 0
    assert visionedge("detect", make_picture(tmp_path / "a.png"), "--model", path).code == 0
    assert [e.read_bytes() for e in (data / CACHE_FOLDER).iterdir()] == [before]
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))


def test_the_model_itself_is_not_overwritten(visionedge: CommandLine, tmp_path: Path) -> None:
    path = TINY.save(tmp_path / "tiny.onnx")
    before = path.read_bytes()
    (tmp_path / "link.onnx").symlink_to(path)
    for output in (path, tmp_path / "link.onnx"):
        outcome = visionedge("model", "compile", path, "-o", output)
        assert outcome.code == 2
        assert "is the model itself" in outcome.complaints[0]
    assert path.read_bytes() == before


def test_an_unwritable_output_gives_a_one_line_error(visionedge: CommandLine, tmp_path: Path) -> None:
    path = TINY.save(tmp_path / "tiny.onnx")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "no" / "out.onnx", tmp_path / "folder"):
        outcome = visionedge("model", "compile", path, "-o", output)
        assert outcome.code == 1
        assert "cannot be written" in outcome.complaints[0]
    assert list(tmp_path.glob(".*")) == []


def test_a_missing_model_gives_a_one_line_error(visionedge: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").touch()
    outcome = visionedge("model", "compile", tmp_path / "no.onnx", "-o", tmp_path / "out.onnx")
    assert outcome.code == 2
    assert "there is no such model file" in outcome.complaints[0]
