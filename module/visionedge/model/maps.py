"""Raw maps of detectors with anchors: for each cell and anchor box, objectness and classes, undecoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionedge.model.decoding import best_rows
from visionedge.model.grids import part, to_corners
from visionedge.model.nodes import Nodes

Order = Literal["channels-first", "channels-last", "anchors-first"]
"""[N, anchors * width, h, w]; [N, h, w, anchors (*) width]; [N, anchors, h, w, width]."""


@dataclass(frozen=True, slots=True)
class RawMap:
    """One output. `anchors` are (width, height) in input pixels; `reach` is how far centres leave their cell.

    With a reach of 1 a centre stays in its cell; 2 lets it go half a cell to each side (darknet's scale_x_y).
    """

    output: str
    columns: int
    rows: int
    stride_x_px: float
    stride_y_px: float
    anchors: tuple[tuple[float, float], ...]
    reach: float = 1.0

    @property
    def count(self) -> int:
        """All anchors of all cells."""
        return self.columns * self.rows * len(self.anchors)

    def table(self, order: Order) -> NDArray[np.float32]:
        """For each anchor, in its order: column, row, strides in x and y, width, height, reach."""
        row, column, anchor = np.mgrid[: self.rows, : self.columns, : len(self.anchors)]
        if order == "anchors-first":
            row, column, anchor = (axis.transpose(2, 0, 1) for axis in (row, column, anchor))
        row, column, anchor = (axis.reshape(-1) for axis in (row, column, anchor))
        sizes = np.array(self.anchors, np.float64)[anchor]
        fixed = np.broadcast_to([self.stride_x_px, self.stride_y_px], (len(row), 2))
        reach = np.full((len(row), 1), self.reach)
        return np.concatenate([np.stack([column, row], 1), fixed, sizes, reach], axis=1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class MapsDecoder:
    """Decodes raw maps. How numbers become boxes: `centre` linear or sigmoid, `size` exp or (2 sigmoid)².

    The objectness always goes through a sigmoid; the classes through a sigmoid each or a softmax over all.
    """

    maps: tuple[RawMap, ...]
    classes: int
    order: Order
    centre: Literal["sigmoid", "linear"] = "sigmoid"
    size: Literal["exp", "square"] = "exp"
    scores: Literal["sigmoid", "softmax"] = "sigmoid"

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The best rows, each anchor as its best class; boxes are decoded only for the chosen anchors."""
        tables = [self._reshaped(nodes, raw) for raw in self.maps]
        table = nodes.add("Concat", *tables, axis=1) if len(tables) > 1 else tables[0]
        scores = part(nodes, table, 5, 5 + self.classes, axis=2)
        softmax = self.scores == "softmax"
        return best_rows(
            nodes,
            nodes.add("Softmax", scores, axis=2) if softmax else scores,
            lambda chosen, count: self._boxes(nodes, table, chosen, count),
            anchors=sum(raw.count for raw in self.maps),
            classes=self.classes,
            limit=limit,
            activate=None if softmax else lambda n, values: n.add("Sigmoid", values),
            objectness=nodes.add("Sigmoid", part(nodes, table, 4, 5, axis=2)),
            one_class=True,
        )

    def _reshaped(self, nodes: Nodes, raw: RawMap) -> str:
        """A map as float32 [N, count, 5 + classes]."""
        tensor, width = nodes.cast(raw.output, "float32"), 5 + self.classes
        if self.order == "channels-first":
            tensor = nodes.reshape(tensor, 0, len(raw.anchors), width, raw.rows * raw.columns)
            tensor = nodes.add("Transpose", tensor, perm=[0, 3, 1, 2])
        return nodes.reshape(tensor, 0, raw.count, width)

    def _boxes(self, nodes: Nodes, table: str, chosen: str, count: int) -> str:
        known = np.concatenate([raw.table(self.order) for raw in self.maps])
        boxes = nodes.pick(part(nodes, table, 0, 4, axis=2), chosen, count, 4)

        def facts(start: int, end: int) -> str:
            return nodes.add("Gather", nodes.constant(known[:, start:end]), chosen, axis=0)

        centres, sizes = part(nodes, boxes, 0, 2, axis=2), part(nodes, boxes, 2, 4, axis=2)
        if self.centre == "sigmoid":
            middle = nodes.add("Sub", nodes.add("Sigmoid", centres), nodes.floats(0.5))
            centres = nodes.add("Add", nodes.add("Mul", middle, facts(6, 7)), nodes.floats(0.5))
        centres = nodes.add("Mul", nodes.add("Add", centres, facts(0, 2)), facts(2, 4))
        if self.size == "square":
            double = nodes.add("Mul", nodes.add("Sigmoid", sizes), nodes.floats(2.0))
            sizes = nodes.add("Mul", double, double)
        else:
            sizes = nodes.add("Exp", sizes)
        return to_corners(nodes, centres, nodes.add("Mul", sizes, facts(4, 6)))
