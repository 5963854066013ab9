"""PaddleDetection's exports without their last nodes, as both generations of paddle2onnx write them.

The newer one names no producer and leaves out Paddle's domain of operators.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tiny_graphs import compiled_rows, network, noise_pictures, state
from tiny_models import TinyDetector, pictures
from tiny_yolos import HEIGHT_PX, WIDTH_PX, best_of, yolov8
from visionedge.errors import ModelError
from visionedge.model.model import load_model

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
GRAPHS = ["PaddlePaddle Graph 0", "PaddlePaddle Graph in PIR mode"]


def _named(path: Path, name: str) -> Path:
    """The model at a path, with that name for its graph."""
    proto = onnx.load(path)
    proto.graph.name, proto.producer_name = name, ""
    onnx.save(proto, path)
    return path


def _write_paddle_config(path: Path) -> None:
    """`infer_cfg.yml` beside a model, as its exporter writes it (JSON is YAML)."""
    steps = [
        {"type": "Resize", "interp": 2, "keep_ratio": False, "target_size": [HEIGHT_PX, WIDTH_PX]},
        {"type": "NormalizeImage", "is_scale": True, "mean": MEAN, "std": STD},
        {"type": "Permute"},
    ]
    path.with_name("infer_cfg.yml").write_text(json.dumps({"arch": "YOLO", "Preprocess": steps}))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_bare_ppyoloe_is_preprocessed_as_its_export_file_states(tmp_path: Path, name: str) -> None:
    """Its table is that of a YOLOv9 that gives corners."""
    path = _named(yolov8(tmp_path / "m.onnx", corners=True, columns=False), name)
    _write_paddle_config(path)
    model = load_model(path)
    assert (model.head, model.input.fit) == ("yolov8", "stretch")
    shots = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    planes = ((shots[..., ::-1] / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    (tables,) = network(path, {"images": np.ascontiguousarray(planes)}).values()
    for rows, table in zip(compiled_rows(model, shots), tables, strict=True):
        wanted = best_of(((x, y, right, bottom), scores) for x, y, right, bottom, *scores in table.tolist())
        np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-3)


def test_a_bare_ppyoloe_without_its_export_file_is_refused_unless_its_scaling_is_stated(tmp_path: Path) -> None:
    path = _named(yolov8(tmp_path / "m.onnx", corners=True, columns=False), GRAPHS[1])
    with pytest.raises(ModelError, match=r"infer_cfg\.yml of its export beside it"):
        load_model(path)
    state(path, input={"scale": 1 / 255, "mean": MEAN, "std": STD})
    way = load_model(path).interpretation.preprocess
    assert (way.fit, way.mean) == ("stretch", tuple(MEAN))


def test_the_export_file_of_another_model_is_not_used_for_a_yolo_in_its_folder(tmp_path: Path) -> None:
    path = yolov8(tmp_path / "m.onnx", corners=True, columns=False)
    _write_paddle_config(path)
    assert load_model(path).input.fit == "letterbox"


def _rooted(detector: TinyDetector, path: Path) -> Path:
    """A detector whose scores are the root of a product of two sigmoids (here of the same values)."""
    proto = detector.proto()
    proto.graph.name = GRAPHS[1]
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        proto.graph.node.append(node)
        if node.op_type == "Sigmoid":
            made = node.output[0]
            proto.graph.node[-1].output[0] = f"{made}.one"
            proto.graph.node.append(helper.make_node("Mul", [f"{made}.one"] * 2, [f"{made}.two"]))
            proto.graph.node.append(helper.make_node("Sqrt", [f"{made}.two"], [made]))
    onnx.save(proto, path)
    return path


def test_scores_of_the_second_picodet_get_no_further_sigmoid(tmp_path: Path) -> None:
    """They are the root of a product: of whether there is a thing, and of which."""
    detector = TinyDetector(metadata={}, strides=(8, 16, 32, 64), producer="")
    model = load_model(_rooted(detector, tmp_path / "two.onnx"))
    assert (model.head, model.interpretation.class_count) == ("picodet", detector.classes)
    assert "a sigmoid made the scores" in model.evidence
    plain = load_model(_named(detector.save(tmp_path / "one.onnx"), GRAPHS[0]))
    shots = pictures(2)
    np.testing.assert_allclose(compiled_rows(model, shots), compiled_rows(plain, shots), rtol=1e-4, atol=1e-3)
