"""What a network does last, behind the last weights: the operators that tell decoded outputs from raw ones.

Two families can share every shape and differ in what their last nodes have done to the values already.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from visionedge.model.analysis.float_view import Graph

# How a decoded table writes its boxes: as two corners, or as a centre and a size. Its shape is the same.
#
# Distances from a cell to the four sides of a box become either, and the nodes that do it differ: corners are
# the cell less some of them and the cell plus the others; a centre and a size come from two such corners.


BoxEncoding = Literal["corners", "centres", ""]
"""The last where nodes do not tell."""

Producers = Mapping[str, onnx.NodeProto]

_SCALERS = frozenset({"Mul", "Div"})
_SHAPE_OPERATORS = frozenset({"Shape", "Size", "ConstantOfShape"})


def _single_sum(sums: set[tuple[str, int]]) -> tuple[str, int]:
    return next(iter(sums)) if len(sums) == 1 else ("", 0)


class BoxEncodingReader:
    """The forms of boxes in a graph, whose `makers` are in its order.

    `movers` are operators whose first input is what comes out; `ends` tells of a tensor whether a network's
    weights made it. Each tensor is looked at once, however many ask.
    """

    def __init__(
        self,
        producers: Producers,
        movers: frozenset[str],
        ends: Callable[[str], bool],
        is_minus_one: Callable[[str], bool],
    ) -> None:
        self._makers = producers
        self._movers = movers
        self._is_minus_one = is_minus_one
        self._depends: set[str] = set()
        for name, node in producers.items():
            if ends(name) or (
                node.op_type not in _SHAPE_OPERATORS and self._depends.intersection(self._carried(node))
            ):
                self._depends.add(name)

    def box_encoding(self, output: str) -> BoxEncoding:
        """The form of the boxes that an output begins with."""
        table = self._back(output)
        if table is None or table.op_type != "Concat":
            return ""
        # Boxes with something behind them, or boxes alone.
        return self._form(self._back(table.input[0])) or self._form(table)

    def _form(self, boxes: onnx.NodeProto | None) -> BoxEncoding:
        if boxes is None or boxes.op_type != "Concat" or len(boxes.input) not in (2, 4):
            return ""
        half = len(boxes.input) // 2
        first, second = (_single_sum(self._sums(names)) for names in (boxes.input[:half], boxes.input[half:]))
        if (first, second) == (("Sub", 1), ("Add", 1)):
            return "corners"
        if (first, second) == (("Add", 1), ("Add", 1)) and all(map(self._subtracts, boxes.input[:half])):
            return "corners"
        return "centres" if (first, second) == (("Add", 2), ("Sub", 2)) else ""

    def _subtracts(self, name: str) -> bool:
        """Whether a sum adds the negative of the network's own work: a cell less a distance.

        PyTorch's exporters negate; Paddle's multiply by -1.
        """
        node = self._back(name)
        worked = [] if node is None else [key for key in node.input if key in self._depends]
        sign = self._makers.get(worked[0]) if len(worked) == 1 else None
        for _ in self._makers:
            if sign is None or sign.op_type not in self._movers:
                break
            sign = self._makers.get(sign.input[0])
        return sign is not None and (
            sign.op_type == "Neg" or (sign.op_type == "Mul" and any(map(self._is_minus_one, sign.input)))
        )

    def _carried(self, node: onnx.NodeProto) -> Sequence[str]:
        """The inputs whose values a node works on."""
        return list(node.input[:1] if node.op_type in self._movers else node.input)

    def _back(self, name: str) -> onnx.NodeProto | None:
        """The node behind all that only moves a tensor or scales it."""
        node = self._makers.get(name)
        for _ in self._makers:
            if node is None or node.op_type not in self._movers | _SCALERS:
                return node
            moved = [key for key in self._carried(node) if key in self._depends]
            node = self._makers.get(moved[0]) if len(moved) == 1 else None
        return None

    def _sums(self, names: Sequence[str]) -> set[tuple[str, int]]:
        """The operators behind tensors, and on how many sides of each the network's own work stands."""
        nodes = [self._back(name) for name in names]
        return {
            (node.op_type, sum(key in self._depends for key in node.input)) if node is not None else ("", 0)
            for node in nodes
        }


WEIGHTED_OPERATORS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "MatMulInteger", "QLinearConv"}
)
# They move values: what made them lies behind their first input.
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
# Of these only the first input carries values; the others are shapes, places and numbers.
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
_CONSTANT = "constant"
_MAX_BOX_VALUES = 8
_MAX_PARTS = 1000
_INTEGER_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(frozen=True, slots=True)
class OutputOps:
    """`operators` lie between an output and the weights behind it, those with the weights left out.

    `parts` are the operators that made what the output is concatenated from, in order and without repetition
    side by side ("constant" for what is none of the network's work); weights and their bias count as "Conv".
    `weighted`: there are weights behind at all, so that the rest says something. `modulus` is the number of
    classes where places in a list of (anchor, class) pairs are made into classes by it; 0 where they are not.
    `form` is how the boxes are written that it begins with, where nodes tell; `sigmoids` how many parts one
    made, side by side or not. `factors` are the constants that are multiplied or divided by.
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
        """Whether numbers are added or multiplied: boxes are decoded at least in part."""
        return bool(self.operators & {"Add", "Div", "Exp", "Mul", "Pow", "Sub"})

    @property
    def has_constant(self) -> bool:
        """Whether a constant is among the parts: a column that says nothing."""
        return bool({_CONSTANT, "ConstantOfShape", "Constant", "Expand"} & set(self.parts))


def read_output_ops(graph: Graph) -> Mapping[str, OutputOps]:
    """The closing of each output, by its name."""
    producers = {name: node for node in graph.node for name in node.output if name}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t if node.attribute else onnx.TensorProto()

    def ends(name: str) -> bool:
        return (
            name in producers
            and name not in constants
            and _has_weights(producers[name], producers, constants)
        )

    def is_minus_one(name: str) -> bool:
        tensor = constants.get(name)
        return (
            tensor is not None
            and math.prod(tensor.dims) == 1
            and bool((numpy_helper.to_array(tensor) == -1).all())
        )

    walk = _Walk(producers, constants, BoxEncodingReader(producers, _VALUE_PRESERVING, ends, is_minus_one))
    return {output.name: _read_output(output.name, walk) for output in graph.output}


Constants = Mapping[str, onnx.TensorProto]


@dataclass(frozen=True, slots=True)
class _Walk:
    """What all outputs of a graph have in common. `moved` keeps what lies behind movers."""

    producers: Producers
    constants: Constants
    box_encodings: BoxEncodingReader
    moved: dict[str, str] = field(default_factory=dict)

    def behind(self, name: str) -> str:
        """The tensor behind all that only moves values; each is looked for once."""
        passed = []
        while name not in self.moved:
            node = self.producers.get(name)
            if (
                node is None
                or node.op_type not in _VALUE_PRESERVING
                or name in self.constants
                or not node.input
            ):
                break
            passed.append(name)
            name = node.input[0]
        name = self.moved.get(name, name)
        self.moved.update(dict.fromkeys(passed, name))
        return name


def _read_output(output: str, walk: _Walk) -> OutputOps:
    producers, constants = walk.producers, walk.constants
    seen: set[str] = set()
    has_weights = False
    moduli: set[int] = set()
    factors: set[float] = set()
    found: set[str] = set()
    waiting = [output]
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if node is None or name in seen or name in constants:
            continue
        seen.add(name)
        if _has_weights(node, producers, constants):
            has_weights = True
            continue
        found.add(node.op_type)
        moduli |= _read_moduli(node, constants)
        factors |= _read_factors(node, constants)
        waiting.extend(node.input[:1] if node.op_type in _FIRST_INPUT_ONLY else node.input)
    leaves = _list_concat_parts(output, walk)
    return OutputOps(
        frozenset(found),
        tuple(word for place, word in enumerate(leaves) if leaves[place - 1 : place] != [word]),
        has_weights,
        max(moduli) if len(moduli) == 1 else 0,
        walk.box_encodings.box_encoding(output),
        leaves.count("Sigmoid"),
        frozenset(factors),
    )


def _read_moduli(node: onnx.NodeProto, constants: Constants) -> set[int]:
    """The whole number that a node divides by."""
    divisor = constants.get(node.input[1]) if node.op_type in ("Div", "Mod") else None
    if divisor is None or divisor.data_type not in _INTEGER_TYPES:
        return set()
    values = numpy_helper.to_array(divisor)
    return {int(values.reshape(()))} if values.size == 1 else set()


def _read_factors(node: onnx.NodeProto, constants: Constants) -> set[float]:
    """The few constants that a node multiplies or divides by: those of a box, and no table's."""
    known = [constants[name] for name in node.input if name in constants]
    if node.op_type not in ("Div", "Mul") or len(known) != 1 or math.prod(known[0].dims) > _MAX_BOX_VALUES:
        return set()
    return {float(value) for value in np.ravel(numpy_helper.to_array(known[0]))}


def _has_weights(node: onnx.NodeProto, producers: Producers, constants: Constants) -> bool:
    """Whether it multiplies by weights, or adds a bias or normalises what such a node made."""
    if node.op_type in WEIGHTED_OPERATORS:
        return True
    known = [constants[name] for name in node.input if name in constants]
    if node.op_type not in ("Add", "BatchNormalization") or not known:
        return False
    if node.op_type == "Add" and sum(side > 1 for side in known[0].dims) > 1:
        return False  # a table, such as reference points, and no bias
    behind = [producers[name] for name in node.input if name in producers and name not in constants]
    return bool(behind) and all(n.op_type in WEIGHTED_OPERATORS for n in behind)


def _list_concat_parts(output: str, walk: _Walk) -> list[str]:
    """The operators that made what an output is concatenated from, in order."""
    parts: list[str] = []
    waiting = [output]
    while waiting and len(parts) < _MAX_PARTS:
        name = walk.behind(waiting.pop())
        node = walk.producers.get(name)
        if node is not None and node.op_type == "Concat":
            waiting.extend(reversed(node.input))
            continue
        word = _CONSTANT
        if node is not None and name not in walk.constants:
            word = "Conv" if _has_weights(node, walk.producers, walk.constants) else node.op_type
        parts.append(word)
    return parts
