"""The operators between the last weighted layer and each output: they show how far outputs are decoded.

Two families can share all shapes and differ only in these operators, for example in a sigmoid behind the
scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from visionedge.model.analysis.shape_inference import infer_types
from visionedge.model.graph import Graph, GraphIndex, read_attributes, walk_nodes

BoxEncoding = Literal["corners", "centres", ""]
"""How a decoded table writes its boxes: two corners, or a centre and a size; "" if not known."""

WEIGHTED_OPERATORS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "MatMulInteger", "QLinearConv"}
)
# The output has the values of the first input.
_VALUE_PRESERVING = frozenset(
    {"Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
# Only the first input has values of the network; the others are shapes, indices and limits.
_FIRST_INPUT_ONLY = (
    {"Clip", "Expand", "Gather", "GatherElements", "GatherND", "Pad", "ReduceMax", "ReduceSum", "Resize"}
    | {"Slice", "Split", "Tile", "TopK"}
    | _VALUE_PRESERVING
)
_SCALING_OPERATORS = frozenset({"Mul", "Div"})
_SHAPE_OPERATORS = frozenset({"Shape", "Size", "ConstantOfShape"})
_CONSTANT = "constant"
_MAX_BOX_VALUES = 8
_MAX_PARTS = 1000
_INTEGER_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(frozen=True, slots=True)
class OutputOps:
    """What is computed between the last weighted layer and an output.

    `operators`: the operators between that layer and the output. `parts`: if the output is a Concat, the
    operators that computed its parts, in order, each once in a row; "constant" for a part without values of
    the network, "Conv" for a weighted layer with or without its bias. `has_weights`: whether there is a
    weighted layer at all. `modulus`: the number of classes, if indices into a list of (anchor, class) pairs
    are divided by it; else 0. `box_encoding`: of the boxes that the output begins with. `sigmoid_count`:
    how many parts a Sigmoid computed. `factors`: the constants by which values are multiplied or divided.
    """

    operators: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    has_weights: bool = False
    modulus: int = 0
    box_encoding: BoxEncoding = ""
    sigmoid_count: int = 0
    factors: frozenset[float] = frozenset()

    @property
    def has_arithmetic(self) -> bool:
        """Whether values are added or multiplied: boxes are decoded, at least in part."""
        return bool(self.operators & {"Add", "Div", "Exp", "Mul", "Pow", "Sub"})

    @property
    def has_constant(self) -> bool:
        """Whether one of the parts is constant: a column without meaning."""
        return bool({_CONSTANT, "ConstantOfShape", "Constant", "Expand"} & set(self.parts))


def read_output_ops(graph_index: GraphIndex) -> Mapping[str, OutputOps]:
    """The `OutputOps` of each output, by its name."""
    reader = _OutputReader(graph_index)
    return {output.name: reader.read(output.name) for output in graph_index.graph.output}


class _OutputReader:
    """Walks back from the outputs of one graph. What the outputs share is computed once."""

    def __init__(self, graph_index: GraphIndex) -> None:
        self._index = graph_index
        self._sources: dict[str, str] = {}  # results of `_skip_value_preserving`
        self._box_encodings = _BoxEncodingReader(graph_index)

    def read(self, output: str) -> OutputOps:
        constants = self._index.constants
        seen, waiting = set[str](), [output]
        has_weights = False
        moduli, factors, operators = set[int](), set[float](), set[str]()
        while waiting:
            name = waiting.pop()
            node = self._index.producers.get(name)
            if node is None or name in seen or name in constants:
                continue
            seen.add(name)
            if _has_weights(node, self._index):
                has_weights = True
                continue
            operators.add(node.op_type)
            moduli |= _read_moduli(node, constants)
            factors |= _read_factors(node, constants)
            waiting.extend(node.input[:1] if node.op_type in _FIRST_INPUT_ONLY else node.input)
        parts = self._list_concat_parts(output)
        return OutputOps(
            operators=frozenset(operators),
            parts=tuple(part for place, part in enumerate(parts) if parts[place - 1 : place] != [part]),
            has_weights=has_weights,
            modulus=max(moduli) if len(moduli) == 1 else 0,
            box_encoding=self._box_encodings.read(output),
            sigmoid_count=parts.count("Sigmoid"),
            factors=frozenset(factors),
        )

    def _list_concat_parts(self, output: str) -> list[str]:
        """The operators that computed the parts of an output, in order; nested Concats are expanded."""
        parts: list[str] = []
        waiting = [output]
        while waiting and len(parts) < _MAX_PARTS:
            name = self._skip_value_preserving(waiting.pop())
            node = self._index.producers.get(name)
            if node is not None and node.op_type == "Concat":
                waiting.extend(reversed(node.input))
            elif node is None or name in self._index.constants:
                parts.append(_CONSTANT)
            else:
                parts.append("Conv" if _has_weights(node, self._index) else node.op_type)
        return parts

    def _skip_value_preserving(self, name: str) -> str:
        """The tensor from which value-preserving operators made `name`."""
        passed = []
        while name not in self._sources:
            node = self._index.producers.get(name)
            if (
                node is None
                or node.op_type not in _VALUE_PRESERVING
                or name in self._index.constants
                or not node.input
            ):
                break
            passed.append(name)
            name = node.input[0]
        name = self._sources.get(name, name)
        self._sources.update(dict.fromkeys(passed, name))
        return name


def _has_weights(node: onnx.NodeProto, graph_index: GraphIndex) -> bool:
    """Whether a node multiplies by weights, or is the bias or normalisation behind such a node."""
    if node.op_type in WEIGHTED_OPERATORS:
        return True
    constants = [graph_index.constants[name] for name in node.input if name in graph_index.constants]
    if node.op_type not in ("Add", "BatchNormalization") or not constants:
        return False
    if node.op_type == "Add" and sum(side > 1 for side in constants[0].dims) > 1:
        return False  # a table, such as reference points, and no bias
    computed = [name for name in node.input if name not in graph_index.constants]
    producers = [graph_index.producers[name] for name in computed if name in graph_index.producers]
    return bool(producers) and all(producer.op_type in WEIGHTED_OPERATORS for producer in producers)


def _read_moduli(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> set[int]:
    """The constant integer that a node divides by."""
    divisor = constants.get(node.input[1]) if node.op_type in ("Div", "Mod") else None
    if divisor is None or divisor.data_type not in _INTEGER_TYPES:
        return set()
    values = numpy_helper.to_array(divisor)
    return {int(values.reshape(()))} if values.size == 1 else set()


def _read_factors(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> set[float]:
    """The constants that a node multiplies or divides by, if they are few enough for a box."""
    known = [constants[name] for name in node.input if name in constants]
    if node.op_type not in ("Div", "Mul") or len(known) != 1 or math.prod(known[0].dims) > _MAX_BOX_VALUES:
        return set()
    return {float(value) for value in np.ravel(numpy_helper.to_array(known[0]))}


class _BoxEncodingReader:
    """Finds how the boxes of an output are written, from the sums that computed them.

    The network predicts distances from a cell to the four sides of a box. Corners are the cell minus two
    distances and the cell plus the other two; a centre and a size are computed from two such corners.
    `_computed` holds the tensors that depend on the weights of the network; the cells are constants.
    """

    def __init__(self, graph_index: GraphIndex) -> None:
        self._producers = graph_index.producers
        self._constants = graph_index.constants
        self._computed: set[str] = set()
        for name, node in graph_index.producers.items():
            has_weights = name not in graph_index.constants and _has_weights(node, graph_index)
            if has_weights or (
                node.op_type not in _SHAPE_OPERATORS and self._computed.intersection(_list_value_inputs(node))
            ):
                self._computed.add(name)

    def read(self, output: str) -> BoxEncoding:
        table = self._skip_scaling(output)
        if table is None or table.op_type != "Concat":
            return ""
        # A table of boxes and scores, or of boxes alone.
        return self._read_concat(self._skip_scaling(table.input[0])) or self._read_concat(table)

    def _read_concat(self, boxes: onnx.NodeProto | None) -> BoxEncoding:
        if boxes is None or boxes.op_type != "Concat" or len(boxes.input) not in (2, 4):
            return ""
        half = len(boxes.input) // 2
        first, second = (_only(self._read_sums(names)) for names in (boxes.input[:half], boxes.input[half:]))
        if (first, second) == (("Sub", 1), ("Add", 1)):
            return "corners"
        if (first, second) == (("Add", 1), ("Add", 1)) and all(map(self._adds_negative, boxes.input[:half])):
            return "corners"
        return "centres" if (first, second) == (("Add", 2), ("Sub", 2)) else ""

    def _read_sums(self, names: Sequence[str]) -> set[tuple[str, int]]:
        """For each tensor (operator, number of its inputs that are computed)."""
        nodes = [self._skip_scaling(name) for name in names]
        return {
            ("", 0) if node is None else (node.op_type, sum(name in self._computed for name in node.input))
            for node in nodes
        }

    def _adds_negative(self, name: str) -> bool:
        """Whether an Add adds a negated distance to a cell.

        PyTorch's exporters use Neg, Paddle's a Mul by -1.
        """
        node = self._skip_scaling(name)
        computed = [] if node is None else [key for key in node.input if key in self._computed]
        negation = self._producers.get(computed[0]) if len(computed) == 1 else None
        for _ in self._producers:
            if negation is None or negation.op_type not in _VALUE_PRESERVING:
                break
            negation = self._producers.get(negation.input[0])
        if negation is None:
            return False
        return negation.op_type == "Neg" or (
            negation.op_type == "Mul" and any(map(self._is_minus_one, negation.input))
        )

    def _is_minus_one(self, name: str) -> bool:
        tensor = self._constants.get(name)
        if tensor is None or math.prod(tensor.dims) != 1:
            return False
        return bool((numpy_helper.to_array(tensor) == -1).all())

    def _skip_scaling(self, name: str) -> onnx.NodeProto | None:
        """The node from whose output value-preserving operators, Mul and Div made `name`."""
        node = self._producers.get(name)
        for _ in self._producers:
            if node is None or node.op_type not in _VALUE_PRESERVING | _SCALING_OPERATORS:
                return node
            computed = [key for key in _list_value_inputs(node) if key in self._computed]
            node = self._producers.get(computed[0]) if len(computed) == 1 else None
        return None


def _list_value_inputs(node: onnx.NodeProto) -> Sequence[str]:
    return list(node.input[:1] if node.op_type in _VALUE_PRESERVING else node.input)


def _only(sums: set[tuple[str, int]]) -> tuple[str, int]:
    return next(iter(sums)) if len(sums) == 1 else ("", 0)


# The output has the values of the first input, moved or padded.
_VALUE_MOVING = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad"}
    | {"Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
_CLIPPING_OPERATORS = frozenset({"Clip", "Max", "Min"})
_INTEGER_OPERATORS = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Shape"})
_ALL_INTEGER_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8})
_TYPE_PRESERVING = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", *_VALUE_MOVING}) - {"Cast"}
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
        if node.op_type in _VALUE_MOVING:
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
            return self._types[name] in _ALL_INTEGER_TYPES
        node = self._producers.get(name)
        if node is None or depth > _MAX_DEPTH:
            return False
        if node.op_type == "Cast":
            return read_attributes(node).get("to") in _ALL_INTEGER_TYPES
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
            if node is None or node.op_type not in _CLIPPING_OPERATORS | _VALUE_MOVING | {"Mul"}:
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
            if node is None or node.op_type not in _VALUE_MOVING - {"Concat", "Gather", "Slice"}:
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

    `from_nms`: in the scores that enter its non-maximum suppression. `from_scores`: in the output of a
    sigmoid or a softmax per anchor, possibly with a background. `from_classifier`: in the one layer in front
    of a softmax that classifies regions, with its background.
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
