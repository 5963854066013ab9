"""Pictures are resized as the tools of a model's family resize them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tiny_graphs import Graph
from visionedge.camera.sources.yuv import YuvConverter, YuvPlanes
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture
from visionedge.model.compiler.build import build_graph
from visionedge.model.model import load_model


def noise(width_px: int, height_px: int, channels: int = 3) -> Picture:
    """A picture in which every resizing shows."""
    picture: Picture = np.random.default_rng(3).integers(0, 256, (height_px, width_px, channels), np.uint8)
    return picture


@pytest.mark.parametrize("size", [(1000, 600), (333, 517), (100, 60)])
def test_antialiased_pictures_equal_those_of_pillow_in_every_pixel(size: tuple[int, int]) -> None:
    """Smaller, larger, and of any proportions; in the window of a letterbox too."""
    picture = noise(*size)
    spec = InputSpec(320, 192, "letterbox", resample="antialias")
    fitted, placement = fit_to_input(picture, spec)
    left, top, width, height = (
        int(v) for v in (placement.left_px, placement.top_px, placement.width_px, placement.height_px)
    )
    wanted = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    assert (fitted[top : top + height, left : left + width] == wanted).all()


def test_planes_of_a_video_are_antialiased_like_a_whole_picture() -> None:
    """The colours are those of the resized picture to a level or two, far nearer than without."""
    small = cv2.GaussianBlur(noise(640, 480), (0, 0), 3)
    sheet = cv2.cvtColor(small, cv2.COLOR_BGR2YUV_I420)
    luma, colours = sheet[:480], sheet[480:].reshape(2, 240, 320)
    planes = YuvPlanes(np.asarray(luma, np.uint8), (colours[0], colours[1]))
    whole: Picture = np.asarray(cv2.cvtColor(sheet, cv2.COLOR_YUV2BGR_I420), np.uint8)
    wanted = np.asarray(Image.fromarray(whole).resize((160, 120), Image.Resampling.BILINEAR)).astype(int)
    window = np.empty((120, 160, 3), np.uint8)
    YuvConverter().convert(planes, window, "antialias")
    assert np.abs(window - wanted).mean() < 1.0
    assert np.abs(window - wanted).max() <= 6


def test_ten_bit_and_rotated_planes_are_antialiased_too() -> None:
    """For all planes of a decoder; black stays black and white stays white."""
    luma = np.full((480, 640), 940, np.uint16)
    grey = np.full((240, 320), 512, np.uint16)
    window = np.empty((160, 120, 3), np.uint8)
    YuvConverter().convert(YuvPlanes(luma, (grey, grey), white=1023, quarter_turns=1), window, "antialias")
    assert (window >= 254).all()


@pytest.mark.parametrize(("width", "height"), [(640, 427), (500, 333), (1920, 1080), (426, 640)])
def test_a_side_is_rounded_down_if_the_family_does_so(width: int, height: int) -> None:
    """YOLOX takes int(), most others round(); a pixel more moves every box."""
    ratio = min(416 / width, 416 / height)
    down = InputSpec(416, 416, rounding="down").place(width, height)
    assert (down.width_px, down.height_px) == (int(width * ratio), int(height * ratio))
    nearest = InputSpec(416, 416).place(width, height)
    assert (nearest.width_px, nearest.height_px) == (round(width * ratio), round(height * ratio))


def _detr(path: Path) -> Path:
    """Logits and boxes that answer queries, as D-FINE gives them."""
    graph = Graph()
    picture = graph.input("pixel_values", "float32", "N", 3, 64, 96)
    logits = graph.attend(graph.features(picture, 25 * 7), 25, 7)
    places = graph.add("Reshape", graph.features(picture, 25 * 4), graph.whole(-1, 25, 4))
    refined = graph.add("Add", places, graph.noise(1, 25, 4, scale=0.1))
    graph.output(logits, "logits", "float32", "N", 25, 7)
    graph.output(graph.add("Sigmoid", refined), "pred_boxes", "float32", "N", 25, 4)
    return graph.save(path)


def test_a_model_may_state_how_its_pictures_are_resized(tmp_path: Path) -> None:
    """MODEL.yaml wins over the family, and a compiled graph keeps it."""
    path = _detr(tmp_path / "m.onnx")
    assert load_model(path).input.resample == "antialias"
    path.with_suffix(".yaml").write_text("input: {resample: bilinear, rounding: down}\n")
    model = load_model(path)
    assert (model.input.resample, model.input.rounding) == ("bilinear", "down")
    compiled = tmp_path / "compiled.onnx"
    compiled.write_bytes(build_graph(model))
    assert load_model(compiled).input == model.input
