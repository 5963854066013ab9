"""The facts about an ONNX model by which the heads recognise its family.

`read_signature` reads them once: inputs, outputs, metadata, and what the graph does to its picture and its
outputs.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper

from visionedge.errors import ModelError
from visionedge.model.analysis.float_view import make_float_view
from visionedge.model.analysis.input_ops import InputOps, read_input_ops
from visionedge.model.analysis.output_ops import (
    ClassCounts,
    OutputOps,
    OutputSource,
    count_classes,
    list_operators,
    read_output_ops,
    read_output_sources,
)
from visionedge.model.analysis.shape_inference import infer_types, read_shape
from visionedge.model.graph import PICTURE_TYPES, GraphIndex, list_graph_inputs

Shape = tuple[int | None, ...]
"""Dimensions; None for an open one."""

DEFAULT_SIZE_PX = 640
"""The size for a picture input with open sides if nothing states one: the usual size of exports."""

_VALUE_PRESERVING = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"})
_TRANSFORMER_OPERATORS = frozenset({"Attention", "LayerNormalization", "MultiHeadAttention", "Softmax"})
_MAX_LISTED = 12


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output. `dtype` is numpy's name; `shape` is None if not even the rank is known."""

    name: str
    dtype: str
    shape: Shape | None

    @property
    def rank(self) -> int:
        """The number of dimensions; -1 if it is unknown."""
        return -1 if self.shape is None else len(self.shape)

    def side(self, axis: int) -> int | None:
        """A dimension, counted from the end if `axis` is negative; None if it is open, unknown or missing."""
        return self.shape[axis] if self.shape is not None and -self.rank <= axis < self.rank else None

    @property
    def is_float(self) -> bool:
        """Whether it holds floats."""
        return self.dtype.startswith("float")

    @property
    def is_integer(self) -> bool:
        """Whether it holds signed integers."""
        return self.dtype.startswith("int")

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name} {self.dtype}[{dims}]"


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """Inputs, outputs, metadata and analysis of a model.

    `output_operators`: by output, the operator that computed its values. `operators`: all operators of the
    graph. `size`: the evidence for the size of a picture input with open sides, else "".
    `transformer_parts`: the number of attentions and layer normalisations in front of the first choice of
    queries; 0 without such a choice.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: str = ""
    output_operators: Mapping[str, str] = field(default_factory=dict)
    output_sources: Mapping[str, OutputSource] = field(default_factory=dict)
    input_ops: InputOps = field(default_factory=InputOps)
    operators: frozenset[str] = frozenset()
    output_ops: Mapping[str, OutputOps] = field(default_factory=dict)
    classes: ClassCounts = field(default_factory=ClassCounts)
    size: str = ""
    transformer_parts: int = 0

    def states_head(self, name: str) -> bool:
        """Whether its metadata or `MODEL.yaml` states this head."""
        return self.metadata.get("visionedge.head") == name

    def ops(self, output: TensorInfo) -> OutputOps:
        """The operators behind the last weighted layer; the default `OutputOps` if nothing is known."""
        return self.output_ops.get(output.name, OutputOps())

    def source(self, output: TensorInfo) -> OutputSource:
        """The source of an output's values; the default `OutputSource` if nothing is known."""
        return self.output_sources.get(output.name, OutputSource())

    def __str__(self) -> str:
        return f"inputs {_join_tensors(self.inputs)}; outputs {_join_tensors(self.outputs)}"


def _join_tensors(tensors: tuple[TensorInfo, ...]) -> str:
    text = ", ".join(str(tensor) for tensor in tensors[:_MAX_LISTED]) or "none"
    return text if len(tensors) <= _MAX_LISTED else f"{text} and {len(tensors) - _MAX_LISTED} more"


def read_signature(model: onnx.ModelProto, stated: Mapping[str, str] | None = None) -> ModelSignature:
    """The signature of a parsed model; missing shapes are inferred if possible.

    `stated` overrides its metadata: the statements of `MODEL.yaml`.

    Raises:
        ModelError: the stated size contradicts the model.
    """
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props} | dict(stated or {})
    with fix_open_size(model, metadata) as size:
        inputs = tuple(_read_tensor(value) for value in list_graph_inputs(graph))
        outputs = tuple(_read_tensor(value) for value in graph.output)
        if any(t.shape is None or None in t.shape[1:] for t in outputs):
            outputs = _infer_outputs(model, outputs)
        classes = count_classes(model)
    floats = GraphIndex.of(make_float_view(graph))
    return ModelSignature(
        inputs=inputs,
        outputs=outputs,
        metadata=metadata,
        producer=_read_producer(model),
        output_operators=_find_output_operators(floats),
        output_ops=read_output_ops(floats),
        output_sources=read_output_sources(floats),
        input_ops=_read_input_ops(floats, inputs),
        operators=list_operators(floats.graph),
        classes=classes,
        size=size,
        transformer_parts=_count_transformer_parts(floats),
    )


def _read_producer(model: onnx.ModelProto) -> str:
    """The exporter's name; "Paddle" also if a later tool replaced the name.

    Then the operator domain of Paddle shows it, or the name that paddle2onnx gives to every graph.
    """
    domains = {opset.domain for opset in model.opset_import}
    if "Paddle" in domains or model.graph.name.startswith("PaddlePaddle Graph"):
        return "Paddle"
    return str(model.producer_name)


def _find_output_operators(graph_index: GraphIndex) -> dict[str, str]:
    operators = {}
    for value in graph_index.graph.output:
        node = graph_index.producers.get(value.name)
        while node is not None and node.op_type in _VALUE_PRESERVING and node.input:
            node = graph_index.producers.get(node.input[0])
        operators[value.name] = node.op_type if node is not None else ""
    return operators


def _read_input_ops(graph_index: GraphIndex, inputs: Iterable[TensorInfo]) -> InputOps:
    """What the graph does to its picture; the default if there is not exactly one input of rank 4."""
    pictures = [t for t in inputs if t.rank == 4]
    if len(pictures) != 1:
        return InputOps()
    shape = pictures[0].shape or ()
    channels_last = shape[3] == 3 and shape[1] != 3
    size_px = (shape[2], shape[1]) if channels_last else (shape[3], shape[2])
    return read_input_ops(graph_index, pictures[0].name, 3 if channels_last else 1, size_px)


def _count_transformer_parts(graph_index: GraphIndex) -> int:
    """How many attentions and layer normalisations lie in front of the first TopK, which chooses the queries.

    A network of convolutions with an encoder on its coarsest map has about four, a transformer has dozens.
    The two are trained with different preprocessing.
    """
    first = next((node for node in graph_index.graph.node if node.op_type == "TopK"), None)
    found, waiting, seen = 0, list(first.input[:1]) if first is not None else [], set[str]()
    while waiting:
        node = graph_index.producers.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        found += node.op_type in _TRANSFORMER_OPERATORS
        waiting.extend(node.input)
    return found


# --- inputs and outputs -------------------------------------------------------------------------------------


def _read_tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return TensorInfo(value.name, value.type.WhichOneof("value") or "unknown", None)
    shape: Shape | None = None
    if kind.HasField("shape"):
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
    return TensorInfo(value.name, _name_dtype(kind.elem_type), shape)


def _name_dtype(elem_type: int) -> str:
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)))
    except (KeyError, TypeError, ValueError):
        return f"type-{elem_type}"


def _infer_outputs(model: onnx.ModelProto, declared: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
    """Outputs with inferred shapes; if inference finds none, the declared ones."""
    found = infer_types(model)
    outputs = []
    for tensor in declared:
        kind = found.onnx.get(tensor.name)
        value = onnx.ValueInfoProto(name=tensor.name, type=kind)
        outputs.append(tensor if kind is None or not kind.WhichOneof("value") else _read_tensor(value))
    if not any(tensor.shape is None or None in tensor.shape[1:] for tensor in outputs):
        return tuple(outputs)
    return tuple(
        _fill_open_sides(tensor, read_shape(found.node_by_node.get(tensor.name))) for tensor in outputs
    )


def _fill_open_sides(tensor: TensorInfo, found: Shape | None) -> TensorInfo:
    """The tensor with the sides in `found` for its open ones, except the first, which is the batch."""
    if found is None or (tensor.shape is not None and len(tensor.shape) != len(found)):
        return tensor
    seen = tensor.shape if tensor.shape is not None else (None,) * len(found)
    sides = (side if side is not None else other for side, other in zip(seen[1:], found[1:], strict=True))
    return replace(tensor, shape=(*seen[:1], *sides))


# --- a picture input with open sides ------------------------------------------------------------------------


@contextmanager
def fix_open_size(model: onnx.ModelProto, metadata: Mapping[str, str]) -> Iterator[str]:
    """Fix open sides of the picture input within the context. Yields the evidence; "" if none was open.

    The size is the stated one, else that of the export, else the usual one.

    Raises:
        ModelError: a size is stated, but the model has another fixed one.
    """
    value = _find_picture(model.graph)
    if value is None:
        yield ""
        return
    dims = value.type.tensor_type.shape.dim
    channel = 3 if dims[3].dim_value == 3 and dims[1].dim_value != 3 else 1
    tall, wide = (1, 2) if channel == 3 else (2, 3)
    seen = (dims[wide].dim_value, dims[tall].dim_value)
    width, height, origin = _choose_size(metadata, seen)
    before = value.type.tensor_type.shape.SerializeToString()
    dims[channel].dim_value, dims[tall].dim_value, dims[wide].dim_value = 3, height, width
    try:
        yield f"its size is open: {width} x {height} {origin}" if 0 in seen else ""
    finally:
        value.type.tensor_type.shape.ParseFromString(before)


def _find_picture(graph: onnx.GraphProto) -> onnx.ValueInfoProto | None:
    """The only input that can be a picture: rank 4, with three channels or all sides open."""
    found = [value for value in list_graph_inputs(graph) if _may_be_picture(value)]
    return found[0] if len(found) == 1 else None


def _may_be_picture(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    dims = [d.dim_value for d in kind.shape.dim]
    if kind.elem_type not in PICTURE_TYPES or len(dims) != 4:
        return False
    return bool(dims[1] == 3 or dims[3] == 3 or dims[1] == dims[2] == dims[3] == 0)


def _choose_size(metadata: Mapping[str, str], seen: tuple[int, int]) -> tuple[int, int, str]:
    """(width, height, evidence) for the size `seen` in the model, in which 0 is open."""
    stated = _read_two_numbers(metadata.get("visionedge.input"), ("width", "height"))
    for word, fixed, wanted in zip(("width", "height"), seen, stated, strict=True):
        if fixed and wanted and fixed != wanted:
            raise ModelError(
                f"input.{word} is stated as {wanted}, but the model has a fixed {word} of {fixed}"
            )
    if all(seen):
        return *seen, ""
    exported = tuple(reversed(_read_two_numbers(metadata.get("imgsz"), (0, 1))))
    for size, origin in ((stated, "as stated"), (exported, "as its metadata 'imgsz' says")):
        if any(size):
            width, height = (a or b or max(size) for a, b in zip(seen, size, strict=True))
            return width, height, origin
    width, height = (a or max(seen) or DEFAULT_SIZE_PX for a in seen)
    return width, height, "as usual; MODEL.yaml can state another size as input.width and input.height"


def _read_two_numbers(text: str | None, keys: tuple[str, str] | tuple[int, int]) -> tuple[int, int]:
    """Two positive integers of a JSON document; 0 for each that is missing or something else."""
    try:
        document = json.loads(text or "{}")
    except ValueError:
        return 0, 0
    if isinstance(document, int):
        document = [document, document]
    found = []
    for key in keys:
        try:
            value = document[key]
        except (KeyError, IndexError, TypeError):
            value = 0
        found.append(value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0)
    return found[0], found[1]
