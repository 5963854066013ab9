"""Bodies of requests: bounded in size, time and memory, decompressed, and decoded where they are pictures.

aiohttp could decompress them as well, but it refuses an unknown content coding before the path is known, so
its answer could not have the error shape of /v2.
"""

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator

from aiohttp import BodyPartReader, MultipartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from visionedge.camera.sources.images import decode_picture, read_picture_size
from visionedge.errors import SourceError
from visionedge.frames.types import Picture
from visionedge.runtime.limits import BoundedExecutor, ConcurrencyLimit, DetachedTasks, MemoryBudget
from visionedge.web.responses import RequestError

UPLOAD_LIMIT_BYTES = 20 * 2**20
UPLOAD_LIMIT_S = 30.0
UPLOADS_AT_ONCE = 4
PIXELS_LIMIT = 40_000_000
MEMORY_BYTES = 360_000_000
"""For the pictures and tensors of all requests at once: one progressive JPEG of 40 megapixels."""

MEMORY_WAIT_S = 10.0

_CLOSE_S = 1.0
_DECODING_BYTES_PER_PX = 9
"""A progressive JPEG keeps its coefficients (6 bytes) beside the picture (3 bytes) until it is decoded."""

_STEP_BYTES = 2**20
"""So much is decompressed before other requests get their turn on the event loop."""

_PLAIN, _GZIP = frozenset({"", "identity"}), frozenset({"gzip", "x-gzip"})
_DEFLATE = "deflate"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"})


class RequestResources:
    """What the requests of one server share: threads, places for bodies that are computed, and memory."""

    def __init__(self) -> None:
        self.executor = BoundedExecutor()
        self.permits = ConcurrencyLimit(UPLOADS_AT_ONCE, "too many pictures are being analysed for others")
        self.memory = MemoryBudget(MEMORY_BYTES, MEMORY_WAIT_S, "too many large pictures are being analysed")
        self.detached_tasks = DetachedTasks()

    def __repr__(self) -> str:
        return f"<RequestResources {self.permits} {self.memory}>"

    async def close(self) -> None:
        """End the work that runs, and the threads."""
        await self.detached_tasks.close(_CLOSE_S)
        await asyncio.to_thread(self.executor.close)


# --- bodies of any kind -------------------------------------------------------------------------------------


class RequestBody:
    """The body of one request, which is read once, from its beginning, within `timeout_s` in all."""

    def __init__(self, request: web.Request, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until_s = asyncio.get_running_loop().time() + timeout_s
        self._pieces = _decompressed(request)
        self._ahead = bytearray()

    async def read_up_to(self, size_bytes: int) -> bytes:
        """The next bytes, at most `size_bytes`; fewer only where the body ends.

        Raises:
            RequestError: 408 after the time limit, 400 or 415 where it cannot be decompressed.
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
            it cannot be decompressed.
    """
    if (request.content_length or 0) > limit_bytes:
        raise body_too_large_error(limit_bytes)
    data = await RequestBody(request, timeout_s).read_up_to(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise body_too_large_error(limit_bytes)
    if not data:
        raise RequestError(400, "the body is empty", code="empty_body")
    return data


def body_too_large_error(limit_bytes: int, what: str = "the body") -> RequestError:
    """The answer 413, with the limit in MiB."""
    return RequestError(413, f"{what} is larger than {limit_bytes / 2**20:.3g} MiB")


def read_content_coding(request: web.Request) -> str:
    """The content coding of the body: gzip, x-gzip, deflate, or "" for none.

    Raises:
        RequestError: 415, the coding is another one.
    """
    coding = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, [])).strip().lower()
    if coding in _PLAIN:
        return ""
    if coding == _DEFLATE or coding in _GZIP:
        return coding
    raise RequestError(
        415, "the content coding of the body is not supported; send it plain, as gzip or deflate"
    )


async def _decompressed(request: web.Request) -> AsyncIterator[bytes]:
    coding = read_content_coding(request)
    compressed = request.content.iter_any()
    if not coding:
        async for piece in compressed:
            yield piece
        return
    try:
        async for piece in _inflate(compressed, coding):
            yield piece
    except zlib.error:
        raise RequestError(400, f"the body is not {coding}, although its Content-Encoding says so") from None


async def _inflate(compressed: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """Raises zlib.error where the data is not of this coding or is cut off."""
    decompressor = None
    async for piece in compressed:
        if decompressor is None:
            decompressor = zlib.decompressobj(_window_bits(coding, piece))
        rest = piece
        while rest and not decompressor.eof:
            yield decompressor.decompress(rest, _STEP_BYTES)
            rest = decompressor.unconsumed_tail
            await asyncio.sleep(0)
    if decompressor is not None and not decompressor.eof:
        raise zlib.error("cut off")


def _window_bits(coding: str, beginning: bytes) -> int:
    """The `wbits` of zlib. `deflate` comes with a zlib header, as the standard says, or without."""
    if coding in _GZIP:
        return 16 + zlib.MAX_WBITS
    has_header = beginning[0] & 0x0F == zlib.DEFLATED
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


# --- pictures -----------------------------------------------------------------------------------------------


async def read_upload(request: web.Request) -> bytes:
    """The encoded picture of a request: its body, or the first file of a form.

    Raises:
        RequestError: it did not arrive whole, is too large, or is no JPEG, PNG or WebP.
    """
    data = await _read_upload_bytes(request)
    # By the first bytes: the content type of a client may be wrong.
    if not is_supported_image(data):
        raise RequestError(415, "the body is not a picture; send a JPEG, PNG or WebP")
    return data


def is_supported_image(data: bytes) -> bool:
    """Whether it begins as a JPEG, PNG or WebP: no other format of a client reaches a decoder."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\xff\xd8\xff", _PNG_SIGNATURE))


def estimate_decoding_bytes(data: bytes) -> int:
    """The most memory that decoding takes, by the size in the header of the picture.

    Raises:
        RequestError: 413, there are too many pixels.
    """
    size = read_picture_size(data)
    if size is None:
        return 0  # decoding fails before it takes any memory
    width_px, height_px = size
    if width_px * height_px > PIXELS_LIMIT:
        limit = f"the limit is {PIXELS_LIMIT / 1e6:g} megapixels"
        raise RequestError(413, f"the picture is {width_px} x {height_px} pixels; {limit}")
    return width_px * height_px * _DECODING_BYTES_PER_PX


def decode_upload(data: bytes) -> Picture:
    """Decode a picture. Blocks: not for the event loop.

    Raises:
        RequestError: 400, the picture is damaged.
    """
    try:
        return decode_picture(strip_png_metadata(data), max_pixels=PIXELS_LIMIT)
    except SourceError as error:
        raise RequestError(400, str(error), code="bad_picture") from None


def strip_png_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that do not change its picture: libpng prints text from them on stderr."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept = [_PNG_SIGNATURE]
    at, view = len(_PNG_SIGNATURE), memoryview(data)
    while at + 8 <= len(data):
        (size_bytes,) = struct.unpack_from(">I", data, at)
        end = at + 12 + size_bytes
        if data[at + 4 : at + 8] in _PNG_CHUNKS:
            kept.append(bytes(view[at:end]))
        at = end
    return b"".join(kept)


async def _read_upload_bytes(request: web.Request) -> bytes:
    if not request.content_type.startswith("multipart/"):
        return await read_body(request, UPLOAD_LIMIT_BYTES, UPLOAD_LIMIT_S)
    if read_content_coding(request):
        raise RequestError(415, "a form must be sent without a Content-Encoding")
    try:
        async with asyncio.timeout(UPLOAD_LIMIT_S):
            return await _first_file(await request.multipart())
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {UPLOAD_LIMIT_S:g} s") from None
    # All that aiohttp's reader of forms raises for malformed heads and bodies.
    except (ValueError, RuntimeError, AssertionError, LookupError, HttpProcessingError):
        raise RequestError(400, "the multipart body cannot be read") from None


async def _first_file(form: MultipartReader) -> bytes:
    part = await form.next()
    while part is not None:
        if isinstance(part, BodyPartReader) and part.filename is not None:
            return await _part_bytes(part)
        part = await form.next()
    raise RequestError(400, "the form holds no file", code="empty_body")


async def _part_bytes(part: BodyPartReader) -> bytes:
    data = bytearray()
    while chunk := await part.read_chunk(65536):
        data += chunk
        if len(data) > UPLOAD_LIMIT_BYTES:
            raise body_too_large_error(UPLOAD_LIMIT_BYTES, "the file")
    if not data:
        raise RequestError(400, "the file is empty", code="empty_body")
    return bytes(data)
