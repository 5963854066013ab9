"""Videos, streams and V4L2 devices through OpenCV's VideoCapture."""

import heapq
import itertools
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import cv2
import numpy as np

from visionedge.camera.sources.base import DecodedPicture, SourceLimits, StreamLag, WholePicture
from visionedge.camera.sources.diagnosis import (
    connection_closed,
    decoding_too_slow,
    diagnose_rtsp_open,
    ended_early,
    no_picture_received,
    no_video,
    open_timed_out,
    too_many_pixels,
    undecodable_media,
)
from visionedge.camera.sources.network import DEFAULT_PORTS
from visionedge.camera.sources.opencv_setup import (
    configure_opencv,
    fill_new_memory,
    is_unwritten,
    limit_ffmpeg,
    reports_error,
)
from visionedge.camera.sources.redirects import resolve_rtsp_redirects
from visionedge.camera.timing import Timeline
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.types import Picture
from visionedge.runtime.installation import describe_extra
from visionedge.runtime.redaction import mask_address

# Opening network streams with OpenCV, which opens one at a time in the whole process.
#
# While one VideoCapture opens, all others wait, in every thread. So a server must have answered before its
# stream is opened (`rtsp_redirects` asks RTSP servers), streams that took long before come last, and the time
# inside is bounded.


_MAX_HEAD_BYTES = 65_536


class PriorityLock:
    """Lets one in at a time: the lowest rank first, and among equals the one that has waited longest."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []
        self._tickets = itertools.count()
        self._taken = False

    def __repr__(self) -> str:
        return f"<Turns taken={self._taken} waiting={len(self._waiting)}>"

    @contextmanager
    def hold(self, rank: float) -> Iterator[None]:
        """Wait for the turn, and keep it while the body runs."""
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


def answers_http(target: str, limit_s: float) -> bool:
    """Whether a server gives a whole answer when it is asked for this HTTP address.

    No login is sent: an answer that asks for one is an answer. What HTTP promises has to begin as well.

    Args:
        target: the URI, with its secrets.
        limit_s: for the connection, and again for the answer.
    """
    parts = urlsplit(target)
    scheme = parts.scheme.lower()
    try:
        address = (parts.hostname or "", parts.port or DEFAULT_PORTS[scheme])
        with socket.create_connection(address, limit_s) as plain:
            if scheme == "http":
                return _request_answered(plain, parts, limit_s)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False  # as the decoder: cameras sign their own certificates
            context.verify_mode = ssl.CERT_NONE
            with context.wrap_socket(plain, server_hostname=parts.hostname) as secure:
                return _request_answered(secure, parts, limit_s)
    except (OSError, ValueError):
        return False


def _request_answered(connection: socket.socket, parts: SplitResult, limit_s: float) -> bool:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    if any("\r" in line or "\n" in line for line in lines):
        return False
    connection.sendall("\r\n".join([*lines, "User-Agent: visionedge", "", ""]).encode("latin-1", "replace"))
    end_s = time.monotonic() + limit_s
    answer = b""
    while not _is_conclusive(answer):
        connection.settimeout(max(0.001, end_s - time.monotonic()))
        chunk = connection.recv(4096)
        if not chunk:
            return answer != b""
        answer += chunk
    return True


def _is_conclusive(answer: bytes) -> bool:
    """Whether an answer has come as far as it says that there is something, or refuses."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if len(head) > _MAX_HEAD_BYTES:
        return True
    promises = head.startswith(b"HTTP/") and head.split()[1:2] == [b"200"]
    return bool(end) and (not promises or body != b"")


_MAX_LAG_FACTOR = 5
"""A connection costs more than pictures left out, so it has to be this much worse."""

_MAX_OPEN_S = 8.0
"""At one picture per second FFmpeg needs as long to know an RTSP stream; all other streams wait meanwhile."""

_KEY_PICTURE = ord("I")

_CONVERSION_CHECK_EVERY = 8
"""No more than one picture in so many is converted twice, however still the scene is."""

_SAMPLE_STEP_PX = 8

_open_lock = PriorityLock()


def open_video(path: Path, limits: SourceLimits) -> "OpencvSource":
    """Open a video file; `path` exists and is a regular file.

    Raises:
        SourceError: it is no video, or one of an impossible size.
    """
    # An absolute path: FFmpeg takes what stands before a colon for a protocol.
    capture = _capture(str(path.absolute()), cv2.CAP_FFMPEG, limits)
    if not capture.isOpened():
        capture.release()
        raise SourceError(no_video(str(path)))
    return OpencvSource(capture, str(path), live=False, limits=limits)


def open_stream(uri: CameraUri, limits: SourceLimits) -> "OpencvSource":
    """Open an RTSP address.

    Raises:
        SourceError: with the reason, as far as one more question to the server tells it.
    """
    began_s = time.monotonic()
    found = resolve_rtsp_redirects(uri, limits)
    refuse_certificate_check(found.target, limits)
    if found.describe_reply is None:  # so it would only keep other cameras from opening
        capture, waited_s = None, time.monotonic() - began_s
    else:
        capture, waited_s = _open_exclusively(found.target, limits)
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
    """Open a video file, a playlist or a stream behind an HTTP address that answers.

    Raises:
        SourceError: it is none that can be read.
    """
    name = mask_address(target)
    capture, waited_s = _open_remote(target, limits)
    if capture is None:
        most_s = min(limits.open_timeout_s, _MAX_OPEN_S)
        late = waited_s >= most_s * 0.95
        raise SourceError(open_timed_out(name, most_s) if late else undecodable_media(name, ""))
    # What has a number of pictures is a file; a stream gives nonsense below zero.
    live = capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0
    return OpencvSource(capture, name, live=live, limits=limits, remote=True, paced=live and playlist)


def _open_remote(target: str, limits: SourceLimits) -> tuple[cv2.VideoCapture | None, float]:
    """What an HTTP address opens as, if anything, and how long that took in s."""
    began_s = time.monotonic()
    if not answers_http(target, limits.open_timeout_s):
        return None, time.monotonic() - began_s
    return _open_exclusively(target, limits)


def _open_exclusively(target: str, limits: SourceLimits) -> tuple[cv2.VideoCapture | None, float]:
    """What the address of a server that answers opens as, if anything, and how long that took in s."""
    inside = replace(limits, open_timeout_s=min(limits.open_timeout_s, _MAX_OPEN_S))
    with _open_lock.hold(limits.open_timeout_s):
        began_s = time.monotonic()
        capture = _capture(target, cv2.CAP_FFMPEG, inside)
        waited_s = time.monotonic() - began_s
    # One that was interrupted by the limit may call itself open, and never gives a picture.
    if capture.isOpened() and waited_s < inside.open_timeout_s:
        return capture, waited_s
    capture.release()
    return None, waited_s


def refuse_certificate_check(target: str, limits: SourceLimits) -> None:
    """OpenCV cannot be told to check the certificate of a TLS server.

    Raises:
        SourceError: that is wanted of it.
    """
    if limits.certificates is not None and target.startswith(("https:", "rtsps:")):
        why = f"only PyAV checks certificates; install {describe_extra('av')}, or leave tls.verify out"
        raise SourceError(f"{mask_address(target)}: {why}")


def open_device(path: Path, limits: SourceLimits) -> "OpencvSource":
    """Open a V4L2 device.

    Raises:
        SourceError: there is none, it may not be used, or it gives no video.
    """
    if not path.exists():
        raise SourceError(
            f"{path} does not exist; plug the camera in, or give it to the container (--device {path})"
        )
    if not path.is_char_device():
        raise SourceError(f"{path} is no video device; write v4l2:///dev/video0")
    if not os.access(path, os.R_OK | os.W_OK):
        raise SourceError(f"{path} may not be used by this user; add the user to the group 'video'")
    configure_opencv()
    capture = cv2.VideoCapture(str(path), cv2.CAP_V4L2)
    if not capture.isOpened():
        capture.release()
        raise SourceError(f"{path} gives no video; another program may be using it")
    return OpencvSource(capture, str(path), live=True, limits=limits)


def _capture(target: str, backend: int, limits: SourceLimits) -> cv2.VideoCapture:
    configure_opencv()
    limit_ffmpeg()
    return cv2.VideoCapture(
        target,
        backend,
        [
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
            round(limits.open_timeout_s * 1000),
            cv2.CAP_PROP_READ_TIMEOUT_MSEC,
            round(limits.read_timeout_s * 1000),
            cv2.CAP_PROP_N_THREADS,
            1,  # the camera's own
        ],
    )


class OpencvSource:
    """One opened VideoCapture; see `Source`."""

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
        return f"<VideoSource {self._name} live={self.live} read={self._read_count}>"

    def read(self) -> DecodedPicture | None:
        """See `Source.read`."""
        if self._interrupted:
            return None
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        self.waiting_since_s = began_s
        grabbed = self._capture.grab()
        self.waiting_since_s = None
        if not grabbed:
            self._judge_end(time.monotonic() - began_s)
            return None
        raw_s = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not self._paced:
            # Who did not compute has waited: decoding happens within `grab`, in this thread.
            waited_s = time.monotonic() - began_s - (time.thread_time() - began_cpu_s)
            self._refuse_late(self._lag.late_s(raw_s, time.monotonic(), waited_s))
        self._read_count += 1
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > self._limits.max_pixels:
            raise SourceError(too_many_pixels(self._name, width, height, self._limits.max_pixels))
        position_s = self._timeline.advance(raw_s) if self._paced else None
        take = self._retrieve_next
        if self._checked_px != (width, height) and (first := self._retrieve_first()) is not None:
            self._checked_px = (width, height)
            take = partial(_identity, first)
        return WholePicture(take, width, height, position_s, key=self._is_key())

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `Source.want`: OpenCV decodes whatever it grabs."""

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._interrupted = True

    def close(self) -> None:
        """See `Source.close`."""
        self._capture.release()

    def _picture(self) -> Picture:
        # `retrieve` makes a new array each time (seen in a test), so a kept picture stays as it is.
        ok, picture = self._capture.retrieve()
        if not ok:
            raise DamagedPictureError(f"a picture of {self._name} cannot be decoded")
        return np.asarray(picture, np.uint8)

    def _retrieve_next(self) -> Picture:
        """A picture that is not the first of its size.

        Where FFmpeg refuses to convert one, OpenCV gives the last picture again and calls it retrieved. A
        still scene gives equal pictures as well; whether FFmpeg reports an error tells the two apart.

        Raises:
            DamagedError: this one cannot be decoded.
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
        """The first picture of a size; OpenCV reserves memory for it, so that is the moment to look.

        None where this one is damaged; the next one may not be.

        Raises:
            SourceError: OpenCV gives memory that was not written, here and for all that follow.
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
            f"{self._name}: OpenCV cannot convert its pictures (interlaced, or an unusual colour "
            f"matrix); use 'decoder: pyav'"
        )

    def _is_key(self) -> bool:
        """V4L2 has no types of pictures: each stands alone there."""
        kind = int(self._capture.get(cv2.CAP_PROP_FRAME_TYPE))
        return kind <= 0 or kind == _KEY_PICTURE

    def _refuse_late(self, late_s: float) -> None:
        """OpenCV decodes whatever lies in front of it; only a new connection begins with what is new."""
        if late_s > _MAX_LAG_FACTOR * self._limits.late_s:
            raise SourceError(decoding_too_slow(self._name, late_s))

    def _judge_end(self, waited_s: float) -> None:
        """Tell an end from a loss: OpenCV says False to both."""
        if self._remote and self._read_count == 0 and waited_s < self._limits.read_timeout_s * 0.9:
            raise SourceError(undecodable_media(self._name, ""))
        if self.live:
            if waited_s >= self._limits.read_timeout_s * 0.9:
                raise SourceError(no_picture_received(self._name, self._limits.read_timeout_s))
            raise SourceError(connection_closed(self._name))
        if self._read_count == 0:
            raise SourceError(no_video(self._name))
        # The number is an estimate in some containers, hence the tenth.
        if self._remote and self._read_count < 0.9 * self._capture.get(cv2.CAP_PROP_FRAME_COUNT):
            raise SourceError(ended_early(self._name, self._read_count))


def _identity(picture: Picture) -> Picture:
    return picture
