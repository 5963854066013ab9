"""Detectors whose graph chose the boxes itself: TensorFlow's detection API and EfficientDet."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX = 64, 48
ANCHORS, CLASSES, KEPT = 130, 6, 10


def _dense(graph: Graph, picture: str, classes: int = CLASSES) -> tuple[str, str]:
    """Boxes [1, A, 4] (top, left, bottom, right, 0-1) and scores [1, A, C] from a picture in NHWC."""
    moved = graph.add("Transpose", picture, perm=[0, 3, 1, 2])
    corners = graph.add("Reshape", graph.features(moved, ANCHORS * 2), graph.whole(-1, ANCHORS, 2))
    first = graph.add("Sigmoid", graph.add("Add", corners, graph.noise(ANCHORS, 2)))
    second = graph.add("Add", first, graph.constant(0.3))
    boxes = graph.add("Concat", first, second, axis=2)
    logits = graph.add("Reshape", graph.features(moved, ANCHORS * classes), graph.whole(-1, ANCHORS, classes))
    return boxes, graph.add("Sigmoid", graph.add("Add", logits, graph.noise(ANCHORS, classes)))


def _chosen(graph: Graph, boxes: str, scores: str) -> tuple[str, str, str, str]:
    """Boxes, classes (int64, from 0), scores, and how many: [m, 4], [m], [m], [1], all of them open."""
    by_class = graph.add("Transpose", scores, perm=[0, 2, 1])
    limits = graph.whole(4), graph.constant(0.5), graph.constant(0.3)
    hits = graph.add("NonMaxSuppression", boxes, by_class, *limits)

    def column(index: int) -> str:
        cut = graph.add("Slice", hits, graph.whole(index), graph.whole(index + 1), graph.whole(1))
        return graph.add("Squeeze", cut, graph.whole(1))

    classes, places = column(1), column(2)
    flat = graph.add("Reshape", by_class, graph.whole(-1))
    width = graph.constant(ANCHORS, "int64")
    at = graph.add("Add", graph.add("Mul", classes, width), places)
    count = graph.add("Shape", classes)
    most = graph.add("Min", graph.whole(KEPT), count)
    best = graph.add("TopK", graph.add("Gather", flat, at), most, outputs=2)
    single = graph.add("Squeeze", boxes, graph.whole(0))
    kept = graph.add("Gather", single, graph.add("Gather", places, f"{best}.1"))
    return kept, graph.add("Gather", classes, f"{best}.1"), best, most


def _filled(graph: Graph, tensor: str, count: str, rank: int) -> str:
    missing = graph.add("Sub", graph.whole(KEPT), count)
    before = [0] * rank
    after = [missing, *([graph.whole(0)] if rank == 2 else [])]
    pads = graph.add("Concat", graph.whole(*before), *after, axis=0)
    return graph.add("Unsqueeze", graph.add("Pad", tensor, pads), graph.whole(0))


def _tfod(
    path: Path,
    *,
    first: int = 0,
    dtype: str = "uint8",
    opening: bool = True,
    names: tuple[str, str, str, str] = ("a", "b", "c", "d"),
    number: str = "float32",
    clip: float | None = None,
    size: tuple[int | str, int | str] = (HEIGHT_PX, WIDTH_PX),
    producer: str = "tf2onnx",
) -> Path:
    graph = Graph()
    picture = graph.input("image", dtype, 1, *size, 3)
    floats = picture if dtype == "float32" else graph.add("Cast", picture, to=1)
    if opening:
        half = graph.constant(127.5)
        floats = graph.add("Sub", graph.add("Div", floats, half), graph.constant(1.0))
    boxes, classes, scores, count = _chosen(graph, *_dense(graph, floats))
    if clip is not None:
        scaled = graph.add("Mul", boxes, graph.constant(clip))
        boxes = graph.add("Clip", scaled, graph.constant(0.0), graph.constant(clip))
    floating = graph.add("Cast", classes, to=1)
    if first:
        floating = graph.add("Add", floating, graph.constant(float(first)))
    graph.output(_filled(graph, boxes, count, 2), names[0], "float32", 1, KEPT, 4)
    graph.output(_filled(graph, floating, count, 1), names[1], "float32", 1, KEPT)
    graph.output(_filled(graph, scores, count, 1), names[2], "float32", 1, KEPT)
    code = 1 if number == "float32" else 6
    graph.output(graph.add("Cast", count, to=code), names[3], number, 1)
    return graph.save(path, producer=producer)


def _expected(
    bare: dict[str, NDArray[Any]], names: tuple[str, str, str, str], first: int, pixels: bool = False
) -> NDArray[np.float64]:
    boxes, classes, scores, count = (bare[name] for name in names)
    wide, tall = (1, 1) if pixels else (WIDTH_PX, HEIGHT_PX)
    rows = []
    for i in range(int(count[0])):
        top, left, bottom, right = boxes[0, i].tolist()
        rows.append(
            (left * wide, top * tall, right * wide, bottom * tall, scores[0, i], classes[0, i] - first)
        )
    return by_score(rows)


@pytest.mark.parametrize("first", [0, 1])
def test_boxes_come_back_in_input_pixels_and_classes_count_from_0(tmp_path: Path, first: int) -> None:
    """Whether the graph counts classes from 0 (TFLite) or from 1 (saved models) is read from its nodes."""
    names = ("d", "c", "b", "a")
    path = _tfod(tmp_path / "ssd.onnx", first=first, names=names)
    model = load_model(path)
    pictures = noise_pictures(3, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures)
    assert (model.head, model.interpretation.class_count, model.interpretation.needs_nms) == (
        "tfod",
        CLASSES,
        False,
    )
    assert any(f"count from {first}" in clause for clause in model.evidence)
    assert rows.shape == (3, KEPT, 6)
    for i in range(3):
        expected = _expected(network(path, {"image": pictures[i : i + 1, ..., ::-1]}), names, first)
        assert len(expected) > 2
        np.testing.assert_allclose(rows[i, : len(expected)], expected, atol=1e-3)
        assert not rows[i, len(expected) :, 4].any()


def test_float_inputs_are_normalised_as_in_tflite_if_the_graph_does_not_normalise(tmp_path: Path) -> None:
    path = _tfod(tmp_path / "ssd.onnx", dtype="float32", opening=False)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    tensor = (pictures[..., ::-1].astype(np.float32) - 127.5) / 127.5
    expected = _expected(network(path, {"image": tensor}), ("a", "b", "c", "d"), 0)
    np.testing.assert_allclose(
        compiled_rows(load_model(path), pictures)[0, : len(expected)], expected, atol=1e-3
    )


def test_float_inputs_are_not_normalised_if_the_graph_normalises(tmp_path: Path) -> None:
    way = load_model(_tfod(tmp_path / "ssd.onnx", dtype="float32")).interpretation.preprocess
    assert (way.scale, way.mean, way.color) == (1.0, (0.0, 0.0, 0.0), "rgb")


def test_a_graph_that_suppresses_90_classes_gets_tensorflows_labels(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("image", "uint8", 1, HEIGHT_PX, WIDTH_PX, 3)
    floats = graph.add("Div", graph.add("Cast", picture, to=1), graph.constant(255.0))
    boxes, classes, scores, count = _chosen(graph, *_dense(graph, floats, classes=90))
    graph.output(_filled(graph, boxes, count, 2), "boxes", "float32", 1, KEPT, 4)
    graph.output(_filled(graph, graph.add("Cast", classes, to=1), count, 1), "classes", "float32", 1, KEPT)
    graph.output(_filled(graph, scores, count, 1), "scores", "float32", 1, KEPT)
    graph.output(graph.add("Cast", count, to=1), "number", "float32", 1)
    model = load_model(graph.save(tmp_path / "ssd.onnx"))
    assert len(model.labels) == 90
    assert (model.labels[0], model.labels[16], model.labels[17]) == ("person", "cat", "dog")


def test_a_list_of_variable_length_is_padded_to_a_fixed_length(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("image", "uint8", 1, HEIGHT_PX, WIDTH_PX, 3)
    floats = graph.add("Div", graph.add("Cast", picture, to=1), graph.constant(255.0))
    boxes, classes, scores, count = _chosen(graph, *_dense(graph, floats))
    zero = graph.whole(0)
    graph.output(graph.add("Unsqueeze", boxes, zero), "a", "float32", 1, "m", 4)
    graph.output(graph.add("Unsqueeze", graph.add("Cast", classes, to=1), zero), "b", "float32", 1, "m")
    graph.output(graph.add("Unsqueeze", scores, zero), "c", "float32", 1, "m")
    graph.output(graph.add("Cast", count, to=1), "d", "float32", 1)
    path = graph.save(tmp_path / "ssd.onnx")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(load_model(path), pictures, limit=40)
    expected = _expected(network(path, {"image": pictures[..., ::-1]}), ("a", "b", "c", "d"), 0)
    assert rows.shape == (1, 40, 6)
    np.testing.assert_allclose(rows[0, : len(expected)], expected, atol=1e-3)
    assert not rows[0, len(expected) :, 4].any()


def test_outputs_whose_classes_and_scores_cannot_be_distinguished_are_refused(tmp_path: Path) -> None:
    """Names alone do not decide; with the head stated they do."""
    graph = Graph()
    picture = graph.input("image", "uint8", 1, HEIGHT_PX, WIDTH_PX, 3)
    moved = graph.add("Transpose", graph.add("Cast", picture, to=1), perm=[0, 3, 1, 2])
    made = graph.add("Reshape", graph.features(moved, 20), graph.whole(-1, 5, 4))
    graph.output(made, "detection_boxes", "float32", 1, 5, 4)
    for name in ("detection_classes", "detection_scores"):
        graph.output(graph.features(moved, 5), name, "float32", 1, 5)
    graph.output(graph.constant([5.0]), "num_detections", "float32", 1)
    path = graph.save(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="no detector"):
        load_model(path)
    state(path, head="tfod", labels=["a", "b"])
    assert load_model(path).interpretation.decoder.rows is not None
    assert load_model(path).labels == ("a", "b")


def test_four_outputs_from_pytorch_are_refused_unless_their_head_is_stated(tmp_path: Path) -> None:
    """There a box begins with its left side; the shapes are the same."""
    path = _tfod(tmp_path / "m.onnx", producer="pytorch")
    with pytest.raises(ModelError, match="no detector"):
        load_model(path)
    state(path, head="tfod")
    assert load_model(path).head == "tfod"


def test_boxes_in_unknown_units_are_refused(tmp_path: Path) -> None:
    """They may be in pixels, as EfficientDet's, or relative: nothing tells."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_tfod(tmp_path / "m.onnx", number="int32"))


@pytest.mark.parametrize(("clip", "head"), [(1.0, "tfod"), (64.0, "efficientdet")])
def test_the_clip_limit_distinguishes_pixels_from_proportions(
    tmp_path: Path, clip: float, head: str
) -> None:
    names = ("boxes", "classes", "scores", "number")
    path = _tfod(tmp_path / "m.onnx", first=1, number="int32", clip=clip, names=names)
    model = load_model(path)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    expected = _expected(
        network(path, {"image": pictures[..., ::-1]}), names, 1, pixels=head == "efficientdet"
    )
    assert model.head == head
    np.testing.assert_allclose(compiled_rows(model, pictures)[0, : len(expected)], expected, atol=1e-3)


def _seven(path: Path, *, sizes: bool, dtype: str = "uint8") -> Path:
    """automl's list: picture, box, score, class from 1."""
    graph = Graph()
    picture = graph.input("image_arrays:0", dtype, 1, HEIGHT_PX, WIDTH_PX, 3)
    floats = graph.add("Div", graph.add("Cast", picture, to=1), graph.constant(255.0))
    if dtype == "float32":
        floats = picture
    boxes, classes, scores, count = _chosen(graph, *_dense(graph, floats))
    span = graph.constant([HEIGHT_PX, WIDTH_PX] * 2)
    whole = _filled(graph, graph.add("Mul", boxes, span), count, 2)

    def column(index: int) -> str:
        return graph.add("Slice", whole, graph.whole(index), graph.whole(index + 1), graph.whole(2))

    top, left, bottom, right = (column(i) for i in range(4))
    corners = [top, left, bottom, right]
    if sizes:
        corners = [left, top, graph.add("Sub", right, left), graph.add("Sub", bottom, top)]
    ids = graph.add("Add", graph.add("Cast", classes, to=1), graph.constant(1.0))
    last = [
        graph.add("Unsqueeze", _filled(graph, tensor, count, 1), graph.whole(2)) for tensor in (scores, ids)
    ]
    image = graph.add("Mul", last[0], graph.constant(0.0))
    graph.output(graph.add("Concat", image, *corners, *last, axis=2), "detections:0", "float32", 1, KEPT, 7)
    return graph.save(path)


@pytest.mark.parametrize("sizes", [False, True])
def test_seven_columns_are_read_in_either_of_automls_orders(tmp_path: Path, sizes: bool) -> None:
    """Older exports say left, top, width, height; the nodes of the last two show which it is."""
    path = _seven(tmp_path / "efficientdet-d0.onnx", sizes=sizes)
    model = load_model(path)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures)
    assert model.head == "efficientdet"
    assert (model.input.fit, model.input.anchor) == ("letterbox", "top-left")
    for i in range(2):
        bare = network(path, {"image_arrays:0": pictures[i : i + 1, ..., ::-1]})["detections:0"][0]
        wanted = []
        for _, a, b, c, d, score, class_id in bare.tolist():
            box = (a, b, a + c, b + d) if sizes else (b, a, d, c)
            if score > 0:
                wanted.append((*box, score, class_id - 1))
        expected = by_score(wanted)
        np.testing.assert_allclose(rows[i, : len(expected)], expected, atol=1e-3)
        assert not rows[i, len(expected) :, 4].any()
        assert (rows[i, :, 5] >= 0).all()


def test_a_float_efficientdet_without_normalisation_is_refused_unless_stated(tmp_path: Path) -> None:
    path = _seven(tmp_path / "m.onnx", sizes=False, dtype="float32")
    with pytest.raises(ModelError, match=r"input\.mean"):
        load_model(path)
    state(path, input={"scale": 1, "mean": [127, 127, 127], "std": [128, 128, 128]})
    assert load_model(path).interpretation.preprocess.mean == (127.0, 127.0, 127.0)


@pytest.mark.shared
def test_ssd_mobilenet_gives_the_results_of_its_reference_code(shared_data: Path) -> None:
    """The real model, fed as its authors feed it: the same boxes, and a dog on the picture of a dog."""
    path = shared_data / "models" / "ssd_mobilenet_v1_300_tfod4out_coco90.onnx"
    model = load_model(path)
    picture = cv2.imread(str(shared_data / "photos" / "darknet_dog.jpg"))
    assert picture is not None
    small = cv2.resize(picture, (300, 300), interpolation=cv2.INTER_LINEAR).astype(np.uint8)[None]
    rows = compiled_rows(model, small)
    bare = list(network(path, {"normalized_input_image_tensor": small[..., ::-1]}).values())
    count = int(bare[3][0])
    assert (model.head, len(model.labels), rows.shape) == ("tfod", 90, (1, 10, 6))
    np.testing.assert_allclose(rows[0, :count, :4], bare[0][0, :count][:, [1, 0, 3, 2]] * 300, atol=1e-2)
    np.testing.assert_allclose(rows[0, :count, 4], bare[2][0, :count], atol=1e-4)
    assert "dog" in {model.labels[int(row[5])] for row in rows[0] if row[4] > 0.5}
