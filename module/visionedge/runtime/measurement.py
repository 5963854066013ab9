"""Which of several ways to compute the same is the fastest here: run in turns, under the same load."""

import os
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

MIN_SPEEDUP = 1.1
"""A variant must be faster than fp32 by this factor to be used: a busy machine varies by less."""

_WARM_UP = 2
_MIN_ROUNDS = 5
_MAX_ROUNDS = 25


@dataclass(frozen=True, slots=True)
class RelativeSpeed:
    """The median time of a run, and how often as fast as the first it was (median over the rounds)."""

    ms: float
    speedup: float


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
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
    def from_document(document: Mapping[str, Any]) -> "PrecisionChoice":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is none.
        """
        milliseconds = {str(name): float(value) for name, value in document["milliseconds"].items()}
        return PrecisionChoice(str(document["precision"]), str(document["reason"]), milliseconds)


def measure_speeds(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    clock: Callable[[], int] = time.monotonic_ns,
) -> dict[str, RelativeSpeed]:
    """Run each in turns for about `budget_s`, at least a few times; the others are held against the first.

    Raises whatever a run raises.
    """
    taken_ns: dict[str, list[int]] = {name: [] for name in runs}
    began_ns = clock()
    for turn in range(_WARM_UP + _MAX_ROUNDS):
        if turn >= _WARM_UP + _MIN_ROUNDS and clock() - began_ns > budget_s * 1e9:
            break
        for name, run in runs.items():
            start_ns = clock()
            run()
            if turn >= _WARM_UP:
                taken_ns[name].append(clock() - start_ns)
    first = np.array(next(iter(taken_ns.values())), np.float64)
    return {
        name: RelativeSpeed(
            float(np.median(taken)) / 1e6,
            float(np.median(first / np.maximum(np.array(taken, np.float64), 1.0))),
        )
        for name, taken in taken_ns.items()
    }


def choose_fastest(
    runs: Mapping[str, Callable[[], object]],
    *,
    min_speedup: float = MIN_SPEEDUP,
    budget_s: float = 2.0,
    clock: Callable[[], int] = time.monotonic_ns,
) -> PrecisionChoice:
    """The precision to use: the fastest, if it beats the first (fp32) by `margin`; else the first.

    A run computes one batch on the calling thread and is warm. Raises whatever a run raises.
    """
    measured = measure_speeds(runs, budget_s=budget_s, clock=clock)
    first, *others = measured
    ms = {name: pace.ms for name, pace in measured.items()}
    best = max(others, key=lambda name: measured[name].speedup, default=first)
    figures = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    factor = measured[best].speedup
    if best == first:
        return PrecisionChoice(first, "there is no other", ms)
    if factor < min_speedup:
        return PrecisionChoice(
            first, f"{best} was measured {factor:.2f} times as fast here: no gain ({figures})", ms
        )
    return PrecisionChoice(best, f"measured {factor:.2f} times as fast as {first} here ({figures})", ms)


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


# How much of the processor other processes used while a benchmark ran.


OTHER_PROCESSES_KEY = "otherProcessesShare"
"""The key of every report of bench: a share of the cores that this process may use, 0 to 1, or null."""

MAX_IDLE_SHARE = 0.05
"""Up to this share, which a desktop or a monitoring agent needs, a machine counts as idle."""

_IDLE_COLUMNS = (3, 4)
"""The places of idle and iowait in a line of /proc/stat; guest time is part of user time already."""


class OtherProcessesLoad:
    """The processor time of everything but this process and its descendants, from now on.

    Time that a hypervisor takes away (steal) counts too. `proc` is Linux's, `cores` are the cores to look at.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        cores: Collection[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc
        self._cores = os.sched_getaffinity(0) if cores is None else cores
        self._clock = clock
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._before = self._now()

    def share(self) -> float | None:
        """The share of the cores that others used since the start, 0 to 1; None where /proc does not tell."""
        now = self._now()
        if self._before is None or now is None:
            return None
        took_s, busy_s, own_s = (after - before for before, after in zip(self._before, now, strict=True))
        others_s = max(0.0, busy_s - own_s)
        return round(min(1.0, others_s / (max(took_s, 1e-9) * len(self._cores))), 3)

    def _now(self) -> tuple[float, float, float] | None:
        """The time, the processor time of the cores, and ours; all in seconds."""
        try:
            return self._clock(), self._busy_s(), self._own_s()
        except (OSError, ValueError, IndexError):
            return None

    def _busy_s(self) -> float:
        wanted = {f"cpu{core}" for core in self._cores}
        lines = (line.split() for line in (self._proc / "stat").read_text(encoding="ascii").splitlines())
        found = [words[1:9] for words in lines if words and words[0] in wanted]
        if len(found) != len(wanted):
            raise ValueError("not all cores are listed")
        ticks = sum(int(w) for words in found for place, w in enumerate(words) if place not in _IDLE_COLUMNS)
        return ticks * self._tick_s

    def _own_s(self) -> float:
        """Of this process and its descendants, those that have ended included."""
        parents: dict[int, int] = {}
        ticks: dict[int, int] = {}
        for folder in self._proc.glob("[0-9]*"):
            try:
                text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it ended between the listing and the reading
            fields = text.rpartition(")")[2].split()
            number = int(folder.name)
            parents[number] = int(fields[1])
            ticks[number] = sum(map(int, fields[11:15]))  # utime, stime, and both of the children waited for
        ours = {os.getpid()}
        while more := {number for number, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return sum(ticks[number] for number in ours if number in ticks) * self._tick_s


def describe_other_load(report: Mapping[str, Any]) -> str:
    """A sentence about the load of others in a report; empty where the machine was idle otherwise."""
    share = report.get(OTHER_PROCESSES_KEY)
    if share is None or share <= MAX_IDLE_SHARE:
        return ""
    return (
        f"Other processes used {share:.0%} of the processor during the measurement: on an otherwise idle"
        " machine the figures are better."
    )
