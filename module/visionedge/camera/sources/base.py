"""What every decoder gives and keeps to: the seam between the camera and whoever decodes for it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture, Placement

# Decoder threads, counted for the whole module: a camera that needs more than its own asks here.


class ThreadBudget:
    """So many threads beside the cameras' own, for whoever comes first. Thread-safe."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ThreadBudget left={self._left}>"

    @property
    def left(self) -> int:
        """How many nobody has."""
        return self._left

    def take(self, wanted: int) -> int:
        """As many of the wanted as there are; the caller owes them back."""
        with self._lock:
            given = max(0, min(wanted, self._left))
            self._left -= given
            return given

    def give_back(self, count: int) -> None:
        """Return what was taken."""
        with self._lock:
            self._left += count


# How far a live source is behind: what it sent long ago and still lies in buffers on the way.


_CLOCK_DRIFT = 0.0005
_MAX_STEP_S = 10.0


class StreamLag:
    """Compares the stream's own times with the clock; only their difference counts, not their zero.

    The shortest way so far is taken for no delay at all. It may lengthen by 0.05 % of the time that passes,
    as clocks of cameras do not run exactly; and a read that had to wait for its packet shows that nothing
    else lies in front of it.
    """

    def __init__(self) -> None:
        self._base_s: float | None = None
        self._sent_s = 0.0
        self._now_s = 0.0
        self._step_s = 0.0

    def __repr__(self) -> str:
        return f"<Backlog base={self._base_s}>"

    def late_s(self, sent_s: float, now_s: float, waited_s: float) -> float:
        """How late a packet is, in s.

        Args:
            sent_s: the stream's time of the packet.
            now_s: the clock when it was read.
            waited_s: how long reading it took.
        """
        way_s = now_s - sent_s
        step_s = sent_s - self._sent_s
        if self._base_s is None or not -1 < step_s < _MAX_STEP_S:
            self._base_s = way_s
        else:
            if step_s > 0:
                self._step_s += (step_s - self._step_s) / 8
            waited = waited_s > max(0.005, self._step_s / 2)
            allowed_s = self._base_s + _CLOCK_DRIFT * (now_s - self._now_s)
            self._base_s = way_s if waited else min(way_s, allowed_s)
        self._sent_s, self._now_s = sent_s, now_s
        return way_s - self._base_s

    def reset(self) -> None:
        """Begin anew: what is late now counts as in time."""
        self._base_s = None


DecoderLibrary = Literal["auto", "pyav", "opencv"]
"""Who decodes videos and streams; `auto` is PyAV where it is installed."""

RtspTransport = Literal["tcp", "udp", "auto"]
"""What RTSP brings its pictures over; `auto` is TCP, and UDP where the server refuses that."""

RedirectPolicy = Literal["same-host", "any"]
"""Where a camera may send us, by a redirect or in a playlist: only to its own host, or to any."""


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """The bounds of a source, and how it is to be opened within them.

    A decoder that opens or reads cannot be interrupted, but its thread can be left behind. Where the first
    limit for opening was too short, later tries get `max_open_timeout_s`: some cameras send their first
    picture 15 s after they were asked, and at one picture per second FFmpeg needs 8 s to know an RTSP stream.

    A source that usually brings many pictures per second is lost after `silence_s` without data, a slower
    one after three times its usual distance, and one whose rate is not known yet after `first_picture_s`; at
    `read_timeout_s` the decoder itself gives up. `picture_timeout_s` is how long it may send what cannot be
    decoded. A TLS server has to show one of the `certificates` in this file, or one signed by them; None: any
    will do. `pictures_per_s` is how many pictures will be looked at, so that the others need not be decoded;
    None: all (of a folder, which has no rate of its own, one per second). `late_s` is how far a live source
    may fall behind before pictures are let go. A source that one thread cannot decode takes further ones
    from `spare_threads`, which all sources share. `hardware` allows a GPU's video decoder. `redirects`
    says which hosts a camera may lead to. `loop` lets a file or folder begin again at its end.
    """

    open_timeout_s: float = 4.0
    max_open_timeout_s: float = 20.0
    silence_s: float = 4.0
    first_picture_s: float = 20.0
    read_timeout_s: float = 30.0
    picture_timeout_s: float = 15.0
    late_s: float = 1.0
    max_pixels: int = 100_000_000
    pictures_per_s: float | None = None
    library: DecoderLibrary = "auto"
    transport: RtspTransport = "tcp"
    certificates: str | None = None
    redirects: RedirectPolicy = "same-host"
    hardware: bool = False
    loop: bool = False
    spare_threads: ThreadBudget = field(default_factory=lambda: ThreadBudget(0), compare=False)


class DecodedPicture(Protocol):
    """One decoded picture, or one that is decoded when it is looked at.

    Call `fill` or `picture` before the next `read`, or never: leaving it out saves the conversion, and with
    some sources the decoding. Once one of them was called, `picture` may be called at any time, by any
    thread.

    `width_px` and `height_px` are those of the upright picture, certain after `fill` or `picture`.
    `position_s` is the media time, always rising; None where the source is live. `covers` counts the pictures
    of the source that this one stands for: itself, and those before it that were not decoded; so at least 1.
    `key` says whether it was coded without reference to any other picture.
    """

    width_px: int
    height_px: int
    position_s: float | None
    source_frames: int
    key: bool

    def picture(self) -> Picture:
        """The whole picture: BGR, uint8 (height, width, 3).

        Raises:
            DamagedError: it cannot be decoded.
            SourceError: neither can any other that follows.
        """

    def fit_to_input(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """The picture at the model's size, as `fitting.fit` gives it; in `out` where that is given.

        Raises:
            DamagedError: it cannot be decoded.
            SourceError: neither can any other that follows.
            ValueError: `out` has another shape or type.
        """


class WholePicture:
    """The slow way, for a source that can give nothing but whole pictures; see `DecodedPicture`.

    `take` gives the picture and is called once.
    """

    def __init__(
        self,
        take: Callable[[], Picture],
        width_px: int,
        height_px: int,
        position_s: float | None,
        *,
        key: bool = True,
    ) -> None:
        self.width_px = width_px
        self.height_px = height_px
        self.position_s = position_s
        self.source_frames = 1
        self.key = key
        self._take = take
        self._picture: Picture | None = None

    def picture(self) -> Picture:
        """See `Decoded.picture`."""
        if self._picture is None:
            self._picture = self._take()
            self.height_px, self.width_px = self._picture.shape[:2]
        return self._picture

    def fit_to_input(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """See `Decoded.fill`."""
        return fit_to_input(self.picture(), spec, out)


class FrameSource(Protocol):
    """Pictures in a row. Used by one thread, but for `interrupt`.

    One that waits for data from outside says so in an attribute `waiting_since_s`: the moment (monotonic)
    since which it has been waiting, None while it is not. `waiting_since_s` below asks for it.
    """

    @property
    def live(self) -> bool:
        """Whether the source sets the pace itself, so that waiting loses pictures."""

    @property
    def decoder(self) -> str:
        """Who decodes, for people."""

    def read(self) -> DecodedPicture | None:
        """The next picture; None at a clean end, or when interrupted.

        A silent source blocks no longer than the read limit; its thread may be left behind sooner.

        Raises:
            SourceError: the source is lost or never was one.
        """

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """So many pictures are looked at from now on (None: all), so that the others need not be decoded."""

    def interrupt(self) -> None:
        """Let `read` end as soon as it can; called by any thread."""

    def close(self) -> None:
        """Give everything back; safe to call twice."""


def waiting_since_s(source: FrameSource) -> float | None:
    """Since when (monotonic) a source has been waiting for data; None where it is not, or cannot tell."""
    since_s: float | None = getattr(source, "waiting_since_s", None)
    return since_s
