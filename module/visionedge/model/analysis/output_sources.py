"""Where the values of a model's outputs come from. Names may lie, nodes do not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from visionedge.model.analysis.float_view import Graph
from visionedge.model.analysis.shape_inference import infer_types

# Operators whose first input is what comes out, at other places or padded.
_VALUE_PRESERVING = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_CLIPPING_OPERATORS = frozenset({"Clip", "Max", "Min"})
_INTEGER_OPERATORS = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Shape"})
_INTEGER_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8})
_TYPE_PRESERVING = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", *_VALUE_PRESERVING}) - {"Cast"}
_MAX_DEPTH = 64
_MIN_ANCHORS = 100
_MAX_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class OutputSource:
    """`whole`: its values were whole numbers; `plus`: the constant that was added to them on the way.

    `maker` is the operator behind all that only moves values; for a Concat, `parts` are those of its inputs,
    and `wholes` and `added` what `whole` and `plus` would be of each.
    `count` is how many a TopK behind it chose; `modulus` what its values are the remainder of (as classes are
    of positions in a list of pairs); `ceiling` the constant that its values are cut off at, as boxes are at
    the picture's border.
    """

    operator: str = ""
    whole: bool = False
    offset: float = 0.0
    parts: tuple[str, ...] = ()
    count: int | None = None
    modulus: int | None = None
    clip_max: float | None = None
    part_is_integer: tuple[bool, ...] = ()
    added: tuple[float, ...] = ()


class _SourceTracer:
    def __init__(self, graph: Graph) -> None:
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.types = {t.name: t.data_type for t in graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = node.attribute[0].t
                self.types[node.output[0]] = node.attribute[0].t.data_type

    def trace(self, name: str) -> OutputSource:
        """Walk back from a tensor for as long as it only carries, or has a constant added."""
        name, whole, offset = self._follow(name)
        node = self.producers.get(name)
        if node is None or node.op_type == "Constant":
            return OutputSource(whole=whole or self._holds_integers(name), offset=offset)
        columns = list(node.input) if node.op_type == "Concat" else []
        walked = [self._follow(key) for key in columns[:_MAX_COLUMNS]]
        return OutputSource(
            node.op_type,
            whole,
            offset,
            tuple(self.source_operator(key) for key in columns),
            self._count(node),
            self._modulus(node),
            self._ceiling(name),
            tuple(whole for _, whole, _ in walked),
            tuple(offset for *_, offset in walked),
        )

    def _follow(self, name: str) -> tuple[str, bool, float]:
        """(the tensor behind all that carries or adds a constant, whether it was whole, what was added)."""
        whole, offset = self.is_integer(name), 0.0
        for _ in range(_MAX_DEPTH):
            node = self.producers.get(name)
            step = None if node is None else self._step_back(node)
            if step is None:
                break
            name, added = step
            offset, whole = offset + added, whole or self.is_integer(name)
        return name, whole, offset

    def _ceiling(self, name: str) -> float | None:
        """The largest constant of the nearest Clip or Min."""
        for _ in range(_MAX_DEPTH):
            node = self.producers.get(name)
            if node is None or node.op_type not in _CLIPPING_OPERATORS | _VALUE_PRESERVING | {"Mul"}:
                return None
            if node.op_type in ("Clip", "Min"):
                found = [self._largest(key) for key in node.input[1:] if key in self.constants]
                if found:
                    return max(found)
            name = next(
                (key for key in node.input if key in self.producers and key not in self.constants), ""
            )
        return None

    def _holds_integers(self, name: str) -> bool:
        """Whether a constant holds whole numbers, and more than a yes or no."""
        if name not in self.constants:
            return False
        values = numpy_helper.to_array(self.constants[name])
        return bool(values.size and (values == np.round(values)).all() and values.max() > 1)

    def _largest(self, name: str) -> float:
        return float(numpy_helper.to_array(self.constants[name]).max())

    def _count(self, node: onnx.NodeProto) -> int | None:
        return self._number(node.input[1]) if node.op_type == "TopK" and len(node.input) > 1 else None

    def _modulus(self, node: onnx.NodeProto) -> int | None:
        """The C of x mod C, or of x - x / C * C."""
        if node.op_type == "Mod":
            return self._number(node.input[1])
        product = self.producers.get(node.input[1]) if node.op_type == "Sub" else None
        if product is None or product.op_type != "Mul":
            return None
        return self._number(product.input[1]) or self._number(product.input[0])

    def _number(self, name: str) -> int | None:
        tensor = self.constants.get(name)
        return (
            int(numpy_helper.to_array(tensor).reshape(())) if tensor and np.prod(tensor.dims) == 1 else None
        )

    def source_operator(self, name: str) -> str:
        """The operator that made a tensor's values; "" for an input or a constant."""
        for _ in range(_MAX_DEPTH):
            node = self.producers.get(name)
            if node is None or node.op_type not in _VALUE_PRESERVING - {"Concat", "Gather", "Slice"}:
                return "" if node is None else node.op_type
            name = node.input[0]
        return ""

    def is_integer(self, name: str, depth: int = 0) -> bool:
        """Whether a tensor is of a whole type, as far as the nodes behind it tell."""
        if name in self.types:
            return self.types[name] in _INTEGER_TYPES
        node = self.producers.get(name)
        if node is None or depth > _MAX_DEPTH:
            return False
        if node.op_type == "Cast":
            return any(a.name == "to" and a.i in _INTEGER_TYPES for a in node.attribute)
        if node.op_type == "TopK" and len(node.output) > 1 and name == node.output[1]:
            return True
        if node.op_type in _INTEGER_OPERATORS:
            return True
        return node.op_type in _TYPE_PRESERVING and self.is_integer(node.input[0], depth + 1)

    def _step_back(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """The tensor whose values a node carries on, and what it adds; None where it makes new ones."""
        if node.op_type == "Concat":
            computed = [key for key in node.input if key in self.producers and key not in self.constants]
            return (computed[0], 0.0) if len(computed) == 1 else None  # the others only fill it up
        if node.op_type in _VALUE_PRESERVING:
            return node.input[0], 0.0
        if node.op_type not in ("Add", "Sub"):
            return None
        sign = 1 if node.op_type == "Add" else -1
        sides = [(0, 1), (1, 0)] if sign > 0 else [(0, 1)]
        for kept, added in sides:
            value = self._number(node.input[added])
            if value is not None:
                return node.input[kept], float(sign * value)
        return None


def read_output_sources(graph: Graph) -> Mapping[str, OutputSource]:
    """The origin of each output."""
    tracer = _SourceTracer(graph)
    return {value.name: tracer.trace(value.name) for value in graph.output}


def list_operators(graph: Graph) -> frozenset[str]:
    """All operators of a graph, those of loops and branches included."""
    return frozenset(node.op_type for node in _walk_nodes(graph))


def _walk_nodes(graph: Graph) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _walk_nodes(inner)


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How many classes a graph that suppresses seems to know; None where nothing tells.

    `suppressed`: those that its suppression works on; `scored`: those, perhaps with a background, that a
    sigmoid or a softmax gives each anchor a score for; `classified`: those of the one layer behind a softmax
    that classifies regions, its background included.
    """

    from_nms: int | None = None
    from_scores: int | None = None
    from_classifier: int | None = None


def count_classes(model: onnx.ModelProto) -> ClassCounts:
    """The counts of a graph; those of a suppression take a shape inference to find them."""
    if "NonMaxSuppression" not in list_operators(model.graph):
        return ClassCounts(from_classifier=_count_softmax_classes(model.graph))
    shapes = {
        name: [d.dim_value for d in kind.tensor_type.shape.dim]
        for name, kind in infer_types(model).onnx.items()
    }
    from_nms, from_scores = set(), set()
    for node in model.graph.node:
        shape = shapes.get(node.input[1] if node.op_type == "NonMaxSuppression" else node.output[0], [])
        if len(shape) == 3 and node.op_type == "NonMaxSuppression" and shape[1] > 1:
            from_nms.add(shape[1])
        elif len(shape) == 3 and node.op_type in ("Sigmoid", "Softmax") and shape[1] >= _MIN_ANCHORS:
            from_scores.add(shape[2])
    return ClassCounts(
        from_nms.pop() if len(from_nms) == 1 else None,
        from_scores.pop() if len(from_scores) == 1 else None,
        _count_softmax_classes(model.graph),
    )


def _count_softmax_classes(graph: onnx.GraphProto) -> int | None:
    """The width of the one fully connected layer whose outputs a softmax takes."""
    producers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    layers = [producers.get(node.input[0]) for node in graph.node if node.op_type == "Softmax"]
    if len(layers) != 1 or layers[0] is None or layers[0].op_type != "Gemm":
        return None
    across = any(a.name == "transB" and a.i for a in layers[0].attribute)
    dims = weights.get(layers[0].input[1], [])
    return int(dims[0 if across else 1]) if len(dims) == 2 else None
