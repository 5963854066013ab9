"""tools/nncf_quantize.py: what stays in floats, unsigned values, the judging. NNCF does not run here."""

import importlib.util
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nncf_quantize import judge, list_float_nodes, main, make_unsigned
from tiny_models import TinyDetector, pictures
from visionedge.frames.letterbox import fit_to_input
from visionedge.model.compiler.compile import read_unchanged_network
from visionedge.model.model import load_model
from visionedge.model.quantization.calibration import open_cpu_session
from visionedge.model.quantization.search import CalibrationData, CalibrationSample
from visionedge.runtime.ov import installed_openvino


def make_chain() -> onnx.ModelProto:
    """Four convolutions with a Relu behind each, then a Sigmoid."""
    nodes, last = [], "pictures"
    for number in range(4):
        nodes.append(helper.make_node("Conv", [last, "kernel"], [f"c{number}"], name=f"conv{number}"))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], name=f"relu{number}"))
        last = f"r{number}"
    nodes.append(helper.make_node("Sigmoid", [last], ["scores"], name="sigmoid"))
    return make_model(nodes, {"kernel": np.ones((1, 1, 1, 1), np.float32)})


def make_model(nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8, 8])
        for name in ("pictures", "scores")
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_first_convolutions_and_the_ends_stay_in_floats() -> None:
    """With what is computed from the first ones alone."""
    network = make_chain()
    assert list_float_nodes(network.graph, 0) == ["conv3", "relu3", "sigmoid"]
    assert list_float_nodes(network.graph, 2)[:4] == ["conv0", "relu0", "conv1", "relu1"]


def test_unsigned_activations_have_the_same_values() -> None:
    """Also those that int8 cuts off; weights stay signed."""
    weights: dict[str, NDArray[Any]] = {"scale": np.array(0.05, np.float32), "zero": np.array(-14, np.int8)}
    pair = [
        helper.make_node("QuantizeLinear", ["pictures", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["scores"]),
    ]
    signed = make_model(pair, weights)
    unsigned = make_unsigned(signed)
    values = np.linspace(-9, 9, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    before, after = (
        open_cpu_session(network.SerializeToString(), optimized=False).run(None, {"pictures": values})[0]
        for network in (signed, unsigned)
    )
    assert np.array_equal(before, after)
    assert {t.name: t.data_type for t in unsigned.graph.initializer}["zero"] == TensorProto.UINT8


@pytest.mark.skipif(not installed_openvino(), reason="OpenVINO is not installed")
def test_a_variant_is_judged_in_openvino_beside_fp32(tmp_path: Path) -> None:
    """The model itself detects the same; one with other weights is refused."""
    model = load_model(TinyDetector().save(tmp_path / "tiny.onnx"))
    samples = tuple(CalibrationSample(*fit_to_input(each, model.input)) for each in pictures(8))
    data = CalibrationData(samples, samples, common=samples[:2])
    same = judge(model, data, read_unchanged_network(model))
    assert (same["refused"], same["parity"]["matched"], same["parity"]["pictures"]) == (None, 1.0, 8)
    assert same["parityHere"]["matched"] > 0.9
    other = judge(model, data, TinyDetector(seed=3).proto())
    assert other["refused"].startswith("only ")


@pytest.mark.skipif(importlib.util.find_spec("nncf") is not None, reason="NNCF is installed")
def test_without_nncf_the_tool_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    for number, picture in enumerate(pictures(16)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    assert main([str(model), "--calibrate", str(tmp_path)]) == 3
    assert "nncf is not installed; pip install -r requirements/nncf.in" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.int8.*"))
