"""The engine host: model and inference change while cameras run; an unavailable one changes nothing."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from clips import make_clip
from engine_host_harness import EngineHostHarness, document, results_of, run_scenario
from fault_script import FaultScript
from tiny_models import TinyDetector
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.engine.batcher import DropReason
from visionedge.frames.types import DEFAULT_MODEL

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1200, fps=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    TinyDetector().save(folder / "small.onnx")
    TinyDetector(width_px=96, height_px=64, seed=1).save(folder / "large.onnx")
    TinyDetector(poison=float("nan")).save(folder / "poisoned.onnx")
    (folder / "empty.onnx").write_bytes(b"")
    return folder


@pytest.mark.parametrize("process", [False, True], ids=["in-process", "own-process"])
def test_another_model_takes_over_and_no_frame_is_lost(
    tmp_path: Path, clip: Path, models: Path, process: bool
) -> None:
    """Of another size, so that pictures have to be prepared otherwise from one frame to the next."""

    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: all(len(results_of(r, name)) >= 3 for name in ("dock", "gate", "yard")))
        assert (await module.apply({"model": {"path": str(models / "large.onnx")}})).is_complete
        await module.until(
            lambda r: all(
                any(e.model == "large" for e in results_of(r, n)[-3:]) for n in ("dock", "gate", "yard")
            )
        )
        now = module.state.snapshot()
        assert now.loaded_model is not None
        assert now.loaded_model.name == "large"
        assert now.config.model.path == str(models / "large.onnx")

    module = run_scenario(scenario, document(clip, models, process=process), tmp_path)
    for camera, seen in module.state.batcher.statistics().cameras.items():
        assert seen.dropped[DropReason.FAILED] == 0
        assert seen.offered == seen.analysed + sum(seen.dropped.values())
        theirs = results_of(module.results, camera)
        numbers = [each.frame.sequence for each in theirs]
        assert all(before < after for before, after in pairwise(numbers))
        names = [each.model for each in theirs]
        assert names == sorted(names, reverse=True)  # small, and from some frame on large
        assert {each.frame.input_picture().shape[1] for each in theirs if each.model == "large"} == {96}


def test_an_unavailable_model_leaves_the_old_one_running(tmp_path: Path, clip: Path, models: Path) -> None:
    async def scenario(module: EngineHostHarness) -> None:
        for name, words in (
            ("gone", "no such model file"),
            ("empty", "empty"),
            ("poisoned", "nan or infinity"),
        ):
            applied = await module.apply({"model": {"path": str(models / f"{name}.onnx")}})
            assert applied.unapplied.keys() == applied.rejected.keys() == {"model"}
            assert words in applied.rejected["model"].lower()
        count = len(module.results)
        await module.until(lambda r: len(r) >= count + 6)
        assert {each.model for each in module.results} == {"small"}
        assert module.state.snapshot().config.model.path == str(models / "small.onnx")

    module = run_scenario(scenario, document(clip, models, process=True), tmp_path)
    assert all(c.dropped[DropReason.FAILED] == 0 for c in module.state.batcher.statistics().cameras.values())


def test_detection_thresholds_change_without_another_engine(tmp_path: Path, clip: Path, models: Path) -> None:
    start = document(clip, models, process=False)

    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: len(r) >= 3)
        engine = module.state.snapshot().models[DEFAULT_MODEL].engine
        assert (await module.apply({"inference": {**start["inference"], "confidence": 1.0}})).is_complete
        count = len(module.results)
        await module.until(lambda r: len(r) >= count + 9)
        assert module.state.snapshot().models[DEFAULT_MODEL].engine is engine
        assert {len(each.detections) for each in module.results[-3:]} == {0}

    module = run_scenario(scenario, start, tmp_path)
    assert any(len(each.detections) for each in module.results[:3])


def test_unknown_classes_are_a_problem_of_the_inference_section(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    start = document(clip, models, process=False)

    async def scenario(module: EngineHostHarness) -> None:
        applied = await module.apply({"inference": {**start["inference"], "classes": ["unicorn"]}})
        assert "unicorn" in applied.rejected["inference"]
        assert module.state.snapshot().config.inference.classes is None

    run_scenario(scenario, start, tmp_path)


def test_classes_and_tracking_of_a_camera_change_while_the_engine_runs(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    start = document(clip, models, process=False)

    def with_dock(**keys: Any) -> Config:
        dock = {**start["cameras"]["dock"], **keys}
        return parse_config({**start, "cameras": {**start["cameras"], "dock": dock}})

    async def scenario(module: EngineHostHarness) -> None:
        (problem,) = module.engine_host.find_unknown_labels(with_dock(classes=["unicorn"]))
        assert problem.startswith("cameras.dock.classes: ")
        assert "unicorn" in problem
        module.engine_host.select_cameras(with_dock(tracking="on").cameras)
        await module.until(lambda r: any(one.candidates is not None for one in results_of(r, "dock")))
        assert all(one.candidates is None for one in results_of(module.results, "gate"))
        module.engine_host.select_cameras(with_dock(classes=["unicorn"]).cameras)
        seen = len(module.results)
        await module.until(lambda r: any(not len(one.detections) for one in results_of(r[seen:], "dock")))

    run_scenario(scenario, start, tmp_path)


# --- while the first engine still opens ---------------------------------------------------------------------


def _held(clip: Path, models: Path) -> dict[str, Any]:
    """A device that is not there, waited for."""
    start = document(clip, models, process=True)
    start["inference"] |= {"device": "cuda", "runtime": "auto", "fallback": "hold"}
    return start


async def _until_held(module: EngineHostHarness) -> None:
    await module.until_event("device-held")
    module.state.set_waiting_reason("the device is not there")  # as the service notes it


def test_a_section_that_waits_for_the_first_engine_is_not_in_force(
    tmp_path: Path, clip: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sections are acknowledged as pending until the policy lets the CPU take over."""
    faults = FaultScript(tmp_path, first_s=60.0)
    faults.begin("absent")
    start = _held(clip, models)

    async def scenario(module: EngineHostHarness) -> None:
        await _until_held(module)
        with monkeypatch.context() as patched:
            patched.setattr("visionedge.app.engine_host._FIRST_ENGINE_TIMEOUT_S", 0.01)
            for _ in range(2):
                applied = await module.apply({"inference": {**start["inference"], "confidence": 0.9}})
                assert applied.rejected == {}
                assert applied.pending.keys() == {"model", "models", "inference"}
                assert "not in use yet: the device is not there" in applied.pending["inference"]
        over = {**start["inference"], "confidence": 0.9, "fallback": "degrade"}
        assert (await module.apply({"inference": over})).is_complete
        now = module.state.snapshot()
        info = now.engine_info()
        assert info is not None
        assert info.device.effective == "cpu"
        assert now.config.inference.fallback == "degrade"
        assert now.models[DEFAULT_MODEL].selection is not None
        assert now.models[DEFAULT_MODEL].selection.confidence == pytest.approx(0.9)

    run_scenario(scenario, start, tmp_path, wait_for_start=False, inject=faults.path)


def test_a_new_device_replaces_a_pending_one(tmp_path: Path, clip: Path, models: Path) -> None:
    """And one that cannot be had changes nothing: the first is waited for as before."""
    faults = FaultScript(tmp_path, first_s=60.0)
    faults.begin("absent")
    start = _held(clip, models)

    async def scenario(module: EngineHostHarness) -> None:
        await _until_held(module)
        applied = await module.apply({"inference": {**start["inference"], "maxBatch": 2}})
        assert applied.rejected.keys() == {"inference"}
        assert applied.pending.keys() == {"model", "models"}
        assert module.state.snapshot().models[DEFAULT_MODEL].engine is None
        assert (await module.apply({"inference": {**start["inference"], "device": "cpu"}})).is_complete
        await module.until(lambda r: all(len(results_of(r, name)) >= 2 for name in ("dock", "gate", "yard")))
        assert {each.device for each in module.results} == {"cpu"}

    run_scenario(scenario, start, tmp_path, wait_for_start=False, inject=faults.path)


def test_the_fallback_policy_of_a_running_engine_changes_without_another_engine(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: len(r) >= 3)
        before = module.state.snapshot().models[DEFAULT_MODEL].engine
        for policy in ("hold", "exit", "degrade"):
            over = {**module.document["inference"], "fallback": policy}
            assert (await module.apply({"inference": over})).is_complete
            assert module.state.snapshot().config.inference.fallback == policy
            assert module.state.snapshot().models[DEFAULT_MODEL].engine is before

    run_scenario(scenario, document(clip, models, process=True), tmp_path)
