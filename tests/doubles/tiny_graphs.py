"""Networks that tests build node by node, and the rows of their compiled graphs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import Model, load_model

Dims = Sequence[int | str]


class Graph:
    """Nodes, constants, inputs and outputs, added one by one; names are made up unless given."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: str, *dims: int | str) -> str:
        """An input."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(dims)))
        return name

    def output(self, tensor: str, name: str, dtype: str, *dims: int | str) -> None:
        """An output, with a node that gives it its name."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.nodes.append(helper.make_node("Identity", [tensor], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(dims)))

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; the name of its first output, of which the others are made by `.1`, `.2` …"""
        name = f"t{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return name

    def constant(self, values: Any, dtype: str = "float32") -> str:
        """A constant."""
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values, np.dtype(dtype)), name))
        return name

    def whole(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(list(values), "int64")

    def noise(self, *shape: int, scale: float = 1.0) -> str:
        """Random weights."""
        return self.constant(self.random.normal(0, scale, shape))

    def conv(self, tensor: str, channels: int, *, side: int = 3, stride: int = 2) -> str:
        """A convolution with random weights and a bias."""
        kernel = self.noise(channels, 3, side, side, scale=1 / side)
        return self.add("Conv", tensor, kernel, self.noise(channels, scale=0.1), strides=[stride, stride])

    def stem(self, picture: str) -> str:
        """A first layer that hardly changes a picture [N, 3, H, W] and so ends its preprocessing."""
        mixed = np.eye(3) * 0.9 + 0.1 / 3
        return self.add("Conv", picture, self.constant(mixed[:, :, None, None]))

    def features(self, tensor: str, width: int, *, side: int = 3, stride: int = 2) -> str:
        """A picture [N, 3, H, W] as a vector [N, width]: another one for another picture."""
        pooled = self.add(
            "GlobalAveragePool", self.add("Relu", self.conv(tensor, 12, side=side, stride=stride))
        )
        return self.add("MatMul", self.add("Flatten", pooled), self.noise(12, width, scale=0.7))

    def attend(self, tensor: str, queries: int, width: int) -> str:
        """A vector [N, queries * width] as queries [N, queries, width] that looked at each other."""
        rows = self.add("Reshape", tensor, self.whole(-1, queries, width))
        likeness = self.add("MatMul", rows, self.add("Transpose", rows, perm=[0, 2, 1]))
        return self.add("Add", rows, self.add("MatMul", self.add("Softmax", likeness, axis=-1), rows))

    def save(self, path: Path, metadata: Mapping[str, str] | None = None, producer: str = "tests") -> Path:
        """Write it to a file; the path."""
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.weights)
        opset = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name=producer)
        helper.set_model_props(model, dict(metadata or {}))
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def state(path: Path, **keys: Any) -> None:
    """Put a `MODEL.yaml` beside a model (JSON is YAML)."""
    path.with_suffix(".yaml").write_text(json.dumps(keys))


def compiled_rows(model: Model, pictures: NDArray[np.uint8], limit: int = 500) -> NDArray[np.float32]:
    """The rows of the compiled graph for pictures (n, H, W, 3), one by one if its batch is one: (n, K, 6)."""
    session = onnxruntime.InferenceSession(compile_model(model, limit), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    step = model.interpretation.input.batch or len(pictures)
    parts = [pictures[i : i + step] for i in range(0, len(pictures), step)]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


def network(path: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs of the bare network, by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def noise_pictures(count: int, width_px: int, height_px: int, seed: int = 3) -> NDArray[np.uint8]:
    """Pictures of blocks and noise, each another, (count, height, width, 3)."""
    random = np.random.default_rng(seed)
    tint = random.integers(0, 200, (count, 1, 1, 3))
    return (tint + random.integers(0, 56, (count, height_px, width_px, 3))).astype(np.uint8)


def by_score(rows: Sequence[tuple[float, ...]]) -> NDArray[np.float64]:
    """Rows of (left, top, right, bottom, score, class) by falling score; of equal ones the first first."""
    return np.array(sorted(rows, key=lambda row: -row[4]))


def loaded(path: Path) -> Model:
    """The model at a path."""
    return load_model(path)
