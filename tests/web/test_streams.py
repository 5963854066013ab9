"""Live streams: events and pictures that come, viewers that leave, and ends that are clean."""

import asyncio
import json
import weakref
from contextlib import aclosing
from typing import cast

import aiohttp
import pytest

from fake_backend import Client, FakeBackend, decode, error_of, grey, result, run_scenario, serving, until
from visionedge.config.schema import HttpConfig
from visionedge.errors import BusyError
from visionedge.frames.types import FrameResult, Picture, build_frame_document
from visionedge.runtime.limits import BoundedExecutor
from visionedge.web import handlers
from visionedge.web.access_control import AccessControl
from visionedge.web.jpeg import JpegCache, JpegOptions
from visionedge.web.latest_results import LatestResults
from visionedge.web.streams import MjpegParts, StopSignal, iterate_with_heartbeat


async def event(answer: aiohttp.ClientResponse) -> str:
    """The next event of a stream that is no comment."""
    while True:
        line = (await answer.content.readline()).decode()
        assert line, "the stream ended"
        if line.startswith("data: "):
            assert await answer.content.readline() == b"\n"
            return line.removeprefix("data: ")


async def part(answer: aiohttp.ClientResponse) -> tuple[int, Picture]:
    """The next part of an MJPEG stream: its sequence and picture."""
    headers: dict[str, str] = {}
    while (line := (await answer.content.readline()).decode().strip()) or not headers:
        if ":" in line:
            name, _, value = line.partition(":")
            headers[name] = value.strip()
    data = await answer.content.readexactly(int(headers["Content-Length"]))
    return int(headers["X-Visionedge-Sequence"]), decode(data)


def test_every_frame_object_is_its_own_event() -> None:
    module = FakeBackend("dock", "yard")

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/frames") as answer:
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            made = [result("dock", 1), result("yard", 8), result("dock", 2)]
            for item in made:
                module.latest_results.publish(item)
            for item in made:
                assert json.loads(await event(answer)) == build_frame_document(item)

    run_scenario(module, scenario)


def test_events_can_be_limited_to_one_camera() -> None:
    module = FakeBackend("dock", "yard")

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/frames?camera=yard") as answer:
            module.latest_results.publish(result("dock", 1))
            module.latest_results.publish(result("yard", 8))
            assert json.loads(await event(answer))["camera"] == "yard"
            module.remove("yard")
            assert await answer.content.read() == b"", "the stream ends with its camera"
        async with client.get("/api/v1/frames?camera=attic") as answer:
            assert (await error_of(answer))[:2] == (404, "unknown_camera")

    run_scenario(module, scenario)


def test_a_viewer_that_disconnects_frees_its_place() -> None:
    module = FakeBackend("dock", latest_results=LatestResults(max_viewers=1))

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/frames"), client.get("/api/v1/frames") as second:
            assert (await error_of(second))[:2] == (503, "busy")
            assert second.headers["Retry-After"] == "5"
        await until(lambda: module.latest_results.statistics().viewers == 0)
        async with client.get("/api/v1/frames") as third:
            assert third.status == 200

    run_scenario(module, scenario)


def test_the_picture_stream_sends_each_new_annotated_picture() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 1, picture=grey(320, 240)))

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/stream.mjpg") as answer:
            assert answer.content_type == "multipart/x-mixed-replace"
            sequence, picture = await part(answer)
            assert (sequence, picture.shape) == (1, (240, 320, 3))
            assert int(picture.max()) - int(picture.min()) > 100, "a box is drawn on the plain picture"
            module.latest_results.publish(result("dock", 2, picture=grey(320, 240)))
            assert (await part(answer))[0] == 2

    run_scenario(module, scenario)


def test_the_picture_stream_ends_when_its_camera_is_removed() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 1))

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/stream.mjpg?width=32") as answer:
            assert (await part(answer))[1].shape == (24, 32, 3)
            module.remove("dock")
            assert (await answer.content.read()).strip() == b"--visionedge-picture" or answer.content.at_eof()
        async with client.get("/api/v1/cameras/dock/stream.mjpg") as answer:
            assert (await error_of(answer))[0] == 404

    run_scenario(module, scenario)


def test_the_number_of_picture_streams_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "PICTURE_STREAMS_AT_ONCE", 1)
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 1))

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/stream.mjpg") as first:
            await part(first)
            async with client.get("/api/v1/cameras/dock/stream.mjpg") as second:
                assert (await error_of(second))[:2] == (503, "busy")

    run_scenario(module, scenario)


def test_all_streams_and_waits_end_when_the_server_closes() -> None:
    module = FakeBackend("dock")
    module.latest_results.publish(result("dock", 1))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession() as outside:
            async with serving(module) as client:
                base = str(client._base_url)
                events = await outside.get(base + "api/v1/frames")
                pictures = await outside.get(base + "api/v1/cameras/dock/stream.mjpg")
                poll = asyncio.create_task(outside.get(base + "api/v1/cameras/dock/frame?after=1&timeout=60"))
                await part(pictures)
                await until(lambda: module.latest_results.statistics().waiting == 2)
                began_s = loop.time()
            assert loop.time() - began_s < 1.5
            await events.content.read()
            await pictures.content.read()
            assert (await error_of(await poll))[:2] == (503, "busy")

    asyncio.run(scenario())


def test_a_picture_is_encoded_once_for_all_viewers() -> None:
    calls: list[int] = []

    def counted() -> Picture:
        calls.append(1)
        return grey()

    async def scenario() -> None:
        executor = BoundedExecutor()
        pictures = JpegCache(executor)
        made = result("dock", 1, full_picture=counted)
        packed = await asyncio.gather(*[pictures.jpeg(made, JpegOptions(annotated=True)) for _ in range(5)])
        assert len(set(packed)) == 1
        assert len(calls) == 1
        await pictures.jpeg(made, JpegOptions())
        await pictures.jpeg(result("dock", 2, full_picture=counted), JpegOptions(annotated=True))
        assert len(calls) == 3
        executor.close()

    asyncio.run(scenario())


def test_cached_pictures_are_bounded() -> None:
    async def scenario() -> None:
        executor = BoundedExecutor()
        pictures = JpegCache(executor, limit=3)
        for number in range(9):
            await pictures.jpeg(result(f"camera-{number}", 1), JpegOptions())
        assert repr(pictures) == "<JpegCache kept=3 limit=3>"
        executor.close()

    asyncio.run(scenario())


def test_an_executor_limits_its_jobs() -> None:
    async def scenario() -> None:
        executor = BoundedExecutor(threads=1, limit=0)
        with pytest.raises(BusyError):
            await executor.run(grey)
        executor.close()

    asyncio.run(scenario())


def test_a_frame_object_is_serialised_once_for_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "_MAX_CACHED_RESPONSES", 2)
    api = handlers.ApiHandlers(FakeBackend(), AccessControl(HttpConfig()))
    made = result("dock", 1)
    body = api._frame_response(made).body
    assert body is not None
    assert api._frame_response(made).body is body
    assert json.loads(cast("bytes", api._frame_response(result("dock", 2)).body))["sequence"] == 2
    for number in range(5):
        api._frame_response(result(f"camera-{number}", 1))
        assert len(api._response_cache) <= 2


def test_a_frame_object_is_the_same_bytes_for_all_viewers() -> None:
    async def scenario() -> None:
        latest_results = LatestResults()
        async with latest_results.subscribe(None) as one, latest_results.subscribe("dock") as other:
            latest_results.publish(result("dock", 1))
            assert await anext(one) is await anext(other)

    asyncio.run(scenario())


def test_a_silent_stream_sends_keep_alives() -> None:
    async def scenario() -> None:
        latest_results, stop_signal = LatestResults(), StopSignal()
        async with (
            latest_results.subscribe(None) as viewer,
            aclosing(iterate_with_heartbeat(viewer, stop_signal, 0.01)) as followed,
        ):
            assert await anext(followed) is None
            latest_results.publish(result("dock", 3))
            heard = await anext(followed)
            assert heard is not None
            assert json.loads(heard.removeprefix(b"data: "))["sequence"] == 3
            stop_signal.set()
            assert await anext(followed, "end") == "end"

    asyncio.run(scenario())


def test_a_slow_viewer_of_pictures_holds_none_in_memory() -> None:
    async def scenario() -> None:
        module = FakeBackend("dock")

        async def packed(result: FrameResult) -> bytes:
            return str(result.frame.sequence).encode()

        async with aclosing(MjpegParts(module, "dock", packed, StopSignal()).each(10.0)) as shown:
            picture = grey()
            kept = weakref.ref(picture)
            module.latest_results.publish(result("dock", 1, picture=picture))
            del picture
            assert await anext(shown) == b"1"
            module.latest_results.publish(result("dock", 2))
            assert kept() is None

    asyncio.run(scenario())


def test_a_slow_viewer_of_pictures_skips_to_the_newest_and_an_unchanged_one_is_sent_again() -> None:
    async def scenario() -> None:
        module = FakeBackend("dock")

        async def packed(result: FrameResult) -> bytes:
            return str(result.frame.sequence).encode()

        async with aclosing(MjpegParts(module, "dock", packed, StopSignal()).each(0.02)) as shown:
            module.latest_results.publish(result("dock", 1))
            assert await anext(shown) == b"1"
            for sequence in (2, 3, 4):
                module.latest_results.publish(result("dock", sequence))
            assert await anext(shown) == b"4"
            assert await anext(shown) == b"4"
            module.latest_results.close()
            assert await anext(shown, None) is None

    asyncio.run(scenario())
