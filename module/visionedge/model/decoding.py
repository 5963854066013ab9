"""From dense score maps to the best rows, as nodes: what every head with anchors ends in."""

from collections.abc import Callable

import numpy as np

from visionedge.model.nodes import Nodes

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
    objectness: str | None = None,
    one_class: bool = False,
) -> str:
    """The best (anchor, class) pairs: float32 [N, K, 6] with K = min(limit, anchors * classes).

    `scores` is float32 [N, anchors, classes]; `activate` (rising: a sigmoid) is applied to the chosen few.
    `objectness`: float32 [N, anchors, 1], a factor to them; `one_class`: an anchor counts once, as the best.
    Two steps, and still exact: the K best pairs lie in the K anchors with the best maxima. So a list of
    thousands of anchors is sorted once, and boxes are decoded for K of them, not for all.
    """
    weigh = _weighing(activate, objectness)
    best = min(limit, anchors)
    count = best if one_class or classes == 1 else min(limit, best * classes)
    maxima = nodes.reduce_max(scores, 2) if classes > 1 else nodes.reshape(scores, 0, anchors)
    values, chosen = nodes.top(weigh(nodes, maxima, lambda n, factor: n.reshape(factor, 0, anchors)), best)
    boxes = boxes_of(chosen, best)
    if classes == 1:
        ids = nodes.add("Mul", values, nodes.constant(np.zeros(1, np.float32)))
    elif one_class:
        ids = nodes.cast(nodes.top(nodes.pick(scores, chosen, best, classes), 1)[1], "float32")
    else:
        pairs = weigh(
            nodes, nodes.pick(scores, chosen, best, classes), lambda n, f: n.pick(f, chosen, best, 1)
        )
        values, place = nodes.top(nodes.reshape(pairs, 0, best * classes), count)
        boxes = nodes.pick(boxes, nodes.add("Div", place, nodes.whole(classes)), count, 4)
        ids = nodes.cast(nodes.add("Mod", place, nodes.whole(classes)), "float32")
    if activate is not None and objectness is None:
        values = activate(nodes, values)
    columns = [nodes.reshape(column, 0, count, 1) for column in (values, ids)]
    return nodes.add("Concat", boxes, *columns, axis=2)


Shaped = Callable[[Nodes, str], str]


def _weighing(
    activate: Callable[[Nodes, str], str] | None, objectness: str | None
) -> Callable[[Nodes, str, Shaped], str]:
    """How values are weighed with the objectness, brought to their shape; they are left alone without one."""

    def weigh(nodes: Nodes, values: str, shaped: Shaped) -> str:
        if objectness is None:
            return values
        # A factor comes to scores, not to what becomes scores.
        values = activate(nodes, values) if activate is not None else values
        return nodes.add("Mul", values, shaped(nodes, objectness))

    return weigh
