"""The overload controller gives measurements to the policy, applies its steps and reports each once."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from camera_doubles import SPEC, FrameRecorder
from visionedge.app import status as report
from visionedge.app.load_meter import CameraLoad, LoadMeasurement
from visionedge.app.metrics import collect_samples
from visionedge.app.overload_controller import OverloadController
from visionedge.app.state import AppState, ModelState
from visionedge.camera.camera import Camera, InputResizer
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.registry import CameraRegistry
from visionedge.camera.timing import Throttle
from visionedge.config.load import parse_config
from visionedge.engine.device.devices import DeviceState, ReasonCode
from visionedge.engine.interface import Engine, ProcessStatus
from visionedge.errors import ModelError
from visionedge.frames.types import DEFAULT_MODEL, utc_now
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.runtime.threads import ThreadGroup

FAST = {"afterSeconds": 5, "backAfterSeconds": 10}
LOST = DeviceState("auto", "cpu", ReasonCode.CUDA_ERROR, "CUDA failure 700", utc_now())
FINE = DeviceState("auto", "cuda", ReasonCode.OK, "usable", utc_now())


class StubCameraRegistry(CameraRegistry):
    """Cameras that do nothing but remember how they are throttled."""

    def __init__(self) -> None:
        super().__init__(
            [InputResizer(SPEC)],
            _NoSlots(),
            ThreadGroup(lambda _name, _error: None),
            first_sequence=lambda _name: 1,
            on_change=lambda _status: None,
        )
        self.throttles: dict[str, Throttle] = {}
        self.eased = 0

    def throttle(self, throttles: Mapping[str, Throttle]) -> None:
        self.throttles = dict(throttles)
        self.eased += 1

    def run(self, *names: str) -> None:
        """Add these cameras."""
        self.by_name = {name: Camera(name, "demo:", SPEC, FrameRecorder()) for name in names}


class _NoSlots(FrameRecorder):
    def open(self, camera: str) -> None:
        raise AssertionError(camera)

    def forget(self, camera: str) -> None:
        """Nothing is kept."""

    def close_camera(self, camera: str) -> None:
        raise AssertionError(camera)


@dataclass
class StubEngineHost:
    """An engine room that has a faster variant, or fails to have one."""

    has_variant: bool = False
    error: ModelError | None = None
    substitute_precision: str | None = None
    calls: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def can_try_faster_variant(self) -> bool:
        return self.has_variant and self.substitute_precision is None

    async def start_substitute(self) -> str | None:
        self.calls.append("call")
        await self.gate.wait()
        if self.error is not None:
            self.has_variant = False
            raise self.error
        self.substitute_precision = "int8"
        return self.substitute_precision

    async def stop_substitute(self) -> None:
        self.calls.append("dismiss")
        self.substitute_precision = None


@dataclass
class ControllerHarness:
    """A controller whose measurements are made by the test, five seconds apart."""

    state: AppState
    engines: StubEngineHost
    events: list[tuple[str, str, Mapping[str, Any]]]
    now_ns: int = 0

    def __post_init__(self) -> None:
        self.camera_registry = StubCameraRegistry()
        self.camera_registry.run(*self.state.snapshot().config.cameras)
        self.state.set_camera_registry(self.camera_registry)
        self.controller = OverloadController(
            self.state,
            self.engines,
            lambda code, words, details: self.events.append((code, words, details)),
            clock=lambda: self.now_ns,
        )

    async def read(self, count: int, *, carries: float, asks: float = 20.0, used_cores: float = 1.9) -> None:
        """So many readings of a device that carries so many frames per second of the cameras."""
        for _ in range(count):
            self.now_ns += 5_000_000_000
            throttles = self.camera_registry.throttles
            rates = {
                n: min(asks, throttles[n].fps or asks) if n in throttles else asks
                for n in self.camera_registry.by_name
            }
            share = min(1.0, carries / max(1e-9, sum(rates.values())))
            cameras = {
                name: CameraLoad(asks, rate, rate, share * rate, (1 - share) * rate, 0.1)
                for name, rate in rates.items()
            }
            self.state.meter.measurement = LoadMeasurement(
                seconds=5.0,
                cameras=cameras,
                cores=2,
                decode_cores=0.1,
                infer_cores=used_cores - 0.1,
                other_cores=0.0,
                external_cores=0.0,
                gpu=False,
            )
            await self.controller.step()
            await asyncio.sleep(0)

    @property
    def codes(self) -> list[tuple[str, str]]:
        return [(code, details.get("level", "")) for code, _, details in self.events]


@dataclass
class StubEngine:
    """An engine of which only the device and the process are used."""

    device: DeviceState = LOST
    process: ProcessStatus | None = None

    def info(self) -> "StubEngine":
        return self


def play(
    scenario: Callable[[ControllerHarness], Awaitable[None]], tmp_path: Path, **overload: Any
) -> ControllerHarness:
    async def events() -> ControllerHarness:
        document = {
            "cameras": {name: {"uri": "demo:"} for name in ("dock", "gate", "yard")},
            "overload": {**FAST, **overload},
        }
        state = AppState.of(parse_config(document), tmp_path, {}, lambda: None)
        set_engine(state, StubEngine())
        harness = ControllerHarness(state, StubEngineHost(), [])
        await scenario(harness)
        await harness.controller.close()
        return harness

    return asyncio.run(events())


def set_engine(state: AppState, engine: StubEngine) -> None:
    """Compute with this engine; its model and selection are not looked at."""
    model, selection = cast("Model", None), cast("Selection", None)
    state.set_model(DEFAULT_MODEL, ModelState(model, selection, None, cast("Engine", engine)))


def capacity_of(harness: ControllerHarness) -> dict[str, Any]:
    """The object `capacity` of status."""
    capacity = report.build_capacity(harness.state.snapshot())
    assert capacity is not None
    return capacity.dump()


def device(harness: ControllerHarness, state: DeviceState) -> None:
    set_engine(harness.state, StubEngine(state))


def test_a_lost_device_lowers_the_camera_rates_and_is_reported(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(10, carries=20)

    harness = play(scenario, tmp_path)
    assert harness.codes[:2] == [("overload-taken", "gate"), ("overload-taken", "fps")]
    assert harness.camera_registry.throttles["dock"] == Throttle(6.0, GateSettings())
    status = capacity_of(harness)
    assert status["demandedPerSecond"] == 60
    assert status["deliveredPerSecond"] == pytest.approx(18)
    assert status["sentence"] == (
        "18.0 of 60.0 frames/s: the CPU keeps up, with a motion gate on dock, gate and yard and"
        " dock, gate and yard at 6 fps"
    )
    assert [level["level"] for level in status["overload"]["levels"]] == ["gate", "fps"]
    assert status["overload"]["active"]
    assert harness.events[1][2] == {
        "level": "fps",
        "framesPerSecond": 18.0,
        "demandedPerSecond": 60.0,
        "deliveredPerSecond": 20.0,
        "levels": ["gate", "fps"],
    }


def test_a_requested_cpu_lowers_nothing_by_default(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        device(harness, replace(FINE, effective="cpu", code=ReasonCode.CPU_REQUESTED))
        await harness.read(20, carries=15)

    harness = play(scenario, tmp_path)
    assert harness.events == []
    assert harness.camera_registry.eased == 0
    assert capacity_of(harness)["overload"] == {
        "active": False,
        "exhausted": False,
        "since": None,
        "levels": [],
    }


def test_a_requested_cpu_lowers_rates_if_configured(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        device(harness, FINE)
        await harness.read(5, carries=15)

    assert play(scenario, tmp_path, when="always", levels=["fps"]).codes[:1] == [("overload-taken", "fps")]


def test_without_levels_nothing_is_degraded(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(20, carries=1)

    assert play(scenario, tmp_path, levels=[], when="always").events == []


def test_all_levels_end_at_once_when_the_device_is_back(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(10, carries=15)
        harness.events.clear()
        device(harness, FINE)
        await harness.read(3, carries=1000)

    harness = play(scenario, tmp_path)
    assert harness.codes == [("overload-returned", "fps"), ("overload-returned", "gate")]
    assert harness.events[0][1] == "the requested device is in use: all cameras at their configured rates"
    assert harness.camera_registry.throttles == {}
    assert harness.state.snapshot().overload_status.taken_levels == ()


def test_without_inference_no_level_starts_or_ends(tmp_path: Path) -> None:
    """An engine that restarts delivers nothing, and which device comes next is not known."""

    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(6, carries=15)
        before = list(harness.events)
        down = ProcessStatus(None, 0, "the engine is restarting")
        set_engine(harness.state, StubEngine(LOST, down))
        await harness.read(20, carries=0)
        assert harness.events == before

    harness = play(scenario, tmp_path)
    assert "gate" in {each.level for each in harness.state.snapshot().overload_status.taken_levels}


def test_high_priority_cameras_keep_their_rate(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        cameras = {
            name: {"uri": "demo:", "priority": 9 if name == "dock" else 0}
            for name in harness.camera_registry.by_name
        }
        config = parse_config({"cameras": cameras, "overload": {**FAST, "levels": ["fps"]}})
        harness.state.restart_with(config)
        await harness.read(4, carries=30)

    throttles = play(scenario, tmp_path).camera_registry.throttles
    assert set(throttles) == {"gate", "yard"}
    assert throttles["gate"].fps == pytest.approx(3.5)


def test_a_camera_added_later_is_limited_like_the_others(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        cameras = {name: {"uri": "demo:"} for name in ("dock", "gate", "yard", "roof")}
        harness.state.restart_with(
            parse_config({"cameras": cameras, "overload": {**FAST, "levels": ["fps"]}})
        )
        await harness.read(4, carries=30)
        assert set(harness.camera_registry.throttles) == {"dock", "gate", "yard"}
        harness.camera_registry.run(*cameras)
        await harness.read(3, carries=30)

    throttles = play(scenario, tmp_path).camera_registry.throttles
    assert set(throttles) == {"dock", "gate", "yard", "roof"}
    assert len(set(throttles.values())) == 1


def test_a_configured_gate_is_not_changed(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        gates = {"dock": {"enabled": False}, "gate": {"sensitivity": 0.9}}
        cameras = {
            name: {"uri": "demo:"} | ({"gate": gates[name]} if name in gates else {})
            for name in harness.camera_registry.by_name
        }
        harness.state.restart_with(
            parse_config({"cameras": cameras, "overload": {**FAST, "levels": ["gate"]}})
        )
        await harness.read(8, carries=15)

    harness = play(scenario, tmp_path)
    assert set(harness.camera_registry.throttles) == {"yard"}
    assert harness.codes == [("overload-taken", "gate"), ("overload-exhausted", "")]
    sentence = capacity_of(harness)["sentence"]
    assert sentence == "15.0 of 60.0 frames/s: too much for the CPU even with a motion gate on yard"


def test_limits_do_not_follow_noise_in_the_requested_rate(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(4, carries=30)
        eased = harness.camera_registry.eased
        for asks in (20.5, 19.5, 20.2, 19.8):
            await harness.read(1, carries=30, asks=asks)
        assert harness.camera_registry.eased == eased

    play(scenario, tmp_path, levels=["fps"])


def test_the_faster_variant_is_reported_once_it_computes(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        harness.engines.has_variant = True
        await harness.read(4, carries=15)
        assert harness.engines.calls == ["call"]
        await harness.read(10, carries=15)  # its opening takes long, and nothing else is given up meanwhile
        assert harness.events == []
        harness.engines.gate.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert harness.codes == [("overload-taken", "variant")]
        await harness.read(10, carries=100, used_cores=0.5)
        await asyncio.sleep(0)

    harness = play(scenario, tmp_path)
    assert harness.engines.calls == ["call", "dismiss"]
    assert harness.codes == [("overload-taken", "variant"), ("overload-returned", "variant")]
    assert harness.events[0][1] == "too much for the CPU (15.0 of 60.0 frames/s): int8"


def test_a_variant_that_cannot_be_opened_is_skipped_for_the_next_level(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        harness.engines.has_variant, harness.engines.error = True, ModelError("damaged")
        harness.engines.gate.set()
        await harness.read(12, carries=15)

    harness = play(scenario, tmp_path)
    assert harness.engines.calls == ["call"]
    assert harness.codes[:2] == [("overload-taken", "gate"), ("overload-taken", "fps")]


def test_a_replaced_substitute_engine_is_reported_as_ended(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        harness.engines.has_variant = True
        harness.engines.gate.set()
        await harness.read(4, carries=15)
        await asyncio.sleep(0)
        harness.engines.substitute_precision = None  # as a change of the model does it
        harness.engines.has_variant = False
        await harness.read(2, carries=100)

    harness = play(scenario, tmp_path, levels=["variant"])
    assert harness.codes == [("overload-taken", "variant"), ("overload-returned", "variant")]
    assert harness.events[1][1] == "another engine is in use: the model in its configured precision"
    assert harness.state.snapshot().overload_status.steps["variant", "returned"] == 1


def test_each_load_snapshot_is_evaluated_once(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(2, carries=15)
        for _ in range(50):
            harness.now_ns += 5_000_000_000
            await harness.controller.step()

    assert play(scenario, tmp_path).events == []


def test_the_metrics_show_the_levels(tmp_path: Path) -> None:
    async def scenario(harness: ControllerHarness) -> None:
        await harness.read(10, carries=20)

    harness = play(scenario, tmp_path)
    harness.state.remove_model(DEFAULT_MODEL)
    samples = {(name, labels): value for name, labels, value in collect_samples(harness.state.snapshot())}
    assert samples["overload_level", ("gate",)] == 1
    assert samples["overload_level", ("variant",)] == 0
    assert samples["overload_steps_total", ("gate", "taken")] == 1
    assert samples["overload_steps_total", ("gate", "returned")] == 0
    assert samples["overload_exhausted", ()] == 0
    assert samples["camera_fps_limit", ("dock",)] == 6
    assert samples["admitted_frames_per_second", ("dock",)] == 6
    assert samples["demanded_frames_per_second", ("dock",)] == 20
