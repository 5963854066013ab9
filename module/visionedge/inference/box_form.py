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


def read_form(output: str, makers: Makers, movers: frozenset[str], ends: Callable[[str], bool]) -> Form:
    """The form of the boxes that an output begins with.

    `movers` are operators whose first input is what comes out; `ends` tells of a tensor whether a network's
    weights made it.
    """
    walk = _Walk(makers, movers, ends)
    table = walk.back(output)
    if table is None or table.op_type != "Concat":
        return ""
    # Boxes with something behind them, or boxes alone.
    return _form(walk, walk.back(table.input[0])) or _form(walk, table)


def _form(walk: "_Walk", boxes: onnx.NodeProto | None) -> Form:
    if boxes is None or boxes.op_type != "Concat" or len(boxes.input) not in (2, 4):
        return ""
    half = len(boxes.input) // 2
    first, second = (_one(walk.sums(names)) for names in (boxes.input[:half], boxes.input[half:]))
    if (first, second) == (("Sub", 1), ("Add", 1)):
        return "corners"
    if (first, second) == (("Add", 1), ("Add", 1)) and all(map(walk.subtracts, boxes.input[:half])):
        return "corners"
    return "centres" if (first, second) == (("Add", 2), ("Sub", 2)) else ""


def _one(sums: set[tuple[str, int]]) -> tuple[str, int]:
    return next(iter(sums)) if len(sums) == 1 else ("", 0)


class _Walk:
    def __init__(self, makers: Makers, movers: frozenset[str], ends: Callable[[str], bool]) -> None:
        self.makers = makers
        self.movers = movers
        self.ends = ends
        self.known: dict[str, bool] = {}

    def back(self, name: str) -> onnx.NodeProto | None:
        """The node behind all that only moves a tensor or scales it."""
        node = self.makers.get(name)
        for _ in self.makers:
            if node is None or node.op_type not in self.movers | _SCALERS:
                return node
            moved = list(node.input) if node.op_type in _SCALERS else list(node.input[:1])
            moved = [key for key in moved if self.depends(key)]
            node = self.makers.get(moved[0]) if len(moved) == 1 else None
        return None

    def sums(self, names: Sequence[str]) -> set[tuple[str, int]]:
        """The operators behind tensors, and on how many sides of each the network's own work stands."""
        nodes = [self.back(name) for name in names]
        return {
            (node.op_type, sum(map(self.depends, node.input))) if node is not None else ("", 0)
            for node in nodes
        }

    def subtracts(self, name: str) -> bool:
        """Whether a sum adds the negative of the network's own work: a cell less a distance."""
        node = self.back(name)
        worked = [] if node is None else [key for key in node.input if self.depends(key)]
        sign = self.makers.get(worked[0]) if len(worked) == 1 else None
        while sign is not None and sign.op_type in self.movers:
            sign = self.makers.get(sign.input[0])
        return sign is not None and sign.op_type == "Neg"

    def depends(self, name: str) -> bool:
        """Whether a tensor's values come from the network's weights; its shape alone does not count."""
        waiting, seen = [name], set[str]()
        while waiting:
            key = waiting.pop()
            if self.known.get(key) or (key not in seen and self.ends(key)):
                self.known[name] = True
                return True
            node = self.makers.get(key)
            if key in seen or node is None or key in self.known or node.op_type in _SHAPES:
                continue
            seen.add(key)
            waiting.extend(node.input[:1] if node.op_type in self.movers else node.input)
        self.known |= dict.fromkeys((name, *seen), False)
        return False
