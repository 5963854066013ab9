"""Lanes: every frame is delivered or counted, in order and with its times, for any result of the engine."""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from engine_infos import make_engine_info
from tiny_models import TinyDetector
from visionedge.engine.batcher import Batcher, DropReason
from visionedge.engine.device.faults import RETRIED_FAULTS, EngineError, EngineUnavailableError, Fault
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.interface import EngineInfo, Inference
from visionedge.engine.lanes import BatchErrorLog, Lane, LanePool
from visionedge.engine.plan import Plan
from visionedge.frames.types import Frame, FrameResult, Picture, Placement
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import TRACKED_CONFIDENCE, CameraSelection, Rows, Selection
from visionedge.runtime.threads import ThreadGroup

SURE = Selection(0.4, None)
ONE_BOX: Rows = np.array([[0, 0, 32, 24, 0.9, 2], [0, 0, 1, 1, 0.25, 0]], np.float32)


class SteppingClock:
    """Each look is a step later."""

    def __init__(self, step_ns: int = 10) -> None:
        self.now_ns = 0
        self._step_ns = step_ns

    def __call__(self) -> int:
        self.now_ns += self._step_ns
        return self.now_ns


class FakeEngine:
    """Finds the same box on every picture by default."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.plan = Plan(1, (8,), "test")
        self.sizes: list[int] = []
        self.least_scores: list[float | None] = []
        self.act: Callable[[int], Rows] = lambda count: np.stack([ONE_BOX] * count)

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        if len({picture.shape for picture in pictures}) > 1:
            raise EngineError("takes pictures of one size")
        self.sizes.append(len(pictures))
        self.least_scores.append(min_score)
        return Inference(self.act(len(pictures)), "cpu")

    def info(self) -> EngineInfo:
        return make_engine_info(self._model, self.plan)

    def close(self) -> None:
        """Nothing is open."""


class NoThreads(ThreadGroup):
    """Starts no thread: the test runs the lane itself."""

    def start(self, name: str, target: Callable[[], None], **_kind: bool) -> threading.Thread:
        return threading.Thread(target=target, name=name)


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(load_model(TinyDetector().save(tmp_path / "tiny.onnx")))


def frame(camera: str, sequence: int = 1, width_px: int = 64) -> Frame:
    picture = np.zeros((48, width_px, 3), np.uint8)
    utc = datetime(2026, 11, 22, tzinfo=UTC)
    whole = Placement(0, 0, 64, 48)
    return Frame(camera, sequence, 1, 0, utc, 640, 480, picture, whole, lambda: picture)


class PreloadedBatcher:
    """A batcher whose frames are all put before the lane starts; the lane ends with the last of them."""

    def __init__(self, engine: FakeEngine, *frames: Frame, clock: Callable[[], int] | None = None) -> None:
        self.batcher = Batcher(8, 10**9, clock or SteppingClock(0))
        self.delivered: list[FrameResult] = []
        self.pool = LanePool(self.batcher, NoThreads(lambda _name, _error: None), self.deliver)
        self.pool.swap_engine(engine, SURE)
        self.lane = Lane(self.batcher, self.pool, self.deliver, clock=clock or SteppingClock())
        self.left = len(frames)
        for one in frames:
            self.batcher.open(one.camera)
            self.batcher.put(one)

    def deliver(self, result: FrameResult) -> None:
        self.delivered.append(result)

    def run(self) -> None:
        """Run the lane on this thread until nothing waits."""

        def watch() -> None:
            for camera in self.batcher.statistics().cameras:
                self.batcher.wait_taken(camera, 5)
            self.batcher.close()

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.lane.run()
        watcher.join()


def test_a_frame_becomes_a_result_with_its_detections_and_names(engine: FakeEngine) -> None:
    preloaded = PreloadedBatcher(engine, frame("dock", 7))
    preloaded.run()
    (result,) = preloaded.delivered
    assert (result.frame.sequence, result.model, result.device) == (7, "tiny", "cpu")
    np.testing.assert_allclose(result.detections.boxes, [[0, 0, 0.5, 0.5]])
    assert result.labels[result.detections.class_ids[0]] == "class-2"
    assert preloaded.batcher.statistics().cameras["dock"].analysed == 1


def test_the_timing_has_wait_inference_and_total(engine: FakeEngine) -> None:
    """Captured at 0; the clock steps by 10: taken at 10, the engine from 20 to 30, delivered at 40 and 50."""
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"), clock=SteppingClock())
    preloaded.run()
    times = [(r.timing.wait_ns, r.timing.infer_ns, r.timing.total_ns) for r in preloaded.delivered]
    assert times == [(10, 10, 40), (10, 10, 50)]
    assert {r.timing.batch_size for r in preloaded.delivered} == {2}


def test_a_lane_takes_what_the_plan_allows(engine: FakeEngine) -> None:
    engine.plan = Plan(1, (1,), "one picture")
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"), frame("hall"))
    preloaded.run()
    assert engine.sizes == [1, 1, 1]


def fail(_count: int) -> Rows:
    raise EngineError("the device is gone")


def test_a_failed_batch_is_counted_and_the_lane_continues(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.plan = Plan(1, (1,), "one picture")
    failing = iter([True, False])
    works = engine.act
    engine.act = lambda count: fail(count) if next(failing) else works(count)
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"))
    preloaded.run()
    cameras = preloaded.batcher.statistics().cameras
    assert (cameras["dock"].dropped[DropReason.FAILED], cameras["gate"].analysed) == (1, 1)
    assert [r.frame.camera for r in preloaded.delivered] == ["gate"]
    assert "a batch failed: the device is gone" in caplog.text


def away(_count: int) -> Rows:
    raise EngineUnavailableError("its process died")


def test_a_batch_without_an_engine_is_counted_and_not_logged_again(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The supervisor has reported it; each lane would only repeat it."""
    engine.act = away
    preloaded = PreloadedBatcher(engine, frame("dock"))
    preloaded.run()
    assert preloaded.batcher.statistics().cameras["dock"].dropped[DropReason.FAILED] == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def lost(fault: Fault) -> EngineError:
    """The error of a remote device that lost a batch: on the whole, or with one replica."""
    kind = EngineUnavailableError if fault is Fault.UNREACHABLE else EngineError
    return kind("no server answers", fault)


@pytest.mark.parametrize("fault", sorted(RETRIED_FAULTS))
def test_a_batch_that_a_remote_device_lost_is_computed_again_while_its_frames_are_fresh(
    engine: FakeEngine, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """By the engine that takes over; until it is there, the lane waits for it."""
    failures = iter([lost(fault), EngineUnavailableError("the engine is restarting")])
    works = engine.act

    def act(count: int) -> Rows:
        error = next(failures, None)
        if error is not None:
            raise error
        return works(count)

    engine.act = act
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"))
    preloaded.run()
    assert [result.frame.camera for result in preloaded.delivered] == ["dock", "gate"]
    cameras = preloaded.batcher.statistics().cameras
    assert [(one.analysed, one.in_flight) for one in cameras.values()] == [(1, 0), (1, 0)]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_frames_that_are_old_when_the_other_engine_is_there_count_as_stale(engine: FakeEngine) -> None:
    """The freshness rule, and not a failure; the camera's next frame is taken."""
    clock = SteppingClock(0)
    works = engine.act

    def act(count: int) -> Rows:
        if clock.now_ns == 0:
            clock.now_ns = 2 * 10**9
            raise lost(Fault.UNREACHABLE)
        return works(count)

    engine.act = act
    preloaded = PreloadedBatcher(engine, frame("dock"), clock=clock)
    preloaded.run()
    dock = preloaded.batcher.statistics().cameras["dock"]
    assert (dock.dropped[DropReason.STALE], dock.dropped[DropReason.FAILED], dock.in_flight) == (1, 0, 0)


def test_a_lane_does_not_wait_for_another_engine_when_the_pool_is_closed(engine: FakeEngine) -> None:
    def act(_count: int) -> Rows:
        preloaded.pool.close()
        raise lost(Fault.UNREACHABLE)

    engine.act = act
    preloaded = PreloadedBatcher(engine, frame("dock"))
    preloaded.run()
    assert preloaded.batcher.statistics().cameras["dock"].dropped[DropReason.FAILED] == 1


def test_pictures_of_different_sizes_fail_only_their_batch(engine: FakeEngine) -> None:
    """As for a moment when a model was exchanged."""
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate", width_px=32))
    preloaded.run()
    failed = [one.dropped[DropReason.FAILED] for one in preloaded.batcher.statistics().cameras.values()]
    assert failed == [1, 1]


def test_the_pictures_of_a_batch_are_resized_when_it_is_taken(engine: FakeEngine) -> None:
    """By several threads; after the pool is closed, for a batch in progress, by the lane alone."""
    cameras = [f"cam-{number}" for number in range(6)]

    def resizable(camera: str) -> Frame:
        picture = np.full((48, 64, 3), cameras.index(camera), np.uint8)
        return replace(frame(camera), image=lambda: picture)

    frames = [resizable(camera) for camera in cameras]
    preloaded = PreloadedBatcher(engine, *frames)
    preloaded.run()
    assert engine.sizes == [6]
    assert {result.frame.camera for result in preloaded.delivered} == set(cameras)
    for _ in range(2):
        assert [picture[0, 0, 0] for picture in preloaded.pool.resize(frames)] == list(range(6))
        preloaded.pool.close()


def test_a_picture_that_cannot_be_resized_fails_its_batch_only(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Picture:
        raise ValueError("no planes")

    engine.plan = Plan(1, (1,), "one picture")
    preloaded = PreloadedBatcher(engine, replace(frame("dock"), image=refuse), frame("gate"))
    preloaded.run()
    counts = preloaded.batcher.statistics().cameras
    assert (counts["dock"].dropped[DropReason.FAILED], counts["gate"].analysed) == (1, 1)
    assert "a picture cannot be resized: ValueError: no planes" in caplog.text


def test_an_engine_that_gives_too_few_results_fails_the_batch(engine: FakeEngine) -> None:
    engine.act = lambda count: (
        np.stack([ONE_BOX] * (count - 1)) if count > 1 else np.zeros((0, 2, 6), np.float32)
    )
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"))
    preloaded.run()
    assert preloaded.delivered == []
    assert [one.dropped[DropReason.FAILED] for one in preloaded.batcher.statistics().cameras.values()] == [
        1,
        1,
    ]


def test_a_new_selection_counts_from_the_next_batch_on(engine: FakeEngine) -> None:
    engine.plan = Plan(1, (1,), "one picture")
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"))
    works = engine.act

    def act(count: int) -> Rows:
        preloaded.pool.select(Selection(0.05, None))  # while the first is computed
        return works(count)

    engine.act = act
    preloaded.run()
    assert [len(r.detections) for r in preloaded.delivered] == [1, 2]
    assert engine.least_scores == [0.4, 0.05]


def test_a_tracked_camera_gets_weak_boxes_and_others_of_its_batch_do_not(engine: FakeEngine) -> None:
    preloaded = PreloadedBatcher(engine, frame("dock"), frame("gate"))
    preloaded.pool.select(Selection(0.4, None, cameras={"dock": CameraSelection(0.4, None, is_tracked=True)}))
    preloaded.run()
    assert engine.least_scores == [TRACKED_CONFIDENCE]
    found = {r.frame.camera: (len(r.detections), r.candidates) for r in preloaded.delivered}
    assert found["gate"] == (1, None)
    reported, candidates = found["dock"]
    assert reported == 1
    assert candidates is not None
    assert len(candidates) == 2


def test_an_unexpected_error_ends_the_lane_and_returns_the_batch(engine: FakeEngine) -> None:
    """Its thread is vital: the module stops, rather than going on without a lane."""
    preloaded = PreloadedBatcher(engine, frame("dock"))

    def deliver(_result: FrameResult) -> None:
        raise LookupError("a bug")

    lane = Lane(preloaded.batcher, preloaded.pool, deliver)
    with pytest.raises(LookupError):
        lane.run()
    dock = preloaded.batcher.statistics().cameras["dock"]
    assert (dock.in_flight, dock.dropped[DropReason.FAILED]) == (0, 1)


class OverlappingEngine(FakeEngine):
    """Two lanes compute at the same time: the first picture is held until another one is computed."""

    def __init__(self, model: Model, first: Callable[[], Rows]) -> None:
        super().__init__(model)
        self.plan = Plan(2, (1,), "two lanes")
        self.began, self.others = threading.Event(), threading.Event()
        self._first = first

    def infer(self, pictures: PictureBatch, min_score: float | None = None) -> Inference:
        if self.began.is_set():
            return super().infer(pictures, min_score)
        self.began.set()
        assert self.others.wait(20)
        return Inference(self._first(), "cpu")


def run_two_lanes(engine: OverlappingEngine, *, deliver: Callable[[FrameResult], None]) -> Batcher:
    """Two frames of a camera through two lanes, the later one first."""
    batcher = Batcher(8, 10**9, SteppingClock(0))
    batcher.open("dock")
    pool = LanePool(batcher, NoThreads(lambda _name, _error: None), deliver)
    pool.swap_engine(engine, SURE)
    batcher.put(frame("dock", 1))
    slow = threading.Thread(target=Lane(batcher, pool, deliver).run)
    slow.start()
    assert engine.began.wait(20)
    batcher.put(frame("dock", 2))
    second = batcher.take(0)
    assert second is not None
    Lane(batcher, pool, deliver)._finish(second)
    assert batcher.statistics().cameras["dock"].in_flight == 2
    engine.others.set()
    batcher.close()
    slow.join(20)
    assert not slow.is_alive()
    return batcher


@pytest.mark.parametrize("is_lost", [False, True], ids=["computed", "computed-again"])
def test_results_of_two_lanes_are_delivered_in_order(engine: FakeEngine, is_lost: bool) -> None:
    """Also if a remote device loses the first batch, which is computed again."""

    def first() -> Rows:
        if is_lost:
            raise lost(Fault.REPLICA_FAILED)
        return np.stack([ONE_BOX])

    delivered: list[FrameResult] = []
    batcher = run_two_lanes(OverlappingEngine(engine.info().model, first), deliver=delivered.append)
    assert [each.frame.sequence for each in delivered] == [1, 2]
    assert batcher.statistics().cameras["dock"].analysed == 2


def test_a_lane_that_fails_delivers_the_results_that_waited_for_it(engine: FakeEngine) -> None:
    delivered: list[FrameResult] = []
    batcher = run_two_lanes(OverlappingEngine(engine.info().model, lambda: fail(1)), deliver=delivered.append)
    assert [each.frame.sequence for each in delivered] == [2]
    dock = batcher.statistics().cameras["dock"]
    assert (dock.analysed, dock.dropped[DropReason.FAILED], dock.in_flight) == (1, 1, 0)


def test_a_delivery_that_raises_leaves_what_waits_behind_it_to_another_lane(engine: FakeEngine) -> None:
    preloaded = PreloadedBatcher(engine, frame("dock", 1))
    batcher = preloaded.batcher
    first = batcher.take(0)
    batcher.put(frame("dock", 2))
    second = batcher.take(0)
    assert first is not None
    assert second is not None

    def deliver(_result: FrameResult) -> None:
        Lane(batcher, preloaded.pool, preloaded.deliver)._finish(second)  # while the first is delivered
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        Lane(batcher, preloaded.pool, deliver)._finish(first)
    assert preloaded.delivered == []
    released = batcher.take(0)
    assert released is not None
    Lane(batcher, preloaded.pool, preloaded.deliver)._hand_on(released.released)
    assert [each.frame.sequence for each in preloaded.delivered] == [2]
    dock = batcher.statistics().cameras["dock"]
    assert (dock.analysed, dock.dropped[DropReason.FAILED], dock.in_flight) == (1, 1, 0)


def test_errors_are_logged_once_a_second_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    clock = SteppingClock(250_000_000)
    errors = BatchErrorLog(clock)
    for number in range(9):
        errors.add(EngineError(f"failure {number}"))
    assert [record.getMessage() for record in caplog.records] == [
        "a batch failed: failure 0",
        "a batch failed (and 3 before it): failure 4",
        "a batch failed (and 3 before it): failure 8",
    ]
