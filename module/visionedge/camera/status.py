"""What a camera is doing: as it is shown, and as the camera itself keeps it."""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from visionedge.camera.sources.base import Decoded
from visionedge.camera.timing import Rate

State = Literal[
    "connecting",
    "waiting",
    "live",
    "stale",
    "frozen",
    "black",
    "reconnecting",
    "failed",
    "ended",
    "stopped",
]

CONNECTED: frozenset[State] = frozenset({"live", "stale", "frozen", "black"})
"""The states of a camera that is connected, whatever it shows."""

_STALE_NS = 2_000_000_000
_STALE_GAPS = 3
_GAPS = 64
"""Longest of so many distances between pictures: what is usual for a camera."""

_GAPS_KNOWN = 8
"""The first pictures come in a row, as the decoder kept them while it learnt what the stream is."""


@dataclass(frozen=True, slots=True)
class CameraStatus:
    """What a camera is doing, safe to show: `uri` and `last_error` are redacted.

    `state`: `connecting` (first try); `waiting` (a file or folder, until frames can be analysed); when
    connected `live`, `stale` (nothing has come for a while), `frozen` (the picture does not change at all),
    `black`; `reconnecting` (was connected, is lost), `failed` (never was connected yet, is tried again),
    `ended` (a file or folder has been played), `stopped`. `since_ns` is
    monotonic. `epoch` is 0 before the first picture. `frames_read` counts pictures that were read, handed on
    or not; `fps` is the rate of the source over the last 5 s, pictures included that need not be decoded;
    `age_ms` is how long ago the newest came. `width` and `height` are in px, 0 before the first picture.
    `next_try_s` is how long it still waits before it opens its source again, None unless it waits for that.
    """

    name: str
    uri: str
    state: State
    since_ns: int
    epoch: int
    frames_read: int
    fps: float
    age_ms: float | None
    last_error: str | None
    width: int
    height: int
    decoder: str | None
    next_try_s: float | None


@dataclass(slots=True)
class Progress:
    """How far a camera has come; written by its own thread alone."""

    since_ns: int
    epoch: int
    next_sequence: int
    state: State = "connecting"
    connected_ns: int = 0
    frames_read: int = 0
    newest_ns: int | None = None
    heard_ns: int | None = None
    gaps_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_GAPS))
    live: bool = False
    lost_ns: int | None = None
    next_try_ns: int | None = None
    last_error: str | None = None
    size_px: tuple[int, int] = (0, 0)
    decoder: str | None = None
    rate: Rate = field(default_factory=Rate)

    def note(self, decoded: Decoded, now_ns: int) -> None:
        """A picture was read."""
        if self.heard_ns is not None:
            self.gaps_ns.append(now_ns - self.heard_ns)
        self.frames_read += 1
        self.newest_ns = self.heard_ns = now_ns
        self.size_px = (decoded.width_px, decoded.height_px)
        self.rate.add(now_ns, decoded.covers)

    def begin(self) -> None:
        """Another connection begins: what was usual on the one before says nothing about it."""
        self.heard_ns = None
        self.gaps_ns.clear()

    def patience_ns(self, least_ns: int, first_ns: int) -> int:
        """How long a camera may be silent, which is more than its pictures usually lie apart.

        Args:
            least_ns: for a camera of many pictures per second.
            first_ns: while its rate is not known.
        """
        least_ns = least_ns if len(self.gaps_ns) >= _GAPS_KNOWN else first_ns
        return max(least_ns, _STALE_GAPS * max(self.gaps_ns, default=0))

    def stale(self, now_ns: int, first_ns: int) -> bool:
        """Whether a source that sets the pace itself is silent, for longer than its pictures lie apart."""
        if not self.live or self.heard_ns is None or self.state not in CONNECTED:
            return False
        return now_ns - self.heard_ns > self.patience_ns(_STALE_NS, first_ns)

    def shown(self, name: str, uri: str, now_ns: int, *, stale: bool) -> CameraStatus:
        """As it is shown; `uri` without secrets."""
        return CameraStatus(
            name=name,
            uri=uri,
            state="stale" if stale else self.state,
            since_ns=self.since_ns,
            epoch=self.epoch,
            frames_read=self.frames_read,
            fps=round(self.rate.per_s(now_ns), 2),
            age_ms=None if self.newest_ns is None else (now_ns - self.newest_ns) / 1e6,
            last_error=self.last_error,
            width=self.size_px[0],
            height=self.size_px[1],
            decoder=self.decoder,
            next_try_s=None if self.next_try_ns is None else max(0.0, (self.next_try_ns - now_ns) / 1e9),
        )
