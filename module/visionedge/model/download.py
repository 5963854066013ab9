"""A model on its way: try after try, on a thread of its own, stopped at any moment from another."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import random
import re
import shutil
import ssl
import stat
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
from yarl import URL

from visionedge import __version__
from visionedge.config.addresses import file_url_to_path, format_url
from visionedge.errors import FetchError
from visionedge.runtime.files import is_special_file, set_aside_damaged
from visionedge.runtime.redaction import find_secrets, redact, register_secrets

# The models that were fetched, on disk: each under its sha256, whole or not at all.
#
# models/SHA256.onnx      checked, ready to be used
# models/SHA256.part      what has arrived so far; a later try goes on from there


log = logging.getLogger(__name__)

MODELS_FOLDER = "models"

MAX_MODELS = 4
MAX_BYTES = 4 << 30
_SPARE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[0-9a-f]{64}\.(onnx|part)")


def make_model_path(data: Path, sha256: str) -> Path:
    """Where a model lies in the data folder, if it was fetched."""
    return data / MODELS_FOLDER / f"{sha256.lower()}.onnx"


class PartialModel:
    """A model that arrives: what is there is on disk, and hashed. Used by one thread, in a ``with``.

    Raises:
        FetchError: from any method, when the disk does not take it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._bytes = 0
        with _wrap_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(handle, "r+b", buffering=0)  # so that a full disk is told at once
            while block := self._file.read(_BLOCK_BYTES):
                self._count(block)

    def __enter__(self) -> "PartialModel":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        # What cannot be written any more is fetched again.
        with contextlib.suppress(OSError):
            self._file.close()

    def __repr__(self) -> str:
        return f"<Part {self.path.name} {self._bytes}>"

    @property
    def size_bytes(self) -> int:
        """What has arrived."""
        return self._bytes

    @property
    def sha256(self) -> str:
        """Of what has arrived."""
        return self._hash.hexdigest()

    def write(self, block: bytes) -> None:
        """Take what comes next. When the disk is full, all of it is given back: others need it more."""
        left = memoryview(block)
        try:
            with _wrap_disk_errors(self.path.parent):
                while left:
                    left = left[self._file.write(left) :]
        except FetchError:
            with contextlib.suppress(FetchError):
                self.discard()
            raise
        self._count(block)

    def discard(self) -> None:
        """Forget what has arrived, and give its room back."""
        with _wrap_disk_errors(self.path.parent):
            self._file.seek(0)
            self._file.truncate()
        self._hash, self._bytes = hashlib.sha256(), 0

    def check_free_space(self, more_bytes: int) -> None:
        """See that so much more fits beside what else needs the disk, before the first byte of it comes."""
        with _wrap_disk_errors(self.path.parent):
            free = shutil.disk_usage(self.path.parent).free
        if free < more_bytes + _SPARE_BYTES:
            raise FetchError(
                f"{self.path.parent}: has no room for it: {_megabytes(more_bytes)} MB are needed, "
                f"and 64 MB to spare, but {_megabytes(free)} MB are free",
                permanent=True,
            )

    def finish(self, path: Path) -> None:
        """All is there: have it safe on disk under its own name."""
        with _wrap_disk_errors(path.parent):
            os.fsync(self._file.fileno())
            self.path.replace(path)

    def _count(self, block: bytes) -> None:
        self._hash.update(block)
        self._bytes += len(block)


class ModelStore:
    """The folder of fetched models. Its methods block on the disk: not for the loop."""

    def __init__(self, data: Path, *, max_models: int = MAX_MODELS, max_bytes: int = MAX_BYTES) -> None:
        self._data = data
        self._folder = data / MODELS_FOLDER
        self._most_models = max_models
        self._max_bytes = max_bytes

    def __repr__(self) -> str:
        return f"<Kept {self._folder}>"

    def find(self, sha256: str) -> Path | None:
        """The model with this sum, its bytes checked, or None; a damaged one is thrown away."""
        path = self._path(sha256)
        _set_aside_irregular(path)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == sha256.lower():
                os.utime(path)  # used just now: it goes last
                return path
            log.warning("%s: is damaged and fetched again", path)
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: cannot be used: %s", path, error.strerror)
        return None

    def open_partial(self, sha256: str) -> PartialModel:
        """The part of a model that has arrived so far.

        Raises:
            FetchError: the disk does not take it.
        """
        path = self._path(sha256).with_suffix(".part")
        _set_aside_irregular(path)
        return PartialModel(path)

    def commit(self, part: PartialModel, sha256: str) -> Path:
        """A part that is whole becomes a model.

        Raises:
            FetchError: the disk does not take it.
        """
        path = self._path(sha256)
        part.finish(path)
        return path

    def evict(self, in_use: Collection[str]) -> None:
        """Let go of the longest unused, until the rest is within the bounds; never of those `in_use`.

        Parts count as well, for their models may never come.
        """
        count = total = 0
        wanted = {sha256.lower() for sha256 in in_use}
        with contextlib.suppress(OSError):
            files = sorted(self._files(), key=lambda file: (file[0].stem in wanted, file[1]), reverse=True)
            for path, _, size_bytes in files:
                count, total = count + 1, total + size_bytes
                if path.stem not in wanted and (count > self._most_models or total > self._max_bytes):
                    path.unlink(missing_ok=True)
                    log.info("%s: let go, newer ones take its place", path)

    def _path(self, sha256: str) -> Path:
        return make_model_path(self._data, sha256)

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """(path, last used, bytes) of what is ours in the folder."""
        for path in self._folder.iterdir():
            if _FILE_NAME.fullmatch(path.name):
                status = path.lstat()
                yield path, status.st_mtime, status.st_size


def _set_aside_irregular(path: Path) -> None:
    """Set aside what is no regular file: a pipe would be waited for, and a folder could not be replaced."""
    if is_special_file(path):
        log.warning("%s: is no regular file and set aside", path)
        set_aside_damaged(path)


@contextlib.contextmanager
def _wrap_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        words = "is full" if full else f"cannot be written: {error.strerror or error}"
        raise FetchError(f"{folder}: {words}", permanent=True) from None


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"


# What goes wrong on the way to a server, in one line each, for people who cannot see its wire.


_CERTIFICATE_HINT = "for an authority of your own let SSL_CERT_FILE name its certificate"


@dataclass(frozen=True, slots=True)
class DownloadTimeouts:
    """How long one try may wait: for a connection with its TLS, for the next bytes, for everything."""

    connect_s: float = 15.0
    read_s: float = 30.0
    total_s: float = 1800.0


@contextlib.contextmanager
def wrap_network_errors(timeouts: DownloadTimeouts) -> Iterator[None]:
    """Errors of the network become one line.

    Raises:
        FetchError: in place of whatever the client raises.
    """
    try:
        yield
    except FetchError:
        raise
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchError(" ".join(redact(_describe_error(error, timeouts)).split())) from None


def _describe_error(error: Exception, timeouts: DownloadTimeouts) -> str:
    message = ""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            message = (
                f"its certificate is not trusted ({_describe_certificate_error(error)}); {_CERTIFICATE_HINT}"
            )
        case aiohttp.ClientConnectorError():
            message = f"{_describe_place(error)}: {_describe_system_error(error.os_error)}"
        case aiohttp.ClientHttpProxyError():
            message = f"the proxy answers {error.status}"
        case TimeoutError():
            message = _describe_timeout(error, timeouts)
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            message = "the connection broke before all had arrived"
        case aiohttp.ClientError():
            message = (
                f"the server's answer cannot be read: {redact(str(error))[:200] or type(error).__name__}"
            )
        case _:
            message = redact(str(error))[:200] or type(error).__name__
    return message


def _describe_place(error: aiohttp.ClientConnectorError) -> str:
    match error:
        case aiohttp.ClientSSLError():
            return "no TLS with the server"
        case aiohttp.ClientProxyConnectionError():
            return "the proxy cannot be reached"
        case aiohttp.ClientConnectorDNSError():
            return "its host cannot be found"
        case _:
            return "the server cannot be reached"


def _describe_timeout(error: TimeoutError, timeouts: DownloadTimeouts) -> str:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {timeouts.connect_s:g} s"
        case aiohttp.ServerTimeoutError():
            return f"nothing came for {timeouts.read_s:g} s"
        case _:
            return f"not all had arrived within {timeouts.total_s:g} s"


def _describe_certificate_error(error: aiohttp.ClientConnectorCertificateError) -> str:
    cause = error.certificate_error
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause)


def _describe_system_error(error: OSError) -> str:
    """The system's word for it; OpenSSL's are written like constants."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.errno < 0 else os.strerror(error.errno)


# An event loop whose connections end with it.


class AbortableEventLoop(asyncio.SelectorEventLoop):
    """A loop that can hang up: TLS would wait for the other side's farewell, which may never come."""

    def __init__(self) -> None:
        super().__init__()
        self._open_transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, and remembered."""
        transport, protocol = await super().create_connection(*args, **kwargs)
        self._open_transports.add(transport)
        return transport, protocol

    async def abort_connections(self) -> None:
        """End all connections at once."""
        for transport in tuple(self._open_transports):
            transport.abort()
        for _ in range(3):  # each layer tells the next one in the next round
            await asyncio.sleep(0)


# One try to fetch a model: https with every limit, or a file where that is allowed.


_MAX_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_RETRYABLE_STATUSES = (408, 425, 429, 500, 502, 503, 504)

_NOT_A_MODEL = (
    (b"PK\x03\x04", "is a ZIP archive; give the address of the .onnx file itself"),
    (b"\x1f\x8b", "is compressed (gzip); give the address of the .onnx file itself"),
    (b"version https://git-lf", "is a pointer of Git LFS, not the file that it stands for"),
    (b"<", "is a web page, not a file; give the address that a download has"),
)


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """Which model, from where; more than `max_bytes` is no model that is wanted."""

    url: str
    sha256: str
    max_bytes: int = 1_000_000_000


@dataclass(slots=True)
class DownloadProgress:
    """How far a fetch has come; `total_bytes` None where the server does not say. Read by any thread."""

    done_bytes: int = 0
    total_bytes: int | None = None

    @property
    def message(self) -> str:
        """``42 %``, or the megabytes where the whole is not known."""
        if self.total_bytes:
            return f"{100 * self.done_bytes // self.total_bytes} %"
        return f"{self.done_bytes / 1e6:.1f} MB"


async def download_once(
    order: DownloadRequest, part: PartialModel, timeouts: DownloadTimeouts, progress: DownloadProgress
) -> None:
    """Fetch what is missing of a part, until it is whole and has the right sum.

    Raises:
        FetchError: in one line, without the address.
    """
    progress.done_bytes, progress.total_bytes = part.size_bytes, None
    if part.sha256 == order.sha256.lower():
        return  # all had arrived when the module ended
    resumed = False
    if order.url.startswith("file:"):
        part.discard()
        await _copy_file(order, part, progress)
    else:
        resumed = await _download(order, part, timeouts, progress)
    if part.sha256 != order.sha256.lower():
        found = part.sha256
        part.discard()
        raise FetchError(
            f"has the sha256 {found[:12]}…, not {order.sha256.lower()[:12]}…",
            # Two halves may be of two different files.
            permanent=not resumed,
        )


async def _copy_file(order: DownloadRequest, part: PartialModel, progress: DownloadProgress) -> None:
    try:
        # Opened without waiting: a pipe would never end, and a device neither.
        handle = os.open(file_url_to_path(order.url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FetchError("is no file", permanent=True)
            _check_size(order, part, progress, status.st_size)
            while block := file.read(_BLOCK_BYTES):
                _write_block(order, part, progress, block)
                await asyncio.sleep(0)  # so that it can be stopped
    except OSError as error:
        raise FetchError(f"cannot be read: {error.strerror or error}", permanent=True) from None


async def _download(
    order: DownloadRequest, part: PartialModel, timeouts: DownloadTimeouts, progress: DownloadProgress
) -> bool:
    """Whether it went on from where the part ended."""
    limits = aiohttp.ClientTimeout(
        total=timeouts.total_s, sock_connect=timeouts.connect_s, sock_read=timeouts.read_s
    )
    with wrap_network_errors(timeouts):
        # Made anew for each try: SSL_CERT_FILE may have got the missing authority meanwhile.
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(), force_close=True)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                timeout=limits,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"User-Agent": f"visionedge/{__version__}", "Accept-Encoding": "identity"},
            ) as session,
            _open_response(session, order, part.size_bytes) as answer,
        ):
            resumed = _is_resumed(answer, part)
            if answer.content_length is not None:
                _check_size(order, part, progress, part.size_bytes + answer.content_length)
            async for block in answer.content.iter_any():
                _write_block(order, part, progress, block)
    return resumed


@contextlib.asynccontextmanager
async def _open_response(
    session: aiohttp.ClientSession, order: DownloadRequest, offset: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer behind all redirects, its status a good one."""
    url = URL(order.url, encoded=order.url.isascii())  # a signature must arrive as it was written
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    for _ in range(_MAX_REDIRECTS + 1):
        async with session.get(url, headers=headers, allow_redirects=False, proxy=_find_proxy(url)) as answer:
            if answer.status not in _REDIRECT_STATUSES:
                _check_status(answer)
                yield answer
                return
            url = _follow_redirect(url, answer)
    raise FetchError(f"is redirected more than {_MAX_REDIRECTS} times", permanent=True)


def _follow_redirect(url: URL, answer: aiohttp.ClientResponse) -> URL:
    """Where a redirect leads; user and password of an address are for its own host only."""
    target = answer.headers.get("Location", "")
    try:
        there = url.with_user(None).join(URL(target, encoded=target.isascii()))
    except ValueError:
        raise FetchError("is redirected to what is no address", permanent=True) from None
    if there.scheme != "https" or not there.host:
        raise FetchError(
            f"is redirected to {there.scheme or 'nowhere'}:, but only https: is followed", permanent=True
        )
    register_secrets(find_secrets([str(there)]))
    return there.with_user(None)


def _check_status(answer: aiohttp.ClientResponse) -> None:
    if answer.status in (
        HTTPStatus.OK,
        HTTPStatus.PARTIAL_CONTENT,
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ):
        return
    with contextlib.suppress(ValueError):
        message = f"{answer.status} {HTTPStatus(answer.status).phrase}"
        raise FetchError(f"the server answers {message}", permanent=answer.status not in _RETRYABLE_STATUSES)
    raise FetchError(f"the server answers {answer.status}", permanent=True)


def _is_resumed(answer: aiohttp.ClientResponse, part: PartialModel) -> bool:
    """Whether the answer continues the part; else the part begins anew.

    Raises:
        FetchError: it is of no use, another try without a part may be.
    """
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError("comes compressed, although that was not asked for", permanent=True)
    if answer.status == HTTPStatus.OK:
        part.discard()
        return False
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status == HTTPStatus.PARTIAL_CONTENT and match and int(match[1]) == part.size_bytes > 0:
        return True
    part.discard()
    raise FetchError("the server cannot go on where it was interrupted; begun anew")


def _check_size(
    order: DownloadRequest, part: PartialModel, progress: DownloadProgress, total_bytes: int
) -> None:
    if total_bytes > order.max_bytes:
        part.discard()
        raise FetchError(_too_large(order, f"{total_bytes / 1e6:,.1f} MB"), permanent=True)
    part.check_free_space(total_bytes - part.size_bytes)
    progress.total_bytes = total_bytes


def _write_block(
    order: DownloadRequest, part: PartialModel, progress: DownloadProgress, block: bytes
) -> None:
    if part.size_bytes + len(block) > order.max_bytes:
        part.discard()
        raise FetchError(_too_large(order, "more"), permanent=True)
    if part.size_bytes == 0:
        for beginning, message in _NOT_A_MODEL:
            if block.startswith(beginning):
                raise FetchError(message, permanent=True)
    part.write(block)
    progress.done_bytes = part.size_bytes


def _too_large(order: DownloadRequest, size: str) -> str:
    return f"has {size}, but model.maxMegabytes is {order.max_bytes / 1e6:,.0f}"


def _find_proxy(url: URL) -> str | None:
    """What HTTPS_PROXY and NO_PROXY say for this address."""
    proxies = getproxies_environment()
    proxy = proxies.get(url.scheme)
    if not proxy or proxy_bypass(url.host or ""):
        return None
    register_secrets(find_secrets([proxy]))
    return proxy if urlsplit(proxy).scheme else f"http://{proxy}"


@dataclass(frozen=True, slots=True)
class DownloadRetryPolicy:
    """How long one try may take, and the pauses between them: for what may pass, and for what seldom does."""

    timeouts: DownloadTimeouts = field(default_factory=DownloadTimeouts)
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0
    first_lasting_wait_s: float = 60.0
    max_lasting_wait_s: float = 3600.0
    progress_interval_s: float = 5.0


def compute_wait_s(retry_policy: DownloadRetryPolicy, failures: int, *, permanent: bool) -> float:
    """How long to wait after so many failures (1 and more): each time twice as long, up to a limit."""
    first = retry_policy.first_lasting_wait_s if permanent else retry_policy.first_wait_s
    longest = retry_policy.max_lasting_wait_s if permanent else retry_policy.max_wait_s
    return min(longest, first * 2.0 ** min(failures - 1, 30))


class ModelDownload:
    """One model's way to the disk. `run` belongs to one thread, all else to any.

    `on_failure` is told, on that thread, why it is tried again, once as long as the reason stays the same.
    With `tries` it gives up after so many, and at once when another would not help; without, it goes on for
    ever: links come back, and files are put where they were missing.
    """

    def __init__(
        self,
        order: DownloadRequest,
        store: ModelStore,
        *,
        tries: int | None = None,
        retry_policy: DownloadRetryPolicy | None = None,
        jitter: Callable[[], float] = random.random,
        on_failure: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self.order = order
        self._store = store
        self._tries = tries
        self._tempo = retry_policy or DownloadRetryPolicy()
        self._jitter = jitter
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._progress = DownloadProgress()
        self._error: str | None = None
        self._failed_at_bytes = 0
        self._stopping = False
        self._cancel: Callable[[], None] = lambda: None
        register_secrets(find_secrets([order.url]))

    def __repr__(self) -> str:
        return f"<Fetch {format_url(self.order.url)} {self.message}>"

    @property
    def message(self) -> str:
        """How it stands, for people."""
        if self._error is not None and self._progress.done_bytes <= self._failed_at_bytes:
            return f"the model cannot be fetched, and is tried again: {self._error}"
        return f"the model is being fetched: {self._progress.message}"

    def run(self) -> Path | None:
        """Fetch the model, or find it kept from before; None if it was stopped. Blocks, for hours maybe.

        Raises:
            FetchError: it is given up; one line that begins with the address.
        """
        store = self._store.find(self.order.sha256)
        if store is not None:
            return store
        loop = AbortableEventLoop()
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(self._run_cancellable(loop))
        return None

    def stop(self) -> None:
        """Let `run` return soon."""
        with self._lock:
            self._stopping = True
            cancel = self._cancel
        cancel()

    async def _run_cancellable(self, loop: AbortableEventLoop) -> Path:
        """Until it is there or given up; whoever stops it cancels the task."""
        task = asyncio.ensure_future(self._run_with_retries())

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)

        with self._lock:
            self._cancel = cancel
            stopping = self._stopping
        if stopping:
            task.cancel()
        try:
            return await task
        finally:
            await loop.abort_connections()

    async def _run_with_retries(self) -> Path:
        log.info("fetching the model %s", format_url(self.order.url))
        failures = 0
        while True:
            try:
                return await self._run_once()
            except FetchError as error:
                failures += 1
                message = f"{format_url(self.order.url)}: {error}"
                if self._tries is not None and (error.permanent or failures >= self._tries):
                    raise FetchError(message, permanent=error.permanent) from None
                news = message != self._error
                self._error, self._failed_at_bytes = message, self._progress.done_bytes
                if news:
                    log.warning("the model cannot be fetched, and is tried again: %s", message)
                    self._on_failure(message)
                pause = compute_wait_s(self._tempo, failures, permanent=error.permanent)
            await asyncio.sleep(pause * (0.5 + 0.5 * self._jitter()))

    async def _run_once(self) -> Path:
        began_s = time.monotonic()
        teller = asyncio.create_task(self._log_progress())
        try:
            with self._store.open_partial(self.order.sha256) as part:
                await download_once(self.order, part, self._tempo.timeouts, self._progress)
                path = self._store.commit(part, self.order.sha256)
        finally:
            teller.cancel()
        log.info("the model is fetched: %.1f MB in %.1f s", part.size_bytes / 1e6, time.monotonic() - began_s)
        return path

    async def _log_progress(self) -> None:
        while True:
            await asyncio.sleep(self._tempo.progress_interval_s)
            log.info("the model is being fetched: %s", self._progress.message)
