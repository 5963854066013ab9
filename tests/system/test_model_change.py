"""The whole module, its hub and a server of models: the twin changes the model while cameras run."""

import hashlib
import json
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.contract import check_messages
from edge_runtime.runtime import EdgeRuntime
from model_server import Answer, ModelServer, content, redirect, status
from module_process import ModuleProcess
from tiny_models import TinyDetector
from visionedge.iothub.desired_properties import DESIRED_FILE_NAME

SECRET = "s3cret-signature"
CAMERAS = ("dock", "yard")


def made(folder: Path, detector: TinyDetector) -> bytes:
    """A model's bytes."""
    detector.save(folder / "made.onnx")
    return (folder / "made.onnx").read_bytes()


def configuration(folder: Path) -> Path:
    """Two cameras and a small model; every frame is told."""
    TinyDetector().save(folder / "small.onnx")
    document = {
        "cameras": {name: {"uri": "demo:", "fps": 4} for name in CAMERAS},
        "model": {"path": str(folder / "small.onnx")},
        "inference": {"device": "cpu", "confidence": 0.1},
        "telemetry": {"mode": "all", "intervalSeconds": 0.2, "fillSeconds": 0},
    }
    path = folder / "vision.json"
    path.write_text(json.dumps(document))
    return path


def acknowledged(hub: EdgeRuntime, version: int) -> dict[str, Any]:
    """What the module answers to desired properties of this version, once it does."""

    def answer() -> dict[str, Any]:
        return dict(hub.broker.twin.reported.get("config", {}).get("model") or {})

    hub.wait_until(lambda: answer().get("version") == version, 60)
    return answer()


def model_document(server: ModelServer, path: str, data: bytes) -> dict[str, Any]:
    """Desired properties that ask for what is behind a path."""
    url = f"{server.url(path)}?sig={SECRET}"
    return {"model": {"url": url, "sha256": hashlib.sha256(data).hexdigest()}}


@pytest.mark.timeout(300)
def test_the_twin_changes_the_model_and_no_frame_is_lost(tmp_path: Path, edge_runtime: EdgeRuntime) -> None:
    """What cannot be had is refused with its reason while the old one goes on; the right one takes over."""
    right = made(tmp_path, TinyDetector(width_px=96, height_px=64, seed=1))
    poisoned = made(tmp_path, TinyDetector(poison=float("nan")))
    wrong: dict[str, tuple[Answer, bytes, str]] = {
        "/hash": (content(right + b"x"), right, "has the sha256"),
        "/gone": (status(404), right, "the server answers 404 Not Found"),
        "/plain": (redirect("http://127.0.0.1/m.onnx"), right, "only https: is followed"),
        "/poisoned": (content(poisoned), poisoned, "NaN or infinity"),
    }
    arguments = ("--config", str(configuration(tmp_path)))
    with ModelServer(tmp_path) as server:
        server.answers["/forklift-v3.onnx"] = content(right)
        environ = {**edge_runtime.environ, **server.environ}
        with ModuleProcess(tmp_path / "data", *arguments, environ=environ) as module:
            module.until(lambda c: all(c[name]["framesAnalysed"] >= 2 for name in CAMERAS))
            for path, (answer, expected, words) in wrong.items():
                server.answers[path] = answer
                config = acknowledged(edge_runtime, edge_runtime.desire(model_document(server, path, expected)))
                assert config["status"] == "rejected"
                assert words in " ".join(config["reasons"])
                assert module.get("/readyz")["status"] == "ready"
                assert module.get("/api/v1/status")["model"]["name"] == "small"
            version = edge_runtime.desire(model_document(server, "/forklift-v3.onnx", right))
            assert acknowledged(edge_runtime, version)["status"] == "applied"
            edge_runtime.wait_for(lambda got: {f["model"] for f in frames(got[-5:])} == {"forklift-v3"}, 60)
            edge_runtime.wait_until(
                lambda: edge_runtime.broker.twin.reported.get("model", {}).get("name") == "forklift-v3"
            )
            cameras = module.cameras()
            assert module.stop(20) == 0
    for camera in cameras.values():
        assert camera["dropped"]["failed"] == 0
        assert camera["epoch"] == 1
    check_messages(edge_runtime.messages)
    for name in CAMERAS:
        theirs = [frame for frame in frames(edge_runtime.messages) if frame["camera"] == name]
        assert all(before["sequence"] < after["sequence"] for before, after in pairwise(theirs))
        names = [frame["model"] for frame in theirs]
        assert names == sorted(names, reverse=True)  # small, and from some frame on forklift-v3
    codes = [event["code"] for event in events(edge_runtime.messages) if event["kind"] == "model"]
    assert codes == ["model-refused"] * len(wrong) + ["model-changed"]
    assert SECRET not in module.log
    assert SECRET not in json.dumps(edge_runtime.broker.twin.reported)
    files = [file for file in (tmp_path / "data").rglob("*") if file.is_file()]
    holding = [file for file in files if SECRET.encode() in file.read_bytes()]
    assert [(file.name, stat.S_IMODE(file.stat().st_mode)) for file in holding] == [
        (DESIRED_FILE_NAME, 0o600)
    ]
    assert not any(SECRET.encode() in message.body for message in edge_runtime.messages)


def frames(messages: list[Any]) -> list[dict[str, Any]]:
    """The frame objects in messages."""
    return [
        frame for message in messages if message.output == "detections" for frame in message.json()["frames"]
    ]


def events(messages: list[Any]) -> list[dict[str, Any]]:
    """The events among messages."""
    return [message.json() for message in messages if message.output == "events"]
