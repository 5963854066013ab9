"""Models of old opsets, brought to one in which our own nodes can be written.

Azure Custom Vision exports opset 7 to 10 and offers no other, so its users cannot export anew.
"""

import onnx
from onnx import version_converter

from visionedge.errors import ModelError

OLDEST = 7
"""The oldest opset that onnxruntime runs and onnx can convert."""

LEAST = 11
"""The oldest opset in which every node of ours exists."""

TARGET = 12
"""Converted to: the last opset in which Squeeze, Unsqueeze and ReduceSum take their axes as attributes."""


def with_new_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an opset of `LEAST` or newer; the very model if it has one already.

    Raises:
        ModelError: it is older than `OLDEST`, or holds a node that cannot be converted.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset >= LEAST:
        return model
    hint = f"export the model with opset {LEAST} or newer"
    if opset < OLDEST:
        raise ModelError(f"opset {opset} is too old: {hint}")
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, TARGET)
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:120]
        raise ModelError(f"opset {opset} is too old and cannot be converted ({words}): {hint}") from None
    del converted.metadata_props[:]
    converted.metadata_props.extend(model.metadata_props)
    converted.producer_name = model.producer_name
    return converted
