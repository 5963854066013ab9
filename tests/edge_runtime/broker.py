"""edgeHub as a module sees it over MQTT: who may connect, sessions, telemetry recorded, the twin answered."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from edge_runtime import packets
from edge_runtime.packets import Connect, Packet, ProtocolError, Publish

PORT = 8883
"""Fixed: the SDK knows no other."""

MAX_PUBLISH_BYTES = 262_144
"""edgeHub closes the connection on a larger PUBLISH, topic included."""


@dataclass(frozen=True, slots=True)
class Account:
    """The one module that this runtime knows: its names and its key, which only the workload API holds."""

    hub: str
    device: str
    module: str
    generation: str
    key: bytes

    @property
    def client_id(self) -> str:
        return f"{self.device}/{self.module}"

    @property
    def resource(self) -> str:
        return f"{self.hub}/devices/{self.device}/modules/{self.module}"

    def sign(self, data: bytes) -> str:
        """Base64 of the HMAC-SHA256 of `data`, as the workload API answers it."""
        return base64.b64encode(hmac.digest(self.key, data, hashlib.sha256)).decode()


@dataclass(frozen=True, slots=True)
class Received:
    """One telemetry message as it arrived; a resend after a lost acknowledgement arrives again."""

    output: str
    body: bytes
    message_id: str
    content_type: str
    content_encoding: str
    properties: dict[str, str]
    topic: str
    qos: int
    dup: bool
    received_ns: int

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


@dataclass(slots=True)
class Faults:
    """What goes wrong from now on. Set from any thread; each field is read when it matters."""

    swallow_pubacks: bool = False
    swallow_connacks: bool = False
    refuse_code: int | None = None


@dataclass(slots=True)
class Session:
    """What the hub keeps of a client across its connections."""

    subscriptions: set[str] = field(default_factory=set)
    connection: "Connection | None" = None
    packet_id: int = 0

    def next_packet_id(self) -> int:
        """1 to 65535, round and round."""
        self.packet_id = self.packet_id % 65_535 + 1
        return self.packet_id


class Twin:
    """A module twin: two documents that take merge patches and count their versions."""

    def __init__(self) -> None:
        self.desired: dict[str, Any] = {}
        self.reported: dict[str, Any] = {}
        self.desired_version = 1
        self.reported_version = 1

    def document(self) -> bytes:
        """Both halves, as a GET answers them."""
        return json.dumps(
            {
                "desired": {**self.desired, "$version": self.desired_version},
                "reported": {**self.reported, "$version": self.reported_version},
            }
        ).encode()

    def report(self, patch: dict[str, Any]) -> int:
        """Lay a patch over the reported half; its new version."""
        self.reported = _merged(self.reported, patch)
        self.reported_version += 1
        return self.reported_version


def _merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merged(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


class Broker:
    """Listens on one loopback address; everything runs on one asyncio loop.

    `on_message` is called with each telemetry message, before it is acknowledged; `on_change` when a client
    asks to connect.
    """

    def __init__(
        self, account: Account, on_message: Callable[[Received], None], on_change: Callable[[], None]
    ) -> None:
        self.account = account
        self.faults = Faults()
        self.twin = Twin()
        self.sessions: dict[str, Session] = {}
        self.refusals: list[str] = []
        self.attempts = 0
        self.connects = 0
        self._on_message = on_message
        self._on_change = on_change
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()

    @property
    def listening(self) -> bool:
        """Whether clients can connect."""
        return self._server is not None

    async def listen(self, address: str, tls: ssl.SSLContext) -> None:
        """Accept clients at this address.

        Raises:
            OSError: the port is taken at this address.
        """
        self._server = await asyncio.start_server(self._accept, address, PORT, ssl=tls)

    async def stop(self) -> None:
        """Cut every connection and listen no more; sessions stay, as edgeHub's do."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.cut()
        if self._connections:
            await asyncio.wait([connection.task for connection in self._connections])
        if server is not None:
            await server.wait_closed()

    def cut(self) -> None:
        """Reset every connection, without a word."""
        for connection in list(self._connections):
            connection.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(self, reader, writer, task)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    def admit(self, connect: Connect) -> int:
        """The CONNACK code for a CONNECT."""
        self.attempts += 1
        self._on_change()
        if self.faults.refuse_code is not None:
            return self.faults.refuse_code
        if connect.client_id != self.account.client_id:
            self.refusals.append(f"client id {connect.client_id}")
            return packets.BAD_CLIENT_ID
        names, _, query = connect.username.partition("/?")
        options = parse_qs(query)
        if names != f"{self.account.hub}/{self.account.client_id}" or "api-version" not in options:
            self.refusals.append(f"user name {connect.username}")
            return packets.BAD_CREDENTIALS
        if (problem := self._token_problem(connect.password)) is not None:
            self.refusals.append(f"token: {problem}")
            return packets.NOT_AUTHORIZED
        return packets.ACCEPTED

    def _token_problem(self, token: str) -> str | None:
        scheme, _, rest = token.partition(" ")
        parts = dict(part.partition("=")[::2] for part in rest.split("&"))
        if scheme != "SharedAccessSignature" or not {"sr", "sig", "se"} <= parts.keys():
            return "no shared access signature"
        if unquote(parts["sr"]) != self.account.resource:
            return f"for {unquote(parts['sr'])}"
        if not parts["se"].isdigit() or int(parts["se"]) <= time.time():
            return "expired"
        expected = self.account.sign(f"{quote(self.account.resource, safe='')}\n{parts['se']}".encode())
        return None if hmac.compare_digest(unquote(parts["sig"]), expected) else "wrongly signed"

    def telemetry(self, message: Publish) -> None:
        """Record a telemetry message.

        Raises:
            ProtocolError: the topic is not this module's.
        """
        prefix = f"devices/{self.account.device}/modules/{self.account.module}/messages/events/"
        if not message.topic.startswith(prefix):
            raise ProtocolError(f"no right to publish to {message.topic}")
        pairs = (pair.partition("=") for pair in message.topic[len(prefix) :].split("&") if pair)
        properties = {unquote(name): unquote(value) for name, _, value in pairs}
        self._on_message(
            Received(
                output=properties.pop("$.on", ""),
                body=message.payload,
                message_id=properties.pop("$.mid", ""),
                content_type=properties.pop("$.ct", ""),
                content_encoding=properties.pop("$.ce", ""),
                properties=properties,
                topic=message.topic,
                qos=message.qos,
                dup=message.dup,
                received_ns=time.monotonic_ns(),
            )
        )


class Connection:
    """One client's connection."""

    def __init__(
        self,
        broker: Broker,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        self.task = task
        self._broker = broker
        self._reader = reader
        self._writer = writer
        self._session: Session | None = None

    def cut(self) -> None:
        """Reset the connection."""
        self._writer.transport.abort()

    async def serve(self) -> None:
        """Talk to the client until either side has enough."""
        try:
            if await self._connect():
                while await self._handle(await packets.read_packet(self._reader)):
                    pass
        except ProtocolError as error:
            self._broker.refusals.append(str(error))
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass  # the client has gone: nothing is left to say to it
        finally:
            if self._session is not None and self._session.connection is self:
                self._session.connection = None
            self._writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await self._writer.wait_closed()

    async def _connect(self) -> bool:
        first = await packets.read_packet(self._reader)
        if first.kind != packets.CONNECT:
            raise ProtocolError("the first packet is no CONNECT")
        connect = packets.parse_connect(first.body)
        code = self._broker.admit(connect)
        known = connect.client_id in self._broker.sessions
        if self._broker.faults.swallow_connacks:
            await self._reader.read()
            return False
        await self._send(packets.packet(packets.CONNACK, bytes([code == 0 and known, code])))
        if code != packets.ACCEPTED:
            return False
        self._broker.connects += 1
        session = self._broker.sessions.setdefault(connect.client_id, Session())
        # A second connection with the same client id ends the first, as MQTT wants it.
        if session.connection is not None:
            session.connection.cut()
        session.connection = self
        self._session = session
        return True

    async def _handle(self, received: Packet) -> bool:
        """Answer one packet; False ends the connection."""
        match received.kind:
            case packets.PUBLISH:
                await self._published(received)
            case packets.SUBSCRIBE | packets.UNSUBSCRIBE:
                await self._subscribe(received)
            case packets.PINGREQ:
                await self._send(packets.packet(packets.PINGRESP))
            case packets.PUBACK:
                pass  # the hub's own messages are not sent twice here
            case packets.DISCONNECT:
                return False
            case _:
                raise ProtocolError(f"packet type {received.kind}")
        return True

    async def _published(self, received: Packet) -> None:
        if len(received.body) > MAX_PUBLISH_BYTES:
            raise ProtocolError(f"a PUBLISH of {len(received.body)} bytes")
        message = packets.parse_publish(received)
        if message.topic.startswith("$iothub/twin/"):
            await self._twin(message)
        else:
            self._broker.telemetry(message)
        if message.qos and not self._broker.faults.swallow_pubacks:
            await self._send(packets.packet(packets.PUBACK, struct.pack(">H", message.packet_id)))

    async def _subscribe(self, received: Packet) -> None:
        assert self._session is not None
        subscribing = received.kind == packets.SUBSCRIBE
        packet_id, filters = packets.parse_filters(received.body, with_qos=subscribing)
        number = struct.pack(">H", packet_id)
        if subscribing:
            self._session.subscriptions |= set(filters)
            await self._send(packets.packet(packets.SUBACK, number + b"\x01" * len(filters)))
        else:
            self._session.subscriptions -= set(filters)
            await self._send(packets.packet(packets.UNSUBACK, number))

    async def _twin(self, message: Publish) -> None:
        assert self._session is not None
        parts = urlsplit(message.topic.removeprefix("$iothub/twin/"))
        request = parse_qs(parts.query).get("$rid", [""])[0]
        if parts.path == "GET/":
            answer, body = f"200/?$rid={request}", self._broker.twin.document()
        elif parts.path == "PATCH/properties/reported/":
            version = self._broker.twin.report(json.loads(message.payload))
            answer, body = f"204/?$rid={request}&$version={version}", b""
        else:
            raise ProtocolError(f"no such twin request: {message.topic}")
        # Only who has subscribed hears the answer: a lost session makes a silent twin.
        if "$iothub/twin/res/#" in self._session.subscriptions:
            topic = f"$iothub/twin/res/{answer}"
            await self._send(packets.publish(topic, body, self._session.next_packet_id()))

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()
