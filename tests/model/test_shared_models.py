"""Four real models on labelled pictures: as well through the compiled graph as by their plain recipes.

Each recipe is written out here in numpy, from the picture's file to boxes in its pixels, and shares nothing
with the module: not the fitting, not the decoding, not the suppression.
"""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from visionedge.frames.letterbox import fit_to_input
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection
from visionedge.model.quantization.int8 import open_cpu_session
from visionedge.ops.models.evaluate import (
    Annotations,
    CocoDetection,
    compute_average_precision,
    match_categories,
    read_annotations,
)

pytestmark = pytest.mark.shared

PICTURES = 12
FLOOR, IOU = 0.01, 0.5
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

Array = NDArray[Any]
Recipe = Callable[[onnxruntime.InferenceSession, Array], Array]
"""A network and a picture (BGR): rows of left, top, right, bottom (the picture's pixels), score, class."""


@dataclass(frozen=True)
class LabelledPictures:
    """The first pictures of coco128 and their annotations."""

    annotations: Annotations
    pictures: dict[int, Array]


@pytest.fixture(scope="module")
def labelled(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelledPictures:
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("coco128")
    with tarfile.open(shared_data / "labelled" / "coco128.tar.gz") as archive:
        members = {member.name: member for member in archive.getmembers()}
        archive.extract(members["annotations/instances_val2017.json"], folder, filter="data")
        annotations = read_annotations(folder / "annotations" / "instances_val2017.json")
        pictures = {}
        for photo in annotations.photos[:PICTURES]:
            file = archive.extractfile(members[f"val2017/{photo.file}"])
            assert file is not None
            picture = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            pictures[photo.number] = picture
    return LabelledPictures(annotations, pictures)


# --- the recipes --------------------------------------------------------------------------------------------


def suppressed(rows: Array) -> Array:
    """Greedy among the best thousand: the first stays, and all of its class that overlap it go away."""
    left, kept = rows[np.argsort(-rows[:, 4], kind="stable")[:1000]], []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[(left[:, 5] != best[5]) | (overlaps(best, left) <= IOU)]
    return np.array(kept).reshape(-1, 6)


def overlaps(a: Array, others: Array) -> Array:
    width = np.minimum(a[2], others[:, 2]) - np.maximum(a[0], others[:, 0])
    height = np.minimum(a[3], others[:, 3]) - np.maximum(a[1], others[:, 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    shares: Array = common / ((a[2] - a[0]) * (a[3] - a[1]) + areas - common)
    return shares


def flat(boxes: Array, scores: Array) -> Array:
    """Boxes (n, 4) and scores (n, classes) as rows, one for each pair above the floor."""
    places, classes = np.nonzero(scores >= FLOOR)
    return np.column_stack([boxes[places], scores[places, classes], classes])


def yolox(session: onnxruntime.InferenceSession, picture: Array) -> Array:
    height, width = picture.shape[:2]
    scale = 416 / max(height, width)
    small = cv2.resize(picture, (round(width * scale), round(height * scale)))
    canvas = np.full((416, 416, 3), 114, np.float32)
    canvas[: small.shape[0], : small.shape[1]] = small
    table = session.run(None, {session.get_inputs()[0].name: canvas.transpose(2, 0, 1)[None]})[0][0]
    boxes, start = np.zeros((len(table), 4)), 0
    for stride in (8, 16, 32):
        side = 416 // stride
        for row in range(side):
            part = slice(start + row * side, start + (row + 1) * side)
            x = (table[part, 0] + np.arange(side)) * stride
            y = (table[part, 1] + row) * stride
            half = np.exp(table[part, 2:4].astype(np.float64)) * stride / 2
            boxes[part] = np.stack([x - half[:, 0], y - half[:, 1], x + half[:, 0], y + half[:, 1]], 1)
        start += side * side
    return suppressed(flat(boxes / scale, table[:, 4:5] * table[:, 5:]))


def picodet(session: onnxruntime.InferenceSession, picture: Array) -> Array:
    height, width = picture.shape[:2]
    rgb = cv2.resize(picture, (416, 416))[..., ::-1] / 255
    tensor = ((rgb - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
    maps = session.run(None, {session.get_inputs()[0].name: tensor})
    rows = []
    for stride in (8, 16, 32, 64):
        side = -(-416 // stride)
        scores, bins = sorted((m[0] for m in maps if m.shape[1] == side * side), key=lambda m: -m.shape[1])
        y, x = ((np.indices((side, side)).reshape(2, -1) + 0.5) * stride)[:, :, None]
        powers = np.exp(bins.reshape(-1, 4, 8).astype(np.float64))
        away = (powers / powers.sum(2, keepdims=True)) @ np.arange(8) * stride
        boxes = np.concatenate([x - away[:, :1], y - away[:, 1:2], x + away[:, 2:3], y + away[:, 3:]], 1)
        rows.append(flat(boxes * ([width / 416, height / 416] * 2), scores))
    return suppressed(np.concatenate(rows))


def deim(session: onnxruntime.InferenceSession, picture: Array) -> Array:
    height, width = picture.shape[:2]
    # Its own script resizes with Pillow, which antialiases.
    small = Image.fromarray(np.ascontiguousarray(picture[..., ::-1])).resize(
        (416, 416), Image.Resampling.BILINEAR
    )
    rgb = np.asarray(small).astype(np.float32) / 255
    feeds = {"images": rgb.transpose(2, 0, 1)[None], "orig_target_sizes": np.array([[width, height]])}
    names = [output.name for output in session.get_outputs()]
    out = dict(zip(names, session.run(None, feeds), strict=True))
    return np.column_stack([out["boxes"][0], out["scores"][0], out["labels"][0]])


def ssd(session: onnxruntime.InferenceSession, picture: Array) -> Array:
    height, width = picture.shape[:2]
    rgb = cv2.resize(picture, (300, 300))[None, ..., ::-1]
    boxes, classes, scores, count = session.run(
        None, {session.get_inputs()[0].name: np.ascontiguousarray(rgb)}
    )
    corners = boxes[0][:, [1, 0, 3, 2]] * ([width, height] * 2)
    return np.column_stack([corners, scores[0], classes[0]])[: int(count[0])]


RECIPES: dict[str, Recipe] = {
    "yolox_nano_416_coco80": yolox,
    "picodet_s_416_coco80": picodet,
    "deimv2_hgnetv2_femto_416_coco80": deim,
    "ssd_mobilenet_v1_300_tfod4out_coco90": ssd,
}


# --- what is compared ---------------------------------------------------------------------------------------


def ap(rows: dict[int, Array], labelled: LabelledPictures, categories: dict[int, int]) -> float:
    """Average precision of rows by picture; boxes are cut to it, 100 are the most."""
    found = []
    for number, table in rows.items():
        height, width = labelled.pictures[number].shape[:2]
        for left, top, right, bottom, score, kind in table[np.argsort(-table[:, 4], kind="stable")][:100]:
            if score >= FLOOR and int(kind) in categories:
                x, y = np.clip([left, right], 0, width), np.clip([top, bottom], 0, height)
                place = (float(x[0]), float(y[0]), float(x[1] - x[0]), float(y[1] - y[0]))
                found.append(CocoDetection(number, categories[int(kind)], place, float(score)))
    figure = compute_average_precision(labelled.annotations, list(rows), found)["ap"]
    assert figure is not None
    return figure


@pytest.mark.parametrize("name", RECIPES)
def test_the_compiled_graph_is_as_accurate_as_the_reference_code_of_the_model(
    shared_data: Path, labelled: LabelledPictures, name: str
) -> None:
    """COCO AP within 0.005, on pictures that are not easy: AP is between 0.2 and 0.7."""
    path = shared_data / "models" / f"{name}.onnx"
    model = load_model(path)
    bare = open_cpu_session(path.read_bytes(), exact=False, threads=1)
    compiled = open_cpu_session(compile_model(model), exact=False, threads=1)
    selection = Selection.of(model, FLOOR, IOU)
    slow, ours = {}, {}
    for number, picture in labelled.pictures.items():
        slow[number] = RECIPES[name](bare, picture)
        image, placement = fit_to_input(picture, model.input)
        rows = compiled.run(None, {compiled.get_inputs()[0].name: image[None]})[0][0]
        seen = selection.apply(rows, placement)
        height, width = picture.shape[:2]
        ours[number] = np.column_stack([seen.boxes * ([width, height] * 2), seen.scores, seen.class_ids])
    categories = match_categories(model.labels, labelled.annotations)
    expected, found = (ap(rows, labelled, categories) for rows in (slow, ours))
    assert 0.2 < expected < 0.7
    assert found == pytest.approx(expected, abs=0.005)
