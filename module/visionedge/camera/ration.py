"""What of a camera's pictures is handed on: what it was asked for, or less while a throttle is on.

What the configuration asks for is counted beside what a throttle lets in, also over pictures that need not
even be decoded then: otherwise a camera that is throttled would seem to be asked for no more.
"""

from dataclasses import dataclass

from visionedge.camera.motion_gate import GateSettings, MotionGate
from visionedge.camera.timing import Due
from visionedge.frames.types import Picture


@dataclass(frozen=True, slots=True)
class Throttle:
    """For a while: so many pictures per second at most, a gate where there is none."""

    fps: float | None = None
    gate: GateSettings | None = None


UNTHROTTLED = Throttle()


@dataclass(slots=True)
class Counts:
    """Pictures of a camera: that the configuration asks for, and of those the ones that a throttle lets in.

    Neither counts what a gate of the configuration holds back. Written by the camera's own thread alone.
    """

    asked: int = 0
    let_in: int = 0


class Ration:
    """Decides picture by picture, for one connection; belongs to the camera's thread.

    Args:
        fps: so many pictures per second are asked for; None: all.
        gate: only those on which something moves are.
        counts: goes on from connection to connection.
    """

    def __init__(self, fps: float | None, gate: GateSettings | None, counts: Counts) -> None:
        self._fps, self._own_gate = fps, gate
        self._counts = counts
        self._throttle = UNTHROTTLED
        self._asked, self._due = Due(fps), Due(fps)
        self._gate = None if gate is None else MotionGate(gate)
        self._moves = True

    def __repr__(self) -> str:
        return f"<Ration fps={self.fps} {self._gate!r}>"

    @property
    def fps(self) -> float | None:
        """How many pictures per second are handed on now; None: all."""
        rates = [rate for rate in (self._fps, self._throttle.fps) if rate is not None]
        return min(rates, default=None)

    def follow(self, throttle: Throttle) -> bool:
        """Keep to this throttle from now on; whether that changes how many pictures are wanted."""
        if throttle is self._throttle:
            return False
        before, self._throttle = (self.fps, self._throttle), throttle
        self._due.change(self.fps)
        if self._own_gate is None and throttle.gate != before[1].gate:
            self._gate = None if throttle.gate is None else MotionGate(throttle.gate)
            self._moves = True
        return self.fps != before[0]

    def take(self, at_s: float, covers: int) -> bool:
        """Whether the picture of this moment is to be handed on; it stands for `covers` of the source's."""
        asked, due = self._asked.count(at_s, covers), self._due.count(at_s, covers)
        # What was not looked at would have been as still as what was.
        self._counts.asked += asked if self._moves or self._own_gate is None else 0
        self._counts.let_in += due if self._moves else 0
        return due > 0

    def opens(self, picture: Picture, now_ns: int) -> bool:
        """Whether something moves on a picture that is due, as far as a gate asks for that."""
        if self._gate is not None:
            self._moves = self._gate.opens(picture, now_ns)
        return self._moves
