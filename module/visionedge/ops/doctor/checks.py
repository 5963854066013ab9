"""A check of doctor and its result: the state, what was found, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from visionedge.ops.doctor.facts import HostFacts
from visionedge.web.documents import RemedyDocument


class CheckState(StrEnum):
    """The state of what was checked."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    BROKEN = "broken"
    SKIPPED = "skipped"


Remedy = RemedyDocument
Remedies = tuple[Remedy, ...]


def remedy(instruction: str, *lines: str) -> Remedies:
    """A single remedy: a sentence, and the lines to type or to put into a file."""
    return (Remedy(instruction=instruction, lines=list(lines)),)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check. `name` is for programs, `title` and `found` are for people."""

    state: CheckState
    found: str
    remedies: Remedies = ()
    name: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A named check. `evaluate` returns a result without a name, or None if the check does not apply.

    `independent`: it is run even after an earlier check of the chain failed.
    """

    name: str
    title: str
    evaluate: Callable[[HostFacts], CheckResult | None]
    independent: bool = False

    def run(self, facts: HostFacts) -> CheckResult | None:
        """The result with the name of this check."""
        result = self.evaluate(facts)
        return None if result is None else replace(result, name=self.name, title=self.title)


def ok(found: str) -> CheckResult:
    """It works."""
    return CheckResult(CheckState.OK, found)


def info(found: str) -> CheckResult:
    """A fact that is neither good nor bad."""
    return CheckResult(CheckState.INFO, found)


def warning(found: str, *remedies: Remedy) -> CheckResult:
    """It works with a restriction."""
    return CheckResult(CheckState.WARNING, found, remedies)


def broken(found: str, *remedies: Remedy) -> CheckResult:
    """It does not work."""
    return CheckResult(CheckState.BROKEN, found, remedies)
