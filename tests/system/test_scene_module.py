"""The whole module with a zone and a line: tracks and totals over a kill, and classes that do not exist."""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from module_process import ModuleProcess
from visionedge.scene.totals import SceneStore

WHOLE = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]], "minSeconds": 0}
MIDDLE = {"start": [0.5, 0], "end": [0.5, 1], "minSeconds": 0}


def write_config(path: Path, **keys: Any) -> Path:
    """Two cameras with the bundled clip, one of them with a scene."""
    cameras = {
        "dock": {"uri": "demo:", "zones": {"all": WHOLE}, "lines": {"middle": MIDDLE}, **keys},
        "plain": {"uri": "demo:", "fps": 1},
    }
    inference = {"device": "cpu", "precision": "fp32", "confidence": 0.4}
    path.write_text(yaml.safe_dump({"cameras": cameras, "inference": inference, "http": {"port": 0}}))
    return path


def read_scene(module: ModuleProcess) -> tuple[dict[str, Any], Counter[str]]:
    """The scene of `dock`, and the totals of its zone over all labels."""
    scene = module.get("/api/v1/cameras/dock/scene")
    zone = scene["zones"]["all"]
    counts = ("inside", "entered", "left", "lost")
    for label, entered in zone["entered"].items():
        assert entered == sum(zone[total].get(label, 0) for total in ("inside", "left", "lost")), label
    return scene, Counter({total: sum(zone[total].values()) for total in counts})


def run_until_some_entered(module: ModuleProcess, more_than: int) -> set[int]:
    """Follow the scene until so many have entered; the numbers of all its tracks."""
    ids: set[int] = set()

    def has_entered(_cameras: object) -> bool:
        scene, totals = read_scene(module)
        ids.update(track["trackId"] for track in scene["tracks"])
        return totals["entered"] > more_than and totals["inside"] > 0

    module.until(has_entered)
    return ids


def stored_events(data: Path) -> Counter[str]:
    store = SceneStore(data / "scene.db")
    types = Counter(event["type"] for event in store.events(limit=10_000))
    store.close()
    return types


def test_totals_agree_with_the_events_over_a_kill_and_numbers_of_tracks_do_not_repeat(tmp_path: Path) -> None:
    data, config = tmp_path / "data", str(write_config(tmp_path / "vision.yaml"))
    with ModuleProcess(data, "--config", config) as module:
        before = run_until_some_entered(module, 2)
        frame = module.get("/api/v1/cameras/dock/frame")
        assert (frame["schema"], frame["precision"]) == ("visionedge/frame/2", "fp32")
        assert all(row.keys() >= {"trackId", "attributes"} for row in frame["detections"])
        assert module.get("/api/v1/cameras/plain/frame?timeout=20")["schema"] == "visionedge/frame/1"
        assert module.get("/api/v1/cameras/plain/scene")["zones"] == {}
        module.stop(number=signal.SIGKILL)
    killed = stored_events(data)
    assert killed["zone-entered"] > 2
    was_inside = killed["zone-entered"] - killed["zone-left"] - killed["zone-lost"]
    with ModuleProcess(data, "--config", config) as module:
        module.until(lambda cameras: cameras["dock"]["framesAnalysed"] > 0)
        _, totals = read_scene(module)
        assert totals["entered"] >= killed["zone-entered"]
        assert totals["lost"] >= killed["zone-lost"] + was_inside
        after = run_until_some_entered(module, killed["zone-entered"] + 1)
        assert max(before) < min(after)
        assert module.stop() == 0
    events = stored_events(data)
    store = SceneStore(data / "scene.db")
    kept = store.load("dock")
    store.close()
    for total in ("entered", "left", "lost"):
        assert sum(kept["all"].totals.get(total, {}).values()) == events[f"zone-{total}"]
    crossed = kept["middle"].totals.values()
    assert sum(sum(by_label.values()) for by_label in crossed) == events["line-crossed"]
    assert len(kept["all"].visits) == events["zone-entered"] - events["zone-left"] - events["zone-lost"]


def test_a_class_of_a_zone_that_the_model_does_not_have_is_named_with_the_likely_one(tmp_path: Path) -> None:
    config = write_config(tmp_path / "vision.yaml", zones={"all": {**WHOLE, "classes": ["persons"]}})
    with ModuleProcess(tmp_path / "data", "--config", str(config)) as module:
        assert module.wait(30) == 2
    assert (
        "cameras.dock.zones.all.classes: yolox-nano-416 has no class 'persons'; did you mean 'person'?"
        in (module.log)
    )
