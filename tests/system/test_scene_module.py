"""The whole module with a zone and a line: tracks, totals and messages over kills, and unknown classes."""

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from edge_runtime.broker import ReceivedMessage
from edge_runtime.contract import check_messages
from edge_runtime.runtime import EdgeRuntime
from module_process import ModuleProcess
from scene_recount import read, recount
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


def received_ids(messages: list[ReceivedMessage]) -> set[str]:
    """The ids of the scene events that the hub has."""
    scene = (message.json() for message in messages if message.output == "scene")
    return {event["id"] for document in scene for event in document["events"]}


def more_events_than(count: int) -> Callable[[list[ReceivedMessage]], bool]:
    """A condition: the hub has more scene events."""
    return lambda messages: len(received_ids(messages)) > count


def test_over_two_kills_every_event_reaches_the_hub_and_the_messages_file_and_is_counted_again(
    edge_runtime: EdgeRuntime, tmp_path: Path
) -> None:
    """The second kill while the hub is down; the script that counts again reads the file alone."""
    data, file = tmp_path / "data", tmp_path / "messages.jsonl"
    arguments = ("--messages", str(file), "--config", str(write_config(tmp_path / "vision.yaml")))
    entered = 0
    for number in range(3):
        with ModuleProcess(data, *arguments, environ=edge_runtime.environ) as module:
            known = len(received_ids(edge_runtime.messages))
            if number == 2:
                edge_runtime.hub_up()
            if number > 0:
                edge_runtime.wait_for(more_events_than(known), 60)
            run_until_some_entered(module, entered + 2)
            if number == 0:
                edge_runtime.wait_for(more_events_than(2), 60)
            elif number == 1:
                edge_runtime.hub_down()
                run_until_some_entered(module, entered + 4)
            else:
                assert module.stop(10) == 0
                continue
            module.stop(number=signal.SIGKILL)
        entered = stored_events(data)["zone-entered"]
    store = SceneStore(data / "scene.db")
    stored, waiting, kept = store.events(limit=10_000), store.waiting(10), store.load("dock")
    store.close()
    assert waiting == []
    check_messages(edge_runtime.messages)
    lines = file.read_text(encoding="utf-8").splitlines()
    in_file = {event["id"] for event in read(lines)}
    # What the hub did not have at the stop is in the spool.
    assert received_ids(edge_runtime.messages) <= in_file == {event["id"] for event in stored}
    assert len(in_file) - len(received_ids(edge_runtime.messages)) <= 5
    totals, problems = recount(read(lines), {"zones": {"all": WHOLE}, "lines": {"middle": MIDDLE}})
    assert problems == []
    assert totals == {
        f"{name} {total} {label}": count
        for name, rule in kept.items()
        for total, by_label in rule.totals.items()
        for label, count in by_label.items()
    }
    events = [json.loads(line) for line in lines]
    numbers = [each["messageSequence"] for each in events if each["schema"] == "visionedge/scene/1"]
    assert numbers == sorted(numbers)


def test_a_class_of_a_zone_that_the_model_does_not_have_is_named_with_the_likely_one(tmp_path: Path) -> None:
    config = write_config(tmp_path / "vision.yaml", zones={"all": {**WHOLE, "classes": ["persons"]}})
    with ModuleProcess(tmp_path / "data", "--config", str(config)) as module:
        assert module.wait(30) == 2
    assert (
        "cameras.dock.zones.all.classes: yolox-nano-416 has no class 'persons'; did you mean 'person'?"
        in (module.log)
    )
