"""Every event can be counted again from its evidence, by a script that does not know the module."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scene_paths import DOOR, HELMET, SQUARE, Place, SceneRun, camera_config, track_at
from scene_recount import recount

SCRIPT = Path(__file__).parents[1] / "doubles" / "scene_recount.py"
CAMERA: dict[str, Any] = {
    "zones": {
        "queue": {
            "polygon": SQUARE,
            "dwellSeconds": 2,
            "occupancy": {"atLeast": 3, "forSeconds": 1},
            "empty": {"forSeconds": 1},
        },
        "notch": {
            "polygon": [[0, 0], [0.3, 0], [0.3, 0.6], [0.6, 0.6], [0.6, 0], [1, 0], [1, 1], [0, 1]],
            "minSeconds": 0,
            "empty": {},
        },
        "slow": {"polygon": [[0.1, 0.1], [0.9, 0.2], [0.6, 0.9]], "minSeconds": 3},
        "bare heads": {"polygon": SQUARE, "attributes": {"helmet": "no"}, "dwellSeconds": 1, "empty": {}},
    },
    "lines": {
        "door": {**DOOR, "minSeconds": 0},
        "slope": {"start": [0.9, 0.1], "end": [0.2, 0.7], "minSeconds": 2},
        "gate": {**DOOR, "attributes": {"helmet": "no"}},
    },
    "then": HELMET,
}


class Walkers:
    """Six people who walk at random, are unseen at times, end, and are followed by others."""

    def __init__(self, seed: int, step: float) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a reproducible walk
        self.answers = random.Random(seed)  # noqa: S311 - the same, and the walk stays as it is
        self.step = step
        self.places: dict[int, Place] = {}
        self.next_id = 1

    def picture(self) -> tuple[list[Any], list[int]]:
        """The tracks of the next picture, and those that have ended."""
        ended = [track_id for track_id in self.places if self.random.random() < 0.005]
        for track_id in ended:
            del self.places[track_id]
        while len(self.places) < 6:
            self.places[self.next_id] = (self.random.random(), self.random.random())
            self.next_id += 1
        for track_id, (x, y) in self.places.items():
            self.places[track_id] = (self.move(x), self.move(y))
        unseen = self.random.random() < 0.1
        return [track_at(i, None if unseen else place) for i, place in self.places.items()], ended

    def answer(self) -> dict[int, dict[str, str]]:
        """What a second model says of some of them."""
        labels = ("yes", "no", "no")
        asked = [track_id for track_id in self.places if self.answers.random() < 0.05]
        return {track_id: {"helmet": self.answers.choice(labels)} for track_id in asked}

    def move(self, value: float) -> float:
        return min(1.0, max(0.0, value + self.random.gauss(0, self.step)))


def walk(seed: int, fps: float, step: float, pictures: int) -> tuple[SceneRun, list[Any]]:
    """A run of random walks, and its events after their way through JSON."""
    run, walkers = SceneRun(camera_config(**CAMERA)), Walkers(seed, step)
    for number in range(pictures):
        tracks, ended = walkers.picture()
        run.attributes |= walkers.answer()
        run.picture(tracks, ended, after_s=1 / fps)
        if number % 700 == 699:
            run._take(run.scene.end_all())
            run.epoch += 1
            walkers.places.clear()
    return run, [json.loads(json.dumps(event.document())) for event in run.events]


@pytest.mark.parametrize(("seed", "fps", "step"), [(1, 10, 0.02), (2, 30, 0.005), (3, 2, 0.2), (4, 5, 0.002)])
def test_random_walks_are_counted_again_without_a_difference(seed: int, fps: float, step: float) -> None:
    run, events = walk(seed, fps, step, 2000)
    totals, problems = recount(events, CAMERA)
    assert problems == []
    document = run.scene.document()
    expected = Counter(
        {
            f"{name} {total} {label}": count
            for rules in (document["zones"], document["lines"])
            for name, rule in rules.items()
            for total in rule.keys() - {"since", "inside"}
            for label, count in rule[total].items()
        }
    )
    assert totals == expected
    assert sum(totals.values()) > 100
    assert totals["bare heads entered person"] > 10


def test_the_keys_of_each_type_of_event_are_those_of_the_contract() -> None:
    _, events = walk(1, 10, 0.05, 1000)
    common = {"id", "camera", "type", "at", "sequence", "epoch", "model", "device", "evidence"}
    of_track = common | {"label", "trackId", "confidence", "box"}
    expected = {
        "zone-entered": of_track | {"zone"},
        "zone-left": of_track | {"zone", "dwellSeconds"},
        "zone-lost": of_track | {"zone", "dwellSeconds"},
        "zone-dwell": of_track | {"zone", "dwellSeconds"},
        "line-crossed": of_track | {"line", "direction"},
        **dict.fromkeys(
            ("zone-occupied", "zone-vacated", "zone-empty", "zone-filled"), common | {"zone", "count"}
        ),
    }
    assert {event["type"] for event in events} == expected.keys()
    for event in events:
        assert event.keys() == expected[event["type"]], event


def test_the_script_is_short_and_imports_nothing_of_the_module() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert "import visionedge" not in text
    assert "from visionedge" not in text


def test_the_script_reads_messages_and_fails_where_the_evidence_does_not_prove_an_event(
    tmp_path: Path,
) -> None:
    _, events = walk(1, 10, 0.02, 300)
    (tmp_path / "camera.json").write_text(json.dumps(CAMERA))

    def result(found: list[Any]) -> subprocess.CompletedProcess[str]:
        messages = '{"schema": "visionedge/scene/1", "events": [{\n\n'  # cut by a kill
        messages += json.dumps({"schema": "visionedge/scene/1", "events": found})
        command = [sys.executable, str(SCRIPT), str(tmp_path / "camera.json")]
        return subprocess.run(command, input=messages, capture_output=True, text=True, check=False)

    assert result([*events, events[0]]).returncode == 0
    wrong = next(event for event in events if event["type"] == "line-crossed")
    wrong["direction"] = {"left-to-right": "right-to-left", "right-to-left": "left-to-right"}[
        wrong["direction"]
    ]
    failed = result(events)
    assert failed.returncode == 1
    assert wrong["id"] in failed.stderr
