"""The keeper: what is measured goes to the ladder, what it says is done, and each step is told once."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from camera_doubles import SPEC, Basket
from visionedge.app import status as report
from visionedge.app.load_meter import CameraLoad, LoadMeasurement
from visionedge.app.metrics import collect_samples
from visionedge.app.overload_controller import OverloadController
from visionedge.app.state import AppState
from visionedge.camera.camera import Camera, InputResizer
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.registry import CameraRegistry
from visionedge.camera.timing import Throttle
from visionedge.config.load import parse_config
from visionedge.engine.device.devices import DeviceState, ReasonCode
from visionedge.engine.interface import Engine, ProcessStatus
from visionedge.errors import ModelError
from visionedge.frames.types import utc_now
from visionedge.runtime.threads import ThreadGroup

FAST = {"afterSeconds": 5, "backAfterSeconds": 10}
LOST = DeviceState("auto", "cpu", ReasonCode.CUDA_ERROR, "CUDA failure 700", utc_now())
FINE = DeviceState("auto", "cuda", ReasonCode.OK, "usable", utc_now())


class Still(CameraRegistry):
    """Cameras that do nothing but remember how they are throttled."""

    def __init__(self) -> None:
        super().__init__(
            InputResizer(SPEC),
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
        """Let these cameras be there."""
        self.by_name = {name: Camera(name, "demo:", SPEC, Basket()) for name in names}


class _NoSlots(Basket):
    def open(self, camera: str) -> None:
        raise AssertionError(camera)

    def forget(self, camera: str) -> None:
        """Nothing is kept."""

    def close_camera(self, camera: str) -> None:
        raise AssertionError(camera)


@dataclass
class Engines:
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
class Stage:
    """A keeper whose readings a test makes up, five seconds apart."""

    state: AppState
    engines: Engines
    told: list[tuple[str, str, Mapping[str, Any]]]
    now_ns: int = 0

    def __post_init__(self) -> None:
        self.camera_registry = Still()
        self.camera_registry.run(*self.state.snapshot().config.cameras)
        self.state.set_camera_registry(self.camera_registry)
        self.controller = OverloadController(
            self.state,
            self.engines,
            lambda code, words, details: self.told.append((code, words, details)),
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
        return [(code, details.get("level", "")) for code, _, details in self.told]


@dataclass
class Seen:
    """An engine of which only the device and the process are looked at."""

    device: DeviceState = LOST
    process: ProcessStatus | None = None

    def info(self) -> "Seen":
        return self


def play(story: Callable[[Stage], Awaitable[None]], tmp_path: Path, **overload: Any) -> Stage:
    async def told() -> Stage:
        document = {
            "cameras": {name: {"uri": "demo:"} for name in ("dock", "gate", "yard")},
            "overload": {**FAST, **overload},
        }
        state = AppState.of(parse_config(document), tmp_path, {}, lambda: None)
        state.set_engine(cast("Engine", Seen()))
        stage = Stage(state, Engines(), [])
        await story(stage)
        await stage.controller.close()
        return stage

    return asyncio.run(told())


def told_of(stage: Stage) -> dict[str, Any]:
    """The object `capacity` of status."""
    capacity = report.build_capacity(stage.state.snapshot())
    assert capacity is not None
    return capacity.dump()


def device(stage: Stage, state: DeviceState) -> None:
    stage.state.set_engine(cast("Engine", Seen(state)))


def test_a_device_that_was_lost_makes_the_cameras_slower_and_says_so(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.read(10, carries=20)

    stage = play(story, tmp_path)
    assert stage.codes[:2] == [("overload-taken", "gate"), ("overload-taken", "fps")]
    assert stage.camera_registry.throttles["dock"] == Throttle(6.0, GateSettings())
    status = told_of(stage)
    assert status["demandedPerSecond"] == 60
    assert status["deliveredPerSecond"] == pytest.approx(18)
    assert status["sentence"] == (
        "18.0 of 60.0 frames/s: the CPU keeps up, with a motion gate on dock, gate and yard and"
        " dock, gate and yard at 6 fps"
    )
    assert [level["level"] for level in status["overload"]["levels"]] == ["gate", "fps"]
    assert status["overload"]["active"]
    assert stage.told[1][2] == {
        "level": "fps",
        "framesPerSecond": 18.0,
        "demandedPerSecond": 60.0,
        "deliveredPerSecond": 20.0,
        "levels": ["gate", "fps"],
    }


def test_a_cpu_that_was_always_the_device_lowers_nothing_by_itself(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        device(stage, replace(FINE, effective="cpu", code=ReasonCode.CPU_REQUESTED))
        await stage.read(20, carries=15)

    stage = play(story, tmp_path)
    assert stage.told == []
    assert stage.camera_registry.eased == 0
    assert told_of(stage)["overload"] == {
        "active": False,
        "exhausted": False,
        "since": None,
        "levels": [],
    }


def test_it_does_where_it_is_told_to(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        device(stage, FINE)
        await stage.read(5, carries=15)

    assert play(story, tmp_path, when="always", levels=["fps"]).codes[:1] == [("overload-taken", "fps")]


def test_an_empty_ladder_gives_nothing_up(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.read(20, carries=1)

    assert play(story, tmp_path, levels=[], when="always").told == []


def test_all_is_returned_at_once_when_the_device_is_back(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.read(10, carries=15)
        stage.told.clear()
        device(stage, FINE)
        await stage.read(3, carries=1000)

    stage = play(story, tmp_path)
    assert stage.codes == [("overload-returned", "fps"), ("overload-returned", "gate")]
    assert stage.told[0][1] == "the requested device is in use: all cameras at their configured rates"
    assert stage.camera_registry.throttles == {}
    assert stage.state.snapshot().overload_status.taken_levels == ()


def test_while_nothing_is_computed_nothing_is_concluded_and_nothing_returned(tmp_path: Path) -> None:
    """An engine that restarts delivers nothing, and which device comes next is not known."""

    async def story(stage: Stage) -> None:
        await stage.read(6, carries=15)
        before = list(stage.told)
        stage.state.set_engine(cast("Engine", Seen(LOST, ProcessStatus(None, 0, "the engine is restarting"))))
        await stage.read(20, carries=0)
        assert stage.told == before

    stage = play(story, tmp_path)
    assert "gate" in {each.level for each in stage.state.snapshot().overload_status.taken_levels}


def test_cameras_of_a_high_priority_keep_their_rate(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        cameras = {
            name: {"uri": "demo:", "priority": 9 if name == "dock" else 0}
            for name in stage.camera_registry.by_name
        }
        config = parse_config({"cameras": cameras, "overload": {**FAST, "levels": ["fps"]}})
        stage.state.restart_with(config)
        await stage.read(4, carries=30)

    throttles = play(story, tmp_path).camera_registry.throttles
    assert set(throttles) == {"gate", "yard"}
    assert throttles["gate"].fps == pytest.approx(3.5)


def test_a_camera_that_comes_later_is_held_like_the_others(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        cameras = {name: {"uri": "demo:"} for name in ("dock", "gate", "yard", "roof")}
        stage.state.restart_with(parse_config({"cameras": cameras, "overload": {**FAST, "levels": ["fps"]}}))
        await stage.read(4, carries=30)
        assert set(stage.camera_registry.throttles) == {"dock", "gate", "yard"}
        stage.camera_registry.run(*cameras)
        await stage.read(3, carries=30)

    throttles = play(story, tmp_path).camera_registry.throttles
    assert set(throttles) == {"dock", "gate", "yard", "roof"}
    assert len(set(throttles.values())) == 1


def test_a_gate_is_left_alone_where_the_configuration_has_a_word_on_it(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        gates = {"dock": {"enabled": False}, "gate": {"sensitivity": 0.9}}
        cameras = {
            name: {"uri": "demo:"} | ({"gate": gates[name]} if name in gates else {})
            for name in stage.camera_registry.by_name
        }
        stage.state.restart_with(parse_config({"cameras": cameras, "overload": {**FAST, "levels": ["gate"]}}))
        await stage.read(8, carries=15)

    stage = play(story, tmp_path)
    assert set(stage.camera_registry.throttles) == {"yard"}
    assert stage.codes == [("overload-taken", "gate"), ("overload-exhausted", "")]
    sentence = told_of(stage)["sentence"]
    assert sentence == "15.0 of 60.0 frames/s: too much for the CPU even with a motion gate on yard"


def test_limits_do_not_follow_the_noise_of_what_is_asked_for(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.read(4, carries=30)
        eased = stage.camera_registry.eased
        for asks in (20.5, 19.5, 20.2, 19.8):
            await stage.read(1, carries=30, asks=asks)
        assert stage.camera_registry.eased == eased

    play(story, tmp_path, levels=["fps"])


def test_the_faster_variant_is_told_when_it_computes_and_not_before(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.engines.has_variant = True
        await stage.read(4, carries=15)
        assert stage.engines.calls == ["call"]
        await stage.read(10, carries=15)  # its opening takes long, and nothing else is given up meanwhile
        assert stage.told == []
        stage.engines.gate.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert stage.codes == [("overload-taken", "variant")]
        await stage.read(10, carries=100, used_cores=0.5)
        await asyncio.sleep(0)

    stage = play(story, tmp_path)
    assert stage.engines.calls == ["call", "dismiss"]
    assert stage.codes == [("overload-taken", "variant"), ("overload-returned", "variant")]
    assert stage.told[0][1] == "too much for the CPU (15.0 of 60.0 frames/s): int8"


def test_a_variant_that_cannot_be_opened_makes_way_for_the_next_rung(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.engines.has_variant, stage.engines.error = True, ModelError("damaged")
        stage.engines.gate.set()
        await stage.read(12, carries=15)

    stage = play(story, tmp_path)
    assert stage.engines.calls == ["call"]
    assert stage.codes[:2] == [("overload-taken", "gate"), ("overload-taken", "fps")]


def test_a_stand_in_that_another_engine_has_replaced_is_told_to_be_gone(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.engines.has_variant = True
        stage.engines.gate.set()
        await stage.read(4, carries=15)
        await asyncio.sleep(0)
        stage.engines.substitute_precision = None  # as a change of the model does it
        stage.engines.has_variant = False
        await stage.read(2, carries=100)

    stage = play(story, tmp_path, levels=["variant"])
    assert stage.codes == [("overload-taken", "variant"), ("overload-returned", "variant")]
    assert stage.told[1][1] == "another engine is in use: the model in its configured precision"
    assert stage.state.snapshot().overload_status.steps["variant", "returned"] == 1


def test_one_reading_is_looked_at_once(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.read(2, carries=15)
        for _ in range(50):
            stage.now_ns += 5_000_000_000
            await stage.controller.step()

    assert play(story, tmp_path).told == []


def test_the_metrics_show_what_is_given_up(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.read(10, carries=20)

    stage = play(story, tmp_path)
    stage.state.set_engine(None)
    samples = {(name, labels): value for name, labels, value in collect_samples(stage.state.snapshot())}
    assert samples["overload_level", ("gate",)] == 1
    assert samples["overload_level", ("variant",)] == 0
    assert samples["overload_steps_total", ("gate", "taken")] == 1
    assert samples["overload_steps_total", ("gate", "returned")] == 0
    assert samples["overload_exhausted", ()] == 0
    assert samples["camera_fps_limit", ("dock",)] == 6
    assert samples["admitted_frames_per_second", ("dock",)] == 6
    assert samples["demanded_frames_per_second", ("dock",)] == 20
