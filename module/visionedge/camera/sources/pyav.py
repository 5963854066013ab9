"""Videos and streams through PyAV: straight to the model's size, and decoding no more than is wanted.

Imported only where PyAV is installed.
"""

import errno
import logging
import math
import os
import re
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

from visionedge.camera.sources.base import Backlog, Decoded, Limits
from visionedge.camera.sources.diagnosis import (
    broke_off,
    closed,
    failed,
    no_certificates,
    no_picture,
    no_video,
    not_media,
    only_rubbish,
    silent,
    too_large,
    why_not_open,
)
from visionedge.camera.sources.http_camera import HttpFile, HttpFiles
from visionedge.camera.sources.opencv_setup import bound_ffmpeg
from visionedge.camera.sources.rtsp_redirects import follow
from visionedge.camera.sources.skip_policy import Level, StreamClock, Thinning
from visionedge.camera.sources.yuv import Matrix, Painter, Plane, Planes, whole_picture
from visionedge.camera.timing import Timeline
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedError, SourceError
from visionedge.frames.letterbox import fit, fit_drawn
from visionedge.frames.types import InputSpec, Picture, Placement
from visionedge.runtime.redaction import masked_address

# PyAV's decoder of one stream, and what its pictures become.


if TYPE_CHECKING:
    VideoPacket = Packet[VideoStream]
else:
    VideoPacket = Packet  # generic for type checkers only

_SKIPPED = {Level.ALL: "DEFAULT", Level.REFERENCES: "NONREF", Level.KEYS: "DEFAULT"}

# Names of pixel formats whose planes are taken as they are; all others go the way over FFmpeg's own BGR.
_PLANAR = re.compile(r"(?:yuvj?4\d\dp|gray)(?:(9|10|12|14|16)le)?")
_FULL_BY_NAME: Mapping[str, bool | None] = {"yuvj": True, "gray": None}
_SAMPLES = np.dtype(np.uint8), np.dtype("<u2")
_TWO_PLANES = {"nv12": 255, "nv16": 255, "nv24": 255, "p010le": 65535, "p210le": 65535, "p410le": 65535}

# FFmpeg's numbers. What a stream does not say (2) is BT.601, as FFmpeg and OpenCV have it. What is not here
# (11 and above: seldom seen, and not linear for the most part) is taken for the matrix of its primaries.
_MATRICES: dict[int, Matrix] = {
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
_MATRICES_OF_PRIMARIES: dict[int, Matrix] = {1: "bt709", 9: "bt2020"}
_UNSAID_MATRIX = 2
_FULL_RANGE = 2
_LIMITED_RANGE = 1


class PyavDecoder:
    """A codec context that survives damaged packets, which give no picture; `damaged` tells of the last."""

    def __init__(self, context: VideoCodecContext, threads: int) -> None:
        context.thread_count = threads
        context.thread_type = "AUTO"
        # Smoothing the edges of blocks is a good part of decoding. Where no other picture refers to one,
        # nothing spreads, and it changes 1080p by a twentieth of a grey level.
        context.options = {"skip_loop_filter": "noref"}
        self.intra_only = context.codec.intra_only
        self.damaged = False
        self._context = context
        self._level = Level.ALL
        self._on_gpu = False

    @property
    def name(self) -> str:
        """Who decodes, for people."""
        return f"pyav {self._context.name}{' (nvdec)' if self._on_gpu else ''}"

    def pictures(self, packet: VideoPacket | None) -> list[VideoFrame]:
        """The pictures that come out when the packet goes in; at None, those still inside."""
        try:
            frames = self._context.decode(packet)
        except FFmpegError:
            self.damaged = True
            return []
        if frames:
            self.damaged = False
            # What was decoded on a GPU comes back with two planes, which no decoder of ours on the CPU gives.
            self._on_gpu = self._context.is_hwaccel and frames[0].format.name in _TWO_PLANES
        return frames

    def alone(self, packet: VideoPacket) -> VideoFrame | None:
        """The picture of a key picture's packet, at once and whatever came before; None if it is damaged."""
        frames = self.pictures(packet)
        if not frames:
            frames = self.drain()
            self.flush()
        self.damaged = not frames
        return frames[0] if frames else None

    def drain(self) -> list[VideoFrame]:
        """The pictures still inside; `flush` before going on."""
        return self.pictures(None)

    def flush(self) -> None:
        """Forget what came before: the next packet is a key picture's."""
        if self._context.is_open:
            self._context.flush_buffers()

    def thin(self, level: Level) -> None:
        """Decode no more than this from now on."""
        if level is self._level:
            return
        if Level.KEYS in (level, self._level):
            self.flush()
        self._context.skip_frame = _SKIPPED[level]  # type: ignore[assignment]  # typed as the names themselves
        self._level = level


class PyavPicture:
    """See `Decoded`. Keeps the frame as it was decoded: BGR is made of it when somebody asks.

    Nothing in it may refer back to it: frames are large, and must not wait for the garbage collector.
    """

    def __init__(
        self,
        look: Callable[[], VideoFrame],
        painter: Painter,
        size_px: tuple[int, int],
        position_s: float | None,
        covers: int,
        *,
        key: bool = False,
    ) -> None:
        self.width_px, self.height_px = size_px
        self.position_s = position_s
        self.covers = covers
        self.key = key
        self._look = look
        self._painter: Painter | None = painter
        self._seen = False

    def fill(self, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
        """See `Decoded.fill`."""
        planes = planes_of(self._shown())
        painter, self._painter = self._painter or Painter(), None
        if planes is None:
            return fit(self.picture(), spec, out)
        return fit_drawn(
            planes.size_px, spec, out, lambda window: painter.paint(planes, window, spec.resample)
        )

    def picture(self) -> Picture:
        """See `Decoded.picture`; made anew each time, as the frame is half its size."""
        frame = self._shown()
        planes = planes_of(frame)
        return _as_ffmpeg_has_it(frame) if planes is None else whole_picture(planes)

    def _shown(self) -> VideoFrame:
        frame = self._look()
        if not self._seen:
            turned = _quarter_turns(frame) % 2 == 1
            self.width_px = frame.height if turned else frame.width
            self.height_px = frame.width if turned else frame.height
            # What is kept is the frame, and not the packet and all that it came from.
            self._look, self._seen = (lambda: frame), True
        return frame


def planes_of(frame: VideoFrame) -> Planes | None:
    """The planes of a frame, not copied; None for a pixel format that is none of brightness and colour."""
    layout = _layout(frame.format.name)
    if layout is None:
        return None
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:
        matrix = _MATRICES_OF_PRIMARIES.get(frame.color_primaries, "bt601")
    luma, *chroma = frame.planes
    # Grey has no colour to be squeezed for broadcasting, so it is full unless it says otherwise.
    kept = layout.full if layout.full is not None else frame.color_range != _LIMITED_RANGE
    return Planes(
        _array(luma, layout.dtype),
        tuple(_array(plane, layout.dtype, layout.together) for plane in chroma),
        layout.white,
        kept or frame.color_range == _FULL_RANGE,
        matrix,
        _quarter_turns(frame),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the planes of a pixel format lie: samples, white, colours together in one plane.

    `full` None: full range unless the frame says otherwise.
    """

    dtype: np.dtype[Any]
    white: int
    together: int = 1
    full: bool | None = False


@lru_cache(maxsize=64)
def _layout(name: str) -> _Layout | None:
    if (white := _TWO_PLANES.get(name)) is not None:
        return _Layout(_SAMPLES[white > 255], white, together=2)
    planar = _PLANAR.fullmatch(name)
    if planar is None:
        return None
    white = (1 << int(planar[1] or 8)) - 1
    return _Layout(_SAMPLES[white > 255], white, full=_FULL_BY_NAME.get(name[:4], False))


def _array(plane: VideoPlane, dtype: np.dtype[Any], together: int = 1) -> Plane:
    shape = (plane.height, plane.width) if together == 1 else (plane.height, plane.width, together)
    pixel_bytes = together * dtype.itemsize
    strides = (plane.line_size, pixel_bytes, dtype.itemsize)[: len(shape)]
    return np.ndarray(shape, dtype, memoryview(plane), strides=strides)


def _quarter_turns(frame: VideoFrame) -> int:
    """Clockwise, to be upright: FFmpeg tells by how much it stands turned anticlockwise."""
    return round(-frame.rotation / 90) % 4


def _as_ffmpeg_has_it(frame: VideoFrame) -> Picture:
    picture = _converted(frame)
    turns = _quarter_turns(frame)
    code = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return picture if turns == 0 else np.asarray(cv2.rotate(picture, code[turns]), np.uint8)


def _converted(frame: VideoFrame) -> Picture:
    try:
        return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
    except FFmpegError:  # FFmpeg knows the matrix and cannot compute it
        frame.colorspace = _UNSAID_MATRIX
    try:
        return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
    except (FFmpegError, ValueError):
        raise DamagedError(f"pictures of the pixel format {frame.format.name} cannot be converted") from None


# NVIDIA's video decoder through PyAV: whether there is one, asked once.


log = logging.getLogger(__name__)

# One CUDA context for all cameras: each of its own would cost hundreds of megabytes.
_OPTIONS: dict[str, object] = {"primary_ctx": "1"}


@lru_cache(maxsize=1)
def hardware() -> HWAccel | None:
    """What `av.open` takes to decode on the GPU; None where this machine or this PyAV has none.

    A stream that the GPU cannot decode goes to the CPU by itself.
    """
    if "cuda" not in hwdevices_available():
        return None
    wanted = HWAccel("cuda", allow_software_fallback=True, options=_OPTIONS)
    try:
        wanted.create(av.Codec("h264", "r"))
    except (FFmpegError, RuntimeError, NotImplementedError) as error:
        log.debug("videos are decoded on the CPU: the GPU's decoder is not usable (%s)", error)
        return None
    return wanted


# fpsprobesize 0: a rate is not needed, and counting pictures for it takes 3 s at 10 fps. analyzeduration:
# still time for a late key picture, within the open limit.
_PROBING = {"fpsprobesize": "0", "analyzeduration": "2000000"}

_TRANSPORTS = {
    "tcp": {"rtsp_transport": "tcp"},
    "udp": {"rtsp_transport": "udp"},
    "auto": {"rtsp_transport": "udp+tcp", "rtsp_flags": "prefer_tcp"},
}

# One thread decodes so many pixels per second with ease; above that a source asks for further ones.
_PIXELS_PER_S_OF_A_THREAD = 3840 * 2160 * 40
_THREADS_MOST = 4

_CATCH_UP_S = 5.0

_CLOSING = (av.error.EOFError, ConnectionError)
_UNSEEN_PACKETS = 5
"""A decoder may hold back so many pictures."""


def open_video(path: Path, limits: Limits) -> "PyavSource":
    """Open a video file; `path` exists and is a regular file.

    Raises:
        SourceError: it is no video, or one of an impossible size.
    """
    try:
        # An absolute path: FFmpeg takes what stands before a colon for a protocol.
        container = _open(str(path.absolute()), {}, limits)
    except FFmpegError:
        raise SourceError(no_video(str(path))) from None
    return _source(container, str(path), live=False, limits=limits)


def open_stream(uri: CameraUri, limits: Limits) -> "PyavSource":
    """Open an RTSP address.

    Raises:
        SourceError: with the reason, as far as one more question to the server tells it.
    """
    began_s = time.monotonic()
    found = follow(uri, limits)
    options = {**_PROBING, **_TRANSPORTS[limits.transport], "allowed_media_types": "video"}
    if limits.certificates is not None and found.target.startswith("rtsps:"):
        options |= _verifying(uri, limits.certificates)
    try:
        container = _open(found.target, options, _rest(limits, began_s))
    except (FFmpegError, TimeoutError):  # FFmpeg's text holds the address with its secrets
        reason = why_not_open(
            found.target,
            time.monotonic() - began_s,
            limits.open_timeout_s,
            limits.transport,
            limits.certificates,
            name=str(uri),
            described=found.described,
        )
        raise SourceError(reason) from None
    return _source(container, str(uri), live=True, limits=limits, remote=True)


def _rest(limits: Limits, began_s: float) -> Limits:
    """The limits for a decoder, after something else took part of the time for opening.

    Raises:
        TimeoutError: nearly nothing is left; a server that was too slow for us may still redirect FFmpeg.
    """
    left_s = limits.open_timeout_s - (time.monotonic() - began_s)
    if left_s < limits.open_timeout_s * 0.05:
        raise TimeoutError
    return replace(limits, open_timeout_s=left_s)


def _verifying(uri: CameraUri, certificates: str) -> dict[str, str]:
    """FFmpeg's options that refuse a server whose certificate is not trusted or is another host's."""
    if not os.access(certificates, os.R_OK):
        raise SourceError(no_certificates(str(uri), certificates))
    return {"tls_verify": "1", "ca_file": certificates}


def open_media(target: str, limits: Limits, *, playlist: bool) -> "PyavSource":
    """Open a video file, a playlist or a stream behind an HTTP address that answers.

    Raises:
        SourceError: it is none that can be read.
    """
    files = HttpFiles(target, limits, hides_name=not playlist)
    # Without http_persistent FFmpeg would go on with connections that are not its own.
    options = {**_PROBING, "http_persistent": "0"} if playlist else dict(_PROBING)
    with ExitStack() as failing:
        failing.callback(files.close)
        container = _opened(target, options, limits, files)
        live = container.duration is None
        paced = live and playlist
        source = _source(
            container, masked_address(target), live=live, limits=limits, files=files, paced=paced
        )
        failing.pop_all()
    return source


def _opened(target: str, options: dict[str, str], limits: Limits, files: HttpFiles) -> InputContainer:
    name, began_s = masked_address(target), time.monotonic()
    try:
        return _open(files.name, options, limits, files.open)
    except FFmpegError as error:
        if files.error is not None:
            raise files.error from None
        if time.monotonic() - began_s >= limits.open_timeout_s * 0.95:
            raise SourceError(no_picture(name, limits.open_timeout_s)) from None
        raise SourceError(not_media(name, error.strerror or "")) from None


def _open(
    target: str, options: dict[str, str], limits: Limits, io_open: Callable[..., HttpFile] | None = None
) -> InputContainer:
    bound_ffmpeg()
    return av.open(
        target,
        "r",
        options=options,
        io_open=io_open,
        timeout=(limits.open_timeout_s, limits.read_timeout_s),
        hwaccel=hardware() if limits.hardware else None,
    )


def _source(
    container: InputContainer,
    name: str,
    *,
    live: bool,
    limits: Limits,
    remote: bool = False,
    files: HttpFiles | None = None,
    paced: bool = False,
) -> "PyavSource":
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        container.close()
        raise SourceError(no_video(name))
    remote = remote or files is not None
    return PyavSource(
        container, stream, name, live=live, limits=limits, remote=remote, files=files, paced=paced
    )


class PyavSource:
    """One opened container; see `Source`.

    A stream of which every picture is a key picture, and one of which only key pictures are wanted, is
    decoded when somebody looks at a picture; everything else is decoded as it comes.

    `paced`: it is live, but comes in bursts (segments of a playlist), and is to be played at its own rate.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        name: str,
        *,
        live: bool,
        limits: Limits,
        remote: bool = False,
        files: HttpFiles | None = None,
        paced: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.live = live
        self._container, self._stream, self._name = container, stream, name
        self._limits, self._remote, self._clock = limits, remote, clock
        self._files, self._paced = files, paced or not live
        self._spare = _spare_threads(stream, limits)
        self._decoder = PyavDecoder(stream.codec_context, 1 + self._spare)
        self._packets = container.demux(stream)
        # Of the stream, not of each picture: what comes out at the end has lost its unit.
        self._tick_s = float(stream.time_base or 0)
        self._painter = Painter()
        self._timeline = Timeline(float(stream.average_rate or 0))
        self._thinning = Thinning(limits.pictures_per_s)
        self._stream_clock = StreamClock()
        self._backlog = Backlog()
        self._ready: deque[VideoFrame] = deque()
        self._interrupted = self._ended = self._closed = False
        self._needs_key = False
        self._behind_since_s: float | None = None
        self.waiting_since_s: float | None = None
        self._unseen_since_s: float | None = None
        self._packet_count = self._given_count = self._covered = self._held = self._unseen_count = 0

    def __repr__(self) -> str:
        return f"<PyavSource {self._name} live={self.live} packets={self._packet_count} {self._thinning!r}>"

    @property
    def decoder(self) -> str:
        """See `Source.decoder`."""
        return self._decoder.name

    def read(self) -> Decoded | None:
        """See `Source.read`."""
        while not self._interrupted:
            if self._ready:
                return self._decoded(self._ready.popleft())
            if self._ended:
                self._judge_end()
                return None
            packet, waited_s = self._next_packet()
            if packet is None:
                self._ended = True
                self._ready.extend(self._decoder.drain())
            elif (late := self._use(packet, waited_s)) is not None:
                return late
        return None

    def want(self, pictures_per_s: float | None) -> None:
        """See `Source.want`."""
        self._thinning.want(pictures_per_s)

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._interrupted = True
        if self._files is not None:
            self._files.interrupt()

    def close(self) -> None:
        """See `Source.close`."""
        if not self._closed:
            self._closed = True
            self._container.close()
            if self._files is not None:
                self._files.close()
            self._limits.spare_threads.give_back(self._spare)

    # --- packets --------------------------------------------------------------------------------------------

    def _next_packet(self) -> tuple[VideoPacket | None, float]:
        self.waiting_since_s = began_s = self._clock()
        try:
            packet = next(self._packets, None)
        except FFmpegError as error:
            self._judge_loss(self._clock() - began_s, error)
            packet = None
        finally:
            self.waiting_since_s = None
        # The last packet is an empty one.
        return (packet if packet is not None and packet.size else None), self._clock() - began_s

    def _use(self, packet: VideoPacket, waited_s: float) -> Decoded | None:
        """Decode a packet into `_ready`, or give a picture that is decoded later, or let it go."""
        self._packet_count += 1
        self._refuse_large(self._stream.codec_context.width, self._stream.codec_context.height)
        if self.live:
            self._watch()
            self._judge_clock(packet)
            if not self._paced and self._lets_go(packet, waited_s):
                self._thinning.pause()
                return None
        if not self._decoder.intra_only:
            at_s = self._clock() if self._stream_clock.wrong else self._time_of(packet)
            wanted = self._thinning.packet(at_s, key=packet.is_keyframe)
            self._decoder.thin(self._thinning.level)
            if not wanted:
                return None
            if self._thinning.level is not Level.KEYS:
                self._ready.extend(self._decoder.pictures(packet))
                return None
        return self._undecoded(packet)

    def _undecoded(self, packet: VideoPacket) -> Decoded | None:
        first: VideoFrame | None = None
        if self._given_count == 0:  # only a picture that was seen proves that there are any
            first = self._decoder.alone(packet)
            if first is None:
                return None
        self._held = 0  # what the decoder held is gone, or is this picture
        context = self._stream.codec_context
        raw_s = self._seconds(packet.pts)

        def look() -> VideoFrame:
            frame = first or self._decoder.alone(packet)
            if frame is None:
                raise DamagedError(f"a picture of {self._name} cannot be decoded")
            return frame

        return self._given(look, (context.width, context.height), raw_s, key=True)

    def _lets_go(self, packet: VideoPacket, waited_s: float) -> bool:
        """Whether the packet is let go, so as not to fall behind; afterwards a key picture comes first."""
        now_s = self._clock()
        late_s = self._backlog.late_s(self._time_of(packet), now_s, waited_s)
        if self._behind_since_s is None:
            if late_s <= self._limits.late_s:
                return self._awaits_key(packet)
            self._behind_since_s = now_s
            return True
        if now_s - self._behind_since_s > _CATCH_UP_S:
            self._backlog.forget()  # even leaving pictures out does not help: better late ones than none
        elif late_s > self._limits.late_s / 4:
            return True
        self._behind_since_s, self._needs_key = None, True
        return self._awaits_key(packet)

    def _awaits_key(self, packet: VideoPacket) -> bool:
        if self._needs_key and packet.is_keyframe:
            self._needs_key = False
            self._decoder.flush()
        return self._needs_key

    def _judge_clock(self, packet: VideoPacket) -> None:
        """What comes in bursts of several seconds arrives at no rate that says anything."""
        if not self._paced and self._stream_clock.note(self._time_of(packet), self._clock()):
            self._thinning.change_clock()

    def _time_of(self, packet: VideoPacket) -> float:
        at_s = self._seconds(packet.dts if packet.dts is not None else packet.pts)
        return self._clock() if math.isnan(at_s) else at_s

    def _seconds(self, ticks: int | None) -> float:
        return math.nan if ticks is None else ticks * self._tick_s

    # --- pictures -------------------------------------------------------------------------------------------

    def _decoded(self, frame: VideoFrame) -> Decoded:
        self._refuse_large(frame.width, frame.height)
        raw_s = self._seconds(frame.pts)
        at_s = self._clock() if self._stream_clock.wrong else raw_s
        if not math.isnan(at_s):
            self._thinning.picture(at_s)
        return self._given(lambda: frame, (frame.width, frame.height), raw_s, key=bool(frame.key_frame))

    def _given(
        self, look: Callable[[], VideoFrame], size_px: tuple[int, int], raw_s: float, *, key: bool
    ) -> Decoded:
        self._given_count += 1
        if not self._decoder.damaged:
            self._unseen_since_s, self._unseen_count = None, 0
        covers = self._covers()
        position_s = self._timeline.advance(raw_s) if self._paced else None
        return PyavPicture(look, self._painter, size_px, position_s, covers, key=key)

    def _covers(self) -> int:
        """How many packets a picture stands for, which are all in the end.

        Behind B-pictures the decoder holds some back: it may give two for one packet, and the last ones for
        none at all. Each of them stands for itself.
        """
        if self._given_count == 1:
            self._held = self._packet_count - 1
        if self._ended and not self._ready:
            self._held = 0
        covers = max(1, self._packet_count - self._held - self._covered)
        self._covered += covers
        return covers

    def _refuse_large(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise SourceError(too_large(self._name, width, height, self._limits.max_pixels))

    # --- ends and losses ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """A packet has come: no picture for long is a loss, but not where packets themselves are rare."""
        now_s = self._clock()
        if self._unseen_since_s is None:
            self._unseen_since_s = now_s
        self._unseen_count += 1
        unseen_s = now_s - self._unseen_since_s
        if unseen_s > self._limits.picture_timeout_s and self._unseen_count > _UNSEEN_PACKETS:
            raise SourceError(only_rubbish(self._name, self._limits.picture_timeout_s))

    def _judge_loss(self, waited_s: float, error: FFmpegError) -> None:
        """A file that cannot be read further has ended; anything else is lost."""
        self._judge_files()
        if not self.live and not self._remote:
            return
        if waited_s >= self._limits.read_timeout_s * 0.9:
            raise SourceError(silent(self._name, self._limits.read_timeout_s)) from None
        if isinstance(error, _CLOSING) or error.errno == errno.EIO:
            raise SourceError(closed(self._name)) from None
        # FFmpeg's words for the number alone: the whole text holds the address with its secrets.
        raise SourceError(failed(self._name, error.strerror or type(error).__name__)) from None

    def _judge_files(self) -> None:
        """FFmpeg does not say why it could not open a segment."""
        if self._files is not None and self._files.error is not None and not self._interrupted:
            raise self._files.error

    def _judge_end(self) -> None:
        """PyAV ends cleanly where a server was killed, too."""
        self._judge_files()
        if self.live:
            raise SourceError(closed(self._name))
        if self._given_count == 0:
            raise SourceError(no_video(self._name))
        # The number is an estimate in some containers, hence the tenth.
        if self._remote and self._packet_count < 0.9 * _expected_pictures(self._container, self._stream):
            raise SourceError(broke_off(self._name, self._packet_count))


def _spare_threads(stream: VideoStream, limits: Limits) -> int:
    context = stream.codec_context
    load = context.width * context.height * float(stream.average_rate or 30)
    return limits.spare_threads.take(min(_THREADS_MOST, math.ceil(load / _PIXELS_PER_S_OF_A_THREAD)) - 1)


def _expected_pictures(container: InputContainer, stream: VideoStream) -> float:
    if stream.frames:
        return stream.frames
    if container.duration is None or stream.average_rate is None:
        return 0.0
    return container.duration / av.time_base * float(stream.average_rate)
