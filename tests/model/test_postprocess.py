"""Rows become detections: confident, without duplicates, relative to the picture, clipped, sorted."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiny_models import TinyDetector
from visionedge.config.load import parse_config
from visionedge.config.schema import list_class_keys
from visionedge.errors import ConfigError
from visionedge.frames.types import Detections, InputSpec, Placement
from visionedge.model.model import load_model
from visionedge.model.postprocess import (
    MAX_DETECTIONS,
    CameraSelection,
    Selection,
    find_unknown_classes,
    to_detections,
)

WHOLE = Placement(0, 0, 100, 100)


def rows(*found: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(found, np.float32).reshape(-1, 6)


def detect(found: NDArray[np.float32], placement: Placement = WHOLE, iou: float | None = 0.5) -> Detections:
    return to_detections(found, placement, 0.4, iou, None)


def test_boxes_are_relative_to_the_picture_within_the_letterbox() -> None:
    """A 200 x 100 picture in a 100 x 100 letterbox is 25 px down and half as large."""
    found = detect(rows((10, 35, 60, 65, 0.9, 1)), Placement(0, 25, 100, 50))
    np.testing.assert_allclose(found.boxes, [[0.1, 0.2, 0.6, 0.8]], atol=1e-6)
    assert found.class_ids.tolist() == [1]


def test_boxes_are_clipped_and_boxes_outside_are_dropped() -> None:
    found = detect(rows((-20, -20, 50, 50, 0.9, 0), (10, 2, 60, 20, 0.8, 1)), Placement(0, 25, 100, 50))
    np.testing.assert_allclose(found.boxes, [[0, 0, 0.5, 0.5]])


@pytest.mark.parametrize("box", [(50, 10, 50, 20), (60, 10, 50, 20), (10, 30, 20, 20)])
def test_boxes_without_area_are_dropped(box: tuple[float, float, float, float]) -> None:
    assert len(detect(rows((*box, 0.9, 0)))) == 0


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_are_dropped(column: int, value: float) -> None:
    found = rows((10, 10, 20, 20, 0.9, 0), (30, 30, 40, 40, 0.8, 1))
    found[0, column] = value
    assert detect(found).class_ids.tolist() == [1]


def test_only_confident_rows_of_selected_classes_count() -> None:
    found = rows((10, 10, 20, 20, 0.39, 0), (30, 30, 40, 40, 0.4, 1), (50, 50, 60, 60, 0.9, 2))
    assert detect(found).class_ids.tolist() == [2, 1]
    assert to_detections(found, WHOLE, 0.4, 0.5, frozenset({1})).class_ids.tolist() == [1]
    assert len(to_detections(found, WHOLE, 0.4, 0.5, frozenset())) == 0


_row = st.tuples(
    *(st.integers(-20, 120) | st.just(float("nan")),) * 4,
    st.integers(0, 10) | st.sampled_from([float("nan"), float("inf"), 7.0]),
    st.integers(0, 2),
)


@given(
    st.lists(_row, max_size=40),
    st.sampled_from([0.0, 0.3, 0.7]),
    st.sampled_from([None, 0.0, 1 / 3, 0.5]),
    st.sampled_from([None, frozenset({0, 2})]),
)
def test_few_rows_give_the_detections_that_many_rows_give(
    table: list[tuple[float, ...]], confidence: float, iou: float | None, class_ids: frozenset[int] | None
) -> None:
    """There are two ways to compute them; rows that are never used make many of few."""
    found = rows(*table)
    found[:, 4] /= 10
    many = np.concatenate([found, np.full((100, 6), -1, np.float32)])
    placement = Placement(0, 25, 100, 50)
    few = to_detections(found, placement, confidence, iou, class_ids)
    same = to_detections(many, placement, confidence, iou, class_ids)
    np.testing.assert_array_equal(few.boxes, same.boxes)
    np.testing.assert_array_equal(few.scores, same.scores)
    np.testing.assert_array_equal(few.class_ids, same.class_ids)


def test_without_suppression_overlapping_boxes_all_stay() -> None:
    twice = rows((10, 10, 20, 20, 0.5, 0), (10, 10, 20, 20, 0.9, 0))
    assert len(detect(twice)) == 1
    np.testing.assert_allclose(detect(twice, iou=None).scores, [0.9, 0.5])


def test_only_the_best_detections_up_to_the_maximum_are_reported() -> None:
    many = rows(*((i, i, i + 0.5, i + 0.5, 0.4 + i / 1000, 0) for i in range(90)))
    many = np.concatenate([many, many + np.array([5, 0, 5, 0, 0.1, 0], np.float32)])
    found = detect(many)
    assert len(found) == MAX_DETECTIONS
    assert found.scores.min() >= np.sort(many[:, 4])[-MAX_DETECTIONS]


def test_no_rows_give_no_detections() -> None:
    assert len(detect(rows())) == 0


@given(
    size=st.tuples(st.integers(2, 3000), st.integers(2, 3000)),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    fit=st.sampled_from(["letterbox", "stretch"]),
    anchor=st.sampled_from(["center", "top-left"]),
)
def test_a_box_is_mapped_back_to_its_place_in_the_picture(
    size: tuple[int, int], corners: list[float], fit: str, anchor: str
) -> None:
    """Put a relative box where the model sees it, and read it back: the round trip of every letterbox."""
    left, right = sorted(corners[:2])
    top, bottom = sorted(corners[2:])
    placement = InputSpec(416, 320, fit, anchor).place(*size)  # type: ignore[arg-type]  # of the sampled words
    placed = np.array([left, top, right, bottom]) * ([placement.width_px, placement.height_px] * 2)
    placed += [placement.left_px, placement.top_px] * 2
    found = detect(rows((*placed.tolist(), 0.9, 0)), placement)
    assert ((found.boxes >= 0) & (found.boxes <= 1)).all()
    for box in found.boxes:
        np.testing.assert_allclose(box, [left, top, right, bottom], atol=2e-4)
    if right - left > 1e-3 and bottom - top > 1e-3:
        assert len(found) == 1


def test_a_selection_names_classes_by_label(tmp_path: Path) -> None:
    metadata = TinyDetector().metadata | {"names": "['cat', 'dog', 'cow', 'cat', 'hen']"}
    model = load_model(TinyDetector(metadata=metadata).save(tmp_path / "m.onnx"))
    assert Selection.of(model, 0.4, 0.5, ("cat", "hen")).class_ids == frozenset({0, 3, 4})
    assert Selection.of(model, 0.4, 0.5).class_ids is None
    with pytest.raises(ConfigError) as caught:
        Selection.of(model, 0.4, 0.5, ("cat", "unicorn", "yeti"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["inference.classes"] * 2
    assert "unicorn" in caught.value.problems[0]


def test_an_unknown_class_of_a_zone_has_the_path_of_its_key_and_the_likely_class(tmp_path: Path) -> None:
    metadata = TinyDetector().metadata | {"names": "['cat', 'dog', 'cow', 'sheep', 'hen']"}
    model = load_model(TinyDetector(metadata=metadata).save(tmp_path / "m.onnx"))
    zone = {"polygon": [[0, 0], [1, 0], [1, 1]]}
    camera = {
        "uri": "demo:",
        "classes": ["cat", "shep", "cow"],
        "zones": {"meadow": {**zone, "classes": ["shep"]}, "barn": zone},
        "lines": {"gate": {"start": [0, 0], "end": [1, 1], "classes": ["cat", "cow"]}},
    }
    keys = list_class_keys("farm", parse_config({"cameras": {"farm": camera}}).cameras["farm"])
    assert find_unknown_classes(model, keys) == [
        "cameras.farm.classes: m has no class 'shep'; did you mean 'sheep'?",
        "cameras.farm.zones.meadow.classes: m has no class 'shep'; did you mean 'sheep'?",
    ]


def test_a_camera_has_its_own_confidence_and_classes_and_weak_boxes_for_its_tracker(tmp_path: Path) -> None:
    metadata = TinyDetector().metadata | {"names": "['cat', 'dog', 'cow', 'sheep', 'hen']"}
    model = load_model(TinyDetector(metadata=metadata).save(tmp_path / "m.onnx"))
    cameras = {
        "plain": {"uri": "demo:"},
        "own": {"uri": "demo:", "confidence": 0.8, "classes": ["dog", "yak"]},
        "tracked": {"uri": "demo:", "confidence": 0.6, "tracking": "on"},
        "all": {"uri": "demo:", "confidence": 0.05, "tracking": "on"},
    }
    selection = Selection.of(model, 0.4, 0.5).for_cameras(model, parse_config({"cameras": cameras}).cameras)
    scores = (0.9, 0.7, 0.5, 0.2, 0.07)
    found = rows(*((20.0 * n, 0, 20.0 * n + 10, 10, score, n % 2) for n, score in enumerate(scores)))

    def counts(camera: str) -> tuple[int, int | None]:
        reported, candidates = selection.apply_to_camera(camera, found, WHOLE)
        if candidates is not None:
            np.testing.assert_array_equal(candidates.scores[: len(reported)], reported.scores)
        return len(reported), None if candidates is None else len(candidates)

    assert counts("plain") == counts("of no configuration") == (3, None)
    assert counts("own") == (0, None)
    assert counts("tracked") == (2, 4)
    assert counts("all") == (5, 5)


@given(
    st.lists(
        st.tuples(*(st.integers(0, 80),) * 2, st.integers(5, 40), st.integers(10, 99), st.integers(0, 1)),
        max_size=30,
    ),
    st.floats(0.1, 0.9),
)
def test_the_reported_boxes_of_a_tracked_camera_are_those_without_a_tracker(
    boxes: list[tuple[int, int, int, int, int]], confidence: float
) -> None:
    found = rows(*((x, y, x + side, y + side, score / 100, label) for x, y, side, score, label in boxes))
    tracked = Selection(0.3, 0.5, cameras={"dock": CameraSelection(confidence, None, is_tracked=True)})
    reported, candidates = tracked.apply_to_camera("dock", found, WHOLE)
    alone = to_detections(found, WHOLE, confidence, 0.5, None)
    np.testing.assert_array_equal(reported.boxes, alone.boxes)
    np.testing.assert_array_equal(reported.scores, alone.scores)
    assert candidates is not None
    assert len(candidates) >= len(reported)
