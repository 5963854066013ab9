"""Whether a parsed model is one that may be looked into at all: sound as a graph, and of known operators."""

from collections.abc import Iterable, Iterator

import onnx

from visionedge.errors import ModelError

# What onnxruntime brings along itself. Everything else is a library of somebody else's, and none is loaded.
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

# Parts of onnxruntime that run what is not in the graph: a compiled engine, a path to one, Python code.
_FORBIDDEN_OPERATORS = frozenset({"EPContext", "PyOp", "PyCustomOp", "PythonOp", "PythonOpGrad", "Snpe"})

_OLDER_OPSET_HINT = "export it with opset 17"

MAX_ENTRIES = 100
"""Inputs, outputs or opsets that a model may have; raw maps of many scales are a few dozen outputs."""

MAX_NESTING = 8
"""How deep loops and branches may nest; detectors have one or two levels."""


def check_model_is_safe(model: onnx.ModelProto) -> None:
    """Refuse what no reader could follow, or nothing here could run.

    Raises:
        ModelError: it is of a future form, needs operators from elsewhere, or its nodes form no graph.
    """
    _check_counts(model)
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"uses opset {entry.version}, which is newer than all known here; {_OLDER_OPSET_HINT}"
            )
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"has IR version {model.ir_version}, which is newer than all known here; {_OLDER_OPSET_HINT}"
        )
    own = {(function.domain, function.name) for function in model.functions}
    for function in model.functions:
        _check_operators(function.node, own, 0)
    _check_operators(model.graph.node, own, 0)
    _check_order(model.graph)


def _check_counts(model: onnx.ModelProto) -> None:
    """Each of these is gone through for each of the others, or is far beyond what a detector has."""
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
                f"holds '{node.op_type}' of '{node.domain}': it was written by onnxruntime's own optimiser"
                " for one kind of processor; give the file that was optimised, or optimise it with"
                " ORT_ENABLE_EXTENDED at most"
            )
        known = node.domain in _KNOWN_DOMAINS or (node.domain, node.op_type) in own
        if not known or node.op_type in _FORBIDDEN_OPERATORS:
            raise ModelError(
                f"needs the operator '{node.op_type}' of '{node.domain or 'ai.onnx'}', which comes from"
                " outside; such code is never loaded: export the model without it"
            )
        for graph in _iterate_subgraphs(node):
            _check_operators(graph.node, own, depth + 1)


def _iterate_subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _check_order(graph: onnx.GraphProto) -> None:
    """Every tensor is made once and before it is used, as ONNX demands; so no walk can go in circles."""
    inputs = [value.name for value in graph.input]
    known = {*inputs, *(tensor.name for tensor in graph.initializer)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    if len(set(inputs)) < len(inputs):
        raise ModelError("is damaged: two of its inputs have one name")
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(
                    f"is damaged: its node {node.op_type} uses '{name}' before anything gives it"
                )
        for name in node.output:
            if name and name in known:
                raise ModelError(f"is damaged: '{name}' is made twice")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise ModelError(f"is damaged: nothing gives its output '{value.name}'")
