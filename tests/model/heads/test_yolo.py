"""The YOLOs that end in one table: each decoded as its family defines it, and none taken for another."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from repository_paths import SHARED
from tiny_graphs import Graph, compiled_rows, network, noise_pictures, state
from tiny_yolos import (
    CLASSES,
    HEIGHT_PX,
    WIDTH_PX,
    around,
    best_of,
    cells,
    flat,
    grids,
    scores_map,
    yolov5,
    yolov6,
    yolov8,
    yolox,
)
from visionedge.errors import ModelError
from visionedge.frames.letterbox import fit_to_input
from visionedge.model.model import load_model
from visionedge.model.postprocess import to_detections

YOLOX_NANO = SHARED / "models" / "yolox_nano_416_coco80.onnx"


def _rgb(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures as the YOLOs after v3 take them: RGB planes of 0-1."""
    planes = np.ascontiguousarray(pictures[..., ::-1].transpose(0, 3, 1, 2))
    return planes.astype(np.float32) / np.float32(255)


def _bgr(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures as YOLOX takes them: BGR planes of 0-255."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32)


def _with_objectness(table: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows of a decoded table (anchors, 5 + classes)."""
    return best_of((around(*row[:4]), [row[4] * score for score in row[5:]]) for row in table.tolist())


def _without_objectness(table: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows of a decoded table (anchors, 4 + classes)."""
    return best_of((around(*row[:4]), row[4:]) for row in table.tolist())


def _raw_yolox(table: NDArray[np.floating], places: list[tuple[int, int, int]]) -> NDArray[np.float64]:
    """Rows of an undecoded table: centres in strides from their cell, logarithms of sizes in strides."""
    decoded = table.astype(np.float64)
    for row, (column, line, stride) in zip(decoded, places, strict=True):
        row[0], row[1] = (row[0] + column) * stride, (row[1] + line) * stride
        row[2], row[3] = np.exp(row[2]) * stride, np.exp(row[3]) * stride
    return _with_objectness(decoded)


def _agree(path: Path, tensors: NDArray[np.float32], reference: Any, pictures: NDArray[np.uint8]) -> None:
    """The compiled rows of each picture are those of the reference over the bare network's table."""
    rows = compiled_rows(load_model(path), pictures)
    for picture, tensor in zip(rows, tensors, strict=True):
        (table,) = (t for t in network(path, {"images": tensor[None]}).values() if t.ndim == 3)
        expected = reference(table[0])[: len(picture)]
        np.testing.assert_allclose(picture[:, 4], expected[:, 4], atol=1e-5)
        np.testing.assert_array_equal(picture[:, 5], expected[:, 5])
        np.testing.assert_allclose(picture[:, :4], expected[:, :4], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("count", "opset"), [(1, 11), (3, 11), (3, 18)])
def test_a_raw_yolox_is_decoded_cell_by_cell(tmp_path: Path, count: int, opset: int) -> None:
    path = yolox(tmp_path / "m.onnx", opset=opset)
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.interpretation.needs_nms) == (
        "yolox",
        CLASSES,
        True,
    )
    assert (model.input.fit, model.input.anchor, model.input.pad) == ("letterbox", "top-left", 114)
    _agree(path, _bgr(pictures), lambda table: _raw_yolox(table, cells()), pictures)


def test_a_yolox_that_decodes_by_itself_is_not_decoded_again(tmp_path: Path) -> None:
    """Its shape is that of the raw one; only its last nodes differ."""
    path = yolox(tmp_path / "m.onnx", decoded=True)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    assert load_model(path).head == "yolox"
    assert "its last nodes decode the boxes" in load_model(path).evidence
    _agree(path, _bgr(pictures), _with_objectness, pictures)


def test_undecoded_boxes_and_scores_without_objectness_are_not_read_as_yolox(tmp_path: Path) -> None:
    """Its first class would be taken for the objectness, its distances for a centre and a size."""
    graph = Graph()
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    width, tables = 4 + CLASSES, []
    for stride, *_ in grids():
        scores = graph.add("Sigmoid", scores_map(graph, picture, CLASSES, stride))
        box = scores_map(graph, picture, 4, stride)
        tables.append(flat(graph, graph.add("Concat", box, scores, axis=1), width))
    table = graph.add("Transpose", graph.add("Concat", *tables, axis=2), perm=[0, 2, 1])
    graph.output(table, "output", "float32", 1, len(cells()), width)
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))


def test_yolov6_is_distinguished_from_yolox_by_its_column_of_ones(tmp_path: Path) -> None:
    path = yolov6(tmp_path / "m.onnx")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    assert load_model(path).head == "yolov6"
    _agree(path, _rgb(pictures), _with_objectness, pictures)


@pytest.mark.parametrize("way", ["split", "slice"])
@pytest.mark.parametrize("maps", [False, True])
def test_yolov5_has_three_rows_for_each_cell(tmp_path: Path, way: Any, maps: bool) -> None:
    """The undecoded maps, which older exporters leave beside the table, are let be."""
    path = yolov5(tmp_path / "m.onnx", way=way, maps=maps)
    pictures = noise_pictures(3, WIDTH_PX, HEIGHT_PX)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.input.anchor) == ("yolov5", CLASSES, "center")
    _agree(path, _rgb(pictures), _with_objectness, pictures)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_yolov8_has_a_column_or_a_row_for_each_cell(tmp_path: Path, columns: bool, count: int) -> None:
    path = yolov8(tmp_path / "m.onnx", columns=columns)
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count) == ("yolov8", CLASSES)
    _agree(path, _rgb(pictures), lambda t: _without_objectness(t.T if columns else t), pictures)


@pytest.mark.parametrize("columns", [True, False])
def test_a_yolov9_that_gives_corners_is_not_decoded_from_centres(tmp_path: Path, columns: bool) -> None:
    """Its shape is the same; the nodes that make boxes from distances differ."""
    path = yolov8(tmp_path / "m.onnx", columns=columns, corners=True)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    model = load_model(path)
    assert any("of corners" in clause for clause in model.evidence)

    def reference(table: NDArray[np.floating]) -> NDArray[np.float64]:
        rows = (table.T if columns else table).tolist()
        return best_of(((x, y, right, bottom), scores) for x, y, right, bottom, *scores in rows)

    _agree(path, _rgb(pictures), reference, pictures)


@pytest.mark.parametrize(("word", "anchor"), [("topleft", "top-left"), ("center", "center")])
def test_metadata_may_state_the_letterbox_alignment(tmp_path: Path, word: str, anchor: str) -> None:
    model = load_model(yolov8(tmp_path / "m.onnx", metadata={"letterbox_pad": word}))
    assert model.input.anchor == anchor
    state(model.path, input={"anchor": "center"})
    assert load_model(model.path).input.anchor == "center"


@pytest.mark.parametrize(("family", "needs_nms"), [("yolo9", True), ("yolo9_e2e", False)])
def test_an_end_to_end_yolov9_is_not_suppressed(
    tmp_path: Path, family: str, needs_nms: bool
) -> None:
    model = load_model(yolov8(tmp_path / "m.onnx", corners=True, metadata={"model_family": family}))
    assert model.interpretation.needs_nms is needs_nms


def test_an_unknown_letterbox_alignment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="letterbox_pad"):
        load_model(yolov8(tmp_path / "m.onnx", metadata={"letterbox_pad": "bottom"}))


def test_half_floats_are_converted_to_fp32_before_decoding(tmp_path: Path) -> None:
    path = yolov8(tmp_path / "m.onnx", dtype="float16")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(load_model(path), pictures)[0]
    (table,) = network(path, {"images": _rgb(pictures).astype(np.float16)}).values()
    expected = _without_objectness(table[0].T)[: len(rows)]
    np.testing.assert_allclose(rows[:, 4], expected[:, 4], atol=1e-6)


def test_a_network_that_divides_by_255_is_given_pixels(tmp_path: Path) -> None:
    path = yolov8(tmp_path / "m.onnx", scaled=True)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    assert load_model(path).interpretation.preprocess.scale == 1.0
    _agree(path, _rgb(pictures) * 255, lambda table: _without_objectness(table.T), pictures)


def test_an_open_size_is_that_of_the_exporters_metadata(tmp_path: Path) -> None:
    notes = {"imgsz": json.dumps([HEIGHT_PX, WIDTH_PX]), "task": "detect", "stride": "32"}
    path = yolov8(tmp_path / "m.onnx", size=("h", "w"), metadata=notes)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    assert (load_model(path).input.width_px, load_model(path).input.height_px) == (WIDTH_PX, HEIGHT_PX)
    _agree(path, _rgb(pictures), lambda table: _without_objectness(table.T), pictures)


def test_labels_come_from_the_metadata_of_ultralytics(tmp_path: Path) -> None:
    names = {"names": "{0: 'a', 1: 'b', 2: 'c', 3: 'd'}", "task": "detect", "author": "Ultralytics"}
    assert load_model(yolov8(tmp_path / "m.onnx", metadata=names)).labels == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("more", "metadata"),
    [
        (51, {"task": "pose", "names": "{0: 'person', 1: 'x', 2: 'y', 3: 'z'}"}),
        (51, {"names": "{0: 'person', 1: 'x', 2: 'y', 3: 'z'}"}),
        (51, {}),
        (32, {"task": "segment"}),
    ],
)
def test_columns_after_the_scores_are_never_read_as_classes(
    tmp_path: Path, more: int, metadata: dict[str, str]
) -> None:
    """A model for poses or masks has them; its task, its names or its last nodes tell."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(yolov8(tmp_path / "m.onnx", more=more, metadata=metadata))


def test_rotated_boxes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no detector"):
        load_model(yolov8(tmp_path / "m.onnx", angle=True))


def test_a_detector_with_masks_beside_its_table_is_refused(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    scores = [flat(graph, graph.add("Sigmoid", scores_map(graph, picture, 40, s)), 40) for s, *_ in grids()]
    graph.output(graph.add("Concat", *scores, axis=2), "output0", "float32", 1, 40, len(cells()))
    graph.output(
        scores_map(graph, picture, 32, 4), "output1", "float32", 1, 32, HEIGHT_PX // 4, WIDTH_PX // 4
    )
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    "shape", [(1000,), (21, HEIGHT_PX, WIDTH_PX), (len(cells()) + 1, 9), (9, len(cells()) - 1), (2, 84)]
)
def test_a_model_that_is_not_a_detector_is_refused_with_the_evidence(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A classifier, a segmentation, tables whose rows are no cells."""
    graph = Graph()
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    vector = graph.features(picture, int(np.prod(shape)))
    made = graph.add("Sigmoid", graph.add("Reshape", vector, graph.whole(1, *shape)))
    graph.output(made, "output0", "float32", 1, *shape)
    with pytest.raises(ModelError, match=r"no detector.*output0 float32\[1,"):
        load_model(graph.save(tmp_path / "m.onnx"))


def test_sigmoids_without_decoded_boxes_are_not_read_as_yolov5(tmp_path: Path) -> None:
    """A table of yolov5's shape whose last node is a sigmoid over everything is not decoded."""
    graph = Graph()
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    width = 5 + CLASSES
    maps = [flat(graph, scores_map(graph, picture, 3 * width, s), 3 * width) for s, *_ in grids()]
    table = graph.add("Reshape", graph.add("Concat", *maps, axis=2), graph.whole(1, -1, width))
    graph.output(graph.add("Sigmoid", table), "output", "float32", 1, 3 * len(cells()), width)
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))


def test_labels_for_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_model(yolov5(tmp_path / "m.onnx", metadata={"names": "['a', 'b']"}))


def test_a_yolox_that_subtracts_a_mean_needs_a_stated_colour_order(tmp_path: Path) -> None:
    """The first YOLOX took RGB and normalised; an export with that in its graph fits both orders."""
    graph = Graph()
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    small = graph.add("Sub", graph.add("Div", picture, graph.constant(255.0)), graph.constant(mean))
    tables = []
    for stride, *_ in grids():
        box, *scores = (scores_map(graph, small, n, stride) for n in (4, 1, CLASSES))
        made = [box, *(graph.add("Sigmoid", score) for score in scores)]
        tables.append(flat(graph, graph.add("Concat", *made, axis=1), 5 + CLASSES))
    table = graph.add("Transpose", graph.add("Concat", *tables, axis=2), perm=[0, 2, 1])
    graph.output(table, "output", "float32", 1, len(cells()), 5 + CLASSES)
    path = graph.save(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"input\.color in MODEL\.yaml"):
        load_model(path)
    state(path, input={"color": "rgb"})
    assert load_model(path).interpretation.preprocess.color == "rgb"


def _boxes_and_scores(path: Path, *, four: bool = True, each: int = 3) -> Path:
    """YOLOv4 as its port to PyTorch exports it; without the fourth dimension it is like YOLO-NAS."""
    graph = Graph(11)
    picture = graph.input("input", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    count = each * len(cells())
    maps = [flat(graph, scores_map(graph, picture, each * 4, s), each * 4) for s, *_ in grids()]
    corner = graph.add("Sigmoid", graph.add("Concat", *maps, axis=2))
    shape = (1, count, 1, 4) if four else (1, count, 4)
    graph.output(graph.add("Reshape", corner, graph.whole(*shape)), "boxes", "float32", *shape)
    maps = [flat(graph, scores_map(graph, picture, each * CLASSES, s), each * CLASSES) for s, *_ in grids()]
    scores = graph.add("Sigmoid", graph.add("Concat", *maps, axis=2))
    graph.output(
        graph.add("Reshape", scores, graph.whole(1, count, CLASSES)), "c", "float32", 1, count, CLASSES
    )
    return graph.save(path)


def test_yolov4_gives_relative_boxes_and_scores(tmp_path: Path) -> None:
    path = _boxes_and_scores(tmp_path / "m.onnx")
    model = load_model(path)
    assert (model.head, model.input.fit, model.interpretation.class_count) == (
        "yolov4-boxes",
        "stretch",
        CLASSES,
    )
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    made = network(path, {"input": _rgb(pictures)})
    size = np.array([WIDTH_PX, HEIGHT_PX] * 2)
    boxes = [tuple(box * size) for box in made["boxes"][0, :, 0].astype(np.float64)]
    expected = best_of(iter(zip(boxes, made["c"][0].tolist(), strict=True)))
    rows = compiled_rows(model, pictures)[0]
    np.testing.assert_allclose(rows, expected[: len(rows)], atol=1e-3)


@pytest.mark.parametrize(("four", "each"), [(False, 1), (True, 1)])
def test_boxes_and_scores_of_other_detectors_are_refused(tmp_path: Path, four: bool, each: int) -> None:
    """YOLO-NAS and others give such pairs; nothing tells how their pictures are prepared."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_boxes_and_scores(tmp_path / "m.onnx", four=four, each=each))


@pytest.mark.shared
def test_a_real_yolox_finds_the_objects_of_a_reference_on_photos(shared_data: Path) -> None:
    """Each sure detection of YOLOX-nano has its like in a slow decoding of the bare network."""
    model = load_model(YOLOX_NANO)
    assert (model.head, len(model.labels)) == ("yolox", 80)
    places = [(x, y, s) for s in (8, 16, 32) for y in range(416 // s) for x in range(416 // s)]
    found = set()
    for name in ("darknet_dog.jpg", "darknet_horses.jpg"):
        photo = cv2.imread(str(shared_data / "photos" / name))
        assert photo is not None
        picture, placement = fit_to_input(photo.astype(np.uint8), model.input)
        (table,) = network(YOLOX_NANO, {"images": _bgr(picture[None])}).values()
        slow = to_detections(_raw_yolox(table[0], places).astype(np.float32), placement, 0.4, 0.5, None)
        rows = compiled_rows(model, picture[None])[0]
        ours = to_detections(rows, placement, 0.4, 0.5, None)
        np.testing.assert_array_equal(ours.class_ids, slow.class_ids)
        np.testing.assert_allclose(ours.boxes, slow.boxes, atol=1e-4)
        np.testing.assert_allclose(ours.scores, slow.scores, atol=1e-4)
        found |= {model.labels[i] for i in ours.class_ids}
    assert {"dog", "bicycle", "horse"} <= found
