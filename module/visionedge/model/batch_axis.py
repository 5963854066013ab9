"""Networks that take one picture without a batch in front of it: torchvision and detectron2 export such."""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8})


def with_batch_axis(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a batch of one in front of its picture and of each output.

    The very model where its one input is no picture of three axes, [3, H, W] or [H, W, 3].
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or not _is_single_picture(inputs[0]):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | weights
    picture = next(value for value in graph.input if value.name not in weights)
    inner = picture.name
    picture.name = _free(f"{inner}.batch", taken)
    dims = [onnx.TensorShapeProto.Dimension(dim_value=1), *picture.type.tensor_type.shape.dim]
    del picture.type.tensor_type.shape.dim[:]
    picture.type.tensor_type.shape.dim.extend(dims)
    axis = _free("batch.axis", taken)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    by_input = opset >= 13  # from then on axes are an input and no attribute
    given = [axis] if by_input else []
    attributes: dict[str, Any] = {} if by_input else {"axes": [0]}
    if by_input:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axis))
    nodes = [helper.make_node("Squeeze", [picture.name, *given], [inner], **attributes), *graph.node]
    for value in graph.output:
        outer = _free(f"{value.name}.batch", taken)
        nodes.append(helper.make_node("Unsqueeze", [value.name, *given], [outer], **attributes))
        value.name = outer
        if value.type.tensor_type.HasField("shape"):
            shape = [onnx.TensorShapeProto.Dimension(dim_value=1), *value.type.tensor_type.shape.dim]
            del value.type.tensor_type.shape.dim[:]
            value.type.tensor_type.shape.dim.extend(shape)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _is_single_picture(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    sides = [dim.dim_value for dim in kind.shape.dim]
    return kind.elem_type in _TYPES and len(sides) == 3 and 3 in (sides[0], sides[2])


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
