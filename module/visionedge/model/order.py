"""The order of a graph's nodes: ONNX demands that each follows those that it uses; not all exporters do.

Onnxruntime sorts nodes by itself and so runs such files; converters to float16 are known to write them.
"""

import heapq
from collections.abc import Iterator

import onnx


def put_in_order(graph: onnx.GraphProto) -> None:
    """Let every node follow those whose outputs it uses, and change no more than that.

    A graph with a circle in it is left as it is.
    """
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs = [
        {makers[name] for name in _used(node) if makers.get(name, place) != place}
        for place, node in enumerate(graph.node)
    ]
    if all(max(needed, default=-1) < place for place, needed in enumerate(needs)):
        return
    order = _order(needs)
    if len(order) < len(needs):
        return
    nodes = [graph.node[place] for place in order]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _order(needs: list[set[int]]) -> list[int]:
    """Places, each behind those that it needs and else as they were; those in circles are left out."""
    users: list[list[int]] = [[] for _ in needs]
    for place, needed in enumerate(needs):
        for other in needed:
            users[other].append(place)
    missing = [len(needed) for needed in needs]
    ready = [place for place, count in enumerate(missing) if not count]
    order = []
    while ready:
        place = heapq.heappop(ready)
        order.append(place)
        for user in users[place]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
    return order


def _used(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node needs, those that its loops and branches take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                yield from _used(inner)
