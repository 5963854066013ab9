"""The bundled model through the whole of it: as the slow way has it, and what is on a real picture."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tiny_models import MEAN, STD, nanodet_box
from visionedge.config import InferenceConfig
from visionedge.frames import Picture
from visionedge.inference.detections import Selection
from visionedge.inference.engine import Engine
from visionedge.inference.model import bundled_model_path, load_model
from visionedge.inference.startup import open_engine

SIDE_PX = 416
FLOOR = 0.15


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    opened = open_engine(load_model(bundled_model_path()), InferenceConfig(device="cpu"))
    yield opened
    opened.close()


def photo(shared_data: Path, name: str) -> Picture:
    picture = cv2.imread(str(shared_data / "photos" / name))
    assert picture is not None
    return np.asarray(picture, np.uint8)


def squeezed(picture: Picture) -> Picture:
    return np.asarray(cv2.resize(picture, (SIDE_PX, SIDE_PX)), np.uint8)


def slow_rows(image: Picture) -> NDArray[np.float64]:
    """The bare network on numpy's preparation, and each pair above the floor decoded one by one."""
    session = onnxruntime.InferenceSession(str(bundled_model_path()), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    normal = (image.astype(np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    tensor = normal.transpose(2, 0, 1)[None]
    outputs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: tensor}), strict=True))
    rows = []
    for stride in (8, 16, 32):
        columns = SIDE_PX // stride
        maps = [m[0] for m in outputs.values() if m.shape[1] == columns * columns]
        scores, bins = sorted(maps, key=lambda m: -m.shape[1])
        for cell, class_id in np.argwhere(scores > FLOOR):
            box = nanodet_box(bins[cell].tolist(), cell % columns, cell // columns, stride)
            rows.append((*box, scores[cell, class_id], class_id))
    return np.array(sorted(rows, key=lambda row: -row[4]))


@pytest.mark.shared
def test_its_rows_are_those_of_a_slow_reference(engine: Engine, shared_data: Path) -> None:
    image = squeezed(photo(shared_data, "darknet_dog.jpg"))
    expected = slow_rows(image)
    rows = engine.infer(image[None])[0]
    above = rows[rows[:, 4] > FLOOR]
    assert len(above) == len(expected) > 20
    np.testing.assert_allclose(above[:, 4], expected[:, 4], atol=1e-4)
    np.testing.assert_allclose(above[:20], expected[:20], atol=2e-2)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("astronaut.png", {"person"}),
        ("coffee.png", {"cup"}),
        ("chelsea.png", {"cat"}),
        ("darknet_dog.jpg", {"dog", "bicycle", "car"}),
    ],
)
def test_it_finds_what_is_on_a_picture(
    engine: Engine, shared_data: Path, name: str, labels: set[str]
) -> None:
    picture = photo(shared_data, name)
    height_px, width_px = picture.shape[:2]
    spec = engine.model.input
    place = spec.place(width_px, height_px)
    image = np.full((spec.height_px, spec.width_px, 3), spec.pad, np.uint8)
    left, top, width, height = (
        int(v) for v in (place.left_px, place.top_px, place.width_px, place.height_px)
    )
    image[top : top + height, left : left + width] = cv2.resize(picture, (width, height))
    found = Selection.of(engine.model, 0.35, 0.5).apply(engine.infer(image[None])[0], place)
    assert labels <= {engine.model.labels[i] for i in found.class_ids}
    if name == "darknet_dog.jpg":
        dog = found.boxes[[engine.model.labels[i] for i in found.class_ids].index("dog")]
        pixels = dog * [width_px, height_px, width_px, height_px]
        np.testing.assert_allclose(pixels, [130, 210, 322, 539], atol=16)
