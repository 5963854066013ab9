"""Rewrites of a graph that keep its results: three that make it faster, and one that opens its batch.

`fold_focus`, `fold_layout` and `fold_scale` move work from the front of the graph into the first convolution.
`make_batch_dynamic` lets a network for one picture take any number.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.errors import ModelError
from visionedge.model.analysis.shape_inference import infer_types
from visionedge.model.graph import (
    Floats,
    GraphIndex,
    list_graph_inputs,
    read_attributes,
    read_constants,
    remove_unused,
    replace_input,
    set_constant,
)

# --- Focus --------------------------------------------------------------------------------------------------
#
# YOLOX and the first YOLOv5 begin with a Focus: four Slices take every second pixel, a Concat joins them,
# and a convolution follows. One convolution with stride 2 and a kernel twice as large computes the same.
# The Slices take 6 % of YOLOX-nano's time on a CPU.

_SLICE_TO_END = 1 << 30
_ROW_AXES, _COLUMN_AXES = (2, -2), (3, -1)


@dataclass(frozen=True, slots=True)
class _Quarter:
    """Every second row of `source` from `row` on, and every second column from `column` on."""

    source: str
    row: int
    column: int


def fold_focus(graph: onnx.GraphProto) -> int:
    """Fold each Focus of a graph [N, C, H, W] into its convolution, in place. Returns how many there were."""
    graph_index = GraphIndex.of(graph)
    unused = []
    for concat in [node for node in graph.node if node.op_type == "Concat" and len(node.input) == 4]:
        quarters = _read_quarters(graph_index, concat)
        convolution = graph_index.only_convolution(concat.output[0])
        if not quarters or convolution is None or not _is_plain_convolution(convolution, focus=True):
            continue
        weight = graph_index.constants.get(convolution.input[1])
        kernel = None if weight is None else _interleave_kernel(numpy_helper.to_array(weight), quarters)
        if kernel is not None:
            unused += [concat.output[0], convolution.input[1]]
            _replace_by_stride_2(graph, convolution, kernel, quarters[0].source)
    if unused:
        remove_unused(graph, unused)
    return len(unused) // 2


def _read_quarters(graph_index: GraphIndex, concat: onnx.NodeProto) -> list[_Quarter]:
    """The four quarters that a Concat joins along the channels; empty if it does not join a Focus."""
    found = [_read_quarter(graph_index, name) for name in concat.input]
    quarters = [quarter for quarter in found if quarter is not None]
    starts = {(quarter.row, quarter.column) for quarter in quarters}
    sources = {quarter.source for quarter in quarters}
    by_channel = read_attributes(concat).get("axis", 0) == 1
    return quarters if by_channel and len(quarters) == len(starts) == 4 and len(sources) == 1 else []


def _read_quarter(graph_index: GraphIndex, name: str) -> _Quarter | None:
    """The quarter in a tensor, if Slices with step 2 along both axes made it."""
    row = column = None
    while (node := graph_index.producers.get(name)) is not None and node.op_type == "Slice":
        for axis, start in _read_steps_of_2(graph_index, node):
            if axis in _ROW_AXES and row is None:
                row = start
            elif axis in _COLUMN_AXES and column is None:
                column = start
            else:
                return None
        name = node.input[0]
    return None if row is None or column is None else _Quarter(name, row, column)


def _read_steps_of_2(graph_index: GraphIndex, node: onnx.NodeProto) -> Iterator[tuple[int, int]]:
    """(axis, start) of each axis that a Slice takes with step 2 to its end; (0, 0) for any other axis."""
    values = [graph_index.constants.get(name) for name in node.input[1:]]
    known = [numpy_helper.to_array(value).ravel().tolist() for value in values if value is not None]
    if len(known) != 4 or len(values) != 4:
        yield 0, 0
        return
    for start, end, axis, step in zip(*known, strict=True):
        yield (axis, start) if step == 2 and start in (0, 1) and end >= _SLICE_TO_END else (0, 0)


def _is_plain_convolution(convolution: onnx.NodeProto, *, focus: bool = False) -> bool:
    """One group, explicit pads, columns without gaps; with `focus` also stride 1 and rows without gaps."""
    attributes = read_attributes(convolution)
    dilations, strides = attributes.get("dilations", [1, 1]), attributes.get("strides", [1, 1])
    return (
        attributes.get("group", 1) == 1
        and attributes.get("auto_pad", b"NOTSET") in (b"", b"NOTSET")
        and dilations[-1] == 1
        and (not focus or (set(dilations) == {1} and set(strides) == {1}))
    )


def _interleave_kernel(weight: NDArray[np.generic], quarters: list[_Quarter]) -> NDArray[np.generic] | None:
    """The weight [O, 4 * C, h, w] for the quarters as a weight [O, C, 2 * h, 2 * w] for the whole picture."""
    if weight.ndim != 4 or weight.shape[1] % 4:
        return None
    outputs, channels, height, width = weight.shape
    kernel = np.zeros((outputs, channels // 4, 2 * height, 2 * width), weight.dtype)
    for quarter, part in zip(quarters, np.split(weight, 4, axis=1), strict=True):
        kernel[:, :, quarter.row :: 2, quarter.column :: 2] = part
    return kernel


def _replace_by_stride_2(
    graph: onnx.GraphProto, convolution: onnx.NodeProto, kernel: NDArray[np.generic], source: str
) -> None:
    pads = read_attributes(convolution).get("pads", [0, 0, 0, 0])
    name = f"{convolution.output[0]}.whole"
    graph.initializer.append(numpy_helper.from_array(kernel, name))
    _set_attributes(
        convolution, kernel_shape=list(kernel.shape[2:]), strides=[2, 2], pads=[2 * pad for pad in pads]
    )
    convolution.input[0], convolution.input[1] = source, name


def _set_attributes(node: onnx.NodeProto, **attributes: list[int]) -> None:
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, values) for name, values in attributes.items())


# --- channel layout -----------------------------------------------------------------------------------------
#
# The bytes of a picture [H, W, 3] are also one channel [1, H, 3 * W] in which the three colours of a pixel
# are neighbours. A kernel three times as wide with a stride three times as large computes on it what the
# convolution computes on [3, H, W]. So the Transpose and the swap of red and blue are not needed, and a CPU
# writes the outputs once instead of once per colour. Measured gain on a CPU: 1.6 % of the time of
# YOLOX-nano and of NanoDet-g, 2.4 % of PicoDet's. CPU only: not measured on a GPU, where the Transpose is
# cheap anyway.

_COLOURS = 3


@dataclass(frozen=True, slots=True)
class _InputLayers:
    """The nodes from the picture to the first convolution.

    They are a Transpose, possibly a Gather that reorders colours, and nodes with a constant per colour.
    `order`: by channel of the convolution, the index of the colour in a pixel. `between`: the tensors
    between the picture and the convolution.
    """

    transpose: onnx.NodeProto
    gather: onnx.NodeProto | None
    order: tuple[int, ...]
    by_colour: tuple[onnx.NodeProto, ...]
    between: frozenset[str]
    convolution: onnx.NodeProto
    weight: Floats


def fold_layout(graph: onnx.GraphProto, pictures: str) -> bool:
    """Fold the transposition of the input `pictures` [N, H, W, 3], in place.

    Returns whether this was possible.
    """
    graph_index = GraphIndex.of(graph)
    layers = _find_input_layers(graph_index, pictures)
    size = _read_size(graph, pictures)
    if layers is None or size is None:
        return False
    height_px, width_px = size
    layers.transpose.op_type = "Reshape"
    del layers.transpose.attribute[:]
    set_constant(graph, layers.transpose, 1, np.array([0, 1, height_px, _COLOURS * width_px]))
    if layers.gather is not None:
        replace_input(graph, layers.gather.output[0], layers.gather.input[0])
    for node in layers.by_colour:
        values = graph_index.find_channel_constant(node, node.op_type)
        assert values is not None  # noqa: S101 - `_find_input_layers` chose nodes that have one
        row = np.tile(_in_pixel_order(values.ravel(), layers.order), width_px)
        set_constant(graph, node, graph_index.find_constant_input(node), row.reshape(1, 1, 1, -1))
    unused = [layers.convolution.input[1], *([layers.gather.output[0]] if layers.gather is not None else [])]
    _widen(graph, layers)
    for place in reversed(range(len(graph.value_info))):
        if graph.value_info[place].name in layers.between:  # its shape changed
            del graph.value_info[place]
    remove_unused(graph, unused)
    return True


def _find_input_layers(graph_index: GraphIndex, pictures: str) -> _InputLayers | None:
    """The nodes between the picture and the first convolution; None if there is any other node."""
    users = graph_index.users.get(pictures, [])
    transpose = next((node for node in users if node.op_type == "Transpose"), None)
    if transpose is None or read_attributes(transpose).get("perm") != [0, 3, 1, 2]:
        return None
    gather, order, by_colour = None, tuple(range(_COLOURS)), list[onnx.NodeProto]()
    node, between = graph_index.only_user(transpose.output[0]), [transpose.output[0]]
    while node is not None and node.op_type != "Conv":
        if node.op_type == "Gather" and gather is None and not by_colour:
            gather, order = node, _read_color_order(graph_index, node)
        elif (
            graph_index.find_channel_constant(node, "Mul") is not None
            or graph_index.find_channel_constant(node, "Add") is not None
        ):
            by_colour.append(node)
        elif node.op_type not in ("Cast", "Identity"):
            return None
        between.append(node.output[0])
        node = graph_index.only_user(node.output[0])
    if node is None or node.input[0] != between[-1] or not order or not _is_plain_convolution(node):
        return None
    weight = graph_index.find_weight(node.input[1])
    if weight is None or weight.ndim != 4 or weight.shape[1] != _COLOURS:
        return None
    return _InputLayers(transpose, gather, order, tuple(by_colour), frozenset(between), node, weight)


def _read_color_order(graph_index: GraphIndex, gather: onnx.NodeProto) -> tuple[int, ...]:
    """The order of colours that a Gather makes; empty if it does something else."""
    indices = graph_index.constants.get(gather.input[1])
    if indices is None or read_attributes(gather).get("axis", 0) != 1:
        return ()
    order = tuple(int(index) for index in numpy_helper.to_array(indices).ravel())
    return order if sorted(order) == list(range(_COLOURS)) and len(indices.dims) == 1 else ()


def _read_size(graph: onnx.GraphProto, pictures: str) -> tuple[int, int] | None:
    """(height, width) of the input; None if they are open."""
    value = next(value for value in graph.input if value.name == pictures)
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return (sizes[1], sizes[2]) if len(sizes) == 4 and sizes[1] > 0 and sizes[2] > 0 else None


def _widen(graph: onnx.GraphProto, layers: _InputLayers) -> None:
    """Give the convolution the kernel, stride and pads for colours that are neighbours in a row."""
    convolution, weight, attributes = layers.convolution, layers.weight, read_attributes(layers.convolution)
    outputs, _, rows, columns = weight.shape
    kernel = np.zeros((outputs, 1, rows, _COLOURS * columns), np.float32)
    for channel, place in enumerate(layers.order):
        kernel[:, 0, :, place::_COLOURS] = weight[:, channel]
    set_constant(graph, convolution, 1, kernel)
    down, across = attributes.get("strides", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    _set_attributes(
        convolution,
        kernel_shape=[rows, _COLOURS * columns],
        strides=[down, _COLOURS * across],
        pads=[top, _COLOURS * left, bottom, _COLOURS * right],
        dilations=[attributes.get("dilations", [1, 1])[0], 1],
    )


def _in_pixel_order(values: NDArray[np.float32], order: tuple[int, ...]) -> NDArray[np.float32]:
    """The constants per channel, reordered as the colours are in a pixel."""
    by_colour = np.empty_like(values)
    by_colour[list(order)] = values
    return by_colour


# --- input scale --------------------------------------------------------------------------------------------
#
# conv(x * factor, w) = conv(x, w * factor), also at the borders, because the padding is zero. An offset
# that is added to x cannot be folded, because the padding would have to change; it is divided by the factor
# instead. On a CPU this saves one of four passes over the picture.


@dataclass(frozen=True, slots=True)
class _ScaledConvolution:
    """x * factor (+ offset), each a constant per channel, and the convolution that alone uses the result."""

    multiply: onnx.NodeProto
    factor: Floats
    add: onnx.NodeProto | None
    offset: Floats
    convolution: onnx.NodeProto
    weight: Floats


def fold_scale(graph: onnx.GraphProto, source: str) -> bool:
    """Fold the factor of the tensor `source` into its convolution, in place.

    Returns whether there was one.
    """
    graph_index = GraphIndex.of(graph)
    found = _find_scaled_convolution(graph_index, source)
    if found is None:
        return False
    unused = [found.multiply.output[0], found.convolution.input[1]]
    set_constant(graph, found.convolution, 1, found.weight * found.factor.reshape(1, -1, 1, 1))
    if found.add is not None:
        place = graph_index.find_constant_input(found.add)
        set_constant(graph, found.add, place, found.offset / found.factor)
    replace_input(graph, found.multiply.output[0], source)
    remove_unused(graph, unused)
    return True


def _find_scaled_convolution(graph_index: GraphIndex, source: str) -> _ScaledConvolution | None:
    multiply = graph_index.only_user(source)
    factor = graph_index.find_channel_constant(multiply, "Mul")
    if multiply is None or factor is None or not factor.all():
        return None
    name = multiply.output[0]
    add = graph_index.only_user(name)
    offset = graph_index.find_channel_constant(add, "Add")
    if add is not None and offset is not None:
        name = add.output[0]
    else:
        add, offset = None, np.zeros_like(factor)
    while (user := graph_index.only_user(name)) is not None and user.op_type == "Identity":
        name = user.output[0]
    convolution = graph_index.only_convolution(name)
    weight = None if convolution is None else graph_index.find_weight(convolution.input[1])
    if convolution is None or weight is None:
        return None
    if weight.ndim != 4 or weight.shape[1] != factor.size:  # with groups, a kernel sees other channels
        return None
    return _ScaledConvolution(multiply, factor, add, offset, convolution, weight)


# --- dynamic batch ------------------------------------------------------------------------------------------
#
# Exporters write the batch size 1 into shapes all over a graph. It is replaced wherever it can mean the
# batch. The result is verified: `trial_run` compares several pictures at once with each alone.

DYNAMIC_BATCH = "N"
"""The name of the open dimension."""

# The number of values that these output depends on the picture, so results of several pictures cannot be
# stacked.
UNBATCHABLE_OPERATORS = frozenset(
    {"NonMaxSuppression", "NonZero", "Unique", "Compress", "If", "Loop", "Scan", "SequenceConstruct"}
    | {"SplitToSequence", "ConcatFromSequence", "SequenceInsert", "SequenceEmpty"}
)


def make_batch_dynamic(network: onnx.ModelProto) -> onnx.ModelProto | str:
    """A copy of the network that takes any number of pictures, or the reason why there is none."""
    operators = sorted({node.op_type for node in network.graph.node} & UNBATCHABLE_OPERATORS)
    if operators:
        return f"the number of values that its {operators[0]} outputs differs from picture to picture"
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    graph = copy.graph
    inputs = list_graph_inputs(graph)
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_value != 1:
            return f"its input '{value.name}' has no batch of one in front"
        dims[0].dim_param = DYNAMIC_BATCH
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    _BatchOpener(graph, _infer_shapes(network)).run({value.name for value in inputs})
    return copy


def _infer_shapes(network: onnx.ModelProto) -> dict[str, list[int]]:
    """The shapes of tensors that are known in full, for a batch of one; none if shape inference fails."""
    try:
        types = infer_types(network).onnx
    except ModelError:
        return {}  # the trial run shows whether they were needed
    shapes = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: shape for name, shape in shapes.items() if all(side > 0 for side in shape)}


class _BatchOpener:
    """Replaces the batch size 1 in the constants of a graph."""

    def __init__(self, graph: onnx.GraphProto, shapes: Mapping[str, list[int]]) -> None:
        self._graph = graph
        self._shapes = shapes
        self._constants = read_constants(graph)
        self._taken = {tensor.name for tensor in graph.initializer}
        self._taken |= {name for node in graph.node for name in node.output}
        self._added = 0

    def run(self, inputs: set[str]) -> None:
        """Rewrite all nodes that read something computed from `inputs`."""
        computed = set(inputs)
        for node in self._graph.node:
            if computed.isdisjoint(node.input):
                continue
            computed.update(node.output)
            rewrite = _BATCH_REWRITES.get(node.op_type)
            if rewrite is not None and node.input[0] in computed:
                rewrite(self, node)

    def reshape(self, node: onnx.NodeProto) -> None:
        """A constant shape that starts with 1 starts with -1 or 0 instead: the size comes from the data."""
        if len(node.input) < 2 or node.input[1] not in self._constants:
            return
        shape = numpy_helper.to_array(self._constants[node.input[1]]).astype(np.int64).ravel()
        zero_is_size = read_attributes(node).get("allowzero", 0)
        if not shape.size or shape[0] in (0, -1):
            return
        if -1 not in shape:
            shape = np.concatenate([[-1], shape[1:]])
        elif shape[0] == 1 and not zero_is_size:
            shape = np.concatenate([[0], shape[1:]])
        node.input[1] = self._add_constant(shape.astype(np.int64))

    def resize(self, node: onnx.NodeProto) -> None:
        """Constant output sizes, which include the batch, become factors."""
        before = self._shapes.get(node.input[0])
        if len(node.input) < 4 or node.input[3] not in self._constants or before is None:
            return
        sizes = numpy_helper.to_array(self._constants[node.input[3]]).ravel()
        if len(sizes) != len(before) or 0 in before:
            return
        # Rounded up to the next float32: the runtime rounds size * factor down, and must not get one less.
        factors = np.nextafter((sizes / np.array(before)).astype(np.float32), np.float32(np.inf))
        factors[sizes == before] = 1
        del node.input[3]
        node.input[2] = self._add_constant(factors)

    def _add_constant(self, values: NDArray[np.generic]) -> str:
        """A new constant; the old one can have other users."""
        while (name := f"open.batch.{self._added}") in self._taken:
            self._added += 1
        self._taken.add(name)
        self._graph.initializer.append(numpy_helper.from_array(values, name))
        return name


_BATCH_REWRITES: Mapping[str, Callable[[_BatchOpener, onnx.NodeProto], None]] = {
    "Reshape": _BatchOpener.reshape,
    "Resize": _BatchOpener.resize,
}
