"""Azure Custom Vision's exports: a raw map or a list, and what lies beside them."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.model.model import load_model

SIDE_PX = 96
COLUMNS = SIDE_PX // 32
CLASSES = 4
ANCHORS = [(0.573, 0.677), (1.87, 2.06), (3.34, 5.47), (7.88, 3.53), (9.77, 9.17)]

BYTES = {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": "NominalRange_0_255"}
PARTS = {"Image.BitmapPixelFormat": "Rgb8", "Image.NominalPixelRange": "Normalized_0_1"}


def _compact(
    path: Path,
    *,
    anchors: int = 5,
    classes: int = CLASSES,
    size: Sequence[int | str] = (SIDE_PX, SIDE_PX),
    scaled: bool = False,
    opset: int = 11,
    **model: Any,
) -> Path:
    """*General (compact)*: a raw map at stride 32, its channels left open as exports do."""
    graph = Graph(opset)
    picture = graph.input("data", "float32", "None", 3, *size)
    if scaled:
        picture = graph.add("Mul", picture, graph.constant(1 / 255))
    width = anchors * (5 + classes)
    top = 255 if "0_255" in model.get("metadata", {}).get("Image.NominalPixelRange", "") else 1
    small = graph.add("Conv", picture, graph.noise(6, 3, 8, 8, scale=0.2 / top), strides=[8, 8])
    deep = graph.add("LeakyRelu", small)
    made = graph.add("Conv", deep, graph.noise(width, 6, 4, 4, scale=0.1), graph.noise(width), strides=[4, 4])
    sides = [side // 32 if isinstance(side, int) else "None" for side in size]
    graph.output(made, "model_outputs0", "float32", "None", "None2", *sides)
    return graph.save(path, **model)


def _tensor(pictures: NDArray[np.uint8], *, bgr: bool, top: int) -> NDArray[np.float32]:
    ordered = pictures if bgr else pictures[..., ::-1]
    planes = np.ascontiguousarray(ordered.transpose(0, 3, 1, 2)).astype(np.float32)
    return planes if top == 255 else planes / np.float32(255)


def _slow(
    table: NDArray[np.float32], anchors: Sequence[tuple[float, float]], sigmoid: bool = False
) -> NDArray[np.float64]:
    """Rows by Custom Vision's own definition: offsets from a cell, sizes in anchors, a softmax."""
    rows = []
    width = len(table) // len(anchors)
    for index, (wide, tall) in enumerate(anchors):
        for row in range(table.shape[1]):
            for column in range(table.shape[2]):
                cell = table[index * width : (index + 1) * width, row, column].astype(np.float64).tolist()
                x, y, w, h, objectness, *logits = cell
                if sigmoid:
                    x, y = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
                x, y = (x + column) * 32, (y + row) * 32
                w, h = math.exp(w) * wide * 32, math.exp(h) * tall * 32
                powers = [math.exp(logit - max(logits)) for logit in logits]
                scores = [power / sum(powers) / (1 + math.exp(-objectness)) for power in powers]
                label = max(range(len(scores)), key=lambda i: scores[i])
                rows.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, scores[label], label))
    return by_score(rows)


def _agree(rows: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(rows[:, 4], expected[:, 4], atol=1e-5)
    np.testing.assert_array_equal(rows[:, 5], expected[:, 5])
    np.testing.assert_allclose(rows[:, :4], expected[:, :4], atol=1e-3, rtol=1e-5)


def _manifest(folder: Path, **keys: Any) -> None:
    document = {"DomainType": "ObjectDetection", "Platform": "ONNX", "ModelFileName": "model.onnx", **keys}
    (folder / "cvexport.manifest").write_text(json.dumps(document))


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
def test_exports_of_old_opsets_are_converted(tmp_path: Path, opset: int) -> None:
    """Custom Vision offers no other opset, so its users cannot export anew."""
    path = _compact(tmp_path / "model.onnx", metadata=PARTS, opset=opset)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    pictures = noise_pictures(1, SIDE_PX, SIDE_PX)
    table = network(path, {"data": _tensor(pictures, bgr=False, top=1)})["model_outputs0"][0]
    model = load_model(path)
    assert model.head == "customvision"
    _agree(compiled_rows(model, pictures)[0], _slow(table, ANCHORS))


@pytest.mark.parametrize(("metadata", "bgr", "top"), [(BYTES, True, 255), (PARTS, False, 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_compact_export_is_decoded_as_defined(
    tmp_path: Path, metadata: dict[str, str], bgr: bool, top: int, count: int
) -> None:
    """Colours and range are those of the metadata, pictures are stretched, anchors are the usual ones."""
    path = _compact(tmp_path / "model.onnx", metadata=metadata)
    model = load_model(path)
    assert (model.head, model.interpretation.class_count, model.input.fit) == (
        "customvision",
        CLASSES,
        "stretch",
    )
    assert model.interpretation.needs_nms
    pictures = noise_pictures(count, SIDE_PX, SIDE_PX)
    for rows, tensor in zip(compiled_rows(model, pictures), _tensor(pictures, bgr=bgr, top=top), strict=True):
        (table,) = network(path, {"data": tensor[None]}).values()
        _agree(rows, _slow(table[0], ANCHORS))


def test_anchors_and_labels_come_from_the_files_beside_the_model(tmp_path: Path, shared_data: Path) -> None:
    """With the manifest and the labels of a real export."""
    for name in ("cvexport.manifest", "labels.txt"):
        shutil.copy(shared_data / "customvision" / name, tmp_path / name)
    metadata = {"Image.NominalPixelRange": "NominalRange_0_255"}
    path = _compact(tmp_path / "model.onnx", classes=20, size=(416, 416), metadata=metadata)
    model = load_model(path)
    assert (model.labels[0], model.labels[-1], len(model.labels)) == ("aeroplane", "tvmonitor", 20)
    assert "anchors as cvexport.manifest says" in model.evidence
    assert model.interpretation.preprocess.color == "rgb"
    pictures = noise_pictures(1, 416, 416)
    (table,) = network(path, {"data": _tensor(pictures, bgr=False, top=255)}).values()
    anchors = [(1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52)]
    expected = _slow(table[0], anchors)
    _agree(compiled_rows(model, pictures)[0], expected[:500])


def test_an_open_input_takes_its_size_from_the_manifest(tmp_path: Path) -> None:
    _manifest(tmp_path, ScaleWidth=160, ScaleHeight=96)
    path = _compact(tmp_path / "model.onnx", size=("h", "w"), metadata=BYTES)
    assert (load_model(path).input.width_px, load_model(path).input.height_px) == (160, 96)


def test_anchors_may_come_from_the_metadata_or_from_model_yaml(tmp_path: Path) -> None:
    own = "[1.0, 1.0, 2.0, 2.0]"
    metadata = {**BYTES, "CustomVision.Postprocess.Yolo.Biases": own}
    path = _compact(tmp_path / "model.onnx", anchors=2, metadata=metadata)
    pictures = noise_pictures(1, SIDE_PX, SIDE_PX)
    (table,) = network(path, {"data": _tensor(pictures, bgr=True, top=255)}).values()
    _agree(compiled_rows(load_model(path), pictures)[0], _slow(table[0], [(1, 1), (2, 2)]))
    state(path, anchors=[[3, 3], [4, 4]])
    _agree(compiled_rows(load_model(path), pictures)[0], _slow(table[0], [(3, 3), (4, 4)]))


def test_centres_pass_a_sigmoid_if_stated(tmp_path: Path) -> None:
    """As the region layer of YOLOv2 has it, which looks the same from outside."""
    metadata = {**BYTES, "visionedge.decode": json.dumps({"centre": "sigmoid"})}
    path = _compact(tmp_path / "model.onnx", metadata=metadata)
    pictures = noise_pictures(1, SIDE_PX, SIDE_PX)
    (table,) = network(path, {"data": _tensor(pictures, bgr=True, top=255)}).values()
    _agree(compiled_rows(load_model(path), pictures)[0], _slow(table[0], ANCHORS, sigmoid=True))


def test_an_unknown_value_range_is_refused(tmp_path: Path) -> None:
    """Pixels of 0-255 and of 0-1 are both common; stating it helps."""
    _manifest(tmp_path)
    path = _compact(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"range of pixels.*input\.scale"):
        load_model(path)
    state(path, input={"scale": 1.0, "color": "bgr"})
    assert load_model(path).interpretation.preprocess.color == "bgr"


def test_contradictory_colour_orders_are_refused(tmp_path: Path) -> None:
    _manifest(tmp_path, InputFormat="RGB")
    with pytest.raises(ModelError, match="order of colours"):
        load_model(_compact(tmp_path / "model.onnx", metadata=BYTES))


def test_the_manifest_of_another_model_is_not_read(tmp_path: Path) -> None:
    _manifest(tmp_path, ModelFileName="other.onnx", Anchors=[[1, 1]])
    assert (
        "anchors as all exports have them"
        in load_model(_compact(tmp_path / "model.onnx", metadata=BYTES)).evidence
    )


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_manifest_is_named_in_the_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "cvexport.manifest").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"cvexport\.manifest"):
        load_model(_compact(tmp_path / "model.onnx", metadata=BYTES))


@pytest.mark.parametrize(
    ("keys", "manifest"),
    [
        ({}, None),
        ({"metadata": BYTES, "scaled": True}, None),
        ({"metadata": BYTES, "anchors": 3}, None),
        ({"metadata": BYTES}, {"DomainType": "Classification"}),
    ],
)
def test_raw_maps_of_others_are_refused(
    tmp_path: Path, keys: dict[str, Any], manifest: dict[str, Any] | None
) -> None:
    """Nothing says Custom Vision; it scales pixels itself as TinyYOLOv2 does; other anchors; a classifier."""
    if manifest is not None:
        _manifest(tmp_path, **manifest)
    with pytest.raises(ModelError, match="no detector"):
        load_model(_compact(tmp_path / "model.onnx", **keys))


def _s1(path: Path, names: Sequence[str], *, rank: int, dtype: str = "int64", **model: Any) -> Path:
    """*General (compact) [S1]*: the best 8 boxes of 0-1 with their classes and scores."""
    graph = Graph(11)
    picture = graph.input("image_tensor", "float32", 1, 3, SIDE_PX, SIDE_PX)
    first = graph.add("Sigmoid", graph.features(picture, 2 * 9))
    first = graph.add(
        "Add", graph.add("Reshape", first, graph.whole(-1, 9, 2)), graph.noise(9, 2, scale=0.05)
    )
    boxes = graph.add("Concat", first, graph.add("Add", first, graph.constant(0.2)), axis=2)
    scores = graph.add("Sigmoid", graph.features(picture, 9 * CLASSES))
    hits = graph.add("TopK", scores, graph.whole(8), outputs=2)
    divisor = graph.constant(9, "int64")
    label, row = graph.add("Div", f"{hits}.1", divisor), graph.add("Mod", f"{hits}.1", divisor)
    chosen = graph.add("Gather", boxes, graph.add("Reshape", row, graph.whole(8)), axis=1)
    label = graph.add("Cast", label, to=7 if dtype == "int64" else 1)
    made = [(chosen, "float32", (1, 8, 4)), (label, dtype, (1, 8)), (hits, "float32", (1, 8))]
    for name, (tensor, kind, shape) in zip(names, made, strict=True):
        if rank == 2:
            graph.output(graph.add("Squeeze", tensor, axes=[0]), name, kind, *shape[1:])
        else:
            graph.output(tensor, name, kind, *shape)
    return graph.save(path, **model)


@pytest.mark.parametrize("rank", [3, 2])
@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_s1_gives_a_list_that_is_used_unchanged(tmp_path: Path, rank: int, dtype: str) -> None:
    """Classes are told from scores by type, or by name where both are floats."""
    names = ("detected_boxes", "detected_classes", "detected_scores")
    path = _s1(tmp_path / "model.onnx", names, rank=rank, dtype=dtype, metadata=PARTS)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    model = load_model(path)
    assert (model.head, model.interpretation.needs_nms, model.input.fit) == (
        "customvision-s1",
        False,
        "stretch",
    )
    pictures = noise_pictures(2, SIDE_PX, SIDE_PX)
    for rows, tensor in zip(compiled_rows(model, pictures), _tensor(pictures, bgr=False, top=1), strict=True):
        boxes, classes, scores = (network(path, {"image_tensor": tensor[None]})[name] for name in names)
        expected = [
            (*(box * SIDE_PX).tolist(), score, label)
            for box, label, score in zip(boxes.reshape(-1, 4), classes.ravel(), scores.ravel(), strict=True)
        ]
        np.testing.assert_allclose(rows[: len(expected)], by_score(expected), atol=1e-3)
        assert not rows[len(expected) :, 4].any()


def test_s1_with_unknown_output_names_is_refused(tmp_path: Path) -> None:
    """Two lists of floats: nothing says which are the scores."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_s1(tmp_path / "model.onnx", ("a", "b", "c"), rank=3, dtype="float32", metadata=PARTS))
