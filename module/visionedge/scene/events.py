"""Scene events and their documents; which total an event changes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

from visionedge.frames.types import FrameResult, format_utc

Box = tuple[float, float, float, float]
"""Left, top, width and height, 0-1 of the picture."""

RuleShape = Literal["zone", "line"]

EventType = Literal[
    "zone-entered",
    "zone-left",
    "zone-lost",
    "zone-dwell",
    "zone-occupied",
    "zone-vacated",
    "zone-empty",
    "zone-filled",
    "line-crossed",
]
EVENT_TYPES: tuple[str, ...] = get_args(EventType)

TOTALS_OF_ZONES = ("entered", "left", "lost")
LineTotal = Literal["left-to-right", "right-to-left"]
TOTALS_OF_LINES: tuple[str, ...] = get_args(LineTotal)

_TOTALS: Mapping[str, str] = {f"zone-{total}": total for total in TOTALS_OF_ZONES}
_CONDITIONS: Mapping[str, tuple[str, bool]] = {
    "zone-occupied": ("occupancy", True),
    "zone-vacated": ("occupancy", False),
    "zone-empty": ("empty", True),
    "zone-filled": ("empty", False),
}


class ScenePicture(NamedTuple):
    """The picture in which rules decide.

    `at_s` is monotonic; `captured_at` is for schedules and documents; `aspect` is width divided by height.
    `model` and `device` are where the detections come from. The size is 0 where it is not known.
    """

    sequence: int
    epoch: int
    at_s: float
    captured_at: datetime
    aspect: float
    model: str
    device: str
    width_px: int = 0
    height_px: int = 0

    @staticmethod
    def of(result: FrameResult) -> "ScenePicture":
        """The picture of a result."""
        frame = result.frame
        return ScenePicture(
            sequence=frame.sequence,
            epoch=frame.epoch,
            at_s=frame.captured_ns / 1e9,
            captured_at=frame.captured_utc,
            aspect=frame.width_px / frame.height_px,
            model=result.model,
            device=result.device,
            width_px=frame.width_px,
            height_px=frame.height_px,
        )


@dataclass(frozen=True, slots=True)
class SceneEvent:
    """One answer of a zone or a line; None for what the type does not have.

    `context`: what messages of Spatial Analysis need beside the document (`spatial_analysis`).
    """

    id: str
    camera: str
    type: str
    shape: RuleShape
    rule: str
    at: datetime
    sequence: int
    epoch: int
    model: str
    device: str
    evidence: Mapping[str, Any]
    direction: str | None = None
    label: str | None = None
    track_id: int | None = None
    count: int | None = None
    dwell_s: float | None = None
    confidence: float | None = None
    box: Box | None = None
    context: Mapping[str, Any] | None = None

    @property
    def total(self) -> str | None:
        """The total of its zone or line that it adds one to: `entered`, `left-to-right` …"""
        return self.direction if self.type == "line-crossed" else _TOTALS.get(self.type)

    @property
    def condition(self) -> tuple[str, bool] | None:
        """The kind of rule whose condition it begins (True) or ends."""
        return _CONDITIONS.get(self.type)

    def document(self) -> dict[str, Any]:
        """The event as a JSON document; keys that make no sense for its type are absent."""
        document: dict[str, Any] = {
            "id": self.id,
            "camera": self.camera,
            "type": self.type,
            self.shape: self.rule,
            "direction": self.direction,
            "label": self.label,
            "trackId": self.track_id,
            "count": self.count,
            "dwellSeconds": None if self.dwell_s is None else round(self.dwell_s, 3),
            "at": format_utc(self.at),
            "sequence": self.sequence,
            "epoch": self.epoch,
            "model": self.model,
            "device": self.device,
            "confidence": None if self.confidence is None else round(self.confidence, 5),
            "box": None if self.box is None else make_box_document(self.box),
            "evidence": self.evidence,
        }
        return {key: value for key, value in document.items() if value is not None}

    def stored_document(self) -> dict[str, Any]:
        """The document, and its `context` if it has one; only for the file and for the delivery."""
        return self.document() if self.context is None else {**self.document(), "context": self.context}


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are wanted; None: any. `rule` is the name of a zone or line."""

    camera: str | None = None
    event_type: str | None = None
    rule: str | None = None
    label: str | None = None

    def matches(self, event: SceneEvent) -> bool:
        """Whether the event is wanted."""
        return (
            self.camera in (None, event.camera)
            and self.event_type in (None, event.type)
            and self.rule in (None, event.rule)
            and self.label in (None, event.label)
        )


def make_box_document(box: Box) -> dict[str, float]:
    """The document of a box, clipped to the picture."""
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(1.0, box[0] + box[2]), min(1.0, box[1] + box[3])
    sides = {"left": left, "top": top, "width": max(0.0, right - left), "height": max(0.0, bottom - top)}
    return {name: round(side, 6) for name, side in sides.items()}


def parse_event(document: Mapping[str, Any]) -> SceneEvent:
    """The event of a document that `SceneEvent.document` or `stored_document` made.

    Raises:
        ValueError: it is none.
    """
    try:
        shape: RuleShape = "zone" if "zone" in document else "line"
        box = document.get("box")
        return SceneEvent(
            id=str(document["id"]),
            camera=str(document["camera"]),
            type=str(document["type"]),
            shape=shape,
            rule=str(document[shape]),
            at=datetime.fromisoformat(document["at"]).astimezone(UTC),
            sequence=int(document["sequence"]),
            epoch=int(document["epoch"]),
            model=str(document["model"]),
            device=str(document["device"]),
            evidence=dict(document["evidence"]),
            direction=document.get("direction"),
            label=document.get("label"),
            track_id=document.get("trackId"),
            count=document.get("count"),
            dwell_s=document.get("dwellSeconds"),
            confidence=document.get("confidence"),
            box=None if box is None else (box["left"], box["top"], box["width"], box["height"]),
            context=document.get("context"),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"is no scene event ({type(error).__name__})") from None


def make_event_id(camera: str, rule: str, event_type: str, track_id: int | None, sequence: int) -> str:
    """32 hexadecimal digits, the same for the same event at every try and after a restart.

    `sequence` is the first one of the event's evidence: neither it nor a track's id is used twice for a
    camera.
    """
    parts = json.dumps([camera, rule, event_type, track_id, sequence])
    return hashlib.sha256(parts.encode()).hexdigest()[:32]
