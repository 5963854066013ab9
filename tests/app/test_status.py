"""The documents of status: every key, in this order, with this value.

The expected documents are in tests/golden/status; `VISIONEDGE_GOLDEN=write make test` rewrites them.
"""

import json
import os
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel

from fake_backend import result
from visionedge.app.load_meter import CameraLoad, LoadMeasurement
from visionedge.app.overload_policy import OverloadStatus, TakenLevel
from visionedge.app.state import AppState, InboundStatistics, ModelState, StateSnapshot
from visionedge.app.status import build_camera, build_capacity, build_engine_event, build_status
from visionedge.camera.camera import Camera, CameraStatus
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.registry import CameraRegistry
from visionedge.camera.timing import Throttle
from visionedge.config.load import parse_config
from visionedge.engine.device.devices import DeviceState, DeviceVerdict, ReasonCode
from visionedge.engine.device.session import NodePlacement
from visionedge.engine.device_parity import DeviceCheck, ParityResult, SpeedCheck
from visionedge.engine.engine_choice import CandidateFigures, EngineCandidate, EngineChoice
from visionedge.engine.interface import Engine, EngineInfo, ProcessStatus, RecoveryState, RecoveryStatistics
from visionedge.engine.plan import AutotuneResult, LatencyFit, MeasuredPoint, OperatingPoint, Plan
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.iothub.client import HubStatus
from visionedge.iothub.delivery import Delivery, DeliveryStatus
from visionedge.iothub.telemetry import TelemetryStatistics
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.parity import ApComparison, Parity
from visionedge.model.postprocess import Selection
from visionedge.outbound.messages_file import MessagesFileStatus
from visionedge.outbound.metering import MeteredUsage
from visionedge.outbound.spool import SpoolStatus
from visionedge.web.documents import EngineEventDocument, StatusDocument
from visionedge.web.latest_results import LatestResults

GOLDEN = Path(__file__).parents[1] / "golden" / "status"
SINCE = datetime(2026, 11, 22, 10, 0, 0, 123_000, UTC)
FP32, INT8 = EngineCandidate("onnxruntime", "fp32"), EngineCandidate("onnxruntime", "int8")
LONG_REASON = "CUDA failure 700: " + "an illegal memory access was encountered " * 20


@dataclass
class StatusEngine:
    """An engine with only the data that status shows."""

    device: DeviceState
    plan: Plan
    choice: EngineChoice = field(
        default_factory=lambda: EngineChoice(
            INT8,
            "1.8 times as fast",
            (
                CandidateFigures(FP32, 14.23456, 140.0, 1.0, note="onnxruntime int8 is 1.80 times as fast"),
                CandidateFigures(INT8, 7.9, 252.04567, 1.8, "98% of 50 boxes agree here"),
            ),
        )
    )
    node_placement: NodePlacement = field(default_factory=lambda: NodePlacement(120, ("NonMaxSuppression",)))
    notes: tuple[str, ...] = ("graph capture is off: the graph has loops",)
    unplanned_shapes: int = 0
    process: ProcessStatus | None = None
    recovery: RecoveryStatistics | None = None
    device_check: DeviceCheck = field(default_factory=DeviceCheck)

    def info(self) -> EngineInfo:
        model, recovery = load_model(find_bundled_model()), self.recovery
        if recovery is not None:  # 17.4 s from now, for any duration of the test so far
            waiting = replace(recovery.recovery_state, retry_at_s=time.monotonic() + 17.43)
            recovery = replace(recovery, recovery_state=waiting)
        return EngineInfo(
            model,
            self.device,
            self.choice,
            self.plan,
            self.node_placement,
            self.device_check,
            self.notes,
            max_rows=300,
            unplanned_shapes=self.unplanned_shapes,
            process=self.process,
            recovery=recovery,
        )


@dataclass
class StatusCamera:
    """A camera that only has a status."""

    seen: CameraStatus

    def status(self) -> CameraStatus:
        return self.seen


@dataclass
class StatusRegistry:
    """The cameras that run."""

    by_name: dict[str, Camera]

    def waits_for_model(self, name: str) -> bool:
        return name not in self.by_name


@dataclass
class StatusDelivery:
    """A delivery that only has a status."""

    seen: DeliveryStatus

    @property
    def inside_edge(self) -> bool:
        return self.seen.inside_edge

    def status(self) -> DeliveryStatus:
        return self.seen


def empty_state(tmp_path: Path) -> StateSnapshot:
    document = {"cameras": {"dock": {"uri": "rtsp://user:secret@192.0.2.5/s"}, "yard": {"uri": "demo:"}}}
    return AppState.of(parse_config(document), tmp_path, {}, lambda: None).snapshot()


def lost_gpu() -> StatusEngine:
    """The CPU computes in place of a GPU; everything that can be there is there."""
    point = OperatingPoint(2, 4)
    table = (
        MeasuredPoint(point, 61.23456, 65.3, 14.0, 3),
        MeasuredPoint(OperatingPoint(1, 8), note="out of memory"),
    )
    fits = (LatencyFit(2, 14.12345, 1.5),)
    measured = AutotuneResult(table, fits, point, (1, 2, 4), "the best of 2", 3.21234)
    parity = Parity(9, 40, 0.98765, 0.01234, 0.2, ApComparison(12, 0.41, 0.4, 0.6, 0.59))
    return StatusEngine(
        DeviceState("cuda", "cpu", ReasonCode.CUDA_ERROR, LONG_REASON, SINCE),
        Plan.of(measured),
        process=ProcessStatus(None, 2, "the engine is restarted"),
        recovery=RecoveryStatistics(
            RecoveryState("waiting", 3, DeviceVerdict(ReasonCode.NO_DEVICE, "no device"), 17.38),
            {"sticky": 1},
            {"no-device": 3},
            1,
        ),
        device_check=DeviceCheck(
            (ParityResult("pictures", 9, 0.98765, parity), ParityResult("frames", 2, None, parity)),
            SpeedCheck(20.12345, 14.0),
        ),
    )


def plain_cpu() -> StatusEngine:
    return StatusEngine(
        DeviceState("auto", "cpu", ReasonCode.NO_GPU_BUILD, "onnxruntime without CUDA", SINCE),
        Plan(2, (1,), "a CPU computes one picture at a time"),
        choice=EngineChoice(FP32, "as it was asked for"),
        node_placement=NodePlacement(120),
        notes=(),
    )


def usage() -> MeteredUsage:
    blocks = {"detections": 20, "events": 3}
    return MeteredUsage({"detections": 10, "events": 3}, blocks, 0.81234, {"detections": 4321.5}, 3600.4)


def delivered(*, inside_edge: bool) -> Delivery:
    hub = HubStatus("connected", True, 13, 2, {"budget": 1}, None, 1, 0, 0, {"silent": 1})
    telemetry = TelemetryStatistics(90, 40, 50, 0, 0, {"oversize": 1}, {"detections": 10}, 99_980, usage())
    return cast(
        "Delivery",
        StatusDelivery(
            DeliveryStatus(
                inside_edge=inside_edge,
                device="edge-7",
                module="vision",
                hub=hub if inside_edge else None,
                telemetry=telemetry,
                messages_file=None if inside_edge else MessagesFileStatus("f", 7, 1, 0, 1, "disk full"),
                spool=SpoolStatus("memory", "no space", 2, 900, {"space": 4}) if inside_edge else None,
            )
        ),
    )


def running_state(tmp_path: Path, engine: StatusEngine) -> StateSnapshot:
    """`dock` runs and was analysed, `yard` does not run."""
    state = empty_state(tmp_path)
    model = load_model(find_bundled_model())
    selection = Selection.of(model, 0.3, 0.5)
    loaded = ModelState(model, selection, None, cast("Engine", engine))
    state = replace(state, models={DEFAULT_MODEL: loaded})
    state = replace(state, latest_results=LatestResults(clock=lambda: 43_210_000))
    state.latest_results.publish(result("dock", 2))
    state.batcher.open("dock")
    for sequence in (1, 2):
        state.batcher.put(result("dock", sequence).frame)
    seen = CameraStatus(
        name="dock",
        uri="rtsp://***@192.0.2.5/s",
        state="reconnecting",
        since_ns=0,
        epoch=3,
        frames_read=5120,
        fps=24.987,
        age_ms=41.2,
        last_error="192.0.2.5:554 refuses connections",
        width=1920,
        height=0,
        decoder="h264",
        next_try_s=3.96,
    )
    registry = StatusRegistry({"dock": cast("Camera", StatusCamera(seen))})
    return replace(state, camera_registry=cast("CameraRegistry", registry))


def starting(tmp_path: Path) -> StateSnapshot:
    """Before the engine is there."""
    return empty_state(tmp_path)


def degraded_in_edge(tmp_path: Path) -> StateSnapshot:
    """A GPU was lost, the cameras are slowed, everything goes to the hub."""
    state = running_state(tmp_path, lost_gpu())
    state = replace(state, delivery=delivered(inside_edge=True))
    state = replace(
        state,
        inbound_statistics=lambda: InboundStatistics(
            {"applied": 2}, 3, {("status", 200): 4, ("ping", 200): 1}, 0, 5, {"busy": 1}, {"version": 7}
        ),
    )
    state.meter.measurement = LoadMeasurement(
        seconds=5.04,
        cameras={"dock": CameraLoad(20.0, 10.0, 10.0, 7.126, 3.0, 0.12345)},
        cores=2,
        decode_cores=0.12345,
        infer_cores=1.7,
        other_cores=0.1,
        external_cores=0.0,
        gpu=False,
        quota=1.23456,
    )
    return replace(
        state,
        overload_status=OverloadStatus(
            may_act=True,
            taken_levels=(
                TakenLevel("fps", SINCE, "dock at 10 fps"),
                TakenLevel("gate", SINCE, "a gate on dock"),
            ),
            throttles={"dock": Throttle(10.0, GateSettings())},
        ),
    )


def local_on_cpu(tmp_path: Path) -> StateSnapshot:
    """As on a laptop; the load is measured, and nothing is given up."""
    state = running_state(tmp_path, plain_cpu())
    state = replace(state, delivery=delivered(inside_edge=False))
    state = replace(state, inbound_statistics=InboundStatistics)
    state.meter.measurement = LoadMeasurement(
        seconds=5.0,
        cameras={},
        cores=4,
        decode_cores=0.0,
        infer_cores=0.0,
        other_cores=0.0,
        external_cores=0.0,
        gpu=False,
    )
    return state


STATES = {"starting": starting, "degraded-in-edge": degraded_in_edge, "local-on-cpu": local_on_cpu}


def fixed(status: dict[str, Any]) -> dict[str, Any]:
    """The document with run-dependent values and texts of other parts replaced."""
    assert status["uptimeSeconds"] >= 0
    assert status["version"]
    assert status["build"]["text"].startswith(status["version"])
    for owner, key in ((status["capacity"], "sentence"), (status["engine"].get("speedCheck"), "doubt")):
        if owner is not None:
            assert owner[key]
            owner[key] = "text"
    if status["model"] is None:
        assert status["reasons"] == [status["engine"]["reason"]]
        status["reasons"], status["engine"]["reason"] = ["text"], "text"
    for camera in status["cameras"]:
        if "since" in camera:
            assert datetime.fromisoformat(camera["since"]).tzinfo is not None
            camera["since"] = "2026-11-22T10:00:00.000Z"
    build = {"text": "0", "revision": "0", "builtAt": "0"}
    return {**status, "version": "0", "build": build, "uptimeSeconds": 1.5}


def paths(document: object, path: str = "") -> list[str]:
    """Where each value is, in the order of the keys."""
    if isinstance(document, dict):
        return [inner for key, value in document.items() for inner in paths(value, f"{path}.{key}")]
    if isinstance(document, list):
        return [inner for index, value in enumerate(document) for inner in paths(value, f"{path}[{index}]")]
    return [path]


def undescribed(document: object) -> list[str]:
    """The keys of a document that its model does not have."""
    if isinstance(document, BaseModel):
        inner = [key for value in dict(document).values() for key in undescribed(value)]
        return [f"{type(document).__name__}.{key}" for key in document.model_extra or {}] + inner
    if isinstance(document, dict):
        return [key for value in document.values() for key in undescribed(value)]
    return [key for value in document for key in undescribed(value)] if isinstance(document, list) else []


@pytest.mark.parametrize("name", STATES)
def test_the_keys_of_status_equal_the_golden_file(name: str, tmp_path: Path) -> None:
    """The order of keys too, because people read the document."""
    state = STATES[name](tmp_path)
    documents = {
        "status": fixed(build_status(state)),
        "engineEvent": build_engine_event(info) if (info := state.engine_info()) else None,
    }
    text = json.dumps(documents, indent=1, allow_nan=False) + "\n"
    file = GOLDEN / f"{name}.json"
    if os.environ.get("VISIONEDGE_GOLDEN") == "write":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    golden = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(text) == golden
    assert paths(documents) == paths(golden)


@pytest.mark.parametrize("name", STATES)
def test_every_key_of_status_is_described_in_its_model(name: str, tmp_path: Path) -> None:
    state = STATES[name](tmp_path)
    assert undescribed(StatusDocument.model_validate(build_status(state))) == []
    if (info := state.engine_info()) is not None:
        assert undescribed(EngineEventDocument.model_validate(build_engine_event(info))) == []


@pytest.mark.parametrize("name", STATES)
def test_an_event_about_the_engine_is_small_and_without_tables(name: str, tmp_path: Path) -> None:
    """Each is billed: the measured plan and the nodes are in the status alone."""
    if (info := STATES[name](tmp_path).engine_info()) is None:
        return
    event = build_engine_event(info)
    assert [key for key, value in event.items() if isinstance(value, dict | list)] == []
    assert len(json.dumps(event)) < 1024


def test_one_camera_has_the_same_document_as_in_the_list(tmp_path: Path) -> None:
    state = degraded_in_edge(tmp_path)
    dock, yard = build_status(state)["cameras"]
    same = {key: value for key, value in (build_camera(state, "dock") or {}).items() if key != "since"}
    assert same == {key: value for key, value in dock.items() if key != "since"}
    assert build_camera(state, "yard") == yard
    assert build_camera(state, "attic") is None


def test_the_capacity_holds_totals_and_each_camera(tmp_path: Path) -> None:
    state = empty_state(tmp_path)
    assert build_capacity(state) is None
    state.meter.measurement = LoadMeasurement(
        seconds=5.0,
        cameras={
            "yard": CameraLoad(25.0, 25.0, 25.0, 5.0, 20.0, 1.02),
            "door": CameraLoad(10.0, 10.0, 10.0, 5.0, 5.0, 0.2),
        },
        cores=2,
        decode_cores=1.22,
        infer_cores=0.6,
        other_cores=0.1,
        external_cores=0.0,
        gpu=False,
        quota=0.5,
    )
    document = build_capacity(state)
    assert document is not None
    capacity = document.dump()
    assert (capacity["demandedPerSecond"], capacity["deliveredPerSecond"]) == (35.0, 10.0)
    assert capacity["cameras"]["door"] == {
        "demandedPerSecond": 10.0,
        "admittedPerSecond": 10.0,
        "deliveredPerSecond": 5.0,
        "decodeCores": 0.2,
    }
    assert capacity["coresUsed"] == {"decode": 1.22, "infer": 0.6, "other": 0.1}
    assert capacity["cpuQuota"] == 0.5
