"""The second stage of a camera: which tracks are asked about, and what becomes of the answers."""

from typing import Any

import numpy as np
import pytest

from scene_paths import PathTrack, camera_config
from visionedge.config.schema import SecondStageConfig
from visionedge.frames.types import Detections
from visionedge.scene.second_stage import CropAnswer, CropQuestion, SecondStage

BOX = (0.4, 0.4, 0.6, 0.8)


def config(**keys: Any) -> SecondStageConfig:
    then = camera_config(then={"model": "helmet", **keys}).then
    assert then is not None
    return then


class StageRun:
    """A second stage, picture by picture, 0.1 s apart."""

    def __init__(self, **keys: Any) -> None:
        self.stage = SecondStage()
        self.stage.configure(config(**keys))
        self.sequence = 0

    def see(self, *track_ids: int, label: str = "person", after_s: float = 0.1) -> tuple[CropQuestion, ...]:
        """The questions about a picture in which these tracks are seen."""
        self.sequence += 1
        self.at_s = getattr(self, "at_s", 0.0) + after_s
        tracks = [PathTrack(track_id, label, (0, 0, 0, 0), 0) for track_id in track_ids]
        found = Detections(np.array([BOX], np.float32), np.ones(1, np.float32), np.zeros(1, np.int32))
        return self.stage.ask(tracks, found, self.sequence, self.at_s)

    def asked(self, *track_ids: int, pictures: int = 1) -> list[int]:
        """How many questions each of the next pictures gives."""
        return [len(self.see(*track_ids)) for _ in range(pictures)]


def test_every_track_is_asked_about_until_it_has_an_answer() -> None:
    run = StageRun()
    (first,) = run.see(1)
    assert (first.model, first.track_id, first.sequence) == ("helmet", 1, 1)
    assert run.asked(1, pictures=5) == [0] * 5  # in progress
    run.stage.take([CropAnswer(first)])  # the model is not sure
    (second,) = run.see(1)
    run.stage.take([CropAnswer(second, "no")])
    assert run.stage.attributes == {1: {"helmet": "no"}}
    assert run.asked(1, pictures=500) == [0] * 500


def test_a_track_keeps_its_first_answer() -> None:
    run = StageRun()
    (lost,) = run.see(1)
    (again,) = run.see(1, after_s=60)
    run.stage.take([CropAnswer(again, "no"), CropAnswer(lost, "yes")])
    assert run.stage.attributes == {1: {"helmet": "no"}}


def test_with_a_number_a_track_is_asked_about_again_after_so_many_pictures() -> None:
    run = StageRun(every=3)
    questions = [question for _ in range(7) for question in run.see(1)]
    assert [question.sequence for question in questions] == [1, 4, 7]
    first, second, third = questions
    run.stage.take([CropAnswer(first, "no"), CropAnswer(third, "yes"), CropAnswer(second, "no")])
    assert run.stage.attributes == {1: {"helmet": "yes"}}  # that of the newest picture
    run.see()
    run.see()
    (fourth,) = run.see(1)
    run.stage.take([CropAnswer(fourth)])
    assert run.stage.attributes == {1: {"helmet": "yes"}}  # not sure: the last answer stays


@pytest.mark.parametrize("every", ["track", 50])
def test_a_question_that_failed_is_asked_again_in_the_next_picture(every: Any) -> None:
    run = StageRun(every=every)
    (question,) = run.see(1)
    run.stage.take([CropAnswer(question, failed=True)])
    assert run.asked(1, pictures=3) == [1, 0, 0]


def test_a_question_whose_answer_never_comes_is_asked_again_after_a_while() -> None:
    run = StageRun()
    run.see(1)
    assert len(run.see(1, after_s=29)) == 0
    assert len(run.see(1, after_s=2)) == 1


def test_the_answer_about_a_track_that_has_ended_is_ignored() -> None:
    run = StageRun()
    first, second = run.see(1, 2)
    run.stage.end([1])
    run.stage.take([CropAnswer(first, "no"), CropAnswer(second, "no")])
    assert run.stage.attributes == {2: {"helmet": "no"}}
    run.stage.end_all()
    assert run.stage.attributes == {}
    assert repr(run.stage) == "<SecondStage tracks=0 open=0 answered=0>"


def test_only_seen_tracks_with_the_wanted_labels_are_asked_about() -> None:
    run = StageRun(classes=["person"])
    assert run.see(1, label="car") == ()
    hidden = PathTrack(2, "person", (0, 0, 0, 0), None)
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert run.stage.ask([hidden], empty, 9, 9.0) == ()
    assert len(run.see(2)) == 1


@pytest.mark.parametrize(
    ("margin", "expected"), [(0, BOX), (0.5, (0.3, 0.2, 0.7, 1.0)), (1, (0.2, 0.0, 0.8, 1.0))]
)
def test_the_box_is_widened_by_the_margin_and_clipped(margin: float, expected: Any) -> None:
    (question,) = StageRun(margin=margin).see(1)
    assert question.corners == pytest.approx(expected, abs=1e-6)


def test_another_model_forgets_the_answers_and_other_keys_do_not() -> None:
    run = StageRun()
    (question,) = run.see(1)
    run.stage.take([CropAnswer(question, "no")])
    run.stage.configure(config(every=5, margin=0.3))
    assert run.stage.attributes == {1: {"helmet": "no"}}
    (open_question,) = [each for _ in range(5) for each in run.see(1)]
    vest = camera_config(then={"model": "vest"}).then
    run.stage.configure(vest)
    assert run.stage.attributes == {}
    (asked,) = run.see(1)
    run.stage.take([CropAnswer(open_question, "yes")])  # of the model before
    run.stage.take([CropAnswer(asked, "orange")])
    assert run.stage.attributes == {1: {"vest": "orange"}}


def test_without_the_second_stage_nothing_is_asked_and_labels_that_are_not_wanted_any_more_lose_answers() -> (
    None
):
    run = StageRun()
    (question,) = run.see(1)
    run.stage.take([CropAnswer(question, "no")])
    run.stage.configure(config(classes=["car"]))
    assert run.see(1) == ()
    assert run.stage.attributes == {}
    run.stage.configure(None)
    assert not run.stage.is_used
    assert run.see(1) == ()
