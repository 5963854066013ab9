"""Measures which of several computations is the fastest here: they run in turns, under the same load."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

_WARM_UP_ROUNDS = 2
_MIN_ROUNDS = 5
_MAX_ROUNDS = 25


@dataclass(frozen=True, slots=True)
class RelativeSpeed:
    """Median time of a run in ms, and median speed relative to the first candidate."""

    ms: float
    speedup: float


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    clock: Callable[[], int] = time.monotonic_ns,
) -> dict[str, RelativeSpeed]:
    """Run the candidates in turns and return the median of each.

    The speed of a machine changes within seconds. A ratio within one round is free of such changes, so each
    candidate is compared with the first one round by round.

    Args:
        candidates: a call is one run; an exception from a run is raised to the caller.
        budget_s: time for all runs together. After a warm-up at least 5 and at most 25 rounds count.
        clock: monotonic ns.
    """
    times_ns: dict[str, list[int]] = {name: [] for name in candidates}
    began_ns = clock()
    for round_number in range(_WARM_UP_ROUNDS + _MAX_ROUNDS):
        if round_number >= _WARM_UP_ROUNDS + _MIN_ROUNDS and clock() - began_ns > budget_s * 1e9:
            break
        for name, run in candidates.items():
            start_ns = clock()
            run()
            if round_number >= _WARM_UP_ROUNDS:
                times_ns[name].append(clock() - start_ns)
    first = np.array(next(iter(times_ns.values())), np.float64)
    return {
        name: RelativeSpeed(
            float(np.median(times)) / 1e6,
            float(np.median(first / np.maximum(np.array(times, np.float64), 1.0))),
        )
        for name, times in times_ns.items()
    }


# Rounds of a benchmark, and the median of their ratios.


KeyT = TypeVar("KeyT", bound=Hashable)
ResultT = TypeVar("ResultT")


def run_in_rounds(
    runs: Mapping[KeyT, Callable[[], ResultT]],
    rounds: int,
    after_round: Callable[[int, Mapping[KeyT, Sequence[ResultT]]], None],
) -> dict[KeyT, list[ResultT]]:
    """Run each once a round, in every second round in reverse order, so that no run has a fixed predecessor.

    `after_round` gets the number of the round, from 1, and all results so far.
    """
    results: dict[KeyT, list[ResultT]] = {key: [] for key in runs}
    for number in range(1, rounds + 1):
        for key in list(runs) if number % 2 else reversed(list(runs)):
            results[key].append(runs[key]())
        after_round(number, results)
    return results


def median_ratio(
    ours: Sequence[ResultT], theirs: Sequence[ResultT], figure: Callable[[ResultT], float]
) -> float:
    """The median over the rounds of the ratio of a figure: noise that a round shares cancels out."""
    return float(median(figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True)))
