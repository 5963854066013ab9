"""Exports for NVIDIA's DeepStream: corners, best score and its class of each cell, in one table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from tiny_yolos import CLASSES, HEIGHT_PX, WIDTH_PX, cell_constants, cells, flat, grids, pieces, scores_map
from visionedge.errors import ModelError
from visionedge.model.model import load_model

TO_CORNERS = [[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]]


def _deepstream(path: Path, *, converted: bool = True, exponential: bool = False, **model: Any) -> Path:
    """A YOLO with what its DeepStream exporter puts behind it."""
    graph = Graph(13)
    picture = graph.input("input", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    sides = graph.add(
        "Concat", *(flat(graph, scores_map(graph, picture, 4, s), 4) for s, *_ in grids()), axis=2
    )
    logits = [flat(graph, scores_map(graph, picture, CLASSES, s), CLASSES) for s, *_ in grids()]
    near, far = pieces(graph, graph.add("Exp" if exponential else "Abs", sides), 0, 2, 4)
    cell, stride = cell_constants(graph)
    middle = graph.add("Add", cell, graph.constant(0.5))
    halves = (
        (middle, graph.add("Add", near, far))
        if converted
        else (graph.add("Sub", middle, near), graph.add("Add", middle, far))
    )
    boxes = graph.add("Mul", graph.add("Concat", *halves, axis=1), stride)
    boxes = graph.add("Transpose", boxes, perm=[0, 2, 1])
    if converted:
        boxes = graph.add("MatMul", boxes, graph.constant(TO_CORNERS))
    scores = graph.add(
        "Transpose", graph.add("Sigmoid", graph.add("Concat", *logits, axis=2)), perm=[0, 2, 1]
    )
    best = graph.add("ReduceMax", scores, axes=[2], keepdims=1)
    label = graph.add("Cast", graph.add("ArgMax", scores, axis=2, keepdims=1), to=1)
    graph.output(graph.add("Concat", boxes, best, label, axis=2), "output", "float32", 1, len(cells()), 6)
    return graph.save(path, **model)


def _rgb(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray((pictures[..., ::-1] / 255).transpose(0, 3, 1, 2).astype(np.float32))


def test_each_cell_is_a_row_and_boxes_still_overlap(tmp_path: Path) -> None:
    """Unlike a list that the graph chose: so they are suppressed here."""
    path = _deepstream(tmp_path / "m.onnx")
    model = load_model(path)
    assert (model.head, model.interpretation.needs_nms, model.interpretation.preprocess.scale) == (
        "deepstream-yolo",
        True,
        1 / 255,
    )
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures)[0]
    given = network(path, {"input": _rgb(pictures)})["output"][0]
    np.testing.assert_allclose(rows, by_score([tuple(row) for row in given.tolist()]), rtol=1e-4, atol=1e-3)


def test_ultralytics_metadata_does_not_imply_a_finished_list(tmp_path: Path) -> None:
    """Nobody chose its rows: read as a list, each thing would be found many times."""
    metadata = {"author": "Ultralytics", "task": "detect"}
    assert load_model(_deepstream(tmp_path / "m.onnx", metadata=metadata)).interpretation.needs_nms


@pytest.mark.parametrize("how", [{"converted": False}, {"exponential": True}])
def test_other_families_need_stated_preprocessing(tmp_path: Path, how: dict[str, bool]) -> None:
    """PP-YOLOE, YOLO-NAS and YOLOX have such exports too, and are prepared otherwise."""
    path = _deepstream(tmp_path / "m.onnx", **how)
    with pytest.raises(ModelError, match="state input"):
        load_model(path)
    state(path, input={"color": "bgr", "scale": 1, "fit": "letterbox"})
    assert load_model(path).interpretation.preprocess.color == "bgr"
