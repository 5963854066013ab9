"""Graphs are changed so that bf16 costs less: what they compute stays the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visionedge.engine.device.backend import list_cpu_precisions
from visionedge.engine.device.openvino_rounding import (
    drop_key_offsets,
    keep_decoding_in_fp32,
    keep_positions_in_fp32,
    reduce_rounding,
)
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import load_model
from visionedge.runtime.ov import import_openvino, installed_openvino

if not installed_openvino():
    pytest.skip("the package openvino is not here", allow_module_level=True)
openvino = import_openvino()
ops = openvino.opset13

needs_bf16 = pytest.mark.skipif(
    "bf16" not in list_cpu_precisions(), reason="this CPU has no instructions for bf16"
)


def noise(*shape: int, scale: float = 1.0, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def compute(model: Any, precision: str, *inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output."""
    options = {"INFERENCE_PRECISION_HINT": precision}
    return np.array(openvino.compile_model(model, "CPU", options)(list(inputs))[0])


def kinds(model: Any) -> list[str]:
    return [operator.get_type_name() for operator in model.get_ordered_ops()]


# --- expectations over bins ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_an_expectation_over_bins_becomes_a_sum(shape: tuple[int, ...]) -> None:
    ops = openvino.opset13
    source = ops.parameter([1, 5, 4, 8], np.float32)
    weights = np.arange(8, dtype=np.float32).reshape(shape)
    model = openvino.Model([ops.matmul(source, ops.constant(weights), False, False)], [source])
    bins = np.random.default_rng(0).random((1, 5, 4, 8), np.float32)
    assert keep_decoding_in_fp32(model) == 1
    kinds = {operator.get_type_name() for operator in model.get_ops()}
    assert "ReduceSum" in kinds
    assert "MatMul" not in kinds
    (rows,) = openvino.compile_model(model, "CPU")(bins).values()
    np.testing.assert_allclose(rows, bins @ weights, rtol=1e-5)


def test_the_expectation_of_a_convolution_becomes_a_sum_and_other_layers_stay() -> None:
    ops = openvino.opset13
    source = ops.parameter([1, 16, 4, 9], np.float32)
    weights = np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1)

    def convolve(weights: NDArray[np.float32]) -> Any:
        return ops.convolution(source, ops.constant(weights), [1, 1], [0, 0], [0, 0], [1, 1])

    bins = np.random.default_rng(0).random((1, 16, 4, 9), np.float32)
    model = openvino.Model([convolve(weights), convolve(np.ones((8, 16, 1, 1), np.float32))], [source])
    assert keep_decoding_in_fp32(model) == 1
    rows = list(openvino.compile_model(model, "CPU")(bins).values())
    np.testing.assert_allclose(rows[0], (bins * weights).sum(axis=1, keepdims=True), rtol=1e-5)
    assert rows[1].shape == (1, 8, 4, 9)


@pytest.mark.parametrize(("shape", "transposed"), [((1, 8), False), ((8, 1), True), ((8, 4), False)])
def test_a_product_with_several_results_is_no_expectation(shape: tuple[int, int], transposed: bool) -> None:
    source = ops.parameter([5, shape[transposed]], np.float32)
    product = ops.matmul(source, ops.constant(noise(*shape)), False, transposed)
    assert keep_decoding_in_fp32(openvino.Model([product], [source])) == 0


# --- keys of attention --------------------------------------------------------------------------------------

TOKENS, HEADS, WIDTH = 30, 2, 6
CHANNELS = HEADS * WIDTH


def attend(
    *, offset: NDArray[np.float32], axis: int = -1, transposed: bool = False, shown: bool = False
) -> Any:
    """Attention as PyTorch exports it; `shown`: the keys are an output, too."""
    rows = ops.parameter([TOKENS, 1, CHANNELS], np.float32)
    shape = ops.constant(np.array([TOKENS, HEADS, WIDTH]))

    def weigh(seed: int) -> Any:
        weights = ops.constant(noise(CHANNELS, CHANNELS, scale=0.3, seed=seed))
        return ops.matmul(rows, weights, False, False)

    def split(tensor: Any, *order: int) -> Any:
        return ops.transpose(ops.reshape(tensor, shape, False), ops.constant(np.array(order)))

    keys = ops.add(weigh(1), ops.constant(offset))
    queries = ops.multiply(split(weigh(2), 1, 0, 2), ops.constant(np.float32(0.4)))
    shaped = split(keys, 1, 0, 2) if transposed else split(keys, 1, 2, 0)
    likeness = ops.matmul(queries, shaped, False, transposed)
    result = ops.matmul(ops.softmax(likeness, axis), split(weigh(3), 1, 0, 2), False, False)
    return openvino.Model([result, keys] if shown else [result], [rows])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_constant_that_all_keys_share_is_removed_and_changes_nothing(transposed: bool) -> None:
    model, rows = attend(offset=noise(CHANNELS), transposed=transposed), noise(TOKENS, 1, CHANNELS)
    before = compute(model, "f32", rows)
    assert drop_key_offsets(model) == 1
    assert "Add" not in kinds(model)
    np.testing.assert_allclose(compute(model, "f32", rows), before, atol=1e-5)


@needs_bf16
def test_attention_with_a_large_constant_in_its_keys_is_right_in_bf16() -> None:
    model, rows = attend(offset=noise(CHANNELS, scale=1000)), noise(TOKENS, 1, CHANNELS)
    expected = compute(attend(offset=noise(CHANNELS, scale=0)), "f32", rows)
    assert np.abs(compute(model, "bf16", rows) - expected).max() > 0.2
    reduce_rounding(model, "cpu")
    np.testing.assert_allclose(compute(model, "bf16", rows), expected, atol=0.02)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(attend(offset=noise(CHANNELS), shown=True), id="another reader of the keys"),
        pytest.param(attend(offset=noise(CHANNELS), axis=1), id="a softmax over queries"),
        pytest.param(attend(offset=noise(TOKENS, 1, CHANNELS)), id="a number for each key"),
    ],
)
def test_a_constant_that_counts_stays(model: Any) -> None:
    assert drop_key_offsets(model) == 0


# --- positions of deformable attention ----------------------------------------------------------------------

SIDE, POINTS = 256, 40


def sample() -> Any:
    """A map that rises and falls by one in four cells, sampled where a layer says, before another layer."""
    rows = ops.parameter([1, POINTS, 16], np.float32)
    logits = ops.matmul(rows, ops.constant(noise(16, 2, scale=0.001)), False, False)
    boxes = ops.sigmoid(ops.add(logits, ops.constant(noise(1, POINTS, 2, seed=1))))
    grid = ops.subtract(ops.multiply(boxes, ops.constant(np.float32(2))), ops.constant(np.float32(1)))
    waves = np.tile(np.abs(np.arange(SIDE, dtype=np.float32) % 8 - 4) / 4, (1, 1, SIDE, 1))
    options = {"align_corners": False, "mode": "bilinear", "padding_mode": "border"}
    sampled = ops.grid_sample(ops.constant(waves), ops.unsqueeze(grid, ops.constant(1)), options)
    cells = ops.reshape(sampled, ops.constant(np.array([POINTS, 1])), False)
    return openvino.Model(
        [ops.matmul(cells, ops.constant(np.eye(1, 32, dtype=np.float32)), False, False)], [rows]
    )


@needs_bf16
def test_features_are_sampled_in_bf16_where_fp32_samples_them() -> None:
    model, rows = sample(), noise(1, POINTS, 16)
    expected = compute(model, "f32", rows)
    assert np.abs(compute(model, "bf16", rows) - expected).max() > 0.05
    assert keep_positions_in_fp32(model) == 1
    np.testing.assert_allclose(compute(model, "bf16", rows), expected, atol=0.01)


def test_positions_are_outputs_behind_those_of_the_graph() -> None:
    model = sample()
    reduce_rounding(model, "openvino-gpu")
    assert len(model.outputs) == 1
    reduce_rounding(model, "cpu")
    assert [tuple(output.get_shape()) for output in model.outputs] == [(POINTS, 32), (1, 1, POINTS, 2)]


def test_a_grid_that_is_a_constant_adds_no_output() -> None:
    source = ops.parameter([1, 3, 8, 8], np.float32)
    model = openvino.Model(
        [ops.grid_sample(source, ops.constant(np.zeros((1, 4, 4, 2), np.float32)), {})], [source]
    )
    assert keep_positions_in_fp32(model) == 0
    assert len(model.outputs) == 1


@pytest.mark.shared
def test_the_attention_of_a_real_model_is_found(shared_data: Path) -> None:
    """DEIMv2 has three decoder layers, each with an attention over queries and samples of two maps."""
    path = shared_data / "models" / "deimv2_hgnetv2_femto_416_coco80.onnx"
    model = openvino.Core().read_model(compile_model(load_model(path)))
    model.reshape([2, 416, 416, 3])
    assert drop_key_offsets(model) == 3
    assert keep_positions_in_fp32(model) == 6
