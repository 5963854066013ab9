"""Checks of received messages against their documented schemas, key by key."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from edge_runtime.broker import ReceivedMessage

FRAME_KEYS = {
    "schema",
    "camera",
    "sequence",
    "epoch",
    "capturedAt",
    "width",
    "height",
    "model",
    "device",
    "timing",
    "detections",
}
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def check_messages(messages: Iterable[ReceivedMessage]) -> None:
    """Check each message, then all together: numbers without gaps, `sequence` strictly rising per camera.

    Messages with the same id count once.
    """
    once = {message.message_id: message for message in messages}
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    sequences: defaultdict[str, list[int]] = defaultdict(list)
    for message in once.values():
        document = check_message(message)
        numbers[message.output].append(document["messageSequence"])
        for frame in document.get("frames", []):
            sequences[frame["camera"]].append(frame["sequence"])
    for output, seen in numbers.items():
        assert seen == list(range(seen[0], seen[0] + len(seen))), f"{output}: {seen}"
    for camera, rising in sequences.items():
        assert all(a < b for a, b in pairwise(rising)), f"{camera}: {rising}"


def check_message(message: ReceivedMessage) -> Mapping[str, Any]:
    """Check envelope, body, properties and size of a message; returns its document."""
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.qos == 1
    assert message.message_id
    own = sum(len(name) + len(value) for name, value in message.properties.items())
    assert len(message.body) + own <= 200_000
    assert all(value.isascii() for value in message.properties.values())
    document: dict[str, Any] = message.json()
    assert message.properties["schema"] == document["schema"]
    if message.output == "detections":
        _check_batch(document, message.properties)
    elif message.output == "scene":
        _check_scene(document, message.properties)
    else:
        assert message.output == "events"
        _check_event(document)
    return document


def _check_batch(document: Mapping[str, Any], properties: Mapping[str, str]) -> None:
    assert document.keys() == {"schema", "device", "module", "messageSequence", "frames"}
    assert document["schema"] == "visionedge/batch/1"
    assert document["frames"]
    found = []
    for frame in document["frames"]:
        _check_frame(frame)
        found += frame["detections"]
    assert properties.keys() == {"schema", "cameras", "maxConfidence", "labels"}
    assert properties["cameras"] == ",".join(sorted({frame["camera"] for frame in document["frames"]}))
    assert float(properties["maxConfidence"]) == max((row["confidence"] for row in found), default=0)
    assert properties["labels"] == ",".join(sorted({row["label"] for row in found}))


def _check_frame(frame: Mapping[str, Any]) -> None:
    is_tracked = frame["schema"] == "visionedge/frame/2"
    assert is_tracked or frame["schema"] == "visionedge/frame/1"
    assert frame.keys() == (FRAME_KEYS | {"precision"} if is_tracked else FRAME_KEYS)
    assert _MOMENT.fullmatch(frame["capturedAt"])
    assert frame["timing"].keys() == {"waitMs", "inferMs", "totalMs", "batchSize"}
    scores = [row["confidence"] for row in frame["detections"]]
    assert scores == sorted(scores, reverse=True)
    for row in frame["detections"]:
        tracking = {"trackId", "attributes"} if is_tracked else set()
        assert row.keys() == {"label", "classId", "confidence", "box"} | tracking
        box = row["box"]
        assert box.keys() == {"left", "top", "width", "height"}
        assert all(0 <= value <= 1 for value in box.values())


def _check_scene(document: Mapping[str, Any], properties: Mapping[str, str]) -> None:
    assert document.keys() == {"schema", "device", "module", "messageSequence", "events"}
    assert document["schema"] == "visionedge/scene/1"
    events = document["events"]
    assert events
    assert properties.keys() == {"schema", "cameras", "types", "rules", "labels"}
    assert properties["cameras"] == ",".join(sorted({event["camera"] for event in events}))
    assert properties["types"] == ",".join(sorted({event["type"] for event in events}))
    rules = {event.get("zone") or event["line"] for event in events}
    assert properties["rules"] == ",".join(sorted(rules))
    labels = {event["label"] for event in events if "label" in event}
    assert properties["labels"] == ",".join(sorted(labels))
    for event in events:
        assert event.keys() >= {"id", "camera", "type", "at", "sequence", "epoch", "evidence"}
        assert _MOMENT.fullmatch(event["at"])


def _check_event(document: Mapping[str, Any]) -> None:
    assert document.keys() == {
        "schema",
        "device",
        "module",
        "messageSequence",
        "at",
        "kind",
        "code",
        "message",
        "details",
    }
    assert document["schema"] == "visionedge/event/1"
    assert document["kind"] in {"engine", "camera", "model", "storage", "module"}
    assert _MOMENT.fullmatch(document["at"])
