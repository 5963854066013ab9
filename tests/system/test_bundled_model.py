"""The files this repository ships for people who have no model and no camera yet: they are what they say."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from repository_paths import SHARED
from visionedge.config.schema import InferenceConfig
from visionedge.engine.local_engine import open_engine
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Picture
from visionedge.model.labels import COCO_80
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.postprocess import Selection
from visionedge.model.quantization.variants import find_variants

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = REPOSITORY / "models"
MEDIA = REPOSITORY / "media"
MODEL = MODELS / "yolox-nano-416.onnx"
LABELS = MODELS / "yolox-nano-416.labels.txt"
CARD = MODELS / "yolox-nano-416.md"
PHOTOS = SHARED / "photos"

FILE_ROW = re.compile(r"\| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|")

Boxes = NDArray[np.float64]
Found = list[tuple[str, float, Boxes]]


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    """The bundled model, loaded as it is, on the CPU."""
    return ort.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])


def labels() -> list[str]:
    return LABELS.read_text(encoding="utf-8").splitlines()


def listed_files() -> Iterator[tuple[Path, int, str]]:
    """Every row of a file table: name, bytes, sha256."""
    for document in (CARD, MEDIA / "NOTICE.md"):
        for row in document.read_text(encoding="utf-8").splitlines():
            if (match := FILE_ROW.fullmatch(row)) is None:
                continue
            name, size_bytes, sha256 = match.groups()
            yield document.parent / name, int(size_bytes), sha256


# The files


def test_the_documents_list_the_existing_files() -> None:
    """Size and sha256 in the model card and in the clip's notice are those of the files."""
    listed = list(listed_files())
    assert {path.name for path, _, _ in listed} == {MODEL.name, LABELS.name, "demo.mp4"}
    for path, size_bytes, sha256 in listed:
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size_bytes, sha256), path.name


def test_the_bundled_model_is_the_published_file() -> None:
    """Its sum is that of the published file: nothing was converted or added."""
    published = "695e750a5d5754bb5a8d5325643b59282191a7e7a564e435a415fd3c578eab14"
    assert hashlib.sha256(find_bundled_model().read_bytes()).hexdigest() == published


def test_every_file_in_the_models_folder_is_described() -> None:
    """The card lists the model's files; beside them lie the card, the README and the licence only."""
    listed = {path.name for path, _, _ in listed_files()}
    there = {path.name for path in MODELS.rglob("*") if path.is_file()}
    assert there - listed == {"README.md", CARD.name, "YOLOX-Apache-2.0.txt"}


def test_the_files_are_small_enough_for_a_repository() -> None:
    """The model stays within 4 MB and the clip within 1.5 MB."""
    assert MODEL.stat().st_size <= 4_000_000
    assert (MEDIA / "demo.mp4").stat().st_size <= 1_500_000


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("models/LICENSES/YOLOX-Apache-2.0.txt", "Copyright (c) 2021-2022 Megvii Inc."),
        (
            "media/LICENSES/OpenCV-Apache-2.0.txt",
            "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
        ),
        ("media/LICENSES/OpenCV-BSD-3-Clause.txt", "Copyright 2015-2022, OpenCV Foundation"),
    ],
)
def test_the_licences_of_the_shipped_files_exist(path: str, sentence: str) -> None:
    """Each work that the model and the clip are made of has its licence beside it."""
    assert sentence in (REPOSITORY / path).read_text(encoding="utf-8")


# The model


def test_the_bundled_model_has_the_80_labels_of_coco_in_order() -> None:
    """The file beside the model says what is assumed of any model with 80 classes."""
    assert labels() == list(COCO_80)
    assert list(load_model(MODEL).labels) == labels()


def test_the_bundled_model_is_interpreted_as_its_card_states() -> None:
    """Head, colours, scaling and letterbox are those of the card."""
    model = load_model(MODEL)
    wanted, preprocess = model.input, model.interpretation.preprocess
    assert (model.name, model.head) == ("yolox-nano-416", "yolox")
    assert (wanted.width_px, wanted.height_px, wanted.fit) == (416, 416, "letterbox")
    assert (wanted.anchor, wanted.pad) == ("top-left", 114)
    assert (preprocess.color, preprocess.scale) == ("bgr", 1.0)
    card = " ".join(CARD.read_text(encoding="utf-8").split())
    assert "the rest is grey 114" in card
    assert "lies at the top left" in card


def test_input_and_output_have_the_shapes_of_the_model_card(session: ort.InferenceSession) -> None:
    (source,), (output,) = session.get_inputs(), session.get_outputs()
    assert (source.name, source.shape) == ("images", [1, 3, 416, 416])
    assert (output.name, output.shape) == ("output", [1, 3549, 85])
    card = CARD.read_text(encoding="utf-8")
    assert "`images`, float32 `[1, 3, 416, 416]`" in card
    assert "`output`, float32 `[1, 3549, 85]`" in card


def test_the_bundled_model_exists_only_in_fp32() -> None:
    """No variant lies beside it: none is faster on the processors that were tried."""
    assert find_variants(load_model(MODEL)) == ()
    assert {tensor.data_type for tensor in onnx.load(MODEL).graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }


# What it sees: a decoder of its own, one cell at a time, slow and easy to follow


def letterbox(picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    """The network's input, and the scale to come back from it."""
    height_px, width_px = picture.shape[:2]
    scale = 416 / max(height_px, width_px)
    size = (int(width_px * scale), int(height_px * scale))
    canvas = np.full((416, 416, 3), 114, np.float32)
    canvas[: size[1], : size[0]] = cv2.resize(picture, size)
    return canvas.transpose(2, 0, 1)[np.newaxis], scale


def cells() -> list[tuple[int, int, int]]:
    """(column, row, stride) of each of the 3549 rows."""
    return [
        (column, row, stride_px)
        for stride_px in (8, 16, 32)
        for row in range(416 // stride_px)
        for column in range(416 // stride_px)
    ]


def cell_box(offsets: NDArray[np.float32], cell: tuple[int, int, int]) -> Boxes:
    """The box of one cell, in input pixels."""
    column, row, stride_px = cell
    x, y, log_width, log_height = offsets.astype(np.float64)
    center = np.array([x + column, y + row])
    half = np.exp([log_width, log_height]) / 2
    return np.concatenate([center - half, center + half]) * stride_px


def iou(first: Boxes, second: Boxes) -> float:
    """The common part of two boxes by what they cover together."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    common = float(np.prod(np.maximum(sides, 0)))
    areas = float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]))
    return common / (areas - common)


def detect(session: ort.InferenceSession, path: Path) -> Found:
    """What the model sees in a picture, best first, in the picture's pixels."""
    picture = cv2.imread(str(path))
    assert picture is not None
    tensor, scale = letterbox(picture.astype(np.uint8))
    (rows,) = session.run(None, {"images": tensor})[0]
    candidates: Found = []
    for row, cell in zip(rows, cells(), strict=True):
        for number in np.flatnonzero(row[4] * row[5:] > 0.4):
            score = float(row[4] * row[5 + number])
            candidates.append((labels()[number], score, cell_box(row[:4], cell) / scale))
    kept: Found = []
    for label, score, box in sorted(candidates, key=lambda candidate: -candidate[1]):
        if all(label != other or iou(box, taken) < 0.5 for other, _, taken in kept):
            kept.append((label, score, box))
    return kept


class ExpectedObject(NamedTuple):
    """A thing that is to be found in a photograph: looked at, and measured off the picture."""

    photo: str
    label: str
    score: float
    box: tuple[int, int, int, int]


@pytest.mark.shared
@pytest.mark.usefixtures("shared_data")
@pytest.mark.parametrize(
    "sight",
    [
        ExpectedObject("astronaut.png", "person", 0.93, (11, 20, 369, 507)),
        ExpectedObject("coffee.png", "cup", 0.90, (162, 16, 421, 295)),
        ExpectedObject("darknet_dog.jpg", "dog", 0.86, (133, 207, 326, 543)),
        ExpectedObject("darknet_dog.jpg", "bicycle", 0.80, (52, 137, 572, 424)),
        ExpectedObject("darknet_dog.jpg", "car", 0.80, (466, 78, 692, 171)),
        ExpectedObject("darknet_person.jpg", "horse", 0.88, (403, 138, 603, 344)),
    ],
)
def test_the_bundled_model_finds_the_objects_of_a_photograph(session: ort.InferenceSession, expected: ExpectedObject) -> None:
    """Label, score and box of the plain things in a photograph are the known ones."""
    rows = detect(session, PHOTOS / expected.photo)
    found = [row for row in rows if row[0] == expected.label]
    assert found, f"no {expected.label}"
    assert found[0][1] == pytest.approx(expected.score, abs=0.02)
    assert iou(found[0][2], np.array(expected.box, np.float64)) > 0.95


def clip_pictures(every: int) -> Iterator[Picture]:
    """Every so many pictures of the bundled clip."""
    clip = cv2.VideoCapture(str(MEDIA / "demo.mp4"))
    number = 0
    while (answer := clip.read())[0]:
        if number % every == 0:
            yield np.asarray(answer[1], np.uint8)
        number += 1


def test_the_bundled_model_finds_only_people_and_vehicles_on_the_clip() -> None:
    """At the confidence that the demo takes; a first look shows no sheep, no bird and no ball."""
    model = load_model(MODEL)
    seen: Counter[str] = Counter()
    engine = open_engine(model, InferenceConfig(device="cpu"))
    try:
        chosen = Selection.of(model, 0.4, 0.5)
        for picture in clip_pictures(every=4):
            image, placement = fit_to_input(picture, model.input)
            found = chosen.apply(engine.infer(image[None]).rows[0], placement)
            seen.update(model.labels[number] for number in found.class_ids)
    finally:
        engine.close()
    assert seen.keys() == {"person", "car", "truck"}
    assert (seen["car"], seen["truck"]) == (126, 63)  # two parked cars and a van, all the time
    assert 400 < seen["person"] < 550


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


def test_the_clip_can_be_streamed() -> None:
    """The index of the MP4 comes before its pictures."""
    content = (MEDIA / "demo.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")
