"""The vocabulary: shapes, sizes and the frame object."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.frames.types import (
    Detections,
    Frame,
    FrameResult,
    InputSpec,
    Placement,
    Timing,
    build_frame_document,
)

SIZES = st.integers(1, 5000)


def a_result() -> FrameResult:
    """A frame with two detections, one of an id without a word."""
    picture = np.zeros((4, 4, 3), np.uint8)
    frame = Frame(
        "dock", 7, 3, 0, datetime(2026, 1, 2, 3, 4, 5, 678900, UTC), 100, 50, picture,
        Placement(0, 0, 4, 4), lambda: picture,
    )  # fmt: skip
    boxes = np.array([[0, 0.25, 0.5, 1], [0.1, 0.1, 0.2, 0.2]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.5], np.float32), np.array([0, 9], np.int32))
    return FrameResult(frame, found, Timing(1_500_000, 2_000_000, 4_000_000, 2), "cpu", "m", ("person",))


def test_the_frame_object_has_exactly_the_keys_of_the_contract() -> None:
    """Key by key and in the units of the wire."""
    assert build_frame_document(a_result()) == {
        "schema": "visionedge/frame/1",
        "camera": "dock",
        "sequence": 7,
        "epoch": 3,
        "capturedAt": "2026-01-02T03:04:05.678Z",
        "width": 100,
        "height": 50,
        "model": "m",
        "device": "cpu",
        "timing": {"waitMs": 1.5, "inferMs": 2.0, "totalMs": 4.0, "batchSize": 2},
        "detections": [
            {
                "label": "person",
                "classId": 0,
                "confidence": 0.9,
                "box": {"left": 0.0, "top": 0.25, "width": 0.5, "height": 0.75},
            },
            {
                "label": "class-9",
                "classId": 9,
                "confidence": 0.5,
                "box": {"left": 0.1, "top": 0.1, "width": 0.1, "height": 0.1},
            },
        ],
    }


def test_the_frame_object_of_a_tracked_camera_has_tracks_and_precision_beside_the_keys_of_the_other() -> None:
    plain = build_frame_document(a_result())
    tracked = build_frame_document(replace(a_result(), track_ids=(4, None), precision="int8"))
    assert tracked == {
        **plain,
        "schema": "visionedge/frame/2",
        "precision": "int8",
        "detections": [
            {**row, "trackId": track_id, "attributes": {}}
            for row, track_id in zip(plain["detections"], (4, None), strict=True)
        ],
    }
    assert [*tracked][8:11] == ["device", "precision", "timing"]


def test_a_detection_has_the_label_of_its_track_else_that_of_its_class() -> None:
    named = replace(a_result(), track_ids=(4, None), track_labels=("car", None))
    rows = build_frame_document(named)["detections"]
    assert [(row["label"], row["classId"]) for row in rows] == [("car", 0), ("class-9", 9)]


def test_a_frame_object_with_a_source_has_no_camera() -> None:
    """`detect` names the picture instead."""
    document = build_frame_document(a_result(), source="a.jpg")
    assert document["source"] == "a.jpg"
    assert "camera" not in document


@given(SIZES, SIZES, st.sampled_from(["center", "top-left"]))
def test_a_letterboxed_picture_is_inside_and_touches_an_edge(width: int, height: int, anchor: str) -> None:
    """The placement never leaves the input and fills one of its sides."""
    spec = InputSpec(416, 320, "letterbox", "top-left" if anchor == "top-left" else "center")
    at = spec.place(width, height)
    assert 0 <= at.left_px <= at.left_px + at.width_px <= 416
    assert 0 <= at.top_px <= at.top_px + at.height_px <= 320
    assert at.width_px == 416 or at.height_px == 320


def test_columns_of_different_length_are_refused() -> None:
    """Detections can't come apart."""
    with pytest.raises(ValueError, match="columns differ"):
        Detections(np.zeros((2, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32))
