"""`bench pipeline` with the engine in its own process."""

from pathlib import Path

import pytest

from clips import make_clip
from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.model.model import load_model
from visionedge.ops.bench.pipeline import bench_pipeline
from visionedge.ops.bench.pipeline_run import PipelineLoad, cpu_s, open_engine_setup

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


def test_the_processor_time_of_the_engine_process_counts(load: PipelineLoad) -> None:
    """Otherwise a frame would look free."""
    setup = open_engine_setup(load, load_model(load.model))
    try:
        before, alone = cpu_s(setup.engine), cpu_s()
        while cpu_s(setup.engine) - before <= cpu_s() - alone + 0.05:
            setup.engine.infer(pictures(8))
    finally:
        setup.close()
