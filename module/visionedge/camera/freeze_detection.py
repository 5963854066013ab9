"""What a live picture may hide: that it is black, or that it has not changed for a long time.

A camera that works shows noise, but behind a codec it need not: at a low bit rate a quiet scene is coded as
"nothing has changed" for many seconds, until the next key picture. A key picture is coded on its own, with
the noise of its moment. So a picture counts as frozen when key pictures are the same in every pixel; where
none comes, when nothing has changed at all for far longer than they usually lie apart.
"""

import zlib
from collections import deque
from typing import Literal

import numpy as np

from visionedge.frames.types import Picture

ContentState = Literal["live", "frozen", "black"]

_INSPECT_INTERVAL_NS = 1_000_000_000
_BLACK_NS = 3_000_000_000
_FROZEN_NS = 10_000_000_000
_FROZEN_REPEATS = 3
_FROZEN_WITHOUT_KEYS_NS = 30_000_000_000
_KEY_GAP_FACTOR = 3

# About so many points across and down are looked at for darkness.
_POINTS = 64
_MAX_DARK_LEVEL = 16
_MAX_BRIGHT_SHARE = 0.02


class _StillPeriod:
    """How long pictures have been the same, in every pixel."""

    def __init__(self) -> None:
        self._seen: int | None = None
        self._since_ns = 0
        self.repeats = 0

    def note(self, digest: int, now_ns: int) -> None:
        """Another picture; compared with the first of a row, so that what changes slowly is not still."""
        if digest == self._seen:
            self.repeats += 1
        else:
            self._seen, self._since_ns, self.repeats = digest, now_ns, 0

    def duration_ns(self, now_ns: int) -> int:
        """For how long."""
        return now_ns - self._since_ns if self._seen is not None else 0


class FreezeDetector:
    """Looks once a second. Black or frozen is what stays so; one other picture ends it."""

    def __init__(self) -> None:
        self._content: ContentState = "live"
        self._looked_ns: int | None = None
        self._dark_since_ns: int | None = None
        self._any, self._keys = _StillPeriod(), _StillPeriod()
        self._key_looked_ns: int | None = None
        self._key_ns: int | None = None
        self._key_gaps_ns: deque[int] = deque(maxlen=8)
        self._all_are_keys = True

    def __repr__(self) -> str:
        return f"<ContentWatch {self._content} repeats={self._keys.repeats}>"

    def note(self, now_ns: int, *, key: bool) -> bool:
        """A picture has come; whether it should be looked at although nobody else wants it.

        Where only some are key pictures, those that are due to be analysed may never be among them.
        """
        if not key:
            self._all_are_keys = False
            return False
        if self._key_ns is not None:
            self._key_gaps_ns.append(now_ns - self._key_ns)
        self._key_ns = now_ns
        return not self._all_are_keys and self._wants_key(now_ns)

    def inspect(self, picture: Picture, now_ns: int, *, key: bool) -> ContentState:
        """What the picture (BGR, any size) and those before it show; `key`: it is a key picture."""
        for_keys = key and self._wants_key(now_ns)
        if for_keys or self._looked_ns is None or now_ns - self._looked_ns >= _INSPECT_INTERVAL_NS:
            self._looked_ns = now_ns
            digest = zlib.crc32(np.ascontiguousarray(picture).data)
            self._any.note(digest, now_ns)
            if for_keys:
                self._key_looked_ns = now_ns
                self._keys.note(digest, now_ns)
            self._content = self._classify(picture, now_ns)
        return self._content

    def _wants_key(self, now_ns: int) -> bool:
        return self._key_looked_ns is None or now_ns - self._key_looked_ns >= _INSPECT_INTERVAL_NS

    def _classify(self, picture: Picture, now_ns: int) -> ContentState:
        if not _is_dark(picture):
            self._dark_since_ns = None
        elif self._dark_since_ns is None:
            self._dark_since_ns = now_ns
        if self._dark_since_ns is not None and now_ns - self._dark_since_ns >= _BLACK_NS:
            return "black"
        return "frozen" if self._is_frozen(now_ns) else "live"

    def _is_frozen(self, now_ns: int) -> bool:
        if self._keys.repeats >= _FROZEN_REPEATS and self._keys.duration_ns(now_ns) >= _FROZEN_NS:
            return True
        usual_ns = max(self._key_gaps_ns, default=0)
        return self._any.duration_ns(now_ns) >= max(_FROZEN_WITHOUT_KEYS_NS, _KEY_GAP_FACTOR * usual_ns)


def _is_dark(picture: Picture) -> bool:
    height, width = picture.shape[:2]
    points = picture[:: max(1, height // _POINTS), :: max(1, width // _POINTS)]
    return float((points.max(axis=2) <= _MAX_DARK_LEVEL).mean()) >= 1 - _MAX_BRIGHT_SHARE
