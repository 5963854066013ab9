"""Machines that exist on paper: how long a batch takes on so many lanes, with a clock and noise."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from visionedge.engine.autotune import MAX_BATCHES, AutotuneRequest, ThroughputSample
from visionedge.engine.plan import OperatingPoint

BatchMs = Callable[[int, int], float]
"""(lanes, batch) → ms that one batch takes while all lanes work."""


@dataclass
class SimulatedMachine:
    """Runs trials in no time and tells how long they took. `noise` is the spread of a whole trial."""

    batch_ms: BatchMs
    noise: float = 0.0
    seed: int = 0
    slower: Callable[[float], float] = lambda _now_s: 1.0
    broken: Callable[[OperatingPoint], bool] = lambda _pair: False
    now_s: float = 0.0
    trials: list[OperatingPoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - no secret

    def clock(self) -> int:
        """Now, in ns."""
        return int(self.now_s * 1e9)

    def trial(self, point: OperatingPoint, limit_s: float) -> ThroughputSample:
        """As `trial.run_trial`: one batch to settle, then as many as fill the time."""
        self.trials.append(point)
        if self.broken(point):
            raise MemoryError(f"no room for\n{point.batch} pictures")
        real_ms = self.batch_ms(point.lanes, point.batch)
        took_ms = real_ms * math.exp(self._random.gauss(0, self.noise)) * self.slower(self.now_s)
        batches = (
            1 if took_ms >= limit_s * 1000 else 1 + min(MAX_BATCHES, math.ceil(limit_s * 1000 / took_ms))
        )
        self.now_s += batches * took_ms / 1000
        return ThroughputSample(point.lanes * point.batch * 1000 / took_ms, took_ms, real_ms / point.batch)

    def frames_per_s(self, point: OperatingPoint) -> float:
        """The truth about a pair."""
        return point.lanes * point.batch * 1000 / self.batch_ms(point.lanes, point.batch)

    def share_of_best(self, point: OperatingPoint, wanted: AutotuneRequest) -> float:
        """The truth about a choice: its speed beside that of the best pair an exhaustive sweep finds."""
        every = [OperatingPoint(lanes, batch) for lanes in wanted.lanes() for batch in wanted.batches()]
        return self.frames_per_s(point) / max(self.frames_per_s(each) for each in every)


def cpu_with_caches(cores: int, picture_ms: float = 12.0) -> BatchMs:
    """A CPU whose caches like small batches; lanes above its cores share them."""

    def batch_ms(lanes: int, batch: int) -> float:
        contention = 1 + 0.15 * (min(lanes, cores) - 1) / max(1, cores - 1)
        return (picture_ms * batch * (1 + 0.05 * math.log2(batch)) + 0.5) * contention * max(1.0, lanes / cores)

    return batch_ms


def memory_bound_cpu(lanes: int, batch: int) -> float:
    """A CPU whose cores wait for memory: what helps is to read the weights once for many pictures."""
    return lanes * (9.0 * batch + 3.0)


def gpu(lanes: int, batch: int) -> float:
    """A GPU: a batch of eight hardly takes longer than one picture, and two lanes hide the host's part."""
    return max(0.3 * batch + 2.0, lanes * (0.3 * batch + 1.4))


def single_lane_gpu(lanes: int, batch: int) -> float:
    """A GPU that gains nothing from a second lane."""
    return lanes * (0.3 * batch + 2.0)
