"""Pictures that clients send: read, looked at before they are decoded, and decoded."""

import asyncio
import struct

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from visionedge.camera.sources.images import decode_picture, picture_size
from visionedge.errors import SourceError
from visionedge.frames.types import Picture
from visionedge.web.jpeg import is_picture
from visionedge.web.requests import coding_of, read_body, too_large
from visionedge.web.responses import RequestError

UPLOAD_LIMIT_BYTES = 20 * 2**20
UPLOAD_LIMIT_S = 30.0
PIXELS_LIMIT = 40_000_000

_DECODING_BYTES_PER_PX = 9
"""A progressive JPEG keeps its coefficients (6 bytes) beside the picture (3 bytes) until it is decoded."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"})


async def read_upload(request: web.Request) -> bytes:
    """The picture of a request as it was sent: its body, or the first file of a form.

    Raises:
        RequestError: it did not arrive whole, is too large, or is no JPEG, PNG or WebP.
    """
    data = await _uploaded(request)
    # The first bytes tell what it is, whatever the client calls it.
    if not is_picture(data):
        raise RequestError(415, "the body is no picture; send a JPEG, PNG or WebP")
    return data


def decoding_bytes(data: bytes) -> int:
    """The memory that decoding takes at most, by the size that the head of the picture tells.

    Raises:
        RequestError: 413, there are too many pixels.
    """
    size = picture_size(data)
    if size is None:
        return 0  # decoding refuses it without having taken anything
    width_px, height_px = size
    if width_px * height_px > PIXELS_LIMIT:
        limit = f"the limit is {PIXELS_LIMIT / 1e6:g} megapixels"
        raise RequestError(413, f"the picture is {width_px} x {height_px} pixels; {limit}")
    return width_px * height_px * _DECODING_BYTES_PER_PX


def decode_upload(data: bytes) -> Picture:
    """Decode it; slow.

    Raises:
        RequestError: 400, it is damaged.
    """
    try:
        return decode_picture(without_remarks(data), max_pixels=PIXELS_LIMIT)
    except SourceError as error:
        raise RequestError(400, str(error), code="bad_picture") from None


def without_remarks(data: bytes) -> bytes:
    """A PNG without the chunks that do not change its picture: libpng quotes from them on stderr."""
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


async def _uploaded(request: web.Request) -> bytes:
    if not request.content_type.startswith("multipart/"):
        return await read_body(request, UPLOAD_LIMIT_BYTES, UPLOAD_LIMIT_S)
    if coding_of(request):
        raise RequestError(415, "a form must be sent without a Content-Encoding")
    try:
        async with asyncio.timeout(UPLOAD_LIMIT_S):
            return await _first_file(await request.multipart())
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {UPLOAD_LIMIT_S:g} s") from None
    # All that aiohttp's reader of forms lets out of a head or a body that is none.
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
            raise too_large(UPLOAD_LIMIT_BYTES, "the file")
    if not data:
        raise RequestError(400, "the file is empty", code="empty_body")
    return bytes(data)
