"""Shapes that a graph computes from that of its input are found, as an export with open sides has them."""

from pathlib import Path

import onnx
import pytest

from tiny_graphs import Graph
from visionedge.model.analysis.shape_inference import infer_node_by_node, read_shape
from visionedge.model.analysis.signature import read_signature


def output_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The shapes of the outputs that are known."""
    types = infer_node_by_node(model)
    shapes = {output.name: read_shape(types.get(output.name)) for output in model.graph.output}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _flattened(path: Path, opset: int, *, height: int | str = 64) -> onnx.ModelProto:
    """[N, 9, rows, columns] as [N, cells, 9], by asking for the shape, and the cells themselves."""
    graph = Graph(opset)
    picture = graph.input("images", "float32", "n", 3, height, 96)
    made = graph.add("Conv", picture, graph.noise(9, 3, 8, 8), strides=[8, 8])
    shape = graph.add("Shape", made)
    head = graph.add("Slice", shape, graph.whole(0), graph.whole(2), graph.whole(0))
    target = graph.add("Concat", head, graph.whole(-1), axis=0)
    table = graph.add("Transpose", graph.add("Reshape", made, target), perm=[0, 2, 1])
    graph.output(table, "table", "float32", "n", "cells", "width")
    sides = [graph.add("Squeeze", graph.add("Gather", shape, graph.whole(axis))) for axis in (2, 3)]
    zero, one = (graph.add("Squeeze", graph.whole(number)) for number in (0, 1))
    rows, columns = (graph.add("Range", zero, side, one) for side in sides)
    # What takes its axes as an attribute up to opset 12 takes them as an input from 13 on.
    if opset < 13:
        rows = graph.add("Unsqueeze", rows, axes=[1])
        length = graph.add("Unsqueeze", sides[1], axes=[0])
    else:
        rows = graph.add("Unsqueeze", rows, graph.whole(1))
        length = graph.add("Unsqueeze", sides[1], graph.whole(0))
    spread = graph.add("Expand", rows, graph.add("Concat", graph.whole(1), length, axis=0))
    places = graph.add("Add", graph.add("Mul", spread, sides[1]), columns)
    graph.output(graph.add("Reshape", places, graph.whole(1, -1)), "places", "int64", "one", "cells")
    return onnx.load(graph.save(path))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_output_sizes_follow_from_the_input_size(tmp_path: Path, opset: int) -> None:
    model = _flattened(tmp_path / "m.onnx", opset)
    assert output_shapes(model) == {"table": (1, 96, 9), "places": (1, 96)}


def test_an_open_batch_dimension_stays_open(tmp_path: Path) -> None:
    outputs = {t.name: t.shape for t in read_signature(_flattened(tmp_path / "m.onnx", 13)).outputs}
    assert outputs == {"table": (None, 96, 9), "places": (1, 96)}


def test_an_open_size_is_fixed_before_shape_inference(tmp_path: Path) -> None:
    model = _flattened(tmp_path / "m.onnx", 13, height="h")
    stated = {"visionedge.input": '{"height": 160}'}
    assert read_signature(model, stated).outputs[0].shape == (None, 240, 9)
    assert model.graph.input[0].type.tensor_type.shape.dim[2].dim_param == "h"


def test_data_dependent_sizes_stay_open(tmp_path: Path) -> None:
    graph = Graph(13)
    picture = graph.input("images", "float32", 1, 3, 8, 8)
    graph.output(graph.add("NonZero", picture), "bright", "int64", 4, "found")
    model = onnx.load(graph.save(tmp_path / "m.onnx"))
    assert output_shapes(model) == {"bright": (4, None)}


def test_an_operator_of_another_domain_ends_shape_inference(tmp_path: Path) -> None:
    model = _flattened(tmp_path / "m.onnx", 13)
    next(node for node in model.graph.node if node.op_type == "Conv").domain = "somewhere.else"
    assert output_shapes(model) == {}
