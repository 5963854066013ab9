"""Classifiers: one score per class for the whole picture, and the networks that only look like one."""

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from command_line import CommandLine
from tiny_classifiers import RED_OR_BLUE, save_colour_classifier
from tiny_graphs import Graph, by_score, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.model.compiler.build import build_graph
from visionedge.model.heads.classifier import MAX_CLASSES
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import Selection

WIDTH_PX, HEIGHT_PX, CLASSES = 48, 32, 7
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ULTRALYTICS = {"task": "classify", "author": "Ultralytics"}
CUSTOM_VISION = {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": "NominalRange_0_255"}


def _classifier(
    path: Path,
    *,
    classes: int = CLASSES,
    ends_with: str = "Softmax",
    shape: tuple[int | str, ...] | None = None,
    size: tuple[int | str, int | str] = (HEIGHT_PX, WIDTH_PX),
    dtype: str = "float32",
    last: bool = False,
    batch: int | str = "N",
    scales: bool = False,
    producer: str = "pytorch",
    metadata: dict[str, str] | None = None,
    opset: int = 17,
) -> Path:
    """Random layers and one score per class. `shape`: that of the output; `scales`: pixels to -1 … 1."""
    graph = Graph(opset)
    picture = graph.input("input", dtype, batch, *((*size, 3) if last else (3, *size)))
    planes = graph.add("Transpose", picture, perm=[0, 3, 1, 2]) if last else picture
    planes = graph.add("Cast", planes, to=TensorProto.FLOAT) if dtype != "float32" else planes
    if scales:
        planes = graph.add("Mul", planes, graph.constant(np.full((1, 3, 1, 1), 2 / 255)))
        planes = graph.add("Sub", planes, graph.constant(np.ones((1, 3, 1, 1))))
    if shape is not None and len(shape) == 4:
        pooled = graph.add("GlobalAveragePool", graph.add("Relu", graph.conv(planes, 12)))
        scores = graph.add("Conv", pooled, graph.noise(classes, 12, 1, 1, scale=0.7))
    else:
        scores = graph.features(planes, classes)
    if ends_with:
        scores = graph.add(ends_with, scores, **({} if ends_with == "Sigmoid" else {"axis": 1}))
    graph.output(scores, "scores", "float32", *(shape or (batch, classes)))
    return graph.save(path, metadata, producer=producer)


def _slow(
    scores: NDArray[np.float32], ends_with: str, size: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)
) -> NDArray[np.float64]:
    """The rows of a picture, in plain Python: the softmax of logits, each class over the whole picture."""
    values = [float(value) for value in scores.ravel()]
    if ends_with in ("", "LogSoftmax"):
        powers = [math.exp(value - max(values)) for value in values]
        values = [power / sum(powers) for power in powers]
    rows = [(0, 0, *size, value, index) for index, value in enumerate(values)]
    return by_score(rows)[:MAX_CLASSES]


def _tensor(pictures: NDArray[np.uint8], mean: Any, std: Any) -> NDArray[np.float32]:
    ordered = pictures[..., ::-1].astype(np.float64)
    planes: NDArray[np.float64] = ((ordered / 255 - mean) / std).transpose(0, 3, 1, 2)
    return planes.astype(np.float32)


def _refusal(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_with", ["", "Softmax", "LogSoftmax", "Sigmoid"])
@pytest.mark.parametrize("shape", [None, ("N", CLASSES, 1, 1)], ids=["[N, C]", "[N, C, 1, 1]"])
def test_rows_are_the_classes_by_probability_over_the_whole_picture(
    tmp_path: Path, ends_with: str, shape: tuple[int | str, ...] | None
) -> None:
    """Logits get their softmax in the compiled graph; probabilities stay as they are."""
    metadata = {**ULTRALYTICS, "names": str([f"n{i}" for i in range(CLASSES)])}
    model = load_model(_classifier(tmp_path / "c.onnx", ends_with=ends_with, shape=shape, metadata=metadata))
    assert (model.head, model.is_classifier, model.interpretation.class_count) == (
        "classifier",
        True,
        CLASSES,
    )
    assert not model.interpretation.needs_nms
    pictures = noise_pictures(3, WIDTH_PX, HEIGHT_PX)
    for rows, tensor in zip(compiled_rows(model, pictures), _tensor(pictures, 0, 1), strict=True):
        (scores,) = network(model.path, {"input": tensor[None]}).values()
        np.testing.assert_allclose(rows, _slow(scores, ends_with), atol=1e-5)


def test_only_the_best_of_many_classes_are_rows(tmp_path: Path) -> None:
    """A thousand logits without labels are ImageNet's; their labels are the class numbers."""
    model = load_model(_classifier(tmp_path / "c.onnx", classes=1000, ends_with=""))
    assert (model.labels[0], model.labels[-1]) == ("class-0", "class-999")
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    (scores,) = network(model.path, {"input": _tensor(pictures, IMAGENET_MEAN, IMAGENET_STD)}).values()
    [rows] = compiled_rows(model, pictures)
    assert rows.shape == (MAX_CLASSES, 6)
    np.testing.assert_allclose(rows, _slow(scores, ""), atol=1e-5)
    assert compiled_rows(model, pictures, limit=3).shape == (1, 3, 6)


@pytest.mark.parametrize("count", [80, 90, 91])
def test_classes_without_labels_are_not_those_of_coco(tmp_path: Path, count: int) -> None:
    """COCO names objects that are detected."""
    path = _classifier(tmp_path / "c.onnx", classes=count, metadata=ULTRALYTICS)
    assert load_model(path).labels == tuple(f"class-{i}" for i in range(count))


def test_a_background_may_lack_a_label(tmp_path: Path) -> None:
    """Older TensorFlow networks have 1001 classes: ImageNet's, and a background in front."""
    path = _classifier(tmp_path / "c.onnx", classes=1001, ends_with="")
    (tmp_path / "labels.txt").write_text("\n".join(f"n{i}" for i in range(1000)))
    labels = load_model(path).labels
    assert (labels[:2], len(labels)) == (("background", "n0"), 1001)


@pytest.mark.parametrize("ends_with", ["Sigmoid", ""])
def test_a_single_score_is_the_probability_of_the_only_class(tmp_path: Path, ends_with: str) -> None:
    """A binary network: a logit gets a sigmoid, as the softmax of one value is always 1."""
    path = _classifier(tmp_path / "c.onnx", classes=1, ends_with=ends_with)
    state(path, labels=["fire"], input={"scale": 1 / 255})
    model = load_model(path)
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    (scores,) = network(path, {"input": _tensor(pictures, 0, 1)}).values()
    expected = scores if ends_with else 1 / (1 + np.exp(-scores.astype(np.float64)))
    rows = compiled_rows(model, pictures)
    assert model.labels == ("fire",)
    np.testing.assert_allclose(rows[:, 0, 4], expected[:, 0], atol=1e-5)
    assert (rows[:, 0, 5] == 0).all()


@pytest.mark.parametrize(("ends_with", "batch"), [("Softmax", "N"), ("Softmax", 3), ("Sigmoid", 1), ("", 1)])
def test_the_built_graph_is_a_classifier_too(tmp_path: Path, ends_with: Any, batch: int | str) -> None:
    """It passes its trial run in a child process; a fixed batch of one is opened, another one stays."""
    model = load_model(save_colour_classifier(tmp_path / "c.onnx", ends_with=ends_with, batch=batch))
    (tmp_path / "built.onnx").write_bytes(build_graph(model))
    built = load_model(tmp_path / "built.onnx")
    assert built.is_classifier
    assert built.labels == model.labels
    assert built.interpretation.input.batch == (3 if batch == 3 else None)
    pictures = np.zeros((3, 32, 32, 3), np.uint8)
    pictures[0, :, :, 2] = pictures[1, :, :, 0] = pictures[2] = 200
    rows = compiled_rows(built, pictures)
    yes = [dict(zip(each[:, 5].tolist(), each[:, 4].tolist(), strict=True))[0] for each in rows]
    np.testing.assert_allclose(yes, [1, 0, 0.5], atol=1e-4)


def test_the_box_is_the_input_also_if_the_graph_resizes_its_picture(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("input", "float32", 1, 3, 64, 96)
    small = graph.add("Resize", picture, "", "", graph.whole(1, 3, 32, 48), mode="linear")
    graph.output(graph.add("Softmax", graph.features(small, 2), axis=1), "scores", "float32", 1, 2)
    model = load_model(graph.save(tmp_path / "m.onnx", ULTRALYTICS))
    rows = compiled_rows(model, noise_pictures(1, 96, 64))[0]
    assert (model.input.width_px, model.input.height_px) == (96, 64)
    assert rows[:, :4].tolist() == [[0, 0, 96, 64]] * 2


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(640, 360), (33, 200)])
def test_a_detection_is_the_whole_picture(tmp_path: Path, fit: str, size: tuple[int, int]) -> None:
    """Also in a letterbox; suppression does not remove the other classes."""
    path = save_colour_classifier(tmp_path / "c.onnx")
    state(path, input={"fit": fit})
    model = load_model(path)
    rows = compiled_rows(model, np.full((1, 32, 32, 3), 99, np.uint8))[0]
    found = Selection.of(model, 0.1, 0.5).apply(rows, model.input.place(*size))
    assert found.boxes.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert sorted(found.class_ids.tolist()) == [0, 1]


def test_the_commands_take_a_classifier_as_any_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model inspect`, `detect`, and `model compile` in integers, whose file is used by `detect`."""
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "data"))
    visionedge = CommandLine(capsys)
    path = save_colour_classifier(tmp_path / "c.onnx")
    shown = visionedge("model", "inspect", path)
    assert shown.code == 0
    assert "Recognised as classifier" in shown.out
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(12):
        picture = np.full((40, 80, 3), 30, np.uint8)
        picture[..., 0 if number % 2 else 2] = 120 + number
        cv2.imwrite(str(pictures / f"{number:02}.png"), picture)
    assert visionedge("model", "compile", path, "--precision", "int8", "--calibrate", pictures).code == 0
    for precision in ("fp32", "int8"):
        outcome = visionedge("detect", pictures, "--json", "--model", path, "--precision", precision)
        found = [json.loads(line)["detections"] for line in outcome.out.splitlines()]
        assert [one["label"] for [one] in found] == list(RED_OR_BLUE) * 6
        box = {"left": 0.0, "top": 0.0, "width": 1.0, "height": 1.0}
        assert all(one["box"] == box and one["confidence"] > 0.9 for [one] in found)


# --- preparation --------------------------------------------------------------------------------------------


def _preparation(model: Model) -> tuple[str, float, tuple[float, ...], tuple[float, ...]]:
    used = model.interpretation.preprocess
    return used.color, used.scale, used.mean, used.std


PLAIN = ("rgb", 1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = ("rgb", 1 / 255, IMAGENET_MEAN, IMAGENET_STD)


def test_ultralytics_classifiers_take_pixels_of_one(tmp_path: Path) -> None:
    metadata = {**ULTRALYTICS, "names": str(dict(enumerate("abcdefg"))), "imgsz": "[32, 48]"}
    model = load_model(_classifier(tmp_path / "c.onnx", size=("height", "width"), metadata=metadata))
    assert model.labels == tuple("abcdefg")
    assert _preparation(model) == PLAIN
    assert (model.input.width_px, model.input.height_px, model.input.fit) == (WIDTH_PX, HEIGHT_PX, "stretch")


@pytest.mark.parametrize(("producer", "ends_with"), [("pytorch", ""), ("Paddle", "Softmax")])
def test_the_usual_mean_is_taken_for_logits_of_pytorch_and_for_paddle(
    tmp_path: Path, producer: str, ends_with: str
) -> None:
    """torchvision, timm, PaddleClas: the evidence says that it is not visible."""
    path = _classifier(tmp_path / "c.onnx", ends_with=ends_with, producer=producer)
    (tmp_path / "c.labels.txt").write_text("\n".join("abcdefg"))
    model = load_model(path)
    assert _preparation(model) == IMAGENET
    assert model.labels == tuple("abcdefg")
    assert any("not visible: ImageNet's mean" in clause for clause in model.evidence)


@pytest.mark.parametrize(
    ("producer", "last", "ends_with"),
    [("pytorch", False, "Softmax"), ("tf2onnx", True, "Softmax"), ("", False, "Softmax")],
    ids=["PyTorch with a softmax", "Keras", "unknown"],
)
def test_an_invisible_preparation_is_not_guessed(
    tmp_path: Path, producer: str, last: bool, ends_with: str
) -> None:
    """Ultralytics and torchvision differ, and so do the networks of Keras; MODEL.yaml decides."""
    path = _classifier(tmp_path / "c.onnx", producer=producer, last=last, ends_with=ends_with)
    with pytest.raises(ModelError, match=r"how its pixels were scaled.*input\.scale.*MODEL\.yaml") as error:
        load_model(path)
    assert error.value.state is not None
    assert len(error.value.state) == 3
    state(path, input={"scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3})
    model = load_model(path)
    assert _preparation(model) == ("rgb", 1 / 255, (0.5,) * 3, (0.5,) * 3)
    assert model.input.resample == ("bilinear" if last else "antialias")


@pytest.mark.parametrize("producer", ["pytorch", "tf2onnx"])
def test_a_network_that_scales_its_picture_needs_no_statement(tmp_path: Path, producer: str) -> None:
    """Keras' Rescaling layer, or a normalisation in front of the network."""
    path = _classifier(tmp_path / "c.onnx", producer=producer, last=producer == "tf2onnx", scales=True)
    assert _preparation(load_model(path)) == ("rgb", 1.0, (0.0,) * 3, (1.0,) * 3)


def test_a_network_that_takes_bytes_needs_no_statement(tmp_path: Path) -> None:
    path = _classifier(tmp_path / "c.onnx", dtype="uint8", last=True, producer="tf2onnx")
    model = load_model(path)
    assert _preparation(model)[1] == 1.0
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    (scores,) = network(path, {"input": pictures[..., ::-1]}).values()
    np.testing.assert_allclose(compiled_rows(model, pictures)[0], _slow(scores, "Softmax"), atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (CUSTOM_VISION, ("bgr", 1.0, (0.0,) * 3, (1.0,) * 3)),
        ({"Image.BitmapPixelFormat": "Rgb8", "Image.NominalPixelRange": "Normalized_0_1"}, PLAIN),
    ],
)
@pytest.mark.parametrize("manifest", [False, True])
def test_custom_vision_states_the_preparation_in_its_metadata(
    tmp_path: Path, metadata: dict[str, str], expected: tuple[Any, ...], manifest: bool
) -> None:
    """Labels are those of the archive."""
    path = _classifier(tmp_path / "model.onnx", producer="", metadata=metadata)
    (tmp_path / "labels.txt").write_text("\n".join("abcdefg"))
    if manifest:
        document = {"DomainType": "Classification", "Platform": "ONNX", "ModelFileName": "model.onnx"}
        (tmp_path / "cvexport.manifest").write_text(json.dumps(document))
    model = load_model(path)
    assert model.labels == tuple("abcdefg")
    assert (_preparation(model), model.input.fit) == (expected, "stretch")


def test_a_manifest_for_detection_is_not_read_as_a_classifier(tmp_path: Path) -> None:
    path = _classifier(tmp_path / "model.onnx", producer="", metadata=CUSTOM_VISION)
    (tmp_path / "cvexport.manifest").write_text(json.dumps({"DomainType": "ObjectDetection"}))
    assert "is not a detector" in _refusal(path)


@pytest.mark.parametrize("opset", [7, 9, 17])
@pytest.mark.parametrize("named", [True, False])
def test_a_map_of_labels_at_the_end_is_opened(tmp_path: Path, opset: int, named: bool) -> None:
    """Custom Vision's older exports output the best label and a map (`classLabel` and `loss`)."""
    scores = _classifier(tmp_path / "scores.onnx", metadata=CUSTOM_VISION, opset=opset)
    expected = load_model(scores)
    proto = onnx.load(scores)
    graph, labels = proto.graph, list("abcdefg")
    del graph.output[:]
    names = numpy_helper.from_array(np.array(labels, object), "labels")
    graph.initializer.append(names)
    attributes = {"classlabels_strings": labels} if named else {"classlabels_int64s": list(range(CLASSES))}
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=1),
            helper.make_node(
                "ArrayFeatureExtractor", ["labels", "best"], ["classLabel"], domain="ai.onnx.ml"
            ),
            helper.make_node("ZipMap", ["scores"], ["loss"], domain="ai.onnx.ml", **attributes),
        ]
    )
    key = TensorProto.STRING if named else TensorProto.INT64
    kind = helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph.output.append(helper.make_tensor_value_info("classLabel", TensorProto.STRING, [1, 1]))
    graph.output.append(helper.make_value_info("loss", helper.make_sequence_type_proto(kind)))
    proto.opset_import.add(domain="ai.onnx.ml", version=1)
    onnx.save(proto, tmp_path / "mapped.onnx")
    model = load_model(tmp_path / "mapped.onnx")
    assert model.labels == (tuple(labels) if named else tuple(f"class-{i}" for i in range(CLASSES)))
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    np.testing.assert_array_equal(compiled_rows(model, pictures), compiled_rows(expected, pictures))


# --- neighbours and bad models ------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 6, 7, 8, 84, 85, 300])
@pytest.mark.parametrize("batch", ["N", 1])
def test_no_number_of_classes_makes_a_classifier_a_detector(
    tmp_path: Path, classes: int, batch: int | str
) -> None:
    """Lists of six or seven columns and tables of 4 + 80 are detectors' outputs of other ranks."""
    ends_with = "Softmax" if classes > 1 else "Sigmoid"
    path = _classifier(tmp_path / "c.onnx", classes=classes, ends_with=ends_with, batch=batch)
    state(path, input={"scale": 1 / 255})
    assert load_model(path).is_classifier


def _embedding(path: Path, kind: str) -> Path:
    graph = Graph()
    vector = graph.features(graph.input("input", "float32", 1, 3, HEIGHT_PX, WIDTH_PX), 512)
    if kind == "normalised":
        vector = graph.add("Div", vector, graph.add("ReduceL2", vector, axes=[1], keepdims=1))
    graph.output(vector, "features", "float32", 1, 512)
    return graph.save(path, producer="pytorch")


def test_an_embedding_is_no_classifier(tmp_path: Path) -> None:
    """Unless its owner says so: 512 logits without labels have the same graph."""
    message = _refusal(_embedding(tmp_path / "e.onnx", "plain"))
    assert "may be an embedding or measurements" in message
    assert "head: classifier" in message
    state(tmp_path / "e.onnx", head="classifier")
    assert load_model(tmp_path / "e.onnx").is_classifier


def test_a_normalised_embedding_is_never_a_classifier(tmp_path: Path) -> None:
    path = _embedding(tmp_path / "e.onnx", "normalised")
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(512))))
    state(path, head="classifier")
    assert "it ends with Div, ReduceL2, which" in _refusal(path)


def test_measurements_of_sigmoids_are_no_classifier(tmp_path: Path) -> None:
    """Four sigmoids can be a box of 0-1; with labels they are classes that do not exclude each other."""
    path = _classifier(tmp_path / "c.onnx", classes=4, ends_with="Sigmoid")
    state(path, input={"scale": 1 / 255})
    assert "may be an embedding or measurements" in _refusal(path)
    state(path, input={"scale": 1 / 255}, labels=list("abcd"))
    assert load_model(path).is_classifier


@pytest.mark.parametrize("kind", ["segmentation", "pose", "text"])
def test_other_tasks_are_no_classifier(tmp_path: Path, kind: str) -> None:
    """A map of classes, a list of points, and letters along a line, each behind a softmax."""
    graph = Graph()
    picture = graph.input("input", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    if kind == "segmentation":
        made = graph.add("Softmax", graph.conv(picture, CLASSES, stride=16), axis=1)
        graph.output(made, "map", "float32", 1, CLASSES, 2, 3)
    else:
        rows = (17, 3) if kind == "pose" else (12, 40)
        made = graph.add("Reshape", graph.features(picture, rows[0] * rows[1]), graph.whole(1, *rows))
        graph.output(graph.add("Softmax", made, axis=-1), "rows", "float32", 1, *rows)
    path = graph.save(tmp_path / "m.onnx", {"names": str(list("abcdefg"))}, producer="pytorch")
    assert "is not a detector or classifier of a supported family" in _refusal(path)


def test_further_outputs_are_refused(tmp_path: Path) -> None:
    graph = Graph()
    vector = graph.features(graph.input("input", "float32", 1, 3, HEIGHT_PX, WIDTH_PX), CLASSES)
    graph.output(graph.add("Softmax", vector, axis=1), "scores", "float32", 1, CLASSES)
    graph.output(vector, "features", "float32", 1, CLASSES)
    assert "more outputs than scores of classes" in _refusal(graph.save(tmp_path / "m.onnx"))


def test_scores_behind_unknown_last_nodes_are_refused(tmp_path: Path) -> None:
    """Whether a scaled softmax gives probabilities cannot be known: no second softmax is laid over it."""
    graph = Graph()
    vector = graph.features(graph.input("input", "float32", 1, 3, HEIGHT_PX, WIDTH_PX), CLASSES)
    made = graph.add("Mul", graph.add("Softmax", vector, axis=1), graph.constant(100.0))
    graph.output(made, "percent", "float32", 1, CLASSES)
    path = graph.save(tmp_path / "m.onnx", {**ULTRALYTICS, "names": str(list("abcdefg"))})
    assert "it ends with Mul, Softmax, which" in _refusal(path)


def _open_classifier(path: Path, declared: int | str) -> Path:
    """Its number of classes is not visible: a constant chooses them."""
    graph = Graph()
    vector = graph.features(graph.input("input", "float32", "N", 3, HEIGHT_PX, WIDTH_PX), 9)
    chosen = graph.add("Compress", vector, graph.constant([1] * CLASSES + [0, 0], "bool"), axis=1)
    graph.output(graph.add("Softmax", chosen, axis=1), "scores", "float32", "N", declared)
    return graph.save(path, ULTRALYTICS)


@pytest.mark.parametrize("declared", ["C", 0], ids=["open", "0"])
def test_an_open_number_of_classes_needs_labels(tmp_path: Path, declared: int | str) -> None:
    """A wrong number of them shows in the trial run."""
    path = _open_classifier(tmp_path / "c.onnx", declared)
    assert "its number of classes is open; state its labels" in _refusal(path)
    state(path, labels=list("abcdefg"))
    model = load_model(path)
    pictures = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    (scores,) = network(path, {"input": _tensor(pictures, 0, 1)}).values()
    np.testing.assert_allclose(compiled_rows(model, pictures)[0], _slow(scores, "Softmax"), atol=1e-5)
    state(path, labels=list("abcd"))
    with pytest.raises(ModelError, match="cannot be run"):
        build_graph(load_model(path))


def test_labels_that_yaml_reads_as_booleans_need_quotes(tmp_path: Path) -> None:
    path = save_colour_classifier(tmp_path / "c.onnx")
    path.with_suffix(".yaml").write_text("labels: [yes, no]\n")
    assert "labels: must be words; put quotes around yes, no" in _refusal(path)
    path.with_suffix(".yaml").write_text("labels: ['yes', 'no']\n")
    assert load_model(path).labels == ("yes", "no")


@pytest.mark.parametrize("labels", [3, 8])
def test_a_wrong_number_of_labels_is_an_error(tmp_path: Path, labels: int) -> None:
    path = _classifier(tmp_path / "c.onnx", metadata=ULTRALYTICS)
    state(path, labels=[f"n{i}" for i in range(labels)])
    assert f"it has {CLASSES} classes, but c.yaml names {labels}" in _refusal(path)


def test_an_open_size_is_not_guessed(tmp_path: Path) -> None:
    """640, the usual size of detectors, is no classifier's."""
    path = _classifier(tmp_path / "c.onnx", size=("height", "width"), ends_with="", classes=1000)
    assert "the size of its pictures is open; state input.width" in _refusal(path)
    state(path, input={"width": WIDTH_PX, "height": HEIGHT_PX})
    assert load_model(path).input.width_px == WIDTH_PX


def test_a_classifier_of_grey_pictures_is_reported_as_such(tmp_path: Path) -> None:
    graph = Graph()
    picture = graph.input("input", "float32", 1, 1, HEIGHT_PX, WIDTH_PX)
    pooled = graph.add("GlobalAveragePool", graph.add("Conv", picture, graph.noise(CLASSES, 1, 3, 3)))
    graph.output(graph.add("Softmax", graph.add("Flatten", pooled), axis=1), "scores", "float32", 1, CLASSES)
    assert "grey pictures" in _refusal(graph.save(tmp_path / "m.onnx"))
