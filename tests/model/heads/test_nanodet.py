"""NanoDet as one table: two generations that differ in their centres, and neither is a YOLOX."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures
from tiny_models import TinyDetector, pictures
from tiny_yolos import pieces
from visionedge.errors import ModelError
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX = 128, 64
BINS = 8
MEAN, STD = np.array([103.53, 116.28, 123.675]), np.array([57.375, 57.12, 58.395])
FIRST, PLUS = (8, 16, 32), (8, 16, 32, 64)


def _table(path: Path, strides: tuple[int, ...], classes: int, *, split: bool, named: bool) -> Path:
    """Scores and bins of one convolution, or of two, put side by side for each scale."""
    graph = Graph(11)
    picture = graph.input("data", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    width, maps = classes + 4 * BINS, []
    for stride in strides:
        kernel = graph.noise(16, 3, stride, stride, scale=0.2 / stride)
        seen = graph.add("Conv", picture, kernel, strides=[stride, stride])
        both = graph.add("Conv", seen, graph.noise(width, 16, 1, 1, scale=0.5), graph.noise(width))
        scores, bins = pieces(graph, both, 0, classes, width)
        if not split:
            bins = graph.add("Conv", seen, graph.noise(4 * BINS, 16, 1, 1, scale=0.5))
        joined = graph.add("Concat", graph.add("Sigmoid", scores), bins, axis=1)
        maps.append(graph.add("Reshape", joined, graph.whole(0, width, -1)))
    table = graph.add("Transpose", graph.add("Concat", *maps, axis=2), perm=[0, 2, 1])
    count = sum(WIDTH_PX * HEIGHT_PX // stride**2 for stride in strides)
    graph.output(table, "output", "float32", "n", count, width)
    names = [f"thing {i}" for i in range(classes)]
    return graph.save(path, {"names": json.dumps(names)} if named else {})


def _slow(
    table: NDArray[np.float32], strides: tuple[int, ...], classes: int, offset: float
) -> NDArray[np.float64]:
    places = [(x, y, s) for s in strides for y in range(HEIGHT_PX // s) for x in range(WIDTH_PX // s)]
    rows: list[tuple[float, ...]] = []
    for row, (x, y, stride) in zip(table.astype(np.float64), places, strict=True):
        sides = []
        for bins in row[classes:].reshape(4, BINS):
            weights = np.exp(bins - bins.max())
            sides.append(float(weights @ np.arange(BINS) / weights.sum()) * stride)
        centre_x, centre_y = (x + offset) * stride, (y + offset) * stride
        box = (centre_x - sides[0], centre_y - sides[1], centre_x + sides[2], centre_y + sides[3])
        rows += [(*box, float(score), label) for label, score in enumerate(row[:classes])]
    return by_score(rows)


@pytest.mark.parametrize(("strides", "offset", "fit"), [(FIRST, 0.5, "letterbox"), (PLUS, 0.0, "stretch")])
@pytest.mark.parametrize("classes", [80, 3])
def test_scores_and_bins_may_be_in_one_table(
    tmp_path: Path, strides: tuple[int, ...], offset: float, fit: str, classes: int
) -> None:
    """One convolution made both, or two; the number of classes is COCO's, or named."""
    split, named = classes == 80, classes != 80
    path = _table(tmp_path / "m.onnx", strides, classes, split=split, named=named)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.input.fit) == ("nanodet-joined", classes, fit)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    planes = ((pictures - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    (tables,) = network(path, {"data": np.ascontiguousarray(planes)}).values()
    for rows, table in zip(compiled_rows(model, pictures), tables, strict=True):
        expected = _slow(table, strides, classes, offset)[: len(rows)]
        np.testing.assert_allclose(rows[:, 4], expected[:, 4], atol=1e-4)
        np.testing.assert_allclose(rows[:, :4], expected[:, :4], atol=0.05)
        np.testing.assert_array_equal(rows[:, 5], expected[:, 5])


def test_without_the_number_of_classes_nanodet_is_refused_and_never_read_as_yolox(tmp_path: Path) -> None:
    """Its rows are cells of YOLOX's strides, and a sigmoid is behind it too."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_table(tmp_path / "m.onnx", FIRST, 3, split=True, named=False))


def test_outputs_without_a_batch_are_those_of_one_picture(tmp_path: Path) -> None:
    """Some exporters of NanoDet-m take the batch off: the rows are the same."""
    detector = TinyDetector(batch=1)
    whole = load_model(detector.save(tmp_path / "whole.onnx"))
    proto = onnx.load(whole.path)
    producers = {name: node for node in proto.graph.node for name in node.output}
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "front"))
    for value in proto.graph.output:
        producer = producers[value.name]
        producer.output[list(producer.output).index(value.name)] = f"{value.name}.whole"
        proto.graph.node.append(helper.make_node("Squeeze", [f"{value.name}.whole", "front"], [value.name]))
        del value.type.tensor_type.shape.dim[0]
    onnx.save(proto, tmp_path / "flat.onnx")
    flat = load_model(tmp_path / "flat.onnx")
    assert (flat.head, flat.interpretation.class_count) == (whole.head, whole.interpretation.class_count)
    shots = pictures(1)
    np.testing.assert_allclose(compiled_rows(flat, shots), compiled_rows(whole, shots), rtol=1e-5, atol=1e-4)
