"""Every family in every form that its exporters give the picture: the rows are those of its usual form.

That usual form, planes of float32, is held against a slow reference in the family's own tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import detr_models as detr
import raw_map_models as maps
import tiny_yolos as yolos
from tiny_graphs import compiled_rows, noise_pictures, state
from visionedge.model.model import load_model


@dataclass(frozen=True)
class InputFormat:
    """How a picture is given: its type, whether channels come last, and the batch (None: open)."""

    dtype: str = "float32"
    last: bool = False
    batch: int | None = None


FORMS = {
    "channels last": InputFormat(last=True),
    "half floats": InputFormat("float16"),
    "half floats, channels last": InputFormat("float16", last=True),
    "bytes": InputFormat("uint8"),
    "bytes, channels last": InputFormat("uint8", last=True),
    "one at a time": InputFormat(batch=1),
    "bytes, channels last, one at a time": InputFormat("uint8", last=True, batch=1),
}
WHOLE_PIXELS = {"yolox"}
"""Families that take pixels of 0-255; where bytes come, the others have them divided in the graph."""


def _raw_maps(activation: str) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        maps.raw_map_model(path, activation=activation)
        state(path, anchors=[list(pair) for pair in yolos.ANCHORS])
        return path

    return build


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "yolox": yolos.yolox,
    "yolov5": yolos.yolov5,
    "yolov6": yolos.yolov6,
    "yolov8": yolos.yolov8,
    "yolov10": maps.end_to_end_model,
    "yolov3": _raw_maps("LeakyRelu"),
    "yolov4": _raw_maps("Mish"),
    "fastestdet": maps.fastestdet_model,
    "detr": detr.finished_detr_model,
    "detr-raw": detr.raw_detr_model,
    "detr-joined": detr.joined_detr_model,
}


def in_format(path: Path, form: InputFormat, *, divided: bool) -> None:
    """Rewrite the picture's input of the model at `path`."""
    model = onnx.load(path)
    graph = model.graph
    (picture,) = (v for v in graph.input if len(v.type.tensor_type.shape.dim) == 4)
    batch, _, height, width = (d.dim_value or d.dim_param for d in picture.type.tensor_type.shape.dim)
    batch = form.batch or batch
    tensor, nodes = "given", []
    if form.dtype != "float32":
        nodes.append(helper.make_node("Cast", [tensor], ["given.floats"], to=TensorProto.FLOAT))
        tensor = "given.floats"
    if form.dtype == "uint8" and divided:
        graph.initializer.append(numpy_helper.from_array(np.array(255, np.float32), "given.most"))
        nodes.append(helper.make_node("Div", [tensor, "given.most"], ["given.parts"]))
        tensor = "given.parts"
    perm = [0, 3, 1, 2] if form.last else [0, 1, 2, 3]
    nodes.append(helper.make_node("Transpose", [tensor], [picture.name], perm=perm))
    sides = [batch, height, width, 3] if form.last else [batch, 3, height, width]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(form.dtype))
    others = [v for v in graph.input if v is not picture]
    body = list(graph.node)
    given = helper.make_tensor_value_info("given", kind, sides)
    del graph.node[:], graph.input[:]
    graph.input.extend([given, *others])
    graph.node.extend([*nodes, *body])
    if form.batch is not None:
        for value in (*graph.output, *others):
            value.type.tensor_type.shape.dim[0].dim_value = form.batch
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_detections_in_every_input_format(
    tmp_path: Path, family: str, form: str
) -> None:
    """Scores to what the type allows, boxes of the best rows to a pixel."""
    path = FAMILIES[family](tmp_path / "m.onnx")
    usual = load_model(path)
    picture = noise_pictures(2, usual.input.width_px, usual.input.height_px)
    expected = compiled_rows(usual, picture, limit=40)
    in_format(path, FORMS[form], divided=family not in WHOLE_PIXELS)
    model = load_model(path)
    found = compiled_rows(model, picture, limit=40)
    assert (model.head, model.input, model.labels) == (usual.head, usual.input, usual.labels)
    assert model.interpretation.input.dtype == FORMS[form].dtype
    half = FORMS[form].dtype == "float16"
    np.testing.assert_allclose(found[..., 4], expected[..., 4], atol=1e-2 if half else 1e-4)
    np.testing.assert_allclose(found[:, 0, :4], expected[:, 0, :4], atol=1.0 if half else 0.05)
