"""`visionedge scene`: events, totals, tracks and annotated videos of recorded clips."""

import io
import json
import re
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from command_line import CommandLine, call_in
from drawn_clips import PERSON, Actor, write_clip, write_detector
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.frames.types import Picture

Document = dict[str, Any]

CAMERA: Document = {
    "uri": "demo:",
    "zones": {"hall": {"polygon": [[0.3, 0], [0.7, 0], [0.7, 1], [0.3, 1]], "minSeconds": 0}},
    "lines": {"door": {"start": [0.5, 0], "end": [0.5, 1], "minSeconds": 0}},
}
"""A person who walks from the left to the right enters the hall, passes the door and leaves the hall."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the detector, `walk.mp4`, and `stay.mp4`, which ends with somebody in the hall."""
    folder = tmp_path_factory.mktemp("made")
    write_detector(folder / "figures.onnx")
    walk = [(0.0, 0.1, 0.8), (3.0, 0.9, 0.8)]
    write_clip(folder / "walk.mp4", [Actor(PERSON, [*walk, (9.0, 0.9, 0.8)])], 3.2)
    write_clip(folder / "stay.mp4", [Actor(PERSON, [(0.0, 0.6, 0.8), (9.0, 0.6, 0.8)])], 1.5)
    return folder


@pytest.fixture
def visionedge(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """Calls the command line in that folder, with its model and state."""
    return call_in(made, monkeypatch, capsys)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, dock=CAMERA)


def write_config(folder: Path, **cameras: Document) -> Path:
    path = folder / "vision.yaml"
    path.write_text(yaml.safe_dump({"cameras": cameras}), encoding="utf-8")
    return path


def read_lines(text: str) -> list[Document]:
    return [json.loads(line) for line in text.splitlines()]


def brief(events: list[Document]) -> list[tuple[str, str | None]]:
    return [(event["type"], event.get("direction")) for event in events]


WALK = [("zone-entered", None), ("line-crossed", "right-to-left"), ("zone-left", None)]
"""A person who walks to the right goes to the left side of a line from the top to the bottom."""


def test_events_are_json_lines_and_the_summary_is_the_last_line(
    visionedge: CommandLine, config: Path
) -> None:
    outcome = visionedge("scene", "walk.mp4", "--config", config, "--json", "--summary")
    assert (outcome.code, outcome.complaints) == (0, [])
    *events, scene = read_lines(outcome.out)
    assert brief(events) == WALK
    assert {(event["camera"], event["epoch"], event["label"]) for event in events} == {("dock", 1, "person")}
    assert set(scene) == {"camera", "since", "tracks", "zones", "lines"}
    assert scene["lines"]["door"]["right-to-left"] == {"person": 1}
    assert scene["zones"]["hall"]["left"] == {"person": 1}


def test_without_json_an_event_is_a_line_of_text(visionedge: CommandLine, config: Path) -> None:
    """The time in the clip, the type, the rule, who, and the direction; at the end of a clip its counts."""
    first, second, third, last = visionedge("scene", "walk.mp4", "--config", config).out.splitlines()
    assert re.fullmatch(r" +0\.\d00 s  zone-entered   hall +person 1", first)
    assert re.fullmatch(r" +1\.\d00 s  line-crossed   door +person 1 +right-to-left", second)
    assert re.fullmatch(r" +2\.\d00 s  zone-left      hall +person 1 +1\.\d s", third)
    assert last == "walk.mp4: 32 pictures, 1 tracks, 3 events"


def test_the_clock_is_that_of_the_clip(visionedge: CommandLine, config: Path) -> None:
    """From --start on, with any offset; without it from 1970 on."""
    seen: list[list[str]] = []
    for start in ((), ("--start", "2026-11-30T08:00:00+01:00"), ("--start", "2026-11-30T07:00:00")):
        outcome = visionedge("scene", "walk.mp4", "--config", config, "--json", *start)
        seen.append([event["at"] for event in read_lines(outcome.out)])
    assert all(at.startswith("1970-01-01T00:00:0") for at in seen[0])
    assert seen[1] == [at.replace("1970-01-01T00", "2026-11-30T07") for at in seen[0]]
    assert seen[2] == seen[1]


def test_two_runs_give_the_same(visionedge: CommandLine, config: Path, tmp_path: Path) -> None:
    """Every byte of the events and of the tracks."""
    runs = []
    for name in ("one.txt", "two.txt"):
        options = ("--config", config, "--json", "--summary", "--tracks", tmp_path / name)
        outcome = visionedge("scene", "walk.mp4", "stay.mp4", *options)
        runs.append((outcome.out, (tmp_path / name).read_text()))
    assert runs[0] == runs[1]


def test_who_is_inside_at_the_end_of_a_clip_is_lost(visionedge: CommandLine, config: Path) -> None:
    """As when the module stops; entered = left + lost + inside."""
    *events, scene = read_lines(
        visionedge("scene", "stay.mp4", "--config", config, "--json", "--summary").out
    )
    assert brief(events) == [("zone-entered", None), ("zone-lost", None)]
    hall = scene["zones"]["hall"]
    assert (hall["entered"], hall["lost"], hall["inside"]) == ({"person": 1}, {"person": 1}, {})


def test_clips_follow_each_other(visionedge: CommandLine, config: Path) -> None:
    """Each is an epoch; numbers of pictures and tracks go on, tracks end, totals add up."""
    options = ("--config", config, "--json", "--summary")
    *events, scene = read_lines(visionedge("scene", "stay.mp4", "walk.mp4", "stay.mp4", *options).out)
    stay = [("zone-entered", None), ("zone-lost", None)]
    assert brief(events) == [*stay, *WALK, *stay]
    assert [event["epoch"] for event in events] == [1, 1, 2, 2, 2, 3, 3]
    assert [event["trackId"] for event in events] == [1, 1, 2, 2, 2, 3, 3]
    assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    assert scene["zones"]["hall"]["entered"] == {"person": 3}
    ids = Counter(event["id"] for event in events)
    assert set(ids.values()) == {1}


def test_tracks_are_written_in_pixels(visionedge: CommandLine, config: Path, tmp_path: Path) -> None:
    """MOTChallenge's text: a line for each picture in which a confirmed track was seen."""
    visionedge("scene", "walk.mp4", "--config", config, "--tracks", tmp_path / "new" / "t.txt")
    rows = [line.split(",") for line in (tmp_path / "new" / "t.txt").read_text().splitlines()]
    assert {(len(row), row[1], *row[-3:]) for row in rows} == {(10, "1", "-1", "-1", "-1")}
    frames = [int(row[0]) for row in rows]
    assert frames == [*range(frames[0], 33)]
    for row in rows:
        left, top, width, height, score = map(float, row[2:7])
        feet_x = 640 * (0.1 + 0.8 * min(3.0, (int(row[0]) - 1) / 10) / 3)
        assert left + width / 2 == pytest.approx(feet_x, abs=12)
        assert top + height == pytest.approx(0.8 * 384, abs=8)
        assert width == pytest.approx(40, abs=4)
        assert height == pytest.approx(96, abs=4)
        assert 0 < score <= 1


def test_each_clip_has_an_annotated_video(visionedge: CommandLine, config: Path, tmp_path: Path) -> None:
    """With as many pictures; zone, line, box and tail are drawn on them."""
    out = tmp_path / "out.mp4"
    outcome = visionedge("scene", "walk.mp4", "stay.mp4", "--config", config, "--annotate", out, "--json")
    assert outcome.code == 0
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["out-2.mp4", "out.mp4"]
    for made, drawn, count in (("walk.mp4", out, 32), ("stay.mp4", tmp_path / "out-2.mp4", 15)):
        plain, painted = read_video(Path(made)), read_video(drawn)
        assert (len(plain), len(painted)) == (count, count)
        changed = np.asarray((cv2.absdiff(plain[-1], painted[-1]) > 40).any(axis=2))
        for share in (0.3, 0.5):  # the edge of the zone, and the line
            x = round(share * 639)
            assert changed[40:340, x - 2 : x + 3].any(axis=1).all()
        assert not changed[:200, :150].any()


def test_a_terminal_shows_the_progress_between_the_events(
    visionedge: CommandLine, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event has a line of its own, and the last state of the progress stays."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert visionedge("scene", "walk.mp4", "--config", config).code == 0
    shown = terminal.getvalue().split("\n")
    *events, progress, counts, rest = [line.rpartition("\r")[2].replace("\x1b[K", "") for line in shown]
    assert rest == ""
    assert [line.split()[2] for line in events] == ["zone-entered", "line-crossed", "zone-left"]
    assert re.fullmatch(r"walk\.mp4: 32 frames, \d+\.\d frames/s", progress)
    assert counts == "walk.mp4: 32 pictures, 1 tracks, 3 events"


class _Terminal(io.StringIO):
    """A terminal that records its output."""

    def isatty(self) -> bool:
        return True


def read_video(path: Path) -> list[Picture]:
    """All pictures; the rate is 10 per second."""
    found: list[Picture] = []
    with closing(open_source(CameraUri("file", str(path)))) as source:
        while (decoded := source.read()) is not None:
            assert decoded.position_s == pytest.approx(len(found) / 10, abs=1e-3)
            found.append(decoded.picture())
    return found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(visionedge: CommandLine, config: Path) -> None:
    outcome = visionedge("scene", "walk.mp4", "--config", config, "--tracks", "/dev/full")
    assert outcome.code == 1
    assert outcome.complaints == ["visionedge: /dev/full: cannot be written: No space left on device"]


def test_without_a_configuration_there_are_only_tracks(visionedge: CommandLine, tmp_path: Path) -> None:
    outcome = visionedge("scene", "walk.mp4", "--tracks", tmp_path / "t.txt", "--summary", "--json")
    assert outcome.code == 0
    assert read_lines(outcome.out) == [
        {"camera": "clip", "since": None, "tracks": [], "zones": {}, "lines": {}}
    ]
    assert len((tmp_path / "t.txt").read_text().splitlines()) > 20


def test_a_camera_is_chosen_by_its_name(visionedge: CommandLine, tmp_path: Path) -> None:
    """It may be left out when there is one; `tracking: off` does not matter."""
    config = write_config(tmp_path, dock={**CAMERA, "tracking": "off"}, yard={"uri": "demo:"})
    outcome = visionedge("scene", "walk.mp4", "--config", config, "--camera", "dock", "--json")
    assert brief(read_lines(outcome.out)) == WALK
    outcome = visionedge("scene", "walk.mp4", "--config", config, "--camera", "yard", "--json")
    assert (outcome.code, outcome.out) == (0, "")
    outcome = visionedge("scene", "walk.mp4", "--config", config, "--json")
    assert outcome.code == 2
    assert outcome.complaints == ["visionedge: --camera: is missing, and the configuration has dock, yard"]


def test_masks_and_classes_of_the_camera_count(visionedge: CommandLine, tmp_path: Path) -> None:
    everything = [[0, 0], [1, 0], [1, 1], [0, 1]]
    for own in ({"masks": [everything]}, {"classes": ["car"]}):
        config = write_config(tmp_path, dock={**CAMERA, **own})
        outcome = visionedge("scene", "walk.mp4", "--config", config)
        assert outcome.out == "walk.mp4: 32 pictures, 0 tracks, 0 events\n"


def test_confidence_is_that_of_the_camera(visionedge: CommandLine, tmp_path: Path) -> None:
    """It wins over the configuration, and a track begins at it."""
    config = write_config(tmp_path, dock={**CAMERA, "confidence": 0.99})
    assert "0 tracks" in visionedge("scene", "walk.mp4", "--config", config).out
    outcome = visionedge("scene", "walk.mp4", "--config", config, "--confidence", "0.5")
    assert "1 tracks, 3 events" in outcome.out


def test_a_clip_that_cannot_be_read_is_reported_and_the_others_are_done(
    visionedge: CommandLine, config: Path, tmp_path: Path
) -> None:
    """A picture is no clip; exit 1."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x")
    clips = ("missing.mp4", picture, "stay.mp4", bad, "stay.mp4")
    outcome = visionedge("scene", *clips, "--config", config, "--json")
    assert outcome.code == 1
    assert [event["epoch"] for event in read_lines(outcome.out)] == [1, 1, 3, 3]
    assert [name for name in ("missing.mp4", "a.png is a picture", "bad.mp4") if name in outcome.err] == [
        *("missing.mp4", "a.png is a picture", "bad.mp4")
    ]
    assert len(outcome.complaints) == 3


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (("--camera", "dick"), 2, "--camera dick: there is no such camera; did you mean 'dock'? "),
        (("--camera", "x"), 2, "--camera x: there is no such camera; the configuration has dock"),
        (("--start", "yesterday"), 2, "--start yesterday: must be a time such as 2026-"),
        (("--start", "9999-12-31T23:59:50"), 2, "--start 9999-12-31T23:59:50: must be a time such as"),
        (("--annotate", "out.avi"), 2, "--annotate out.avi: the name must end with .mp4"),
        (("--annotate", "walk.mp4"), 2, "--annotate walk.mp4: is one of the videos that are read"),
        (("--tracks", "walk.mp4"), 2, "--tracks walk.mp4: is one of the videos that are read"),
        (("--tracks", "o.mp4", "--annotate", "o.mp4"), 2, "--tracks o.mp4: is the file of --annotate"),
        (("--tracks", "state"), 1, "state: cannot be written: it is a folder"),
        (("--tracks", "n" * 300), 1, f"{'n' * 300}: cannot be written: File name too long"),
        (("--tracks", "figures.onnx/t.txt"), 1, "figures.onnx/t.txt: cannot be written: "),
        (("--annotate", "figures.onnx/o.mp4"), 1, "figures.onnx cannot be created: "),
        (("--precision", "int8"), 2, "figures.onnx: "),
        (("--model", "missing.onnx"), 2, "missing.onnx: "),
    ],
)
def test_a_mistake_is_one_line(
    visionedge: CommandLine, config: Path, options: tuple[str, ...], code: int, line: str
) -> None:
    Path("state").mkdir(exist_ok=True)
    outcome = visionedge("scene", "walk.mp4", "--config", config, *options)
    assert (outcome.code, outcome.out) == (code, "")
    (complaint,) = outcome.complaints
    assert complaint.startswith(f"visionedge: {line}")


def test_wrong_keys_and_unknown_classes_are_named_with_their_paths(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    config = write_config(tmp_path, dock={**CAMERA, "zones": {"hall": {"polygon": [[0, 0], [1, 1]]}}})
    outcome = visionedge("scene", "walk.mp4", "--config", config)
    assert outcome.code == 2
    assert "cameras.dock.zones.hall.polygon" in outcome.complaints[0]
    config = write_config(tmp_path, dock={**CAMERA, "classes": ["persn"]})
    outcome = visionedge("scene", "walk.mp4", "--config", config)
    assert outcome.code == 2
    assert (
        "cameras.dock.classes: figures has no class 'persn'; did you mean 'person'?" in outcome.complaints[0]
    )


def test_a_model_at_an_address_is_not_downloaded(
    visionedge: CommandLine, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is given with --model."""
    monkeypatch.delenv("VISIONEDGE_MODEL")
    text = config.read_text()
    config.write_text(f"{text}model: {{url: 'https://models.example/m.onnx', sha256: {'a' * 64}}}\n")
    outcome = visionedge("scene", "walk.mp4", "--config", config)
    assert outcome.code == 2
    assert outcome.complaints[0].startswith("visionedge: model.url: scene downloads no model;")
    assert visionedge("scene", "walk.mp4", "--config", config, "--model", "figures.onnx").code == 0


def test_the_model_of_the_camera_looks_at_the_clip(
    visionedge: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of `models`, with its own classes; --model replaces it, too."""
    monkeypatch.delenv("VISIONEDGE_MODEL")
    config = write_config(tmp_path, dock={**CAMERA, "model": "figures"})
    text = config.read_text()
    own = ("scene", "walk.mp4", "--config", config, "--json")
    for classes, entered in (("[person]", True), ("[car]", False)):
        config.write_text(f"{text}models: {{figures: {{path: figures.onnx, classes: {classes}}}}}\n")
        outcome = visionedge(*own)
        assert outcome.code == 0
        assert any(event["type"] == "zone-entered" for event in read_lines(outcome.out)) is entered
    config.write_text(f"{text}models: {{figures: {{url: 'https://h/f.onnx', sha256: {'a' * 64}}}}}\n")
    outcome = visionedge(*own)
    assert outcome.complaints[0].startswith("visionedge: models.figures.url: scene downloads no model;")
    assert visionedge(*own, "--model", "figures.onnx").code == 0


def test_a_schedule_without_a_start_is_pointed_out(visionedge: CommandLine, tmp_path: Path) -> None:
    """The zone counts at the times of the schedule."""
    schedule = {"from": "08:00", "to": "18:00"}
    zone = {**CAMERA["zones"]["hall"], "schedule": schedule}
    config = write_config(tmp_path, dock={**CAMERA, "zones": {"hall": zone}})
    outcome = visionedge("scene", "stay.mp4", "--config", config)
    assert "without --start the videos begin at 1970-01-01T00:00:00Z" in outcome.err
    assert "0 events" in outcome.out
    outcome = visionedge("scene", "stay.mp4", "--config", config, "--start", "2026-11-30T08:00:00")
    assert outcome.err == ""
    assert "2 events" in outcome.out
