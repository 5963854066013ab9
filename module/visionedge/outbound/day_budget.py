"""The budget of blocks for each UTC day (`telemetry.maxPerDay`), safe against a wall clock that is set.

A new day begins at midnight, or when the module starts on a later date than the last one. Setting the clock
back or ahead does not begin a new day. The blocks spent are kept by date; `spent` is stored with the
messages.
"""

import time
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from types import MappingProxyType

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
