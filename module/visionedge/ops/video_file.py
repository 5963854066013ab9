"""Writes an MP4 video: H.264 by PyAV, which browsers play, else MPEG-4 by OpenCV."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from visionedge.camera.timing import plausible_fps
from visionedge.errors import SourceError
from visionedge.frames.types import Picture

_TICKS_PER_S = 90_000
_H264_OPTIONS = {"preset": "veryfast", "crf": "23"}
_BT601, _LIMITED_RANGE = 6, 1
"""FFmpeg's numbers of the colours that its conversion from BGR gives."""


class _Encoder(Protocol):
    def write(self, picture: Picture, position_s: float) -> None: ...
    def close(self) -> None: ...


class VideoFile:
    """A video that is written. Its first picture waits for the second, because their distance is the rate.

    `add` and `close` raise SourceError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: tuple[Picture, float] | None = None
        self._encoder: _Encoder | None = None

    def add(self, picture: Picture, position_s: float) -> None:
        """Write the next picture, which is shown at this time; another size becomes that of the first."""
        if self._first is not None and picture.shape != (shape := self._first[0].shape):
            picture = np.asarray(cv2.resize(picture, (shape[1], shape[0])), np.uint8)
        if self._encoder is not None:
            self._encoder.write(picture, position_s)
        elif self._first is None:
            self._first = picture, position_s
        else:
            self._begin(self._first, position_s - self._first[1]).write(picture, position_s)

    def close(self) -> None:
        """Complete the file."""
        if self._encoder is None and self._first is not None:  # a video of one picture
            self._begin(self._first, 0.0)
        if self._encoder is not None:
            self._encoder.close()
        self._encoder = self._first = None

    def _begin(self, first: tuple[Picture, float], step_s: float) -> _Encoder:
        rate = plausible_fps(1 / step_s if step_s > 0 else 0.0)
        height_px, width_px = first[0].shape[:2]
        open_encoder = _H264Encoder if _has_h264() else _Mpeg4Encoder
        self._encoder = encoder = open_encoder(self._path, (width_px, height_px), rate)
        encoder.write(*first)
        return encoder


def _has_h264() -> bool:
    if importlib.util.find_spec("av") is None:
        return False
    import av

    return "libx264" in av.codecs_available


class _H264Encoder:
    """H.264 with the times of the pictures, whatever their distances."""

    def __init__(self, path: Path, size_px: tuple[int, int], rate: float) -> None:
        import av

        self._path, self._frame_type, self._begin_s = path, av.VideoFrame, 0.0
        self._is_empty = True
        # The absolute path: FFmpeg reads the text before a colon as a protocol.
        self._container = av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "+faststart"})
        fraction = Fraction(rate).limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=fraction, options=_H264_OPTIONS)
        # The planes of the colours have half the size, so the sides must be even.
        self._stream.width, self._stream.height = (side + side % 2 for side in size_px)
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = Fraction(1, _TICKS_PER_S)
        context.colorspace, context.color_range = _BT601, _LIMITED_RANGE

    def write(self, picture: Picture, position_s: float) -> None:
        height_px, width_px = picture.shape[:2]
        edges = 0, self._stream.height - height_px, 0, self._stream.width - width_px
        whole = cv2.copyMakeBorder(picture, *edges, cv2.BORDER_REPLICATE) if any(edges) else picture
        frame = self._frame_type.from_ndarray(np.asarray(whole, np.uint8), format="bgr24")
        if self._is_empty:
            self._is_empty, self._begin_s = False, position_s
        frame.pts = round((position_s - self._begin_s) * _TICKS_PER_S)
        frame.time_base = Fraction(1, _TICKS_PER_S)
        with self._reporting():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        with self._reporting():
            try:
                self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        from av.error import FFmpegError

        try:
            yield
        except FFmpegError as error:
            raise SourceError(f"{self._path} cannot be written: {error.strerror}") from None


class _Mpeg4Encoder:
    """MPEG-4 Part 2 at a constant rate."""

    def __init__(self, path: Path, size_px: tuple[int, int], rate: float) -> None:
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path), code, rate, size_px)
        if not self._writer.isOpened():
            raise SourceError(f"{path} cannot be written")

    def write(self, picture: Picture, position_s: float) -> None:
        del position_s  # the rate is constant
        self._writer.write(picture)

    def close(self) -> None:
        self._writer.release()
