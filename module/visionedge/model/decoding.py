"""Graph nodes that decode the outputs of a network to rows; shared by the heads.

`select_best_rows` chooses the best (anchor, class) pairs of dense scores, `convert_list_to_rows` takes a
list that the network chose itself. `AnchorMapDecoder` and `DenseDecoder` are whole decoders for raw maps
and dense tables.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionedge.model.analysis.output_ops import OutputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import Decoder, NetworkInput, find_only_input

BoxDecoding = Callable[[str, int], str]
"""Decodes chosen anchors: (int64 [N, count], count) → float32 [N, count, 4], corners in input pixels."""


def select_best_rows(
    nodes: NodeBuilder,
    scores: str,
    decode_boxes: BoxDecoding,
    *,
    anchors: int,
    classes: int,
    limit: int,
    activate: Callable[[NodeBuilder, str], str] | None = None,
    objectness: str | None = None,
    one_class_per_anchor: bool = False,
) -> str:
    """The best (anchor, class) pairs: float32 [N, K, 6] with K = min(limit, anchors * classes).

    The K anchors with the largest scores are chosen first, then the K best pairs among them. The result is
    exact, because the K best pairs belong to these anchors; and boxes are decoded for K anchors only, of
    thousands.

    Args:
        nodes: the nodes are appended to it.
        scores: float32 [N, anchors, classes].
        decode_boxes: see `BoxDecoding`.
        anchors: the number of anchors.
        classes: the number of classes.
        limit: the most rows per picture.
        activate: a monotonic function (a sigmoid), applied to the chosen scores only.
        objectness: float32 [N, anchors, 1]; multiplies the scores.
        one_class_per_anchor: an anchor has only one row, that of its best class.
    """
    weigh = _make_weighing(activate, objectness)
    best = min(limit, anchors)
    count = best if one_class_per_anchor or classes == 1 else min(limit, best * classes)
    maxima = nodes.reduce_max(scores, 2) if classes > 1 else nodes.reshape(scores, 0, anchors)
    values, chosen = nodes.top_k(weigh(nodes, maxima, lambda n, factor: n.reshape(factor, 0, anchors)), best)
    boxes = decode_boxes(chosen, best)
    if classes == 1:
        ids = nodes.add("Mul", values, nodes.constant(np.zeros(1, np.float32)))
    elif one_class_per_anchor:
        ids = nodes.cast(nodes.top_k(nodes.gather_rows(scores, chosen, best, classes), 1)[1], "float32")
    else:
        pairs = weigh(
            nodes,
            nodes.gather_rows(scores, chosen, best, classes),
            lambda n, f: n.gather_rows(f, chosen, best, 1),
        )
        values, place = nodes.top_k(nodes.reshape(pairs, 0, best * classes), count)
        boxes = nodes.gather_rows(boxes, nodes.add("Div", place, nodes.int64s(classes)), count, 4)
        ids = nodes.cast(nodes.add("Mod", place, nodes.int64s(classes)), "float32")
    if activate is not None and objectness is None:
        values = activate(nodes, values)
    columns = [nodes.reshape(column, 0, count, 1) for column in (values, ids)]
    return nodes.add("Concat", boxes, *columns, axis=2)


Reshaping = Callable[[NodeBuilder, str], str]


def _make_weighing(
    activate: Callable[[NodeBuilder, str], str] | None, objectness: str | None
) -> Callable[[NodeBuilder, str, Reshaping], str]:
    """A function that multiplies scores by the objectness, if there is one."""

    def weigh(nodes: NodeBuilder, values: str, shaped: Reshaping) -> str:
        if objectness is None:
            return values
        # The objectness multiplies scores, so logits are activated first.
        values = activate(nodes, values) if activate is not None else values
        return nodes.add("Mul", values, shaped(nodes, objectness))

    return weigh


# --- grids of anchors ---------------------------------------------------------------------------------------

STRIDE_SETS_PX = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32))
"""The strides that detectors with a pyramid of maps are built with."""


def compute_grid(width_px: int, height_px: int, stride_px: int) -> tuple[int, int]:
    """(columns, rows) of the map with this stride."""
    return math.ceil(width_px / stride_px), math.ceil(height_px / stride_px)


def count_cells(width_px: int, height_px: int, strides_px: Sequence[int]) -> int:
    """The number of cells of all maps."""
    return sum(math.prod(compute_grid(width_px, height_px, stride)) for stride in strides_px)


def find_strides(
    count: int | None,
    width_px: int,
    height_px: int,
    anchors_per_cell: int = 1,
    stride_sets: Sequence[tuple[int, ...]] = STRIDE_SETS_PX,
) -> tuple[int, ...] | None:
    """The strides of the maps that together have `count` anchors, for a picture of this size."""
    for strides in stride_sets:
        if anchors_per_cell * count_cells(width_px, height_px, strides) == count:
            return strides
    return None


def make_cell_table(width_px: int, height_px: int, strides_px: Sequence[int]) -> NDArray[np.float32]:
    """For each cell its column, its row (from 0) and its stride: (cells, 3), map by map, row by row."""
    tables = []
    for stride in strides_px:
        columns, rows = compute_grid(width_px, height_px, stride)
        row, column = np.mgrid[:rows, :columns].reshape(2, -1)
        tables.append(np.stack([column, row, np.full_like(row, stride)], axis=1))
    return np.concatenate(tables).astype(np.float32)


def slice_axis(nodes: NodeBuilder, tensor: str, start: int, end: int, axis: int) -> str:
    """The part [start, end) of a tensor along one axis."""
    return nodes.add("Slice", tensor, nodes.int64s(start), nodes.int64s(end), nodes.int64s(axis))


def to_pixels(nodes: NodeBuilder, boxes: str, width_px: int, height_px: int) -> str:
    """Boxes [N, count, 4] of 0-1 as pixels of a picture."""
    return nodes.add("Mul", boxes, nodes.floats(*[width_px, height_px] * 2))


def centres_to_corners(nodes: NodeBuilder, boxes: str) -> str:
    """Boxes [N, count, 4] of a centre and a size, as left, top, right, bottom."""
    centres, sizes = slice_axis(nodes, boxes, 0, 2, axis=2), slice_axis(nodes, boxes, 2, 4, axis=2)
    return to_corners(nodes, centres, sizes)


def to_corners(nodes: NodeBuilder, centres: str, sizes: str) -> str:
    """Boxes from centres and sizes, each [N, count, 2]: [N, count, 4], left, top, right, bottom."""
    half = nodes.add("Mul", sizes, nodes.constant(np.full(1, 0.5, np.float32)))
    return nodes.add("Concat", nodes.add("Sub", centres, half), nodes.add("Add", centres, half), axis=2)


# --- lists that the network chose itself --------------------------------------------------------------------


def convert_list_to_rows(
    nodes: NodeBuilder, boxes: str, scores: str, ids: str, *, count: int | None, limit: int
) -> str:
    """The best rows of a list: float32 [N, K, 6] in falling order of score.

    `boxes` are float32 [N, n, 4] as corners in input pixels, `scores` and `ids` float32 [N, n]. If n is known
    as `count`, K is min(n, limit); else K is `limit`, and the list is padded with rows of score 0. Rows with
    a negative class are padding by the network: their score becomes 0, too.
    """
    best = limit if count is None else min(count, limit)
    # 1 for a class from 0 on, 0 for a negative one.
    above = nodes.add("Max", nodes.add("Add", ids, nodes.floats(1.0)), nodes.floats(0.0))
    scores = nodes.add("Mul", scores, nodes.add("Min", above, nodes.floats(1.0)))
    if count is None:
        boxes = nodes.add("Pad", boxes, nodes.int64s(0, 0, 0, 0, best, 0))
        scores, ids = (nodes.add("Pad", tensor, nodes.int64s(0, 0, 0, best)) for tensor in (scores, ids))
    values, place = nodes.top_k(scores, best)
    ids = nodes.add("Max", nodes.add("GatherElements", ids, place, axis=1), nodes.floats(0.0))
    columns = [nodes.reshape(column, 0, best, 1) for column in (values, ids)]
    return nodes.add("Concat", nodes.gather_rows(boxes, place, best, 4), *columns, axis=2)


# --- raw maps with anchors: undecoded box, objectness and classes per cell and anchor -----------------------

AnchorMapOrder = Literal["channels-first", "channels-last", "anchors-first"]
"""[N, anchors * width, h, w]; [N, h, w, anchors (*) width]; [N, anchors, h, w, width]."""


@dataclass(frozen=True, slots=True)
class AnchorMap:
    """One output. `anchors` are (width, height) in input pixels. `scale_x_y` is darknet's parameter.

    With `scale_x_y` 1 a centre stays in its cell; with 2 it can be half a cell outside on each side.
    """

    output: str
    columns: int
    rows: int
    stride_x_px: float
    stride_y_px: float
    anchors: tuple[tuple[float, float], ...]
    scale_x_y: float = 1.0

    @property
    def count(self) -> int:
        """The number of anchors of all cells."""
        return self.columns * self.rows * len(self.anchors)

    def table(self, order: AnchorMapOrder) -> NDArray[np.float32]:
        """For each anchor, in its order: column, row, strides in x and y, width, height, scale_x_y."""
        row, column, anchor = np.mgrid[: self.rows, : self.columns, : len(self.anchors)]
        if order == "anchors-first":
            row, column, anchor = (axis.transpose(2, 0, 1) for axis in (row, column, anchor))
        row, column, anchor = (axis.reshape(-1) for axis in (row, column, anchor))
        sizes = np.array(self.anchors, np.float64)[anchor]
        fixed = np.broadcast_to([self.stride_x_px, self.stride_y_px], (len(row), 2))
        scale_x_y = np.full((len(row), 1), self.scale_x_y)
        return np.concatenate([np.stack([column, row], 1), fixed, sizes, scale_x_y], axis=1).astype(
            np.float32
        )


@dataclass(frozen=True, slots=True)
class AnchorMapDecoder(Decoder):
    """Decodes raw maps. A centre is linear or a sigmoid, a size is exp(x) or "square": (2 sigmoid(x))².

    The objectness always goes through a sigmoid; the classes through a sigmoid each or a softmax over all.
    """

    maps: tuple[AnchorMap, ...]
    classes: int
    order: AnchorMapOrder
    centre: Literal["sigmoid", "linear"] = "sigmoid"
    size: Literal["exp", "square"] = "exp"
    scores: Literal["sigmoid", "softmax"] = "sigmoid"

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows, each anchor as its best class; boxes are decoded only for the chosen anchors."""
        tables = [self._reshaped(nodes, raw) for raw in self.maps]
        table = nodes.add("Concat", *tables, axis=1) if len(tables) > 1 else tables[0]
        scores = slice_axis(nodes, table, 5, 5 + self.classes, axis=2)
        softmax = self.scores == "softmax"
        return select_best_rows(
            nodes,
            nodes.add("Softmax", scores, axis=2) if softmax else scores,
            lambda chosen, count: self._boxes(nodes, table, chosen, count),
            anchors=sum(raw.count for raw in self.maps),
            classes=self.classes,
            limit=limit,
            activate=None if softmax else lambda n, values: n.add("Sigmoid", values),
            objectness=nodes.add("Sigmoid", slice_axis(nodes, table, 4, 5, axis=2)),
            one_class_per_anchor=True,
        )

    def _reshaped(self, nodes: NodeBuilder, raw: AnchorMap) -> str:
        """A map as float32 [N, count, 5 + classes]."""
        tensor, width = nodes.cast(raw.output, "float32"), 5 + self.classes
        if self.order == "channels-first":
            tensor = nodes.reshape(tensor, 0, len(raw.anchors), width, raw.rows * raw.columns)
            tensor = nodes.add("Transpose", tensor, perm=[0, 3, 1, 2])
        return nodes.reshape(tensor, 0, raw.count, width)

    def _boxes(self, nodes: NodeBuilder, table: str, chosen: str, count: int) -> str:
        known = np.concatenate([raw.table(self.order) for raw in self.maps])
        boxes = nodes.gather_rows(slice_axis(nodes, table, 0, 4, axis=2), chosen, count, 4)

        def facts(start: int, end: int) -> str:
            return nodes.add("Gather", nodes.constant(known[:, start:end]), chosen, axis=0)

        centres, sizes = slice_axis(nodes, boxes, 0, 2, axis=2), slice_axis(nodes, boxes, 2, 4, axis=2)
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


# --- dense tables: box, possibly objectness, and classes per anchor -----------------------------------------


@dataclass(frozen=True, slots=True)
class CellGrid:
    """The grid of undecoded boxes: centres in strides from their cell, sizes as logarithms of strides."""

    width_px: int
    height_px: int
    strides_px: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DenseDecoder(Decoder):
    """Decodes [N, anchors, 4 (+ 1) + classes], or [N, 4 (+ 1) + classes, anchors] if `columns`.

    A box is a centre and a size in input pixels, or relative to `cells`; with `corners` it is two corners.
    `objectness`: the fifth number multiplies the scores of the classes. All scores are behind a sigmoid.
    """

    output: str
    anchors: int
    classes: int
    objectness: bool
    columns: bool = False
    cells: CellGrid | None = None
    corners: bool = False

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows, each anchor as its best class; boxes are decoded only for the chosen anchors."""
        table = nodes.cast(self.output, "float32")
        if self.columns:
            table = nodes.add("Transpose", table, perm=[0, 2, 1])
        first = 5 if self.objectness else 4
        boxes = slice_axis(nodes, table, 0, 4, axis=2)
        return select_best_rows(
            nodes,
            slice_axis(nodes, table, first, first + self.classes, axis=2),
            lambda chosen, count: self._boxes(nodes, boxes, chosen, count),
            anchors=self.anchors,
            classes=self.classes,
            limit=limit,
            objectness=slice_axis(nodes, table, 4, 5, axis=2) if self.objectness else None,
            one_class_per_anchor=True,
        )

    def _boxes(self, nodes: NodeBuilder, table: str, chosen: str, count: int) -> str:
        boxes = nodes.gather_rows(table, chosen, count, 4)
        if self.corners:
            return boxes
        centres, sizes = slice_axis(nodes, boxes, 0, 2, axis=2), slice_axis(nodes, boxes, 2, 4, axis=2)
        if self.cells is not None:
            grid = make_cell_table(self.cells.width_px, self.cells.height_px, self.cells.strides_px)
            place = nodes.add("Gather", nodes.constant(grid[:, :2]), chosen, axis=0)
            stride = nodes.add("Gather", nodes.constant(grid[:, 2:]), chosen, axis=0)
            centres = nodes.add("Mul", nodes.add("Add", centres, place), stride)
            sizes = nodes.add("Mul", nodes.add("Exp", sizes), stride)
        return to_corners(nodes, centres, sizes)


@dataclass(frozen=True, slots=True)
class DenseTable:
    """The output [N, `rows`, `width`] of a model, its picture, and the operators that computed the output."""

    picture: NetworkInput
    output: TensorInfo
    rows: int
    width: int
    output_ops: OutputOps


def find_dense_table(signature: ModelSignature, beside: int | None = None) -> DenseTable | None:
    """The table that a model outputs; None for any other model.

    Further outputs with `beside` dimensions are allowed: the maps from which the table was computed.
    """
    picture = find_only_input(signature)
    tables = [t for t in signature.outputs if beside is None or t.rank != beside]
    if picture is None or len(tables) != 1:
        return None
    (output,) = tables
    rows, width = output.side(1), output.side(2)
    if output.rank != 3 or not output.is_float or not rows or not width:
        return None
    return DenseTable(picture, output, rows, width, signature.ops(output))
