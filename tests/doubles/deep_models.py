"""A tiny detector with layers in front of its last ones: something for other precisions to work on."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tiny_models import TinyDetector


def deep_detector(detector: TinyDetector | None = None, seed: int = 5) -> onnx.ModelProto:
    """The network of a `TinyDetector` behind a convolution, a depthwise one, a sum and a point-wise one."""
    model = (detector or TinyDetector()).proto()
    random = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []

    def convolution(source: str, made: str, shape: tuple[int, ...], group: int = 1) -> str:
        fan_in = int(np.prod(shape[1:]))
        kernel = random.normal(0, 1 / np.sqrt(fan_in), shape).astype(np.float32)
        bias = random.normal(0, 0.1, shape[0]).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(kernel, f"{made}.kernel"))
        model.graph.initializer.append(numpy_helper.from_array(bias, f"{made}.bias"))
        pads = [shape[-1] // 2] * 4
        inputs = [source, f"{made}.kernel", f"{made}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [made], name=made, group=group, pads=pads))
        return made

    def add(operator: str, inputs: list[str], made: str) -> str:
        nodes.append(helper.make_node(operator, inputs, [made], name=made))
        return made

    first = add("LeakyRelu", [convolution("image", "first", (8, 3, 3, 3))], "first.leaky")
    second = add("Relu", [convolution(first, "depthwise", (8, 1, 3, 3), group=8)], "second.relu")
    both = add("Add", [first, second], "both")
    last = convolution(both, "point", (3, 8, 1, 1))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "image":
                node.input[place] = last
    body = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *body])
    onnx.checker.check_model(model)
    return model


def save_deep(path: Path, detector: TinyDetector | None = None) -> Path:
    """Write it to a file; the path."""
    onnx.save(deep_detector(detector), path)
    return path
