"""Models that answer a fixed set of queries with boxes and scores."""

from pathlib import Path

import numpy as np

from tiny_graphs import Graph

WIDTH_PX, HEIGHT_PX = 96, 64
QUERIES, CLASSES = 25, 7
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def queries(
    graph: Graph,
    picture: str,
    *,
    side: int = 3,
    stride: int = 2,
    refined: bool = True,
    classes: int = CLASSES,
) -> tuple[str, str]:
    """Logits [N, Q, C] and relative boxes [N, Q, 4], refined from points or straight from a layer."""
    logits = graph.attend(
        graph.features(picture, QUERIES * classes, side=side, stride=stride), QUERIES, classes
    )
    places = graph.add(
        "Add", graph.features(picture, QUERIES * 4, side=side, stride=stride), graph.noise(QUERIES * 4)
    )
    places = graph.add("Reshape", places, graph.whole(-1, QUERIES, 4))
    if refined:
        places = graph.add("Add", places, graph.noise(1, QUERIES, 4, scale=0.1))
    return logits, graph.add("Sigmoid", places)


def raw_detr_model(
    path: Path,
    *,
    side: int = 3,
    stride: int = 2,
    activation: str | None = None,
    opening: str | None = None,
    refined: bool = True,
    cut: bool = False,
    classes: int = CLASSES,
    names: tuple[str, str] = ("pred_boxes", "logits"),
    metadata: dict[str, str] | None = None,
) -> Path:
    """The export of logits and boxes, as Hugging Face and RF-DETR have it."""
    graph = Graph()
    picture = graph.input("pixel_values", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    if opening == "imagenet":
        less = graph.add("Sub", picture, graph.constant(MEAN.reshape(1, 3, 1, 1)))
        picture = graph.add("Div", less, graph.constant(STD.reshape(1, 3, 1, 1)))
    elif opening == "bytes":
        picture = graph.add("Div", picture, graph.constant(255.0))
    logits, boxes = queries(graph, picture, side=side, stride=stride, refined=refined, classes=classes)
    if activation is not None:
        logits = graph.add(activation, logits, **({"axis": -1} if activation == "Softmax" else {}))
    if cut:
        logits = graph.add("Slice", logits, graph.whole(0), graph.whole(-1), graph.whole(2))
    graph.output(boxes, names[0], "float32", "N", QUERIES, 4)
    graph.output(logits, names[1], "float32", "N", QUERIES, classes - cut)
    return graph.save(path, metadata)


def _corners(graph: Graph, boxes: str) -> str:
    def column(index: int) -> str:
        return graph.add("Slice", boxes, graph.whole(index), graph.whole(index + 1), graph.whole(2))

    x, y, w, h = (column(i) for i in range(4))
    half = graph.constant(0.5)
    half_w, half_h = graph.add("Mul", w, half), graph.add("Mul", h, half)
    sides = [("Sub", x, half_w), ("Sub", y, half_h), ("Add", x, half_w), ("Add", y, half_h)]
    return graph.add("Concat", *(graph.add(*side) for side in sides), axis=2)


def finished_detr_model(
    path: Path, *, batch: int | str = "N", chosen: int = 20, dtype: str = "float32", opset: int = 17
) -> Path:
    """RT-DETR's own export: a list chosen in the graph, boxes in the pixels of orig_target_sizes."""
    graph = Graph(opset)
    picture = graph.input("images", dtype, batch, 3, HEIGHT_PX, WIDTH_PX)
    floats = picture if dtype == "float32" else graph.add("Cast", picture, to=1)
    sizes = graph.input("orig_target_sizes", "int64", batch, 2)
    logits, boxes = queries(graph, floats)
    wide = graph.add("Tile", sizes, graph.whole(1, 2))
    scale = graph.add("Cast", graph.add("Unsqueeze", wide, graph.whole(1)), to=1)
    corners = graph.add("Mul", _corners(graph, boxes), scale)
    flat = graph.add("Flatten", graph.add("Sigmoid", logits), axis=1)
    best = graph.add("TopK", flat, graph.whole(chosen), outputs=2)
    classes = graph.constant(CLASSES, "int64")
    query = graph.add("Div", f"{best}.1", classes)
    labels = graph.add("Sub", f"{best}.1", graph.add("Mul", query, classes))
    places = graph.add("Tile", graph.add("Unsqueeze", query, graph.whole(2)), graph.whole(1, 1, 4))
    picked = graph.add("GatherElements", corners, places, axis=1)
    # The names lie: what counts is the shapes.
    graph.output(labels, "scores", "int64", batch, chosen)
    graph.output(picked, "labels", "float32", batch, chosen, 4)
    graph.output(best, "boxes", "float32", batch, chosen)
    return graph.save(path)


def joined_detr_model(path: Path, **metadata: str) -> Path:
    """RT-DETR as Ultralytics exports it."""
    graph = Graph()
    picture = graph.input("images", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    logits, boxes = queries(graph, picture)
    joined = graph.add("Concat", boxes, graph.add("Sigmoid", logits), axis=2)
    graph.output(joined, "output0", "float32", "N", QUERIES, 4 + CLASSES)
    return graph.save(path, metadata)
