"""Zones, lines, masks and schedules in the configuration: a problem is one line with the path of its key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine
from visionedge.config.documents import read_document
from visionedge.config.load import parse_config, redact_config
from visionedge.config.schema import CameraConfig
from visionedge.errors import ConfigError
from visionedge.iothub.desired_properties import (
    DesiredDocument,
    build_acknowledgement,
    group_problems_by_section,
)

TRIANGLE = [[0, 0], [1, 0], [1, 1]]


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process."""
    return CommandLine(capsys)


def camera(**keys: Any) -> CameraConfig:
    return parse_config({"cameras": {"dock": {"uri": "demo:", **keys}}}).cameras["dock"]


def problems(**keys: Any) -> list[str]:
    """The problems of a camera, without the path that they have in common."""
    with pytest.raises(ConfigError) as caught:
        camera(**keys)
    return [problem.removeprefix("cameras.dock.") for problem in caught.value.problems]


def zone_problems(**keys: Any) -> list[str]:
    found = problems(zones={"queue": {"polygon": TRIANGLE, **keys}})
    return [problem.removeprefix("zones.queue.") for problem in found]


def from_yaml(folder: Path, text: str) -> CameraConfig:
    file = folder / "c.yaml"
    file.write_text(f"cameras:\n  dock:\n    uri: 'demo:'\n{text}")
    return parse_config(read_document(file)).cameras["dock"]


def test_the_example_of_the_documents_is_valid(tmp_path: Path) -> None:
    config = from_yaml(
        tmp_path,
        """
    classes: [person]
    tracking: auto
    masks: [[[0, 0], [0.3, 0], [0.3, 0.2]]]
    zones:
      queue:
        polygon: [[0.3, 0.3], [0.3, 0.9], [0.6, 0.9], [0.6, 0.3]]
        classes: [person]
        anchor: bottom-center
        minSeconds: 0.5
        dwellSeconds: 30
        occupancy: {atLeast: 5, forSeconds: 3}
        empty: {forSeconds: 10}
        schedule: {from: "08:00", to: "18:00", days: [mon, tue], timezone: Europe/Berlin}
    lines:
      door: {start: [0.5, 0.2], end: [0.5, 0.8], classes: [person], anchor: bottom-center, minSeconds: 0.3}
""",
    )
    queue = config.zones["queue"]
    assert queue.schedule is not None
    assert (queue.schedule.from_, queue.schedule.to) == ("08:00", "18:00")
    assert (queue.anchor, queue.min_seconds, config.lines["door"].min_seconds) == ("bottom-center", 0.5, 0.3)
    assert config.masks == (((0.0, 0.0), (0.3, 0.0), (0.3, 0.2)),)
    whole = parse_config(read_document(tmp_path / "c.yaml"))
    assert parse_config(redact_config(whole)).cameras["dock"] == config


@pytest.mark.parametrize(
    ("polygon", "problem"),
    [
        ([[0, 0], [1, 0]], "polygon: has 2 points; a polygon needs 3 to 64"),
        ([[n / 100, (n % 2) / 2] for n in range(65)], "polygon: has 65 points; a polygon needs 3 to 64"),
        (
            [[0, 0], [1, 1], [1, 0], [0, 1]],
            "polygon: crosses or touches itself: the edge from point 1 to point 2 and the edge from point 3"
            " to point 4",
        ),
        ([[0, 0], [0.5, 0.5], [1, 1]], "polygon: has an edge that runs back on the edge before it"),
        ([[0, 0], [1, 0], [1, 1], [0, 0]], "polygon: ends with its first point; leave the last one out"),
        ([[0, 0], [1.2, 0], [1, 1]], "polygon.1.0: must be less than or equal to 1"),
        ([[0, 0], [1, -0.1], [1, 1]], "polygon.1.1: must be greater than or equal to 0"),
        ([[0, 0], [1, float("nan")], [1, 1]], "polygon.1.1: must be a finite number"),
        ([[0, 0], [1, 0, 0], [1, 1]], "polygon.1: must be a point [x, y]"),
        ([[0, 0], 0.5, [1, 1]], "polygon.1: must be a point [x, y]"),
        ("0,0 1,1 0,1", "polygon: must be a list"),
    ],
)
def test_a_wrong_polygon_is_one_line_with_the_path_of_the_key(polygon: object, problem: str) -> None:
    assert zone_problems(polygon=polygon) == [problem]


def test_a_wrong_mask_is_named_by_its_number() -> None:
    assert problems(masks=[TRIANGLE, [[0, 0], [1, 1]]]) == ["masks.1: has 2 points; a polygon needs 3 to 64"]


def test_a_line_without_length_is_refused() -> None:
    assert problems(lines={"door": {"start": [0.5, 0.2], "end": [0.5, 0.2]}}) == [
        "lines.door.end: is equal to 'start', so the line has no length"
    ]


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (
            {"from": "08:00", "to": "8:00"},
            "to: is equal to 'from', so the zone never counts; leave 'schedule' out to count always",
        ),
        (
            {"from": "08:00", "to": "18:00", "days": []},
            "days: is empty, so the zone never counts; leave 'days' out to count on all days",
        ),
        (
            {"from": "08:00", "to": "18:00", "timezone": "Europe/Berln"},
            "timezone: is no known time zone; did you mean 'Europe/Berlin'?",
        ),
        (
            {"from": "08:00", "to": "18:00", "timezone": "../../etc/passwd"},
            "timezone: is no known time zone; give a name such as Europe/Berlin",
        ),
        (
            {"from": "24:00", "to": "00:00"},
            'from: must be before "24:00"; the day ends there, so write "00:00" of the next day',
        ),
        (
            {"from": "08:00", "to": "18:00", "days": ["monday"]},
            "days.0: must be 'mon', 'tue', 'wed', 'thu', 'fri', 'sat' or 'sun'",
        ),
    ],
)
def test_a_schedule_that_never_opens_is_refused(schedule: dict[str, Any], problem: str) -> None:
    assert zone_problems(schedule=schedule) == [f"schedule.{problem}"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [("18:00", "18:00"), ("'18:00'", "18:00"), ("8:05", "08:05"), ("08:05", "08:05"), ("24:00", "24:00")],
)
def test_a_time_is_understood_with_quotes_and_without(tmp_path: Path, written: str, expected: str) -> None:
    """YAML reads 18:00 as the number 1080."""
    text = f"    zones: {{q: {{polygon: {TRIANGLE}, schedule: {{from: '00:00', to: {written}}}}}}}\n"
    schedule = from_yaml(tmp_path, text).zones["q"].schedule
    assert schedule is not None
    assert schedule.to == expected


@pytest.mark.parametrize("written", ["18", "18:00:00", "25:00", "24:01", "18.5", "6pm", "on", "12:60"])
def test_another_time_is_refused_with_the_advice_to_quote_it(tmp_path: Path, written: str) -> None:
    text = f"    zones: {{q: {{polygon: {TRIANGLE}, schedule: {{from: '00:00', to: {written}}}}}}}\n"
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, text)
    assert caught.value.problems == (
        'cameras.dock.zones.q.schedule.to: must be a time from "00:00" to "24:00"; quote it (YAML reads'
        " 18:00 as a number)",
    )


@pytest.mark.parametrize(
    ("written", "expected"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("yes", "on"), ("auto", "auto")]
)
def test_tracking_is_on_or_off_with_quotes_and_without(tmp_path: Path, written: str, expected: str) -> None:
    assert from_yaml(tmp_path, f"    tracking: {written}\n").tracking == expected


def test_a_class_that_yaml_reads_as_a_boolean_must_be_quoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classes.1: must be a text; quote it"):
        from_yaml(tmp_path, "    classes: [person, no]\n")


def test_zones_may_have_names_that_yaml_reads_as_booleans(tmp_path: Path) -> None:
    zones = from_yaml(
        tmp_path, f"    zones: {{on: {{polygon: {TRIANGLE}}}, no: {{polygon: {TRIANGLE}}}}}\n"
    ).zones
    assert list(zones) == ["on", "no"]


def test_an_unknown_key_of_a_zone_names_the_likely_one() -> None:
    assert zone_problems(dwelSeconds=3, occupancy={"atleast": 2}) == [
        "occupancy.atLeast: is missing",
        "occupancy.atleast: unknown key; did you mean 'atLeast'?",
        "dwelSeconds: unknown key; did you mean 'dwellSeconds'?",
    ]
    assert problems(lines={"door": {"start": [0, 0], "end": [1, 1], "dwellSeconds": 3}}) == [
        "lines.door.dwellSeconds: unknown key; did you mean 'minSeconds'?"
    ]


def test_a_zone_and_a_line_of_a_camera_have_different_names() -> None:
    line = {"start": [0, 0], "end": [1, 1]}
    assert problems(zones={"door": {"polygon": TRIANGLE}}, lines={"door": line}) == [
        "lines.door: a zone of this camera has this name, too"
    ]


def test_a_zone_can_count_only_what_its_camera_reports() -> None:
    zones = {"queue": {"polygon": TRIANGLE, "classes": ["person", "car"]}}
    assert problems(classes=["person"], zones=zones) == [
        "zones.queue.classes: 'car' is not among the 'classes' of the camera"
    ]
    assert camera(zones=zones).zones["queue"].classes == ("person", "car")
    dock: dict[str, Any] = {"uri": "demo:", "zones": zones}
    document = {"cameras": {"dock": dock}, "inference": {"classes": ["person"]}}
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert caught.value.problems == (
        "cameras.dock.zones.queue.classes: 'car' is not among 'inference.classes'",
    )
    dock["classes"] = ["car", "person"]
    parse_config(document)


@pytest.mark.parametrize("name", ["a,b", "", " a", "a ", "a/b", "é", "x" * 65, "a\nb"])
def test_a_name_that_would_break_lists_and_addresses_is_refused(name: str) -> None:
    (problem,) = problems(zones={name: {"polygon": TRIANGLE}})
    assert problem.endswith(
        ": a name must be 1 to 64 characters of A-Z, a-z, 0-9, '_', '-', '.' and blanks between them"
    )


def test_500_zones_of_one_camera_work() -> None:
    zones = {f"zone-{n}": {"polygon": TRIANGLE} for n in range(500)}
    assert len(camera(zones=zones).zones) == 500


def test_classes_confidence_and_tracking_have_defaults_for_all_cameras() -> None:
    config = parse_config(
        {
            "cameraDefaults": {"classes": ["person"], "confidence": 0.5, "tracking": "off"},
            "cameras": {"a": {"uri": "demo:"}, "b": {"uri": "demo:", "classes": ["car"]}},
        }
    )
    a, b = config.cameras["a"], config.cameras["b"]
    assert (a.classes, a.confidence, a.tracking) == (("person",), 0.5, "off")
    assert b.classes == ("car",)


def test_the_event_log_has_a_bound() -> None:
    assert parse_config({}).events.keep.megabytes == 64
    assert parse_config({"events": {"keep": {"days": 7}}}).events.keep.days == 7
    with pytest.raises(ConfigError, match=r"events.keep.days: must be greater than 0"):
        parse_config({"events": {"keep": {"days": 0}}})


WRONG = {
    "zones: {q: {polygon: [[0, 0], [1, 1]]}}": "zones.q.polygon: has 2 points; a polygon needs 3 to 64",
    "zones: {q: {polygon: [[0, 0], [1, 1], [1, 0], [0, 1]]}}": (
        "zones.q.polygon: crosses or touches itself: the edge from point 1 to point 2 and the edge from"
        " point 3 to point 4"
    ),
    "zones: {q: {polygon: [[0, 0], [1.5, 0], [1, 1]]}}": (
        "zones.q.polygon.1.0: must be less than or equal to 1"
    ),
    "zones: {q: {polygon: [[0, 0], [.nan, 0], [1, 1]]}}": "zones.q.polygon.1.0: must be a finite number",
    "lines: {d: {start: [0.5, 0.2], end: [0.5, 0.2]}}": (
        "lines.d.end: is equal to 'start', so the line has no length"
    ),
    f"zones: {{q: {{polygon: {TRIANGLE}, schedule: {{from: '08:00', to: '08:00'}}}}}}": (
        "zones.q.schedule.to: is equal to 'from', so the zone never counts; leave 'schedule' out to count"
        " always"
    ),
    f"zones: {{q: {{polygon: {TRIANGLE}, schedule: {{from: '08:00', to: '09:00', timezone: Mars}}}}}}": (
        "zones.q.schedule.timezone: is no known time zone; give a name such as Europe/Berlin"
    ),
    f"zones: {{q: {{polygon: {TRIANGLE}, classes: [persn]}}}}": (
        "zones.q.classes: yolox-nano-416 has no class 'persn'; did you mean 'person'?"
    ),
    "lines: {d: {start: [0, 0], end: [1, 1], classes: [lorry]}}": (
        "lines.d.classes: yolox-nano-416 has no class 'lorry'; it has person, bicycle, car, motorcycle,"
        " airplane, bus, train, truck and 72 more"
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_config_check_shows_a_problem_of_a_scene_in_one_line_with_its_path(
    visionedge: CommandLine, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "vision.yaml"
    path.write_text(f"cameras:\n  dock:\n    uri: 'demo:'\n    {text}\n")
    done = visionedge("config", "check", str(path))
    assert (done.code, done.out) == (2, "")
    assert done.err == f"visionedge: {path}:4: cameras.dock.{WRONG[text]}\n"


@pytest.mark.parametrize("text", [text for text in WRONG if "no class" not in WRONG[text]])
def test_the_twin_gets_a_problem_of_a_scene_with_its_path(text: str) -> None:
    """Unknown classes are found when the section is applied to the model in use."""
    keys = yaml.safe_load(f"{{{text}}}")
    desired = DesiredDocument(3, {"cameras": {"dock": {"uri": "demo:", **keys}}})
    with pytest.raises(ConfigError) as caught:
        parse_config(desired.document)
    problems = group_problems_by_section(desired, caught.value.problems)
    answer = build_acknowledgement(desired, problems, {})
    assert answer["cameras"]["status"] == "rejected"
    assert answer["cameras"]["reasons"] == [f"cameras.dock.{WRONG[text]}"]


def test_config_check_says_nothing_of_classes_where_the_model_is_elsewhere(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "vision.yaml"
    path.write_text("model: {path: elsewhere.onnx}\ncameras: {dock: {uri: 'demo:', classes: [lorry]}}\n")
    assert visionedge("config", "check", str(path)).code == 0
