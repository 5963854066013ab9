"""One client's connection to the double of edgeHub, with faults."""

import asyncio
import contextlib
import ssl
import struct
from typing import TYPE_CHECKING

from edge_runtime import packets
from edge_runtime.account import token_left_s
from edge_runtime.packets import Connect, Packet, ProtocolError
from edge_runtime.session import Session

if TYPE_CHECKING:
    from edge_runtime.broker import Broker

MAX_PUBLISH_BYTES = 262_144
"""edgeHub closes the connection on a larger PUBLISH, topic included."""


class Connection:
    """One client's connection."""

    def __init__(
        self,
        broker: "Broker",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        self.task = task
        self._broker = broker
        self._reader = reader
        self._writer = writer
        self._session: Session | None = None
        self._silence_s: float | None = None

    def cut(self) -> None:
        """Reset the connection."""
        self._writer.transport.abort()

    async def serve(self) -> None:
        """Answer packets until either side ends the connection."""
        try:
            if await self._connect():
                await self.deliver(again=True)
                while await self._handle(await self._read()):
                    pass
        except ProtocolError as error:
            self._broker.refusals.append(str(error))
        except (asyncio.IncompleteReadError, TimeoutError, OSError, ssl.SSLError):
            pass  # the client has disconnected, or was silent for too long
        finally:
            if self._session is not None and self._session.connection is self:
                self._session.connection = None
                self._broker.changed()
            self._writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await self._writer.wait_closed()

    async def deliver(self, *, again: bool) -> None:
        """Send the waiting messages to the module's inputs."""
        assert self._session is not None
        topic = f"{self._broker.account.topic}/inputs/any/"
        if self._session.subscribed(topic):
            for data in self._session.due(again=again):
                await self.send(data)

    async def send(self, data: bytes) -> None:
        """Write a packet, unless the connection is half-open."""
        if self._broker.faults.swallow:
            return
        self._writer.write(data)
        await self._writer.drain()

    async def _read(self) -> Packet:
        """Read the next packet, when the hub does not hang. Fails if the client is silent for too long."""
        async with asyncio.timeout(self._silence_s):
            packet = await packets.read_packet(self._reader, self._should_reset)
        await self._broker.flowing.wait()
        return packet

    def _should_reset(self, kind: int) -> bool:
        """Whether to reset the connection in the middle of this packet."""
        if kind != packets.PUBLISH or self._broker.faults.reset_publishes <= 0:
            return False
        self._broker.faults.reset_publishes -= 1
        self.cut()
        return True

    async def _connect(self) -> bool:
        first = await self._read()
        if first.kind != packets.CONNECT:
            raise ProtocolError("the first packet is not a CONNECT")
        connect = packets.parse_connect(first.body)
        code = self._broker.authenticate(connect)
        if self._broker.faults.swallow_connacks:
            await self._reader.read()
            return False
        if code != packets.ACCEPTED:
            await self.send(packets.packet(packets.CONNACK, bytes([0, code])))
            return False
        session, known = self._find_session(connect)
        await self.send(packets.packet(packets.CONNACK, bytes([known, code])))
        self._broker.connects += 1
        # A second connection with the same client id ends the first one, as MQTT requires.
        if session.connection is not None:
            session.connection.cut()
        session.connection = self
        self._session = session
        self._silence_s = connect.keep_alive_s * 1.5 or None
        # edgeHub ends a connection when its token expires.
        asyncio.get_running_loop().call_later(token_left_s(connect.password), self.cut)
        return True

    def _find_session(self, connect: Connect) -> tuple[Session, bool]:
        """The client's session, and whether it existed before."""
        sessions = self._broker.sessions
        if connect.clean_session or self._broker.faults.forget_sessions:
            old = sessions.pop(connect.client_id, None)
            if old is not None and old.connection is not None:
                old.connection.cut()
        known = connect.client_id in sessions
        return sessions.setdefault(connect.client_id, Session()), known

    async def _handle(self, received: Packet) -> bool:
        """Answer one packet; False ends the connection."""
        if self._broker.faults.swallow:
            return True
        match received.kind:
            case packets.PUBLISH:
                await self._published(received)
            case packets.SUBSCRIBE | packets.UNSUBSCRIBE:
                await self._subscribe(received)
            case packets.PINGREQ:
                await self.send(packets.packet(packets.PINGRESP))
            case packets.PUBACK:
                assert self._session is not None
                self._session.acknowledged(packets.parse_packet_id(received.body))
            case packets.DISCONNECT:
                return False
            case _:
                raise ProtocolError(f"packet type {received.kind}")
        return True

    async def _published(self, received: Packet) -> None:
        if len(received.body) > MAX_PUBLISH_BYTES:
            raise ProtocolError(f"a PUBLISH of {len(received.body)} bytes")
        message = packets.parse_publish(received)
        faults = self._broker.faults
        if message.topic.startswith("$iothub/twin/"):
            await self._answer(self._broker.ask_twin(message))
        elif message.topic.startswith("$iothub/methods/res/"):
            self._broker.method_answered(message)
        else:
            self._broker.telemetry(message)
            if faults.reset_pubacks > 0:
                faults.reset_pubacks -= 1
                self.cut()
        if message.qos and not faults.swallow_pubacks:
            if faults.puback_delay_s:
                await asyncio.sleep(faults.puback_delay_s)
            await self.send(packets.packet(packets.PUBACK, struct.pack(">H", message.packet_id)))

    async def _answer(self, answer: tuple[str, bytes] | None) -> None:
        """The twin answers only subscribed clients, so it is silent after a lost session."""
        assert self._session is not None
        if answer is not None and self._session.subscribed(answer[0]):
            await self.send(packets.publish(*answer, self._session.next_packet_id()))

    async def _subscribe(self, received: Packet) -> None:
        assert self._session is not None
        subscribing = received.kind == packets.SUBSCRIBE
        packet_id, filters = packets.parse_filters(received.body, with_qos=subscribing)
        number = struct.pack(">H", packet_id)
        if not subscribing:
            self._session.subscriptions -= set(filters)
            await self.send(packets.packet(packets.UNSUBACK, number))
            return
        if self._broker.faults.swallow_subacks:
            return
        self._session.subscriptions |= set(filters)
        self._broker.changed()
        await self.send(packets.packet(packets.SUBACK, number + b"\x01" * len(filters)))
        await self.deliver(again=False)
