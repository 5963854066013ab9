"""Tiny detectors with random but fixed weights, and a slow reference decoder."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Row = tuple[float, float, float, float, float, int]
"""left, top, right, bottom, score, class."""

MEAN = (103.53, 116.28, 123.675)
STD = (57.375, 57.12, 58.395)
PLAIN_INPUT = {"color": "bgr", "mean": list(MEAN), "std": list(STD), "fit": "letterbox"}


@dataclass(frozen=True)
class TinyDetector:
    """A network with NanoDet's outputs: for each stride a convolution to scores and one to distributions."""

    width_px: int = 64
    height_px: int = 48
    classes: int = 5
    reg_max: int = 7
    strides: tuple[int, ...] = (8, 16, 32)
    sigmoid: bool = True
    opset: int = 17
    batch: int | None = None
    dtype: str = "float32"
    layout: str = "NCHW"
    seed: int = 0
    metadata: dict[str, str] = field(
        default_factory=lambda: {"visionedge.head": "nanodet", "visionedge.input": json.dumps(PLAIN_INPUT)}
    )
    producer: str = "tests"
    poison: float | None = None
    """Added to every score, to make a model that gives no numbers."""

    def grids(self) -> list[tuple[int, int, int]]:
        """(stride, columns, rows) of each scale."""
        return [(s, math.ceil(self.width_px / s), math.ceil(self.height_px / s)) for s in self.strides]

    def proto(self) -> onnx.ModelProto:
        """The model."""
        nodes: list[onnx.NodeProto] = []
        source = "image"
        if self.layout == "NHWC":
            nodes.append(helper.make_node("Transpose", [source], ["moved"], perm=[0, 3, 1, 2]))
            source = "moved"
        if self.dtype != "float32":
            nodes.append(helper.make_node("Cast", [source], ["floats"], to=TensorProto.FLOAT))
            source = "floats"
        weights: list[onnx.TensorProto] = []
        outputs = []
        random = np.random.default_rng(self.seed)
        for grid in self.grids():
            for kind, width in (("scores", self.classes), ("boxes", 4 * (self.reg_max + 1))):
                name = f"{kind}.{grid[0]}"
                nodes.append(
                    self._convolution(name, source, width=width, grid=grid, random=random, weights=weights)
                )
                cells = grid[1] * grid[2]
                nodes += self._as_list(name, kind, width, cells, weights)
                shape = [self.batch or "N", cells, width]
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return self._model(nodes, weights, outputs)

    def _convolution(
        self,
        name: str,
        source: str,
        *,
        width: int,
        grid: tuple[int, int, int],
        random: np.random.Generator,
        weights: list[onnx.TensorProto],
    ) -> onnx.NodeProto:
        stride, columns, rows = grid
        kernel = random.normal(0, 0.6 / stride, (width, 3, stride, stride)).astype(np.float32)
        if self.dtype == "uint8":
            kernel /= 100
        weights.append(numpy_helper.from_array(kernel, f"{name}.kernel"))
        pads = [0, 0, rows * stride - self.height_px, columns * stride - self.width_px]
        inputs, outputs = [source, f"{name}.kernel"], [f"{name}.map"]
        return helper.make_node("Conv", inputs, outputs, strides=[stride, stride], pads=pads)

    def _as_list(
        self, name: str, kind: str, width: int, cells: int, weights: list[onnx.TensorProto]
    ) -> list[onnx.NodeProto]:
        shape = np.array([self.batch or -1, width, cells], np.int64)
        weights.append(numpy_helper.from_array(shape, f"{name}.shape"))
        made = f"{name}.values"
        nodes = [helper.make_node("Reshape", [f"{name}.map", f"{name}.shape"], [f"{name}.flat"])]
        if kind == "scores" and self.sigmoid:
            nodes.append(helper.make_node("Sigmoid", [f"{name}.flat"], [made]))
        else:
            made = f"{name}.flat"
        if kind == "scores" and self.poison is not None:
            weights.append(numpy_helper.from_array(np.array(self.poison, np.float32), f"{name}.poison"))
            nodes.append(helper.make_node("Mul", [made, f"{name}.poison"], [f"{name}.poisoned"]))
            made = f"{name}.poisoned"
        return [*nodes, helper.make_node("Transpose", [made], [name], perm=[0, 2, 1])]

    def _model(
        self, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        size = [self.height_px, self.width_px]
        shape = [3, *size] if self.layout == "NCHW" else [*size, 3]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        image = helper.make_tensor_value_info("image", kind, [self.batch or "N", *shape])
        graph = helper.make_graph(nodes, "tiny", [image], outputs, weights)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=8,
            producer_name=self.producer,
        )
        helper.set_model_props(model, self.metadata)
        return model

    def save(self, path: Path) -> Path:
        """Write the model to a file; the path."""
        onnx.save(self.proto(), path)
        return path

    # --- the slow reference ---------------------------------------------------------------------------------

    def tensor(self, pictures: NDArray[np.uint8]) -> NDArray[Any]:
        """The input of this network for pictures (n, H, W, 3), from its metadata, in numpy."""
        if self.dtype == "uint8":
            floats = pictures
        else:
            way = json.loads(self.metadata["visionedge.input"])
            ordered = pictures[..., ::-1] if way["color"] == "rgb" else pictures
            scaled = ordered.astype(np.float64) * way.get("scale", 1.0)
            floats = (scaled - np.array(way["mean"])) / np.array(way["std"])
        moved = floats.transpose(0, 3, 1, 2) if self.layout == "NCHW" else floats
        return np.ascontiguousarray(moved.astype(self.dtype))

    def rows(self, pictures: NDArray[np.uint8], limit: int) -> list[list[Row]]:
        """The best rows of each picture: the bare network, then every pair of cell and class, one by one."""
        session = onnxruntime.InferenceSession(
            self.proto().SerializeToString(), providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        found: list[list[Row]] = []
        for tensor in self.tensor(pictures):
            outputs = dict(zip(names, session.run(None, {"image": tensor[None]}), strict=True))
            rows: list[Row] = []
            for stride, columns, _ in self.grids():
                scores, bins = outputs[f"scores.{stride}"][0], outputs[f"boxes.{stride}"][0]
                for cell in range(len(scores)):
                    box = nanodet_box(bins[cell].tolist(), cell % columns, cell // columns, stride)
                    for class_id, score in enumerate(scores[cell].tolist()):
                        rows.append((*box, score if self.sigmoid else 1 / (1 + math.exp(-score)), class_id))
            found.append(sorted(rows, key=lambda row: -row[4])[:limit])
        return found


def nanodet_box(
    bins: list[float], column: int, row: int, stride: int, offset: float = 0.5
) -> tuple[float, float, float, float]:
    """The box of one cell: its centre and, to each side, the mean bin of a softmax, in strides."""
    count = len(bins) // 4
    away = []
    for side in range(4):
        logits = bins[side * count : (side + 1) * count]
        top = max(logits)
        powers = [math.exp(value - top) for value in logits]
        away.append(stride * sum(i * power for i, power in enumerate(powers)) / sum(powers))
    x, y = (column + offset) * stride, (row + offset) * stride
    return x - away[0], y - away[1], x + away[2], y + away[3]


def pictures(count: int, width_px: int = 64, height_px: int = 48, seed: int = 1) -> NDArray[np.uint8]:
    """Noise at a model's input size, uint8 (count, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, height_px, width_px, 3), np.uint8)


def classifier(path: Path) -> Path:
    """The mean of each channel: neither a detector nor a classifier, as it has no layer."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])
    flat = helper.make_tensor_value_info("flat", TensorProto.FLOAT, [1, 3])
    graph = helper.make_graph(nodes, "classifier", [image], [flat])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
