"""Timing of a camera, without I/O: media times, playback, sampling, rate, lag, and admission of frames.

Every class takes the time as an argument, so that tests set it.
"""

import math
from collections import deque
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

_CLOCK_DRIFT = 0.0005
"""Clocks of cameras run fast or slow by up to 0.05 %."""

_MAX_STEP_S = 10.0

_SHARE_FRAMES = 64
"""Frames that are counted before the share of replaced ones is looked at."""

_HIGH_SHARE = 3 / 4
_LOW_SHARE = 1 / 3
"""Below the share that is left of 3/4 when only half of the pictures come: 1/2."""

_SPARSE_INTERVALS = 2.3
"""Two intervals of a source, whose rate is measured, and not three."""


def plausible_fps(fps: float) -> float:
    """Return the rate that a file claims, or 25 if that is impossible."""
    return fps if math.isfinite(fps) and 0 < fps <= _MAX_FPS else _FALLBACK_FPS


class Timeline:
    """Media times that always rise, even if the time stamps of a file are missing, fall or jump."""

    def __init__(self, fps: float) -> None:
        self._step_s = 1.0 / plausible_fps(fps)
        self._raw_s: float | None = None
        self._position_s = 0.0

    def advance(self, raw_s: float) -> float:
        """Return the position of the next picture, in s, from its time stamp (NaN: it has none)."""
        if not math.isfinite(raw_s):
            raw_s = -1.0
        if self._raw_s is not None:
            gap_s = raw_s - self._raw_s
            self._position_s += gap_s if _MIN_GAP_S <= gap_s <= _MAX_GAP_S else self._step_s
        self._raw_s = raw_s
        return self._position_s


class FrameSampler:
    """Selects `fps` pictures per second (None: all), evenly spaced and without drift."""

    def __init__(self, fps: float | None) -> None:
        self._interval_s = None if fps is None else 1.0 / fps
        self._taken_s: float | None = None
        self._next_s: float | None = None
        self._last_s: float | None = None

    def change(self, fps: float | None) -> None:
        """Continue at another rate, one interval after the last picture that was due."""
        self._interval_s = None if fps is None else 1.0 / fps
        if self._interval_s is not None and self._taken_s is not None:
            self._next_s = self._taken_s + self._interval_s

    def is_due(self, at_s: float) -> bool:
        """Whether the picture of this time is due; times rise from call to call."""
        if self._interval_s is None:
            self._taken_s = at_s
            return True
        if self._next_s is None:
            self._next_s = at_s
        # A picture may be early by a quarter of the interval, for the jitter of a camera at its own rate.
        if at_s < self._next_s - self._interval_s / 4:
            return False
        self._taken_s = at_s
        self._next_s += self._interval_s
        if self._next_s <= at_s:  # pictures that were missed in a gap are not replaced
            self._next_s = at_s + self._interval_s
        return True

    def count_due(self, at_s: float, pictures: int) -> int:
        """Return how many pictures were due, of `pictures` evenly spaced ones since the last call."""
        last_s, self._last_s = self._last_s, at_s
        if pictures <= 1 or last_s is None:
            return int(self.is_due(at_s))
        step_s = (at_s - last_s) / pictures
        return sum(self.is_due(last_s + step_s * (number + 1)) for number in range(pictures))


class PlaybackClock:
    """Plays media times on the monotonic clock. A late picture is due at once; delays do not add up.

    After a delay of more than 2 s (a suspended machine, or decoding slower than playing) playback continues
    at its own rate from there, instead of catching up.
    """

    def __init__(self, position_s: float, now_ns: int) -> None:
        self._offset_ns = now_ns - round(position_s * 1e9)

    def delay_s(self, position_s: float, now_ns: int) -> float:
        """Return the time until the picture is due, in s; 0 if it is late."""
        early_ns = round(position_s * 1e9) + self._offset_ns - now_ns
        if early_ns < -_MAX_LATE_NS:
            self._offset_ns -= early_ns
        return max(0, early_ns) / 1e9


class StreamLag:
    """How far a live stream is behind: its time stamps compared with the clock.

    The zero of the time stamps is not known, so the smallest difference so far counts as no delay. It may
    grow by 0.05 % of the time that passes, for the drift of the camera's clock. A read that had to wait for
    its packet proves that no older packet is buffered, so its delay counts as none.
    """

    def __init__(self) -> None:
        self._base_s: float | None = None
        self._sent_s = 0.0
        self._now_s = 0.0
        self._step_s = 0.0

    def __repr__(self) -> str:
        return f"<StreamLag base={self._base_s}>"

    def late_s(self, sent_s: float, now_s: float, waited_s: float) -> float:
        """Return the delay of a packet, in s.

        Args:
            sent_s: the packet's time stamp.
            now_s: the clock when it was read.
            waited_s: how long the read waited for it.
        """
        delay_s = now_s - sent_s
        step_s = sent_s - self._sent_s
        if self._base_s is None or not -1 < step_s < _MAX_STEP_S:
            self._base_s = delay_s
        else:
            if step_s > 0:
                self._step_s += (step_s - self._step_s) / 8
            waited = waited_s > max(0.005, self._step_s / 2)
            drifted_s = self._base_s + _CLOCK_DRIFT * (now_s - self._now_s)
            self._base_s = delay_s if waited else min(delay_s, drifted_s)
        self._sent_s, self._now_s = sent_s, now_s
        return delay_s - self._base_s

    def reset(self) -> None:
        """Count the next packet as in time."""
        self._base_s = None


class FrameRate:
    """Pictures per second over the last 5 s."""

    def __init__(self) -> None:
        # At more than 200 per second, 1000 pictures are fewer than 5 s.
        self._pictures: deque[tuple[int, int]] = deque(maxlen=1000)

    def add(self, now_ns: int, count: int = 1) -> None:
        """Count pictures that came since the last call."""
        self._pictures.append((now_ns, count))

    def per_s(self, now_ns: int) -> float:
        """Return the rate now; it falls as soon as a picture is overdue."""
        # Copied first: the camera's thread may add a picture meanwhile.
        recent = [picture for picture in tuple(self._pictures) if now_ns - picture[0] <= _RATE_WINDOW_NS]
        if len(recent) < 2:
            return 0.0
        times_ns = [time_ns for time_ns, _ in recent]
        longest_ns = max(later - earlier for earlier, later in pairwise(times_ns))
        span_ns = max(times_ns[-1] - times_ns[0], now_ns - times_ns[0] - longest_ns)
        return sum(count for _, count in recent[1:]) / (span_ns / 1e9) if span_ns > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Throttle:
    """A temporary limit: at most `fps` pictures per second, and a motion gate for a camera that has none."""

    fps: float | None = None
    gate: GateSettings | None = None


UNTHROTTLED = Throttle()


@dataclass(slots=True)
class AdmissionCounts:
    """Pictures that the configuration demands, and those of them that a throttle admits.

    Neither counts pictures that a gate of the configuration holds back. Written by the camera's thread only.
    """

    demanded: int = 0
    admitted: int = 0


class ReplacedShare:
    """Whether newer frames replace most frames of a camera before a lane takes them."""

    def __init__(self) -> None:
        self.is_high = False
        self._frames = self._replaced = 0

    def __repr__(self) -> str:
        return f"<ReplacedShare {self._replaced}/{self._frames} high={self.is_high}>"

    def note(self, *, replaced: bool) -> bool:
        """Note whether a frame replaced the one before it; return whether `is_high` has changed."""
        self._frames += 1
        self._replaced += replaced
        if self._frames < _SHARE_FRAMES:
            return False
        was_high, limit = self.is_high, _LOW_SHARE if self.is_high else _HIGH_SHARE
        self.is_high = self._replaced / self._frames > limit
        self._frames = self._replaced = 0
        return self.is_high != was_high


class FrameAdmission:
    """Decides which pictures of one connection become frames; belongs to the camera's thread.

    It counts the pictures that the configuration demands beside those that a throttle admits, also over
    pictures that are not decoded: otherwise the demand of a throttled camera would seem to fall.

    Args:
        fps: pictures per second that the configuration demands; None: all.
        gate: the motion gate of the configuration; None: it has none.
        counts: continues from connection to connection.
    """

    def __init__(self, fps: float | None, gate: GateSettings | None, counts: AdmissionCounts) -> None:
        self._fps, self._own_gate = fps, gate
        self._counts = counts
        self._throttle = UNTHROTTLED
        self._demanded, self._admitted = FrameSampler(fps), FrameSampler(fps)
        self._gate = None if gate is None else MotionGate(gate)
        self._moves = True
        self._replaced = ReplacedShare()

    def __repr__(self) -> str:
        return f"<FrameAdmission fps={self.fps} {self._gate!r}>"

    @property
    def fps(self) -> float | None:
        """Pictures per second that are admitted now; None: all."""
        rates = [rate for rate in (self._fps, self._throttle.fps) if rate is not None]
        return min(rates, default=None)

    def set_throttle(self, throttle: Throttle) -> bool:
        """Use this throttle from now on; return whether `fps` has changed."""
        if throttle is self._throttle:
            return False
        old_fps, old_throttle = self.fps, self._throttle
        self._throttle = throttle
        self._admitted.change(self.fps)
        if self._own_gate is None and throttle.gate != old_throttle.gate:
            self._gate = None if throttle.gate is None else MotionGate(throttle.gate)
            self._moves = True
        return self.fps != old_fps

    def note_offered(self, *, replaced: bool) -> bool:
        """Note whether a frame replaced the one before it; return whether `wanted_rate` has changed."""
        return self._replaced.note(replaced=replaced)

    def wanted_rate(self, source_fps: float) -> float | None:
        """Pictures per second that a source of this rate must decode; None: all.

        While most frames are replaced, every second picture is enough: the newest picture is older by one
        interval of the source at most.
        """
        if not self._replaced.is_high or source_fps <= 0:
            return self.fps
        half = source_fps / _SPARSE_INTERVALS
        return half if self.fps is None else min(self.fps, half)

    def admits(self, at_s: float, source_frames: int) -> bool:
        """Whether the picture of this time is due; it represents `source_frames` pictures of the source."""
        demanded = self._demanded.count_due(at_s, source_frames)
        due = self._admitted.count_due(at_s, source_frames)
        # The gate's last verdict is assumed for pictures that it did not see.
        self._counts.demanded += demanded if self._moves or self._own_gate is None else 0
        # Pictures that were not decoded because they would be replaced are not admitted.
        admitted = min(due, 1) if self._replaced.is_high else due
        self._counts.admitted += admitted if self._moves else 0
        return due > 0

    @property
    def has_gate(self) -> bool:
        """Whether `passes_gate` looks at pictures now."""
        return self._gate is not None

    def passes_gate(self, picture: Picture, now_ns: int) -> bool:
        """Whether a picture that is due passes the motion gate; true without a gate."""
        if self._gate is not None:
            self._moves = self._gate.passes(picture, now_ns)
        return self._moves
