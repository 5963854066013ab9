"""A hot swap: one engine replaces another; every frame is computed once, by the engine that it fits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from engine_infos import make_engine_info
from tiny_models import TinyDetector
from visionedge.engine.batcher import Batcher, DropReason
from visionedge.engine.device.faults import EngineError
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.interface import EngineInfo, Inference, ProcessStatus
from visionedge.engine.lanes import LanePool
from visionedge.engine.plan import Plan
from visionedge.frames.types import DEFAULT_MODEL, Frame, FrameResult, InputSpec, Placement
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import Rows, Selection
from visionedge.runtime.threads import ThreadGroup

SURE = Selection(0.4, None)
NOW = datetime(2026, 11, 22, tzinfo=UTC)
ROWS: Rows = np.array([[0, 0, 32, 24, 0.9, 2]], np.float32)


class FakeEngine:
    """Records what it computes; `hold` delays its first batch. In a process it needs one more lane."""

    def __init__(self, model: Model, lanes: int = 1, process: ProcessStatus | None = None) -> None:
        self._model = model
        self._process = process
        self.plan = Plan(lanes, (4,), "test")
        self.computed = 0
        self.began = threading.Event()
        self.hold: threading.Event | None = None

    def info(self) -> EngineInfo:
        return replace(make_engine_info(self._model, self.plan), process=self._process)

    def infer(self, pictures: PictureBatch, _min_score: float | None = None) -> Inference:
        self.began.set()
        if self.hold is not None:
            assert self.hold.wait(20)
        if any(picture.shape[1] != self._model.input.width_px for picture in pictures):
            raise EngineError("pictures of another size")
        self.computed += len(pictures)
        return Inference(np.stack([ROWS] * len(pictures)), "cpu")

    def close(self) -> None:
        """Nothing is open."""


class ResultCollector:
    """The results, and a way to wait for so many."""

    def __init__(self) -> None:
        self.results: list[FrameResult] = []
        self._more = threading.Condition()

    def __call__(self, result: FrameResult) -> None:
        with self._more:
            self.results.append(result)
            self._more.notify_all()

    def wait_for(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self.results) >= count, 20)

    @property
    def seen(self) -> list[tuple[str, int, str]]:
        return [(each.frame.camera, each.frame.sequence, each.model) for each in self.results]


class LanePoolHarness:
    """A lane pool on real threads."""

    def __init__(self) -> None:
        self.deaths: list[str] = []
        self.thread_group = ThreadGroup(lambda name, _error: self.deaths.append(name))
        self.batcher = Batcher(8, 10**11, clock=lambda: 0)
        self.delivered = ResultCollector()
        self.lineup = LanePool(self.batcher, self.thread_group, self.delivered)

    def put(self, camera: str, sequence: int, spec: InputSpec) -> None:
        self.batcher.open(camera)
        image = np.zeros((spec.height_px, spec.width_px, 3), np.uint8)
        whole = Placement(0, 0, spec.width_px, spec.height_px)
        self.batcher.put(Frame(camera, sequence, 1, 0, NOW, 640, 480, image, whole, lambda: image, spec))


@pytest.fixture
def harness() -> Iterator[LanePoolHarness]:
    made = LanePoolHarness()
    yield made
    made.lineup.close()
    made.batcher.close()
    assert made.thread_group.join(10) == []
    assert made.deaths == []


@pytest.fixture
def small(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "small.onnx"))


@pytest.fixture
def large(tmp_path: Path) -> Model:
    return load_model(TinyDetector(width_px=96, height_px=64).save(tmp_path / "large.onnx"))


@contextmanager
def elsewhere(work: Callable[[], None]) -> Iterator[threading.Thread]:
    """Work on another thread, which has ended afterwards."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(20)
        assert not thread.is_alive()


def test_frames_prepared_for_the_previous_model_are_computed_by_it(
    harness: LanePoolHarness, small: Model, large: Model
) -> None:
    """Also when frames of both wait side by side, and would be one batch."""
    old, new = FakeEngine(small), FakeEngine(large)
    old.hold = threading.Event()
    harness.lineup.swap_engine(old, SURE)
    harness.put("dock", 1, small.input)
    assert old.began.wait(20)  # the only lane is busy, so what comes now waits
    harness.put("gate", 1, small.input)
    harness.put("yard", 1, large.input)
    harness.lineup.swap_engine(new, SURE)
    old.hold.set()
    harness.delivered.wait_for(3)
    assert sorted(harness.delivered.seen) == [
        ("dock", 1, "small"),
        ("gate", 1, "small"),
        ("yard", 1, "large"),
    ]
    assert all(not any(c.dropped.values()) for c in harness.batcher.statistics().cameras.values())


def test_the_previous_engine_is_closed_once_no_frame_needs_it(
    harness: LanePoolHarness, small: Model, large: Model
) -> None:
    old = FakeEngine(small)
    old.hold = threading.Event()
    harness.lineup.swap_engine(old, SURE)
    harness.put("dock", 1, small.input)
    assert old.began.wait(20)
    harness.lineup.swap_engine(FakeEngine(large), SURE)
    with elsewhere(lambda: harness.lineup.drain_previous(20)) as settling:
        settling.join(0.2)
        assert settling.is_alive()
        old.hold.set()
    assert harness.delivered.seen == [("dock", 1, "small")]
    assert harness.lineup.find_engines(DEFAULT_MODEL).previous is None


def test_a_camera_with_frames_in_both_engines_gets_its_results_in_order(
    harness: LanePoolHarness, small: Model, large: Model
) -> None:
    old, new = FakeEngine(small, lanes=2), FakeEngine(large, lanes=2)
    old.hold = threading.Event()
    harness.lineup.swap_engine(old, SURE)
    harness.put("dock", 1, small.input)
    assert old.began.wait(20)
    harness.lineup.swap_engine(new, SURE)
    harness.put("dock", 2, large.input)
    assert new.began.wait(20)
    harness.put("gate", 1, large.input)
    harness.delivered.wait_for(1)
    assert harness.delivered.seen == [("gate", 1, "large")]
    old.hold.set()
    harness.delivered.wait_for(3)
    assert harness.delivered.seen[1:] == [("dock", 1, "small"), ("dock", 2, "large")]


def test_late_frames_for_a_closed_model_fail_and_are_counted(
    harness: LanePoolHarness, small: Model, large: Model
) -> None:
    harness.lineup.swap_engine(FakeEngine(small), SURE)
    harness.lineup.swap_engine(FakeEngine(large), SURE)
    harness.lineup.drain_previous(20)
    harness.put("dock", 1, small.input)
    harness.put("gate", 1, large.input)
    harness.delivered.wait_for(1)
    assert harness.delivered.seen == [("gate", 1, "large")]
    harness.put("dock", 2, large.input)
    harness.delivered.wait_for(2)
    assert harness.batcher.statistics().cameras["dock"].dropped[DropReason.FAILED] == 1


def test_a_caller_beside_the_lanes_keeps_the_engine_open(harness: LanePoolHarness, small: Model) -> None:
    harness.lineup.swap_engine(FakeEngine(small), SURE)
    with harness.lineup.use() as running:
        harness.lineup.swap_engine(FakeEngine(small), SURE)
        harness.lineup.drain_previous(0.1)
        with elsewhere(lambda: harness.lineup.drain_previous(0.1)):
            pass
        assert running.model is small


def test_lanes_are_added_and_paused_according_to_the_plan(harness: LanePoolHarness, small: Model) -> None:
    harness.lineup.swap_engine(FakeEngine(small, lanes=2, process=ProcessStatus(1, 0, None)), SURE)
    assert sorted(harness.thread_group.alive()) == ["lane:0", "lane:1", "lane:2", "lane:3"]
    slow = FakeEngine(small, lanes=1)
    slow.hold = threading.Event()
    harness.lineup.swap_engine(slow, SURE)
    for number in range(6):  # those that waited for a frame take one more, and rest then
        harness.put(f"camera-{number}", 1, small.input)
    slow.hold.set()
    harness.delivered.wait_for(6)
    slow.hold = threading.Event()
    harness.put("dock", 1, small.input)
    harness.delivered.wait_for(6)
    slow.plan = Plan(2, (4,), "more")
    harness.lineup.start_lanes()
    slow.hold.set()
    harness.delivered.wait_for(7)
    assert sorted(harness.thread_group.alive()) == ["lane:0", "lane:1", "lane:2", "lane:3"]


def test_another_selection_counts_from_the_next_batch_on(harness: LanePoolHarness, small: Model) -> None:
    harness.lineup.swap_engine(FakeEngine(small), SURE)
    harness.put("dock", 1, small.input)
    harness.delivered.wait_for(1)
    harness.lineup.select(Selection(0.95, None))
    harness.put("dock", 2, small.input)
    harness.delivered.wait_for(2)
    assert [len(each.detections) for each in harness.delivered.results] == [1, 0]


def test_without_an_engine_nothing_is_computed(harness: LanePoolHarness) -> None:
    with pytest.raises(EngineError, match="warming up"), harness.lineup.use():
        pass
