"""URIs of cameras: what they may look like, and how a text is made safe to show (`redact`)."""

import os
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from visionedge.errors import ConfigError

Kind = Literal["rtsp", "http", "file", "folder", "v4l2", "demo"]

_KINDS: dict[str, Kind] = {
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "http": "http",
    "https": "http",
    "v4l2": "v4l2",
    "file": "file",
    "demo": "demo",
}
FORMS = "rtsp://, rtsps://, http(s)://, a file, a folder of pictures, v4l2:///dev/video0 or demo:"
"""What a camera URI may be, for messages."""

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*):(//)?")


@dataclass(frozen=True, slots=True)
class CameraUri:
    """A camera URI understood: its kind and what the decoder opens (`target`, with its secrets)."""

    kind: Kind
    target: str

    def __str__(self) -> str:
        return redact(self.target)

    def __repr__(self) -> str:
        return f"CameraUri({self.kind!r}, {redact(self.target)!r})"


def parse_camera_uri(uri: str) -> CameraUri:
    """Understand a camera URI; nothing is opened.

    Raises:
        ConfigError: the scheme is unknown or the host or path is missing.
    """
    if not uri.strip():
        raise ConfigError([f"an empty camera URI; give {FORMS}"])
    found = _SCHEME.match(uri)
    # One letter before a colon is a drive of Windows, not a scheme.
    if found is None or len(found[1]) == 1:
        return _local(uri)
    kind = _KINDS.get(found[1].lower())
    if kind is None:
        if os.path.exists(uri):  # noqa: PTH110 - unlike Path's, it answers False to impossible names
            return _local(uri)
        raise ConfigError([f"unknown scheme '{found[1]}:' in camera URI {redact(uri)}; give {FORMS}"])
    if kind in ("rtsp", "http"):
        return CameraUri(kind, _with_host(uri))
    if kind == "v4l2":
        return CameraUri(kind, _device_path(uri, found[0]))
    if kind == "file":
        return _local(uri[len(found[0]) :])
    return CameraUri(kind, uri)


def _local(path: str) -> CameraUri:
    # A name that is too long or lies behind a closed folder is told when it is opened.
    return CameraUri("folder" if os.path.isdir(path) else "file", path)  # noqa: PTH112 - as above, False and no error


def _with_host(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        _ = parts.port  # raises where it is no number
    except ValueError as error:
        raise ConfigError([f"camera URI {redact(uri)} cannot be read: {redact(str(error))}"]) from None
    if not parts.hostname:
        raise ConfigError([f"camera URI {redact(uri)} names no host"])
    return uri


def _device_path(uri: str, prefix: str) -> str:
    path = uri[len(prefix) :]
    if not path.startswith("/"):
        raise ConfigError([f"camera URI {uri} names no device; write v4l2:///dev/video0"])
    return path


# A user part may hold anything but blanks and quotes up to the last '@' of the token: passwords with '/', '#'
# or '@' in them are common and seldom escaped. Rather a host too many masked than a password shown.
_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^\s\"'<>/?#]*(?::[^\s\"'<>]*)?@)")
_MASKED = (
    *("token", "key", "password", "passwd", "pass", "pwd", "secret", "sig", "signature"),
    *("auth", "credential", "credentials", "user", "username", "login", "usr"),
)
_QUERY = re.compile(rf"(?i)(?P<name>\b[\w.-]*(?:{'|'.join(_MASKED)}))=(?P<value>[^&\s\"'<>;,]+)")
_HEADER = re.compile(r"(?i)\b(?P<kind>Bearer|Basic|Digest|SharedAccessSignature)\s+(?P<value>[^\s\"'<>]+)")


def redact(text: str) -> str:
    """The text with user names and passwords of URIs, secret query values and tokens replaced by ``***``."""
    text = _USER.sub(lambda m: f"{m['scheme']}***@", text)
    text = _HEADER.sub(lambda m: f"{m['kind']} ***", text)
    return _QUERY.sub(lambda m: f"{m['name']}=***", text)
