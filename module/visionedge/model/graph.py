"""An ONNX graph: look-ups, changes in place, and new nodes.

`GraphIndex` is the one way to look up which node produces or uses a tensor, and which tensors are constants.
`NodeBuilder` writes the nodes that the compiler adds; each of them has a CUDA kernel.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.errors import ModelError

Floats = NDArray[np.float32]

MIN_OPSET = 11
"""The oldest opset in which every operator that `NodeBuilder` writes exists."""

PICTURE_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8})
"""The element types that a picture input can have."""


class Graph(Protocol):
    """The readable part of a graph: `onnx.GraphProto`, or the float view of a quantised one."""

    @property
    def node(self) -> Sequence[onnx.NodeProto]: ...
    @property
    def initializer(self) -> Sequence[onnx.TensorProto]: ...
    @property
    def input(self) -> Sequence[onnx.ValueInfoProto]: ...
    @property
    def output(self) -> Sequence[onnx.ValueInfoProto]: ...


@dataclass(frozen=True, slots=True)
class GraphIndex:
    """Look-ups in a graph, built in one pass over its nodes. It does not follow later changes of the graph.

    `producers`: the node that computes a tensor. `users`: the nodes that read it, each once, also if a
    subgraph of the node reads it. `constants`: initializers and the values of Constant nodes. `outputs`: the
    names of the graph's outputs.
    """

    graph: Graph
    producers: Mapping[str, onnx.NodeProto]
    users: Mapping[str, Sequence[onnx.NodeProto]]
    constants: Mapping[str, onnx.TensorProto]
    outputs: frozenset[str]

    @staticmethod
    def of(graph: Graph) -> "GraphIndex":
        """The index of a graph as it is now."""
        users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(list_inputs(node)):
                users.setdefault(name, []).append(node)
        return GraphIndex(
            graph,
            producers={name: node for node in graph.node for name in node.output if name},
            users=users,
            constants=read_constants(graph),
            outputs=frozenset(output.name for output in graph.output),
        )

    def only_user(self, name: str) -> onnx.NodeProto | None:
        """The node that uses a tensor, if there is exactly one and the graph does not output the tensor."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def only_convolution(self, name: str) -> onnx.NodeProto | None:
        """The only user of a tensor, if it is a Conv with the tensor as its data input."""
        user = self.only_user(name)
        return user if user is not None and user.op_type == "Conv" and user.input[0] == name else None

    def find_weight(self, name: str) -> Floats | None:
        """A constant float32 tensor; also one that is stored as float16 and cast to float32."""
        producer = self.producers.get(name)
        is_cast = producer is not None and producer.op_type == "Cast"
        stored = self.constants.get(producer.input[0] if producer is not None and is_cast else name)
        if stored is None:
            return None
        values = numpy_helper.to_array(stored)
        if producer is not None and is_cast:
            to_float32 = read_attributes(producer)["to"] == onnx.TensorProto.FLOAT
            return values.astype(np.float32) if to_float32 else None
        return values.astype(np.float32) if values.dtype == np.float32 else None

    def find_constant_input(self, node: onnx.NodeProto) -> int:
        """The index of a node's first constant input; -1 if it has none."""
        return next((index for index, name in enumerate(node.input) if name in self.constants), -1)

    def find_channel_constant(self, node: onnx.NodeProto | None, operator: str) -> Floats | None:
        """The constant input (1, C, 1, 1), float32, of a node with this operator; None for any other node."""
        if node is None or node.op_type != operator or (place := self.find_constant_input(node)) < 0:
            return None
        values = numpy_helper.to_array(self.constants[node.input[place]])
        shape = values.shape
        by_channel = len(shape) == 4 and (shape[0], *shape[2:]) == (1, 1, 1) and values.dtype == np.float32
        return values.astype(np.float32) if by_channel else None


# --- reading ------------------------------------------------------------------------------------------------


def read_opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators (domain "" or "ai.onnx"); 0 if the model names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def list_graph_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a graph that are not weights."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def read_constants(graph: Graph) -> dict[str, onnx.TensorProto]:
    """By name: the initializers, and the values of Constant nodes."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and (value := _read_constant_node(node)) is not None:
            constants[node.output[0]] = value
    return constants


def _read_constant_node(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node; None for text and sparse tensors."""
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.HasField("t"):
            value: onnx.TensorProto = attribute.t
            return value
        if attribute.name in ("value_float", "value_floats"):
            return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.float32))
        if attribute.name in ("value_int", "value_ints"):
            return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.int64))
    return None


def read_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def list_subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a loop and the branches of an If; none for other nodes."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def list_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those that its subgraphs read included. Names can repeat."""
    yield from node.input
    for graph in list_subgraphs(node):
        for inner in graph.node:
            yield from list_inputs(inner)
        yield from (output.name for output in graph.output)


def walk_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of their subgraphs at any depth."""
    for node in nodes:
        yield node
        for graph in list_subgraphs(node):
            yield from walk_nodes(graph.node)


# --- changing in place --------------------------------------------------------------------------------------


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put each node behind the producers of its inputs, as ONNX demands, and move as few nodes as possible.

    Some exporters write another order, which onnxruntime accepts. A graph with a cycle is left as it is.
    """
    producers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs = {
        place: {producers[name] for name in list_inputs(node) if producers.get(name, place) != place}
        for place, node in enumerate(graph.node)
    }
    if all(max(needed, default=-1) < place for place, needed in needs.items()):
        return
    order = _sort_stably(needs)
    copies = [onnx.NodeProto.FromString(graph.node[place].SerializeToString()) for place in order]
    if copies:
        del graph.node[:]
        graph.node.extend(copies)


def _sort_stably(needs: Mapping[int, set[int]]) -> list[int]:
    """The topological order that always takes the smallest possible place next; empty if there is a cycle."""
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError:
        return []
    ready: list[int] = []
    order = []
    while sorter.is_active():
        for place in sorter.get_ready():
            heapq.heappush(ready, place)
        order.append(heapq.heappop(ready))
        sorter.done(order[-1])
    return order


def set_constant(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, values: NDArray[Any]) -> None:
    """Give a node a new constant as input `index`, which can be one more than it has.

    The constant that it had is not changed, because other nodes can use it.
    """
    name, taken = f"{node.output[0]}.constant", {tensor.name for tensor in graph.initializer}
    while name in taken:
        name += "."
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    if index == len(node.input):
        node.input.append(name)
    node.input[index] = name


def replace_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let all nodes read the tensor `new` instead of `old`."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def remove_unused(graph: onnx.GraphProto, tensors: Iterable[str]) -> None:
    """Remove the producers of `tensors` that nothing uses, then what only these used, and unused constants.

    Nodes with several outputs stay.
    """
    uses = Counter(name for node in graph.node for name in list_inputs(node))
    uses.update(output.name for output in graph.output)
    places = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    waiting, removed = list(tensors), set[int]()
    while waiting:
        name = waiting.pop()
        place = places.get(name)
        if uses[name] or place is None or place in removed or len(graph.node[place].output) != 1:
            continue
        removed.add(place)
        for needed in list_inputs(graph.node[place]):
            uses[needed] -= 1
            waiting.append(needed)
    for place in sorted(removed, reverse=True):
        del graph.node[place]
    made = {name for node in graph.node for name in node.output}
    for values in (graph.initializer, graph.value_info):
        for place in reversed(range(len(values))):
            if not uses[values[place].name] and values[place].name not in made:
                del values[place]


# --- writing ------------------------------------------------------------------------------------------------

# Operators with a CUDA kernel for the types that they are used with here (float32, uint8 and int64), from
# opset 11 on. Any other operator would copy its tensors to the CPU and back, once per batch.
CUDA_OPERATORS = frozenset(
    {"Add", "Cast", "Concat", "Div", "Exp", "Expand", "Gather", "GatherElements", "Identity", "MatMul", "Max"}
    | {
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
    }
    | {"TopK", "Transpose", "Unsqueeze"}
)


class NodeBuilder:
    """A growing list of nodes and constants. Tensors are given and returned by name.

    `opset` is that of the network: if an operator changed since opset 11, its form in `opset` is written.
    `taken` are the names that the network uses.

    Raises:
        ModelError: `opset` is below `MIN_OPSET`.
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
        return f"<NodeBuilder opset={self.opset} nodes={len(self.nodes)} constants={len(self.constants)}>"

    def name(self, word: str) -> str:
        """A name that the network does not use."""
        return f"{self._prefix}{word}"

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node; the name of its output, which is `output` if given."""
        return self.add_many(operator, inputs, 1, output, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: int, first: str | None = None, **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; their names. `first` is the name of the first one."""
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

    def int64s(self, *values: int) -> str:
        """Append a constant int64 vector: a shape, axes or indices."""
        return self.constant(np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        """Append a constant float32 vector."""
        return self.constant(np.array(values, np.float32))

    def cast(self, tensor: str, dtype: str) -> str:
        """The tensor converted to the numpy type `dtype`, such as "float32"."""
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.add("Cast", tensor, to=code)

    def reshape(self, tensor: str, *shape: int) -> str:
        """The tensor in another shape; 0 keeps a dimension, -1 takes all remaining values."""
        return self.add("Reshape", tensor, self.int64s(*shape))

    def reduce_max(self, tensor: str, axis: int) -> str:
        """The largest value along an axis; the axis is removed."""
        if self.opset >= 18:
            return self.add("ReduceMax", tensor, self.int64s(axis), keepdims=0)
        return self.add("ReduceMax", tensor, axes=[axis], keepdims=0)

    def top_k(self, tensor: str, count: int) -> tuple[str, str]:
        """The `count` largest values along the last axis, in falling order, and their indices (int64)."""
        values, indices = self.add_many("TopK", [tensor, self.int64s(count)], 2, axis=-1, largest=1, sorted=1)
        return values, indices

    def gather_rows(self, tensor: str, rows: str, count: int, width: int) -> str:
        """The rows of float32 [N, R, width] at int64 indices [N, count]: float32 [N, count, width].

        They are gathered from [N, R * width]. OpenVINO 2026.4 removes a Slice of columns in front of a
        GatherElements along axis 1 of [N, R, width], and then refuses the graph because of its shapes.
        """
        if width == 1:
            return self.reshape(
                self.add("GatherElements", self.reshape(tensor, 0, -1), rows, axis=1), 0, count, 1
            )
        first = self.add("Mul", self.reshape(rows, 0, count, 1), self.int64s(width))
        places = self.add("Add", first, self.int64s(*range(width)))
        flat = self.add(
            "GatherElements", self.reshape(tensor, 0, -1), self.reshape(places, 0, count * width), axis=1
        )
        return self.reshape(flat, 0, count, width)
