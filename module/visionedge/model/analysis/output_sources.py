"""Where the values of each output come from: nodes are followed back, because tensor names can be wrong.

`read_output_sources` follows the outputs; `count_classes` reads how many classes a graph has.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from visionedge.model.analysis.shape_inference import infer_types
from visionedge.model.graph import Graph, GraphIndex, read_attributes, walk_nodes

# The output has the values of the first input, moved or padded.
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
    """The source of an output's values.

    `operator`: the operator that computed them; value-preserving operators behind it are skipped.
    `is_integer`: whether they were integers. `offset`: the constant that was added to them later. `count`:
    how many a TopK chose. `modulus`: the number C if they are the remainder of a division by C, as classes
    are of indices into a list of (anchor, class) pairs. `clip_max`: the constant upper limit, as boxes have
    at the border of the picture. If the operator is a Concat: `parts` are the operators of its inputs, and
    `part_is_integer` and `part_offsets` what `is_integer` and `offset` are for each.
    """

    operator: str = ""
    is_integer: bool = False
    offset: float = 0.0
    parts: tuple[str, ...] = ()
    count: int | None = None
    modulus: int | None = None
    clip_max: float | None = None
    part_is_integer: tuple[bool, ...] = ()
    part_offsets: tuple[float, ...] = ()


def read_output_sources(graph_index: GraphIndex) -> Mapping[str, OutputSource]:
    """The source of each output, by its name."""
    tracer = _SourceTracer(graph_index)
    return {value.name: tracer.trace(value.name) for value in graph_index.graph.output}


class _SourceTracer:
    def __init__(self, graph_index: GraphIndex) -> None:
        self._producers = graph_index.producers
        self._constants = graph_index.constants
        self._types = {name: tensor.data_type for name, tensor in graph_index.constants.items()}
        self._types |= {value.name: value.type.tensor_type.elem_type for value in graph_index.graph.input}

    def trace(self, name: str) -> OutputSource:
        """Follow a tensor back through value-preserving operators and sums with a constant."""
        name, is_integer, offset = self._follow(name)
        node = self._producers.get(name)
        if node is None or node.op_type == "Constant":
            return OutputSource(is_integer=is_integer or self._holds_integers(name), offset=offset)
        columns = list(node.input) if node.op_type == "Concat" else []
        followed = [self._follow(column) for column in columns[:_MAX_COLUMNS]]
        return OutputSource(
            node.op_type,
            is_integer,
            offset,
            parts=tuple(self._find_operator(column) for column in columns),
            count=self._read_count(node),
            modulus=self._read_modulus(node),
            clip_max=self._find_clip_max(name),
            part_is_integer=tuple(is_integer for _, is_integer, _ in followed),
            part_offsets=tuple(offset for *_, offset in followed),
        )

    def _follow(self, name: str) -> tuple[str, bool, float]:
        """(the first tensor, whether any tensor on the way holds integers, the sum of added constants)."""
        is_integer, offset = self._is_integer(name), 0.0
        for _ in range(_MAX_DEPTH):
            node = self._producers.get(name)
            step = None if node is None else self._step_back(node)
            if step is None:
                break
            name, added = step
            offset, is_integer = offset + added, is_integer or self._is_integer(name)
        return name, is_integer, offset

    def _step_back(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """(the input that a node passes on, the constant that it adds); None if it computes new values."""
        if node.op_type == "Concat":
            computed = [key for key in node.input if key in self._producers and key not in self._constants]
            return (computed[0], 0.0) if len(computed) == 1 else None  # the other inputs only pad it
        if node.op_type in _VALUE_PRESERVING:
            return node.input[0], 0.0
        if node.op_type not in ("Add", "Sub"):
            return None
        sign = 1 if node.op_type == "Add" else -1
        for kept, added in [(0, 1), (1, 0)] if sign > 0 else [(0, 1)]:
            value = self._read_integer(node.input[added])
            if value is not None:
                return node.input[kept], float(sign * value)
        return None

    def _is_integer(self, name: str, depth: int = 0) -> bool:
        """Whether a tensor has an integer type, as far as the nodes show it."""
        if name in self._types:
            return self._types[name] in _INTEGER_TYPES
        node = self._producers.get(name)
        if node is None or depth > _MAX_DEPTH:
            return False
        if node.op_type == "Cast":
            return read_attributes(node).get("to") in _INTEGER_TYPES
        if node.op_type == "TopK" and len(node.output) > 1 and name == node.output[1]:
            return True
        if node.op_type in _INTEGER_OPERATORS:
            return True
        return node.op_type in _TYPE_PRESERVING and self._is_integer(node.input[0], depth + 1)

    def _holds_integers(self, name: str) -> bool:
        """Whether the values of a constant are integers, and not only 0 and 1."""
        if name not in self._constants:
            return False
        values = numpy_helper.to_array(self._constants[name])
        return bool(values.size and (values == np.round(values)).all() and values.max() > 1)

    def _find_clip_max(self, name: str) -> float | None:
        """The largest constant of the nearest Clip or Min."""
        for _ in range(_MAX_DEPTH):
            node = self._producers.get(name)
            if node is None or node.op_type not in _CLIPPING_OPERATORS | _VALUE_PRESERVING | {"Mul"}:
                return None
            if node.op_type in ("Clip", "Min"):
                limits = [self._constants[key] for key in node.input[1:] if key in self._constants]
                if limits:
                    return max(float(numpy_helper.to_array(limit).max()) for limit in limits)
            name = next(
                (key for key in node.input if key in self._producers and key not in self._constants), ""
            )
        return None

    def _find_operator(self, name: str) -> str:
        """The operator that computed a tensor's values; "" for an input or a constant."""
        for _ in range(_MAX_DEPTH):
            node = self._producers.get(name)
            if node is None or node.op_type not in _VALUE_PRESERVING - {"Concat", "Gather", "Slice"}:
                return "" if node is None else node.op_type
            name = node.input[0]
        return ""

    def _read_count(self, node: onnx.NodeProto) -> int | None:
        return self._read_integer(node.input[1]) if node.op_type == "TopK" and len(node.input) > 1 else None

    def _read_modulus(self, node: onnx.NodeProto) -> int | None:
        """The C of x mod C, or of x - x / C * C."""
        if node.op_type == "Mod":
            return self._read_integer(node.input[1])
        product = self._producers.get(node.input[1]) if node.op_type == "Sub" else None
        if product is None or product.op_type != "Mul":
            return None
        return self._read_integer(product.input[1]) or self._read_integer(product.input[0])

    def _read_integer(self, name: str) -> int | None:
        tensor = self._constants.get(name)
        if tensor is None or np.prod(tensor.dims) != 1:
            return None
        return int(numpy_helper.to_array(tensor).reshape(()))


def list_operators(graph: Graph) -> frozenset[str]:
    """All operators of a graph, those of loops and branches included."""
    return frozenset(node.op_type for node in walk_nodes(graph.node))


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """The number of classes that a graph shows; None if it does not.

    `from_nms`: those that its non-maximum suppression gets. `from_scores`: those that a sigmoid or a
    softmax scores for each anchor, possibly with a background. `from_classifier`: those of the one layer in
    front of a softmax that classifies regions, with its background.
    """

    from_nms: int | None = None
    from_scores: int | None = None
    from_classifier: int | None = None


def count_classes(model: onnx.ModelProto) -> ClassCounts:
    """The class counts of a graph. Shape inference runs only if the graph has a non-maximum suppression."""
    from_classifier = _count_softmax_classes(model.graph)
    if "NonMaxSuppression" not in list_operators(model.graph):
        return ClassCounts(from_classifier=from_classifier)
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
        from_classifier,
    )


def _count_softmax_classes(graph: onnx.GraphProto) -> int | None:
    """The width of the one fully connected layer in front of the only softmax."""
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    if len(softmaxes) != 1:
        return None
    layer = GraphIndex.of(graph).producers.get(softmaxes[0].input[0])
    if layer is None or layer.op_type != "Gemm":
        return None
    weights = [dim for tensor in graph.initializer if tensor.name == layer.input[1] for dim in tensor.dims]
    return int(weights[0 if read_attributes(layer).get("transB") else 1]) if len(weights) == 2 else None
