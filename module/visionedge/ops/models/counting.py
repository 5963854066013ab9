"""How much there is in a network: its weights, and the multiplications it takes to look at one picture."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from visionedge.model.onnx_file import tensors

_WEIGHTS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    | {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Amount:
    """`parameters`: values of weights. `macs`: multiply-and-adds for one picture, of the `counted` nodes.

    `uncounted` nodes multiply too, but their shapes are known only when they run.
    """

    parameters: int
    macs: int
    counted: int
    uncounted: int


def amount(network: onnx.ModelProto, shapes: Shapes) -> Amount:
    """Count a network whose shapes are those for one picture."""
    known, total, missing = 0, 0, 0
    for node in network.graph.node:
        count = _COUNTS.get(node.op_type)
        if count is None:
            continue
        macs = count(node, shapes)
        if macs is None:
            missing += 1
        else:
            known, total = known + 1, total + macs
    weights = sum(math.prod(t.dims) for t in tensors(network) if t.data_type in _WEIGHTS)
    return Amount(weights, total, known, missing)


def operators_of(network: onnx.ModelProto) -> Counter[str]:
    """How many nodes there are of each operator; those of other domains with theirs in front."""
    return Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in network.graph.node
    )


def _shape(node: onnx.NodeProto, index: int, shapes: Shapes) -> tuple[int, ...] | None:
    return shapes.get(node.input[index]) if len(node.input) > index else None


def _convolution(node: onnx.NodeProto, shapes: Shapes, weight: int = 1) -> int | None:
    """Each value that comes out took one kernel: its weights are for its own group of channels."""
    kernel, out = _shape(node, weight, shapes), shapes.get(node.output[0])
    return None if kernel is None or out is None else math.prod(out) * math.prod(kernel[1:])


def _transposed(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Each value that goes in is spread by one kernel."""
    kernel, before = _shape(node, 1, shapes), _shape(node, 0, shapes)
    return None if kernel is None or before is None else math.prod(before) * math.prod(kernel[1:])


def _product(node: onnx.NodeProto, shapes: Shapes, second: int = 1) -> int | None:
    left, right = _shape(node, 0, shapes), _shape(node, second, shapes)
    if not left or not right:
        return None
    columns = right[-1] if len(right) > 1 else 1
    batch = math.prod(right[:-2]) if len(right) > len(left) else 1
    return math.prod(left) * columns * batch


def _general(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    right, out = _shape(node, 1, shapes), shapes.get(node.output[0])
    if right is None or out is None:
        return None
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(out) * right[1 if turned else 0]


_COUNTS: Mapping[str, Callable[[onnx.NodeProto, Shapes], int | None]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": lambda node, shapes: _convolution(node, shapes, 3),
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": lambda node, shapes: _product(node, shapes, 3),
    "Gemm": _general,
}
