"""Several models share one machine: each camera gets the same engine time, whatever its model costs."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest

from visionedge.engine.batcher import Batch, Batcher, DropReason
from visionedge.frames.types import Detections, Frame, FrameResult, Placement, Timing

MS = 1_000_000
SECOND = 1_000 * MS
IMAGE = np.zeros((2, 2, 3), np.uint8)
WHOLE = Placement(0.0, 0.0, 2.0, 2.0)
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def frame(camera: str, sequence: int, at_ns: int, model: str) -> Frame:
    utc = datetime(2026, 11, 30, tzinfo=UTC)
    return Frame(camera, sequence, 1, at_ns, utc, 2, 2, IMAGE, WHOLE, lambda: IMAGE, model=model)


def result(one: Frame, infer_ns: int, size: int) -> FrameResult:
    return FrameResult(one, NOTHING, Timing(0, infer_ns, infer_ns, size), "cpu", one.model, ())


@dataclass
class SharedMachine:
    """Cameras that always have a frame, and the lanes of models whose pictures take a fixed time.

    `models`: engine time of a picture in ms, lanes, and pictures in a batch. `cameras`: their models.
    """

    models: dict[str, tuple[float, int, int]]
    cameras: dict[str, str]
    hung: str | None = None
    failing: str | None = None
    now_ns: int = 0
    busy: list[tuple[int, int, Batch]] = field(default_factory=list)
    sequences: Counter[str] = field(default_factory=Counter)
    most_used: float = 0.0

    def __post_init__(self) -> None:
        self.batcher = Batcher(8, 100 * SECOND, clock=lambda: self.now_ns)
        self.idle = {model: lanes for model, (_, lanes, _) in self.models.items()}
        for model, (_, lanes, _) in self.models.items():
            self.batcher.use_lanes(model, lanes)
        for camera in self.cameras:
            self.batcher.open(camera)

    def play(self, seconds: float) -> None:
        """Let time pass; every camera that has no frame in its slot offers one."""
        end_ns = self.now_ns + round(seconds * SECOND)
        while self.now_ns < end_ns:
            self.offer()
            while self._take():
                self.offer()
            self.busy.sort(key=lambda each: each[:2])
            if self.busy[0][0] > self.now_ns + 200 * MS:
                self.now_ns += 50 * MS  # lanes ask again when a batch has run for too long
                continue
            self.now_ns, _, batch = self.busy.pop(0)
            self.finish(batch)

    def offer(self) -> None:
        """A frame for each empty slot."""
        for camera, seen in self.batcher.statistics().cameras.items():
            if not seen.waiting:
                self.sequences[camera] += 1
                model = self.cameras[camera]
                self.batcher.put(frame(camera, self.sequences[camera], self.now_ns, model))

    def _take(self) -> bool:
        """Let an idle lane of any model take a batch, if the batcher gives one."""
        for model, (picture_ms, lanes, size) in self.models.items():
            if self.idle[model] and (batch := self.batcher.take(0, size, model)) is not None:
                assert {each.model for each in batch.frames} == {model}
                duration_ns = round(picture_ms * MS * len(batch))
                if model == self.hung:
                    duration_ns = 10_000 * SECOND
                elif model == self.failing:
                    duration_ns = 1 * SECOND
                self.busy.append((self.now_ns + duration_ns, batch.number, batch))
                self.idle[model] -= 1
                running = [self.models[each.frames[0].model] for _, _, each in self.busy]
                self.most_used = max(self.most_used, sum(1 / lanes for _, lanes, _ in running))
                return True
        return False

    def finish(self, batch: Batch) -> None:
        """Give a batch back, and deliver its results."""
        picture_ms = self.models[batch.frames[0].model][0]
        self.idle[batch.frames[0].model] += 1
        infer_ns = round(picture_ms * MS * len(batch))
        computed = () if batch.frames[0].model == self.failing else batch.frames
        found = self.batcher.done(batch, [result(each, infer_ns, len(batch)) for each in computed])
        while found:
            found = self.batcher.confirm(found, len(found))

    def engine_s(self) -> dict[str, float]:
        """The engine time of each camera."""
        return {name: seen.engine_ns / 1e9 for name, seen in self.batcher.statistics().cameras.items()}


def fairness(values: list[float]) -> float:
    """Jain's index: 1 when all are equal."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


SIX = {"a1": "fast", "a2": "fast", "b1": "slow", "b2": "slow", "c1": "slower", "c2": "slower"}


@pytest.mark.parametrize(
    "models",
    [
        {"fast": (5, 3, 1), "slow": (20, 3, 1), "slower": (70, 3, 1)},
        {"fast": (5, 2, 8), "slow": (20, 2, 4), "slower": (70, 2, 2)},
        {"fast": (5, 4, 1), "slow": (20, 1, 2), "slower": (70, 2, 1)},
    ],
    ids=["on the CPU", "in batches", "with other plans"],
)
def test_saturated_cameras_get_equal_engine_time(models: dict[str, tuple[float, int, int]]) -> None:
    machine = SharedMachine(models, SIX)
    machine.play(20)
    assert fairness(list(machine.engine_s().values())) > 0.995
    assert machine.most_used <= 1.001, "only as many batches run as keep the machine busy"


def test_more_cameras_of_one_model_get_more_of_the_machine() -> None:
    cameras = {"a1": "fast", **{f"b{number}": "slow" for number in range(5)}}
    machine = SharedMachine({"fast": (5, 2, 1), "slow": (20, 2, 1)}, cameras)
    machine.play(10)
    assert fairness(list(machine.engine_s().values())) > 0.995


def test_engine_time_beside_frames_counts_for_a_camera() -> None:
    machine = SharedMachine({"fast": (5, 1, 1)}, {"dock": "fast", "yard": "fast"})
    machine.play(1)
    machine.batcher.charge("dock", 2 * SECOND)
    machine.play(10)
    seen = machine.engine_s()
    assert seen["dock"] == pytest.approx(seen["yard"], rel=0.01)


def test_a_model_that_hangs_does_not_stop_the_cameras_of_another_one() -> None:
    machine = SharedMachine({"fast": (5, 2, 1), "slow": (20, 2, 1)}, {"dock": "fast", "yard": "slow"})
    machine.play(2)
    machine.hung = "slow"
    machine.play(1)
    before = machine.engine_s()["dock"]
    machine.play(10)
    assert machine.engine_s()["dock"] - before > 9, "both lanes of the machine work for the other model"


def test_a_model_without_an_engine_costs_the_cameras_of_another_one_nothing() -> None:
    """Each of its batches waits for a second and fails, for as long as its process is away."""
    machine = SharedMachine({"fast": (5, 2, 1), "slow": (20, 2, 1)}, {"dock": "fast", "yard": "slow"})
    machine.play(2)
    machine.failing = "slow"
    machine.play(3)
    before = machine.engine_s()["dock"]
    machine.play(10)
    assert machine.engine_s()["dock"] - before > 19.5
    machine.failing = None
    machine.play(3)
    first = machine.engine_s()
    machine.play(10)
    last = machine.engine_s()
    assert last["yard"] - first["yard"] == pytest.approx(last["dock"] - first["dock"], rel=0.05)


def test_a_camera_that_paused_has_no_long_lead() -> None:
    machine = SharedMachine({"fast": (5, 1, 1)}, {"dock": "fast"})
    machine.play(20)
    machine.cameras["yard"] = "fast"
    machine.batcher.open("yard")
    machine.batcher.open("gate")
    machine.cameras["gate"] = "fast"
    before = machine.engine_s()["dock"]
    machine.play(3)
    assert machine.engine_s()["dock"] - before == pytest.approx(1, rel=0.2)


def test_the_frames_of_a_removed_model_are_discarded_and_its_lanes_end() -> None:
    made = Batcher(8, SECOND, clock=lambda: 0)
    made.open("dock")
    made.use_lanes("", 1)
    made.use_lanes("small", 1)
    ended = threading.Event()

    def run_lane() -> None:
        assert made.take(20, model="small") is None
        ended.set()

    lane = threading.Thread(target=run_lane)
    lane.start()
    made.put(frame("dock", 1, 0, "other"))
    made.remove_model("small")
    lane.join(20)
    assert ended.is_set()
    made.use_lanes("other", 1)
    made.remove_model("other")
    assert made.statistics().cameras["dock"].dropped[DropReason.DISCARDED] == 1
    assert made.take(0, model="other") is None
