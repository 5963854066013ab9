"""One trial of the plan: so many threads that compute batches one after the other, timed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from visionedge.inference.plan import Pair

MOST_BATCHES = 24
"""Of one lane in one trial: tiny networks need no more to be timed well."""

_STARTED_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one trial gave; `batch_ms` is the median, `cpu_ms` the lanes' processor time for one picture."""

    frames_per_s: float
    batch_ms: float
    cpu_ms: float


def run_trial(
    run: Callable[[int], object],
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
    together = threading.Barrier(pair.lanes)

    def timed() -> int:
        began_ns = clock()
        run(pair.batch)
        return clock() - began_ns

    def lane(_: int) -> tuple[list[int], int]:
        together.wait(_STARTED_WITHIN_S)
        used_ns = cpu_clock()
        settling_ns = timed()
        if settling_ns >= limit_s * 1e9:
            return [settling_ns], cpu_clock() - used_ns
        durations_ns: list[int] = []
        used_ns = cpu_clock()
        while not durations_ns or (sum(durations_ns) < limit_s * 1e9 and len(durations_ns) < most):
            durations_ns.append(timed())
        return durations_ns, cpu_clock() - used_ns

    with ThreadPoolExecutor(pair.lanes, "plan") as crew:
        futures = [crew.submit(lane, number) for number in range(pair.lanes)]
    lanes = [future.result()[0] for future in futures]
    used_ns = sum(future.result()[1] for future in futures)
    return Sample(
        # Each lane by its own time: none is charged for another that still works on its last batch.
        frames_per_s=sum(pair.batch * len(d) / max(sum(d), 1) * 1e9 for d in lanes),
        batch_ms=float(np.median([duration for durations in lanes for duration in durations])) / 1e6,
        cpu_ms=used_ns / 1e6 / (pair.batch * sum(len(durations) for durations in lanes)),
    )
