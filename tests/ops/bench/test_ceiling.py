"""The references of the pipeline: the ceiling, and the boxes of the plain loop."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clips import make_clip
from tiny_models import TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.engine.local_engine import open_engine
from visionedge.frames.types import Detections, Picture
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.baseline import (
    Ceiling,
    CeilingMeasurement,
    PlainLoop,
    build_ceiling_document,
    make_network_runner,
    measure_baseline_agreement,
)
from visionedge.ops.bench.pipeline_run import ResultRecord, RunCost, summarize_run
from visionedge.runtime.process_limits import usable_cores

MS = 1_000_000


def test_the_ceiling_is_the_rate_of_all_cores_at_the_cost_of_the_bare_parts() -> None:
    alone, at_once = CeilingMeasurement(1, 2, 8, 99), CeilingMeasurement(2, 3, 9, 160)
    assert alone.ceiling_per_s == pytest.approx(usable_cores() * 100)
    rows = [ResultRecord("a", at_ms * MS, at_ms * MS + MS, MS, 1) for at_ms in range(0, 1000, 10)]
    found = build_ceiling_document(
        [(alone, at_once)] * 3, [summarize_run(rows, RunCost(1.0, 1.15, {}, 10.0), 50)] * 3
    )
    assert found["alone"]["speedToCeiling"] == pytest.approx(1 / usable_cores())
    assert found["alone"]["cpuToBare"] == pytest.approx(1.15)
    assert found["atOnce"]["cpuToBare"] == pytest.approx(11.5 / 12, abs=0.001)
    assert found["atOnce"]["toMeasured"] == pytest.approx(100 / 160)


def test_the_ceiling_is_measured_on_as_many_threads_as_wanted(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", pictures=5)  # fewer than are decoded: it is played again
    ceiling = Ceiling(make_network_runner(load_model(TinyDetector().save(tmp_path / "tiny.onnx"))), str(clip))
    found = ceiling.measure(0.05, 2)
    assert found.threads == 2
    assert min(found.decode_ms, found.run_ms, found.frames_per_s) > 0


class ShiftedPlainLoop(PlainLoop):
    """A plain loop that sees everything a little too far to the right."""

    def detect(self, picture: Picture, selection: Selection) -> Detections:
        found = super().detect(picture, selection)
        return replace(found, boxes=found.boxes + np.array([0.2, 0, 0.2, 0], np.float32))


@pytest.mark.parametrize(("kind", "least", "most"), [(PlainLoop, 0.85, 1.0), (ShiftedPlainLoop, 0.0, 0.2)])
def test_boxes_that_both_find_are_counted(kind: type[PlainLoop], least: float, most: float) -> None:
    """Resizing differs a little; the detections of the bundled model hardly differ."""
    model = load_model(find_bundled_model())
    selection = Selection.of(model, 0.4, 0.6)
    plain = kind(model, selection, source="demo:", cameras=1, threads=1, device="cpu")
    with closing(plain), closing(open_engine(model, InferenceConfig(device="cpu"))) as engine:
        found = measure_baseline_agreement("demo:", engine, selection, plain, pictures=3)
    assert found["pictures"] == 3
    assert found["boxes"] > 10
    assert least <= found["matched"] <= most
