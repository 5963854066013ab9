"""Still pictures: from bytes or a file to BGR, with the size looked at before anything is decoded."""

import logging
import os
import re
import stat
import struct
from pathlib import Path

import cv2
import numpy as np

from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.camera.sources.opencv_setup import configure_opencv
from visionedge.errors import SourceError
from visionedge.frames.types import Picture

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
PICTURE_FORMATS = "JPEG, PNG, WebP, BMP or TIFF"

MAX_FILE_BYTES = 512 * 1024 * 1024
"""A picture at the pixel limit, uncompressed, still fits."""

_FILLER_BYTES = 64
"""More than the last part of a picture takes that the library decodes at once."""

# Markers of JPEG without a length, and those that carry the size (all frame headers but DHT, JPG and DAC).
_STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def decode_picture(
    data: bytes, *, name: str = "the picture", max_pixels: int = SourceLimits().max_pixels
) -> Picture:
    """Decode JPEG, PNG, WebP, BMP or TIFF, turned upright where its EXIF data says so.

    Returns:
        BGR, uint8 (height, width, 3); transparency is left out, 16 bits become 8.

    Raises:
        SourceError: it is none of these, is cut off, or is larger than `max_pixels`.
    """
    size = read_picture_size(data)
    if size is None:
        raise SourceError(f"{name} is no picture that can be read; give {PICTURE_FORMATS}")
    width, height = size
    if width * height > max_pixels:
        raise SourceError(
            f"{name} is {width} x {height} pixels, more than {max_pixels / 1e6:g} megapixels; make it smaller"
        )
    configure_opencv()
    picture = _decode(data)
    if picture is None and data[:3] == b"\xff\xd8\xff":
        picture = _decode_without_end_marker(data)
    if picture is None:
        raise SourceError(f"{name} is a damaged picture; save it again")
    return picture


def _decode(data: bytes) -> Picture | None:
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, MemoryError):
        return None
    return None if picture is None or picture.size == 0 else np.asarray(picture, np.uint8)


def _decode_without_end_marker(data: bytes) -> Picture | None:
    """A baseline JPEG of which nothing but the end marker is missing, as some cameras send it; else None.

    Then it does not matter what follows the data; where more is missing, what follows would show in the
    picture. No end marker is put behind it: where data is missing the library would complain on stderr.
    """
    data = data[:-1] if data.endswith(b"\xff") else data
    one, other = (_decode(data + filler * _FILLER_BYTES) for filler in (b"\x00", b"\x55"))
    if one is None or other is None or not np.array_equal(one, other):
        return None
    return one


def read_picture(path: Path, *, max_pixels: int = SourceLimits().max_pixels) -> Picture:
    """Read and decode a picture file; see `decode_picture`.

    Raises:
        SourceError: the file is missing, cannot be opened, or is no such picture.
    """
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            check_regular_file(str(path), os.fstat(file.fileno()))
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SourceError(f"{path!r} cannot be the name of a file") from None
    if len(data) > MAX_FILE_BYTES:
        raise SourceError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; make it smaller")
    return decode_picture(data, name=str(path), max_pixels=max_pixels)


def check_regular_file(name: str, seen: os.stat_result) -> None:
    """Refuse what is no file, and would never end or never begin to be read: a pipe, a device, a socket.

    Raises:
        SourceError: it is none, or holds nothing.
    """
    if not stat.S_ISREG(seen.st_mode):
        raise SourceError(f"{name} is no regular file")
    if seen.st_size == 0:
        raise SourceError(f"{name} is empty")


def _open_nonblocking(path: str, flags: int) -> int:
    # A pipe that nobody writes to would keep us waiting for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def list_pictures(folder: Path) -> list[Path]:
    """The picture files in a folder (not below it, none that is hidden), in natural order: 2 before 10.

    Raises:
        SourceError: the folder cannot be listed.
    """
    try:
        found = [
            p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")
        ]
    except FileNotFoundError:
        raise SourceError(f"{folder} does not exist; check the path") from None
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}") from None
    return sorted(found, key=lambda p: natural_sort_key(p.name))


def natural_sort_key(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key that takes runs of digits as numbers."""
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name.casefold())
    # Equal but for case or leading zeros: the name itself decides, so that the order is always the same.
    return (*((int(digits or -1), text) for digits, text in parts), (-1, name))


def read_picture_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in px as the header says; None for anything that is no header of our formats."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_size(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            # A PNG without its end is cut off; the library would say so on stderr.
            return struct.unpack_from(">II", data, 16) if b"IEND" in data[-64:] else None
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data[:2] == b"BM":
            width, height = struct.unpack_from("<ii", data, 18)
            return abs(width), abs(height)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff_size(data)
    except (struct.error, IndexError):
        pass  # the header is cut off: no picture
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while True:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _STANDALONE_MARKERS:
            at += 2
        elif marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return width, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    sides: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (256, 257):  # ImageWidth, ImageLength; SHORT or LONG
            sides[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)[0]
    return (sides[256], sides[257]) if len(sides) == 2 else None


# A folder of pictures as a source: each once, in natural order, at a steady rate.


log = logging.getLogger(__name__)


_PICTURES_PER_S = 1.0
"""A folder has no rate of its own."""


class FolderSource:
    """Pictures from files; unreadable ones are left out and counted in `skipped`. See `Source`."""

    live = False
    decoder = "opencv"

    def __init__(self, name: str, paths: list[Path], limits: SourceLimits) -> None:
        self.skipped = 0
        self.step_s = 1 / (limits.pictures_per_s or _PICTURES_PER_S)
        self._name = name
        self._limits = limits
        self._left = paths[::-1]
        self._given = 0

    def __repr__(self) -> str:
        return f"<PicturesSource {self._name} left={len(self._left)} skipped={self.skipped}>"

    def read(self) -> DecodedPicture | None:
        """See `Source.read`."""
        while self._left:
            try:
                picture = read_picture(self._left.pop(), max_pixels=self._limits.max_pixels)
            except SourceError as error:
                self._skip(error)
                continue
            return self._decoded(picture)
        self._judge_end()
        return None

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `Source.want`: they are played at the rate they began with."""

    def interrupt(self) -> None:
        """See `Source.interrupt`: reading a picture is quick."""

    def close(self) -> None:
        """See `Source.close`."""
        self._left.clear()

    def _decoded(self, picture: Picture) -> DecodedPicture:
        position_s = self._given * self.step_s
        self._given += 1
        return WholePicture(lambda: picture, picture.shape[1], picture.shape[0], position_s)

    def _skip(self, error: SourceError) -> None:
        self.skipped += 1
        if self.skipped == 1:
            log.warning("%s; it is left out, and so are others like it", error)

    def _judge_end(self) -> None:
        if self._given == 0:
            raise SourceError(f"none of the {self.skipped} pictures in {self._name} can be read")
        if self.skipped > 1:
            log.warning("%d pictures of %s could not be read", self.skipped, self._name)


def open_folder(folder: Path, limits: SourceLimits) -> FolderSource:
    """Open a folder of pictures.

    Raises:
        SourceError: it cannot be listed or holds no picture.
    """
    paths = list_pictures(folder)
    if not paths:
        raise SourceError(
            f"{folder} holds no pictures ({', '.join(sorted(s[1:] for s in PICTURE_SUFFIXES))})"
        )
    return FolderSource(str(folder), paths, limits)


def open_picture(path: Path, limits: SourceLimits) -> FolderSource:
    """Open one picture: a folder of one.

    Raises:
        SourceError: it is no picture; read at once, so that the reason names it.
    """
    read_picture(path, max_pixels=limits.max_pixels)
    return FolderSource(str(path), [path], limits)
