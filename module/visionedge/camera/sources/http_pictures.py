"""Pictures that a camera gives over HTTP: MJPEG as it comes, and stills, which are fetched repeatedly."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import Decoded, Limits, WholePicture
from visionedge.camera.sources.http_client import Answer, HttpClient
from visionedge.camera.sources.http_login import challenges_in
from visionedge.camera.sources.images import decode_picture, picture_size
from visionedge.camera.sources.jpeg_scanner import JpegScanner
from visionedge.errors import DamagedError, SourceError
from visionedge.frames.types import Picture

MAX_PICTURE_BYTES = 24 << 20
_WAITING_MOST_BYTES = 24 << 20
_POLLS_PER_S = 1.0
_POLLS_FAILED_MOST = 3
_PATIENCE_MOST_S = 60.0
_SECOND_PICTURE_S = 1.0
_EOI = b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class _Came:
    at_s: float
    data: bytes


class HttpPictures:
    """JPEG pictures in one endless answer, or one picture in each of many answers; see `Source`.

    Which of them it is shows when the first answer ends behind its first picture (`settle`). Then the address
    is asked again at the rate that is wanted; a few failures in a row are tolerated, as the next answer may
    be right again.
    """

    decoder = "opencv"

    def __init__(
        self,
        client: HttpClient,
        answer: Answer,
        begin: bytes,
        limits: Limits,
        *,
        jpeg: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._answer, self._limits = client, answer, limits
        self._jpeg, self._clock = jpeg, clock
        self._scanner = JpegScanner(MAX_PICTURE_BYTES)
        self._waiting: deque[_Came] = deque()
        self._gaps_s: deque[float] = deque(maxlen=3)
        self._came_s: float | None = None
        self._progress_s = clock()
        self._polls = False
        self._interval_s = 1 / (limits.pictures_per_s or _POLLS_PER_S)
        self._due_s = clock() + self._interval_s
        self._failed_count = self._body_count = self._given_count = self._left_out = 0
        self._stopped = threading.Event()
        self._whole = bytearray()
        self._feed(begin)

    def __repr__(self) -> str:
        return f"<HttpPictures {self._client.name} polls={self._polls} given={self._given_count}>"

    @property
    def live(self) -> bool:
        """See `Source.live`: where each picture is asked for, we set the pace."""
        return not self._polls

    def settle(self, deadline_s: float) -> None:
        """Wait until it shows whether the answer is one picture or a stream of them.

        Raises:
            SourceError: it is neither.
        """
        while (
            not self._answer.over and len(self._waiting) < 2 and not (self._waiting and self._scanner.begun)
        ):
            left_s = deadline_s - self._clock()
            try:
                self._feed(
                    self._answer.read(max(0.1, min(left_s, _SECOND_PICTURE_S) if self._waiting else left_s))
                )
            except TimeoutError:
                if self._waiting:
                    return
                raise SourceError(
                    diagnosis.no_picture(self._client.name, self._limits.open_timeout_s)
                ) from None
        if self._answer.over:
            self._finish()
            self._polls = self._body_count == 1
            if self._body_count == 0:
                raise SourceError(diagnosis.broken_picture(self._client.name))

    def read(self) -> Decoded | None:
        """See `Source.read`."""
        while not self._client.interrupted:
            came = self._next()
            if came is None:
                if not self._client.interrupted:
                    self._go_on()
                continue
            decoded = self._decoded(came)
            if decoded is not None:
                return decoded
        return None

    def want(self, pictures_per_s: float | None) -> None:
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

    def _next(self) -> _Came | None:
        """The next picture of this answer; None at its end."""
        while True:
            self._drain()
            if self._waiting:
                return self._newest()
            if self._answer.over:
                self._finish()
                return self._waiting.popleft() if self._waiting else None
            patience_s = self._patience_s()
            try:
                self._feed(self._answer.read(patience_s))
            except TimeoutError:
                raise SourceError(diagnosis.silent(self._client.name, round(patience_s, 1))) from None
            if self._clock() - self._progress_s > max(patience_s, self._limits.picture_timeout_s):
                raise SourceError(self._no_progress())

    def _drain(self) -> None:
        """Take what has come already, so that it does not grow old in the buffers of the connection."""
        for _ in range(64):
            data = self._answer.read(0)
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
            self._arrive(picture)

    def _finish(self) -> None:
        """The answer has ended: what is left may be a picture, too."""
        left = bytes(self._whole) if self._answer.complete else b""
        self._whole.clear()
        last = self._scanner.finish() if self._jpeg else left
        if last:
            self._arrive(last)

    def _arrive(self, picture: bytes) -> None:
        now_s = self._clock()
        if self._came_s is not None:
            self._gaps_s.append(now_s - self._came_s)
        self._came_s = now_s
        self._body_count += 1
        self._waiting.append(_Came(now_s, picture))
        while len(self._waiting) > 1 and sum(len(came.data) for came in self._waiting) > _WAITING_MOST_BYTES:
            self._leave_out()

    def _newest(self) -> _Came:
        """The oldest that waits; where that is late, those before the newest are left out."""
        if self._clock() - self._waiting[0].at_s > self._limits.late_s:
            while len(self._waiting) > 1:
                self._leave_out()
        return self._waiting.popleft()

    def _leave_out(self) -> None:
        self._waiting.popleft()
        self._left_out += 1

    def _patience_s(self) -> float:
        """How long silence is no loss: a picture every 10 s is a rate, too."""
        least_s = self._limits.silence_s
        if len(self._gaps_s) < 2:
            return max(least_s, self._limits.first_picture_s)
        return max(least_s, min(_PATIENCE_MOST_S, 3 * max(self._gaps_s)))

    def _no_progress(self) -> str:
        if self._given_count == 0:
            return diagnosis.no_jpeg(self._client.name)
        return diagnosis.only_rubbish(self._client.name, self._limits.picture_timeout_s)

    # --- the next answer ------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """An answer has ended: ask again where stills are fetched; a stream is lost."""
        multipart = self._answer.head.content_type.startswith("multipart/")
        if not self._polls and (multipart or self._body_count != 1):
            if self._given_count == 0:
                raise SourceError(diagnosis.no_jpeg(self._client.name))
            raise SourceError(diagnosis.closed(self._client.name))
        if self._polls and self._body_count == 0:
            self._fail(diagnosis.broken_picture(self._client.name))
        self._polls = True
        while not self._client.interrupted and not self._fetch():
            pass

    def _fetch(self) -> bool:
        """Ask for the next still when it is due; False where there is no new one."""
        if self._stopped.wait(max(0.0, self._due_s - self._clock())):
            return False
        self._due_s = max(self._due_s + self._interval_s, self._clock())
        try:
            answer = self._client.get(self._conditions())
        except SourceError as error:
            self._fail(str(error))
            return False
        if answer.head.status == 304:
            self._failed_count = 0
            return False
        if answer.head.status >= 300:
            self._fail(refusal(self._client, answer))
            return False
        self._answer, self._body_count = answer, 0
        self._scanner = JpegScanner(MAX_PICTURE_BYTES)
        self._progress_s, self._came_s = self._clock(), None
        return True

    def _conditions(self) -> dict[str, str]:
        """So that a picture that has not changed is not sent again."""
        head = self._answer.head
        pairs = {"If-None-Match": head.get("etag"), "If-Modified-Since": head.get("last-modified")}
        return {name: value for name, value in pairs.items() if value and self._failed_count == 0}

    def _fail(self, reason: str) -> None:
        self._failed_count += 1
        if self._failed_count >= _POLLS_FAILED_MOST and not self._client.interrupted:
            raise SourceError(reason)

    # --- pictures -------------------------------------------------------------------------------------------

    def _decoded(self, came: _Came) -> Decoded | None:
        """What is given for it; None where it is damaged, as far as that shows before it is decoded."""
        size = picture_size(came.data)
        if size is None:
            self._reject()
            return None
        if size[0] * size[1] > self._limits.max_pixels:
            raise SourceError(diagnosis.too_large(self._client.name, *size, self._limits.max_pixels))
        decoded = WholePicture(lambda: _decode(came.data, self._client.name), *size, None)
        if self._given_count == 0:  # only a picture that was seen proves that there are any
            try:
                decoded.picture()
            except DamagedError:
                self._reject()
                return None
        decoded.covers, self._left_out = 1 + self._left_out, 0
        self._given_count += 1
        self._failed_count, self._progress_s = 0, came.at_s
        return decoded

    def _reject(self) -> None:
        """A damaged picture is left out; a still that is damaged counts as a failure."""
        if self._polls:
            self._fail(diagnosis.broken_picture(self._client.name))


def refusal(client: HttpClient, answer: Answer) -> str:
    """Why an answer without a picture is one."""
    challenges = challenges_in(answer.head.all("www-authenticate"))
    return diagnosis.http_refused(client.name, client.origin, answer.head.status, challenges)


def _decode(data: bytes, name: str) -> Picture:
    jpeg = data[:2] == b"\xff\xd8"
    whole = data.endswith(_EOI) or not jpeg
    with contextlib.suppress(SourceError):
        picture = decode_picture(data if whole else data + _EOI, name=name)
        # The decoder paints what is missing of a JPEG in a middle grey.
        if whole or not np.all(picture[-8:, -8:] == 128):
            return picture
    raise DamagedError(f"a picture of {name} cannot be decoded")
