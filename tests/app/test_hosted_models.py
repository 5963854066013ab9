"""Several models, each with its cameras: nothing is mixed, and a change of one does not touch the others."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from clips import make_clip
from engine_host_harness import EngineHostHarness, results_of, run_scenario
from tiny_models import TinyDetector
from visionedge.engine.batcher import DropReason
from visionedge.frames.types import FrameResult

pytestmark = pytest.mark.system

CAMERAS = {"a1": None, "a2": None, "b1": "wide", "b2": "wide", "c1": "tall", "c2": "tall"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1200, fps=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other sizes and with other labels; `same` has the input of `wide`."""
    folder = tmp_path_factory.mktemp("models")
    TinyDetector().save(folder / "first.onnx")
    TinyDetector(width_px=96, height_px=64, seed=1).save(folder / "wide.onnx")
    TinyDetector(width_px=96, height_px=64, seed=2).save(folder / "same.onnx")
    TinyDetector(width_px=32, height_px=96, seed=3).save(folder / "tall.onnx")
    (folder / "empty.onnx").write_bytes(b"")
    for name in ("first", "wide", "same", "tall"):
        labels = "".join(f"{name}-{number}\n" for number in range(5))
        (folder / f"{name}.labels.txt").write_text(labels)
    return folder


def document(clip: Path, models: Path, *, process: bool = False, **named: str) -> dict[str, Any]:
    """Six cameras; `named`: files other than those of their names."""
    files = {"wide": "wide", "tall": "tall", **named}
    used = {name: model if model in files else None for name, model in CAMERAS.items()}
    return {
        "cameras": {
            name: {"uri": str(clip), "loop": True} | ({"model": model} if model else {})
            for name, model in used.items()
        },
        "model": {"path": str(models / "first.onnx")},
        "models": {name: {"path": str(models / f"{file}.onnx")} for name, file in files.items()},
        "inference": {"device": "cpu", "runtime": "onnxruntime", "process": process, "confidence": 0.1},
    }


def check_that_nothing_is_mixed(results: list[FrameResult], camera: str, model: str, labels: str) -> None:
    """The results of a camera have the name, the labels and the input of its model."""
    sizes = {"first": (64, 48), "wide": (96, 64), "same": (96, 64), "tall": (32, 96)}
    for result in results_of(results, camera):
        assert result.model == model
        assert result.labels[0] == f"{labels}-0"
        assert result.frame.spec is not None
        assert (result.frame.spec.width_px, result.frame.spec.height_px) == sizes[labels]


def check_that_nothing_is_lost(module: EngineHostHarness, *cameras: str) -> None:
    """Every frame of these cameras is accounted for, and the results are in order."""
    for camera in cameras:
        seen = module.state.batcher.statistics().cameras[camera]
        assert seen.dropped[DropReason.FAILED] == 0
        assert seen.offered == seen.analysed + sum(seen.dropped.values())
        numbers = [each.frame.sequence for each in results_of(module.results, camera)]
        assert all(before < after for before, after in pairwise(numbers))


def has_more(camera: str, results: list[FrameResult], count: int) -> bool:
    return len(results_of(results, camera)) >= count


@pytest.mark.parametrize("process", [False, True], ids=["in-process", "own-process"])
def test_each_camera_is_computed_by_its_model(
    tmp_path: Path, clip: Path, models: Path, process: bool
) -> None:
    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: all(has_more(camera, r, 5) for camera in CAMERAS))
        assert list(module.state.snapshot().engine_infos()) == ["", "tall", "wide"]
        assert module.state.snapshot().readiness() == []

    module = run_scenario(scenario, document(clip, models, process=process), tmp_path)
    for camera, model in CAMERAS.items():
        check_that_nothing_is_mixed(module.results, camera, model or "first", model or "first")
    check_that_nothing_is_lost(module, *CAMERAS)


@pytest.mark.parametrize("file", ["same", "tall"], ids=["of the same input", "of another input"])
def test_one_model_is_replaced_while_the_others_run(
    tmp_path: Path, clip: Path, models: Path, file: str
) -> None:
    process = file == "tall"  # one of the two in processes, as these take a while to start

    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: all(has_more(camera, r, 3) for camera in CAMERAS))
        others = {name: module.state.snapshot().models[name].engine for name in ("", "tall")}
        assert (await module.apply(document(clip, models, process=process, wide=file))).is_complete
        await module.until(lambda r: all(results_of(r, c)[-1].labels[0] == f"{file}-0" for c in ("b1", "b2")))
        now = module.state.snapshot().models
        assert {name: now[name].engine for name in others} == others, "they were not touched"

    module = run_scenario(scenario, document(clip, models, process=process), tmp_path)
    for camera in ("a1", "a2", "c1", "c2"):
        model = CAMERAS[camera] or "first"
        check_that_nothing_is_mixed(module.results, camera, model, model)
    check_that_nothing_is_lost(module, *CAMERAS)


def test_a_model_that_cannot_be_used_changes_nothing(tmp_path: Path, clip: Path, models: Path) -> None:
    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: all(has_more(camera, r, 3) for camera in CAMERAS))
        before = dict(module.state.snapshot().models)
        for wanted in (document(clip, models, wide="empty"), document(clip, models, more="empty")):
            applied = await module.apply(wanted)
            assert applied.rejected.keys() == {"models"}
            assert "empty.onnx" in applied.rejected["models"]
            assert dict(module.state.snapshot().models) == before
            assert module.state.snapshot().readiness() == []
        count = len(results_of(module.results, "b1"))
        await module.until(lambda r: has_more("b1", r, count + 3))

    module = run_scenario(scenario, document(clip, models), tmp_path)
    check_that_nothing_is_lost(module, *CAMERAS)


def test_a_camera_changes_to_a_new_model_and_the_unused_one_is_closed(
    tmp_path: Path, clip: Path, models: Path
) -> None:
    """Its source stays open, and no frame is lost on the way."""

    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: all(has_more(camera, r, 3) for camera in CAMERAS))
        wanted = document(clip, models)
        del wanted["models"]["wide"]
        wanted["models"]["other"] = {"path": str(models / "same.onnx")}
        for camera in ("b1", "b2"):
            wanted["cameras"][camera]["model"] = "other"
        applied = await module.apply(wanted)
        assert applied.is_complete, applied.unapplied
        await module.until(lambda r: all(results_of(r, c)[-1].model == "other" for c in ("b1", "b2")))
        assert list(module.state.snapshot().models) == ["", "other", "tall"]

    module = run_scenario(scenario, document(clip, models), tmp_path)
    check_that_nothing_is_lost(module, *CAMERAS)
    assert {each.frame.epoch for each in results_of(module.results, "b1")} == {1}


def test_classes_and_confidence_of_a_model_are_its_own(tmp_path: Path, clip: Path, models: Path) -> None:
    wanted = document(clip, models)
    wanted["models"]["wide"] |= {"classes": ["wide-1"], "confidence": 0.0}

    async def scenario(module: EngineHostHarness) -> None:
        await module.until(lambda r: has_more("b1", r, 3))
        found = {name for each in results_of(module.results, "b1") for name in each.label_detections()}
        assert found == {"wide-1"}
        wanted["models"]["wide"]["classes"] = ["tall-1"]
        applied = await module.apply(wanted)
        assert "models.wide.classes: wide has no class 'tall-1'" in applied.rejected["models"]

    run_scenario(scenario, wanted, tmp_path)
