"""Messages to IoT Hub: their bodies, their properties, and how many frames go into one message.

`encode_frame` turns a frame object into JSON once; `build_batch_messages` packs encoded frames into messages
of at most `MAX_BYTES`, properties included. A frame object is never split. Pure: no clock, no I/O.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

from visionedge.frames.types import format_utc
from visionedge.outbound.metering import BLOCK_BYTES, count_blocks

DETECTIONS = "detections"
EVENTS = "events"
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
# Upper bound for the envelope and the properties: the two lists above, two ids of at most 128 characters (up
# to six bytes each when JSON escapes them), and the short fixed texts.
_RESERVED_BYTES = 8_192
MAX_FRAME_BYTES = MAX_BYTES - _RESERVED_BYTES

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
    """One message, ready to send. `body` is UTF-8 JSON; `frames` is the number of frame objects in it."""

    output: str
    body: bytes
    message_id: str
    properties: Mapping[str, str]
    sequence_number: int
    frames: int = 0

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
class EncodedFrame:
    """A frame object as JSON, and the values that the properties of its message are made from.

    `confidence` is the highest score of its detections; `labels` are escaped for use in a property.
    """

    body: bytes
    camera: str
    confidence: float
    labels: frozenset[str]


class FrameTooLargeError(ValueError):
    """One frame object is larger than `MAX_FRAME_BYTES`, so it fits into no message."""


def encode_json(document: Any) -> bytes:
    """Encode a document as compact UTF-8 JSON.

    Raises:
        ValueError: the document contains NaN or infinity, which JSON does not have.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A file name that is not UTF-8 contains lone surrogates; they become '?'.
    return text.encode("utf-8", "replace")


def encode_frame(document: Mapping[str, Any]) -> EncodedFrame:
    """Encode a frame object of schema `visionedge/batch/1`.

    Raises:
        FrameTooLargeError: the frame object is larger than `MAX_FRAME_BYTES`.
        ValueError: the frame object contains NaN or infinity.
    """
    body = encode_json(document)
    if len(body) > MAX_FRAME_BYTES:
        text = f"frame object of {len(body)} bytes is too large: at most {MAX_FRAME_BYTES} fit into a message"
        raise FrameTooLargeError(text)
    return _without_body(document, body)


def _without_body(document: Mapping[str, Any], body: bytes = b"") -> EncodedFrame:
    """The values that message properties need from a frame object."""
    detections = document["detections"]
    return EncodedFrame(
        body=body,
        camera=document["camera"],
        confidence=max((row["confidence"] for row in detections), default=0.0),
        labels=frozenset(escape_property_value(row["label"]) for row in detections) - {""},
    )


def escape_property_value(text: str) -> str:
    """Percent-encode ``,``, ``%``, ``*`` and non-ASCII, for an entry in the list of a property."""
    return quote(text, safe=_PLAIN, errors="replace")


def build_batch_messages(sender: Sender, first_number: int, frames: Sequence[EncodedFrame]) -> list[Message]:
    """Pack frames, in their order, into messages that are numbered from `first_number`.

    A new message begins when the next frame would exceed `MAX_BYTES`, or the limits of the lists of cameras
    and labels. Only the label list of a single frame is ever shortened; it then ends with ``*``.
    """
    return [
        _batch_message(sender, first_number + index, group)
        for index, group in enumerate(_split_into_messages(frames))
    ]


def envelope_bytes(sender: Sender, sequence_number: int) -> int:
    """The size of a batch message without its frames and without its lists of cameras and labels."""
    empty = EncodedFrame(b"", "", 0.99999, frozenset())  # the longest text that a confidence can have
    return _batch_message(sender, sequence_number, [empty]).size_bytes


class BatchSizeEstimator:
    """The size of a batch message while frames are added to it; never smaller than the real size.

    `envelope_bytes` is the size without frames (`envelope_bytes()`).
    """

    def __init__(self, envelope_bytes: int = 0) -> None:
        self._envelope = envelope_bytes + _METERING_MARGIN_BYTES
        self._count = 0
        self._bodies_bytes = 0
        self._cameras: set[str] = set()
        self._cameras_bytes = 0
        self._labels: set[str] = set()
        self._labels_bytes = 0

    def add(self, frame: EncodedFrame) -> None:
        """Add a frame; frames, cameras and labels are separated by one comma each."""
        self._bodies_bytes += len(frame.body) + (self._count > 0)
        self._count += 1
        if frame.camera not in self._cameras:
            self._cameras_bytes += len(frame.camera) + bool(self._cameras)
            self._cameras.add(frame.camera)
        for label in frame.labels - self._labels:
            self._labels_bytes += len(label) + bool(self._labels)
            self._labels.add(label)

    @property
    def size_bytes(self) -> int:
        """The size of the message with the frames so far."""
        lists = self._cameras_bytes + min(self._labels_bytes, MAX_LABELS_BYTES)
        return self._envelope + self._bodies_bytes + lists

    @property
    def fits(self) -> bool:
        """Whether the frames so far fit into one message; a single frame always does."""
        return self._count <= 1 or (
            self._bodies_bytes <= MAX_FRAME_BYTES
            and self._cameras_bytes <= MAX_CAMERAS_BYTES
            and self._labels_bytes <= MAX_LABELS_BYTES
        )

    @property
    def is_well_filled(self) -> bool:
        """Whether the message uses at least `MIN_FILL_RATIO` of its metered blocks."""
        return self.size_bytes >= MIN_FILL_RATIO * BLOCK_BYTES * count_blocks(self.size_bytes)


def count_frames_to_fill(frames: Iterable[EncodedFrame], envelope_bytes: int) -> int:
    """How many of the first frames make the largest well-filled message; 0 when no number of them does.

    When the frames do not fit into one message, the first message is full and goes out, well filled or not.
    """
    size, best = BatchSizeEstimator(envelope_bytes), 0
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
    if len(body) > MAX_FRAME_BYTES:
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
            raise ValueError("unknown schema")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a key is missing or has the wrong type: {error!r}") from None
    return Message(
        output, body, _message_id(sender, output, sequence_number), properties, sequence_number, frames=count
    )


def _split_into_messages(frames: Iterable[EncodedFrame]) -> list[list[EncodedFrame]]:
    groups: list[list[EncodedFrame]] = []
    size = BatchSizeEstimator()
    for frame in frames:
        size.add(frame)
        if groups and size.fits:
            groups[-1].append(frame)
        else:
            groups.append([frame])
            size = BatchSizeEstimator()
            size.add(frame)
    return groups


def _batch_message(sender: Sender, sequence_number: int, frames: Sequence[EncodedFrame]) -> Message:
    head = encode_json(
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
    """The id of a message: unique for the module over all its starts, and the same when it is sent again."""
    return f"{sender.run_id}-{output}-{sequence_number}"


def _number_text(value: float) -> str:
    """A number as routes of IoT Hub can cast it: ``0.87``, ``1``, ``0``, never with an exponent."""
    return f"{value:.5f}".rstrip("0").rstrip(".")


def _label_list(labels: frozenset[str]) -> str:
    """The sorted labels, separated by commas; shortened to `MAX_LABELS_BYTES` with ``*`` at the end."""
    complete = ",".join(sorted(labels))
    if len(complete) <= MAX_LABELS_BYTES:
        return complete
    kept: list[str] = []
    left_bytes = MAX_LABELS_BYTES - 1
    for label in sorted(labels):
        left_bytes -= len(label) + 1
        if left_bytes < 0:
            break
        kept.append(label)
    return ",".join([*kept, "*"])
