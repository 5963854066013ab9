"""Decides which pictures need no decoding when only some per second are wanted.

Two levels save work and never damage a decoded picture: skipping pictures that no other picture refers to,
and skipping all but key pictures. The policy measures while the stream plays which level still gives enough
pictures.
"""

from collections import deque
from enum import IntEnum

_TOLERANCE = 1.01
_MIN_KEY_GAPS = 3
_MAX_KEY_GAP_S = 8.0
_MAX_STEP_S = 20.0
_BAN_S = 60.0
_MAX_BAN_S = 3600.0
_COMPARE_INTERVAL_S = 3.0
_MAX_CLOCK_RATE = 1.5


class DecodeLevel(IntEnum):
    """The pictures that are decoded: all, those that others refer to, or key pictures only."""

    ALL = 0
    REFERENCES = 1
    KEYS = 2


class StreamClockCheck:
    """Checks whether a live stream's time stamps run like the clock; some cameras count in a wrong unit.

    Two deviations in a row in the same direction decide. A stall and the burst after it deviate once in each
    direction, and a server that begins with buffered pictures deviates once.
    """

    def __init__(self) -> None:
        self.is_wrong = False
        self._began_s: tuple[float, float] | None = None
        self._direction = 0

    def __repr__(self) -> str:
        return f"<StreamClockCheck wrong={self.is_wrong}>"

    def note(self, at_s: float, now_s: float) -> bool:
        """Note the time stamp and the arrival of a packet; return whether `is_wrong` has changed."""
        if self._began_s is None:
            self._began_s = at_s, now_s
        passed_s = now_s - self._began_s[1]
        if passed_s < _COMPARE_INTERVAL_S:
            return False
        rate = (at_s - self._began_s[0]) / passed_s
        self._began_s = at_s, now_s
        last, self._direction = self._direction, (rate > _MAX_CLOCK_RATE) - (rate < 1 / _MAX_CLOCK_RATE)
        was_wrong = self.is_wrong
        if self._direction == last:
            self.is_wrong = last != 0
        return self.is_wrong != was_wrong


class SkipPolicy:
    """Chooses the decode level; a level that gave too few pictures is banned for a while.

    All times are in s, of one clock: the stream's time stamps, or the monotonic clock if they are wrong.

    Args:
        looked_at_per_s: pictures per second that are wanted; None: all.
    """

    def __init__(self, looked_at_per_s: float | None) -> None:
        self.level = DecodeLevel.ALL
        self._last_key_s: float | None = None
        self._key_gaps_s: deque[float] = deque(maxlen=8)
        self.set_wanted_rate(looked_at_per_s)

    def __repr__(self) -> str:
        return f"<SkipPolicy {self.level.name} keys={[round(gap_s, 2) for gap_s in self._key_gaps_s]}>"

    def set_wanted_rate(self, looked_at_per_s: float | None) -> None:
        """Set the wanted rate (None: all); the level follows at the next key picture at the latest."""
        self._max_gap_s = 0.0 if looked_at_per_s is None else _TOLERANCE / looked_at_per_s
        self._skips = looked_at_per_s is not None
        self._last_picture_s: float | None = None
        self._banned_until_s = {DecodeLevel.REFERENCES: -1e18, DecodeLevel.KEYS: -1e18}
        self._ban_s = {DecodeLevel.REFERENCES: _BAN_S, DecodeLevel.KEYS: _BAN_S}
        if self.level is not DecodeLevel.KEYS:  # until the next key picture, others cannot be decoded
            self.level = DecodeLevel.REFERENCES if self._skips else DecodeLevel.ALL

    def packet(self, at_s: float, *, key: bool) -> bool:
        """Note a packet and return whether to decode it. The level may have changed."""
        if not self._skips:
            self.level = DecodeLevel.ALL if key else self.level
            return self.level is not DecodeLevel.KEYS
        if key:
            self._note_key(at_s)
            self.level = self._level_from(at_s)
        elif self.level is DecodeLevel.KEYS:
            if self._last_key_s is not None and at_s - self._last_key_s > 1.5 * self._max_gap_s:
                self._ban(DecodeLevel.KEYS, at_s)  # from the next key picture on
            return False
        elif self.level is DecodeLevel.ALL and at_s >= self._banned_until_s[DecodeLevel.REFERENCES]:
            self.level = DecodeLevel.REFERENCES
            self._last_picture_s = None
        return True

    def picture(self, at_s: float) -> None:
        """Note a decoded picture; too long a gap bans the level."""
        last_s, self._last_picture_s = self._last_picture_s, at_s
        if self.level is not DecodeLevel.REFERENCES or last_s is None:
            return
        if self._max_gap_s < at_s - last_s < _MAX_STEP_S:
            self._ban(DecodeLevel.REFERENCES, at_s)
            self.level = DecodeLevel.ALL

    def pause(self) -> None:
        """Ignore the next gap: pictures are skipped for another reason."""
        self._last_picture_s = None

    def change_clock(self) -> None:
        """Forget all times: from now on they come from another clock."""
        self._last_key_s = self._last_picture_s = None
        self._key_gaps_s.clear()
        self._banned_until_s = dict.fromkeys(self._banned_until_s, -1e18)

    def _note_key(self, at_s: float) -> None:
        if self._last_key_s is not None:
            gap_s = at_s - self._last_key_s
            if 0 < gap_s < _MAX_STEP_S:
                self._key_gaps_s.append(gap_s)
            else:  # the clock of the stream has jumped
                self._key_gaps_s.clear()
                self._banned_until_s = dict.fromkeys(self._banned_until_s, at_s)
        self._last_key_s = at_s

    def _level_from(self, at_s: float) -> DecodeLevel:
        gaps_s = self._key_gaps_s
        enough = len(gaps_s) >= _MIN_KEY_GAPS and max(gaps_s) <= min(self._max_gap_s, _MAX_KEY_GAP_S)
        if enough and at_s >= self._banned_until_s[DecodeLevel.KEYS]:
            return DecodeLevel.KEYS
        if self.level is DecodeLevel.KEYS:
            self._last_picture_s = None
            return (
                DecodeLevel.REFERENCES
                if at_s >= self._banned_until_s[DecodeLevel.REFERENCES]
                else DecodeLevel.ALL
            )
        return self.level

    def _ban(self, level: DecodeLevel, at_s: float) -> None:
        if at_s < self._banned_until_s[level]:
            return
        self._banned_until_s[level] = at_s + self._ban_s[level]
        self._ban_s[level] = min(_MAX_BAN_S, 2 * self._ban_s[level])
