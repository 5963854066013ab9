"""Nodes in any order, as onnxruntime takes them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tiny_graphs import compiled_rows, noise_pictures
from tiny_yolos import HEIGHT_PX, WIDTH_PX, yolov8
from visionedge.model.graph import sort_nodes
from visionedge.model.model import load_model


def _shuffled(path: Path, seed: int) -> None:
    proto = onnx.load(path)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes[i] for i in np.random.default_rng(seed).permutation(len(nodes)))
    onnx.save(proto, path)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_model_is_the_same_in_any_order_of_its_nodes(tmp_path: Path, seed: int) -> None:
    """Converters to float16 are known to write their casts behind all that uses them."""
    path = yolov8(tmp_path / "m.onnx")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    before = compiled_rows(load_model(path), pictures)
    _shuffled(path, seed)
    np.testing.assert_array_equal(compiled_rows(load_model(path), pictures), before)


def _graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    return helper.make_graph(list(nodes), "g", [x], [])


def _order(graph: onnx.GraphProto) -> list[str]:
    sort_nodes(graph)
    return [node.output[0] for node in graph.node]


def test_nodes_keep_their_order_as_far_as_possible() -> None:
    late = helper.make_node("Relu", ["b"], ["c"])
    nodes = [helper.make_node("Relu", ["x"], [name]) for name in ("z", "b", "a")]
    assert _order(_graph(*nodes)) == ["z", "b", "a"]
    assert _order(_graph(nodes[0], late, nodes[1], nodes[2])) == ["z", "b", "c", "a"]


def test_outer_values_of_a_branch_come_before_it() -> None:
    branch = _graph(helper.make_node("Relu", ["outside"], ["y"]))
    choice = helper.make_node("If", ["x"], ["r"], then_branch=branch, else_branch=branch)
    made = helper.make_node("Relu", ["x"], ["outside"])
    assert _order(_graph(choice, made)) == ["outside", "r"]


def test_a_cycle_is_left_unchanged() -> None:
    first, second = helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])
    assert _order(_graph(first, second)) == ["a", "b"]
