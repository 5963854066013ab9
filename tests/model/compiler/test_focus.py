"""Focus folded into its convolution: the same numbers without the slices, and everything else left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from visionedge.model.compiler.compile import compile_model
from visionedge.model.compiler.passes import fold_focus
from visionedge.model.model import load_model

END = (1 << 63) - 1
ORDER = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Row and column of the quarters, as YOLOX puts them."""


def network(
    order: tuple[tuple[int, int], ...] = ORDER,
    *,
    kernel: int = 3,
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    together: bool = False,
    **convolution: Any,
) -> onnx.ModelProto:
    """Four quarters, a convolution and a Relu; `together` cuts rows and columns in one Slice."""
    nodes, weights = [], []

    def constant(name: str, *values: int) -> str:
        weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def cut(source: str, out: str, axes: tuple[int, ...], starts: tuple[int, ...]) -> None:
        names = [
            constant(f"{out}.starts", *starts),
            constant(f"{out}.ends", *([END] * len(axes))),
            constant(f"{out}.axes", *axes),
            constant(f"{out}.steps", *([2] * len(axes))),
        ]
        nodes.append(helper.make_node("Slice", [source, *names], [out]))

    for number, (row, column) in enumerate(order):
        if together:
            cut("image", f"q{number}", (2, 3), (row, column))
        else:
            cut("image", f"r{number}", (2,), (row,))
            cut(f"r{number}", f"q{number}", (-1,), (column,))
    random = np.random.default_rng(1)
    weight = random.normal(size=(5, 12, kernel, kernel)).astype(np.float32)
    weights.append(numpy_helper.from_array(weight, "weight"))
    weights.append(numpy_helper.from_array(random.normal(size=5).astype(np.float32), "bias"))
    nodes.append(helper.make_node("Concat", ["q0", "q1", "q2", "q3"], ["joined"], axis=1))
    nodes.append(
        helper.make_node("Conv", ["joined", "weight", "bias"], ["found"], pads=list(pads), **convolution)
    )
    nodes.append(helper.make_node("Relu", ["found"], ["out"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 32, 48])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 5, None, None])
    graph = helper.make_graph(nodes, "focus", [image], [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def computed(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    picture = np.random.default_rng(2).normal(size=(2, 3, 32, 48)).astype(np.float32)
    found: np.ndarray = session.run(None, {"image": picture})[0]
    return found


@pytest.mark.parametrize(
    "model",
    [
        network(),
        network(together=True),
        network(order=((0, 0), (0, 1), (1, 0), (1, 1))),
        network(order=((1, 1), (0, 1), (1, 0), (0, 0))),
        network(kernel=1, pads=(0, 0, 0, 0)),
        network(pads=(0, 1, 2, 0)),
    ],
    ids=["YOLOX", "one slice each", "by rows", "backwards", "1 x 1", "uneven pads"],
)
def test_the_result_is_equal_without_the_slices(model: onnx.ModelProto) -> None:
    before = computed(model)
    assert fold_focus(model.graph) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]
    assert {tensor.name for tensor in model.graph.initializer} == {"found.whole", "bias"}
    np.testing.assert_allclose(computed(model), before, rtol=1e-4, atol=1e-5)


def shared(model: onnx.ModelProto) -> None:
    """Somebody else looks at the quarters, too."""
    model.graph.node.append(helper.make_node("Relu", ["joined"], ["spy"]))
    model.graph.output.append(helper.make_tensor_value_info("spy", TensorProto.FLOAT, None))


def other_axis(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Concat").attribute[0].i = 2


def shorter(model: onnx.ModelProto) -> None:
    """One slice ends before the picture does; the next makes up for it by its step."""
    ends = next(tensor for tensor in model.graph.initializer if tensor.name == "r0.ends")
    ends.CopyFrom(numpy_helper.from_array(np.array([31], np.int64), "r0.ends"))


def computed_weight(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Identity", ["weight"], ["weight.made"]))
    next(node for node in model.graph.node if node.op_type == "Conv").input[1] = "weight.made"


@pytest.mark.parametrize("change", [shared, other_axis, shorter, computed_weight])
def test_a_similar_pattern_is_left_unchanged(change: Callable[[onnx.ModelProto], None]) -> None:
    model = network()
    change(model)
    nodes = [node.op_type for node in model.graph.node]
    assert fold_focus(model.graph) == 0
    assert [node.op_type for node in model.graph.node] == nodes


@pytest.mark.parametrize(
    "model",
    [
        network(order=((0, 0), (0, 0), (1, 0), (1, 1))),
        network(strides=[2, 2]),
        network(dilations=[2, 2]),
        network(pads=(0, 0, 0, 0), auto_pad="VALID"),
    ],
    ids=["a quarter twice", "strides", "dilations", "pads by name"],
)
def test_another_slice_order_is_left_unchanged(model: onnx.ModelProto) -> None:
    if any(attribute.name == "auto_pad" for node in model.graph.node for attribute in node.attribute):
        convolution = next(node for node in model.graph.node if node.op_type == "Conv")
        kept = [attribute for attribute in convolution.attribute if attribute.name != "pads"]
        del convolution.attribute[:]
        convolution.attribute.extend(kept)
    assert fold_focus(model.graph) == 0


@pytest.mark.shared
def test_a_real_yolox_loses_only_its_slices(shared_data: Path) -> None:
    path = shared_data / "models" / "yolox_nano_416_coco80.onnx"
    compiled = onnx.load_model_from_string(compile_model(load_model(path)))
    first = next(node for node in compiled.graph.node if node.op_type == "Conv")
    kernel = next(list(a.ints) for a in first.attribute if a.name == "kernel_shape")
    assert kernel[0] == 6, "twice as large as it was"
    original = onnx.load(path)
    picture = np.random.default_rng(0).uniform(0, 255, (1, 3, 416, 416)).astype(np.float32)
    before, after = (onnx.ModelProto.FromString(original.SerializeToString()) for _ in range(2))
    assert fold_focus(after.graph) == 1
    found = [
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"images": picture}
        )[0]
        for each in (before, after)
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)
