"""What an ONNX model says of itself: the facts that a head is recognised by."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

Shape = tuple[int | None, ...]
"""Dimensions; None where the model leaves one open."""

# Operators that move values without changing them: what made an output is looked for in front of these.
_MOVERS = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: `dtype` as numpy names it, `shape` None where not even the rank is said."""

    name: str
    dtype: str
    shape: Shape | None

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name} {self.dtype}[{dims}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs, outputs and metadata of a model; `made_by`: the operator that made each output's values."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        inputs = ", ".join(str(t) for t in self.inputs) or "none"
        outputs = ", ".join(str(t) for t in self.outputs) or "none"
        return f"inputs {inputs}; outputs {outputs}"


def read_signature(model: onnx.ModelProto) -> Signature:
    """The signature of a parsed model; shapes that it leaves out are inferred where that is possible."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    outputs = _tensors(graph.output)
    if any(t.shape is None or None in t.shape[1:] for t in outputs):
        outputs = _inferred(model, outputs)
    return Signature(
        inputs=_tensors(value for value in graph.input if value.name not in weights),
        outputs=outputs,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        producer=model.producer_name,
        made_by=_makers(graph),
    )


def _tensors(values: Iterable[onnx.ValueInfoProto]) -> tuple[Tensor, ...]:
    return tuple(_tensor(value) for value in values)


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return Tensor(value.name, value.type.WhichOneof("value") or "unknown", None)
    shape: Shape | None = None
    if kind.HasField("shape"):
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
    return Tensor(value.name, _dtype(kind.elem_type), shape)


def _dtype(elem_type: int) -> str:
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)))
    except (KeyError, TypeError, ValueError):
        return f"type-{elem_type}"


def _inferred(model: onnx.ModelProto, declared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs as shape inference sees them; as declared where it fails (it is a help, never a judge)."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return declared
    return _tensors(inferred.graph.output)


def _makers(graph: onnx.GraphProto) -> dict[str, str]:
    maker = {name: node for node in graph.node for name in node.output}
    made_by = {}
    for value in graph.output:
        node = maker.get(value.name)
        while node is not None and node.op_type in _MOVERS and node.input:
            node = maker.get(node.input[0])
        made_by[value.name] = node.op_type if node is not None else ""
    return made_by
