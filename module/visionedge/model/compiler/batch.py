"""A network whose batch was fixed at one, opened to any number of pictures.

Exporters write the one into shapes all over a graph. Here it is taken out again where it can stand for the
batch; that this is right is never assumed: `first_run` computes several pictures at once and one by one.
"""

import itertools

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from visionedge.errors import ModelError
from visionedge.model.analysis.shape_inference import infer

# How many values these give depends on the pictures, so several of them do not stack.
UNSTACKABLE = frozenset(
    {"NonMaxSuppression", "NonZero", "Unique", "Compress", "If", "Loop", "Scan", "SequenceConstruct"}
    | {"SplitToSequence", "ConcatFromSequence", "SequenceInsert", "SequenceEmpty"}
)

OPEN = "N"


def opened(network: onnx.ModelProto) -> onnx.ModelProto | str:
    """A copy that may take any number of pictures, or why there can be none, in words."""
    operators = sorted({node.op_type for node in network.graph.node} & UNSTACKABLE)
    if operators:
        return f"its {operators[0]} gives another number of values for each picture"
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    graph = copy.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_value != 1:
            return f"its input '{value.name}' has no batch of one in front"
        dims[0].dim_param = OPEN
    shapes = _shapes(network)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    _open_nodes(graph, {value.name for value in inputs}, shapes)
    return copy


def _open_nodes(graph: onnx.GraphProto, moving: set[str], shapes: dict[str, list[int]]) -> None:
    """Take the one out of the nodes that see pictures; `moving` are the tensors that do."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        if moving.isdisjoint(node.input):
            continue
        moving.update(node.output)
        change = _CHANGES.get(node.op_type)
        if change is not None and node.input[0] in moving:
            change(node, constants, shapes, graph)


def _reshape(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    _: dict[str, list[int]],
    graph: onnx.GraphProto,
) -> None:
    """A shape that is written out in full gets its first size from the data instead."""
    if len(node.input) < 2 or node.input[1] not in constants:
        return
    shape = numpy_helper.to_array(constants[node.input[1]]).astype(np.int64).ravel()
    keeps_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
    if not shape.size or shape[0] in (0, -1):
        return
    if -1 not in shape:
        shape = np.concatenate([[-1], shape[1:]])
    elif shape[0] == 1 and not keeps_zero:
        shape = np.concatenate([[0], shape[1:]])
    node.input[1] = _constant(graph, shape.astype(np.int64))


def _resize(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    shapes: dict[str, list[int]],
    graph: onnx.GraphProto,
) -> None:
    """Sizes of all dimensions, the batch among them, become factors."""
    before = shapes.get(node.input[0])
    if len(node.input) < 4 or node.input[3] not in constants or before is None:
        return
    sizes = numpy_helper.to_array(constants[node.input[3]]).ravel()
    if len(sizes) != len(before) or 0 in before:
        return
    # A hair more than the quotient: what is cut off below is then the very size, never one less.
    factors = np.nextafter((sizes / np.array(before)).astype(np.float32), np.float32(np.inf))
    factors[sizes == before] = 1
    del node.input[3]
    node.input[2] = _constant(graph, factors)


_CHANGES = {"Reshape": _reshape, "Resize": _resize}


def _constant(graph: onnx.GraphProto, values: NDArray[np.generic]) -> str:
    """A new constant: the old one may serve other nodes too."""
    taken = {tensor.name for tensor in graph.initializer} | {name for n in graph.node for name in n.output}
    name = next(name for i in itertools.count() if (name := f"open.batch.{i}") not in taken)
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _shapes(network: onnx.ModelProto) -> dict[str, list[int]]:
    """The whole shapes that are known of tensors, with the batch of one; none where inference fails."""
    try:
        types = infer(network).onnx
    except ModelError:
        return {}  # what runs it will tell whether that matters
    sides = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: dims for name, dims in sides.items() if all(side > 0 for side in dims)}
