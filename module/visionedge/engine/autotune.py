"""The measured plan: which number of lanes and which batch computes most, found in a few seconds.

Pairs are tried in rounds, every pair that is still in the running once a round, so that a machine that is
busy for a moment is busy for all of them; what is far behind after a round is not run again. How long a
batch takes is fitted as a * n + b for each number of lanes: what cannot win by the fit, takes longer than the
budget, or would take too long to try, is not run at all. The choice is made on medians.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np

from visionedge.engine.plan import Fit, Measured, Pair, PlanCache, PlanKey, Timed, batch_sizes, make_plan
from visionedge.runtime.process_limits import bounded_cores

# One trial: so many threads that compute batches one after the other, timed.


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


__all__ = ["PlanCache", "PlanKey", "choose", "fit", "measure", "paces", "search"]

SPEND_S = 3.0
FINAL_S = 1.5
"""On top of it where an unusual pair is the best: what is usual gives way only after a match of the two."""

_ROUNDS = 9
_TRIAL_S = 0.08
"""Rather many short trials than few long ones: a neighbour's burst then spoils a round and not the median."""

# The least share of the best that a pair must reach to be run again, after each round: a first look at a
# busy machine may be wrong by much, a median of three by little. Of a prediction still less is asked.
_IN_THE_RUNNING = (0.75, 0.85, 0.9)
_BY_THE_FIT = 0.7
_OVER_BUDGET = 1.25
_AS_GOOD = 0.98
"""Pairs this near to the best are its equals, and the one that answers soonest is taken."""

_FINAL_ROUNDS = 12


_SURE_ROUNDS = 3
_QUIET = 0.8
"""The least share of the processor that lanes on a CPU get when nobody else wants it."""
_SHARED = 0.5
"""Below this share a measurement says nothing, not even for the usual pair."""

Trial = Callable[[Pair, float], Sample]
"""Runs a pair for about so many seconds."""


def measure(
    run: Callable[[int], object],
    *,
    device: str,
    max_batch: int,
    fixed_batch: int | None,
    cores: int,
    latency_budget_ms: float | None = None,
    clock: Callable[[], int] = time.monotonic_ns,
    spend_s: float = SPEND_S,
) -> Measured:
    """Find the best plan for an engine that is warmed up; `run` computes a batch of so many on its thread.

    Raises what `run` raises where not even the smallest batch can be computed.
    """
    wanted = Wanted(device, max_batch, fixed_batch, cores, latency_budget_ms)

    def trial(pair: Pair, limit_s: float) -> Sample:
        return run_trial(run, pair, limit_s, clock=clock)

    return search(trial, wanted, clock=clock, spend_s=spend_s)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the plan is for."""

    device: str
    max_batch: int
    fixed_batch: int | None
    cores: int
    latency_budget_ms: float | None = None

    def batches(self) -> tuple[int, ...]:
        """The sizes in question."""
        return batch_sizes(self.max_batch) if self.fixed_batch is None else (self.fixed_batch,)

    def lanes(self) -> tuple[int, ...]:
        """The numbers of lanes in question: up to the cores, or a few that share a GPU."""
        if self.device != "cpu":
            return (1, 2, 3)
        cores = bounded_cores(self.cores)
        # Half the cores are often all the real ones there are.
        return tuple(sorted({*batch_sizes(cores), max(1, cores // 2)}))

    def by_rule(self) -> Pair:
        """What is taken where nothing can be measured."""
        plan = make_plan(self.device, self.max_batch, self.fixed_batch, self.cores)
        return Pair(plan.lanes, plan.max_batch)


def search(trial: Trial, wanted: Wanted, *, clock: Callable[[], int], spend_s: float = SPEND_S) -> Measured:
    """Try pairs until the best is known or the time is spent, and choose."""
    began_ns = clock()
    book = _Book(wanted)

    def left_s() -> float:
        return spend_s - (clock() - began_ns) / 1e9

    # Small batches first: they are cheap, and tell what the larger ones would take.
    for batch in wanted.batches():
        for lanes in wanted.lanes():
            pair = Pair(lanes, batch)
            note = book.not_worth(pair, left_s())
            if note is None:
                book.run(trial, pair, _TRIAL_S)
            else:
                book.notes[pair] = note
    for number in range(1, _ROUNDS):
        again = book.again(_IN_THE_RUNNING[min(number, len(_IN_THE_RUNNING)) - 1], left_s())
        if len(again) < 2:
            break
        for pair in again if number % 2 else reversed(again):  # no pair is always the first
            if pair in book.samples:
                book.run(trial, pair, _TRIAL_S)
    _final(book, trial, left_s)
    return book.measured((clock() - began_ns) / 1e9)


def _final(book: "_Book", trial: Trial, left_s: Callable[[], float]) -> None:
    """Hold what would take the place of the usual pair against it, again and again.

    Who is the best of many owes it to luck as well, so what they did before does not count any more.
    """
    finalists = book.contested()
    before = {pair: len(book.samples[pair]) for pair in finalists}
    for number in range(_FINAL_ROUNDS):
        costs_s = [book.cost_s(pair, _TRIAL_S) for pair in finalists if pair in book.samples]
        if len(costs_s) < 2 or sum(costs_s) > left_s() + FINAL_S:
            break
        for pair in finalists if number % 2 else reversed(finalists):
            book.run(trial, pair, _TRIAL_S)
    given = {pair: book.samples[pair] for pair in finalists if pair in book.samples}
    if len(given) < 2:
        return
    match = {pair: samples[before[pair] :] for pair, samples in given.items()}
    rounds = min(map(len, match.values()))
    if rounds == 0:  # there was no time for any: what both have done has to do
        match, rounds = given, min(map(len, given.values()))
    book.match = {pair: samples[:rounds] for pair, samples in match.items()}


def fit(lanes: int, points: Mapping[int, float]) -> Fit:
    """Durations in ms by batch size as a * n + b, neither below 0, by least squares of relative errors."""
    # Weights 1/d²: a batch of eight takes longer, and is not measured any better for that.
    sums = [0.0] * 5
    for batch, took_ms in points.items():
        weight = 1 / max(took_ms, 1e-9) ** 2
        for index, value in enumerate((1.0, batch, batch * batch, took_ms, batch * took_ms)):
            sums[index] += weight * value
    one, n, nn, d, nd = sums
    spread = one * nn - n * n
    slope = (one * nd - n * d) / spread if len(points) > 1 and spread > 0 else nd / nn
    if slope < 0:
        return Fit(lanes, 0.0, d / one)
    fixed = (d - slope * n) / one
    return Fit(lanes, slope, fixed) if fixed > 0 else Fit(lanes, nd / nn, 0.0)


def choose(
    samples: Mapping[Pair, Sequence[Sample]], latency_budget_ms: float | None, usual: Pair
) -> tuple[Pair, str]:
    """The best pair among those that were run most often, and why in a clause.

    The best is that which computes most pictures; among equals that whose batch is done soonest. `usual`,
    what its kind of device is known to like, gives way only to a pair that is clearly better.
    """
    finals, pace = _finals(samples)
    within = _within(finals, latency_budget_ms)
    if not within:
        nearest = _within(finals, _OVER_BUDGET * min(sample.batch_ms for sample in finals.values()))
        best = max(nearest, key=lambda pair: pace[pair])
        return (
            best,
            f"no batch is done within {latency_budget_ms:g} ms; nearest, {_figures(best, finals[best])}",
        )
    rivals = [p for p in within if usual not in within or _clearly_better(samples[p], samples[usual])]
    top = max((pace[pair] for pair in rivals), default=0.0)
    equals = [pair for pair in rivals if pace[pair] >= _AS_GOOD * top]
    best = min(equals, key=lambda pair: (within[pair].batch_ms, pair), default=usual)
    limit = "" if latency_budget_ms is None else f", the most within {latency_budget_ms:g} ms"
    kept = "" if best != usual or len(within) == 1 else ", and no other pair clearly more"
    return best, f"{_figures(best, within[best])}{limit}{kept}"


def _clearly_better(given: Sequence[Sample], than: Sequence[Sample]) -> bool:
    """Whether one pair beat another by more than the machine's moods."""
    ratios = sorted(ours.frames_per_s / theirs.frames_per_s for ours, theirs in zip(given, than, strict=True))
    if len(ratios) < _SURE_ROUNDS:
        return ratios[0] > (1.25 if len(ratios) == 1 else 1.1)
    return median(ratios) > 1.02 and ratios[len(ratios) // 4] > 1


def _finals(samples: Mapping[Pair, Sequence[Sample]]) -> tuple[dict[Pair, Sample], dict[Pair, float]]:
    """The pairs that were in every round: their medians, and how fast they were beside the others."""
    most = max(len(given) for given in samples.values())
    finals = {pair: given for pair, given in samples.items() if len(given) == most}
    return {pair: _middle(given) for pair, given in finals.items()}, paces(finals)


def paces(samples: Mapping[Pair, Sequence[Sample]]) -> dict[Pair, float]:
    """How fast pairs were, all of them run once a round: the median of their speeds beside the round's own.

    What slows the machine for a while slows all pairs of that round, and cancels out.
    """
    rounds = zip(*samples.values(), strict=True)
    usual = [median(sample.frames_per_s for sample in each) for each in rounds]
    return {
        pair: median(sample.frames_per_s / speed for sample, speed in zip(given, usual, strict=True))
        for pair, given in samples.items()
    }


def _within(finals: Mapping[Pair, Sample], budget_ms: float | None) -> dict[Pair, Sample]:
    return {p: s for p, s in finals.items() if budget_ms is None or s.batch_ms <= budget_ms}


def _figures(pair: Pair, sample: Sample) -> str:
    return f"{pair} gave {sample.frames_per_s:.1f} frames/s at {sample.batch_ms:.1f} ms a batch"


def _middle(given: Iterable[Sample]) -> Sample:
    rows = list(given)
    return Sample(
        median(s.frames_per_s for s in rows), median(s.batch_ms for s in rows), median(s.cpu_ms for s in rows)
    )


@dataclass(slots=True)
class _Book:
    """What was measured so far, and what may be concluded from it."""

    wanted: Wanted
    samples: dict[Pair, list[Sample]] = field(default_factory=dict)
    notes: dict[Pair, str] = field(default_factory=dict)
    failed: int | None = None
    """The smallest batch that one lane could not compute."""
    match: dict[Pair, list[Sample]] = field(default_factory=dict)
    """The usual pair against the best of the others, where that was held."""
    hurried: bool = False
    """Something was left out only for want of time."""

    def run(self, trial: Trial, pair: Pair, limit_s: float) -> None:
        """Run a pair once more; one that fails is out, with its reason."""
        try:
            sample = trial(pair, limit_s)
        except Exception as error:
            if pair == Pair(1, self.wanted.batches()[0]):
                raise  # nothing works then
            self.samples.pop(pair, None)
            words = " ".join(str(error).split()) or type(error).__name__
            self.notes[pair] = f"failed: {words[:200]}"
            if pair.lanes == 1:
                self.failed = pair.batch
                self.samples = {p: given for p, given in self.samples.items() if p.batch < pair.batch}
            return
        self.samples.setdefault(pair, []).append(sample)

    def not_worth(self, pair: Pair, left_s: float) -> str | None:
        """Why a pair need not be run, None if it should be."""
        if self.failed is not None and pair.batch >= self.failed:
            return f"a batch of {self.failed} failed"
        if not self.samples:
            return None
        expected_ms, sure = self._expected_ms(pair)
        budget_ms = self.wanted.latency_budget_ms
        least_ms = min(_middle(given).batch_ms for given in self.samples.values())
        if budget_ms is not None and expected_ms > _OVER_BUDGET * max(budget_ms, least_ms):
            return f"about {expected_ms:.0f} ms by the fit, over the budget"
        speed = pair.lanes * pair.batch * 1000 / expected_ms
        best = max(_middle(given).frames_per_s for given in self.samples.values())
        if sure and speed < _BY_THE_FIT * best:
            return f"at most about {speed:.1f} frames/s by the fit"
        if self.cost_s(pair, _TRIAL_S) > left_s:
            self.hurried = True
            return f"at least about {expected_ms:.0f} ms a batch: no time to try it"
        return None

    def _expected_ms(self, pair: Pair) -> tuple[float, bool]:
        """What a batch will take at least, and whether speed may be concluded from it."""
        known = self._durations_ms(pair.lanes)
        if pair.batch in known:
            return known[pair.batch], True
        if len(known) > 1:
            return fit(pair.lanes, known).batch_ms(pair.batch), True
        if known:
            # One point: at best a larger batch takes no longer.
            return max(known.values()), True
        fewer = [p for p in self.samples if p.lanes < pair.lanes and p.batch <= pair.batch]
        nearest = max(fewer, default=None)
        return (_middle(self.samples[nearest]).batch_ms, False) if nearest else (0.001, False)

    def _durations_ms(self, lanes: int) -> dict[int, float]:
        return {
            pair.batch: _middle(given).batch_ms for pair, given in self.samples.items() if pair.lanes == lanes
        }

    def cost_s(self, pair: Pair, limit_s: float) -> float:
        """The time that a trial of this pair will take: one batch to settle, and then its time."""
        batch_s = self._expected_ms(pair)[0] / 1000
        return batch_s if batch_s >= limit_s else batch_s + min(limit_s + batch_s / 2, MOST_BATCHES * batch_s)

    def again(self, share: float, left_s: float) -> list[Pair]:
        """The pairs worth another round, of those that were in every round so far, as the time allows."""
        finals, pace = _finals(self.samples)
        budget_ms = self.wanted.latency_budget_ms
        within = _within(finals, None if budget_ms is None else 1.1 * budget_ms)
        if within:
            least = share * max(pace[pair] for pair in within)
            running = sorted((p for p in within if pace[p] >= least), key=lambda pair: -pace[pair])
        else:
            most_ms = _OVER_BUDGET * min(sample.batch_ms for sample in finals.values())
            running = sorted(_within(finals, most_ms), key=lambda pair: -pace[pair])
        usual = self.wanted.by_rule()
        if usual in running or (usual in within and len(self.samples[usual]) < _SURE_ROUNDS):
            # What is usual is given up only for good reasons, and those take a few rounds.
            running = [usual, *(pair for pair in running if pair != usual)]
        return sorted(self._affordable(running, left_s))

    def _affordable(self, running: list[Pair], left_s: float) -> list[Pair]:
        """As many of the first pairs as can be run until one is sure; else two of them, or none."""
        done = max(len(given) for given in self.samples.values())
        costs_s = [self.cost_s(pair, _TRIAL_S) for pair in running]
        for count in range(len(running), 1, -1):
            rounds = max(1, _SURE_ROUNDS - done) if count > 2 else 1
            if rounds * sum(costs_s[:count]) <= left_s:
                return running[:count]
        return []

    def contested(self) -> list[Pair]:
        """What is usual and what would take its place as it looks now; none when there is no such thing."""
        usual, budget_ms = self.wanted.by_rule(), self.wanted.latency_budget_ms
        pair, _ = choose(self.samples, budget_ms, usual)
        known = {usual: _middle(self.samples[usual])} if usual in self.samples else {}
        return [usual, pair] if pair != usual and _within(known, budget_ms) else []

    def measured(self, spent_s: float) -> Measured:
        """The choice and everything that speaks for it."""
        wanted = self.wanted
        usual = wanted.by_rule()
        pair, why = choose(self.match or self.samples, wanted.latency_budget_ms, usual)
        share = self._processor_share(pair)
        if share < _QUIET:
            why = f"{why}; the lanes got only {share:.0%} of the processor"
        if self.hurried and len(self.samples) == 1 and usual.batch == pair.batch and usual != pair:
            pair, why = usual, f"{why}; too slow to try more, so the rule for its kind says {usual}"
        return Measured(
            table=tuple(self._line(Pair(n, size)) for n in wanted.lanes() for size in wanted.batches()),
            fits=tuple(fit(n, points) for n in wanted.lanes() if len(points := self._durations_ms(n)) > 1),
            choice=pair,
            buckets=tuple(size for size in wanted.batches() if size <= pair.batch),
            reason=f"measured in {spent_s:.1f} s: {why} ({len(self.samples)} pairs tried)",
            spent_s=spent_s,
            settled=self._settled(pair, share),
        )

    def _settled(self, pair: Pair, share: float) -> bool:
        """Whether the choice may be kept: not what was measured while others had most of the processor.

        The usual pair needs less of it, as it would be taken without any measurement.
        """
        if len(self.wanted.lanes()) * len(self.wanted.batches()) == 1:
            return True  # there is nothing to choose
        return share >= (_SHARED if pair == self.wanted.by_rule() else _QUIET)

    def _processor_share(self, pair: Pair) -> float:
        """How much of the processor the lanes got of what they could use; 1 where a GPU computes."""
        if self.wanted.device != "cpu":
            return 1.0
        sample = _middle(self.samples[pair])
        return sample.cpu_ms * sample.frames_per_s / 1000 / min(pair.lanes, self.wanted.cores)

    def _line(self, pair: Pair) -> Timed:
        given = self.samples.get(pair)
        if not given:
            return Timed(pair, note=self.notes.get(pair, f"a batch of {self.failed} failed"))
        middle = _middle(given)
        return Timed(
            pair, middle.frames_per_s, middle.batch_ms, middle.cpu_ms, len(given), self.notes.get(pair, "")
        )
