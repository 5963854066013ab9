"""Suppression by a plugin of TensorRT at the end of a graph: it is taken out, and its inputs become outputs.

`EfficientNMS_TRT` and `BatchedNMS_TRT` exist in TensorRT alone. Their inputs are boxes and scores of all
anchors, and their attributes say how both are written, so that our own suppression can take their place.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from visionedge.errors import ModelError

KEY = "visionedge.boxes"
"""The metadata key that says how boxes and scores are written (`BoxesAndScores`), as JSON."""

_EFFICIENT = ("EfficientNMS_TRT",)
_BATCHED = ("BatchedNMS_TRT", "BatchedNMSDynamic_TRT")


@dataclass(frozen=True, slots=True)
class BoxesAndScores:
    """How a plugin's inputs are written.

    `centers`: a box is a centre and a size, else two corners. `relative`: 0-1 instead of pixels; None: not
    said. `logits`: scores still need a sigmoid. `background`: the class that means nothing; -1 for none.
    """

    plugin: str
    centers: bool = False
    relative: bool | None = None
    logits: bool = False
    background: int = -1


def without_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the plugin's inputs as its outputs; the very model where there is no such plugin.

    Raises:
        ModelError: the plugin has inputs or attributes that are not understood.
    """
    found = [node for node in model.graph.node if node.op_type in (*_EFFICIENT, *_BATCHED)]
    if not found:
        return model
    node = found[0]
    if len(found) > 1 or len(node.input) != 2 or not all(node.input):
        raise ModelError(f"uses {node.op_type} in a way that is not known here; {_HINT}")
    told = _told(node)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    behind = set(node.output)
    kept = []
    for each in graph.node:
        if each.name == node.name and list(each.output) == list(node.output):
            continue
        if behind & set(each.input):
            behind |= set(each.output)  # what only passes the plugin's outputs on
        else:
            kept.append(each)
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.input)
    entry = changed.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(asdict(told))
    return changed


_HINT = "export the model without its suppression (such as end2end=False or nms=False)"


def _told(node: onnx.NodeProto) -> BoxesAndScores:
    values: Mapping[str, Any] = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type in _EFFICIENT:
        return BoxesAndScores(
            node.op_type,
            centers=values.get("box_coding", 0) == 1,
            logits=values.get("score_activation", 0) == 1,
            background=int(values.get("background_class", -1)),
        )
    if values.get("shareLocation", 1) != 1:
        raise ModelError(f"uses {node.op_type} with other boxes for each class: not known here; {_HINT}")
    return BoxesAndScores(
        node.op_type,
        relative=values.get("isNormalized", 1) == 1,
        background=int(values.get("backgroundLabelId", -1)),
    )
