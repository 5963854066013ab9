"""From a finished list of boxes to rows, as nodes: the end of heads whose graph chose the boxes itself."""

from visionedge.model.nodes import Nodes


def listed_rows(nodes: Nodes, boxes: str, scores: str, ids: str, *, count: int | None, limit: int) -> str:
    """The best of a list: float32 [N, K, 6] by falling score.

    `boxes` are float32 [N, n, 4] as corners in input pixels, `scores` and `ids` float32 [N, n]. K is
    min(n, limit) where n is known as `count`, and else `limit`: the list is filled up with rows of score 0.
    Rows of a negative class are such fillings of the network's own; their score becomes 0 too.
    """
    best = limit if count is None else min(count, limit)
    real = nodes.add("Min", nodes.add("Max", nodes.add("Add", ids, _one(nodes)), _zero(nodes)), _one(nodes))
    scores = nodes.add("Mul", scores, real)
    if count is None:
        boxes = nodes.add("Pad", boxes, nodes.whole(0, 0, 0, 0, best, 0))
        scores, ids = (nodes.add("Pad", tensor, nodes.whole(0, 0, 0, best)) for tensor in (scores, ids))
    values, place = nodes.top(scores, best)
    ids = nodes.add("Max", nodes.add("GatherElements", ids, place, axis=1), _zero(nodes))
    columns = [nodes.reshape(column, 0, best, 1) for column in (values, ids)]
    return nodes.add("Concat", nodes.pick(boxes, place, best, 4), *columns, axis=2)


def _one(nodes: Nodes) -> str:
    return nodes.floats(1.0)


def _zero(nodes: Nodes) -> str:
    return nodes.floats(0.0)
