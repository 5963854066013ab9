"""Models from an address: downloaded over https, checked by their sha256, and kept in a `ModelStore`.

`ModelDownload.run` blocks its thread until the model is there; `stop` ends it from any other thread. aiohttp
does the requests and tenacity the retries. Redirects are followed here, because aiohttp would follow them to
`http:` and would send the user name and password in a redirect's address.
"""

import asyncio
import contextlib
import http.client
import logging
import os
import re
import ssl
import stat
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
import tenacity
from yarl import URL

from visionedge import __version__
from visionedge.config.addresses import file_url_to_path, format_url
<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
from visionedge.errors import FetchError
from visionedge.model.model_store import ModelStore, PartialModel
=======
from visionedge.errors import DownloadError
from visionedge.runtime.files import evict_least_recently_used, is_special_file, set_aside_damaged
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06
from visionedge.runtime.redaction import find_secrets, redact, register_secrets
from visionedge.runtime.retry import RetryPolicy

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_MAX_REDIRECTS = 5
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_FILE_STATUSES = (200, 206, 416)  # 416: the partial model is not a part of the file
_RETRYABLE_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

_NOT_A_MODEL = (
    (b"PK\x03\x04", "is a ZIP archive; give the address of the .onnx file itself"),
    (b"\x1f\x8b", "is compressed (gzip); give the address of the .onnx file itself"),
    (b"version https://git-lf", "is a pointer of Git LFS; give the address of the file that it points to"),
    (b"<", "is a web page; give the address that downloads the file"),
)

TIMEOUTS = aiohttp.ClientTimeout(total=1800, sock_connect=15, sock_read=30)
"""Limits of one attempt, in s: in total, until the TLS connection is open, and between two blocks."""

WAIT = RetryPolicy(1, 60, jitter=0.5)
LASTING_WAIT = RetryPolicy(60, 3600, jitter=0.5)
"""For permanent failures, which a person has to repair."""


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """Which model to download, and from where. A file larger than `max_bytes` is refused."""

    url: str
    sha256: str
    max_bytes: int = 1_000_000_000


@dataclass(frozen=True, slots=True)
<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
=======
class DownloadTimeouts:
    """Limits of one attempt: until the TLS connection is open, between two blocks, and in total."""

    connect_s: float = 15.0
    read_s: float = 30.0
    total_s: float = 1800.0


_WAITS = RetryPolicy(first_wait_s=1.0, max_wait_s=60.0, jitter=0.5)
_PERMANENT_WAITS = RetryPolicy(first_wait_s=60.0, max_wait_s=3600.0, jitter=0.5)


@dataclass(frozen=True, slots=True)
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06
class DownloadRetryPolicy:
    """Limits of an attempt, and the waits after a failed one. Their jitter spreads many devices in time."""

<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
    timeouts: aiohttp.ClientTimeout = TIMEOUTS
    wait: RetryPolicy = WAIT
    lasting_wait: RetryPolicy = LASTING_WAIT
    progress_interval_s: float = 5.0

=======
    A permanent failure is one that a person has to repair, so the waits after it are longer.
    """

    timeouts: DownloadTimeouts = field(default_factory=DownloadTimeouts)
    waits: RetryPolicy = _WAITS
    permanent_waits: RetryPolicy = _PERMANENT_WAITS
    progress_interval_s: float = 5.0


@dataclass(slots=True)
class DownloadProgress:
    """How far a download is; `total_bytes` is None if the server does not say. Any thread may read it."""

    done_bytes: int = 0
    total_bytes: int | None = None

    @property
    def message(self) -> str:
        """``42 %``, or the megabytes so far if the size is not known."""
        if self.total_bytes:
            return f"{100 * self.done_bytes // self.total_bytes} %"
        return f"{self.done_bytes / 1e6:.1f} MB"

>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06

class ModelDownload:
    """The download of one model. `run` belongs to one thread, everything else to any thread.

    With `tries`, the download gives up after so many failed attempts, and at once after a permanent
    failure. Without `tries` it never gives up: networks come back, and missing files get uploaded.
    `on_failure` is called on the thread of `run` with the reason of a failed attempt, once for equal
    reasons in a row.

    `message` is the state for people: the progress, or the failure after which the download is retried.
    """

    def __init__(
        self,
        request: DownloadRequest,
        store: ModelStore,
        *,
        tries: int | None = None,
        retry_policy: DownloadRetryPolicy | None = None,
        on_failure: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._request = request
        self._store = store
        self._tries = tries
        self._retry_policy = retry_policy or DownloadRetryPolicy()
        self._on_failure = on_failure
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._task: asyncio.Task[Path] | None = None
        self._logged_s = 0.0
        self.message = f"downloading the model: {format_progress(0, None)}"
        register_secrets(find_secrets([request.url]))

    def __repr__(self) -> str:
        return f"<ModelDownload {format_url(self._request.url)} {self.message}>"

    def run(self) -> Path | None:
        """Download the model, or find it in the store; None if `stop` was called. Blocks, possibly for hours.

        Raises:
            DownloadError: the download gave up; one line that begins with the address.
        """
        stored = self._store.find(self._request.sha256)
        if stored is not None:
            return stored
        loop = _AbortableEventLoop()
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: loop):
            with self._lock:
                self._task = loop.create_task(self._retry(loop))
                if self._stopping:
                    self._task.cancel()
            return loop.run_until_complete(self._task)
        return None

    def stop(self) -> None:
        """Let `run` return soon; also before it began, or after it ended."""
        with self._lock:
            self._stopping = True
            task = self._task
        if task is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: `run` has ended
                task.get_loop().call_soon_threadsafe(task.cancel)

    async def _retry(self, loop: "_AbortableEventLoop") -> Path:
        log.info("downloading the model from %s", format_url(self._request.url))
        self._logged_s = time.monotonic()
        attempts = tenacity.AsyncRetrying(
<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
            retry=tenacity.retry_if_exception(self._is_retryable),
            stop=tenacity.stop_never if self._tries is None else tenacity.stop_after_attempt(self._tries),
=======
            retry=tenacity.retry_if_exception_type(DownloadError),
            stop=self._gives_up,
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06
            wait=self._compute_wait_s,
            before_sleep=self._report_failure,
            reraise=True,
        )
        try:
            return await attempts(self._attempt)
<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
=======
        except DownloadError as error:
            raise DownloadError(self._describe(error), permanent=error.permanent) from None
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06
        finally:
            await loop.abort_connections()

    async def _attempt(self) -> Path:
        began_s = time.monotonic()
        try:
            with self._store.open_partial(self._request.sha256) as partial:
                await _DownloadAttempt(
                    self._request, partial, self._retry_policy.timeouts, self._report_progress
                ).run()
                path = partial.commit()
        except FetchError as error:
            message = f"{format_url(self._request.url)}: {error}"
            raise FetchError(message, permanent=error.permanent) from None
        took_s = time.monotonic() - began_s
        log.info("downloaded the model: %.1f MB in %.1f s", partial.size_bytes / 1e6, took_s)
        return path

    def _is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, FetchError) and (self._tries is None or not error.permanent)

    def _compute_wait_s(self, state: tenacity.RetryCallState) -> float:
        policy = self._retry_policy
<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
        wait = policy.lasting_wait if _read_failure(state).permanent else policy.wait
        return wait.wait_s(state.attempt_number)
=======
        return (policy.permanent_waits if _read_failure(state).permanent else policy.waits)(state)
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06

    def _report_failure(self, state: tenacity.RetryCallState) -> None:
        failure = str(_read_failure(state))
        self.message = f"cannot download the model, retrying: {failure}"
        if failure != self._failure:
            self._failure = failure
            log.warning("cannot download the model, retrying in %.0f s: %s", state.upcoming_sleep, failure)
            self._on_failure(failure)

<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
    def _report_progress(self, done_bytes: int, total_bytes: int | None) -> None:
        self.message = f"downloading the model: {format_progress(done_bytes, total_bytes)}"
        now_s = time.monotonic()
        if now_s - self._logged_s >= self._retry_policy.progress_interval_s:
            self._logged_s = now_s
            log.info("%s", self.message)


def format_progress(done_bytes: int, total_bytes: int | None) -> str:
    """``42 %``, or the megabytes so far if the size of the file is not known."""
    return f"{100 * done_bytes // total_bytes} %" if total_bytes else f"{done_bytes / 1e6:.1f} MB"
=======
    def _describe(self, error: DownloadError) -> str:
        return f"{format_url(self.order.url)}: {error}"
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06


def _read_failure(state: tenacity.RetryCallState) -> DownloadError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, DownloadError)  # noqa: S101 - only these are retried
    return error


class _AbortableEventLoop(asyncio.SelectorEventLoop):
    """An event loop that can abort its connections: closing one with TLS waits up to 30 s for the server."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        transport, protocol = await super().create_connection(*args, **kwargs)
        self._opened.add(transport)
        return transport, protocol

    async def abort_connections(self) -> None:
        for transport in tuple(self._opened):
            transport.abort()
        for _ in range(3):  # the socket, TLS and HTTP layers are closed one after the other
            await asyncio.sleep(0)


# --- one attempt --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _DownloadAttempt:
    """Downloads the missing part of `partial`, and checks its sum.

<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
    `report` is called after each block, with the size of the partial model and the total size in bytes.
    """

    request: DownloadRequest
    partial: PartialModel
    timeouts: aiohttp.ClientTimeout
    report: Callable[[int, int | None], None]
    total_bytes: int | None = None

    async def run(self) -> None:
        """Raises FetchError: one line without the address."""
        wanted, partial = self.request.sha256.lower(), self.partial
        if partial.sha256 == wanted:
            return  # an earlier process ended between the last byte and the renaming
        is_file = self.request.url.startswith("file:")
        resumed = await self._copy_file() if is_file else await self._download()
        if (found := partial.sha256) != wanted:
            partial.discard()
=======
    Raises:
        DownloadError: one line without the address.
    """
    progress.done_bytes, progress.total_bytes = partial.size_bytes, None
    if partial.sha256 == order.sha256.lower():
        return  # an earlier process ended between the last byte and the renaming
    resumed = False
    if order.url.startswith("file:"):
        partial.discard()
        await _copy_file(order, partial, progress)
    else:
        resumed = await _download(order, partial, timeouts, progress)
    if partial.sha256 != order.sha256.lower():
        found = partial.sha256
        partial.discard()
        raise DownloadError(
            f"has the sha256 {found[:12]}…, not {order.sha256.lower()[:12]}…",
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06
            # A resumed download can consist of two versions of the file; a new one cannot.
            raise FetchError(f"has the sha256 {found[:12]}…, not {wanted[:12]}…", permanent=not resumed)

    async def _copy_file(self) -> bool:
        self.partial.discard()
        try:
            # Non-blocking: opening a pipe would wait for a writer.
            handle = os.open(file_url_to_path(self.request.url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise FetchError("is not a regular file", permanent=True)
                self._set_total(status.st_size)
                while block := file.read(_BLOCK_BYTES):
                    self._write(block)
                    await asyncio.sleep(0)  # lets `stop` cancel it
        except OSError as error:
            raise FetchError(f"cannot be read: {error.strerror or error}", permanent=True) from None
        return False

<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
    async def _download(self) -> bool:
        """Returns whether the server resumed where the partial model ended."""
        try:
            async with (
                aiohttp.ClientSession(
                    # A new context for each attempt: the file SSL_CERT_FILE can have changed.
                    connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(), force_close=True),
                    timeout=self.timeouts,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    headers={"User-Agent": f"visionedge/{__version__}", "Accept-Encoding": "identity"},
                ) as session,
                await self._request_file(session) as response,
            ):
                resumed = self._is_resumed(response)
                if response.content_length is not None:
                    self._set_total(self.partial.size_bytes + response.content_length)
                async for block in response.content.iter_any():
                    self._write(block)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise FetchError(_describe_network_error(error, self.timeouts)) from None
        return resumed
=======
async def _copy_file(order: DownloadRequest, partial: "PartialModel", progress: DownloadProgress) -> None:
    try:
        # Non-blocking: opening a pipe would wait for a writer.
        handle = os.open(file_url_to_path(order.url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DownloadError("is no regular file", permanent=True)
            _check_size(order, partial, progress, status.st_size)
            while block := file.read(_BLOCK_BYTES):
                _write_block(order, partial, progress, block)
                await asyncio.sleep(0)  # lets `stop` cancel it
    except OSError as error:
        raise DownloadError(f"cannot be read: {error.strerror or error}", permanent=True) from None
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06

    async def _request_file(self, session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        """The response behind all redirects."""
        url = URL(self.request.url, encoded=self.request.url.isascii())  # encoding again breaks a signature
        offset = self.partial.size_bytes
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        for _ in range(_MAX_REDIRECTS + 1):
            response = await session.get(url, headers=headers, allow_redirects=False, proxy=_find_proxy(url))
            if response.status not in _REDIRECT_STATUSES:
<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
                return response
            response.close()
            url = _follow_redirect(url, response.headers.get("Location", ""))
        raise FetchError(f"is redirected more than {_MAX_REDIRECTS} times", permanent=True)

    def _is_resumed(self, response: aiohttp.ClientResponse) -> bool:
        """Whether the response continues the partial model, which is emptied if it does not.

        Raises:
            FetchError: it is not a file; after another part of a file, the next attempt begins anew.
        """
        if response.status not in _FILE_STATUSES:
            phrase = http.client.responses.get(response.status, "")
            raise FetchError(
                f"the server answers {response.status} {phrase}".rstrip(),
                permanent=response.status not in _RETRYABLE_STATUSES,
            )
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise FetchError("comes compressed, although the request excluded compression", permanent=True)
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        is_part = response.status == 206
        if is_part and match and int(match[1]) == self.partial.size_bytes > 0:
            return True
        self.partial.discard()
        if response.status != 200:
            raise FetchError("the server cannot resume the interrupted download; starting from the beginning")
        return False

    def _set_total(self, total_bytes: int) -> None:
        """Check that a file of this size is allowed, and that the disk has space for it."""
        if total_bytes > self.request.max_bytes:
            self._refuse_size(f"{total_bytes / 1e6:,.1f} MB")
        self.partial.check_free_space(total_bytes - self.partial.size_bytes)
        self.total_bytes = total_bytes

    def _write(self, block: bytes) -> None:
        if self.partial.size_bytes + len(block) > self.request.max_bytes:
            self._refuse_size("more")
        if self.partial.size_bytes == 0:
            for beginning, message in _NOT_A_MODEL:
                if block.startswith(beginning):
                    raise FetchError(message, permanent=True)
        self.partial.write(block)
        self.report(self.partial.size_bytes, self.total_bytes)

    def _refuse_size(self, size: str) -> None:
        self.partial.discard()
        limit = f"model.maxMegabytes is {self.request.max_bytes / 1e6:,.0f}"
        raise FetchError(f"has {size}, but {limit}", permanent=True)
=======
                _check_status(response)
                yield response
                return
            url = _follow_redirect(url, response)
    raise DownloadError(f"is redirected more than {_MAX_REDIRECTS} times", permanent=True)
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06


def _follow_redirect(url: URL, location: str) -> URL:
    """The target of a redirect, without user name and password: these are only for the first host."""
    try:
        target = url.with_user(None).join(URL(location, encoded=location.isascii()))
    except ValueError:
        raise DownloadError("is redirected to an invalid address", permanent=True) from None
    if target.scheme != "https" or not target.host:
        raise DownloadError(
            f"is redirected to {target.scheme or 'nowhere'}:, but only https: is followed", permanent=True
        )
    register_secrets(find_secrets([str(target)]))
    return target.with_user(None)


def _find_proxy(url: URL) -> str | None:
    """The proxy by HTTPS_PROXY and NO_PROXY; aiohttp's own look-up also sends passwords of ~/.netrc."""
    proxy = getproxies_environment().get(url.scheme)
    if not proxy or proxy_bypass(url.host or ""):
        return None
    register_secrets(find_secrets([proxy]))
    return proxy if urlsplit(proxy).scheme else f"http://{proxy}"


<<<<<<< 0909c1bf4357b1965c23ed910ce116e28db009ab
_CONNECTION_LOST = "the connection broke before the file was complete"
_NETWORK_ERRORS = (  # the first kind that fits an error describes it
    (
        aiohttp.ClientConnectorCertificateError,
        "its certificate is not trusted ({cause});"
        " for your own authority, set SSL_CERT_FILE to the file of its certificate",
    ),
    (aiohttp.ClientSSLError, "no TLS with the server: {cause}"),
    (aiohttp.ClientProxyConnectionError, "the proxy cannot be reached: {cause}"),
    (aiohttp.ClientConnectorDNSError, "its host cannot be found: {cause}"),
    (aiohttp.ClientConnectorError, "the server cannot be reached: {cause}"),
    (aiohttp.ClientHttpProxyError, "the proxy answers {error.status}"),
    (aiohttp.ConnectionTimeoutError, "no connection within {timeouts.sock_connect:g} s"),
    (aiohttp.ServerTimeoutError, "no data for {timeouts.sock_read:g} s"),
    (TimeoutError, "not complete within {timeouts.total:g} s"),
    (aiohttp.ClientPayloadError, _CONNECTION_LOST),
    (aiohttp.ClientConnectionError, _CONNECTION_LOST),
    (aiohttp.ClientError, "the server's answer cannot be read: {cause}"),
    (Exception, "{cause}"),
)


def _describe_network_error(error: Exception, timeouts: aiohttp.ClientTimeout) -> str:
    """One line for people who cannot see the network."""
    text = next(text for kind, text in _NETWORK_ERRORS if isinstance(error, kind))
    text = text.format(cause=_describe_cause(error), error=error, timeouts=timeouts)
    return " ".join(redact(text).split())


def _describe_cause(error: Exception) -> str:
    match getattr(error, "certificate_error", None) or getattr(error, "os_error", error):
        case ssl.SSLCertVerificationError() as cause:
            return cause.verify_message
        case ssl.SSLError(reason=str(reason)) if reason:
            return reason.replace("_", " ").lower()  # OpenSSL writes reasons like constants
        case OSError(errno=int(number), strerror=str(text)):
            return text if number < 0 else os.strerror(number)
        case cause:
            return redact(str(cause))[:200] or type(cause).__name__
=======
def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status in (
        HTTPStatus.OK,
        HTTPStatus.PARTIAL_CONTENT,
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ):
        return
    name = ""
    with contextlib.suppress(ValueError):
        name = f" {HTTPStatus(response.status).phrase}"
    raise DownloadError(
        f"the server answers {response.status}{name}", permanent=response.status not in _RETRYABLE_STATUSES
    )


def _is_resumed(response: aiohttp.ClientResponse, partial: "PartialModel") -> bool:
    """Whether the response continues the partial model. If it is the whole file, `partial` is emptied.

    Raises:
        DownloadError: neither; the next attempt starts from the beginning.
    """
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DownloadError("comes compressed, although the request excluded compression", permanent=True)
    if response.status == HTTPStatus.OK:
        partial.discard()
        return False
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status == HTTPStatus.PARTIAL_CONTENT and match and int(match[1]) == partial.size_bytes > 0:
        return True
    partial.discard()
    raise DownloadError("the server cannot resume the interrupted download; starting from the beginning")


def _check_size(
    order: DownloadRequest, partial: "PartialModel", progress: DownloadProgress, total_bytes: int
) -> None:
    if total_bytes > order.max_bytes:
        partial.discard()
        raise _make_too_large_error(order, f"{total_bytes / 1e6:,.1f} MB")
    partial.check_free_space(total_bytes - partial.size_bytes)
    progress.total_bytes = total_bytes


def _write_block(
    order: DownloadRequest, partial: "PartialModel", progress: DownloadProgress, block: bytes
) -> None:
    if partial.size_bytes + len(block) > order.max_bytes:
        partial.discard()
        raise _make_too_large_error(order, "more")
    if partial.size_bytes == 0:
        for beginning, message in _NOT_A_MODEL:
            if block.startswith(beginning):
                raise DownloadError(message, permanent=True)
    partial.write(block)
    progress.done_bytes = partial.size_bytes


def _make_too_large_error(order: DownloadRequest, size: str) -> DownloadError:
    return DownloadError(
        f"has {size}, but model.maxMegabytes is {order.max_bytes / 1e6:,.0f}", permanent=True
    )


# --- network errors in one line, for people who cannot see the network --------------------------------------


@contextlib.contextmanager
def _wrap_network_errors(timeouts: DownloadTimeouts) -> Iterator[None]:
    try:
        yield
    except DownloadError:
        raise
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise DownloadError(" ".join(redact(_describe_error(error, timeouts)).split())) from None


def _describe_error(error: Exception, timeouts: DownloadTimeouts) -> str:
    message = redact(str(error))[:200] or type(error).__name__
    match error:
        case aiohttp.ClientConnectorCertificateError():
            message = (
                f"its certificate is not trusted ({_describe_certificate_error(error)});"
                " for your own authority, set SSL_CERT_FILE to the file of its certificate"
            )
        case aiohttp.ClientConnectorError():
            message = f"{_describe_step(error)}: {_describe_system_error(error.os_error)}"
        case aiohttp.ClientHttpProxyError():
            message = f"the proxy answers {error.status}"
        case aiohttp.ConnectionTimeoutError():
            message = f"no connection within {timeouts.connect_s:g} s"
        case aiohttp.ServerTimeoutError():
            message = f"no data for {timeouts.read_s:g} s"
        case TimeoutError():
            message = f"not complete within {timeouts.total_s:g} s"
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            message = "the connection broke before the file was complete"
        case aiohttp.ClientError():
            message = f"the server's answer cannot be read: {message}"
    return message


def _describe_step(error: aiohttp.ClientConnectorError) -> str:
    match error:
        case aiohttp.ClientSSLError():
            return "no TLS with the server"
        case aiohttp.ClientProxyConnectionError():
            return "the proxy cannot be reached"
        case aiohttp.ClientConnectorDNSError():
            return "its host cannot be found"
        case _:
            return "the server cannot be reached"


def _describe_certificate_error(error: aiohttp.ClientConnectorCertificateError) -> str:
    cause = error.certificate_error
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause)


def _describe_system_error(error: OSError) -> str:
    """The system's text for an error; OpenSSL's reasons are written like constants."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.errno < 0 else os.strerror(error.errno)


# --- the store on disk --------------------------------------------------------------------------------------


def make_model_path(data: Path, sha256: str) -> Path:
    """The path of a downloaded model in the data folder."""
    return data / MODELS_FOLDER / f"{sha256.lower()}.onnx"


class ModelStore:
    """The folder of downloaded models. Its methods block on the disk: do not call them in the event loop."""

    def __init__(self, data: Path, *, max_models: int = MAX_MODELS, max_bytes: int = MAX_BYTES) -> None:
        self._data = data
        self._max_models = max_models
        self._max_bytes = max_bytes

    def find(self, sha256: str) -> Path | None:
        """The model with this sum, after reading all its bytes; None if it is missing.

        A damaged one is deleted.
        """
        path = make_model_path(self._data, sha256)
        _set_aside_irregular(path)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == sha256.lower():
                os.utime(path)  # the modification time is the time of last use, see `evict`
                return path
            log.warning("%s: is damaged; it is downloaded again", path)
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: cannot be used: %s; it is downloaded again", path, error.strerror)
        return None

    def open_partial(self, sha256: str) -> "PartialModel":
        """The part of a model that has arrived so far.

        Raises:
            DownloadError: it cannot be written.
        """
        path = make_model_path(self._data, sha256).with_suffix(".part")
        _set_aside_irregular(path)
        return PartialModel(path)

    def commit(self, partial: "PartialModel", sha256: str) -> Path:
        """Rename a complete partial model.

        Raises:
            DownloadError: it cannot be written.
        """
        path = make_model_path(self._data, sha256)
        partial.finish(path)
        return path

    def evict(self, in_use: Collection[str]) -> None:
        """Delete the least recently used models until the limits are met, but none of `in_use` (by sha256).

        Partial models count too, because they may never be completed.
        """
        kept = {sha256.lower() for sha256 in in_use}
        deleted = evict_least_recently_used(
            self._data / MODELS_FOLDER,
            _FILE_NAME,
            max_files=self._max_models,
            max_bytes=self._max_bytes,
            keep=lambda path: path.stem in kept,
        )
        for path in deleted:
            log.info("%s: deleted, as the store is full", path)


class PartialModel:
    """A model that is arriving: a file on disk, and the hash of its content. For one thread, in a ``with``.

    Raises:
        DownloadError: from any method, if the disk is full or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._bytes = 0
        with _wrap_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(handle, "r+b", buffering=0)  # unbuffered: `write` notices a full disk
            while block := self._file.read(_BLOCK_BYTES):
                self._count(block)

    def __enter__(self) -> "PartialModel":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the next attempt reads what was really written
            self._file.close()

    @property
    def size_bytes(self) -> int:
        """The bytes that have arrived."""
        return self._bytes

    @property
    def sha256(self) -> str:
        """The sum of the bytes that have arrived."""
        return self._hash.hexdigest()

    def write(self, block: bytes) -> None:
        """Append a block. If the disk is full, the file is emptied, because others need the space."""
        left = memoryview(block)
        try:
            with _wrap_disk_errors(self.path.parent):
                while left:
                    left = left[self._file.write(left) :]
        except DownloadError:
            with contextlib.suppress(DownloadError):
                self.discard()
            raise
        self._count(block)

    def discard(self) -> None:
        """Empty the file."""
        with _wrap_disk_errors(self.path.parent):
            self._file.seek(0)
            self._file.truncate()
        self._hash, self._bytes = hashlib.sha256(), 0

    def check_free_space(self, more_bytes: int) -> None:
        """Check before the first byte that so many more fit, and 64 MB for other files."""
        with _wrap_disk_errors(self.path.parent):
            free_bytes = shutil.disk_usage(self.path.parent).free
        if free_bytes < more_bytes + _SPARE_BYTES:
            raise DownloadError(
                f"{self.path.parent}: too little space: {_megabytes(more_bytes)} MB are needed, with"
                f" {_megabytes(_SPARE_BYTES)} MB to spare, but only {_megabytes(free_bytes)} MB are free",
                permanent=True,
            )

    def finish(self, path: Path) -> None:
        """Write the content to the disk for certain, then rename the file."""
        with _wrap_disk_errors(path.parent):
            os.fsync(self._file.fileno())
            self.path.replace(path)

    def _count(self, block: bytes) -> None:
        self._hash.update(block)
        self._bytes += len(block)


def _set_aside_irregular(path: Path) -> None:
    """Rename what is no regular file: opening a pipe would block, and a folder could not be replaced."""
    if is_special_file(path):
        log.warning("%s: is no regular file; renamed", path)
        set_aside_damaged(path)


@contextlib.contextmanager
def _wrap_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if is_full else f"cannot be written: {error.strerror or error}"
        raise DownloadError(f"{folder}: {reason}", permanent=True) from None


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"
>>>>>>> 286db107d34f6d3d3b708d2e7725082826d44c06
