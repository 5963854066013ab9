"""A network converted to float16, for GPUs. Its inputs and outputs stay float32.

These nodes stay float32: those behind the last weighted layer, which compute boxes and scores (above 1024
the steps of float16 are a whole pixel), operators without a float16 CUDA kernel, and nodes with subgraphs.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from visionedge.model.analysis.cuda_kernels import explain_missing_kernel, read_opsets
from visionedge.model.graph import list_inputs
from visionedge.model.quantization.calibration import (
    WEIGHTED_OPERATORS,
    find_nodes_before_last_weights,
    list_float_tensors,
)

# Sums over many values, and operators with an explicit type.
_FP32_ONLY = frozenset(
    {
        "Cast",
        "CastLike",
        "Constant",
        "ConstantOfShape",
        "CumSum",
        "DequantizeLinear",
        "EyeLike",
        "QuantizeLinear",
        "RandomNormalLike",
        "RandomUniformLike",
        "Range",
    }
)
_MAX_FP16 = 65504.0
# Inputs that must be float32.
_FP32_INPUTS = {"Resize": (2,), "Upsample": (1,)}


def convert_to_fp16(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a folded network that computes in float16 where that is safe."""
    return _rewrite(network, simulate=False)


def simulate_fp16(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float32 and rounds each value that `convert_to_fp16` has in float16.

    It shows on a CPU what float16 costs: onnxruntime has no float16 kernels there and computes such a
    network in float32 without rounding.
    """
    return _rewrite(network, simulate=True)


def _rewrite(network: onnx.ModelProto, *, simulate: bool) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    _Fp16Converter(copy.graph, read_opsets(copy), simulate).convert()
    del copy.graph.value_info[:]  # their types changed
    return copy


@dataclass(slots=True)
class _Fp16Converter:
    """Inserts one Cast for each tensor that is used in the other precision."""

    graph: onnx.GraphProto
    opsets: dict[str, int]
    simulate: bool
    floats: set[str] = field(init=False)
    weights: dict[str, onnx.TensorProto] = field(init=False)
    fp16_tensors: set[str] = field(init=False, default_factory=set)
    body: list[onnx.NodeProto] = field(init=False, default_factory=list)
    made: dict[str, str] = field(init=False, default_factory=dict)
    constants: list[onnx.TensorProto] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {
            tensor.name: tensor for tensor in self.graph.initializer if tensor.data_type == TensorProto.FLOAT
        }
        self.floats = list_float_tensors(self.graph)

    def convert(self) -> None:
        weighted = {node.name for node in self.graph.node if node.op_type in WEIGHTED_OPERATORS}
        inner = weighted | find_nodes_before_last_weights(self.graph)
        outputs = {value.name for value in self.graph.output}
        for node in self.graph.node:
            half = node.name in inner and self._can_convert(node)
            stays = _FP32_INPUTS.get(node.op_type, ())
            for place, name in enumerate(node.input):
                if name in self.weights or name in self.floats:
                    node.input[place] = self._as(name, half and place not in stays)
            self.body.append(node)
            if half:
                self._outputs_of(node, outputs)
        used = {name for node in self.body for name in list_inputs(node)}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.body)
        self.graph.initializer.extend([*kept, *self.constants])

    def _outputs_of(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        """Mark the outputs of a node as float16; an output of the graph is cast back to float32."""
        for place, name in enumerate(node.output):
            if name not in self.floats:
                continue
            if name in outputs:
                node.output[place] = _fp16_name(name)
                self.made[_fp16_name(name)] = _fp16_name(name)
                self._cast(_fp16_name(name), name, TensorProto.FLOAT)
            elif self.simulate:
                self._cast(name, _fp16_name(name), TensorProto.FLOAT16)
                self.made[_fp16_name(name)] = self.made[_fp32_name(name)] = _fp16_name(name)
            else:
                self.fp16_tensors.add(name)

    def _can_convert(self, node: onnx.NodeProto) -> bool:
        """Whether it has float tensors, and a CUDA kernel for float16."""
        if node.op_type in _FP32_ONLY or any(a.HasField("g") or a.graphs for a in node.attribute):
            return False
        stays = _FP32_INPUTS.get(node.op_type, ())
        types = {
            name: TensorProto.FLOAT16
            for place, name in enumerate((*node.input, *node.output))
            if place not in stays and (name in self.floats or name in self.weights)
        }
        return bool(types) and explain_missing_kernel(node, self.opsets, types) is None

    def _as(self, name: str, half: bool) -> str:
        """The name of a tensor in the wanted precision; a Cast is added if needed."""
        wanted = _fp16_name(name) if half else _fp32_name(name)
        if wanted in self.made:
            return self.made[wanted]
        if half == (name in self.fp16_tensors):
            return name
        self.made[wanted] = wanted
        if name in self.weights:
            values = _to_fp16(numpy_helper.to_array(self.weights[name]))
            kept = values.astype(np.float32) if self.simulate else values
            self.constants.append(numpy_helper.from_array(kept, wanted))
        else:
            self._cast(name, wanted, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        return wanted

    def _cast(self, name: str, made: str, kind: int) -> None:
        between = name
        if self.simulate:
            between, kind = f"{made}:rounded", TensorProto.FLOAT
            self._node(name, between, TensorProto.FLOAT16)
        self._node(between, made, kind)

    def _node(self, name: str, made: str, kind: int) -> None:
        self.body.append(helper.make_node("Cast", [name], [made], name=f"{made}.Cast", to=kind))


def _fp16_name(name: str) -> str:
    return f"half:{name}"


def _fp32_name(name: str) -> str:
    return f"float:{name}"


def _to_fp16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    result: NDArray[np.float16] = np.clip(values, -_MAX_FP16, _MAX_FP16).astype(np.float16)
    return result
