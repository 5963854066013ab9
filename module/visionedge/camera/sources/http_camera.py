"""Opens an HTTP address of a camera: MJPEG, still pictures, or a file or playlist for FFmpeg.

`open_http` detects the kind from the response, never from the path. Pictures are read here
(`HttpPictureSource`). FFmpeg parses everything else, but reads it through `HttpFileOpener`, so that
redirects, logins and proxies are handled in one place.
"""

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from visionedge.camera.sources.allowed_formats import check_container
from visionedge.camera.sources.base import DecodedPicture, FrameSource, SourceLimits, WholePicture
from visionedge.camera.sources.diagnosis import SourceFault, http_refused
from visionedge.camera.sources.http_client import HttpClient, HttpResponse, ResponseHead
from visionedge.camera.sources.images import (
    JPEG_END,
    JPEG_START,
    JpegScanner,
    decode_picture,
    read_picture_size,
)
from visionedge.camera.sources.network import parse_challenges, strip_login
from visionedge.camera.sources.redirects import copy_login
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.types import Picture

MAX_PICTURE_BYTES = 24 << 20
_MAX_QUEUED_BYTES = 24 << 20
_POLLS_PER_S = 1.0
_MAX_FAILED_POLLS = 3
_MAX_SILENCE_S = 60.0
_SECOND_PICTURE_WAIT_S = 1.0
"""How long to wait for a second picture after the first one, before a body counts as a still picture."""

_FIRST_BYTES = 512
"""Bytes of a body from which its kind is detected."""

_FIRST_BYTES_WAIT_S = 1.0
_OTHER_PICTURE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
_PART = re.compile(rb"\s*(?:--|content-(?:type|length)\s*:)", re.IGNORECASE)
_TEXT = re.compile(r"text/|.*\b(?:html|json|xml|javascript)\b")

ContentKind = Literal["jpeg", "still", "playlist", "media", "page"]

OpenMedia = Callable[[str, SourceLimits, bool], FrameSource]
"""Opens media that are not pictures: (address with the login, limits, whether it is a playlist)."""


def open_http(uri: CameraUri, limits: SourceLimits, open_media: OpenMedia) -> FrameSource:
    """Open an HTTP address.

    Raises:
        SourceError: it cannot be opened; one line with the reason and the remedy.
    """
    deadline_s = time.monotonic() + limits.open_timeout_s
    client = HttpClient(uri.target, limits)
    with contextlib.ExitStack() as failing:
        failing.callback(client.close)
        response = client.get()
        multipart = response.head.content_type.startswith("multipart/")
        first_bytes = (
            b"" if multipart or response.head.status >= 300 else _read_first_bytes(response, deadline_s)
        )
        kind = detect_content_kind(response.head, first_bytes)
        _raise_refusal(client, response, kind, first_bytes)
        if kind in ("jpeg", "still"):
            pictures = HttpPictureSource(client, response, first_bytes, limits, jpeg=kind == "jpeg")
            if not multipart:
                pictures.detect_polling(deadline_s)
            failing.pop_all()
            return pictures
    if kind == "media":
        check_container(first_bytes, client.name, limits)
    return open_media(copy_login(response.url, uri.target), limits, kind == "playlist")


def _raise_refusal(client: HttpClient, response: HttpResponse, kind: ContentKind, first_bytes: bytes) -> None:
    """Raise the reason if the answer is a refusal or text."""
    if response.head.status >= 300:
        raise SourceError(describe_http_refusal(client, response))
    if kind == "page" and not first_bytes.strip():
        raise SourceFault.EMPTY_BODY.error(client.name)
    if kind == "page":
        content_type = response.head.content_type[:60] or "no content type"
        raise SourceFault.NOT_A_PICTURE.error(client.name, content_type=content_type)


def detect_content_kind(head: ResponseHead, first_bytes: bytes) -> ContentKind:
    """Return the kind of an answer, from its media type and the first bytes of its body."""
    media = head.content_type
    if media.startswith("multipart/") or first_bytes.startswith(JPEG_START) or _PART.match(first_bytes):
        return "jpeg"
    if first_bytes.startswith(_OTHER_PICTURE_SIGNATURES) or (
        first_bytes[:4] == b"RIFF" and first_bytes[8:12] == b"WEBP"
    ):
        return "still"
    if media == "application/dash+xml" or first_bytes.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"#EXTM3U"):
        return "playlist"
    # Other bytes may precede the first part. In the head of a video file, a JPEG start would be a
    # coincidence.
    if "jpeg" in media or "jpg" in media or (JPEG_START in first_bytes and not media.startswith("video/")):
        return "jpeg"
    return "page" if _is_text(media, first_bytes) else "media"


def _is_text(media: str, first_bytes: bytes) -> bool:
    """Whether the body is text for people or programs; an empty body counts as text."""
    begins = first_bytes.lstrip(b"\xef\xbb\xbf \t\r\n")
    return begins[:1] in (b"", b"<", b"{", b"[") or (_TEXT.match(media) is not None and first_bytes.isascii())


def _read_first_bytes(response: HttpResponse, deadline_s: float) -> bytes:
    first_bytes, wait_s = b"", deadline_s - time.monotonic()
    while len(first_bytes) < _FIRST_BYTES and not response.is_finished:
        try:
            first_bytes += response.read(max(0.1, wait_s))
        except TimeoutError:
            break
        wait_s = min(_FIRST_BYTES_WAIT_S, deadline_s - time.monotonic())
    return first_bytes


@dataclass(frozen=True, slots=True)
class _ReceivedPicture:
    at_s: float
    data: bytes


class HttpPictureSource:
    """JPEG pictures in one endless answer, or one picture in each of many answers; see `FrameSource`.

    If the first answer ends after one picture (`detect_polling`), the address is polled at the wanted rate.
    Up to two failed polls in a row are tolerated.
    """

    decoder = "opencv"

    def __init__(
        self,
        client: HttpClient,
        response: HttpResponse,
        first_bytes: bytes,
        limits: SourceLimits,
        *,
        jpeg: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._response, self._limits = client, response, limits
        self._jpeg, self._clock = jpeg, clock
        self._scanner = JpegScanner(MAX_PICTURE_BYTES)
        self._waiting: deque[_ReceivedPicture] = deque()
        self._gaps_s: deque[float] = deque(maxlen=3)
        self._received_s: float | None = None
        self._progress_s = clock()
        self._is_polling = False
        self._interval_s = 1 / (limits.pictures_per_s or _POLLS_PER_S)
        self._due_s = clock() + self._interval_s
        self._failed_count = self._body_count = self._given_count = self._skipped_count = 0
        self._stopped = threading.Event()
        self._whole = bytearray()
        self._feed(first_bytes)

    def __repr__(self) -> str:
        return f"<HttpPictureSource {self._client.name} polls={self._is_polling} given={self._given_count}>"

    @property
    def live(self) -> bool:
        """See `FrameSource.live`; false while the address is polled."""
        return not self._is_polling

    def detect_polling(self, deadline_s: float) -> None:
        """Wait until it is known whether the answer is one picture or a stream.

        Raises:
            SourceError: it is neither.
        """
        while (
            not self._response.is_finished
            and len(self._waiting) < 2
            and not (self._waiting and self._scanner.has_begun)
        ):
            left_s = deadline_s - self._clock()
            try:
                self._feed(
                    self._response.read(
                        max(0.1, min(left_s, _SECOND_PICTURE_WAIT_S) if self._waiting else left_s)
                    )
                )
            except TimeoutError:
                if self._waiting:
                    return
                raise SourceFault.OPEN_TIMED_OUT.error(
                    self._client.name, limit_s=self._limits.open_timeout_s
                ) from None
        if self._response.is_finished:
            self._finish()
            self._is_polling = self._body_count == 1
            if self._body_count == 0:
                raise SourceFault.DAMAGED_PICTURE.error(self._client.name)

    def read(self) -> DecodedPicture | None:
        """See `FrameSource.read`."""
        while not self._client.interrupted:
            received = self._next()
            if received is None:
                if not self._client.interrupted:
                    self._next_response()
                continue
            decoded = self._decoded(received)
            if decoded is not None:
                return decoded
        return None

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        """See `FrameSource`; sets the rate of polling. A stream decodes pictures only when asked for."""
        self._interval_s = 1 / (pictures_per_s or _POLLS_PER_S)

    def interrupt(self) -> None:
        """See `FrameSource.interrupt`."""
        self._stopped.set()
        self._client.interrupt()

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._client.close()

    # --- one answer -----------------------------------------------------------------------------------------

    def _next(self) -> _ReceivedPicture | None:
        """Return the next picture of this answer; None at its end."""
        while True:
            self._drain()
            if self._waiting:
                return self._newest()
            if self._response.is_finished:
                self._finish()
                return self._waiting.popleft() if self._waiting else None
            silence_limit_s = self._silence_limit_s()
            try:
                self._feed(self._response.read(silence_limit_s))
            except TimeoutError:
                raise SourceFault.NO_PICTURE_RECEIVED.error(
                    self._client.name, limit_s=round(silence_limit_s, 1)
                ) from None
            if self._clock() - self._progress_s > max(silence_limit_s, self._limits.picture_timeout_s):
                raise SourceError(self._no_progress())

    def _drain(self) -> None:
        """Read all data that has arrived, so that it does not grow old in the socket buffer."""
        for _ in range(64):
            data = self._response.read(0)
            if not data:
                return
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        if not self._jpeg:
            self._whole += data
            if len(self._whole) > MAX_PICTURE_BYTES:
                raise SourceFault.TOO_MANY_BYTES.error(self._client.name, mebibytes=MAX_PICTURE_BYTES >> 20)
            return
        self._scanner.feed(data)
        while (picture := self._scanner.take()) is not None:
            self._enqueue(picture)

    def _finish(self) -> None:
        """The answer has ended: the remaining bytes may be a picture."""
        left = bytes(self._whole) if self._response.is_complete else b""
        self._whole.clear()
        last = self._scanner.finish() if self._jpeg else left
        if last:
            self._enqueue(last)

    def _enqueue(self, picture: bytes) -> None:
        now_s = self._clock()
        if self._received_s is not None:
            self._gaps_s.append(now_s - self._received_s)
        self._received_s = now_s
        self._body_count += 1
        self._waiting.append(_ReceivedPicture(now_s, picture))
        while (
            len(self._waiting) > 1
            and sum(len(received.data) for received in self._waiting) > _MAX_QUEUED_BYTES
        ):
            self._drop_oldest()

    def _newest(self) -> _ReceivedPicture:
        """Return the oldest queued picture, or the newest if the oldest is late."""
        if self._clock() - self._waiting[0].at_s > self._limits.late_s:
            while len(self._waiting) > 1:
                self._drop_oldest()
        return self._waiting.popleft()

    def _drop_oldest(self) -> None:
        self._waiting.popleft()
        self._skipped_count += 1

    def _silence_limit_s(self) -> float:
        """Return how long the source may be silent: three times its usual gap, within limits."""
        min_s = self._limits.silence_s
        if len(self._gaps_s) < 2:
            return max(min_s, self._limits.first_picture_s)
        return max(min_s, min(_MAX_SILENCE_S, 3 * max(self._gaps_s)))

    def _no_progress(self) -> str:
        if self._given_count == 0:
            return SourceFault.NO_JPEG.describe(self._client.name)
        return SourceFault.UNDECODABLE_STREAM.describe(
            self._client.name, limit_s=self._limits.picture_timeout_s
        )

    # --- the next answer ------------------------------------------------------------------------------------

    def _next_response(self) -> None:
        """An answer has ended: poll again, or raise if it was a stream."""
        multipart = self._response.head.content_type.startswith("multipart/")
        if not self._is_polling and (multipart or self._body_count != 1):
            if self._given_count == 0:
                raise SourceFault.NO_JPEG.error(self._client.name)
            raise SourceFault.CONNECTION_CLOSED.error(self._client.name)
        if self._is_polling and self._body_count == 0:
            self._fail(SourceFault.DAMAGED_PICTURE.describe(self._client.name))
        self._is_polling = True
        while not self._client.interrupted and not self._fetch():
            pass

    def _fetch(self) -> bool:
        """Request the next picture when it is due; False if there is no new one."""
        if self._stopped.wait(max(0.0, self._due_s - self._clock())):
            return False
        self._due_s = max(self._due_s + self._interval_s, self._clock())
        try:
            response = self._client.get(self._conditional_headers())
        except SourceError as error:
            self._fail(str(error))
            return False
        if response.head.status == 304:
            self._failed_count = 0
            return False
        if response.head.status >= 300:
            self._fail(describe_http_refusal(self._client, response))
            return False
        self._response, self._body_count = response, 0
        self._scanner = JpegScanner(MAX_PICTURE_BYTES)
        self._progress_s, self._received_s = self._clock(), None
        return True

    def _conditional_headers(self) -> dict[str, str]:
        """Return headers that save sending an unchanged picture again."""
        head = self._response.head
        pairs = {"If-None-Match": head.get("etag"), "If-Modified-Since": head.get("last-modified")}
        return {name: value for name, value in pairs.items() if value and self._failed_count == 0}

    def _fail(self, reason: str) -> None:
        self._failed_count += 1
        if self._failed_count >= _MAX_FAILED_POLLS and not self._client.interrupted:
            raise SourceError(reason)

    # --- pictures -------------------------------------------------------------------------------------------

    def _decoded(self, received: _ReceivedPicture) -> DecodedPicture | None:
        """Return the picture; None if its header is damaged, or the first picture cannot be decoded."""
        size = read_picture_size(received.data)
        if size is None:
            self._reject()
            return None
        if size[0] * size[1] > self._limits.max_pixels:
            raise SourceFault.TOO_MANY_PIXELS.error(
                self._client.name, width=size[0], height=size[1], megapixels=self._limits.max_pixels / 1e6
            )
        decoded = WholePicture(lambda: _decode(received.data, self._client.name), *size, None)
        if self._given_count == 0:  # the first picture must prove that the source has pictures
            try:
                decoded.picture()
            except DamagedPictureError:
                self._reject()
                return None
        decoded.source_frames, self._skipped_count = 1 + self._skipped_count, 0
        self._given_count += 1
        self._failed_count, self._progress_s = 0, received.at_s
        return decoded

    def _reject(self) -> None:
        """Skip a damaged picture; while polling it counts as a failure."""
        if self._is_polling:
            self._fail(SourceFault.DAMAGED_PICTURE.describe(self._client.name))


def describe_http_refusal(client: HttpClient, response: HttpResponse) -> str:
    """Return why the server refused the request."""
    challenges = parse_challenges(response.head.get_all("www-authenticate"))
    return http_refused(client.name, client.origin, response.head.status, challenges)


def _decode(data: bytes, name: str) -> Picture:
    jpeg = data.startswith(JPEG_START)
    whole = data.endswith(JPEG_END) or not jpeg
    with contextlib.suppress(SourceError):
        picture = decode_picture(data if whole else data + JPEG_END, name=name)
        # The decoder fills the missing part of a JPEG with grey 128.
        if whole or not np.all(picture[-8:, -8:] == 128):
            return picture
    raise DamagedPictureError(f"{name}: a picture cannot be decoded")


class HttpFile:
    """The body at one address as a file object; seekable if the server sends its length."""

    def __init__(self, client: HttpClient, url: str, read_timeout_s: float) -> None:
        self._client, self._url, self._timeout_s = client, url, read_timeout_s
        self._at = 0
        self._left = b""
        first = self._ask(0)
        self._response: HttpResponse | None = first
        self._size = first.head.length

    def __repr__(self) -> str:
        return f"<HttpFile {self._client.name} at={self._at}>"

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; empty at the end."""
        if self._response is None and (self._size is None or self._at < self._size):
            self._response = self._ask(self._at)
        try:
            while self._response is not None and not self._left and not self._response.is_finished:
                self._left = self._response.read(self._timeout_s)
        except TimeoutError:
            raise SourceFault.NO_PICTURE_RECEIVED.error(self._client.name, limit_s=self._timeout_s) from None
        data, self._left = self._left[:size], self._left[size:]
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position of the next `read`."""
        if whence == 2 and self._size is None:
            raise OSError("the length is not known")
        at = offset + (0, self._at, self._size or 0)[whence]
        if 0 <= at - self._at < len(self._left):
            self._left = self._left[at - self._at :]
        elif at != self._at:
            self._response, self._left = None, b""
        self._at = at
        return at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seekable(self) -> bool:
        """Whether the length is known."""
        return self._size is not None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _ask(self, at: int) -> HttpResponse:
        response = self._client.get({"Range": f"bytes={at}-"} if at else None, url=self._url)
        if response.head.status >= 300:
            raise SourceError(describe_http_refusal(self._client, response))
        if at and response.head.status != 206:  # a server without range support starts at 0
            while at > 0 and not response.is_finished:
                data = response.read(self._timeout_s)
                self._left = data[at:]
                at -= len(data)
        return response


class HttpFileOpener:
    """Opens the addresses that FFmpeg requests for one camera. One thread uses it; any may call `interrupt`.

    `name` is the address that FFmpeg opens. With `hides_name` it has no suffix: FFmpeg derives a format from
    the suffix, and reads `.cgi` as a format of 2003.
    """

    def __init__(self, target: str, limits: SourceLimits, *, hides_name: bool) -> None:
        self._target, self._limits = target, limits
        self.name = "http:" if hides_name else strip_login(target)
        self._addresses = {self.name: target}
        self._clients: list[HttpClient] = []
        self._interrupted = False
        self.error: SourceError | None = None
        """The last refusal: FFmpeg skips a segment that it cannot open and does not report it."""

    def __repr__(self) -> str:
        return f"<HttpFileOpener open={len(self._clients)} error={self.error!r}>"

    def open(self, url: str, _flags: int, _options: dict[str, str]) -> HttpFile:
        """Open an address that FFmpeg requests."""
        self._clients = [client for client in self._clients if client.open]
        client = HttpClient(self._target, self._limits)
        self._clients.append(client)
        client.interrupted = self._interrupted
        try:
            return HttpFile(client, self._addresses.get(url, url), self._limits.read_timeout_s)
        except SourceError as error:
            client.close()
            self.error = error
            raise

    def interrupt(self) -> None:
        """End all waiting reads at once."""
        self._interrupted = True
        for client in tuple(self._clients):
            client.interrupt()

    def close(self) -> None:
        """Close all connections: FFmpeg does not close all files that it opened."""
        for client in self._clients:
            client.close()
        self._clients.clear()
