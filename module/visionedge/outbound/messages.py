"""Messages to IoT Hub: their bodies, their properties, and how many frames or scene events go into one.

`encode_frame` and `encode_scene_event` turn a document into JSON once; `build_batch_messages` and
`build_scene_messages` pack them into messages of at most `MAX_BYTES`, properties included. A document is
never split. Pure: no clock, no I/O.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import quote

from visionedge.frames.types import format_utc
from visionedge.outbound.metering import BLOCK_BYTES, count_blocks

DETECTIONS = "detections"
SCENE = "scene"
EVENTS = "events"
KEPT_OUTPUTS = (EVENTS, SCENE)
"""The outputs whose messages are dropped last, after all telemetry."""

CONTENT_TYPE = "application/json"
CONTENT_ENCODING = "utf-8"
RUN_ID_CHARACTERS = 12
"""The length of `Sender.run_id`."""

CORRELATION_ID = "$.cid"
"""The name of IoT Hub's own property for the id of the message that this message answers."""

MAX_BYTES = 200_000
"""The size limit of a message, body and properties together. IoT Hub accepts 256 KB."""

MAX_CAMERAS_BYTES = 2_048
MAX_LABELS_BYTES = 1_024
MAX_RULES_BYTES = 1_024
LIST_LIMITS: Mapping[str, int] = MappingProxyType(
    {"cameras": MAX_CAMERAS_BYTES, "labels": MAX_LABELS_BYTES, "rules": MAX_RULES_BYTES, "types": 512}
)
"""The properties that are lists, and the most bytes of each."""

# Upper bound for the envelope and the properties: the lists above, two ids of at most 128 characters (up to
# six bytes each when JSON escapes them), and the short fixed texts.
_RESERVED_BYTES = 8_192
MAX_DOCUMENT_BYTES = MAX_BYTES - _RESERVED_BYTES
"""The most bytes of a frame object or scene event, and of all together in a message."""

EventKind = Literal["engine", "camera", "model", "storage", "module"]

MIN_FILL_RATIO = 0.9
"""A message is well filled when it uses at least this share of the blocks that IoT Hub meters for it."""

# IoT Hub may add the names of device, module and hub to a message on its way.
_METERING_MARGIN_BYTES = 96

# Printable ASCII without the separator ',', the escape character '%' and the '*' that marks a shortened list.
_PLAIN = " !\"#$&'()+-./:;<=>?@[\\]^_`{|}~"


@dataclass(frozen=True, slots=True)
class Sender:
    """The sender of messages: device id, module id, and `run_id`, a text that is new at each start."""

    device: str
    module: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message, ready to send.

    `body` is UTF-8 JSON; `frames` is the number of frame objects in it, `event_ids` are the ids of the scene
    events in it (empty after its way through a file).
    """

    output: str
    body: bytes
    message_id: str
    properties: Mapping[str, str]
    sequence_number: int
    frames: int = 0
    event_ids: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The size that IoT Hub meters: body, values of system properties, names and values of the others."""
        system = len(CONTENT_TYPE) + len(CONTENT_ENCODING) + len(self.message_id) + len(self.output)
        own = sum(len(name) + len(value) for name, value in self.properties.items())
        return len(self.body) + system + own


@dataclass(frozen=True, slots=True)
class Event:
    """A change of state that is reported to the cloud on output `events`."""

    kind: EventKind
    code: str
    message: str
    at: datetime
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A frame object or a scene event as JSON, and what the properties of its message are made from.

    `values`: its values for the properties that are lists, escaped; `confidence`: the highest score of a
    frame's detections; `event`: the scene event. With `is_whole` it is the body of a message of its own.
    """

    body: bytes
    values: Mapping[str, frozenset[str]]
    confidence: float = 0.0
    event: Mapping[str, Any] | None = None
    is_whole: bool = False


class DocumentTooLargeError(ValueError):
    """One frame object or scene event is larger than `MAX_DOCUMENT_BYTES`, so it fits into no message."""


@dataclass(frozen=True, slots=True)
class _MessageFormat:
    """The messages of an output: their schema, and the key of their frames or events."""

    output: str
    schema: str
    key: str
    lists: tuple[str, ...]


_BATCH = _MessageFormat(DETECTIONS, "visionedge/batch/1", "frames", ("cameras", "labels"))
_SCENE = _MessageFormat(SCENE, "visionedge/scene/1", "events", ("cameras", "types", "rules", "labels"))
_INSIGHTS = _MessageFormat(SCENE, "spatial-analysis/2.0", "", _SCENE.lists)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_json(document: Any) -> bytes:
    """Encode a document as compact UTF-8 JSON.

    Raises:
        ValueError: the document contains NaN or infinity, which JSON does not have.
    """
    # A file name that is not UTF-8 contains lone surrogates; they become '?'.
    return _ENCODER.encode(document).encode("utf-8", "replace")


def encode_frame(document: Mapping[str, Any]) -> EncodedDocument:
    """Encode a frame object of schema `visionedge/batch/1`.

    Raises:
        DocumentTooLargeError: the frame object is larger than `MAX_DOCUMENT_BYTES`.
        ValueError: the frame object contains NaN or infinity.
    """
    return _describe_frame(document, _encode_bounded(document, "frame object"))


def encode_scene_event(document: Mapping[str, Any]) -> EncodedDocument:
    """Encode a scene event of schema `visionedge/scene/1`.

    Raises:
        DocumentTooLargeError: the event is larger than `MAX_DOCUMENT_BYTES`.
        ValueError: the event contains NaN or infinity.
    """
    return _describe_event(document, _encode_bounded(document, "scene event"))


def encode_insights(document: Mapping[str, Any], event: Mapping[str, Any]) -> EncodedDocument:
    """Encode a document of Spatial Analysis, which is a message of its own; `event` is what it is made of.

    Raises:
        DocumentTooLargeError: the document is larger than `MAX_DOCUMENT_BYTES`.
        ValueError: the document contains NaN or infinity.
    """
    body = _encode_bounded(document, "document of Spatial Analysis")
    return EncodedDocument(body, _list_insights(document, event["camera"]), event=event, is_whole=True)


def _list_insights(document: Mapping[str, Any], camera: str) -> dict[str, frozenset[str]]:
    """The values that message properties need from a document of Spatial Analysis."""
    found = {
        "cameras": [camera],
        "types": [event["type"] for event in document["events"]],
        "rules": [event["zone"] for event in document["events"]],
        "labels": [detection["type"] for detection in document["detections"]],
    }
    return {name: frozenset(map(escape_property_value, texts)) for name, texts in found.items()}


def _encode_bounded(document: Mapping[str, Any], what: str) -> bytes:
    body = encode_json(document)
    if len(body) > MAX_DOCUMENT_BYTES:
        text = f"{what} of {len(body)} bytes is too large: at most {MAX_DOCUMENT_BYTES} fit into a message"
        raise DocumentTooLargeError(text)
    return body


def _describe_frame(document: Mapping[str, Any], body: bytes = b"") -> EncodedDocument:
    """The values that message properties need from a frame object."""
    detections = document["detections"]
    labels = frozenset(escape_property_value(row["label"]) for row in detections) - {""}
    return EncodedDocument(
        body,
        {"cameras": frozenset((document["camera"],)), "labels": labels},
        max((row["confidence"] for row in detections), default=0.0),
    )


def _describe_event(document: Mapping[str, Any], body: bytes = b"") -> EncodedDocument:
    """The values that message properties need from a scene event."""
    found = {
        "cameras": document["camera"],
        "types": document["type"],
        "rules": document.get("zone", document.get("line", "")),
        "labels": document.get("label", ""),
    }
    values = {name: frozenset((escape_property_value(text),)) - {""} for name, text in found.items()}
    return EncodedDocument(body, values, event=document)


def escape_property_value(text: str) -> str:
    """Percent-encode ``,``, ``%``, ``*`` and non-ASCII, for an entry in the list of a property."""
    return quote(text, safe=_PLAIN, errors="replace")


def build_batch_messages(
    sender: Sender, first_number: int, frames: Sequence[EncodedDocument]
) -> list[Message]:
    """Pack frames, in their order, into messages of output `detections`, numbered from `first_number`.

    A new message begins when the next frame would exceed `MAX_BYTES`, or the limit of a list of properties.
    Only a list of a single frame is ever shortened; it then ends with ``*``.
    """
    return _build_messages(_BATCH, sender, first_number, frames)


def build_scene_messages(
    sender: Sender, first_number: int, events: Sequence[EncodedDocument]
) -> list[Message]:
    """Pack scene events, in their order, into messages of output `scene`, as `build_batch_messages` does."""
    return _build_messages(_SCENE, sender, first_number, events)


def envelope_bytes(sender: Sender, sequence_number: int) -> int:
    """The size of a batch message without its frames and without its lists of cameras and labels."""
    empty = EncodedDocument(b"", {}, 0.99999)  # the longest text that a confidence can have
    return _make_message(_BATCH, sender, sequence_number, [empty]).size_bytes


class MessageSizeEstimator:
    """The size of a message while documents are added to it; never smaller than the real size.

    `envelope_bytes` is the size without documents (`envelope_bytes()`).
    """

    def __init__(self, envelope_bytes: int = 0) -> None:
        self._envelope = envelope_bytes + _METERING_MARGIN_BYTES
        self._count = 0
        self._bodies_bytes = 0
        self._values: dict[str, set[str]] = {}
        self._lists_bytes: dict[str, int] = {}

    def add(self, document: EncodedDocument) -> None:
        """Add a document; documents, and the values of a list, are separated by one comma each."""
        self._bodies_bytes += len(document.body) + (self._count > 0)
        self._count += 1
        for name, values in document.values.items():
            known = self._values.setdefault(name, set())
            for value in values - known:
                self._lists_bytes[name] = self._lists_bytes.get(name, 0) + len(value) + bool(known)
                known.add(value)

    @property
    def size_bytes(self) -> int:
        """The size of the message with the documents so far."""
        lists = sum(min(size, LIST_LIMITS[name]) for name, size in self._lists_bytes.items())
        return self._envelope + self._bodies_bytes + lists

    @property
    def fits(self) -> bool:
        """Whether the documents so far fit into one message; a single one always does."""
        return self._count <= 1 or (
            self._bodies_bytes <= MAX_DOCUMENT_BYTES
            and all(size <= LIST_LIMITS[name] for name, size in self._lists_bytes.items())
        )

    @property
    def is_well_filled(self) -> bool:
        """Whether the message uses at least `MIN_FILL_RATIO` of its metered blocks."""
        return self.size_bytes >= MIN_FILL_RATIO * BLOCK_BYTES * count_blocks(self.size_bytes)


def count_frames_to_fill(frames: Iterable[EncodedDocument], envelope_bytes: int) -> int:
    """How many of the first frames make the largest well-filled message; 0 when no number of them does.

    When the frames do not fit into one message, the first message is full and goes out, well filled or not.
    """
    size, best = MessageSizeEstimator(envelope_bytes), 0
    for count, frame in enumerate(frames, 1):
        size.add(frame)
        if not size.fits:
            return best or count - 1
        if size.is_well_filled:
            best = count
    return best


def build_event_message(sender: Sender, sequence_number: int, event: Event) -> Message:
    """Build the message of an event; details that do not fit are replaced by a note of their size."""
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
    body = encode_json(document)
    if len(body) > MAX_DOCUMENT_BYTES:
        body = encode_json(document | {"details": {"omitted": f"{len(body)} bytes are too many"}})
    message_id = _message_id(sender, EVENTS, sequence_number)
    return Message(EVENTS, body, message_id, _event_properties(event.kind, event.code), sequence_number)


def parse_message(body: bytes) -> Message:
    """Rebuild a message from its body, to measure its size; it gets another run id of the same length.

    Raises:
        ValueError: the body is not that of a message of this module.
    """
    try:
        document = json.loads(body)
        if "sourceInfo" in document:
            return _parse_insights(document, body)
        sender = Sender(document["device"], document["module"], "0" * RUN_ID_CHARACTERS)
        sequence_number = int(document["messageSequence"])
        if document["schema"] == "visionedge/event/1":
            output, count = EVENTS, 0
            properties = _event_properties(document["kind"], document["code"])
        elif document["schema"] == _BATCH.schema:
            frames = [_describe_frame(frame) for frame in document["frames"]]
            output, count = DETECTIONS, len(frames)
            properties = _properties(_BATCH, frames)
        elif document["schema"] == _SCENE.schema:
            output, count = SCENE, 0
            properties = _properties(_SCENE, [_describe_event(event) for event in document["events"]])
        else:
            raise ValueError("unknown schema")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a key is missing or has the wrong type: {error!r}") from None
    return Message(
        output, body, _message_id(sender, output, sequence_number), properties, sequence_number, frames=count
    )


def _parse_insights(document: Mapping[str, Any], body: bytes) -> Message:
    """A message of Spatial Analysis: its body has neither the sender nor a number, which is 0 here."""
    properties = {"schema": _INSIGHTS.schema}
    for name, values in _list_insights(document, document["sourceInfo"]["id"]).items():
        properties[name] = _list_text(values, LIST_LIMITS[name])
    return Message(SCENE, body, _message_id(Sender("", "", "0" * RUN_ID_CHARACTERS), SCENE, 0), properties, 0)


def _build_messages(
    message_format: _MessageFormat,
    sender: Sender,
    first_number: int,
    documents: Iterable[EncodedDocument],
) -> list[Message]:
    groups = _split_into_messages(documents)
    return [
        _make_message(_INSIGHTS if group[0].is_whole else message_format, sender, number, group)
        for number, group in enumerate(groups, first_number)
    ]


def _split_into_messages(documents: Iterable[EncodedDocument]) -> list[list[EncodedDocument]]:
    groups: list[list[EncodedDocument]] = []
    size = MessageSizeEstimator()
    for document in documents:
        size.add(document)
        if groups and size.fits and not (document.is_whole or groups[-1][0].is_whole):
            groups[-1].append(document)
        else:
            groups.append([document])
            size = MessageSizeEstimator()
            size.add(document)
    return groups


def _make_message(
    message_format: _MessageFormat,
    sender: Sender,
    sequence_number: int,
    documents: Sequence[EncodedDocument],
) -> Message:
    head = encode_json(
        {
            "schema": message_format.schema,
            "device": sender.device,
            "module": sender.module,
            "messageSequence": sequence_number,
        }
    )
    opening = b',"%s":[' % message_format.key.encode()
    body = head[:-1] + opening + b",".join(document.body for document in documents) + b"]}"
    return Message(
        message_format.output,
        documents[0].body if message_format is _INSIGHTS else body,
        _message_id(sender, message_format.output, sequence_number),
        _properties(message_format, documents),
        sequence_number,
        frames=len(documents) if message_format is _BATCH else 0,
        event_ids=tuple(document.event["id"] for document in documents if document.event is not None),
    )


def _properties(message_format: _MessageFormat, documents: Sequence[EncodedDocument]) -> dict[str, str]:
    properties = {"schema": message_format.schema}
    for name in message_format.lists:
        found = frozenset[str]().union(*(document.values.get(name, ()) for document in documents))
        properties[name] = _list_text(found, LIST_LIMITS[name])
    if message_format is _BATCH:
        properties["maxConfidence"] = _number_text(max(document.confidence for document in documents))
    return properties


def _event_properties(kind: str, code: str) -> dict[str, str]:
    return {"schema": "visionedge/event/1", "kind": kind, "code": escape_property_value(code)[:128]}


def _message_id(sender: Sender, output: str, sequence_number: int) -> str:
    """The id of a message: unique for the module over all its starts, and the same when it is sent again."""
    return f"{sender.run_id}-{output}-{sequence_number}"


def _number_text(value: float) -> str:
    """A number as routes of IoT Hub can cast it: ``0.87``, ``1``, ``0``, never with an exponent."""
    return f"{value:.5f}".rstrip("0").rstrip(".")


def _list_text(values: frozenset[str], limit_bytes: int) -> str:
    """The sorted values, separated by commas; shortened to `limit_bytes` with ``*`` at the end."""
    complete = ",".join(sorted(values))
    if len(complete) <= limit_bytes:
        return complete
    kept: list[str] = []
    left_bytes = limit_bytes - 1
    for value in sorted(values):
        left_bytes -= len(value) + 1
        if left_bytes < 0:
            break
        kept.append(value)
    return ",".join([*kept, "*"])
