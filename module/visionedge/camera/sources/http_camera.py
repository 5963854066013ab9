"""Opens an HTTP address of a camera: what it is shows in the answer, never in the path alone."""

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import DecodedPicture, FrameSource, SourceLimits, WholePicture
from visionedge.camera.sources.http_client import HttpClient, HttpResponse, ResponseHead
from visionedge.camera.sources.images import decode_picture, read_picture_size
from visionedge.camera.sources.network import parse_challenges, strip_login
from visionedge.camera.sources.redirects import copy_login
from visionedge.config.addresses import CameraUri
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.types import Picture

# Finds the JPEG pictures in a stream of bytes, whatever stands between them.
#
# Cameras disagree on how a part of a multipart stream looks (boundaries, lengths, types), but not on how a
# JPEG looks: it is found by its own markers, and all else is ignored.


_SOI = b"\xff\xd8\xff"
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_SOS = 0xDA
_SEGMENTS_BETWEEN_SCANS = frozenset({0xC4, _SOS, 0xDB, 0xDC, 0xDD, 0xFE})
"""Segments that may follow a scan: tables, restart intervals, comments and the next scan."""


class JpegScanner:
    """``feed`` bytes, ``take`` pictures.

    A picture longer than `max_bytes` is let go, so nothing that a camera sends makes this larger than that.
    A picture without its end marker ends where the next one begins.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._data = bytearray()
        self._at = 0
        """What lies before it has been looked at; 0 while no picture has begun."""
        self._in_scan = False
        self.damaged_count = 0

    def __repr__(self) -> str:
        return f"<JpegScanner {len(self._data)} bytes damaged={self.damaged_count}>"

    @property
    def has_begun(self) -> bool:
        """Whether a picture has begun and not ended."""
        return self._at > 0

    @property
    def buffered_bytes(self) -> int:
        """How much of the stream it keeps."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        self._data += data

    def take(self) -> bytes | None:
        """The next whole picture; None where more bytes are needed for it."""
        while True:
            if self._at == 0 and not self._begin():
                return None
            end = self._end()
            if end is not None and end > 0:
                return self._cut(end)
            if end is None and len(self._data) <= self._max_bytes:
                return None
            self._drop(len(self._data) if end is None else len(_SOI) - 1)

    def finish(self) -> bytes | None:
        """The stream has ended: the picture that has begun and lacks its end marker alone."""
        return self._cut(len(self._data)) if self._in_scan else None

    def _begin(self) -> bool:
        start = self._data.find(_SOI)
        if start < 0:
            del self._data[: max(0, len(self._data) - len(_SOI) + 1)]
            return False
        del self._data[:start]
        self._at, self._in_scan = 2, False
        return True

    def _drop(self, size: int) -> None:
        """What began is no picture: look for the next behind so many of its bytes."""
        self.damaged_count += 1
        del self._data[:size]
        self._at, self._in_scan = 0, False

    def _cut(self, end: int) -> bytes:
        picture = bytes(self._data[:end])
        del self._data[:end]
        self._at, self._in_scan = 0, False
        return picture

    def _end(self) -> int | None:
        """Where the picture ends; None where more bytes are needed, 0 where it is none."""
        data = self._data
        while True:
            if self._in_scan:
                at = data.find(b"\xff", self._at)
                self._at = len(data) if at < 0 else at
            if self._at + 2 > len(data):
                return None
            marker = data[self._at + 1]
            if marker == 0xD9:
                return self._at + 2
            if self._in_scan and marker == 0xD8:
                return self._at
            if not self._in_scan and (data[self._at] != 0xFF or marker in (0, 0xD8)):
                return 0
            if not self._step(marker):
                return None

    def _step(self, marker: int) -> bool:
        """Go on behind a marker; False where more bytes are needed."""
        if marker == 0xFF:  # padding
            self._at += 1
        elif marker in _STANDALONE or (self._in_scan and marker not in _SEGMENTS_BETWEEN_SCANS):
            self._at += 2
        elif self._at + 4 > len(self._data):
            return False
        else:
            self._at += 2 + max(2, int.from_bytes(self._data[self._at + 2 : self._at + 4], "big"))
            self._in_scan = marker == _SOS
        return True


# Pictures that a camera gives over HTTP: MJPEG as it comes, and stills, which are fetched repeatedly.


MAX_PICTURE_BYTES = 24 << 20
_MAX_QUEUED_BYTES = 24 << 20
_POLLS_PER_S = 1.0
_MAX_FAILED_POLLS = 3
_MAX_SILENCE_S = 60.0
_SECOND_PICTURE_WAIT_S = 1.0
_EOI = b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class _ReceivedPicture:
    at_s: float
    data: bytes


class HttpPictureSource:
    """JPEG pictures in one endless answer, or one picture in each of many answers; see `FrameSource`.

    Which of them it is shows when the first answer ends behind its first picture (`settle`). Then the address
    is asked again at the rate that is wanted; a few failures in a row are tolerated, as the next answer may
    be right again.
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
        self._failed_count = self._body_count = self._given_count = self._left_out = 0
        self._stopped = threading.Event()
        self._whole = bytearray()
        self._feed(first_bytes)

    def __repr__(self) -> str:
        return f"<HttpPictures {self._client.name} polls={self._is_polling} given={self._given_count}>"

    @property
    def live(self) -> bool:
        """See `Source.live`: where each picture is asked for, we set the pace."""
        return not self._is_polling

    def detect_polling(self, deadline_s: float) -> None:
        """Wait until it shows whether the answer is one picture or a stream of them.

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
                raise SourceError(
                    diagnosis.open_timed_out(self._client.name, self._limits.open_timeout_s)
                ) from None
        if self._response.is_finished:
            self._finish()
            self._is_polling = self._body_count == 1
            if self._body_count == 0:
                raise SourceError(diagnosis.damaged_picture(self._client.name))

    def read(self) -> DecodedPicture | None:
        """See `Source.read`."""
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
        """See `Source.want`: stills are fetched so often; JPEG of a stream is decoded when looked at."""
        self._interval_s = 1 / (pictures_per_s or _POLLS_PER_S)

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._stopped.set()
        self._client.interrupt()

    def close(self) -> None:
        """See `Source.close`."""
        self._client.close()

    # --- one answer -----------------------------------------------------------------------------------------

    def _next(self) -> _ReceivedPicture | None:
        """The next picture of this answer; None at its end."""
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
                raise SourceError(
                    diagnosis.no_picture_received(self._client.name, round(silence_limit_s, 1))
                ) from None
            if self._clock() - self._progress_s > max(silence_limit_s, self._limits.picture_timeout_s):
                raise SourceError(self._no_progress())

    def _drain(self) -> None:
        """Take what has come already, so that it does not grow old in the buffers of the connection."""
        for _ in range(64):
            data = self._response.read(0)
            if not data:
                return
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        if not self._jpeg:
            self._whole += data
            if len(self._whole) > MAX_PICTURE_BYTES:
                raise SourceError(diagnosis.too_many_bytes(self._client.name, MAX_PICTURE_BYTES))
            return
        self._scanner.feed(data)
        while (picture := self._scanner.take()) is not None:
            self._enqueue(picture)

    def _finish(self) -> None:
        """The answer has ended: what is left may be a picture, too."""
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
        """The oldest that waits; where that is late, those before the newest are left out."""
        if self._clock() - self._waiting[0].at_s > self._limits.late_s:
            while len(self._waiting) > 1:
                self._drop_oldest()
        return self._waiting.popleft()

    def _drop_oldest(self) -> None:
        self._waiting.popleft()
        self._left_out += 1

    def _silence_limit_s(self) -> float:
        """How long silence is no loss: a picture every 10 s is a rate, too."""
        min_s = self._limits.silence_s
        if len(self._gaps_s) < 2:
            return max(min_s, self._limits.first_picture_s)
        return max(min_s, min(_MAX_SILENCE_S, 3 * max(self._gaps_s)))

    def _no_progress(self) -> str:
        if self._given_count == 0:
            return diagnosis.no_jpeg(self._client.name)
        return diagnosis.undecodable_stream(self._client.name, self._limits.picture_timeout_s)

    # --- the next answer ------------------------------------------------------------------------------------

    def _next_response(self) -> None:
        """An answer has ended: ask again where stills are fetched; a stream is lost."""
        multipart = self._response.head.content_type.startswith("multipart/")
        if not self._is_polling and (multipart or self._body_count != 1):
            if self._given_count == 0:
                raise SourceError(diagnosis.no_jpeg(self._client.name))
            raise SourceError(diagnosis.connection_closed(self._client.name))
        if self._is_polling and self._body_count == 0:
            self._fail(diagnosis.damaged_picture(self._client.name))
        self._is_polling = True
        while not self._client.interrupted and not self._fetch():
            pass

    def _fetch(self) -> bool:
        """Ask for the next still when it is due; False where there is no new one."""
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
        """So that a picture that has not changed is not sent again."""
        head = self._response.head
        pairs = {"If-None-Match": head.get("etag"), "If-Modified-Since": head.get("last-modified")}
        return {name: value for name, value in pairs.items() if value and self._failed_count == 0}

    def _fail(self, reason: str) -> None:
        self._failed_count += 1
        if self._failed_count >= _MAX_FAILED_POLLS and not self._client.interrupted:
            raise SourceError(reason)

    # --- pictures -------------------------------------------------------------------------------------------

    def _decoded(self, received: _ReceivedPicture) -> DecodedPicture | None:
        """What is given for it; None where it is damaged, as far as that shows before it is decoded."""
        size = read_picture_size(received.data)
        if size is None:
            self._reject()
            return None
        if size[0] * size[1] > self._limits.max_pixels:
            raise SourceError(diagnosis.too_many_pixels(self._client.name, *size, self._limits.max_pixels))
        decoded = WholePicture(lambda: _decode(received.data, self._client.name), *size, None)
        if self._given_count == 0:  # only a picture that was seen proves that there are any
            try:
                decoded.picture()
            except DamagedPictureError:
                self._reject()
                return None
        decoded.source_frames, self._left_out = 1 + self._left_out, 0
        self._given_count += 1
        self._failed_count, self._progress_s = 0, received.at_s
        return decoded

    def _reject(self) -> None:
        """A damaged picture is left out; a still that is damaged counts as a failure."""
        if self._is_polling:
            self._fail(diagnosis.damaged_picture(self._client.name))


def describe_http_refusal(client: HttpClient, response: HttpResponse) -> str:
    """Why an answer without a picture is one."""
    challenges = parse_challenges(response.head.all("www-authenticate"))
    return diagnosis.http_refused(client.name, client.origin, response.head.status, challenges)


def _decode(data: bytes, name: str) -> Picture:
    jpeg = data[:2] == b"\xff\xd8"
    whole = data.endswith(_EOI) or not jpeg
    with contextlib.suppress(SourceError):
        picture = decode_picture(data if whole else data + _EOI, name=name)
        # The decoder paints what is missing of a JPEG in a middle grey.
        if whole or not np.all(picture[-8:, -8:] == 128):
            return picture
    raise DamagedPictureError(f"a picture of {name} cannot be decoded")


_FIRST_BYTES = 512
_FIRST_BYTES_WAIT_S = 1.0
_JPEG = b"\xff\xd8\xff"
_OTHER_PICTURE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
_PART = re.compile(rb"\s*(?:--|content-(?:type|length)\s*:)", re.IGNORECASE)
_TEXT = re.compile(r"text/|.*\b(?:html|json|xml|javascript)\b")

ContentKind = Literal["jpeg", "still", "playlist", "media", "page"]

OpenMedia = Callable[[str, SourceLimits, bool], FrameSource]
"""Opens what is no picture: (its address with the login, limits, whether it is a playlist)."""


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
    return open_media(copy_login(response.url, uri.target), limits, kind == "playlist")


def _raise_refusal(client: HttpClient, response: HttpResponse, kind: ContentKind, first_bytes: bytes) -> None:
    """Raise the reason where there is no picture in this answer."""
    if response.head.status >= 300:
        raise SourceError(describe_http_refusal(client, response))
    if kind == "page" and not first_bytes.strip():
        raise SourceError(diagnosis.empty_body(client.name))
    if kind == "page":
        raise SourceError(diagnosis.not_a_picture(client.name, response.head.content_type))


def detect_content_kind(head: ResponseHead, first_bytes: bytes) -> ContentKind:
    """What an answer is, from its media type and the first bytes of its body."""
    media = head.content_type
    if media.startswith("multipart/") or first_bytes.startswith(_JPEG) or _PART.match(first_bytes):
        return "jpeg"
    if first_bytes.startswith(_OTHER_PICTURE_SIGNATURES) or (
        first_bytes[:4] == b"RIFF" and first_bytes[8:12] == b"WEBP"
    ):
        return "still"
    if media == "application/dash+xml" or first_bytes.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"#EXTM3U"):
        return "playlist"
    # Something stands before the first part; in the head of a video file these bytes would be chance.
    if "jpeg" in media or "jpg" in media or (_JPEG in first_bytes and not media.startswith("video/")):
        return "jpeg"
    return "page" if _is_text(media, first_bytes) else "media"


def _is_text(media: str, first_bytes: bytes) -> bool:
    """Whether it is for people or programs; nothing at all is, too."""
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


# Files and playlists over HTTP for FFmpeg: it parses, and what it asks for is fetched here.
#
# So redirects and segments at other hosts, logins and proxies are decided in one place.


class HttpFile:
    """What is behind one address, as a file that can be read, and sought in where the server allows it."""

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
        """Up to so many bytes; empty at the end."""
        if self._response is None and (self._size is None or self._at < self._size):
            self._response = self._ask(self._at)
        try:
            while self._response is not None and not self._left and not self._response.is_finished:
                self._left = self._response.read(self._timeout_s)
        except TimeoutError:
            raise SourceError(diagnosis.no_picture_received(self._client.name, self._timeout_s)) from None
        data, self._left = self._left[:size], self._left[size:]
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go on at another place, from the next `read` on."""
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
        """Where it is."""
        return self._at

    def seekable(self) -> bool:
        """A stream without an end has only one direction."""
        return self._size is not None

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _ask(self, at: int) -> HttpResponse:
        response = self._client.get({"Range": f"bytes={at}-"} if at else None, url=self._url)
        if response.head.status >= 300:
            raise SourceError(describe_http_refusal(self._client, response))
        if at and response.head.status != 206:  # a server without ranges begins at the beginning
            while at > 0 and not response.is_finished:
                data = response.read(self._timeout_s)
                self._left = data[at:]
                at -= len(data)
        return response


class HttpFileOpener:
    """Opens whatever one camera's container asks for. Used by one thread, but for `interrupt`.

    `name` is what FFmpeg is to open. With `hides_name` it tells nothing: FFmpeg takes the end of an address
    for a format, and any `.cgi` for one of 2003.
    """

    def __init__(self, target: str, limits: SourceLimits, *, hides_name: bool) -> None:
        self._target, self._limits = target, limits
        self.name = "http:" if hides_name else strip_login(target)
        self._addresses = {self.name: target}
        self._clients: list[HttpClient] = []
        self._interrupted = False
        self.error: SourceError | None = None
        """The last that was refused: FFmpeg goes on behind a segment that it cannot open."""

    def __repr__(self) -> str:
        return f"<HttpFiles open={len(self._clients)} error={self.error!r}>"

    def open(self, url: str, _flags: int, _options: dict[str, str]) -> HttpFile:
        """The file behind an address that FFmpeg asks for."""
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
        """Let whatever waits end at once."""
        self._interrupted = True
        for client in tuple(self._clients):
            client.interrupt()

    def close(self) -> None:
        """Hang up everywhere: FFmpeg does not close all that it opened."""
        for client in self._clients:
            client.close()
        self._clients.clear()
