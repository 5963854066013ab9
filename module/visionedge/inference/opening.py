"""What a network does to its picture before anything learned: scaling, subtracting, swapping of channels.

A model that normalises by itself must not be fed what its family usually is. So its first nodes are followed
from the input for as long as they only move values or change them by constants, and summed up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Weights = Callable[[str], NDArray[np.generic] | None]
"""The constant behind a name, None where it is computed."""

_MOVERS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_LOOKERS = frozenset({"Shape", "Size"})  # ask for the shape only
_SWAP = (2, 1, 0)


@dataclass(frozen=True, slots=True)
class Opening:
    """Value * factor + offset for each channel in the input's order; `swaps` = red and blue trade places.

    `kernels` are (side, stride) of the convolutions that come next: large patches are a transformer's.
    """

    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    swaps: bool = False
    kernels: frozenset[tuple[int, int]] = frozenset()

    @property
    def scales(self) -> bool:
        """Whether it changes values at all."""
        return self.factor != (1.0, 1.0, 1.0) or self.offset != (0.0, 0.0, 0.0)


@dataclass(slots=True)
class _Path:
    """A walk from the input on; `factor` and `offset` are in the order that the channels have by now."""

    tensor: str
    channel: int | None
    factor: NDArray[np.float64] = field(default_factory=lambda: np.ones(3))
    offset: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    swaps: bool = False


def read_opening(graph: onnx.GraphProto, name: str, channel: int) -> Opening:
    """The opening of the input `name` [N, 3, H, W] or [N, H, W, 3], whose axis of channels is `channel`."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t

    def weights(key: str) -> NDArray[np.generic] | None:
        return numpy_helper.to_array(constants[key]) if key in constants else None

    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for key in dict.fromkeys(node.input):
            users.setdefault(key, []).append(node)
    path = _Path(name, channel)
    for _ in graph.node:
        following = [n for n in users.get(path.tensor, []) if n.op_type not in _LOOKERS]
        if len(following) != 1 or not _step(path, following[0], weights):
            break
    following = [n for n in users.get(path.tensor, []) if n.op_type not in _LOOKERS]
    return _summary(path, following, weights)


def _summary(path: _Path, following: list[onnx.NodeProto], weights: Weights) -> Opening:
    order = slice(None, None, -1) if path.swaps else slice(None)
    first, second, third = path.factor[order].tolist()
    low, middle, high = path.offset[order].tolist()
    kernels = [_kernel(node, weights) for node in following if node.op_type == "Conv"]
    return Opening((first, second, third), (low, middle, high), path.swaps, frozenset(kernels))


def _step(path: _Path, node: onnx.NodeProto, weights: Weights) -> bool:
    """Go over one node; False where it is none that only moves or scales."""
    if node.op_type in _MOVERS:
        known = True
        path.channel = None if node.op_type == "Reshape" else path.channel
    elif node.op_type == "Transpose":
        known = _transpose(path, node)
    elif node.op_type in ("Gather", "Slice"):
        known = _swap(path, node, weights)
    else:
        change = _STEPS[node.op_type](path.tensor, node, weights) if node.op_type in _STEPS else None
        known = change is not None
        if change is not None:
            factor, offset = change
            path.factor, path.offset = path.factor * factor, path.offset * factor + offset
    path.tensor = node.output[0] if known else path.tensor
    return known


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _transpose(path: _Path, node: onnx.NodeProto) -> bool:
    order = [int(i) for a in node.attribute if a.name == "perm" for i in a.ints]
    if path.channel is not None and path.channel in order:
        path.channel = order.index(path.channel)
    return bool(order)


def _swap(path: _Path, node: onnx.NodeProto, weights: Weights) -> bool:
    """Channels in reverse: a Gather by 2, 1, 0 or a Slice with the step -1."""
    values = [weights(key) for key in node.input[1:]]
    if any(value is None for value in values):
        return False
    numbers = [np.ravel(value).tolist() for value in values if value is not None]
    axis = _axis(node) if node.op_type == "Gather" else (numbers[2:3] or [[None]])[0][0]
    backwards = numbers[0] == list(_SWAP) if node.op_type == "Gather" else numbers[3:4] == [[-1]]
    if not backwards or path.channel is None or axis not in (path.channel, path.channel - 4):
        return False
    path.factor, path.offset, path.swaps = path.factor[::-1], path.offset[::-1], not path.swaps
    return True


Change = tuple[NDArray[np.float64], NDArray[np.float64]] | None


def _small(values: NDArray[np.generic] | None) -> NDArray[np.float64] | None:
    """A constant as one number for each of three channels; None if it is something else."""
    if values is None or values.size not in (1, 3) or max(values.shape, default=1) != values.size:
        return None
    return np.broadcast_to(np.ravel(values).astype(np.float64), (3,))


def _arithmetic(tensor: str, node: onnx.NodeProto, weights: Weights) -> Change:
    first, second = node.input[:2]
    value = _small(weights(second if first == tensor else first))
    if value is None:
        return None
    zero, one = np.zeros(3), np.ones(3)
    left = first == tensor
    ways: dict[str, Change] = {
        "Add": (one, value),
        "Sub": (one, -value) if left else (-one, value),
        "Mul": (value, zero),
        "Div": (1 / value, zero) if left and value.all() else None,
    }
    return ways[node.op_type]


def _quantize(_: str, node: onnx.NodeProto, weights: Weights) -> Change:
    scale = _small(weights(node.input[1]))
    shift = _small(weights(node.input[2])) if len(node.input) > 2 else np.zeros(3)
    if scale is None or shift is None or not scale.all():
        return None
    return (1 / scale, shift) if node.op_type == "QuantizeLinear" else (scale, -shift * scale)


def _normalize(_: str, node: onnx.NodeProto, weights: Weights) -> Change:
    parts = [_small(weights(key)) for key in node.input[1:5]]
    if len(parts) != 4 or any(part is None for part in parts):
        return None
    gain, bias, mean, variance = (part for part in parts if part is not None)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    factor = gain / np.sqrt(variance + epsilon)
    return factor, bias - mean * factor


_STEPS: Mapping[str, Callable[[str, onnx.NodeProto, Weights], Change]] = {
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "BatchNormalization": _normalize,
}


def _kernel(node: onnx.NodeProto, weights: Weights) -> tuple[int, int]:
    """(side, stride) of a convolution; 0 where it is not said."""
    weight = weights(node.input[1])
    stride = next((int(a.ints[0]) for a in node.attribute if a.name == "strides"), 1)
    side = next((int(a.ints[0]) for a in node.attribute if a.name == "kernel_shape"), 0)
    return (side or (int(weight.shape[-1]) if weight is not None else 0), stride)
