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

from visionedge.model.graph import GraphIndex

BoxEncoding = Literal["corners", "centres", ""]
"""How a decoded table writes its boxes: two corners, or a centre and a size; "" if not known."""

WEIGHTED_OPERATORS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "MatMulInteger", "QLinearConv"}
)
# The output has the values of the first input.
_VALUE_PRESERVING = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "Flatten",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
# Only the first input has values of the network; the others are shapes, indices and limits.
_FIRST_INPUT_ONLY = _VALUE_PRESERVING | {
    "Clip",
    "Expand",
    "Gather",
    "GatherElements",
    "GatherND",
    "Pad",
    "ReduceMax",
    "ReduceSum",
    "Resize",
    "Slice",
    "Split",
    "Tile",
    "TopK",
}
_SCALING_OPERATORS = frozenset({"Mul", "Div"})
_SHAPE_OPERATORS = frozenset({"Shape", "Size", "ConstantOfShape"})
_CONSTANT = "constant"
_MAX_BOX_VALUES = 8
_MAX_PARTS = 1000
_INTEGER_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(frozen=True, slots=True)
class OutputOps:
    """What happens to the values of an output behind the last weighted layer.

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
        """Whether values are added or multiplied: boxes are decoded at least in part."""
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
        """The operators that computed the parts of an output, in order; nested Concats are taken apart."""
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
    """The constants that a node multiplies or divides by, if they are no more than a box needs."""
    known = [constants[name] for name in node.input if name in constants]
    if node.op_type not in ("Div", "Mul") or len(known) != 1 or math.prod(known[0].dims) > _MAX_BOX_VALUES:
        return set()
    return {float(value) for value in np.ravel(numpy_helper.to_array(known[0]))}


class _BoxEncodingReader:
    """Finds how the boxes of an output are written, from the sums that computed them.

    The network predicts distances from a cell to the four sides of a box. Corners are the cell minus two of
    them and the cell plus the other two; a centre and a size are computed from two such corners. "Computed"
    below means: depends on the network's weights, unlike the constant cells.
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
