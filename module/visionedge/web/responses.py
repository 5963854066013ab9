"""Answers and queries: JSON documents, errors in the one shape, and checked query values."""

import logging
import math
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from visionedge.errors import BusyError, VisionedgeError
from visionedge.outbound.messages import encode_json
from visionedge.runtime.redaction import redact

log = logging.getLogger(__name__)

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    411: "length_required",
    413: "too_large",
    415: "unsupported_media",
    417: "expectation_failed",
    431: "head_too_large",
    500: "internal",
    503: "unavailable",
}

_MAX_QUOTED_CHARACTERS = 100
"""A client's text is cut to this before it is quoted: masking a long one could take long."""

_MAX_MESSAGE_CHARACTERS = 1000

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_BOOLEANS = {"": True, "1": True, "true": True, "0": False, "false": False}


class RequestError(Exception):
    """A request that is answered with an error: status, code for programs, message for people."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or _CODES.get(status, "error")
        self.headers = dict(headers)


def truncate(text: str, maximum: int = _MAX_QUOTED_CHARACTERS) -> str:
    """The beginning of a text. For every text of a client before it is quoted, masked or logged."""
    return text if len(text) <= maximum else text[:maximum] + "…"


def json_response(
    document: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer that ends with a line feed, for terminals."""
    body = encode_json(document) + b"\n"
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def set_common_headers(headers: MutableMapping[str, str]) -> None:
    """The headers of every answer: clients must not cache it or guess its type."""
    headers.setdefault("Cache-Control", "no-store")
    headers.setdefault("X-Content-Type-Options", "nosniff")
    # Otherwise a page of another site could show the pictures in an <img>.
    headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    headers["Server"] = "visionedge"


def error_response(path: str, problem: RequestError) -> web.Response:
    """The error as JSON: ``{"error": {"code", "message"}}``, and under /v2 as that protocol wants it."""
    message = redact(truncate(str(problem), _MAX_MESSAGE_CHARACTERS))
    error = (
        message if path == "/v2" or path.startswith("/v2/") else {"code": problem.code, "message": message}
    )
    return json_response({"error": error}, status=problem.status, headers=problem.headers)


def to_request_error(error: Exception, request: web.BaseRequest) -> RequestError:
    """The error that a client gets for an exception of a handler."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BusyError):
        return RequestError(503, str(error), code="busy", headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, web.HTTPException):
        return _from_http_exception(error, request)
    if isinstance(error, web.RequestPayloadError | HttpProcessingError | ConnectionError):
        return RequestError(400, "the body cannot be read: it is malformed or cut off")
    if isinstance(error, VisionedgeError):
        return RequestError(500, str(error), code="failed")
    log.error("%s %s failed", truncate(request.method), redact(truncate(request.path)), exc_info=error)
    return RequestError(500, "internal error; the module's log has the details")


def _from_http_exception(error: web.HTTPException, request: web.BaseRequest) -> RequestError:
    headers = {}
    message = error.reason or "error"
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        allowed = headers["Allow"]
        message = f"{truncate(request.path)} does not take {truncate(request.method)}; it takes {allowed}"
    elif isinstance(error, web.HTTPNotFound):
        message = f"nothing is at {truncate(request.path) or 'this address'}; /openapi.json lists all paths"
    elif isinstance(error, web.HTTPExpectationFailed):
        message = "the only supported Expect is 100-continue"
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        message = "the body is too large"
    return RequestError(error.status, message, headers=headers)


def unknown_camera_error(name: str) -> RequestError:
    """No camera has the name that is part of the path, or that a stream of frames is limited to."""
    return RequestError(404, f"there is no camera '{truncate(name)}'", code="unknown_camera")


def query_text(request: web.Request, name: str) -> str | None:
    """A query value as text; None where it is absent.

    Raises:
        RequestError: 400, it is given more than once. The other functions here also raise it for a value of
            another kind.
    """
    values = request.query.getall(name, [])
    if len(values) > 1:
        raise RequestError(400, f"'{name}' is given {len(values)} times")
    return values[0] if values else None


def query_integer(
    request: web.Request, name: str, *, minimum: int | None = None, maximum: int | None = None
) -> int | None:
    """A query value as a whole number within its limits."""
    text = query_text(request, name)
    if text is None:
        return None
    if not _INTEGER.fullmatch(text):
        raise RequestError(400, f"'{name}' must be a whole number")
    number = int(text)
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise RequestError(400, f"'{name}' must be from {minimum} to {maximum}")
    return number


def query_seconds(request: web.Request, name: str, *, max_s: float) -> float | None:
    """A query value as seconds, not below 0; above `max_s` it counts as `max_s`."""
    text = query_text(request, name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise RequestError(400, f"'{name}' must be seconds, such as 10 or 2.5")
    return min(float(text), max_s)


def query_bool(request: web.Request, name: str) -> bool:
    """A query value as a bool: true for 1, true or the bare name; false for 0, false or absent."""
    text = query_text(request, name)
    if text is None:
        return False
    if text.lower() not in _BOOLEANS:
        raise RequestError(400, f"'{name}' must be 1 or 0")
    return _BOOLEANS[text.lower()]
