"""The messages that wait for the hub, in memory: bounded, in order, oldest detections dropped first."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from visionedge.outbound.messages import EVENTS, Message


class MessageQueue(Protocol):
    """Where messages wait for their acknowledgement: a `MemoryQueue` in memory, or a `Spool` on disk.

    The first message stays inside until `settle`: it is never lost by being taken out. The hub client holds
    its own lock around every call.
    """

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, outside of locks, whenever `first` may have something new by itself."""

    def put(self, message: Message) -> None:
        """Append a message."""

    def first(self) -> Message | None:
        """The message to send next; it stays inside."""

    def settle(self, message: Message, *, dropped: str | None = None) -> None:
        """Take out the first message: it was acknowledged, or given up for the reason `dropped`."""

    def drop_unsaved(self) -> int:
        """The client ends: drop what cannot be kept for the next start; how many messages that were."""

    def __len__(self) -> int: ...

    @property
    def bytes(self) -> int:
        """The bytes of all that waits."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Messages that were never sent, by reason."""


class MemoryQueue:
    """A queue of messages bounded by count and bytes. No lock of its own: its owner holds one.

    What is dropped first is the oldest message that is no event; events go only when nothing else is left,
    and the message that was handed out is not dropped for others.
    """

    def __init__(self, limit: int = 2_000, limit_bytes: int = 32_000_000) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._messages: deque[Message] = deque()
        self._dropped: Counter[str] = Counter()
        self._in_flight: Message | None = None
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<Backlog waiting={len(self)} bytes={self._bytes} dropped={dict(self._dropped)}>"

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def bytes(self) -> int:
        """The bytes of all that waits."""
        return self._bytes

    @property
    def dropped(self) -> Mapping[str, int]:
        """Messages that were never sent, by reason: `full`, `refused`, `closed`."""
        return MappingProxyType(dict(self._dropped))

    def attach(self, wake: Callable[[], None]) -> None:
        """Nothing comes by itself here: only `put` brings something new."""

    def put(self, message: Message) -> None:
        """Append a message; what no longer fits is dropped, counted `full`."""
        self._messages.append(message)
        self._bytes += message.size_bytes
        while len(self._messages) > self._limit or self._bytes > self._limit_bytes:
            index_to_drop = self._find_droppable()
            if index_to_drop is None:
                break
            self._remove(index_to_drop)
            self._dropped["full"] += 1

    def first(self) -> Message | None:
        """The message to send next; it stays inside."""
        self._in_flight = self._messages[0] if self._messages else None
        return self._in_flight

    def settle(self, message: Message, *, dropped: str | None = None) -> None:
        """Take out the first message: it was acknowledged, or given up for the reason `dropped`.

        It may be gone already, after `abandon`.
        """
        if self._messages and self._messages[0] is message:
            self._remove(0)
            if dropped:
                self._dropped[dropped] += 1

    def drop_unsaved(self) -> int:
        """Drop all that is left, counted `closed`; how many that were."""
        left = len(self._messages)
        self._messages.clear()
        self._bytes = 0
        if left:
            self._dropped["closed"] += left
        return left

    def _find_droppable(self) -> int | None:
        """The place of the message to drop first; None when only the one in flight is left."""
        free = [i for i, message in enumerate(self._messages) if message is not self._in_flight]
        return next((i for i in free if self._messages[i].output != EVENTS), free[0] if free else None)

    def _remove(self, index: int) -> None:
        self._bytes -= self._messages[index].size_bytes
        del self._messages[index]
