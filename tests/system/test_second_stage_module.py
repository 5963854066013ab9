"""The whole module with a second stage: answers in frames, rules and metrics, and a change of it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from drawn_clips import CAR, PERSON, Actor, write_clip, write_detector
from module_process import ModuleProcess
from tiny_classifiers import save_colour_classifier

WHOLE = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]], "minSeconds": 0, "attributes": {"warm": "no"}}
CAMERA = {"zones": {"cold": WHOLE}, "then": {"model": "warm"}}


def write_config(folder: Path, **keys: Any) -> Path:
    """Two cameras with a blue person and a red car, which stand."""
    path = folder / "vision.yaml"
    clip = str(folder / "clip.mp4")
    camera = {"uri": clip, "fps": 10, **keys}
    document = {
        "cameras": {"dock": camera, "gate": camera},
        "model": {"path": str(folder / "figures.onnx")},
        "models": {"warm": {"path": str(folder / "warm.onnx"), "confidence": 0.8}},
        "inference": {
            "device": "cpu",
            "precision": "fp32",
            "runtime": "onnxruntime",
            "classes": ["person", "car"],
        },
        "http": {"port": 0},
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def read_attributes(module: ModuleProcess, camera: str) -> dict[str, Any]:
    """The attributes in the newest frame object, by label."""
    frame = module.get(f"/api/v1/cameras/{camera}/frame")
    return {row["label"]: row["attributes"] for row in frame.get("detections", ())}


def shows(module: ModuleProcess, camera: str, expected: dict[str, Any]) -> Callable[[object], bool]:
    """A condition: the newest frame object has these attributes."""
    return lambda _cameras: read_attributes(module, camera) == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with both models and the clip, which shows a blue person and a red car."""
    write_detector(tmp_path / "figures.onnx")
    save_colour_classifier(tmp_path / "warm.onnx")
    still = [Actor(PERSON, [(0, 0.3, 0.8), (60, 0.3, 0.8)]), Actor(CAR, [(0, 0.7, 0.8), (60, 0.7, 0.8)])]
    write_clip(tmp_path / "clip.mp4", still, 20)
    return tmp_path


def count(module: ModuleProcess, outcome: str) -> float:
    return module.metric("visionedge_crops_total", model="warm", outcome=outcome)


def test_each_track_gets_one_answer_and_the_second_stage_changes_while_cameras_run(folder: Path) -> None:
    """After it was killed, the engine of the second model answers again."""
    config = write_config(folder, **CAMERA)
    expected = {"person": {"warm": "no"}, "car": {"warm": "yes"}}
    with ModuleProcess(folder / "data", "--config", str(config)) as module:
        for camera in ("dock", "gate"):
            module.until(shows(module, camera, expected))
            zone = module.get(f"/api/v1/cameras/{camera}/scene")["zones"]["cold"]
            assert zone["inside"] == zone["entered"] == {"person": 1}
        assert (count(module, "answered"), count(module, "unsure")) == (4, 0)
        epochs = {name: camera["epoch"] for name, camera in module.cameras().items()}
        reload(module, folder, **{**CAMERA, "then": {"model": "warm", "every": 1}})
        module.until(lambda _cameras: count(module, "answered") > 20)
        os.kill(find_process(module)["pid"], signal.SIGKILL)
        module.until(lambda _cameras: find_process(module)["restarts"] == 1)
        answered = count(module, "answered")
        module.until(lambda _cameras: count(module, "answered") > answered + 20)
        reload(module, folder, tracking="on")
        module.until(shows(module, "dock", {"person": {}, "car": {}}))
        assert {name: camera["epoch"] for name, camera in module.cameras().items()} == epochs
        assert module.stop() == 0


def find_process(module: ModuleProcess) -> dict[str, Any]:
    """The engine's process of the second model."""
    process: dict[str, Any] = module.get("/api/v1/status")["models"]["warm"]["engine"]["process"]
    return process


def reload(module: ModuleProcess, folder: Path, **keys: Any) -> None:
    """Other keys of the cameras."""
    write_config(folder, **keys)
    os.kill(module.pid, signal.SIGHUP)
