"""Our own nodes in a graph: written one by one, each with a CUDA kernel, in the network's own opset."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.errors import ModelError

LEAST_OPSET = 11

# Each has a CUDA kernel for the types it is used with (float32, uint8 and int64 tensors), from opset 11 on.
# A node outside this list would pull its tensors to the CPU and back, once for each batch.
CUDA_OPERATORS = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Div",
        "Exp",
        "Expand",
        "Gather",
        "GatherElements",
        "Identity",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Pad",
        "Pow",
        "ReduceMax",
        "Reshape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Sub",
        "Tanh",
        "TopK",
        "Transpose",
        "Unsqueeze",
    }
)


class Nodes:
    """A growing list of nodes and constants. Names of tensors go in and come out as plain text.

    `opset` is the network's: where an operator changed since 11, the form of that opset is written.
    `taken` are the names that the network uses already.
    """

    def __init__(self, opset: int, taken: Iterable[str]) -> None:
        if opset < LEAST_OPSET:
            raise ModelError(f"opset {opset} is too old: export the model with opset {LEAST_OPSET} or newer")
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = "visionedge."
        used = set(taken)
        while any(name.startswith(self._prefix) for name in used):
            self._prefix = f"_{self._prefix}"

    def __repr__(self) -> str:
        return f"<Nodes opset={self.opset} nodes={len(self.nodes)} constants={len(self.constants)}>"

    def name(self, word: str) -> str:
        """A name that the network does not use."""
        return f"{self._prefix}{word}"

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node; the name of its output, which `output` may state outright."""
        return self.add_many(operator, inputs, 1, output, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: int, first: str | None = None, **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; their names."""
        if operator not in CUDA_OPERATORS:
            raise ValueError(f"{operator} is not among the operators known to have a CUDA kernel")
        label = self.name(f"{operator}.{len(self.nodes)}")
        names = [label if index == 0 else f"{label}.{index}" for index in range(outputs)]
        if first is not None:
            names[0] = first
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=label, **attributes))
        return names

    def constant(self, values: NDArray[Any]) -> str:
        """Append a constant tensor."""
        name = self.name(f"constant.{len(self.constants)}")
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def whole(self, *values: int) -> str:
        """Append a constant int64 vector: a shape, axes or indices."""
        return self.constant(np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        """Append a constant float32 vector."""
        return self.constant(np.array(values, np.float32))

    def cast(self, tensor: str, dtype: str) -> str:
        """The tensor as numpy's `dtype` ("float32")."""
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.add("Cast", tensor, to=code)

    def reshape(self, tensor: str, *shape: int) -> str:
        """The tensor in another shape; 0 keeps a dimension, -1 is the rest."""
        return self.add("Reshape", tensor, self.whole(*shape))

    def reduce_max(self, tensor: str, axis: int) -> str:
        """The largest value along an axis, which goes away."""
        if self.opset >= 18:
            return self.add("ReduceMax", tensor, self.whole(axis), keepdims=0)
        return self.add("ReduceMax", tensor, axes=[axis], keepdims=0)

    def top(self, tensor: str, count: int) -> tuple[str, str]:
        """The `count` largest values along the last axis, falling, and where they stood (int64)."""
        values, indices = self.add_many("TopK", [tensor, self.whole(count)], 2, axis=-1, largest=1, sorted=1)
        return values, indices

    def pick(self, tensor: str, rows: str, count: int, width: int) -> str:
        """Rows of float32 [N, R, width] by int64 [N, count]: float32 [N, count, width]."""
        wide = self.add("Expand", self.reshape(rows, 0, count, 1), self.whole(1, count, width))
        return self.add("GatherElements", tensor, wide, axis=1)
