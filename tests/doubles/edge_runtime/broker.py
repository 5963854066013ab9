"""edgeHub as a module sees it over MQTT: authentication, sessions, messages, twin and methods."""

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from edge_runtime import packets
from edge_runtime.account import Account, Faults, ReceivedMessage
from edge_runtime.connection import MAX_PUBLISH_BYTES, Connection
from edge_runtime.packets import Connect, ProtocolError, Publish
from edge_runtime.session import OutgoingMessage, Session
from edge_runtime.twin import RefusedError, Twin

__all__ = ["MAX_PUBLISH_BYTES", "PORT", "Account", "Broker", "Faults", "MethodAnswer", "ReceivedMessage"]

PORT = 8883
"""The SDK always uses this port."""

MAX_METHOD_BYTES = 128 * 1024
_TWIN_ANSWERS = "$iothub/twin/res/"


@dataclass(frozen=True, slots=True)
class MethodAnswer:
    """The result of a direct method; 404: the module is not subscribed, 504: no answer in time."""

    status: int
    payload: Any


class Broker:
    """Listens on one loopback address; everything runs on one asyncio loop.

    `on_message` is called with each telemetry message before its acknowledgement; `on_change` when a client
    connects, subscribes or disconnects, and when the twin changes.
    """

    def __init__(
        self,
        account: Account,
        faults: Faults,
        on_message: Callable[[ReceivedMessage], None],
        on_change: Callable[[], None],
    ) -> None:
        self.account = account
        self.faults = faults
        self.twin = Twin()
        self.sessions: dict[str, Session] = {}
        self.refusals: list[str] = []
        self.attempts = 0
        self.connects = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._on_message = on_message
        self.changed = on_change
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._methods: dict[str, asyncio.Future[MethodAnswer]] = {}

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
        """Reset all connections and stop listening; sessions stay, as in edgeHub."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.cut()
        if self._connections:
            await asyncio.wait([connection.task for connection in self._connections])
        if server is not None:
            await server.wait_closed()

    def cut(self) -> None:
        """Reset all connections."""
        for connection in list(self._connections):
            connection.cut()

    def lose_sessions(self) -> None:
        """Delete the subscriptions of all clients; their connections stay."""
        for session in self.sessions.values():
            session.subscriptions.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(self, reader, writer, task)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    # --- from the client ------------------------------------------------------------------------------------

    def authenticate(self, connect: Connect) -> int:
        """The CONNACK code for a CONNECT."""
        self.attempts += 1
        self.changed()
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
        if (problem := self.account.token_problem(connect.password)) is not None:
            self.refusals.append(f"token: {problem}")
            return packets.NOT_AUTHORIZED
        return packets.ACCEPTED

    def telemetry(self, message: Publish) -> None:
        """Record a telemetry message.

        Raises:
            ProtocolError: the topic is not this module's.
        """
        prefix = f"{self.account.topic}/messages/events/"
        if not message.topic.startswith(prefix):
            raise ProtocolError(f"no right to publish to {message.topic}")
        pairs = (pair.partition("=") for pair in message.topic[len(prefix) :].split("&") if pair)
        properties = {unquote(name): unquote(value) for name, _, value in pairs}
        self._on_message(
            ReceivedMessage(
                output=properties.pop("$.on", ""),
                body=message.payload,
                message_id=properties.pop("$.mid", ""),
                content_type=properties.pop("$.ct", ""),
                content_encoding=properties.pop("$.ce", ""),
                correlation_id=properties.pop("$.cid", ""),
                properties=properties,
                topic=message.topic,
                qos=message.qos,
                dup=message.dup,
                received_ns=time.monotonic_ns(),
            )
        )

    def ask_twin(self, message: Publish) -> tuple[str, bytes] | None:
        """Topic and body of the answer to a twin request; None while the twin is silent.

        Raises:
            ProtocolError: there is no such request.
        """
        parts = urlsplit(message.topic.removeprefix("$iothub/twin/"))
        request = parse_qs(parts.query).get("$rid", [""])[0]
        if self.faults.silent_twin:
            return None
        if self.faults.twin_status is not None:
            return f"{_TWIN_ANSWERS}{self.faults.twin_status}/?$rid={request}", b""
        if parts.path == "GET/":
            return f"{_TWIN_ANSWERS}200/?$rid={request}", self.twin.document()
        if parts.path != "PATCH/properties/reported/":
            raise ProtocolError(f"no such twin request: {message.topic}")
        try:
            version = self.twin.report(message.payload)
        except RefusedError as error:
            self.refusals.append(f"reported properties: {error}")
            return f"{_TWIN_ANSWERS}400/?$rid={request}", b""
        self.changed()
        return f"{_TWIN_ANSWERS}204/?$rid={request}&$version={version}", b""

    def method_answered(self, message: Publish) -> None:
        """The module answers a direct method."""
        parts = urlsplit(message.topic.removeprefix("$iothub/methods/res/"))
        waiting = self._methods.pop(parse_qs(parts.query).get("$rid", [""])[0], None)
        if waiting is None or waiting.done():
            self.refusals.append(f"an answer to no method: {message.topic}")
            return
        status = int(parts.path.strip("/"))
        if len(message.payload) > MAX_METHOD_BYTES:
            self.refusals.append(f"a method's answer of {len(message.payload)} bytes")
            waiting.set_result(MethodAnswer(500, None))
            return
        waiting.set_result(MethodAnswer(status, json.loads(message.payload or b"null")))

    # --- from the cloud -------------------------------------------------------------------------------------

    async def desire(self, patch: dict[str, Any]) -> int:
        """Change desired properties and notify the module if it is subscribed; returns the new version."""
        body = self.twin.desire(patch)
        version = self.twin.desired_version
        await self._publish(f"$iothub/twin/PATCH/properties/desired/?$version={version}", body)
        return version

    async def invoke(self, name: str, payload: Any, timeout_s: float) -> MethodAnswer:
        """Call a direct method; calls are not queued."""
        request = uuid.uuid4().hex
        waiting: asyncio.Future[MethodAnswer] = asyncio.get_running_loop().create_future()
        self._methods[request] = waiting
        body = json.dumps(payload).encode()
        if not await self._publish(f"$iothub/methods/POST/{name}/?$rid={request}", body):
            del self._methods[request]
            return MethodAnswer(404, None)
        try:
            return await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            self._methods.pop(request, None)
            return MethodAnswer(504, None)

    async def input(self, name: str, body: bytes, properties: dict[str, str]) -> None:
        """Send a message from another module to an input; it waits while the module is not connected."""
        bag = {"$.cdid": self.account.device, "$.cmid": "other", **properties}
        text = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in bag.items())
        session = self.sessions.setdefault(self.account.client_id, Session())
        session.queue.append(OutgoingMessage(f"{self.account.topic}/inputs/{name}/{text}", body))
        if session.connection is not None:
            await session.connection.deliver(again=False)

    async def _publish(self, topic: str, body: bytes) -> bool:
        """Send with QoS 0 to the module if it is connected and subscribed; returns whether it is."""
        session = self.sessions.get(self.account.client_id)
        if session is None or session.connection is None or not session.subscribed(topic):
            return False
        await session.connection.send(packets.publish(topic, body, 0))
        return True
