"""A quantised graph as the float graph that it computes, for analysis only.

`quantize_dynamic` replaces a convolution by five nodes: DynamicQuantizeLinear, ConvInteger, Cast and two
Mul. An analysis would mistake these for arithmetic of the network. Here they become one Conv again; pairs of
QuantizeLinear and DequantizeLinear and onnxruntime's QLinear operators are replaced in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from visionedge.model.graph import Graph, read_constants


@dataclass(frozen=True, slots=True)
class FloatView:
    """The float graph. Unchanged nodes are the objects of the original graph: do not modify them."""

    node: Sequence[onnx.NodeProto]
    initializer: Sequence[onnx.TensorProto]
    input: Sequence[onnx.ValueInfoProto]
    output: Sequence[onnx.ValueInfoProto]


_INTEGER_OPERATORS = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}
# operator: (its float form, the inputs with values)
_QLINEAR: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "QLinearConv": ("Conv", (0, 3, 8)),
    "QLinearMatMul": ("MatMul", (0, 3)),
    "QGemm": ("Gemm", (0, 3, 6)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearSigmoid": ("Sigmoid", (0,)),
    "QLinearSoftmax": ("Softmax", (0,)),
    "QLinearLeakyRelu": ("LeakyRelu", (0,)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QLinearReduceMean": ("ReduceMean", (0,)),
    "QLinearWhere": ("Where", (0, 1, 4)),
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)),
    "MatMulIntegerToFloat": ("MatMul", (0, 1)),
    "MatMulNBits": ("MatMul", (0, 1)),
    "FusedMatMul": ("MatMul", (0, 1)),
    "NhwcFusedConv": ("Conv", (0, 1, 2)),
}
_FUSED_OPERATORS = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
# Their output has the values of their input, so it is quantised if the input is.
_VALUE_PRESERVING = frozenset(
    {"Concat", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)
_MAX_SMALL_VALUES = 64


def make_float_view(graph: onnx.GraphProto) -> Graph:
    """The float view of a graph; the graph itself if nothing in it is quantised."""
    if not any(node.op_type in _QUANTIZED_OPERATORS for node in graph.node):
        return graph
    return _FloatViewBuilder(graph).build()


class _FloatViewBuilder:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants = read_constants(graph)
        self.added: list[onnx.TensorProto] = []
        self.alias: dict[str, str] = {}
        self.quantised: set[str] = set()
        self.integer: set[str] = set()  # outputs of ConvInteger and MatMulInteger that are not scaled yet
        self.scales: dict[str, str] = {}  # scales of inputs, with the name of the weights' scale
        # By output: (float node, integer node).
        self.products: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
        self.outputs = {value.name for value in graph.output}

    def build(self) -> FloatView:
        """All nodes in their order, in float form."""
        for node in self.graph.node:
            if not self._convert(node):
                self._copy(node)
        return FloatView(
            self.nodes, [*self.graph.initializer, *self.added], self.graph.input, self.graph.output
        )

    def _convert(self, node: onnx.NodeProto) -> bool:
        """Whether the node belongs to a quantisation and was replaced."""
        change = _HANDLERS.get(node.op_type)
        return change is not None and change(self, node)

    def _copy(self, node: onnx.NodeProto) -> None:
        if node.op_type in _VALUE_PRESERVING and node.input and node.input[0] in self.quantised:
            self.quantised.update(node.output)
        if any(name in self.alias for name in node.input):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for place, name in enumerate(node.input):
                copy.input[place] = self.alias.get(name, name)
            node = copy
        self.nodes.append(node)

    def _add_alias(self, output: str, source: str) -> None:
        """Replace a tensor by another one; an output of the graph still needs a node that computes it."""
        source = self.alias.get(source, source)
        if output in self.outputs:
            self.nodes.append(helper.make_node("Identity", [source], [output]))
        else:
            self.alias[output] = source

    def _replace(self, node: onnx.NodeProto, operator: str, inputs: Sequence[str]) -> None:
        new = helper.make_node(operator, [self.alias.get(name, name) for name in inputs], node.output)
        new.name = node.name
        new.attribute.extend(node.attribute)
        self.nodes.append(new)

    def _constant(self, name: str, tensor: onnx.TensorProto) -> None:
        tensor.name = name
        self.added.append(tensor)

    # --- the operators --------------------------------------------------------------------------------------

    def dynamic_quantize(self, node: onnx.NodeProto) -> bool:
        """DynamicQuantizeLinear: its output becomes its input; its scale and zero point become 1."""
        self._add_alias(node.output[0], node.input[0])
        self.quantised.add(node.output[0])
        for name, kind in zip(node.output[1:], (np.float32, np.uint8), strict=False):
            self._constant(name, numpy_helper.from_array(np.ones((), kind)))
            self.scales[name] = ""
        return True

    def integer_product(self, node: onnx.NodeProto) -> bool:
        """ConvInteger, MatMulInteger."""
        self._replace(node, _INTEGER_OPERATORS[node.op_type], node.input[:2])
        self.integer.update(node.output)
        self.products[node.output[0]] = (self.nodes[-1], node)
        return True

    def cast(self, node: onnx.NodeProto) -> bool:
        """A Cast behind a ConvInteger belongs to it."""
        if node.input[0] not in self.integer:
            return False
        self._add_alias(node.output[0], node.input[0])
        self.integer.add(node.output[0])
        return True

    def multiply(self, node: onnx.NodeProto) -> bool:
        """The two Mul: one multiplies the two scales, one multiplies the integer result by both."""
        if all(name in self.scales or name in self.constants for name in node.input):
            if not any(name in self.scales for name in node.input):
                return False
            self._constant(node.output[0], numpy_helper.from_array(np.ones((), np.float32)))
            own = [name for name in node.input if name not in self.scales]
            self.scales[node.output[0]] = own[0] if own else ""
            return True
        values = [name for name in node.input if name in self.integer]
        scales = [name for name in node.input if name in self.scales]
        if len(values) != 1 or len(scales) != 1:
            return False
        self._add_float_weights(self.alias.get(values[0], values[0]), self.scales[scales[0]])
        self._add_alias(node.output[0], values[0])
        return True

    def _add_float_weights(self, product: str, scale: str) -> None:
        """Give a small layer its weights as floats: it can be part of the preprocessing."""
        node, integer = self.products.get(product, (None, None))
        if node is None or integer is None:
            return
        zero = list(integer.input[3:4])
        parts = helper.make_node("DequantizeLinear", [integer.input[1], scale, *zero], ["weights"])
        weights = self._dequantised(parts)
        if weights is not None:
            node.input[1] = f"{product}/weights"
            self._constant(node.input[1], weights)

    def reshape(self, node: onnx.NodeProto) -> bool:
        """A reshaped constant, such as a bias, is another constant."""
        parts = [self.constants.get(name) for name in node.input]
        if len(parts) != 2 or any(part is None for part in parts):
            return False
        values, shape = [numpy_helper.to_array(part) for part in parts if part is not None]
        if 0 in shape:
            return False
        build = numpy_helper.from_array(np.reshape(values, [int(side) for side in np.ravel(shape)]))
        self._constant(node.output[0], build)
        self.constants[node.output[0]] = build
        return True

    def quantize(self, node: onnx.NodeProto) -> bool:
        """QuantizeLinear: its output becomes its input."""
        self._add_alias(node.output[0], node.input[0])
        self.quantised.add(node.output[0])
        return True

    def dequantize(self, node: onnx.NodeProto) -> bool:
        """DequantizeLinear of quantised values or of weights; the one of a uint8 picture stays."""
        source = node.input[0]
        if source in self.quantised:
            self._add_alias(node.output[0], source)
            return True
        if source not in self.constants:
            return False
        small = self._dequantised(node)
        if small is None:
            self._add_alias(node.output[0], source)
        else:
            self._constant(node.output[0], small)
        return True

    def _dequantised(self, node: onnx.NodeProto) -> onnx.TensorProto | None:
        """The values of a small constant; None for a large one, such as weights."""
        parts = [self.constants.get(name) for name in node.input]
        if any(part is None or int(np.prod(part.dims)) > _MAX_SMALL_VALUES for part in parts):
            return None
        values, *rest = [numpy_helper.to_array(part).astype(np.float32) for part in parts if part is not None]
        if any(each.size != 1 for each in rest):
            return None
        zero = rest[1] if len(rest) > 1 else np.zeros((), np.float32)
        return numpy_helper.from_array(((values - zero.ravel()[:1]) * rest[0].ravel()[:1]).astype(np.float32))

    def qlinear(self, node: onnx.NodeProto) -> bool:
        """QLinear operators and fused products."""
        operator, places = _QLINEAR[node.op_type]
        self._replace(node, operator, [node.input[place] for place in places if place < len(node.input)])
        self.quantised.update(node.output)
        return True

    def qlinear_concat(self, node: onnx.NodeProto) -> bool:
        """QLinearConcat: inputs are scale and zero point, then (tensor, scale, zero point) for each part."""
        self._replace(node, "Concat", list(node.input)[2::3])
        self.quantised.update(node.output)
        return True

    def fused(self, node: onnx.NodeProto) -> bool:
        """FusedConv and FusedGemm: the layer, and its activation as a separate node."""
        words = {a.name: a.s.decode(errors="replace") for a in node.attribute if a.name == "activation"}
        activation, (output, *_) = words.get("activation", ""), node.output
        if not activation:
            self._replace(node, _FUSED_OPERATORS[node.op_type], node.input)
            return True
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.output[0] = f"{output}/before.{activation}"
        self._replace(copy, _FUSED_OPERATORS[node.op_type], node.input)
        self.nodes.append(helper.make_node(activation, [copy.output[0]], [output]))
        return True


_HANDLERS: Mapping[str, Callable[[_FloatViewBuilder, onnx.NodeProto], bool]] = {
    "DynamicQuantizeLinear": _FloatViewBuilder.dynamic_quantize,
    "Cast": _FloatViewBuilder.cast,
    "Mul": _FloatViewBuilder.multiply,
    "QuantizeLinear": _FloatViewBuilder.quantize,
    "DequantizeLinear": _FloatViewBuilder.dequantize,
    "QLinearConcat": _FloatViewBuilder.qlinear_concat,
    "Reshape": _FloatViewBuilder.reshape,
    **dict.fromkeys(_INTEGER_OPERATORS, _FloatViewBuilder.integer_product),
    **dict.fromkeys(_QLINEAR, _FloatViewBuilder.qlinear),
    **dict.fromkeys(_FUSED_OPERATORS, _FloatViewBuilder.fused),
}
_QUANTIZED_OPERATORS = frozenset(_HANDLERS) - {"Cast", "Mul", "Reshape"}
