"""The whole module while its engine dies under load: it says so, starts another, and frames come again."""

import json
import os
import re
import select
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from module_process import ModuleProcess

CONFIG = """
telemetry: {mode: none}
cameras: {dock: {uri: 'demo:'}, gate: {uri: 'demo:'}, yard: {uri: 'demo:', fps: 5}}
"""
SHM = Path("/dev/shm")  # noqa: S108 - looked at only
LOST = re.compile(r"ERROR .*the engine's process (\d+) died of signal \d+ \((\w+)\); restarting")
BACK = re.compile(r"INFO .*the engine is back after [\d.]+ s, process (\d+)")


def process_of(module: ModuleProcess) -> dict[str, Any]:
    """What status says of the engine's process."""
    found: dict[str, Any] = module.get("/api/v1/status")["engine"]["process"]
    return found


def children(pid: int) -> set[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task")
    return {int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_frames_continue_after_the_engine_died(tmp_path: Path, number: signal.Signals) -> None:
    """Once in the log, once in the events; cameras and HTTP never pause; nothing is left behind."""
    config, out, before = tmp_path / "vision.yaml", tmp_path / "out.jsonl", set(SHM.iterdir())
    config.write_text(CONFIG)
    arguments = ("--config", str(config), "--messages", str(out))
    with ModuleProcess(tmp_path / "data", *arguments) as module:
        module.until(lambda c: all(camera["framesAnalysed"] >= 3 for camera in c.values()))
        first = process_of(module)["pid"]
        assert children(module.pid) == {first}
        os.kill(first, number)
        assert module.wait_for_log(LOST).groups() == (str(first), number.name)
        second = int(module.wait_for_log(BACK)[1])
        seen = module.cameras()
        module.until(lambda c: all(c[n]["framesAnalysed"] >= seen[n]["framesAnalysed"] + 3 for n in c))
        assert process_of(module) == {"pid": second, "restarts": 1, "down": None}
        assert {camera["epoch"] for camera in module.cameras().values()} == {1}
        assert b"visionedge_engine_restarts_total 1.0" in module.raw("/metrics")
        assert children(module.pid) == {second}
        assert module.stop() == 0
        assert not Path(f"/proc/{second}").exists()
    events = [json.loads(line) for line in out.read_text().splitlines()]
    codes = [event["code"] for event in events if event["kind"] == "engine"]
    assert codes[1:] == ["engine-lost", "engine-back"]
    assert len(LOST.findall(module.log)) == 1
    assert set(SHM.iterdir()) == before


def test_without_an_engine_the_module_is_not_ready_with_the_reason(tmp_path: Path) -> None:
    """Model and compiled graph are gone, so no other can start: 503 with the reason, until it is back."""
    model = tmp_path / "mine.onnx"
    bundled = Path(__file__).resolve().parents[2] / "models" / "yolox-nano-416.onnx"
    model.write_bytes(bundled.read_bytes())
    with ModuleProcess(tmp_path / "data", "--model", str(model)) as module:
        module.until(lambda c: c["demo"]["framesAnalysed"] >= 1)
        model.rename(tmp_path / "away.onnx")
        shutil.rmtree(tmp_path / "data" / "compiled")
        os.kill(process_of(module)["pid"], signal.SIGKILL)
        module.wait_for_log(re.compile(r"engine: restart failed \(.*\); retrying in \d+ s"))
        answer = module.get("/readyz")
        assert "the engine is restarting: its process died of signal 9" in answer["error"]["message"]
        assert process_of(module)["down"].startswith("the engine is restarting")
        assert module.get("/healthz")["status"] == "ok"
        (tmp_path / "away.onnx").rename(model)
        module.wait_for_log(BACK)
        assert module.get("/readyz")["status"] == "ready"
        assert module.stop() == 0


def test_a_killed_module_leaves_no_process(tmp_path: Path) -> None:
    """Neither the engine's process nor a name in shared memory."""
    before = set(SHM.iterdir())
    with ModuleProcess(tmp_path / "data") as module:
        module.until(lambda c: c["demo"]["framesAnalysed"] >= 1)
        handle = os.pidfd_open(process_of(module)["pid"])
        module.stop(number=signal.SIGKILL)
    assert _ended(handle)
    assert set(SHM.iterdir()) == before


def _ended(handle: int) -> bool:
    """Whether the process behind a pidfd has ended, waited for."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = bool(poll.poll(5000))
    os.close(handle)
    return ended


def test_ctrl_c_reaches_the_whole_process_group_and_ends_it_in_order(tmp_path: Path) -> None:
    """A terminal signals the child too, which leaves it to the module: no engine is lost on the way."""
    with ModuleProcess(tmp_path / "data") as module:
        module.until(lambda c: c["demo"]["framesAnalysed"] >= 1)
        os.kill(process_of(module)["pid"], signal.SIGINT)
        assert module.stop(number=signal.SIGINT) == 0
    assert "died" not in module.log
    assert "left behind" not in module.log


def test_without_an_engine_process_the_module_is_one_process(tmp_path: Path) -> None:
    """`inference.process: false`."""
    config = tmp_path / "vision.yaml"
    config.write_text("inference: {process: false}\ncameras: {dock: {uri: 'demo:'}}\n")
    with ModuleProcess(tmp_path / "data", "--config", str(config)) as module:
        module.until(lambda c: c["dock"]["framesAnalysed"] >= 1)
        assert process_of(module) is None
        assert children(module.pid) == set()
        assert module.stop() == 0
