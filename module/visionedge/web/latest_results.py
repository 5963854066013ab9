"""The newest result of each camera, waits for a newer one, and bounded streams for viewers.

A stream brings frame objects, scene events, or both, as the fields of server-sent events.

Everything here is for the event loop; threads hand results over through the `LoopQueue` of the service.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from visionedge.errors import BusyError
from visionedge.frames.types import FrameResult, build_frame_document
from visionedge.outbound.messages import encode_json
from visionedge.scene.events import EventFilter, SceneEvent

_RATE_WINDOW_NS = 5_000_000_000

_EVENTS_FOR_EACH_FRAME = 16
"""A stream of events holds so many times more of them, because one picture can bring hundreds: a reader that
is not slow must not lose any when many objects are confirmed at once in many zones."""


@dataclass(frozen=True, slots=True)
class CameraTraffic:
    """The results of one camera: their count, their rate over the last 5 s, and the age of the newest."""

    published: int
    fps: float
    age_ns: int


@dataclass(frozen=True, slots=True)
class ViewerStatistics:
    """The counters at one moment. `lost`: what slow viewers missed of their streams, since the start."""

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
    """One viewer's stream of server-sent events: ``async with latest_results.subscribe(…) as frames``.

    The text waits here, the same bytes for all viewers, not the results: those would keep their pictures in
    memory for as long as the slowest viewer takes. When `limit` texts wait, the oldest is dropped; `lost`
    counts them.

    Attributes:
        camera: the only camera of the stream; None: all.
        frames: whether it brings frame objects.
        events: the scene events that it brings; None: none.
    """

    def __init__(
        self,
        latest_results: "LatestResults",
        camera: str | None,
        limit: int,
        *,
        frames: bool = True,
        events: EventFilter | None = None,
    ) -> None:
        self._latest_results = latest_results
        self.camera, self.frames, self.events = camera, frames, events
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

    def take_waiting(self) -> list[bytes]:
        """All that can be sent at once."""
        waiting = [*self._waiting]
        self._waiting.clear()
        return waiting

    def offer(self, fields: bytes) -> bool:
        """Queue a server-sent event; False when the oldest one was dropped for it."""
        kept = len(self._waiting) < self._limit
        if not kept:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(fields)
        self._wake.set()
        return kept

    def end(self) -> None:
        """End the stream after what waits."""
        self._ended = True
        self._wake.set()


def encode_frame_fields(result: FrameResult) -> bytes:
    """A frame object as the fields of a server-sent event."""
    return b"data: " + encode_json(build_frame_document(result))


def encode_event_fields(document: Mapping[str, Any]) -> bytes:
    """The document of a scene event as the fields of a server-sent event."""
    return b"id: " + str(document["id"]).encode() + b"\ndata: " + encode_json(document)


class LatestResults:
    """The newest result of every camera, and the viewers and requests that wait for new ones. Loop only.

    At most `max_viewers` subscriptions, and as many waits in `wait_for_newer`; further ones raise
    `BusyError`. Each subscription holds at most `buffer` frame objects and events.
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
        viewers = [viewer for viewer in self._viewers if viewer.frames and viewer.camera in (None, camera)]
        if viewers:
            fields = encode_frame_fields(result)  # once for all viewers
            self._lost += sum(not viewer.offer(fields) for viewer in viewers)
        self._wake(camera)

    def publish_events(self, events: Sequence[SceneEvent]) -> None:
        """Pass scene events to all that wait for them, as `scene` events where frame objects come, too."""
        for event in events:
            viewers = [each for each in self._viewers if each.events and each.events.matches(event)]
            if viewers:
                fields = encode_event_fields(event.document())
                named = b"event: scene\n" + fields
                self._lost += sum(not each.offer(named if each.frames else fields) for each in viewers)

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

    def subscribe(self, camera: str | None, *, with_events: bool = False) -> Subscription:
        """A stream of every frame object from now on, of one camera or of all (None); also of its events.

        Entering may raise `BusyError`.
        """
        events = EventFilter(camera) if with_events else None
        return Subscription(self, camera, self._buffer, events=events)

    def subscribe_events(self, wanted: EventFilter) -> Subscription:
        """A stream of the scene events from now on, without frame objects. Entering may raise `BusyError`."""
        limit = _EVENTS_FOR_EACH_FRAME * self._buffer
        return Subscription(self, wanted.camera, limit, frames=False, events=wanted)

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
