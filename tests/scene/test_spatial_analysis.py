"""Scene events as messages of Spatial Analysis: every kind is valid, and says what happened."""

import copy
import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scene_paths import DOOR, SQUARE, SceneRun, camera_config, track_at
from spatial_analysis_schema import find_problems
from visionedge.config.schema import CameraConfig
from visionedge.frames.geometry import PolygonArea, find_crossed_side
from visionedge.scene.events import parse_event
from visionedge.scene.scene import KeptRule
from visionedge.scene.spatial_analysis import build_insights

ZONE = {"polygon": SQUARE, "minSeconds": 0}
LINE = {**DOOR, "minSeconds": 0}


class InsightsRun(SceneRun):
    """A scene whose events become messages, after their way through JSON."""

    def __init__(self, config: CameraConfig, kept: Any = None) -> None:
        self.documents: list[dict[str, Any]] = []
        self.refused: list[str] = []
        super().__init__(config, kept)

    def configure(self, config: CameraConfig) -> None:
        self.scene.keeps_context = True
        super().configure(config)

    def _take(self, changes: Any) -> None:
        super()._take(changes)
        firsts = self.scene.take_first_counts()
        for stored in (*firsts, *(event.stored_document() for event in changes.events)):
            document = build_insights(json.loads(json.dumps(stored)))
            if document is None:
                self.refused.append(stored["type"])
            else:
                assert find_problems(document) == [], document
                self.documents.append(document)

    def of(self, event_type: str) -> list[dict[str, Any]]:
        """The events of a type, in their order."""
        return [each for doc in self.documents for each in doc["events"] if each["type"] == event_type]

    @property
    def counts_inside(self) -> list[int]:
        return [event["properties"]["personCount"] for event in self.of("personCountEvent")]


def run_of(**keys: Any) -> InsightsRun:
    return InsightsRun(camera_config(zones={"queue": ZONE}, **keys))


# --- every kind ---------------------------------------------------------------------------------------------


def test_a_visit_is_a_count_an_entry_an_exit_and_a_time() -> None:
    run = run_of(sourceId="Lobby Camera 1")
    run.walk([(0.2, 0.5), (0.4, 0.5), (0.5, 0.5), (0.6, 0.5), (0.8, 0.5)])
    assert [[event["type"] for event in document["events"]] for document in run.documents] == [
        ["personCountEvent"],
        ["personZoneEnterExitEvent", "personCountEvent"],
        ["personZoneEnterExitEvent", "personZoneDwellTimeEvent", "personCountEvent"],
    ]
    assert run.counts_inside == [0, 1, 0]
    entry, leave = run.of("personZoneEnterExitEvent")
    (stay,) = run.of("personZoneDwellTimeEvent")
    assert (entry["properties"]["status"], entry["properties"]["side"]) == ("Enter", "1")
    assert (leave["properties"]["status"], leave["properties"]["side"]) == ("Exit", "3")
    assert stay["properties"] == leave["properties"] | {"dwellTime": 300.0, "dwellFrames": 3}
    assert {event["zone"] for event in (entry, leave, stay)} == {"queue"}
    source = run.documents[1]["sourceInfo"]
    assert source == {
        "id": "Lobby Camera 1",
        "timestamp": "2026-11-30T10:00:00.200Z",
        "width": 640,
        "height": 480,
        "frameId": "2",
        "imagePath": "",
    }
    (person,) = run.documents[1]["detections"]
    assert person["region"]["points"] == [{"x": 0.38, "y": 0.4}, {"x": 0.42, "y": 0.5}]
    assert person["confidence"] == 0.9
    assert person["metadata"] == {
        "trackingId": entry["properties"]["trackingId"],
        "footprintX": "0.400000",
        "footprintY": "0.500000",
    }


@pytest.mark.parametrize(("places", "status"), [((0.4, 0.6), "CrossLeft"), ((0.6, 0.4), "CrossRight")])
def test_a_crossing_has_the_direction_of_one_who_stands_at_the_start(
    places: tuple[float, float], status: str
) -> None:
    """DOOR runs from the top to the bottom, so the right half of the picture is on its left."""
    run = InsightsRun(camera_config(lines={"door": LINE}))
    run.walk([(x, 0.5) for x in places])
    (event,) = run.of("personLineEvent")
    assert event["properties"]["status"] == status
    assert event["zone"] == "door"
    assert run.events[0].direction == {"CrossRight": "left-to-right", "CrossLeft": "right-to-left"}[status]


def test_a_count_shows_everybody_inside() -> None:
    run = run_of()
    run.picture([track_at(1, (0.4, 0.5)), track_at(2, (0.5, 0.5))])
    run.picture([track_at(1, (0.4, 0.5)), track_at(2, (0.5, 0.5)), track_at(3, (0.6, 0.6))])
    run.picture([track_at(1, (0.1, 0.5)), track_at(2, (0.5, 0.55)), track_at(3, (0.6, 0.6))])
    assert run.counts_inside == [0, 1, 2, 3, 2]
    left = run.documents[-1]
    assert len(left["detections"]) == 3
    assert left["events"][-1]["detectionIds"] == [each["id"] for each in left["detections"][1:]]
    assert left["detections"][1]["metadata"]["footprintY"] == "0.550000"


def test_nobody_saw_the_side_of_one_who_appears_or_is_lost_inside() -> None:
    run = run_of()
    run.walk([(0.5, 0.5), (0.5, 0.5)])
    run.picture(ended=[1])
    passages = [event["properties"] for event in run.of("personZoneEnterExitEvent")]
    assert [(each["status"], each["side"]) for each in passages] == [("Enter", ""), ("Exit", "")]
    assert run.of("personZoneDwellTimeEvent")[0]["properties"]["dwellFrames"] == 2
    assert run.counts_inside == [0, 1, 0]


@pytest.mark.parametrize(
    ("sends", "types"),
    [
        (["count"], {"personCountEvent"}),
        (["zonecrossing"], {"personZoneEnterExitEvent"}),
        (["zonedwelltime"], {"personZoneDwellTimeEvent"}),
        ([], set()),
    ],
)
def test_a_zone_sends_only_the_events_that_it_is_to_send(sends: list[str], types: set[str]) -> None:
    run = InsightsRun(camera_config(zones={"queue": {**ZONE, "spatialAnalysis": sends}}))
    run.walk([(0.2, 0.5), (0.4, 0.5), (0.2, 0.5)])
    assert {event["type"] for document in run.documents for event in document["events"]} == types


def test_what_spatial_analysis_does_not_know_is_not_sent() -> None:
    zone = {**ZONE, "dwellSeconds": 0.1, "occupancy": {"atLeast": 1}, "empty": {}}
    run = InsightsRun(camera_config(zones={"queue": zone}))
    run.walk([(0.2, 0.5), (0.4, 0.5), (0.4, 0.5), (0.2, 0.5)])
    assert {*run.refused} == {"zone-dwell", "zone-occupied", "zone-vacated", "zone-empty", "zone-filled"}


def test_only_people_are_sent_and_counted() -> None:
    run = run_of()
    run.picture([track_at(1, (0.4, 0.5), "car"), track_at(2, (0.5, 0.5))])
    run.picture([track_at(1, (0.1, 0.5), "car"), track_at(2, (0.5, 0.5))])
    assert run.counts_inside == [0, 1]
    assert run.refused == ["zone-entered", "zone-left"]
    cars = InsightsRun(camera_config(zones={"queue": {**ZONE, "classes": ["car"]}}))
    cars.walk([(0.4, 0.5)])
    assert cars.documents == []


# --- changes and restarts -----------------------------------------------------------------------------------


def test_a_zone_that_begins_anew_sends_its_count_and_another_one_does_not() -> None:
    run = run_of()
    run.walk([(0.5, 0.5)])
    run.configure(camera_config(zones={"queue": {**ZONE, "dwellSeconds": 5}, "new": ZONE}))
    run.walk([(0.5, 0.5)])
    assert [event["zone"] for event in run.of("personCountEvent")] == ["queue", "queue", "new", "new"]
    assert run.counts_inside == [0, 1, 0, 1]


def test_after_a_restart_everybody_has_left_and_the_count_begins_at_0() -> None:
    run = run_of()
    run.picture([track_at(number, (0.3 + number / 10, 0.5)) for number in (1, 2, 3)])
    run.picture([track_at(number, (0.3 + number / 10, 0.5)) for number in (1, 2, 3)])
    stored = [json.loads(json.dumps(each.stored_document())) for each in run.scene.open_visits().visits]
    kept = KeptRule("zone", "", run.now, visits=tuple(map(parse_event, stored)))
    before = len(run.documents)
    run.restart({"queue": kept}, camera_config(zones={"queue": ZONE}))
    run.picture()
    exits = [event for document in run.documents[before:] for event in document["events"]]
    assert Counter(event["type"] for event in exits) == {
        "personZoneEnterExitEvent": 3,
        "personZoneDwellTimeEvent": 3,
        "personCountEvent": 4,
    }
    assert run.counts_inside == [0, 1, 2, 3, 2, 1, 0, 0]
    assert run.documents[before]["sourceInfo"]["width"] == 640
    assert exits[1]["properties"]["dwellFrames"] == 2


def test_ids_are_the_same_at_every_try_and_differ_between_events_and_cameras() -> None:
    first, second = run_of(), run_of()
    for run in (first, second):
        run.walk([(0.2, 0.5), (0.4, 0.5), (0.2, 0.5)])
    assert first.documents == second.documents
    ids = [event["id"] for document in first.documents for event in document["events"]]
    assert len(set(ids)) == len(ids)
    stored = first.events[0].stored_document()
    here, there = (build_insights({**stored, "camera": name}) for name in ("dock", "yard"))
    assert here is not None
    assert there is not None
    tracks = {doc["events"][0]["properties"]["trackingId"] for doc in (here, there)}
    assert len(tracks) == 2


def test_an_event_from_before_the_format_was_set_is_not_sent() -> None:
    """Nor is the exit of one who was inside when the module stopped before."""
    run = run_of()
    run.scene.keeps_context = False
    run.walk([(0.2, 0.5), (0.4, 0.5)])
    kept = KeptRule("zone", "", run.now, visits=run.scene.open_visits().visits)
    run.restart({"queue": kept}, camera_config(zones={"queue": ZONE}))
    assert run.refused == ["zone-entered", "zone-lost"]
    assert run.documents == []


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_passages_agree_over_random_walks(seed: int) -> None:
    """At every moment the count is the number of entries less the exits."""
    chance = random.Random(seed)  # noqa: S311 - a reproducible walk
    run = InsightsRun(camera_config(zones={"queue": {**ZONE, "minSeconds": 0.2}}, lines={"door": LINE}))
    places = {number: (chance.random(), chance.random()) for number in range(5)}
    next_id = 5
    for _ in range(300):
        ended = [number for number in places if chance.random() < 0.01]
        for number in ended:
            del places[number]
            places[next_id] = (chance.random(), chance.random())
            next_id += 1
        for number, place in places.items():
            x, y = (min(1.0, max(0.0, value + chance.gauss(0, 0.05))) for value in place)
            places[number] = (x, y)
        run.picture([track_at(number, place) for number, place in places.items()], ended)
    inside = 0
    for document in run.documents:
        for event in document["events"]:
            if event["type"] == "personZoneEnterExitEvent":
                inside += 1 if event["properties"]["status"] == "Enter" else -1
            elif event["type"] == "personCountEvent":
                assert event["properties"]["personCount"] == inside
    assert len(run.of("personLineEvent")) > 20
    assert len(run.of("personZoneDwellTimeEvent")) > 10


# --- sides --------------------------------------------------------------------------------------------------

_NOTCH = [(0.0, 0.0), (0.3, 0.0), (0.3, 0.6), (0.6, 0.6), (0.6, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("outside", "inside", "side"),
    [
        ((0.2, 0.5), (0.4, 0.5), 1),
        ((0.5, 0.8), (0.5, 0.6), 2),
        ((0.8, 0.5), (0.6, 0.5), 3),
        ((0.5, 0.2), (0.5, 0.4), 4),
        ((0.2, 0.5), (0.3, 0.5), 1),  # on the border is inside
        ((0.2, 0.2), (0.5, 0.5), 1),  # through a corner
        ((0.2, 0.3), (0.3, 0.3), 1),  # along a side, to its end
    ],
)
def test_sides_are_numbered_from_the_first_two_points(
    outside: tuple[float, float], inside: tuple[float, float], side: int
) -> None:
    polygon = [(x, y) for x, y in SQUARE]
    assert find_crossed_side(polygon, inside, outside) == side


def test_of_several_sides_the_last_one_before_the_inside_counts() -> None:
    """A path between two far pictures goes through a part of the zone, and comes in for good afterwards."""
    assert find_crossed_side(_NOTCH, (0.8, 0.3), (0.45, 0.3)) == 4
    assert find_crossed_side(_NOTCH, (0.1, 0.3), (0.45, 0.3)) == 2


def test_a_point_on_a_slanted_border_is_on_that_side_in_spite_of_rounding() -> None:
    """Coordinates have six decimals, so it may be outside by less than that."""
    triangle = [(0.1, 0.1), (0.7, 0.3), (0.2, 0.9)]
    assert not PolygonArea(triangle).contains(0.4, 0.199999)
    assert find_crossed_side(triangle, (0.4, 0.199999), (0.4, 0.1)) == 1


_VALUE = st.integers(0, 20).map(lambda number: number / 20)


@given(st.tuples(_VALUE, _VALUE), st.tuples(_VALUE, _VALUE))
def test_a_path_over_the_border_always_has_a_side(
    first: tuple[float, float], second: tuple[float, float]
) -> None:
    polygon = [*_NOTCH[:3], (0.6, 0.6), (0.5, 0.1), (0.9, 0.2), (0.8, 0.95), (0.05, 0.9)]
    area = PolygonArea(polygon)
    if area.contains(*first) and not area.contains(*second):
        assert find_crossed_side(polygon, first, second) in range(1, 9)


# --- the schema ---------------------------------------------------------------------------------------------


def make_valid() -> dict[str, Any]:
    """A message with all four kinds of events, put together of two."""
    run = InsightsRun(camera_config(zones={"queue": ZONE}, lines={"door": LINE}))
    run.walk([(0.2, 0.5), (0.45, 0.5), (0.8, 0.5)])
    document = copy.deepcopy(run.documents[-2])
    for each in run.documents[-1:]:
        document["events"] += each["events"]
        document["detections"] += each["detections"]
    assert find_problems(document) == []
    assert len({event["type"] for event in document["events"]}) == 4
    return document


WRONG: list[tuple[str, Any]] = [
    ("schemaVersion", "2.1"),
    ("schemaVersion", 2.0),
    ("events", []),
    ("detections", {}),
    ("sourceInfo.id", ""),
    ("sourceInfo.timestamp", "2026-11-30T10:00:00Z"),
    ("sourceInfo.timestamp", "2026-11-30T10:00:00.000+00:00"),
    ("sourceInfo.timestamp", "2026-13-30T10:00:00.000Z"),
    ("sourceInfo.width", 0),
    ("sourceInfo.width", 640.5),
    ("sourceInfo.frameId", 7),
    ("sourceInfo.imagePath", None),
    ("sourceInfo.more", 1),
    ("more", 1),
    ("events.0.id", "F" * 32),
    ("events.0.id", "f" * 31),
    ("events.0.type", "personDistanceEvent"),
    ("events.0.more", 1),
    ("events.0.trigger", "event"),
    ("events.0.zone", None),
    ("events.0.detectionIds", []),
    ("events.0.detectionIds.0", "0" * 32),
    ("events.0.properties.status", "Left"),
    ("events.0.properties.side", 1),
    ("events.0.properties.side", "0"),
    ("events.0.properties.more", 1),
    ("events.0.properties.trackingId", 12),
    ("events.1.properties.status", "Enter"),
    ("events.1.properties.dwellTime", "300"),
    ("events.1.properties.dwellFrames", 0),
    ("events.2.properties.personCount", 1),
    ("events.2.properties.personCount", -1),
    ("events.2.trigger", "always"),
    ("events.3.properties.status", "Exit"),
    ("detections.0.type", "car"),
    ("detections.0.id", "x"),
    ("detections.0.confidence", 1.01),
    ("detections.0.region.type", "POLYGON"),
    ("detections.0.region.points", [{"x": 0, "y": 0}]),
    ("detections.0.region.points.0.x", -0.1),
    ("detections.0.region.points.0", [0, 0]),
    ("detections.0.metadata.footprintX", 0.4),
    ("detections.0.metadata.footprintX", "1.2"),
    ("detections.0.metadata.speed", "1"),
    ("detections.0.more", 1),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={value!r}" for path, value in WRONG])
def test_the_schema_refuses_a_wrong_value(path: str, value: object) -> None:
    document = make_valid()
    *steps, last = path.split(".")
    place: Any = document
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    assert find_problems(document)


def test_the_schema_refuses_a_document_without_any_of_its_keys() -> None:
    def check(place: Any, whole: Any) -> int:
        if isinstance(place, list):
            return sum(check(each, whole) for each in place)
        found = 0
        for key in [*place] if isinstance(place, dict) else []:
            value = place.pop(key)
            assert find_problems(whole), key
            place[key] = value
            found += 1 + check(value, whole)
        return found

    document = make_valid()
    assert check(document, document) > 60
