"""Time, decided purely: when a picture is due, when it is shown, how long to wait before the next try."""

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from visionedge.camera.motion_gate import GateSettings, MotionGate
from visionedge.frames.types import Picture

_FALLBACK_FPS = 25.0
_MAX_FPS = 1000.0
_MIN_GAP_S = 1e-6
_MAX_GAP_S = 10.0
_RATE_WINDOW_NS = 5_000_000_000
_MAX_LATE_NS = 2_000_000_000


def plausible_fps(fps: float) -> float:
    """The rate that a file claims, or 25 where that cannot be."""
    return fps if math.isfinite(fps) and 0 < fps <= _MAX_FPS else _FALLBACK_FPS


class Timeline:
    """Media times that always rise, whatever a file's own say (missing, falling, leaping)."""

    def __init__(self, fps: float) -> None:
        self._step_s = 1.0 / plausible_fps(fps)
        self._raw_s: float | None = None
        self._position_s = 0.0

    def advance(self, raw_s: float) -> float:
        """The position of the next picture, in s, from what its own time stamp says."""
        if not math.isfinite(raw_s):
            raw_s = -1.0
        if self._raw_s is not None:
            gap_s = raw_s - self._raw_s
            self._position_s += gap_s if _MIN_GAP_S <= gap_s <= _MAX_GAP_S else self._step_s
        self._raw_s = raw_s
        return self._position_s


class FrameSampler:
    """Which pictures to hand on for `fps` per second (None: all): without drift, at even distances."""

    def __init__(self, fps: float | None) -> None:
        self._interval_s = None if fps is None else 1.0 / fps
        self._taken_s: float | None = None
        self._next_s: float | None = None
        self._last_s: float | None = None

    def change(self, fps: float | None) -> None:
        """Go on at another rate, at its distance from the last picture that was due."""
        self._interval_s = None if fps is None else 1.0 / fps
        if self._interval_s is not None and self._taken_s is not None:
            self._next_s = self._taken_s + self._interval_s

    def take(self, at_s: float) -> bool:
        """Whether the picture of this moment is due; the moments rise."""
        if self._interval_s is None:
            self._taken_s = at_s
            return True
        if self._next_s is None:
            self._next_s = at_s
        # A quarter of the interval is allowed for: a camera that is asked for its own rate jitters around it.
        if at_s < self._next_s - self._interval_s / 4:
            return False
        self._taken_s = at_s
        self._next_s += self._interval_s
        if self._next_s <= at_s:  # after a gap, what was missed is not made up for
            self._next_s = at_s + self._interval_s
        return True

    def count(self, at_s: float, pictures: int) -> int:
        """How many pictures were due, of so many that came at even distances since the last one counted."""
        last_s, self._last_s = self._last_s, at_s
        if pictures <= 1 or last_s is None:
            return int(self.take(at_s))
        step_s = (at_s - last_s) / pictures
        return sum(self.take(last_s + step_s * (number + 1)) for number in range(pictures))


class PlaybackClock:
    """Plays media times on the monotonic clock. A late picture is due at once; lateness never adds up.

    What is late by more than two seconds is not caught up with: after a halted machine goes on, or where
    decoding takes longer than playing, the pictures go on at their own rate from there.
    """

    def __init__(self, position_s: float, now_ns: int) -> None:
        self._offset_ns = now_ns - round(position_s * 1e9)

    def delay_s(self, position_s: float, now_ns: int) -> float:
        """How long until the picture is due, in s; 0 where it is late."""
        early_ns = round(position_s * 1e9) + self._offset_ns - now_ns
        if early_ns < -_MAX_LATE_NS:
            self._offset_ns -= early_ns
        return max(0, early_ns) / 1e9


class ReconnectBackoff:
    """Waits between tries: doubled from 1 s to 30 s, each shortened by up to a quarter at random.

    The jitter keeps many cameras behind one switch from coming back in the same moment.
    """

    def __init__(
        self,
        *,
        first_s: float = 1.0,
        limit_s: float = 30.0,
        random_fraction: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._limit_s = limit_s
        self._random_fraction = random_fraction
        self._base_s = first_s

    def next_s(self) -> float:
        """How long to wait now, in s."""
        base_s, self._base_s = self._base_s, min(self._limit_s, self._base_s * 2)
        return base_s * (1 - 0.25 * self._random_fraction())

    def reset(self) -> None:
        """Begin with short waits again."""
        self._base_s = self._first_s


class FrameRate:
    """Pictures per second over the last 5 s."""

    def __init__(self) -> None:
        # 200 per second and more are averaged over fewer seconds.
        self._came: deque[tuple[int, int]] = deque(maxlen=1000)

    def add(self, now_ns: int, count: int = 1) -> None:
        """So many pictures came since the last time."""
        self._came.append((now_ns, count))

    def per_s(self, now_ns: int) -> float:
        """The rate now: falls as soon as a picture is overdue."""
        # A copy first: the camera's thread may add while another one asks.
        recent = [came for came in tuple(self._came) if now_ns - came[0] <= _RATE_WINDOW_NS]
        if len(recent) < 2:
            return 0.0
        times_ns = [time_ns for time_ns, _ in recent]
        longest_ns = max(later - earlier for earlier, later in pairwise(times_ns))
        span_ns = max(times_ns[-1] - times_ns[0], now_ns - times_ns[0] - longest_ns)
        return sum(count for _, count in recent[1:]) / (span_ns / 1e9) if span_ns > 0 else 0.0


# What of a camera's pictures is handed on: what it was asked for, or less while a throttle is on.
#
# What the configuration asks for is counted beside what a throttle lets in, also over pictures that need not
# even be decoded then: otherwise a camera that is throttled would seem to be asked for no more.


@dataclass(frozen=True, slots=True)
class Throttle:
    """For a while: so many pictures per second at most, a gate where there is none."""

    fps: float | None = None
    gate: GateSettings | None = None


UNTHROTTLED = Throttle()


@dataclass(slots=True)
class AdmissionCounts:
    """Pictures of a camera: that the configuration asks for, and of those the ones that a throttle lets in.

    Neither counts what a gate of the configuration holds back. Written by the camera's own thread alone.
    """

    demanded: int = 0
    admitted: int = 0


class FrameAdmission:
    """Decides picture by picture, for one connection; belongs to the camera's thread.

    Args:
        fps: so many pictures per second are asked for; None: all.
        gate: only those on which something moves are.
        counts: goes on from connection to connection.
    """

    def __init__(self, fps: float | None, gate: GateSettings | None, counts: AdmissionCounts) -> None:
        self._fps, self._own_gate = fps, gate
        self._counts = counts
        self._throttle = UNTHROTTLED
        self._asked, self._due = FrameSampler(fps), FrameSampler(fps)
        self._gate = None if gate is None else MotionGate(gate)
        self._moves = True

    def __repr__(self) -> str:
        return f"<Ration fps={self.fps} {self._gate!r}>"

    @property
    def fps(self) -> float | None:
        """How many pictures per second are handed on now; None: all."""
        rates = [rate for rate in (self._fps, self._throttle.fps) if rate is not None]
        return min(rates, default=None)

    def set_throttle(self, throttle: Throttle) -> bool:
        """Keep to this throttle from now on; whether that changes how many pictures are wanted."""
        if throttle is self._throttle:
            return False
        before, self._throttle = (self.fps, self._throttle), throttle
        self._due.change(self.fps)
        if self._own_gate is None and throttle.gate != before[1].gate:
            self._gate = None if throttle.gate is None else MotionGate(throttle.gate)
            self._moves = True
        return self.fps != before[0]

    def take(self, at_s: float, source_frames: int) -> bool:
        """Whether the picture of this moment is to be handed on; it stands for `covers` of the source's."""
        demanded, due = self._asked.count(at_s, source_frames), self._due.count(at_s, source_frames)
        # What was not looked at would have been as still as what was.
        self._counts.demanded += demanded if self._moves or self._own_gate is None else 0
        self._counts.admitted += due if self._moves else 0
        return due > 0

    def passes(self, picture: Picture, now_ns: int) -> bool:
        """Whether something moves on a picture that is due, as far as a gate asks for that."""
        if self._gate is not None:
            self._moves = self._gate.passes(picture, now_ns)
        return self._moves
