"""A model on its way: try after try, on a thread of its own, stopped at any moment from another."""

import asyncio
import contextlib
import logging
import os
import random
import re
import ssl
import stat
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
from yarl import URL

from visionedge import __version__
from visionedge.config.addresses import local_path, shown
from visionedge.errors import FetchError
from visionedge.model.model_store import Kept, Part
from visionedge.runtime.redaction import keep_secret, redact, secrets_in

# What goes wrong on the way to a server, in one line each, for people who cannot see its wire.


_OWN_AUTHORITY = "for an authority of your own let SSL_CERT_FILE name its certificate"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one try may wait: for a connection with its TLS, for the next bytes, for everything."""

    connect_s: float = 15.0
    silence_s: float = 30.0
    all_s: float = 1800.0


@contextlib.contextmanager
def told(patience: Patience) -> Iterator[None]:
    """Errors of the network become one line.

    Raises:
        FetchError: in place of whatever the client raises.
    """
    try:
        yield
    except FetchError:
        raise
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchError(" ".join(redact(_words(error, patience)).split())) from None


def _words(error: Exception, patience: Patience) -> str:
    words = ""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            words = f"its certificate is not trusted ({_certificate(error)}); {_OWN_AUTHORITY}"
        case aiohttp.ClientConnectorError():
            words = f"{_where(error)}: {_system(error.os_error)}"
        case aiohttp.ClientHttpProxyError():
            words = f"the proxy answers {error.status}"
        case TimeoutError():
            words = _late(error, patience)
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            words = "the connection broke before all had arrived"
        case aiohttp.ClientError():
            words = f"the server's answer cannot be read: {redact(str(error))[:200] or type(error).__name__}"
        case _:
            words = redact(str(error))[:200] or type(error).__name__
    return words


def _where(error: aiohttp.ClientConnectorError) -> str:
    match error:
        case aiohttp.ClientSSLError():
            return "no TLS with the server"
        case aiohttp.ClientProxyConnectionError():
            return "the proxy cannot be reached"
        case aiohttp.ClientConnectorDNSError():
            return "its host cannot be found"
        case _:
            return "the server cannot be reached"


def _late(error: TimeoutError, patience: Patience) -> str:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {patience.connect_s:g} s"
        case aiohttp.ServerTimeoutError():
            return f"nothing came for {patience.silence_s:g} s"
        case _:
            return f"not all had arrived within {patience.all_s:g} s"


def _certificate(error: aiohttp.ClientConnectorCertificateError) -> str:
    cause = error.certificate_error
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause)


def _system(error: OSError) -> str:
    """The system's word for it; OpenSSL's are written like constants."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.errno < 0 else os.strerror(error.errno)


# An event loop whose connections end with it.


class ConnectionLoop(asyncio.SelectorEventLoop):
    """A loop that can hang up: TLS would wait for the other side's farewell, which may never come."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, and remembered."""
        transport, protocol = await super().create_connection(*args, **kwargs)
        self._lines.add(transport)
        return transport, protocol

    async def hang_up(self) -> None:
        """End all connections at once."""
        for transport in tuple(self._lines):
            transport.abort()
        for _ in range(3):  # each layer tells the next one in the next round
            await asyncio.sleep(0)


# One try to fetch a model: https with every limit, or a file where that is allowed.


_MOST_REDIRECTS = 5
_BLOCK_BYTES = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)

_NO_MODELS = (
    (b"PK\x03\x04", "is a ZIP archive; give the address of the .onnx file itself"),
    (b"\x1f\x8b", "is compressed (gzip); give the address of the .onnx file itself"),
    (b"version https://git-lf", "is a pointer of Git LFS, not the file that it stands for"),
    (b"<", "is a web page, not a file; give the address that a download has"),
)


@dataclass(frozen=True, slots=True)
class Order:
    """Which model, from where; more than `most_bytes` is no model that is wanted."""

    url: str
    sha256: str
    most_bytes: int = 1_000_000_000


@dataclass(slots=True)
class Progress:
    """How far a fetch has come; `total_bytes` None where the server does not say. Read by any thread."""

    done_bytes: int = 0
    total_bytes: int | None = None

    @property
    def words(self) -> str:
        """``42 %``, or the megabytes where the whole is not known."""
        if self.total_bytes:
            return f"{100 * self.done_bytes // self.total_bytes} %"
        return f"{self.done_bytes / 1e6:.1f} MB"


async def attempt(order: Order, part: Part, patience: Patience, progress: Progress) -> None:
    """Fetch what is missing of a part, until it is whole and has the right sum.

    Raises:
        FetchError: in one line, without the address.
    """
    progress.done_bytes, progress.total_bytes = part.size_bytes, None
    if part.sha256 == order.sha256.lower():
        return  # all had arrived when the module ended
    goes_on = False
    if order.url.startswith("file:"):
        part.begin_anew()
        await _copy(order, part, progress)
    else:
        goes_on = await _download(order, part, patience, progress)
    if part.sha256 != order.sha256.lower():
        found = part.sha256
        part.begin_anew()
        raise FetchError(
            f"has the sha256 {found[:12]}…, not {order.sha256.lower()[:12]}…",
            # Two halves may be of two different files.
            lasting=not goes_on,
        )


async def _copy(order: Order, part: Part, progress: Progress) -> None:
    try:
        # Opened without waiting: a pipe would never end, and a device neither.
        handle = os.open(local_path(order.url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FetchError("is no file", lasting=True)
            _check_size(order, part, progress, status.st_size)
            while block := file.read(_BLOCK_BYTES):
                _take(order, part, progress, block)
                await asyncio.sleep(0)  # so that it can be stopped
    except OSError as error:
        raise FetchError(f"cannot be read: {error.strerror or error}", lasting=True) from None


async def _download(order: Order, part: Part, patience: Patience, progress: Progress) -> bool:
    """Whether it went on from where the part ended."""
    limits = aiohttp.ClientTimeout(
        total=patience.all_s, sock_connect=patience.connect_s, sock_read=patience.silence_s
    )
    with told(patience):
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
            _answer(session, order, part.size_bytes) as answer,
        ):
            goes_on = _goes_on(answer, part)
            if answer.content_length is not None:
                _check_size(order, part, progress, part.size_bytes + answer.content_length)
            async for block in answer.content.iter_any():
                _take(order, part, progress, block)
    return goes_on


@contextlib.asynccontextmanager
async def _answer(
    session: aiohttp.ClientSession, order: Order, offset: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer behind all redirects, its status a good one."""
    url = URL(order.url, encoded=order.url.isascii())  # a signature must arrive as it was written
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    for _ in range(_MOST_REDIRECTS + 1):
        async with session.get(url, headers=headers, allow_redirects=False, proxy=_proxy(url)) as answer:
            if answer.status not in _REDIRECTS:
                _check_status(answer)
                yield answer
                return
            url = _next(url, answer)
    raise FetchError(f"is redirected more than {_MOST_REDIRECTS} times", lasting=True)


def _next(url: URL, answer: aiohttp.ClientResponse) -> URL:
    """Where a redirect leads; user and password of an address are for its own host only."""
    target = answer.headers.get("Location", "")
    try:
        there = url.with_user(None).join(URL(target, encoded=target.isascii()))
    except ValueError:
        raise FetchError("is redirected to what is no address", lasting=True) from None
    if there.scheme != "https" or not there.host:
        raise FetchError(
            f"is redirected to {there.scheme or 'nowhere'}:, but only https: is followed", lasting=True
        )
    keep_secret(secrets_in([str(there)]))
    return there.with_user(None)


def _check_status(answer: aiohttp.ClientResponse) -> None:
    if answer.status in (
        HTTPStatus.OK,
        HTTPStatus.PARTIAL_CONTENT,
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    ):
        return
    with contextlib.suppress(ValueError):
        words = f"{answer.status} {HTTPStatus(answer.status).phrase}"
        raise FetchError(f"the server answers {words}", lasting=answer.status not in _TRY_AGAIN)
    raise FetchError(f"the server answers {answer.status}", lasting=True)


def _goes_on(answer: aiohttp.ClientResponse, part: Part) -> bool:
    """Whether the answer continues the part; else the part begins anew.

    Raises:
        FetchError: it is of no use, another try without a part may be.
    """
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError("comes compressed, although that was not asked for", lasting=True)
    if answer.status == HTTPStatus.OK:
        part.begin_anew()
        return False
    match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status == HTTPStatus.PARTIAL_CONTENT and match and int(match[1]) == part.size_bytes > 0:
        return True
    part.begin_anew()
    raise FetchError("the server cannot go on where it was interrupted; begun anew")


def _check_size(order: Order, part: Part, progress: Progress, total_bytes: int) -> None:
    if total_bytes > order.most_bytes:
        part.begin_anew()
        raise FetchError(_too_large(order, f"{total_bytes / 1e6:,.1f} MB"), lasting=True)
    part.make_room(total_bytes - part.size_bytes)
    progress.total_bytes = total_bytes


def _take(order: Order, part: Part, progress: Progress, block: bytes) -> None:
    if part.size_bytes + len(block) > order.most_bytes:
        part.begin_anew()
        raise FetchError(_too_large(order, "more"), lasting=True)
    if part.size_bytes == 0:
        for beginning, words in _NO_MODELS:
            if block.startswith(beginning):
                raise FetchError(words, lasting=True)
    part.write(block)
    progress.done_bytes = part.size_bytes


def _too_large(order: Order, size: str) -> str:
    return f"has {size}, but model.maxMegabytes is {order.most_bytes / 1e6:,.0f}"


def _proxy(url: URL) -> str | None:
    """What HTTPS_PROXY and NO_PROXY say for this address."""
    proxies = getproxies_environment()
    proxy = proxies.get(url.scheme)
    if not proxy or proxy_bypass(url.host or ""):
        return None
    keep_secret(secrets_in([proxy]))
    return proxy if urlsplit(proxy).scheme else f"http://{proxy}"


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tempo:
    """How long one try may take, and the pauses between them: for what may pass, and for what seldom does."""

    patience: Patience = field(default_factory=Patience)
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    first_lasting_pause_s: float = 60.0
    longest_lasting_pause_s: float = 3600.0
    tell_every_s: float = 5.0


def pause_s(tempo: Tempo, failures: int, *, lasting: bool) -> float:
    """How long to wait after so many failures (1 and more): each time twice as long, up to a limit."""
    first = tempo.first_lasting_pause_s if lasting else tempo.first_pause_s
    longest = tempo.longest_lasting_pause_s if lasting else tempo.longest_pause_s
    return min(longest, first * 2.0 ** min(failures - 1, 30))


class Fetch:
    """One model's way to the disk. `run` belongs to one thread, all else to any.

    `on_trouble` is told, on that thread, why it is tried again, once as long as the reason stays the same.
    With `tries` it gives up after so many, and at once when another would not help; without, it goes on for
    ever: links come back, and files are put where they were missing.
    """

    def __init__(
        self,
        order: Order,
        kept: Kept,
        *,
        tries: int | None = None,
        tempo: Tempo | None = None,
        jitter: Callable[[], float] = random.random,
        on_trouble: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self.order = order
        self._kept = kept
        self._tries = tries
        self._tempo = tempo or Tempo()
        self._jitter = jitter
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._progress = Progress()
        self._error: str | None = None
        self._failed_at_bytes = 0
        self._stopping = False
        self._cancel: Callable[[], None] = lambda: None
        keep_secret(secrets_in([order.url]))

    def __repr__(self) -> str:
        return f"<Fetch {shown(self.order.url)} {self.words}>"

    @property
    def words(self) -> str:
        """How it stands, for people."""
        if self._error is not None and self._progress.done_bytes <= self._failed_at_bytes:
            return f"the model cannot be fetched, and is tried again: {self._error}"
        return f"the model is being fetched: {self._progress.words}"

    def run(self) -> Path | None:
        """Fetch the model, or find it kept from before; None if it was stopped. Blocks, for hours maybe.

        Raises:
            FetchError: it is given up; one line that begins with the address.
        """
        kept = self._kept.find(self.order.sha256)
        if kept is not None:
            return kept
        loop = ConnectionLoop()
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(self._whole(loop))
        return None

    def stop(self) -> None:
        """Let `run` return soon."""
        with self._lock:
            self._stopping = True
            cancel = self._cancel
        cancel()

    async def _whole(self, loop: ConnectionLoop) -> Path:
        """Until it is there or given up; whoever stops it cancels the task."""
        task = asyncio.ensure_future(self._tried())

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
            await loop.hang_up()

    async def _tried(self) -> Path:
        log.info("fetching the model %s", shown(self.order.url))
        failures = 0
        while True:
            try:
                return await self._once()
            except FetchError as error:
                failures += 1
                words = f"{shown(self.order.url)}: {error}"
                if self._tries is not None and (error.lasting or failures >= self._tries):
                    raise FetchError(words, lasting=error.lasting) from None
                news = words != self._error
                self._error, self._failed_at_bytes = words, self._progress.done_bytes
                if news:
                    log.warning("the model cannot be fetched, and is tried again: %s", words)
                    self._on_trouble(words)
                pause = pause_s(self._tempo, failures, lasting=error.lasting)
            await asyncio.sleep(pause * (0.5 + 0.5 * self._jitter()))

    async def _once(self) -> Path:
        began_s = time.monotonic()
        teller = asyncio.create_task(self._tell())
        try:
            with self._kept.begin(self.order.sha256) as part:
                await attempt(self.order, part, self._tempo.patience, self._progress)
                path = self._kept.keep(part, self.order.sha256)
        finally:
            teller.cancel()
        log.info("the model is fetched: %.1f MB in %.1f s", part.size_bytes / 1e6, time.monotonic() - began_s)
        return path

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(self._tempo.tell_every_s)
            log.info("the model is being fetched: %s", self._progress.words)
