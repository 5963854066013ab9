"""One try to fetch a model: https with every limit, or a file where that is allowed."""

import asyncio
import contextlib
import os
import re
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
from yarl import URL

from visionedge import __version__
from visionedge.config.addresses import local_path
from visionedge.errors import FetchError
from visionedge.model.faults import Patience, told
from visionedge.model.model_store import Part
from visionedge.runtime.redaction import keep_secret, secrets_in

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
