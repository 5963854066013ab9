"""Where the values of a model's outputs come from. Names may lie, nodes do not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from visionedge.model.analysis.float_view import Graph
from visionedge.model.analysis.shape_inference import infer

# Operators whose first input is what comes out, at other places or padded.
_CARRIERS = frozenset(
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
_CUTTERS = frozenset({"Clip", "Max", "Min"})
_WHOLE_MAKERS = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Shape"})
_WHOLE_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8})
_SAME_TYPE = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", *_CARRIERS}) - {"Cast"}
_DEEPEST = 64
_LEAST_ANCHORS = 100
_MOST_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class Origin:
    """`whole`: its values were whole numbers; `plus`: the constant that was added to them on the way.

    `maker` is the operator behind all that only moves values; for a Concat, `parts` are those of its inputs,
    and `wholes` and `added` what `whole` and `plus` would be of each.
    `count` is how many a TopK behind it chose; `modulus` what its values are the remainder of (as classes are
    of positions in a list of pairs); `ceiling` the constant that its values are cut off at, as boxes are at
    the picture's border.
    """

    maker: str = ""
    whole: bool = False
    plus: float = 0.0
    parts: tuple[str, ...] = ()
    count: int | None = None
    modulus: int | None = None
    ceiling: float | None = None
    wholes: tuple[bool, ...] = ()
    added: tuple[float, ...] = ()


class _Tracer:
    def __init__(self, graph: Graph) -> None:
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.types = {t.name: t.data_type for t in graph.initializer}
        self.types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = node.attribute[0].t
                self.types[node.output[0]] = node.attribute[0].t.data_type

    def origin(self, name: str) -> Origin:
        """Walk back from a tensor for as long as it only carries, or has a constant added."""
        name, whole, plus = self._walked(name)
        node = self.makers.get(name)
        if node is None or node.op_type == "Constant":
            return Origin(whole=whole or self._counts(name), plus=plus)
        columns = list(node.input) if node.op_type == "Concat" else []
        walked = [self._walked(key) for key in columns[:_MOST_COLUMNS]]
        return Origin(
            node.op_type,
            whole,
            plus,
            tuple(self.behind(key) for key in columns),
            self._count(node),
            self._modulus(node),
            self._ceiling(name),
            tuple(whole for _, whole, _ in walked),
            tuple(plus for *_, plus in walked),
        )

    def _walked(self, name: str) -> tuple[str, bool, float]:
        """(the tensor behind all that carries or adds a constant, whether it was whole, what was added)."""
        whole, plus = self.is_whole(name), 0.0
        for _ in range(_DEEPEST):
            node = self.makers.get(name)
            step = None if node is None else self._back(node)
            if step is None:
                break
            name, added = step
            plus, whole = plus + added, whole or self.is_whole(name)
        return name, whole, plus

    def _ceiling(self, name: str) -> float | None:
        """The largest constant of the nearest Clip or Min."""
        for _ in range(_DEEPEST):
            node = self.makers.get(name)
            if node is None or node.op_type not in _CUTTERS | _CARRIERS | {"Mul"}:
                return None
            if node.op_type in ("Clip", "Min"):
                found = [self._largest(key) for key in node.input[1:] if key in self.constants]
                if found:
                    return max(found)
            name = next((key for key in node.input if key in self.makers and key not in self.constants), "")
        return None

    def _counts(self, name: str) -> bool:
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
        product = self.makers.get(node.input[1]) if node.op_type == "Sub" else None
        if product is None or product.op_type != "Mul":
            return None
        return self._number(product.input[1]) or self._number(product.input[0])

    def _number(self, name: str) -> int | None:
        tensor = self.constants.get(name)
        return (
            int(numpy_helper.to_array(tensor).reshape(())) if tensor and np.prod(tensor.dims) == 1 else None
        )

    def behind(self, name: str) -> str:
        """The operator that made a tensor's values; "" for an input or a constant."""
        for _ in range(_DEEPEST):
            node = self.makers.get(name)
            if node is None or node.op_type not in _CARRIERS - {"Concat", "Gather", "Slice"}:
                return "" if node is None else node.op_type
            name = node.input[0]
        return ""

    def is_whole(self, name: str, depth: int = 0) -> bool:
        """Whether a tensor is of a whole type, as far as the nodes behind it tell."""
        if name in self.types:
            return self.types[name] in _WHOLE_TYPES
        node = self.makers.get(name)
        if node is None or depth > _DEEPEST:
            return False
        if node.op_type == "Cast":
            return any(a.name == "to" and a.i in _WHOLE_TYPES for a in node.attribute)
        if node.op_type == "TopK" and len(node.output) > 1 and name == node.output[1]:
            return True
        if node.op_type in _WHOLE_MAKERS:
            return True
        return node.op_type in _SAME_TYPE and self.is_whole(node.input[0], depth + 1)

    def _back(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """The tensor whose values a node carries on, and what it adds; None where it makes new ones."""
        if node.op_type == "Concat":
            computed = [key for key in node.input if key in self.makers and key not in self.constants]
            return (computed[0], 0.0) if len(computed) == 1 else None  # the others only fill it up
        if node.op_type in _CARRIERS:
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


def read_origins(graph: Graph) -> Mapping[str, Origin]:
    """The origin of each output."""
    tracer = _Tracer(graph)
    return {value.name: tracer.origin(value.name) for value in graph.output}


def operators(graph: Graph) -> frozenset[str]:
    """All operators of a graph, those of loops and branches included."""
    return frozenset(node.op_type for node in _nodes(graph))


def _nodes(graph: Graph) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner)


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How many classes a graph that suppresses seems to know; None where nothing tells.

    `suppressed`: those that its suppression works on; `scored`: those, perhaps with a background, that a
    sigmoid or a softmax gives each anchor a score for; `classified`: those of the one layer behind a softmax
    that classifies regions, its background included.
    """

    suppressed: int | None = None
    scored: int | None = None
    classified: int | None = None


def count_classes(model: onnx.ModelProto) -> ClassCounts:
    """The counts of a graph; those of a suppression take a shape inference to find them."""
    if "NonMaxSuppression" not in operators(model.graph):
        return ClassCounts(classified=_classified(model.graph))
    shapes = {
        name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in infer(model).onnx.items()
    }
    suppressed, scored = set(), set()
    for node in model.graph.node:
        shape = shapes.get(node.input[1] if node.op_type == "NonMaxSuppression" else node.output[0], [])
        if len(shape) == 3 and node.op_type == "NonMaxSuppression" and shape[1] > 1:
            suppressed.add(shape[1])
        elif len(shape) == 3 and node.op_type in ("Sigmoid", "Softmax") and shape[1] >= _LEAST_ANCHORS:
            scored.add(shape[2])
    return ClassCounts(
        suppressed.pop() if len(suppressed) == 1 else None,
        scored.pop() if len(scored) == 1 else None,
        _classified(model.graph),
    )


def _classified(graph: onnx.GraphProto) -> int | None:
    """The width of the one fully connected layer whose outputs a softmax takes."""
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    layers = [makers.get(node.input[0]) for node in graph.node if node.op_type == "Softmax"]
    if len(layers) != 1 or layers[0] is None or layers[0].op_type != "Gemm":
        return None
    across = any(a.name == "transB" and a.i for a in layers[0].attribute)
    dims = weights.get(layers[0].input[1], [])
    return int(dims[0 if across else 1]) if len(dims) == 2 else None
