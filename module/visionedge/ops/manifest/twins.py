"""What is true of every twin: the limits of IoT Hub and edgeHub, placeholders, and secrets in templates."""

import json
import math
import unicodedata
from collections.abc import Iterator

from visionedge.config.documents import Document
from visionedge.ops.manifest.document import AGENT, HUB, Manifest
from visionedge.ops.manifest.findings import Findings
from visionedge.ops.manifest.options import is_options
from visionedge.ops.manifest.place import MAX_TEXT_BYTES, Place
from visionedge.ops.manifest.placeholders import has_placeholder, names_in
from visionedge.runtime.redaction import secrets_in

MAX_TWIN_BYTES = 32_768
MAX_LEVELS = 10
MAX_KEY_BYTES = 1024
MAX_INTEGER = 2**52 - 1
_FORBIDDEN = frozenset(".$# ")
_NUMBER_BYTES = 8
_TRUTH_BYTES = 4


def check_twins(manifest: Manifest, names: frozenset[str], findings: Findings) -> None:
    """Judge the desired properties of each module as a twin; `names` are the modules that there are."""
    for module, twin in manifest.twins.items():
        if module not in names and module not in (AGENT, HUB) and not manifest.layered:
            remedy = "name a module that runs, or leave it out"
            findings.warning(twin, "are wished of a module that $edgeAgent does not run", remedy)
        size_bytes = _size(twin, 0, manifest.template, findings)
        if size_bytes > MAX_TWIN_BYTES:
            remedy = f"IoT Hub takes {MAX_TWIN_BYTES}; keep what is large elsewhere"
            findings.error(twin, f"are {size_bytes} bytes of keys and values", remedy)
    for place in manifest.content.walk():
        if not manifest.template and (names_ := names_in(place.text)):
            remedy = "fill it in, as the tools of IoT Edge and `visionedge manifest generate` do"
            findings.error(place, f"holds the placeholder {names_[0]}", remedy)
    if manifest.template:
        _secrets(manifest, findings)


def _size(place: Place, level: int, template: bool, findings: Findings) -> int:
    """The bytes that IoT Hub counts, everything below a place judged on the way."""
    value = place.value
    if level > MAX_LEVELS:
        findings.error(place, f"lies deeper than {MAX_LEVELS} levels", "make the document flatter")
        return 0
    if isinstance(value, tuple):
        for item in place.items:
            if item.value is None:
                findings.error(item, "is null in a list, which no twin can hold", "leave it out")
        return sum(_size(item, level + 1, template, findings) for item in place.items)
    if place.entries:
        return sum(_entry(key, item, level + 1, template, findings) for key, item in place.entries.items())
    return _scalar(place, findings)


def _entry(key: str, item: Place, level: int, template: bool, findings: Findings) -> int:
    key_bytes = len(key.encode(errors="surrogatepass"))
    if key_bytes > MAX_KEY_BYTES:
        findings.error(item, f"has a name of {key_bytes} bytes", f"a twin takes {MAX_KEY_BYTES}")
    if any(c in _FORBIDDEN or unicodedata.category(c) == "Cc" for c in key):
        findings.error(item, "has a name that no twin can hold", "write it without '.', '$', '#' and blanks")
    if template and is_options(key) and item.entries:
        return key_bytes + len(json.dumps(item.plain(), separators=(",", ":")))
    return key_bytes + _size(item, level, template, findings)


def _scalar(place: Place, findings: Findings) -> int:
    value = place.value
    match value:
        case bool():
            return _TRUTH_BYTES
        case int():
            if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
                findings.error(place, "is a number beyond 52 bits", "no twin can hold it")
            return _NUMBER_BYTES
        case float():
            if not math.isfinite(value):
                findings.error(place, "is a number that nothing can hold", "write a smaller one")
            return _NUMBER_BYTES
        case str():
            size_bytes = len(value.encode(errors="surrogatepass"))
            if size_bytes > MAX_TEXT_BYTES:
                findings.error(place, f"is a text of {size_bytes} bytes", _shorter(place))
            return size_bytes
        case _:
            return 0


def _shorter(place: Place) -> str:
    if is_options(place.path.rpartition(".")[2]):
        return "cut it into createOptions, createOptions01 … of 512 characters"
    return f"IoT Hub takes {MAX_TEXT_BYTES} in one"


def _secrets(manifest: Manifest, findings: Findings) -> None:
    for key, place in _texts(manifest.content):
        document: Document = {key: place.plain()}
        if any(not has_placeholder(secret) for secret in secrets_in(document)):
            remedy = "put ${NAME} in its place: templates are kept and shared, manifests are made of them"
            findings.warning(place, "is, or holds, a secret in plain text", remedy)


def _texts(place: Place, key: str = "") -> Iterator[tuple[str, Place]]:
    """The texts below a place, each with the key that it stands at."""
    if place.text:
        yield key, place
    for name, item in place.entries.items():
        yield from _texts(item, name)
    for item in place.items:
        yield from _texts(item, key)
