"""A network converted to 8-bit integers: values as uint8, weights as int8 with a scale per output channel.

The graph keeps its inputs and outputs. Each quantised value passes a pair of QuantizeLinear and
DequantizeLinear (QDQ), and onnxruntime uses integer kernels for nodes between such pairs. Which nodes gain
from it differs between networks: a recipe chooses them, `generate_recipes` lists the recipes to try, and
`RangeTuner` chooses the ranges of values.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.frames.types import Picture
from visionedge.model.graph import list_inputs
from visionedge.model.interpretation import ModelInterpretation
from visionedge.model.quantization.calibration import (
    RANGE_METHODS,
    WEIGHTED_OPERATORS,
    PictureSession,
    ProgressReporter,
    RangeMethod,
    TensorRanges,
    TensorStatistics,
    ValueRange,
    find_nodes_before_last_weights,
    list_float_tensors,
    make_silent_reporter,
)

_CONVOLUTION_OPERATORS = frozenset({"Conv", "Relu", "Clip"})
_ALL_OPERATORS = _CONVOLUTION_OPERATORS | {
    "Add",
    "Concat",
    "LeakyRelu",
    "MaxPool",
    "Mul",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
}
# Their outputs are the same integers as their input.
_VALUE_PRESERVING = frozenset({"MaxPool", "Resize", "Slice", "Split"})
_ELEMENTWISE = frozenset({"Add", "Clip", "LeakyRelu", "Mul", "Relu", "Sigmoid"})
# These stay floats behind a convolution that stays in floats. MaxPool commutes with rounding, and fewer
# values are left to round behind it.
_FOLLOWING_OPERATORS = _ELEMENTWISE | {"MaxPool"}
_MIN_SCALE = 1e-9
# A part of a Concat whose range is at least half of the result's gets the range of the result: it is
# rounded once instead of twice, and then only copied.
_MIN_SPAN_TO_JOIN = 0.5
_MAX_BIAS = 2.0**30  # in steps; an int32 holds twice that


@dataclass(frozen=True, slots=True)
class QuantizationRecipe:
    """Which nodes become integers. The first `skip_first` convolutions stay floats.

    The last convolutions, which compute scores and boxes, and all nodes behind them always stay floats.

    With `reduced_range` the sum of two products of a convolution fits into 16 bits. x86 processors without
    VNNI add them in 16 bits and saturate. It costs up to one bit of the eight, and the network computes the
    same on every processor.
    """

    everything: bool = True
    depthwise: bool = True
    skip_first: int = 0
    reduced_range: bool = True

    def __str__(self) -> str:
        return f"{self.nodes}; {'narrow' if self.reduced_range else 'wide'} weights"

    @property
    def nodes(self) -> str:
        """The name of the recipe without its weights."""
        words = "everything" if self.everything else "convolutions"
        if not self.depthwise:
            words += " but depthwise"
        return f"{words}, behind the first {self.skip_first}" if self.skip_first else words


def generate_recipes(network: onnx.ModelProto, values: TensorRanges) -> Iterator[QuantizationRecipe]:
    """The recipes to try for a network; each makes another network."""
    convolutions = sum(node.op_type == "Conv" for node in network.graph.node)
    fronts = sorted({0, 1, convolutions // 12, convolutions // 6, convolutions // 3})
    seen = {network.SerializeToString()}
    for everything in (True, False):
        for depthwise in (True, False):
            for skip_first in fronts:
                recipe = QuantizationRecipe(everything, depthwise, skip_first)
                made = quantize(network, values, recipe).SerializeToString()
                if made not in seen and b"QuantizeLinear" in made:
                    seen.add(made)
                    yield recipe


def quantize(network: onnx.ModelProto, values: TensorRanges, recipe: QuantizationRecipe) -> onnx.ModelProto:
    """A copy of a folded network in integers by a recipe; `values` are those of its float tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    _QdqInserter(copy.graph, values, recipe).insert_pairs()
    del copy.graph.value_info[:]  # it describes removed tensors too
    return copy


def _choose_nodes(
    graph: onnx.GraphProto, recipe: QuantizationRecipe, weights: set[str], values: TensorRanges
) -> frozenset[str]:
    """The names of the nodes that become integers: those whose values are all known."""
    unknown = list_float_tensors(graph) - set(values.ranges)
    operators = _ALL_OPERATORS if recipe.everything else _CONVOLUTION_OPERATORS
    inner = find_nodes_before_last_weights(graph)
    chosen: set[str] = set()
    loose: set[str] = set()  # made by a convolution in floats, or by what follows one
    passed = 0
    for node in graph.node:
        passed += node.op_type == "Conv"
        known = unknown.isdisjoint((*node.input, *node.output))
        if (
            passed <= recipe.skip_first
            or node.op_type not in operators
            or node.name not in inner
            or not known
        ):
            continue
        if node.op_type == "Conv":
            follows = _is_wanted(node, recipe, weights)
        else:
            follows = node.op_type not in _FOLLOWING_OPERATORS or loose.isdisjoint(node.input)
        if follows:
            chosen.add(node.name)
        else:
            loose.update(node.output)
    return frozenset(chosen)


def _is_wanted(convolution: onnx.NodeProto, recipe: QuantizationRecipe, weights: set[str]) -> bool:
    """Whether a recipe has this convolution; its weights and bias must be constants."""
    constant = all(name in weights for name in convolution.input[1:] if name)
    return constant and (recipe.depthwise or _read_groups(convolution) == 1)


def _read_groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


@dataclass(frozen=True, slots=True)
class _QuantizationParameters:
    """value = (integer - zero) * scale, integers from 0 to 255."""

    scale: np.float32
    zero_point: np.uint8

    @staticmethod
    def of(values: ValueRange) -> "_QuantizationParameters":
        low, high = min(values[0], 0.0), max(values[1], 0.0)
        scale = np.float32(max((high - low) / 255, _MIN_SCALE))
        return _QuantizationParameters(scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255)))

    def integers(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        steps = np.round(values / self.scale) + float(self.zero_point)
        result: NDArray[np.uint8] = np.clip(steps, 0, 255).astype(np.uint8)
        return result


def _compute_kernel_ranges(kernels: NDArray[np.float64], *, reduced_range: bool) -> NDArray[np.float64]:
    """What 127 steps have to reach in each kernel [out, n]: its largest weight, or two of them together.

    255 * (a + b) stays within 16 bits for a + b of 128 at most, and rounding adds 1 to the 127 aimed at.
    Only weights of the same sign add up, and which two meet differs from processor to processor.
    """
    if not reduced_range or kernels.shape[1] == 1:
        plain: NDArray[np.float64] = np.abs(kernels).max(axis=1)
        return plain
    lowest_first = np.sort(kernels, axis=1)
    above, below = np.maximum(lowest_first, 0.0), np.maximum(-lowest_first, 0.0)
    pairs: NDArray[np.float64] = np.stack([above[:, -2:].sum(axis=1), below[:, :2].sum(axis=1)]).max(axis=0)
    return pairs


def _compute_bias_shift(
    away: NDArray[np.float64], means: NDArray[np.float64], groups: int
) -> NDArray[np.float64]:
    """By how much the mean of each output moves when weights are `away` [out, in / groups, h, w] from right.

    The rounding of a kernel's weights does not cancel out where its inputs have a mean.
    """
    sums = away.sum(axis=(2, 3)).reshape(groups, -1, away.shape[1])
    moved: NDArray[np.float64] = (sums @ means.reshape(groups, -1, 1)).reshape(-1)
    return moved


def _make_name(tensor: str, part: str) -> str:
    """The name of a part of a tensor's pair; no exporter writes such names."""
    return f"int8:{tensor}:{part}"


@dataclass(slots=True)
class _QdqInserter:
    """Inserts the QDQ pairs into a graph, node by node."""

    graph: onnx.GraphProto
    values: TensorRanges
    recipe: QuantizationRecipe
    weights: dict[str, onnx.TensorProto] = field(init=False)
    chosen: frozenset[str] = field(init=False)
    steps: dict[str, _QuantizationParameters] = field(init=False)
    left: set[str] = field(init=False)
    body: list[onnx.NodeProto] = field(init=False, default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.chosen = _choose_nodes(self.graph, self.recipe, set(self.weights), self.values)
        self.steps = self._steps()
        self.left = self._find_float_outputs()

    def insert_pairs(self) -> None:
        for value in self.graph.input:
            self._insert_pair(value.name)
        for node in self.graph.node:
            if node.name in self.chosen:
                self._quantize_weights(node)
            for place, name in enumerate(node.input):
                if name in self.steps:
                    node.input[place] = _make_name(name, "floats")
            self.body.append(node)
            for name in node.output:
                self._insert_pair(name)
        used = {name for node in self.body for name in list_inputs(node)}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.body)
        self.graph.initializer.extend([*kept, *self.constants.values()])

    def _steps(self) -> dict[str, _QuantizationParameters]:
        """The step of each tensor that becomes an integer: all that go into or come out of chosen nodes."""
        floats = list_float_tensors(self.graph)
        nodes = [node for node in self.graph.node if node.name in self.chosen]
        wanted = {name for node in nodes for name in (*node.input, *node.output) if name in floats}
        wanted -= self._find_fused_activations(nodes)
        same = {
            out: node.input[0] for node in nodes if node.op_type in _VALUE_PRESERVING for out in node.output
        }
        for node in nodes:
            if node.op_type == "Concat":
                for name in wanted.intersection(node.input) - same.keys():
                    if self._span(name) >= _MIN_SPAN_TO_JOIN * self._span(node.output[0]):
                        same[name] = node.output[0]
        steps = {}
        for name in wanted:
            origin = name
            while origin in same:
                origin = same[origin]
            steps[name] = _QuantizationParameters.of(self.values.ranges[origin])
        return steps

    def _span(self, name: str) -> float:
        low, high = self.values.ranges[name]
        return high - low

    def _find_fused_activations(self, nodes: list[onnx.NodeProto]) -> set[str]:
        """What lies between a convolution and its Relu or Clip: the integers' own range cuts it as well."""
        users = Counter(name for node in self.graph.node for name in node.input)
        convolutions = {node.output[0] for node in nodes if node.op_type == "Conv"}
        return {
            node.input[0]
            for node in nodes
            if node.op_type in ("Relu", "Clip")
            and node.input[0] in convolutions
            and users[node.input[0]] == 1
        }

    def _insert_pair(self, name: str) -> None:
        if (step := self.steps.get(name)) is None:
            return
        scale = self._constant(_make_name(name, "scale"), np.array(step.scale))
        zero_point = self._constant(_make_name(name, "zero"), np.array(step.zero_point))
        source = self._add_clip(name, step) if name in self.left else name
        self._add("QuantizeLinear", [source, scale, zero_point], _make_name(name, "integers"))
        self._add(
            "DequantizeLinear", [_make_name(name, "integers"), scale, zero_point], _make_name(name, "floats")
        )

    def _add_clip(self, name: str, step: _QuantizationParameters) -> str:
        """Cut to the range by a Clip, which costs little, and nothing where it goes into a convolution.

        Without it onnxruntime takes a convolution in floats between two pairs for one to be made integers,
        and quantises it with one scale for all its weights. And it rounds in front of a MaxPool
        instead of behind it: among integers that are not laid out as its convolutions want them, a MaxPool
        takes 15 times as long (onnxruntime 1.31 on x86: a fifth of NanoDet-g's time).
        """
        low = np.float32(-float(step.zero_point) * float(step.scale))
        high = np.float32((254.75 - float(step.zero_point)) * float(step.scale))
        bounds = [
            self._constant(_make_name(name, word), np.array(value))
            for word, value in (("low", low), ("high", high))
        ]
        self._add("Clip", [name, *bounds], _make_name(name, "cut"))
        return _make_name(name, "cut")

    def _find_float_outputs(self) -> set[str]:
        """What MaxPools and convolutions make that stay in floats, the latter also through a Relu or Clip."""
        left: set[str] = set()
        for node in self.graph.node:
            behind = node.op_type in ("Relu", "Clip") and node.input[0] in left
            pools = node.op_type == "MaxPool" and node.input[0] not in self.steps
            if node.name not in self.chosen and (node.op_type in WEIGHTED_OPERATORS or behind or pools):
                left.update(node.output)
        return left

    def _quantize_weights(self, node: onnx.NodeProto) -> None:
        """The weights of a chosen node as integers; the small numbers of Clip, Resize and so on stay."""
        if node.op_type == "Conv":
            self._quantize_convolution(node)
        elif node.op_type in ("Add", "Mul", "Concat"):
            for place, name in enumerate(node.input):
                if name in self.weights:
                    node.input[place] = self._quantize_constant(name)

    def _quantize_constant(self, name: str) -> str:
        values = numpy_helper.to_array(self.weights[name])
        step = _QuantizationParameters.of((float(values.min()), float(values.max())))
        return self._dequantised(name, step.integers(values), np.array(step.scale), np.array(step.zero_point))

    def _quantize_convolution(self, node: onnx.NodeProto) -> None:
        kernel = numpy_helper.to_array(self.weights[node.input[1]]).astype(np.float64)
        bias = np.zeros(len(kernel))
        if len(node.input) > 2 and node.input[2]:
            bias = numpy_helper.to_array(self.weights[node.input[2]]).astype(np.float64)
        source = float(self.steps[node.input[0]].scale)
        # What sees one channel at a time is added up in 32 bits everywhere.
        reduced_range = self.recipe.reduced_range and kernel.shape[1] > 1
        scales = _compute_kernel_ranges(kernel.reshape(len(kernel), -1), reduced_range=reduced_range) / 127
        # A channel of tiny weights and a large bias would not fit; coarser weights cost it nothing.
        least = np.maximum(np.abs(bias) / (source * _MAX_BIAS), _MIN_SCALE)
        scales = np.maximum(scales, least).astype(np.float32)
        wide = scales.reshape(-1, *([1] * (kernel.ndim - 1)))
        integers = np.clip(np.round(kernel / wide), -127, 127).astype(np.int8)
        means = self.values.means.get(node.input[0])
        if means is not None and kernel.ndim == 4:
            bias = bias - _compute_bias_shift(
                integers * wide.astype(np.float64) - kernel, means, _read_groups(node)
            )
        both = (np.float32(source) * scales).astype(np.float32)
        zeros = np.zeros(len(kernel), np.int8)
        made = [
            self._dequantised(f"{node.name}.kernel", integers, scales, zeros, axis=0),
            self._dequantised(
                f"{node.name}.bias",
                np.round(bias / both).astype(np.int32),
                both,
                zeros.astype(np.int32),
                axis=0,
            ),
        ]
        del node.input[1:]
        node.input.extend(made)

    def _dequantised(
        self,
        name: str,
        integers: NDArray[Any],
        scale: NDArray[Any],
        zero_point: NDArray[Any],
        **attributes: int,
    ) -> str:
        """Integers as a constant and what makes them floats; the name of the floats."""
        made = _make_name(name, "floats")
        if _make_name(name, "integers") not in self.constants:
            parts = [
                self._constant(_make_name(name, word), values)
                for word, values in (("integers", integers), ("scale", scale), ("zero", zero_point))
            ]
            self._add("DequantizeLinear", parts, made, **attributes)
        return made

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        node = helper.make_node(operator, inputs, [output], name=f"{output}.{operator}")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.body.append(node)


# --- range tuning -------------------------------------------------------------------------------------------
#
# No single method of setting ranges is the best for every tensor. So each tensor, in the order of the
# graph, is tried with the range of each method, and keeps the one that brings the network's outputs closest
# to fp32.


MAX_TRIES = 240
"""Each try opens the network again. The tensors near the input, which matter most, come first."""

NetworkOutputs = list[NDArray[np.float64]]


class RangeTuner:
    """Chooses ranges so that the network's outputs on some pictures are close to those of fp32."""

    def __init__(
        self,
        simple: onnx.ModelProto,
        interpretation: ModelInterpretation,
        statistics: TensorStatistics,
        pictures: Sequence[Picture],
        progress: ProgressReporter | None = None,
    ) -> None:
        self._simple = simple
        self._interpretation = interpretation
        self._ways = {method: statistics.values(method) for method in RANGE_METHODS}
        self._pictures = pictures
        self._progress = progress or make_silent_reporter()
        self._distance = make_distance(run_network(simple, interpretation, pictures))

    def choose_method(self, recipe: QuantizationRecipe) -> tuple[RangeMethod, TensorRanges]:
        """The method for all ranges with the smallest distance to fp32."""
        method = min(RANGE_METHODS, key=lambda way: self._measure_distance(recipe, self._ways[way]))
        return method, self._ways[method]

    def tune_each(self, recipe: QuantizationRecipe, start: TensorRanges) -> TensorRanges:
        """The best range of each tensor, starting with `start`; takes minutes."""
        ranges: dict[str, ValueRange] = dict(start.ranges)
        least, tries = self._measure_distance(recipe, start), 0
        names = _list_quantized_tensors(quantize(self._simple, start, recipe), ranges)
        for number, name in enumerate(names):
            self._progress.step(f"{number} of {len(names)} tensors; {least:.4f} away from fp32")
            ways = dict.fromkeys(way.ranges[name] for way in self._ways.values())
            for candidate in [way for way in ways if way != ranges[name]]:
                if tries == MAX_TRIES:
                    return TensorRanges(ranges, start.means)
                tries += 1
                before, ranges[name] = ranges[name], candidate
                now = self._measure_distance(recipe, TensorRanges(ranges, start.means))
                if now < least:
                    least = now
                else:
                    ranges[name] = before
        return TensorRanges(ranges, start.means)

    def _measure_distance(self, recipe: QuantizationRecipe, values: TensorRanges) -> float:
        # With a reduced range integer kernels give the same results, and are faster.
        network, exact = quantize(self._simple, values, recipe), not recipe.reduced_range
        pictures = self._progress.track(self._pictures, "comparing ranges, pictures")
        return self._distance(run_network(network, self._interpretation, pictures, exact=exact))


def _list_quantized_tensors(network: onnx.ModelProto, ranges: Mapping[str, ValueRange]) -> list[str]:
    """The tensors that become integers, in the order of the graph."""
    names = [node.input[0] for node in network.graph.node if node.op_type == "QuantizeLinear"]
    return [name for name in names if name in ranges]


def run_network(
    network: onnx.ModelProto,
    interpretation: ModelInterpretation,
    pictures: Iterable[Picture],
    *,
    exact: bool = False,
) -> list[NetworkOutputs]:
    """The network's own outputs for each picture, with the compiler's preprocessing in front."""
    own = [
        value.name
        for value in network.graph.output
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]
    session = PictureSession(network, interpretation, watched=own, exact=exact)
    return [[values.astype(np.float64) for values in session.run(p, own)] for p in pictures]


def make_distance(expected: list[NetworkOutputs]) -> Callable[[list[NetworkOutputs]], float]:
    """The root mean square difference of outputs, each relative to its own variance."""
    spreads = [
        max(float(np.mean([values.var() for values in each])), 1e-12) for each in zip(*expected, strict=True)
    ]

    def distance(outputs: list[NetworkOutputs]) -> float:
        errors = [
            float(np.mean((values - wanted) ** 2)) / spread
            for some, others in zip(outputs, expected, strict=True)
            for values, wanted, spread in zip(some, others, spreads, strict=True)
        ]
        return float(np.sqrt(np.mean(errors)))

    return distance
