"""The layout folded into the first convolution: the same numbers from the bytes as they lie."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from visionedge.model.compiler import compile as compiler
from visionedge.model.compiler.compile import compile_model
from visionedge.model.compiler.passes import fold_layout
from visionedge.model.model import find_bundled_model, load_model

HEIGHT_PX, WIDTH_PX = 16, 24


def network(
    *,
    swapped: bool = False,
    offset: bool = True,
    order: tuple[int, ...] = (2, 1, 0),
    by_pixel: bool = False,
    spied: str = "",
    half: bool = False,
    pooled: bool = False,
    **convolution: Any,
) -> onnx.ModelProto:
    """Bytes, transposed, made floats, shifted by colour, and a convolution."""
    random = np.random.default_rng(3)
    channels = 3 // convolution.get("group", 1)
    weight = random.normal(size=(6, channels, 3, 3)).astype(np.float16 if half else np.float32)
    shape = (1, 3, HEIGHT_PX, WIDTH_PX) if by_pixel else (1, 3, 1, 1)
    constants = {"weight": weight, "mean": random.uniform(-120, -90, shape).astype(np.float32)}
    nodes = [helper.make_node("Transpose", ["pictures"], ["planes"], perm=[0, 3, 1, 2])]
    last = "planes"
    if swapped:
        constants["order"] = np.array(order, np.int64)
        nodes.append(helper.make_node("Gather", [last, "order"], ["swapped"], axis=1))
        last = "swapped"
    nodes.append(helper.make_node("Cast", [last], ["floats"], to=TensorProto.FLOAT))
    last = "floats"
    if offset:
        nodes.append(helper.make_node("Add", [last, "mean"], ["shifted"]))
        last = "shifted"
    if pooled:
        nodes.append(helper.make_node("MaxPool", [last], ["pooled"], kernel_shape=[2, 2]))
        last = "pooled"
    nodes.append(helper.make_node("Identity", [last], ["image"]))
    if half:
        nodes.append(helper.make_node("Cast", ["weight"], ["weight.wide"], to=TensorProto.FLOAT))
    kernel = "weight.wide" if half else "weight"
    nodes.append(helper.make_node("Conv", ["image", kernel], ["out"], **convolution))
    pictures = helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["N", HEIGHT_PX, WIDTH_PX, 3])
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 6, None, None])]
    if spied:
        outputs.append(helper.make_tensor_value_info(spied, TensorProto.FLOAT, ["N", 3, None, None]))
    graph = helper.make_graph(
        nodes,
        "front",
        [pictures],
        outputs,
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
        value_info=[helper.make_tensor_value_info("planes", TensorProto.UINT8, ["N", 3, 16, 24])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def computed(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pictures = np.random.default_rng(4).integers(0, 256, (2, HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    found: np.ndarray = session.run(["out"], {"pictures": pictures})[0]
    return found


@pytest.mark.parametrize(
    "model",
    [
        network(pads=[1, 1, 1, 1], strides=[2, 2]),
        network(swapped=True, pads=[1, 1, 1, 1]),
        network(swapped=True, order=(1, 2, 0), pads=[0, 2, 1, 0], strides=[1, 3]),
        network(offset=False),
        network(half=True, pads=[1, 1, 1, 1]),
        network(pads=[2, 1, 2, 1], dilations=[2, 1]),
    ],
    ids=["stride 2", "RGB", "any order, uneven pads", "no offset", "half weights", "dilated down"],
)
def test_the_result_is_equal_without_the_transpose(model: onnx.ModelProto) -> None:
    before = computed(model)

    assert fold_layout(model.graph, "pictures")

    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[0] == "Reshape"
    assert not {"Transpose", "Gather"} & set(kinds)
    np.testing.assert_allclose(computed(model), before, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        network(group=3),
        network(dilations=[1, 2]),
        network(auto_pad="SAME_UPPER"),
        network(by_pixel=True),
        network(spied="image"),
        network(pooled=True),
        network(swapped=True, order=(0, 0, 2)),
    ],
    ids=["groups", "dilated across", "pads by name", "by pixel", "watched", "pooled", "a colour twice"],
)
def test_a_graph_that_cannot_take_interleaved_colours_is_left_unchanged(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert not fold_layout(model.graph, "pictures")
    assert model.SerializeToString() == before


def front(path: Path) -> list[str]:
    graph = onnx.load_from_string(compile_model(load_model(path))).graph
    return [node.op_type for node in graph.node[:4]]


def test_the_bundled_model_reads_interleaved_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package of onnxruntime for CPUs; for GPUs the picture is transposed."""
    monkeypatch.setattr(compiler, "is_gpu_wheel", lambda: False)
    assert front(find_bundled_model()) == ["Reshape", "Cast", "Identity", "Conv"]
    monkeypatch.setattr(compiler, "is_gpu_wheel", lambda: True)
    assert front(find_bundled_model()) == ["Transpose", "Cast", "Identity", "Conv"]
