"""Pictures on their way to a browser: scaled, annotated and packed as JPEG, on threads of their own."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2

from visionedge.errors import SourceError
from visionedge.frames.drawing import draw_detections
from visionedge.frames.types import Frame, FrameResult, Picture
from visionedge.runtime.threads import TimedJoinExecutor
from visionedge.web.backend import BusyError

T = TypeVar("T")

UPLOADS_AT_ONCE = 4
MEMORY_BYTES = 360_000_000
"""For the pictures and tensors of all requests at once: one progressive JPEG of 40 megapixels."""
MEMORY_WAIT_S = 10.0
_CLOSE_S = 1.0

_QUALITY = 82
_JPEG_MAX_PX = 65_500
_LARGE_PX = 4_096
_LOW_QUALITY = 60
_THUMBNAIL_PX = 64


class ConcurrencyLimit:
    """So many at once, and of these only so many for one client; one more has to come again."""

    def __init__(self, limit: int, message: str, *, per_client: int | None = None) -> None:
        self._limit = limit
        self._per_client = limit if per_client is None else per_client
        self._message = message
        self._clients: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Permits taken={self.taken} limit={self._limit}>"

    @property
    def taken(self) -> int:
        """How many are held."""
        return self._clients.total()

    @contextmanager
    def acquire(self, client: str = "") -> Iterator[None]:
        """Hold a permit.

        Raises:
            Busy: none is left, or none for this client.
        """
        if self.taken >= self._limit:
            raise BusyError(self._message)
        if self._clients[client] >= self._per_client:
            raise BusyError(f"{self._message} from this address")
        self._clients[client] += 1
        try:
            yield
        finally:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]


class MemoryBudget:
    """So many bytes for all work at once. What does not fit waits for a time; what never fits takes all."""

    def __init__(self, limit_bytes: int, wait_s: float, message: str) -> None:
        self._limit_bytes = limit_bytes
        self._wait_s = wait_s
        self._message = message
        self._wakes: set[asyncio.Future[None]] = set()
        self.taken_bytes = 0

    def __repr__(self) -> str:
        return f"<Budget taken_bytes={self.taken_bytes} waiting={len(self._wakes)}>"

    @asynccontextmanager
    async def hold(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold a part of it.

        Raises:
            Busy: it was not free in time.
        """
        size_bytes = min(size_bytes, self._limit_bytes)
        try:
            async with asyncio.timeout(self._wait_s):
                while self.taken_bytes + size_bytes > self._limit_bytes:
                    await self._change()
        except TimeoutError:
            raise BusyError(self._message) from None
        self.taken_bytes += size_bytes
        try:
            yield
        finally:
            self.taken_bytes -= size_bytes
            for wake in self._wakes:
                if not wake.done():
                    wake.set_result(None)

    async def _change(self) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wakes.add(wake)
        try:
            await wake
        finally:
            self._wakes.discard(wake)


class DetachedTasks:
    """Work of requests that goes on to its end when its client leaves, with all that it holds."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<Unattended tasks={len(self._tasks)}>"

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_retrieve_error)
        return await asyncio.shield(task)

    async def close(self, timeout_s: float) -> None:
        """Wait so long for what is under way, then cancel it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in tuple(self._tasks):
            task.cancel()


class BoundedExecutor:
    """A few threads for what must not run on the loop, and no more waiting for them than `limit` jobs."""

    def __init__(self, threads: int = 2, limit: int = 32, name: str = "http") -> None:
        self._executor = TimedJoinExecutor(threads, name)
        self._limit = limit
        self._jobs = 0

    def __repr__(self) -> str:
        return f"<Desk jobs={self._jobs} limit={self._limit}>"

    @property
    def is_full(self) -> bool:
        """Whether one more job would be refused."""
        return self._jobs >= self._limit

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result. Its place stays taken until it is done, also when the caller has gone.

        Raises:
            Busy: too many jobs wait.
        """
        if self.is_full:
            raise BusyError("too many pictures are being worked on")
        future = asyncio.get_running_loop().run_in_executor(self._executor, job)
        self._jobs += 1
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def _done(self, future: "asyncio.Future[T]") -> None:
        self._jobs -= 1
        # Read here too, or a job whose caller has gone would complain that nobody heard its error.
        if not future.cancelled():
            future.exception()

    def close(self, *, wait: bool = True) -> list[str]:
        """Let go of what waits and end the threads; the names of those that still run.

        With `wait` it blocks until they have ended, for 2 s at most.
        """
        self._executor.shutdown(wait=wait, cancel_futures=True)
        return self._executor.alive()


class RequestResources:
    """What the requests of one server share: threads, permits for bodies that are computed, and memory."""

    def __init__(self) -> None:
        self.executor = BoundedExecutor()
        self.permits = ConcurrencyLimit(UPLOADS_AT_ONCE, "too many pictures are being analysed for others")
        self.memory = MemoryBudget(MEMORY_BYTES, MEMORY_WAIT_S, "too many large pictures are being analysed")
        self.detached_tasks = DetachedTasks()

    def __repr__(self) -> str:
        return f"<RequestResources {self.permits} {self.memory}>"

    async def close(self) -> None:
        """End the work that is under way, and the threads."""
        await self.detached_tasks.close(_CLOSE_S)
        await asyncio.to_thread(self.executor.close)


@dataclass(frozen=True, slots=True)
class JpegOptions:
    """How a picture is wanted: with boxes, not wider than `width_px` (None: as it is), and how well."""

    annotated: bool = False
    width_px: int | None = None
    quality: int = _QUALITY


class JpegCache:
    """JPEGs of results: each look at a picture is packed once and shared by all who ask for it meanwhile.

    Holds the newest of at most `limit` (camera, look) pairs.
    """

    def __init__(self, executor: BoundedExecutor, limit: int = 48) -> None:
        self._desk = executor
        self._limit = limit
        self._kept: OrderedDict[tuple[str, JpegOptions], tuple[int, asyncio.Task[bytes]]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Pictures kept={len(self._kept)} limit={self._limit}>"

    async def jpeg(self, result: FrameResult, options: JpegOptions) -> bytes:
        """The picture of this very result as JPEG.

        Raises:
            Busy: too many pictures are being worked on.
            SourceError: the picture cannot be had any more or cannot be a JPEG.
        """
        key, sequence = (result.frame.camera, options), result.frame.sequence
        kept = self._kept.get(key)
        if kept is None or kept[0] != sequence or _failed(kept[1]):
            task = asyncio.create_task(self._desk.run(lambda: encode_jpeg(result, options)))
            task.add_done_callback(_retrieve_error)
            if kept is not None and kept[0] > sequence:
                return await task
            kept = self._kept[key] = (sequence, task)
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return await asyncio.shield(kept[1])


def _failed(task: "asyncio.Task[bytes]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _retrieve_error(task: asyncio.Task[Any]) -> None:
    """Read the error here too, or asyncio would complain of one that no client waited for any more."""
    if not task.cancelled():
        task.exception()


def encode_jpeg(result: FrameResult, options: JpegOptions) -> bytes:
    """The result's picture as JPEG bytes; slow, so never on the loop. Scaled first, so that lines stay crisp.

    Raises:
        SourceError: the picture cannot be had any more or cannot be a JPEG.
    """
    picture = result.frame.full_picture()
    height_px, width_px = picture.shape[:2]
    if options.width_px is not None and options.width_px < width_px:
        size = (options.width_px, max(1, round(height_px * options.width_px / width_px)))
        picture = _as_picture(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    if options.annotated:
        picture = draw_detections(picture, result)
    if max(picture.shape[:2]) > _JPEG_MAX_PX:
        raise SourceError(f"a picture of {width_px}x{height_px} is too large for a JPEG; ask with ?width=")
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, options.quality])
    if not done:
        raise SourceError(f"the picture of {result.frame.camera} cannot be packed as JPEG")
    return data.tobytes()


def encode_jpeg_within(result: FrameResult, max_bytes: int, *, annotated: bool) -> bytes:
    """The result's picture as a JPEG of so many bytes at most: first less well, then ever smaller. Slow.

    Raises:
        SourceError: as `pack`, or even a thumbnail is larger.
    """
    frame = result.frame
    longest_px = max(frame.width_px, frame.height_px)
    scale, quality = min(1.0, _LARGE_PX / longest_px), _QUALITY
    while len(jpeg := encode_jpeg(result, _scaled_options(frame, scale, quality, annotated))) > max_bytes:
        if longest_px * scale < _THUMBNAIL_PX:
            raise SourceError(f"the picture of {frame.camera} does not fit into {max_bytes} bytes")
        if quality > _LOW_QUALITY:
            quality = _LOW_QUALITY
        else:
            # A JPEG has about as many bytes as the square of its sides.
            scale *= min(0.9, max(0.25, 0.95 * (max_bytes / len(jpeg)) ** 0.5))
    return jpeg


def _scaled_options(frame: Frame, scale: float, quality: int, annotated: bool) -> JpegOptions:
    return JpegOptions(annotated, max(1, round(frame.width_px * scale)), quality)


def is_supported_image(data: bytes) -> bool:
    """Whether it begins as a JPEG, PNG or WebP: only these three formats of strangers reach a decoder."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def _as_picture(picture: object) -> Picture:
    """What OpenCV gives for a uint8 picture is one; its types say any number."""
    return picture  # type: ignore[return-value]  # cv2's stubs are wider than what it does
