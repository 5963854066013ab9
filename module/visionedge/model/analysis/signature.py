"""What an ONNX model says of itself: the facts that a head is recognised by."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper

from visionedge.model.analysis.attention import transformer_parts
from visionedge.model.analysis.float_view import Graph, float_view
from visionedge.model.analysis.input_ops import Opening, read_opening
from visionedge.model.analysis.output_ops import Closing, read_closings
from visionedge.model.analysis.output_sources import (
    ClassCounts,
    Origin,
    count_classes,
    operators,
    read_origins,
)
from visionedge.model.analysis.shape_inference import infer
from visionedge.model.analysis.shapes import shape_of
from visionedge.model.analysis.sizes import sized

Shape = tuple[int | None, ...]
"""Dimensions; None where the model leaves one open."""

# Operators that move values without changing them: what made an output is looked for in front of these.
_MOVERS = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"})


_MOST_TOLD = 12


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
    """Inputs, outputs and metadata of a model; `made_by`: the operator that made each output's values.

    `origins` and `closings` tell more of each output, `opening` what is done to the picture first and
    `operators` which occur at all. `classes` is what a suppression in the graph tells of their number,
    `size` the evidence for the size of a picture that the model leaves open. `transformer_parts`: how many
    attentions and the like its queries are chosen behind.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    opening: Opening = field(default_factory=Opening)
    operators: frozenset[str] = frozenset()
    closings: Mapping[str, Closing] = field(default_factory=dict)
    classes: ClassCounts = field(default_factory=ClassCounts)
    size: str = ""
    transformer_parts: int = 0

    def __str__(self) -> str:
        return f"inputs {_listed(self.inputs)}; outputs {_listed(self.outputs)}"


def _listed(tensors: tuple[Tensor, ...]) -> str:
    words = ", ".join(str(tensor) for tensor in tensors[:_MOST_TOLD]) or "none"
    return words if len(tensors) <= _MOST_TOLD else f"{words} and {len(tensors) - _MOST_TOLD} more"


def read_signature(model: onnx.ModelProto, stated: Mapping[str, str] | None = None) -> Signature:
    """The signature of a parsed model; shapes that it leaves out are inferred where that is possible.

    `stated` is laid over its metadata: what its owner says of it.

    Raises:
        ModelError: a size is stated that it cannot have.
    """
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props} | dict(stated or {})
    weights = {tensor.name for tensor in graph.initializer}
    with sized(model, metadata) as size:
        inputs = _tensors(value for value in graph.input if value.name not in weights)
        outputs = _tensors(graph.output)
        if any(t.shape is None or None in t.shape[1:] for t in outputs):
            outputs = _inferred(model, outputs)
        classes = count_classes(model)
    floats = float_view(graph)
    return Signature(
        inputs=inputs,
        outputs=outputs,
        metadata=metadata,
        producer=_producer(model),
        made_by=_makers(floats),
        closings=read_closings(floats),
        origins=read_origins(floats),
        opening=_opening(floats, inputs),
        operators=operators(floats),
        classes=classes,
        size=size,
        transformer_parts=transformer_parts(floats),
    )


def _producer(model: onnx.ModelProto) -> str:
    """Who made it: Paddle's domain of operators tells, even where the last tool named itself, or nobody."""
    return next((i.domain for i in model.opset_import if i.domain == "Paddle"), model.producer_name)


def _opening(graph: Graph, inputs: tuple[Tensor, ...]) -> Opening:
    """What is done first to the one input that may be a picture."""
    pictures = [t for t in inputs if t.shape is not None and len(t.shape) == 4]
    if len(pictures) != 1:
        return Opening()
    shape = pictures[0].shape or ()
    last = shape[3] == 3 and shape[1] != 3
    size_px = (shape[2], shape[1]) if last else (shape[3], shape[2])
    return read_opening(graph, pictures[0].name, 3 if last else 1, size_px)


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
    found = infer(model)
    outputs = []
    for tensor in declared:
        kind = found.onnx.get(tensor.name)
        value = onnx.ValueInfoProto(name=tensor.name, type=kind)
        seen = tensor if kind is None or not kind.WhichOneof("value") else _tensor(value)
        outputs.append(seen)
    if not any(tensor.shape is None or None in tensor.shape[1:] for tensor in outputs):
        return tuple(outputs)
    return tuple(_closed(tensor, shape_of(found.walked.get(tensor.name))) for tensor in outputs)


def _closed(tensor: Tensor, found: Shape | None) -> Tensor:
    """A tensor with the sides that were found for those it leaves open; the first is the batch."""
    if found is None or (tensor.shape is not None and len(tensor.shape) != len(found)):
        return tensor
    seen = tensor.shape if tensor.shape is not None else (None,) * len(found)
    sides = (side if side is not None else other for side, other in zip(seen[1:], found[1:], strict=True))
    return replace(tensor, shape=(*seen[:1], *sides))


def _makers(graph: Graph) -> dict[str, str]:
    maker = {name: node for node in graph.node for name in node.output}
    made_by = {}
    for value in graph.output:
        node = maker.get(value.name)
        while node is not None and node.op_type in _MOVERS and node.input:
            node = maker.get(node.input[0])
        made_by[value.name] = node.op_type if node is not None else ""
    return made_by
