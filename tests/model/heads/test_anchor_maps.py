"""Raw maps and finished lists: YOLOv3 to v5 undecoded, FastestDet, and detectors that suppress themselves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raw_map_models import WIDTH, _candidates, end_to_end_model, fastestdet_model, raw_map_model
from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from tiny_yolos import (
    ANCHORS,
    CLASSES,
    HEIGHT_PX,
    WIDTH_PX,
    around,
    best_of,
    grids,
    pieces,
    scores_map,
)
from visionedge.errors import ModelError
from visionedge.model.model import load_model


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _planes(pictures: NDArray[np.uint8], *, bgr: bool = False) -> NDArray[np.float32]:
    """Planes of 0-1."""
    ordered = pictures if bgr else pictures[..., ::-1]
    return np.ascontiguousarray(ordered.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def _cell(table: NDArray[np.float32], order: str, anchor: int, row: int, column: int) -> NDArray[np.float32]:
    """The numbers of one anchor of one cell."""
    span = slice(anchor * WIDTH, (anchor + 1) * WIDTH)
    places: dict[str, Any] = {
        "channels-first": (span, row, column),
        "channels-last": (row, column, span),
        "anchors-first": (anchor, row, column),
        "anchors-last": (row, column, anchor),
    }
    cell: NDArray[np.float32] = table[places[order]]
    return cell


def _slow(outputs: dict[str, NDArray[Any]], order: str, way: str) -> NDArray[np.float64]:
    """Rows by the definitions of YOLOv3, YOLOv4 (scale_x_y) and YOLOv5, number by number."""
    reach = {"yolov4": {8: 1.2, 16: 1.1, 32: 1.05}}.get(way, {})
    found = []
    for index, (stride, columns, rows) in enumerate(grids()):
        table = outputs[f"a{stride}"][0]
        for anchor, (wide, tall) in enumerate(ANCHORS[3 * index : 3 * index + 3]):
            for row in range(rows):
                for column in range(columns):
                    x, y, w, h, objectness, *classes = _cell(table, order, anchor, row, column).tolist()
                    if way == "yolov5-raw":
                        x, y = (2 * _sigmoid(x) - 0.5 + column, 2 * _sigmoid(y) - 0.5 + row)
                        w, h = (2 * _sigmoid(w)) ** 2 * wide, (2 * _sigmoid(h)) ** 2 * tall
                    else:
                        scale = reach.get(stride, 1.0)
                        x, y = (scale * _sigmoid(v) - (scale - 1) / 2 for v in (x, y))
                        x, y, w, h = x + column, y + row, math.exp(w) * wide, math.exp(h) * tall
                    scores = [_sigmoid(objectness) * _sigmoid(c) for c in classes]
                    found.append((around(x * stride, y * stride, w, h), scores))
    return best_of(iter(found))


def _agree(rows: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(rows[:, 4], expected[: len(rows), 4], atol=1e-5)
    np.testing.assert_array_equal(rows[:, 5], expected[: len(rows), 5])
    np.testing.assert_allclose(rows[:, :4], expected[: len(rows), :4], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "activation", "head"),
    [
        ("channels-first", "LeakyRelu", "yolov3"),
        ("channels-last", "LeakyRelu", "yolov3"),
        ("anchors-last", "LeakyRelu", "yolov3"),
        ("channels-first", "Mish", "yolov4"),
        ("anchors-last", "Mish", "yolov4"),
        ("anchors-first", "SiLU", "yolov5-raw"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_raw_maps_are_decoded_according_to_their_activations(
    tmp_path: Path, order: str, activation: str, head: str, count: int
) -> None:
    path = raw_map_model(tmp_path / "m.onnx", order, activation=activation)
    state(path, anchors=[list(pair) for pair in ANCHORS])
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.interpretation.needs_nms) == (
        head,
        CLASSES,
        True,
    )
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    for rows, tensor in zip(compiled_rows(model, pictures), _planes(pictures), strict=True):
        _agree(rows, _slow(network(path, {"images": tensor[None]}), order, head))


def test_anchors_come_from_metadata_in_any_nesting_and_order(tmp_path: Path) -> None:
    """One list of numbers, pairs, or a list for each map, the coarsest first as darknet's outputs are."""
    pairs = [list(pair) for pair in ANCHORS]
    ways: list[Any] = [
        [side for pair in ANCHORS for side in pair],
        pairs,
        [[side for pair in ANCHORS[i : i + 3] for side in pair] for i in (6, 3, 0)],
    ]
    decoders = set()
    for index, way in enumerate(ways):
        path = raw_map_model(tmp_path / f"m{index}.onnx", metadata={"anchors": str(way)})
        decoders.add(load_model(path).interpretation.decoder)
    assert len(decoders) == 1


def test_raw_maps_without_anchors_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing states their anchors.*MODEL\.yaml"):
        load_model(raw_map_model(tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("anchors", "words"),
    [
        (ANCHORS[:6], "states 6 anchors"),
        (ANCHORS[:7], "states 7 anchors"),
        ([(0.1 * w / 100, 0.1 * h / 100) for w, h in ANCHORS], "must be in pixels"),
    ],
)
def test_anchors_that_do_not_match_the_maps_are_refused(
    tmp_path: Path, anchors: Sequence[tuple[float, float]], words: str
) -> None:
    path = raw_map_model(tmp_path / "m.onnx")
    state(path, anchors=[list(pair) for pair in anchors])
    with pytest.raises(ModelError, match=words):
        load_model(path)


def test_the_six_anchors_of_yolo_tiny_are_refused_if_the_model_may_be_v4(tmp_path: Path) -> None:
    """YOLOv4-tiny gives its finer map the second to fourth of them; that has to be said map by map."""
    tiny = [[10, 14], [23, 27], [37, 58], [81, 82], [135, 169], [344, 319]]
    path = raw_map_model(tmp_path / "m.onnx", strides=(16, 32))
    state(path, anchors=tiny)
    assert load_model(path).head == "yolov3"
    graph = Graph(13)
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    half, _ = pieces(graph, graph.add("LeakyRelu", graph.stem(picture)), 0, 1, 3)
    joined = graph.add("Concat", half, half, half, axis=1)
    for stride, columns, rows in grids((16, 32)):
        made = scores_map(graph, joined, 3 * WIDTH, stride)
        graph.output(made, f"a{stride}", "float32", 1, 3 * WIDTH, rows, columns)
    path = graph.save(tmp_path / "v4.onnx")
    state(path, anchors=tiny)
    with pytest.raises(ModelError, match="map by map"):
        load_model(path)
    state(path, anchors=[tiny[1:4], tiny[3:]])
    assert load_model(path).head == "yolov3"


@pytest.mark.parametrize(
    ("order", "activation"),
    [("anchors-first", "LeakyRelu"), ("anchors-first", None), ("channels-first", "SiLU")],
)
def test_raw_maps_of_an_ambiguous_generation_need_a_stated_head(
    tmp_path: Path, order: str, activation: str | None
) -> None:
    """YOLOv7-tiny and YOLOv3 share shape and activation, but not their decoding."""
    path = raw_map_model(tmp_path / "m.onnx", order, activation=activation)
    pairs = [list(pair) for pair in ANCHORS]
    state(path, anchors=pairs)
    with pytest.raises(ModelError, match="no detector"):
        load_model(path)
    state(path, anchors=pairs, head="yolov5-raw")
    assert load_model(path).head == "yolov5-raw"


def test_maps_after_a_sigmoid_are_not_raw(tmp_path: Path) -> None:
    path = raw_map_model(tmp_path / "m.onnx", sigmoid=True)
    state(path, anchors=[list(pair) for pair in ANCHORS])
    with pytest.raises(ModelError, match="no detector"):
        load_model(path)


@pytest.mark.parametrize("count", [1, 3])
def test_fastestdet_is_decoded_cell_by_cell(tmp_path: Path, count: int) -> None:
    path = fastestdet_model(tmp_path / "m.onnx")
    model = load_model(path)
    assert (model.head, model.input.fit, model.interpretation.preprocess.color) == (
        "fastestdet",
        "stretch",
        "bgr",
    )
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    for rows, tensor in zip(compiled_rows(model, pictures), _planes(pictures, bgr=True), strict=True):
        made = network(path, {"input.1": tensor[None]})["758"][0]
        found = []
        for row in range(HEIGHT_PX // 16):
            for column in range(WIDTH_PX // 16):
                objectness_, x, y, w, h, *scores = made[:, row, column].tolist()
                x, y = (math.tanh(x) + column) * 16, (math.tanh(y) + row) * 16
                box = around(x, y, _sigmoid(w) * WIDTH_PX, _sigmoid(h) * HEIGHT_PX)
                found.append((box, [objectness_**0.6 * score**0.4 for score in scores]))
        _agree(rows, best_of(iter(found)))


@pytest.mark.parametrize("keys", [{"softmax": False}, {"stride": 8}])
def test_a_map_with_another_structure_than_fastestdet_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    """A segmentation has such a shape, too."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(fastestdet_model(tmp_path / "m.onnx", **keys))


@pytest.mark.parametrize(("count", "limit"), [(1, 500), (3, 500), (2, 8)])
def test_an_end_to_end_list_is_used_unchanged(tmp_path: Path, count: int, limit: int) -> None:
    path = end_to_end_model(tmp_path / "m.onnx")
    model = load_model(path)
    assert (model.head, model.interpretation.needs_nms, model.interpretation.class_count) == (
        "yolov10",
        False,
        CLASSES,
    )
    pictures = noise_pictures(count, WIDTH_PX, HEIGHT_PX)
    for rows, tensor in zip(compiled_rows(model, pictures, limit), _planes(pictures), strict=True):
        expected = network(path, {"images": tensor[None]})["output0"][0][:limit]
        np.testing.assert_allclose(rows, expected, atol=1e-4)


def test_a_list_with_other_columns_in_front_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no detector"):
        load_model(end_to_end_model(tmp_path / "m.onnx", score_first=True))


def test_a_list_of_poses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no detector"):
        load_model(end_to_end_model(tmp_path / "m.onnx", metadata={"task": "pose"}))


def test_a_list_with_another_number_of_classes_than_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_model(end_to_end_model(tmp_path / "m.onnx", metadata={"names": "['a', 'b']"}))


def test_centernet_needs_stated_preprocessing(tmp_path: Path) -> None:
    """A pooling that finds peaks tells it from YOLO; nothing tells colours and mean."""
    path = end_to_end_model(tmp_path / "m.onnx", heat=True)
    with pytest.raises(ModelError, match=r"CenterNet.*MODEL\.yaml"):
        load_model(path)
    state(
        path, input={"color": "rgb", "scale": 1 / 255, "mean": [0, 0, 0], "std": [1, 1, 1], "fit": "stretch"}
    )
    model = load_model(path)
    assert (model.head, model.input.fit) == ("centernet", "stretch")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    expected = network(path, {"images": _planes(pictures)})["output0"]
    np.testing.assert_allclose(compiled_rows(model, pictures), expected, atol=1e-4)


def test_ultralytics_rt_detr_lists_boxes_as_relative_centres(tmp_path: Path) -> None:
    """Its shape is that of YOLOv10; sampling tells it, and without Ultralytics' word it is refused."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(end_to_end_model(tmp_path / "m.onnx", samples=True))
    notes = {"author": "Ultralytics", "description": "Ultralytics rtdetr-l model", "task": "detect"}
    path = end_to_end_model(tmp_path / "n.onnx", samples=True, metadata=notes)
    model = load_model(path)
    assert (model.head, model.input.fit) == ("rtdetr-list", "stretch")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    expected = [
        (*around(x * WIDTH_PX, y * HEIGHT_PX, w * WIDTH_PX, h * HEIGHT_PX), score, label)
        for x, y, w, h, score, label in network(path, {"images": _planes(pictures)})["output0"][0].tolist()
    ]
    np.testing.assert_allclose(compiled_rows(model, pictures)[0], by_score(expected), rtol=1e-5, atol=1e-3)


def _with_suppression(path: Path, batch: int | str = 1) -> Path:
    """YOLOv7 with onnxruntime's suppression: [n, 7], led by the picture's place in the batch."""
    graph = Graph(13)
    picture = graph.input("images", "float32", batch, 3, HEIGHT_PX, WIDTH_PX)
    corners, scores = _candidates(graph, picture)
    by_class = graph.add("Transpose", scores, perm=[0, 2, 1])
    hits = graph.add(
        "NonMaxSuppression", corners, by_class, *[graph.whole(9)], graph.constant(0.5), graph.constant(0.6)
    )
    place, label, anchor = pieces(graph, hits, 0, 1, 2, 3)
    box = graph.add("GatherND", corners, graph.add("Concat", place, anchor, axis=1))
    score = graph.add("Unsqueeze", graph.add("GatherND", by_class, hits), graph.whole(1))
    floats = [graph.add("Cast", tensor, to=1) for tensor in (place, label)]
    table = graph.add("Concat", floats[0], box, floats[1], score, axis=1)
    graph.output(table, "output", "float32", "n", 7)
    return graph.save(path)


@pytest.mark.parametrize("batch", [1, "n"])
def test_rows_of_seven_columns_are_computed_one_picture_at_a_time(tmp_path: Path, batch: int | str) -> None:
    path = _with_suppression(tmp_path / "m.onnx", batch)
    model = load_model(path)
    assert (model.head, model.interpretation.needs_nms, model.interpretation.input.batch) == (
        "yolov7-nms",
        False,
        1,
    )
    pictures = noise_pictures(3, WIDTH_PX, HEIGHT_PX)
    for rows, tensor in zip(compiled_rows(model, pictures, limit=60), _planes(pictures), strict=True):
        table = network(path, {"images": tensor[None]})["output"].tolist()
        expected = by_score([(*row[1:5], row[6], row[5]) for row in table])
        assert 0 < len(expected) < 60
        np.testing.assert_allclose(rows[: len(expected)], expected, atol=1e-4)
        assert not rows[len(expected) :, 4].any()


def test_rows_of_seven_for_a_fixed_batch_of_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no detector"):
        load_model(_with_suppression(tmp_path / "m.onnx", 4))
