"""The scene of one camera, from its results: what a reported detection is called."""

from dataclasses import replace

import numpy as np

from fake_backend import result as make_result
from visionedge.config.load import parse_config
from visionedge.frames.types import Detections, FrameResult, build_frame_document, utc_now
from visionedge.scene.camera_scene import CameraScene

LABELS = ("person", "car", "truck")


class OneObject:
    """A camera with one object that stands in the middle."""

    def __init__(self) -> None:
        self.scene = CameraScene("dock", 1, {})
        config = parse_config({"cameras": {"dock": {"uri": "demo:", "tracking": "on"}}})
        self.scene.configure(config.cameras["dock"], utc_now())
        self.sequence = 0

    def see(self, label: str, labels: tuple[str, ...] = LABELS) -> FrameResult:
        """The result of a picture in which the model takes the object for this."""
        self.sequence += 1
        made = make_result("dock", self.sequence)
        class_ids = np.array([labels.index(label)], np.int32)
        found = Detections(made.detections.boxes, np.array([0.9], np.float32), class_ids)
        frame = replace(made.frame, captured_ns=self.sequence * 100_000_000)
        result, _ = self.scene.update(
            replace(made, frame=frame, detections=found, candidates=found, labels=labels)
        )
        assert found.class_ids[0] == labels.index(label)  # others use the same columns
        return result


def names(result: FrameResult) -> tuple[str, int, bool]:
    """Label and class of the one detection, and whether it has a track."""
    (row,) = build_frame_document(result)["detections"]
    return row["label"], row["classId"], row["trackId"] is not None


def test_a_detection_is_called_as_its_track_once_that_is_confirmed() -> None:
    run = OneObject()
    assert names(run.see("truck")) == ("truck", 2, False)
    for _ in range(5):
        run.see("car")
    last = run.see("truck")
    assert names(last) == ("car", 1, True)
    assert last.label_detections() == ["car"]


def test_after_a_change_of_the_model_the_class_is_the_one_with_the_name_of_the_track() -> None:
    run = OneObject()
    for _ in range(6):
        run.see("car")
    assert names(run.see("truck", ("truck", "car"))) == ("car", 1, True)
    # This model has no cars: the class stays that of the picture.
    assert names(run.see("truck", ("bicycle", "truck"))) == ("car", 1, True)
