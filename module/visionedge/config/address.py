"""Addresses of models: what they may look like, and what a model from there is called."""

import re
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from visionedge.runtime.redaction import ESCAPES, masked_address

_LONGEST_NAME = 64
_SHOWN_CHARS = 200


def check_address(url: str, *, insecure: bool) -> None:
    """Refuse what no model can be fetched from; `insecure` lets http: and file: pass. Nothing is opened.

    Raises:
        ValueError: with what is wrong, secrets masked.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port raises where it is no number
    except ValueError:  # its text quotes the address
        raise ValueError(f"cannot be read as an address; in a user name or password {ESCAPES}") from None
    if any(ord(character) <= 32 for character in url):
        raise ValueError("has blanks in it; write %20 for a blank")
    if parts.scheme in ("http", "file") and not insecure:
        raise ValueError(
            f"{parts.scheme}: is not safe, give an https:// address; "
            "'model.allowInsecure: true' in the local file allows it"
        )
    if parts.scheme not in ("https", "http", "file"):
        raise ValueError("must be an https:// address of an ONNX file")
    if parts.scheme == "file":
        if host not in (None, "localhost") or not parts.path.startswith("/"):
            raise ValueError("a file on this machine is written file:///folder/model.onnx")
    elif not host:
        raise ValueError("names no host")


def local_path(url: str) -> str:
    """The path that a file: address names."""
    return url2pathname(urlsplit(url).path)


def model_name(url: str) -> str:
    """What the model is called in frames and status: its file's name without the ending."""
    last = unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2].removesuffix(".onnx")
    return re.sub(r"[^\w.+-]+", "-", last)[:_LONGEST_NAME].strip("-.") or "model"


def shown(url: str) -> str:
    """The address for people: not what is secret in it, neither the query, and not without end."""
    plain, query, _ = url.partition("?")
    text = masked_address(plain) + ("?…" if query else "")
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
