"""The whole module with a model too slow for its cameras: what it gives up, and how that comes back."""

import json
import os
import re
from pathlib import Path
from typing import Any

from mjpeg_server import MjpegServer
from module_process import ModuleProcess
from slow_models import rounds_for, save_slow

CONFIG = """
cameras:
  dock: {{uri: '{url}'}}
  gate: {{uri: '{url}'}}
  till: {{uri: '{url}', priority: 5}}
model: {{path: '{model}'}}
inference: {{device: cpu, maxAgeSeconds: 30}}
telemetry: {{mode: none}}
overload: {{when: always, levels: [gate, fps], afterSeconds: 1, backAfterSeconds: 2}}
"""
TAKEN_GATE = re.compile(
    r"WARNING .*overload: too much for the CPU \(.* frames/s\): a motion gate on dock, gate"
)
TAKEN_FPS = re.compile(r"WARNING .*overload: too much for the CPU \(.* frames/s\): .* fps")
RETURNED_FPS = re.compile(r"INFO .*overload: the load is lower: all cameras at their configured rates")
RETURNED_GATE = re.compile(r"INFO .*overload: the load is lower: no motion gates but those of the config")
PICTURE_MS = 25.0
WAIT_S = 180.0


def started(data: Path, *arguments: str) -> ModuleProcess:
    """A module on one core, so that it has the same lane everywhere and leaves the others alone."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return ModuleProcess(data, *arguments)
    finally:
        os.sched_setaffinity(0, cores)


def load_of(module: ModuleProcess) -> dict[str, Any]:
    """The object `capacity` of status."""
    found: dict[str, Any] = module.get("/api/v1/status")["capacity"]
    return found


def samples(module: ModuleProcess) -> dict[str, float]:
    """The metrics, by name with labels, all of one moment."""
    lines = module.raw("/metrics").decode().splitlines()
    words = [line.rsplit(" ", 1) for line in lines if line.startswith("visionedge_")]
    return {name.removeprefix("visionedge_"): float(value) for name, value in words}


def check_that_frames_add_up(seen: dict[str, float]) -> None:
    """Every frame of every camera was analysed, let go for a reason, or waits."""
    for camera in ("dock", "gate", "till"):
        label = f'{{camera="{camera}"'
        let_go = sum(v for name, v in seen.items() if name.startswith(f"frames_dropped_total{label}"))
        offered = seen[f"frames_offered_total{label}}}"]
        assert offered == seen[f"frames_analysed_total{label}}}"] + seen[f"frames_waiting{label}}}"] + let_go


def test_levels_start_under_load_and_end_after_it(tmp_path: Path) -> None:
    """Each step once in log, events and metrics; no camera is opened again, and no frame unaccounted for."""
    config, out = tmp_path / "vision.yaml", tmp_path / "out.jsonl"
    # At most a third of the 120 frames a second that are asked for, whatever the processor.
    model = save_slow(tmp_path / "slow.onnx", rounds_for(PICTURE_MS))
    with MjpegServer(40) as server:
        config.write_text(CONFIG.format(url=server.url, model=model))
        with started(tmp_path / "data", "--config", str(config), "--messages", str(out)) as module:
            module.ready(WAIT_S)
            module.wait_for_log(TAKEN_GATE, WAIT_S)
            module.wait_for_log(TAKEN_FPS, WAIT_S)
            load, cameras = load_of(module), module.cameras()
            assert [level["level"] for level in load["overload"]["levels"]] == ["gate", "fps"]
            assert load["overload"]["active"]
            assert load["deliveredPerSecond"] < load["demandedPerSecond"]
            assert "with a motion gate on dock, gate and till and" in load["sentence"]
            assert cameras["dock"]["throttle"] == cameras["gate"]["throttle"]
            assert cameras["dock"]["throttle"]["gate"]
            seen = samples(module)
            assert (seen['overload_level{level="gate"}'], seen['overload_level{level="variant"}']) == (1, 0)
            check_that_frames_add_up(seen)

            server.set_fps(0.4)
            module.wait_for_log(RETURNED_FPS, WAIT_S)
            module.wait_for_log(RETURNED_GATE, WAIT_S)
            load, cameras = load_of(module), module.cameras()
            assert load["overload"]["levels"] == []
            assert {name: camera["throttle"] for name, camera in cameras.items()} == dict.fromkeys(cameras)
            assert {camera["epoch"] for camera in cameras.values()} == {1}
            seen = samples(module)
            check_that_frames_add_up(seen)
            assert module.stop(10) == 0
    events = [json.loads(line) for line in out.read_text().splitlines()]
    steps = [(e["code"], e["details"].get("level")) for e in events if e["code"].startswith("overload-")]
    assert steps[:2] == [("overload-taken", "gate"), ("overload-taken", "fps")]
    assert steps[-2:] == [("overload-returned", "fps"), ("overload-returned", "gate")]
    for level in ("gate", "fps"):
        for direction in ("taken", "returned"):
            count = steps.count((f"overload-{direction}", level))
            assert seen[f'overload_steps_total{{direction="{direction}",level="{level}"}}'] == count
    assert len(re.findall(" overload: ", module.log)) == len(steps)
