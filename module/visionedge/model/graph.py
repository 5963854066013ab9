"""A network's graph, to be changed with care: who makes and who uses each tensor, and what is constant."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.errors import ModelError

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GraphIndex:
    """Who makes and who uses the tensors of a graph."""

    producers: Mapping[str, onnx.NodeProto]
    users: Mapping[str, list[onnx.NodeProto]]
    constants: Mapping[str, onnx.TensorProto]
    outputs: frozenset[str]

    @staticmethod
    def of(graph: onnx.GraphProto) -> "GraphIndex":
        """As the graph is now."""
        constants = {tensor.name: tensor for tensor in graph.initializer}
        users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                constants[node.output[0]] = node.attribute[0].t
            for name in dict.fromkeys(list_inputs(node)):
                users.setdefault(name, []).append(node)
        producers = {name: node for node in graph.node for name in node.output}
        return GraphIndex(producers, users, constants, frozenset(output.name for output in graph.output))

    def only_user(self, name: str) -> onnx.NodeProto | None:
        """The node that alone uses a tensor."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def only_convolution(self, name: str) -> onnx.NodeProto | None:
        """The convolution that alone uses a tensor, as what it goes over."""
        user = self.only_user(name)
        return user if user is not None and user.op_type == "Conv" and user.input[0] == name else None


def list_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node needs; of a loop or a branch also what is needed inside it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for each in inner.node:
                yield from list_inputs(each)
            yield from (output.name for output in inner.output)


def read_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """What is said of a node: attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def find_weight(graph_index: GraphIndex, name: str) -> Floats | None:
    """A constant float32 tensor, perhaps kept as float16 and made float32 by a Cast."""
    producer = graph_index.producers.get(name)
    kept = graph_index.constants.get(
        producer.input[0] if producer is not None and producer.op_type == "Cast" else name
    )
    if kept is None:
        return None
    values = numpy_helper.to_array(kept)
    if producer is not None and producer.op_type == "Cast":
        to = next(attribute.i for attribute in producer.attribute if attribute.name == "to")
        return values.astype(np.float32) if to == onnx.TensorProto.FLOAT else None
    return values.astype(np.float32) if values.dtype == np.float32 else None


def find_channel_constant(
    graph_index: GraphIndex, node: onnx.NodeProto | None, operator: str
) -> Floats | None:
    """The constant (1, C, 1, 1) that a node of this kind has; None for any other node."""
    if node is None or node.op_type != operator or (place := find_constant_input(graph_index, node)) < 0:
        return None
    values = numpy_helper.to_array(graph_index.constants[node.input[place]])
    shape = values.shape
    by_channel = len(shape) == 4 and (shape[0], *shape[2:]) == (1, 1, 1) and values.dtype == np.float32
    return values.astype(np.float32) if by_channel else None


def find_constant_input(graph_index: GraphIndex, node: onnx.NodeProto) -> int:
    """Which of two inputs is the constant; -1 where none is."""
    return next((index for index, name in enumerate(node.input) if name in graph_index.constants), -1)


def set_constant(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, values: NDArray[Any]) -> None:
    """Give a node another constant; the old one may serve others. `index` may be one behind its inputs."""
    name, taken = f"{node.output[0]}.constant", {tensor.name for tensor in graph.initializer}
    while name in taken:
        name += "."
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    if index == len(node.input):
        node.input.append(name)
    node.input[index] = name


def remove_unused(graph: onnx.GraphProto) -> None:
    """Take away a Cast of a weight that nobody wants any more, and constants that nothing needs."""
    used = {name for node in graph.node for name in list_inputs(node)} | {
        output.name for output in graph.output
    }
    for cast in [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in used]:
        graph.node.remove(cast)
    used = {name for node in graph.node for name in list_inputs(node)}
    for constant in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(constant)


# Our own nodes in a graph: written one by one, each with a CUDA kernel, in the network's own opset.


MIN_OPSET = 11

# Each has a CUDA kernel for the types it is used with (float32, uint8 and int64 tensors), from opset 11 on.
# A node outside this list would pull its tensors to the CPU and back, once for each batch.
CUDA_OPERATORS = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Div",
        "Exp",
        "Expand",
        "Gather",
        "GatherElements",
        "Identity",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Pad",
        "Pow",
        "ReduceMax",
        "Reshape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Sub",
        "Tanh",
        "TopK",
        "Transpose",
        "Unsqueeze",
    }
)


class NodeBuilder:
    """A growing list of nodes and constants. Names of tensors go in and come out as plain text.

    `opset` is the network's: where an operator changed since 11, the form of that opset is written.
    `taken` are the names that the network uses already.
    """

    def __init__(self, opset: int, taken: Iterable[str]) -> None:
        if opset < MIN_OPSET:
            raise ModelError(f"opset {opset} is too old: export the model with opset {MIN_OPSET} or newer")
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = "visionedge."
        used = set(taken)
        while any(name.startswith(self._prefix) for name in used):
            self._prefix = f"_{self._prefix}"

    def __repr__(self) -> str:
        return f"<Nodes opset={self.opset} nodes={len(self.nodes)} constants={len(self.constants)}>"

    def name(self, word: str) -> str:
        """A name that the network does not use."""
        return f"{self._prefix}{word}"

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node; the name of its output, which `output` may state outright."""
        return self.add_many(operator, inputs, 1, output, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: int, first: str | None = None, **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; their names."""
        if operator not in CUDA_OPERATORS:
            raise ValueError(f"{operator} is not among the operators known to have a CUDA kernel")
        label = self.name(f"{operator}.{len(self.nodes)}")
        names = [label if index == 0 else f"{label}.{index}" for index in range(outputs)]
        if first is not None:
            names[0] = first
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=label, **attributes))
        return names

    def constant(self, values: NDArray[Any]) -> str:
        """Append a constant tensor."""
        name = self.name(f"constant.{len(self.constants)}")
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def whole(self, *values: int) -> str:
        """Append a constant int64 vector: a shape, axes or indices."""
        return self.constant(np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        """Append a constant float32 vector."""
        return self.constant(np.array(values, np.float32))

    def cast(self, tensor: str, dtype: str) -> str:
        """The tensor as numpy's `dtype` ("float32")."""
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.add("Cast", tensor, to=code)

    def reshape(self, tensor: str, *shape: int) -> str:
        """The tensor in another shape; 0 keeps a dimension, -1 is the rest."""
        return self.add("Reshape", tensor, self.whole(*shape))

    def reduce_max(self, tensor: str, axis: int) -> str:
        """The largest value along an axis, which goes away."""
        if self.opset >= 18:
            return self.add("ReduceMax", tensor, self.whole(axis), keepdims=0)
        return self.add("ReduceMax", tensor, axes=[axis], keepdims=0)

    def top(self, tensor: str, count: int) -> tuple[str, str]:
        """The `count` largest values along the last axis, falling, and where they stood (int64)."""
        values, indices = self.add_many("TopK", [tensor, self.whole(count)], 2, axis=-1, largest=1, sorted=1)
        return values, indices

    def gather_rows(self, tensor: str, rows: str, count: int, width: int) -> str:
        """Rows of float32 [N, R, width] by int64 [N, count]: float32 [N, count, width]."""
        wide = self.add("Expand", self.reshape(rows, 0, count, 1), self.whole(1, count, width))
        return self.add("GatherElements", tensor, wide, axis=1)
