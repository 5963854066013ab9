"""What became of a configuration that was wanted: an outcome for each of its sections."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from visionedge.config.schema import SECTIONS, Config


@dataclass(frozen=True, slots=True)
class SectionOutcome:
    """What became of one section; `reason` says why it is not applied, and is empty if it is.

    `pending`: accepted, but what it configures does not run yet. `rejected`: the section stays as it was.
    """

    status: Literal["applied", "pending", "rejected"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a wanted configuration: an outcome for each key of `SECTIONS`.

    Raises:
        ValueError: a section has no outcome, or an outcome is of no section.
    """

    outcomes: Mapping[str, SectionOutcome]

    def __post_init__(self) -> None:
        if self.outcomes.keys() != SECTIONS.keys():
            raise ValueError(f"sections without an outcome: {sorted(SECTIONS.keys() ^ self.outcomes.keys())}")

    @property
    def is_complete(self) -> bool:
        """Whether every section is in force as it was wanted."""
        return not self.unapplied

    @property
    def pending(self) -> dict[str, str]:
        """The reasons of the sections that are accepted and not in use yet."""
        return self._reasons("pending")

    @property
    def rejected(self) -> dict[str, str]:
        """The reasons of the sections that stay as they were."""
        return self._reasons("rejected")

    @property
    def unapplied(self) -> dict[str, str]:
        """The reasons of all sections that are not in force, pending or rejected."""
        return self._reasons("pending", "rejected")

    def _reasons(self, *statuses: str) -> dict[str, str]:
        return {key: each.reason for key, each in self.outcomes.items() if each.status in statuses}


class ConfigTarget(Protocol):
    """What a configuration is applied to: the running module (`AppState`)."""

    def compare(self, wanted: Config) -> Applied:
        """What of a configuration is in force now; changes nothing."""

    async def apply(self, wanted: Config) -> Applied:
        """Make the running module that of a configuration, and return what became of it."""
