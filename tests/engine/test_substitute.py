"""A faster variant replaces the configured engine temporarily; no frame is lost."""

import shutil
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from clips import make_clip
from engine_host_harness import EngineHostHarness, document, results_of, run_scenario
from fault_script import FaultScript
from slow_models import save_slow, store_fast_variant
from tiny_models import TinyDetector
from visionedge.engine.batcher import DropReason
from visionedge.engine.engine_choice import CHOICES_FOLDER as CHOICES
from visionedge.frames.types import DEFAULT_MODEL
from visionedge.model.quantization.variants import VARIANTS_FOLDER

pytestmark = pytest.mark.system

ROUNDS = 2


def check_that_frames_add_up(module: EngineHostHarness) -> None:
    """Every frame is accounted for, and none came twice or out of its turn."""
    for camera, seen in module.state.batcher.statistics().cameras.items():
        assert seen.offered == seen.analysed + sum(seen.dropped.values())
        numbers = [each.frame.sequence for each in results_of(module.results, camera)]
        assert all(before < after for before, after in pairwise(numbers))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1500, fps=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_slow(folder / "small.onnx", ROUNDS)
    TinyDetector(seed=1).save(folder / "other.onnx")
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder for all: compiled graphs and plans of one test serve the next."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def data(kept: Path) -> Iterator[Path]:
    """The data folder; variants are for one test alone."""
    yield kept
    shutil.rmtree(kept / VARIANTS_FOLDER, ignore_errors=True)


def store(module: EngineHostHarness, data: Path) -> None:
    loaded_model = module.state.snapshot().loaded_model
    assert loaded_model is not None
    store_fast_variant(loaded_model, data)


async def some_more(module: EngineHostHarness) -> None:
    """Wait until every camera has more results."""
    counts = {name: len(results_of(module.results, name)) for name in ("dock", "gate", "yard")}
    await module.until(lambda r: all(len(results_of(r, name)) >= count + 3 for name, count in counts.items()))


def test_without_a_variant_there_is_no_substitute(data: Path, clip: Path, models: Path) -> None:
    async def scenario(module: EngineHostHarness) -> None:
        await some_more(module)
        engine = module.state.snapshot().models[DEFAULT_MODEL].engine
        assert not await module.engine_host.can_try_faster_variant()
        assert await module.engine_host.start_substitute() is None
        assert module.state.snapshot().models[DEFAULT_MODEL].engine is engine
        await some_more(module)

    run_scenario(scenario, document(clip, models, process=False), data)


def test_an_explicitly_requested_precision_is_kept(data: Path, clip: Path, models: Path) -> None:
    async def scenario(module: EngineHostHarness) -> None:
        await some_more(module)
        store(module, data)
        assert not await module.engine_host.can_try_faster_variant()

    start = document(clip, models, process=False)
    start["inference"]["precision"] = "fp32"
    run_scenario(scenario, start, data)


def test_a_substitute_computes_until_it_is_ended_or_the_model_changes(
    data: Path, clip: Path, models: Path
) -> None:
    """Detection thresholds may change meanwhile, without a lost frame."""

    async def scenario(module: EngineHostHarness) -> None:
        engine_host, state = module.engine_host, module.state
        await some_more(module)
        engine = state.snapshot().models[DEFAULT_MODEL].engine
        store(module, data)
        assert await engine_host.can_try_faster_variant()
        assert await engine_host.start_substitute() == "int8"
        now = state.snapshot()
        assert now.models[DEFAULT_MODEL].requested is engine
        info = now.engine_info()
        assert info is not None
        assert info.choice.precision == engine_host.substitute_precision == "int8"
        assert not await engine_host.can_try_faster_variant()
        start["inference"]["confidence"] = 0.99
        assert (await module.apply({"inference": start["inference"]})).is_complete
        assert engine_host.substitute_precision == "int8"
        await some_more(module)

        await engine_host.stop_substitute()
        assert state.snapshot().models[DEFAULT_MODEL].engine is engine
        assert state.snapshot().models[DEFAULT_MODEL].requested is None
        assert engine_host.substitute_precision is None
        selection = state.snapshot().models[DEFAULT_MODEL].selection
        assert selection is not None
        assert selection.confidence == 0.99
        await some_more(module)

        assert await engine_host.can_try_faster_variant()
        assert await engine_host.start_substitute() == "int8"
        assert (await module.apply({"model": {"path": str(models / "other.onnx")}})).is_complete
        assert engine_host.substitute_precision is None
        await module.until(lambda r: r[-1].model == "other")

    start = document(clip, models, process=False)
    module = run_scenario(scenario, start, data)
    check_that_frames_add_up(module)
    assert all(c.dropped[DropReason.FAILED] == 0 for c in module.state.batcher.statistics().cameras.values())


def test_a_lost_device_returns_behind_the_substitute(
    data: Path, tmp_path: Path, clip: Path, models: Path
) -> None:
    """The replaced engine still probes its device, and the substitute reports its recovery."""
    faults = FaultScript(tmp_path)
    shutil.rmtree(data / CHOICES, ignore_errors=True)  # a choice that is kept would be taken at once

    async def scenario(module: EngineHostHarness) -> None:
        engine_host, state = module.engine_host, module.state
        await some_more(module)
        store(module, data)
        assert not await engine_host.can_try_faster_variant()  # on a GPU, integers are not
        faults.begin("sticky", "absent")
        await module.until(lambda r: r[-1].device == "cpu")

        assert await engine_host.can_try_faster_variant()
        assert await engine_host.start_substitute() == "int8"
        await some_more(module)
        info = state.snapshot().engine_info()
        assert info is not None
        device = info.device
        assert (device.requested, device.effective, device.degraded) == ("auto", "cpu", True)
        assert info.recovery is not None
        assert info.recovery.recovery_state.stage != "settled"

        faults.end("sticky", "absent")
        await module.until_event("device-back")
        info = state.snapshot().engine_info()
        assert info is not None
        assert not info.device.degraded
        assert info.device.effective == "cpu"  # where frames are still computed
        await engine_host.stop_substitute()
        await module.until(lambda r: results_of(r, "dock")[-1].device == "cuda")

    start = document(clip, models, process=True)
    start["inference"]["device"] = "auto"
    module = run_scenario(scenario, start, data, inject=faults.path)
    check_that_frames_add_up(module)
    assert [event.code for event in module.events] == ["device-lost", "engine-back", "device-back"]
    devices = [each.device for each in results_of(module.results, "dock")]
    assert [device for device, _ in groupby(devices)] == ["cuda", "cpu", "cuda"]
