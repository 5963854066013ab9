"""Direct methods: who may be called and with what, deadlines, sizes, and errors in one shape."""

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
"""Below the 128 KB that IoT Hub takes, as the SDK encodes it."""

_MAX_CONCURRENT = 8


class MethodError(VisionedgeError):
    """A call that gets an error for an answer: a status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


MethodHandler = Callable[[Mapping[str, Any]], Awaitable[Document]]


@dataclass(frozen=True, slots=True)
class DirectMethod:
    """A method: what it does, how long that may take, and the types of the keys that its payload may have.

    `keys` None: the payload is any mapping.
    """

    handler: MethodHandler
    deadline_s: float
    keys: Mapping[str, type] | None = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MethodResult:
    """What goes back: an HTTP-like status and a JSON document."""

    status: int
    document: Document


class MethodDispatcher:
    """The methods by name. `answer` belongs to the asyncio loop, raises nothing and keeps the deadlines."""

    def __init__(self, methods: Mapping[str, DirectMethod]) -> None:
        self._methods = methods
        self._running = 0
        self.counts: Counter[tuple[str, int]] = Counter()

    def __repr__(self) -> str:
        return f"<Methods running={self._running} {dict(self.counts)}>"

    async def answer(self, name: str, payload: Any) -> MethodResult:
        """Call a method."""
        if self._running >= _MAX_CONCURRENT:
            return self.busy(name)
        self._running += 1
        try:
            answer = await self._call(name, payload)
        finally:
            self._running -= 1
        return self._count_result(name, answer)

    def busy(self, name: str) -> MethodResult:
        """The answer to a call when there are too many."""
        return self._count_result(name, _error(MethodError(503, "busy", "too many methods run; call again")))

    def _count_result(self, name: str, answer: MethodResult) -> MethodResult:
        known = name if name in self._methods else "unknown"
        self.counts[known, answer.status] += 1
        return answer

    async def _call(self, name: str, payload: Any) -> MethodResult:
        try:
            method = self._method(name)
            arguments = _validate_payload(method, payload)
            async with asyncio.timeout(method.deadline_s):
                document = await method.handler(arguments)
            _check_size(document)
        except TimeoutError:
            return _error(MethodError(504, "timeout", f"{name} did not come to its end in time"))
        except MethodError as error:
            return _error(error)
        except VisionedgeError as error:
            return _error(MethodError(500, "failed", str(error)))
        except Exception:
            log.exception("the direct method %s failed", redact(name))
            return _error(MethodError(500, "internal", "internal error; the module's log has the details"))
        return MethodResult(200, document)

    def _method(self, name: str) -> DirectMethod:
        method = self._methods.get(name)
        if method is None:
            known = ", ".join(sorted(self._methods))
            raise MethodError(404, "unknown_method", f"there is no method '{name[:64]}'; there are {known}")
        return method


def measure_result_bytes(document: Any) -> int:
    """How large a document is as the SDK sends it.

    Raises:
        ValueError: it holds a number that JSON has no word for.
    """
    return len(json.dumps(document, allow_nan=False))


def _check_size(document: Document) -> None:
    if measure_result_bytes(document) > MAX_RESULT_BYTES:
        raise MethodError(500, "too_large", "the answer is larger than a direct method may give")


def _validate_payload(method: DirectMethod, payload: Any) -> Mapping[str, Any]:
    """The payload, if it has the keys and types that the method wants; nothing counts as no key."""
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
            raise MethodError(400, "bad_payload", f"unknown key '{key[:64]}'; known here: {known}")
        if not isinstance(value, kind):
            raise MethodError(400, "bad_payload", f"'{key}' must be {_TYPE_NAMES[kind]}")
    return payload


_TYPE_NAMES: Mapping[type, str] = {str: "a text", bool: "true or false"}


def _error(error: MethodError) -> MethodResult:
    message = redact(str(error))[:2000]
    return MethodResult(error.status, {"error": {"code": error.code, "message": message}})
