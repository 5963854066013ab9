"""`bench pipeline` with the engine in its own process."""

from dataclasses import replace
from pathlib import Path

import pytest

from clips import make_clip
from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.model.model import load_model
from visionedge.ops.bench.compare import collect_figures
from visionedge.ops.bench.pipeline import bench_pipeline, format_report
from visionedge.ops.bench.pipeline_run import PipelineLoad, cpu_s, open_engine_process
from visionedge.ops.bench.report import render_page
from visionedge.ops.bench.scene import read_scene

pytestmark = pytest.mark.system


@pytest.fixture
def load(tmp_path: Path) -> PipelineLoad:
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    clip = make_clip(tmp_path / "yard.mp4", pictures=20)
    cpu = InferenceConfig(device="cpu")
    return PipelineLoad(model, str(clip), cameras=2, seconds=1.0, rounds=2, inference=cpu)


def test_no_frame_is_lost_at_full_speed(load: PipelineLoad) -> None:
    progress: list[str] = []
    report = bench_pipeline(load, progress.append)
    assert len(report["pipeline"]["framesPerSecondAll"]) == 2
    assert report["pipeline"]["dropped"] == {}
    assert report["pipeline"]["cpuMsPerFrame"] > 0
    assert [line.split(" ")[1] for line in progress if line.startswith("round")] == ["1/2:", "2/2:"]


def test_a_scene_is_measured_beside_the_pipeline_without_it_in_each_round(load: PipelineLoad) -> None:
    progress: list[str] = []
    load = replace(load, seconds=0.5, scene=read_scene("default", {}))
    report = bench_pipeline(load, progress.append)
    assert (report["load"]["zones"], report["load"]["lines"]) == (2, 1)
    assert set(report["scene"]) == set(report["pipeline"])
    ratio = report["sceneRatio"]
    assert set(ratio) == {"framesPerSecond", "cpuMsPerFrame", "framesPerSecondAll", "cpuMsPerFrameAll"}
    assert len(ratio["framesPerSecondAll"]) == 2
    rounds = [line.partition(": ")[2].rpartition(" ")[0] for line in progress if line.startswith("round 2")]
    assert [line.rpartition(" ")[0] for line in rounds] == ["pipeline", "pipeline with the scene"]
    text = format_report(report)
    assert "ratio with to without" in text
    assert "With the scene to without" in render_page(report | {"otherProcessesShare": None}, text)
    assert collect_figures(report) == {}  # two rounds are too few


def test_the_processor_time_of_the_engine_process_counts(load: PipelineLoad) -> None:
    """Otherwise a frame would look free."""
    with open_engine_process(load, load_model(load.model)) as (engine, _):
        before, alone = cpu_s(engine), cpu_s()
        while cpu_s(engine) - before <= cpu_s() - alone + 0.05:
            engine.infer(pictures(8))
