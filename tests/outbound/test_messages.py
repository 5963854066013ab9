"""Messages: the contract's documents, their properties, and how frames are split."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fake_backend import result
from telemetry_harness import scene_event
from visionedge.app.status import shorten
from visionedge.frames.types import build_frame_document
from visionedge.outbound.messages import (
    MAX_BYTES,
    MAX_CAMERAS_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_LABELS_BYTES,
    MAX_RULES_BYTES,
    DocumentTooLargeError,
    EncodedDocument,
    Event,
    Message,
    Sender,
    build_batch_messages,
    build_event_message,
    build_scene_messages,
    encode_frame,
    encode_json,
    encode_scene_event,
    escape_property_value,
)
from visionedge.web.documents import BatchDocument, EventDocument

SENDER = Sender("press-7", "vision", "a1b2c3")
NOON = datetime(2026, 11, 22, 12, 0, 0, 123_456, tzinfo=UTC)


def frame(camera: str = "dock", *, labels: tuple[str, ...] = (), confidence: float = 0.87) -> dict[str, Any]:
    """A frame object with one detection per label, with the keys that messages use."""
    rows = [{"label": label, "confidence": confidence} for label in labels]
    return {"camera": camera, "detections": rows}


def encoded(size: int, camera: str = "dock", labels: frozenset[str] = frozenset()) -> EncodedDocument:
    """A frame of so many bytes."""
    values = {"cameras": frozenset((camera,)), "labels": labels}
    return EncodedDocument(b'"' + b"x" * (size - 2) + b'"', values, 0.5)


def described_keys(model: type[BaseModel]) -> set[str]:
    """The keys that /openapi.json describes."""
    return {field.alias or name for name, field in model.model_fields.items()}


def test_a_batch_of_whole_frames_has_the_described_shape() -> None:
    """Batches are built without their schema model for speed, so this test compares the two."""
    [message] = build_batch_messages(SENDER, 41, [encode_frame(build_frame_document(result()))])
    document = json.loads(message.body)
    assert BatchDocument.model_validate(document, strict=True).dump() == document


def test_a_batch_has_the_documents_keys_and_the_properties_to_filter_by() -> None:
    """The body is the contract's document; the properties name cameras, labels and the best score."""
    frames = [
        encode_frame(frame("gate", labels=("person", "car"), confidence=0.5)),
        encode_frame(frame("dock", labels=("person",), confidence=0.87)),
    ]

    [message] = build_batch_messages(SENDER, 41, frames)

    assert json.loads(message.body) == {
        "schema": "visionedge/batch/1",
        "device": "press-7",
        "module": "vision",
        "messageSequence": 41,
        "frames": [json.loads(f.body) for f in frames],
    }
    assert message.output == "detections"
    assert message.frames == 2
    assert set(json.loads(message.body)) == described_keys(BatchDocument)
    assert message.properties == {
        "schema": "visionedge/batch/1",
        "cameras": "dock,gate",
        "maxConfidence": "0.87",
        "labels": "car,person",
    }


@pytest.mark.parametrize(("score", "text"), [(0.0, "0"), (1.0, "1"), (0.5, "0.5"), (0.00001, "0.00001")])
def test_the_best_score_is_a_plain_number(score: float, text: str) -> None:
    """Routes cast it to a number: never an exponent."""
    [message] = build_batch_messages(SENDER, 1, [encode_frame(frame(labels=("person",), confidence=score))])
    assert message.properties["maxConfidence"] == text


def test_a_batch_without_detections_has_confidence_zero() -> None:
    """No detection: best score 0, no labels."""
    [message] = build_batch_messages(SENDER, 1, [encode_frame(frame())])
    assert message.properties["maxConfidence"] == "0"
    assert message.properties["labels"] == ""


def test_message_ids_are_stable_unique_and_plain() -> None:
    """Made again, a message has its id again; another number gives another one."""
    frames = [encoded(150_000), encoded(150_000)]
    first, second = build_batch_messages(SENDER, 7, frames)
    again, _ = build_batch_messages(SENDER, 7, frames)

    assert first.message_id == again.message_id == "a1b2c3-detections-7"
    assert second.message_id == "a1b2c3-detections-8"


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("traffic light", "traffic light"),
        ("Türe", "T%C3%BCre"),
        ("a,b", "a%2Cb"),
        ("50%", "50%25"),
        ("*", "%2A"),
        ("tab\t", "tab%09"),
    ],
)
def test_labels_in_properties_are_plain_ascii(label: str, text: str) -> None:
    """Property values are ASCII only, and a comma inside a label must not look like two labels."""
    assert escape_property_value(label) == text


@given(
    st.lists(
        st.tuples(
            st.integers(2, MAX_DOCUMENT_BYTES), st.text("abc", min_size=1, max_size=64), st.integers(0, 60)
        ),
        max_size=40,
    )
)
@settings(max_examples=60, deadline=None)
def test_messages_stay_within_the_size_limit_and_no_frame_is_lost(parts: list[tuple[int, str, int]]) -> None:
    """For any sizes, cameras and labels: within limits, frames whole and in order, numbers rising."""
    frames = [
        encoded(size, camera, frozenset(f"{camera[:40]}-{i}" for i in range(labels)))
        for size, camera, labels in parts
    ]

    messages = build_batch_messages(SENDER, 5, frames)

    assert [m.sequence_number for m in messages] == list(range(5, 5 + len(messages)))
    assert all(m.size_bytes <= MAX_BYTES for m in messages)
    assert all(len(m.properties["cameras"]) <= MAX_CAMERAS_BYTES for m in messages)
    assert all(len(m.properties["labels"]) <= MAX_LABELS_BYTES for m in messages)
    bodies = [encode_json(f) for m in messages for f in json.loads(m.body)["frames"]]
    assert bodies == [f.body for f in frames]


def test_frames_share_a_message_as_long_as_they_fit() -> None:
    """Splitting is not wasteful: two neighbours never fit into one message together."""
    messages = build_batch_messages(SENDER, 1, [encoded(30_000) for _ in range(20)])
    assert [m.frames for m in messages] == [6, 6, 6, 2]


def test_labels_are_cut_only_within_a_single_frame_and_visibly() -> None:
    """The list of a frame with more labels than a property can hold ends with an asterisk."""
    labels = tuple(f"label-number-{i:04}" for i in range(200))

    [message] = build_batch_messages(SENDER, 1, [encode_frame(frame(labels=labels))])

    text = message.properties["labels"]
    assert len(text) <= MAX_LABELS_BYTES
    assert text.endswith(",*")
    assert set(text.split(",")[:-1]) < set(labels)


def test_a_frame_too_large_for_a_message_is_refused() -> None:
    """The error names the size; nothing is cut silently."""
    with pytest.raises(DocumentTooLargeError, match=str(MAX_DOCUMENT_BYTES)):
        encode_frame(frame(labels=("x" * MAX_DOCUMENT_BYTES,)))


def test_values_that_json_cannot_represent_are_refused() -> None:
    """NaN is not JSON, although Python writes it."""
    with pytest.raises(ValueError, match="JSON"):
        encode_frame(frame(labels=("person",), confidence=math.nan))


def test_a_text_that_is_not_utf8_does_not_break_a_message() -> None:
    """A file name with a stray byte reaches us as a lone surrogate."""
    assert encode_json({"model": "caf\udce9", "label": "Türe"}) == '{"model":"caf?","label":"Türe"}'.encode()


def scene_messages(*events: dict[str, Any]) -> list[Message]:
    return build_scene_messages(SENDER, 7, [encode_scene_event(event) for event in events])


def test_scene_events_have_an_envelope_and_the_properties_to_filter_by() -> None:
    """The events are those of HTTP, whole and in their order; the message names their ids."""
    events = [
        scene_event(1),
        scene_event(2, camera="gate", type="line-crossed", zone=None, line="Door 2", label="Türe, 50 %"),
        scene_event(3, type="zone-empty", label=None, trackId=None),
    ]
    events = [{key: value for key, value in event.items() if value is not None} for event in events]

    [message] = scene_messages(*events)

    assert json.loads(message.body) == {
        "schema": "visionedge/scene/1",
        "device": "press-7",
        "module": "vision",
        "messageSequence": 7,
        "events": events,
    }
    assert (message.output, message.message_id, message.frames) == ("scene", "a1b2c3-scene-7", 0)
    assert message.event_ids == tuple(event["id"] for event in events)
    assert message.properties == {
        "schema": "visionedge/scene/1",
        "cameras": "dock,gate",
        "types": "line-crossed,zone-empty,zone-entered",
        "rules": "Door 2,queue",
        "labels": "T%C3%BCre%2C 50 %25,person",
    }


def test_ten_thousand_scene_events_are_packed_within_the_size_limit() -> None:
    """Whole, in order and once; two neighbours never fit into one message together."""
    path = [[number, 0.123456, 0.654321] for number in range(16)]
    events = [scene_event(number, evidence={"path": path}) for number in range(10_000)]
    messages = scene_messages(*events)
    assert [m.sequence_number for m in messages] == list(range(7, 7 + len(messages)))
    assert all(m.size_bytes <= MAX_BYTES for m in messages)
    assert all(m.size_bytes > 0.9 * MAX_BYTES for m in messages[:-1])
    assert [event for m in messages for event in json.loads(m.body)["events"]] == events
    assert [name for m in messages for name in m.event_ids] == [event["id"] for event in events]


def test_the_rules_and_labels_of_a_scene_message_stay_within_their_limits() -> None:
    """Another message begins; only the list of a single event is cut, visibly."""
    messages = scene_messages(*(scene_event(n, zone=f"zone-{n:03}-{'x' * 50}") for n in range(100)))
    assert len(messages) > 1
    assert all(len(m.properties["rules"]) <= MAX_RULES_BYTES for m in messages)
    assert all("*" not in m.properties["rules"] for m in messages)
    [message] = scene_messages(scene_event(label="ü" * 1_000))
    assert message.properties["labels"] == "*"


def test_a_scene_event_too_large_for_a_message_is_refused() -> None:
    """The error names the size."""
    with pytest.raises(DocumentTooLargeError, match=f"scene event .* {MAX_DOCUMENT_BYTES} fit"):
        encode_scene_event(scene_event(size=MAX_DOCUMENT_BYTES))


def test_an_event_has_the_documented_keys() -> None:
    """Exactly these keys, time in UTC with milliseconds, and kind and code as properties."""
    event = Event("camera", "camera-lost", "camera dock: no picture", NOON, {"camera": "dock"})

    message = build_event_message(SENDER, 3, event)

    assert json.loads(message.body) == {
        "schema": "visionedge/event/1",
        "device": "press-7",
        "module": "vision",
        "messageSequence": 3,
        "at": "2026-11-22T12:00:00.123Z",
        "kind": "camera",
        "code": "camera-lost",
        "message": "camera dock: no picture",
        "details": {"camera": "dock"},
    }
    assert EventDocument.model_validate_json(message.body, strict=True).dump() == json.loads(message.body)
    assert (message.output, message.message_id) == ("events", "a1b2c3-events-3")
    assert message.properties == {"schema": "visionedge/event/1", "kind": "camera", "code": "camera-lost"}


def test_details_that_do_not_fit_are_omitted_with_a_note() -> None:
    """An event is always sent."""
    message = build_event_message(SENDER, 1, Event("module", "big", "text", NOON, {"x": "y" * MAX_BYTES}))

    assert message.size_bytes <= MAX_BYTES
    assert list(json.loads(message.body)["details"]) == ["omitted"]


def test_the_size_counts_body_and_properties() -> None:
    """As IoT Hub counts: system property values, and names and values of the others."""
    message = Message("o", b"12345", "id", {"name": "value"}, 1)
    assert message.size_bytes == 5 + len("application/json") + len("utf-8") + 1 + 2 + 4 + 5


def test_library_messages_are_truncated_to_the_length_of_an_event() -> None:
    """onnxruntime's errors can be pages; the whole text is in the log and in status."""
    assert shorten("short") == "short"
    assert len(shorten("x" * 9000)) == 500
    assert shorten("x" * 9000).endswith("…")
