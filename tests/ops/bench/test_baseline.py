"""The baseline: the plain network finds the boxes of the compiled graph, else the comparison is invalid."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny_yolos
from tiny_models import TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.engine.autotune import make_noise_pictures
from visionedge.engine.local_engine import open_engine
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.ops.bench.baseline import PlainNetwork, can_decode

CPU = InferenceConfig(device="cpu")


def nanodet(path: Path) -> Path:
    return TinyDetector().save(path)


def raw_scores(path: Path) -> Path:
    return TinyDetector(sigmoid=False).save(path)


def yolox(path: Path) -> Path:
    return tiny_yolos.yolox(path)


def yolox_decoded(path: Path) -> Path:
    return tiny_yolos.yolox(path, decoded=True)


def yolov8(path: Path) -> Path:
    return tiny_yolos.yolov8(path)


def agree(model: Model) -> int:
    """Compare all candidates above a score; how many there were."""
    picture = make_noise_pictures(model.input, 1)[0]
    network = PlainNetwork(model, threads=1, device="cpu")
    rows = open_engine(model, CPU).infer([picture]).rows[0]
    outputs = network.run(network.tensor(picture))
    np.testing.assert_allclose(network.rows(outputs, len(rows))[:, 4], rows[:, 4], atol=1e-4)
    least = float(np.sort(rows[:, 4])[-20])
    boxes, scores, ids = network.candidates(outputs, least)
    assert len(scores) > 5
    for box, score, class_id in zip(boxes, scores, ids, strict=True):
        same = rows[(rows[:, 5] == class_id) & (np.abs(rows[:, 4] - score) < 1e-4)]
        assert np.abs(same[:, :4] - box).max(axis=1).min() < 0.05, (box, same)
    return len(scores)


@pytest.mark.parametrize("make", [nanodet, raw_scores, yolox, yolox_decoded, yolov8])
def test_numpy_around_the_network_finds_the_boxes_of_the_compiled_graph(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = load_model(make(tmp_path / "model.onnx"))
    assert can_decode(model)
    assert agree(model) > 5


def test_numpy_around_the_bundled_model_finds_the_boxes_of_its_compiled_graph() -> None:
    assert agree(load_model(find_bundled_model())) > 5


@pytest.mark.shared
@pytest.mark.parametrize("name", ["yolox_nano_416_coco80", "picodet_s_416_coco80"])
def test_numpy_around_real_models_finds_the_boxes_of_their_compiled_graphs(
    name: str, shared_data: Path
) -> None:
    assert agree(load_model(shared_data / "models" / f"{name}.onnx")) > 5


def test_a_network_with_another_input_type_has_no_numpy_baseline(tmp_path: Path) -> None:
    assert not can_decode(load_model(TinyDetector(layout="NHWC").save(tmp_path / "nhwc.onnx")))
    assert not can_decode(load_model(TinyDetector(batch=4).save(tmp_path / "four.onnx")))
