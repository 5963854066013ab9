"""Zones and lines that count only tracks with certain attributes."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from fake_backend import result as make_result
from scene_paths import DOOR, HELMET, SQUARE, SceneRun, camera_config
from visionedge.frames.types import Detections, Frame, FrameResult, build_frame_document, utc_now
from visionedge.scene.camera_scene import CameraScene
from visionedge.scene.second_stage import CropAnswer, CropQuestion

BARE = {"attributes": {"helmet": "no"}}
ZONE = {"polygon": SQUARE, **BARE}
INSIDE, OUTSIDE = (0.5, 0.5), (0.9, 0.5)


def start(**keys: Any) -> SceneRun:
    return SceneRun(camera_config(then=HELMET, **keys))


def test_a_track_begins_to_take_part_in_a_zone_when_it_has_the_attributes() -> None:
    run = start(zones={"queue": {**ZONE, "minSeconds": 30}})
    run.walk([INSIDE] * 5)
    run.attributes = {1: {"helmet": "yes"}}
    run.walk([INSIDE] * 5)
    assert run.types == []
    run.attributes = {1: {"helmet": "no"}}
    run.walk([INSIDE])
    assert run.types == ["zone-entered"]  # at once, as one who is inside when its track is confirmed
    assert run.events[0].evidence == {
        "firstSequence": 11,
        "lastSequence": 11,
        "path": [[11, *INSIDE]],
    }


def test_a_track_that_has_the_attributes_enters_and_leaves_as_every_other() -> None:
    run = start(zones={"queue": {**ZONE, "minSeconds": 0}})
    run.attributes = {1: {"helmet": "no", "vest": "orange"}}
    run.walk([OUTSIDE, INSIDE, OUTSIDE])
    assert run.types == ["zone-entered", "zone-left"]


def test_a_track_inside_that_loses_the_attributes_is_lost_and_may_enter_again() -> None:
    run = start(zones={"queue": {**ZONE, "dwellSeconds": 1, "occupancy": {"atLeast": 1}}})
    run.attributes = {1: {"helmet": "no"}}
    run.walk([INSIDE] * 5)
    run.attributes = {1: {"helmet": "yes"}}
    run.walk([INSIDE, OUTSIDE, INSIDE])
    lost = next(event for event in run.events if event.type == "zone-lost")
    assert (lost.sequence, lost.evidence["firstSequence"], lost.evidence["lastSequence"]) == (6, 1, 5)
    run.attributes = {1: {"helmet": "no"}}
    run.walk([INSIDE] * 11)
    once = ["zone-entered", "zone-occupied", "zone-lost", "zone-vacated"]
    assert run.types == [*once, "zone-entered", "zone-occupied", "zone-dwell"]
    zone = run.scene.document()["zones"]["queue"]
    assert (zone["entered"], zone["lost"], zone["inside"]) == ({"person": 2}, {"person": 1}, {"person": 1})


def test_who_loses_the_attributes_in_the_picture_in_which_it_is_outside_is_lost_by_its_path_inside() -> None:
    run = start(zones={"queue": {**ZONE, "minSeconds": 10}})
    run.attributes = {1: {"helmet": "no"}}
    run.walk([INSIDE, INSIDE, OUTSIDE])
    run.attributes = {}
    run.walk([OUTSIDE])
    assert run.types == ["zone-entered", "zone-lost"]
    assert run.events[1].evidence["lastSequence"] == 2


def test_a_line_counts_only_tracks_with_the_attributes() -> None:
    run = start(lines={"door": {**DOOR, **BARE, "minSeconds": 0}})
    for answers in ({}, {"helmet": "yes"}, {"helmet": "no"}):
        run.attributes = {1: answers}
        run.walk([(0.4, 0.5), (0.6, 0.5)])
        run.attributes = {}
        run.walk([(0.4, 0.5)])
    assert run.types == ["right-to-left"]


def test_a_crossing_that_does_not_count_yet_counts_no_more_without_the_attributes() -> None:
    run = start(lines={"door": {**DOOR, **BARE, "minSeconds": 1}})
    run.attributes = {1: {"helmet": "no"}}
    run.walk([(0.49, 0.5), (0.51, 0.5)])
    run.attributes = {}
    run.walk([(0.51, 0.5)])
    run.attributes = {1: {"helmet": "no"}}
    run.walk([(0.51, 0.5)] * 30)
    assert run.types == []


def test_all_attributes_must_match() -> None:
    run = SceneRun(camera_config(zones={"queue": {"polygon": SQUARE}}))
    config = camera_config(then=HELMET, zones={"queue": ZONE})
    wanted = {"helmet": "no", "vest": "orange"}  # of two second stages, which no configuration allows yet
    zone = config.zones["queue"].model_copy(update={"attributes": wanted})
    run.configure(config.model_copy(update={"zones": {"queue": zone}}))
    for answers in ({"helmet": "no"}, {"vest": "orange"}, {"helmet": "no", "vest": "none"}):
        run.attributes = {1: answers}
        run.walk([INSIDE])
    assert run.types == []
    run.attributes = {1: wanted}
    run.walk([INSIDE])
    assert run.types == ["zone-entered"]


def test_the_definition_of_a_rule_without_attributes_is_that_of_older_versions() -> None:
    """Else the totals of every installation would begin at 0 at the update."""
    run = start(zones={"queue": {"polygon": SQUARE}}, lines={"door": {**DOOR, "classes": ["person"]}})
    definitions = {begun.rule: begun.definition for change in run.changes for begun in change.starts}
    points = json.dumps(SQUARE)
    assert definitions == {
        "queue": f'["zone", [{points}], null, "bottom-center"]',
        "door": '["line", [[0.5, 0.2], [0.5, 0.8]], ["person"], "bottom-center"]',
    }


def test_other_attributes_are_another_definition() -> None:
    run = start(zones={"queue": ZONE})
    run.attributes = {1: {"helmet": "no"}}
    run.walk([INSIDE])
    run.configure(camera_config(then=HELMET, zones={"queue": {**ZONE, "minSeconds": 5}}))
    assert run.types == ["zone-entered"]
    run.configure(camera_config(then=HELMET, zones={"queue": {**ZONE, "attributes": {"helmet": "yes"}}}))
    assert run.types == ["zone-entered", "zone-lost"]
    assert run.scene.document()["zones"]["queue"]["entered"] == {}


# --- from results to frame objects --------------------------------------------------------------------------


class StageCamera:
    """A camera with a second stage, in whose pictures persons stand."""

    def __init__(self, **keys: Any) -> None:
        self.scene = CameraScene("dock", 1, {})
        self.scene.configure(camera_config(**keys), utc_now())
        self.sequence = 0

    def see(self, *xs: float, answer: Any = None, captured_ns: int | None = None) -> FrameResult:
        self.sequence += 1
        made = make_result("dock", self.sequence)
        boxes = np.array([[x - 0.05, 0.3, x + 0.05, 0.7] for x in xs], np.float32).reshape(-1, 4)
        found = Detections(boxes, np.full(len(xs), 0.9, np.float32), np.zeros(len(xs), np.int32))
        frame = replace(made.frame, captured_ns=captured_ns or self.sequence * 100_000_000)
        given = replace(made, frame=frame, detections=found, candidates=found)
        return self.scene.update(given, answer)[0]


def shown(result: FrameResult) -> list[Any]:
    return [row["attributes"] for row in build_frame_document(result)["detections"]]


def test_answers_are_in_the_frame_objects_of_the_results_after_them() -> None:
    run = StageCamera(then=HELMET)
    assert shown(run.see(0.3, 0.7)) == [{}, {}]  # not confirmed yet
    questions: list[CropQuestion] = []
    while not questions:
        run.see(0.3, 0.7)
        questions += run.scene.questions
    assert [round(question.corners[0], 5) for question in questions] == [0.24, 0.64]
    run.scene.second_stage.take([CropAnswer(questions[0], "no")])
    assert shown(run.see(0.3, 0.7)) == [{"helmet": "no"}, {}]
    assert shown(run.see()) == []


def test_questions_that_are_answered_at_once_count_in_the_same_picture() -> None:
    run = StageCamera(then=HELMET, zones={"all": {**ZONE, "polygon": [[0, 0], [0, 1], [1, 1], [1, 0]]}})
    asked: list[tuple[int, CropQuestion]] = []

    def answer(frame: Frame, questions: tuple[CropQuestion, ...]) -> list[CropAnswer]:
        asked.extend((frame.sequence, question) for question in questions)
        return [CropAnswer(question, "no") for question in questions]

    results = [run.see(0.5, answer=answer) for _ in range(30)]
    ((sequence, question),) = asked
    assert question.sequence == sequence
    first = next(result for result in results if result.track_ids != (None,))
    assert first.frame.sequence == sequence
    assert shown(first) == [{"helmet": "no"}]
    assert run.scene.scene.document()["zones"]["all"]["entered"] == {"person": 1}


def test_without_a_second_stage_attributes_are_empty() -> None:
    run = StageCamera(tracking="on")
    results = [run.see(0.5) for _ in range(5)]
    assert results[-1].attributes is None
    assert shown(results[-1]) == [{}]


def test_the_answers_of_an_offline_camera_are_forgotten() -> None:
    run = StageCamera(then=HELMET)
    for _ in range(5):
        run.see(0.5, answer=lambda _frame, questions: [CropAnswer(each, "no") for each in questions])
    assert len(run.scene.second_stage.attributes) == 1
    run.scene.end_if_offline(60)
    assert run.scene.second_stage.attributes == {}
    run.see(0.5, captured_ns=60_000_000_000)
    assert run.scene.questions == ()  # a new object, whose track is not confirmed yet
