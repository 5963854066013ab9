"""Opens and reads videos and streams with PyAV, and converts pictures straight to the model's size.

Imported only if PyAV is installed.
"""

import errno
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.stream import VideoStream

from visionedge.camera.sources.allowed_formats import SourceKind, check_codec, ffmpeg_options
from visionedge.camera.sources.base import DecodedPicture, SourceLimits
from visionedge.camera.sources.diagnosis import (
    SourceFault,
    diagnose_rtsp_open,
    undecodable_media,
)
from visionedge.camera.sources.http_camera import HttpFile, HttpFileOpener
from visionedge.camera.sources.opencv_setup import limit_ffmpeg
from visionedge.camera.sources.redirects import resolve_rtsp_redirects
from visionedge.camera.sources.skip_policy import DecodeLevel, SkipPolicy, StreamClockCheck
from visionedge.camera.sources.yuv import ColourMatrix, YuvConverter, YuvPlanes, convert_full_size
from visionedge.camera.timing import StreamLag, Timeline
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.letterbox import Plane, draw_to_input, fit_to_input
from visionedge.frames.types import InputSpec, Picture, Placement
from visionedge.runtime.redaction import mask_address

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    VideoPacket = Packet[VideoStream]
else:
    VideoPacket = Packet  # generic for type checkers only

_SKIP_FRAME = {DecodeLevel.ALL: "DEFAULT", DecodeLevel.REFERENCES: "NONREF", DecodeLevel.KEYS: "DEFAULT"}

# Pixel formats whose planes are used directly; FFmpeg converts all others to BGR.
_PLANAR = re.compile(r"(?:yuvj?4\d\dp|gray)(?:(9|10|12|14|16)le)?")
_FULL_RANGE_BY_NAME: Mapping[str, bool | None] = {"yuvj": True, "gray": None}
_SAMPLE_TYPES = np.dtype(np.uint8), np.dtype("<u2")
_SEMI_PLANAR = {"nv12": 255, "nv16": 255, "nv24": 255, "p010le": 65535, "p210le": 65535, "p410le": 65535}

# FFmpeg's numbers of colour matrices. An unspecified matrix (2) is BT.601, as in FFmpeg and OpenCV. Others
# (11 and above: rare, and mostly not linear) are replaced by the matrix of their primaries.
_MATRICES: dict[int, ColourMatrix] = {
    0: "bt601",
    1: "bt709",
    2: "bt601",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020",
    10: "bt2020",
}
_MATRICES_OF_PRIMARIES: dict[int, ColourMatrix] = {1: "bt709", 9: "bt2020"}
_UNSPECIFIED_MATRIX = 2
_FULL_RANGE = 2
_LIMITED_RANGE = 1


# One CUDA context for all cameras: a context for each would cost hundreds of megabytes.
_HWACCEL_OPTIONS: dict[str, object] = {"primary_ctx": "1"}

# fpsprobesize 0: the rate is not needed, and measuring it takes 3 s at 10 fps. analyzeduration 2 s: enough
# for a late key picture, within the open limit.
_PROBE_OPTIONS = {"fpsprobesize": "0", "analyzeduration": "2000000"}

_TRANSPORTS = {
    "tcp": {"rtsp_transport": "tcp"},
    "udp": {"rtsp_transport": "udp"},
    "auto": {"rtsp_transport": "udp+tcp", "rtsp_flags": "prefer_tcp"},
}

# One thread decodes 4K at 40 pictures per second; above that a source acquires more threads.
_PIXELS_PER_S_OF_A_THREAD = 3840 * 2160 * 40
_MAX_THREADS = 4

_CATCH_UP_S = 5.0

_CLOSED_ERRORS = (av.error.EOFError, ConnectionError)
_MAX_UNDECODED_PACKETS = 5
"""A decoder may buffer this many pictures."""


def open_video(path: Path, limits: SourceLimits) -> "PyavSource":
    """Open a video file; `path` exists and is a regular file.

    Raises:
        SourceError: it cannot be decoded as video, or is too large.
    """
    try:
        # An absolute path: FFmpeg reads the text before a colon as a protocol.
        container = _open(str(path.absolute()), "file", {}, limits)
    except FFmpegError:
        raise SourceFault.NO_VIDEO.error(str(path)) from None
    name = str(path)
    return PyavSource(container, _find_video(container, name, limits), name, live=False, limits=limits)


def open_stream(uri: CameraUri, limits: SourceLimits) -> "PyavSource":
    """Open an RTSP address.

    Raises:
        SourceError: it cannot be opened; the server is asked for the reason.
    """
    began_s = time.monotonic()
    found = resolve_rtsp_redirects(uri, limits)
    options = {**_PROBE_OPTIONS, **_TRANSPORTS[limits.transport], "allowed_media_types": "video"}
    if limits.certificates is not None and found.target.startswith("rtsps:"):
        options |= _tls_options(uri, limits.certificates)
    try:
        container = _open(found.target, "rtsp", options, _remaining_limits(limits, began_s))
    except (FFmpegError, TimeoutError):  # FFmpeg's text holds the address with its secrets
        reason = diagnose_rtsp_open(
            found.target,
            time.monotonic() - began_s,
            limits.open_timeout_s,
            limits.transport,
            limits.certificates,
            name=str(uri),
            describe_reply=found.describe_reply,
        )
        raise SourceError(reason) from None
    stream = _find_video(container, str(uri), limits)
    return PyavSource(container, stream, str(uri), live=True, limits=limits, remote=True)


def _remaining_limits(limits: SourceLimits, began_s: float) -> SourceLimits:
    """Return the limits for the decoder, after our own requests took part of the time for opening.

    Raises:
        TimeoutError: less than 5 % is left. FFmpeg must not open then: a slow server could still redirect it.
    """
    left_s = limits.open_timeout_s - (time.monotonic() - began_s)
    if left_s < limits.open_timeout_s * 0.05:
        raise TimeoutError
    return replace(limits, open_timeout_s=left_s)


def _tls_options(uri: CameraUri, certificates: str) -> dict[str, str]:
    """Return FFmpeg's options for checking the certificate and the host name of a server."""
    if not os.access(certificates, os.R_OK):
        raise SourceFault.UNREADABLE_CERTIFICATES.error(str(uri), file=certificates)
    return {"tls_verify": "1", "ca_file": certificates}


def open_media(target: str, limits: SourceLimits, *, playlist: bool) -> "PyavSource":
    """Open a video file, a playlist or a stream at an HTTP address.

    Raises:
        SourceError: it cannot be read.
    """
    files = HttpFileOpener(target, limits, hides_name=not playlist)
    with ExitStack() as failing:
        failing.callback(files.close)
        container = _open_http_container(target, limits, files, playlist=playlist)
        live = container.duration is None
        paced = live and playlist
        name = mask_address(target)
        stream = _find_video(container, name, limits)
        source = PyavSource(container, stream, name, live=live, limits=limits, files=files, paced=paced)
        failing.pop_all()
    return source


def _open_http_container(
    target: str, limits: SourceLimits, files: HttpFileOpener, *, playlist: bool
) -> InputContainer:
    name, began_s = mask_address(target), time.monotonic()
    # http_persistent 0: FFmpeg must not reuse connections that `HttpFileOpener` owns.
    options = {**_PROBE_OPTIONS, "http_persistent": "0"} if playlist else _PROBE_OPTIONS
    try:
        return _open(files.name, "playlist" if playlist else "http", options, limits, files.open)
    except FFmpegError as error:
        if files.error is not None:
            raise files.error from None
        if time.monotonic() - began_s >= limits.open_timeout_s * 0.95:
            raise SourceFault.OPEN_TIMED_OUT.error(name, limit_s=limits.open_timeout_s) from None
        raise SourceError(undecodable_media(name, error.strerror or "")) from None


def _open(
    target: str,
    kind: SourceKind,
    options: Mapping[str, str],
    limits: SourceLimits,
    io_open: Callable[..., HttpFile] | None = None,
) -> InputContainer:
    limit_ffmpeg()
    return av.open(
        target,
        "r",
        options={**options, **ffmpeg_options(kind, limits)},
        io_open=io_open,
        timeout=(limits.open_timeout_s, limits.read_timeout_s),
        hwaccel=find_hardware_decoder() if limits.hardware else None,
    )


def _find_video(container: InputContainer, name: str, limits: SourceLimits) -> VideoStream:
    """Return the first video; close the container and raise `SourceError` without one that is allowed."""
    with ExitStack() as failing:
        failing.callback(container.close)
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise SourceFault.NO_VIDEO.error(name)
        check_codec(stream.codec_context.codec.canonical_name, name, limits)
        failing.pop_all()
    return stream


@lru_cache(maxsize=1)
def find_hardware_decoder() -> HWAccel | None:
    """Return the argument for `av.open` to decode on an NVIDIA GPU; None if that is not possible.

    A stream that the GPU cannot decode is decoded on the CPU.
    """
    if "cuda" not in hwdevices_available():
        return None
    wanted = HWAccel("cuda", allow_software_fallback=True, options=_HWACCEL_OPTIONS)
    try:
        wanted.create(av.Codec("h264", "r"))
    except (FFmpegError, RuntimeError, NotImplementedError) as error:
        log.debug("videos are decoded on the CPU: the GPU's decoder cannot be used (%s)", error)
        return None
    return wanted


class PyavSource:
    """One opened container; see `FrameSource`.

    If every picture is a key picture, or only key pictures are wanted, decoding waits for the conversion;
    otherwise packets are decoded as they come.

    `paced`: a live source that comes in bursts (segments of a playlist) is played at its own rate.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        name: str,
        *,
        live: bool,
        limits: SourceLimits,
        remote: bool = False,
        files: HttpFileOpener | None = None,
        paced: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.live = live
        self._container, self._stream, self._name = container, stream, name
        self._limits, self._remote, self._clock = limits, remote or files is not None, clock
        self._files, self._paced = files, paced or not live
        self._spare = _take_spare_threads(stream, limits)
        self._decoder = PyavDecoder(stream.codec_context, 1 + self._spare)
        self._packets = container.demux(stream)
        # Time base of the stream, because frames that are drained at the end have none.
        self._tick_s = float(stream.time_base or 0)
        self._timeline = Timeline(float(stream.average_rate or 0))
        self._skip_policy = SkipPolicy(limits.pictures_per_s)
        self._stream_clock = StreamClockCheck()
        self._lag = StreamLag()
        self._ready: deque[VideoFrame] = deque()
        self._interrupted = self._ended = self._closed = False
        self._needs_key = False
        self._behind_since_s: float | None = None
        self.waiting_since_s: float | None = None
        self._unseen_since_s: float | None = None
        self._packet_count = self._given_count = self._covered = self._buffered_count = self._unseen_count = 0

    def __repr__(self) -> str:
        return (
            f"<PyavSource {self._name} live={self.live} packets={self._packet_count} {self._skip_policy!r}>"
        )

    @property
    def decoder(self) -> str:
        """See `FrameSource.decoder`."""
        return self._decoder.name

    @property
    def expected_pictures(self) -> float:
        """About how many pictures the file has; 0: not known."""
        return _expected_pictures(self._container, self._stream)

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`."""
        while not self._interrupted:
            if self._ready:
                return self._decoded(self._ready.popleft())
            if self._ended:
                self._check_end()
                return None
            packet, waited_s = self._next_packet()
            if packet is None:
                self._ended = True
                self._ready.extend(self._decoder.drain())
            elif (late := self._process_packet(packet, waited_s)) is not None:
                return late
        return None

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource.want`."""
        self._skip_policy.set_wanted_rate(pictures_per_s)

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._interrupted = True
        if self._files is not None:
            self._files.interrupt()

    def close(self) -> None:
        """See `FrameSource.close`."""
        if not self._closed:
            self._closed = True
            self._container.close()
            if self._files is not None:
                self._files.close()
            self._limits.spare_threads.release(self._spare)

    # --- packets --------------------------------------------------------------------------------------------

    def _next_packet(self) -> tuple[VideoPacket | None, float]:
        self.waiting_since_s = began_s = self._clock()
        try:
            packet = next(self._packets, None)
        except FFmpegError as error:
            self._raise_loss(self._clock() - began_s, error)
            packet = None
        finally:
            self.waiting_since_s = None
        # The last packet is an empty one.
        return (packet if packet is not None and packet.size else None), self._clock() - began_s

    def _process_packet(self, packet: VideoPacket, waited_s: float) -> DecodedPicture | None:
        """Decode a packet into `_ready`, or return a picture that is decoded later, or skip it."""
        self._packet_count += 1
        self._refuse_large(self._stream.codec_context.width, self._stream.codec_context.height)
        if self.live:
            self._check_decodable()
            self._check_clock(packet)
            if not self._paced and self._is_dropped(packet, waited_s):
                self._skip_policy.pause()
                return None
        if not self._decoder.intra_only:
            at_s = self._clock() if self._stream_clock.is_wrong else self._time_of(packet)
            wanted = self._skip_policy.packet(at_s, key=packet.is_keyframe)
            self._decoder.set_level(self._skip_policy.level)
            if not wanted:
                return None
            if self._skip_policy.level is not DecodeLevel.KEYS:
                self._ready.extend(self._decoder.decode(packet))
                return None
        return self._undecoded(packet)

    def _undecoded(self, packet: VideoPacket) -> DecodedPicture | None:
        first: VideoFrame | None = None
        if self._given_count == 0:  # the first picture must prove that the source has pictures
            first = self._decoder.decode_key_picture(packet)
            if first is None:
                return None
        self._buffered_count = 0  # the decoder buffers nothing now
        context = self._stream.codec_context
        raw_s = self._seconds(packet.pts)

        def decode_frame() -> VideoFrame:
            frame = first or self._decoder.decode_key_picture(packet)
            if frame is None:
                raise DamagedPictureError(f"{self._name}: a picture cannot be decoded")
            return frame

        return self._make_picture(decode_frame, (context.width, context.height), raw_s, key=True)

    def _is_dropped(self, packet: VideoPacket, waited_s: float) -> bool:
        """Whether to skip the packet because the source is late; decoding resumes at a key picture."""
        now_s = self._clock()
        late_s = self._lag.late_s(self._time_of(packet), now_s, waited_s)
        if self._behind_since_s is None:
            # While a key picture is awaited, a late one is better than none.
            if late_s <= self._limits.late_s or self._needs_key:
                return self._awaits_key(packet)
            self._behind_since_s = now_s
            return True
        if now_s - self._behind_since_s > _CATCH_UP_S:
            self._lag.reset()  # skipping did not help; late pictures are better than none
        elif late_s > self._limits.late_s / 4:
            return True
        self._behind_since_s, self._needs_key = None, True
        return self._awaits_key(packet)

    def _awaits_key(self, packet: VideoPacket) -> bool:
        if self._needs_key and packet.is_keyframe:
            self._needs_key = False
            self._decoder.flush()
        return self._needs_key

    def _check_clock(self, packet: VideoPacket) -> None:
        """Compare time stamps with the clock, except for sources that come in bursts."""
        if not self._paced and self._stream_clock.note(self._time_of(packet), self._clock()):
            self._skip_policy.change_clock()

    def _time_of(self, packet: VideoPacket) -> float:
        at_s = self._seconds(packet.dts if packet.dts is not None else packet.pts)
        return self._clock() if math.isnan(at_s) else at_s

    def _seconds(self, ticks: int | None) -> float:
        return math.nan if ticks is None else ticks * self._tick_s

    # --- pictures -------------------------------------------------------------------------------------------

    def _decoded(self, frame: VideoFrame) -> DecodedPicture:
        self._refuse_large(frame.width, frame.height)
        raw_s = self._seconds(frame.pts)
        at_s = self._clock() if self._stream_clock.is_wrong else raw_s
        if not math.isnan(at_s):
            self._skip_policy.picture(at_s)
        return self._make_picture(
            lambda: frame, (frame.width, frame.height), raw_s, key=bool(frame.key_frame)
        )

    def _make_picture(
        self, decode_frame: Callable[[], VideoFrame], size_px: tuple[int, int], raw_s: float, *, key: bool
    ) -> DecodedPicture:
        self._given_count += 1
        if not self._decoder.damaged:
            self._unseen_since_s, self._unseen_count = None, 0
        source_frames = self._count_source_frames()
        position_s = self._timeline.advance(raw_s) if self._paced else None
        return PyavPicture(decode_frame, size_px, position_s, source_frames, key=key)

    def _count_source_frames(self) -> int:
        """Return how many packets a picture represents; the sum over all pictures is the number of packets.

        With B-pictures the decoder buffers some: it may return two pictures for one packet, and the last ones
        at the end. Each of them represents itself.
        """
        if self._given_count == 1:
            self._buffered_count = self._packet_count - 1
        if self._ended and not self._ready:
            self._buffered_count = 0
        source_frames = max(1, self._packet_count - self._buffered_count - self._covered)
        self._covered += source_frames
        return source_frames

    def _refuse_large(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise SourceFault.TOO_MANY_PIXELS.error(
                self._name, width=width, height=height, megapixels=self._limits.max_pixels / 1e6
            )

    # --- ends and losses ------------------------------------------------------------------------------------

    def _check_decodable(self) -> None:
        """Raise if packets came for `picture_timeout_s` without a picture; rare packets are no loss."""
        now_s = self._clock()
        if self._unseen_since_s is None:
            self._unseen_since_s = now_s
        self._unseen_count += 1
        unseen_s = now_s - self._unseen_since_s
        if unseen_s > self._limits.picture_timeout_s and self._unseen_count > _MAX_UNDECODED_PACKETS:
            raise SourceFault.UNDECODABLE_STREAM.error(self._name, limit_s=self._limits.picture_timeout_s)

    def _raise_loss(self, waited_s: float, error: FFmpegError) -> None:
        """Raise the reason of a loss; a local file that cannot be read further has ended."""
        self._check_files()
        if not self.live and not self._remote:
            return
        if waited_s >= self._limits.read_timeout_s * 0.9:
            raise SourceFault.NO_PICTURE_RECEIVED.error(
                self._name, limit_s=self._limits.read_timeout_s
            ) from None
        if isinstance(error, _CLOSED_ERRORS) or error.errno == errno.EIO:
            raise SourceFault.CONNECTION_CLOSED.error(self._name) from None
        # Only FFmpeg's text for the error number: the whole message contains the address with its secrets.
        raise SourceFault.READ_FAILED.error(
            self._name, error=error.strerror or type(error).__name__
        ) from None

    def _check_files(self) -> None:
        """Raise the reason why a segment did not open, which FFmpeg does not report."""
        if self._files is not None and self._files.error is not None and not self._interrupted:
            raise self._files.error

    def _check_end(self) -> None:
        """Raise unless this is a clean end: PyAV also ends without an error if the server was killed."""
        self._check_files()
        if self.live:
            raise SourceFault.CONNECTION_CLOSED.error(self._name)
        if self._given_count == 0:
            raise SourceFault.NO_VIDEO.error(self._name)
        # The number of pictures is an estimate in some containers, hence the factor 0.9.
        if self._remote and self._packet_count < 0.9 * self.expected_pictures:
            raise SourceFault.ENDED_EARLY.error(self._name, count=self._packet_count)


def _take_spare_threads(stream: VideoStream, limits: SourceLimits) -> int:
    context = stream.codec_context
    load = context.width * context.height * float(stream.average_rate or 30)
    return limits.spare_threads.acquire(min(_MAX_THREADS, math.ceil(load / _PIXELS_PER_S_OF_A_THREAD)) - 1)


def _expected_pictures(container: InputContainer, stream: VideoStream) -> float:
    if stream.frames:
        return stream.frames
    if container.duration is None or stream.average_rate is None:
        return 0.0
    return container.duration / av.time_base * float(stream.average_rate)


class PyavDecoder:
    """A codec context that survives damaged packets; `damaged`: the last packet gave no picture."""

    def __init__(self, context: VideoCodecContext, threads: int) -> None:
        context.thread_count = threads
        context.thread_type = "AUTO"
        # The deblocking filter is a large part of decoding. Without it on pictures that no other picture
        # refers to, errors do not spread, and 1080p changes by 0.05 grey levels.
        context.options = {"skip_loop_filter": "noref"}
        self.intra_only = context.codec.intra_only
        self.damaged = False
        self._context = context
        self._level = DecodeLevel.ALL
        self._on_gpu = False

    @property
    def name(self) -> str:
        """The name of the decoder, for status."""
        return f"pyav {self._context.name}{' (nvdec)' if self._on_gpu else ''}"

    def decode(self, packet: VideoPacket | None) -> list[VideoFrame]:
        """Decode a packet and return the pictures that come out; None: those still buffered."""
        try:
            frames = self._context.decode(packet)
        except FFmpegError:
            self.damaged = True
            return []
        if frames:
            self.damaged = False
            # Pictures from a GPU have two planes; no decoder on the CPU gives such pictures.
            self._on_gpu = self._context.is_hwaccel and frames[0].format.name in _SEMI_PLANAR
        return frames

    def decode_key_picture(self, packet: VideoPacket) -> VideoFrame | None:
        """Return the picture of a key picture's packet at once; None if it is damaged."""
        frames = self.decode(packet)
        if not frames:
            frames = self.drain()
            self.flush()
        self.damaged = not frames
        return frames[0] if frames else None

    def drain(self) -> list[VideoFrame]:
        """Return the pictures that are still buffered; call `flush` before decoding more."""
        return self.decode(None)

    def flush(self) -> None:
        """Drop buffered pictures; the next packet must be a key picture."""
        if self._context.is_open:
            self._context.flush_buffers()

    def set_level(self, level: DecodeLevel) -> None:
        """Set the decode level."""
        if level is self._level:
            return
        if DecodeLevel.KEYS in (level, self._level):
            self.flush()
        self._context.skip_frame = _SKIP_FRAME[level]  # type: ignore[assignment]  # typed as the names themselves
        self._level = level


class PyavPicture:
    """See `DecodedPicture`. Keeps the decoded frame and converts it to BGR on demand.

    It must not be part of a reference cycle: frames are large and must not wait for the garbage collector.
    """

    def __init__(
        self,
        decode_frame: Callable[[], VideoFrame],
        size_px: tuple[int, int],
        position_s: float | None,
        source_frames: int,
        *,
        key: bool = False,
    ) -> None:
        self.width_px, self.height_px = size_px
        self.position_s = position_s
        self.source_frames = source_frames
        self.key = key
        self._decode_frame = decode_frame
        self._loaded: VideoFrame | Picture | None = None

    def load(self) -> None:
        """See `DecodedPicture.load`; a decoder does not reuse the memory of a frame that is held."""
        self._load()

    def fit_to_input(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """See `DecodedPicture.fit_to_input`."""
        loaded = self._load()
        if not isinstance(loaded, VideoFrame):
            return fit_to_input(loaded, spec, out)
        planes, converter = read_planes(loaded), _thread_memory.converter
        return draw_to_input(
            planes.size_px, spec, out, lambda window: converter.convert(planes, window, spec.resample)
        )

    def picture(self) -> Picture:
        """See `DecodedPicture.picture`; converted at each call, because the frame takes half the memory."""
        loaded = self._load()
        return convert_full_size(read_planes(loaded)) if isinstance(loaded, VideoFrame) else loaded

    def _load(self) -> VideoFrame | Picture:
        """Return the frame; for a pixel format that is not luma and chroma the whole picture."""
        if self._loaded is None:
            frame = self._decode_frame()
            turned = _quarter_turns(frame) % 2 == 1
            self.width_px = frame.height if turned else frame.width
            self.height_px = frame.width if turned else frame.height
            self._loaded = _convert_upright(frame) if _layout(frame.format.name) is None else frame
            # The packet that the frame came from is not kept.
            self._decode_frame = lambda: frame
        return self._loaded


class _ThreadMemory(threading.local):
    """The converter of a thread: a camera's thread and lanes resize pictures of the same source."""

    def __init__(self) -> None:
        self.converter = YuvConverter()


_thread_memory = _ThreadMemory()


def read_planes(frame: VideoFrame) -> YuvPlanes:
    """Return the planes of a frame without a copy.

    Raises:
        ValueError: the pixel format is not luma and chroma.
    """
    layout = _layout(frame.format.name)
    if layout is None:
        raise ValueError(f"the pixel format {frame.format.name} is not luma and chroma")
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:
        matrix = _MATRICES_OF_PRIMARIES.get(frame.color_primaries, "bt601")
    luma, *chroma = frame.planes
    # Grey is full range unless the frame says otherwise.
    kept = layout.full if layout.full is not None else frame.color_range != _LIMITED_RANGE
    return YuvPlanes(
        _array(luma, layout.dtype),
        tuple(_array(plane, layout.dtype, layout.channels) for plane in chroma),
        layout.white,
        kept or frame.color_range == _FULL_RANGE,
        matrix,
        _quarter_turns(frame),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Memory layout of a pixel format: sample type, white level, chroma channels per plane.

    `full` None: full range unless the frame says otherwise.
    """

    dtype: np.dtype[Any]
    white: int
    channels: int = 1
    full: bool | None = False


@lru_cache(maxsize=64)
def _layout(name: str) -> _Layout | None:
    if (white := _SEMI_PLANAR.get(name)) is not None:
        return _Layout(_SAMPLE_TYPES[white > 255], white, channels=2)
    planar = _PLANAR.fullmatch(name)
    if planar is None:
        return None
    white = (1 << int(planar[1] or 8)) - 1
    return _Layout(_SAMPLE_TYPES[white > 255], white, full=_FULL_RANGE_BY_NAME.get(name[:4], False))


def _array(plane: VideoPlane, dtype: np.dtype[Any], channels: int = 1) -> Plane:
    shape = (plane.height, plane.width) if channels == 1 else (plane.height, plane.width, channels)
    pixel_bytes = channels * dtype.itemsize
    strides = (plane.line_size, pixel_bytes, dtype.itemsize)[: len(shape)]
    return np.ndarray(shape, dtype, memoryview(plane), strides=strides)


def _quarter_turns(frame: VideoFrame) -> int:
    """Return the clockwise quarter turns that make a frame upright; FFmpeg counts anticlockwise."""
    return round(-frame.rotation / 90) % 4


def _convert_upright(frame: VideoFrame) -> Picture:
    picture = _convert(frame)
    turns = _quarter_turns(frame)
    code = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return picture if turns == 0 else np.asarray(cv2.rotate(picture, code[turns]), np.uint8)


def _convert(frame: VideoFrame) -> Picture:
    try:
        return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
    except FFmpegError:  # FFmpeg cannot convert from this matrix
        frame.colorspace = _UNSPECIFIED_MATRIX
    try:
        return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
    except (FFmpegError, ValueError):
        raise DamagedPictureError(
            f"pictures of the pixel format {frame.format.name} cannot be converted"
        ) from None
