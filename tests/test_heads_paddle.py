"""PaddleDetection's exports with the suppression in the graph, in either of their two preparations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.inference.model import load_model

WIDTH_PX, HEIGHT_PX = 64, 48
CELLS, CLASSES = 60, 5
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def _first(graph: Graph, picture: str, used_to: float | None) -> str:
    """The first convolution; its biases take off what pixels of a mean of `used_to` give (None: anything)."""
    kernel = graph.random.normal(0.1, 0.4, (32, 3, 3, 3)).astype(np.float32)
    learned = graph.random.normal(0, 0.25, 32)
    sums = kernel.sum(axis=(1, 2, 3))
    bias = learned - sums * used_to if used_to is not None else learned + 4 * sums
    conv = graph.add("Conv", picture, graph.constant(kernel), graph.constant(bias), strides=[2, 2])
    pooled = graph.add("Flatten", graph.add("GlobalAveragePool", graph.add("Relu", conv)))
    return graph.add("MatMul", pooled, graph.noise(32, CELLS * (4 + CLASSES), scale=0.2))


def _paddle(
    path: Path,
    *,
    used_to: float | None = 0.45,
    im_shape: bool = False,
    padded: int | None = None,
    batch: int | str = "N",
    number: str | None = "int32",
) -> Path:
    """PP-YOLOE with its suppression: boxes divided by scale_factor, which is (height, width)."""
    graph = Graph()
    picture = graph.input("image", "float32", batch, 3, HEIGHT_PX, WIDTH_PX)
    size = graph.input("im_shape", "float32", batch, 2) if im_shape else ""
    scale = graph.input("scale_factor", "float32", batch, 2)
    table = graph.add("Reshape", _first(graph, picture, used_to), graph.whole(1, CELLS, 4 + CLASSES))
    table = graph.add("Sigmoid", graph.add("Add", table, graph.noise(CELLS, 4 + CLASSES)))

    def cut(tensor: str, start: int, end: int, axis: int) -> str:
        return graph.add("Slice", tensor, graph.whole(start), graph.whole(end), graph.whole(axis))

    corner = cut(table, 0, 2, 2)
    relative = graph.add("Concat", corner, graph.add("Add", corner, cut(table, 2, 4, 2)), axis=2)
    flip = graph.whole(1, 0, 1, 0)
    span = graph.constant([WIDTH_PX, HEIGHT_PX] * 2)
    if im_shape:
        span = graph.add("Unsqueeze", graph.add("Gather", size, flip, axis=1), graph.whole(1))
    boxes = graph.add("Mul", relative, span)
    boxes = graph.add(
        "Div", boxes, graph.add("Unsqueeze", graph.add("Gather", scale, flip, axis=1), graph.whole(1))
    )
    scores = graph.add("Transpose", cut(table, 4, 4 + CLASSES, 2), perm=[0, 2, 1])
    hits = graph.add(
        "NonMaxSuppression", boxes, scores, graph.whole(3), graph.constant(0.4), graph.constant(0.4)
    )
    classes, places = (graph.add("Squeeze", cut(hits, i, i + 1, 1), graph.whole(1)) for i in (1, 2))
    at = graph.add("Add", graph.add("Mul", classes, graph.constant(CELLS, "int64")), places)
    kept = graph.add("Gather", graph.add("Reshape", scores, graph.whole(-1)), at)
    columns = [
        graph.add("Unsqueeze", column, graph.whole(1)) for column in (graph.add("Cast", classes, to=1), kept)
    ]
    picked = graph.add("Gather", graph.add("Squeeze", boxes, graph.whole(0)), places)
    rows = graph.add("Concat", *columns, picked, axis=1)
    count = graph.add("Shape", classes)
    if padded is not None:
        missing = graph.add("Sub", graph.whole(padded), count)
        pads = graph.add("Concat", graph.whole(0, 0), missing, graph.whole(0), axis=0)
        rows = graph.add("Pad", rows, pads, graph.constant(0.9))
    graph.output(rows, "multiclass_nms3_0.tmp_0", "float32", padded or "n", 6)
    if number is not None:
        code = {"int32": 6, "int64": 7}[number]
        graph.output(graph.add("Cast", count, to=code), "multiclass_nms3_0.tmp_2", number, batch)
    return graph.save(path, producer="PaddlePaddle")


def _expected(path: Path, tensor: NDArray[Any], im_shape: bool) -> NDArray[np.float64]:
    feeds: dict[str, NDArray[Any]] = {"image": tensor, "scale_factor": np.ones((1, 2), np.float32)}
    if im_shape:
        feeds["im_shape"] = np.array([[HEIGHT_PX, WIDTH_PX]], np.float32)
    bare = network(path, feeds)
    rows = bare["multiclass_nms3_0.tmp_0"]
    count = int(bare["multiclass_nms3_0.tmp_2"][0]) if len(bare) > 1 else len(rows)
    return by_score([(*row[2:], row[1], row[0]) for row in rows[:count].tolist()])


def _tensor(picture: NDArray[np.uint8], imagenet: bool) -> NDArray[np.float32]:
    rgb = picture[None, ..., ::-1].astype(np.float64) / 255
    normal = (rgb - MEAN) / STD if imagenet else rgb
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2).astype(np.float32))


@pytest.mark.parametrize("im_shape", [False, True])
@pytest.mark.parametrize("number", ["int32", "int64", None])
def test_a_list_of_any_length_becomes_rows_of_a_fixed_number(
    tmp_path: Path, im_shape: bool, number: str | None
) -> None:
    """Three pictures, one by one: such a graph knows no batch, however open its first dimension is."""
    path = _paddle(tmp_path / "ppyoloe.onnx", im_shape=im_shape, number=number)
    model = load_model(path)
    pictures = noise_pictures(3, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures, limit=30)
    assert (model.head, model.reading.suppress, model.reading.input.batch) == ("paddle", False, 1)
    assert (model.reading.class_count, model.input.fit) == (CLASSES, "stretch")
    assert rows.shape == (3, 30, 6)
    for i in range(3):
        expected = _expected(path, _tensor(pictures[i], imagenet=False), im_shape)
        assert 2 < len(expected) < 30
        np.testing.assert_allclose(rows[i, : len(expected)], expected, atol=1e-3)
        assert not rows[i, len(expected) :, 4].any()


def test_rows_behind_the_number_do_not_count(tmp_path: Path) -> None:
    """An export of a fixed length fills up with anything; only the number says what is real."""
    path = _paddle(tmp_path / "m.onnx", padded=50, batch=1)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(load_model(path), pictures)
    expected = _expected(path, _tensor(pictures[0], imagenet=False), im_shape=False)
    assert rows.shape == (1, 50, 6)
    np.testing.assert_allclose(rows[0, : len(expected)], expected, atol=1e-3)
    assert not rows[0, len(expected) :, 4].any()


def test_no_detection_at_all_is_no_row_above_0(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("image", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    graph.input("scale_factor", "float32", 1, 2)
    _first(graph, picture, 0.45)
    none = graph.add("Slice", graph.noise(1, 6), graph.whole(0), graph.whole(0), graph.whole(0))
    graph.output(none, "rows", "float32", "n", 6)
    graph.output(graph.constant([0], "int32"), "number", "int32", 1)
    rows = compiled_rows(
        load_model(graph.save(tmp_path / "m.onnx")), noise_pictures(1, WIDTH_PX, HEIGHT_PX), 9
    )
    assert rows.shape == (1, 9, 6)
    assert not rows[..., 4].any()


@pytest.mark.parametrize(("used_to", "imagenet"), [(0.45, False), (0.0, True)])
def test_the_first_convolution_tells_whether_a_mean_is_taken_off(
    tmp_path: Path, used_to: float, imagenet: bool
) -> None:
    """PP-YOLOE and PP-YOLOE+ share every shape and differ in that; the biases remember the training."""
    path = _paddle(tmp_path / "m.onnx", used_to=used_to)
    model = load_model(path)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    expected = _expected(path, _tensor(pictures[0], imagenet), im_shape=False)
    np.testing.assert_allclose(compiled_rows(model, pictures)[0, : len(expected)], expected, atol=1e-3)
    assert any("first convolution" in clause for clause in model.evidence)


def test_a_first_convolution_that_tells_nothing_is_refused_unless_it_is_stated(
    tmp_path: Path,
) -> None:
    path = _paddle(tmp_path / "m.onnx", used_to=None)
    with pytest.raises(ModelError, match=r"MODEL\.yaml"):
        load_model(path)
    state(path, input={"mean": MEAN.tolist(), "std": STD.tolist()})
    way = load_model(path).reading.preprocess
    assert way.mean == tuple(MEAN.tolist())
    assert way.scale == pytest.approx(1 / 255)


def test_a_transformer_without_suppression_takes_pixels_of_0_to_1(tmp_path: Path) -> None:
    """PaddleDetection's RT-DETR: always 300 rows, boxes scaled by im_shape / scale_factor."""
    graph = Graph()
    picture = graph.input("image", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    size = graph.input("im_shape", "float32", "N", 2)
    scale = graph.input("scale_factor", "float32", "N", 2)
    attended = graph.attend(graph.features(picture, 20 * 6), 20, 6)
    span = graph.add("Gather", graph.add("Div", size, scale), graph.whole(1, 0, 1, 0), axis=1)
    table = graph.add("Reshape", graph.add("Sigmoid", attended), graph.whole(-1, 6))

    def cut(start: int, end: int) -> str:
        return graph.add("Slice", table, graph.whole(start), graph.whole(end), graph.whole(1))

    boxes = graph.add("Mul", cut(2, 6), span)
    classes = graph.add(
        "Cast", graph.add("Cast", graph.add("Mul", cut(0, 1), graph.constant(4.0)), to=7), to=1
    )
    graph.output(graph.add("Concat", classes, cut(1, 2), boxes, axis=1), "rows", "float32", 20, 6)
    graph.output(graph.constant([20], "int32"), "number", "int32", "N")
    path = graph.save(tmp_path / "rtdetr.onnx")
    model = load_model(path)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures)
    assert any("as RT-DETR" in clause for clause in model.evidence)
    assert rows.shape == (2, 20, 6)
    for i in range(2):
        feeds = {
            "image": _tensor(pictures[i], imagenet=False),
            "im_shape": np.array([[HEIGHT_PX, WIDTH_PX]], np.float32),
            "scale_factor": np.ones((1, 2), np.float32),
        }
        bare = network(path, feeds)["rows"]
        expected = by_score([(*row[2:], row[1], row[0]) for row in bare.tolist()])
        np.testing.assert_allclose(rows[i], expected, atol=1e-3)


def test_the_size_of_the_original_is_no_scale_factor(tmp_path: Path) -> None:
    """(w, h) as whole numbers is RT-DETR's second input; a list of six columns does not go with it."""
    graph = Graph()
    picture = graph.input("image", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    sizes = graph.input("orig_target_sizes", "int64", 1, 2)
    flat = graph.add("Reshape", _first(graph, picture, 0.45), graph.whole(-1))
    six = graph.add("Slice", flat, graph.whole(0), graph.whole(60), graph.whole(0))
    moved = graph.add("Add", six, graph.add("ReduceMax", graph.add("Cast", sizes, to=1)))
    graph.output(graph.add("Reshape", moved, graph.whole(10, 6)), "rows", "float32", 10, 6)
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))
