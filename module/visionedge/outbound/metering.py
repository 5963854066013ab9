"""What messages cost: IoT Hub meters blocks of 4 KB, and a unit of it takes so many of them a day."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from types import MappingProxyType

BLOCK_BYTES = 4_096
UNIT_BLOCKS_PER_DAY: Mapping[str, int] = MappingProxyType({"S1": 400_000, "S2": 6_000_000})
"""Metered messages (blocks) that one unit of a tier takes in a day."""

S1 = "S1"
MAX_PER_DAY = "maxPerDay"
DAY_S = 86_400
_SLICE_NS = 60_000_000_000
_SLICES = 60
_MIN_PROJECTION_S = 300.0
"""A projection from less time is not reported: starting alone makes many messages."""

_HYSTERESIS = 0.9


def blocks(size_bytes: int) -> int:
    """How many blocks a message of this size is metered as; the smallest counts as one."""
    return max(1, -(-size_bytes // BLOCK_BYTES))


@dataclass(frozen=True, slots=True)
class MeteredUsage:
    """Messages and blocks by output since the start, and what the last `span_s` would come to in a day.

    `per_day` has the projected blocks by output; `span_s` is an hour, or what there is of it.
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
        """Which part of one unit's daily quota that is, by tier."""
        return {tier: self.blocks_per_day / quota for tier, quota in UNIT_BLOCKS_PER_DAY.items()}


class UsageMeter:
    """Counts messages as IoT Hub meters them."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._messages: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        self._bytes = 0
        self._began_ns = clock()
        # (which minute, blocks by output in it) of the last hour.
        self._slices: deque[tuple[int, Counter[str]]] = deque(maxlen=_SLICES + 1)

    def __repr__(self) -> str:
        return f"<Meter messages={dict(self._messages)} blocks={dict(self._blocks)}>"

    def count(self, output: str, size_bytes: int) -> None:
        """A message was made."""
        metered = blocks(size_bytes)
        self._messages[output] += 1
        self._blocks[output] += metered
        self._bytes += size_bytes
        minute = self._clock() // _SLICE_NS
        if not self._slices or self._slices[-1][0] != minute:
            self._slices.append((minute, Counter()))
        self._slices[-1][1][output] += metered

    def restart_projection(self) -> None:
        """Project the day from what is counted from now on; nothing was sent for a while, on purpose."""
        self._slices.clear()
        self._began_ns = self._clock()

    def usage(self) -> MeteredUsage:
        """The counts, and the day they would make."""
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
        for minute, counted in self._slices:
            if minute > now_ns // _SLICE_NS - _SLICES:
                recent.update(counted)
        # The minute that is being counted is not over yet: time is from the first counted minute's begin.
        since_ns = max(self._began_ns, (now_ns // _SLICE_NS - _SLICES + 1) * _SLICE_NS)
        # A module that has just started says nothing wild: less than a minute counts as one.
        return max(60.0, (now_ns - since_ns) / 1e9), recent


class QuotaForecast:
    """Whether the projected day passes a limit: `telemetry.maxPerDay`, or the quota of one S1 unit."""

    def __init__(self) -> None:
        self.exceeded: tuple[str, ...] = ()
        self._day: object = None

    def __repr__(self) -> str:
        return f"<Forecast exceeded={self.exceeded}>"

    def update(self, usage: MeteredUsage, limited: float, max_per_day: int, day: object) -> bool:
        """Judge a projection, of which `max_per_day` limits `limited` blocks; whether that is to be reported.

        It is when other limits are passed than before, and on each day on which one still is.
        """
        if usage.span_s < _MIN_PROJECTION_S:
            return False
        # No more than `maxPerDay` is sent, whatever is projected.
        billed = min(limited, max_per_day) + usage.blocks_per_day - limited
        values = {MAX_PER_DAY: (limited, max_per_day), S1: (billed, UNIT_BLOCKS_PER_DAY[S1])}
        exceeded = tuple(name for name, (value, limit) in values.items() if self._exceeds(name, value, limit))
        changed, self.exceeded = exceeded != self.exceeded, exceeded
        if not changed and (not exceeded or day == self._day):
            return False
        self._day = day
        return True

    def _exceeds(self, name: str, value: float, limit: int) -> bool:
        """A limit that was passed counts as passed until the projection is well below it."""
        return value > (limit * _HYSTERESIS if name in self.exceeded else limit)


# How much may still go out on this UTC day, whatever happens to the wall clock. Pure: both clocks are given.
#
# A day begins at midnight, or at a start of the module on a later date than the last one. It does not begin
# because the clock was set: neither back nor ahead. What was spent is kept by date; `spent` is to be stored.


_CLOCK_STEP_S = 60.0
"""The wall clock was set when it went this much further, or less far, than the monotonic one."""

_DAY_MEMORY_S = 86_400.0
"""So long a date that was left when the clock was set back is still the day that it was."""


class DayBudget:
    """Counts units of anything against a limit for each UTC day; one thread, but for `spent`.

    `spent`: what was spent earlier, by ISO date.
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
        # A later date: the clock is behind, or was ahead before. It is the same day as far as anybody knows.
        later = [count for day, count in spent.items() if day > today]
        self._used = max([spent.get(today, 0), *later])
        self._is_real_date = True
        self._other_days: dict[date, tuple[int, int]] = {}
        for day, count in spent.items():
            if day > today and (known := _date(day)) is not None:
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
        """How much more may go out today."""
        self._update_day()
        return max(0, self.limit - self._used)

    def take(self, count: int) -> bool:
        """Spend so much if there is so much left; whether there was."""
        if count > self.left():
            return False
        self.spend(count)
        return True

    def spend(self, count: int) -> None:
        """Count what goes out now."""
        self._update_day()
        self._set_used(self._used + count)

    def _update_day(self) -> None:
        """See what day it is, and why."""
        now_utc, now_ns = self._utc(), self._clock()
        before_utc, before_ns = self._last_reading
        self._last_reading = (now_utc, now_ns)
        today = now_utc.date()
        if today == self._day:
            return
        passed_s = (now_ns - before_ns) / 1e9
        was_set = abs((now_utc - before_utc - timedelta(seconds=passed_s)).total_seconds()) > _CLOCK_STEP_S
        if was_set and self._is_real_date:
            # It may come again. One that the clock was set to was perhaps never the date.
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


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None
