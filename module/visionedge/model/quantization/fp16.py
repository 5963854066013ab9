"""A network in float16, for GPUs: inputs and outputs stay as they are, and so does what needs the range.

float32 stay: the last nodes, which make boxes and scores of what the weights gave (half of a pixel is all
that float16 knows beyond 512), operators whose CUDA kernel takes no float16, and nodes with graphs inside.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from visionedge.model.analysis.cuda_kernels import missing_kernel, opsets_of
from visionedge.model.quantization.calibration import float_tensors

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Sums over many values, and what states a type of its own.
_FLOAT_ONLY = frozenset(
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
_LARGEST = 65504.0
# Inputs that ONNX wants as float32 whatever the values are.
_STAYS_FLOAT = {"Resize": (2,), "Upsample": (1,)}


def halved(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a folded network that computes in float16 where that is safe."""
    return _rewritten(network, pretend=False)


def rounded(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float32 and rounds every value that `halved` has in float16.

    It tells on a CPU what float16 costs: onnxruntime has no such kernels there and quietly computes a network
    in float16 without rounding anything.
    """
    return _rewritten(network, pretend=True)


def _rewritten(network: onnx.ModelProto, *, pretend: bool) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    _Halver(copy.graph, opsets_of(copy), pretend).halve()
    del copy.graph.value_info[:]  # their types are no longer so
    return copy


@dataclass(slots=True)
class _Halver:
    """Casts where a tensor passes from one precision to the other, each once."""

    graph: onnx.GraphProto
    opsets: dict[str, int]
    pretend: bool
    floats: set[str] = field(init=False)
    weights: dict[str, onnx.TensorProto] = field(init=False)
    halves: set[str] = field(init=False, default_factory=set)
    body: list[onnx.NodeProto] = field(init=False, default_factory=list)
    made: dict[str, str] = field(init=False, default_factory=dict)
    constants: list[onnx.TensorProto] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {
            tensor.name: tensor for tensor in self.graph.initializer if tensor.data_type == TensorProto.FLOAT
        }
        self.floats = float_tensors(self.graph)

    def halve(self) -> None:
        inner = _up_to_the_last_weights(self.graph)
        outputs = {value.name for value in self.graph.output}
        for node in self.graph.node:
            half = node.name in inner and self._takes_half(node)
            stays = _STAYS_FLOAT.get(node.op_type, ())
            for place, name in enumerate(node.input):
                if name in self.weights or name in self.floats:
                    node.input[place] = self._as(name, half and place not in stays)
            self.body.append(node)
            if half:
                self._outputs_of(node, outputs)
        used = {name for node in self.body for name in node.input} | _inside(self.body)
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.body)
        self.graph.initializer.extend([*kept, *self.constants])

    def _outputs_of(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        """What a node gives is float16 from here on; an output of the graph is brought back to float32."""
        for place, name in enumerate(node.output):
            if name not in self.floats:
                continue
            if name in outputs:
                node.output[place] = _half_name(name)
                self.made[_half_name(name)] = _half_name(name)
                self._cast(_half_name(name), name, TensorProto.FLOAT)
            elif self.pretend:
                self._cast(name, _half_name(name), TensorProto.FLOAT16)
                self.made[_half_name(name)] = self.made[_float_name(name)] = _half_name(name)
            else:
                self.halves.add(name)

    def _takes_half(self, node: onnx.NodeProto) -> bool:
        """Whether it has something to halve, and a CUDA kernel for that."""
        if node.op_type in _FLOAT_ONLY or any(a.HasField("g") or a.graphs for a in node.attribute):
            return False
        stays = _STAYS_FLOAT.get(node.op_type, ())
        types = {
            name: TensorProto.FLOAT16
            for place, name in enumerate((*node.input, *node.output))
            if place not in stays and (name in self.floats or name in self.weights)
        }
        return bool(types) and missing_kernel(node, self.opsets, types) is None

    def _as(self, name: str, half: bool) -> str:
        """The name of a tensor in the wanted precision; made where it is not there yet."""
        wanted = _half_name(name) if half else _float_name(name)
        if wanted in self.made:
            return self.made[wanted]
        if half == (name in self.halves):
            return name
        self.made[wanted] = wanted
        if name in self.weights:
            values = _to_half(numpy_helper.to_array(self.weights[name]))
            kept = values.astype(np.float32) if self.pretend else values
            self.constants.append(numpy_helper.from_array(kept, wanted))
        else:
            self._cast(name, wanted, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        return wanted

    def _cast(self, name: str, made: str, kind: int) -> None:
        between = name
        if self.pretend:
            between, kind = f"{made}:rounded", TensorProto.FLOAT
            self._node(name, between, TensorProto.FLOAT16)
        self._node(between, made, kind)

    def _node(self, name: str, made: str, kind: int) -> None:
        self.body.append(helper.make_node("Cast", [name], [made], name=f"{made}.Cast", to=kind))


def _half_name(name: str) -> str:
    return f"half:{name}"


def _float_name(name: str) -> str:
    return f"float:{name}"


def _to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    result: NDArray[np.float16] = np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)
    return result


def _up_to_the_last_weights(graph: onnx.GraphProto) -> set[str]:
    """The nodes with weights, and all that have such a node behind them."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    inner: set[str] = set()
    for node in reversed(graph.node):
        behind = [user for name in node.output for user in users.get(name, [])]
        if node.op_type in _WEIGHTED or any(user.name in inner for user in behind):
            inner.add(node.name)
    return inner


def _inside(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names that graphs inside of nodes use from outside."""
    graphs = [a.g for node in nodes for a in node.attribute if a.HasField("g")]
    names: set[str] = set()
    while graphs:
        graph = graphs.pop()
        names |= {name for node in graph.node for name in node.input}
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return names
