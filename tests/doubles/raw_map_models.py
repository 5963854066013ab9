"""Models that end in raw maps: for each cell and anchor box, objectness and classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_graphs import Graph
from tiny_yolos import (
    CLASSES,
    HEIGHT_PX,
    STRIDES_PX,
    WIDTH_PX,
    flat,
    grids,
    pieces,
    scores_map,
)

WIDTH = 5 + CLASSES


def raw_map_model(
    path: Path,
    order: str = "channels-first",
    *,
    activation: str | None = "LeakyRelu",
    strides: Sequence[int] = STRIDES_PX,
    sigmoid: bool = False,
    each: int = 3,
    **model: Any,
) -> Path:
    """Raw maps of YOLO in one of the exporters' layouts, after one activation."""
    graph = Graph(13)
    picture = graph.input("images", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    small = picture = graph.stem(picture)
    if activation == "SiLU":
        small = graph.add("Mul", picture, graph.add("Sigmoid", picture))
    elif activation == "Mish":
        small = graph.add("Mul", picture, graph.add("Tanh", graph.add("Softplus", picture)))
    elif activation is not None:
        small = graph.add(activation, picture)
    for stride, columns, rows in reversed(grids(strides)):
        tensor = scores_map(graph, small, each * WIDTH, stride)
        sides: list[int | str] = ["n", each * WIDTH, rows, columns]
        if sigmoid:
            tensor = graph.add("Sigmoid", tensor)
        if order == "channels-last":
            tensor, sides = (
                graph.add("Transpose", tensor, perm=[0, 2, 3, 1]),
                ["n", rows, columns, each * WIDTH],
            )
        if order == "anchors-first":
            tensor = graph.add("Reshape", tensor, graph.whole(0, each, WIDTH, rows, columns))
            tensor = graph.add("Transpose", tensor, perm=[0, 1, 3, 4, 2])
            sides = ["n", each, rows, columns, WIDTH]
        if order == "anchors-last":
            tensor = graph.add("Reshape", tensor, graph.whole(0, each, WIDTH, rows, columns))
            tensor = graph.add("Transpose", tensor, perm=[0, 3, 4, 1, 2])
            sides = ["n", rows, columns, each, WIDTH]
        graph.output(tensor, f"a{stride}", "float32", *sides)
    return graph.save(path, **model)


def fastestdet_model(path: Path, *, softmax: bool = True, stride: int = 16, **model: Any) -> Path:
    graph = Graph(13)
    picture = graph.input("input.1", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    objectness = graph.add("Sigmoid", scores_map(graph, picture, 1, stride))
    classes = scores_map(graph, picture, CLASSES, stride)
    classes = graph.add("Softmax" if softmax else "Relu", classes, **({"axis": 1} if softmax else {}))
    table = graph.add("Concat", objectness, scores_map(graph, picture, 4, stride), classes, axis=1)
    graph.output(table, "758", "float32", "n", WIDTH, HEIGHT_PX // stride, WIDTH_PX // stride)
    return graph.save(path, **model)


def _candidates(graph: Graph, picture: str) -> tuple[str, str]:
    """Boxes [N, 96, 4] as corners in pixels and scores [N, 96, classes]."""
    boxes = graph.add("Transpose", flat(graph, scores_map(graph, picture, 4, 8), 4), perm=[0, 2, 1])
    first, size = pieces(graph, graph.add("Sigmoid", boxes), 0, 2, 4, axis=2)
    scale = graph.constant(np.array([WIDTH_PX, HEIGHT_PX], np.float32) / 2)
    first, size = graph.add("Mul", first, scale), graph.add("Mul", size, scale)
    corners = graph.add("Concat", first, graph.add("Add", first, size), axis=2)
    scores = graph.add("Sigmoid", flat(graph, scores_map(graph, picture, CLASSES, 8), CLASSES))
    return corners, graph.add("Transpose", scores, perm=[0, 2, 1])


def end_to_end_model(
    path: Path, *, score_first: bool = False, heat: bool = False, samples: bool = False, **model: Any
) -> Path:
    """YOLOv10: the best 20 of all (anchor, class) pairs as [N, 20, 6]."""
    graph = Graph(17)
    picture = graph.input("images", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    if samples:
        lattice = graph.constant(np.zeros((1, HEIGHT_PX, WIDTH_PX, 2)))
        picture = graph.stem(picture)
        sampled = graph.add("GridSample", picture, lattice)
        picture = graph.add("Add", picture, sampled)
    corners, scores = _candidates(graph, picture)
    if heat:
        pooled = graph.add("MaxPool", scores, kernel_shape=[3], strides=[1], pads=[1, 1])
        scores = graph.add("Mul", scores, graph.add("Cast", graph.add("Equal", scores, pooled), to=1))
    values = graph.add("TopK", graph.add("Reshape", scores, graph.whole(0, -1)), graph.whole(20), outputs=2)
    place, divisor = f"{values}.1", graph.constant(CLASSES, "int64")
    label = graph.add("Unsqueeze", graph.add("Mod", place, divisor), graph.whole(2))
    row = graph.add("Unsqueeze", graph.add("Div", place, divisor), graph.whole(2))
    box = graph.add("GatherElements", corners, graph.add("Expand", row, graph.whole(1, 20, 4)), axis=1)
    columns = [box, graph.add("Unsqueeze", values, graph.whole(2)), graph.add("Cast", label, to=1)]
    table = graph.add("Concat", *(columns[::-1] if score_first else columns), axis=2)
    graph.output(table, "output0", "float32", "n", 20, 6)
    return graph.save(path, **model)
