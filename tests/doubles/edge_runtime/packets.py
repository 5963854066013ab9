"""The packets of MQTT 3.1.1 that clients of edgeHub use. Pure functions."""

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass

CONNECT, CONNACK, PUBLISH, PUBACK = 1, 2, 3, 4
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 8, 9, 10, 11
PINGREQ, PINGRESP, DISCONNECT = 12, 13, 14

ACCEPTED, BAD_PROTOCOL, BAD_CLIENT_ID, BAD_CREDENTIALS, NOT_AUTHORIZED = 0, 1, 2, 4, 5


class ProtocolError(Exception):
    """The client sent a packet that is not allowed; the connection is closed."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A control packet: its type, the four flag bits and the bytes after the length."""

    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Connect:
    """The fields of a CONNECT."""

    client_id: str
    clean_session: bool
    keep_alive_s: int
    username: str
    password: str


@dataclass(frozen=True, slots=True)
class Publish:
    """The fields of a PUBLISH; `packet_id` is 0 with QoS 0."""

    topic: str
    payload: bytes
    qos: int
    dup: bool
    retain: bool
    packet_id: int


async def read_packet(
    reader: asyncio.StreamReader, torn: Callable[[int], bool] = lambda _kind: False
) -> Packet:
    """Read the next packet. `torn` gets its type and returns whether the connection breaks in its middle.

    Raises:
        asyncio.IncompleteReadError: the client disconnected.
        ProtocolError: the length is not valid.
    """
    first = (await reader.readexactly(1))[0]
    length = 0
    for place in range(4):
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            head = await reader.readexactly(length // 2)
            if torn(first >> 4):
                raise asyncio.IncompleteReadError(head, length)
            return Packet(first >> 4, first & 0x0F, head + await reader.readexactly(length - length // 2))
    raise ProtocolError("a length of more than four bytes")


def packet(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    """The bytes of a packet."""
    length, digits = len(body), bytearray()
    while True:
        length, digit = divmod(length, 128)
        digits.append(digit | (0x80 if length else 0))
        if not length:
            return bytes([kind << 4 | flags]) + bytes(digits) + body


def text(value: str) -> bytes:
    """A text in MQTT: length and UTF-8."""
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def publish(topic: str, payload: bytes, packet_id: int, *, dup: bool = False) -> bytes:
    """A PUBLISH from the hub, QoS 1 (or 0 when `packet_id` is 0)."""
    number = struct.pack(">H", packet_id) if packet_id else b""
    flags = (0b0010 if packet_id else 0) | (0b1000 if dup else 0)
    return packet(PUBLISH, text(topic) + number + payload, flags=flags)


class _Fields:
    """Reads a body from front to back."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, count: int) -> bytes:
        part = self._body[self._at : self._at + count]
        if len(part) != count:
            raise ProtocolError("a packet ends in the middle of a field")
        self._at += count
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        return int(struct.unpack(">H", self.take(2))[0])

    def text(self) -> str:
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError as error:
            raise ProtocolError("a text is not UTF-8") from error

    def rest(self) -> bytes:
        return self.take(len(self._body) - self._at)

    @property
    def left(self) -> bool:
        return self._at < len(self._body)


def parse_connect(body: bytes) -> Connect:
    """A CONNECT of MQTT 3.1.1 with user name and password and no will, as IoT clients send it."""
    fields = _Fields(body)
    if fields.text() != "MQTT" or fields.byte() != 4:
        raise ProtocolError("not MQTT 3.1.1")
    flags = fields.byte()
    keep_alive_s = fields.number()
    client_id = fields.text()
    if flags & 0b0000_0100:
        raise ProtocolError("a will, which edgeHub does not support")
    username = fields.text() if flags & 0b1000_0000 else ""
    password = fields.text() if flags & 0b0100_0000 else ""
    return Connect(client_id, bool(flags & 0b10), keep_alive_s, username, password)


def parse_publish(received: Packet) -> Publish:
    """A PUBLISH."""
    fields = _Fields(received.body)
    qos = received.flags >> 1 & 0b11
    if qos > 1:
        raise ProtocolError("QoS 2, which IoT Hub does not support")
    topic = fields.text()
    packet_id = fields.number() if qos else 0
    return Publish(
        topic, fields.rest(), qos, bool(received.flags & 0b1000), bool(received.flags & 1), packet_id
    )


def parse_packet_id(body: bytes) -> int:
    """The packet id of a PUBACK."""
    return _Fields(body).number()


def parse_filters(body: bytes, *, with_qos: bool) -> tuple[int, list[str]]:
    """Packet id and topic filters of a SUBSCRIBE (`with_qos`) or UNSUBSCRIBE."""
    fields = _Fields(body)
    packet_id = fields.number()
    filters = []
    while fields.left:
        filters.append(fields.text())
        if with_qos:
            fields.byte()
    if not filters:
        raise ProtocolError("a subscription without topic filters")
    return packet_id, filters
