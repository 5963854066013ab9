"""Schedules: local time, over midnight, and the two days a year on which the clocks change."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from visionedge.config.schema import ScheduleConfig
from visionedge.scene.schedule import Schedule


def schedule(begin: str, end: str, **keys: Any) -> Schedule:
    return Schedule(ScheduleConfig.model_validate({"from": begin, "to": end, **keys}))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def open_minutes(plan: Schedule, first: str, hours: float) -> int:
    """In how many minutes from a moment on the schedule is open."""
    start = utc(first)
    return sum(plan.is_open(start + timedelta(minutes=n)) for n in range(round(hours * 60)))


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-11-30 07:59:59", False),
        ("2026-11-30 08:00", True),
        ("2026-11-30 17:59:59", True),
        ("2026-11-30 18:00", False),
    ],
)
def test_a_zone_counts_from_one_time_until_before_the_other(moment: str, expected: bool) -> None:
    assert schedule("08:00", "18:00").is_open(utc(moment)) is expected


def test_a_span_over_midnight_belongs_to_the_day_on_which_it_began() -> None:
    """2026-11-30 is a Monday."""
    plan = schedule("22:00", "06:00", days=["mon"])
    assert not plan.is_open(utc("2026-11-30 05:00"))
    assert plan.is_open(utc("2026-11-30 23:00"))
    assert plan.is_open(utc("2026-12-01 05:59"))
    assert not plan.is_open(utc("2026-12-01 06:00"))
    assert not plan.is_open(utc("2026-12-01 23:00"))
    assert open_minutes(plan, "2026-11-30 00:00", 7 * 24) == 8 * 60


def test_sunday_night_reaches_into_monday() -> None:
    plan = schedule("22:00", "06:00", days=["sun"])
    assert plan.is_open(utc("2026-11-30 05:00"))
    assert not plan.is_open(utc("2026-11-30 22:30"))


def test_a_whole_day_ends_at_24_00() -> None:
    assert open_minutes(schedule("00:00", "24:00", days=["tue"]), "2026-11-30 00:00", 7 * 24) == 24 * 60


def test_the_day_is_that_of_the_time_zone() -> None:
    """Monday 00:30 in Auckland is still Sunday in UTC."""
    plan = schedule("00:00", "01:00", days=["mon"], timezone="Pacific/Auckland")
    assert plan.is_open(utc("2026-11-29 11:30"))
    assert not plan.is_open(utc("2026-11-30 11:30"))


@pytest.mark.parametrize(
    ("day", "expected_hours"),
    [("2026-03-28", 8), ("2026-03-29", 7), ("2026-10-24", 8), ("2026-10-25", 9)],
)
def test_a_night_in_which_the_clocks_change_is_an_hour_shorter_or_longer(
    day: str, expected_hours: int
) -> None:
    """Berlin changes from 02:00 to 03:00 in March, and from 03:00 to 02:00 in October."""
    plan = schedule("00:00", "08:00", timezone="Europe/Berlin")
    start = f"{datetime.fromisoformat(day).date() - timedelta(days=1)} 12:00"
    assert open_minutes(plan, start, 24) == expected_hours * 60


def test_opening_hours_stay_at_the_local_time_over_the_year() -> None:
    plan = schedule("08:00", "18:00", timezone="Europe/Berlin")
    assert plan.is_open(utc("2026-07-01 06:00"))
    assert not plan.is_open(utc("2026-12-01 06:59"))
    assert plan.is_open(utc("2026-12-01 07:00"))


def test_an_hour_that_comes_twice_is_open_twice_and_one_that_is_left_out_never() -> None:
    plan = schedule("02:00", "03:00", timezone="Europe/Berlin")
    assert open_minutes(plan, "2026-10-24 22:00", 12) == 120
    assert open_minutes(plan, "2026-03-28 22:00", 12) == 0
