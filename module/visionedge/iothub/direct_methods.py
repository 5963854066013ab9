"""Direct methods: checks a call, runs its method within a deadline, and makes the result or an error.

The methods themselves are in `app/direct_methods.py`.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from visionedge.config.documents import Document
from visionedge.errors import VisionedgeError
from visionedge.runtime.redaction import redact

log = logging.getLogger(__name__)

MAX_RESULT_BYTES = 120_000
"""The limit of a result as the SDK encodes it; IoT Hub accepts 128 KB."""

_MAX_CONCURRENT = 8
_TYPE_NAMES: Mapping[type, str] = {str: "a text", bool: "true or false", int: "a whole number"}


class MethodError(VisionedgeError):
    """An error result of a call: an HTTP-like status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


MethodHandler = Callable[[Mapping[str, Any]], Awaitable[Document]]


@dataclass(frozen=True, slots=True)
class DirectMethod:
    """A method: its handler, its deadline, and the allowed keys of its payload with their types.

    `keys=None`: the payload may be any object.
    """

    handler: MethodHandler
    deadline_s: float
    keys: Mapping[str, type] | None = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MethodResult:
    """The result of a call: an HTTP-like status and a JSON document."""

    status: int
    document: Document


class MethodDispatcher:
    """Runs methods by name, at most eight at once. For the asyncio loop; `answer` raises nothing.

    `counts` has the number of calls by method and status.
    """

    def __init__(self, methods: Mapping[str, DirectMethod]) -> None:
        self._methods = methods
        self._running = 0
        self.counts: Counter[tuple[str, int]] = Counter()

    def __repr__(self) -> str:
        return f"<MethodDispatcher running={self._running} {dict(self.counts)}>"

    async def answer(self, name: str, payload: Any) -> MethodResult:
        """Call a method and return its result, or an error as a result."""
        if self._running >= _MAX_CONCURRENT:
            return self.busy(name)
        self._running += 1
        try:
            result = await self._call(name, payload)
        finally:
            self._running -= 1
        return self._count_result(name, result)

    def busy(self, name: str) -> MethodResult:
        """The result of a call that is refused because too many calls run."""
        error = MethodError(503, "busy", "too many calls at once; call again")
        return self._count_result(name, _error(error))

    def _count_result(self, name: str, result: MethodResult) -> MethodResult:
        known = name if name in self._methods else "unknown"
        self.counts[known, result.status] += 1
        return result

    async def _call(self, name: str, payload: Any) -> MethodResult:
        try:
            method = self._method(name)
            arguments = _validate_payload(method, payload)
            async with asyncio.timeout(method.deadline_s):
                document = await method.handler(arguments)
            _check_size(document)
        except TimeoutError:
            return _error(MethodError(504, "timeout", f"{name} did not finish in time"))
        except MethodError as error:
            return _error(error)
        except VisionedgeError as error:
            return _error(MethodError(500, "failed", str(error)))
        except Exception:
            log.exception("the direct method %s failed", redact(name))
            return _error(MethodError(500, "internal", "internal error; see the log of the module"))
        return MethodResult(200, document)

    def _method(self, name: str) -> DirectMethod:
        method = self._methods.get(name)
        if method is None:
            known = ", ".join(sorted(self._methods))
            raise MethodError(404, "unknown_method", f"unknown method '{name[:64]}'; known methods: {known}")
        return method


def measure_result_bytes(document: Any) -> int:
    """The size of a document as the SDK sends it.

    Raises:
        ValueError: the document contains NaN or infinity.
    """
    return len(json.dumps(document, allow_nan=False))


def _check_size(document: Document) -> None:
    if measure_result_bytes(document) > MAX_RESULT_BYTES:
        raise MethodError(500, "too_large", f"the result exceeds {MAX_RESULT_BYTES:,} bytes")


def _validate_payload(method: DirectMethod, payload: Any) -> Mapping[str, Any]:
    """Check the keys and types of a payload; a missing payload is an empty one."""
    if payload is None or payload == "":
        return {}
    if not isinstance(payload, dict):
        raise MethodError(400, "bad_payload", "the payload must be an object, such as {}")
    if method.keys is None:
        return payload
    for key, value in payload.items():
        kind = method.keys.get(key)
        if kind is None:
            known = ", ".join(sorted(method.keys)) or "none"
            raise MethodError(400, "bad_payload", f"unknown key '{key[:64]}'; known keys: {known}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise MethodError(400, "bad_payload", f"'{key}' must be {_TYPE_NAMES[kind]}")
    return payload


def _error(error: MethodError) -> MethodResult:
    message = redact(str(error))[:2000]
    return MethodResult(error.status, {"error": {"code": error.code, "message": message}})
