"""With the true boxes of a real sequence the rules count what people counted on it."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from scene_paths import PathTrack, SceneRun, camera_config

pytestmark = pytest.mark.shared

WIDTH, HEIGHT, PICTURES, FPS = 768, 576, 795, 10
LINES = {"A": (380, 120, 380, 330), "B": (560, 140, 560, 330), "C": (230, 150, 230, 300)}
ZONE = [(250, 180), (520, 180), (520, 380), (250, 380)]


def true_tracks(file: Path) -> dict[int, list[PathTrack]]:
    """The tracks of each picture, whose numbers begin at 1."""
    found: dict[int, list[PathTrack]] = defaultdict(list)
    with file.open(encoding="utf-8") as lines:
        for number, track_id, *sides in csv.reader(lines):
            left, top, width, height = map(float, sides[:4])
            box = (left / WIDTH, top / HEIGHT, width / WIDTH, height / HEIGHT)
            found[int(number)].append(PathTrack(int(track_id), "person", box))
    return found


def count(data: Path, *, step: int = 1, line_s: float = 0.3, zone_s: float = 0.5) -> dict[str, Any]:
    """Left-to-right and right-to-left of each line; entered, left and inside of the zone at the end."""
    tracks = true_tracks(data / "tracking" / "PETS09-S2L1.gt.txt")
    lines = {
        name: {
            "start": [left / WIDTH, top / HEIGHT],
            "end": [right / WIDTH, bottom / HEIGHT],
            "minSeconds": line_s,
        }
        for name, (left, top, right, bottom) in LINES.items()
    }
    zone = {"polygon": [[x / WIDTH, y / HEIGHT] for x, y in ZONE], "minSeconds": zone_s}
    run = SceneRun(camera_config(lines=lines, zones={"zone": zone}))
    for number in range(1, PICTURES + 1, step):
        run.picture(tracks[number], after_s=step / FPS)
    document = run.scene.document()
    crossed = {
        name: tuple(line[way].get("person", 0) for way in ("left-to-right", "right-to-left"))
        for name, line in document["lines"].items()
    }
    inside = document["zones"]["zone"]
    return crossed | {
        "zone": tuple(inside[total].get("person", 0) for total in ("entered", "left", "inside"))
    }


@pytest.mark.parametrize("step", [1, 2])
def test_lines_and_a_zone_count_the_truth_at_10_and_at_5_pictures_a_second(
    shared_data: Path, step: int
) -> None:
    """The ground truth: A 15/11, B 13/10, C 8/6; 27 entered, 24 left, 3 ended inside."""
    assert count(shared_data, step=step) == {"A": (15, 11), "B": (13, 10), "C": (8, 6), "zone": (27, 24, 3)}


def test_without_hysteresis_one_more_crossing_counts(shared_data: Path) -> None:
    found = count(shared_data, line_s=0, zone_s=0)
    assert found == {"A": (15, 11), "B": (13, 10), "C": (9, 6), "zone": (27, 24, 3)}
