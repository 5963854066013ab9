"""Detectors that answer queries: RT-DETR, D-FINE, DEIM, RF-DETR in the forms they are exported in."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from detr_models import (
    CLASSES,
    HEIGHT_PX,
    MEAN,
    QUERIES,
    STD,
    WIDTH_PX,
    finished_detr_model,
    joined_detr_model,
    queries,
    raw_detr_model,
)
from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.model.model import load_model


def _plain(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB of 0-1, as the original training code makes it."""
    rgb = pictures[..., ::-1].astype(np.float64) / 255
    return np.ascontiguousarray(rgb.transpose(0, 3, 1, 2).astype(np.float32))


def _imagenet(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    rgb = (pictures[..., ::-1].astype(np.float64) / 255 - MEAN) / STD
    return np.ascontiguousarray(rgb.transpose(0, 3, 1, 2).astype(np.float32))


def _slow_rows(scores: NDArray[Any], boxes: NDArray[Any], limit: int) -> NDArray[np.float64]:
    """Each pair of query and class, one by one; boxes from centre and size to corners in pixels."""
    rows = []
    for (x, y, w, h), line in zip(boxes.tolist(), scores.tolist(), strict=True):
        for class_id, score in enumerate(line):
            corners = (
                (x - w / 2) * WIDTH_PX,
                (y - h / 2) * HEIGHT_PX,
                (x + w / 2) * WIDTH_PX,
                (y + h / 2) * HEIGHT_PX,
            )
            rows.append((*corners, score, class_id))
    return by_score(rows)[:limit]


def _sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    values = [1 / (1 + math.exp(-value)) for value in logits.ravel().tolist()]
    return np.array(values).reshape(logits.shape)


@pytest.mark.parametrize("count", [1, 3])
def test_a_finished_list_is_in_input_pixels_for_any_output_names(
    tmp_path: Path, count: int
) -> None:
    path = finished_detr_model(tmp_path / "rtdetr.onnx")
    model = load_model(path)
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures)
    assert model.head == "detr"
    assert model.interpretation.class_count == CLASSES
    assert not model.interpretation.needs_nms
    assert rows.shape == (count, 20, 6)
    sizes = np.array([[WIDTH_PX, HEIGHT_PX]] * count, np.int64)
    bare = network(path, {"images": _plain(pictures), "orig_target_sizes": sizes})
    for i in range(count):
        np.testing.assert_allclose(rows[i, :, :4], bare["labels"][i], atol=1e-3)
        np.testing.assert_allclose(rows[i, :, 4], bare["boxes"][i], atol=1e-5)
        np.testing.assert_array_equal(rows[i, :, 5], bare["scores"][i])


@pytest.mark.parametrize(("dtype", "opset"), [("float16", 13), ("float32", 11 + 2), ("float32", 20)])
def test_a_finished_list_works_in_half_floats_and_other_opsets(
    tmp_path: Path, dtype: str, opset: int
) -> None:
    path = finished_detr_model(tmp_path / "rtdetr.onnx", batch=1, dtype=dtype, opset=opset)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(load_model(path), pictures, limit=5)
    sizes = np.array([[WIDTH_PX, HEIGHT_PX]], np.int64)
    for i in range(2):
        tensor = _plain(pictures[i : i + 1]).astype(dtype)
        bare = network(path, {"images": tensor, "orig_target_sizes": sizes})
        np.testing.assert_allclose(rows[i, :, :4], bare["labels"][0, :5], atol=0.1)
        np.testing.assert_allclose(rows[i, :, 4], bare["boxes"][0, :5], atol=2e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_logits_and_boxes_become_the_best_pairs_of_query_and_class(tmp_path: Path, count: int) -> None:
    path = raw_detr_model(tmp_path / "dfine.onnx")
    model = load_model(path)
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures, limit=50)
    assert (model.head, model.interpretation.class_count, model.input.fit) == ("detr-raw", CLASSES, "stretch")
    bare = network(path, {"pixel_values": _plain(pictures)})
    for i in range(count):
        expected = _slow_rows(_sigmoid(bare["logits"][i]), bare["pred_boxes"][i], 50)
        np.testing.assert_allclose(rows[i, :, :4], expected[:, :4], atol=1e-3)
        np.testing.assert_allclose(rows[i, :, 4], expected[:, 4], atol=1e-5)
        np.testing.assert_array_equal(rows[i, :, 5], expected[:, 5])


def test_a_sigmoid_in_the_graph_is_not_applied_twice(tmp_path: Path) -> None:
    path = raw_detr_model(tmp_path / "m.onnx", activation="Sigmoid")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(load_model(path), pictures, limit=10)
    bare = network(path, {"pixel_values": _plain(pictures)})
    np.testing.assert_allclose(rows[0, :, 4], np.sort(bare["logits"][0].ravel())[::-1][:10], atol=1e-5)


@pytest.mark.parametrize(("side", "stride"), [(16, 16), (4, 4), (7, 2)])
def test_a_patch_backbone_or_a_resnet_gets_the_imagenet_mean(
    tmp_path: Path, side: int, stride: int
) -> None:
    """RF-DETR stands on DINOv2, which never saw a picture without it."""
    path = raw_detr_model(tmp_path / "rfdetr.onnx", side=side, stride=stride)
    model = load_model(path)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures, limit=20)
    bare = network(path, {"pixel_values": _imagenet(pictures)})
    assert any("ImageNet" in clause for clause in model.evidence)
    for i in range(2):
        expected = _slow_rows(_sigmoid(bare["logits"][i]), bare["pred_boxes"][i], 20)
        np.testing.assert_allclose(rows[i, :, :5], expected[:, :5], atol=1e-3)


def test_sigmoid_boxes_without_queries_are_not_read_as_detr(tmp_path: Path) -> None:
    """Every DETR attends; other detectors give such pairs of anchors, prepared in other ways."""
    graph = Graph()
    picture = graph.input("images", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    for width, name in ((4, "boxes"), (CLASSES, "scores")):
        table = graph.add(
            "Reshape", graph.features(picture, QUERIES * width), graph.whole(-1, QUERIES, width)
        )
        graph.output(graph.add("Sigmoid", table), name, "float32", "N", QUERIES, width)
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))


@pytest.mark.parametrize(("blocks", "mean"), [(1, (0.0, 0.0, 0.0)), (9, tuple(MEAN))])
def test_queries_selected_after_a_transformer_get_the_imagenet_mean(
    tmp_path: Path, blocks: int, mean: tuple[float, ...]
) -> None:
    """Some transformers start with small convolutions; RT-DETR's encoder attends but once."""
    graph = Graph()
    picture = graph.input("pixel_values", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    logits, boxes = queries(graph, picture)
    for _ in range(blocks):
        logits = graph.add("Softmax", graph.add("MatMul", logits, graph.noise(CLASSES, CLASSES)), axis=-1)
    best = graph.add("TopK", graph.add("ReduceMax", logits, axes=[2], keepdims=0), graph.whole(9), outputs=2)
    places = graph.add("Unsqueeze", f"{best}.1", graph.whole(2))
    for tensor, width, name in ((boxes, 4, "dets"), (logits, CLASSES, "labels")):
        wide = graph.add("Tile", places, graph.whole(1, 1, width))
        chosen = graph.add("GatherElements", tensor, wide, axis=1)
        answer = chosen if name == "dets" else graph.add("MatMul", chosen, graph.noise(CLASSES, CLASSES))
        graph.output(answer, name, "float32", "N", 9, width)
    assert load_model(graph.save(tmp_path / "m.onnx")).interpretation.preprocess.mean == mean


@pytest.mark.parametrize(("opening", "scale"), [("imagenet", 1 / 255), ("bytes", 1.0)])
def test_a_model_that_normalises_by_itself_is_not_normalised_again(
    tmp_path: Path, opening: str, scale: float
) -> None:
    model = load_model(raw_detr_model(tmp_path / "m.onnx", opening=opening))
    way = model.interpretation.preprocess
    assert way.scale == pytest.approx(scale)
    assert (way.mean, way.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert any("normalises by itself" in clause for clause in model.evidence)


def test_scaling_without_the_family_mean_is_refused_unless_stated(
    tmp_path: Path,
) -> None:
    path = raw_detr_model(tmp_path / "m.onnx", side=16, stride=16, opening="bytes")
    with pytest.raises(ModelError, match="subtract no mean"):
        load_model(path)
    state(path, input={"scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]})
    assert load_model(path).interpretation.preprocess.scale == 1


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_and_scores_in_one_table_are_distinguished_from_yolov8(tmp_path: Path, count: int) -> None:
    path = joined_detr_model(tmp_path / "rtdetr-l.onnx", task="detect")
    model = load_model(path)
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures, limit=40)
    bare = network(path, {"images": _plain(pictures)})["output0"]
    assert model.head == "rtdetr-ultralytics"
    for i in range(count):
        expected = _slow_rows(bare[i, :, 4:], bare[i, :, :4], 40)
        np.testing.assert_allclose(rows[i], expected, atol=1e-3)


def test_another_task_than_detection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no detector"):
        load_model(joined_detr_model(tmp_path / "m.onnx", task="segment"))


def test_softmax_scores_with_refined_boxes_are_refused(tmp_path: Path) -> None:
    """No family is known to have both."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(raw_detr_model(tmp_path / "m.onnx", activation="Softmax"))


@pytest.mark.parametrize("activation", [None, "Softmax"])
def test_the_original_detr_is_recognised_by_its_boxes_and_drops_the_no_object_class(
    tmp_path: Path, activation: str | None
) -> None:
    """A softmax over all classes and "no object", one class for a query, for any number of queries."""
    path = raw_detr_model(tmp_path / "m.onnx", side=7, activation=activation, refined=False)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count) == ("detr-softmax", CLASSES - 1)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    mean, std = (each.astype(np.float32).reshape(1, 3, 1, 1) for each in (MEAN, STD))
    bare = network(path, {"pixel_values": (_plain(pictures) - mean) / std})
    for rows, logits, boxes in zip(
        compiled_rows(model, pictures), bare["logits"], bare["pred_boxes"], strict=True
    ):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True)) if activation is None else logits
        likely = powers / powers.sum(axis=1, keepdims=True)
        best = likely[:, :-1].argmax(axis=1)
        sizes = np.array([WIDTH_PX, HEIGHT_PX] * 2)
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
        expected = np.column_stack([corners * sizes, likely[np.arange(len(best)), best], best])
        np.testing.assert_allclose(rows, by_score([tuple(row) for row in expected.tolist()]), atol=2e-3)


def test_a_sidecar_may_state_that_the_scores_are_sigmoids(tmp_path: Path) -> None:
    path = raw_detr_model(tmp_path / "m.onnx", refined=False)
    assert load_model(path).head == "detr-softmax"
    state(path, head="detr-raw")
    model = load_model(path)
    assert (model.head, model.interpretation.class_count) == ("detr-raw", CLASSES)


def test_a_slice_of_a_softmax_is_refused_and_a_slice_of_sigmoids_is_accepted(tmp_path: Path) -> None:
    """What was cut off is not known; and what went through a sigmoid does not go through another."""
    with pytest.raises(ModelError, match="part of the output of a softmax"):
        load_model(raw_detr_model(tmp_path / "m.onnx", activation="Softmax", refined=False, cut=True))
    path = raw_detr_model(tmp_path / "n.onnx", activation="Sigmoid", cut=True)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    scores = network(path, {"pixel_values": _plain(pictures)})["logits"]
    assert compiled_rows(load_model(path), pictures)[0, 0, 4] == pytest.approx(scores.max(), abs=1e-5)


@pytest.mark.parametrize("slots", [2, 3, 4, 7])
def test_the_last_slot_of_an_rfdetr_is_the_background(tmp_path: Path, slots: int) -> None:
    """Its own decoder drops it; with four slots scores are as wide as boxes, and nodes tell them apart."""
    path = raw_detr_model(tmp_path / "m.onnx", classes=slots, names=("dets", "labels"))
    model = load_model(path)
    assert (model.head, model.interpretation.class_count) == ("detr-raw", slots - 1)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    bare = network(path, {"pixel_values": _plain(pictures)})
    expected = _slow_rows(_sigmoid(bare["labels"][0])[:, : slots - 1], bare["dets"][0], 20)
    np.testing.assert_allclose(compiled_rows(model, pictures, 20)[0], expected, rtol=1e-4, atol=1e-3)


def test_an_rfdetr_of_coco_or_with_a_name_for_each_slot_keeps_them_all(tmp_path: Path) -> None:
    """COCO's 91 slots are the numbers of its categories."""
    coco = load_model(raw_detr_model(tmp_path / "coco.onnx", classes=91, names=("dets", "labels")))
    assert (coco.interpretation.class_count, coco.labels[1], coco.labels[90]) == (91, "person", "toothbrush")
    named = raw_detr_model(
        tmp_path / "named.onnx", classes=3, names=("dets", "labels"), metadata={"names": '["a", "b", "c"]'}
    )
    assert load_model(named).interpretation.class_count == 3


def test_scores_and_boxes_of_cells_are_not_read_as_queries(tmp_path: Path) -> None:
    """126 rows at 96 x 64 are the cells at strides 8, 16 and 32: a YOLO, whose boxes may be anything."""
    graph = Graph()
    picture = graph.input("images", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    graph.output(graph.attend(graph.features(picture, 126 * 5), 126, 5), "scores", "float32", "N", 126, 5)
    boxes = graph.add("Sigmoid", graph.attend(graph.features(picture, 126 * 4), 126, 4))
    graph.output(boxes, "boxes", "float32", "N", 126, 4)
    with pytest.raises(ModelError):
        load_model(graph.save(tmp_path / "m.onnx"))


def test_boxes_of_anchors_are_not_read_as_queries(tmp_path: Path) -> None:
    """A raw SSD has such outputs too, but neither attention nor boxes made by a sigmoid."""
    graph = Graph()
    picture = graph.input("images", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    for name, width in (("boxes", 4), ("scores", 21)):
        made = graph.add("Reshape", graph.features(picture, 50 * width), graph.whole(-1, 50, width))
        graph.output(made, name, "float32", "N", 50, width)
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))


def test_an_open_input_size_is_the_stated_or_the_usual_one_and_is_reported(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("pixel_values", "float32", "batch", "channels", "height", "width")
    logits, boxes = queries(graph, picture)
    graph.output(logits, "logits", "float32", "batch", QUERIES, CLASSES)
    graph.output(boxes, "pred_boxes", "float32", "batch", QUERIES, 4)
    path = graph.save(tmp_path / "m.onnx")
    model = load_model(path)
    assert (model.input.width_px, model.input.height_px) == (640, 640)
    assert any("size is open: 640 x 640 as is usual" in clause for clause in model.evidence)
    state(path, input={"width": WIDTH_PX, "height": HEIGHT_PX})
    model = load_model(path)
    assert (model.input.width_px, model.input.height_px) == (WIDTH_PX, HEIGHT_PX)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    bare = network(path, {"pixel_values": _plain(pictures)})
    expected = _slow_rows(_sigmoid(bare["logits"][1]), bare["pred_boxes"][1], 30)
    np.testing.assert_allclose(compiled_rows(model, pictures, limit=30)[1], expected, atol=1e-3)


def test_a_variable_number_of_queries_is_padded(tmp_path: Path) -> None:
    """Exports of an open size often do not say how many queries there are."""
    graph = Graph()
    picture = graph.input("pixel_values", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    logits, boxes = queries(graph, picture)
    first = graph.add("Slice", graph.add("Shape", picture), graph.whole(0), graph.whole(1))
    most = graph.add("Add", graph.add("Mul", first, graph.whole(0)), graph.whole(15))
    best = graph.add("TopK", graph.add("ReduceMax", logits, axes=[2], keepdims=0), most, outputs=2)
    rows = graph.add("Unsqueeze", f"{best}.1", graph.whole(2))
    for name, tensor, width in (("logits", logits, CLASSES), ("pred_boxes", boxes, 4)):
        wide = graph.add("Tile", rows, graph.whole(1, 1, width))
        graph.output(graph.add("GatherElements", tensor, wide, axis=1), name, "float32", "N", "Q", width)
    path = graph.save(tmp_path / "m.onnx")
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    found = compiled_rows(load_model(path), pictures, limit=40)
    bare = network(path, {"pixel_values": _plain(pictures)})
    assert found.shape == (2, 40, 6)
    for i in range(2):
        expected = _slow_rows(_sigmoid(bare["logits"][i]), bare["pred_boxes"][i], 40)
        np.testing.assert_allclose(found[i], expected, atol=1e-3)


@pytest.mark.shared
def test_deimv2_gives_the_results_of_its_reference_code(shared_data: Path) -> None:
    """The real model, fed as its authors feed it: the same boxes, and a dog on the picture of a dog."""
    path = shared_data / "models" / "deimv2_hgnetv2_femto_416_coco80.onnx"
    model = load_model(path)
    picture = cv2.imread(str(shared_data / "photos" / "darknet_dog.jpg"))
    assert picture is not None
    small = cv2.resize(picture, (416, 416), interpolation=cv2.INTER_LINEAR).astype(np.uint8)[None]
    rows = compiled_rows(model, small)
    assert (model.head, model.labels[0], rows.shape) == ("detr", "person", (1, 300, 6))
    bare = network(path, {"images": _plain(small), "orig_target_sizes": np.array([[416, 416]], np.int64)})
    np.testing.assert_allclose(rows[0, :50, :4], bare["boxes"][0, :50], atol=0.02)
    np.testing.assert_allclose(rows[0, :50, 4], bare["scores"][0, :50], atol=1e-4)
    np.testing.assert_array_equal(rows[0, :20, 5], bare["labels"][0, :20])
    assert "dog" in {model.labels[int(row[5])] for row in rows[0] if row[4] > 0.5}
