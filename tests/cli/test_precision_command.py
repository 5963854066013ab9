"""`model compile --precision`: a variant is made, judged and kept with its report, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from command_line import CommandLine
from deep_models import deep_detector, save_deep
from tiny_models import MEAN, TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.engine.local_engine import open_engine
from visionedge.frames.types import Picture
from visionedge.model.model import load_model
from visionedge.model.parity import Tolerance
from visionedge.model.quantization.calibration import (
    ProgressReporter,
    TensorRanges,
    fold_constants,
    list_float_tensors,
)
from visionedge.model.quantization.int8 import QuantizationRecipe, quantize
from visionedge.model.quantization.search import CalibrationData, CalibrationSample, make_variant
from visionedge.model.quantization.variants import find_variants

WIDTH_PX, HEIGHT_PX = 64, 48
LABELS = ["ant", "bee", "cat", "dog", "emu"]
SMALL = TinyDetector(strides=(8, 16), reg_max=3)


def scene(number: int) -> Picture:
    """Flat patches of colour, others for each number."""
    random = np.random.default_rng(number)
    picture = np.full((HEIGHT_PX, WIDTH_PX, 3), random.integers(0, 256, 3), np.uint8)
    for _ in range(6):
        top, left = random.integers(0, HEIGHT_PX - 8), random.integers(0, WIDTH_PX - 8)
        bottom, right = top + random.integers(4, 24), left + random.integers(4, 32)
        picture[top:bottom, left:right] = random.integers(0, 256, 3)
    return picture


def grey(number: int) -> Picture:
    """A covered camera: the mean that the model subtracts, and another picture for each number."""
    picture = np.full((HEIGHT_PX, WIDTH_PX, 3), np.round(MEAN), np.uint8)
    picture[0, number] += 1
    return picture


def folder_of(path: Path, pictures: list[Picture]) -> Path:
    path.mkdir()
    for number, picture in enumerate(pictures):
        assert cv2.imwrite(str(path / f"p{number:02}.png"), picture)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("in") / "photos", [scene(number) for number in range(16)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_deep(tmp_path / "deep.onnx", SMALL)


@pytest.fixture
def visionedge(
    capsys: pytest.CaptureFixture[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    monkeypatch.setenv("VISIONEDGE_DATA", str(data))
    return CommandLine(capsys)


def test_a_long_wait_reports_some_steps_but_not_each() -> None:
    """A step is reported if the last line is three seconds old."""
    lines: list[str] = []
    seconds = iter(range(100))
    progress = ProgressReporter(
        lines.append, clock=lambda: float(next(seconds))
    )  # each look at the clock is a second
    progress("begins")
    assert list(progress.track(range(10), "pictures")) == list(range(10))
    assert lines == ["begins", "  pictures: 3 of 10", "  pictures: 6 of 10", "  pictures: 9 of 10"]


@pytest.mark.parametrize("recipe", [(), ("--thorough",)])
def test_every_part_of_the_int8_conversion_reports_progress(
    visionedge: CommandLine,
    model: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: tuple[str, ...],
) -> None:
    """Each processed picture, in any part, is a step that may be reported."""
    monkeypatch.setattr("visionedge.model.quantization.calibration.REPORT_INTERVAL_S", 0.0)
    outcome = visionedge("model", "compile", model, "--precision", "int8", "--calibrate", photos, *recipe)
    for part in ("pass 1 of ", "pass 2 of ", "comparing detections", "comparing ranges"):
        assert re.search(rf"^  {part}.*pictures: \d+ of \d+$", outcome.err, re.MULTILINE), part
    assert ("tensors; " in outcome.err) == bool(recipe)


@pytest.fixture(autouse=True)
def _timed_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionedge.model.quantization.search._TIMING_BUDGET_S", 0.01)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def rows_of(model: Path, data: Path, precision: str) -> NDArray[np.float32]:
    config = InferenceConfig.model_validate({"device": "cpu", "precision": precision})
    engine = open_engine(load_model(model), config, data=data, measuring=False)
    try:
        assert engine.info().choice.precision == precision
        return engine.infer(np.stack([scene(number) for number in range(50, 54)])).rows
    finally:
        engine.close()


def test_an_int8_variant_is_saved_with_its_report_and_used_on_request(
    visionedge: CommandLine, model: Path, photos: Path, data: Path
) -> None:
    """Beside the model; the table of attempts is the result, the rest goes to stderr."""
    outcome = visionedge("model", "compile", model, "--precision", "int8", "--calibrate", photos)
    assert outcome.code == 0
    assert outcome.out.count("<- chosen") == 1
    assert "stored as" in outcome.err
    report: dict[str, Any] = json.loads(model.with_name("deep.int8.json").read_bytes())
    assert report["parity"]["matched"] >= 0.9 <= report["parityHere"]["matched"]
    assert report["parity"]["pictures"] == report["made"]["calibrationPictures"] == 8
    assert report["refused"] is None
    (variant,) = find_variants(load_model(model))
    assert (variant.precision, variant.recipe, variant.refusal) == ("int8", report["recipe"], None)
    assert TensorProto.INT8 in {tensor.data_type for tensor in onnx.load(variant.path).graph.initializer}
    fp32, int8 = (rows_of(model, data, precision) for precision in ("fp32", "int8"))
    assert 0 < np.abs(fp32[:, :20, 4] - int8[:, :20, 4]).max() < 0.1


def test_thorough_tunes_ranges_tensor_by_tensor_and_keeps_the_better_ones(
    visionedge: CommandLine, model: Path, photos: Path
) -> None:
    """Even if one method for all tensors was good enough; the progress is reported meanwhile."""
    arguments = ("model", "compile", model, "--precision", "int8", "--calibrate", photos)
    outcome = visionedge(*arguments, "--recipe", "everything", "--thorough")
    assert outcome.code == 0
    report = json.loads(model.with_name("deep.int8.json").read_bytes())
    judged = {way["recipe"]: way for way in report["tried"] if way["matched"] is not None}
    assert sorted(words.endswith("; ranges tensor by tensor") for words in judged) == [False, True]
    assert "setting the ranges of 'everything; narrow weights' tensor by tensor" in outcome.err
    chosen, other = judged[report["recipe"]], judged[({*judged} - {report["recipe"]}).pop()]
    assert chosen["matched"] - chosen["scoreShift"] >= other["matched"] - other["scoreShift"] - 1e-3


def test_an_fp16_variant_needs_no_calibration_but_pictures_to_judge_it(
    visionedge: CommandLine, model: Path, photos: Path
) -> None:
    outcome = visionedge("model", "compile", model, "--precision", "fp16", "--calibrate", photos)
    assert outcome.code == 0
    report = json.loads(model.with_name("deep.fp16.json").read_bytes())
    assert (report["parity"]["pictures"], report["parityHere"]) == (16, None)
    assert report["parity"]["matched"] > 0.98
    kinds = {tensor.data_type for tensor in onnx.load(model.with_name("deep.fp16.onnx")).graph.initializer}
    assert TensorProto.FLOAT16 in kinds


def test_ranges_calibrated_on_grey_pictures_are_refused_and_not_saved(
    visionedge: CommandLine, model: Path, tmp_path: Path
) -> None:
    """Every second picture calibrates, the others judge; the values of real pictures are clipped.

    All recipes are tried, and the best one has the reason of its refusal.
    """
    pictures = [grey(i) if i % 2 == 0 else scene(i) for i in range(24)]
    bad = folder_of(tmp_path / "bad", pictures)
    before = sorted(tmp_path.iterdir())
    outcome = visionedge("model", "compile", model, "--precision", "int8", "--calibrate", bad)
    assert outcome.code == 1
    (line,) = outcome.complaints
    assert "int8 is refused: only " in line
    assert "of the boxes agree, 90.0% are wanted; nothing was stored" in line
    assert outcome.out.count("<- refused") == 1
    agreed = [float(share) for share in re.findall(r"(\d+\.\d)%", outcome.out)]
    assert len(agreed) == len(outcome.out.splitlines()) - 2 >= 4  # but for the head and fp32
    assert max(agreed) < 90
    assert sorted(tmp_path.iterdir()) == before


def faint(number: int) -> Picture:
    """A scene that hardly stands out from the mean."""
    return np.asarray(np.round(np.array(MEAN) + 0.1 * (scene(number) - np.array(MEAN))), np.uint8)


def test_ranges_that_fit_only_their_calibration_pictures_are_refused(model: Path) -> None:
    """Ranges from faint pictures are good enough only for faint pictures."""
    loaded = load_model(model)
    whole = loaded.input.place(WIDTH_PX, HEIGHT_PX)
    faint_ones = [CalibrationSample(faint(number), whole) for number in range(16)]
    common = [CalibrationSample(scene(number), whole) for number in range(8)]
    material = CalibrationData(tuple(faint_ones[::2]), tuple(faint_ones[1::2]), common=tuple(common))
    wide = Tolerance(unmatched=0.2)
    made = make_variant(loaded, "int8", material, wide, progress=lambda _: None, only="everything")
    way = made.tried[0]
    assert way.parity is not None
    assert way.parity.refusal(wide) is None
    assert way.refusal is not None
    assert way.refusal.startswith("on the bundled clip only ")
    assert "its ranges were set by pictures unlike it" in way.refusal
    assert made.refusal is not None


@pytest.mark.parametrize(
    "case",
    [
        (["--precision", "int8"], 2, "--calibrate DIR: int8 needs some dozens of pictures"),
        (["--precision", "int8", "--calibrate", "nowhere"], 1, "nowhere"),
        (
            ["--precision", "int8", "--calibrate", "one"],
            1,
            "has 1 different pictures; calibration needs at least 8",
        ),
        (["--calibrate", "one", "-o", "x.onnx"], 2, "--calibrate: needs --precision int8 or fp16"),
        (["--precision", "fp16", "--recipe", "everything"], 2, "--recipe: needs --precision int8"),
        (["--precision", "fp16", "--thorough"], 2, "--thorough: needs --precision int8"),
    ],
)
def test_an_impossible_conversion_gives_a_one_line_error(
    visionedge: CommandLine,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[list[str], int, str],
) -> None:
    """One picture, twenty times, is one."""
    folder_of(tmp_path / "one", [grey(0)] * 20)
    monkeypatch.chdir(tmp_path)
    arguments, code, words = case
    outcome = visionedge("model", "compile", model, *arguments)
    assert outcome.code == code
    (line,) = outcome.complaints
    assert words in line


def test_a_named_recipe_is_used_at_any_speed(visionedge: CommandLine, model: Path, photos: Path) -> None:
    """The others are timed and reported too; an unknown recipe is reported with the existing ones."""
    arguments = ("model", "compile", model, "--precision", "int8", "--calibrate", photos, "--recipe")
    assert visionedge(*arguments, "everything, behind the first 2").code == 0
    report = json.loads(model.with_name("deep.int8.json").read_bytes())
    assert report["recipe"].startswith("everything, behind the first 2; narrow weights; ranges ")
    assert len(report["tried"]) >= 4
    assert [tried["matched"] is None for tried in report["tried"]] == [False] + [True] * (
        len(report["tried"]) - 1
    )
    outcome = visionedge(*arguments, "magic")
    assert outcome.code == 2
    assert "this model has no 'magic'; it has: " in outcome.complaints[0]
    assert "everything but depthwise" in outcome.complaints[0]


def test_pictures_without_objects_do_not_judge_a_variant(
    visionedge: CommandLine, tmp_path: Path, photos: Path
) -> None:
    """fp32 itself sees too little on them, so that no variant could be refused."""
    blind = deep_detector(SMALL)
    for node in blind.graph.node:
        if node.op_type == "Conv" and node.output[0].startswith("scores."):
            node.input.append("unsure")
    blind.graph.initializer.append(numpy_helper.from_array(np.full(5, -9, np.float32), "unsure"))
    model = tmp_path / "blind.onnx"
    onnx.save(blind, model)
    outcome = visionedge("model", "compile", model, "--precision", "int8", "--calibrate", photos)
    assert outcome.code == 1
    (line,) = outcome.complaints
    assert "at least 10 are needed" in line
    assert "give pictures that show what the model knows" in line


def test_an_int8_model_is_not_converted_again(visionedge: CommandLine, tmp_path: Path, photos: Path) -> None:
    simple = fold_constants(deep_detector(SMALL))
    ranges = dict.fromkeys(list_float_tensors(simple.graph), (-9.0, 9.0))
    model = tmp_path / "integers.onnx"
    onnx.save(quantize(simple, TensorRanges(ranges, {}), QuantizationRecipe()), model)
    outcome = visionedge("model", "compile", model, "--precision", "int8", "--calibrate", photos)
    assert outcome.code == 2
    assert "computes in integers already" in outcome.complaints[0]


def test_with_labels_the_report_has_the_average_precision_of_both(
    visionedge: CommandLine, tmp_path: Path, photos: Path
) -> None:
    """Of the judged pictures, which set no ranges."""
    pytest.importorskip("pycocotools")
    metadata = SMALL.metadata | {"names": json.dumps(LABELS)}
    model = save_deep(
        tmp_path / "deep.onnx", TinyDetector(strides=SMALL.strides, reg_max=SMALL.reg_max, metadata=metadata)
    )
    names = [f"p{number:02}.png" for number in range(16)]
    document = {
        "images": [
            {"id": i, "file_name": name, "width": WIDTH_PX, "height": HEIGHT_PX}
            for i, name in enumerate(names, 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(LABELS, 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 30, 30], "iscrowd": 0, "area": 900}
            for i in range(1, 17)
        ],
    }
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(document))
    outcome = visionedge(
        "model", "compile", model, "--precision", "fp16", "--calibrate", photos, "--labels", labels
    )
    assert outcome.code == 0
    ap = json.loads(model.with_name("deep.fp16.json").read_bytes())["parity"]["ap"]
    assert ap["pictures"] == 16
    assert ap["variant"] == pytest.approx(ap["fp32"], abs=0.01)


def test_the_compiled_graph_of_a_variant_can_be_written_too(
    visionedge: CommandLine, model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fast.onnx"
    outcome = visionedge("model", "compile", model, "--precision", "fp16", "--calibrate", photos, "-o", out)
    assert outcome.code == 0
    assert f"{out}: uint8 [N,48,64,3] BGR -> float32" in outcome.err
    assert onnx.load(out).graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
