"""Finds the JPEG pictures in a stream of bytes, whatever stands between them.

Cameras disagree on how a part of a multipart stream looks (boundaries, lengths, types), but not on how a JPEG
looks: it is found by its own markers, and all else is ignored.
"""

_SOI = b"\xff\xd8\xff"
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_SOS = 0xDA
_BETWEEN_SCANS = frozenset({0xC4, _SOS, 0xDB, 0xDC, 0xDD, 0xFE})
"""Segments that may follow a scan: tables, restart intervals, comments and the next scan."""


class JpegScanner:
    """``feed`` bytes, ``take`` pictures.

    A picture longer than `max_bytes` is let go, so nothing that a camera sends makes this larger than that.
    A picture without its end marker ends where the next one begins.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._data = bytearray()
        self._at = 0
        """What lies before it has been looked at; 0 while no picture has begun."""
        self._in_scan = False
        self.damaged_count = 0

    def __repr__(self) -> str:
        return f"<JpegScanner {len(self._data)} bytes damaged={self.damaged_count}>"

    @property
    def begun(self) -> bool:
        """Whether a picture has begun and not ended."""
        return self._at > 0

    @property
    def held_bytes(self) -> int:
        """How much of the stream it keeps."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        self._data += data

    def take(self) -> bytes | None:
        """The next whole picture; None where more bytes are needed for it."""
        while True:
            if self._at == 0 and not self._begin():
                return None
            end = self._end()
            if end is not None and end > 0:
                return self._cut(end)
            if end is None and len(self._data) <= self._max_bytes:
                return None
            self._drop(len(self._data) if end is None else len(_SOI) - 1)

    def finish(self) -> bytes | None:
        """The stream has ended: the picture that has begun and lacks its end marker alone."""
        return self._cut(len(self._data)) if self._in_scan else None

    def _begin(self) -> bool:
        start = self._data.find(_SOI)
        if start < 0:
            del self._data[: max(0, len(self._data) - len(_SOI) + 1)]
            return False
        del self._data[:start]
        self._at, self._in_scan = 2, False
        return True

    def _drop(self, size: int) -> None:
        """What began is no picture: look for the next behind so many of its bytes."""
        self.damaged_count += 1
        del self._data[:size]
        self._at, self._in_scan = 0, False

    def _cut(self, end: int) -> bytes:
        picture = bytes(self._data[:end])
        del self._data[:end]
        self._at, self._in_scan = 0, False
        return picture

    def _end(self) -> int | None:
        """Where the picture ends; None where more bytes are needed, 0 where it is none."""
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
        """Go on behind a marker; False where more bytes are needed."""
        if marker == 0xFF:  # padding
            self._at += 1
        elif marker in _STANDALONE or (self._in_scan and marker not in _BETWEEN_SCANS):
            self._at += 2
        elif self._at + 4 > len(self._data):
            return False
        else:
            self._at += 2 + max(2, int.from_bytes(self._data[self._at + 2 : self._at + 4], "big"))
            self._in_scan = marker == _SOS
        return True
