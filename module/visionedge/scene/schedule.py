"""When a zone counts: a daily span of local time. The UTC time is an argument."""

import zoneinfo
from datetime import datetime

from visionedge.config.schema import ScheduleConfig

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Schedule:
    """The times at which a zone is open, by the clocks on the wall of its time zone.

    A span that ends before it begins runs over midnight and belongs to the day on which it began. An hour
    that a time zone repeats is open twice; one that it leaves out does not exist.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self._timezone = zoneinfo.ZoneInfo(config.timezone)
        self._from, self._to = _minutes(config.from_), _minutes(config.to)
        self._days = frozenset(_DAYS.index(day) for day in config.days)

    def is_open(self, utc: datetime) -> bool:
        """Whether the zone counts at a moment, which has a time zone itself."""
        local = utc.astimezone(self._timezone)
        minutes, today = local.hour * 60 + local.minute, local.weekday()
        if self._from < self._to:
            return today in self._days and self._from <= minutes < self._to
        began_today = today in self._days and minutes >= self._from
        return began_today or ((today - 1) % 7 in self._days and minutes < self._to)


def _minutes(time_of_day: str) -> int:
    hours, _, minutes = time_of_day.partition(":")
    return int(hours) * 60 + int(minutes)
