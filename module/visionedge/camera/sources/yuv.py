"""Converts the planes of a decoded picture to BGR at any size: resized first, converted afterwards.

This order is cheap: a picture of two megapixels is read once, and the conversion works on the size of the
model's input. The file is independent of the decoder.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames.antialias import resize_antialiased
from visionedge.frames.letterbox import Plane, copy_if_separate, resize_into
from visionedge.frames.types import Picture, Resample

ColourMatrix = Literal["bt601", "bt709", "smpte240m", "fcc", "bt2020", "ycgco"]

# Shares of red and blue in luma; the rest is green. From the standards of these names (YCgCo has no shares).
_LUMA: dict[ColourMatrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
    "bt2020": (0.2627, 0.0593),
}

_ROTATIONS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}


@dataclass(frozen=True, slots=True)
class YuvPlanes:
    """A picture as a video decoder gives it.

    `luma` is (height, width). `chroma` is two planes, or one of two channels, or none for a grey picture; of
    any size, each covering the whole picture. Samples are uint8, or uint16 with `white` as the largest value.
    `full_range`: black is 0 and white is `white`; false: the limited range of broadcasting (16 to 235 of
    255). `quarter_turns` clockwise make the picture upright.
    """

    luma: Plane
    chroma: tuple[Plane, ...]
    white: int = 255
    full_range: bool = False
    matrix: ColourMatrix = "bt601"
    quarter_turns: int = 0

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height when upright."""
        height, width = self.luma.shape[:2]
        return (height, width) if self.quarter_turns % 2 else (width, height)


class YuvConverter:
    """Converts planes to BGR at a given size. Reuses its working memory, so it belongs to one thread."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, tuple[int, ...]], Picture] = {}

    def convert(self, planes: YuvPlanes, window: Picture, resample: Resample = "bilinear") -> None:
        """Fill `window`, uint8 (height, width, 3), with the whole upright picture in BGR."""
        height, width = window.shape[:2]
        turns = planes.quarter_turns % 4
        if turns % 2:
            width, height = height, width
        out = self._buffer(8, (height, width, 3)) if turns else window
        if resample == "antialias":
            self._convert_antialiased(planes, out)
        elif _is_i420(planes, (height, width)):
            self._convert_i420(planes, out)
        else:
            self._convert_any(planes, out)
        if turns:
            copy_if_separate(cv2.rotate(out, _ROTATIONS[turns], dst=window), window)

    def _convert_i420(self, planes: YuvPlanes, out: Picture) -> None:
        """The most common planes: resized into one I420 buffer, which OpenCV converts in one call."""
        height, width = out.shape[:2]
        i420 = self._buffer(7, (height + height // 2, width))
        luma, colours = i420[:height], i420[height:].reshape(2, height // 2, width // 2)
        resize_into(planes.luma, luma, _interpolation(planes.luma.shape, luma.shape, colour=False))
        for plane, colour in zip(planes.chroma, colours, strict=True):
            resize_into(plane, colour, cv2.INTER_NEAREST_EXACT)
        copy_if_separate(cv2.cvtColor(i420, cv2.COLOR_YUV2BGR_I420, dst=out), out)

    def _convert_antialiased(self, planes: YuvPlanes, out: Picture) -> None:
        """Resize each plane by itself: the mean over pixels and the colour matrix are both linear."""
        height, width = out.shape[:2]
        whole = (_to_8_bit(plane, planes.white) for plane in (planes.luma, *planes.chroma))
        parts = [_antialiased(plane, width, height) for plane in whole]
        _apply_matrix(parts, planes, self._buffer(9, (height, width, 3)), out)

    def _convert_any(self, planes: YuvPlanes, out: Picture) -> None:
        height, width = out.shape[:2]
        parts = [
            self._resized(n, p, planes, (width, height)) for n, p in enumerate((planes.luma, *planes.chroma))
        ]
        _apply_matrix(parts, planes, self._buffer(9, (height, width, 3)), out)

    def _resized(self, number: int, plane: Plane, planes: YuvPlanes, size_px: tuple[int, int]) -> Picture:
        width, height = size_px
        if plane.shape[:2] != (height, width):
            how = _interpolation(plane.shape, (height, width), colour=number > 0)
            if plane.dtype == np.uint8:
                if number > 0 and _is_twice_as_large(plane.shape, (height, width)):
                    plane = self._coarse(number, plane, (height, width))
                    how = cv2.INTER_NEAREST_EXACT
                buffer = self._buffer(number, (height, width, *plane.shape[2:]))
                return np.asarray(cv2.resize(plane, size_px, dst=buffer, interpolation=how))
            plane = np.asarray(cv2.resize(plane, size_px, interpolation=how), np.uint16)
        return _to_8_bit(plane, planes.white)

    def _coarse(self, number: int, plane: Plane, size: tuple[int, int]) -> Plane:
        """Resize a chroma plane to half the wanted height and width, each rounded up."""
        height, width = (-(-side // 2) for side in size)
        buffer = self._buffer(10 + number, (height, width, *plane.shape[2:]))
        return np.asarray(
            cv2.resize(plane, (width, height), dst=buffer, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8
        )

    def _buffer(self, number: int, shape: tuple[int, ...]) -> Picture:
        buffer = self._buffers.get((number, shape))
        if buffer is None:
            # The size has changed; buffers of the old size are dropped.
            self._buffers = {k: m for k, m in self._buffers.items() if k[0] != number}
            buffer = self._buffers[number, shape] = np.empty(shape, np.uint8)
        return buffer


def convert_full_size(planes: YuvPlanes) -> Picture:
    """Return the picture at its own size, BGR uint8 (height, width, 3)."""
    width, height = planes.size_px
    picture: Picture = np.empty((height, width, 3), np.uint8)
    YuvConverter().convert(planes, picture)
    return picture


def _interpolation(old: tuple[int, ...], new: tuple[int, int], *, colour: bool) -> int:
    """Return bilinear, or nearest where it is cheaper and no worse.

    At an odd factor such as 3, bilinear samples the centre of a pixel, so nearest gives the same. Chroma is
    coarse already; with nearest the mean error of real 1080p pictures stays the same.
    """
    sides = list(zip(old, new, strict=False))  # `old` may end with the number of channels
    middle = all(before % after == 0 and before // after % 2 for before, after in sides)
    coarse = colour and all(before >= after for before, after in sides)
    return cv2.INTER_NEAREST_EXACT if middle or coarse else cv2.INTER_LINEAR


def _to_8_bit(plane: Plane, white: int) -> Picture:
    if plane.dtype == np.uint8:
        return np.asarray(plane, np.uint8)
    # A ratio of powers of two maps black, grey and white exactly to their 8-bit values.
    return np.asarray(cv2.convertScaleAbs(plane, alpha=256 / (white + 1)), np.uint8)


def _antialiased(plane: Picture, width_px: int, height_px: int) -> Picture:
    if plane.ndim == 2:
        return resize_antialiased(plane, width_px, height_px)
    channels = (plane[..., number] for number in range(plane.shape[2]))
    return np.dstack([resize_antialiased(channel, width_px, height_px) for channel in channels])


def _is_twice_as_large(old: tuple[int, ...], new: tuple[int, int]) -> bool:
    """Whether a chroma plane is at least twice as high and wide as wanted.

    Then chroma at half the wanted size is enough, as coarse as in nearly all video and JPEG (4:2:0). It reads
    half as much memory, which saves a tenth of the conversion of a 1080p picture.
    """
    return all(before >= 2 * after for before, after in zip(old, new, strict=False))


def _is_i420(planes: YuvPlanes, size: tuple[int, int]) -> bool:
    """Whether OpenCV's I420 conversion applies: 8-bit BT.601 in limited range with two chroma planes.

    The wanted size must be even, and chroma at least twice as large.
    """
    return (
        (planes.matrix, planes.full_range, planes.white) == ("bt601", False, 255)
        and len(planes.chroma) == 2
        and all(_is_twice_as_large(plane.shape, size) for plane in planes.chroma)
        and size[0] % 2 == size[1] % 2 == 0
    )


def _apply_matrix(parts: list[Picture], planes: YuvPlanes, merged: Picture, out: Picture) -> None:
    matrix = _to_bgr(planes.matrix, planes.full_range, grey=len(parts) == 1)
    # `merge` takes planes of one and of two channels alike.
    joined = parts[0][:, :, None] if len(parts) == 1 else cv2.merge(parts, dst=merged)
    copy_if_separate(cv2.transform(joined, matrix, dst=out), out)


def _yuv_to_bgr_rows(name: ColourMatrix) -> NDArray[np.float64]:
    """Return the matrix from full-range Y, U, V to B, G, R."""
    if name == "ycgco":  # U is green, V is orange
        return np.array([[1.0, -1.0, -1.0], [1.0, 1.0, 0.0], [1.0, -1.0, 1.0]])
    red, blue = _LUMA[name]
    green = 1 - red - blue
    to_blue, to_red = 2 * (1 - blue), 2 * (1 - red)
    return np.array(
        [
            [1.0, to_blue, 0.0],
            [1.0, -to_blue * blue / green, -to_red * red / green],
            [1.0, 0.0, to_red],
        ]
    )


@lru_cache(maxsize=32)
def _to_bgr(name: ColourMatrix, full_range: bool, *, grey: bool) -> NDArray[np.float32]:
    """Return the matrix from 8-bit (Y, U, V, 1), or (Y, 1), to B, G, R."""
    luma, chroma, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
    rows = _yuv_to_bgr_rows(name) * np.array([luma, chroma, chroma])
    offset = -rows @ np.array([black, 128.0, 128.0])
    if grey:
        rows, offset = rows[:, :1], np.full(3, -luma * black)
    return np.ascontiguousarray(np.column_stack([rows, offset]), np.float32)
