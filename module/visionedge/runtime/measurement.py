"""Which of several ways to compute the same is the fastest here: run in turns, under the same load."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MARGIN = 1.1
"""A variant must be faster than fp32 by this factor to be used: a busy machine varies by less."""

_WARM_UP = 2
_LEAST_ROUNDS = 5
_MOST_ROUNDS = 25


@dataclass(frozen=True, slots=True)
class Pace:
    """The median time of a run, and how often as fast as the first it was (median over the rounds)."""

    ms: float
    times_as_fast: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What is used, why in one line, and the milliseconds for a picture of all that were run."""

    precision: str
    reason: str
    ms: Mapping[str, float]

    def document(self) -> dict[str, Any]:
        """As status shows it."""
        return {
            "precision": self.precision,
            "reason": self.reason,
            "milliseconds": {name: round(value, 3) for name, value in self.ms.items()},
        }

    @staticmethod
    def of_document(document: Mapping[str, Any]) -> "Choice":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is none.
        """
        milliseconds = {str(name): float(value) for name, value in document["milliseconds"].items()}
        return Choice(str(document["precision"]), str(document["reason"]), milliseconds)


def paces(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    clock: Callable[[], int] = time.monotonic_ns,
) -> dict[str, Pace]:
    """Run each in turns for about `budget_s`, at least a few times; the others are held against the first.

    Raises whatever a run raises.
    """
    taken_ns: dict[str, list[int]] = {name: [] for name in runs}
    began_ns = clock()
    for turn in range(_WARM_UP + _MOST_ROUNDS):
        if turn >= _WARM_UP + _LEAST_ROUNDS and clock() - began_ns > budget_s * 1e9:
            break
        for name, run in runs.items():
            start_ns = clock()
            run()
            if turn >= _WARM_UP:
                taken_ns[name].append(clock() - start_ns)
    first = np.array(next(iter(taken_ns.values())), np.float64)
    return {
        name: Pace(
            float(np.median(taken)) / 1e6,
            float(np.median(first / np.maximum(np.array(taken, np.float64), 1.0))),
        )
        for name, taken in taken_ns.items()
    }


def choose(
    runs: Mapping[str, Callable[[], object]],
    *,
    margin: float = MARGIN,
    budget_s: float = 2.0,
    clock: Callable[[], int] = time.monotonic_ns,
) -> Choice:
    """The precision to use: the fastest, if it beats the first (fp32) by `margin`; else the first.

    A run computes one batch on the calling thread and is warm. Raises whatever a run raises.
    """
    measured = paces(runs, budget_s=budget_s, clock=clock)
    first, *others = measured
    ms = {name: pace.ms for name, pace in measured.items()}
    best = max(others, key=lambda name: measured[name].times_as_fast, default=first)
    figures = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    factor = measured[best].times_as_fast
    if best == first:
        return Choice(first, "there is no other", ms)
    if factor < margin:
        return Choice(first, f"{best} was measured {factor:.2f} times as fast here: no gain ({figures})", ms)
    return Choice(best, f"measured {factor:.2f} times as fast as {first} here ({figures})", ms)
