"""tools/evaluate_tracking.py: its figures are those of motmetrics, and our tracks reach what docs say."""

import io
import json
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

import evaluate_tracking
from evaluate_tracking import (
    Crossing,
    Tracks,
    count_crossings,
    count_matched,
    find_crossings,
    read_tracks,
    score,
)
from visionedge.config.schema import CameraConfig, InferenceConfig
from visionedge.ops.detect import DetectRequest, run_detect
from visionedge.ops.scene_clips import SceneRequest, run_scene

LINES = ["--line=A=380,120,380,330", "--line=B=560,140,560,330", "--line=C=230,150,230,300"]


def random_tracks(seed: int) -> tuple[Tracks, Tracks]:
    """A truth of five wandering boxes, and tracks with noise, gaps, false boxes and exchanged numbers."""
    numbers = random.Random(seed)  # noqa: S311 - no secret
    truth: Tracks = {}
    tracks: Tracks = {}
    places = {i: [numbers.uniform(0, 60), numbers.uniform(0, 60)] for i in range(1, 6)}
    names = {i: i + 10 for i in places}
    for frame in range(1, 61):
        truth[frame], tracks[frame] = {}, {}
        if numbers.random() < 0.2:
            a, b = numbers.sample(sorted(names), 2)
            names[a], names[b] = names[b], names[a]
        for number, place in places.items():
            place[0] += numbers.uniform(-4, 4)
            place[1] += numbers.uniform(-4, 4)
            truth[frame][number] = (place[0], place[1], 20.0, 30.0)
            if numbers.random() < 0.85:
                x, y = place[0] + numbers.gauss(0, 3), place[1] + numbers.gauss(0, 3)
                tracks[frame][names[number]] = (x, y, 20.0, 30.0)
        if numbers.random() < 0.3:
            tracks[frame][99] = (numbers.uniform(0, 60), numbers.uniform(0, 60), 20.0, 30.0)
    return truth, tracks


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (1, (0.493333, 0.466667, 32, 45, 75)),
        (2, (0.603333, 0.479718, 20, 33, 66)),
        (3, (0.576667, 0.588850, 23, 39, 65)),
    ],
)
def test_the_figures_are_those_of_motmetrics(seed: int, expected: tuple[float, ...]) -> None:
    """motmetrics 1.4.0, IoU 0.5, on the same boxes: MOTA, IDF1, switches, false and missed boxes."""
    ours = score(*random_tracks(seed), range(1, 61))
    figures = (ours.mota, ours.idf1, ours.switches, ours.false_boxes, ours.missed_boxes)
    assert figures == pytest.approx(expected, abs=1e-6)


def test_a_perfect_track_has_no_error() -> None:
    truth, _ = random_tracks(1)
    figures = score(truth, truth, range(1, 61))
    assert (figures.mota, figures.idf1, figures.switches, figures.ids) == (1, 1, 0, 5)


def foot(x: float, y: float) -> tuple[float, float, float, float]:
    """A box whose lower edge has its middle here."""
    return (x - 1, y - 2, 2, 2)


def test_a_crossing_passes_the_segment_and_not_its_extension() -> None:
    lines = {"door": ((10.0, 0.0), (10.0, 10.0))}  # downwards: its left is the right half of the picture
    tracks = {
        1: {1: foot(5, 5), 2: foot(5, 15), 3: foot(15, 5)},
        2: {1: foot(15, 5), 2: foot(15, 15), 3: foot(12, 5)},
        3: {1: foot(15, 5), 2: foot(15, 15), 3: foot(5, 5)},
    }
    crossings = find_crossings(tracks, lines)
    assert crossings == [Crossing("door", False, 2), Crossing("door", True, 3)]
    assert count_crossings(crossings, lines) == {"door": (1, 1)}


def test_an_event_is_matched_once_at_its_line_direction_and_time() -> None:
    truth = [Crossing("a", True, 10), Crossing("a", True, 12), Crossing("b", False, 50)]
    ours = [Crossing("a", True, 14), Crossing("a", False, 10), Crossing("b", False, 70)]
    assert count_matched(truth, ours, 10) == 1


def test_a_line_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate_tracking.main(["boxes.jsonl", "truth.txt", "--line", "A=1,2,3"])
    assert "must be NAME=X1,Y1,X2,Y2" in capsys.readouterr().err


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a table in Markdown by their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.shared
def test_the_bundled_model_and_the_tracker_reach_the_figures_of_the_docs(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture of vtest.avi, also at a half and a quarter of its rate."""
    boxes, clip = tmp_path / "boxes.jsonl", shared_data / "videos" / "vtest.avi"
    inference = InferenceConfig(confidence=0.1, precision="fp32", device="cpu")
    with boxes.open("w", encoding="utf-8") as out:
        assert run_detect(DetectRequest((str(clip),), None, inference, as_json=True), out) == 0
    assert len(boxes.read_text(encoding="utf-8").splitlines()) == 795
    capsys.readouterr()
    truth = shared_data / "tracking" / "PETS09-S2L1.gt.txt"
    assert evaluate_tracking.main([str(boxes), str(truth), *LINES]) == 0
    truth_row, *ours = read_table(capsys.readouterr().out)
    assert (truth_row["A"], truth_row["B"], truth_row["C"]) == ("15/11", "13/10", "9/6")
    assert [row["pictures/s"] for row in ours] == ["10", "5", "2.5"]
    # A person who walks at the back is not in the truth; another processor rounds otherwise.
    assert float(ours[0]["MOTA"]) >= 0.795
    assert float(ours[0]["IDF1"]) >= 0.72
    assert int(ours[0]["differ"]) <= 4
    assert all(int(row["from full rate"]) <= 4 for row in ours)
    assert json.loads(ours[0]["matched"].partition(" ")[0]) >= 60


@pytest.mark.shared
def test_the_scene_of_a_clip_counts_what_the_tool_counts_in_its_tracks(
    shared_data: Path, tmp_path: Path
) -> None:
    """Lines without hysteresis on every picture of vtest.avi; every total is the number of its events."""
    width_px, height_px = 768, 576
    lines = dict(evaluate_tracking._parse_line(line.removeprefix("--line=")) for line in LINES)
    config = CameraConfig.model_validate(
        {
            "uri": "demo:",
            "classes": ["person"],
            "lines": {
                name: {
                    "start": [start[0] / width_px, start[1] / height_px],
                    "end": [end[0] / width_px, end[1] / height_px],
                    "minSeconds": 0,
                }
                for name, (start, end) in lines.items()
            },
        }
    )
    request = SceneRequest(
        paths=(str(shared_data / "videos" / "vtest.avi"),),
        model=None,
        inference=InferenceConfig(precision="fp32", device="cpu"),
        name="yard",
        camera=config,
        start=datetime(2026, 11, 30, tzinfo=UTC),
        as_json=True,
        summary=True,
        tracks=tmp_path / "tracks.txt",
    )
    out = io.StringIO()
    assert run_scene(request, out) == 0
    *events, scene = map(json.loads, out.getvalue().splitlines())
    counted = {
        name: tuple(line[way].get("person", 0) for way in ("left-to-right", "right-to-left"))
        for name, line in scene["lines"].items()
    }
    assert counted == {"A": (14, 11), "B": (13, 11), "C": (9, 6)}
    assert counted == count_crossings(find_crossings(read_tracks(tmp_path / "tracks.txt"), lines), lines)
    assert Counter((event["line"], event["direction"]) for event in events) == {
        (name, way): count
        for name, counts in counted.items()
        for way, count in zip(("left-to-right", "right-to-left"), counts, strict=True)
    }
