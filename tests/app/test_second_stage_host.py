"""The second stage of the running module: crops of all cameras go to a model, and answers come back."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_backend import grey
from fake_backend import result as make_result
from tiny_classifiers import save_colour_classifier
from visionedge.app.metrics import Metrics, collect_samples
from visionedge.app.scene_host import SceneHost
from visionedge.app.second_stage import (
    MAX_WAITING_CROPS,
    CameraAnswers,
    CropQueue,
    CropStatistics,
    CropWorker,
    SecondStageHost,
)
from visionedge.app.state import AppState
from visionedge.config.load import parse_config
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.faults import EngineError, EngineUnavailableError
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.interface import Engine, EngineInfo, Inference
from visionedge.engine.lanes import EngineWithSelection
from visionedge.engine.local_engine import open_engine
from visionedge.engine.plan import Plan
from visionedge.errors import SourceError
from visionedge.frames.types import Detections, Frame, FrameResult, Picture, build_frame_document
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene.second_stage import CropAnswer, CropQuestion

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def make_frame(
    camera: str = "dock", sequence: int = 1, full_picture: Callable[[], Picture] | None = None
) -> Frame:
    """A picture whose left half is blue (no) and whose right half is red (yes)."""
    picture = grey()
    picture[:, :32], picture[:, 32:] = (255, 0, 0), (0, 0, 255)
    return make_result(camera, sequence, picture=picture, full_picture=full_picture).frame


def ask(*track_ids: int, sequence: int = 1, corners: Any = LEFT, model: str = "helmet") -> list[CropQuestion]:
    return [CropQuestion(model, track_id, sequence, corners) for track_id in track_ids]


def taken(queue: CropQueue, count: int | None = None) -> list[tuple[str, int]]:
    return [(crop.camera, crop.question.track_id) for crop in queue.take(count)]


# --- the queue ----------------------------------------------------------------------------------------------


def test_cameras_are_served_in_turns() -> None:
    """One with many objects does not keep the others waiting."""
    queue = CropQueue()
    queue.put(make_frame("crowd"), ask(*range(10)))
    queue.put(make_frame("door"), ask(7))
    assert taken(queue, 3) == [("crowd", 0), ("door", 7), ("crowd", 1)]
    queue.put(make_frame("gate"), ask(1, 2))
    assert taken(queue, 4) == [("crowd", 2), ("gate", 1), ("crowd", 3), ("gate", 2)]
    assert len(queue.take()) == 6
    assert queue.take() == []


def test_a_newer_question_takes_the_place_of_an_older_one_about_the_track() -> None:
    queue = CropQueue()
    queue.put(make_frame(), ask(1, 2))
    (dropped,) = queue.put(make_frame(sequence=2), ask(1, sequence=2))
    assert (dropped.question.track_id, dropped.question.sequence) == (1, 1)
    assert [crop.question.sequence for crop in queue.take()] == [2, 1]  # it keeps its turn


def test_a_camera_keeps_few_pictures_in_memory() -> None:
    queue = CropQueue()
    dropped = [
        crop.question.sequence
        for number in range(1, 8)
        for crop in queue.put(make_frame(sequence=number), ask(number, sequence=number))
    ]
    assert dropped == [1, 2, 3]
    assert taken(queue) == [("dock", number) for number in (4, 5, 6, 7)]


def test_a_full_queue_drops_the_oldest_of_the_camera_with_the_most() -> None:
    queue = CropQueue(limit=5)
    queue.put(make_frame("door"), ask(1))
    dropped = queue.put(make_frame("crowd"), ask(*range(8)))
    assert [(crop.camera, crop.question.track_id) for crop in dropped] == [
        ("crowd", number) for number in (0, 1, 2, 3)
    ]
    assert ("door", 1) in taken(queue)


def test_some_hundred_crops_wait_at_most() -> None:
    queue = CropQueue()
    for camera in range(20):
        queue.put(make_frame(str(camera)), ask(*range(100)))
    assert len(queue.take()) == MAX_WAITING_CROPS == 256


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 6), unique=True)),
            st.integers(0, 9),
            st.sampled_from(["forget", "fail"]),
        )
    )
)
def test_every_question_is_counted_once(steps: list[Any]) -> None:
    """asked = answered + unsure + dropped + waiting"""
    queue = CropQueue(limit=10)
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            queue.put(make_frame(step[0], number), ask(*step[1], sequence=number))
        elif step == "forget":
            queue.forget("a")
        elif step == "fail":
            queue.count([CropAnswer(crop.question, failed=True) for crop in queue.take()])
        else:
            labels = [None, "no"]
            queue.count([CropAnswer(crop.question, labels[n % 2]) for n, crop in enumerate(queue.take(step))])
        found = queue.statistics()
        assert found.asked == found.answered + found.unsure + found.dropped + found.waiting
        assert found.waiting <= 10
    queue.close()
    assert queue.statistics().waiting == 0


# --- the thread of a model ----------------------------------------------------------------------------------


class CountingEngine:
    """An engine that counts its batches; each of `errors` is raised by one of them."""

    def __init__(self, engine: Engine, max_batch: int = 4) -> None:
        self._engine = engine
        self._plan = Plan(1, (max_batch,), "test")
        self.batches: list[int] = []
        self.errors: list[EngineError] = []
        self.before: Callable[[], object] = lambda: None

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        self.before()
        if self.errors:
            raise self.errors.pop(0)
        self.batches.append(len(pictures))
        parts = [self._engine.infer([picture], min_score) for picture in pictures]
        return Inference(np.concatenate([part.rows for part in parts]), "cpu")

    def info(self) -> EngineInfo:
        return replace(self._engine.info(), plan=self._plan)

    def close(self) -> None:
        """The fixture closes the engine."""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = save_colour_classifier(tmp_path_factory.mktemp("models") / "helmet.onnx")
    engine = open_engine(load_model(path), InferenceConfig(device="cpu"))
    yield engine
    engine.close()


@pytest.fixture
def engine(classifier: Engine) -> CountingEngine:
    return CountingEngine(classifier)


class WorkerRun:
    """A worker that computes on the thread of the test, until it has delivered so many answers."""

    def __init__(self, engine: CountingEngine) -> None:
        self.engine = engine
        self.queue = CropQueue()
        self.delivered: list[CameraAnswers] = []
        self.charged: Counter[str] = Counter()
        self.missing: list[EngineError] = []
        ticks = iter(range(0, 10**6, 1000))
        self.worker = CropWorker(
            "helmet",
            self.queue,
            self.use,
            self.deliver,
            lambda camera, engine_ns: self.charged.update({camera: engine_ns}),
            clock=lambda: next(ticks),
            retry_s=0,
        )

    @contextmanager
    def use(self, model: str) -> Iterator[EngineWithSelection]:
        assert model == "helmet"
        if self.missing:
            raise self.missing.pop(0)
        selection = Selection.of(self.engine.info().model, 0.8, 0.5)
        yield EngineWithSelection.of(self.engine, selection)

    def deliver(self, answers: CameraAnswers) -> None:
        self.delivered.append(answers)
        if len(self.answers) >= self.wanted:
            self.queue.close()

    def run(self, wanted: int) -> list[CropAnswer]:
        self.wanted = wanted
        self.worker.run()
        return self.answers

    @property
    def answers(self) -> list[CropAnswer]:
        return [answer for each in self.delivered for answer in each.answers]


def test_crops_of_all_cameras_are_computed_in_batches_of_the_plan(engine: CountingEngine) -> None:
    run = WorkerRun(engine)
    run.queue.put(make_frame("dock"), ask(1, 2, 3, 4))
    run.queue.put(make_frame("gate"), ask(9, corners=RIGHT))
    answers = run.run(5)
    assert {answer.question.track_id: answer.label for answer in answers} == {
        **dict.fromkeys((1, 2, 3, 4), "no"),
        9: "yes",
    }
    assert engine.batches == [4, 1]
    assert [each.camera for each in run.delivered] == ["dock", "gate", "dock"]
    assert run.charged == {"dock": 3 * 250 + 1000, "gate": 250}
    assert run.queue.statistics() == CropStatistics(5, 5, 0, 0, 0)


def test_the_picture_of_a_frame_is_converted_once_for_all_its_crops(engine: CountingEngine) -> None:
    conversions: list[int] = []

    def convert() -> Picture:
        conversions.append(1)
        return make_frame().full_picture()

    run = WorkerRun(engine)
    run.queue.put(make_frame(full_picture=convert), ask(*range(6)))
    run.run(6)
    assert conversions == [1]


def test_a_picture_that_cannot_be_had_fails_its_crops_alone(engine: CountingEngine) -> None:
    def gone() -> Picture:
        raise SourceError("the picture is not available any more")

    run = WorkerRun(engine)
    run.queue.put(make_frame("dock", full_picture=gone), ask(1))
    run.queue.put(make_frame("gate"), ask(2))
    first, second = run.run(2)
    assert (first.failed, first.label, second.failed, second.label) == (True, None, False, "no")
    assert run.charged == {"gate": 1000}


@pytest.mark.parametrize("kind", [EngineError, EngineUnavailableError])
def test_an_engine_that_fails_gives_its_questions_back_and_is_asked_again(
    engine: CountingEngine, kind: type[EngineError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "visionedge.app.second_stage")
    run = WorkerRun(engine)
    engine.errors = [kind("out of memory"), kind("out of memory")]
    run.queue.put(make_frame(), ask(*range(9)))
    answers = run.run(9)
    assert [answer.failed for answer in answers] == [True] * 8 + [False]
    assert run.queue.statistics() == CropStatistics(9, 1, 0, 8, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "second model 'helmet': crops cannot be computed (out of memory); they are asked again every 0 s",
        "second model 'helmet': crops are computed again",
    ]


def test_while_there_is_no_engine_all_questions_are_given_back(engine: CountingEngine) -> None:
    run = WorkerRun(engine)
    run.missing = [EngineUnavailableError("the engine is warming up")]
    run.queue.put(make_frame(), ask(*range(9)))
    assert all(answer.failed for answer in run.run(9))
    assert engine.batches == []


# --- the models in use --------------------------------------------------------------------------------------


class HostRun:
    """A host with its threads, whose answers the test takes."""

    def __init__(self, engine: CountingEngine) -> None:
        self.engine = engine
        self.threads = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
        self.answers: SimpleQueue[CameraAnswers] = SimpleQueue()
        self.host = SecondStageHost(self.threads, self.use, self.answers.put)

    @contextmanager
    def use(self, _model: str) -> Iterator[EngineWithSelection]:
        selection = Selection.of(self.engine.info().model, 0.8, 0.5)
        yield EngineWithSelection.of(self.engine, selection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        assert self.threads.join(5) == []


def test_answers_come_from_the_thread_of_the_model(engine: CountingEngine) -> None:
    with HostRun(engine) as run:
        run.host.configure({"helmet"})
        assert run.threads.alive() == ["second:helmet"]
        assert run.host.ask(make_frame(), ask(1)) == []
        found = run.answers.get(timeout=10)
        assert (found.camera, [answer.label for answer in found.answers]) == ("dock", ["no"])
        assert run.host.statistics()["helmet"].answered == 1


def test_a_model_that_is_used_no_more_loses_its_thread_and_others_go_on(engine: CountingEngine) -> None:
    with HostRun(engine) as run:
        run.host.configure({"helmet", "vest"})
        run.host.configure({"vest"})
        assert run.host.statistics().keys() == {"vest"}
        run.host.ask(make_frame(), ask(1, model="vest"))
        assert run.answers.get(timeout=10).answers[0].label == "no"
        for thread in threading.enumerate():
            if thread.name == "second:helmet":
                thread.join(10)
        assert run.threads.alive() == ["second:vest"]


def test_questions_to_a_model_that_is_not_in_use_fail_at_once(engine: CountingEngine) -> None:
    with HostRun(engine) as run:
        (failed,) = run.host.ask(make_frame(), ask(1))
        assert failed.camera == "dock"
        assert [answer.failed for answer in failed.answers] == [True]


# --- with the scenes ----------------------------------------------------------------------------------------

WHOLE = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]], "attributes": {"helmet": "no"}}
CAMERA = {"uri": "demo:", "then": {"model": "helmet"}, "zones": {"all": WHOLE}}


class ModuleRun(HostRun):
    """Scenes with the second stage, of cameras in whose pictures two persons stand: a red and a blue one."""

    def __init__(self, engine: CountingEngine, data: Path, *names: str) -> None:
        super().__init__(engine)
        self.document = {"models": {"helmet": {"path": "h.onnx"}}, "cameras": dict.fromkeys(names, CAMERA)}
        self.state = AppState.of(parse_config(self.document), data, {}, lambda: None)
        self.scenes = SceneHost(
            self.state.snapshot, data, self.threads, deliver=lambda _events: None, second_stage=self.host
        )
        self.sequence = 0

    def configure(self, **cameras: Any) -> None:
        document = {**self.document, "cameras": cameras or self.document["cameras"]}
        asyncio.run(self.scenes.configure(parse_config(document).cameras))

    def see(self, camera: str = "dock") -> FrameResult:
        """The next picture of a camera."""
        self.sequence += 1
        frame = make_frame(camera, self.sequence)
        frame = replace(frame, captured_ns=self.sequence * 100_000_000)
        boxes = np.array([[0.1, 0.3, 0.3, 0.7], [0.7, 0.3, 0.9, 0.7]], np.float32)
        found = Detections(boxes, np.full(2, 0.9, np.float32), np.zeros(2, np.int32))
        plain = make_result(camera, self.sequence)
        return self.scenes.update(replace(plain, frame=frame, detections=found, candidates=found))

    def see_until_asked(self, camera: str = "dock") -> None:
        before = self.host.statistics()["helmet"].asked
        while self.host.statistics()["helmet"].asked == before:
            self.see(camera)

    def take(self) -> None:
        self.scenes.take_answers(self.answers.get(timeout=10))

    def inside(self, camera: str = "dock") -> int:
        return sum(self.scenes.document(camera)["zones"]["all"]["inside"].values())

    def __exit__(self, *_: object) -> None:
        self.host.close()
        assert self.scenes.flush(5)
        assert self.scenes.close(5)
        assert self.threads.join(5) == []


def shown(result: FrameResult) -> list[Any]:
    return [row["attributes"] for row in build_frame_document(result)["detections"]]


def test_each_track_is_asked_about_once_and_its_answer_is_in_frames_rules_and_metrics(
    engine: CountingEngine, tmp_path: Path
) -> None:
    with ModuleRun(engine, tmp_path, "dock") as run:
        run.configure()
        run.see_until_asked()
        assert run.inside() == 0
        run.take()
        results = [run.see() for _ in range(20)]
        assert [shown(result) for result in results] == [[{"helmet": "no"}, {"helmet": "yes"}]] * 20
        assert run.inside() == 1
        assert run.host.statistics()["helmet"] == CropStatistics(2, 2, 0, 0, 0)
        run.state.set_scenes(run.scenes.statistics)
        text = Metrics(lambda: collect_samples(run.state.snapshot())).render().decode()
        assert 'visionedge_crops_total{model="helmet",outcome="answered"} 2.0' in text
        assert 'visionedge_crops_asked_total{model="helmet"} 2.0' in text


def test_an_engine_that_hangs_holds_up_no_picture_and_no_other_camera(
    engine: CountingEngine, tmp_path: Path
) -> None:
    released = threading.Event()
    engine.before = lambda: released.wait(10)
    with ModuleRun(engine, tmp_path, "dock", "gate") as run:
        run.configure()
        run.see_until_asked("dock")
        run.see_until_asked("gate")
        assert all(result.attributes for result in [run.see(name) for name in ("dock", "gate") * 10])
        released.set()
        run.take()
        run.take()
        assert [shown(run.see(name)) for name in ("dock", "gate")] == [
            [{"helmet": "no"}, {"helmet": "yes"}]
        ] * 2


def test_a_camera_that_is_removed_while_its_questions_are_in_progress(
    engine: CountingEngine, tmp_path: Path
) -> None:
    """The answers are ignored, also when the camera has come back with other tracks."""
    released, began = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        released.wait(10)

    engine.before = wait
    with ModuleRun(engine, tmp_path, "dock", "gate") as run:
        run.configure()
        run.see_until_asked("dock")
        assert began.wait(10)
        run.configure(gate=CAMERA)
        run.configure()
        released.set()
        run.take()
        assert shown(run.see("dock")) == [{}, {}]
        run.see_until_asked("dock")
        run.take()
        assert shown(run.see("dock")) == [{"helmet": "no"}, {"helmet": "yes"}]


def test_a_change_of_the_second_stage_takes_effect_on_tracks_that_go_on(
    engine: CountingEngine, tmp_path: Path
) -> None:
    with ModuleRun(engine, tmp_path, "dock") as run:
        run.configure()
        run.see_until_asked()
        run.take()
        before = run.see()
        run.configure(dock={"uri": "demo:", "tracking": "on"})
        after = run.see()
        assert (shown(after), after.track_ids) == ([{}, {}], before.track_ids)
        assert run.host.statistics() == {}
        run.configure(dock={**CAMERA, "then": {"model": "helmet", "every": 1}})
        run.see()
        run.take()
        last = run.see()
        assert (shown(last), last.track_ids) == ([{"helmet": "no"}, {"helmet": "yes"}], before.track_ids)
