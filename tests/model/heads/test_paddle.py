"""PaddleDetection's exports with the suppression in the graph, prepared as their exporter tells."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from tiny_models import TinyDetector
from visionedge.errors import ModelError
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX = 64, 48
CELLS, CLASSES = 60, 5
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def _first(graph: Graph, picture: str) -> str:
    """The first convolution and what is made of it."""
    kernel, bias = graph.noise(32, 3, 3, 3, scale=0.4), graph.noise(32, scale=0.25)
    conv = graph.add("Conv", picture, kernel, bias, strides=[2, 2])
    pooled = graph.add("Flatten", graph.add("GlobalAveragePool", graph.add("Relu", conv)))
    return graph.add("MatMul", pooled, graph.noise(32, CELLS * (4 + CLASSES), scale=0.2))


RESIZE = {"type": "Resize", "interp": 2, "keep_ratio": False, "target_size": [HEIGHT_PX, WIDTH_PX]}
PLAIN = {"type": "NormalizeImage", "is_scale": True, "norm_type": "none", "mean": [0, 0, 0], "std": [1, 1, 1]}
IMAGENET = {"type": "NormalizeImage", "is_scale": True, "mean": MEAN.tolist(), "std": STD.tolist()}
PERMUTE = {"type": "Permute"}


def _with_export_file(path: Path, *steps: dict[str, Any]) -> Path:
    """The exporter's `infer_cfg.yml` beside a model (JSON is YAML); the model's path."""
    document = {"mode": "paddle", "arch": "YOLO", "Preprocess": list(steps), "label_list": ["a"] * CLASSES}
    path.with_name("infer_cfg.yml").write_text(json.dumps(document))
    return path


def _paddle(
    path: Path,
    *,
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
    table = graph.add("Reshape", _first(graph, picture), graph.whole(1, CELLS, 4 + CLASSES))
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
def test_a_list_of_any_length_becomes_a_fixed_number_of_rows(
    tmp_path: Path, im_shape: bool, number: str | None
) -> None:
    """Three pictures, one by one: such a graph knows no batch, however open its first dimension is."""
    path = _with_export_file(_paddle(tmp_path / "ppyoloe.onnx", im_shape=im_shape, number=number), RESIZE, PLAIN)
    model = load_model(path)
    pictures = noise_pictures(3, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(model, pictures, limit=30)
    assert (model.head, model.interpretation.needs_nms, model.interpretation.input.batch) == (
        "paddle",
        False,
        1,
    )
    assert (model.interpretation.class_count, model.input.fit) == (CLASSES, "stretch")
    assert rows.shape == (3, 30, 6)
    for i in range(3):
        expected = _expected(path, _tensor(pictures[i], imagenet=False), im_shape)
        assert 2 < len(expected) < 30
        np.testing.assert_allclose(rows[i, : len(expected)], expected, atol=1e-3)
        assert not rows[i, len(expected) :, 4].any()


def test_rows_beyond_the_reported_number_are_ignored(tmp_path: Path) -> None:
    """An export of a fixed length fills up with anything; only the number says what is real."""
    path = _with_export_file(_paddle(tmp_path / "m.onnx", padded=50, batch=1), RESIZE, PLAIN)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    rows = compiled_rows(load_model(path), pictures)
    expected = _expected(path, _tensor(pictures[0], imagenet=False), im_shape=False)
    assert rows.shape == (1, 50, 6)
    np.testing.assert_allclose(rows[0, : len(expected)], expected, atol=1e-3)
    assert not rows[0, len(expected) :, 4].any()


def test_a_picture_without_detections_gives_no_row_above_0(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("image", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    graph.input("scale_factor", "float32", 1, 2)
    _first(graph, picture)
    none = graph.add("Slice", graph.noise(1, 6), graph.whole(0), graph.whole(0), graph.whole(0))
    graph.output(none, "rows", "float32", "n", 6)
    graph.output(graph.constant([0], "int32"), "number", "int32", 1)
    rows = compiled_rows(
        load_model(_with_export_file(graph.save(tmp_path / "m.onnx"), RESIZE, PLAIN)),
        noise_pictures(1, WIDTH_PX, HEIGHT_PX),
        9,
    )
    assert rows.shape == (1, 9, 6)
    assert not rows[..., 4].any()


@pytest.mark.parametrize(("step", "imagenet"), [(PLAIN, False), (IMAGENET, True)])
def test_the_export_file_decides_whether_a_mean_is_subtracted(
    tmp_path: Path, step: dict[str, Any], imagenet: bool
) -> None:
    """PP-YOLOE and PP-YOLOE+ share every shape and differ in that."""
    path = _with_export_file(_paddle(tmp_path / "m.onnx"), RESIZE, step, PERMUTE)
    model = load_model(path)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    expected = _expected(path, _tensor(pictures[0], imagenet), im_shape=False)
    np.testing.assert_allclose(compiled_rows(model, pictures)[0, : len(expected)], expected, atol=1e-3)
    assert "infer_cfg.yml beside it says how pictures are prepared" in model.evidence


@pytest.mark.parametrize(
    ("step", "way"),
    [
        ({"is_scale": False, "mean": [127.5] * 3, "std": [127.502231] * 3}, (1.0, 127.5, 127.502231)),
        ({"is_scale": False, "mean": [0, 0, 0], "std": [1, 1, 1]}, (1.0, 0.0, 1.0)),
        ({"mean": [0.5] * 3, "std": [0.25] * 3}, (1 / 255, 0.5, 0.25)),
    ],
)
def test_other_paddle_scalings_are_used_as_stated(
    tmp_path: Path, step: dict[str, Any], way: tuple[float, float, float]
) -> None:
    """Its SSD has a mean of its own, its YOLOX takes pixels of 0-255."""
    path = _with_export_file(_paddle(tmp_path / "m.onnx"), RESIZE, {"type": "NormalizeImage"} | step, PERMUTE)
    found = load_model(path).interpretation.preprocess
    assert (found.scale, found.mean[0], found.std[0], found.color) == (*way, "rgb")


def test_without_the_export_file_the_model_is_refused_unless_stated(tmp_path: Path) -> None:
    """The weights do not remember it: a guess would be right often, and wrong without a word."""
    path = _paddle(tmp_path / "m.onnx")
    with pytest.raises(
        ModelError, match=r"put the infer_cfg\.yml of its export beside it, or state.*MODEL\.yaml"
    ):
        load_model(path)
    state(path, input={"mean": MEAN.tolist(), "std": STD.tolist()})
    way = load_model(path).interpretation.preprocess
    assert way.mean == tuple(MEAN.tolist())
    assert way.scale == pytest.approx(1 / 255)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([RESIZE | {"target_size": [640, 640]}, PLAIN], r"for pictures of \[640, 640\], but the model takes"),
        ([RESIZE | {"keep_ratio": True}, PLAIN], "asks for Resize with keep_ratio"),
        ([RESIZE, {"type": "PadStride", "stride": 32}, PLAIN], "asks for the step PadStride"),
        ([{"type": "LetterBoxResize"}, PLAIN], "asks for the step LetterBoxResize"),
        ([RESIZE], "asks for Preprocess without Resize and NormalizeImage"),
        ([RESIZE, PLAIN | {"norm_type": "min_max"}], "asks for norm_type min_max"),
        ([RESIZE, IMAGENET | {"std": [1, 0, 1]}], "asks for a std of 0"),
        ([RESIZE, IMAGENET | {"mean": ["a", 0, 0]}], "asks for mean:"),
        ([RESIZE, IMAGENET | {"mean": [0.5]}], "asks for mean:"),
        ([{"no": "type"}], "it has no list Preprocess"),
    ],
)
def test_unsupported_steps_in_the_export_file_are_refused(
    tmp_path: Path, steps: list[dict[str, Any]], words: str
) -> None:
    """Among them the file of another export that lies in the same folder."""
    with pytest.raises(ModelError, match=words):
        load_model(_with_export_file(_paddle(tmp_path / "m.onnx"), *steps))


@pytest.mark.parametrize("text", ["a: [", "Preprocess: 3", "- x", ""])
def test_a_damaged_export_file_matters_only_to_models_that_need_it(tmp_path: Path, text: str) -> None:
    """A model of another family in the same folder is not concerned."""
    (tmp_path / "infer_cfg.yml").write_text(text)
    with pytest.raises(ModelError, match=r"infer_cfg\.yml"):
        load_model(_paddle(tmp_path / "m.onnx"))
    load_model(TinyDetector().save(tmp_path / "other.onnx"))


def test_a_mean_that_the_graph_subtracts_needs_no_export_file(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("image", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    graph.input("scale_factor", "float32", 1, 2)
    scaled = graph.add("Mul", picture, graph.constant(np.reshape(1 / (255 * STD), (1, 3, 1, 1))))
    normal = graph.add("Sub", scaled, graph.constant(np.reshape(MEAN / STD, (1, 3, 1, 1))))
    rows = graph.add("Reshape", _first(graph, normal), graph.whole(-1))
    rows = graph.add("Slice", rows, graph.whole(0), graph.whole(60), graph.whole(0))
    graph.output(graph.add("Reshape", rows, graph.whole(10, 6)), "rows", "float32", 10, 6)
    way = load_model(graph.save(tmp_path / "m.onnx")).interpretation.preprocess
    assert (way.scale, way.mean, way.std) == (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _transformer(path: Path, side: int = 3) -> Path:
    """PaddleDetection's RT-DETR: always so many rows, boxes scaled by im_shape / scale_factor."""
    graph = Graph()
    picture = graph.input("image", "float32", "N", 3, HEIGHT_PX, WIDTH_PX)
    size = graph.input("im_shape", "float32", "N", 2)
    scale = graph.input("scale_factor", "float32", "N", 2)
    attended = graph.attend(graph.features(picture, 20 * 6, side=side), 20, 6)
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
    return graph.save(path)


def test_a_resnet_before_a_transformer_is_not_read_as_rt_detr(tmp_path: Path) -> None:
    """DETR and DINO give the very same outputs, and take ImageNet's mean off."""
    with pytest.raises(ModelError, match=r"infer_cfg\.yml"):
        load_model(_transformer(tmp_path / "dino.onnx", side=7))


def test_a_transformer_without_suppression_takes_pixels_of_0_to_1(tmp_path: Path) -> None:
    path = _transformer(tmp_path / "rtdetr.onnx")
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


def test_the_original_picture_size_is_not_read_as_a_scale_factor(tmp_path: Path) -> None:
    """(w, h) as whole numbers is RT-DETR's second input; a list of six columns does not go with it."""
    graph = Graph()
    picture = graph.input("image", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    sizes = graph.input("orig_target_sizes", "int64", 1, 2)
    flat = graph.add("Reshape", _first(graph, picture), graph.whole(-1))
    six = graph.add("Slice", flat, graph.whole(0), graph.whole(60), graph.whole(0))
    moved = graph.add("Add", six, graph.add("ReduceMax", graph.add("Cast", sizes, to=1)))
    graph.output(graph.add("Reshape", moved, graph.whole(10, 6)), "rows", "float32", 10, 6)
    with pytest.raises(ModelError, match="no detector"):
        load_model(graph.save(tmp_path / "m.onnx"))
