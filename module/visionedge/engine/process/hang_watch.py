"""How long the answer to a batch is waited for before its process counts as hung.

About ten times what batches usually take. Time in which this process did not run either (it was stopped, or
the machine was) is not the child's.
"""

import select
import socket
import time
from collections.abc import Callable

LEAST_S = 2.0
"""A busy machine may keep a healthy process from its work for this long."""

_TIMES = 10
_FADES = 0.98
_KNOWN_AFTER = 5
_SLICE_S = 0.25
_MOST_OF_A_SLICE_S = 2 * _SLICE_S

Readable = Callable[[socket.socket, float], bool]


class UsualTime:
    """What a batch usually takes, from the batches of one process: the longest of the last hundred or so.

    Any thread may call; a note that is lost in between does no harm.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._count = 0
        self._usual_s = 0.0

    def __repr__(self) -> str:
        return f"<UsualTime {self._usual_s:.3f} s limit={self.limit_s:.3g} s>"

    def note(self, took_s: float) -> None:
        """A batch was answered after this time, its wait for a free lane included."""
        self._count += 1
        self._usual_s = max(took_s, self._usual_s * _FADES)

    @property
    def limit_s(self) -> float:
        """How long the next batch may take."""
        if self._count < _KNOWN_AFTER:
            return self._most_s
        return min(self._most_s, max(LEAST_S, _TIMES * self._usual_s))


def await_reply(
    line: socket.socket,
    limit_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    readable: Readable | None = None,
) -> None:
    """Wait until a reply begins to arrive, or the other end is gone.

    Raises:
        TimeoutError: nothing came within the limit, in which this process ran all the time.
    """
    ready = readable or _readable
    waited_s, before_s = 0.0, clock()
    while not ready(line, min(_SLICE_S, max(0.0, limit_s - waited_s))):
        now_s = clock()
        # A slice that took much longer is one in which nobody ran.
        waited_s += min(now_s - before_s, _MOST_OF_A_SLICE_S)
        before_s = now_s
        if waited_s >= limit_s:
            raise TimeoutError(f"no reply within {limit_s:g} s")


def _readable(line: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(line, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
