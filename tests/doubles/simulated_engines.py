"""Simulated engines for the choice: speeds, refusals and faults by candidate, with a clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from visionedge.engine.autotune import MAX_BATCHES, ThroughputSample
from visionedge.engine.engine_choice import CandidateAgreement, EngineCandidate
from visionedge.engine.plan import OperatingPoint

T = TypeVar("T")

BatchMs = Callable[[OperatingPoint], float]
"""The time of a batch while all lanes work, in ms."""

AGREES = CandidateAgreement("100% of 40 boxes agree here")


class HangError(Exception):
    """A step that never ends: the runner turns it into a `TimeoutError`."""


@dataclass
class SimulatedEngines:
    """`CandidateTrials` in simulated time; `failures` happen in a step: ``open``, ``measure``, ``check``."""

    batch_ms: Mapping[EngineCandidate, BatchMs]
    open_s: float = 0.5
    check_s: float = 0.3
    refusals: Mapping[EngineCandidate, str] = field(default_factory=dict)
    failures: Mapping[tuple[EngineCandidate, str], Exception] = field(default_factory=dict)
    slower: Callable[[float], float] = lambda _now_s: 1.0
    cpu_share: float = 1.0
    now_s: float = 0.0
    steps: list[tuple[str, EngineCandidate]] = field(default_factory=list)

    def clock(self) -> float:
        """Now, in s."""
        return self.now_s

    def runner(self, step: Callable[[], T], limit_s: float) -> T:
        """Run a step; one that hangs takes its whole limit."""
        try:
            return step()
        except HangError:
            self.now_s += limit_s
            raise TimeoutError(f"gave no answer within {limit_s:.0f} s") from None

    def open(self, candidate: EngineCandidate) -> None:
        self._step("open", candidate, self.open_s)

    def check(self, candidate: EngineCandidate) -> CandidateAgreement:
        self._step("check", candidate, self.check_s)
        refusal = self.refusals.get(candidate)
        return AGREES if refusal is None else CandidateAgreement("", refusal)

    def measure(self, candidate: EngineCandidate, point: OperatingPoint, limit_s: float) -> ThroughputSample:
        """As the real trial: one batch to warm up, then as many as fill the time."""
        self._step("measure", candidate, 0.0)
        took_ms = self.batch_ms[candidate](point) * self.slower(self.now_s)
        fitting = 1 + min(MAX_BATCHES, max(1, round(limit_s * 1000 / took_ms)))
        self.now_s += (1 if took_ms >= limit_s * 1000 else fitting) * took_ms / 1000
        return ThroughputSample(point.lanes * point.batch * 1000 / took_ms, took_ms, self.cpu_share * took_ms)

    def count(self, step: str, candidate: EngineCandidate) -> int:
        """How often a step was run."""
        return self.steps.count((step, candidate))

    def _step(self, step: str, candidate: EngineCandidate, took_s: float) -> None:
        self.steps.append((step, candidate))
        self.now_s += took_s
        failure = self.failures.get((candidate, step))
        if failure is not None:
            raise failure


def always(ms: float) -> BatchMs:
    """A batch takes the same time whatever else runs."""
    return lambda _point: ms
