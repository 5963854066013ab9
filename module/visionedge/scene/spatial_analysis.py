"""Scene events as messages of Azure AI Vision Spatial Analysis, schema version 2.0. Pure.

Their keys are those of Microsoft's documentation of 2024-01-19 (MicrosoftDocs/azure-docs,
spatial-analysis-operations.md). A message tells more than a scene event: the size of the picture, everybody
in the zone, the side that was crossed. `describe_…` collect it when an event happens, as its `context`;
`build_insights` makes the message of both, also after a restart.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from visionedge.frames.geometry import find_crossed_side
from visionedge.frames.types import format_utc
from visionedge.scene.events import Box, SceneEvent, ScenePicture, make_box_document, make_event_id
from visionedge.scene.rules import LEFT_TO_RIGHT, Decision, ZoneRule

SCHEMA_VERSION = "2.0"

_PERSON = "person"
_FIRST_COUNT = "first-count"
_VISITS = {"zone-entered": "Enter", "zone-left": "Exit", "zone-lost": "Exit"}

Document = dict[str, Any]


# --- the context of an event --------------------------------------------------------------------------------


def describe_picture(source_id: str, picture: ScenePicture) -> Document:
    """The context of every event: `source_id` is the camera's name in messages."""
    return {"source": source_id, "width": picture.width_px, "height": picture.height_px}


def describe_visit(zone: ZoneRule, decision: Decision) -> Document:
    """The context of an event of a track in a zone, beside that of the picture."""
    described: Document = {"sends": _list_sent(zone), "side": ""}
    last_inside = decision.passed[-1]
    if decision.type in ("zone-entered", "zone-left") and len(decision.passed) == 2:
        before, after = decision.passed
        inside, outside = (after, before) if decision.type == "zone-entered" else (before, after)
        last_inside = inside
        side = find_crossed_side(zone.config.polygon, (inside.x, inside.y), (outside.x, outside.y))
        described["side"] = str(side)
    if decision.since is not None:
        described["dwellFrames"] = last_inside.sequence - decision.since.sequence + 1
    return described


class DescribedTrack(Protocol):
    """A track, or the event of one, with its last box."""

    @property
    def track_id(self) -> int | None: ...
    @property
    def label(self) -> str | None: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def box(self) -> Box | None: ...


def describe_track(track: DescribedTrack) -> Document:
    """One of those who are inside a zone, for `inside` in the context of its events."""
    return {
        "trackId": track.track_id,
        "label": track.label,
        "confidence": round(track.confidence or 0.0, 5),
        "box": make_box_document(track.box or (0.0, 0.0, 0.0, 0.0)),
    }


def describe_loss(event: SceneEvent, others: Iterable[SceneEvent]) -> SceneEvent:
    """The loss of one who was inside when the module stopped; `others` are lost after it."""
    if event.context is None:
        return event
    return replace(event, context={**event.context, "inside": [describe_track(other) for other in others]})


def make_first_count(
    camera: str, zone: ZoneRule, picture: ScenePicture, context: Document, inside: list[Document]
) -> Document:
    """A document that says how many are inside a zone that begins to count; for `build_insights` only."""
    return {
        "id": make_event_id(camera, zone.name, _FIRST_COUNT, None, picture.sequence),
        "camera": camera,
        "type": _FIRST_COUNT,
        "zone": zone.name,
        "at": format_utc(picture.captured_at),
        "sequence": picture.sequence,
        "context": {**context, "sends": _list_sent(zone), "inside": inside},
    }


def _list_sent(zone: ZoneRule) -> list[str]:
    """The events that a zone sends: none if it counts no people."""
    is_for_people = zone.classes is None or _PERSON in zone.classes
    return list(zone.config.spatial_analysis) if is_for_people else []


def is_first_count(document: Mapping[str, Any]) -> bool:
    """Whether a document is from `make_first_count`, which no other format has."""
    return bool(document["type"] == _FIRST_COUNT)


# --- messages -----------------------------------------------------------------------------------------------


def build_insights(document: Mapping[str, Any]) -> Document | None:
    """The message of a scene event's document; None: the event has no counterpart, or is not sent.

    An event that happened before `telemetry.format` was set has no context and is not sent: a reader
    of these messages would get an exit without its entry.
    """
    context = document.get("context")
    if context is None or document.get("label", _PERSON) != _PERSON:
        return None
    events = _list_events(document, context)
    if not events:
        return None
    rows = {row["trackId"]: row for row in _list_people(context)}
    if "trackId" in document:
        rows = {document["trackId"]: document, **rows}
    detections = [_build_detection(document, row) for row in rows.values()]
    named = {detection_id for event in events for detection_id in event["detectionIds"]}
    return {
        "events": events,
        "sourceInfo": {
            "id": context["source"],
            "timestamp": document["at"],
            "width": context["width"],
            "height": context["height"],
            "frameId": str(document["sequence"]),
            "imagePath": "",
        },
        "detections": [detection for detection in detections if detection["id"] in named],
        "schemaVersion": SCHEMA_VERSION,
    }


def _list_events(document: Mapping[str, Any], context: Mapping[str, Any]) -> list[Document]:
    """What Spatial Analysis calls events: one scene event may be several of them."""
    if document["type"] == "line-crossed":
        crossed = "CrossRight" if document["direction"] == LEFT_TO_RIGHT else "CrossLeft"
        return [_build_track_event(document, "personLineEvent", {"status": crossed})]
    found, sends = [], context.get("sends", ())
    if (status := _VISITS.get(document["type"])) is not None:
        passage = {"status": status, "side": context["side"]}
        if "zonecrossing" in sends:
            found.append(_build_track_event(document, "personZoneEnterExitEvent", passage))
        if "zonedwelltime" in sends and status == "Exit":
            stay = {
                "dwellTime": round(document["dwellSeconds"] * 1000.0, 1),
                "dwellFrames": context["dwellFrames"],
            }
            found.append(_build_track_event(document, "personZoneDwellTimeEvent", passage | stay))
    if "count" in sends and "inside" in context:
        found.append(_build_count_event(document, _list_people(context)))
    return found


def _build_track_event(
    document: Mapping[str, Any], event_type: str, properties: Mapping[str, Any]
) -> Document:
    return {
        "id": _hash(document["id"], event_type),
        "type": event_type,
        "detectionIds": [_detection_id(document, document["trackId"])],
        "properties": {"trackingId": _tracking_id(document, document["trackId"]), **properties},
        "zone": document.get("zone", document.get("line")),
    }


def _build_count_event(document: Mapping[str, Any], people: Sequence[Mapping[str, Any]]) -> Document:
    return {
        "id": _hash(document["id"], "personCountEvent"),
        "type": "personCountEvent",
        "detectionIds": [_detection_id(document, row["trackId"]) for row in people],
        "properties": {"personCount": len(people)},
        "zone": document["zone"],
        "trigger": "event",
    }


def _list_people(context: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inside: Iterable[Mapping[str, Any]] = context.get("inside", ())
    return [row for row in inside if row["label"] == _PERSON]


def _build_detection(document: Mapping[str, Any], row: Mapping[str, Any]) -> Document:
    box = row["box"]
    right, bottom = (round(min(1.0, box[a] + box[b]), 6) for a, b in (("left", "width"), ("top", "height")))
    corners = [{"x": box["left"], "y": box["top"]}, {"x": right, "y": bottom}]
    return {
        "type": _PERSON,
        "id": _detection_id(document, row["trackId"]),
        "region": {"type": "RECTANGLE", "points": corners},
        "confidence": row["confidence"],
        "metadata": {
            "trackingId": _tracking_id(document, row["trackId"]),
            "footprintX": f"{(box['left'] + right) / 2:.6f}",
            "footprintY": f"{bottom:.6f}",
        },
    }


def _detection_id(document: Mapping[str, Any], track_id: int) -> str:
    return _hash(document["id"], "detection", track_id)


def _tracking_id(document: Mapping[str, Any], track_id: int) -> str:
    """The same in all messages of a track, and another one for each camera."""
    return _hash(document["camera"], "track", track_id)


def _hash(*parts: object) -> str:
    """32 hexadecimal digits, the same at every try."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
