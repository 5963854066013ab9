"""The newest result of each camera, waits for a newer one, and bounded streams of results for viewers.

Everything here is for the event loop; threads hand results over through the `LoopQueue` of the service.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from visionedge.errors import BusyError
from visionedge.frames.types import FrameResult, build_frame_document
from visionedge.outbound.messages import encode_json

_RATE_WINDOW_NS = 5_000_000_000


@dataclass(frozen=True, slots=True)
class CameraTraffic:
    """The results of one camera: their count, their rate over the last 5 s, and the age of the newest."""

    published: int
    fps: float
    age_ns: int


@dataclass(frozen=True, slots=True)
class ViewerStatistics:
    """The counters at one moment. `lost` are the frame objects that slow viewers missed, since the start."""

    cameras: dict[str, CameraTraffic]
    viewers: int
    waiting: int
    lost: int
    refused: int


class _Entry:
    """The newest result of one camera, and when those of the last 5 s were published."""

    __slots__ = ("latest", "published", "published_ns")

    def __init__(self, latest: FrameResult) -> None:
        self.latest = latest
        self.published = 0
        self.published_ns: deque[int] = deque()

    def update(self, result: FrameResult, now_ns: int) -> None:
        self.latest = result
        self.published += 1
        self.published_ns.append(now_ns)
        self.expire(now_ns)

    def expire(self, now_ns: int) -> None:
        while self.published_ns and now_ns - self.published_ns[0] > _RATE_WINDOW_NS:
            self.published_ns.popleft()

    def traffic(self, now_ns: int) -> CameraTraffic:
        self.expire(now_ns)
        span_ns = now_ns - self.published_ns[0] if self.published_ns else 0
        # n moments span n - 1 intervals. The time since the last one counts, so a silent camera's rate falls.
        fps = (len(self.published_ns) - 1) * 1e9 / span_ns if span_ns > 0 else 0.0
        return CameraTraffic(self.published, fps, now_ns - self.latest.frame.captured_ns)


class Subscription:
    """One viewer's stream of frame objects as JSON: ``async with latest_results.subscribe(…) as frames``.

    The JSON waits here, the same bytes for all viewers, not the results: those would keep their pictures in
    memory for as long as the slowest viewer takes. When `limit` frame objects wait, the oldest is dropped;
    `lost` counts them.
    """

    def __init__(self, latest_results: "LatestResults", camera: str | None, limit: int) -> None:
        self._latest_results = latest_results
        self.camera = camera
        self.lost = 0
        self._limit = limit
        self._waiting: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    def __repr__(self) -> str:
        return f"<Subscription camera={self.camera} waiting={len(self._waiting)} lost={self.lost}>"

    async def __aenter__(self) -> "Subscription":
        self._latest_results._enter(self)  # noqa: SLF001 - the two classes are one thing in two halves
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._latest_results._leave(self)  # noqa: SLF001 - as above

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> bytes:
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.popleft()

    def offer(self, frame: bytes) -> bool:
        """Queue a frame object; False when the oldest one was dropped for it."""
        kept = len(self._waiting) < self._limit
        if not kept:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(frame)
        self._wake.set()
        return kept

    def end(self) -> None:
        """End the stream after the frame objects that wait."""
        self._ended = True
        self._wake.set()


class LatestResults:
    """The newest result of every camera, and the viewers and requests that wait for new ones. Loop only.

    At most `max_viewers` subscriptions, and as many waits in `wait_for_newer`; further ones raise
    `BusyError`. Each subscription holds at most `buffer` frame objects.
    """

    def __init__(
        self, *, buffer: int = 64, max_viewers: int = 64, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._buffer = buffer
        self._max_viewers = max_viewers
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._viewers: set[Subscription] = set()
        self._waits: dict[str, set[asyncio.Future[None]]] = {}
        self._waiting = 0
        self._lost = 0
        self._refused = 0
        self._closed = False

    def __repr__(self) -> str:
        cameras, viewers = len(self._entries), len(self._viewers)
        return f"<LatestResults cameras={cameras} viewers={viewers} waiting={self._waiting}>"

    def publish(self, result: FrameResult) -> None:
        """Keep a result as the newest of its camera and pass it to all that wait for it."""
        camera = result.frame.camera
        entry = self._entries.get(camera)
        if entry is None:
            entry = self._entries[camera] = _Entry(result)
        entry.update(result, self._clock())
        viewers = [viewer for viewer in self._viewers if viewer.camera in (None, camera)]
        if viewers:
            frame = encode_json(build_frame_document(result))  # once for all viewers
            self._lost += sum(not viewer.offer(frame) for viewer in viewers)
        self._wake(camera)

    def latest(self, camera: str) -> FrameResult | None:
        """The newest result of a camera; None before its first."""
        entry = self._entries.get(camera)
        return entry.latest if entry else None

    async def wait_for_newer(self, camera: str, after: int | None, timeout_s: float) -> FrameResult | None:
        """The newest result with a sequence above `after` (None: any), waiting up to `timeout_s`.

        None after `timeout_s`, or when the camera was forgotten or the module stops.

        Raises:
            BusyError: too many requests wait.
        """
        result = self._above(camera, after)
        if result is not None or timeout_s <= 0 or self._closed:
            return result
        if self._waiting >= self._max_viewers:
            self._refused += 1
            raise BusyError("too many requests wait for a frame")
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._await_above(camera, after)
        except TimeoutError:
            return None
        finally:
            self._waiting -= 1

    async def _await_above(self, camera: str, after: int | None) -> FrameResult | None:
        """Wait from result to result; `forget` and `close` cancel the future that is waited for."""
        loop = asyncio.get_running_loop()
        while True:
            wait: asyncio.Future[None] = loop.create_future()
            waits = self._waits.setdefault(camera, set())
            waits.add(wait)
            try:
                await asyncio.wait([wait])
            finally:
                waits.discard(wait)
            if wait.cancelled():
                return None
            result = self._above(camera, after)
            if result is not None:
                return result

    def _above(self, camera: str, after: int | None) -> FrameResult | None:
        result = self.latest(camera)
        if result is None or (after is not None and result.frame.sequence <= after):
            return None
        return result

    def _wake(self, camera: str) -> None:
        for wait in self._waits.pop(camera, ()):
            if not wait.done():
                wait.set_result(None)

    def _end_waits(self, camera: str) -> None:
        for wait in self._waits.pop(camera, ()):
            wait.cancel()

    def subscribe(self, camera: str | None) -> Subscription:
        """A stream of every frame object from now on, of one camera or of all (None).

        Entering may raise `BusyError`.
        """
        return Subscription(self, camera, self._buffer)

    def _enter(self, viewer: Subscription) -> None:
        if len(self._viewers) >= self._max_viewers:
            self._refused += 1
            raise BusyError("too many viewers", retry_after_s=5)
        self._viewers.add(viewer)
        if self._closed:
            viewer.end()

    def _leave(self, viewer: Subscription) -> None:
        self._viewers.discard(viewer)

    def forget(self, camera: str) -> None:
        """Drop the result of a camera that was removed, and end the streams and waits for it."""
        self._entries.pop(camera, None)
        self._end_waits(camera)
        for viewer in self._viewers:
            if viewer.camera == camera:
                viewer.end()

    def close(self) -> None:
        """End every stream and every wait: the module stops."""
        self._closed = True
        for camera in list(self._waits):
            self._end_waits(camera)
        for viewer in self._viewers:
            viewer.end()

    def statistics(self) -> ViewerStatistics:
        """The counters at this moment."""
        now_ns = self._clock()
        traffic = {camera: entry.traffic(now_ns) for camera, entry in self._entries.items()}
        return ViewerStatistics(traffic, len(self._viewers), self._waiting, self._lost, self._refused)
