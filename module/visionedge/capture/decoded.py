"""What every decoder gives and keeps to: the seam between the camera and whoever decodes for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from visionedge.frames import Picture


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a source.

    Reading stays below the 5 s that the module has to end: a decoder that hangs in it cannot be interrupted.
    Opening can be walked away from, so where the first limit was too short the next try gets twice as much,
    up to `open_timeout_most_s`: at one picture per second FFmpeg needs 8 s to know an RTSP stream.
    """

    open_timeout_s: float = 4.0
    open_timeout_most_s: float = 16.0
    read_timeout_s: float = 4.0
    max_pixels: int = 100_000_000
    decoder_threads: int = 1
    pictures_per_s: float = 1.0
    """The rate of a folder of pictures, which has none of its own."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoded picture.

    `picture()` converts it to BGR, uint8 (height, width, 3), in an array of its own; call it before the next
    `read`. Leaving it out saves the conversion. `width_px` and `height_px` are what the stream says; where it
    changes its size, the picture itself is right. `position_s` is the media time, always rising; None where
    the source is live.
    """

    picture: Callable[[], Picture]
    width_px: int
    height_px: int
    position_s: float | None


class Source(Protocol):
    """Pictures in a row. Used by one thread."""

    @property
    def live(self) -> bool:
        """Whether the source sets the pace itself, so that waiting loses pictures."""

    @property
    def decoder(self) -> str:
        """Who decodes, for people."""

    def read(self) -> Decoded | None:
        """The next picture, None at a clean end; blocks no longer than the read limit.

        Raises:
            SourceError: the source is lost or never was one.
        """

    def close(self) -> None:
        """Give everything back; safe to call twice."""
