"""Usage metering: IoT Hub bills messages in blocks of 4 KB, and each unit has a daily quota of blocks.

`UsageMeter` counts the blocks and projects the last hour to a day; `QuotaForecast` compares the projection
with the limits; `DayBudget` counts the blocks that may still be sent today. Pure: the clock is an argument.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from types import MappingProxyType

BLOCK_BYTES = 4_096
UNIT_BLOCKS_PER_DAY: Mapping[str, int] = MappingProxyType({"S1": 400_000, "S2": 6_000_000})
"""The daily quota, in blocks, of one unit of a tier."""

S1 = "S1"
MAX_PER_DAY = "maxPerDay"
SCENE_SHARE = 10
"""With zones or lines, detections stop when a tenth of the day's budget is left: it is for scene events."""

DAY_S = 86_400
_MINUTE_NS = 60_000_000_000
_WINDOW_MINUTES = 60
_MIN_PROJECTION_S = 300.0
"""A projection from less time is not reported: the start of the module sends many messages at once."""

_HYSTERESIS = 0.9
"""A limit that was exceeded counts as exceeded until the projection is below this share of it."""


def count_blocks(size_bytes: int) -> int:
    """The number of blocks that IoT Hub meters for a message of this size, at least one."""
    return max(1, -(-size_bytes // BLOCK_BYTES))


# --- the blocks so far, and the projected day ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeteredUsage:
    """Messages and blocks by output since the start, and a projection of the last `span_s` to a day.

    `fill_ratio` is the share of the metered bytes that messages used. `per_day` has the projected blocks by
    output. `span_s` is one hour, or the time since the start if that is shorter.
    """

    messages: Mapping[str, int]
    blocks: Mapping[str, int]
    fill_ratio: float
    per_day: Mapping[str, float]
    span_s: float

    @property
    def blocks_per_day(self) -> float:
        """The projected blocks of all outputs."""
        return sum(self.per_day.values())

    @property
    def shares(self) -> Mapping[str, float]:
        """The projected blocks as a share of one unit's daily quota, by tier."""
        return {tier: self.blocks_per_day / quota for tier, quota in UNIT_BLOCKS_PER_DAY.items()}


class UsageMeter:
    """Counts messages as IoT Hub meters them. `clock` gives monotonic nanoseconds."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._messages: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        self._bytes = 0
        self._began_ns = clock()
        # (number of the minute, blocks by output in it) of the last hour.
        self._minutes: deque[tuple[int, Counter[str]]] = deque(maxlen=_WINDOW_MINUTES + 1)

    def __repr__(self) -> str:
        return f"<UsageMeter messages={dict(self._messages)} blocks={dict(self._blocks)}>"

    def count(self, output: str, size_bytes: int) -> None:
        """Count a message."""
        metered = count_blocks(size_bytes)
        self._messages[output] += 1
        self._blocks[output] += metered
        self._bytes += size_bytes
        minute = self._clock() // _MINUTE_NS
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, Counter()))
        self._minutes[-1][1][output] += metered

    def restart_projection(self) -> None:
        """Project the day from now on only, because sending was paused on purpose until now."""
        self._minutes.clear()
        self._began_ns = self._clock()

    def usage(self) -> MeteredUsage:
        """The counts, and their projection to a day."""
        total = self._blocks.total()
        span_s, recent = self._recent()
        return MeteredUsage(
            messages=MappingProxyType(dict(self._messages)),
            blocks=MappingProxyType(dict(self._blocks)),
            fill_ratio=self._bytes / (total * BLOCK_BYTES) if total else 0.0,
            per_day=MappingProxyType({output: n * DAY_S / span_s for output, n in recent.items()}),
            span_s=span_s,
        )

    def _recent(self) -> tuple[float, Counter[str]]:
        """The seconds that the projection is made from, and the blocks by output in them."""
        now_ns = self._clock()
        recent: Counter[str] = Counter()
        for minute, counted in self._minutes:
            if minute > now_ns // _MINUTE_NS - _WINDOW_MINUTES:
                recent.update(counted)
        # The current minute is not over: the span begins with the first counted minute.
        since_ns = max(self._began_ns, (now_ns // _MINUTE_NS - _WINDOW_MINUTES + 1) * _MINUTE_NS)
        # A span of at least one minute, or the first messages would be projected to a huge number.
        return max(60.0, (now_ns - since_ns) / 1e9), recent


# --- the projected day against the limits -------------------------------------------------------------------


class QuotaForecast:
    """Whether the projected day exceeds a limit: `telemetry.maxPerDay`, or the quota of one S1 unit."""

    def __init__(self) -> None:
        self.exceeded: tuple[str, ...] = ()
        self._reported_day: object = None

    def __repr__(self) -> str:
        return f"<QuotaForecast exceeded={self.exceeded}>"

    def update(self, usage: MeteredUsage, limited: float, max_per_day: int, day: object) -> bool:
        """Compare a projection with the limits; `max_per_day` applies to `limited` of the projected blocks.

        Returns whether the result must be reported: when the exceeded limits changed, and once on each
        further day on which a limit is exceeded.
        """
        if usage.span_s < _MIN_PROJECTION_S:
            return False
        # At most `max_per_day` of the limited blocks are sent, so no more are billed.
        billed = min(limited, max_per_day) + usage.blocks_per_day - limited
        values = {MAX_PER_DAY: (limited, max_per_day), S1: (billed, UNIT_BLOCKS_PER_DAY[S1])}
        exceeded = tuple(name for name, (value, limit) in values.items() if self._exceeds(name, value, limit))
        changed, self.exceeded = exceeded != self.exceeded, exceeded
        if not changed and (not exceeded or day == self._reported_day):
            return False
        self._reported_day = day
        return True

    def _exceeds(self, name: str, value: float, limit: int) -> bool:
        return value > (limit * _HYSTERESIS if name in self.exceeded else limit)


# --- the budget of a UTC day --------------------------------------------------------------------------------

_CLOCK_STEP_S = 60.0
"""The wall clock was set if it moved this much more, or less, than the monotonic clock."""

_DAY_MEMORY_S = 86_400.0
"""When the clock was set to another date, the count of the date before is remembered for this long."""


class DayBudget:
    """Counts blocks against a limit for each UTC day. For one thread; only `spent` is safe for all threads.

    Args:
        limit: blocks for each day; may be changed at any time.
        utc: the wall clock.
        spent: blocks spent in earlier runs, by ISO date.
        clock: monotonic nanoseconds, to detect that the wall clock was set.
    """

    def __init__(
        self,
        limit: int,
        utc: Callable[[], datetime],
        spent: Mapping[str, int] = MappingProxyType({}),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.limit = limit
        self._utc = utc
        self._clock = clock
        self._last_reading = (utc(), clock())
        self._day: date = self._last_reading[0].date()
        today = self._day.isoformat()
        # A later date on disk: the clock is behind now, or was ahead before. Assume that it is still the same
        # day.
        later = [count for day, count in spent.items() if day > today]
        self._used = max([spent.get(today, 0), *later])
        # False while the date is one that the clock was set to: it may never have been the real date.
        self._is_real_date = True
        self._other_days: dict[date, tuple[int, int]] = {}
        for day, count in spent.items():
            if day > today and (known := _parse_date(day)) is not None:
                self._other_days[known] = (count, self._last_reading[1])
        self.spent: Mapping[str, int] = MappingProxyType({today: self._used})

    def __repr__(self) -> str:
        return f"<DayBudget used={self._used} limit={self.limit} day={self._day}>"

    @property
    def day(self) -> date:
        """The UTC day that is being counted."""
        self._update_day()
        return self._day

    def left(self) -> int:
        """The blocks that may still be sent today."""
        self._update_day()
        return max(0, self.limit - self._used)

    def spend(self, count: int) -> None:
        """Count blocks that are sent now; more than are left is allowed."""
        self._update_day()
        self._set_used(self._used + count)

    def _update_day(self) -> None:
        """Read both clocks; on another date, find out whether midnight passed or the clock was set."""
        now_utc, now_ns = self._utc(), self._clock()
        before_utc, before_ns = self._last_reading
        self._last_reading = (now_utc, now_ns)
        today = now_utc.date()
        if today == self._day:
            return
        passed_s = (now_ns - before_ns) / 1e9
        was_set = abs((now_utc - before_utc - timedelta(seconds=passed_s)).total_seconds()) > _CLOCK_STEP_S
        if was_set and self._is_real_date:
            # The clock may be corrected, and this date come again.
            self._other_days[self._day] = (self._used, now_ns)
        self._other_days = {
            day: one for day, one in self._other_days.items() if (now_ns - one[1]) / 1e9 <= _DAY_MEMORY_S
        }
        known = self._other_days[today][0] if today in self._other_days else 0
        self._day, self._is_real_date = today, not was_set
        self._set_used(max(self._used, known) if was_set else known)

    def _set_used(self, used: int) -> None:
        self._used = used
        self.spent = MappingProxyType({self._day.isoformat(): used})


def _parse_date(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None
