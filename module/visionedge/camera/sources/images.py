"""Still pictures: decodes bytes and files to BGR, finds JPEG pictures in a stream, plays a folder.

The size is read from the header before anything is decoded, so a picture cannot take more memory than
allowed.
"""

import logging
import re
import struct
from pathlib import Path

import cv2
import numpy as np

from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.camera.sources.opencv_setup import configure_opencv
from visionedge.errors import SourceError
from visionedge.frames.types import Picture
from visionedge.runtime.files import read_regular_file

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
PICTURE_FORMATS = "JPEG, PNG, WebP, BMP or TIFF"

MAX_FILE_BYTES = 512 * 1024 * 1024
"""An uncompressed picture at the pixel limit is smaller."""

_FILLER_BYTES = 64
"""More bytes than the decoder reads ahead at the end of a picture."""

JPEG_START = b"\xff\xd8\xff"
"""Start-of-image marker, and the first byte of the marker that follows it."""

JPEG_END = b"\xff\xd9"

_STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG markers without a length."""

_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers whose segment holds the size: SOF0 to SOF15, without DHT, JPG and DAC."""

_SOS = 0xDA
_SEGMENTS_BETWEEN_SCANS = frozenset({0xC4, _SOS, 0xDB, 0xDC, 0xDD, 0xFE})
"""Segments that may follow a scan: tables, restart intervals, comments and the next scan."""

_PICTURES_PER_S = 1.0
"""Rate of a folder, which has none of its own."""


def decode_picture(
    data: bytes, *, name: str = "the picture", max_pixels: int = SourceLimits().max_pixels
) -> Picture:
    """Decode JPEG, PNG, WebP, BMP or TIFF, upright as its EXIF data says.

    Returns:
        BGR, uint8 (height, width, 3); without transparency, 16 bits become 8.

    Raises:
        SourceError: it has another format, is cut off, or is larger than `max_pixels`.
    """
    size = read_picture_size(data)
    if size is None:
        raise SourceError(f"{name}: not a readable picture; supported are {PICTURE_FORMATS}")
    width, height = size
    if width * height > max_pixels:
        limit = f"more than the limit of {max_pixels / 1e6:g} megapixels"
        raise SourceError(f"{name}: {width} x {height} pixels, {limit}; use a smaller picture")
    configure_opencv()
    picture = _decode(data)
    if picture is None and data.startswith(JPEG_START):
        picture = _decode_without_end_marker(data)
    if picture is None:
        raise SourceError(f"{name}: damaged picture; save it again")
    return picture


def _decode(data: bytes) -> Picture | None:
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, MemoryError):
        return None
    return None if picture is None or picture.size == 0 else np.asarray(picture, np.uint8)


def _decode_without_end_marker(data: bytes) -> Picture | None:
    """Decode a baseline JPEG without its end marker, as some cameras send it; None if more is missing.

    If only the end marker is missing, the bytes after the data do not change the picture; so two fillers must
    give the same picture. An end marker is not appended: the library would print a warning on stderr if data
    is missing.
    """
    data = data[:-1] if data.endswith(b"\xff") else data
    one, other = (_decode(data + filler * _FILLER_BYTES) for filler in (b"\x00", b"\x55"))
    if one is None or other is None or not np.array_equal(one, other):
        return None
    return one


def read_picture(path: Path, *, max_pixels: int = SourceLimits().max_pixels) -> Picture:
    """Read and decode a picture file; see `decode_picture`.

    Raises:
        SourceError: the file is missing, cannot be read, or is not such a picture.
    """
    try:
        data = read_regular_file(path, max_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        raise SourceError(f"{path}: does not exist; check the path") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise SourceError(f"{path}: empty file")
    return decode_picture(data, name=str(path), max_pixels=max_pixels)


def list_pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder in natural order (2 before 10); no subfolders, no hidden files.

    Raises:
        SourceError: the folder cannot be listed.
    """
    try:
        found = [
            p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")
        ]
    except FileNotFoundError:
        raise SourceError(f"{folder}: does not exist; check the path") from None
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed: {error.strerror}") from None
    return sorted(found, key=lambda p: natural_sort_key(p.name))


def natural_sort_key(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that compares runs of digits as numbers."""
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name.casefold())
    # Names that differ only in case or leading zeros are ordered by the name itself.
    return (*((int(digits or -1), text) for digits, text in parts), (-1, name))


def read_picture_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in px from the header; None if it is not a header of a supported format."""
    try:
        if data.startswith(JPEG_START):
            return _jpeg_size(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            # A PNG without its end is cut off; the library would print an error on stderr.
            return struct.unpack_from(">II", data, 16) if b"IEND" in data[-64:] else None
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data[:2] == b"BM":
            width, height = struct.unpack_from("<ii", data, 18)
            return abs(width), abs(height)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff_size(data)
    except (struct.error, IndexError):
        pass  # the header is cut off
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


class JpegScanner:
    """Finds JPEG pictures in a stream of bytes: `feed` bytes, `take` pictures.

    Cameras disagree about the parts of a multipart stream (boundaries, lengths, types), but not about JPEG
    markers, so pictures are found by their markers and all other bytes are skipped. A picture longer than
    `max_bytes` is dropped, which bounds the memory. A picture without an end marker ends where the next one
    begins.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._data = bytearray()
        self._at = 0
        """Bytes of the current picture that were examined; 0 while no picture has begun."""
        self._in_scan = False
        self.damaged_count = 0

    def __repr__(self) -> str:
        return f"<JpegScanner {len(self._data)} bytes damaged={self.damaged_count}>"

    @property
    def has_begun(self) -> bool:
        """Whether a picture has begun and not ended."""
        return self._at > 0

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the stream that are buffered."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """Append bytes of the stream."""
        self._data += data

    def take(self) -> bytes | None:
        """Return the next whole picture; None if it needs more bytes."""
        while True:
            if self._at == 0 and not self._begin():
                return None
            end = self._end()
            if end is not None and end > 0:
                return self._cut(end)
            if end is None and len(self._data) <= self._max_bytes:
                return None
            self._drop(len(self._data) if end is None else len(JPEG_START) - 1)

    def finish(self) -> bytes | None:
        """Return the last picture at the end of the stream, if it lacks only its end marker."""
        return self._cut(len(self._data)) if self._in_scan else None

    def _begin(self) -> bool:
        start = self._data.find(JPEG_START)
        if start < 0:
            del self._data[: max(0, len(self._data) - len(JPEG_START) + 1)]
            return False
        del self._data[:start]
        self._at, self._in_scan = 2, False
        return True

    def _drop(self, size: int) -> None:
        """Count a damaged picture and search for the next one after `size` bytes."""
        self.damaged_count += 1
        del self._data[:size]
        self._at, self._in_scan = 0, False

    def _cut(self, end: int) -> bytes:
        picture = bytes(self._data[:end])
        del self._data[:end]
        self._at, self._in_scan = 0, False
        return picture

    def _end(self) -> int | None:
        """Return the length of the picture; None if more bytes are needed, 0 if it is not a JPEG."""
        data = self._data
        while True:
            if self._in_scan:
                at = data.find(b"\xff", self._at)
                self._at = len(data) if at < 0 else at
            if self._at + 2 > len(data):
                return None
            marker = data[self._at + 1]
            if marker == 0xD9:
                return self._at + 2
            if self._in_scan and marker == 0xD8:
                return self._at
            if not self._in_scan and (data[self._at] != 0xFF or marker in (0, 0xD8)):
                return 0
            if not self._step(marker):
                return None

    def _step(self, marker: int) -> bool:
        """Skip a marker and its segment; False if more bytes are needed."""
        if marker == 0xFF:  # padding
            self._at += 1
        elif marker in _STANDALONE_MARKERS or (self._in_scan and marker not in _SEGMENTS_BETWEEN_SCANS):
            self._at += 2
        elif self._at + 4 > len(self._data):
            return False
        else:
            self._at += 2 + max(2, int.from_bytes(self._data[self._at + 2 : self._at + 4], "big"))
            self._in_scan = marker == _SOS
        return True


class FolderSource:
    """A `FrameSource` of picture files: each once, in natural order, at a steady rate.

    Unreadable files are skipped and counted in `skipped`.
    """

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
        return f"<FolderSource {self._name} left={len(self._left)} skipped={self.skipped}>"

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`."""
        while self._left:
            try:
                picture = read_picture(self._left.pop(), max_pixels=self._limits.max_pixels)
            except SourceError as error:
                self._skip(error)
                continue
            return self._decoded(picture)
        self._check_end()
        return None

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource`; the rate stays as it was at the beginning."""

    def interrupt(self) -> None:
        """See `FrameSource`; reading a picture is quick."""

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._left.clear()

    def _decoded(self, picture: Picture) -> DecodedPicture:
        position_s = self._given * self.step_s
        self._given += 1
        return WholePicture(lambda: picture, picture.shape[1], picture.shape[0], position_s)

    def _skip(self, error: SourceError) -> None:
        self.skipped += 1
        if self.skipped == 1:
            log.warning("%s; skipped, further unreadable pictures are counted", error)

    def _check_end(self) -> None:
        if self._given == 0:
            raise SourceError(f"{self._name}: none of the {self.skipped} pictures can be read")
        if self.skipped > 1:
            log.warning("%s: %d pictures could not be read", self._name, self.skipped)


def open_folder(folder: Path, limits: SourceLimits) -> FolderSource:
    """Open a folder of pictures.

    Raises:
        SourceError: it cannot be listed, or there is no picture in it.
    """
    paths = list_pictures(folder)
    if not paths:
        raise SourceError(
            f"{folder}: no pictures in it ({', '.join(sorted(s[1:] for s in PICTURE_SUFFIXES))})"
        )
    return FolderSource(str(folder), paths, limits)


def open_picture(path: Path, limits: SourceLimits) -> FolderSource:
    """Open one picture as a folder of one.

    Raises:
        SourceError: it cannot be read as a picture; it is read at once, so that the error names it.
    """
    read_picture(path, max_pixels=limits.max_pixels)
    return FolderSource(str(path), [path], limits)
