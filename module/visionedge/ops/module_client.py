"""Requests to a running module, for `bench http`, `manifest estimate` and the bundle of `doctor`."""

import json
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from visionedge.errors import ConfigError, VisionedgeError
from visionedge.runtime.redaction import redact

STATUS_PATH = "/api/v1/status"

_MAX_BYTES = 8 * 2**20


def fetch(url: str, path: str, token: str | None = None, *, timeout_s: float = 10.0) -> tuple[int, bytes]:
    """GET `path` below the address of a module: the status code and the body.

    Proxies and redirects are not used, so that only this host gets the token.

    Raises:
        ConfigError: the address or the token is not valid.
        VisionedgeError: the module cannot be reached.
    """
    if token and not (token.isascii() and token.isprintable()):
        raise ConfigError(["--token: has characters that are not allowed in an HTTP header"])
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(["--url: is not a URL such as http://127.0.0.1:8080"]) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ConfigError(["--url: write the address of a module, such as http://127.0.0.1:8080"])
    connection_type = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = connection_type(parts.hostname, port, timeout=timeout_s)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", parts.path.rstrip("/").removesuffix(path) + path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(_MAX_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VisionedgeError(f"{url} cannot be reached: {redact(reason) or type(error).__name__}") from None
    finally:
        connection.close()


def fetch_status(url: str, token: str | None) -> dict[str, Any]:
    """The status of a module.

    Raises:
        ConfigError: the address or the token is not valid.
        VisionedgeError: the module cannot be reached, refuses, or is no visionedge module.
    """
    code, body = fetch(url, STATUS_PATH, token)
    if code in {401, 403}:
        raise VisionedgeError(f"{url} answers {code}: set VISIONEDGE_HTTP_TOKEN, or use --token")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if code != 200 or not isinstance(document, dict):
        raise VisionedgeError(f"{url} answers {code}, which is not the status of a visionedge module")
    return document
