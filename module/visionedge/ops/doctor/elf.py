"""Which libraries a shared object asks for, read from its own header; nothing is loaded."""

import struct
from pathlib import Path
from typing import BinaryIO

_NEEDED, _STRINGS, _END = 1, 5, 0
_DYNAMIC, _LOAD = 2, 1
_MOST_ENTRIES, _MOST_SEGMENTS, _SEGMENT_BYTES = 4096, 128, 56
_MOST_NAME_BYTES = 256


def needed_by(path: Path) -> tuple[str, ...]:
    """The libraries that the loader will want for a 64-bit little-endian ELF file, in its order.

    Nothing where the file is no such thing: whoever asks has a table to fall back on.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    # What a damaged file may point to: outside of itself, at nothing, or beyond any file.
    except (OSError, struct.error, StopIteration, ValueError, OverflowError):
        return ()


def _read(file: BinaryIO) -> tuple[str, ...]:
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        return ()
    (start,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    if size != _SEGMENT_BYTES or count > _MOST_SEGMENTS:
        return ()
    file.seek(start)
    segments = [_segment(file.read(size)) for _ in range(count)]
    dynamic = next(segment for segment in segments if segment[0] == _DYNAMIC)
    file.seek(dynamic[1])
    entries = _entries(file.read(min(dynamic[3], 16 * _MOST_ENTRIES)))
    strings = _file_offset(segments, next(value for tag, value in entries if tag == _STRINGS))
    return tuple(_name(file, strings + value) for tag, value in entries if tag == _NEEDED)


def _name(file: BinaryIO, offset: int) -> str:
    file.seek(offset)
    return file.read(_MOST_NAME_BYTES).split(b"\0")[0].decode(errors="replace")


def _segment(data: bytes) -> tuple[int, int, int, int]:
    """Type, offset in the file, address, and size in the file."""
    (kind,) = struct.unpack_from("<I", data)
    offset, address, _, size = struct.unpack_from("<QQQQ", data, 8)
    return kind, offset, address, size


def _entries(data: bytes) -> list[tuple[int, int]]:
    entries: list[tuple[int, int]] = []
    for tag, value in struct.iter_unpack("<qQ", data[: len(data) // 16 * 16]):
        if tag == _END:
            break
        entries.append((tag, value))
    return entries


def _file_offset(segments: list[tuple[int, int, int, int]], address: int) -> int:
    """Where in the file an address of the loaded object lies."""
    return next(
        offset + address - start
        for kind, offset, start, size in segments
        if kind == _LOAD and start <= address < start + size
    )
