"""Rows that cannot be detections are seen for what they are."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_yolos import yolov8
from visionedge.errors import ModelError
from visionedge.model.compiler.build import build_graph
from visionedge.model.compiler.trial_run import check_plausibility
from visionedge.model.model import load_model

WIDTH_PX, HEIGHT_PX = 320, 240


def _rows(count: int = 200) -> NDArray[np.float32]:
    """Detections all over a picture."""
    random = np.random.default_rng(1)
    first = random.uniform(0, 200, (count, 2))
    boxes = np.concatenate([first, first + random.uniform(5, 40, (count, 2))], axis=1)
    scores = np.sort(random.uniform(0, 1, (count, 1)), axis=0)[::-1]
    classes = random.integers(0, 80, (count, 1))
    return np.concatenate([boxes, scores, classes], axis=1).astype(np.float32)


def test_detections_all_over_the_picture_are_plausible() -> None:
    assert check_plausibility(_rows(), WIDTH_PX, HEIGHT_PX) == ""


@pytest.mark.parametrize("count", [0, 1, 10])
def test_few_rows_are_not_judged_by_position(count: int) -> None:
    rows = _rows(count)
    rows[:, :4] /= 1000
    assert check_plausibility(rows, WIDTH_PX, HEIGHT_PX) == ""


def test_padding_rows_with_score_0_do_not_count() -> None:
    rows = _rows()
    rows[10:, :5] = 0
    rows[:10, :4] /= 10
    assert check_plausibility(rows, WIDTH_PX, HEIGHT_PX) == ""


@pytest.mark.parametrize(("factor", "away"), [(7.0, 0.0), (1.0, -0.5)])
def test_scores_outside_0_to_1_are_implausible(factor: float, away: float) -> None:
    """They are logits, or coordinates of a landmark."""
    rows = _rows()
    rows[:, 4] = rows[:, 4] * factor + away
    assert "scores" in check_plausibility(rows, WIDTH_PX, HEIGHT_PX)


def test_relative_boxes_are_implausible_as_pixels() -> None:
    rows = _rows()
    rows[:, :4] /= WIDTH_PX
    assert "unit" in check_plausibility(rows, WIDTH_PX, HEIGHT_PX)


def test_corners_are_implausible_as_centres_and_sizes() -> None:
    """A corner is always farther out than the other, a size hardly ever larger than its centre is far out."""
    rows = _rows()
    corner, other = rows[:, :2].copy(), rows[:, 2:4].copy()
    rows[:, :2], rows[:, 2:4] = corner - other / 2, corner + other / 2
    assert "corners" in check_plausibility(rows, WIDTH_PX, HEIGHT_PX)


def test_boxes_as_large_as_the_picture_are_plausible() -> None:
    """A network that answers queries may give them everywhere for noise."""
    rows = _rows()
    rows[:, :4] = np.array([2, 2, WIDTH_PX, HEIGHT_PX]) + rows[:, :4] / 100
    assert check_plausibility(rows, WIDTH_PX, HEIGHT_PX) == ""


def test_boxes_larger_than_the_picture_are_plausible() -> None:
    """A network of small pictures may give them for noise, wherever their centres are."""
    rows = _rows()
    centres, sizes = rows[:, :2].copy(), rows[:, 2:4] - rows[:, :2] + 2 * WIDTH_PX
    rows[:, :2], rows[:, 2:4] = centres - sizes / 2, centres + sizes / 2
    assert check_plausibility(rows, WIDTH_PX, HEIGHT_PX) == ""


def test_map_cells_are_implausible_as_pixels() -> None:
    rows = _rows()
    rows[:, :4] /= 4
    assert "unit" in check_plausibility(rows, WIDTH_PX, HEIGHT_PX)


def test_centres_and_sizes_are_implausible_as_corners() -> None:
    rows = _rows()
    rows[:, 2:4] -= rows[:, :2]
    assert "end before they begin" in check_plausibility(rows, WIDTH_PX, HEIGHT_PX)


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_other_columns_are_implausible_as_classes(value: float) -> None:
    rows = _rows()
    rows[3, 5] = value
    assert "classes" in check_plausibility(rows, WIDTH_PX, HEIGHT_PX)


def test_a_model_with_boxes_in_another_unit_is_refused_by_the_trial_run(tmp_path: Path) -> None:
    """Shapes and nodes are those of YOLOv8; only its numbers tell."""
    model = load_model(yolov8(tmp_path / "m.onnx", relative=True))
    with pytest.raises(ModelError, match=r"all its boxes lie within.*state its head in MODEL\.yaml"):
        build_graph(model)


def test_a_model_with_boxes_in_pixels_passes_the_trial_run(tmp_path: Path) -> None:
    assert build_graph(load_model(yolov8(tmp_path / "m.onnx")))
