"""`telemetry.format: spatial-analysis`: each document is a message of its own on output `scene`."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from scene_paths import DOOR, SQUARE, SceneRun, camera_config
from spatial_analysis_schema import find_problems
from telemetry_harness import TelemetryHarness, documents, scene_event
from visionedge.config.schema import TelemetryConfig
from visionedge.outbound.messages import Message, parse_message
from visionedge.outbound.metering import count_blocks

CAMERA = camera_config(
    zones={"queue": {"polygon": SQUARE, "minSeconds": 0}},
    lines={"door": {**DOOR, "minSeconds": 0}},
)


def make_events() -> list[dict[str, Any]]:
    """What the thread `scene` delivers of one who walks through a zone and over its line."""
    run = SceneRun(CAMERA)
    run.scene.keeps_context = True
    run.walk([(0.2, 0.5), (0.45, 0.5), (0.6, 0.5), (0.8, 0.5)])
    events = [event.stored_document() for event in run.events]
    return [json.loads(json.dumps(each)) for each in (*run.scene.take_first_counts(), *events)]


def types_of(messages: Sequence[Message]) -> list[list[str]]:
    return [[event["type"] for event in document["events"]] for document in documents(messages)]


def test_each_document_is_one_message_with_properties_for_routes() -> None:
    clock, events = TelemetryHarness(), make_events()
    telemetry = clock.telemetry(mode="none", format="spatial-analysis")
    telemetry.offer_scene(events)
    sent = telemetry.due(clock.advance_s(1))
    assert [find_problems(document) for document in documents(sent)] == [[]] * 4
    assert types_of(sent) == [
        ["personCountEvent"],
        ["personZoneEnterExitEvent", "personCountEvent"],
        ["personLineEvent"],
        ["personZoneEnterExitEvent", "personZoneDwellTimeEvent", "personCountEvent"],
    ]
    assert [message.output for message in sent] == ["scene"] * 4
    assert [message.message_id for message in sent] == [f"run-scene-{number}" for number in (1, 2, 3, 4)]
    assert [message.event_ids for message in sent] == [(event["id"],) for event in events]
    assert sent[1].properties == {
        "schema": "spatial-analysis/2.0",
        "cameras": "dock",
        "types": "personCountEvent,personZoneEnterExitEvent",
        "rules": "queue",
        "labels": "person",
    }


def test_an_event_without_counterpart_is_acknowledged_and_not_sent() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(format="spatial-analysis")
    unknown = [scene_event(1, type="zone-dwell"), scene_event(2, label="car")]
    telemetry.offer_scene([*unknown, *make_events()])
    assert len(telemetry.due(clock.advance_s(1))) == 4
    assert telemetry.take_refused() == [event["id"] for event in unknown]


def test_the_other_format_sends_the_events_alone() -> None:
    """Neither their context nor the first counts."""
    clock, events = TelemetryHarness(), make_events()
    telemetry = clock.telemetry()
    telemetry.offer_scene(events)
    [sent] = documents(telemetry.due(clock.advance_s(1)))
    assert sent["schema"] == "visionedge/scene/1"
    assert [event["id"] for event in sent["events"]] == [event["id"] for event in events[1:]]
    assert not any("context" in event for event in sent["events"])
    assert telemetry.take_refused() == [events[0]["id"]]


def test_events_keep_the_format_in_which_they_were_taken_when_it_changes() -> None:
    clock, (_, *events) = TelemetryHarness(), make_events()
    telemetry = clock.telemetry()
    telemetry.offer_scene(events[:2])
    telemetry.apply(TelemetryConfig.model_validate({"format": "spatial-analysis"}))
    telemetry.offer_scene(events[2:])
    telemetry.apply(TelemetryConfig())
    telemetry.offer_scene(events[:1])
    sent = telemetry.due(clock.advance_s(1))
    assert [message.properties["schema"] for message in sent] == [
        "visionedge/scene/1",
        "spatial-analysis/2.0",
        "visionedge/scene/1",
    ]
    assert [len(message.event_ids) for message in sent] == [2, 1, 1]


def test_without_a_budget_documents_wait_for_the_next_day_in_their_order() -> None:
    """Each of them is a block that IoT Hub bills."""
    clock, events = TelemetryHarness(), make_events()
    telemetry = clock.telemetry(mode="none", maxPerDay=3, format="spatial-analysis")
    telemetry.offer_scene(events)
    sent = [each for each in telemetry.due(clock.advance_s(1)) if each.output == "scene"]
    assert [each.event_ids[0] for each in sent] == [event["id"] for event in events[:3]]
    assert sum(count_blocks(each.size_bytes) for each in sent) == 3
    sent += telemetry.due(clock.advance_s(86_400))
    assert [each.event_ids[0] for each in sent] == [event["id"] for event in events]


def test_the_size_of_a_message_is_known_from_its_line_in_a_file() -> None:
    """For `manifest estimate`."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(format="spatial-analysis")
    telemetry.offer_scene(make_events())
    for message in telemetry.due(clock.advance_s(1)):
        again = parse_message(message.body)
        assert (again.output, again.properties) == ("scene", message.properties)
        assert abs(again.size_bytes - message.size_bytes) < 16


@pytest.mark.parametrize("cut", ['"events":', '"detections":', '"id":"dock"'])
def test_a_line_that_lacks_a_key_is_no_message(cut: str) -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(format="spatial-analysis")
    telemetry.offer_scene(make_events())
    body = telemetry.due(clock.advance_s(1))[0].body
    assert cut.encode() in body
    with pytest.raises(ValueError, match="is missing"):
        parse_message(body.replace(cut.encode(), cut.replace('"', '"x', 1).encode()))
