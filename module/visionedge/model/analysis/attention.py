"""Whether the features that queries are chosen from come from a transformer: such are trained otherwise."""

from visionedge.model.analysis.float_view import Graph

_PARTS = frozenset({"Attention", "LayerNormalization", "MultiHeadAttention", "Softmax"})


def transformer_parts(graph: Graph) -> int:
    """How many attentions and normalisations of layers lie behind the first choice of queries.

    A network of convolutions with an encoder on its coarsest map has four or so, a transformer dozens; 0
    where nothing is chosen.
    """
    makers = {name: node for node in graph.node for name in node.output if name}
    first = next((node for node in graph.node if node.op_type == "TopK"), None)
    found, waiting, seen = 0, list(first.input[:1]) if first is not None else [], set[str]()
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        found += node.op_type in _PARTS
        waiting.extend(node.input)
    return found
