"""Crops: cut out of pictures, and answered by classifiers and detectors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_clips import PERSON, Actor, write_detector
from tiny_classifiers import save_colour_classifier
from visionedge.config.schema import InferenceConfig
from visionedge.engine.crops import answer_crops, cut_crop
from visionedge.engine.lanes import EngineWithSelection
from visionedge.engine.local_engine import open_engine
from visionedge.frames.types import Picture
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection

UNIT = st.floats(0, 1)
RED, BLUE, GREY = (0, 0, 255), (255, 0, 0), (90, 90, 90)


def plain(colour: tuple[int, int, int], height_px: int = 50, width_px: int = 30) -> Picture:
    return np.full((height_px, width_px, 3), colour, np.uint8)


def open_running(path: Path, confidence: float = 0.8) -> EngineWithSelection:
    model = load_model(path)
    engine = open_engine(model, InferenceConfig(device="cpu"))
    return EngineWithSelection.of(engine, Selection.of(model, confidence, 0.5))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineWithSelection]:
    running = open_running(save_colour_classifier(tmp_path_factory.mktemp("models") / "helmet.onnx"))
    yield running
    running.engine.close()


SIDES = st.tuples(UNIT, UNIT).map(sorted)


@given(SIDES, SIDES, st.integers(1, 7), st.integers(1, 7))
def test_a_crop_has_at_least_one_pixel_and_lies_in_the_picture(
    across: list[float], down: list[float], width_px: int, height_px: int
) -> None:
    picture = np.arange(height_px * width_px * 3, dtype=np.uint8).reshape(height_px, width_px, 3)
    (left, right), (top, bottom) = across, down
    crop = cut_crop(picture, (left, top, right, bottom))
    assert crop.size >= 3
    assert np.shares_memory(crop, picture)


def test_a_crop_has_every_pixel_that_its_box_touches() -> None:
    picture = np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3)
    assert (cut_crop(picture, (0.19, 0.3, 0.51, 0.99)) == picture[3:10, 1:6]).all()
    assert (cut_crop(picture, (0, 0, 1, 1)) == picture).all()


def test_a_classifier_gives_its_best_label_or_none_where_it_is_not_sure(
    classifier: EngineWithSelection,
) -> None:
    assert answer_crops(classifier, [plain(RED), plain(BLUE), plain(GREY)]) == ["yes", "no", None]
    anything = replace(classifier, selection=replace(classifier.selection, confidence=0.5))
    assert None not in answer_crops(anything, [plain(GREY)])


def test_colours_are_those_of_pictures(classifier: EngineWithSelection) -> None:
    """BGR, also of a crop that is no whole array."""
    picture = np.hstack([plain(BLUE), plain(RED)])
    assert answer_crops(classifier, [cut_crop(picture, (0.5, 0, 1, 1))]) == ["yes"]
    assert answer_crops(classifier, [cut_crop(picture, (0, 0, 0.5, 1))]) == ["no"]


def test_a_detector_gives_the_label_of_its_best_detection_or_none_as_a_text(tmp_path: Path) -> None:
    running = open_running(write_detector(tmp_path / "figures.onnx"), 0.4)
    empty = np.full((384, 640, 3), 196, np.uint8)
    with_person = empty.copy()
    Actor(PERSON, [(0, 0.5, 0.8), (9, 0.5, 0.8)]).draw(with_person, 1)
    try:
        assert answer_crops(running, [with_person, empty]) == ["person", "none"]
        others = replace(running, selection=replace(running.selection, class_ids=frozenset({1})))
        assert answer_crops(others, [with_person]) == ["none"]
    finally:
        running.engine.close()
