"""A module on the servers of two other modules, with cameras: one dies, then both, then one comes back."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from module_process import ModuleProcess, assert_every_frame_is_accounted_for, engine_of, metrics_of
from tiny_models import TinyDetector

TOKEN = "remote-t0ken-to-hunt-for"
CAMERAS = {name: {"uri": "demo:", "fps": 8} for name in ("dock", "gate", "yard", "road")}


def serve(folder: Path, model: Path, port: int = 0) -> ModuleProcess:
    """A module without a camera that serves its model to others."""
    config = folder / f"{model.parent.name}-server.json"
    document = {"inference": {"device": "cpu"}, "telemetry": {"mode": "none"}}
    config.write_text(json.dumps(document), encoding="utf-8")
    arguments = ["--config", config, "--model", model, "--http", f"127.0.0.1:{port}"]
    data = folder / f"server-{port}"
    environ = {"VISIONEDGE_HTTP_TOKEN": TOKEN}
    return ModuleProcess(data, *(str(word) for word in arguments), environ=environ)


def port_of(server: ModuleProcess) -> int:
    """The port of a server that is ready."""
    return int(server.ready().rstrip("/").rpartition(":")[2])


def until_more_frames(module: ModuleProcess, count: int) -> None:
    """Every camera has so many more analysed frames."""
    seen = module.cameras()
    module.until(lambda c: all(c[n]["framesAnalysed"] >= seen[n]["framesAnalysed"] + count for n in c))


def dropped(module: ModuleProcess) -> Counter[str]:
    """The dropped frames of all cameras by reason."""
    found: Counter[str] = Counter()
    for camera in module.cameras().values():
        found.update(camera["dropped"])
    return found


def device_of_a_frame(module: ModuleProcess) -> str:
    """Where the newest frame of a camera was computed."""
    return str(module.get("/api/v1/cameras/dock/frame")["device"])


@pytest.mark.timeout(300)  # five modules start, and a lost device is tried again after 5 s and more
def test_no_frame_is_lost_while_servers_die_and_come_back(tmp_path: Path) -> None:
    """A server hangs, dies; both are dead; one is back. Only the freshness rule drops frames.

    Loss and return are reported, and no text has the token.
    """
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    with serve(tmp_path, model) as first, serve(tmp_path, model) as second:
        ports = [port_of(first), port_of(second)]
        config = tmp_path / "vision.json"
        remote = {
            "url": [f"http://127.0.0.1:{port}" for port in ports],
            "model": "tiny.detect",
            "insecure": True,
        }
        inference: dict[str, Any] = {"device": "remote", "remote": remote}
        document = {"inference": inference, "cameras": CAMERAS, "telemetry": {"mode": "none"}}
        config.write_text(json.dumps(document), encoding="utf-8")
        messages = tmp_path / "out.jsonl"
        words = ["--config", config, "--model", model, "--messages", messages]
        environ = {"VISIONEDGE_REMOTE_TOKEN": TOKEN}
        with ModuleProcess(tmp_path / "data", *(str(word) for word in words), environ=environ) as module:
            until_more_frames(module, 5)
            check_both_replicas(module, ports)

            freeze_and_wake(module, first.pid)
            first.stop(number=signal.SIGKILL)
            module.until(lambda _cameras: states(module) == ["down", "up"])
            until_more_frames(module, 5)
            assert device_of_a_frame(module) == "remote"
            assert states(module) == ["down", "up"]

            second.stop(number=signal.SIGKILL)
            module.wait_for_log(re.compile(r"remote is lost: no replica is left: .*; the CPU takes over"))
            until_more_frames(module, 5)
            assert device_of_a_frame(module) == "cpu"
            engine = engine_of(module)
            assert (engine["requested"], engine["effective"]) == ("remote", "cpu")
            assert engine["reasonCode"] == "remote-unreachable"
            assert engine["remote"]["sentence"] == "no picture leaves this device: the CPU computes"

            with serve(tmp_path, model, ports[0]):
                module.wait_for_log(re.compile(r"remote is back: "), 120)
                until_more_frames(module, 5)
                assert device_of_a_frame(module) == "remote"
                assert engine_of(module)["recovery"]["changeOvers"] == 1
            check_losses(module)
            paths = ("/api/v1/status", "/api/v1/log", "/metrics")
            shown = "".join(module.raw(path).decode() for path in paths) + module.log
            assert module.stop(10) == 0
    codes = [json.loads(line)["code"] for line in messages.read_text().splitlines() if '"engine"' in line]
    assert [code for code in codes if code.startswith("device")][:2] == ["device-lost", "device-back"]
    assert TOKEN not in shown + messages.read_text()


def states(module: ModuleProcess) -> list[str]:
    """The states of the replicas."""
    return [replica["state"] for replica in engine_of(module)["remote"]["replicas"]]


def freeze_and_wake(module: ModuleProcess, pid: int) -> None:
    """The first server hangs: after the time limit the other one computes; awake, it is used again."""
    os.kill(pid, signal.SIGSTOP)
    module.wait_for_log(re.compile(r"replica .* is not used any more: gave no answer within"))
    until_more_frames(module, 5)
    assert (device_of_a_frame(module), states(module)) == ("remote", ["down", "up"])
    os.kill(pid, signal.SIGCONT)
    module.until(lambda _cameras: states(module) == ["up", "up"])
    until_more_frames(module, 2)


def check_both_replicas(module: ModuleProcess, ports: list[int]) -> None:
    """Both get batches, and status, log and metrics say so."""
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    sentence = f"pictures leave this device: {', '.join(urls)}"
    engine = engine_of(module)
    assert (engine["effective"], engine["degraded"], engine["remote"]["sentence"]) == (
        "remote",
        False,
        sentence,
    )
    assert sentence in module.log
    assert device_of_a_frame(module) == "remote"
    samples = metrics_of(module)
    for url in urls:
        assert samples[f'remote_replica_up{{replica="{url}"}}'] == 1
        assert samples[f'remote_batches_total{{replica="{url}"}}'] > 0


def check_losses(module: ModuleProcess) -> None:
    """Nothing was lost but by a newer frame or by age."""
    assert_every_frame_is_accounted_for(module)
    lost = dropped(module)
    assert {reason for reason, count in lost.items() if count} <= {"replaced", "stale"}, lost
    assert {camera["epoch"] for camera in module.cameras().values()} == {1}
