"""Desired properties: what they wish of the module, and the acknowledgement that answers them. Pure.

A document with any problem is not used at all: what was in force before goes on. The acknowledgement has an
entry for each top-level key of the wish: `applied` when that section is in force as it is wished, else
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
"""A third of what a twin takes; what is cut off stands in the event `config-rejected`."""

_MOST_SECTIONS = 24
_MOST_CHARACTERS = 300
_KEY_CHARACTERS = 128
_MORE_BYTES = 80
_FORBIDDEN = frozenset(".$# ")
_SECTIONS = frozenset(map(to_camel, Config.model_fields))


@dataclass(frozen=True, slots=True)
class Wish:
    """Desired properties at one version, without what the hub adds to them (`$version`, `$metadata`)."""

    version: int
    document: Document


Refusals = Mapping[str, Sequence[str]]
"""The reasons by section; those under an empty name belong to none in particular."""


def wish_of(twin: Mapping[str, Any]) -> Wish | None:
    """What a twin wishes; None where it has no desired half that can be read."""
    desired = twin.get("desired")
    if not isinstance(desired, Mapping):
        return None
    version = desired.get("$version")
    known = isinstance(version, int) and not isinstance(version, bool)
    document = {str(key): value for key, value in desired.items() if not str(key).startswith("$")}
    return Wish(version if known else 0, document)  # type: ignore[arg-type]  # an int, as was just seen


def overlaid(local: Mapping[str, Any], desired: Mapping[str, Any]) -> Document:
    """The desired document laid over the local one: key by key, but a model is one place or the other."""
    below, over = local.get("model"), desired.get("model")
    if isinstance(below, Mapping) and isinstance(over, Mapping):
        other = ("path",) if "url" in over else ("url", "sha256") if "path" in over else ()
        local = {**local, "model": {key: value for key, value in below.items() if key not in other}}
    return merge(local, desired)


def refusals(wish: Wish, problems: Sequence[str]) -> dict[str, list[str]]:
    """The problems of `config.validate` by the section that they are in."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(_section(wish, problem), []).append(problem)
    return found


def in_force(wish: Wish, before: Mapping[str, Any], refused: Refusals) -> Document:
    """The desired document in force after a wish of which some sections were refused."""
    taken = {key: value for key, value in wish.document.items() if key not in refused}
    return {**taken, **{key: before[key] for key in refused if key in before}}


def acknowledgement(
    wish: Wish, refused: Refusals, force: Mapping[str, Any], *, kept: bool = True
) -> Document:
    """The reported property `config`; `force` is the desired document that is in force now.

    Not `kept`: it is not on disk yet, and a kill would take it away.
    """
    # A section that was taken away, and that cannot be done without, has its say as well.
    keys = {*wish.document, *(key for key in refused if key)}
    told = {key: _reasons(key, wish, refused, force) for key in sorted(keys, key=_rank)}
    first = dict(list(told.items())[:_MOST_SECTIONS])
    if len(first) < len(told):
        more = f"{len(told) - len(first)} more keys; the event config-rejected has their problems"
        first["_more"] = [more]
    cut = _cut(first, MAX_ACKNOWLEDGEMENT_BYTES - sum(len(_key(key)) + _MORE_BYTES for key in first))
    return {_key(key): _entry(wish.version, reasons, kept=kept) for key, reasons in cut.items()}


def _entry(version: int, reasons: Sequence[str], *, kept: bool) -> Document:
    if not reasons:
        return {"status": "applied", "version": version, **({} if kept else {"kept": False})}
    return {"status": "rejected", "version": version, "reasons": list(reasons)}


def _reasons(key: str, wish: Wish, refused: Refusals, force: Mapping[str, Any]) -> list[str]:
    """Why a section is not in force; empty when it is."""
    own = list(refused.get(key, ()))
    if own:
        return own
    if key in force and force[key] == wish.document[key]:
        return []
    wrong = ", ".join(sorted(_key(name) for name in refused if name))
    return [*refused.get("", ()), *([f"not applied, because of what is wrong in {wrong}"] if wrong else [])]


def _section(wish: Wish, problem: str) -> str:
    """The section that a problem names in the beginning of its line; empty where none fits."""
    fitting = [key for key in wish.document if problem.startswith((f"{redact(key)}.", f"{redact(key)}:"))]
    return max(fitting, key=len, default="")


def _rank(key: str) -> tuple[bool, str]:
    """The sections that there are come first."""
    return key not in _SECTIONS, key


def _key(section: str) -> str:
    """A section's name as edgeHub takes it for a key."""
    plain = (c if c.isprintable() and c not in _FORBIDDEN else "_" for c in redact(section))
    return "".join(plain)[:_KEY_CHARACTERS] or "_"


def _cut(told: Mapping[str, Sequence[str]], left_bytes: int) -> dict[str, list[str]]:
    """As many reasons as fit, in turns, so that no section's hide those of another; the rest is counted."""
    kept: dict[str, list[str]] = {key: [] for key in told}
    for turn in range(max(map(len, told.values()), default=0)):
        for key, reasons in told.items():
            # One that was left out once stays the end of its list.
            if turn != len(kept[key]) or turn >= len(reasons):
                continue
            text = _shortened(reasons[turn])
            size = len(json.dumps(text)) + 1
            if size <= left_bytes:
                kept[key].append(text)
                left_bytes -= size
    for key, reasons in told.items():
        if missing := len(reasons) - len(kept[key]):
            kept[key].append(f"and {missing} more; the event config-rejected has them")
    return kept


def _shortened(reason: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in redact(reason))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
