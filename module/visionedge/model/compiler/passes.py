"""Focus, the way YOLOX and the first YOLOv5 begin: every second pixel in four slices, and a convolution.

A convolution with a kernel twice as large that goes two pixels at a time computes the very same without the
slices, which are slow: on a CPU they cost YOLOX-nano 6 % of its time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.model.graph import (
    Floats,
    GraphIndex,
    find_channel_constant,
    find_constant_input,
    find_weight,
    read_attributes,
    remove_unused,
    set_constant,
)

_TO_THE_END = 1 << 30
_ROWS, _COLUMNS = (2, -2), (3, -1)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Every second pixel of `source`, from this row and column on."""

    source: str
    row: int
    column: int


def fold_focus(graph: onnx.GraphProto) -> int:
    """Fold every Focus of a graph [N, C, H, W] into its convolution, in place; how many there were."""
    folded = 0
    for concat in [node for node in graph.node if node.op_type == "Concat" and len(node.input) == 4]:
        graph_index = GraphIndex.of(graph)
        quarters = [_read_quarter(graph_index, name) for name in concat.input]
        convolution = graph_index.only_convolution(concat.output[0])
        if convolution is None or not _is_focus(concat, quarters):
            continue
        weight = graph_index.constants.get(convolution.input[1])
        if weight is None or not _is_plain(convolution):
            continue
        slices = [each for each in quarters if each is not None]
        kernel = _interleave_kernel(numpy_helper.to_array(weight), slices)
        if kernel is not None:
            _replace(graph, convolution, kernel, slices[0].source)
            _remove_unused(graph, concat.output[0])
            folded += 1
    return folded


def _read_quarter(graph_index: GraphIndex, name: str) -> _Slice | None:
    """What a tensor is of the picture, if Slices made it that take every second row and column."""
    row = column = None
    while (node := graph_index.producers.get(name)) is not None and node.op_type == "Slice":
        for axis, start in _read_steps(graph_index, node):
            if axis in _ROWS and row is None:
                row = start
            elif axis in _COLUMNS and column is None:
                column = start
            else:
                return None
        name = node.input[0]
    return None if row is None or column is None else _Slice(name, row, column)


def _read_steps(graph_index: GraphIndex, node: onnx.NodeProto) -> Iterator[tuple[int, int]]:
    """(axis, start) of a Slice that takes every second to the end; (0, 0) for any other."""
    values = [graph_index.constants.get(name) for name in node.input[1:]]
    known = [numpy_helper.to_array(value).ravel().tolist() for value in values if value is not None]
    if len(known) != 4 or len(values) != 4:
        yield 0, 0
        return
    for start, end, axis, step in zip(*known, strict=True):
        yield (axis, start) if step == 2 and start in (0, 1) and end >= _TO_THE_END else (0, 0)


def _is_focus(concat: onnx.NodeProto, quarters: list[_Slice | None]) -> bool:
    places = {(each.row, each.column) for each in quarters if each is not None}
    sources = {each.source for each in quarters if each is not None}
    axis = next((int(a.i) for a in concat.attribute if a.name == "axis"), 0)
    return axis == 1 and len(quarters) == 4 and len(places) == 4 and len(sources) == 1


def _is_plain(convolution: onnx.NodeProto) -> bool:
    """One group, every pixel, pads that are said."""
    for attribute in convolution.attribute:
        if attribute.name in ("strides", "dilations") and set(attribute.ints) != {1}:
            return False
        if attribute.name == "group" and attribute.i != 1:
            return False
        if attribute.name == "auto_pad" and attribute.s not in (b"", b"NOTSET"):
            return False
    return True


def _interleave_kernel(weight: NDArray[np.generic], slices: list[_Slice]) -> NDArray[np.generic] | None:
    """The weight [O, 4 * C, h, w] of the quarters as one [O, C, 2 * h, 2 * w] of the whole."""
    if weight.ndim != 4 or weight.shape[1] % 4:
        return None
    outputs, channels, height, width = weight.shape
    kernel = np.zeros((outputs, channels // 4, 2 * height, 2 * width), weight.dtype)
    for place, part in zip(slices, np.split(weight, 4, axis=1), strict=True):
        kernel[:, :, place.row :: 2, place.column :: 2] = part
    return kernel


def _replace(
    graph: onnx.GraphProto, convolution: onnx.NodeProto, kernel: NDArray[np.generic], source: str
) -> None:
    pads = next((list(a.ints) for a in convolution.attribute if a.name == "pads"), [0, 0, 0, 0])
    name = f"{convolution.output[0]}.whole"
    graph.initializer.append(numpy_helper.from_array(kernel, name))
    del convolution.attribute[:]
    convolution.attribute.extend(
        helper.make_attribute(key, value)
        for key, value in (
            ("kernel_shape", list(kernel.shape[2:])),
            ("strides", [2, 2]),
            ("pads", [2 * pad for pad in pads]),
        )
    )
    convolution.input[0], convolution.input[1] = source, name


def _remove_unused(graph: onnx.GraphProto, unused: str) -> None:
    """Take away what made a tensor that nobody uses any more, and constants that only that needed."""
    waiting = [unused]
    while waiting:
        name = waiting.pop()
        used = any(name in node.input for node in graph.node)
        producer = next((node for node in graph.node if name in node.output), None)
        if used or producer is None or len(producer.output) != 1:
            continue
        waiting.extend(producer.input)
        graph.node.remove(producer)
    needed = {name for node in graph.node for name in (*node.input, *node.output)}
    for constant in [each for each in graph.initializer if each.name not in needed]:
        graph.initializer.remove(constant)
    for value in [each for each in graph.value_info if each.name not in needed]:
        graph.value_info.remove(value)


# The layout of pictures, put into the first convolution: it goes over the bytes as they lie.
#
# A picture [H, W, 3] is, without moving a byte, one channel [1, H, 3 * W] in which the colours of a pixel are
# neighbours. A kernel three times as wide that goes three times as far computes on it what the convolution
# computes on [3, H, W], so nothing need be transposed, nor red and blue be swapped. A CPU also goes over its
# outputs once instead of once for each colour: together that is 1.6 % of the time of YOLOX-nano and of
# NanoDet-g, 2.4 % of PicoDet's. What a GPU makes of so odd a convolution was not seen, and it transposes for
# next to nothing.


_COLOURS = 3


@dataclass(frozen=True, slots=True)
class _InputLayers:
    """From bytes to a convolution: the Transpose, perhaps a Gather, what has a constant for each colour.

    `order` says which colour of a pixel is which channel of the convolution, `between` which tensors lie
    between pictures and convolution.
    """

    transpose: onnx.NodeProto
    gather: onnx.NodeProto | None
    order: tuple[int, ...]
    by_colour: tuple[onnx.NodeProto, ...]
    between: frozenset[str]
    convolution: onnx.NodeProto
    weight: Floats


def fold_layout(graph: onnx.GraphProto, pictures: str) -> bool:
    """Fold the transposition of the input `pictures` [N, H, W, 3], in place; whether that could be done."""
    graph_index = GraphIndex.of(graph)
    front = _find_input_layers(graph_index, pictures)
    size = _read_size(graph, pictures)
    if front is None or size is None:
        return False
    height_px, width_px = size
    front.transpose.op_type = "Reshape"
    del front.transpose.attribute[:]
    set_constant(graph, front.transpose, 1, np.array([0, 1, height_px, _COLOURS * width_px]))
    if front.gather is not None:
        _bypass(graph, front.gather)
    for node in front.by_colour:
        values = find_channel_constant(graph_index, node, node.op_type)
        assert values is not None  # noqa: S101 - it was found by having some
        row = np.tile(_in_pixel_order(values.ravel(), front.order), width_px)
        set_constant(graph, node, find_constant_input(graph_index, node), row.reshape(1, 1, 1, -1))
    _widen(graph, front)
    for value in [each for each in graph.value_info if each.name in front.between]:
        graph.value_info.remove(value)  # of another shape now
    remove_unused(graph)
    return True


def _find_input_layers(graph_index: GraphIndex, pictures: str) -> _InputLayers | None:
    """What lies between the pictures and the first convolution, if it is all known."""
    transpose = next((n for n in graph_index.users.get(pictures, []) if n.op_type == "Transpose"), None)
    if transpose is None or read_attributes(transpose).get("perm") != [0, 3, 1, 2]:
        return None
    gather, order, by_colour = None, tuple(range(_COLOURS)), list[onnx.NodeProto]()
    node, between = graph_index.only_user(transpose.output[0]), [transpose.output[0]]
    while node is not None and node.op_type != "Conv":
        if node.op_type == "Gather" and gather is None and not by_colour:
            gather, order = node, _read_color_order(graph_index, node)
        elif (
            find_channel_constant(graph_index, node, "Mul") is not None
            or find_channel_constant(graph_index, node, "Add") is not None
        ):
            by_colour.append(node)
        elif node.op_type not in ("Cast", "Identity"):
            return None
        between.append(node.output[0])
        node = graph_index.only_user(node.output[0])
    if node is None or node.input[0] != between[-1] or not order or not _is_plain_convolution(node):
        return None
    weight = find_weight(graph_index, node.input[1])
    if weight is None or weight.ndim != 4 or weight.shape[1] != _COLOURS:
        return None
    return _InputLayers(transpose, gather, order, tuple(by_colour), frozenset(between), node, weight)


def _read_color_order(graph_index: GraphIndex, gather: onnx.NodeProto) -> tuple[int, ...]:
    """The order of colours that a Gather takes; empty where it does something else."""
    indices = graph_index.constants.get(gather.input[1])
    if indices is None or read_attributes(gather).get("axis", 0) != 1:
        return ()
    order = tuple(int(index) for index in numpy_helper.to_array(indices).ravel())
    return order if sorted(order) == list(range(_COLOURS)) and len(indices.dims) == 1 else ()


def _is_plain_convolution(convolution: onnx.NodeProto) -> bool:
    """One group, neighbouring pixels, pads that are said."""
    said = read_attributes(convolution)
    return (
        said.get("group", 1) == 1
        and said.get("dilations", [1, 1])[1] == 1
        and said.get("auto_pad", b"NOTSET") in (b"", b"NOTSET")
    )


def _read_size(graph: onnx.GraphProto, pictures: str) -> tuple[int, int] | None:
    """Height and width of the input, if they are fixed."""
    value = next(each for each in graph.input if each.name == pictures)
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return (sizes[1], sizes[2]) if len(sizes) == 4 and sizes[1] > 0 and sizes[2] > 0 else None


def _widen(graph: onnx.GraphProto, front: _InputLayers) -> None:
    """Give the convolution the kernel, stride and pads for colours that lie side by side."""
    convolution, weight, said = front.convolution, front.weight, read_attributes(front.convolution)
    outputs, _, rows, columns = weight.shape
    kernel = np.zeros((outputs, 1, rows, _COLOURS * columns), np.float32)
    for channel, place in enumerate(front.order):
        kernel[:, 0, :, place::_COLOURS] = weight[:, channel]
    set_constant(graph, convolution, 1, kernel)
    down, right = said.get("strides", [1, 1])
    top, left, bottom, far = said.get("pads", [0, 0, 0, 0])
    del convolution.attribute[:]
    convolution.attribute.extend(
        helper.make_attribute(name, values)
        for name, values in (
            ("kernel_shape", [rows, _COLOURS * columns]),
            ("strides", [down, _COLOURS * right]),
            ("pads", [top, _COLOURS * left, bottom, _COLOURS * far]),
            ("dilations", [said.get("dilations", [1, 1])[0], 1]),
        )
    )


def _in_pixel_order(values: NDArray[np.float32], order: tuple[int, ...]) -> NDArray[np.float32]:
    """The constants of the channels in the order in which the colours lie in a pixel."""
    lying = np.empty_like(values)
    lying[list(order)] = values
    return lying


def _bypass(graph: onnx.GraphProto, gather: onnx.NodeProto) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == gather.output[0]:
                node.input[index] = gather.input[0]
    graph.node.remove(gather)


# A factor in front of the first convolution, put into its weights instead.
#
# Padding is zero, and zero times anything is zero: so a convolution of x * factor is one of x with its
# weights times the factor, at the borders too. What is added to x does not go that way, as the padding knows
# nothing of it; that stays, in other units. On a CPU it saves one of four passes over the picture.


@dataclass(frozen=True, slots=True)
class _ScaledConvolution:
    """x * factor (+ offset), each a constant for a channel, and what alone uses that: a convolution."""

    multiply: onnx.NodeProto
    factor: Floats
    add: onnx.NodeProto | None
    offset: Floats
    convolution: onnx.NodeProto
    weight: Floats


def fold_scale(graph: onnx.GraphProto, source: str) -> bool:
    """Fold the factor that the tensor `source` is multiplied with, in place; whether there was one."""
    graph_index = GraphIndex.of(graph)
    found = _find_scaled_convolution(graph_index, source)
    if found is None:
        return False
    set_constant(graph, found.convolution, 1, found.weight * found.factor.reshape(1, -1, 1, 1))
    if found.add is not None:
        set_constant(
            graph, found.add, find_constant_input(graph_index, found.add), found.offset / found.factor
        )
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == found.multiply.output[0]:
                node.input[index] = source
    graph.node.remove(found.multiply)
    remove_unused(graph)
    return True


def _find_scaled_convolution(graph_index: GraphIndex, source: str) -> _ScaledConvolution | None:
    multiply = graph_index.only_user(source)
    factor = find_channel_constant(graph_index, multiply, "Mul")
    if multiply is None or factor is None or not factor.all():
        return None
    name = multiply.output[0]
    add = graph_index.only_user(name)
    offset = find_channel_constant(graph_index, add, "Add")
    if add is not None and offset is not None:
        name = add.output[0]
    else:
        add, offset = None, np.zeros_like(factor)
    while (user := graph_index.only_user(name)) is not None and user.op_type == "Identity":
        name = user.output[0]
    convolution = graph_index.only_convolution(name)
    weight = None if convolution is None else find_weight(graph_index, convolution.input[1])
    if convolution is None or weight is None:
        return None
    if weight.ndim != 4 or weight.shape[1] != factor.size:  # in groups each would see other channels
        return None
    return _ScaledConvolution(multiply, factor, add, offset, convolution, weight)
