"""What a live picture may hide: that it is black, or that it has not changed for a long time.

A camera that works shows noise, but behind a codec it need not: at a low bit rate a quiet scene is coded as
"nothing has changed" for many seconds, until the next key picture. So a picture counts as frozen only when
nothing in it has changed at all, and key pictures, each a coding of its own, have shown the same, or none has
come for far longer than usual.
"""

import zlib
from collections import deque
from typing import Literal

import numpy as np

from visionedge.frames import Picture

Content = Literal["live", "frozen", "black"]

_LOOK_NS = 1_000_000_000
_BLACK_NS = 3_000_000_000
_FROZEN_NS = 10_000_000_000
_FROZEN_KEYS = 3
_FROZEN_WITHOUT_KEYS_NS = 30_000_000_000
_KEY_GAPS = 3

# About so many points across and down are looked at for darkness.
_POINTS = 64
_DARK = 16
_EXCEPTIONS = 0.02


class ContentWatch:
    """Looks once a second. Black or frozen is what stays so; one other picture ends it."""

    def __init__(self) -> None:
        self._content: Content = "live"
        self._looked_ns: int | None = None
        self._dark_since_ns: int | None = None
        self._still: int | None = None
        self._still_since_ns = self._still_since_key = 0
        self._keys = 0
        self._key_ns: int | None = None
        self._key_gaps_ns: deque[int] = deque(maxlen=8)

    def __repr__(self) -> str:
        return f"<ContentWatch {self._content} keys={self._keys}>"

    def note_key(self, now_ns: int) -> None:
        """A key picture has come, looked at or not."""
        if self._key_ns is not None:
            self._key_gaps_ns.append(now_ns - self._key_ns)
        self._key_ns = now_ns
        self._keys += 1

    def look(self, picture: Picture, now_ns: int) -> Content:
        """What the picture (BGR, any size) and those before it show."""
        if self._looked_ns is None or now_ns - self._looked_ns >= _LOOK_NS:
            self._looked_ns = now_ns
            self._content = self._judge(picture, now_ns)
        return self._content

    def _judge(self, picture: Picture, now_ns: int) -> Content:
        if _is_dark(picture):
            if self._dark_since_ns is None:
                self._dark_since_ns = now_ns
        else:
            self._dark_since_ns = None
        still = zlib.crc32(np.ascontiguousarray(picture).data)
        if still != self._still:
            # Compared with the first of a row, so that what changes slowly is not called still.
            self._still, self._still_since_ns, self._still_since_key = still, now_ns, self._keys
        if self._dark_since_ns is not None and now_ns - self._dark_since_ns >= _BLACK_NS:
            return "black"
        return "frozen" if self._is_frozen(now_ns - self._still_since_ns) else "live"

    def _is_frozen(self, still_ns: int) -> bool:
        if self._keys - self._still_since_key >= _FROZEN_KEYS:
            return still_ns >= _FROZEN_NS
        usual_ns = max(self._key_gaps_ns, default=0)
        return still_ns >= max(_FROZEN_WITHOUT_KEYS_NS, _KEY_GAPS * usual_ns)


def _is_dark(picture: Picture) -> bool:
    height, width = picture.shape[:2]
    points = picture[:: max(1, height // _POINTS), :: max(1, width // _POINTS)]
    return float((points.max(axis=2) <= _DARK).mean()) >= 1 - _EXCEPTIONS
