"""What a network does to its picture in front of its first layers: scaling, mean subtraction, colour order.

A model that normalises its input itself must not get a normalised picture. So the picture is followed from
the input through all operators that move values or change them by constants, to the first layers. "No change
seen" is evidence only if every path ends at a layer; else `InputOps.unknown` names the operators that were
not understood.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from visionedge.model.graph import GraphIndex, list_inputs, read_attributes

LAYER_OPERATORS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "DeformConv", "Einsum", "FusedConv", "FusedGemm", "Gemm"}
    | {"MatMul", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
    | {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
)
_SHAPE_OPERATORS = frozenset({"Shape", "Size"})  # they do not read values
_FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
_INTEGER_TYPES = frozenset(
    {TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT32}
    | {TensorProto.INT32, TensorProto.UINT64, TensorProto.INT64}
)
_REMOVED_AXIS = -1
_SLICE_TO_END = 1 << 20
_MAX_DEPTH = 8
_MAX_LISTED = 6


@dataclass(frozen=True, slots=True)
class ValueBound:
    """The graph clips values of the input, in the unit of the input, to `low` … `high`.

    `integer_scale`: it rounds them to integers after multiplying them by this factor; 0 if it does not.
    """

    low: float
    high: float
    integer_scale: float = 0.0


@dataclass(frozen=True, slots=True)
class InputOps:
    """value * `factor` + `offset` per channel, in the order of the input's channels.

    `swaps_red_blue`: whether red and blue are swapped. `kernels`: (side, stride) of the convolutions that
    follow; a transformer has one with large patches. `unknown`: the operators between picture and layer
    that were not understood, or the reason why the result is unclear; "" if all is known. `seen`: the
    operators that were followed. `size_px`: (width, height) to which the graph resizes its picture, if it
    does. `known_transform`: the changes in front of the first unknown operator.
    """

    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    swaps_red_blue: bool = False
    kernels: frozenset[tuple[int, int]] = frozenset()
    unknown: str = ""
    seen: tuple[str, ...] = ()
    bounds: tuple[ValueBound, ...] = ()
    size_px: tuple[int, int] | None = None
    known_transform: "PictureTransform | None" = None

    @property
    def changes_values(self) -> bool:
        """Whether values are scaled or shifted."""
        return self.factor != (1.0, 1.0, 1.0) or self.offset != (0.0, 0.0, 0.0)


def read_input_ops(
    graph_index: GraphIndex, name: str, channel: int, size_px: tuple[int | None, int | None]
) -> InputOps:
    """Follow the input `name`, [N, 3, H, W] or [N, H, W, 3]; `channel` is its channel axis.

    `size_px` is (width, height) of the input.
    """
    walk = _Walk(graph_index)
    walk.known[name] = _PictureTensor(channel, 4, tuple(_Channel(i) for i in range(3)), size_px)
    for node in graph_index.graph.node:
        walk.step(node)
    return walk.input_ops(size_px)


@dataclass(frozen=True, slots=True)
class _Channel:
    """One channel of a tensor: value * factor + offset of the input's channel `source`."""

    source: int
    factor: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class _PictureTensor:
    """A tensor that holds the picture. `axis` is that of its channels; None if unknown, -1 if it was removed.

    `parts`: the number of smaller pictures into which it was split, as a Focus does.
    """

    axis: int | None
    rank: int
    channels: tuple[_Channel, ...]
    size_px: tuple[int | None, int | None]
    parts: int = 1


Values = NDArray[np.generic]


class _Walk:
    """The tensors that hold the picture so far, and what was found on the way."""

    def __init__(self, graph_index: GraphIndex) -> None:
        self.constants = graph_index.constants
        self.producers = graph_index.producers
        self.users = graph_index.users
        self.known: dict[str, _PictureTensor] = {}
        self.ends: list[_PictureTensor] = []
        self.kernels: set[tuple[int, int]] = set()
        self.bounds: list[ValueBound] = []
        self.seen: dict[str, None] = {}
        self.unknown: dict[str, None] = {}
        self.known_transform: PictureTransform | None = None

    def step(self, node: onnx.NodeProto) -> None:
        """Follow the picture through a node, if the node reads it."""
        pictures = [name for name in dict.fromkeys(list_inputs(node)) if name in self.known]
        if not pictures or node.op_type in _SHAPE_OPERATORS:
            return
        handler = _HANDLERS.get(node.op_type) if pictures[0] in node.input else None
        outputs = handler(self, node, self.known[pictures[0]]) if handler is not None else None
        if outputs is not None:
            self.seen[node.op_type] = None
            self.known.update(zip(node.output, outputs, strict=False))
        elif node.op_type in LAYER_OPERATORS:
            self.ends.extend(self.known[name] for name in pictures)
            if "Conv" in node.op_type:
                self.kernels.add(self.kernel(node))
        else:
            self.unknown[node.op_type] = None
            self.known_transform = self.known_transform or _summary(self.known[pictures[0]])

    def input_ops(self, size_px: tuple[int | None, int | None]) -> InputOps:
        """The summary of all paths from the picture to a layer."""
        seen = tuple(self.seen)[:_MAX_LISTED]
        unknown = ", ".join(list(self.unknown)[:_MAX_LISTED])
        summaries = {_summary(pixels) for pixels in self.ends}
        kernels = frozenset(self.kernels)
        if unknown:
            return InputOps(kernels=kernels, unknown=unknown, seen=seen, known_transform=self.known_transform)
        summary = summaries.pop() if len(summaries) == 1 else None
        if summary is None:
            reason = "several paths to its layers, or mixed channels" if self.ends else "no layer behind"
            return InputOps(kernels=kernels, unknown=reason, seen=seen)
        factor, offset, swaps_red_blue, last = summary
        resized = (last[0] or 0, last[1] or 0) if last != size_px else None
        bounds = tuple(dict.fromkeys(self.bounds))
        return InputOps(factor, offset, swaps_red_blue, kernels, "", seen, bounds, resized)

    # --- constants ------------------------------------------------------------------------------------------

    def constant(self, name: str) -> Values | None:
        """The value of a constant, possibly cast or reshaped by nodes; None if the tensor is computed."""
        shapes: list[onnx.NodeProto] = []
        for _ in range(_MAX_DEPTH):
            if name in self.constants:
                values: Values = numpy_helper.to_array(self.constants[name])
                for shape in reversed(shapes):
                    values = self._reshaped(shape, values)
                return values
            node = self.producers.get(name)
            if node is None or node.op_type not in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
                return None
            shapes.append(node)
            name = node.input[0]
        return None

    def _reshaped(self, node: onnx.NodeProto, values: Values) -> Values:
        numbers = self.numbers(node, "shape" if node.op_type == "Reshape" else "axes", 1)
        match node.op_type, numbers:
            case "Reshape", list(shape):  # a side of 0 stays as it is
                return values.reshape([side or values.shape[place] for place, side in enumerate(shape)])
            case "Unsqueeze", list(axes):
                return np.expand_dims(values, tuple(axes))
            case "Squeeze", axes:
                return np.squeeze(values, axes and tuple(axes))
        return values

    def numbers(self, node: onnx.NodeProto, attribute: str, place: int) -> list[int] | None:
        """Integers that a node has as an attribute (older opsets) or as an input; None if it has neither."""
        for each in node.attribute:
            if each.name == attribute:
                return [int(n) for n in (each.ints or [each.i])]
        if place >= len(node.input) or not node.input[place]:
            return None
        values = self.constant(node.input[place])
        return None if values is None else [int(n) for n in np.ravel(values)]

    def kernel(self, node: onnx.NodeProto) -> tuple[int, int]:
        """(side, stride) of a convolution's kernel; side 0 if unknown."""
        attributes = read_attributes(node)
        stride, side = attributes.get("strides") or [1], attributes.get("kernel_shape") or [0]
        weight = self.constants.get(node.input[1])
        return (side[0] or (int(weight.dims[-1]) if weight is not None and weight.dims else 0), stride[0])


PictureTransform = tuple[
    tuple[float, float, float], tuple[float, float, float], bool, tuple[int | None, int | None]
]


def _summary(pixels: _PictureTensor) -> PictureTransform | None:
    """(factor, offset, swaps_red_blue, size_px) of a tensor; None if its channels are mixed."""
    ways: dict[int, _Channel] = {}
    for channel in pixels.channels:
        if ways.setdefault(channel.source, channel) != channel:
            return None
    if list(ways) not in ([0, 1, 2], [2, 1, 0]) or len(pixels.channels) != 3 * pixels.parts:
        return None
    first, second, third = (ways[i] for i in range(3))
    factor, offset = (first.factor, second.factor, third.factor), (first.offset, second.offset, third.offset)
    return factor, offset, next(iter(ways)) == 2, pixels.size_px


# --- one function per operator: the tensors that it outputs, None if they are unknown -----------------------

_PictureTensors = Sequence[_PictureTensor] | None


def _read_axis(node: onnx.NodeProto, pixels: _PictureTensor) -> int:
    axis: int = read_attributes(node).get("axis", 0)
    return axis % pixels.rank


def _identity(_: _Walk, __: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    return [pixels]


def _cast(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    to = read_attributes(node).get("to", 0)
    if to in _FLOAT_TYPES:
        return [pixels]
    return _rounded(walk, node, pixels) if to in _INTEGER_TYPES else None


def _rounded(walk: _Walk, _: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    factors = [abs(channel.factor) for channel in pixels.channels]
    walk.bounds.append(ValueBound(-np.inf, np.inf, integer_scale=min(factors)))
    return [pixels]


def _transpose(_: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    order = read_attributes(node).get("perm") or list(range(pixels.rank))[::-1]
    known = pixels.axis is not None and pixels.axis in order
    return [replace(pixels, axis=order.index(pixels.axis or 0) if known else None)]


def _reshape(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """The channel axis stays if the new shape has the channels in the same place; else it is unknown."""
    shape = walk.numbers(node, "shape", 1)
    if shape is None:
        return [replace(pixels, axis=None)]
    count = len(pixels.channels)
    if pixels.axis == 1 and len(shape) > 1 and shape[1] in (0, count):
        return [replace(pixels, rank=len(shape))]
    if pixels.axis == pixels.rank - 1 and shape[-1] == count:
        return [replace(pixels, axis=len(shape) - 1, rank=len(shape))]
    return [replace(pixels, axis=None, rank=len(shape))]


def _flatten(_: _Walk, __: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    return [replace(pixels, axis=None, rank=2)]


def _unsqueeze(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    axes = walk.numbers(node, "axes", 1)
    if axes is None or len(axes) != 1:
        return [replace(pixels, axis=None)]
    axis = axes[0] % (pixels.rank + 1)
    if pixels.axis == _REMOVED_AXIS:
        return [replace(pixels, axis=axis, rank=pixels.rank + 1)]
    moved = pixels.axis if pixels.axis is None or pixels.axis < axis else pixels.axis + 1
    return [replace(pixels, axis=moved, rank=pixels.rank + 1)]


def _squeeze(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    axes = walk.numbers(node, "axes", 1)
    if axes is None or len(axes) != 1 or pixels.axis in (None, _REMOVED_AXIS):
        return [replace(pixels, axis=None, rank=pixels.rank - 1)]
    axis, mine = axes[0] % pixels.rank, pixels.axis or 0
    moved = _REMOVED_AXIS if mine == axis else mine - (mine > axis)
    return [replace(pixels, axis=moved, rank=pixels.rank - 1)]


def _gather(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """Reorders channels, or takes one."""
    axis = _read_axis(node, pixels)
    places = walk.constant(node.input[1])
    if axis != pixels.axis or places is None or places.ndim > 1:
        return None
    count = len(pixels.channels)
    numbers = [int(n) for n in np.ravel(places)]
    if not all(-count <= n < count for n in numbers):
        return None
    channels = tuple(pixels.channels[n] for n in numbers)
    if places.ndim == 0:
        return [replace(pixels, axis=_REMOVED_AXIS, rank=pixels.rank - 1, channels=channels)]
    return [replace(pixels, channels=channels)]


def _slice(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """Takes channels, or every n-th row or column; a crop of the picture is unknown."""
    starts, ends = walk.numbers(node, "starts", 1), walk.numbers(node, "ends", 2)
    if starts is None or ends is None:
        return None
    axes = walk.numbers(node, "axes", 3)
    axes = list(range(len(starts))) if axes is None else axes
    steps = walk.numbers(node, "steps", 4)
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut = _cut(pixels, axis % pixels.rank, start, end, step)
        if cut is None:
            return None
        pixels = cut
    return [pixels]


def _cut(pixels: _PictureTensor, axis: int, start: int, end: int, step: int) -> _PictureTensor | None:
    if axis == pixels.axis:
        stop = None if step < 0 and end < -len(pixels.channels) else end
        return replace(pixels, channels=pixels.channels[start:stop:step])
    if axis == 0 or pixels.axis is None or step < 1:
        return None if (start, step) != (0, 1) or end < _SLICE_TO_END else pixels
    whole = end >= _SLICE_TO_END or end in pixels.size_px
    if not whole or not 0 <= start < step:
        return None
    return replace(pixels, parts=pixels.parts * step)


def _split(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    axis = _read_axis(node, pixels)
    count = len(pixels.channels)
    sizes = walk.numbers(node, "split", 1) or [count // len(node.output)] * len(node.output)
    if axis != pixels.axis or sum(sizes) != count:
        return None
    edges = np.cumsum([0, *sizes]).tolist()
    return [
        replace(pixels, channels=pixels.channels[first:last]) for first, last in itertools.pairwise(edges)
    ]


def _concat(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """Joins channels, or the parts of a picture."""
    axis = _read_axis(node, pixels)
    parts = [walk.known.get(name) for name in node.input]
    found = [part for part in parts if part is not None]
    alike = {(part.axis, part.rank, part.size_px, part.parts) for part in found}
    if len(found) != len(parts) or len(alike) != 1 or axis != pixels.axis:
        return None
    return [replace(pixels, channels=tuple(channel for part in found for channel in part.channels))]


def _space_to_depth(_: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    many: int = read_attributes(node).get("blocksize", 1) ** 2
    return [replace(pixels, channels=pixels.channels * many, parts=pixels.parts * many)]


def _resize(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """Another fixed size; channels and batch must stay."""
    width, height = pixels.size_px
    attributes = read_attributes(node)
    crops = attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize"
    if crops or {"axes", "keep_aspect_ratio_policy"} & set(attributes):
        return None
    if pixels.rank != 4 or pixels.axis not in (1, 3) or not width or not height:
        return None
    before = [1, 3, height, width] if pixels.axis == 1 else [1, height, width, 3]
    after = _sides(walk, node, before)
    spatial = (2, 3) if pixels.axis == 1 else (1, 2)
    if after is None or len(after) != 4 or any(after[i] != before[i] for i in {0, 1, 2, 3} - set(spatial)):
        return None
    return [replace(pixels, size_px=(after[spatial[1]], after[spatial[0]]))]


def _sides(walk: _Walk, node: onnx.NodeProto, before: list[int]) -> list[int] | None:
    sizes = walk.numbers(node, "", 3)
    if sizes:
        return [before[0], *sizes[1:]]
    factors: list[float] = read_attributes(node).get("scales", [])
    for name in list(node.input[1:3])[::-1]:
        values = walk.constant(name) if name and not factors else None
        factors = factors or ([float(f) for f in np.ravel(values)] if values is not None else [])
    if len(factors) != len(before):
        return None
    return [int(np.floor(side * factor)) for side, factor in zip(before, factors, strict=True)]


def _pad(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """A border for the convolutions that follow, narrower than their kernels; any other border is unknown."""
    pads = walk.numbers(node, "pads", 1)
    if pads is None or len(pads) != 2 * pixels.rank or min(pads) < 0:
        return None
    if not any(pads):
        return [pixels]
    users = walk.users.get(node.output[0], [])
    convolutions = bool(users) and all(user.op_type == "Conv" for user in users)
    fixed = [pads[axis] + pads[axis + pixels.rank] for axis in (0, pixels.axis or 0)]
    if not convolutions or any(fixed) or pixels.axis is None:
        return None
    return [pixels] if max(pads) < min(walk.kernel(user)[0] for user in users) else None


# --- arithmetic ---------------------------------------------------------------------------------------------

Floats = NDArray[np.float64]


def _apply_affine(pixels: _PictureTensor, factor: Floats, offset: Floats) -> _PictureTensors:
    rows = zip(pixels.channels, factor.tolist(), offset.tolist(), strict=True)
    channels = tuple(_Channel(c.source, c.factor * by, c.offset * by + plus) for c, by, plus in rows)
    return [replace(pixels, channels=channels)]


def _per_channel(pixels: _PictureTensor, values: Values | None) -> Floats | None:
    """A constant as one number per channel; None if it has another shape."""
    count = len(pixels.channels)
    if values is None or values.size not in (1, count) or values.dtype.kind not in "fiu":
        return None
    if values.size > 1:
        wide = [place for place, side in enumerate(values.shape) if side > 1]
        aligned = pixels.axis is not None and pixels.axis >= 0 and len(wide) == 1
        if not aligned or values.ndim - wide[0] != pixels.rank - (pixels.axis or 0):
            return None
    return np.broadcast_to(np.ravel(values).astype(np.float64), (count,))


def _arithmetic(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    first, second = node.input[:2]
    left = first in walk.known
    value = _per_channel(pixels, walk.constant(second if left else first))
    if value is None or (left and second in walk.known):
        return None
    zero, one = np.zeros(len(value)), np.ones(len(value))
    if node.op_type == "Div":
        return _apply_affine(pixels, 1 / value, zero) if left and value.all() else None
    if node.op_type == "Mul":
        return _apply_affine(pixels, value, zero) if value.all() else None
    if node.op_type == "Add":
        return _apply_affine(pixels, one, value)
    return _apply_affine(pixels, one, -value) if left else _apply_affine(pixels, -one, value)


def _negate(_: _Walk, __: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    return _apply_affine(pixels, -np.ones(len(pixels.channels)), np.zeros(len(pixels.channels)))


def _dequantize(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    scale = _per_channel(pixels, walk.constant(node.input[1]))
    shift = np.zeros(len(pixels.channels))
    if len(node.input) > 2 and node.input[2]:
        known = _per_channel(pixels, walk.constant(node.input[2]))
        if known is None:
            return None
        shift = known
    if scale is None or not scale.all():
        return None
    return _apply_affine(pixels, scale, -shift * scale)


def _batch_norm(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    if pixels.axis != 1:
        return None
    parts = [walk.constant(key) for key in node.input[1:5]]
    count = len(pixels.channels)
    if len(parts) != 4 or any(part is None or part.size != count for part in parts):
        return None
    gain, bias, mean, variance = (np.ravel(p).astype(np.float64) for p in parts if p is not None)
    epsilon = read_attributes(node).get("epsilon", 1e-5)
    factor = gain / np.sqrt(variance + epsilon)
    return _apply_affine(pixels, factor, bias - mean * factor) if factor.all() else None


def _pointwise_convolution(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """A 1x1 convolution that only scales and reorders channels; None for a learned one, which is a layer."""
    weight = walk.constants.get(node.input[1])
    if weight is None or list(weight.dims) not in ([3, 3, 1, 1], [3, 1, 1, 1]) or pixels.axis != 1:
        return None
    if walk.kernel(node)[1] != 1 or len(pixels.channels) != 3:
        return None
    if weight.data_type not in _FLOAT_TYPES:
        return None
    values = numpy_helper.to_array(weight).astype(np.float64).reshape(3, -1)
    matrix = np.diag(values[:, 0]) if values.shape[1] == 1 else values
    if not ((matrix != 0).sum(axis=0) == 1).all() or not ((matrix != 0).sum(axis=1) == 1).all():
        return None
    bias: Values | None = np.zeros(3)
    if len(node.input) > 2 and node.input[2]:
        bias = walk.constant(node.input[2])
    if bias is None:
        return None
    order = (matrix != 0).argmax(axis=1)
    swapped = replace(pixels, channels=tuple(pixels.channels[i] for i in order.tolist()))
    return _apply_affine(swapped, matrix[np.arange(3), order], np.ravel(bias).astype(np.float64))


# --- bounds -------------------------------------------------------------------------------------------------


def _clip(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    limits: dict[str, float] = read_attributes(node)
    for word, place in (("min", 1), ("max", 2)):
        if place < len(node.input) and node.input[place]:
            value = walk.constant(node.input[place])
            if value is None or value.size != 1:
                return None
            limits[word] = float(np.ravel(value)[0])
    return _add_bounds(walk, pixels, limits.get("min", -np.inf), limits.get("max", np.inf))


def _min_max(walk: _Walk, node: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    """Min and Max with constants."""
    others = [walk.constant(name) for name in node.input if name not in walk.known]
    if len(others) != len(node.input) - 1 or any(value is None or value.size != 1 for value in others):
        return None
    numbers = [float(np.ravel(value)[0]) for value in others if value is not None]
    if not numbers:
        return [pixels]
    if node.op_type == "Min":
        return _add_bounds(walk, pixels, -np.inf, min(numbers))
    return _add_bounds(walk, pixels, max(numbers), np.inf)


def _relu(walk: _Walk, _: onnx.NodeProto, pixels: _PictureTensor) -> _PictureTensors:
    return _add_bounds(walk, pixels, 0.0, np.inf)


def _add_bounds(walk: _Walk, pixels: _PictureTensor, low: float, high: float) -> _PictureTensors:
    for channel in pixels.channels:
        ends = sorted((end - channel.offset) / channel.factor for end in (low, high))
        walk.bounds.append(ValueBound(ends[0], ends[1]))
    return [pixels]


_HANDLERS: Mapping[str, Callable[[_Walk, onnx.NodeProto, _PictureTensor], _PictureTensors]] = {
    "Identity": _identity,
    "Dropout": _identity,
    "Cast": _cast,
    "Floor": _rounded,
    "Round": _rounded,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
    "Neg": _negate,
    "DequantizeLinear": _dequantize,
    "BatchNormalization": _batch_norm,
    "Conv": _pointwise_convolution,
    "Clip": _clip,
    "Min": _min_max,
    "Max": _min_max,
    "Relu": _relu,
}
