"""URIs of cameras: what they may look like, and how a text is made safe to show (`redact`)."""

import base64
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from visionedge.runtime.vocabulary import OWN_WORDS

ESCAPES = "write %23 for '#', %2F for '/', %3F for '?', %40 for '@', %5B for '[' and %5D for ']'"
"""The remedy for such characters in a user name or password."""


# --- addresses, by their structure -------------------------------------------------------------------------

_MASK = "***"
_SEPARATOR = re.compile(r"[/?#]")
_HOST = re.compile(r"(?P<host>\[[^\[\]@]*\]|[^\[\]@:]*)(?::(?P<port>[0-9]{0,5}))?")
_PATH_VALUE = re.compile(r"(=|%3[dD])[^/]+")
_LONGEST_NAME = 64
# The placeholders of our own hints.
_HINTS = frozenset({"USER:PASSWORD", "HOST:PORT", "…", ""})


@dataclass(frozen=True, slots=True)
class _Parts:
    """What follows the ``://`` of an address, by its separators alone, so that nothing in it makes this fail.

    `raw`: the user name or password seems to hold a separator that is not escaped.
    """

    user: str | None
    host: str
    tail: str
    raw: bool = False

    @staticmethod
    def of(rest: str) -> "_Parts":
        found = _SEPARATOR.search(rest)
        end = len(rest) if found is None else found.start()
        authority, tail = rest[:end], rest[end:]
        user, at, host = authority.rpartition("@")
        # An '@' further on belongs to a path or query, unless what is before it can be a user name and a
        # password with a '/', '?' or '#' in it. Rather a host too many is masked than a password shown.
        if "@" not in tail or _is_host(host, dotted=not at):
            return _Parts(user if at else None, host, tail)
        user, _, behind = rest.rpartition("@")
        found = _SEPARATOR.search(behind)
        end = len(behind) if found is None else found.start()
        return _Parts(user, behind[:end], behind[end:], raw=True)


def _is_host(text: str, *, dotted: bool) -> bool:
    """Whether this can only be a host: an IP address, 'localhost', or where `dotted` a name with a dot."""
    found = _HOST.fullmatch(text)
    if found is None:
        return False
    host: str = found["host"]
    if host.startswith("[") or host == "localhost" or (dotted and found["port"] is None and "." in host):
        return True
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def masked_address(uri: str) -> str:
    """An address that may be shown: no user name, no password, and no value of its query or path.

    The whole text is one address, so its user name and password may hold blanks and quotes.
    """
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{_masked_rest(rest)}" if separator else _PAIR.sub(_masked_pair, uri)


def _masked_rest(rest: str) -> str:
    """What follows a ``://``, masked; further addresses in its path, too."""
    shown = []
    while True:
        parts = _Parts.of(rest)
        path, nested, behind = parts.tail.partition("://")
        whole = not nested or "?" in path or "#" in path
        shown += [_masked_authority(parts), _masked_tail(parts.tail if whole else path)]
        if whole:
            return "".join(shown)
        shown.append(nested)
        rest = behind


def _masked_authority(parts: _Parts) -> str:
    if parts.raw and "?" in (parts.user or ""):
        return _MASK  # the host may be the end of a query value
    if _HOST.fullmatch(parts.host) is None and parts.host not in _HINTS:
        return _MASK  # without its '@', a user name and a password look like a host and a port
    return (
        parts.host if parts.user is None else f"{parts.user if parts.user in _HINTS else _MASK}@{parts.host}"
    )


def _masked_tail(tail: str) -> str:
    tail, sharp, fragment = tail.partition("#")
    path, mark, query = tail.partition("?")
    path = _PATH_VALUE.sub(rf"\1{_MASK}", path)
    query = "&".join(_masked_chunk(chunk) for chunk in query.split("&"))
    return f"{path}{mark}{query}{sharp}{_MASK if fragment else ''}"


def _masked_chunk(chunk: str) -> str:
    name, equals, _ = chunk.partition("=")
    if not equals or "%3d" in name.lower() or len(name) > _LONGEST_NAME:
        return chunk if chunk in _HINTS else _MASK
    return f"{name}={_MASK}"


# --- texts -------------------------------------------------------------------------------------------------

TEXT_CHARACTERS = 8192
"""A longer text is cut before it is masked."""

_KEPT_CHARACTERS = 4096
# Whatever lies across the end of a text that is cut is shorter, or is masked up to that end.
_MARGIN_CHARACTERS = 1024
_MOST_PASSES = 8

# Each pattern begins with fixed text, and no unbounded run is tried twice: masking is linear in the text.
_ADDRESS = re.compile(r"://([^\s\"'<>]+)")
_END_OF_SENTENCE = ".,:;)"
_HEADER = re.compile(
    r"(?i)\b((?:(?:Bearer|Basic|Digest|SharedAccessSignature)[ \t]{1,8}){1,16})([^\s\"'<>]+)"
)
_HEADER_WORDS = ("bearer", "basic", "digest", "sharedaccesssignature")
_MASKED = (
    *("token", "key", "password", "passwd", "pass", "pwd", "psw", "secret", "sig", "signature"),
    *("auth", "credential", "credentials", "user", "username", "login", "usr", "loginuse", "loginpas"),
    *("passphrase", "jwt", "sessionid", "response", "sas"),
)
_NAMES = "|".join(sorted(_MASKED, key=len, reverse=True))
_SECRET_KEY = re.compile(rf"(?i)[\w.-]*(?:{_NAMES})")
_PAIR = re.compile(
    rf"(?i)((?:{_NAMES})(?:\[\w{{0,16}}\])?(?:=|%3D))"
    r"(\"[^\"]{1,256}\"|'[^']{1,256}'|[^&\s\"'<>]+)"
)


def redact(text: str) -> str:
    """A text without secrets, for logs, errors and answers; a very long one is cut, and says so.

    Masked as ``***`` are user names, passwords and query values of addresses, tokens and values of pairs
    such as ``password=…`` by their place, and what was kept (`keep_secret`) by its value. To redact a text
    again changes nothing.
    """
    shown = _cut(text) if len(text) > TEXT_CHARACTERS else _masked(text)
    while len(shown) > TEXT_CHARACTERS:  # masks can be longer than what they hide
        shown = _cut(shown)
    return shown


def _cut(text: str) -> str:
    shown = _masked(text[: _KEPT_CHARACTERS + _MARGIN_CHARACTERS])
    # The end may be the beginning of something that could not be recognised.
    kept = shown[: max(0, min(_KEPT_CHARACTERS, len(shown) - _MARGIN_CHARACTERS))]
    return _masked(f"{kept} … (cut, {len(text)} characters)")


def _masked(text: str) -> str:
    for _ in range(_MOST_PASSES):
        shown = _ADDRESS.sub(_masked_url, _known.mask(text))
        # Most texts hold neither, and to look for a word costs a tenth of trying a pattern.
        if any(word in shown.lower() for word in _HEADER_WORDS):
            shown = _HEADER.sub(_masked_header, shown)
        if "=" in shown or "%3" in shown:
            shown = _PAIR.sub(_masked_pair, shown)
        if shown == text:
            break
        text = shown
    return text


def _masked_url(found: re.Match[str]) -> str:
    rest = found[1].rstrip(_END_OF_SENTENCE)
    return f"://{_masked_rest(rest)}{found[1][len(rest) :]}"


def _masked_header(found: re.Match[str]) -> str:
    value = found[2].rstrip(_END_OF_SENTENCE)
    # "Bearer TOKEN" of a hint and "Basic challenge" of a sentence hold no secret.
    if value in _HINTS or value.casefold() in OWN_WORDS:
        return found[0]
    return f"{found[1]}{_MASK}{found[2][len(value) :]}"


def _masked_pair(found: re.Match[str]) -> str:
    if found[2][0] in "\"'":
        return f"{found[1]}{found[2][0]}{_MASK}{found[2][0]}"
    value = found[2].rstrip(_END_OF_SENTENCE)
    return f"{found[1]}{_MASK if value else ''}{found[2][len(value) :]}"


# The keys of documents whose values are sentences, of ours and of others. Names, states, codes, labels and
# devices are words of our own and stay as they are.
_FREE_TEXTS = frozenset(
    {
        *("reason", "reasons", "lastError", "message", "error", "sentence", "notes", "note", "problems"),
        *("found", "say", "lines", "words", "detail", "text", "why", "fetching", "remedy", "down"),
    }
)
_ADDRESSES = frozenset({"uri", "url"})


def redact_document(document: Any, key: str = "") -> Any:
    """A JSON value with its addresses masked and its sentences redacted, known by the keys that hold them."""
    if isinstance(document, str):
        if key in _ADDRESSES:
            return masked_address(document)
        return redact(document) if key in _FREE_TEXTS else document
    if isinstance(document, Mapping):
        return {name: redact_document(item, str(name)) for name, item in document.items()}
    if isinstance(document, list | tuple):
        return [redact_document(item, key) for item in document]
    return document


# --- known secrets -----------------------------------------------------------------------------------------

_LEAST_CHARACTERS, _MOST_CHARACTERS = 3, 4096
_LONG_CHARACTERS = 6
_SHORT_NUMBER = re.compile(r"[0-9]{1,3}")


class KnownSecrets:
    """Secrets to be masked wherever they appear, also far from any URI and in another escaping.

    One of six characters or more is masked inside words, too; of three to five only as a word of its own; a
    shorter one cannot be told from ordinary text and is masked only by its place. So is a word of our own
    (`OWN_WORDS`): masked in our sentences, it would show which word the secret is.
    """

    def __init__(self, limit: int = 4_000) -> None:
        self._limit = limit
        self._kept: dict[str, frozenset[str]] = {}
        self._by_start: dict[str, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return f"<KnownSecrets {len(self._kept)}>"

    def keep(self, secrets: Iterable[str]) -> None:
        """Mask these from now on; the oldest of very many are forgotten."""
        new = [secret for secret in dict.fromkeys(secrets) if secret not in self._kept]
        fresh = [secret for secret in new if _can_be_found(secret)][-self._limit :]
        if not fresh:
            return
        kept = {**self._kept, **{secret: frozenset(_forms(secret)) for secret in fresh}}
        kept = dict([*kept.items()][-self._limit :])
        by_start: dict[str, set[str]] = {}
        for form in frozenset[str]().union(*kept.values()):
            by_start.setdefault(form[: _start_characters(form)], set()).add(form)
        # Replaced as a whole: other threads read it meanwhile.
        self._kept, self._by_start = kept, {start: tuple(forms) for start, forms in by_start.items()}

    def mask(self, text: str) -> str:
        """The text with the known secrets masked. The number of known secrets costs next to nothing."""
        by_start = self._by_start
        if not by_start:
            return text
        starts = {text[at : at + _LEAST_CHARACTERS] for at in range(len(text) - _LEAST_CHARACTERS + 1)}
        starts |= {text[at : at + _LONG_CHARACTERS] for at in range(len(text) - _LONG_CHARACTERS + 1)}
        found = [form for start in by_start.keys() & starts for form in by_start[start] if form in text]
        if not found:
            return text
        # The longest first: one secret may be the beginning of another.
        choices = "|".join(_choice(form) for form in sorted(found, key=lambda form: (-len(form), form)))
        return re.sub(choices, _MASK, text)


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


# How the command line names a camera.
_NAMED = re.compile(r"([a-z0-9_-]{1,64})=\w")


def _gather(value: object, key: str, found: set[str], keys: set[str]) -> None:
    match value:
        case str():
            found |= _secrets_of_text(value)
            keys |= {
                match[1] for match in [_NAMED.match(value)] if match and not _SECRET_KEY.fullmatch(match[1])
            }
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


# A text that is one address, with a name before it on the command line: what follows may hold blanks.
_WHOLE_ADDRESS = re.compile(r"\s*([\w-]{1,64}=)?[a-zA-Z][a-zA-Z0-9+.-]{0,31}://")


def _secrets_of_text(text: str) -> set[str]:
    """Those of a text that is an address, or that holds addresses, headers or pairs."""
    found = {match[2] for match in _HEADER.finditer(text)}
    pairs = {match[2].strip("\"'") for match in _PAIR.finditer(text)}
    # In a connection string the value ends before the ';'.
    found |= pairs | {re.split("[;,]", value, maxsplit=1)[0] for value in pairs}
    rests = [match[1] for match in _ADDRESS.finditer(text)]
    if whole := _WHOLE_ADDRESS.match(text):
        rests.append(text[whole.end() :])
    for rest in rests:
        found |= _secrets_of_address(rest)
    return found - {"", *_HINTS}


# Query values by these names choose a picture; masked in sentences, they would hide words and numbers.
_SETTINGS = re.compile(
    r"(?i)(channel|subtype|stream|streamtype|resolution|fps|framerate|width|height|quality|compression|codec|"
    r"videocodec|profile|transport|transportmode|unicast|proto|camera|cam|chn|rotation|sensor|media|video|audio|format)"
)


def _secrets_of_address(rest: str) -> set[str]:
    """User name, password and query values of what follows a ``://``."""
    parts = _Parts.of(rest)
    found = set[str]()
    if parts.user is not None and parts.user not in _HINTS:
        name, _, password = parts.user.partition(":")
        found |= {parts.user, name, password}
    query = parts.tail.partition("#")[0].partition("?")[2]
    for chunk in query.split("&"):
        name, equals, value = chunk.partition("=")
        if not equals:
            found.add(chunk)
        elif not _SETTINGS.fullmatch(name):
            found.add(value)
    return found


def _can_be_found(secret: str) -> bool:
    """Whether this can be searched for in sentences: see `KnownSecrets`."""
    if len(secret) > _MOST_CHARACTERS:
        return False
    plain = unquote(secret)
    short = len(plain) < _LEAST_CHARACTERS or _SHORT_NUMBER.fullmatch(plain)
    return not short and plain.casefold() not in OWN_WORDS and bool(plain.strip("*"))


def _forms(secret: str) -> set[str]:
    """How a secret may be spelt: as it is, percent-decoded and -encoded, and inside JSON or Python texts."""
    plain = unquote(secret)
    # JSON can hold half a character, which no text on the wire can.
    percent = partial(quote, plain, errors="surrogatepass")
    forms = {
        secret,
        plain,
        percent(),
        percent(safe=""),
        percent(safe=":"),
        quote_plus(plain, errors="surrogatepass"),
    }
    forms |= {quote(secret, errors="surrogatepass"), quote(secret, safe="", errors="surrogatepass")}
    for form in (secret, plain):
        forms |= {json.dumps(form, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
        forms.add(repr(form)[1:-1])
    if ":" in plain:  # a login, as HTTP sends it
        forms.add(base64.b64encode(plain.encode(errors="surrogatepass")).decode())
    return {form for form in forms if len(form) >= _LEAST_CHARACTERS}


def _start_characters(form: str) -> int:
    """How much of a form is looked up in a text, before the whole of it is searched for."""
    return _LONG_CHARACTERS if len(form) >= _LONG_CHARACTERS else _LEAST_CHARACTERS


def _choice(form: str) -> str:
    exact = re.escape(form)
    return exact if len(form) >= _LONG_CHARACTERS else rf"(?<![A-Za-z0-9]){exact}(?![A-Za-z0-9])"
