"""Answers that do not end: server-sent events and MJPEG. A slow viewer loses only its own frames."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from aiohttp import web

from visionedge.errors import BusyError, SourceError
from visionedge.frames.types import FrameResult
from visionedge.web.backend import Backend
from visionedge.web.jpeg import JpegCache, JpegOptions

T = TypeVar("T")

HEARTBEAT_S = 15.0
"""A silent stream sends a sign of life this often, so that lost clients are found."""

WRITE_LIMIT_S = 20.0
"""A client that reads nothing for this long is disconnected, so that it does not keep a viewer's place."""

BOUNDARY = "visionedge-picture"


class StopSignal(asyncio.Event):
    """Set once when the server stops or the token changes; streams wait for it."""

    async def run_until_set(self, work: Coroutine[None, None, T]) -> T | None:
        """The result of the work, or None when the signal is set first; the work is then cancelled."""
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


async def iterate_with_heartbeat(
    frames: AsyncIterator[bytes], stop_signal: StopSignal, heartbeat_s: float
) -> AsyncGenerator[bytes | None, None]:
    """The frames, and None when none came for `heartbeat_s`. Ends with the frames or with the signal."""
    end = asyncio.ensure_future(stop_signal.wait())
    upcoming: asyncio.Future[bytes] | None = None
    try:
        while not stop_signal.is_set():
            upcoming = upcoming or asyncio.ensure_future(anext(frames))
            await asyncio.wait((upcoming, end), timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                yield None
                continue
            try:
                frame = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = None
            yield frame
    finally:
        await _cancel(end, *([upcoming] if upcoming else []))


async def send_events(
    request: web.Request,
    events: AsyncIterator[bytes],
    stop_signal: StopSignal,
    comment: str,
    *,
    count_lost: Callable[[], int],
    take_waiting: Callable[[], Sequence[bytes]] = tuple,
) -> web.StreamResponse:
    """Server-sent events, each given as its fields; first a comment about what follows.

    When `count_lost` has grown, a comment says by how much: a gap is not visible otherwise. `take_waiting`
    gives the events after the one that came, to be sent with it: each write to a client has its price.
    """
    lost = 0
    response = await _start_response(request, "text/event-stream; charset=utf-8")
    with _ignore_disconnect(request):
        await _write(response, f"retry: 2000\n: {comment}\n\n".encode())
        async with aclosing(iterate_with_heartbeat(events, stop_signal, HEARTBEAT_S)) as followed:
            async for fields in followed:
                if (more := count_lost() - lost) > 0:
                    lost += more
                    await _write(
                        response, f": {more} were lost here, as the reader was too slow\n\n".encode()
                    )
                waiting = (b": still here",) if fields is None else (fields, *take_waiting())
                await _write(response, b"\n\n".join((*waiting, b"")))
    return response


async def resume_events(missed: Sequence[bytes], live: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The events that a client has missed, then the live ones; none of them twice."""
    for fields in missed:
        yield fields
    seen = {_event_id(fields) for fields in missed}
    async for fields in live:
        if not seen or _event_id(fields) not in seen:
            yield fields


def _event_id(fields: bytes) -> bytes:
    return fields.partition(b"\n")[0]


async def send_mjpeg(
    request: web.Request,
    backend: Backend,
    camera: str,
    *,
    jpeg_cache: JpegCache,
    options: JpegOptions,
    stop_signal: StopSignal,
) -> web.StreamResponse:
    """MJPEG: always the newest picture, so a slow viewer skips some. Ends when the camera is removed."""
    response = await _start_response(request, f"multipart/x-mixed-replace; boundary={BOUNDARY}")
    with _ignore_disconnect(request):
        await _write(response, f"--{BOUNDARY}\r\n".encode())
        parts = MjpegParts(backend, camera, lambda result: _part(jpeg_cache, result, options), stop_signal)
        async for part in parts.each(HEARTBEAT_S):
            await _write(response, part)
    return response


class MjpegParts:
    """The newest picture of a camera as a part of an MJPEG stream, encoded by `encode_part`.

    While a slow viewer reads a part only the encoded part is kept: a result would keep its whole picture.
    """

    def __init__(
        self,
        backend: Backend,
        camera: str,
        encode_part: Callable[[FrameResult], Awaitable[bytes]],
        stop_signal: StopSignal,
    ) -> None:
        self._backend = backend
        self._camera = camera
        self._encode = encode_part
        self._stop_signal = stop_signal
        self._sequence: int | None = None
        self._part = b""

    async def each(self, heartbeat_s: float) -> AsyncGenerator[bytes, None]:
        """Each part, and the last one again when none came for `heartbeat_s`: MJPEG has no other heartbeat.

        Ends when the camera is removed, the module stops, or the signal is set.
        """
        while not self._stop_signal.is_set() and self._backend.has_camera(self._camera):
            if not await self._update(heartbeat_s):
                return
            if self._part:
                yield self._part

    async def _update(self, heartbeat_s: float) -> bool:
        """Wait for a newer picture and encode it; False where none will come."""
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        result = await self._stop_signal.run_until_set(self._newer(heartbeat_s))
        if result is None:
            # A wait that returns before its time: the camera was removed or the module stops.
            return loop.time() - asked_s >= heartbeat_s / 2
        self._sequence = result.frame.sequence
        self._part = await self._encode(result) or self._part
        return True

    async def _newer(self, timeout_s: float) -> FrameResult | None:
        try:
            return await self._backend.wait_for_newer(self._camera, self._sequence, timeout_s)
        except BusyError as busy:
            await asyncio.sleep(busy.retry_after_s)
            return self._backend.latest(self._camera)


async def _part(jpeg_cache: JpegCache, result: FrameResult, options: JpegOptions) -> bytes:
    """A part with its closing boundary: browsers show a part only when its boundary has arrived."""
    try:
        jpeg = await jpeg_cache.jpeg(result, options)
    except (BusyError, SourceError):
        return b""  # skip this picture; the next one may work
    head = (
        f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n"
        f"X-Visionedge-Sequence: {result.frame.sequence}\r\n\r\n"
    )
    return head.encode() + jpeg + f"\r\n--{BOUNDARY}\r\n".encode()


async def _start_response(request: web.Request, content_type: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    return response


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(WRITE_LIMIT_S):
        await response.write(data)


@contextmanager
def _ignore_disconnect(request: web.Request) -> Iterator[None]:
    """End the stream without an error when the client has disconnected or reads nothing."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        if request.transport is not None:
            request.transport.abort()
