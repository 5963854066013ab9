"""The bundled model through the whole of it: as the slow way has it, and what is on a real picture."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from visionedge.config.schema import InferenceConfig
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.frames.types import Picture
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.postprocess import Selection

SIDE_PX = 416
FLOOR = 0.15


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    opened = open_engine(load_model(find_bundled_model()), InferenceConfig(device="cpu"))
    yield opened
    opened.close()


def photo(shared_data: Path, name: str) -> Picture:
    picture = cv2.imread(str(shared_data / "photos" / name))
    assert picture is not None
    return np.asarray(picture, np.uint8)


def squeezed(picture: Picture) -> Picture:
    return np.asarray(cv2.resize(picture, (SIDE_PX, SIDE_PX)), np.uint8)


def slow_rows(image: Picture) -> NDArray[np.float64]:
    """The bare network on the picture as it is, and each cell above the floor decoded one by one."""
    session = onnxruntime.InferenceSession(str(find_bundled_model()), providers=["CPUExecutionProvider"])
    tensor = image.astype(np.float32).transpose(2, 0, 1)[None]
    (table,) = session.run(None, {"images": tensor})[0]
    rows, first = [], 0
    for stride in (8, 16, 32):
        columns = SIDE_PX // stride
        grid = table[first : first + columns * columns].astype(np.float64)
        first += columns * columns
        scores = grid[:, 4:5] * grid[:, 5:]
        for cell in np.flatnonzero(scores.max(axis=1) > FLOOR):  # a cell counts once, as its best class
            class_id = scores[cell].argmax()
            x, y, log_width, log_height = grid[cell, :4]
            x, y = (x + cell % columns) * stride, (y + cell // columns) * stride
            width, height = np.exp(log_width) * stride, np.exp(log_height) * stride
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            rows.append((*box, scores[cell, class_id], class_id))
    return np.array(sorted(rows, key=lambda row: -row[4]))


@pytest.mark.shared
def test_the_rows_of_the_bundled_model_equal_a_slow_reference(engine: LocalEngine, shared_data: Path) -> None:
    image = squeezed(photo(shared_data, "darknet_dog.jpg"))
    expected = slow_rows(image)
    rows = engine.infer(image[None]).rows[0]
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
def test_the_bundled_model_finds_the_objects_of_a_picture(
    engine: LocalEngine, shared_data: Path, name: str, labels: set[str]
) -> None:
    picture = photo(shared_data, name)
    height_px, width_px = picture.shape[:2]
    model = engine.info().model
    spec = model.input
    place = spec.place(width_px, height_px)
    image = np.full((spec.height_px, spec.width_px, 3), spec.pad, np.uint8)
    left, top, width, height = (
        int(v) for v in (place.left_px, place.top_px, place.width_px, place.height_px)
    )
    image[top : top + height, left : left + width] = cv2.resize(picture, (width, height))
    found = Selection.of(model, 0.35, 0.5).apply(engine.infer(image[None]).rows[0], place)
    assert labels <= {model.labels[i] for i in found.class_ids}
    if name == "darknet_dog.jpg":
        dog = found.boxes[[model.labels[i] for i in found.class_ids].index("dog")]
        pixels = dog * [width_px, height_px, width_px, height_px]
        np.testing.assert_allclose(pixels, [133, 207, 326, 543], atol=16)
