"""Boxes and scores in two outputs, and plugins of TensorRT whose inputs those are."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from tiny_yolos import HEIGHT_PX, WIDTH_PX, cell_constants, cells, flat, grids, pieces, scores_map
from visionedge.errors import ModelError
from visionedge.model.model import load_model

CLASSES = 3
LETTERBOX = {"color": "rgb", "scale": 1 / 255, "fit": "letterbox"}
ULTRALYTICS = {"author": "Ultralytics", "task": "detect", "description": "Ultralytics YOLOv8n model"}


def _cells(graph: Graph, picture: str, *, less: str, sigmoid: bool, centers: bool = False) -> tuple[str, str]:
    """Boxes [N, n, 4] as a cell and distances to its sides, and scores [N, n, C].

    `less` is what makes a difference of a cell and a distance: Sub, or Neg or Mul (by -1) and Add.
    """
    sides = [flat(graph, scores_map(graph, picture, 4, s), 4) for s, *_ in grids()]
    logits = [flat(graph, scores_map(graph, picture, CLASSES, s), CLASSES) for s, *_ in grids()]
    away = graph.add("Abs", graph.add("Concat", *sides, axis=2))
    before, after = pieces(graph, away, 0, 2, 4)
    cell, stride = cell_constants(graph)
    middle = graph.add("Add", cell, graph.constant(0.5))
    ways = {"Sub": (middle, before), "Neg": (before,), "Mul": (before, graph.constant([-1.0]))}
    first = graph.add(less, *ways[less])
    first = first if less == "Sub" else graph.add("Add", first, middle)
    second = graph.add("Add", after, middle)
    if centers:
        centre = graph.add("Div", graph.add("Add", first, second), graph.constant(2.0))
        first, second = centre, graph.add("Sub", second, first)
    box = graph.add("Mul", graph.add("Concat", first, second, axis=1), stride)
    scores = graph.add("Concat", *logits, axis=2)
    scores = graph.add("Sigmoid", scores) if sigmoid else scores
    return (graph.add("Transpose", box, perm=[0, 2, 1]), graph.add("Transpose", scores, perm=[0, 2, 1]))


def _apart(
    path: Path,
    *,
    less: str = "Sub",
    columns: bool = False,
    sigmoid: bool = True,
    scaled: bool = False,
    **model: Any,
) -> Path:
    graph = Graph(13)
    picture = graph.input("input", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    inner = graph.add("Div", picture, graph.constant(255.0)) if scaled else picture
    boxes, scores = _cells(graph, inner, less=less, sigmoid=sigmoid)
    if columns:
        scores = graph.add("Transpose", scores, perm=[0, 2, 1])
    # The names lie: what counts is the shapes.
    graph.output(
        scores, "boxes", "float32", "n", *((CLASSES, len(cells())) if columns else (len(cells()), CLASSES))
    )
    graph.output(boxes, "scores", "float32", "n", len(cells()), 4)
    return graph.save(path, **model)


def _rgb(pictures: NDArray[np.uint8], scale: float = 1 / 255) -> NDArray[np.float32]:
    rgb = pictures[..., ::-1].astype(np.float32) * np.float32(scale)
    return np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))


def _wanted(boxes: NDArray[Any], scores: NDArray[Any]) -> NDArray[np.float64]:
    """Each anchor as its best class, one by one."""
    rows = [
        (*box.tolist(), float(line.max()), int(line.argmax()))
        for box, line in zip(boxes, scores, strict=True)
    ]
    return by_score(rows)


@pytest.mark.parametrize("less", ["Sub", "Neg", "Mul"])
@pytest.mark.parametrize("columns", [False, True])
def test_boxes_and_scores_are_read_in_any_order_and_layout(
    tmp_path: Path, less: str, columns: bool
) -> None:
    """YOLO-NAS and PP-YOLOE subtract distances in other ways, PP-YOLOE has its scores in columns."""
    path = _apart(tmp_path / "m.onnx", less=less, columns=columns)
    state(path, input=LETTERBOX)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.interpretation.needs_nms) == (
        "boxes-scores",
        CLASSES,
        True,
    )
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    given = network(path, {"input": _rgb(pictures)})
    scores = given["boxes"].transpose(0, 2, 1) if columns else given["boxes"]
    for rows, box, score in zip(compiled_rows(model, pictures), given["scores"], scores, strict=True):
        np.testing.assert_allclose(rows, _wanted(box, score), rtol=1e-4, atol=1e-3)


def test_scores_without_a_sigmoid_get_one(tmp_path: Path) -> None:
    """Where the last layer gives them as they are."""
    path = _apart(tmp_path / "m.onnx", sigmoid=False)
    state(path, input=LETTERBOX)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    given = network(path, {"input": _rgb(pictures)})
    wanted = _wanted(given["scores"][0], 1 / (1 + np.exp(-given["boxes"][0])))
    np.testing.assert_allclose(compiled_rows(load_model(path), pictures)[0], wanted, rtol=1e-4, atol=1e-3)


def test_preprocessing_is_never_guessed(tmp_path: Path) -> None:
    """These families differ in that and in nothing that shows; a graph that scales by itself says it."""
    path = _apart(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="prepared in different ways; state input"):
        load_model(path)
    scaled = load_model(_apart(tmp_path / "scaled.onnx", scaled=True))
    assert scaled.interpretation.preprocess.scale == 1.0
    known = load_model(_apart(tmp_path / "known.onnx", metadata=ULTRALYTICS))
    assert known.interpretation.preprocess.scale == 1 / 255


def test_an_unknown_box_encoding_has_to_be_stated(tmp_path: Path) -> None:
    """Two corners or a centre and a size: their shape is the same."""
    graph = Graph(13)
    picture = graph.input("input", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    boxes = [flat(graph, scores_map(graph, picture, 4, s), 4) for s, *_ in grids()]
    scores = [flat(graph, scores_map(graph, picture, CLASSES, s), CLASSES) for s, *_ in grids()]
    boxed = graph.add("Transpose", graph.add("Concat", *boxes, axis=2), perm=[0, 2, 1])
    scored = graph.add(
        "Transpose", graph.add("Sigmoid", graph.add("Concat", *scores, axis=2)), perm=[0, 2, 1]
    )
    graph.output(boxed, "boxes", "float32", "n", len(cells()), 4)
    graph.output(scored, "scores", "float32", "n", len(cells()), CLASSES)
    path = graph.save(tmp_path / "m.onnx")
    state(path, input=LETTERBOX)
    with pytest.raises(ModelError, match="state boxes: corners"):
        load_model(path)
    state(path, input=LETTERBOX, boxes="centers")
    assert "boxes are centres and sizes" in load_model(path).evidence


def _with_plugin(
    path: Path, plugin: str, *, centers: bool = False, sigmoid: bool = True, **attributes: Any
) -> Path:
    """A graph that ends in a plugin; the same graph without it beside it, as `plain.onnx`."""
    graph = Graph(13)
    picture = graph.input("images", "float32", "n", 3, HEIGHT_PX, WIDTH_PX)
    boxes, scores = _cells(graph, picture, less="Sub", sigmoid=sigmoid, centers=centers)
    if plugin.startswith("Batched"):
        boxes = graph.add("Div", boxes, graph.constant([WIDTH_PX, HEIGHT_PX] * 2))
        boxes = graph.add("Unsqueeze", boxes, graph.whole(2))
    graph.output(
        boxes, "b", "float32", "n", len(cells()), *((1, 4) if plugin.startswith("Batched") else (4,))
    )
    graph.output(scores, "s", "float32", "n", len(cells()), CLASSES)
    model = onnx.load(graph.save(path.with_name("plain.onnx")))
    given = [node.input[0] for node in model.graph.node if node.output[0] in ("b", "s")]
    del model.graph.output[:]
    names = ("num_dets", "det_boxes", "det_scores", "det_classes")
    domain = {"domain": "TRT"} if attributes.pop("domain", False) else {}
    node = helper.make_node(
        plugin, given, [f"{name}.raw" for name in names], name="nms", **domain, **attributes
    )
    model.graph.node.append(node)
    for name in names:
        model.graph.node.append(helper.make_node("Identity", [f"{name}.raw"], [name]))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    if domain:
        model.opset_import.append(helper.make_opsetid("TRT", 1))
    helper.set_model_props(model, ULTRALYTICS)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("plugin", "centers", "sigmoid", "attributes"),
    [
        ("EfficientNMS_TRT", False, True, {"box_coding": 0, "score_activation": 0, "background_class": -1}),
        ("EfficientNMS_TRT", True, True, {"box_coding": 1, "domain": True}),
        ("EfficientNMS_TRT", False, False, {"score_activation": 1}),
        (
            "BatchedNMSDynamic_TRT",
            False,
            True,
            {"isNormalized": 1, "shareLocation": 1, "backgroundLabelId": -1},
        ),
    ],
)
def test_a_tensorrt_plugin_is_replaced_by_the_modules_own_suppression(
    tmp_path: Path, plugin: str, centers: bool, sigmoid: bool, attributes: dict[str, Any]
) -> None:
    """Its attributes say how boxes and scores are written."""
    path = _with_plugin(tmp_path / "m.onnx", plugin, centers=centers, sigmoid=sigmoid, **attributes)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.interpretation.needs_nms) == (
        "boxes-scores",
        CLASSES,
        True,
    )
    assert any(plugin in clause for clause in model.evidence)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    given = network(tmp_path / "plain.onnx", {"images": _rgb(pictures)})
    boxes = given["b"][0].reshape(-1, 4)
    if plugin.startswith("Batched"):
        boxes = boxes * np.array([WIDTH_PX, HEIGHT_PX] * 2)
    if centers:
        boxes = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    scores = given["s"][0] if sigmoid else 1 / (1 + np.exp(-given["s"][0]))
    wanted = _wanted(boxes, scores)
    np.testing.assert_allclose(compiled_rows(model, pictures)[0], wanted, rtol=1e-4, atol=1e-3)


def test_a_background_class_is_not_reported(tmp_path: Path) -> None:
    """The plugin names it, first or last; what is left is counted from 0."""
    path = _with_plugin(tmp_path / "m.onnx", "EfficientNMS_TRT", background_class=0)
    model = load_model(path)
    assert model.interpretation.class_count == CLASSES - 1
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    given = network(tmp_path / "plain.onnx", {"images": _rgb(pictures)})
    wanted = _wanted(given["b"][0], given["s"][0][:, 1:])
    np.testing.assert_allclose(compiled_rows(model, pictures)[0], wanted, rtol=1e-4, atol=1e-3)


def test_a_plugin_with_boxes_for_each_class_is_refused(tmp_path: Path) -> None:
    """One line that says what would help."""
    path = _with_plugin(tmp_path / "m.onnx", "BatchedNMS_TRT", shareLocation=0)
    with pytest.raises(
        ModelError, match=r"separate boxes for each class.*export the model without its suppression"
    ):
        load_model(path)
