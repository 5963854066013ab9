"""What doctor says about one thing: its state, what was found, and what to do about it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Document = dict[str, Any]


class CheckState(StrEnum):
    """How a thing stands."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    BROKEN = "broken"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Remedy:
    """A sentence, and the lines to type or to put somewhere."""

    instruction: str
    lines: tuple[str, ...] = ()

    def document(self) -> Document:
        """As JSON."""
        return {"say": self.instruction, "lines": list(self.lines)}


Remedies = tuple[Remedy, ...]


def one_remedy(instruction: str, *lines: str) -> Remedies:
    """A single remedy."""
    return (Remedy(instruction, lines),)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was looked at. `name` is for programs, `title` and `found` for people."""

    name: str
    title: str
    state: CheckState
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
class CheckOutcome:
    """A finding before it has a name: what a check of a link gives."""

    state: CheckState
    found: str
    remedies: Remedies = ()


def ok(found: str) -> CheckOutcome:
    """All is well."""
    return CheckOutcome(CheckState.OK, found)


def info(found: str) -> CheckOutcome:
    """Neither good nor bad."""
    return CheckOutcome(CheckState.INFO, found)


def warning(found: str, *remedies: Remedy) -> CheckOutcome:
    """It works, and yet."""
    return CheckOutcome(CheckState.WARNING, found, remedies)


def broken(found: str, *remedies: Remedy) -> CheckOutcome:
    """It does not work."""
    return CheckOutcome(CheckState.BROKEN, found, remedies)
