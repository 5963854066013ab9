"""Errors of a session in the engine: smaller batches, a kind of fault, or nothing."""

from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fault_script import GONE, NO_MEMORY, REFUSED, STICKY
from tiny_models import TinyDetector, pictures
from visionedge.engine.device.devices import DeviceState, EffectiveDevice, ReasonCode, Runtime
from visionedge.engine.device.faults import EngineError, Fault
from visionedge.engine.device.session import NodePlacement, PictureBatch
from visionedge.engine.local_engine import LocalEngine
from visionedge.engine.plan import Plan
from visionedge.engine.process.fault_injection import (
    FaultCondition,
    make_device_backend,
    make_tuning,
    read_fault_script,
)
from visionedge.errors import ConfigError, ModelError
from visionedge.model.model import Model, load_model

pytestmark = pytest.mark.system

Act = Callable[[int], np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(TinyDetector().save(tmp_path_factory.mktemp("model") / "tiny.onnx"))


class ScriptedSession:
    """A session that calls `act` for each run once it is set; before that it works."""

    device: EffectiveDevice = "cpu"
    runtime: Runtime = "onnxruntime"
    rows = 9
    node_placement = NodePlacement(1)
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.act: Act = working
        self.kept: list[set[int]] = []
        self.sizes: list[int] = []

    def run(self, pictures: PictureBatch, size: int) -> np.ndarray:
        self.sizes.append(size)
        return self.act(size)[: len(pictures)]

    def keep_only(self, sizes: Collection[int]) -> None:
        self.kept.append(set(sizes))

    def close(self) -> None:
        pass


def working(size: int) -> np.ndarray:
    return np.ones((size, 9, 6), np.float32)


def raising(text: str, *, from_size: int = 1) -> Act:
    def act(size: int) -> np.ndarray:
        if size >= from_size:
            raise RuntimeError(text)
        return working(size)

    return act


def nan_rows(size: int) -> np.ndarray:
    rows = working(size)
    rows[-1, -1, 2] = np.inf
    return rows


def engine_on(model: Model, session: ScriptedSession, device: EffectiveDevice = "cuda") -> LocalEngine:
    state = DeviceState("auto", device, ReasonCode.OK, "usable", datetime(2026, 11, 27, tzinfo=UTC))
    return LocalEngine(model, session, state, Plan(2, (1, 2, 4, 8), "test"))


def test_too_little_memory_lowers_the_batch_size_permanently_and_loses_no_picture(model: Model) -> None:
    session = ScriptedSession()
    engine, plans = engine_on(model, session), list[Plan]()
    engine.on_plan_reduced = plans.append
    session.act = raising(NO_MEMORY, from_size=4)
    assert engine.infer(pictures(8)).rows.shape == (8, 9, 6)
    assert engine.info().plan.buckets == (1, 2)
    assert [plan.buckets for plan in plans] == [(1, 2, 4), (1, 2)]
    assert session.kept[-1] == {1, 2}, "the memory of larger ones is given back"
    session.sizes.clear()
    assert engine.infer(pictures(5)).rows.shape == (5, 9, 6)
    assert session.sizes == [2, 2, 1]
    assert engine.info().unplanned_shapes == 0


def test_if_not_even_one_picture_fits_the_batch_fails_with_that_reason(model: Model) -> None:
    session = ScriptedSession()
    engine = engine_on(model, session)
    session.act = raising(NO_MEMORY)
    with pytest.raises(EngineError, match="CUDA failure 2: out of memory") as caught:
        engine.infer(pictures(3))
    assert caught.value.fault is Fault.OUT_OF_MEMORY
    assert engine.info().plan.buckets == (1,)


@pytest.mark.parametrize(
    ("text", "fault", "words"),
    [
        (STICKY, Fault.STICKY, "CUDA failure 700: an illegal memory access was encountered"),
        (GONE, Fault.GONE, "CUDA failure 100: no CUDA-capable device is detected"),
        (REFUSED, Fault.REFUSED, "9 : NOT_IMPLEMENTED : no kernel for this node"),
    ],
)
def test_an_error_of_a_session_is_classified_and_shortened(
    model: Model, text: str, fault: Fault, words: str
) -> None:
    session = ScriptedSession()
    engine = engine_on(model, session)
    session.act = raising(text)
    with pytest.raises(EngineError) as caught:
        engine.infer(pictures(2))
    assert (caught.value.fault, str(caught.value)) == (fault, f"tiny failed on cuda: {words}")


@pytest.mark.parametrize(
    ("text", "fault", "words"),
    [
        (
            "Exception from src/inference/src/cpp/infer_request.cpp:224:\n[GPU] clFlush, error code: -5"
            " CL_OUT_OF_RESOURCES\n",
            Fault.STICKY,
            "[GPU] clFlush, error code: -5 CL_OUT_OF_RESOURCES",
        ),
        ("[GPU] clFinish, error code: -2 CL_DEVICE_NOT_AVAILABLE", Fault.GONE, None),
        (
            "Check 'a == b' failed at src/core/b.cpp:61:\nShapes are not consistent",
            Fault.REFUSED,
            "Shapes are not consistent",
        ),
    ],
)
def test_an_error_of_openvino_is_classified_and_shortened(
    model: Model, text: str, fault: Fault, words: str | None
) -> None:
    session = ScriptedSession()
    engine = engine_on(model, session, "openvino-gpu")
    session.act = raising(text)
    with pytest.raises(EngineError) as caught:
        engine.infer(pictures(2))
    assert (caught.value.fault, str(caught.value)) == (fault, f"tiny failed on openvino-gpu: {words or text}")


def test_nan_rows_are_a_fault_of_a_device_and_never_of_the_cpu(model: Model) -> None:
    """On the CPU they are the model's, and left out where detections are made of rows."""
    session = ScriptedSession()
    engine = engine_on(model, session)
    session.act = nan_rows
    with pytest.raises(EngineError) as caught:
        engine.infer(pictures(1))
    assert caught.value.fault is Fault.INVALID_OUTPUT
    engine.checks_finite = False
    assert engine.infer(pictures(1)).rows.shape == (1, 9, 6)
    session = ScriptedSession()
    engine = engine_on(model, session, "cpu")
    session.act = nan_rows
    assert engine.infer(pictures(1)).rows.shape == (1, 9, 6)


def test_a_device_that_fails_in_warm_up_does_not_lower_the_batch_size(
    model: Model,
) -> None:
    """Its process is spoiled; a size that is refused, or does not fit into memory, is only left out."""
    for text in (NO_MEMORY, REFUSED):
        session = ScriptedSession()
        session.act = raising(text, from_size=4)
        assert engine_on(model, session).info().plan.buckets == (1, 2)
    session = ScriptedSession()
    session.act = raising(STICKY, from_size=4)
    with pytest.raises(EngineError) as caught:
        engine_on(model, session)
    assert caught.value.fault is Fault.STICKY
    session.act = nan_rows
    with pytest.raises(ModelError, match="NaN or infinity"):
        engine_on(model, session, "cpu")


# --- scripts of faults --------------------------------------------------------------------------------------


def test_a_fault_happens_if_all_its_conditions_hold(tmp_path: Path) -> None:
    here = tmp_path / "now"
    cases = [
        (FaultCondition(), (1, 0.0, 1), True),
        (FaultCondition(batch=3), (2, 0.0, 1), False),
        (FaultCondition(batch=3), (3, 0.0, 1), True),
        (FaultCondition(every=4), (8, 0.0, 1), True),
        (FaultCondition(every=4), (9, 0.0, 1), False),
        (FaultCondition(after=1, until=2), (1, 1.5, 1), True),
        (FaultCondition(after=1, until=2), (1, 2.0, 1), False),
        (FaultCondition(min_batch=4), (1, 0.0, 2), False),
        (FaultCondition(min_batch=4, batch=1), (1, 0.0, 4), True),
        (FaultCondition(file=str(here)), (1, 0.0, 1), False),
    ]
    assert [when.is_met(*moment) for when, moment, _ in cases] == [expected for *_, expected in cases]
    here.touch()
    assert cases[-1][0].is_met(1, 0.0, 1)


def test_a_script_is_read_and_invalid_parts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text(
        f"device: tensorrt\ntiming: {{firstSeconds: 0.5}}\nfaults: [{{at: probe, raise: '{GONE}'}}]\n"
    )
    script = read_fault_script(path)
    tuning, backend = make_tuning(script), make_device_backend(script)
    assert tuning.timing is not None
    assert tuning.timing.first_wait_s == 0.5
    assert (backend.has_provider("tensorrt"), backend.has_provider("cuda")) == (True, False)
    assert [backend.probe_device(device).code for device in ("tensorrt", "cuda")] == [
        ReasonCode.NO_DEVICE
    ] * 2
    path.write_text("faults: [{at: lunch}, {when: {batch: soon}}]\nwhat: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_fault_script(path)
    locations = [problem.split(": ")[1] for problem in caught.value.problems]
    assert locations == ["faults.0.at", "faults.1.when.batch", "what"]
