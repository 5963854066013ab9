"""Opens and reads videos, streams and V4L2 devices with OpenCV's VideoCapture.

OpenCV opens one stream at a time in the whole process: while one VideoCapture opens, all others wait, in
every thread. So a server must answer our own request before its stream is opened, streams that were slow
before are opened last (`PriorityLock`), and the time for opening is bounded.
"""

import heapq
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path

import cv2
import numpy as np

from visionedge.camera.sources.allowed_formats import SourceKind, check_opencv_codec, ffmpeg_options
from visionedge.camera.sources.base import DecodedPicture, SourceLimits, WholePicture
from visionedge.camera.sources.diagnosis import (
    SourceFault,
    diagnose_rtsp_open,
    undecodable_media,
)
from visionedge.camera.sources.http_client import HttpClient
from visionedge.camera.sources.network import strip_login
from visionedge.camera.sources.opencv_setup import (
    capture_options,
    configure_opencv,
    ffmpeg_errors,
    fill_new_memory,
    is_unwritten,
    limit_ffmpeg,
    reports_error,
)
from visionedge.camera.sources.redirects import resolve_rtsp_redirects
from visionedge.camera.timing import StreamLag, Timeline
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedPictureError, SourceError, UnsupportedFormatError
from visionedge.frames.types import Picture
from visionedge.runtime.installation import describe_extra
from visionedge.runtime.redaction import mask_address

_MAX_LAG_FACTOR = 5
"""A new connection costs more than skipped pictures, so it needs this many times `late_s`."""

_MAX_OPEN_S = 8.0
"""FFmpeg needs this long to analyse an RTSP stream of one picture per second; all other streams wait."""

_KEY_PICTURE = ord("I")

_CONVERSION_CHECK_EVERY = 8
"""At most one picture in this many is converted twice, even in a still scene."""

_SAMPLE_STEP_PX = 8


def open_video(path: Path, limits: SourceLimits) -> "OpencvSource":
    """Open a video file; `path` exists and is a regular file.

    Raises:
        SourceError: it cannot be decoded as video, or is too large.
    """
    # An absolute path: FFmpeg reads the text before a colon as a protocol.
    capture = _capture(str(path.absolute()), "file", limits, str(path))
    if not capture.isOpened():
        capture.release()
        raise SourceFault.NO_VIDEO.error(str(path))
    return OpencvSource(capture, str(path), live=False, limits=limits)


def open_stream(uri: CameraUri, limits: SourceLimits) -> "OpencvSource":
    """Open an RTSP address.

    Raises:
        SourceError: it cannot be opened; the server is asked for the reason.
    """
    began_s = time.monotonic()
    found = resolve_rtsp_redirects(uri, limits)
    refuse_certificate_check(found.target, limits)
    if found.describe_reply is None:  # opening would only delay other cameras
        capture, waited_s = None, time.monotonic() - began_s
    else:
        capture, waited_s = _open_exclusively(found.target, "rtsp", limits)
    if capture is None:
        most_s = min(limits.open_timeout_s, _MAX_OPEN_S)
        reason = diagnose_rtsp_open(
            found.target,
            waited_s,
            most_s,
            limits.transport,
            name=str(uri),
            describe_reply=found.describe_reply,
        )
        raise SourceError(reason)
    return OpencvSource(capture, str(uri), live=True, limits=limits, remote=True)


def open_media(target: str, limits: SourceLimits, *, playlist: bool) -> "OpencvSource":
    """Open a video file, a playlist or a stream at an HTTP address.

    Raises:
        SourceError: it cannot be read.
    """
    name = mask_address(target)
    capture, waited_s = _open_remote(target, "playlist" if playlist else "http", limits)
    if capture is None:
        most_s = min(limits.open_timeout_s, _MAX_OPEN_S)
        late = waited_s >= most_s * 0.95
        raise SourceError(
            SourceFault.OPEN_TIMED_OUT.describe(name, limit_s=most_s) if late else undecodable_media(name, "")
        )
    # A file has a number of pictures; for a stream OpenCV returns a value below zero.
    live = capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0
    return OpencvSource(capture, name, live=live, limits=limits, remote=True, paced=live and playlist)


def answers_http(target: str, limit_s: float) -> bool:
    """Whether a server answers a request for this HTTP address; a 200 must also begin with its body.

    The request carries no login: a demand for one is an answer.

    Args:
        target: the address with its secrets.
        limit_s: for the head of the answer, and again for its body.
    """
    client = HttpClient(strip_login(target), SourceLimits(open_timeout_s=limit_s, redirects="any"))
    with closing(client):
        try:
            response = client.get()
            return response.head.status != HTTPStatus.OK or response.read(limit_s) != b""
        except (SourceError, TimeoutError):
            return False


def _open_remote(
    target: str, kind: SourceKind, limits: SourceLimits
) -> tuple[cv2.VideoCapture | None, float]:
    """Open an HTTP address; return the capture, None if it failed, and the time that opening took, in s.

    Raises:
        UnsupportedFormatError: the codec is not allowed.
    """
    began_s = time.monotonic()
    if not answers_http(target, limits.open_timeout_s):
        return None, time.monotonic() - began_s
    return _open_exclusively(target, kind, limits)


def _open_exclusively(
    target: str, kind: SourceKind, limits: SourceLimits
) -> tuple[cv2.VideoCapture | None, float]:
    """Like `_open_remote`, for a server that has answered; one stream at a time."""
    inside = replace(limits, open_timeout_s=min(limits.open_timeout_s, _MAX_OPEN_S))
    with _open_lock.hold(limits.open_timeout_s):
        began_s = time.monotonic()
        capture = _capture(target, kind, inside, mask_address(target))
        waited_s = time.monotonic() - began_s
    # A capture that was interrupted by the limit may report that it is open, and never gives a picture.
    if capture.isOpened() and waited_s < inside.open_timeout_s:
        return capture, waited_s
    capture.release()
    return None, waited_s


def refuse_certificate_check(target: str, limits: SourceLimits) -> None:
    """OpenCV cannot check the certificate of a TLS server.

    Raises:
        SourceError: the configuration demands it.
    """
    if limits.certificates is not None and target.startswith(("https:", "rtsps:")):
        why = f"only PyAV checks certificates; install {describe_extra('av')}, or leave tls.verify out"
        raise SourceError(f"{mask_address(target)}: {why}")


def open_device(path: Path, limits: SourceLimits) -> "OpencvSource":
    """Open a V4L2 device.

    Raises:
        SourceError: it does not exist, may not be used, or gives no video.
    """
    if not path.exists():
        raise SourceError(
            f"{path}: does not exist; plug the camera in, or pass it to the container (--device {path})"
        )
    if not path.is_char_device():
        raise SourceError(f"{path}: not a video device; use an address such as v4l2:///dev/video0")
    if not os.access(path, os.R_OK | os.W_OK):
        raise SourceError(f"{path}: no permission to use it; add the user to the group 'video'")
    configure_opencv()
    capture = cv2.VideoCapture(str(path), cv2.CAP_V4L2)
    if not capture.isOpened():
        capture.release()
        raise SourceError(f"{path}: no video; another program may be using it")
    return OpencvSource(capture, str(path), live=True, limits=limits)


def _capture(target: str, kind: SourceKind, limits: SourceLimits, name: str) -> cv2.VideoCapture:
    """Open a source with FFmpeg; nothing of it is decoded before its codec is known to be allowed.

    Raises:
        UnsupportedFormatError: the codec is not allowed.
    """
    configure_opencv()
    limit_ffmpeg()
    with capture_options(ffmpeg_options(kind, limits)), ffmpeg_errors() as messages:
        capture = cv2.VideoCapture(
            target,
            cv2.CAP_FFMPEG,
            [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
                round(limits.open_timeout_s * 1000),
                cv2.CAP_PROP_READ_TIMEOUT_MSEC,
                round(limits.read_timeout_s * 1000),
                cv2.CAP_PROP_N_THREADS,
                1,  # the thread that reads
            ],
        )
    try:
        check_opencv_codec(int(capture.get(cv2.CAP_PROP_FOURCC)), messages, name, limits)
    except UnsupportedFormatError:
        capture.release()
        raise
    return capture


class PriorityLock:
    """A lock for the waiting thread of the lowest rank; among equals for the one that came first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []
        self._tickets = itertools.count()
        self._taken = False

    def __repr__(self) -> str:
        return f"<PriorityLock taken={self._taken} waiting={len(self._waiting)}>"

    @contextmanager
    def hold(self, rank: float) -> Iterator[None]:
        """Hold the lock while the body runs."""
        with self._changed:
            mine = (rank, next(self._tickets))
            heapq.heappush(self._waiting, mine)
            self._changed.wait_for(lambda: not self._taken and self._waiting[0] == mine)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


_open_lock = PriorityLock()


class OpencvSource:
    """One opened VideoCapture; see `FrameSource`."""

    decoder = "opencv"

    def __init__(
        self,
        capture: cv2.VideoCapture,
        name: str,
        *,
        live: bool,
        limits: SourceLimits,
        remote: bool = False,
        paced: bool = False,
    ) -> None:
        self.live = live
        self._capture = capture
        self._name = name
        self._limits = limits
        self._remote = remote
        self._paced = paced or not live
        self._timeline = Timeline(capture.get(cv2.CAP_PROP_FPS))
        self._lag = StreamLag()
        self.waiting_since_s: float | None = None
        self._read_count = 0
        self._checked_px: tuple[int, int] | None = None
        self._sample: Picture | None = None
        self._unchecked_count = 0
        self._interrupted = False

    def __repr__(self) -> str:
        return f"<OpencvSource {self._name} live={self.live} read={self._read_count}>"

    @property
    def expected_pictures(self) -> float:
        """About how many pictures the file has; 0 or less: not known."""
        return self._capture.get(cv2.CAP_PROP_FRAME_COUNT)

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`."""
        if self._interrupted:
            return None
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        self.waiting_since_s = began_s
        grabbed = self._capture.grab()
        self.waiting_since_s = None
        if not grabbed:
            self._check_end(time.monotonic() - began_s)
            return None
        raw_s = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not self._paced:
            # `grab` decodes in this thread, so its time without processor time was spent waiting.
            waited_s = time.monotonic() - began_s - (time.thread_time() - began_cpu_s)
            self._refuse_late(self._lag.late_s(raw_s, time.monotonic(), waited_s))
        self._read_count += 1
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > self._limits.max_pixels:
            raise SourceFault.TOO_MANY_PIXELS.error(
                self._name, width=width, height=height, megapixels=self._limits.max_pixels / 1e6
            )
        position_s = self._timeline.advance(raw_s) if self._paced else None
        take = self._retrieve_next
        if self._checked_px != (width, height) and (first := self._retrieve_first()) is not None:
            self._checked_px = (width, height)
            take = partial(_identity, first)
        return WholePicture(take, width, height, position_s, key=self._is_key())

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource`; OpenCV decodes every picture that it grabs."""

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._interrupted = True

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._capture.release()

    def _picture(self) -> Picture:
        # `retrieve` makes a new array each time (seen in a test), so a kept picture stays as it is.
        ok, picture = self._capture.retrieve()
        if not ok:
            raise DamagedPictureError(f"{self._name}: a picture cannot be decoded")
        return np.asarray(picture, np.uint8)

    def _retrieve_next(self) -> Picture:
        """Return a picture that is not the first of its size.

        If FFmpeg refuses to convert a picture, OpenCV returns the last one again and reports success. A still
        scene gives equal pictures, too; an error that FFmpeg reports separates the two cases.

        Raises:
            DamagedPictureError: it cannot be decoded.
            SourceError: FFmpeg refuses to convert it.
        """
        picture = self._picture()
        last, self._sample = self._sample, picture[::_SAMPLE_STEP_PX, ::_SAMPLE_STEP_PX].copy()
        self._unchecked_count += 1
        if (
            self._unchecked_count >= _CONVERSION_CHECK_EVERY
            and last is not None
            and np.array_equal(last, self._sample)
        ):
            self._unchecked_count = 0
            if reports_error(self._capture.retrieve):
                raise self._not_converted()
        return picture

    def _retrieve_first(self) -> Picture | None:
        """Return the first picture of a size; None if it is damaged.

        OpenCV allocates memory for it, so unwritten memory shows now.

        Raises:
            SourceError: OpenCV returns memory that was not written, now and for all later pictures.
        """
        try:
            with fill_new_memory():
                picture = self._picture()
        except DamagedPictureError:
            return None
        if is_unwritten(picture):
            raise self._not_converted()
        return picture

    def _not_converted(self) -> SourceError:
        return SourceError(
            f"{self._name}: OpenCV cannot convert the pictures (interlaced, or an unusual colour "
            f"matrix); use 'decoder: pyav'"
        )

    def _is_key(self) -> bool:
        """Whether the picture is a key picture; V4L2 reports no type, all its pictures are."""
        kind = int(self._capture.get(cv2.CAP_PROP_FRAME_TYPE))
        return kind <= 0 or kind == _KEY_PICTURE

    def _refuse_late(self, late_s: float) -> None:
        """Refuse a stream that is too late: OpenCV cannot skip pictures, but a new connection can."""
        if late_s > _MAX_LAG_FACTOR * self._limits.late_s:
            raise SourceFault.DECODING_TOO_SLOW.error(self._name, late_s=late_s)

    def _check_end(self, waited_s: float) -> None:
        """Raise unless this is a clean end: OpenCV returns False for an end and for a loss."""
        if self._remote and self._read_count == 0 and waited_s < self._limits.read_timeout_s * 0.9:
            raise SourceError(undecodable_media(self._name, ""))
        if self.live:
            if waited_s >= self._limits.read_timeout_s * 0.9:
                raise SourceFault.NO_PICTURE_RECEIVED.error(self._name, limit_s=self._limits.read_timeout_s)
            raise SourceFault.CONNECTION_CLOSED.error(self._name)
        if self._read_count == 0:
            raise SourceFault.NO_VIDEO.error(self._name)
        # The number of pictures is an estimate in some containers, hence the factor 0.9.
        if self._remote and self._read_count < 0.9 * self.expected_pictures:
            raise SourceFault.ENDED_EARLY.error(self._name, count=self._read_count)


def _identity(picture: Picture) -> Picture:
    return picture
