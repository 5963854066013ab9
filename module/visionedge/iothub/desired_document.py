"""The desired document: what the twin wants of the configuration, and the acknowledgement that answers it.
Pure.

A document with any problem is not used at all: the configuration before stays in force. The acknowledgement
has an entry for each top-level key (section): `applied` if that section is in force as desired, else
`rejected` with the reasons.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from visionedge.config.documents import Document
from visionedge.config.load import merge
from visionedge.config.schema import Config
from visionedge.runtime.redaction import redact

MAX_ACKNOWLEDGEMENT_BYTES = 10_000
"""A third of the limit of a twin. Reasons that do not fit are in the event `config-rejected`."""

_MAX_SECTIONS = 24
_MAX_REASON_CHARACTERS = 300
_MAX_KEY_CHARACTERS = 128
_MORE_BYTES = 80
_FORBIDDEN = frozenset(".$# ")
_SECTIONS = frozenset(map(to_camel, Config.model_fields))


@dataclass(frozen=True, slots=True)
class DesiredDocument:
    """Desired properties at one version, without what the hub adds to them (`$version`, `$metadata`)."""

    version: int
    document: Document


RejectionReasons = Mapping[str, Sequence[str]]
"""The reasons by section; the empty name has reasons that belong to no section in particular."""


def read_desired_document(twin: Mapping[str, Any]) -> DesiredDocument | None:
    """The desired document of a twin; None if its desired half cannot be read."""
    desired = twin.get("desired")
    if not isinstance(desired, Mapping):
        return None
    version = desired.get("$version")
    is_number = isinstance(version, int) and not isinstance(version, bool)
    document = {str(key): value for key, value in desired.items() if not str(key).startswith("$")}
    return DesiredDocument(version if is_number else 0, document)  # type: ignore[arg-type]  # an int, as checked above


def overlay_desired(local: Mapping[str, Any], desired: Mapping[str, Any]) -> Document:
    """Merge the desired document over the local one, key by key.

    A model has either a path or a URL: the desired one replaces the other one of the local document.
    """
    below, over = local.get("model"), desired.get("model")
    if isinstance(below, Mapping) and isinstance(over, Mapping):
        other = ("path",) if "url" in over else ("url", "sha256") if "path" in over else ()
        local = {**local, "model": {key: value for key, value in below.items() if key not in other}}
    return merge(local, desired)


def group_problems_by_section(desired: DesiredDocument, problems: Sequence[str]) -> dict[str, list[str]]:
    """Group the problems of a `ConfigError` by section."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(_section(desired, problem), []).append(problem)
    return found


def compute_effective_document(
    desired: DesiredDocument, before: Mapping[str, Any], rejected: RejectionReasons
) -> Document:
    """The desired document in force: rejected sections stay as they were `before`."""
    taken = {key: value for key, value in desired.document.items() if key not in rejected}
    return {**taken, **{key: before[key] for key in rejected if key in before}}


def build_acknowledgement(
    desired: DesiredDocument, rejected: RejectionReasons, effective: Mapping[str, Any], *, kept: bool = True
) -> Document:
    """The reported property `config`; `effective` is the desired document that is in force now.

    `kept=False`: the document is not on disk yet, so a kill of the module would lose it.
    """
    # Also acknowledge required sections that were removed from the desired properties.
    keys = {*desired.document, *(key for key in rejected if key)}
    reported = {key: _reasons(key, desired, rejected, effective) for key in sorted(keys, key=_sort_key)}
    first = dict(list(reported.items())[:_MAX_SECTIONS])
    if len(first) < len(reported):
        first["_more"] = [f"{len(reported) - len(first)} more keys; see the event config-rejected"]
    cut = _limit_reasons(
        first, MAX_ACKNOWLEDGEMENT_BYTES - sum(len(_sanitize_key(key)) + _MORE_BYTES for key in first)
    )
    return {_sanitize_key(key): _entry(desired.version, reasons, kept=kept) for key, reasons in cut.items()}


def _entry(version: int, reasons: Sequence[str], *, kept: bool) -> Document:
    if not reasons:
        return {"status": "applied", "version": version, **({} if kept else {"kept": False})}
    return {"status": "rejected", "version": version, "reasons": list(reasons)}


def _reasons(
    key: str, desired: DesiredDocument, rejected: RejectionReasons, effective: Mapping[str, Any]
) -> list[str]:
    """Why a section is not in force; empty if it is."""
    own = list(rejected.get(key, ()))
    if own:
        return own
    if key in effective and effective[key] == desired.document[key]:
        return []
    wrong = ", ".join(sorted(_sanitize_key(name) for name in rejected if name))
    return [*rejected.get("", ()), *([f"not applied because of problems in {wrong}"] if wrong else [])]


def _section(desired: DesiredDocument, problem: str) -> str:
    """The section whose name begins the line of a problem; empty if there is none."""
    named = [key for key in desired.document if problem.startswith((f"{redact(key)}.", f"{redact(key)}:"))]
    return max(named, key=len, default="")


def _sort_key(key: str) -> tuple[bool, str]:
    """Known sections come before unknown ones."""
    return key not in _SECTIONS, key


def _sanitize_key(section: str) -> str:
    """The name of a section as a key that edgeHub accepts."""
    plain = (c if c.isprintable() and c not in _FORBIDDEN else "_" for c in redact(section))
    return "".join(plain)[:_MAX_KEY_CHARACTERS] or "_"


def _limit_reasons(reported: Mapping[str, Sequence[str]], left_bytes: int) -> dict[str, list[str]]:
    """Keep as many reasons as fit, one of each section in turn, and count the rest."""
    kept: dict[str, list[str]] = {key: [] for key in reported}
    for turn in range(max(map(len, reported.values()), default=0)):
        for key, reasons in reported.items():
            # After one reason that does not fit, no further reasons of this section are added.
            if turn != len(kept[key]) or turn >= len(reasons):
                continue
            text = _shortened(reasons[turn])
            size = len(json.dumps(text)) + 1
            if size <= left_bytes:
                kept[key].append(text)
                left_bytes -= size
    for key, reasons in reported.items():
        if missing := len(reasons) - len(kept[key]):
            kept[key].append(f"and {missing} more; see the event config-rejected")
    return kept


def _shortened(reason: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in redact(reason))
    return text if len(text) <= _MAX_REASON_CHARACTERS else f"{text[:_MAX_REASON_CHARACTERS]}…"
