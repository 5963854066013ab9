"""The door from the threads to the asyncio loop: results and events go out here, and nowhere else."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """A bounded queue that wakes its reader once each time it turns non-empty.

    Any thread may `put` (it never blocks); one reader calls `drain`. When it is full the oldest item goes
    first and is counted in `dropped`. `wake` is called outside the lock; a service gives
    ``lambda: loop.call_soon_threadsafe(…)``.
    """

    def __init__(self, wake: Callable[[], None], limit: int = 1024) -> None:
        self._wake = wake
        self._limit = limit
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self.dropped = 0

    def __repr__(self) -> str:
        return f"<Outbox waiting={len(self._items)} limit={self._limit} dropped={self.dropped}>"

    def put(self, item: T) -> None:
        """Hand an item over; called by lanes, cameras and hub threads."""
        with self._lock:
            turned = not self._items
            if len(self._items) >= self._limit:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
        if turned:
            self._wake()

    def drain(self) -> list[T]:
        """All items, oldest first; the box is empty afterwards."""
        with self._lock:
            items = list(self._items)
            self._items.clear()
        return items
