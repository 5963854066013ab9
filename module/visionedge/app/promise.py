"""What is given up at this moment, as status, metrics and events tell it, and the sentences for people."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from visionedge.app.load_meter import Reading
from visionedge.app.overload_policy import RUNGS, Rung
from visionedge.app.sight import load_of, rates_in_words
from visionedge.camera.timing import Throttle
from visionedge.frames.types import utc_text

Direction = Literal["taken", "returned"]

_NAMED_MOST = 3


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A rung that is taken: since when, and what that means just now in a few words."""

    rung: Rung
    since_utc: datetime
    words: str


@dataclass(frozen=True, slots=True)
class Promise:
    """How the promise stands. `has_say`: the ladder may act; `throttles` are those of cameras, by name.

    `steps` counts what was done since the start.
    """

    has_say: bool = False
    at_the_end: bool = False
    given_up: tuple[GivenUp, ...] = ()
    throttles: Mapping[str, Throttle] = field(default_factory=dict)
    steps: Mapping[tuple[Rung, Direction], int] = field(
        default_factory=lambda: {(rung, way): 0 for rung in RUNGS for way in ("taken", "returned")}
    )

    def document(self) -> dict[str, Any]:
        """The object `overload` of the status' `capacity`."""
        return {
            "active": self.has_say,
            "exhausted": self.at_the_end,
            "since": utc_text(min(each.since_utc for each in self.given_up)) if self.given_up else None,
            "rungs": [
                {"rung": each.rung, "since": utc_text(each.since_utc), "what": each.words}
                for each in self.given_up
            ],
        }


def sentence(seen: Reading, promise: Promise, device: str) -> str:
    """How the promise is kept while something is given up, in one sentence."""
    rates = rates_in_words(seen)
    given_up = joined([each.words for each in promise.given_up]) or "nothing that may be given up"
    if load_of(seen) != "over":
        return f"{rates}: {device} carries them with {given_up}"
    return f"{rates}: too much for {device}{' even' if promise.at_the_end else ''} with {given_up}"


def slowed_in_words(limits: Mapping[str, float], asked: Mapping[str, float]) -> str:
    """The cameras that a limit slows, and to what."""
    rates = {name: limit for name, limit in limits.items() if limit < asked.get(name, 0.0)}
    if not rates:
        return "no camera slowed just now"
    low, high = min(rates.values()), max(rates.values())
    return f"{cameras_in_words(rates)} at {f'{low:g} to {high:g}' if low < high else f'{low:g}'} fps"


def cameras_in_words(names: Collection[str]) -> str:
    """Cameras by their names, or how many."""
    return joined(sorted(names)) if len(names) <= _NAMED_MOST else f"{len(names)} cameras"


def joined(parts: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
