"""From dense score maps to the best rows, as nodes: what every head with anchors ends in."""

from collections.abc import Callable

import numpy as np

from visionedge.inference.nodes import Nodes

BoxesOf = Callable[[str, int], str]
"""Boxes of some anchors: (int64 [N, count], count) → float32 [N, count, 4], corners in input pixels."""


def best_rows(
    nodes: Nodes,
    scores: str,
    boxes_of: BoxesOf,
    *,
    anchors: int,
    classes: int,
    limit: int,
    activate: Callable[[Nodes, str], str] | None = None,
) -> str:
    """The best (anchor, class) pairs: float32 [N, K, 6] with K = min(limit, anchors * classes).

    `scores` is float32 [N, anchors, classes]; `activate` (rising: a sigmoid) is applied to the chosen few.
    Two steps, and still exact: the K best pairs lie in the K anchors with the best maxima. So a list of
    thousands of anchors is sorted once, and boxes are decoded for K of them, not for all.
    """
    best = min(limit, anchors)
    count = min(limit, best * classes)
    maxima = nodes.reduce_max(scores, 2) if classes > 1 else nodes.reshape(scores, 0, anchors)
    values, chosen = nodes.top(maxima, best)
    boxes = boxes_of(chosen, best)
    if classes > 1:
        pairs = nodes.reshape(nodes.pick(scores, chosen, best, classes), 0, best * classes)
        values, place = nodes.top(pairs, count)
        boxes = nodes.pick(boxes, nodes.add("Div", place, nodes.whole(classes)), count, 4)
        ids = nodes.cast(nodes.add("Mod", place, nodes.whole(classes)), "float32")
    else:
        ids = nodes.add("Mul", values, nodes.constant(np.zeros(1, np.float32)))
    if activate is not None:
        values = activate(nodes, values)
    columns = [nodes.reshape(column, 0, count, 1) for column in (values, ids)]
    return nodes.add("Concat", boxes, *columns, axis=2)
