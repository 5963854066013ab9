"""Networks in integers: as float has them, with integer kernels where they are wanted and nowhere else."""

import itertools
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deep_models import deep_detector, save_deep
from tiny_models import MEAN, STD, TinyDetector, pictures
from visionedge.errors import ModelError
from visionedge.model.model import Model, load_model
from visionedge.model.quantization.calibration import TensorRanges, collect_statistics, fold_constants
from visionedge.model.quantization.int8 import (
    QuantizationRecipe,
    RangeTuner,
    generate_recipes,
    open_cpu_session,
    quantize,
)

EVERYTHING = QuantizationRecipe()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_deep(tmp_path_factory.mktemp("deep") / "deep.onnx"))


@pytest.fixture(scope="module")
def simple() -> onnx.ModelProto:
    return fold_constants(deep_detector())


@pytest.fixture(scope="module")
def values(model: Model, simple: onnx.ModelProto) -> TensorRanges:
    return collect_statistics(simple, model.interpretation, list(pictures(8))).values("all")


def run(network: onnx.ModelProto, seed: int = 3) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    height_px, width_px = source.shape[2:]
    tensor = TinyDetector().tensor(pictures(1, width_px, height_px, seed=seed))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {source.name: tensor}), strict=True))


def computed(network: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def away(some: dict[str, NDArray[Any]], others: dict[str, NDArray[Any]]) -> float:
    return max(float(np.abs(some[name] - others[name]).max()) for name in some)


def test_values_are_observed_in_the_units_of_the_network(values: TensorRanges) -> None:
    """The compiler may put the normalisation's factor into the first convolution; ranges are set without."""
    low, high = values.ranges["image"]
    mean, std = np.array(MEAN), np.array(STD)
    assert low == pytest.approx((-mean / std).min(), abs=0.05)
    assert high == pytest.approx(((255 - mean) / std).max(), abs=0.05)


def test_every_recipe_agrees_closely_with_fp32(simple: onnx.ModelProto, values: TensorRanges) -> None:
    """Within a few steps of 8 bits, for pictures that no range was set by."""
    tried = list(generate_recipes(simple, values))
    assert len(tried) >= 4
    expected = run(simple)
    spread = max(float(array.std()) for array in expected.values())
    for recipe in tried:
        assert away(expected, run(quantize(simple, values, recipe))) < 0.35 * spread, str(recipe)


def test_recipes_differ_and_describe_themselves(simple: onnx.ModelProto, values: TensorRanges) -> None:
    """No two of them make the same graph or have the same words."""
    tried = list(generate_recipes(simple, values))
    graphs = {quantize(simple, values, recipe).SerializeToString() for recipe in tried}
    assert len(graphs) == len(tried) == len({str(recipe) for recipe in tried})


def test_integer_kernels_compute_the_inner_nodes(
    simple: onnx.ModelProto, values: TensorRanges, tmp_path: Path
) -> None:
    """All but the last convolutions, the sum and the activation; the last ones stay in floats."""
    operators = computed(quantize(simple, values, EVERYTHING), tmp_path)
    assert operators.count("QLinearConv") == 3
    assert {"QLinearLeakyRelu", "QLinearAdd"} <= set(operators)
    assert sum(operator in ("Conv", "FusedConv") for operator in operators) == 6
    assert not {"Add", "Relu", "LeakyRelu"} & set(operators)


@pytest.mark.parametrize(
    ("recipe", "integers"),
    [
        (QuantizationRecipe(skip_first=1), 2),
        (QuantizationRecipe(depthwise=False), 2),
        (QuantizationRecipe(skip_first=2, depthwise=False), 1),
    ],
)
def test_a_recipe_excludes_the_nodes_that_it_names(
    simple: onnx.ModelProto, values: TensorRanges, tmp_path: Path, recipe: QuantizationRecipe, integers: int
) -> None:
    """Those in front, and those of one channel each, stay in floats."""
    assert computed(quantize(simple, values, recipe), tmp_path).count("QLinearConv") == integers


@pytest.mark.parametrize("recipe", [QuantizationRecipe(skip_first=1), QuantizationRecipe(depthwise=False)])
def test_a_maximum_is_taken_before_rounding(
    recipe: QuantizationRecipe, tmp_path: Path
) -> None:
    """A MaxPool behind a convolution in floats: onnxruntime's own way, integers first, is slow."""
    network = pooled()
    ranges = TensorRanges(dict.fromkeys(("image", "first", "leaky", "pooled", "second"), (-4.0, 4.0)), {})
    made = quantize(network, ranges, recipe)
    computed(made, tmp_path)
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    producers = {name: node for node in nodes for name in node.output}
    assert "QLinearConv" in {node.op_type for node in nodes}
    (pool,) = (node for node in nodes if node.op_type == "MaxPool")
    producer = producers[pool.input[0]]
    # Which layout a convolution computes in, and which operator fits it in, is a matter of the processor.
    while producer.op_type in ("ReorderInput", "ReorderOutput", "Transpose"):
        producer = producers[producer.input[0]]
    assert producer.op_type in ("Conv", "FusedConv", "LeakyRelu")
    assert away(run_image(network), run_image(made)) < 4 * 8 / 255


def pooled() -> onnx.ModelProto:
    """image → depthwise convolution → LeakyRelu → MaxPool → convolution → convolution."""
    random = np.random.default_rng(2)
    weights = {
        "wide": random.normal(0, 0.3, (8, 1, 3, 3)).astype(np.float32),
        "inner": random.normal(0, 0.1, (8, 8, 1, 1)).astype(np.float32),
        "last": np.eye(8, dtype=np.float32)[..., None, None],
    }
    nodes = [
        helper.make_node("Conv", ["image", "wide"], ["first"], name="first", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["first"], ["leaky"], name="leaky", alpha=0.1),
        helper.make_node("MaxPool", ["leaky"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["pooled", "inner"], ["second"], name="second"),
        helper.make_node("Conv", ["second", "last"], ["y"], name="third"),
    ]
    return network_of(nodes, weights, {"image": (1, 8, 16, 16)}, {"y": (1, 8, 8, 8)})


@pytest.mark.parametrize(("reach", "joined"), [(3.0, True), (0.5, False)])
def test_concatenated_values_share_a_scale_unless_it_is_much_coarser(
    reach: float, joined: bool
) -> None:
    """Then the integers are copied: one rounding less, which is nearer to floats, and less work."""
    random = np.random.default_rng(4)
    weights = {
        "wide": random.normal(0, 0.3, (4, 8, 1, 1)).astype(np.float32),
        "slim": random.normal(0, 0.3, (4, 8, 1, 1)).astype(np.float32),
        "last": np.eye(8, dtype=np.float32)[..., None, None],
    }
    nodes = [
        helper.make_node("Conv", ["image", "wide"], ["one"], name="one"),
        helper.make_node("Conv", ["image", "slim"], ["two"], name="two"),
        helper.make_node("Concat", ["one", "two"], ["both"], name="both", axis=1),
        helper.make_node("Conv", ["both", "last"], ["y"], name="end"),
    ]
    network = network_of(nodes, weights, {"image": (1, 8, 16, 16)}, {"y": (1, 8, 16, 16)})
    ranges = {"image": (-1.0, 1.0), "one": (-4.0, 4.0), "two": (-reach, reach), "both": (-4.0, 4.0)}
    made = quantize(network, TensorRanges(ranges, {}), EVERYTHING)
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    one, two, both = (float(scales[f"int8:{name}:scale"]) for name in ("one", "two", "both"))
    assert one == both
    assert (two == both) is joined


def run_image(network: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(1).uniform(-1, 1, (1, 8, 16, 16)).astype(np.float32)
    return {"y": session.run(None, {"image": image})[0]}


def test_inputs_outputs_and_metadata_stay(simple: onnx.ModelProto, values: TensorRanges) -> None:
    """It can stand wherever the model stood, and is a sound graph."""
    made = quantize(simple, values, EVERYTHING)
    onnx.checker.check_model(made)
    original = deep_detector()
    assert [str(v) for v in made.graph.input] == [str(v) for v in original.graph.input]
    assert [v.name for v in made.graph.output] == [v.name for v in original.graph.output]
    assert list(made.metadata_props) == list(original.metadata_props)


def test_wrong_ranges_lower_the_agreement(simple: onnx.ModelProto, values: TensorRanges) -> None:
    """Ranges of a tenth cut everything off: the outputs are far away."""
    reduced_range = TensorRanges(
        {name: (low / 10, high / 10) for name, (low, high) in values.ranges.items()}, {}
    )
    expected = run(simple)
    near = away(expected, run(quantize(simple, values, EVERYTHING)))
    assert away(expected, run(quantize(simple, reduced_range, EVERYTHING))) > 3 * near


def test_unobserved_values_stay_in_fp32(
    simple: onnx.ModelProto, values: TensorRanges, tmp_path: Path
) -> None:
    """A tensor without a range takes its nodes out, and no more."""
    known = TensorRanges({name: each for name, each in values.ranges.items() if name != "both"}, {})
    made = quantize(simple, known, EVERYTHING)
    assert "QLinearAdd" not in computed(made, tmp_path)
    assert away(run(simple), run(made)) < 1


Shapes = dict[str, tuple[int, ...]]


def network_of(
    nodes: list[onnx.NodeProto], weights: dict[str, NDArray[np.float32]], inputs: Shapes, outputs: Shapes
) -> onnx.ModelProto:
    """A network of floats, folded."""
    x, y = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
        for shapes in (inputs, outputs)
    )
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "network", x, y, constants)
    return fold_constants(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def two_convolutions(kernel: NDArray[np.float32], bias: NDArray[np.float32]) -> onnx.ModelProto:
    """x → conv → conv, point by point, where the second only hands on."""
    weights = {"kernel": kernel, "bias": bias, "last": np.eye(len(kernel), dtype=np.float32)[..., None, None]}
    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["middle"], name="first"),
        helper.make_node("Conv", ["middle", "last"], ["y"], name="second"),
    ]
    return network_of(nodes, weights, {"x": (1, 3, 8, 8)}, {"y": (1, 2, 8, 8)})


def run_two(network: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


def test_a_channel_with_tiny_weights_and_a_large_bias_is_correct() -> None:
    """Its bias would not fit into an integer in steps as small as its weights want."""
    kernel = np.full((2, 3, 1, 1), 0.5, np.float32)
    kernel[1] = 1e-12
    network = two_convolutions(kernel, np.array([0, 7], np.float32))
    x = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    made = quantize(network, TensorRanges({"x": (0, 1), "middle": (0, 7)}, {}), EVERYTHING)
    np.testing.assert_allclose(run_two(made, x)[0, 1], 7, atol=0.05)


def test_rounding_of_weights_keeps_the_mean() -> None:
    """Where every weight of a kernel is rounded the same way, the bias takes it back."""
    kernel = np.full((2, 3, 1, 1), 0.4 / 127, np.float32)
    kernel[:, 0] = 1.0
    network = two_convolutions(kernel, np.zeros(2, np.float32))
    x = np.full((1, 3, 8, 8), 200, np.float32)
    ranges = {"x": (0.0, 255.0), "middle": (0.0, 255.0)}
    expected = run_two(network, x)
    wide = QuantizationRecipe(reduced_range=False)
    plain = run_two(quantize(network, TensorRanges(ranges, {}), wide), x)
    corrected = run_two(quantize(network, TensorRanges(ranges, {"x": np.full(3, 200.0)}), wide), x)
    assert np.abs(plain - expected).max() > 1
    assert np.abs(corrected - expected).max() <= 0.51


def weights_of(network: onnx.ModelProto) -> NDArray[np.int64]:
    """The integers of the first convolution, (out, n)."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    kernel = tensors["int8:first.kernel:integers"]
    return kernel.reshape(len(kernel), -1).astype(np.int64)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, (2, 3, 1, 1), elements=st.floats(-4, 4, width=32)))
def test_pairs_of_reduced_range_weights_stay_within_128_and_near_their_values(
    kernel: NDArray[np.float32],
) -> None:
    """255 * 128 is the most that fits into 16 bits with a sign; seven of eight bits are left at least."""
    network = two_convolutions(kernel, np.zeros(2, np.float32))
    made = quantize(network, TensorRanges({"x": (0, 1), "middle": (-9, 9)}, {}), EVERYTHING)
    integers = weights_of(made)
    pairs = [a + b for row in integers.tolist() for a, b in itertools.combinations(row, 2) if a * b > 0]
    assert max(map(abs, pairs), default=0) <= 128
    assert np.abs(integers).max() <= 127
    flat = kernel.reshape(2, -1)
    step = np.maximum(np.abs(flat).max(axis=1, keepdims=True) / 63.5, 1e-6)
    scale = np.array(_scales(made)).reshape(2, 1)
    assert (np.abs(integers * scale - flat) <= 0.51 * step).all()


def _scales(network: onnx.ModelProto) -> list[float]:
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    scales: list[float] = tensors["int8:first.kernel:scale"].tolist()
    return scales


@pytest.mark.parametrize("sign", [1, -1])
def test_reduced_range_weights_are_correct_with_16_bit_accumulation(sign: int) -> None:
    """The largest values meet the largest weights, which this processor may or may not cut off at."""
    kernel = np.full((2, 3, 1, 1), sign, np.float32)
    network = two_convolutions(kernel, np.zeros(2, np.float32))
    ranges = TensorRanges({"x": (0.0, 255.0), "middle": (-765.0, 765.0)}, {})
    made = quantize(network, ranges, EVERYTHING).SerializeToString()
    x = np.full((1, 3, 8, 8), 255, np.float32)
    exact, own = (open_cpu_session(made, exact=exact).run(None, {"x": x})[0] for exact in (True, False))
    np.testing.assert_allclose(own, exact, atol=0.01)
    np.testing.assert_allclose(exact, sign * 765.0, atol=6)


def test_integer_kernels_match_the_written_graph(simple: onnx.ModelProto, values: TensorRanges) -> None:
    """The same as without them, but for a step here and there."""
    made = quantize(simple, values, EVERYTHING).SerializeToString()
    tensor = TinyDetector().tensor(pictures(1, seed=3))
    exact, own = (open_cpu_session(made, exact=exact) for exact in (True, False))
    outputs = [session.run(None, {"image": tensor}) for session in (exact, own)]
    for one, other in zip(*outputs, strict=True):
        assert np.abs(one - other).max() < 0.1 * one.std()


def test_ranges_tuned_tensor_by_tensor_are_never_worse(model: Model, simple: onnx.ModelProto) -> None:
    """They bring the outputs nearer to those of fp32 than the best one way for all does."""
    images = list(pictures(4))
    tuner = RangeTuner(
        simple, model.interpretation, collect_statistics(simple, model.interpretation, images), images[:2]
    )
    _, uniform = tuner.choose_method(EVERYTHING)
    finer = tuner.tune_each(EVERYTHING, uniform)

    def distance(some: TensorRanges) -> float:
        network = quantize(simple, some, EVERYTHING)
        expected, outputs = run(simple, seed=1), run(network, seed=1)
        return float(np.mean([np.mean((outputs[name] - expected[name]) ** 2) for name in expected]))

    assert finer.ranges != uniform.ranges
    assert distance(finer) <= distance(uniform) * 1.05


def test_a_network_that_gives_nan_is_refused(model: Model) -> None:
    """Ranges cannot be set by what is not a number."""
    network = deep_detector()
    for tensor in network.graph.initializer:
        if tensor.name == "first.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, np.nan, np.float32), tensor.name))
    with pytest.raises(ModelError, match="NaN or infinity"):
        collect_statistics(fold_constants(network), model.interpretation, list(pictures(1)))


def test_old_opsets_and_fixed_batches_are_accepted(tmp_path: Path) -> None:
    """Opset 11 has no scale for each channel: it is brought to one that has."""
    detector = TinyDetector(opset=11, batch=2)
    model = load_model(save_deep(tmp_path / "old.onnx", detector))
    simple = fold_constants(onnx.load(model.path))
    assert simple.opset_import[0].version >= 13
    made = quantize(
        simple, collect_statistics(simple, model.interpretation, list(pictures(3))).values("all"), EVERYTHING
    )
    onnx.checker.check_model(made)
    assert "QuantizeLinear" in {node.op_type for node in made.graph.node}
