"""Checks of an untrusted model after parsing: a valid graph, of operators that onnxruntime itself has."""

from collections.abc import Iterable

import onnx

from visionedge.errors import ModelError
from visionedge.model.graph import list_subgraphs

# The domains of onnxruntime's own operators. Any other one needs a library, and no library is loaded.
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

# Operators of onnxruntime that run something outside the graph: a compiled engine, a path to one, Python
# code.
_FORBIDDEN_OPERATORS = frozenset({"EPContext", "PyOp", "PyCustomOp", "PythonOp", "PythonOpGrad", "Snpe"})

_OLDER_OPSET_HINT = "export it with opset 17"

MAX_ENTRIES = 100
"""Inputs, outputs or opsets that a model may have. Raw maps of several scales are some dozens of outputs."""

MAX_NESTING = 8
"""How deep loops and branches may nest; detectors have one or two levels."""


def check_model_is_safe(model: onnx.ModelProto) -> None:
    """Refuse a model that cannot be analysed or run safely.

    Raises:
        ModelError: its format is too new, it needs operators from outside, or its nodes are no valid graph.
    """
    _check_counts(model)
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"uses opset {entry.version}; the newest that is supported is {newest}; {_OLDER_OPSET_HINT}"
            )
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"has IR version {model.ir_version}; the newest that is supported is {int(onnx.IR_VERSION)};"
            f" {_OLDER_OPSET_HINT}"
        )
    own = {(function.domain, function.name) for function in model.functions}
    for function in model.functions:
        _check_operators(function.node, own, 0)
    _check_operators(model.graph.node, own, 0)
    _check_graph(model.graph)


def _check_counts(model: onnx.ModelProto) -> None:
    """Bound the work: each input, output and opset is compared with all others."""
    weights = {tensor.name for tensor in model.graph.initializer}
    counts = {
        "inputs": sum(value.name not in weights for value in model.graph.input),
        "outputs": len(model.graph.output),
        "opsets": len(model.opset_import),
    }
    for what, count in counts.items():
        if count > MAX_ENTRIES:
            raise ModelError(f"has {count:,} {what}; no detector has more than {MAX_ENTRIES}", state=())


def _check_operators(nodes: Iterable[onnx.NodeProto], own: set[tuple[str, str]], depth: int) -> None:
    if depth > MAX_NESTING:
        raise ModelError(f"nests loops and branches deeper than {MAX_NESTING} levels; no detector does")
    for node in nodes:
        if node.domain == "com.microsoft.nchwc":
            raise ModelError(
                f"has the operator '{node.op_type}' of '{node.domain}': onnxruntime's own optimiser wrote it"
                " for one kind of processor; give the file that was optimised, or optimise it with"
                " ORT_ENABLE_EXTENDED at most"
            )
        known = node.domain in _KNOWN_DOMAINS or (node.domain, node.op_type) in own
        if not known or node.op_type in _FORBIDDEN_OPERATORS:
            raise ModelError(
                f"needs the operator '{node.op_type}' of '{node.domain or 'ai.onnx'}', whose code is not part"
                " of onnxruntime and is never loaded; export the model without it"
            )
        for graph in list_subgraphs(node):
            _check_operators(graph.node, own, depth + 1)


def _check_graph(graph: onnx.GraphProto) -> None:
    """Refuse a tensor that is computed twice or used before it is computed: so there is no cycle."""
    inputs = [value.name for value in graph.input]
    known = {*inputs, *(tensor.name for tensor in graph.initializer)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    if len(set(inputs)) < len(inputs):
        raise ModelError("is damaged: two of its inputs have one name")
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(
                    f"is damaged: its node {node.op_type} uses '{name}', which no earlier node computes"
                )
        for name in node.output:
            if name and name in known:
                raise ModelError(f"is damaged: '{name}' is computed twice")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise ModelError(f"is damaged: no node computes its output '{value.name}'")
