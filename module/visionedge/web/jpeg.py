"""Pictures of results as JPEG: scaled, annotated and encoded on threads.

`JpegCache` encodes a picture once for all clients that ask for the same one.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

import cv2

from visionedge.errors import SourceError
from visionedge.frames.drawing import draw_detections
from visionedge.frames.types import Frame, FrameResult, Picture
from visionedge.runtime.limits import BoundedExecutor, retrieve_error

_QUALITY = 82
_JPEG_MAX_PX = 65_500
"""The longest side that the format allows, in px."""

# For `encode_jpeg_within`: it starts from a picture of 4096 px and gives up below 64 px.
_LARGE_PX = 4_096
_LOW_QUALITY = 60
_THUMBNAIL_PX = 64


@dataclass(frozen=True, slots=True)
class JpegOptions:
    """With boxes or without, at most `width_px` wide (None: as wide as the picture), quality 0-100."""

    annotated: bool = False
    width_px: int | None = None
    quality: int = _QUALITY


class JpegCache:
    """JPEGs of the newest results. Each is encoded once; clients that ask meanwhile wait for the same one.

    Holds at most `limit` pairs of camera and options, those that were used last.
    """

    def __init__(self, executor: BoundedExecutor, limit: int = 48) -> None:
        self._executor = executor
        self._limit = limit
        self._kept: OrderedDict[tuple[str, JpegOptions], tuple[int, asyncio.Task[bytes]]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<JpegCache kept={len(self._kept)} limit={self._limit}>"

    async def jpeg(self, result: FrameResult, options: JpegOptions) -> bytes:
        """The picture of this result as JPEG.

        Raises:
            BusyError: too many pictures are being worked on.
            SourceError: the picture is not available any more or cannot be a JPEG.
        """
        key, sequence = (result.frame.camera, options), result.frame.sequence
        kept = self._kept.get(key)
        if kept is None or kept[0] != sequence or _failed(kept[1]):
            task = asyncio.create_task(self._executor.run(lambda: encode_jpeg(result, options)))
            task.add_done_callback(retrieve_error)
            if kept is not None and kept[0] > sequence:
                return await task  # an older result does not replace a newer one
            kept = self._kept[key] = (sequence, task)
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return await asyncio.shield(kept[1])


def encode_jpeg(result: FrameResult, options: JpegOptions) -> bytes:
    """The result's picture as JPEG. Blocks: not for the event loop.

    It is scaled before it is annotated, so that lines stay sharp.

    Raises:
        SourceError: the picture is not available any more or cannot be a JPEG.
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
        raise SourceError(f"the picture of {result.frame.camera} cannot be encoded as JPEG")
    return data.tobytes()


def encode_jpeg_within(result: FrameResult, max_bytes: int, *, annotated: bool) -> bytes:
    """The result's picture as a JPEG of at most `max_bytes`: first in lower quality, then smaller. Blocks.

    Raises:
        SourceError: as `encode_jpeg`, or even a thumbnail is larger.
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
            # The size of a JPEG grows about with the square of its sides.
            scale *= min(0.9, max(0.25, 0.95 * (max_bytes / len(jpeg)) ** 0.5))
    return jpeg


def _failed(task: "asyncio.Task[bytes]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _scaled_options(frame: Frame, scale: float, quality: int, annotated: bool) -> JpegOptions:
    return JpegOptions(annotated, max(1, round(frame.width_px * scale)), quality)


def _as_picture(picture: object) -> Picture:
    """The result of OpenCV for a uint8 picture, whose types allow any number."""
    return picture  # type: ignore[return-value]  # cv2's stubs are wider than its results
