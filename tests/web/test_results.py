"""The board: newest results, bounded viewers, waits that end."""

import asyncio
import json
import weakref
from typing import cast

import pytest

from fake_backend import grey, result
from visionedge.errors import BusyError
from visionedge.frames.types import Picture
from visionedge.web.latest_results import LatestResults


class FakeClock:
    """A clock in ns that tests advance."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def sequence_of(frame: bytes) -> int:
    """The number in the event of a frame object."""
    return cast("int", json.loads(frame.removeprefix(b"data: "))["sequence"])


def test_the_newest_result_of_each_camera_is_kept() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        assert latest_results.latest("dock") is None
        for camera, sequence in (("dock", 1), ("yard", 7), ("dock", 2)):
            latest_results.publish(result(camera, sequence))
        dock, yard = latest_results.latest("dock"), latest_results.latest("yard")
        assert dock is not None
        assert yard is not None
        assert (dock.frame.sequence, yard.frame.sequence) == (2, 7)

    asyncio.run(scenario())


def test_a_wait_ends_with_the_first_newer_result_of_its_own_camera() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        latest_results.publish(result("dock", 4))
        wait = asyncio.create_task(latest_results.wait_for_newer("dock", 4, 5))
        await asyncio.sleep(0)
        latest_results.publish(result("yard", 9))
        latest_results.publish(result("dock", 5))
        found = await wait
        assert found is not None
        assert found.frame.sequence == 5
        assert latest_results.statistics().waiting == 0

    asyncio.run(scenario())


def test_an_existing_newer_result_is_returned_at_once() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        latest_results.publish(result("dock", 4))
        for after in (3, None):
            found = await latest_results.wait_for_newer("dock", after, 0)
            assert found is not None
            assert found.frame.sequence == 4

    asyncio.run(scenario())


def test_a_wait_returns_none_at_its_timeout_or_when_camera_or_results_close() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        assert await latest_results.wait_for_newer("dock", None, 0.01) is None
        forgotten = asyncio.create_task(latest_results.wait_for_newer("dock", None, 30))
        closed = asyncio.create_task(latest_results.wait_for_newer("yard", None, 30))
        await asyncio.sleep(0)
        latest_results.forget("dock")
        assert await forgotten is None
        latest_results.close()
        assert await closed is None
        assert await latest_results.wait_for_newer("dock", None, 30) is None

    asyncio.run(scenario())


def test_a_slow_viewer_loses_only_its_own_oldest_frames() -> None:
    async def scenario() -> None:
        latest_results = LatestResults(buffer=3)
        async with latest_results.subscribe(None) as slow, latest_results.subscribe("dock") as quick:
            seen: list[int] = []
            for sequence in range(1, 8):
                latest_results.publish(result("dock", sequence))
                seen.append(sequence_of(await anext(quick)))
            assert seen == [1, 2, 3, 4, 5, 6, 7]
            assert [sequence_of(await anext(slow)) for _ in range(3)] == [5, 6, 7]
            assert (slow.lost, quick.lost, latest_results.statistics().lost) == (4, 0, 4)

    asyncio.run(scenario())


def test_a_viewer_can_take_all_that_waits_at_once() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        async with latest_results.subscribe(None) as viewer:
            for sequence in range(1, 4):
                latest_results.publish(result("dock", sequence))
            assert sequence_of(await anext(viewer)) == 1
            assert [sequence_of(item) for item in viewer.take_waiting()] == [2, 3]
            assert viewer.take_waiting() == []

    asyncio.run(scenario())


def test_a_slow_viewer_holds_no_pictures_in_memory() -> None:
    """A 4K picture has 25 MB; its frame object has a few KB."""

    async def scenario() -> None:
        latest_results = LatestResults(buffer=64)
        pictures: list[weakref.ref[Picture]] = []
        async with latest_results.subscribe(None) as slow, latest_results.subscribe(None) as other:

            def publish(sequence: int) -> None:
                picture = grey()
                pictures.append(weakref.ref(picture))
                latest_results.publish(result("dock", sequence, picture=picture))

            for number in range(1, 30):
                publish(number)
            assert [sequence for sequence, kept in enumerate(pictures, 1) if kept() is not None] == [29]
            assert await anext(slow) is await anext(other), "written once for both"

    asyncio.run(scenario())


def test_a_subscription_gets_only_its_camera_and_ends_with_it() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        async with latest_results.subscribe("dock") as dock:
            latest_results.publish(result("yard", 1))
            latest_results.publish(result("dock", 2))
            latest_results.forget("yard")
            latest_results.forget("dock")
            heard = [sequence_of(item) async for item in dock]
        assert heard == [2]
        assert latest_results.statistics().viewers == 0

    asyncio.run(scenario())


def test_closing_the_results_ends_a_waiting_viewer() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        async with latest_results.subscribe(None) as viewer:
            wait = asyncio.create_task(anext(viewer, None))
            await asyncio.sleep(0)
            latest_results.close()
            assert await wait is None

    asyncio.run(scenario())


def test_too_many_viewers_and_waits_are_refused_and_counted() -> None:
    async def scenario() -> None:
        latest_results = LatestResults(max_viewers=1)
        async with latest_results.subscribe(None):
            with pytest.raises(BusyError, match="viewers"):
                async with latest_results.subscribe(None):
                    pass
        wait = asyncio.create_task(latest_results.wait_for_newer("dock", None, 30))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="wait"):
            await latest_results.wait_for_newer("dock", None, 30)
        latest_results.close()
        await wait
        assert latest_results.statistics().refused == 2

    asyncio.run(scenario())


def test_the_rate_covers_the_last_seconds_and_falls_if_a_camera_is_silent() -> None:
    clock = FakeClock()
    latest_results = LatestResults(clock=clock)
    for sequence in range(1, 52):
        clock.now_ns = sequence * 100_000_000
        latest_results.publish(result("dock", sequence))
    traffic = latest_results.statistics().cameras["dock"]
    assert traffic.published == 51
    assert traffic.fps == pytest.approx(10, rel=0.01)
    clock.now_ns += 2_000_000_000
    assert latest_results.statistics().cameras["dock"].fps < 7
    clock.now_ns += 60_000_000_000
    assert latest_results.statistics().cameras["dock"].fps == 0


def test_repr_shows_the_state_in_one_line() -> None:
    latest_results = LatestResults()
    latest_results.publish(result())
    assert repr(latest_results) == "<LatestResults cameras=1 viewers=0 waiting=0>"
