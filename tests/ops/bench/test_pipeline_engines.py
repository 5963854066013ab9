"""`bench pipeline` with the engine in its own process, in this one, and both in turns."""

from dataclasses import replace
from pathlib import Path

import pytest

from clips import make_clip
from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.model.model import load_model
from visionedge.ops.bench.pipeline import bench_pipeline, format_report
from visionedge.ops.bench.pipeline_run import PipelineLoad, cpu_s, open_engine_setup

CPU = InferenceConfig(device="cpu")


@pytest.fixture
def load(tmp_path: Path) -> PipelineLoad:
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    clip = make_clip(tmp_path / "yard.mp4", pictures=20)
    return PipelineLoad(
        model, str(clip), cameras=2, seconds=1.0, rounds=2, inference=CPU, compare_process=True
    )


@pytest.mark.parametrize(("in_process", "other"), [(False, "inProcess"), (True, "ownProcess")])
def test_both_ways_are_measured_in_turns(load: PipelineLoad, in_process: bool, other: str) -> None:
    """The ratio is always that of the own process to none; no frame is lost in either."""
    told: list[str] = []
    report = bench_pipeline(replace(load, in_process=in_process), told.append)
    assert report["engineProcess"] is not in_process
    for side in ("pipeline", other):
        assert len(report[side]["framesPerSecondAll"]) == 2
        assert report[side]["dropped"] == {}
        assert report[side]["cpuMsPerFrame"] > 0
    own, none = (other, "pipeline") if in_process else ("pipeline", other)
    rounds = zip(report[own]["framesPerSecondAll"], report[none]["framesPerSecondAll"], strict=True)
    ratios = sorted(a / b for a, b in rounds)
    assert ratios[0] - 0.05 <= report["processRatio"]["framesPerSecond"] <= ratios[-1] + 0.05
    first, second = [line.split(": ")[1].rsplit(" ", 2)[0] for line in told if line.startswith("round")][:2]
    assert {first, second} == {"pipeline", words_for(other)}
    assert "ratio, own process/none" in format_report(report)


def words_for(side: str) -> str:
    """What people read for a side."""
    return {"inProcess": "engine in this process", "ownProcess": "engine in its own"}[side]


def test_the_processor_time_of_the_own_process_counts(load: PipelineLoad) -> None:
    """Otherwise a frame would look free."""
    model = load_model(load.model)
    setup = open_engine_setup(load, model, own_process=True)
    try:
        before, alone = cpu_s(setup.engine), cpu_s()
        while cpu_s(setup.engine) - before <= cpu_s() - alone + 0.05:
            setup.engine.infer(pictures(8))
    finally:
        setup.close()
