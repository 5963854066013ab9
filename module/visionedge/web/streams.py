"""Answers without an end: server-sent events and MJPEG. A slow viewer loses only its own."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from aiohttp import web

from visionedge.errors import SourceError
from visionedge.frames import Result, frame_document
from visionedge.web.answers import json_bytes
from visionedge.web.pictures import Look, Pictures
from visionedge.web.view import Busy, ModuleView

T = TypeVar("T")

HEARTBEAT_S = 15.0
"""A silent stream says this often that it lives, so that dead clients are found."""

WRITE_LIMIT_S = 20.0
"""A client that takes nothing for so long is let go, so that it does not hold a viewer's place for ever."""

BOUNDARY = "visionedge-picture"


class Closing:
    """The end of the server as something that can be waited for."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """The server ends: every `race` returns."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the server ends."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return when the server ends."""
        await self._event.wait()

    async def race(self, work: Coroutine[None, None, T]) -> T | None:
        """The work's result, or None when the server ends first (the work is then cancelled)."""
        task, end = asyncio.ensure_future(work), asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait((task, end), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            await _cancel(task, end)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    open_tasks = [task for task in tasks if not task.done()]
    for task in open_tasks:
        task.cancel()
    if open_tasks:
        await asyncio.wait(open_tasks)


class Documents:
    """Frame objects as JSON bytes; the newest of each camera is made once for all who ask for it."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        # With the number of the frame: the result itself would hold its picture in memory.
        self._kept: dict[str, tuple[int, bytes]] = {}

    def of(self, result: Result) -> bytes:
        """The frame object of this result."""
        camera, sequence = result.frame.camera, result.frame.sequence
        kept = self._kept.get(camera)
        if kept is not None and kept[0] == sequence:
            return kept[1]
        data = json_bytes(frame_document(result))
        self._kept.pop(camera, None)
        self._kept[camera] = (sequence, data)
        if len(self._kept) > self._limit:
            self._kept.pop(next(iter(self._kept)))
        return data


async def follow(
    results: AsyncIterator[Result], closing: Closing, heartbeat_s: float
) -> AsyncGenerator[Result | None, None]:
    """The results, and None whenever none came for `heartbeat_s`; ends with them or with the server."""
    end = asyncio.ensure_future(closing.wait())
    upcoming: asyncio.Future[Result] | None = None
    try:
        while not closing.is_set():
            upcoming = upcoming or asyncio.ensure_future(anext(results))
            await asyncio.wait((upcoming, end), timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                yield None
                continue
            try:
                result = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = None
            yield result
    finally:
        await _cancel(end, *([upcoming] if upcoming else []))


async def send_events(
    request: web.Request, results: AsyncIterator[Result], documents: Documents, closing: Closing
) -> web.StreamResponse:
    """Server-sent events: one frame object each, named by the default event so that `onmessage` hears it."""
    response = await _begin(request, "text/event-stream; charset=utf-8")
    with _let_go(request):
        await _write(response, b"retry: 2000\n: frame objects follow\n\n")
        async with aclosing(follow(results, closing, HEARTBEAT_S)) as followed:
            async for result in followed:
                data = b": still here" if result is None else b"data: " + documents.of(result)
                await _write(response, data + b"\n\n")
    return response


async def send_pictures(
    request: web.Request,
    view: ModuleView,
    camera: str,
    *,
    pictures: Pictures,
    look: Look,
    closing: Closing,
) -> web.StreamResponse:
    """MJPEG: always the newest picture, so a slow viewer skips some. Ends when the camera is removed."""
    response = await _begin(request, f"multipart/x-mixed-replace; boundary={BOUNDARY}")
    with _let_go(request):
        await _write(response, f"--{BOUNDARY}\r\n".encode())
        async with aclosing(newest(view, camera, closing, HEARTBEAT_S)) as shown:
            async for result in shown:
                await _write(response, await _part(pictures, result, look))
    return response


async def newest(
    view: ModuleView, camera: str, closing: Closing, heartbeat_s: float
) -> AsyncGenerator[Result, None]:
    """The newest result each time one is asked for, and the last one again when none came for `heartbeat_s`.

    MJPEG knows no other heartbeat. Ends when the camera is removed, the module stops, or the server does.
    """
    loop = asyncio.get_running_loop()
    shown: Result | None = None
    while not closing.is_set() and view.knows(camera):
        asked_s = loop.time()
        result = await closing.race(_newer(view, camera, shown, heartbeat_s))
        if result is None and loop.time() - asked_s < heartbeat_s / 2:
            return  # nobody waits in vain for less than the time given, unless nothing will come
        shown = result or shown
        if shown is not None:
            yield shown


async def _newer(view: ModuleView, camera: str, shown: Result | None, timeout_s: float) -> Result | None:
    try:
        return await view.newer(camera, shown.frame.sequence if shown else None, timeout_s)
    except Busy as busy:
        await asyncio.sleep(busy.retry_after_s)
        return view.latest(camera)


async def _part(pictures: Pictures, result: Result, look: Look) -> bytes:
    """A part with its closing boundary: browsers show a part only when they see what ends it."""
    try:
        jpeg = await pictures.jpeg(result, look)
    except (Busy, SourceError):
        return b""  # this viewer skips a picture; the next may come through
    head = (
        f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n"
        f"X-Visionedge-Sequence: {result.frame.sequence}\r\n\r\n"
    )
    return head.encode() + jpeg + f"\r\n--{BOUNDARY}\r\n".encode()


async def _begin(request: web.Request, content_type: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    return response


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(WRITE_LIMIT_S):
        await response.write(data)


@contextmanager
def _let_go(request: web.Request) -> Iterator[None]:
    """A client that went away or takes nothing any more ends its stream, and that is no error."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        if request.transport is not None:
            request.transport.abort()
