"""The whole module with a zone and a line: events and totals over every path of HTTP, and after a kill."""

import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from module_process import ModuleProcess

WHOLE = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]], "minSeconds": 0}
MIDDLE = {"start": [0.5, 0], "end": [0.5, 1], "minSeconds": 0}


def write_config(path: Path) -> Path:
    """A camera with the bundled clip."""
    dock = {"uri": "demo:", "fps": 5, "zones": {"all": WHOLE}, "lines": {"middle": MIDDLE}}
    inference = {"device": "cpu", "precision": "fp32", "confidence": 0.4}
    path.write_text(yaml.safe_dump({"cameras": {"dock": dock}, "inference": inference, "http": {"port": 0}}))
    return path


def read_live(module: ModuleProcess, wanted: int, last_id: str = "") -> list[dict[str, Any]]:
    """The next events of the stream, after the one with an id."""
    url = f"{module.ready()}api/v1/events/stream?camera=dock"
    request = urllib.request.Request(url, headers={"Last-Event-ID": last_id})  # noqa: S310 - http, by ready()
    found: list[dict[str, Any]] = []
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
        for line in answer:
            if line.startswith(b"data: "):
                found.append(json.loads(line.removeprefix(b"data: ")))
                if len(found) == wanted:
                    break
    return found


def read_entered(module: ModuleProcess) -> list[int]:
    """How many persons have entered, one after the other: of the counts, scene, metrics, status and scene."""
    entered = "visionedge_zone_entered_total"
    counts = module.get("/api/v1/cameras/dock/counts?by=day")["counts"]
    return [
        sum(count.get("entered", 0) for count in counts),
        sum(module.get("/api/v1/cameras/dock/scene")["zones"]["all"]["entered"].values()),
        int(module.metric(entered, camera="dock", zone="all")),
        module.get("/api/v1/status")["scenes"]["cameras"]["dock"]["zones"]["all"]["entered"],
        sum(module.get("/api/v1/cameras/dock/scene")["zones"]["all"]["entered"].values()),
    ]


def test_events_and_totals_agree_on_all_paths_and_go_on_after_a_kill(tmp_path: Path) -> None:
    data, config = tmp_path / "data", str(write_config(tmp_path / "vision.yaml"))
    with ModuleProcess(data, "--config", config) as module:
        live = read_live(module, 4)
        module.until(lambda _: module.get("/api/v1/status")["scenes"]["storage"]["waiting"] == 0)
        logged = module.get("/api/v1/events?limit=1000")["events"][::-1]
        first = [event["id"] for event in logged].index(live[0]["id"])
        assert logged[first : first + 4] == live
        before = read_entered(module)
        assert before == sorted(before)
        assert before[0] > 0
        (camera,) = module.cameras().values()
        assert camera["zones"] == {"all": WHOLE["polygon"]}
        assert camera["lines"] == {"middle": [MIDDLE["start"], MIDDLE["end"]]}
        module.stop(number=signal.SIGKILL)
    with ModuleProcess(data, "--config", config) as module:
        module.until(lambda cameras: cameras["dock"]["framesAnalysed"] > 0)
        assert read_live(module, 3, live[0]["id"]) == live[1:]
        after = read_entered(module)
        assert after == sorted(after)
        assert after[0] >= before[0]
        assert module.stop() == 0
