"""One trial: so many threads that compute batches one after the other, timed."""

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from visionedge.engine.plan import Pair

MOST_BATCHES = 24
"""Of one lane in one trial: tiny networks need no more to be timed well."""

_STARTED_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one trial gave; `batch_ms` is the median, `cpu_ms` the lanes' processor time for one picture."""

    frames_per_s: float
    batch_ms: float
    cpu_ms: float


Run = Callable[[int], object]
"""Computes a batch of so many pictures on the thread that calls it."""

NameT = TypeVar("NameT", bound=Hashable)


def run_trial(
    run: Run,
    pair: Pair,
    limit_s: float,
    *,
    most: int = MOST_BATCHES,
    clock: Callable[[], int] = time.monotonic_ns,
    cpu_clock: Callable[[], int] = time.thread_time_ns,
) -> Sample:
    """Compute batches on `pair.lanes` threads for about `limit_s`, at most `most` on each, at least one.

    The first of each lane settles its buffers and does not count, unless it fills the time by itself.

    Raises whatever `run` raises.
    """
    return run_in_turns({"": run}, pair, limit_s, most=most, clock=clock, cpu_clock=cpu_clock)[""]


def run_in_turns(
    runs: Mapping[NameT, Run],
    pair: Pair,
    limit_s: float,
    *,
    most: int = MOST_BATCHES,
    clock: Callable[[], int] = time.monotonic_ns,
    cpu_clock: Callable[[], int] = time.thread_time_ns,
) -> dict[NameT, Sample]:
    """The same for several that are to be compared: every lane computes a batch of each in turn.

    So each has about `limit_s`, and whatever the machine does meanwhile it does to all of them.
    """
    together = threading.Barrier(pair.lanes)

    def lane(_: int) -> dict[NameT, list[_Batch]]:
        def timed(name: NameT) -> _Batch:
            used_ns, began_ns = cpu_clock(), clock()
            runs[name](pair.batch)
            return _Batch(clock() - began_ns, cpu_clock() - used_ns)

        together.wait(_STARTED_WITHIN_S)
        done = {name: [timed(name)] for name in runs}
        if _spent_s(done) >= limit_s * len(runs):
            return done
        done = {name: [] for name in runs}
        turns = 0
        while not turns or (_spent_s(done) < limit_s * len(runs) and turns < most):
            turns += 1
            for name in list(runs)[:: 1 if turns % 2 else -1]:  # none always comes after the same
                done[name].append(timed(name))
        return done

    with ThreadPoolExecutor(pair.lanes, "plan") as crew:
        lanes = [future.result() for future in [crew.submit(lane, number) for number in range(pair.lanes)]]
    return {name: _sample(pair, [done[name] for done in lanes]) for name in runs}


class _Batch(NamedTuple):
    took_ns: int
    used_ns: int


def _spent_s(done: Mapping[NameT, Sequence[_Batch]]) -> float:
    return sum(batch.took_ns for batches in done.values() for batch in batches) / 1e9


def _sample(pair: Pair, lanes: Sequence[Sequence[_Batch]]) -> Sample:
    batches = [batch for each in lanes for batch in each]
    return Sample(
        # Each lane by its own time: none is charged for another that still works on its last batch.
        frames_per_s=sum(pair.batch * len(b) / max(sum(x.took_ns for x in b), 1) * 1e9 for b in lanes),
        batch_ms=float(np.median([batch.took_ns for batch in batches])) / 1e6,
        cpu_ms=sum(batch.used_ns for batch in batches) / 1e6 / (pair.batch * len(batches)),
    )
