"""Bodies of requests: bounded in size and time, unpacked where they come compressed.

aiohttp could unpack them as well, but it refuses an unknown coding before it is known what was asked for, so
such an answer could not have the shape of its path.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator

from aiohttp import hdrs, web

from visionedge.web.responses import RequestError

_STEP_BYTES = 2**20
"""So much is unpacked before others have their turn on the loop."""
_PLAIN, _GZIP = frozenset({"", "identity"}), frozenset({"gzip", "x-gzip"})
_DEFLATE = "deflate"


class Body:
    """The body of a request, to be read once, from its beginning."""

    def __init__(self, request: web.Request, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until_s = asyncio.get_running_loop().time() + timeout_s
        self._pieces = _unpacked(request)
        self._ahead = bytearray()

    async def up_to(self, size_bytes: int) -> bytes:
        """The next bytes, so many at most; fewer only where the body ends.

        Raises:
            RequestError: 408 after the time limit, 400 or 415 where it cannot be unpacked.
        """
        try:
            async with asyncio.timeout_at(self._until_s):
                while len(self._ahead) < size_bytes:
                    self._ahead += await anext(self._pieces)
        except StopAsyncIteration:
            pass
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {self._timeout_s:g} s") from None
        taken = bytes(memoryview(self._ahead)[:size_bytes])
        del self._ahead[:size_bytes]
        return taken


async def read_body(request: web.Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        RequestError: 413 above `limit_bytes`, 408 after `timeout_s`, 400 when it is empty, 400 or 415 when
            it cannot be unpacked.
    """
    if (request.content_length or 0) > limit_bytes:
        raise too_large(limit_bytes)
    data = await Body(request, timeout_s).up_to(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise too_large(limit_bytes)
    if not data:
        raise RequestError(400, "the body is empty", code="empty_body")
    return data


def too_large(limit_bytes: int, what: str = "the body") -> RequestError:
    """413 with the limit."""
    return RequestError(413, f"{what} is larger than {limit_bytes / 2**20:.3g} MiB")


def coding_of(request: web.Request) -> str:
    """The content coding of the body; "" where it is as it is.

    Raises:
        RequestError: 415, it is none that can be unpacked.
    """
    coding = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, [])).strip().lower()
    if coding in _PLAIN:
        return ""
    if coding == _DEFLATE or coding in _GZIP:
        return coding
    raise RequestError(415, "the content coding of the body is not known; send it plain, as gzip or deflate")


async def _unpacked(request: web.Request) -> AsyncIterator[bytes]:
    coding = coding_of(request)
    packed = request.content.iter_any()
    if not coding:
        async for piece in packed:
            yield piece
        return
    try:
        async for piece in _inflated(packed, coding):
            yield piece
    except zlib.error:
        raise RequestError(400, f"the body is no {coding}, though its Content-Encoding says so") from None


async def _inflated(packed: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """Raises zlib.error where it is not of this coding, or is cut off."""
    unpacker = None
    async for piece in packed:
        if unpacker is None:
            unpacker = zlib.decompressobj(_window_bits(coding, piece))
        rest = piece
        while rest and not unpacker.eof:
            yield unpacker.decompress(rest, _STEP_BYTES)
            rest = unpacker.unconsumed_tail
            await asyncio.sleep(0)
    if unpacker is not None and not unpacker.eof:
        raise zlib.error("cut off")


def _window_bits(coding: str, beginning: bytes) -> int:
    """What tells zlib the format; `deflate` comes with zlib's header as the standard has it, or bare."""
    if coding in _GZIP:
        return 16 + zlib.MAX_WBITS
    has_header = beginning[0] & 0x0F == zlib.DEFLATED
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS
