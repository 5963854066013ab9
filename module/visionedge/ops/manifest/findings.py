"""What lint found: one line each, and the readers that tell what has a wrong type."""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from visionedge.config.documents import kind_of
from visionedge.ops.manifest.place import Place, below
from visionedge.ops.manifest.placeholders import has_placeholder
from visionedge.runtime.redaction import redact

Severity = Literal["error", "warning"]

_LONG_WORD = re.compile(r"\S{301,}")


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem: where it is, what it is, and what to do about it. Secrets are masked, all is one line."""

    severity: Severity
    path: str
    problem: str
    remedy: str

    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self.path}: {self.problem}; {self.remedy}"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "severity": self.severity,
            "path": self.path,
            "problem": self.problem,
            "remedy": self.remedy,
        }


class Findings:
    """Gathers problems. Its readers give a value of the type that is wanted, or tell that it is another."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def __repr__(self) -> str:
        return f"<Findings {len(self._found)}>"

    def all(self) -> tuple[Finding, ...]:
        """Errors first, otherwise in the order in which they were found; none of them twice."""
        return tuple(sorted(self._found, key=lambda finding: finding.severity))

    def error(self, where: Place | str, problem: str, remedy: str) -> None:
        """What IoT Edge or the module will not take."""
        self._add("error", where, problem, remedy)

    def warning(self, where: Place | str, problem: str, remedy: str) -> None:
        """What will be taken, and is hardly what was meant."""
        self._add("warning", where, problem, remedy)

    def _add(self, severity: Severity, where: Place | str, problem: str, remedy: str) -> None:
        path = where.path if isinstance(where, Place) else where
        self._found[Finding(severity, one_line(path), one_line(problem), one_line(remedy))] = None

    def needed(self, parent: Place, key: str, remedy: str) -> Place | None:
        """What stands at a key; it is told when nothing does, unless the rest of `parent` is elsewhere."""
        found = parent.entries.get(key)
        if found is None and isinstance(parent.value, Mapping) and not parent.partial:
            self.error(below(parent.path, key), "is missing", remedy)
        return found

    def mapping(self, place: Place | None) -> Mapping[str, Place]:
        """The entries of what has to be an object."""
        if place is None:
            return {}
        if not isinstance(place.value, Mapping):
            self._wrong(place, "an object")
        for key in place.twice:
            self.error(below(place.path, key), "is given twice, and the last one wins", "keep one of them")
        return place.entries

    def items(self, place: Place | None) -> tuple[Place, ...]:
        """The items of what has to be a list."""
        if place is not None and not isinstance(place.value, tuple):
            self._wrong(place, "a list")
        return place.items if place is not None else ()

    def text(self, place: Place | None) -> str | None:
        """What has to be a text."""
        if place is None or isinstance(place.value, str):
            return None if place is None else place.text
        self._wrong(place, "a text")
        return None

    def choice(self, place: Place | None, choices: Collection[str]) -> str | None:
        """A text that has to be one of these."""
        text = self.text(place)
        if place is None or text is None or text in choices or has_placeholder(text):
            return text
        self.error(place, "is none of the values that IoT Edge knows", f"write {' or '.join(choices)}")
        return None

    def whole(self, place: Place | None, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        if place is None:
            return None
        value = place.value
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(place, "a whole number")
            return None
        if not least <= value <= most:
            self.error(place, "is out of range", f"write {least} to {most}")
            return None
        return value

    def known(self, place: Place | None, keys: Collection[str], reader: str) -> Mapping[str, Place]:
        """The entries of an object of which `reader` knows these keys only."""
        entries = self.mapping(place)
        for key, item in entries.items():
            if key not in keys:
                close = difflib.get_close_matches(key[:64], keys, n=1)
                remedy = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(keys)}"
                self.warning(item, f"{reader} knows no such key", remedy)
        return entries

    def _wrong(self, place: Place, wanted: str) -> None:
        kind = "an object" if isinstance(place.value, Mapping) else _kind(place.value)
        self.error(place, f"is {kind}", f"it has to be {wanted}")


def _kind(value: object) -> str:
    return "null" if value is None else kind_of(list(value) if isinstance(value, tuple) else value)


def one_line(text: str) -> str:
    """A text that breaks no line and no terminal, and holds no secret."""
    plain = "".join(c if c.isprintable() else " " for c in redact(text))
    return _LONG_WORD.sub(lambda word: f"{word[0][:120]}…{word[0][-40:]}", plain)
