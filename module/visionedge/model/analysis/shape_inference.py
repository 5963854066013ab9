"""Shape inference in a child process: ``python -m visionedge.model.analysis.shape_inference``.

ONNX's shape inference is native code with assertions: an untrusted graph can end the process. So it runs in
a child process, without the weights, which it does not need.

The child reads a model from stdin and writes two graphs with types only to stdout: those that ONNX infers,
and those of `infer_node_by_node`, which also finds shapes that the graph computes from the shape of its
input.
"""

import contextlib
import hashlib
import math
import signal
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, TypeProto, defs, helper, numpy_helper, shape_inference

from visionedge.errors import ModelError
from visionedge.model.graph import read_opset
from visionedge.runtime.child_process import check_machine_limit, limit_this_child, run_child

Values = NDArray[np.generic]

# Shapes and indices are small; a larger tensor holds picture data.
MAX_VALUES = 4096
_DOMAINS = ("", "ai.onnx")
# onnx raises one of these for an invalid node, and its evaluator any error of numpy.
_INFERENCE_ERRORS = (
    shape_inference.InferenceError,
    defs.SchemaError,
    ValueError,
    RuntimeError,
    TypeError,
    IndexError,
    KeyError,
)


def infer_node_by_node(model: onnx.ModelProto) -> Mapping[str, TypeProto]:
    """The types of all tensors of a graph whose shape or element type follows from its inputs.

    An open first side of an input counts as 1. For the child process only: the inference of a node is
    native code with assertions.

    Exports with open dimensions read shapes, slice and join them, and reshape by the result. For a fixed
    input all of these are constants, so they are computed on the way.
    """
    walk = _NodeInference(model)
    for node in model.graph.node:
        walk.step(node)
    return walk.types


class _NodeInference:
    """The types of all tensors so far, and the values of the small ones that are constant."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.imports = list(model.opset_import)
        self.version = read_opset(model)
        self.types: dict[str, TypeProto] = {}
        self.values: dict[str, Values] = {}
        for value in graph.input:
            self.types[value.name] = _with_batch_of_one(value.type)
        for tensor in graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if math.prod(tensor.dims) <= MAX_VALUES and tensor.data_type != TensorProto.STRING:
                self.values[tensor.name] = numpy_helper.to_array(tensor)

    def step(self, node: onnx.NodeProto) -> None:
        """Infer the outputs of a node; nothing if that fails."""
        if node.domain not in _DOMAINS:
            return
        try:
            self._infer(node)
            self._compute(node)
        except _INFERENCE_ERRORS:
            return

    def _infer(self, node: onnx.NodeProto) -> None:
        types = {name: self.types[name] for name in node.input if name in self.types}
        data = {
            name: numpy_helper.from_array(self.values[name]) for name in node.input if name in self.values
        }
        schema = defs.get_schema(node.op_type, self.version, "")
        made = shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=self.imports)
        self.types.update(made)

    def _compute(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Shape":
            self._take_shape(node)
            return
        if any(name and name not in self.values for name in node.input) or not _is_self_contained(node):
            return
        shapes = [read_shape(self.types.get(name)) for name in node.output]
        if any(shape is None or None in shape or _size(shape) > MAX_VALUES for shape in shapes):
            return
        feeds = {name: self.values[name] for name in node.input if name}
        inputs = [helper.make_value_info(name, self.types[name]) for name in feeds]
        outputs = [helper.make_value_info(name, self.types[name]) for name in node.output]
        graph = helper.make_graph([node], "one", inputs, outputs)
        # A whole model, because an evaluator of a single node uses the newest version of its operator.
        alone = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.version)])
        # Few networks need it, and it takes 12 MB of every process that imports it.
        from onnx.reference import ReferenceEvaluator

        results = ReferenceEvaluator(alone).run(None, feeds)
        self.values.update(zip(node.output, map(np.asarray, results), strict=False))

    def _take_shape(self, node: onnx.NodeProto) -> None:
        shape = read_shape(self.types.get(node.input[0]))
        if shape is not None and None not in shape:
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            part = shape[ends.get("start", 0) : ends.get("end", len(shape))]
            self.values[node.output[0]] = np.array(part, np.int64)


def _with_batch_of_one(kind: TypeProto) -> TypeProto:
    """A tensor's type with 1 for an open first side."""
    closed = TypeProto()
    closed.CopyFrom(kind)
    dims = closed.tensor_type.shape.dim
    if len(dims) and dims[0].dim_value <= 0:
        dims[0].dim_value = 1
    return closed


def read_shape(kind: TypeProto | None) -> tuple[int | None, ...] | None:
    """The shape of a type, open sides as None; None if not even the rank is known."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim)


def _size(shape: tuple[int | None, ...]) -> int:
    return math.prod(side or 0 for side in shape)


def _is_self_contained(node: onnx.NodeProto) -> bool:
    """Whether a node has no subgraph, which could loop forever, and no text."""
    return not any(a.HasField("g") or a.graphs or a.HasField("s") or a.strings for a in node.attribute)


INFERENCE_TIMEOUT_S = 60
_EXTRA_TIMEOUT_S = 10  # for a child that cannot start its own timer
_MAX_CACHED = 8

TensorTypes = Mapping[str, TypeProto]


@dataclass(frozen=True, slots=True)
class InferredTypes:
    """The types of tensors: `onnx` by ONNX's own inference, `node_by_node` by `infer_node_by_node`."""

    onnx: TensorTypes
    node_by_node: TensorTypes


_cache: dict[str, InferredTypes] = {}


def infer_types(model: onnx.ModelProto) -> InferredTypes:
    """The types of a graph's tensors, as far as they follow from its inputs; the last few results are cached.

    Raises:
        ModelError: the inference crashes or does not end.
        UnavailableError: no process can be started.
    """
    sent = strip_weights(model).SerializeToString()
    key = hashlib.sha256(sent).hexdigest()
    if key not in _cache:
        found = _infer_in_child(sent)
        while len(_cache) >= _MAX_CACHED:
            with contextlib.suppress(KeyError, StopIteration):
                del _cache[next(iter(_cache))]
        _cache[key] = found
    return _cache[key]


def strip_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large constants have a shape and a type, but no values."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph, to = model.graph, copy.graph
    to.name = graph.name
    to.node.extend(graph.node)
    to.input.extend(graph.input)
    to.output.extend(graph.output)
    to.value_info.extend(graph.value_info)
    to.sparse_initializer.extend(graph.sparse_initializer)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= MAX_VALUES:
            to.initializer.append(tensor)
        else:
            to.initializer.append(
                TensorProto(name=tensor.name, data_type=tensor.data_type, dims=list(tensor.dims))
            )
    return copy


def _infer_in_child(sent: bytes) -> InferredTypes:
    purpose = "examine the model"
    timeout_s = INFERENCE_TIMEOUT_S + _EXTRA_TIMEOUT_S
    done = run_child("visionedge.model.analysis.shape_inference", sent, timeout_s, purpose=purpose)
    if done.returncode:
        check_machine_limit(done.stderr, purpose=purpose)
        raise ModelError(_describe_exit(done.returncode))
    (first,) = struct.unpack_from("<Q", done.stdout)
    parts = (done.stdout[8 : 8 + first], done.stdout[8 + first :])
    ours, node_by_node = (onnx.GraphProto.FromString(part) for part in parts)
    return InferredTypes(_types_of_graph(ours), _types_of_graph(node_by_node))


def _types_of_graph(graph: onnx.GraphProto) -> TensorTypes:
    return {value.name: value.type for value in graph.value_info}


def _describe_exit(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"the shapes of its tensors cannot be inferred within {INFERENCE_TIMEOUT_S} s"
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"makes onnx's shape inference crash ({how}), so its graph cannot be right; export it again"


# --- the child ----------------------------------------------------------------------------------------------


def main() -> None:
    """Infer the types of the model on stdin."""
    limit_this_child(INFERENCE_TIMEOUT_S)
    model = onnx.ModelProto.FromString(sys.stdin.buffer.read())
    node_by_node = onnx.GraphProto()
    for name, kind in infer_node_by_node(model).items():
        node_by_node.value_info.add(name=name).type.CopyFrom(kind)
    ours = _infer_with_onnx(model).SerializeToString()
    sys.stdout.buffer.write(struct.pack("<Q", len(ours)) + ours + node_by_node.SerializeToString())


def _infer_with_onnx(model: onnx.ModelProto) -> onnx.GraphProto:
    """The types that ONNX infers; the declared ones if inference fails."""
    found = onnx.GraphProto()
    try:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except (shape_inference.InferenceError, ValueError, RuntimeError):
        graph = model.graph
    for value in (*graph.value_info, *graph.input, *graph.output):
        found.value_info.add(name=value.name).type.CopyFrom(value.type)
    return found


if __name__ == "__main__":
    main()
