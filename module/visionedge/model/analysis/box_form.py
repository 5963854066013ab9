"""How a decoded table writes its boxes: as two corners, or as a centre and a size. Its shape is the same.

Distances from a cell to the four sides of a box become either, and the nodes that do it differ: corners are
the cell less some of them and the cell plus the others; a centre and a size come from two such corners.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import onnx

Form = Literal["corners", "centres", ""]
"""The last where nodes do not tell."""

Makers = Mapping[str, onnx.NodeProto]

_SCALERS = frozenset({"Mul", "Div"})
_SHAPES = frozenset({"Shape", "Size", "ConstantOfShape"})


def _one(sums: set[tuple[str, int]]) -> tuple[str, int]:
    return next(iter(sums)) if len(sums) == 1 else ("", 0)


class Forms:
    """The forms of boxes in a graph, whose `makers` are in its order.

    `movers` are operators whose first input is what comes out; `ends` tells of a tensor whether a network's
    weights made it. Each tensor is looked at once, however many ask.
    """

    def __init__(self, makers: Makers, movers: frozenset[str], ends: Callable[[str], bool]) -> None:
        self._makers = makers
        self._movers = movers
        self._depends: set[str] = set()
        for name, node in makers.items():
            if ends(name) or (
                node.op_type not in _SHAPES and self._depends.intersection(self._carried(node))
            ):
                self._depends.add(name)

    def form(self, output: str) -> Form:
        """The form of the boxes that an output begins with."""
        table = self._back(output)
        if table is None or table.op_type != "Concat":
            return ""
        # Boxes with something behind them, or boxes alone.
        return self._form(self._back(table.input[0])) or self._form(table)

    def _form(self, boxes: onnx.NodeProto | None) -> Form:
        if boxes is None or boxes.op_type != "Concat" or len(boxes.input) not in (2, 4):
            return ""
        half = len(boxes.input) // 2
        first, second = (_one(self._sums(names)) for names in (boxes.input[:half], boxes.input[half:]))
        if (first, second) == (("Sub", 1), ("Add", 1)):
            return "corners"
        if (first, second) == (("Add", 1), ("Add", 1)) and all(map(self._subtracts, boxes.input[:half])):
            return "corners"
        return "centres" if (first, second) == (("Add", 2), ("Sub", 2)) else ""

    def _subtracts(self, name: str) -> bool:
        """Whether a sum adds the negative of the network's own work: a cell less a distance."""
        node = self._back(name)
        worked = [] if node is None else [key for key in node.input if key in self._depends]
        sign = self._makers.get(worked[0]) if len(worked) == 1 else None
        for _ in self._makers:
            if sign is None or sign.op_type not in self._movers:
                break
            sign = self._makers.get(sign.input[0])
        return sign is not None and sign.op_type == "Neg"

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
