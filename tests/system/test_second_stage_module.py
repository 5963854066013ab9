"""The whole module with a second stage: answers in frames, rules and metrics, and a change of it."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_each_track_gets_one_answer_and_the_second_stage_can_be_taken_away_while_cameras_run(
    tmp_path: Path,
) -> None:
    write_detector(tmp_path / "figures.onnx")
    save_colour_classifier(tmp_path / "warm.onnx")
    still = [Actor(PERSON, [(0, 0.3, 0.8), (60, 0.3, 0.8)]), Actor(CAR, [(0, 0.7, 0.8), (60, 0.7, 0.8)])]
    write_clip(tmp_path / "clip.mp4", still, 20)
    config = write_config(tmp_path, **CAMERA)
    expected = {"person": {"warm": "no"}, "car": {"warm": "yes"}}
    with ModuleProcess(tmp_path / "data", "--config", str(config)) as module:
        for camera in ("dock", "gate"):
            module.until(shows(module, camera, expected))
            zone = module.get(f"/api/v1/cameras/{camera}/scene")["zones"]["cold"]
            assert zone["inside"] == zone["entered"] == {"person": 1}
        assert module.metric("visionedge_crops_total", model="warm", outcome="answered") == 4
        assert module.metric("visionedge_crops_total", model="warm", outcome="unsure") == 0
        epochs = {name: camera["epoch"] for name, camera in module.cameras().items()}
        write_config(tmp_path, tracking="on")
        module._process.send_signal(signal.SIGHUP)
        module.until(shows(module, "dock", {"person": {}, "car": {}}))
        assert {name: camera["epoch"] for name, camera in module.cameras().items()} == epochs
        assert module.stop() == 0
