"""The size of a picture input that the model leaves open: stated, or exported with, or the usual one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx

from visionedge.errors import ModelError

USUAL_PX = 640
"""What the exporters of detectors with an open size take where nobody says otherwise."""

_KINDS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8})


@contextmanager
def sized(model: onnx.ModelProto, metadata: Mapping[str, str]) -> Iterator[str]:
    """While it lasts, an open size of the picture is fixed; gives the evidence for it, "" if none was open.

    Raises:
        ModelError: a size is stated, but the model has a fixed other one; or it is no size.
    """
    value = _picture(model.graph)
    if value is None:
        yield ""
        return
    dims = value.type.tensor_type.shape.dim
    channel = 3 if dims[3].dim_value == 3 and dims[1].dim_value != 3 else 1
    tall, wide = (1, 2) if channel == 3 else (2, 3)
    seen = (dims[wide].dim_value, dims[tall].dim_value)
    width, height, origin = _size(metadata, seen)
    before = value.type.tensor_type.shape.SerializeToString()
    dims[channel].dim_value, dims[tall].dim_value, dims[wide].dim_value = 3, height, width
    try:
        yield f"its size is open: {width} x {height} {origin}" if 0 in seen else ""
    finally:
        value.type.tensor_type.shape.ParseFromString(before)


def _picture(graph: onnx.GraphProto) -> onnx.ValueInfoProto | None:
    """The one input that may be a picture: four dimensions, three channels or an open number of them."""
    weights = {tensor.name for tensor in graph.initializer}
    found = [v for v in graph.input if v.name not in weights and _may_be_picture(v)]
    return found[0] if len(found) == 1 else None


def _may_be_picture(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    dims = [d.dim_value for d in kind.shape.dim]
    if kind.elem_type not in _KINDS or len(dims) != 4:
        return False
    return bool(dims[1] == 3 or dims[3] == 3 or dims[1] == dims[2] == dims[3] == 0)


def _size(metadata: Mapping[str, str], seen: tuple[int, int]) -> tuple[int, int, str]:
    """(width, height, where it comes from) for a size in which 0 is open."""
    stated = _numbers(metadata.get("visionedge.input"), ("width", "height"))
    for word, fixed, wanted in zip(("width", "height"), seen, stated, strict=True):
        if fixed and wanted and fixed != wanted:
            raise ModelError(
                f"input.{word} is stated as {wanted}, but the model has a fixed {word} of {fixed}"
            )
    if all(seen):
        return *seen, ""
    exported = tuple(reversed(_numbers(metadata.get("imgsz"), (0, 1))))
    for size, origin in ((stated, "as stated"), (exported, "as its metadata 'imgsz' says")):
        if any(size):
            width, height = (a or b or max(size) for a, b in zip(seen, size, strict=True))
            return width, height, origin
    width, height = (a or max(seen) or USUAL_PX for a in seen)
    return width, height, "as is usual; MODEL.yaml can state another as input.width and input.height"


def _numbers(text: str | None, keys: tuple[str, str] | tuple[int, int]) -> tuple[int, int]:
    """Two numbers of a JSON document, 0 where they are not given."""
    try:
        document = json.loads(text or "{}")
    except ValueError:
        return 0, 0
    if isinstance(document, int):
        document = [document, document]
    found = []
    for key in keys:
        try:
            value = document[key]
        except (KeyError, IndexError, TypeError):
            value = 0
        found.append(value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0)
    return found[0], found[1]
