"""Detects a live camera whose picture is black, or frozen.

The picture of a working camera has noise, but a codec can hide it: at a low bit rate a quiet scene is coded
as "unchanged" for many seconds, until the next key picture, which is coded on its own with new noise. So a
camera is frozen if its key pictures are equal in every pixel; without key pictures, if no pixel changes for
much longer than the usual gap between them.
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

_POINTS = 64
"""About this many points across and down are sampled for darkness."""

_MAX_DARK_LEVEL = 16
_MAX_BRIGHT_SHARE = 0.02


class _StillPeriod:
    """Measures how long pictures have been equal in every pixel."""

    def __init__(self) -> None:
        self._seen: int | None = None
        self._since_ns = 0
        self.repeats = 0

    def note(self, digest: int, now_ns: int) -> None:
        """Compare a picture with the first of a series of equal ones."""
        if digest == self._seen:
            self.repeats += 1
        else:
            self._seen, self._since_ns, self.repeats = digest, now_ns, 0

    def duration_ns(self, now_ns: int) -> int:
        """Return how long the pictures have been equal."""
        return now_ns - self._since_ns if self._seen is not None else 0


class FreezeDetector:
    """Inspects a picture once a second; one picture that differs ends `black` or `frozen`."""

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
        return f"<FreezeDetector {self._content} repeats={self._keys.repeats}>"

    def note(self, now_ns: int, *, key: bool) -> bool:
        """Note a picture; return whether it must be inspected even if it is not analysed.

        If only some pictures are key pictures, the analysed ones may never be among them.
        """
        if not key:
            self._all_are_keys = False
            return False
        if self._key_ns is not None:
            self._key_gaps_ns.append(now_ns - self._key_ns)
        self._key_ns = now_ns
        return not self._all_are_keys and self._wants_key(now_ns)

    @property
    def content(self) -> ContentState:
        """What the last picture that was inspected has shown."""
        return self._content

    def is_due(self, now_ns: int, *, key: bool) -> bool:
        """Whether `inspect` would look at a picture of this time; `key`: it is a key picture."""
        if key and self._wants_key(now_ns):
            return True
        return self._looked_ns is None or now_ns - self._looked_ns >= _INSPECT_INTERVAL_NS

    def inspect(self, picture: Picture, now_ns: int, *, key: bool) -> ContentState:
        """Inspect a picture (BGR, any size) and return the state; `key`: it is a key picture."""
        if self.is_due(now_ns, key=key):
            for_keys = key and self._wants_key(now_ns)
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
