"""How much may still go out on this UTC day, whatever happens to the wall clock. Pure: both clocks are given.

A day begins at midnight, or at a start of the module on a later date than the last one. It does not begin
because the clock was set: neither back nor ahead. What was spent is kept by date; `spent` is to be stored.
"""

import time
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from types import MappingProxyType

_SET_BY_S = 60.0
"""The wall clock was set when it went this much further, or less far, than the monotonic one."""

_REMEMBERED_S = 86_400.0
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
        self._seen = (utc(), clock())
        self._day: date = self._seen[0].date()
        today = self._day.isoformat()
        # A later date: the clock is behind, or was ahead before. It is the same day as far as anybody knows.
        later = [count for day, count in spent.items() if day > today]
        self._used = max([spent.get(today, 0), *later])
        self._came_by_itself = True
        self._left: dict[date, tuple[int, int]] = {}
        for day, count in spent.items():
            if day > today and (known := _date(day)) is not None:
                self._left[known] = (count, self._seen[1])
        self.spent: Mapping[str, int] = MappingProxyType({today: self._used})

    def __repr__(self) -> str:
        return f"<DayBudget used={self._used} limit={self.limit} day={self._day}>"

    @property
    def day(self) -> date:
        """The UTC day that is being counted."""
        self._look()
        return self._day

    def left(self) -> int:
        """How much more may go out today."""
        self._look()
        return max(0, self.limit - self._used)

    def take(self, count: int) -> bool:
        """Spend so much if there is so much left; whether there was."""
        if count > self.left():
            return False
        self.spend(count)
        return True

    def spend(self, count: int) -> None:
        """Count what goes out now."""
        self._look()
        self._note(self._used + count)

    def _look(self) -> None:
        """See what day it is, and why."""
        now_utc, now_ns = self._utc(), self._clock()
        before_utc, before_ns = self._seen
        self._seen = (now_utc, now_ns)
        today = now_utc.date()
        if today == self._day:
            return
        passed_s = (now_ns - before_ns) / 1e9
        was_set = abs((now_utc - before_utc - timedelta(seconds=passed_s)).total_seconds()) > _SET_BY_S
        if was_set and self._came_by_itself:
            # It may come again. One that the clock was set to was perhaps never the date.
            self._left[self._day] = (self._used, now_ns)
        self._left = {day: one for day, one in self._left.items() if (now_ns - one[1]) / 1e9 <= _REMEMBERED_S}
        known = self._left[today][0] if today in self._left else 0
        self._day, self._came_by_itself = today, not was_set
        self._note(max(self._used, known) if was_set else known)

    def _note(self, used: int) -> None:
        self._used = used
        self.spent = MappingProxyType({self._day.isoformat(): used})


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None
