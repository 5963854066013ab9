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
from visionedge.errors import DownloadError
from visionedge.model.model_store import ModelStore, PartialModel
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
class DownloadRetryPolicy:
    """Limits of an attempt, and the waits after a failed one. Their jitter spreads many devices in time."""

    timeouts: aiohttp.ClientTimeout = TIMEOUTS
    wait: RetryPolicy = WAIT
    lasting_wait: RetryPolicy = LASTING_WAIT
    progress_interval_s: float = 5.0


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
            retry=tenacity.retry_if_exception(self._is_retryable),
            stop=tenacity.stop_never if self._tries is None else tenacity.stop_after_attempt(self._tries),
            wait=self._compute_wait_s,
            before_sleep=self._report_failure,
            reraise=True,
        )
        try:
            return await attempts(self._attempt)
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
        except DownloadError as error:
            message = f"{format_url(self._request.url)}: {error}"
            raise DownloadError(message, permanent=error.permanent) from None
        took_s = time.monotonic() - began_s
        log.info("downloaded the model: %.1f MB in %.1f s", partial.size_bytes / 1e6, took_s)
        return path

    def _is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, DownloadError) and (self._tries is None or not error.permanent)

    def _compute_wait_s(self, state: tenacity.RetryCallState) -> float:
        policy = self._retry_policy
        wait = policy.lasting_wait if _read_failure(state).permanent else policy.wait
        return wait.wait_s(state.attempt_number)

    def _report_failure(self, state: tenacity.RetryCallState) -> None:
        failure = str(_read_failure(state))
        self.message = f"cannot download the model, retrying: {failure}"
        if failure != self._failure:
            self._failure = failure
            log.warning("cannot download the model, retrying in %.0f s: %s", state.upcoming_sleep, failure)
            self._on_failure(failure)

    def _report_progress(self, done_bytes: int, total_bytes: int | None) -> None:
        self.message = f"downloading the model: {format_progress(done_bytes, total_bytes)}"
        now_s = time.monotonic()
        if now_s - self._logged_s >= self._retry_policy.progress_interval_s:
            self._logged_s = now_s
            log.info("%s", self.message)


def format_progress(done_bytes: int, total_bytes: int | None) -> str:
    """``42 %``, or the megabytes so far if the size of the file is not known."""
    return f"{100 * done_bytes // total_bytes} %" if total_bytes else f"{done_bytes / 1e6:.1f} MB"


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

    `report` is called after each block, with the size of the partial model and the total size in bytes.
    """

    request: DownloadRequest
    partial: PartialModel
    timeouts: aiohttp.ClientTimeout
    report: Callable[[int, int | None], None]
    total_bytes: int | None = None

    async def run(self) -> None:
        """Raises DownloadError: one line without the address."""
        wanted, partial = self.request.sha256.lower(), self.partial
        if partial.sha256 == wanted:
            return  # an earlier process ended between the last byte and the renaming
        is_file = self.request.url.startswith("file:")
        resumed = await self._copy_file() if is_file else await self._download()
        if (found := partial.sha256) != wanted:
            partial.discard()
            # A resumed download can consist of two versions of the file; a new one cannot.
            raise DownloadError(f"has the sha256 {found[:12]}…, not {wanted[:12]}…", permanent=not resumed)

    async def _copy_file(self) -> bool:
        self.partial.discard()
        try:
            # Non-blocking: opening a pipe would wait for a writer.
            handle = os.open(file_url_to_path(self.request.url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise DownloadError("is not a regular file", permanent=True)
                self._set_total(status.st_size)
                while block := file.read(_BLOCK_BYTES):
                    self._write(block)
                    await asyncio.sleep(0)  # lets `stop` cancel it
        except OSError as error:
            raise DownloadError(f"cannot be read: {error.strerror or error}", permanent=True) from None
        return False

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
            raise DownloadError(_describe_network_error(error, self.timeouts)) from None
        return resumed

    async def _request_file(self, session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        """The response behind all redirects."""
        url = URL(self.request.url, encoded=self.request.url.isascii())  # encoding again breaks a signature
        offset = self.partial.size_bytes
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        for _ in range(_MAX_REDIRECTS + 1):
            response = await session.get(url, headers=headers, allow_redirects=False, proxy=_find_proxy(url))
            if response.status not in _REDIRECT_STATUSES:
                return response
            response.close()
            url = _follow_redirect(url, response.headers.get("Location", ""))
        raise DownloadError(f"is redirected more than {_MAX_REDIRECTS} times", permanent=True)

    def _is_resumed(self, response: aiohttp.ClientResponse) -> bool:
        """Whether the response continues the partial model, which is emptied if it does not.

        Raises:
            DownloadError: it is not a file; after another part of a file, the next attempt begins anew.
        """
        if response.status not in _FILE_STATUSES:
            phrase = http.client.responses.get(response.status, "")
            raise DownloadError(
                f"the server answers {response.status} {phrase}".rstrip(),
                permanent=response.status not in _RETRYABLE_STATUSES,
            )
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise DownloadError("comes compressed, although the request excluded compression", permanent=True)
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        is_part = response.status == 206
        if is_part and match and int(match[1]) == self.partial.size_bytes > 0:
            return True
        self.partial.discard()
        if response.status != 200:
            raise DownloadError(
                "the server cannot resume the interrupted download; starting from the beginning"
            )
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
                    raise DownloadError(message, permanent=True)
        self.partial.write(block)
        self.report(self.partial.size_bytes, self.total_bytes)

    def _refuse_size(self, size: str) -> None:
        self.partial.discard()
        limit = f"model.maxMegabytes is {self.request.max_bytes / 1e6:,.0f}"
        raise DownloadError(f"has {size}, but {limit}", permanent=True)


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
