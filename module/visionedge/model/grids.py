"""Grids of anchors: how many cells a pyramid of strides has, where they lie, and boxes as corners."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from visionedge.model.nodes import Nodes

PYRAMIDS_PX = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32))
"""The strides that detectors with a pyramid of maps are built with."""


def grid(width_px: int, height_px: int, stride_px: int) -> tuple[int, int]:
    """Columns and rows of the map of one stride."""
    return math.ceil(width_px / stride_px), math.ceil(height_px / stride_px)


def cells(width_px: int, height_px: int, strides_px: Sequence[int]) -> int:
    """The cells of all maps together."""
    return sum(math.prod(grid(width_px, height_px, stride)) for stride in strides_px)


def pyramid(
    count: int | None,
    width_px: int,
    height_px: int,
    each: int = 1,
    among: Sequence[tuple[int, ...]] = PYRAMIDS_PX,
) -> tuple[int, ...] | None:
    """The strides whose maps have `count` anchors over a picture of this size, `each` to a cell."""
    for strides in among:
        if each * cells(width_px, height_px, strides) == count:
            return strides
    return None


def columns_rows_strides(width_px: int, height_px: int, strides_px: Sequence[int]) -> NDArray[np.float32]:
    """For each cell its column, its row (from 0) and its stride: (cells, 3), map by map, row by row."""
    tables = []
    for stride in strides_px:
        columns, rows = grid(width_px, height_px, stride)
        row, column = np.mgrid[:rows, :columns].reshape(2, -1)
        tables.append(np.stack([column, row, np.full_like(row, stride)], axis=1))
    return np.concatenate(tables).astype(np.float32)


def part(nodes: Nodes, tensor: str, start: int, end: int, axis: int) -> str:
    """A stretch of a tensor along one axis."""
    return nodes.add("Slice", tensor, nodes.whole(start), nodes.whole(end), nodes.whole(axis))


def to_corners(nodes: Nodes, centres: str, sizes: str) -> str:
    """Boxes from centres and sizes, each [N, count, 2]: [N, count, 4], left, top, right, bottom."""
    half = nodes.add("Mul", sizes, nodes.constant(np.full(1, 0.5, np.float32)))
    return nodes.add("Concat", nodes.add("Sub", centres, half), nodes.add("Add", centres, half), axis=2)
