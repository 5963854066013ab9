"""The board where results are pinned up: the newest of each camera, and bounded streams for viewers.

Everything here belongs to the event loop; threads reach it through the outbox only.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from visionedge.frames.types import FrameResult, build_frame_document
from visionedge.web.backend import BusyError
from visionedge.web.responses import json_bytes

_RATE_WINDOW_NS = 5_000_000_000


@dataclass(frozen=True, slots=True)
class CameraTraffic:
    """What was published for one camera: how many, how many a second lately, and how old the newest is."""

    published: int
    fps: float
    age_ns: int


@dataclass(frozen=True, slots=True)
class ViewerStatistics:
    """The board at one moment. `lost` counts what slow viewers missed, over all viewers there ever were."""

    cameras: dict[str, CameraTraffic]
    viewers: int
    waiting: int
    lost: int
    refused: int


class _Entry:
    """The newest result of one camera, and when the results of the last seconds were published."""

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
        # n moments span n - 1 intervals; the time since the last counts too: a silent camera's rate falls.
        fps = (len(self.published_ns) - 1) * 1e9 / span_ns if span_ns > 0 else 0.0
        return CameraTraffic(self.published, fps, now_ns - self.latest.frame.captured_ns)


class FrameDocumentCache:
    """Frame objects as JSON bytes; the newest of each camera is made once for all who ask for it."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        # With the number of the frame: the result itself would hold its picture in memory.
        self._kept: dict[str, tuple[int, bytes]] = {}

    def to_json(self, result: FrameResult) -> bytes:
        """The frame object of this result."""
        camera, sequence = result.frame.camera, result.frame.sequence
        kept = self._kept.get(camera)
        if kept is not None and kept[0] == sequence:
            return kept[1]
        data = json_bytes(build_frame_document(result))
        self._kept.pop(camera, None)
        self._kept[camera] = (sequence, data)
        if len(self._kept) > self._limit:
            self._kept.pop(next(iter(self._kept)))
        return data


class Subscription:
    """One viewer's stream of frame objects as JSON: ``async with board.subscribe(…) as frames``.

    Bytes wait here, the same for all viewers, and no results: those would hold their pictures in memory for
    as long as the slowest viewer takes. `lost` counts the frames that this viewer was too slow for; the
    oldest go first.
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
        """Hand a frame object over; False when an older one was lost for it."""
        kept = len(self._waiting) < self._limit
        if not kept:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(frame)
        self._wake.set()
        return kept

    def end(self) -> None:
        """No frame will follow; those that wait are still delivered."""
        self._ended = True
        self._wake.set()


class LatestResults:
    """The newest result of every camera, and who wants to hear of new ones. Loop only, never blocks.

    At most `max_viewers` subscriptions and as many waits in `newer` at once; further ones raise `BusyError`.
    Each subscription holds at most `buffer` frame objects.
    """

    def __init__(
        self, *, buffer: int = 64, max_viewers: int = 64, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._buffer = buffer
        self._max_viewers = max_viewers
        self._clock = clock
        self._documents = FrameDocumentCache()
        self._entries: dict[str, _Entry] = {}
        self._viewers: set[Subscription] = set()
        self._waits: dict[str, set[asyncio.Future[None]]] = {}
        self._waiting = 0
        self._lost = 0
        self._refused = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Board cameras={len(self._entries)} viewers={len(self._viewers)} waiting={self._waiting}>"

    def publish(self, result: FrameResult) -> None:
        """Pin a result up and hand it to everyone who waits for it."""
        camera = result.frame.camera
        entry = self._entries.get(camera)
        if entry is None:
            entry = self._entries[camera] = _Entry(result)
        entry.update(result, self._clock())
        viewers = [viewer for viewer in self._viewers if viewer.camera in (None, camera)]
        if viewers:
            frame = self._documents.to_json(result)
            self._lost += sum(not viewer.offer(frame) for viewer in viewers)
        self._wake(camera)

    def latest(self, camera: str) -> FrameResult | None:
        """The newest result of a camera; None before its first."""
        entry = self._entries.get(camera)
        return entry.latest if entry else None

    async def wait_for_newer(self, camera: str, after: int | None, timeout_s: float) -> FrameResult | None:
        """The newest result with a sequence above `after` (None: any), waiting up to `timeout_s`.

        None when the time is up, the camera was forgotten or the board closed.

        Raises:
            Busy: too many wait already.
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
        """Wait publish by publish; an end (camera forgotten, board closed) cancels the futures."""
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
        """A stream of every frame object from now on, of one camera or of all.

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
        """A camera was removed: its result goes, and the streams and waits for it end."""
        self._entries.pop(camera, None)
        self._end_waits(camera)
        for viewer in self._viewers:
            if viewer.camera == camera:
                viewer.end()

    def close(self) -> None:
        """The module stops: every stream and every wait ends."""
        self._closed = True
        for camera in list(self._waits):
            self._end_waits(camera)
        for viewer in self._viewers:
            viewer.end()

    def statistics(self) -> ViewerStatistics:
        """The board at this moment."""
        now_ns = self._clock()
        traffic = {camera: entry.traffic(now_ns) for camera, entry in self._entries.items()}
        return ViewerStatistics(traffic, len(self._viewers), self._waiting, self._lost, self._refused)
