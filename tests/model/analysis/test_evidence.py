"""Evidence of preprocessing: it is understood up to the first layer of a graph, or the model is refused.

Each family is held against itself: a network with nodes in front of it must see in a picture what it sees
without them, or be refused with the keys that state what cannot be seen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import detr_models as detr
import raw_map_models as maps
import tiny_yolos as yolos
from tiny_graphs import compiled_rows, noise_pictures, state
from tiny_models import TinyDetector
from visionedge.errors import ModelError
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX = yolos.WIDTH_PX, yolos.HEIGHT_PX

Front = Callable[["Prefix"], None]


class Prefix:
    """Nodes in front of the one picture of a model, which is its input with another name from now on."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        graph = self.model.graph
        (self.picture,) = (v for v in graph.input if len(v.type.tensor_type.shape.dim) == 4)
        self.inner, self.tensor = self.picture.name, "given"
        self.nodes: list[onnx.NodeProto] = []

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; the name of its first output."""
        name = f"front.{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return name

    def then(self, operator: str, *inputs: str, **attributes: Any) -> None:
        """Add a node over the current picture."""
        self.tensor = self.add(operator, self.tensor, *inputs, **attributes)

    def constant(self, values: object, dtype: str = "float32") -> str:
        """A constant."""
        name = f"front.c{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.dtype(dtype)), name))
        return name

    def save(self, path: Path) -> Path:
        """Write the model with the nodes in front."""
        graph = self.model.graph
        self.picture.name = "given"
        body = list(graph.node)
        del graph.node[:]
        last = helper.make_node("Identity", [self.tensor], [self.inner])
        graph.node.extend([*self.nodes, last, *body])
        onnx.save(self.model, path)
        return path


def _with(path: Path, *fronts: Front) -> Path:
    prefix = Prefix(path)
    for front in fronts:
        front(prefix)
    return prefix.save(path.with_name("front.onnx"))


def _divided(prefix: Prefix) -> None:
    prefix.then("Div", prefix.constant(255.0))


def _clipped(prefix: Prefix) -> None:
    prefix.then("Clip", prefix.constant(0.0), prefix.constant(255.0))


def _cut_off(prefix: Prefix) -> None:
    prefix.then("Max", prefix.constant(0.0))
    prefix.then("Min", prefix.constant(255.0))


def _rounded(prefix: Prefix) -> None:
    prefix.then("Cast", to=TensorProto.UINT8)
    prefix.then("Cast", to=TensorProto.FLOAT)


def _split(prefix: Prefix) -> None:
    first = prefix.add("Split", prefix.tensor, outputs=3, axis=1)
    prefix.tensor = prefix.add("Concat", f"{first}.2", f"{first}.1", first, axis=1)


def _gathered(prefix: Prefix) -> None:
    """Channels one by one, as `torch.stack([x[:, 2], x[:, 1], x[:, 0]], 1)` is exported."""
    older = prefix.model.opset_import[0].version < 13
    axes = () if older else (prefix.constant([1], "int64"),)
    said: dict[str, Any] = {"axes": [1]} if older else {}
    planes = [
        prefix.add("Unsqueeze", prefix.add("Gather", prefix.tensor, place, axis=1), *axes, **said)
        for place in (prefix.constant(i, "int64") for i in (2, 1, 0))
    ]
    prefix.tensor = prefix.add("Concat", *planes, axis=1)


def _sliced(prefix: Prefix) -> None:
    axis = prefix.constant([1], "int64")
    planes = [
        prefix.add("Slice", prefix.tensor, *(prefix.constant([n], "int64") for n in (i, i + 1)), axis)
        for i in (2, 1, 0)
    ]
    prefix.tensor = prefix.add("Concat", *planes, axis=1)


def _mixed(prefix: Prefix) -> None:
    """A convolution of 1 x 1 that swaps red and blue and divides."""
    kernel = np.eye(3)[::-1].reshape(3, 3, 1, 1) / 255
    prefix.then("Conv", prefix.constant(kernel))


def _doubled(prefix: Prefix) -> None:
    """A picture of twice the size, made smaller in the graph."""
    dims = prefix.picture.type.tensor_type.shape.dim
    before = [dims[2].dim_value, dims[3].dim_value]
    sizes = prefix.constant([1, 3, *before], "int64")
    dims[0].dim_value, dims[2].dim_value, dims[3].dim_value = 1, 2 * before[0], 2 * before[1]
    empty = prefix.constant([])
    prefix.then("Resize", empty, empty, sizes, mode="nearest", coordinate_transformation_mode="asymmetric")


def _bordered(prefix: Prefix) -> None:
    prefix.then("Pad", prefix.constant([0, 0, 8, 8, 0, 0, 8, 8], "int64"))


def _cropped(prefix: Prefix) -> None:
    whole = [prefix.constant([n], "int64") for n in (1, 60, 2)]
    prefix.then("Slice", *whole)


def _bent(prefix: Prefix) -> None:
    prefix.then("Pow", prefix.constant(0.5))


def _averaged(prefix: Prefix) -> None:
    mean = prefix.add("ReduceMean", prefix.tensor, axes=[1], keepdims=1)
    prefix.tensor = prefix.add("Sub", prefix.tensor, mean)


def _pictured(prefix: Prefix) -> None:
    """Less a mean picture, as Caffe has it."""
    dims = [d.dim_value for d in prefix.picture.type.tensor_type.shape.dim]
    prefix.then("Sub", prefix.constant(np.full((1, 3, *dims[2:]), 104.0)))


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "yolov8": yolos.yolov8,
    "yolov10": maps.end_to_end_model,
    "yolov5": yolos.yolov5,
    "detr-raw": detr.raw_detr_model,
}
ORDERS = {"bgr": "rgb", "rgb": "bgr"}


def _rows(path: Path, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    return compiled_rows(load_model(path), pictures)


@pytest.mark.parametrize(
    ("fronts", "swaps"),
    [
        ((_clipped, _divided), False),
        ((_cut_off, _divided), False),
        ((_rounded, _divided), False),
        ((_divided, _split), True),
        ((_gathered, _divided), True),
        ((_sliced, _divided), True),
        ((_mixed,), True),
        ((_clipped, _rounded, _split, _gathered, _divided), False),
    ],
    ids=lambda value: "+".join(f.__name__[1:] for f in value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_preprocessing_in_the_graph_does_not_change_the_detections(
    tmp_path: Path, family: str, fronts: tuple[Front, ...], swaps: bool
) -> None:
    """Nothing is divided twice and no colour swap is lost, for any nodes."""
    path = FAMILIES[family](tmp_path / "m.onnx")
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    model, before = load_model(_with(path, *fronts)), load_model(path)
    assert model.head == before.head
    color = before.interpretation.preprocess.color
    assert model.interpretation.preprocess.color == (ORDERS[color] if swaps else color)
    np.testing.assert_allclose(compiled_rows(model, pictures), _rows(path, pictures), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("front", [_bordered, _cropped, _bent, _averaged, _pictured])
@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_first_nodes_are_refused_with_the_evidence(tmp_path: Path, family: str, front: Front) -> None:
    path = _with(FAMILIES[family](tmp_path / "m.onnx"), _divided, front)
    with pytest.raises(ModelError, match=r"not supported.*input\.color and input\.scale") as refused:
        load_model(path)
    assert "Div" in str(refused.value)
    state(path, input={"color": "rgb"})
    with pytest.raises(ModelError):
        load_model(path)
    state(path, input={"color": "rgb", "scale": 1.0})
    assert load_model(path).interpretation.preprocess.scale == 1.0


def test_a_clip_that_would_change_pixels_is_refused(tmp_path: Path) -> None:
    """It was made for pixels of another range than its family has."""
    path = _with(yolos.yolox(tmp_path / "m.onnx"), lambda p: p.then("Clip", p.constant(0.0), p.constant(1.0)))
    with pytest.raises(ModelError, match=r"clips its picture at 0 and 1.*input\.scale"):
        load_model(path)
    path = _with(yolos.yolov8(tmp_path / "n.onnx"), _clipped)
    with pytest.raises(ModelError, match="clips its picture at 0 and 255"):
        load_model(path)
    path = _with(yolos.yolov8(tmp_path / "k.onnx"), _rounded)
    with pytest.raises(ModelError, match="rounds its picture to integers"):
        load_model(path)


def test_a_mean_in_the_opposite_colour_order_is_refused(tmp_path: Path) -> None:
    """Its order shows which channel is blue."""

    def less(prefix: Prefix) -> None:
        mean = np.array([103.53, 116.28, 123.675], np.float32).reshape(1, 3, 1, 1)
        prefix.then("Sub", prefix.constant(mean))
        prefix.then("Div", prefix.constant(57.0))

    path = detr.raw_detr_model(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"order BGR.*input\.color"):
        load_model(_with(path, less))
    assert load_model(_with(path, less, _split)).interpretation.preprocess.color == "bgr"


@pytest.mark.parametrize("family", ["yolov10", "detr-raw", "yolov6"])
def test_boxes_after_a_resize_are_in_input_pixels(tmp_path: Path, family: str) -> None:
    """Never of the size that the graph resizes to; where boxes may be scaled back already, it is refused."""
    path = (FAMILIES | {"yolov6": yolos.yolov6})[family](tmp_path / "m.onnx")
    small = noise_pictures(1, WIDTH_PX, HEIGHT_PX)
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    wide = _with(path, _doubled)
    if family == "yolov6":  # halves a sum, which may be the ratio
        with pytest.raises(ModelError, match="export it without the Resize"):
            load_model(wide)
        return
    model = load_model(wide)
    assert (model.input.width_px, model.input.height_px) == (2 * WIDTH_PX, 2 * HEIGHT_PX)
    expected = _rows(path, small)[0]
    expected[:, :4] *= 2
    np.testing.assert_allclose(compiled_rows(model, large)[0], expected, rtol=1e-4, atol=2e-3)


# --- PicoDet and NanoDet ------------------------------------------------------------------------------------


def _nanodet(path: Path) -> Path:
    return TinyDetector(metadata={"visionedge.head": "nanodet"}, width_px=WIDTH_PX, height_px=HEIGHT_PX).save(
        path
    )


def _picodet(path: Path) -> Path:
    detector = TinyDetector(
        metadata={}, width_px=WIDTH_PX, height_px=HEIGHT_PX, strides=(8, 16, 32, 64), producer="PaddlePaddle"
    )
    return detector.save(path)


def _less_mean(mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> Front:
    def front(prefix: Prefix) -> None:
        prefix.then("Mul", prefix.constant(scale))
        prefix.then("Sub", prefix.constant(np.reshape(mean, (1, 3, 1, 1))))
        prefix.then("Div", prefix.constant(np.reshape(std, (1, 3, 1, 1))))

    return front


def _as_bytes(prefix: Prefix) -> None:
    """Bytes of [N, H, W, 3], as cameras' drivers give them."""
    dims = prefix.picture.type.tensor_type.shape.dim
    sides = [dims[2].dim_value, dims[3].dim_value, 3]
    for dim, side in zip(list(dims)[1:], sides, strict=True):
        dim.dim_value = side
    prefix.picture.type.tensor_type.elem_type = TensorProto.UINT8
    prefix.then("Cast", to=TensorProto.FLOAT)
    prefix.then("Transpose", perm=[0, 3, 1, 2])


@pytest.mark.parametrize("bytes_in", [False, True], ids=["floats", "bytes"])
@pytest.mark.parametrize(
    ("build", "mean"),
    [
        (_nanodet, _less_mean((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), 1.0)),
        (_picodet, _less_mean((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)),
    ],
    ids=["nanodet", "picodet"],
)
def test_nanodet_and_picodet_with_their_mean_in_the_graph_are_not_normalised_twice(
    tmp_path: Path, build: Callable[[Path], Path], mean: Front, bytes_in: bool
) -> None:
    path = build(tmp_path / "m.onnx")
    front = _with(path, *((_as_bytes, mean) if bytes_in else (mean,)))
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    model = load_model(front)
    assert model.interpretation.preprocess.mean == (0.0, 0.0, 0.0)
    np.testing.assert_allclose(compiled_rows(model, pictures), _rows(path, pictures), rtol=1e-3, atol=2e-3)


def test_a_nanodet_that_divides_and_subtracts_no_mean_is_refused(tmp_path: Path) -> None:
    path = _with(_nanodet(tmp_path / "m.onnx"), _divided)
    with pytest.raises(ModelError, match="do not subtract the mean"):
        load_model(path)


# --- quantised ----------------------------------------------------------------------------------------------


def _quantised(path: Path, kind: QuantType = QuantType.QUInt8) -> Path:
    to = path.with_name("quantised.onnx")
    quantize_dynamic(path, to, weight_type=kind)
    assert any(node.op_type == "ConvInteger" for node in onnx.load(to).graph.node)
    return to


def _pooled(prefix: Prefix) -> None:
    """A layer and a pooling, as backbones have them."""
    prefix.then("Conv", prefix.constant(np.full((3, 3, 1, 1), 0.1) + np.eye(3)[:, :, None, None]))
    prefix.then("MaxPool", kernel_shape=[1, 1])


QUANTISABLE: dict[str, Callable[[Path], Path]] = {
    **FAMILIES,
    "yolox": yolos.yolox,
    "yolox-decoded": lambda path: yolos.yolox(path, decoded=True),
    "yolov6": yolos.yolov6,
    "fastestdet": maps.fastestdet_model,
    "nanodet": _nanodet,
    "detr-list": detr.finished_detr_model,
    "detr-joined": detr.joined_detr_model,
    "resnet": lambda path: detr.raw_detr_model(path, side=7),
    "patches": lambda path: detr.raw_detr_model(path, side=16, stride=16),
    "softmax": lambda path: detr.raw_detr_model(path, side=7, refined=False),
    "divided": lambda path: _with(yolos.yolov8(path), _divided),
    "pooled": lambda path: _with(maps.end_to_end_model(path), _pooled),
}


@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8], ids=["uint8", "int8"])
@pytest.mark.parametrize("family", QUANTISABLE)
def test_a_dynamically_quantised_model_is_read_like_its_original(
    tmp_path: Path, family: str, kind: QuantType
) -> None:
    """Head, preparation, classes and all: quantisation changes weights, and no picture's preparation."""
    path = QUANTISABLE[family](tmp_path / "m.onnx")
    before, after = load_model(path), load_model(_quantised(path, kind))
    for name in ("head", "preprocess", "input", "class_count", "needs_nms", "decoder"):
        assert getattr(after.interpretation, name) == getattr(before.interpretation, name), name
    assert [c for c in after.evidence if "starts with" in c] == [
        c for c in before.evidence if "starts with" in c
    ]


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime publishes no types
    """A few pictures of 0-1 to set ranges with."""

    def __init__(self, path: Path) -> None:
        (picture,) = onnx.load(path).graph.input
        planes = noise_pictures(4, WIDTH_PX, HEIGHT_PX)[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
        self.feeds = iter([{picture.name: each[None] / np.float32(255)} for each in planes])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize(
    "family", ["yolov8", "yolov5", "yolov10", "detr-raw", "yolov6", "softmax", "fastestdet"]
)
def test_a_statically_quantised_model_is_read_like_its_original(
    tmp_path: Path, family: str, form: QuantFormat
) -> None:
    path = QUANTISABLE[family](tmp_path / "m.onnx")
    to = tmp_path / "static.onnx"
    quantize_static(path, to, _Reader(path), quant_format=form)
    before, after = load_model(path), load_model(to)
    for name in ("head", "preprocess", "class_count", "needs_nms"):
        assert getattr(after.interpretation, name) == getattr(before.interpretation, name), name


@pytest.mark.parametrize("family", [*FAMILIES, "yolox", "yolov6", "softmax", "divided"])
def test_a_model_optimised_by_onnxruntime_is_read_like_its_original(tmp_path: Path, family: str) -> None:
    path = QUANTISABLE[family](tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    before, after = load_model(path), load_model(tmp_path / "optimised.onnx")
    for name in ("head", "preprocess", "class_count", "needs_nms", "decoder"):
        assert getattr(after.interpretation, name) == getattr(before.interpretation, name), name


def test_a_picodet_changed_by_a_tool_needs_a_stated_head(tmp_path: Path) -> None:
    """Its producer is that tool then, and nothing else distinguishes it from NanoDet-Plus."""
    before = load_model(_picodet(tmp_path / "m.onnx"))
    path = _quantised(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="state head: picodet"):
        load_model(path)
    state(path, head="picodet")
    after = load_model(path)
    assert (after.head, after.interpretation.preprocess) == ("picodet", before.interpretation.preprocess)


def test_a_quantised_centernet_is_still_recognised(tmp_path: Path) -> None:
    """The pooling that finds its peaks comes after its weights; pooling before them proves nothing."""
    path = maps.end_to_end_model(tmp_path / "m.onnx", heat=True)
    with pytest.raises(ModelError, match="CenterNet"):
        load_model(_quantised(path))


def test_a_detr_with_unreadable_first_layers_is_refused(tmp_path: Path) -> None:
    """They show whether it subtracts ImageNet's mean; without them this is unknown."""
    path = _with(
        detr.raw_detr_model(tmp_path / "m.onnx"), lambda p: p.then("AveragePool", kernel_shape=[1, 1])
    )
    with pytest.raises(ModelError, match=r"state input\.scale, input\.mean and input\.std"):
        load_model(path)
    state(path, input={"mean": [0, 0, 0], "std": [1, 1, 1]})
    assert load_model(path).head == "detr-raw"


# --- labels, tasks and what else is no guess ----------------------------------------------------------------


@pytest.mark.parametrize("head", [None, "stated"])
@pytest.mark.parametrize("by", ["MODEL.yaml", "metadata"])
@pytest.mark.parametrize("family", [*FAMILIES, "yolox", "yolov6", "fastestdet"])
def test_a_wrong_number_of_labels_is_reported_as_such(
    tmp_path: Path, family: str, by: str, head: str | None
) -> None:
    build = QUANTISABLE[family]
    path = build(tmp_path / "m.onnx")
    before = load_model(path)
    labels = [f"thing {i}" for i in range(before.interpretation.class_count - 1)]
    stated = {"head": before.head} if head else {}
    if by == "metadata":
        model = onnx.load(path)
        helper.set_model_props(model, {"names": str(dict(enumerate(labels)))})
        onnx.save(model, path)
        state(path, **stated)
    else:
        state(path, labels=labels, **stated)
    label_source = "m.yaml" if by == "MODEL.yaml" else "its metadata"
    words = f"it has {before.interpretation.class_count} classes, but {label_source} names {len(labels)}"
    with pytest.raises(ModelError, match=words):
        load_model(path)


def test_a_detector_whose_metadata_name_classification_is_refused(tmp_path: Path) -> None:
    """Its boxes are not looked at."""
    path = yolos.yolov8(tmp_path / "m.onnx", metadata={"task": "classify", "author": "Ultralytics"})
    with pytest.raises(ModelError, match="says classify, but it has no score per class"):
        load_model(path)


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "depth", "semantic"])
def test_a_model_for_another_task_is_refused_with_the_model_to_export(tmp_path: Path, task: str) -> None:
    path = yolos.yolov8(tmp_path / "m.onnx", metadata={"task": task, "author": "Ultralytics"})
    with pytest.raises(ModelError, match=rf"'{task}'.*export a detection model.*format=onnx"):
        load_model(path)


def test_a_model_for_grey_pictures_is_reported_as_such(tmp_path: Path) -> None:
    model = onnx.load(yolos.yolov8(tmp_path / "m.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"grey pictures \(one channel\)"):
        load_model(tmp_path / "m.onnx")


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    """A detector of digits calls its classes 0 to 9."""
    names = str({i: i for i in range(yolos.CLASSES)})
    model = load_model(yolos.yolov8(tmp_path / "m.onnx", metadata={"names": names}))
    assert model.labels == tuple(str(i) for i in range(yolos.CLASSES))


def test_the_evidence_contains_the_colour_order(tmp_path: Path) -> None:
    path = yolos.yolox(tmp_path / "m.onnx")
    state(path, input={"color": "rgb", "fit": "stretch"})
    assert "takes RGB, stretch" in load_model(path).evidence
