"""`bench pipeline`: the schedule of pictures, the cost of a result, and the report of the command."""

import json
import logging
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from visionedge.__main__ import main
from visionedge.camera.camera import Camera
from visionedge.errors import ConfigError
from visionedge.frames.types import Detections, Frame, FrameResult, InputSpec, Placement, Timing
from visionedge.ops.bench.pipeline_run import (
    ResultRecord,
    RunCost,
    StampedFrame,
    SyntheticSource,
    SyntheticSpec,
    VirtualCamera,
    _quiet_cameras,
    compute_ages_ns,
    fairness,
    make_record,
    make_synthetic_pictures,
    summarize_run,
)

pytestmark = pytest.mark.system

MS = 1_000_000
IMAGE = np.zeros((2, 2, 3), np.uint8)


# --- a virtual camera ---------------------------------------------------------------------------------------


@dataclass
class PipelineHarness:
    """A clock that only waiting and decoding advance, and a recorder of the frames for the batcher."""

    decode_ms: int = 0
    now_ns: int = 0
    put_frames: list[Frame] = field(default_factory=list)

    def wait(self, _event: threading.Event, seconds: float) -> bool:
        self.now_ns += round(seconds * 1e9)
        return False

    def put(self, frame: Frame) -> bool:
        self.put_frames.append(frame)
        return False

    def count_gated(self, camera: str) -> None:
        raise AssertionError(camera)

    def wait_taken(self, camera: str, timeout_s: float) -> bool:
        raise AssertionError(camera, timeout_s)

    def wrap_source(self, pictures: int, fps: float) -> list[StampedFrame]:
        virtual = VirtualCamera(self, scheduled=True, clock=lambda: self.now_ns, wait=self.wait)
        spec = SyntheticSpec(8, 8, fps)
        source = virtual.wrap_source(SyntheticSource(spec, make_synthetic_pictures(spec)))
        assert source.live
        for number in range(pictures):
            decoded = source.read()
            assert decoded is not None
            decoded.fit_to_input(InputSpec(8, 8))
            self.now_ns += self.decode_ms * MS
            virtual.put(frame(self.now_ns, number))
        return [each for each in self.put_frames if isinstance(each, StampedFrame)]


def frame(captured_ns: int, sequence: int = 1) -> Frame:
    return Frame(
        camera="a",
        sequence=sequence,
        epoch=1,
        captured_ns=captured_ns,
        captured_utc=datetime(2026, 1, 1, tzinfo=UTC),
        width_px=2,
        height_px=2,
        image=IMAGE,
        placement=Placement(0.0, 0.0, 2.0, 2.0),
        full_picture=lambda: IMAGE,
    )


def test_frames_have_the_time_at_which_they_were_due() -> None:
    frames = PipelineHarness(decode_ms=10).wrap_source(5, fps=20)
    assert [each.captured_ns // MS for each in frames] == [0, 50, 100, 150, 200]
    assert {each.decode_ns // MS for each in frames} == {10}
    assert {(each.put_ns - each.captured_ns) // MS for each in frames} == {10}


def test_the_delay_of_a_slow_camera_counts_in_its_latency() -> None:
    """No coordinated omission: pictures are due at their rate, also if they are decoded late."""
    frames = PipelineHarness(decode_ms=80).wrap_source(5, fps=20)
    assert [each.captured_ns // MS for each in frames] == [0, 50, 100, 150, 200]
    assert [(each.put_ns - each.captured_ns) // MS for each in frames] == [80, 110, 140, 170, 200]


@pytest.mark.parametrize(
    "wrong", ["synthetic:", "synthetic:640x480", "synthetic:640x480@0", "synthetic:9x9@x"]
)
def test_an_invalid_synthetic_camera_is_reported(wrong: str) -> None:
    with pytest.raises(ConfigError, match="synthetic:WIDTHxHEIGHT@FPS"):
        SyntheticSpec.parse(wrong)


def test_a_synthetic_camera_moves_and_has_its_size() -> None:
    spec = SyntheticSpec(64, 48, 30)
    source = SyntheticSource(spec, make_synthetic_pictures(spec))
    first, second = source.read(), source.read()
    assert first is not None
    assert second is not None
    assert first.picture().shape == (48, 64, 3)
    assert (first.picture() != second.picture()).any()
    assert second.position_s == pytest.approx(1 / 30)
    source.interrupt()
    assert source.read() is None


# --- figures ------------------------------------------------------------------------------------------------


def test_the_stages_of_a_result_add_up_to_its_latency() -> None:
    stamped = StampedFrame(
        **{name: getattr(frame(100 * MS), name) for name in Frame.__dataclass_fields__},
        decode_ns=10 * MS,
        put_ns=130 * MS,
    )
    timing = Timing(wait_ns=50 * MS, infer_ns=20 * MS, total_ns=75 * MS, batch_size=1)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    row = make_record(FrameResult(stamped, nothing, timing, "cpu", "tiny", ()), 180 * MS)
    stages = (row.late_ns, row.decode_ns, row.wait_ns, row.infer_ns, row.deliver_ns)
    assert [harness // MS for harness in stages] == [20, 10, 20, 20, 10]
    assert sum(stages) == row.total_ns == 80 * MS


def result(at_ms: int, camera: str = "a", latency_ms: int = 20) -> ResultRecord:
    return ResultRecord(camera, (at_ms - latency_ms) * MS, at_ms * MS, 5 * MS, 1)


def test_the_age_grows_with_every_dropped_frame() -> None:
    steady = [result(100), result(300), result(500), result(310, "b")]
    assert [age // MS for age in compute_ages_ns(steady)] == [220, 220]
    assert max(compute_ages_ns([result(100), result(500)])) == 420 * MS


def test_goodput_counts_only_timely_results() -> None:
    rows = [result(100), result(200), result(300, latency_ms=90), result(400)]
    run = summarize_run(rows, RunCost(2.0, 0.04, {"replaced": 3, "stale": 0}, 10.0), slo_ms=50)
    assert (run.frames_per_second, run.goodput_per_second) == (2.0, 1.5)
    assert run.cpu_ms_per_frame == pytest.approx(10)
    assert run.dropped == {"replaced": 3}


@pytest.mark.parametrize(
    ("shares", "among", "index"), [([5, 5, 5], 3, 1.0), ([7], 4, 0.25), ([1, 3], 2, 0.8), ([6, 6], 4, 0.5)]
)
def test_fairness_is_jains_index_and_includes_cameras_without_results(
    shares: list[int], among: int, index: float
) -> None:
    assert fairness(shares, among) == pytest.approx(index)


# --- the command --------------------------------------------------------------------------------------------


def test_a_load_at_a_rate_reports_ages_goodput_stages_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = ["--cameras", "2", "--source", "synthetic:320x240@20", "--fps", "5"]
    arguments += ["--slo-ms", "60000"]
    short = ["--seconds", "1", "--rounds", "1", "--device", "cpu", "--json", str(report)]
    assert main(["bench", "pipeline", *arguments, *short]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "camera bench-" in line] == []
    assert logging.getLogger(Camera.__module__).level == logging.NOTSET
    assert ", 2 cameras of " in out
    assert "goodput" in out
    assert "two batches and a frame's interval are" in out
    ours = json.loads(report.read_text())["pipeline"]
    assert 0 < ours["goodputPerSecond"] <= ours["framesPerSecond"] <= 13
    assert ours["ageMs"]["p50"] > ours["latencyMs"]["p50"]
    assert 0.5 <= ours["fairness"] <= 1
    assert set(ours["stagesMs"]) == {"late", "decode", "wait", "infer", "deliver"}
    assert ours["rssMiB"] > 10


@pytest.mark.parametrize(
    ("level", "within"), [(logging.INFO, logging.WARNING), (logging.DEBUG, logging.DEBUG)]
)
def test_cameras_of_a_bench_log_their_warnings_and_at_the_level_debug_everything(
    level: int, within: int
) -> None:
    cameras = logging.getLogger(Camera.__module__)
    before = cameras.level
    cameras.setLevel(level)
    try:
        with _quiet_cameras():
            assert cameras.getEffectiveLevel() == within
        assert cameras.level == level
    finally:
        cameras.setLevel(before)


def test_a_wrong_source_is_reported_before_anything_is_measured() -> None:
    assert main(["bench", "pipeline", "--source", "synthetic:9x", "--fps", "5"]) == 2
    assert main(["bench", "pipeline", "--source", "synthetic:64x64@5", "--baseline"]) == 2
    assert main(["bench", "pipeline", "--scene", "missing.yaml"]) == 2
