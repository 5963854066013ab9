"""Each configuration of docs/scenarios.md counts in its clip what a person counts there."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml

from command_line import CommandLine, Outcome
from drawn_clips import write_detector
from repository_paths import REPOSITORY
from scenario_clips import CLIPS, read_scenarios
from tiny_models import TinyDetector
from visionedge.config.load import parse_config

Document = dict[str, Any]
MONDAY_AT_10 = "2026-11-30T10:00:00+01:00"


TEXT = (REPOSITORY / "docs" / "scenarios.md").read_text(encoding="utf-8")
SCENARIOS = read_scenarios(TEXT)


@dataclass(frozen=True)
class Seen:
    """The events of a clip, and the scene after its end: who is inside then is lost."""

    events: list[Document]
    scene: Document

    def count(self, event_type: str, rule: str) -> int:
        """How often a zone or line had an event."""
        return len(self.select(event_type, rule))

    def select(self, event_type: str, rule: str) -> list[Document]:
        """The events of a type of a zone or line."""
        return [
            event
            for event in self.events
            if event["type"] == event_type and rule in (event.get("zone"), event.get("line"))
        ]

    def totals(self, zone: str) -> Counter[str]:
        """Entered, left and lost of a zone, over all labels; those above 0."""
        counts = self.scene["zones"][zone]
        totals = ((total, sum(counts[total].values())) for total in ("entered", "left", "lost"))
        return Counter({total: count for total, count in totals if count})


class Scenes:
    """Calls `visionedge scene` for scenarios in a folder."""

    def __init__(self, folder: Path, detector: bytes, visionedge: CommandLine) -> None:
        self._folder, self._visionedge = folder, visionedge
        self.detector = folder / "parts.onnx"
        self.detector.write_bytes(detector)

    def play(
        self,
        name: str,
        document: Document | None = None,
        start: str = MONDAY_AT_10,
        fps: float | None = None,
    ) -> Seen:
        """The drawn clip of a scenario, with its configuration or another one, at its rate or another one."""
        clip = self._folder / f"{name}-{fps}.mp4"
        if not clip.exists():
            replace(CLIPS[name], fps=fps or CLIPS[name].fps).write(clip)
        return self.run(clip, document or SCENARIOS[name], "--model", str(self.detector), "--start", start)

    def run(self, clip: Path, document: Document, *options: str) -> Seen:
        """Any clip with a configuration of one camera."""
        (camera,) = document["cameras"]
        config = self._folder / "vision.yaml"
        config.write_text(yaml.safe_dump(document), encoding="utf-8")
        options = ("--json", "--summary", *options)
        outcome = self._visionedge("scene", clip, "--config", config, "--camera", camera, *options)
        assert outcome.code == 0, outcome.err
        *events, scene = map(json.loads, outcome.out.splitlines())
        seen = Seen(events, scene)
        for zone in scene["zones"]:
            totals = seen.totals(zone)
            assert totals["entered"] == totals["left"] + totals["lost"]
        return seen


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and the data folder with the compiled detector: made once."""
    return tmp_path_factory.mktemp("scenarios")


@pytest.fixture(scope="session")
def detector(folder: Path) -> bytes:
    return write_detector(folder / "detector.onnx").read_bytes()


@pytest.fixture
def scenes(
    folder: Path, detector: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Scenes:
    monkeypatch.setenv("VISIONEDGE_DATA", str(folder / "data"))
    return Scenes(folder, detector, CommandLine(capsys))


def zone_of(document: Document) -> Document:
    """The only zone of a configuration."""
    (camera,) = document["cameras"].values()
    (zone,) = camera["zones"].values()
    assert isinstance(zone, dict)
    return zone


# --- the document -------------------------------------------------------------------------------------------


def test_every_scenario_has_a_clip() -> None:
    assert SCENARIOS.keys() == CLIPS.keys()
    assert len(SCENARIOS) == 8


@pytest.mark.parametrize("name", CLIPS)
def test_every_configuration_passes_config_check(
    name: str, scenes: Scenes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As it is printed."""
    config = tmp_path / "vision.yaml"
    config.write_text(yaml.safe_dump(SCENARIOS[name]), encoding="utf-8")
    (tmp_path / "parts.onnx").write_bytes(scenes.detector.read_bytes())
    outcome = CommandLine(capsys)("config", "check", config)
    assert (outcome.code, outcome.complaints) == (0, []), outcome.err


def test_the_configuration_of_helmets_passes_config_check_with_its_classifier(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its labels are those that the zone wants."""
    scenarios = read_scenarios(TEXT, drawn=False)
    assert scenarios.keys() == {"helmets"}
    config = parse_config(scenarios["helmets"])
    site = config.cameras["site"]
    assert site.then is not None
    assert (site.then.model, site.then.every, site.is_tracked) == ("helmet", "track", True)
    assert site.zones["works"].attributes == {"helmet": "no"}
    document = deepcopy(scenarios["helmets"])
    document["models"]["helmet"]["path"] = str(tmp_path / "helmet.onnx")
    file = tmp_path / "vision.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")

    def check(*labels: str) -> Outcome:
        metadata = TinyDetector().metadata | {"names": json.dumps(labels)}
        TinyDetector(classes=2, metadata=metadata).save(tmp_path / "helmet.onnx")
        return CommandLine(capsys)("config", "check", file)

    assert check("yes", "no").code == 0
    wrong = check("on", "off")
    assert wrong.code == 2
    assert "works.attributes.helmet: helmet has no class 'no'; it has on, off" in wrong.err


def test_the_pictures_are_small() -> None:
    """60 kB each, 400 kB together, in the size of the clips."""
    files = [REPOSITORY / "docs" / "scenarios" / f"{name}.webp" for name in CLIPS]
    assert max(file.stat().st_size for file in files) <= 60_000
    assert sum(file.stat().st_size for file in files) <= 400_000
    pictures = [cv2.imread(str(file)) for file in files]
    assert {None if picture is None else picture.shape for picture in pictures} == {(384, 640, 3)}


# --- parts --------------------------------------------------------------------------------------------------


def test_part_detection_sees_each_of_two_parts_that_come_together(scenes: Scenes) -> None:
    """The part beside the nest does not count."""
    seen = scenes.play("part-detection")
    assert seen.totals("nest") == {"entered": 2, "left": 2}
    assert [event["count"] for event in seen.select("zone-filled", "nest")] == [2]
    assert seen.count("zone-empty", "nest") == 2


def test_part_counting_counts_parts_side_by_side_and_those_that_go_back(scenes: Scenes) -> None:
    """A part that jitters on the line counts once."""
    gate = scenes.play("part-counting").scene["lines"]["gate"]
    assert (gate["left-to-right"], gate["right-to-left"]) == ({"part": 6}, {"part": 1})


def test_a_piece_of_a_part_counts_only_with_a_lower_confidence(scenes: Scenes) -> None:
    document = deepcopy(SCENARIOS["part-counting"])
    document["cameras"]["belt"]["confidence"] = 0.3
    gate = scenes.play("part-counting", document).scene["lines"]["gate"]
    assert gate["left-to-right"] == {"part": 7}


def test_defect_counting_counts_good_parts_and_defects_apart(scenes: Scenes) -> None:
    seen = scenes.play("defect-counting")
    gate = seen.scene["lines"]["gate"]
    assert (gate["left-to-right"], gate["right-to-left"]) == ({"ok": 4, "ng": 2}, {})
    assert Counter(event["label"] for event in seen.select("line-crossed", "gate")) == {"ok": 4, "ng": 2}


@pytest.mark.parametrize("fps", [2.5, 30])
def test_parts_count_at_any_rate_at_which_they_move_by_less_than_their_length(
    fps: float, scenes: Scenes
) -> None:
    """At 2.5 pictures a second a part moves by 0.97 of its length from one to the next."""
    gate = scenes.play("defect-counting", fps=fps).scene["lines"]["gate"]
    assert gate["left-to-right"] == {"ok": 4, "ng": 2}


# --- people -------------------------------------------------------------------------------------------------


def test_danger_zone_reports_who_enters_within_half_a_second(scenes: Scenes) -> None:
    """He crosses the border 3.45 s after the begin of the clip. Nobody else enters."""
    seen = scenes.play("danger-zone")
    assert seen.totals("danger") == {"entered": 1, "left": 1}
    (entered,) = seen.select("zone-entered", "danger")
    assert seconds_after_start(entered) == pytest.approx(3.7, abs=0.25)


def test_an_l_shaped_zone_is_not_its_bounding_box(scenes: Scenes) -> None:
    """Somebody stands in the notch."""
    document = deepcopy(SCENARIOS["danger-zone"])
    zone = zone_of(document)
    across, down = zip(*zone["polygon"], strict=True)
    box = [(x, y) for x in (min(across), max(across)) for y in (min(down), max(down))]
    zone["polygon"] = [list(box[corner]) for corner in (0, 1, 3, 2)]
    assert scenes.play("danger-zone", document).totals("danger")["entered"] == 2


def test_an_empty_shelf_is_reported_after_10_seconds_and_a_hidden_one_is_not(scenes: Scenes) -> None:
    """The last bottle is taken after 7 s; its track ends 2.5 s later. New ones come after 24 s."""
    seen = scenes.play("empty-shelf")
    (empty,) = seen.select("zone-empty", "top")
    (filled,) = seen.select("zone-filled", "top")
    assert seconds_after_start(empty) == pytest.approx(19.5, abs=0.3)
    assert seconds_after_start(filled) == pytest.approx(24.4, abs=0.3)
    assert (seen.totals("top")["entered"], seen.totals("bottom")["entered"]) == (6, 3)
    assert seen.count("zone-empty", "bottom") == 0


def seconds_after_start(event: Document) -> float:
    """When an event came in a clip that began at `MONDAY_AT_10`."""
    minutes, seconds = re.fullmatch(r"2026-11-30T09:(\d\d):([\d.]+)Z", event["at"]).groups()  # type: ignore[union-attr]  # a failed match fails the test
    return 60 * int(minutes) + float(seconds)


@pytest.mark.parametrize(
    ("start", "totals"),
    [
        pytest.param(MONDAY_AT_10, {"entered": 3, "left": 3}, id="open"),
        pytest.param("2026-11-30T08:30:00+01:00", {}, id="before it opens"),
        pytest.param("2026-11-30T19:30:00Z", {}, id="after it closed, by the time zone of the shop"),
        pytest.param("2026-11-29T12:00:00+01:00", {}, id="a Sunday"),
        pytest.param("2026-11-30T08:59:55+01:00", {"entered": 2, "left": 2}, id="one inside when it opens"),
        pytest.param(
            "2026-11-30T19:59:55+01:00", {"entered": 2, "left": 1, "lost": 1}, id="one inside when it closes"
        ),
    ],
)
def test_customers_count_during_opening_hours(start: str, totals: dict[str, int], scenes: Scenes) -> None:
    """Three come in, after 2, 4 and 6 s; the fourth looks in at the door."""
    assert scenes.play("customers", start=start).totals("customers") == totals


@pytest.mark.parametrize(
    ("start", "entered"),
    [
        pytest.param("2026-11-29T00:30:00+01:00", 3, id="the night from Saturday"),
        pytest.param("2026-11-28T23:59:55+01:00", 3, id="at midnight"),
        pytest.param("2026-11-30T00:30:00+01:00", 0, id="the night from Sunday"),
    ],
)
def test_opening_hours_over_midnight_belong_to_the_day_on_which_they_began(
    start: str, entered: int, scenes: Scenes
) -> None:
    document = deepcopy(SCENARIOS["customers"])
    zone_of(document)["schedule"].update({"from": "18:00", "to": "02:00"})
    totals = scenes.play("customers", document, start).totals("customers")
    assert (totals["entered"], totals["lost"]) == (entered, 0)


def test_a_crowded_queue_is_reported_with_its_count_until_one_is_served(scenes: Scenes) -> None:
    """The fifth joins after 6.4 s; all five wait for more than 10 s; one passes behind the queue."""
    seen = scenes.play("crowded-queue")
    (occupied,) = seen.select("zone-occupied", "waiting")
    (vacated,) = seen.select("zone-vacated", "waiting")
    assert (occupied["count"], vacated["count"]) == (5, 4)
    assert seconds_after_start(occupied) == pytest.approx(9.4, abs=0.3)
    assert seen.totals("waiting") == {"entered": 5, "left": 1, "lost": 4}
    assert seen.count("zone-dwell", "waiting") == 5


# --- cars ---------------------------------------------------------------------------------------------------


def test_a_car_park_knows_its_free_places_and_who_came_and_went(scenes: Scenes) -> None:
    """Place 1 is taken all the time, place 2 for some time, place 3 never; a truck turns and leaves."""
    seen = scenes.play("car-park")
    changes = {
        place: [event["type"] for event in seen.events if event.get("zone") == place and "count" in event]
        for place in ("place-1", "place-2", "place-3")
    }
    assert changes == {
        "place-1": [],
        "place-2": ["zone-empty", "zone-filled", "zone-empty"],
        "place-3": ["zone-empty"],
    }
    assert [event["zone"] for event in seen.events if event["type"] == "zone-dwell"] == ["place-1", "place-2"]
    gate = seen.scene["lines"]["gate"]
    assert gate["left-to-right"] == gate["right-to-left"] == {"car": 1, "truck": 1}


# --- clips of cameras ---------------------------------------------------------------------------------------


def cut(source: Path, target: Path, pictures: slice, fps: float) -> Path:
    """Write some pictures of a clip; returns `target`."""
    reader = cv2.VideoCapture(str(source))
    size = int(reader.get(cv2.CAP_PROP_FRAME_WIDTH)), int(reader.get(cv2.CAP_PROP_FRAME_HEIGHT))
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for picture in islice(_pictures(reader), pictures.start, pictures.stop, pictures.step):
        writer.write(picture)
    writer.release()
    reader.release()
    return target


def _pictures(reader: cv2.VideoCapture) -> Iterator[Any]:
    while True:
        is_read, picture = reader.read()
        if not is_read:
            return
        yield picture


def test_people_and_a_van_in_a_street(scenes: Scenes, shared_data: Path, tmp_path: Path) -> None:
    """Danger zone, queue and car park in one camera: the first 9 s of vtest.avi.

    The ground truth has 4 who enter the L and leave it. 5 enter its bounding box, of whom 2 are still inside.
    In the place of the queue are at least 5 from 3.6 s on, and 6 from 5.9 s on. The van does not move.
    """
    clip = cut(shared_data / "videos/vtest.avi", tmp_path / "street.mp4", slice(0, 90), 10)
    danger = {"classes": ["person"], **zone_of(SCENARIOS["danger-zone"])}
    l_shape = [[0.8, 0.36], [0.8, 0.5], [0.62, 0.5], [0.62, 0.66], [0.93, 0.66], [0.93, 0.36]]
    box = [[0.62, 0.36], [0.62, 0.66], [0.93, 0.66], [0.93, 0.36]]
    queue, place = (
        zone_of(SCENARIOS["crowded-queue"]),
        SCENARIOS["car-park"]["cameras"]["parking"]["zones"]["place-1"],
    )
    zones = {
        "danger": {**danger, "polygon": l_shape},
        "box": {**danger, "polygon": box},
        "waiting": {**queue, "polygon": [[0.3, 0.35], [0.3, 0.6], [0.9, 0.6], [0.9, 0.35]]},
        "place": {
            **place,
            "polygon": [[0.83, 0.05], [0.83, 0.18], [0.95, 0.18], [0.95, 0.05]],
            "classes": SCENARIOS["car-park"]["cameras"]["parking"]["classes"],
            "dwellSeconds": 5,
        },
    }
    seen = scenes.run(clip, {"cameras": {"street": {"uri": "rtsp://192.0.2.5/stream1", "zones": zones}}})
    assert seen.totals("danger") == {"entered": 4, "left": 4}
    assert seen.totals("box") == {"entered": 5, "left": 3, "lost": 2}
    assert [event["count"] for event in seen.select("zone-occupied", "waiting")] == [6]
    assert [event["sequence"] for event in seen.select("zone-vacated", "waiting")] == [90]  # the end
    assert seen.totals("place") == {"entered": 1, "lost": 1}
    assert seen.count("zone-empty", "place") == 0
    assert seen.count("zone-dwell", "place") == 1


def test_customers_of_a_recorded_camera(scenes: Scenes, shared_data: Path, tmp_path: Path) -> None:
    """Three visit the table within 55 s, the first of them from the begin; at 2 pictures a second."""
    source = shared_data / "videos/intel_one-by-one-person-detection.mp4"
    clip = cut(source, tmp_path / "table.mp4", slice(380, 930, 5), 2)
    document = deepcopy(SCENARIOS["customers"])
    zone_of(document)["polygon"] = [[0.4, 0.5], [0.4, 1], [0.75, 1], [0.75, 0.5]]
    seen = scenes.run(clip, document, "--start", MONDAY_AT_10)
    assert seen.totals("customers") == {"entered": 3, "left": 3}
