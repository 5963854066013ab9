"""Doctor in a module that runs: one examination at a time, and none oftener than once a minute."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from visionedge.ops.doctor.report import MAX_AGE_NS, CachedReport


class FakeDoctor:
    """Counts its examinations; each takes until `go` is set, and fails where `fails`."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = asyncio.Event()
        self.fails = False
        self.now_ns = 0

    async def __call__(self) -> dict[str, int]:
        self.begun += 1
        number = self.begun
        await self.go.wait()
        if self.fails:
            raise OSError("no child could be started")
        return {"number": number}


def run_with_visits(scenario: Callable[[FakeDoctor, CachedReport], Awaitable[None]]) -> None:
    """Tell a story with an examiner and the visits to it."""

    async def whole() -> None:
        examiner = FakeDoctor()
        await scenario(examiner, CachedReport(examiner, lambda: examiner.now_ns))

    asyncio.run(whole())


def test_concurrent_requests_share_one_examination() -> None:
    async def scenario(examiner: FakeDoctor, visits: CachedReport) -> None:
        asked = [asyncio.create_task(visits.report()) for _ in range(5)]
        await asyncio.sleep(0)
        examiner.go.set()
        assert [await report for report in asked] == [{"number": 1}] * 5
        assert examiner.begun == 1

    run_with_visits(scenario)


def test_a_report_is_fresh_for_a_minute() -> None:
    async def scenario(examiner: FakeDoctor, visits: CachedReport) -> None:
        examiner.go.set()
        numbers = []
        for now_ns in (0, MAX_AGE_NS - 1, MAX_AGE_NS, MAX_AGE_NS + 1):
            examiner.now_ns = now_ns
            numbers.append((await visits.report())["number"])
        assert numbers == [1, 1, 2, 2]

    run_with_visits(scenario)


def test_a_cancelled_request_does_not_cancel_the_others() -> None:
    async def scenario(examiner: FakeDoctor, visits: CachedReport) -> None:
        leaving, staying = (asyncio.create_task(visits.report()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        examiner.go.set()
        assert await staying == {"number": 1}
        assert leaving.cancelled()
        assert examiner.begun == 1

    run_with_visits(scenario)


def test_a_failed_examination_is_not_cached() -> None:
    async def scenario(examiner: FakeDoctor, visits: CachedReport) -> None:
        examiner.go.set()
        examiner.fails = True
        with pytest.raises(OSError, match="no child"):
            await visits.report()
        examiner.fails = False
        assert await visits.report() == {"number": 2}

    run_with_visits(scenario)
