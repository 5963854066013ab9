"""What doctor says about one thing: its state, what was found, and what to do about it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Document = dict[str, Any]


class State(StrEnum):
    """How a thing stands."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    BROKEN = "broken"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Remedy:
    """A sentence, and the lines to type or to put somewhere."""

    say: str
    lines: tuple[str, ...] = ()

    def document(self) -> Document:
        """As JSON."""
        return {"say": self.say, "lines": list(self.lines)}


Remedies = tuple[Remedy, ...]


def one(say: str, *lines: str) -> Remedies:
    """A single remedy."""
    return (Remedy(say, lines),)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `name` is for programs, `title` and `found` for people."""

    name: str
    title: str
    state: State
    found: str
    remedies: Remedies = ()

    def document(self) -> Document:
        """As JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "state": str(self.state),
            "found": self.found,
            "remedies": [remedy.document() for remedy in self.remedies],
        }


@dataclass(frozen=True, slots=True)
class Judged:
    """A finding before it has a name: what a check of a link gives."""

    state: State
    found: str
    remedies: Remedies = ()


def ok(found: str) -> Judged:
    """All is well."""
    return Judged(State.OK, found)


def info(found: str) -> Judged:
    """Neither good nor bad."""
    return Judged(State.INFO, found)


def warning(found: str, *remedies: Remedy) -> Judged:
    """It works, and yet."""
    return Judged(State.WARNING, found, remedies)


def broken(found: str, *remedies: Remedy) -> Judged:
    """It does not work."""
    return Judged(State.BROKEN, found, remedies)
