"""Tiny YOLOs with random weights, ending in the nodes that their own exporters write."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score

WIDTH_PX, HEIGHT_PX = 96, 64
STRIDES_PX = (8, 16, 32)
CLASSES = 4
ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))

Table = NDArray[np.float32]
Box = tuple[float, float, float, float]


def grids(strides: Sequence[int] = STRIDES_PX) -> list[tuple[int, int, int]]:
    """(stride, columns, rows) of each map."""
    return [(s, math.ceil(WIDTH_PX / s), math.ceil(HEIGHT_PX / s)) for s in strides]


def cells(strides: Sequence[int] = STRIDES_PX) -> list[tuple[int, int, int]]:
    """(column, row, stride) of each cell, map by map."""
    return [(x, y, s) for s, columns, rows in grids(strides) for y in range(rows) for x in range(columns)]


def scores_map(graph: Graph, picture: str, channels: int, stride: int, gain: float = 1.0) -> str:
    """A convolution to [N, channels, rows, columns] of a picture of 0-1, with outputs around 0."""
    kernel = graph.noise(channels, 3, stride, stride, scale=gain / stride)
    return graph.add("Conv", picture, kernel, graph.noise(channels), strides=[stride, stride])


def flat(graph: Graph, tensor: str, channels: int) -> str:
    """[N, channels, rows, columns] as [N, channels, cells]."""
    return graph.add("Reshape", tensor, graph.whole(0, channels, -1))


def cell_constants(graph: Graph) -> tuple[str, str]:
    """Cells as [1, 2, cells] and their strides as [1, 1, cells]."""
    table = np.array(cells(), np.float32).T
    return graph.constant(table[None, :2]), graph.constant(table[None, 2:])


def pieces(graph: Graph, tensor: str, *cuts: int, axis: int = 1) -> list[str]:
    """A tensor in parts, each from one cut to the next."""
    edges = [graph.whole(cut) for cut in cuts]
    return [
        graph.add("Slice", tensor, start, end, graph.whole(axis)) for start, end in itertools.pairwise(edges)
    ]


def yolox(
    path: Path, *, decoded: bool = False, opset: int = 11, batch: int | str = "n", **model: Any
) -> Path:
    """YOLOX as its exporter writes it: raw, or decoded in the graph."""
    graph = Graph(opset)
    picture = graph.input("images", "float32", batch, 3, HEIGHT_PX, WIDTH_PX)
    small = graph.add("Conv", picture, graph.constant(np.eye(3)[:, :, None, None] / 255))
    tables = []
    for stride, *_ in grids():
        box = scores_map(graph, small, 4, stride)
        objectness = graph.add("Sigmoid", scores_map(graph, small, 1, stride))
        classes = graph.add("Sigmoid", scores_map(graph, small, CLASSES, stride))
        tables.append(flat(graph, graph.add("Concat", box, objectness, classes, axis=1), 5 + CLASSES))
    table = graph.add("Concat", *tables, axis=2)
    if decoded:
        cell, span = cell_constants(graph)
        centre, size, rest = pieces(graph, table, 0, 2, 4, 99)
        centre = graph.add("Mul", graph.add("Add", centre, cell), span)
        table = graph.add("Concat", centre, graph.add("Mul", graph.add("Exp", size), span), rest, axis=1)
    table = graph.add("Transpose", table, perm=[0, 2, 1])
    graph.output(table, "output", "float32", batch, len(cells()), 5 + CLASSES)
    return graph.save(path, **model)


def yolov6(path: Path, **model: Any) -> Path:
    """YOLOv6: YOLOX's shape, decoded, with ones for the objectness."""
    graph = Graph(13)
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    boxes = [flat(graph, scores_map(graph, picture, 4, s), 4) for s, *_ in grids()]
    classes = [
        flat(graph, graph.add("Sigmoid", scores_map(graph, picture, CLASSES, s)), CLASSES)
        for s, *_ in grids()
    ]
    cell, stride = cell_constants(graph)
    middle = graph.add("Add", cell, graph.constant(0.5))
    before, after = pieces(graph, graph.add("Abs", graph.add("Concat", *boxes, axis=2)), 0, 2, 4)
    first, second = graph.add("Sub", middle, before), graph.add("Add", middle, after)
    centre = graph.add("Div", graph.add("Add", first, second), graph.constant(2.0))
    box = graph.add("Concat", centre, graph.add("Sub", second, first), axis=1)
    box = graph.add("Transpose", graph.add("Mul", box, stride), perm=[0, 2, 1])
    score = graph.add("Transpose", graph.add("Concat", *classes, axis=2), perm=[0, 2, 1])
    ones = graph.constant(np.ones((1, len(cells()), 1)))
    table = graph.add("Concat", box, ones, score, axis=2)
    graph.output(table, "outputs", "float32", 1, len(cells()), 5 + CLASSES)
    return graph.save(path, **model)


def yolov5(
    path: Path,
    *,
    way: Literal["split", "slice"] = "split",
    maps: bool = False,
    batch: int | str = "n",
    **model: Any,
) -> Path:
    """YOLOv5 as its exporter writes it, with the undecoded maps beside the table if `maps`."""
    graph = Graph(12)
    picture = graph.input("images", "float32", batch, 3, HEIGHT_PX, WIDTH_PX)
    tables, width = [], 5 + CLASSES
    for index, (stride, columns, rows) in enumerate(grids()):
        raw = scores_map(graph, picture, 3 * width, stride)
        raw = graph.add("Reshape", raw, graph.whole(0, 3, width, rows, columns))
        raw = graph.add("Transpose", raw, perm=[0, 1, 3, 4, 2])
        if maps:
            graph.output(raw, f"map{stride}", "float32", batch, 3, rows, columns, width)
        y = graph.add("Sigmoid", raw)
        if way == "split":
            centre = graph.add("Split", y, axis=4, split=[2, 2, 1 + CLASSES], outputs=3)
            size, rest = f"{centre}.1", f"{centre}.2"
        else:
            centre, size, rest = pieces(graph, y, 0, 2, 4, width, axis=4)
        mesh = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1)[None, None] - 0.5
        sides = np.array(ANCHORS[3 * index : 3 * index + 3], np.float32).reshape(1, 3, 1, 1, 2)
        two, span = graph.constant(2.0), graph.constant(float(stride))
        centre = graph.add("Mul", graph.add("Add", graph.add("Mul", centre, two), graph.constant(mesh)), span)
        size = graph.add("Mul", graph.add("Pow", graph.add("Mul", size, two), two), graph.constant(sides))
        whole = graph.add("Concat", centre, size, rest, axis=4)
        tables.append(graph.add("Reshape", whole, graph.whole(0, -1, width)))
    graph.output(graph.add("Concat", *tables, axis=1), "output0", "float32", batch, 3 * len(cells()), width)
    return graph.save(path, **model)


def yolov8(
    path: Path,
    *,
    columns: bool = True,
    more: int = 0,
    angle: bool = False,
    batch: int | str = "n",
    dtype: str = "float32",
    size: tuple[int | str, int | str] = (HEIGHT_PX, WIDTH_PX),
    scaled: bool = False,
    relative: bool = False,
    corners: bool = False,
    **model: Any,
) -> Path:
    """YOLOv8 as its exporter writes it; `more` numbers behind the scores as a model for poses has them.

    `angle` adds one and turns the boxes by it; `scaled`: the network divides its pixels by 255 itself;
    `relative`: it gives boxes as parts of the picture, as no exporter of ONNX does; `corners`: as two
    corners, as some ports of YOLOv9 do.
    """
    graph = Graph(17)
    picture = graph.input("images", dtype, batch, 3, *size)
    if dtype != "float32":
        picture = graph.add("Cast", picture, to=1)
    if scaled:
        picture = graph.add("Div", picture, graph.constant(255.0))
    bins = 8
    boxes = [flat(graph, scores_map(graph, picture, 4 * bins, s), 4 * bins) for s, *_ in grids()]
    classes = [flat(graph, scores_map(graph, picture, CLASSES, s), CLASSES) for s, *_ in grids()]
    spread = graph.add("Reshape", graph.add("Concat", *boxes, axis=2), graph.whole(0, 4, bins, -1))
    likely = graph.add("Softmax", graph.add("Transpose", spread, perm=[0, 2, 1, 3]), axis=1)
    steps = graph.constant(np.arange(bins, dtype=np.float32).reshape(1, bins, 1, 1))
    sides = graph.add("Reshape", graph.add("Conv", likely, steps), graph.whole(0, 4, -1))
    before, after = pieces(graph, sides, 0, 2, 4)
    cell, stride = cell_constants(graph)
    middle = graph.add("Add", cell, graph.constant(0.5))
    first, second = graph.add("Sub", middle, before), graph.add("Add", middle, after)
    centre = graph.add("Div", graph.add("Add", first, second), graph.constant(2.0))
    halves = [first, second] if corners else [centre, graph.add("Sub", second, first)]
    box = graph.add("Mul", graph.add("Concat", *halves, axis=1), stride)
    if relative:
        box = graph.add("Div", box, graph.constant(float(WIDTH_PX)))
    parts = [box, graph.add("Sigmoid", graph.add("Concat", *classes, axis=2))]
    if more or angle:
        extra = [flat(graph, scores_map(graph, picture, more + angle, s), more + angle) for s, *_ in grids()]
        parts.append(graph.add("Mul", graph.add("Concat", *extra, axis=2), graph.constant(8.0)))
    if angle:
        parts[0] = graph.add("Mul", box, graph.add("Cos", parts[-1]))
    table = graph.add("Concat", *parts, axis=1)
    width = 4 + CLASSES + more + angle
    shape: tuple[int | str, int | str] = (width, len(cells()) if size == (HEIGHT_PX, WIDTH_PX) else "anchors")
    if not columns:
        table, shape = graph.add("Transpose", table, perm=[0, 2, 1]), shape[::-1]
    if dtype != "float32":
        table = graph.add("Cast", table, to=10)
    graph.output(table, "output0", dtype, batch, *shape)
    return graph.save(path, **model)


def best_of(boxes_and_scores: Iterator[tuple[Box, Sequence[float]]]) -> NDArray[np.float64]:
    """Rows from (left, top, right, bottom) and the scores of all classes: each anchor as its best class."""
    rows = []
    for box, scores in boxes_and_scores:
        label = max(range(len(scores)), key=lambda index: scores[index])
        rows.append((*box, float(scores[label]), label))
    return by_score(rows)


def around(x: float, y: float, width: float, height: float) -> Box:
    """A box around a centre."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
