"""The budget of a day: one for each day, however the wall clock is set."""

from datetime import UTC, datetime, timedelta

import pytest

from visionedge.outbound.metering import DayBudget


class FakeClocks:
    """A wall clock that can be set, and a monotonic one."""

    def __init__(self, start: str = "2026-11-22T10:00") -> None:
        self.utc = datetime.fromisoformat(start).replace(tzinfo=UTC)
        self.ns = 0

    def passes(self, hours: float) -> None:
        """Move both clocks."""
        self.utc += timedelta(hours=hours)
        self.ns += round(hours * 3600e9)

    def budget(self, limit: int = 100, **spent: int) -> DayBudget:
        """A budget by these clocks."""
        known = {name.replace("_", "-").strip("d"): count for name, count in spent.items()}
        return DayBudget(limit, lambda: self.utc, known, lambda: self.ns)


def test_each_day_has_its_own_limit() -> None:
    clocks = FakeClocks()
    budget = clocks.budget()
    budget.spend(60)
    assert budget.left() == 40
    budget.spend(40)
    assert budget.left() == 0
    clocks.passes(13.9)
    assert budget.left() == 0
    clocks.passes(0.2)
    assert budget.left() == 100
    assert dict(budget.spent) == {"2026-11-23": 0}


@pytest.mark.parametrize("hours", [-2, -11, -24, -36, -24 * 400, 2, 24, 24 * 400])
def test_a_clock_change_grants_no_second_budget(hours: float) -> None:
    """Neither at once, nor when it is set right again."""
    clocks = FakeClocks()
    budget = clocks.budget()
    budget.spend(100)
    clocks.utc += timedelta(hours=hours)
    assert budget.left() == 0
    clocks.passes(1)
    clocks.utc -= timedelta(hours=hours)
    assert budget.left() == 0


def test_a_clock_set_back_over_midnight_continues_the_day() -> None:
    clocks = FakeClocks("2026-11-22T01:00")
    budget = clocks.budget()
    budget.spend(100)
    clocks.utc -= timedelta(hours=2)
    assert budget.left() == 0
    clocks.passes(1.5)  # 00:30 of the day that has spent it all
    assert budget.left() == 0
    clocks.passes(24)
    assert budget.left() == 100


@pytest.mark.parametrize("days", [1, 3, 400])
def test_a_corrected_clock_blocks_no_later_day(days: int) -> None:
    """Not even the date that it had shown, when that comes."""
    clocks = FakeClocks()
    budget = clocks.budget()
    clocks.utc += timedelta(days=days)
    budget.spend(100)
    clocks.passes(1)
    clocks.utc -= timedelta(days=days)
    assert budget.left() == 0
    for _ in range(5):
        clocks.passes(24)
        assert budget.left() == 100
        budget.spend(100)


def test_a_restart_continues_the_day() -> None:
    clocks = FakeClocks()
    assert clocks.budget(d2026_11_22=70).left() == 30
    assert clocks.budget(d2026_11_21=100).left() == 100


def test_a_restart_with_a_slow_clock_continues_the_last_day() -> None:
    """A machine without a battery-backed clock starts in 1970, until it has the time from the network."""
    clocks = FakeClocks("1970-01-01T00:00")
    budget = clocks.budget(d2026_11_22=100)
    assert budget.left() == 0
    assert dict(budget.spent) == {"1970-01-01": 100}
    clocks.passes(0.1)
    clocks.utc = datetime(2026, 11, 22, 10, tzinfo=UTC)
    assert budget.left() == 0
    assert dict(budget.spent) == {"2026-11-22": 100}


def test_a_future_date_on_disk_blocks_one_day_and_not_each_start() -> None:
    clocks = FakeClocks()
    first = clocks.budget(d2030_01_01=100)
    assert first.left() == 0
    clocks.passes(24)
    again = DayBudget(100, lambda: clocks.utc, first.spent, lambda: clocks.ns)
    assert again.left() == 100


def test_invalid_dates_on_disk_are_ignored() -> None:
    assert FakeClocks().budget(zzz=100).left() == 0
