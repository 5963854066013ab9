"""PyAV's decoder of one stream, and what its pictures become."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.stream import VideoStream

from visionedge.camera.sources.skip_policy import Level
from visionedge.camera.sources.yuv import Matrix, Painter, Plane, Planes, whole_picture
from visionedge.errors import DamagedError
from visionedge.frames.letterbox import fit, fit_drawn
from visionedge.frames.types import InputSpec, Picture, Placement

if TYPE_CHECKING:
    VideoPacket = Packet[VideoStream]
else:
    VideoPacket = Packet  # generic for type checkers only

_SKIPPED = {Level.ALL: "DEFAULT", Level.REFERENCES: "NONREF", Level.KEYS: "DEFAULT"}

# Names of pixel formats whose planes are taken as they are; all others go the way over FFmpeg's own BGR.
_PLANAR = re.compile(r"(?:yuvj?4\d\dp|gray)(?:(9|10|12|14|16)le)?")
_FULL_BY_NAME: Mapping[str, bool | None] = {"yuvj": True, "gray": None}
_SAMPLES = np.dtype(np.uint8), np.dtype("<u2")
_TWO_PLANES = {"nv12": 255, "nv16": 255, "nv24": 255, "p010le": 65535, "p210le": 65535, "p410le": 65535}

# FFmpeg's numbers. What a stream does not say (2) is BT.601, as FFmpeg and OpenCV have it. What is not here
# (11 and above: seldom seen, and not linear for the most part) is taken for the matrix of its primaries.
_MATRICES: dict[int, Matrix] = {
    0: "bt601",
    1: "bt709",
    2: "bt601",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020",
    10: "bt2020",
}
_MATRICES_OF_PRIMARIES: dict[int, Matrix] = {1: "bt709", 9: "bt2020"}
_UNSAID_MATRIX = 2
_FULL_RANGE = 2
_LIMITED_RANGE = 1


class PyavDecoder:
    """A codec context that survives damaged packets, which give no picture; `damaged` tells of the last."""

    def __init__(self, context: VideoCodecContext, threads: int) -> None:
        context.thread_count = threads
        context.thread_type = "AUTO"
        # Smoothing the edges of blocks is a good part of decoding. Where no other picture refers to one,
        # nothing spreads, and it changes 1080p by a twentieth of a grey level.
        context.options = {"skip_loop_filter": "noref"}
        self.intra_only = context.codec.intra_only
        self.damaged = False
        self._context = context
        self._level = Level.ALL
        self._on_gpu = False

    @property
    def name(self) -> str:
        """Who decodes, for people."""
        return f"pyav {self._context.name}{' (nvdec)' if self._on_gpu else ''}"

    def pictures(self, packet: VideoPacket | None) -> list[VideoFrame]:
        """The pictures that come out when the packet goes in; at None, those still inside."""
        try:
            frames = self._context.decode(packet)
        except FFmpegError:
            self.damaged = True
            return []
        if frames:
            self.damaged = False
            # What was decoded on a GPU comes back with two planes, which no decoder of ours on the CPU gives.
            self._on_gpu = self._context.is_hwaccel and frames[0].format.name in _TWO_PLANES
        return frames

    def alone(self, packet: VideoPacket) -> VideoFrame | None:
        """The picture of a key picture's packet, at once and whatever came before; None if it is damaged."""
        frames = self.pictures(packet)
        if not frames:
            frames = self.drain()
            self.flush()
        self.damaged = not frames
        return frames[0] if frames else None

    def drain(self) -> list[VideoFrame]:
        """The pictures still inside; `flush` before going on."""
        return self.pictures(None)

    def flush(self) -> None:
        """Forget what came before: the next packet is a key picture's."""
        if self._context.is_open:
            self._context.flush_buffers()

    def thin(self, level: Level) -> None:
        """Decode no more than this from now on."""
        if level is self._level:
            return
        if Level.KEYS in (level, self._level):
            self.flush()
        self._context.skip_frame = _SKIPPED[level]  # type: ignore[assignment]  # typed as the names themselves
        self._level = level


class PyavPicture:
    """See `Decoded`. Keeps the frame as it was decoded: BGR is made of it when somebody asks.

    Nothing in it may refer back to it: frames are large, and must not wait for the garbage collector.
    """

    def __init__(
        self,
        look: Callable[[], VideoFrame],
        painter: Painter,
        size_px: tuple[int, int],
        position_s: float | None,
        covers: int,
        *,
        key: bool = False,
    ) -> None:
        self.width_px, self.height_px = size_px
        self.position_s = position_s
        self.covers = covers
        self.key = key
        self._look = look
        self._painter: Painter | None = painter
        self._seen = False

    def fill(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """See `Decoded.fill`."""
        planes = planes_of(self._shown())
        painter, self._painter = self._painter or Painter(), None
        if planes is None:
            return fit(self.picture(), spec, out)
        return fit_drawn(
            planes.size_px, spec, out, lambda window: painter.paint(planes, window, spec.resample)
        )

    def picture(self) -> Picture:
        """See `Decoded.picture`; made anew each time, as the frame is half its size."""
        frame = self._shown()
        planes = planes_of(frame)
        return _as_ffmpeg_has_it(frame) if planes is None else whole_picture(planes)

    def _shown(self) -> VideoFrame:
        frame = self._look()
        if not self._seen:
            turned = _quarter_turns(frame) % 2 == 1
            self.width_px = frame.height if turned else frame.width
            self.height_px = frame.width if turned else frame.height
            # What is kept is the frame, and not the packet and all that it came from.
            self._look, self._seen = (lambda: frame), True
        return frame


def planes_of(frame: VideoFrame) -> Planes | None:
    """The planes of a frame, not copied; None for a pixel format that is none of brightness and colour."""
    layout = _layout(frame.format.name)
    if layout is None:
        return None
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:
        matrix = _MATRICES_OF_PRIMARIES.get(frame.color_primaries, "bt601")
    luma, *chroma = frame.planes
    # Grey has no colour to be squeezed for broadcasting, so it is full unless it says otherwise.
    kept = layout.full if layout.full is not None else frame.color_range != _LIMITED_RANGE
    return Planes(
        _array(luma, layout.dtype),
        tuple(_array(plane, layout.dtype, layout.together) for plane in chroma),
        layout.white,
        kept or frame.color_range == _FULL_RANGE,
        matrix,
        _quarter_turns(frame),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the planes of a pixel format lie: samples, white, colours together in one plane.

    `full` None: full range unless the frame says otherwise.
    """

    dtype: np.dtype[Any]
    white: int
    together: int = 1
    full: bool | None = False


@lru_cache(maxsize=64)
def _layout(name: str) -> _Layout | None:
    if (white := _TWO_PLANES.get(name)) is not None:
        return _Layout(_SAMPLES[white > 255], white, together=2)
    planar = _PLANAR.fullmatch(name)
    if planar is None:
        return None
    white = (1 << int(planar[1] or 8)) - 1
    return _Layout(_SAMPLES[white > 255], white, full=_FULL_BY_NAME.get(name[:4], False))


def _array(plane: VideoPlane, dtype: np.dtype[Any], together: int = 1) -> Plane:
    shape = (plane.height, plane.width) if together == 1 else (plane.height, plane.width, together)
    pixel_bytes = together * dtype.itemsize
    strides = (plane.line_size, pixel_bytes, dtype.itemsize)[: len(shape)]
    return np.ndarray(shape, dtype, memoryview(plane), strides=strides)


def _quarter_turns(frame: VideoFrame) -> int:
    """Clockwise, to be upright: FFmpeg tells by how much it stands turned anticlockwise."""
    return round(-frame.rotation / 90) % 4


def _as_ffmpeg_has_it(frame: VideoFrame) -> Picture:
    picture = _converted(frame)
    turns = _quarter_turns(frame)
    code = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return picture if turns == 0 else np.asarray(cv2.rotate(picture, code[turns]), np.uint8)


def _converted(frame: VideoFrame) -> Picture:
    try:
        return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
    except FFmpegError:  # FFmpeg knows the matrix and cannot compute it
        frame.colorspace = _UNSAID_MATRIX
    try:
        return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
    except (FFmpegError, ValueError):
        raise DamagedError(f"pictures of the pixel format {frame.format.name} cannot be converted") from None
