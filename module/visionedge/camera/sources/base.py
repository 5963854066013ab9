"""Picture sources: the protocols (`FrameSource`, `DecodedPicture`) and their limits (`SourceLimits`)."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture, Placement


class ThreadBudget:
    """Decoder threads beside the cameras' own, for the whole module. Thread-safe."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ThreadBudget left={self._left}>"

    @property
    def left(self) -> int:
        """Threads that are free."""
        return self._left

    def acquire(self, wanted: int) -> int:
        """Acquire up to `wanted` threads and return how many; the caller must release them."""
        with self._lock:
            granted = max(0, min(wanted, self._left))
            self._left -= granted
            return granted

    def release(self, count: int) -> None:
        """Return threads that were acquired."""
        with self._lock:
            self._left += count


DecoderLibrary = Literal["auto", "pyav", "opencv"]
"""The library that decodes videos and streams; `auto` is PyAV if it is installed."""

RtspTransport = Literal["tcp", "udp", "auto"]
"""The transport of RTSP; `auto` is TCP, and UDP if the server refuses TCP."""

RedirectPolicy = Literal["same-host", "any"]
"""Hosts that a redirect or a playlist of a camera may name: its own, or any."""


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """The time and size limits of a source, and how it is opened.

    Opening: `open_timeout_s`; once that was too short, later attempts get `max_open_timeout_s`. Some cameras
    send their first picture 15 s after the request, and at one picture per second FFmpeg needs 8 s to analyse
    an RTSP stream.

    Reading: a source of many pictures per second is lost after `silence_s` without data, a slower one after
    three times its usual gap, one whose rate is not known yet after `first_picture_s`; the decoder itself
    gives up after `read_timeout_s`. A source may send undecodable data for `picture_timeout_s`, and a live
    source may be `late_s` behind before pictures are skipped. A picture has at most `max_pixels`.

    Decoding: `library` is the decoder. `pictures_per_s` pictures are looked at, so that others need not be
    decoded (None: all; a folder, which has no rate of its own, then plays one per second). A source that one
    thread cannot decode acquires more from `spare_threads`, which all sources share. `hardware` allows the
    video decoder of a GPU. `loop` plays a file or folder again at its end.

    Network: `transport` of RTSP, `redirects` for the hosts that may be followed. `certificates` is a file: a
    TLS server must present one of them, or one signed by them; None: certificates are not checked.

    Formats: `extra_codecs` and `extra_containers`, by FFmpeg's names, are allowed beside the usual ones.
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
    extra_codecs: tuple[str, ...] = ()
    extra_containers: tuple[str, ...] = ()
    spare_threads: ThreadBudget = field(default_factory=lambda: ThreadBudget(0), compare=False)


class DecodedPicture(Protocol):
    """A picture of a source, decoded at the latest when it is loaded.

    Call `load` before the next `read`, or not at all, which with some sources saves the decoding. Afterwards
    any thread may call `fit_to_input` and `picture` at any time; before it, they load the picture.

    `width_px` and `height_px` are those of the upright picture, exact once it is loaded.
    `position_s` is the media time, always rising; None if the source is live. `source_frames` counts the
    pictures of the source that this one represents: itself, and those before it that were not decoded (at
    least 1). `key` is true for a picture that was coded without reference to others.
    """

    width_px: int
    height_px: int
    position_s: float | None
    source_frames: int
    key: bool

    def load(self) -> None:
        """Decode the picture into memory that no later picture overwrites.

        Raises:
            DamagedPictureError: it cannot be decoded.
            SourceError: neither this picture nor any later one can be decoded.
        """

    def picture(self) -> Picture:
        """Return the whole picture: BGR, uint8 (height, width, 3).

        Raises:
            DamagedPictureError: it cannot be decoded.
            SourceError: neither this picture nor any later one can be decoded.
        """

    def fit_to_input(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """Return the picture at the model's input size and its place there; in `out` if given.

        Raises:
            DamagedPictureError: it cannot be decoded.
            SourceError: neither this picture nor any later one can be decoded.
            ValueError: `out` has another shape or type.
        """


class WholePicture:
    """A `DecodedPicture` of a source that gives only whole pictures in BGR; `decode` is called once."""

    def __init__(
        self,
        decode: Callable[[], Picture],
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
        self._decode = decode
        self._picture: Picture | None = None

    def load(self) -> None:
        """See `DecodedPicture.load`."""
        self.picture()

    def picture(self) -> Picture:
        """See `DecodedPicture.picture`."""
        if self._picture is None:
            self._picture = self._decode()
            self.height_px, self.width_px = self._picture.shape[:2]
        return self._picture

    def fit_to_input(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """See `DecodedPicture.fit_to_input`."""
        return fit_to_input(self.picture(), spec, out)


class FrameSource(Protocol):
    """A sequence of pictures. One thread uses it; any thread may call `interrupt`.

    A source that waits for data from outside has an attribute `waiting_since_s`: the monotonic time since
    when it has been waiting, None while it is not. The function `waiting_since_s` reads it. A source of a
    file may have an attribute `expected_pictures`, which the function of this name reads.
    """

    @property
    def live(self) -> bool:
        """Whether the source sends at its own rate, so that pictures are lost while they are not read."""

    @property
    def decoder(self) -> str:
        """The name of the decoder, for status."""

    def read(self) -> DecodedPicture | None:
        """Return the next picture; None at a clean end, or after `interrupt`.

        A silent source blocks for `SourceLimits.read_timeout_s` at most.

        Raises:
            SourceError: the source is lost, or cannot be decoded at all.
        """

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """Set how many pictures per second will be looked at (None: all); others need not be decoded."""

    def interrupt(self) -> None:
        """End `read` as soon as possible; called by any thread."""

    def close(self) -> None:
        """Release all resources; safe to call twice."""


def waiting_since_s(source: FrameSource) -> float | None:
    """Return since when a source has been waiting for data (monotonic); None if it is not, or not known."""
    since_s: float | None = getattr(source, "waiting_since_s", None)
    return since_s


def expected_pictures(source: FrameSource) -> int | None:
    """Return about how many pictures a file has, which some containers only estimate; None: not known."""
    count: float = getattr(source, "expected_pictures", 0)
    return round(count) if count >= 1 else None
