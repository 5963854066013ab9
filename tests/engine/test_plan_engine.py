"""The plan of the engine: measured at the first start, read from the cache at the next, and shown."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from tiny_models import TinyDetector, pictures
from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import EffectiveDevice, Runtime
from visionedge.engine.device.session import NodePlacement, PictureBatch
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import Plan
from visionedge.model.model import Model, load_model

CPU = InferenceConfig.model_validate({"device": "cpu", "maxBatch": 4})


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "tiny.onnx"))


def test_the_first_start_measures_and_the_next_one_does_not(model: Model, tmp_path: Path) -> None:
    """With one core and one picture there is one pair to choose from, so that any machine keeps it."""
    single = InferenceConfig.model_validate({"device": "cpu", "maxBatch": 1})
    first, second = (open_engine(model, single, data=tmp_path / "data", cores=1).info() for _ in range(2))
    assert first.plan.measured is not None
    assert first.plan.reason.startswith("measured in ")
    assert second.plan.reason == f"{second.plan.reason.partition(': ')[0]}: {first.plan.reason}"
    assert second.plan.reason.startswith("from the cache, of ")
    assert (second.plan.lanes, second.plan.buckets) == (first.plan.lanes, first.plan.buckets) == (1, (1,))


def test_the_chosen_point_is_in_the_table(model: Model, tmp_path: Path) -> None:
    engine = open_engine(model, CPU, data=tmp_path / "data", cores=2)
    measured = engine.info().plan.measured
    assert measured is not None
    (line,) = [line for line in measured.table if line.point == measured.choice]
    assert line.frames_per_s is not None
    plan = engine.info().plan
    assert (plan.lanes, plan.max_batch) == (measured.choice.lanes, measured.choice.batch)
    assert len(measured.table) == 6


def test_another_latency_budget_gives_another_plan(model: Model, tmp_path: Path) -> None:
    open_engine(model, CPU, data=tmp_path / "data", cores=1)
    tight = CPU.model_copy(update={"latency_budget_ms": 0.001})
    engine = open_engine(model, tight, data=tmp_path / "data", cores=1)
    assert engine.info().plan.reason.startswith("measured in ")
    assert "no batch is done within 0.001 ms" in engine.info().plan.reason


def test_without_a_data_folder_the_rule_decides(model: Model) -> None:
    engine = open_engine(model, CPU, cores=2)
    assert engine.info().plan.measured is None
    assert "2 usable cores: a lane each" in engine.info().plan.reason


def test_a_given_plan_is_used_unchanged(model: Model, tmp_path: Path) -> None:
    plan = Plan(3, (1, 2), "as asked")
    assert open_engine(model, CPU, data=tmp_path / "data", plans={"cpu": plan}).info().plan is plan


def test_a_measured_engine_uses_only_warmed_batch_sizes(model: Model, tmp_path: Path) -> None:
    engine = open_engine(model, CPU, data=tmp_path / "data", cores=2)
    for count in (1, 2, 3, 4, 9):
        assert engine.infer(pictures(count)).rows.shape == (count, engine.info().max_rows, 6)
    assert engine.info().unplanned_shapes == 0


def test_a_model_that_fixes_its_batch_is_measured_with_that_one(tmp_path: Path) -> None:
    point = load_model(TinyDetector(batch=2).save(tmp_path / "pair.onnx"))
    engine = open_engine(point, CPU, data=tmp_path / "data", cores=2)
    measured = engine.info().plan.measured
    assert measured is not None
    assert {line.point.batch for line in measured.table} == {2}
    assert engine.info().plan.buckets == (2,)


class StubSession:
    """A session that cannot compute four at once, and records the batch sizes to keep."""

    device: EffectiveDevice = "cpu"
    runtime: Runtime = "onnxruntime"
    rows = 9
    node_placement = NodePlacement(1)
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.kept: set[int] | None = None

    def run(self, given: PictureBatch, size: int) -> np.ndarray:
        if size > 2:
            raise MemoryError("no room")
        return np.zeros((len(given), 9, 6), np.float32)

    def keep_only(self, sizes: Collection[int]) -> None:
        self.kept = set(sizes)

    def close(self) -> None:
        """Nothing to release."""


def test_the_memory_of_other_batch_sizes_is_released(model: Model) -> None:
    state = open_engine(model, CPU).info().device
    session = StubSession()
    engine = LocalEngine(model, session, state, Plan(1, (1, 2, 4), ""))
    assert engine.info().plan.buckets == (1, 2)
    engine.set_plan(Plan(2, (1,), "measured"))
    assert session.kept == {1}
    assert len(engine.infer(pictures(3)).rows) == 3
    assert engine.info().unplanned_shapes == 0
