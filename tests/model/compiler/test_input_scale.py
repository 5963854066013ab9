"""A factor folded into the first convolution: the same numbers, one pass less; all else is left alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from visionedge.model.compiler.compile import compile_model
from visionedge.model.compiler.passes import fold_scale
from visionedge.model.model import find_bundled_model, load_model

FACTOR = np.array([0.5, 2.0, 3.0], np.float32).reshape(1, 3, 1, 1)
OFFSET = np.array([-1.0, 4.0, 0.25], np.float32).reshape(1, 3, 1, 1)


def network(
    *,
    factor: NDArray[np.float32] = FACTOR,
    offset: NDArray[np.float32] | None = OFFSET,
    named: bool = False,
    half: bool = False,
    group: int = 1,
    second_user: bool = False,
    **convolution: Any,
) -> onnx.ModelProto:
    """image * factor (+ offset), a convolution and a Relu; `named` gives the sum another name in between."""
    random = np.random.default_rng(1)
    weight = random.normal(size=(6, 3 // group, 3, 3)).astype(np.float32)
    weights = [numpy_helper.from_array(random.normal(size=6).astype(np.float32), "bias")]
    nodes = []

    def constant(name: str, values: NDArray[Any]) -> str:
        weights.append(numpy_helper.from_array(values, name))
        return name

    nodes.append(helper.make_node("Mul", ["image", constant("factor", factor)], ["scaled"]))
    last = "scaled"
    if offset is not None:
        nodes.append(helper.make_node("Add", [last, constant("offset", offset)], ["moved"]))
        last = "moved"
    if named:
        nodes.append(helper.make_node("Identity", [last], ["input"]))
        last = "input"
    if half:
        nodes.append(
            helper.make_node("Cast", [constant("small", weight.astype(np.float16))], ["weight"], to=1)
        )
    else:
        constant("weight", weight)
    nodes.append(helper.make_node("Conv", [last, "weight", "bias"], ["seen"], group=group, **convolution))
    outputs = ["seen"]
    if second_user:
        nodes.append(helper.make_node("Relu", [last], ["also"]))
        outputs.append("also")
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 24])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None, None, None]) for name in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def computed(model: onnx.ModelProto) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    picture = np.random.default_rng(2).normal(size=(2, 3, 16, 24)).astype(np.float32)
    found: NDArray[np.float32] = session.run(None, {"image": picture})[0]
    return found


@pytest.mark.parametrize(
    "model",
    [
        network(pads=[1, 1, 1, 1]),
        network(pads=[2, 0, 1, 3], strides=[2, 2]),
        network(auto_pad="SAME_UPPER", strides=[2, 2]),
        network(offset=None, pads=[1, 1, 1, 1]),
        network(named=True, pads=[1, 1, 1, 1]),
        network(half=True, pads=[1, 1, 1, 1]),
        network(pads=[2, 2, 2, 2], dilations=[2, 2]),
    ],
    ids=["add", "uneven pads", "auto pads", "no offset", "named", "half", "dilated"],
)
def test_the_folded_convolution_gives_equal_results_at_the_borders_too(model: onnx.ModelProto) -> None:
    before = computed(model)
    assert fold_scale(model.graph, "image")
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node if node.op_type in ("Mul", "Cast")] == []
    np.testing.assert_allclose(computed(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        network(group=3, pads=[1, 1, 1, 1]),
        network(second_user=True),
        network(factor=np.array(2.0, np.float32)),
        network(factor=FACTOR * np.array([1, 0, 1], np.float32).reshape(1, 3, 1, 1)),
        network(factor=np.ones((1, 1, 16, 24), np.float32)),
    ],
    ids=["groups", "two users", "one number", "a zero", "by pixel"],
)
def test_an_uncertain_pattern_is_left_unchanged(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert not fold_scale(model.graph, "image")
    assert model.SerializeToString() == before


@pytest.mark.shared
def test_the_normalisation_of_a_real_model_is_folded_into_its_first_weights(shared_data: Path) -> None:
    """PicoDet has a mean and a deviation: only the mean is still taken off before the first convolution."""
    model = load_model(shared_data / "models" / "picodet_s_416_coco80.onnx")
    graph = onnx.load_from_string(compile_model(model)).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds[kinds.index("Cast") : kinds.index("Conv")] == ["Cast", "Add", "Identity"]


def test_the_bundled_model_takes_pixels_unscaled() -> None:
    """It has neither mean nor factor, so nothing is computed before its first convolution."""
    graph = onnx.load_from_string(compile_model(load_model(find_bundled_model()))).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds[kinds.index("Cast") : kinds.index("Conv")] == ["Cast", "Identity"]
