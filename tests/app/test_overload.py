"""Overload in simulated time: 64 cameras offer three times the capacity of the engine."""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest

from visionedge.engine.batcher import Batch, Batcher, BatcherStatistics, DropReason
from visionedge.frames.types import Detections, Frame, FrameResult, Placement, Timing

CAMERAS = 64
FPS = 5
OVERLOAD = 3
MS = 1_000_000
INTERVAL_NS = 1_000 * MS // FPS
IMAGE = np.zeros((2, 2, 3), np.uint8)
PLACEMENT = Placement(0.0, 0.0, 2.0, 2.0)
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


@dataclass
class OverloadSimulation:
    """Cameras at even phases and lanes whose batches take a fixed time, played on a clock of its own."""

    lanes: int
    batch: int
    seconds: int = 60
    now_ns: int = 0
    ages_ns: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    delivered: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.batch, 10_000 * MS, clock=lambda: self.now_ns)
        self.service_ns = 1_000 * MS * OVERLOAD * self.batch * self.lanes // (CAMERAS * FPS)
        self.busy: list[tuple[int, Batch]] = []

    def play(self) -> BatcherStatistics:
        """Run the simulation until nothing is in flight."""
        names = [f"camera-{number:02}" for number in range(CAMERAS)]
        for name in names:
            self.batcher.open(name)
        arrivals = sorted(
            (turn * INTERVAL_NS + number * INTERVAL_NS // CAMERAS, name, turn + 1)
            for turn in range(self.seconds * FPS)
            for number, name in enumerate(names)
        )
        for at_ns, name, sequence in arrivals:
            self._until(at_ns)
            self.batcher.put(frame(name, sequence, at_ns))
            self._take()
        self._until(self.now_ns + self.seconds * 1_000 * MS)
        return self.batcher.statistics()

    def _until(self, at_ns: int) -> None:
        while self.busy and self.busy[0][0] <= at_ns:
            self.now_ns, batch = self.busy.pop(0)
            found = self.batcher.done(batch, [result(each) for each in batch.frames])
            while found:
                for each in found:
                    self.ages_ns[each.frame.camera].append(self.now_ns - each.frame.captured_ns)
                    self.delivered.append(each.frame)
                found = self.batcher.confirm(found, len(found))
            self._take()
        self.now_ns = max(self.now_ns, at_ns)

    def _take(self) -> None:
        while len(self.busy) < self.lanes and (batch := self.batcher.take(0.0)) is not None:
            self.busy.append((self.now_ns + self.service_ns, batch))


def frame(camera: str, sequence: int, at_ns: int) -> Frame:
    utc = datetime(2026, 1, 1, tzinfo=UTC)
    return Frame(
        camera=camera,
        sequence=sequence,
        epoch=1,
        captured_ns=at_ns,
        captured_utc=utc,
        width_px=2,
        height_px=2,
        image=IMAGE,
        placement=PLACEMENT,
        full_picture=lambda: IMAGE,
    )


def result(one: Frame) -> FrameResult:
    return FrameResult(one, NOTHING, Timing(0, 0, 0, 1), "cpu", "tiny", ())


@pytest.fixture(scope="module", params=[(1, 8), (2, 1), (2, 8)], ids=lambda pair: f"{pair[0]}x{pair[1]}")
def played(request: pytest.FixtureRequest) -> tuple[OverloadSimulation, BatcherStatistics]:
    simulation = OverloadSimulation(*request.param)
    return simulation, simulation.play()


Played = tuple[OverloadSimulation, BatcherStatistics]


def test_every_camera_gets_the_same_share_under_threefold_overload(played: Played) -> None:
    _, seen = played
    shares = [camera.analysed for camera in seen.cameras.values()]
    jain = sum(shares) ** 2 / (CAMERAS * sum(share**2 for share in shares))
    assert jain >= 0.99
    assert min(shares) >= 0.9 * max(shares)


def test_the_engine_is_never_idle_and_every_computed_frame_is_delivered(played: Played) -> None:
    simulation, seen = played
    analysed = sum(camera.analysed for camera in seen.cameras.values())
    offered = sum(camera.offered for camera in seen.cameras.values())
    assert analysed == len(simulation.delivered)
    assert analysed == pytest.approx(offered / OVERLOAD, rel=0.02)


def test_a_result_is_never_older_than_two_batches_and_a_frame_interval(played: Played) -> None:
    simulation, _ = played
    ages_ns = np.array([age for ages in simulation.ages_ns.values() for age in ages])
    assert np.percentile(ages_ns, 99) <= 2 * simulation.service_ns + INTERVAL_NS


def test_every_frame_is_accounted_for_at_the_end(played: Played) -> None:
    _, seen = played
    for camera in seen.cameras.values():
        assert camera.offered == 60 * FPS
        assert camera.in_flight == 0
        assert camera.offered == camera.analysed + camera.waiting + sum(camera.dropped.values())
        assert (
            camera.dropped[DropReason.STALE]
            == camera.dropped[DropReason.FAILED]
            == camera.dropped[DropReason.DISCARDED]
            == 0
        )


def test_results_of_a_camera_stay_in_order_under_overload(played: Played) -> None:
    simulation, _ = played
    by_camera: dict[str, list[int]] = defaultdict(list)
    for each in simulation.delivered:
        by_camera[each.camera].append(each.sequence)
    assert all(before < after for numbers in by_camera.values() for before, after in pairwise(numbers))
