"""What is read from the first nodes of a graph is what onnxruntime computes there, or is called unknown."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from visionedge.model.analysis.input_ops import InputOps, ValueBound, read_input_ops
from visionedge.model.graph import GraphIndex

SIDE_PX = 8
KERNEL_PX = 3
MEAN = np.array([10.0, 20.0, 30.0], np.float32)


@dataclass
class Front:
    """The nodes between the picture `x` and the first layer; `tensor` is the picture as it is by now."""

    channels_last: bool = False
    dtype: int = TensorProto.FLOAT
    opset: int = 17
    tensor: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    @property
    def shape(self) -> list[int]:
        """That of the picture."""
        return [1, SIDE_PX, SIDE_PX, 3] if self.channels_last else [1, 3, SIDE_PX, SIDE_PX]

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """A node; the names of its outputs."""
        names = [f"t{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names

    def then(self, operator: str, *inputs: str, **attributes: Any) -> None:
        """A node over the picture."""
        (self.tensor,) = self.add(operator, self.tensor, *inputs, **attributes)

    def constant(self, values: object, dtype: str = "float32") -> str:
        """The name of a constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, np.dtype(dtype)), name))
        return name

    def numbers(self, *values: int) -> str:
        """The name of a constant for axes, sizes and the like."""
        return self.constant(values, "int64")

    def read(self, *, layer: bool = True) -> InputOps:
        """What is read from the nodes with a convolution behind them."""
        nodes = list(self.nodes)
        if layer:
            nodes.append(helper.make_node("Conv", [self.tensor, "weight"], ["y"]))
        size_px = (SIDE_PX, SIDE_PX)
        graph = self._graph(nodes, "y" if layer else self.tensor)
        return read_input_ops(GraphIndex.of(graph), "x", 3 if self.channels_last else 1, size_px)

    def run(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """What onnxruntime computes in front of the convolution."""
        last = helper.make_node("Cast", [self.tensor], ["y"], to=TensorProto.FLOAT)
        graph = self._graph([*self.nodes, last], "y")
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        given = picture.transpose(0, 2, 3, 1) if self.channels_last else picture
        dtype = helper.tensor_dtype_to_np_dtype(self.dtype)
        seen: NDArray[np.float32] = session.run(None, {"x": given.astype(dtype)})[0]
        return seen

    def _graph(self, nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.ones((4, 3, KERNEL_PX, KERNEL_PX), np.float32), "weight")
        return helper.make_graph(
            nodes,
            "front",
            [helper.make_tensor_value_info("x", self.dtype, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [*self.constants, weight],
        )


Change = Callable[[Front], None]


def _mean_subtracted(front: Front) -> None:
    front.then("Sub", front.constant(MEAN.reshape(3, 1, 1)))
    front.then("Div", front.constant([[[[50.0]], [[60.0]], [[70.0]]]]))


def _inverted(front: Front) -> None:
    (front.tensor,) = front.add("Sub", front.constant(255.0), front.tensor)
    (front.tensor,) = front.add("Mul", front.constant(0.5), front.tensor)


def _negative(front: Front) -> None:
    front.then("Neg")
    front.then("Add", front.constant(7.0))


def _normalised_by_a_layer(front: Front) -> None:
    parts = ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], MEAN, [2.0, 4.0, 9.0])
    front.then("BatchNormalization", *(front.constant(part) for part in parts), epsilon=0.5)


def _scaled_by_a_convolution(front: Front) -> None:
    weight = front.constant(np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1, 1))
    front.then("Conv", weight, front.constant(MEAN), group=3)


def _swapped_by_a_convolution(front: Front) -> None:
    front.then("Conv", front.constant(np.eye(3)[::-1].reshape(3, 3, 1, 1) * 0.25))


def _swapped_by_a_slice(front: Front) -> None:
    front.then("Slice", front.numbers(-1), front.numbers(-100), front.numbers(1), front.numbers(-1))


def _swapped_by_a_gather(front: Front) -> None:
    front.then("Gather", front.numbers(2, 1, 0), axis=1)


def _swapped_by_a_split(front: Front) -> None:
    parts = front.add("Split", front.tensor, outputs=3, axis=1)
    (front.tensor,) = front.add("Concat", *parts[::-1], axis=1)


def _taken_apart_and_joined(front: Front) -> None:
    """As PyTorch exports `torch.stack` of single channels."""
    axis, joined = front.numbers(1), []
    for channel in range(3):
        (one,) = front.add("Gather", front.tensor, front.constant(channel, "int64"), axis=1)
        (scaled,) = front.add("Mul", one, front.constant(0.5 + channel))
        joined += front.add("Unsqueeze", scaled, axis)
    (front.tensor,) = front.add("Concat", *joined, axis=1)


def _squeezed_and_back(front: Front) -> None:
    front.then("Squeeze", front.numbers(0))
    front.then("Sub", front.constant(MEAN.reshape(3, 1, 1)))
    front.then("Unsqueeze", front.numbers(0))


def _an_axis_behind_the_channels_and_back(front: Front) -> None:
    front.then("Unsqueeze", front.numbers(4))
    front.then("Mul", front.constant(MEAN.reshape(3, 1, 1, 1)))
    front.then("Squeeze", front.numbers(4))


def _reshaped(front: Front) -> None:
    front.then("Reshape", front.numbers(1, 3, -1))
    front.then("Sub", front.constant(MEAN.reshape(1, 3, 1)))
    front.then("Reshape", front.numbers(1, 3, SIDE_PX, SIDE_PX))


def _a_computed_constant(front: Front) -> None:
    """Exporters leave nodes between a constant and its use."""
    (name,) = front.add("Cast", front.constant(MEAN, "float64"), to=TensorProto.FLOAT)
    (name,) = front.add("Reshape", name, front.numbers(1, 3))
    (name,) = front.add("Unsqueeze", name, front.numbers(2, 3))
    (name,) = front.add("Reshape", name, front.numbers(0, 3, -1, 1))
    (name,) = front.add("Unsqueeze", name, front.numbers(0))
    (name,) = front.add("Squeeze", name, front.numbers(0))
    (name,) = front.add("Identity", name)
    front.then("Sub", name)


def _unchanged(front: Front) -> None:
    front.then("Identity")
    front.then("Dropout")


EXACT = [
    *(_mean_subtracted, _inverted, _negative, _normalised_by_a_layer, _scaled_by_a_convolution),
    *(_swapped_by_a_convolution, _swapped_by_a_slice, _swapped_by_a_gather, _swapped_by_a_split),
    *(_taken_apart_and_joined, _squeezed_and_back, _an_axis_behind_the_channels_and_back, _reshaped),
    *(_a_computed_constant, _unchanged),
]


def _name(change: Change) -> str:
    return change.__name__.strip("_")


def _picture() -> NDArray[np.float32]:
    shape = (1, 3, SIDE_PX, SIDE_PX)
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.float32)


def _expected(picture: NDArray[np.float32], read: InputOps) -> NDArray[np.float32]:
    factor, offset = (np.array(numbers).reshape(1, 3, 1, 1) for numbers in (read.factor, read.offset))
    changed: NDArray[np.float32] = picture * factor + offset
    return changed[:, ::-1] if read.swaps_red_blue else changed


@pytest.mark.parametrize("change", EXACT, ids=_name)
def test_the_change_that_is_read_is_the_one_that_onnxruntime_computes(change: Change) -> None:
    front = Front()
    change(front)
    read = front.read()
    assert read.unknown == ""
    assert read.kernels == {(KERNEL_PX, 1)}
    np.testing.assert_allclose(front.run(_picture()), _expected(_picture(), read), rtol=1e-5, atol=1e-3)


def _brought_to_the_front(front: Front) -> None:
    front.then("Sub", front.constant(MEAN))
    front.then("Transpose", perm=[0, 3, 1, 2])


def _reshaped_with_the_channels_last(front: Front) -> None:
    front.then("Reshape", front.numbers(1, SIDE_PX * SIDE_PX, 3))
    front.then("Sub", front.constant(MEAN))
    front.then("Reshape", front.numbers(1, SIDE_PX, SIDE_PX, 3))
    front.then("Transpose", perm=[0, 3, 1, 2])


@pytest.mark.parametrize("change", [_brought_to_the_front, _reshaped_with_the_channels_last], ids=_name)
def test_channels_that_come_last_are_followed_too(change: Change) -> None:
    front = Front(channels_last=True)
    change(front)
    read = front.read()
    assert read.unknown == ""
    np.testing.assert_allclose(front.run(_picture()), _expected(_picture(), read))


@pytest.mark.parametrize("zero_point", [None, 7])
def test_a_quantised_picture_is_scaled_as_its_node_says(zero_point: int | None) -> None:
    front = Front(dtype=TensorProto.UINT8)
    zero = [] if zero_point is None else [front.constant(zero_point, "uint8")]
    front.then("DequantizeLinear", front.constant(0.5), *zero)
    read = front.read()
    assert read.unknown == ""
    np.testing.assert_allclose(front.run(_picture()), _expected(_picture(), read))


def _to_half_by_sizes(front: Front) -> None:
    front.then("Resize", "", "", front.numbers(1, 3, SIDE_PX // 2, SIDE_PX // 4))


def _to_half_by_scales(front: Front) -> None:
    front.then("Resize", "", front.constant([1, 1, 0.5, 0.25]))


def _to_half_by_an_attribute(front: Front) -> None:
    """The operator of opset 7 and 8."""
    front.opset = 7
    front.then("Upsample", scales=[1.0, 1.0, 0.5, 0.25], mode="nearest")


@pytest.mark.parametrize(
    "change", [_to_half_by_sizes, _to_half_by_scales, _to_half_by_an_attribute], ids=_name
)
def test_the_size_behind_a_resize_is_read(change: Change) -> None:
    front = Front()
    change(front)
    read = front.read()
    assert read.unknown == ""
    assert read.size_px == (SIDE_PX // 4, SIDE_PX // 2)


def test_the_size_behind_a_resize_of_channels_last_is_read() -> None:
    front = Front(channels_last=True)
    front.then("Resize", "", "", front.numbers(1, SIDE_PX // 2, SIDE_PX // 4, 3))
    front.then("Transpose", perm=[0, 3, 1, 2])
    assert front.read().size_px == (SIDE_PX // 4, SIDE_PX // 2)


def _by_attributes(front: Front) -> None:
    front.opset = 6
    front.then("Clip", min=0.0, max=1.0)


def _by_inputs(front: Front) -> None:
    front.then("Clip", front.constant(0.0), front.constant(1.0))


def _by_two_nodes(front: Front) -> None:
    front.then("Max", front.constant(0.0))
    (front.tensor,) = front.add("Min", front.constant(1.0), front.tensor)


@pytest.mark.parametrize("change", [_by_attributes, _by_inputs, _by_two_nodes], ids=_name)
def test_a_bound_is_read_in_the_unit_of_the_input(change: Change) -> None:
    """The picture is halved first, so a bound of 1 is one of 2 for the input."""
    front = Front()
    front.then("Div", front.constant(2.0))
    change(front)
    read = front.read()
    assert read.unknown == ""
    assert max(bound.low for bound in read.bounds) == 0
    assert min(bound.high for bound in read.bounds) == 2


def test_a_bound_of_an_inverted_picture_is_the_other_end() -> None:
    front = Front()
    front.then("Neg")
    front.then("Relu")
    assert front.read().bounds == (ValueBound(-np.inf, 0.0),)


def test_numbers_that_are_rounded_are_read_with_their_scale() -> None:
    front = Front()
    front.then("Mul", front.constant(4.0))
    front.then("Cast", to=TensorProto.UINT8)
    front.then("Cast", to=TensorProto.FLOAT)
    read = front.read()
    assert read.unknown == ""
    assert [bound.integer_scale for bound in read.bounds] == [4.0]


def test_a_maximum_of_the_picture_alone_changes_nothing() -> None:
    front = Front()
    front.then("Max")
    assert (front.read().unknown, front.read().bounds) == ("", ())


def test_a_border_that_the_first_layer_would_have_added_itself_is_no_change() -> None:
    for width in (0, 1):
        front = Front()
        front.then("Pad", front.numbers(0, 0, width, width, 0, 0, width, width))
        assert front.read().unknown == ""


def test_parts_of_a_picture_are_still_the_picture() -> None:
    """As the first layer of YOLOv5 and YOLOX takes every second row and column."""
    front, parts = Front(), []
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        starts, ends = front.numbers(row, column), front.numbers(SIDE_PX, SIDE_PX)
        parts += front.add("Slice", front.tensor, starts, ends, front.numbers(2, 3), front.numbers(2, 2))
    (front.tensor,) = front.add("Concat", *parts, axis=1)
    assert front.read() == InputOps(kernels=frozenset({(KERNEL_PX, 1)}), seen=("Slice", "Concat"))
    front = Front()
    front.then("SpaceToDepth", blocksize=2)
    assert front.read().unknown == ""


# --- what cannot be known -----------------------------------------------------------------------------------


def _bent(front: Front) -> None:
    front.then("Div", front.constant(255.0))
    front.then("Sigmoid")


def _multiplied_by_itself(front: Front) -> None:
    front.then("Mul", front.tensor)


def _multiplied_by_zero(front: Front) -> None:
    front.then("Mul", front.constant([[[1.0]], [[0.0]], [[1.0]]]))


def _divisor(front: Front) -> None:
    (front.tensor,) = front.add("Div", front.constant(1.0), front.tensor)


def _divided_by_zero(front: Front) -> None:
    front.then("Div", front.constant(0.0))


def _a_mean_for_each_row(front: Front) -> None:
    front.then("Sub", front.constant(np.arange(SIDE_PX).reshape(SIDE_PX, 1)))


def _three_numbers_for_three_columns(front: Front) -> None:
    front.then("Reshape", front.numbers(1, SIDE_PX, SIDE_PX, 3))
    front.then("Sub", front.constant(MEAN))


def _a_computed_mean(front: Front) -> None:
    (mean,) = front.add("ReduceMean", front.constant(np.ones((4, 3, 1, 1))), axes=[0], keepdims=0)
    front.then("Sub", mean)


def _flattened(front: Front) -> None:
    front.then("Flatten")
    front.then("Sub", front.constant(np.ones(3 * SIDE_PX * SIDE_PX)))


def _a_computed_shape(front: Front) -> None:
    (shape,) = front.add("Shape", front.tensor)
    front.then("Reshape", shape)
    front.then("Sub", front.constant(MEAN.reshape(3, 1, 1)))


def _squeezed_of_all(front: Front) -> None:
    front.then("Squeeze")
    front.then("Sub", front.constant(MEAN.reshape(3, 1, 1)))


def _unsqueezed_twice(front: Front) -> None:
    front.then("Unsqueeze", front.numbers(0, 1))
    front.then("Sub", front.constant(MEAN.reshape(3, 1, 1)))


def _columns_reordered(front: Front) -> None:
    front.then("Gather", front.numbers(*range(SIDE_PX)[::-1]), axis=3)


def _a_channel_that_is_not_there(front: Front) -> None:
    front.then("Gather", front.numbers(0, 1, 3), axis=1)


def _cropped(front: Front) -> None:
    front.then("Slice", front.numbers(2), front.numbers(SIDE_PX), front.numbers(2))


def _mirrored(front: Front) -> None:
    front.then("Slice", front.numbers(-1), front.numbers(-100), front.numbers(3), front.numbers(-1))


def _sliced_by_computed_numbers(front: Front) -> None:
    (end,) = front.add("Size", front.tensor)
    front.then("Slice", front.numbers(0), end)


def _sliced_by_too_few_numbers(front: Front) -> None:
    front.then("Slice", front.numbers(0), front.numbers(3, 3), front.numbers(1))


def _halves_of_the_width(front: Front) -> None:
    front.tensor = front.add("Split", front.tensor, outputs=2, axis=3)[0]


def _a_channel_of_zeros(front: Front) -> None:
    zeros = front.constant(np.zeros((1, 1, SIDE_PX, SIDE_PX)))
    (front.tensor,) = front.add("Concat", front.tensor, zeros, axis=1)


def _pictures_side_by_side(front: Front) -> None:
    (front.tensor,) = front.add("Concat", front.tensor, front.tensor, axis=3)


def _a_part_of_the_picture_resized(front: Front) -> None:
    roi = front.constant([0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8])
    words = {"coordinate_transformation_mode": "tf_crop_and_resize"}
    front.then("Resize", roi, "", front.numbers(1, 3, 4, 4), **words)


def _more_channels_by_resizing(front: Front) -> None:
    front.then("Resize", "", "", front.numbers(1, 6, SIDE_PX, SIDE_PX))


def _a_resize_without_numbers(front: Front) -> None:
    front.then("Resize", "", front.constant([2.0, 2.0]))


def _a_wide_border(front: Front) -> None:
    front.then("Pad", front.numbers(0, 0, 4, 4, 0, 0, 4, 4))


def _a_negative_border(front: Front) -> None:
    front.then("Pad", front.numbers(0, 0, -1, -1, 0, 0, 0, 0))


def _more_channels_by_a_border(front: Front) -> None:
    front.then("Pad", front.numbers(0, 1, 0, 0, 0, 0, 0, 0))


def _a_border_and_then_a_mean(front: Front) -> None:
    front.then("Pad", front.numbers(0, 0, 1, 1, 0, 0, 1, 1))
    front.then("Sub", front.constant(1.0))


def _cast_to_truth(front: Front) -> None:
    front.then("Cast", to=TensorProto.BOOL)


def _a_computed_bound(front: Front) -> None:
    (low,) = front.add("ReduceMin", front.tensor, keepdims=0)
    front.then("Clip", low)


def _a_bound_for_each_channel(front: Front) -> None:
    front.then("Min", front.constant(MEAN.reshape(3, 1, 1)))


def _a_computed_scale(front: Front) -> None:
    (scale,) = front.add("Sqrt", front.constant(4.0))
    front.then("DequantizeLinear", scale)


def _a_computed_zero_point(front: Front) -> None:
    (zero,) = front.add("Abs", front.constant(4, "uint8"))
    front.then("DequantizeLinear", front.constant(0.5), zero)


def _normalised_over_the_wrong_axis(front: Front) -> None:
    front.then("Transpose", perm=[0, 2, 3, 1])
    parts = (np.ones(SIDE_PX), np.zeros(SIDE_PX), np.zeros(SIDE_PX), np.ones(SIDE_PX))
    front.then("BatchNormalization", *(front.constant(part) for part in parts))


def _normalised_by_computed_numbers(front: Front) -> None:
    (mean,) = front.add("Sqrt", front.constant(MEAN))
    ones = front.constant(np.ones(3))
    front.then("BatchNormalization", ones, ones, mean, ones)


UNKNOWN: list[tuple[str, Change]] = [
    ("Sigmoid", _bent),
    *(("Mul", change) for change in (_multiplied_by_itself, _multiplied_by_zero)),
    *(("Div", change) for change in (_divisor, _divided_by_zero)),
    *(("Sub", change) for change in (_a_mean_for_each_row, _three_numbers_for_three_columns)),
    *(("Sub", change) for change in (_a_computed_mean, _flattened, _a_computed_shape)),
    *(("Sub", change) for change in (_squeezed_of_all, _unsqueezed_twice)),
    *(("Gather", change) for change in (_columns_reordered, _a_channel_that_is_not_there)),
    *(("Slice", change) for change in (_cropped, _mirrored, _sliced_by_computed_numbers)),
    ("Slice", _sliced_by_too_few_numbers),
    ("Split", _halves_of_the_width),
    *(("Concat", change) for change in (_a_channel_of_zeros, _pictures_side_by_side)),
    *(("Resize", change) for change in (_a_part_of_the_picture_resized, _more_channels_by_resizing)),
    ("Resize", _a_resize_without_numbers),
    *(("Pad", change) for change in (_a_wide_border, _a_negative_border, _more_channels_by_a_border)),
    ("Pad", _a_border_and_then_a_mean),
    ("Cast", _cast_to_truth),
    ("ReduceMin, Clip", _a_computed_bound),
    ("Min", _a_bound_for_each_channel),
    *(("DequantizeLinear", change) for change in (_a_computed_scale, _a_computed_zero_point)),
    ("BatchNormalization", _normalised_over_the_wrong_axis),
    ("BatchNormalization", _normalised_by_computed_numbers),
]


@pytest.mark.parametrize(("operators", "change"), UNKNOWN, ids=[_name(change) for _, change in UNKNOWN])
def test_a_change_that_is_not_the_same_for_all_pixels_of_a_channel_is_unknown(
    operators: str, change: Change
) -> None:
    front = Front()
    change(front)
    assert front.read().unknown == operators


def test_what_comes_before_the_first_unknown_operator_is_read() -> None:
    front = Front()
    _bent(front)
    known = front.read().known_transform
    assert known is not None
    factor, offset, swaps_red_blue, size_px = known
    assert factor == pytest.approx((1 / 255,) * 3)
    assert (offset, swaps_red_blue, size_px) == ((0.0,) * 3, False, (SIDE_PX, SIDE_PX))


def test_a_convolution_that_mixes_the_colours_is_the_first_layer() -> None:
    front = Front()
    front.then("Conv", front.constant(np.ones((3, 3, 1, 1))))
    read = front.read()
    assert (read.unknown, read.changes_values) == ("", False)
    assert read.kernels == {(1, 1)}


def test_a_picture_that_reaches_no_layer_is_unknown() -> None:
    front = Front()
    front.then("Div", front.constant(255.0))
    assert "no layer" in front.read(layer=False).unknown


def test_layers_that_see_different_pictures_are_unknown() -> None:
    front = Front()
    front.add("Conv", front.tensor, front.constant(np.ones((2, 3, 5, 5))))
    front.then("Div", front.constant(255.0))
    assert "to its layers" in front.read().unknown


def test_channels_that_were_mixed_up_are_unknown() -> None:
    for order in ((0, 0, 1), (1, 2, 0)):
        front = Front()
        front.then("Gather", front.numbers(*order), axis=1)
        assert "mixed channels" in front.read().unknown
