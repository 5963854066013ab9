"""The session of a client, which outlives its connections: subscriptions, and messages to its inputs."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_runtime import packets

if TYPE_CHECKING:
    from edge_runtime.connection import Connection

_RESENDS = 2
"""How often edgeHub sends an unacknowledged message again (MaxOutboundRetransmissionCount)."""


@dataclass(slots=True)
class OutgoingMessage:
    """A message to the module that is not acknowledged."""

    topic: str
    body: bytes
    packet_id: int = 0
    sent: int = 0


@dataclass(slots=True)
class Session:
    """The session of a client; `queue` has the waiting messages, in order."""

    subscriptions: set[str] = field(default_factory=set)
    connection: "Connection | None" = None
    queue: deque[OutgoingMessage] = field(default_factory=deque)
    packet_id: int = 0

    def next_packet_id(self) -> int:
        """The next packet id: 1 to 65535, then 1 again."""
        self.packet_id = self.packet_id % 65_535 + 1
        return self.packet_id

    def subscribed(self, topic: str) -> bool:
        """Whether one of the filters matches a topic."""
        return any(matches(known, topic) for known in self.subscriptions)

    def acknowledged(self, packet_id: int) -> None:
        """The client has acknowledged a message."""
        self.queue = deque(message for message in self.queue if message.packet_id != packet_id)

    def due(self, *, again: bool) -> list[bytes]:
        """The packets to send now: new messages, and with `again` unacknowledged ones as duplicates."""
        ready = []
        for message in list(self.queue):
            if message.sent and not again:
                continue
            if message.sent > _RESENDS:
                self.queue.remove(message)
                continue
            message.packet_id = message.packet_id or self.next_packet_id()
            ready.append(
                packets.publish(message.topic, message.body, message.packet_id, dup=message.sent > 0)
            )
            message.sent += 1
        return ready


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic filter with ``+`` and ``#`` matches a topic."""
    wanted, given = pattern.split("/"), topic.split("/")
    for place, level in enumerate(wanted):
        if level == "#":
            return True
        if place >= len(given) or level not in ("+", given[place]):
            return False
    return len(wanted) == len(given)
