"""URIs of cameras: what they may look like, and how a text is made safe to show (`redact`)."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal
from urllib.parse import quote, quote_plus, unquote, urlsplit

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
_SECRET_KEY = re.compile(rf"(?i)[\w.-]*(?:{'|'.join(_MASKED)})")
# A name is looked at from its beginning only: from each of its parts it would take minutes in a long text.
_QUERY = re.compile(rf"(?i)(?P<name>(?<![\w.-])[\w.-]*(?:{'|'.join(_MASKED)}))=(?P<value>[^&\s\"'<>;,]+)")
_HEADER = re.compile(r"(?i)\b(?P<kind>Bearer|Basic|Digest|SharedAccessSignature)\s+(?P<value>[^\s\"'<>]+)")


def redact(text: str) -> str:
    """The text without secrets: those that were kept (`keep_secret`), and whatever looks like one.

    That is user names and passwords of URIs, secret query values and tokens; all become ``***``.
    """
    text = _known.mask(text)
    text = _USER.sub(lambda m: f"{m['scheme']}***@", text)
    text = _HEADER.sub(lambda m: f"{m['kind']} ***", text)
    return _QUERY.sub(lambda m: f"{m['name']}=***", text)


class KnownSecrets:
    """Secrets to be masked wherever they appear, also far from any URI and in another escaping.

    One of six characters or more is masked inside words, too; of three to five only as a word of its own; a
    shorter one cannot be told from ordinary text and is masked only where the patterns see it.
    """

    def __init__(self, limit: int = 1_000) -> None:
        self._limit = limit
        self._kept: dict[str, None] = {}
        self._pattern: re.Pattern[str] | None = None

    def __repr__(self) -> str:
        return f"<KnownSecrets {len(self._kept)}>"

    def keep(self, secrets: Iterable[str]) -> None:
        """Mask these from now on; the oldest of very many are forgotten."""
        fresh = dict.fromkeys(secret for secret in secrets if len(secret) >= 3)
        if fresh.keys() <= self._kept.keys():
            return
        kept = [*self._kept, *(secret for secret in fresh if secret not in self._kept)][-self._limit :]
        forms = {form for secret in kept for form in _forms(secret)}
        # The longest first: one secret may be the beginning of another.
        choices = "|".join(_choice(form) for form in sorted(forms, key=len, reverse=True))
        self._kept, self._pattern = dict.fromkeys(kept), re.compile(choices)

    def mask(self, text: str) -> str:
        """The text with the known secrets masked."""
        pattern = self._pattern
        return text if pattern is None else pattern.sub("***", text)


# One for the process: texts are masked at every edge of it, in log handlers and threads of libraries as well,
# where nobody could hand it in.
_known = KnownSecrets()


def keep_secret(secrets: Iterable[str]) -> None:
    """Have `redact` mask these wherever they appear."""
    _known.keep(secrets)


def secrets_in(document: object) -> set[str]:
    """The secrets that a document or a list of arguments holds, found by their places.

    What is also a key of the document, such as the name of a camera, is no secret: masking it would leave
    nothing readable.
    """
    found, keys = set[str](), set[str]()
    _gather(document, "", found, keys)
    return found - keys


def _gather(value: object, key: str, found: set[str], keys: set[str]) -> None:
    match value:
        case str():
            found |= _secrets_of_text(value)
            if _SECRET_KEY.fullmatch(key):
                found.add(value)
        case Mapping():
            for name, item in value.items():
                keys.add(str(name))
                _gather(str(name), "", found, keys)
                _gather(item, str(name), found, keys)
        case list() | tuple():
            for item in value:
                _gather(item, key, found, keys)
        case int() | float() if _SECRET_KEY.fullmatch(key) and not isinstance(value, bool):
            found.add(str(value))


def _secrets_of_text(text: str) -> set[str]:
    found = set()
    for match in _USER.finditer(text):
        user, _, password = match["user"].removesuffix("@").partition(":")
        found |= {user, password}
    found |= {match["value"] for match in _HEADER.finditer(text)}
    found |= {match["value"] for match in _QUERY.finditer(text)}
    return found


def _forms(secret: str) -> set[str]:
    """How a secret may be spelt: as it is, percent-decoded and -encoded, and inside JSON or Python texts."""
    plain = unquote(secret)
    # JSON can hold half a character, which no text on the wire can.
    percent = partial(quote, plain, errors="surrogatepass")
    forms = {secret, plain, percent(), percent(safe=""), quote_plus(plain, errors="surrogatepass")}
    forms |= {json.dumps(form)[1:-1] for form in (secret, plain)} | {repr(plain)[1:-1]}
    return {form for form in forms if len(form) >= 3}


def _choice(form: str) -> str:
    exact = re.escape(form)
    return exact if len(form) >= 6 else rf"(?<![A-Za-z0-9]){exact}(?![A-Za-z0-9])"
