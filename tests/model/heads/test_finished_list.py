"""Finished lists as torchvision, Azure AutoML, detectron2 and MMDeploy write them."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX, COUNT = 96, 64, 12
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BGR_MEAN = (103.53, 116.28, 123.675)
Kind = Literal["torchvision", "automl", "detectron2", "mmdeploy"]


def _made(path: Path, kind: Kind, *, batch: bool = False, normalises: bool | None = None) -> Path:
    """A network that prepares its picture as that tool's exports do and ends as they end."""
    graph = Graph(13)
    sides = (3, HEIGHT_PX, WIDTH_PX)
    picture = graph.input("image", "float32", *((1, *sides) if batch else sides))
    whole = picture if batch else graph.add("Unsqueeze", picture, graph.whole(0))
    if normalises if normalises is not None else kind in ("torchvision", "detectron2"):
        mean, std = (RGB_MEAN, RGB_STD) if kind == "torchvision" else (BGR_MEAN, (1.0, 1.0, 1.0))
        less = graph.add("Sub", whole, graph.constant(np.reshape(mean, (1, 3, 1, 1))))
        whole = graph.add("Div", less, graph.constant(np.reshape(std, (1, 3, 1, 1))))
    if kind == "torchvision":  # its size is worked out from the picture's
        shape = graph.add("Cast", graph.add("Shape", whole), to=1)
        larger = graph.add("Cast", graph.add("Mul", shape, graph.constant([1, 1, 1.5, 1.5])), to=7)
        whole = graph.add("Resize", whole, "", "", larger)
    corners = graph.add("Reshape", graph.features(whole, COUNT * 4), graph.whole(COUNT, 4))
    boxes = graph.add("Mul", graph.add("Abs", corners), graph.constant([10, 8, 40, 30]))
    logits = graph.add("Reshape", graph.features(whole, COUNT * 6), graph.whole(COUNT, 6))
    head = graph.add("Gemm", logits, graph.noise(5, 6), graph.noise(5), transB=1)
    likely = graph.add("Softmax", head, axis=-1)
    best = graph.add(
        "TopK",
        graph.add("Slice", likely, graph.whole(1), graph.whole(5), graph.whole(1)),
        graph.whole(1),
        outputs=2,
    )
    scores = graph.add("Squeeze", best, graph.whole(1))
    labels = graph.add("Squeeze", f"{best}.1", graph.whole(1))
    if kind in ("torchvision", "automl"):
        labels = graph.add("Add", labels, graph.whole(1))
    if kind == "mmdeploy":
        dets = graph.add("Concat", boxes, graph.add("Unsqueeze", scores, graph.whole(1)), axis=1)
        graph.output(graph.add("Unsqueeze", dets, graph.whole(0)), "dets", "float32", 1, COUNT, 5)
        graph.output(graph.add("Unsqueeze", labels, graph.whole(0)), "labels", "int64", 1, COUNT)
        return graph.save(path)
    # The names lie: what counts is the shapes.
    graph.output(boxes, "scores", "float32", "n", 4)
    graph.output(scores, "boxes", "float32", "n")
    graph.output(labels, "labels", "int64", "n")
    if kind == "detectron2":
        graph.output(graph.whole(HEIGHT_PX, WIDTH_PX), "size", "int64", 2)
    return graph.save(path, producer="pytorch")


def _wanted(
    path: Path, pictures: NDArray[np.uint8], *, bgr: bool, scale: float, batch: bool
) -> NDArray[np.float64]:
    pixels = (pictures if bgr else pictures[..., ::-1]).astype(np.float32) * np.float32(scale)
    tensor = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    given = network(path, {"image": tensor if batch else tensor[0]})
    rows = zip(given["scores"].tolist(), given["boxes"].tolist(), given["labels"].tolist(), strict=True)
    return by_score([(*box, score, label) for box, score, label in rows])


@pytest.mark.parametrize("batch", [False, True])
def test_a_detector_of_torchvision_gets_pixels_of_0_to_1_and_its_classes_count_from_1(
    tmp_path: Path, batch: bool
) -> None:
    """With or without a batch in front of its picture; the graph resizes and scales boxes back itself."""
    path = _made(tmp_path / "m.onnx", "torchvision", batch=batch)
    (tmp_path / "labels.txt").write_text("cat\ndog\nfish\nbird\n")
    model = load_model(path)
    assert (model.head, model.interpretation.needs_nms) == ("torchvision", False)
    assert model.labels == ("background", "cat", "dog", "fish", "bird")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    wanted = _wanted(path, pictures, bgr=False, scale=1 / 255, batch=batch)
    np.testing.assert_allclose(compiled_rows(model, pictures)[0, :COUNT], wanted, rtol=1e-4, atol=1e-3)


def test_labels_may_include_or_omit_the_background_but_their_number_must_match(tmp_path: Path) -> None:
    """Its last layer tells that there are five, the background among them."""
    path = _made(tmp_path / "m.onnx", "torchvision")
    for words in (["__background__", "a", "b", "c", "d"], ["a", "b", "c", "d"]):
        state(path, labels=words)
        assert load_model(path).labels[1:] == ("a", "b", "c", "d")
    state(path, labels=["a", "b", "c"])
    with pytest.raises(ModelError, match=r"4 classes \(and the background\), but m\.yaml names 3"):
        load_model(path)


def test_an_automl_detector_is_preprocessed_like_its_own_script(tmp_path: Path) -> None:
    """The labels.json that it puts beside the model tells: stretched, ImageNet's mean taken off."""
    path = _made(tmp_path / "model.onnx", "automl", batch=True)
    with pytest.raises(ModelError, match=r"for Azure AutoML put its labels\.json beside it"):
        load_model(path)
    (tmp_path / "labels.json").write_text(json.dumps(["--bg--", "can", "carton", "milk", "bottle"]))
    model = load_model(path)
    way = model.interpretation.preprocess
    assert (way.fit, way.color, way.mean, way.std) == ("stretch", "rgb", RGB_MEAN, RGB_STD)
    assert model.labels[1:] == ("can", "carton", "milk", "bottle")


def test_a_detector_of_detectron2_gets_bgr_and_its_classes_count_from_0(tmp_path: Path) -> None:
    """The order of the mean that it subtracts tells the order of its colours."""
    path = _made(tmp_path / "m.onnx", "detectron2")
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    model = load_model(path)
    assert (model.head, model.labels) == ("detectron2", ("a", "b", "c", "d"))
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    wanted = _wanted(path, pictures, bgr=True, scale=1.0, batch=False)
    np.testing.assert_allclose(compiled_rows(model, pictures)[0, :COUNT], wanted, rtol=1e-4, atol=1e-3)


def test_an_mmdeploy_model_needs_stated_preprocessing(tmp_path: Path) -> None:
    """Its means stand in a configuration that does not come with the file."""
    path = _made(tmp_path / "m.onnx", "mmdeploy", batch=True)
    with pytest.raises(ModelError, match=r"state input\.scale, input\.mean and input\.std"):
        load_model(path)
    state(path, input={"color": "bgr", "scale": 1, "mean": list(BGR_MEAN), "std": [57.375, 57.12, 58.395]})
    model = load_model(path)
    assert model.head == "mmdeploy"
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    pixels = (pictures.astype(np.float32) - np.array(BGR_MEAN, np.float32)) / np.array(
        [57.375, 57.12, 58.395], np.float32
    )
    given: dict[str, Any] = network(
        path, {"image": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32))}
    )
    rows = [
        (*dets, label)
        for dets, label in zip(given["dets"][0].tolist(), given["labels"][0].tolist(), strict=True)
    ]
    np.testing.assert_allclose(
        compiled_rows(model, pictures)[0, :COUNT], by_score(rows), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1, 2]", "[" * 10_000])
def test_an_invalid_labels_json_gives_a_one_line_error(tmp_path: Path, text: str) -> None:
    """It is named, with what to do."""
    path = _made(tmp_path / "m.onnx", "torchvision")
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ModelError, match=r"labels\.json: is no JSON list of labels"):
        load_model(path)
