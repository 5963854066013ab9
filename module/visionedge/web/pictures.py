"""Pictures on their way to a browser: scaled, annotated and packed as JPEG, on threads of their own."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import cv2

from visionedge.annotate import annotate
from visionedge.errors import SourceError
from visionedge.frames import Picture, Result
from visionedge.web.view import Busy

T = TypeVar("T")

_QUALITY = 82
_JPEG_MOST_PX = 65_500


class Permits:
    """So many at once; one more is told to come again."""

    def __init__(self, limit: int, message: str) -> None:
        self._limit = limit
        self._message = message
        self.taken = 0

    def __repr__(self) -> str:
        return f"<Permits taken={self.taken} limit={self._limit}>"

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a permit.

        Raises:
            Busy: none is left.
        """
        if self.taken >= self._limit:
            raise Busy(self._message)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Desk:
    """A few threads for what must not run on the loop, and no more waiting for them than `limit` jobs."""

    def __init__(self, threads: int = 2, limit: int = 32) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="http")
        self._limit = limit
        self._jobs = 0

    def __repr__(self) -> str:
        return f"<Desk jobs={self._jobs} limit={self._limit}>"

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result. Its place stays taken until it is done, also when the caller has gone.

        Raises:
            Busy: too many jobs wait.
        """
        if self._jobs >= self._limit:
            raise Busy("too many pictures are being worked on")
        self._jobs += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, job)
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def _done(self, future: "asyncio.Future[T]") -> None:
        self._jobs -= 1
        # Read here too, or a job whose caller has gone would complain that nobody heard its error.
        if not future.cancelled():
            future.exception()

    def close(self) -> None:
        """Let go of what waits and end the threads, which takes as long as one job."""
        self._executor.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Look:
    """How a picture is wanted: with boxes or without, and not wider than `width_px` (None: as it is)."""

    annotated: bool = False
    width_px: int | None = None


class Pictures:
    """JPEGs of results: each look at a picture is packed once and shared by all who ask for it meanwhile.

    Holds the newest of at most `limit` (camera, look) pairs.
    """

    def __init__(self, desk: Desk, limit: int = 48) -> None:
        self._desk = desk
        self._limit = limit
        self._kept: OrderedDict[tuple[str, Look], tuple[int, asyncio.Task[bytes]]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Pictures kept={len(self._kept)} limit={self._limit}>"

    async def jpeg(self, result: Result, look: Look) -> bytes:
        """The picture of this very result as JPEG.

        Raises:
            Busy: too many pictures are being worked on.
            SourceError: the picture cannot be had any more or cannot be a JPEG.
        """
        key, sequence = (result.frame.camera, look), result.frame.sequence
        kept = self._kept.get(key)
        if kept is None or kept[0] != sequence or _failed(kept[1]):
            task = asyncio.create_task(self._desk.run(lambda: pack(result, look)))
            task.add_done_callback(_heard)
            if kept is not None and kept[0] > sequence:
                return await task
            kept = self._kept[key] = (sequence, task)
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return await asyncio.shield(kept[1])


def _failed(task: "asyncio.Task[bytes]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _heard(task: "asyncio.Task[bytes]") -> None:
    if not task.cancelled():
        task.exception()


def pack(result: Result, look: Look) -> bytes:
    """The result's picture as JPEG bytes; slow, so never on the loop. Scaled first, so that lines stay crisp.

    Raises:
        SourceError: the picture cannot be had any more or cannot be a JPEG.
    """
    picture = result.frame.full_picture()
    height_px, width_px = picture.shape[:2]
    if look.width_px is not None and look.width_px < width_px:
        size = (look.width_px, max(1, round(height_px * look.width_px / width_px)))
        picture = _bytes_picture(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    if look.annotated:
        picture = annotate(picture, result)
    if max(picture.shape[:2]) > _JPEG_MOST_PX:
        raise SourceError(f"a picture of {width_px}x{height_px} is too large for a JPEG; ask with ?width=")
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise SourceError(f"the picture of {result.frame.camera} cannot be packed as JPEG")
    return data.tobytes()


def _bytes_picture(picture: object) -> Picture:
    """What OpenCV gives for a uint8 picture is one; its types say any number."""
    return picture  # type: ignore[return-value]  # cv2's stubs are wider than what it does
