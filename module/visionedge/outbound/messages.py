"""Messages to IoT Hub: what goes into a body and its properties, and how frames are split into messages.

Pure: no clock, no I/O. A message is at most `MAX_BYTES`, properties included; frames are never cut.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

from visionedge.frames.types import format_utc

DETECTIONS = "detections"
EVENTS = "events"
CONTENT_TYPE = "application/json"
CONTENT_ENCODING = "utf-8"
RUN_ID_CHARACTERS = 12
"""The length of `Sender.run`."""

CORRELATION_ID = "$.cid"
"""Among the properties of a message this one is IoT Hub's own: the id of the message that it answers."""

MAX_BYTES = 200_000
"""The most a message weighs, body and properties together: 200 KB in the strictest reading."""

MAX_CAMERAS_BYTES = 2_048
MAX_LABELS_BYTES = 1_024
# What the envelope and the properties may take at most: the two lists above, ids of at most 128 characters
# (escaped, six bytes each), and the short rest.
_RESERVED_BYTES = 8_192
MAX_FRAME_BYTES = MAX_BYTES - _RESERVED_BYTES

EventKind = Literal["engine", "camera", "model", "storage", "module"]

# Printable ASCII without the comma (it separates), '%' (it escapes) and '*' (it stands for "and more").
_PLAIN = " !\"#$&'()+-./:;<=>?@[\\]^_`{|}~"


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends: device and module id, and `run`, a short text that no other start of the module shares."""

    device: str
    module: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message, ready to send: `body` is UTF-8 JSON, `frames` how many frame objects it holds."""

    output: str
    body: bytes
    message_id: str
    properties: Mapping[str, str]
    sequence_number: int
    frames: int = 0

    @property
    def size_bytes(self) -> int:
        """What IoT Hub counts: the body, the values of system properties, names and values of the others."""
        system = len(CONTENT_TYPE) + len(CONTENT_ENCODING) + len(self.message_id) + len(self.output)
        own = sum(len(name) + len(value) for name, value in self.properties.items())
        return len(self.body) + system + own


@dataclass(frozen=True, slots=True)
class Event:
    """A change of state that people or rules in the cloud should hear of."""

    kind: EventKind
    code: str
    message: str
    at: datetime
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """A frame object as JSON, with what the properties of its message need."""

    body: bytes
    camera: str
    confidence: float
    labels: frozenset[str]


class FrameTooLargeError(ValueError):
    """A frame object alone is larger than a message may be."""


def encode(document: Any) -> bytes:
    """Compact UTF-8 JSON.

    Raises:
        ValueError: it holds a number that JSON has no word for (NaN, infinity).
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A file name that is no UTF-8 reaches us as lone surrogates, which no UTF-8 can carry.
    return text.encode("utf-8", "replace")


def encode_frame(document: Mapping[str, Any]) -> EncodedFrame:
    """Encode a frame object of the contract.

    Raises:
        FrameTooLargeError: it fits in no message.
        ValueError: it holds NaN or infinity.
    """
    body = encode(document)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLargeError(f"a frame object of {len(body)} bytes; {MAX_FRAME_BYTES} fit in a message")
    return _without_body(document, body)


def _without_body(document: Mapping[str, Any], body: bytes = b"") -> EncodedFrame:
    """What the properties of a message need of a frame object."""
    detections = document["detections"]
    return EncodedFrame(
        body=body,
        camera=document["camera"],
        confidence=max((row["confidence"] for row in detections), default=0.0),
        labels=frozenset(escape_property_value(row["label"]) for row in detections) - {""},
    )


def escape_property_value(text: str) -> str:
    """A text as it may stand in a property's list: ``,``, ``%``, ``*`` and non-ASCII are percent-encoded."""
    return quote(text, safe=_PLAIN, errors="replace")


def build_batch_messages(sender: Sender, first_number: int, frames: Sequence[EncodedFrame]) -> list[Message]:
    """Pack frames, in their order, into as few messages as their limits allow, numbered from `first_number`.

    A message ends where the next frame would make it too large or its lists of cameras or labels too long;
    only the labels of a single frame are ever cut, and then end with ``*``.
    """
    return [
        _batch_message(sender, first_number + index, pack)
        for index, pack in enumerate(_split_into_messages(frames))
    ]


def envelope_bytes(sender: Sender, sequence_number: int) -> int:
    """What a batch message weighs without its frames and without its lists of cameras and labels."""
    nothing = EncodedFrame(b"", "", 0.99999, frozenset())
    return _batch_message(sender, sequence_number, [nothing]).size_bytes


def build_event_message(sender: Sender, sequence_number: int, event: Event) -> Message:
    """The message that tells an event; details that do not fit are left out and said to be."""
    document = {
        "schema": "visionedge/event/1",
        "device": sender.device,
        "module": sender.module,
        "messageSequence": sequence_number,
        "at": format_utc(event.at),
        "kind": event.kind,
        "code": event.code,
        "message": event.message[:4096],
        "details": dict(event.details),
    }
    body = encode(document)
    if len(body) > MAX_FRAME_BYTES:
        body = encode(document | {"details": {"omitted": f"{len(body)} bytes are too many"}})
    message_id = _message_id(sender, EVENTS, sequence_number)
    return Message(EVENTS, body, message_id, _event_properties(event.kind, event.code), sequence_number)


def parse_message(body: bytes) -> Message:
    """The message that a body was sent with, for who counts again; its id is another one of the same length.

    Raises:
        ValueError: it is no body of a message of this module.
    """
    try:
        document = json.loads(body)
        sender = Sender(document["device"], document["module"], "0" * RUN_ID_CHARACTERS)
        sequence_number = int(document["messageSequence"])
        if document["schema"] == "visionedge/event/1":
            output, count = EVENTS, 0
            properties = _event_properties(document["kind"], document["code"])
        elif document["schema"] == "visionedge/batch/1":
            frames = [_without_body(frame) for frame in document["frames"]]
            output, count = DETECTIONS, len(frames)
            properties = _batch_properties(frames)
        else:
            raise ValueError("its schema is not known here")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a key of it is missing or wrong: {error!r}") from None
    return Message(
        output, body, _message_id(sender, output, sequence_number), properties, sequence_number, frames=count
    )


def _split_into_messages(frames: Iterable[EncodedFrame]) -> list[list[EncodedFrame]]:
    packs: list[list[EncodedFrame]] = []
    size, cameras, labels = 0, frozenset[str](), frozenset[str]()
    for frame in frames:
        wider_cameras, wider_labels = cameras | {frame.camera}, labels | frame.labels
        fits = (
            size + len(frame.body) + 1 <= MAX_FRAME_BYTES
            and len(",".join(wider_cameras)) <= MAX_CAMERAS_BYTES
            and len(",".join(wider_labels)) <= MAX_LABELS_BYTES
        )
        if packs and fits:
            packs[-1].append(frame)
            size, cameras, labels = size + len(frame.body) + 1, wider_cameras, wider_labels
        else:
            packs.append([frame])
            size, cameras, labels = len(frame.body), frozenset({frame.camera}), frame.labels
    return packs


def _batch_message(sender: Sender, sequence_number: int, frames: Sequence[EncodedFrame]) -> Message:
    head = encode(
        {
            "schema": "visionedge/batch/1",
            "device": sender.device,
            "module": sender.module,
            "messageSequence": sequence_number,
        }
    )
    body = head[:-1] + b',"frames":[' + b",".join(frame.body for frame in frames) + b"]}"
    message_id = _message_id(sender, DETECTIONS, sequence_number)
    return Message(
        DETECTIONS, body, message_id, _batch_properties(frames), sequence_number, frames=len(frames)
    )


def _batch_properties(frames: Sequence[EncodedFrame]) -> dict[str, str]:
    return {
        "schema": "visionedge/batch/1",
        "cameras": ",".join(sorted({frame.camera for frame in frames})),
        "maxConfidence": _number_text(max(frame.confidence for frame in frames)),
        "labels": _label_list(frozenset[str]().union(*(frame.labels for frame in frames))),
    }


def _event_properties(kind: str, code: str) -> dict[str, str]:
    return {"schema": "visionedge/event/1", "kind": kind, "code": escape_property_value(code)[:128]}


def _message_id(sender: Sender, output: str, sequence_number: int) -> str:
    """The same each time the message is sent; no other message of this module ever has it."""
    return f"{sender.run_id}-{output}-{sequence_number}"


def _number_text(value: float) -> str:
    """``0.87``, ``1``, ``0``: as routes can cast it, never with an exponent."""
    return f"{value:.5f}".rstrip("0").rstrip(".")


def _label_list(labels: frozenset[str]) -> str:
    whole = ",".join(sorted(labels))
    if len(whole) <= MAX_LABELS_BYTES:
        return whole
    kept: list[str] = []
    left = MAX_LABELS_BYTES - 1
    for label in sorted(labels):
        left -= len(label) + 1
        if left < 0:
            break
        kept.append(label)
    return ",".join([*kept, "*"])
