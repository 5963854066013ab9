"""What a live picture may hide: that it is black, or that it has not changed for a long time."""

from typing import Literal

import numpy as np

from visionedge.frames import Picture

Content = Literal["live", "frozen", "black"]

_LOOK_NS = 1_000_000_000
_BLACK_NS = 3_000_000_000
_FROZEN_NS = 10_000_000_000

# About so many points across and down are looked at; each as it is, for an average would hide the noise.
_POINTS = 64
_DARK = 16
_SAME = 2
# A clock that the camera writes into its pictures goes on when nothing else does.
_EXCEPTIONS = 0.02


class ContentWatch:
    """Looks once a second. Black or frozen is what stays so; one other picture ends it."""

    def __init__(self) -> None:
        self._content: Content = "live"
        self._looked_ns: int | None = None
        self._dark_since_ns: int | None = None
        self._still: Picture | None = None
        self._still_since_ns = 0

    def __repr__(self) -> str:
        return f"<ContentWatch {self._content}>"

    def look(self, picture: Picture, now_ns: int) -> Content:
        """What the picture (BGR, any size) and those before it show."""
        if self._looked_ns is None or now_ns - self._looked_ns >= _LOOK_NS:
            self._looked_ns = now_ns
            self._content = self._judge(_points(picture), now_ns)
        return self._content

    def _judge(self, points: Picture, now_ns: int) -> Content:
        if _mostly(points.max(axis=2) <= _DARK):
            if self._dark_since_ns is None:
                self._dark_since_ns = now_ns
        else:
            self._dark_since_ns = None
        if self._still is None or not _alike(points, self._still):
            # Compared with the first of a row, so that what changes slowly is not called still.
            self._still, self._still_since_ns = points, now_ns
        if self._dark_since_ns is not None and now_ns - self._dark_since_ns >= _BLACK_NS:
            return "black"
        return "frozen" if now_ns - self._still_since_ns >= _FROZEN_NS else "live"


def _points(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    # A copy: the array may be one that is used again.
    return picture[:: max(1, height // _POINTS), :: max(1, width // _POINTS)].copy()


def _alike(one: Picture, other: Picture) -> bool:
    if one.shape != other.shape:
        return False
    return _mostly(np.abs(one.astype(np.int16) - other).max(axis=2) <= _SAME)


def _mostly(points: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> bool:
    return float(points.mean()) >= 1 - _EXCEPTIONS
