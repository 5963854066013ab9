"""The recount run: the module counts on clips over kills, another model, a lost device and a reconnect.

    make recount SECONDS=600

Then `scene_recount.py` counts every event again from the JSON Lines of `--messages` alone, and the totals of
`/scene` must be the same. One JSON document on stdout; exit code 1 if something differs. The device is
simulated: a session on the CPU that claims to be CUDA and is lost on command.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fault_script import FaultScript
from module_process import ModuleProcess, engine_of
from repository_paths import SHARED
from rtsp_server import RtspServer

RECOUNT = Path(__file__).with_name("scene_recount.py")
STREET: dict[str, Any] = {
    "zones": {
        "path": {
            "polygon": [[0.33, 0.31], [0.68, 0.31], [0.68, 0.66], [0.33, 0.66]],
            "occupancy": {"atLeast": 3, "forSeconds": 1},
            "empty": {"forSeconds": 1},
            "dwellSeconds": 3,
        },
        "corner": {
            "polygon": [[0, 0], [0.5, 0], [0.5, 0.5], [0.25, 0.5], [0.25, 1], [0, 1]],
            "minSeconds": 0,
        },
    },
    "lines": {
        "left": {"start": [0.3, 0.26], "end": [0.3, 0.52], "minSeconds": 0},
        "middle": {"start": [0.5, 0.2], "end": [0.5, 0.58]},
        "right": {"start": [0.73, 0.24], "end": [0.73, 0.58]},
    },
}
HALL: dict[str, Any] = {
    "zones": {"hall": {"polygon": [[0.2, 0.1], [0.8, 0.1], [0.8, 1], [0.2, 1]], "empty": {"forSeconds": 1}}},
    "lines": {"across": {"start": [0.5, 0], "end": [0.5, 1]}},
}
MODELS = ("bundled_yolox_nano_416.onnx", "picodet_s_416_coco80.onnx")


@dataclass
class RecountRun:
    """A run of so many seconds, apart from the starts; `folder` is for its files."""

    seconds: float
    shared: Path
    folder: Path
    fps: float = 5.0
    steps: list[str] = field(default_factory=list)
    polls: int = 0
    broken: list[str] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Run it; the figures, with what differs in `broken`."""
        clip = "intel_one-by-one-person-detection.mp4"
        shutil.copy(self.shared / "videos" / clip, self.folder / "hall.mp4")
        self.faults = FaultScript(self.folder, run_s=10.0)
        with RtspServer(self.folder) as server:
            self.hall_uri = server.uri("hall.mp4")
            self.configure(MODELS[0])
            with self.module() as module:
                self.follow(module, 1 / 6)
                self.lose_device(module)
                self.follow(module, 1 / 6)
                self.kill(module)
            with self.module() as module:
                self.follow(module, 1 / 6)
                self.change_model(module)
                self.follow(module, 1 / 6)
                self.reconnect(module, server)
                self.follow(module, 1 / 6)
                self.kill(module)
            with self.module() as module:
                self.follow(module, 1 / 6)
                self.stop(module)
            # Without tracking nothing counts any more, so the totals are those of all events.
            self.configure(MODELS[1], tracking="off")
            with self.module() as module:
                module.until(lambda cameras: all(camera["framesAnalysed"] for camera in cameras.values()))
                scenes = self.scenes(module)
                self.stop(module)
        return self.compare(scenes)

    # --- the module ---------------------------------------------------------------------------------------

    @property
    def messages(self) -> Path:
        """The file of `--messages`."""
        return self.folder / "messages.jsonl"

    def configure(self, model: str, **keys: Any) -> None:
        """Write the configuration."""
        street = {"uri": (self.shared / "videos" / "vtest.avi").as_uri(), "loop": True}
        cameras = {"street": {**street, **STREET}, "hall": {"uri": self.hall_uri, **HALL}}
        document = {
            "cameras": {name: {**camera, "fps": self.fps, **keys} for name, camera in cameras.items()},
            "model": {"path": str(self.shared / "models" / model)},
            "inference": {"precision": "fp32", "classes": ["person"]},
            "telemetry": {"mode": "none"},
        }
        (self.folder / "vision.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")

    @contextmanager
    def module(self) -> Iterator[ModuleProcess]:
        """The module on the same data folder, when both cameras give pictures."""
        options = {
            "--config": "vision.yaml",
            "--messages": self.messages.name,
            "--inject": self.faults.path.name,
        }
        words = [word for name, file in options.items() for word in (name, str(self.folder / file))]
        with ModuleProcess(self.folder / "data", *words, environ={"VISIONEDGE_INJECT_FAULTS": "1"}) as module:
            module.ready(120)
            module.until(lambda cameras: all(camera["framesAnalysed"] for camera in cameras.values()), 120)
            yield module

    def scenes(self, module: ModuleProcess) -> dict[str, Any]:
        """The scenes of both cameras; each of their zones must be conserved."""
        scenes = {name: module.get(f"/api/v1/cameras/{name}/scene") for name in ("street", "hall")}
        self.polls += 1
        for scene in scenes.values():
            for name, zone in scene["zones"].items():
                counts = {total: Counter(zone[total]) for total in ("entered", "left", "lost", "inside")}
                if counts["entered"] != counts["left"] + counts["lost"] + counts["inside"]:
                    self.broken.append(f"zone {name} is not conserved: {zone}")
        return scenes

    def follow(self, module: ModuleProcess, share: float) -> None:
        """Read the scenes with each picture for a share of the time."""
        end_s = time.monotonic() + share * self.seconds
        module.until(
            lambda _cameras: bool(self.scenes(module)) and time.monotonic() > end_s, self.seconds + 60
        )

    # --- what happens to it -------------------------------------------------------------------------------

    def lose_device(self, module: ModuleProcess) -> None:
        """The simulated device fails, the CPU computes for a while, and the device returns."""
        self.faults.begin("sticky", "absent")
        module.wait_for_log(re.compile(r"INFO .*the engine is back .* effective cpu"), 120)
        self.follow(module, 1 / 12)
        self.faults.end("sticky", "absent")
        module.until(lambda _cameras: engine_of(module)["recovery"]["changeOvers"] == 1, 120)
        self.steps.append("device lost and back")

    def change_model(self, module: ModuleProcess) -> None:
        """SIGHUP with another model in the file."""
        before = module.get("/api/v1/cameras/street/frame")["model"]
        self.configure(MODELS[1])
        os.kill(module.pid, signal.SIGHUP)
        module.until(lambda _cameras: module.get("/api/v1/cameras/street/frame")["model"] != before, 120)
        self.steps.append("model changed")

    def reconnect(self, module: ModuleProcess, server: RtspServer) -> None:
        """The camera's server is killed and starts again."""
        epoch = module.cameras()["hall"]["epoch"]
        server.kill()
        self.follow(module, 1 / 24)
        server.start()
        module.until(lambda cameras: cameras["hall"]["epoch"] > epoch and cameras["hall"]["fps"] > 0, 120)
        self.steps.append("camera reconnected")

    def kill(self, module: ModuleProcess) -> None:
        """Without a word, while somebody is inside."""
        module.until(
            lambda _cameras: any(zone["inside"] for zone in self.scenes(module)["street"]["zones"].values())
        )
        module.stop(number=signal.SIGKILL)
        self.steps.append("killed")

    def stop(self, module: ModuleProcess) -> None:
        """As an operator does."""
        if (code := module.stop(20)) != 0:
            self.broken.append(f"the module ended with {code}")

    # --- the count ----------------------------------------------------------------------------------------

    def compare(self, scenes: dict[str, Any]) -> dict[str, Any]:
        """The totals of the scenes against those that the script counts from the messages."""
        rules = {shape: {**STREET[shape], **HALL[shape]} for shape in ("zones", "lines")}
        (self.folder / "rules.json").write_text(json.dumps(rules), encoding="utf-8")
        command = [sys.executable, str(RECOUNT), str(self.folder / "rules.json")]
        with self.messages.open(encoding="utf-8") as lines:
            done = subprocess.run(command, stdin=lines, capture_output=True, text=True, check=False)
        self.broken += done.stderr.splitlines()
        counted = json.loads(done.stdout)
        shown = {
            f"{name} {total} {label}": count
            for scene in scenes.values()
            for name, rule in {**scene["zones"], **scene["lines"]}.items()
            for total, by_label in rule.items()
            if total not in {"since", "inside"}
            for label, count in by_label.items()
        }
        self.broken += [
            f"{key}: {shown.get(key)} in /scene, {counted.get(key)} counted again"
            for key in sorted({*shown, *counted})
            if shown.get(key) != counted.get(key)
        ]
        figures = {"seconds": self.seconds, "steps": self.steps, "scenesRead": self.polls, **self.figures()}
        return {**figures, "totals": counted, "broken": self.broken}

    def figures(self) -> dict[str, Any]:
        """What the messages have: events by type, by model, by device and by epoch of their camera."""
        messages = []
        for line in self.messages.read_text(encoding="utf-8").splitlines():
            try:
                messages.append(json.loads(line))
            except ValueError:
                messages.append({"cut": line})
        lines = [event for message in messages for event in message.get("events", [])]
        events = {event["id"]: event for event in lines}.values()
        return {
            "events": len(events),
            "repeated": len(lines) - len(events),
            "cutLines": sum("cut" in message for message in messages),
            "types": dict(Counter(event["type"] for event in events)),
            "models": dict(Counter(event["model"] for event in events)),
            "devices": dict(Counter(event["device"] for event in events)),
            "tracks": len({(event["camera"], event["trackId"]) for event in events if "trackId" in event}),
            "epochs": sorted({f"{event['camera']} {event['epoch']}" for event in events}),
        }


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--shared", type=Path, default=SHARED, help="its videos and models")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = RecountRun(options.seconds, options.shared, Path(folder)).run()
    print(json.dumps(figures, indent=1))  # noqa: T201 - its result
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
