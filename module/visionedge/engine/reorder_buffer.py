"""Puts the results of one camera back into the order of its frames.

Lanes compute several frames of a camera at the same time, and a later frame may be computed first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from visionedge.frames.types import Frame, FrameResult

_SPARE_RESULTS = 8
"""So many more results than frames in computation may wait for an earlier one: a lane that hangs must not
make the other lanes fill the memory with pictures."""


@dataclass(slots=True)
class _Entry:
    frame: Frame
    result: FrameResult | None = None
    ready_ns: int = 0


class ReorderBuffer:
    """The frames of one camera in flight: in computation, waiting for an earlier one, or being delivered.

    `add` a frame when a lane takes it; then call either `complete` or `remove` for it, once. `release` gives
    the results whose turn it is; it gives no more until `confirm`, so that one thread at a time delivers.
    Frames must be added by rising sequence. Not thread-safe.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by sequence
        self._overtaken: dict[int, Frame] = {}
        self._released: list[FrameResult] = []
        self._early = 0

    def __len__(self) -> int:
        """The number of frames in flight."""
        return len(self._entries) + len(self._overtaken) + len(self._released)

    def __repr__(self) -> str:
        return f"<ReorderBuffer in_flight={len(self)} early={self._early} overtaken={len(self._overtaken)}>"

    @property
    def early(self) -> int:
        """The number of results that wait."""
        return self._early

    @property
    def has_room(self) -> bool:
        """Whether another frame may be added."""
        return self._early < len(self._entries) - self._early + _SPARE_RESULTS

    @property
    def waiting_since_ns(self) -> int | None:
        """The time since which the longest-waiting result has waited; None without one.

        Also None until `confirm` if results are being delivered.
        """
        if not self._early or self._released:
            return None
        return min(entry.ready_ns for entry in self._entries.values() if entry.result is not None)

    def frames(self) -> Iterator[Frame]:
        """All frames in flight."""
        yield from self._overtaken.values()
        yield from (result.frame for result in self._released)
        yield from (entry.frame for entry in self._entries.values())

    def add(self, frame: Frame) -> None:
        """A lane has taken a frame."""
        self._entries[frame.sequence] = _Entry(frame)

    def complete(self, result: FrameResult, now_ns: int) -> bool:
        """Keep a result until its turn; False: a later one was released, so it must not be delivered."""
        sequence = result.frame.sequence
        if self._overtaken.pop(sequence, None) is not None:
            return False
        entry = self._entries[sequence]
        entry.result, entry.ready_ns = result, now_ns
        self._early += 1
        return True

    def remove(self, frame: Frame) -> None:
        """A frame gets no result: those behind it do not wait for it."""
        if self._overtaken.pop(frame.sequence, None) is None:
            del self._entries[frame.sequence]

    def release(self, now_ns: int, max_wait_ns: int) -> list[FrameResult]:
        """Return the results to be delivered now, in order; `confirm` when they are delivered.

        A result that has waited for `max_wait_ns` overtakes the frames before it. The time that a result has
        waited is part of its total time.
        """
        if self._released or not self._early:
            return []
        due = {
            sequence
            for sequence, entry in self._entries.items()
            if entry.result is not None and now_ns - entry.ready_ns >= max_wait_ns
        }
        last_due = max(due, default=-1)
        for sequence, entry in list(self._entries.items()):
            if entry.result is not None:
                self._released.append(_add_wait(entry.result, now_ns - entry.ready_ns))
                self._early -= 1
            elif sequence < last_due:
                self._overtaken[sequence] = entry.frame
            else:
                break
            del self._entries[sequence]
        return list(self._released)

    def confirm(self) -> None:
        """The results that were released are delivered, or lost."""
        self._released.clear()


def _add_wait(result: FrameResult, waited_ns: int) -> FrameResult:
    if waited_ns <= 0:
        return result
    timing = replace(result.timing, total_ns=result.timing.total_ns + waited_ns)
    return replace(result, timing=timing)
