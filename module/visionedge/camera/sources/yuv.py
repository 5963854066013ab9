"""From the planes of a decoded picture to BGR at any size: resized small first, coloured small after.

That order is what makes it cheap: a picture of two megapixels is read once, and everything else happens at
the size of the model's input. It knows nothing of decoders.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames.antialias import resize_antialiased
from visionedge.frames.types import Picture, Resample

Plane = NDArray[np.uint8] | NDArray[np.uint16]

ColourMatrix = Literal["bt601", "bt709", "smpte240m", "fcc", "bt2020", "ycgco"]

# How much red and blue make luma; the rest is green. From the standards of these names (YCgCo has none).
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
    """A picture as a video decoder leaves it.

    `luma` is (height, width). `chroma` is two planes, or one of two channels, or none for a grey picture; of
    any size, each covering the whole picture. Samples are uint8, or uint16 of which `white` is the largest
    value. `full_range` says whether black and white are 0 and `white`, or lie within as broadcasting has it.
    `quarter_turns` clockwise make it upright.
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
    """Paints planes at a size. Keeps its working memory from picture to picture, so it is for one thread."""

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
            _copy_if_needed(window, cv2.rotate(out, _ROTATIONS[turns], dst=window))

    def _convert_i420(self, planes: YuvPlanes, out: Picture) -> None:
        """The commonest planes by far, made small in one sheet of I420, which OpenCV paints itself."""
        height, width = out.shape[:2]
        i420 = self._buffer(7, (height + height // 2, width))
        luma, colours = i420[:height], i420[height:].reshape(2, height // 2, width // 2)
        _resize_into(planes.luma, luma, _interpolation(planes.luma.shape, luma.shape, colour=False))
        for plane, colour in zip(planes.chroma, colours, strict=True):
            _resize_into(plane, colour, cv2.INTER_NEAREST_EXACT)
        _copy_if_needed(out, cv2.cvtColor(i420, cv2.COLOR_YUV2BGR_I420, dst=out))

    def _convert_antialiased(self, planes: YuvPlanes, out: Picture) -> None:
        """Each plane by itself, as both the mean over pixels and the change of colours are linear."""
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
        """A plane of colour at half the height and width that are wanted, each rounded up."""
        height, width = (-(-side // 2) for side in size)
        buffer = self._buffer(10 + number, (height, width, *plane.shape[2:]))
        return np.asarray(
            cv2.resize(plane, (width, height), dst=buffer, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8
        )

    def _buffer(self, number: int, shape: tuple[int, ...]) -> Picture:
        buffer = self._buffers.get((number, shape))
        if buffer is None:
            # Another size than before: the old ones are not needed any more.
            self._buffers = {k: m for k, m in self._buffers.items() if k[0] != number}
            buffer = self._buffers[number, shape] = np.empty(shape, np.uint8)
        return buffer


def convert_full_size(planes: YuvPlanes) -> Picture:
    """The picture at its own size, BGR uint8 (height, width, 3)."""
    width, height = planes.size_px
    picture: Picture = np.empty((height, width, 3), np.uint8)
    YuvConverter().convert(planes, picture)
    return picture


def _interpolation(old: tuple[int, ...], new: tuple[int, int], *, colour: bool) -> int:
    """Bilinear, but for what is cheaper and no worse.

    Where that falls on the middle of a pixel each time, as with a third, taking the pixel is the same. And
    colour that gets smaller was coarse before: on real 1080p pictures the mean error stays what it was.
    """
    sides = list(zip(old, new, strict=False))  # a third length is that of two channels
    middle = all(before % after == 0 and before // after % 2 for before, after in sides)
    coarse = colour and all(before >= after for before, after in sides)
    return cv2.INTER_NEAREST_EXACT if middle or coarse else cv2.INTER_LINEAR


def _to_8_bit(plane: Plane, white: int) -> Picture:
    if plane.dtype == np.uint8:
        return np.asarray(plane, np.uint8)
    # Powers of two on both sides, so that black, grey and white of 8 bits are met exactly.
    return np.asarray(cv2.convertScaleAbs(plane, alpha=256 / (white + 1)), np.uint8)


def _antialiased(plane: Picture, width_px: int, height_px: int) -> Picture:
    if plane.ndim == 2:
        return resize_antialiased(plane, width_px, height_px)
    channels = (plane[..., number] for number in range(plane.shape[2]))
    return np.dstack([resize_antialiased(channel, width_px, height_px) for channel in channels])


def _is_twice_as_large(old: tuple[int, ...], new: tuple[int, int]) -> bool:
    """Whether a plane of colour is at least twice as high and wide as it is wanted.

    Then every second line and column of it will do: colour as coarse as in nearly all video and JPEG. Half as
    much memory is read, which is most of the cost: a tenth of all that is above decoding a 1080p picture.
    """
    return all(before >= 2 * after for before, after in zip(old, new, strict=False))


def _is_i420(planes: YuvPlanes, size: tuple[int, int]) -> bool:
    """Whether OpenCV paints them as they are: BT.601 of 8 bits as broadcasting has it, two planes of colour.

    At a size of which colour is wanted half as fine, and with as many lines and columns as that takes.
    """
    return (
        (planes.matrix, planes.full_range, planes.white) == ("bt601", False, 255)
        and len(planes.chroma) == 2
        and all(_is_twice_as_large(plane.shape, size) for plane in planes.chroma)
        and size[0] % 2 == size[1] % 2 == 0
    )


def _resize_into(plane: Plane, out: Picture, how: int) -> None:
    _copy_if_needed(out, cv2.resize(plane, (out.shape[1], out.shape[0]), dst=out, interpolation=how))


def _apply_matrix(parts: list[Picture], planes: YuvPlanes, merged: Picture, out: Picture) -> None:
    matrix = _to_bgr(planes.matrix, planes.full_range, grey=len(parts) == 1)
    # `merge` takes planes of one and of two channels alike.
    joined = parts[0][:, :, None] if len(parts) == 1 else cv2.merge(parts, dst=merged)
    _copy_if_needed(out, cv2.transform(joined, matrix, dst=out))


def _copy_if_needed(out: Picture, given: object) -> None:
    # OpenCV writes through a view of rows; should it ever answer with an array of its own, that one counts.
    answer = np.asarray(given, np.uint8)
    if answer is not out and not np.shares_memory(answer, out):
        out[:] = answer


def _yuv_to_bgr_rows(name: ColourMatrix) -> NDArray[np.float64]:
    """What turns Y, U and V of full range into B, G and R."""
    if name == "ycgco":  # U is how green, V how orange it is
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
    """What turns (Y, U, V, 1), or (Y, 1), of 8 bits into B, G, R."""
    luma, chroma, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
    rows = _yuv_to_bgr_rows(name) * np.array([luma, chroma, chroma])
    offset = -rows @ np.array([black, 128.0, 128.0])
    if grey:
        rows, offset = rows[:, :1], np.full(3, -luma * black)
    return np.ascontiguousarray(np.column_stack([rows, offset]), np.float32)
