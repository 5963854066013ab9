"""The support bundle in chunks, because an answer of a direct method holds 128 KB.

A call without `id` makes a bundle and returns its first chunk; further calls name the `id` and the chunk.
"""

import asyncio
import base64
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visionedge.config.documents import Document
from visionedge.iothub.direct_methods import MethodError

CHUNK_BYTES = 88_000
"""117,336 characters in base64: an answer of 120,000 bytes still holds it."""

MAX_BUNDLE_BYTES = 4 << 20

_KEEP_S = 600.0
_FRESH_S = 60.0
"""A bundle that is younger is not made again, so that calls cannot keep the module busy."""

_WAIT_S = 4.0
_ID_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class _Bundle:
    """A zip; its id is the beginning of its hash, so that an id never names two."""

    data: bytes
    sha256: str
    made_s: float

    @property
    def id(self) -> str:
        return self.sha256[:_ID_CHARACTERS]

    @property
    def chunks(self) -> int:
        return -(-len(self.data) // CHUNK_BYTES)


class SupportBundle:
    """Keeps the newest bundle for ten minutes after it was made. For the event loop only.

    `make` returns the zip. While it runs, all callers wait for the same one; a cancelled caller does not
    cancel it.
    """

    def __init__(
        self, make: Callable[[], Awaitable[bytes]], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._clock_s = clock_s
        self._making: asyncio.Future[bytes] | None = None
        self._kept: _Bundle | None = None

    def __repr__(self) -> str:
        return f"<SupportBundle {self._kept.id if self._kept else 'none'} making={self._making is not None}>"

    async def answer(self, payload: Mapping[str, Any]) -> Document:
        """A chunk of a bundle; `payload` has the keys `id` and `chunk`, or neither.

        Raises:
            MethodError: the bundle is not ready yet, or the id or the chunk is not known.
        """
        self._forget_old()
        number = payload.get("chunk", 0)
        if "id" in payload:
            bundle = self._kept
            if bundle is None or bundle.id != payload["id"]:
                raise MethodError(
                    410, "gone", "the bundle is no longer kept: call without 'id' for a new one"
                )
        elif number:
            raise MethodError(400, "bad_payload", "give the 'id' of the bundle with its 'chunk'")
        else:
            bundle = await self._newest()
        if not 0 <= number < bundle.chunks:
            raise MethodError(404, "unknown_chunk", f"chunks 0 to {bundle.chunks - 1} exist")
        data = bundle.data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        return {
            "id": bundle.id,
            "chunk": number,
            "chunks": bundle.chunks,
            "bytes": len(bundle.data),
            "sha256": bundle.sha256,
            "data": base64.b64encode(data).decode(),
        }

    async def _newest(self) -> _Bundle:
        if self._making is None:
            if self._kept is not None and self._clock_s() - self._kept.made_s < _FRESH_S:
                return self._kept
            self._making = asyncio.ensure_future(self._make())
        making = self._making
        await asyncio.wait({making}, timeout=_WAIT_S)
        if not making.done():
            raise MethodError(409, "in_progress", "the bundle is being made: call again in some seconds")
        if self._making is making:
            self._making = None
        bundle = self._check(making.result())
        self._kept = bundle
        return bundle

    def _check(self, data: bytes) -> _Bundle:
        if len(data) > MAX_BUNDLE_BYTES:
            text = f"the bundle has more than {MAX_BUNDLE_BYTES >> 20} MiB: use `visionedge doctor --bundle`"
            raise MethodError(500, "too_large", text)
        return _Bundle(data, hashlib.sha256(data).hexdigest(), self._clock_s())

    def _forget_old(self) -> None:
        if self._kept is not None and self._clock_s() - self._kept.made_s >= _KEEP_S:
            self._kept = None
