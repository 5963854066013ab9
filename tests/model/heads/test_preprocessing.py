"""How a picture is prepared: what the first nodes of a network do to it counts before any family's way."""

from pathlib import Path

import numpy as np
import pytest

from tiny_graphs import Graph, compiled_rows, network, noise_pictures, state
from visionedge.errors import ModelError
from visionedge.model.interpretation import Preprocess
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX = 64, 48


def _begun(dtype: str = "float32", layout: str = "NCHW") -> tuple[Graph, str]:
    graph = Graph()
    shape = (3, HEIGHT_PX, WIDTH_PX) if layout == "NCHW" else (HEIGHT_PX, WIDTH_PX, 3)
    return graph, graph.input("pixels", dtype, "N", *shape)


def _ended(graph: Graph, picture: str, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A detector of queries behind what was done to the picture [N, 3, H, W]."""
    logits = graph.attend(graph.features(picture, 25 * 3), 25, 3)
    boxes = graph.add("Sigmoid", graph.attend(graph.features(picture, 100), 25, 4))
    graph.output(logits, "logits", "float32", "N", 25, 3)
    graph.output(boxes, "boxes", "float32", "N", 25, 4)
    return graph.save(path, metadata)


def _way(path: Path) -> Preprocess:
    return load_model(path).interpretation.preprocess


def test_byte_inputs_are_not_scaled_and_the_scaling_of_the_graph_stays(tmp_path: Path) -> None:
    graph, picture = _begun("uint8", "NHWC")
    scale, zero = graph.constant(1 / 128), graph.constant(128, "uint8")
    floats = graph.add("DequantizeLinear", picture, scale, zero)
    path = _ended(graph, graph.add("Transpose", floats, perm=[0, 3, 1, 2]), tmp_path / "m.onnx")
    pictures = noise_pictures(2, WIDTH_PX, HEIGHT_PX)
    best = network(path, {"pixels": np.ascontiguousarray(pictures[..., ::-1])})["logits"].max(axis=(1, 2))
    rows = compiled_rows(load_model(path), pictures)
    np.testing.assert_allclose(rows[:, 0, 4], 1 / (1 + np.exp(-best)), atol=1e-5)


@pytest.mark.parametrize("by", ["Gather", "Slice"])
def test_a_graph_that_swaps_red_and_blue_gets_the_opposite_colour_order(tmp_path: Path, by: str) -> None:
    graph, picture = _begun()
    if by == "Gather":
        swapped = graph.add("Gather", picture, graph.whole(2, 1, 0), axis=1)
    else:
        ends = graph.whole(-1), graph.whole(-10), graph.whole(1), graph.whole(-1)
        swapped = graph.add("Slice", picture, *ends)
    path = _ended(graph, swapped, tmp_path / "m.onnx")
    model = load_model(path)
    assert model.interpretation.preprocess.color == "bgr"
    assert any("swap red and blue" in clause for clause in model.evidence)
    state(path, input={"color": "rgb"})
    assert _way(path).color == "rgb"


def test_a_batch_normalisation_of_the_input_counts_as_its_normalisation(tmp_path: Path) -> None:
    graph, picture = _begun()
    gain, bias = graph.constant([1, 1, 1]), graph.constant([0, 0, 0])
    mean, variance = graph.constant([123.7, 116.3, 103.5]), graph.constant([3400, 3300, 3300])
    normal = graph.add("BatchNormalization", picture, gain, bias, mean, variance)
    assert _way(_ended(graph, normal, tmp_path / "m.onnx")).scale == 1.0


def test_a_mean_in_byte_range_means_that_pixels_are_bytes(tmp_path: Path) -> None:
    graph, picture = _begun()
    less = graph.add("Sub", picture, graph.constant(np.reshape([123.0, 117.0, 104.0], (1, 3, 1, 1))))
    assert _way(_ended(graph, less, tmp_path / "m.onnx")).scale == 1.0


def test_steps_that_cancel_each_other_are_not_a_normalisation(tmp_path: Path) -> None:
    """Quantised models round their input and take it back."""
    graph, picture = _begun()
    scale, zero = graph.constant(1 / 255), graph.constant(0, "uint8")
    rounded = graph.add("QuantizeLinear", picture, scale, zero)
    floats = graph.add("DequantizeLinear", rounded, scale, zero)
    assert _way(_ended(graph, floats, tmp_path / "m.onnx")).scale == pytest.approx(1 / 255)


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 100.0), ("uint8", 2.0)])
def test_scaling_that_fits_no_known_range_is_refused(tmp_path: Path, dtype: str, factor: float) -> None:
    graph, picture = _begun(dtype)
    floats = picture if dtype == "float32" else graph.add("Cast", picture, to=1)
    path = _ended(graph, graph.add("Mul", floats, graph.constant(factor)), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"neither pixels of 0-255 nor of 0-1; state input in MODEL\.yaml"):
        load_model(path)


def test_an_open_size_is_that_of_the_export_metadata(tmp_path: Path) -> None:
    """Ultralytics writes imgsz as height and width."""
    graph = Graph()
    picture = graph.input("pixels", "float32", "N", 3, "h", "w")
    path = _ended(graph, picture, tmp_path / "m.onnx", {"imgsz": "[320, 416]"})
    model = load_model(path)
    assert (model.input.width_px, model.input.height_px) == (416, 320)
    assert any("as its metadata 'imgsz' says" in clause for clause in model.evidence)
