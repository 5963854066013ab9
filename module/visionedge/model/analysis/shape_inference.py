"""Shapes of a graph, worked out in a process that may be lost: ``python -m …inference.inferring``.

ONNX's shape inference is native code that asserts: a graph from outside can end the process that asks it. So
it is asked where that harms nothing, with the weights left out; they do not matter for it.

The child reads a model from stdin and writes two graphs to stdout, which hold nothing but types: what ONNX
infers, and what `shapes` works out where it gives up.
"""

import contextlib
import hashlib
import math
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, TypeProto, shape_inference

from visionedge.errors import ModelError, UnavailableError
from visionedge.model.analysis.shapes import MOST_NUMBERS, tensor_types
from visionedge.model.compiler.trial_run import address_space_bytes, blames_machine
from visionedge.runtime.child_process import run

INFERRED_WITHIN_S = 60
_SPARE_S = 10
_KEPT = 8

Types = Mapping[str, TypeProto]


@dataclass(frozen=True, slots=True)
class Inferred:
    """The types of tensors: `onnx` as its own inference has them, `walked` as `shapes` works them out."""

    onnx: Types
    walked: Types


_kept: dict[str, Inferred] = {}


def infer(model: onnx.ModelProto) -> Inferred:
    """The types of a graph's tensors, as far as its inputs tell; those of the last few graphs are kept.

    Raises:
        ModelError: the inference crashes or does not end.
        UnavailableError: no process can be started.
    """
    sent = without_weights(model).SerializeToString()
    key = hashlib.sha256(sent).hexdigest()
    if key not in _kept:
        found = _asked(sent)
        while len(_kept) >= _KEPT:
            with contextlib.suppress(KeyError, StopIteration):
                del _kept[next(iter(_kept))]
        _kept[key] = found
    return _kept[key]


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
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
        if math.prod(tensor.dims) <= MOST_NUMBERS:
            to.initializer.append(tensor)
        else:
            to.initializer.append(
                TensorProto(name=tensor.name, data_type=tensor.data_type, dims=list(tensor.dims))
            )
    return copy


def _asked(sent: bytes) -> Inferred:
    try:
        done = run("visionedge.model.analysis.shape_inference", sent, INFERRED_WITHIN_S + _SPARE_S)
    except subprocess.TimeoutExpired:
        raise ModelError(_death(-signal.SIGALRM)) from None
    except OSError as error:
        raise UnavailableError(f"no process can be started to examine the model: {error.strerror}") from None
    if done.returncode:
        if (words := blames_machine(done.stderr)) is not None:
            raise UnavailableError(f"the process that examines the model cannot run: {words}")
        raise ModelError(_death(done.returncode))
    (first,) = struct.unpack_from("<Q", done.stdout)
    parts = (done.stdout[8 : 8 + first], done.stdout[8 + first :])
    ours, walked = (onnx.GraphProto.FromString(part) for part in parts)
    return Inferred(_types(ours), _types(walked))


def _types(graph: onnx.GraphProto) -> Types:
    return {value.name: value.type for value in graph.value_info}


def _death(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"the shapes of its tensors cannot be worked out within {INFERRED_WITHIN_S} s"
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"makes onnx's shape inference crash ({how}): its graph cannot be right; export it again"


# --- the child ----------------------------------------------------------------------------------------------


def main() -> None:
    """Answer for the model on stdin."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes(),) * 2)
    signal.alarm(INFERRED_WITHIN_S)
    model = onnx.ModelProto.FromString(sys.stdin.buffer.read())
    walked = onnx.GraphProto()
    for name, kind in tensor_types(model).items():
        walked.value_info.add(name=name).type.CopyFrom(kind)
    ours = _inferred(model).SerializeToString()
    sys.stdout.buffer.write(struct.pack("<Q", len(ours)) + ours + walked.SerializeToString())


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    """What ONNX infers; as declared where it fails (it is a help, never a judge)."""
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
