"""How long the module waits for the reply to a batch before it takes the engine's process for hung.

About ten times what a batch usually takes. Time in which this process did not run either (because it was
stopped, or the machine was) does not count.
"""

import select
import socket
import time
from collections.abc import Callable

MIN_LIMIT_S = 2.0
"""A busy machine may keep a healthy process from its work for this long."""

_USUAL_FACTOR = 10
_DECAY = 0.98  # per batch: after a hundred batches a long one counts for an eighth
_MIN_BATCHES = 5
_SLICE_S = 0.25
_MAX_SLICE_S = 2 * _SLICE_S

Readable = Callable[[socket.socket, float], bool]
"""Waits until a socket has data, for at most so many seconds; False after that."""


class AdaptiveTimeout:
    """The longest recent batch of one process, and the limit that follows from it.

    Any thread may call. There is no lock: a batch that is not counted does no harm.
    """

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._count = 0
        self._usual_s = 0.0

    def __repr__(self) -> str:
        return f"<AdaptiveTimeout usual={self._usual_s:.3f} s limit={self.limit_s:.3g} s>"

    def note(self, took_s: float) -> None:
        """Count a batch that was answered after this time, including its wait for a free lane."""
        self._count += 1
        self._usual_s = max(took_s, self._usual_s * _DECAY)

    @property
    def limit_s(self) -> float:
        """How long the next batch may take."""
        if self._count < _MIN_BATCHES:
            return self._max_s
        return min(self._max_s, max(MIN_LIMIT_S, _USUAL_FACTOR * self._usual_s))


def wait_for_reply(
    channel: socket.socket,
    limit_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    readable: Readable | None = None,
) -> None:
    """Wait until a reply begins to arrive, or the other end is closed.

    Raises:
        TimeoutError: nothing arrived within the limit, during which this process ran all the time.
    """
    ready = readable or _readable
    waited_s, before_s = 0.0, clock()
    while not ready(channel, min(_SLICE_S, max(0.0, limit_s - waited_s))):
        now_s = clock()
        # A slice that took much longer is one in which this process did not run.
        waited_s += min(now_s - before_s, _MAX_SLICE_S)
        before_s = now_s
        if waited_s >= limit_s:
            raise TimeoutError(f"no reply within {limit_s:g} s")


def _readable(channel: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
