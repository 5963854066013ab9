"""URIs of cameras and addresses of models: which forms they may have, and the parts that the code needs."""

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from visionedge.errors import ConfigError
from visionedge.runtime.redaction import ESCAPE_HINT, HOST_PATTERN, AddressParts, mask_address

CameraKind = Literal["rtsp", "http", "file", "folder", "v4l2", "demo"]

_KIND_BY_SCHEME: dict[str, CameraKind] = {
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "http": "http",
    "https": "http",
    "v4l2": "v4l2",
    "file": "file",
    "demo": "demo",
}
URI_FORMS = "rtsp://, rtsps://, http(s)://, a file, a folder of pictures, v4l2:///dev/video0 or demo:"
"""The forms of a camera URI, for messages."""

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*):(//)?")

_REMOTE_PORTS = {"https": 443, "http": 80, "grpcs": 443, "grpc": 8001}

_MAX_NAME_CHARACTERS = 64
_MAX_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class CameraUri:
    """A parsed camera URI: its kind, and the address that the decoder opens (`target`, with secrets)."""

    kind: CameraKind
    target: str

    def __str__(self) -> str:
        return mask_address(self.target)

    def __repr__(self) -> str:
        return f"CameraUri({self.kind!r}, {mask_address(self.target)!r})"


def parse_camera_uri(uri: str) -> CameraUri:
    """Parse a camera URI; nothing is opened. Spaces around it are ignored.

    Raises:
        ConfigError: the scheme is unknown, or the host or path is missing or cannot be read. The message
            has no part of a user name or password.
    """
    uri = uri.strip()
    if not uri:
        raise ConfigError([f"the camera URI is empty; give {URI_FORMS}"])
    found = _SCHEME.match(uri)
    # One letter before a colon is a Windows drive, not a scheme.
    if found is None or len(found[1]) == 1:
        return _local_uri(uri)
    scheme = found[1].lower()
    kind = _KIND_BY_SCHEME.get(scheme)
    if kind is None:
        if os.path.exists(uri):  # noqa: PTH110 - unlike Path's, it answers False to impossible names
            return _local_uri(uri)
        raise ConfigError(
            [f"unknown scheme '{found[1]}:' in camera URI {mask_address(uri)}; give {URI_FORMS}"]
        )
    rest = uri[len(found[0]) :]
    if kind in ("rtsp", "http"):
        return CameraUri(kind, f"{scheme}://{_normalise_network_address(rest)}")
    if kind == "v4l2":
        return CameraUri(kind, _device_path(uri, rest))
    if kind == "file":
        return _local_uri(_file_path(rest) if found[2] else rest)
    return CameraUri(kind, f"{scheme}:{rest}")


def _local_uri(path: str) -> CameraUri:
    # A name that is too long, or in a folder that cannot be read, is reported when it is opened.
    return CameraUri("folder" if os.path.isdir(path) else "file", path)  # noqa: PTH112 - as above, False and no error


def _file_path(rest: str) -> str:
    """The decoded path of a file address without a host, or with localhost."""
    return unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)


def _normalise_network_address(rest: str) -> str:
    """The part after the scheme in FFmpeg's form: a colon after the user name, a bare '%' in an IPv6 zone."""
    parts = AddressParts.parse(rest)
    if any(character in rest for character in "\r\n\0"):
        raise ConfigError(["the camera URI has a line break; write the address in one line"])
    if parts.is_ambiguous or (parts.user is not None and any(character in parts.user for character in "[]")):
        reason = "the user name or password in the camera URI has '#', '/', '?', '[' or ']' (or its path '@')"
        raise ConfigError([f"{reason}; {ESCAPE_HINT}"])
    host, port = _host_and_port(parts.host)
    user = "" if parts.user is None else parts.user if ":" in parts.user else f"{parts.user}:"
    return f"{user}{'' if parts.user is None else '@'}{host}{port}{parts.tail}"


def _host_and_port(text: str) -> tuple[str, str]:
    """The host of an address and ``:PORT`` (or nothing)."""
    found = HOST_PATTERN.fullmatch(text)
    if found is None or int(found["port"] or 0) > 65535:
        # Not shown: if the '@' was forgotten, the text after the colon is a password.
        raise ConfigError(
            ["the host or the port in the camera URI cannot be read; write HOST, HOST:PORT or [IPV6]:PORT"]
        )
    host = found["host"]
    if not host:
        raise ConfigError(["the camera URI has no host"])
    if host.startswith("["):
        host = host.replace("%25", "%")
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ConfigError(["the brackets in the camera URI do not hold an IPv6 address"]) from None
    return host, f":{found['port']}" if found["port"] else ""


def _device_path(uri: str, path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError([f"camera URI {mask_address(uri)} has no device; write v4l2:///dev/video0"])
    return path


def check_model_url(url: str, *, insecure: bool) -> None:
    """Check an address of a model; `insecure` allows http: and file:. Nothing is opened.

    Raises:
        ValueError: the reason why no model can be downloaded from it, with secrets masked.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port raises if it is not a number
    except ValueError:  # its message quotes the address
        raise ValueError(f"cannot be read as an address; in a user name or password {ESCAPE_HINT}") from None
    if any(ord(character) <= 32 for character in url):
        raise ValueError("has spaces in it; write %20 for a space")
    if parts.scheme in ("http", "file") and not insecure:
        raise ValueError(
            f"{parts.scheme}: is not secure, give an https:// address; "
            "'allowInsecure: true' beside it in the local file allows it"
        )
    if parts.scheme not in ("https", "http", "file"):
        raise ValueError("must be an https:// address of an ONNX file")
    if parts.scheme == "file":
        if host not in (None, "localhost") or not parts.path.startswith("/"):
            raise ValueError("a file on this machine is written file:///folder/model.onnx")
    elif not host:
        raise ValueError("has no host")


def check_remote_url(url: str, *, insecure: bool) -> None:
    """Check the address of an inference server; `insecure` allows http: and grpc:. Nothing is opened.

    Raises:
        ValueError: the reason why it cannot be used, without a part of a user name or password.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port raises if it is not a number
    except ValueError:  # its message quotes the address
        raise ValueError("cannot be read as an address; write https://HOST:PORT") from None
    if any(ord(character) <= 32 for character in url):
        raise ValueError("has spaces in it")
    if parts.scheme not in _REMOTE_PORTS:
        raise ValueError("must be an https:// or grpcs:// address")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must have no user name, query or fragment; give a token in VISIONEDGE_REMOTE_TOKEN")
    if not host:
        raise ValueError("has no host")
    if parts.scheme.startswith("grpc") and parts.path.strip("/"):
        raise ValueError("gRPC has no path: write grpcs://HOST:PORT")
    if parts.scheme in ("http", "grpc") and not insecure:
        raise ValueError(
            f"{parts.scheme}: does not encrypt pictures; use {parts.scheme}s://, or allow it with"
            " 'inference.remote.insecure: true'"
        )


def remote_host_and_port(url: str) -> tuple[str, int]:
    """Host and port of an address that `check_remote_url` accepts."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or _REMOTE_PORTS[parts.scheme]


def file_url_to_path(url: str) -> str:
    """The path in a file: address."""
    return url2pathname(urlsplit(url).path)


def model_name_from_url(url: str) -> str:
    """The name of a model in frames and status: its file name without the suffix."""
    last = unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2].removesuffix(".onnx")
    return re.sub(r"[^\w.+-]+", "-", last)[:_MAX_NAME_CHARACTERS].strip("-.") or "model"


def format_url(url: str) -> str:
    """The address for messages: without secrets and query, and at most 200 characters."""
    plain, query, _ = url.partition("?")
    text = mask_address(plain) + ("?…" if query else "")
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 1]}…"
