"""The scene of one camera, from its results: names of detections, and what counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fake_backend import result as make_result
from visionedge.config.load import parse_config
from visionedge.frames.types import Detections, FrameResult, build_frame_document, utc_now
from visionedge.scene.camera_scene import CameraScene

LABELS = ("person", "car", "truck")
WHOLE = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]], "minSeconds": 0}
DOOR = {"start": [0.5, 0], "end": [0.5, 1], "minSeconds": 0}


class CameraRun:
    """A camera; its objects stand in the middle, or where they are put."""

    def __init__(self, **keys: Any) -> None:
        self.scene = CameraScene("dock", 1, {})
        keys = keys or {"tracking": "on"}
        config = parse_config({"cameras": {"dock": {"uri": "demo:", **keys}}})
        self.scene.configure(config.cameras["dock"], utc_now())
        self.sequence = 0
        self.types: list[str] = []

    def see(self, label: str, labels: tuple[str, ...] = LABELS, xs: Sequence[float] = (0.5,)) -> FrameResult:
        """The result of a picture in which the model takes the objects for this."""
        self.sequence += 1
        made = make_result("dock", self.sequence)
        boxes = np.array([[x - 0.05, 0.3, x + 0.05, 0.7] for x in xs], np.float32).reshape(-1, 4)
        class_ids = np.full(len(xs), labels.index(label), np.int32)
        found = Detections(boxes, np.full(len(xs), 0.9, np.float32), class_ids)
        frame = replace(made.frame, captured_ns=self.sequence * 100_000_000)
        result, changes = self.scene.update(
            replace(made, frame=frame, detections=found, candidates=found, labels=labels)
        )
        self.types += [event.direction or event.type for event in changes.events]
        assert set(found.class_ids) <= {labels.index(label)}  # others use the same columns
        return result


def names(result: FrameResult) -> tuple[str, int, bool]:
    """Label and class of the one detection, and whether it has a track."""
    (row,) = build_frame_document(result)["detections"]
    return row["label"], row["classId"], row["trackId"] is not None


def test_a_detection_is_called_as_its_track_once_that_is_confirmed() -> None:
    run = CameraRun()
    assert names(run.see("truck")) == ("truck", 2, False)
    for _ in range(5):
        run.see("car")
    last = run.see("truck")
    assert names(last) == ("car", 1, True)
    assert last.label_detections() == ["car"]


def test_after_a_change_of_the_model_the_class_is_the_one_with_the_name_of_the_track() -> None:
    run = CameraRun()
    for _ in range(6):
        run.see("car")
    assert names(run.see("truck", ("truck", "car"))) == ("car", 1, True)
    # This model has no cars: the class stays that of the picture.
    assert names(run.see("truck", ("bicycle", "truck"))) == ("car", 1, True)


def test_detections_without_a_confirmed_track_count_nothing() -> None:
    """A false box in every third picture, each at another place."""
    run = CameraRun(zones={"whole": WHOLE}, lines={"door": DOOR})
    for number in range(90):
        run.see("person", xs=() if number % 3 else ((0.2, 0.8, 0.45, 0.6)[number % 4],))
    assert run.types == []
    assert run.scene.scene.document()["zones"]["whole"]["entered"] == {}


def test_every_object_of_a_picture_counts_and_not_only_the_first() -> None:
    run = CameraRun(zones={"whole": WHOLE}, lines={"door": DOOR})
    for number in range(40):
        run.see("person", xs=(0.3 + number / 100, 0.2 + number / 100, 0.8 - number / 100))
    assert Counter(run.types) == {"zone-entered": 3, "right-to-left": 2, "left-to-right": 1}


def test_who_is_inside_stays_inside_over_a_change_of_the_model() -> None:
    run = CameraRun(zones={"whole": WHOLE})
    for labels in (LABELS, ("dog", "car", "person"), ("person",)):
        for _ in range(10):
            run.see("person", labels)
    assert run.types == ["zone-entered"]
    assert run.scene.scene.document()["zones"]["whole"]["inside"] == {"person": 1}
