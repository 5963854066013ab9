"""Autotuning: the number of lanes and the batch size with the highest throughput, found in a few seconds.

An operating point is a number of lanes and a batch size. Points are tried in rounds, each one once a round,
so that a machine that is busy for a moment is busy for all of them; a point that is much slower than the best
is not run again. The time of a batch is fitted as a * n + b for each number of lanes: a point that cannot win
by the fit, exceeds the latency budget, or would take too long to try, is not run at all. The choice is made
on medians.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.plan import (
    AutotuneResult,
    LatencyFit,
    MeasuredPoint,
    OperatingPoint,
    list_batch_sizes,
    make_default_plan,
)
from visionedge.frames.types import InputSpec
from visionedge.runtime.process_limits import bounded_cores

TIME_BUDGET_S = 3.0
FINAL_TIME_BUDGET_S = 1.5
"""More time if another point than the default is the best: the default is replaced only after a final."""

MAX_BATCHES = 24
"""The most batches of one lane in one trial: tiny networks need no more to be timed well."""

_START_TIMEOUT_S = 60.0
_ROUNDS = 9
_FINAL_ROUNDS = 12
_TRIAL_S = 0.08
"""Many short trials, not few long ones: a burst of another process spoils one round, not the median."""

_MIN_SHARES_BY_ROUND = (0.75, 0.85, 0.9)
"""The share of the best point's speed that a point needs to be run again, after each round.

One measurement on a busy machine may be wrong by much, a median of three by little.
"""

_MIN_PREDICTED_SHARE = 0.7
"""The same for a speed that was only predicted."""

_LATENCY_TOLERANCE = 1.25
_EQUAL_SHARE = 0.98
"""Points this near to the best count as equally fast; the one with the shortest batch is chosen."""

REQUEST_MS = 1.0
"""The processor time that a request costs the module on a CPU, beside the computation: threads change places,
and what they need is not in the caches any more. Between batches of 1 and 2, `bench pipeline` saved 0.8 ms a
frame beyond what the engine saved."""

_MIN_PAIR_GAIN = 1.05
"""A pair doubles the time of a batch, so it must gain this much."""

_MIN_SURE_ROUNDS = 3
MIN_CPU_SHARE = 0.8
"""The least share of the processor that lanes on a CPU get on an idle machine."""

MIN_CPU_SHARE_DEFAULT = 0.5
"""Below this share a measurement cannot be used, not even for the default point."""

# --- trials: lanes that compute batches one after the other, timed ------------------------------------------


@dataclass(frozen=True, slots=True)
class ThroughputSample:
    """The result of a trial; `batch_ms` is the median, `cpu_ms` the processor time of one picture."""

    frames_per_s: float
    batch_ms: float
    cpu_ms: float


BatchRunner = Callable[[int], object]
"""Computes a batch of the given size on the thread that calls it."""

NameT = TypeVar("NameT", bound=Hashable)


def run_trial(
    run: BatchRunner,
    point: OperatingPoint,
    limit_s: float,
    *,
    max_count: int = MAX_BATCHES,
    clock: Callable[[], int] = time.monotonic_ns,
    cpu_clock: Callable[[], int] = time.thread_time_ns,
) -> ThroughputSample:
    """Compute batches on `point.lanes` threads for about `limit_s`, at least one and at most `max_count`.

    The first batch of a lane allocates its buffers and is not counted, unless it takes the whole time by
    itself. Raises whatever `run` raises.
    """
    samples = run_interleaved(
        {"": run}, point, limit_s, max_count=max_count, clock=clock, cpu_clock=cpu_clock
    )
    return samples[""]


def run_interleaved(
    runs: Mapping[NameT, BatchRunner],
    point: OperatingPoint,
    limit_s: float,
    *,
    max_count: int = MAX_BATCHES,
    clock: Callable[[], int] = time.monotonic_ns,
    cpu_clock: Callable[[], int] = time.thread_time_ns,
) -> dict[NameT, ThroughputSample]:
    """The same for several runs that are compared: every lane computes a batch of each in turns.

    Each has about `limit_s`, and other load on the machine slows all of them.
    """
    together = threading.Barrier(point.lanes)

    def lane(_: int) -> dict[NameT, list[_BatchTiming]]:
        def timed(name: NameT) -> _BatchTiming:
            used_ns, began_ns = cpu_clock(), clock()
            runs[name](point.batch)
            return _BatchTiming(clock() - began_ns, cpu_clock() - used_ns)

        together.wait(_START_TIMEOUT_S)
        done = {name: [timed(name)] for name in runs}
        if _spent_s(done) >= limit_s * len(runs):
            return done
        done = {name: [] for name in runs}
        turns = 0
        while not turns or (_spent_s(done) < limit_s * len(runs) and turns < max_count):
            turns += 1
            for name in list(runs)[:: 1 if turns % 2 else -1]:  # so that none always runs after the same one
                done[name].append(timed(name))
        return done

    with ThreadPoolExecutor(point.lanes, "plan") as executor:
        lanes = [
            future.result() for future in [executor.submit(lane, number) for number in range(point.lanes)]
        ]
    return {name: _summarize_lanes(point, [done[name] for done in lanes]) for name in runs}


def make_cpu_clock(lanes: int, *, own: bool) -> Callable[[], int]:
    """The processor time in ns of a lane, for a runtime that computes on its thread, or on `own` threads.

    In the second case it is an equal share of the whole process's.
    """
    return (lambda: time.process_time_ns() // lanes) if own else time.thread_time_ns


class _BatchTiming(NamedTuple):
    took_ns: int
    used_ns: int


def _spent_s(done: Mapping[NameT, Sequence[_BatchTiming]]) -> float:
    return sum(batch.took_ns for batches in done.values() for batch in batches) / 1e9


def _summarize_lanes(point: OperatingPoint, lanes: Sequence[Sequence[_BatchTiming]]) -> ThroughputSample:
    batches = [batch for each in lanes for batch in each]
    return ThroughputSample(
        # Each lane by its own time: lanes end at different times.
        frames_per_s=sum(point.batch * len(b) / max(sum(x.took_ns for x in b), 1) * 1e9 for b in lanes),
        batch_ms=float(np.median([batch.took_ns for batch in batches])) / 1e6,
        cpu_ms=sum(batch.used_ns for batch in batches) / 1e6 / (point.batch * len(batches)),
    )


def make_noise_pictures(spec: InputSpec, count: int) -> NDArray[np.uint8]:
    """Random pictures (count, H, W, 3), the same each time; for warming up and measuring."""
    size = (count, spec.height_px, spec.width_px, 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


# --- the search ---------------------------------------------------------------------------------------------

TrialRunner = Callable[[OperatingPoint, float], ThroughputSample]
"""Runs a point for about the given time in seconds."""


def autotune_plan(
    run: Callable[[int], object],
    *,
    device: str,
    max_batch: int,
    fixed_batch: int | None,
    cores: int,
    latency_budget_ms: float | None = None,
    spend_s: float = TIME_BUDGET_S,
    on_trial: Callable[[], None] = lambda: None,
    has_own_threads: bool = False,
) -> AutotuneResult:
    """Find the best plan for an engine that is warmed up; `run` computes a batch of the given size.

    It takes `spend_s`, and at most `FINAL_TIME_BUDGET_S` more. `on_trial` is called before each trial.
    `has_own_threads`: the runtime computes on threads of its own, as OpenVINO does.

    Raises what `run` raises if not even the smallest batch can be computed.
    """
    request = AutotuneRequest(device, max_batch, fixed_batch, cores, latency_budget_ms)

    def trial(point: OperatingPoint, limit_s: float) -> ThroughputSample:
        on_trial()
        return run_trial(run, point, limit_s, cpu_clock=make_cpu_clock(point.lanes, own=has_own_threads))

    return search_plan(trial, request, spend_s=spend_s)


@dataclass(frozen=True, slots=True)
class AutotuneRequest:
    """The device, the machine and the limits for which a plan is searched."""

    device: str
    max_batch: int
    fixed_batch: int | None
    cores: int
    latency_budget_ms: float | None = None

    def batches(self) -> tuple[int, ...]:
        """The batch sizes to try."""
        return list_batch_sizes(self.max_batch) if self.fixed_batch is None else (self.fixed_batch,)

    def lanes(self) -> tuple[int, ...]:
        """The numbers of lanes to try: up to the number of cores, or one to three for a GPU."""
        if self.device != "cpu":
            return (1, 2, 3)
        cores = bounded_cores(self.cores)
        # With hyper-threading, half the cores are the physical ones.
        return tuple(sorted({*list_batch_sizes(cores), max(1, cores // 2)}))

    def default_point(self) -> OperatingPoint:
        """The point of the default plan."""
        plan = make_default_plan(self.device, self.max_batch, self.fixed_batch, self.cores)
        return OperatingPoint(plan.lanes, plan.max_batch)


def search_plan(
    trial: TrialRunner,
    request: AutotuneRequest,
    *,
    clock: Callable[[], int] = time.monotonic_ns,
    spend_s: float = TIME_BUDGET_S,
) -> AutotuneResult:
    """Try points until the best is known or the time is spent, and choose."""
    began_ns = clock()
    measurements = _Measurements(request)

    def left_s() -> float:
        return spend_s - (clock() - began_ns) / 1e9

    # Small batches first: they are fast, and larger ones are predicted from them.
    for batch in request.batches():
        for lanes in request.lanes():
            point = OperatingPoint(lanes, batch)
            note = measurements.skip_reason(point, left_s())
            if note is None:
                measurements.run(trial, point, _TRIAL_S)
            else:
                measurements.notes[point] = note
    for number in range(1, _ROUNDS):
        points_to_rerun = measurements.points_to_rerun(
            _MIN_SHARES_BY_ROUND[min(number, len(_MIN_SHARES_BY_ROUND)) - 1], left_s()
        )
        if len(points_to_rerun) < 2:
            break
        # In turns from both ends, so that no point is always the first.
        for point in points_to_rerun if number % 2 else reversed(points_to_rerun):
            if point in measurements.samples:
                measurements.run(trial, point, _TRIAL_S)
    _run_final_rounds(measurements, trial, left_s)
    return measurements.measured((clock() - began_ns) / 1e9)


def _run_final_rounds(measurements: "_Measurements", trial: TrialRunner, left_s: Callable[[], float]) -> None:
    """Measure the default point and the one that would replace it again, in turns.

    The best of many noisy measurements is biased (winner's curse), so the finalists are measured afresh.
    """
    finalists = measurements.finalists()
    before = {point: len(measurements.samples[point]) for point in finalists}
    for number in range(_FINAL_ROUNDS):
        costs_s = [
            measurements.cost_s(point, _TRIAL_S) for point in finalists if point in measurements.samples
        ]
        if len(costs_s) < 2 or sum(costs_s) > left_s() + FINAL_TIME_BUDGET_S:
            break
        for point in finalists if number % 2 else reversed(finalists):
            measurements.run(trial, point, _TRIAL_S)
    runs = {point: measurements.samples[point] for point in finalists if point in measurements.samples}
    if len(runs) < 2:
        return
    final_samples = {point: samples[before[point] :] for point, samples in runs.items()}
    rounds = min(map(len, final_samples.values()))
    if rounds == 0:  # there was no time: use the earlier measurements
        final_samples, rounds = runs, min(map(len, runs.values()))
    measurements.final_samples = {point: samples[:rounds] for point, samples in final_samples.items()}


def fit_latency(lanes: int, points: Mapping[int, float]) -> LatencyFit:
    """Fit durations in ms by batch size as a * n + b, a and b >= 0, by least squares of relative errors."""
    # Weights 1/d²: a long batch is not measured more precisely than a short one.
    sums = [0.0] * 5
    for batch, took_ms in points.items():
        weight = 1 / max(took_ms, 1e-9) ** 2
        for index, value in enumerate((1.0, batch, batch * batch, took_ms, batch * took_ms)):
            sums[index] += weight * value
    one, n, nn, d, nd = sums
    spread = one * nn - n * n
    slope = (one * nd - n * d) / spread if len(points) > 1 and spread > 0 else nd / nn
    if slope < 0:
        return LatencyFit(lanes, 0.0, d / one)
    fixed = (d - slope * n) / one
    return LatencyFit(lanes, slope, fixed) if fixed > 0 else LatencyFit(lanes, nd / nn, 0.0)


def choose_point(
    samples: Mapping[OperatingPoint, Sequence[ThroughputSample]],
    latency_budget_ms: float | None,
    usual: OperatingPoint,
) -> tuple[OperatingPoint, str]:
    """The best of the points that were run most often, and why in a clause.

    The best has the highest throughput; of equal ones, the shortest batch. `usual`, the default point of such
    a device, is replaced only by a point that is clearly better.
    """
    finals, speeds = _summarize_complete(samples)
    within = _filter_by_latency(finals, latency_budget_ms)
    if not within:
        nearest = _filter_by_latency(
            finals, _LATENCY_TOLERANCE * min(sample.batch_ms for sample in finals.values())
        )
        best = max(nearest, key=lambda point: speeds[point])
        return (
            best,
            f"no batch is done within {latency_budget_ms:g} ms; nearest: "
            f"{_describe_sample(best, finals[best])}",
        )
    rivals = [p for p in within if usual not in within or _clearly_better(samples[p], samples[usual])]
    top = max((speeds[point] for point in rivals), default=0.0)
    equals = [point for point in rivals if speeds[point] >= _EQUAL_SHARE * top]
    best = min(equals, key=lambda point: (within[point].batch_ms, point), default=usual)
    limit = "" if latency_budget_ms is None else f", the most within {latency_budget_ms:g} ms"
    kept = "" if best != usual or len(within) == 1 else ", and no other point is clearly faster"
    return best, f"{_describe_sample(best, within[best])}{limit}{kept}"


def _clearly_better(runs: Sequence[ThroughputSample], reference: Sequence[ThroughputSample]) -> bool:
    """Whether one point is faster than another by more than measurement noise."""
    ratios = sorted(
        ours.frames_per_s / theirs.frames_per_s for ours, theirs in zip(runs, reference, strict=True)
    )
    if len(ratios) < _MIN_SURE_ROUNDS:
        return ratios[0] > (1.25 if len(ratios) == 1 else 1.1)
    return median(ratios) > 1.02 and ratios[len(ratios) // 4] > 1


def _summarize_complete(
    samples: Mapping[OperatingPoint, Sequence[ThroughputSample]],
) -> tuple[dict[OperatingPoint, ThroughputSample], dict[OperatingPoint, float]]:
    """The points that were run in every round: their medians, and their relative speeds."""
    max_count = max(len(runs) for runs in samples.values())
    finals = {point: runs for point, runs in samples.items() if len(runs) == max_count}
    return {point: _median_sample(runs) for point, runs in finals.items()}, compute_relative_speeds(finals)


def compute_relative_speeds(
    samples: Mapping[OperatingPoint, Sequence[ThroughputSample]],
) -> dict[OperatingPoint, float]:
    """The speed of points that were all run once a round: the median of speed divided by the round's median.

    Other load slows all points of a round, and cancels out.
    """
    rounds = zip(*samples.values(), strict=True)
    usual = [median(sample.frames_per_s for sample in each) for each in rounds]
    return {
        point: median(sample.frames_per_s / speed for sample, speed in zip(runs, usual, strict=True))
        for point, runs in samples.items()
    }


def _picture_ms(sample: ThroughputSample, lanes: int, request_ms: float) -> float:
    """The time of a lane for one picture, with its part of a request."""
    return 1000 * lanes / sample.frames_per_s + request_ms


def _filter_by_latency(
    finals: Mapping[OperatingPoint, ThroughputSample], budget_ms: float | None
) -> dict[OperatingPoint, ThroughputSample]:
    return {p: s for p, s in finals.items() if budget_ms is None or s.batch_ms <= budget_ms}


def _describe_sample(point: OperatingPoint, sample: ThroughputSample) -> str:
    return f"{point} gave {sample.frames_per_s:.1f} frames/s at {sample.batch_ms:.1f} ms a batch"


def _median_sample(runs: Iterable[ThroughputSample]) -> ThroughputSample:
    rows = list(runs)
    return ThroughputSample(
        median(s.frames_per_s for s in rows), median(s.batch_ms for s in rows), median(s.cpu_ms for s in rows)
    )


@dataclass(slots=True)
class _Measurements:
    """The measurements so far, and what follows from them."""

    request: AutotuneRequest
    samples: dict[OperatingPoint, list[ThroughputSample]] = field(default_factory=dict)
    notes: dict[OperatingPoint, str] = field(default_factory=dict)
    failed: int | None = None
    """The smallest batch that a single lane could not compute."""
    final_samples: dict[OperatingPoint, list[ThroughputSample]] = field(default_factory=dict)
    """The samples of the final: the default point and the best of the others."""
    out_of_time: bool = False
    """A point was not run only because there was no time."""

    def run(self, trial: TrialRunner, point: OperatingPoint, limit_s: float) -> None:
        """Run a point once more; one that fails is removed, with the reason."""
        try:
            sample = trial(point, limit_s)
        except Exception as error:
            if point == OperatingPoint(1, self.request.batches()[0]):
                raise  # not even the smallest point works
            self.samples.pop(point, None)
            message = " ".join(str(error).split()) or type(error).__name__
            self.notes[point] = f"failed: {message[:200]}"
            if point.lanes == 1:
                self.failed = point.batch
                self.samples = {p: runs for p, runs in self.samples.items() if p.batch < point.batch}
            return
        self.samples.setdefault(point, []).append(sample)

    def skip_reason(self, point: OperatingPoint, left_s: float) -> str | None:
        """Why a point need not be run, or None."""
        if self.failed is not None and point.batch >= self.failed:
            return f"a batch of {self.failed} failed"
        if not self.samples:
            return None
        expected_ms, sure = self._expected_ms(point)
        budget_ms = self.request.latency_budget_ms
        least_ms = min(_median_sample(runs).batch_ms for runs in self.samples.values())
        if budget_ms is not None and expected_ms > _LATENCY_TOLERANCE * max(budget_ms, least_ms):
            return f"about {expected_ms:.0f} ms by the fit, over the budget"
        speed = point.lanes * point.batch * 1000 / expected_ms
        best = max(_median_sample(runs).frames_per_s for runs in self.samples.values())
        if sure and speed < _MIN_PREDICTED_SHARE * best:
            return f"at most about {speed:.1f} frames/s by the fit"
        if self.cost_s(point, _TRIAL_S) > left_s:
            self.out_of_time = True
            return f"at least about {expected_ms:.0f} ms a batch: no time to try it"
        return None

    def _expected_ms(self, point: OperatingPoint) -> tuple[float, bool]:
        """The least time of a batch in ms, and whether a speed may be predicted from it."""
        known = self._durations_ms(point.lanes)
        if point.batch in known:
            return known[point.batch], True
        if len(known) > 1:
            return fit_latency(point.lanes, known).batch_ms(point.batch), True
        if known:
            # Only one batch size is known: at best, a larger batch takes no longer.
            return max(known.values()), True
        fewer = [p for p in self.samples if p.lanes < point.lanes and p.batch <= point.batch]
        nearest = max(fewer, default=None)
        return (_median_sample(self.samples[nearest]).batch_ms, False) if nearest else (0.001, False)

    def _durations_ms(self, lanes: int) -> dict[int, float]:
        return {
            point.batch: _median_sample(runs).batch_ms
            for point, runs in self.samples.items()
            if point.lanes == lanes
        }

    def cost_s(self, point: OperatingPoint, limit_s: float) -> float:
        """The time of a trial of this point: one batch to warm up, and then its time."""
        batch_s = self._expected_ms(point)[0] / 1000
        return batch_s if batch_s >= limit_s else batch_s + min(limit_s + batch_s / 2, MAX_BATCHES * batch_s)

    def points_to_rerun(self, share: float, left_s: float) -> list[OperatingPoint]:
        """The points for another round, of those that were run in every round, as the time allows."""
        finals, speeds = _summarize_complete(self.samples)
        budget_ms = self.request.latency_budget_ms
        within = _filter_by_latency(finals, None if budget_ms is None else 1.1 * budget_ms)
        if within:
            least = share * max(speeds[point] for point in within)
            running = sorted((p for p in within if speeds[p] >= least), key=lambda point: -speeds[point])
        else:
            most_ms = _LATENCY_TOLERANCE * min(sample.batch_ms for sample in finals.values())
            running = sorted(_filter_by_latency(finals, most_ms), key=lambda point: -speeds[point])
        usual = self.request.default_point()
        if usual in running or (usual in within and len(self.samples[usual]) < _MIN_SURE_ROUNDS):
            # The default point is dropped only after a few rounds.
            running = [usual, *(point for point in running if point != usual)]
        return sorted(self._affordable(running, left_s))

    def _affordable(self, running: list[OperatingPoint], left_s: float) -> list[OperatingPoint]:
        """As many of the first points as can be run until one is sure; else two of them, or none."""
        done = max(len(runs) for runs in self.samples.values())
        costs_s = [self.cost_s(point, _TRIAL_S) for point in running]
        for count in range(len(running), 1, -1):
            rounds = max(1, _MIN_SURE_ROUNDS - done) if count > 2 else 1
            if rounds * sum(costs_s[:count]) <= left_s:
                return running[:count]
        return []

    def finalists(self) -> list[OperatingPoint]:
        """The default point and the one that would replace it; empty if it is the best itself."""
        usual, budget_ms = self.request.default_point(), self.request.latency_budget_ms
        point, _ = choose_point(self.samples, budget_ms, usual)
        known = {usual: _median_sample(self.samples[usual])} if usual in self.samples else {}
        return [usual, point] if point != usual and _filter_by_latency(known, budget_ms) else []

    def measured(self, spent_s: float) -> AutotuneResult:
        """The choice, and all measurements."""
        request = self.request
        usual = request.default_point()
        point, why = choose_point(self.final_samples or self.samples, request.latency_budget_ms, usual)
        if (pair := self._find_pair(point)) is not None:
            point, why = pair, f"{why}; pairs, as a request costs about {REQUEST_MS:g} ms"
        share = self._compute_cpu_share(point)
        if share < MIN_CPU_SHARE:
            why = f"{why}; the lanes got only {share:.0%} of the processor"
        if self.out_of_time and len(self.samples) == 1 and usual.batch == point.batch and usual != point:
            point, why = usual, f"{why}; too slow to try more, so the default is used: {usual}"
        return AutotuneResult(
            table=tuple(
                self._make_row(OperatingPoint(n, size)) for n in request.lanes() for size in request.batches()
            ),
            fits=tuple(
                fit_latency(n, points) for n in request.lanes() if len(points := self._durations_ms(n)) > 1
            ),
            choice=point,
            buckets=tuple(size for size in request.batches() if size <= point.batch),
            reason=f"measured in {spent_s:.1f} s: {why} ({len(self.samples)} points tried)",
            spent_s=spent_s,
            settled=self._is_reliable(point, share),
        )

    def _find_pair(self, point: OperatingPoint) -> OperatingPoint | None:
        """The same lanes with batches of two, where these gain with the cost of requests; None elsewhere."""
        pair = OperatingPoint(point.lanes, 2)
        if self.request.device != "cpu" or point.batch != 1 or pair not in self.samples:
            return None
        runs = tuple(zip(self.samples[point], self.samples[pair], strict=False))
        budget_ms, batch_ms = self.request.latency_budget_ms, _median_sample(self.samples[pair]).batch_ms
        if len(runs) < _MIN_SURE_ROUNDS or (budget_ms is not None and batch_ms > budget_ms):
            return None
        gains = sorted(
            _picture_ms(single, point.lanes, REQUEST_MS) / _picture_ms(double, point.lanes, REQUEST_MS / 2)
            for single, double in runs
        )
        return pair if median(gains) >= _MIN_PAIR_GAIN and gains[len(gains) // 4] > 1 else None

    def _is_reliable(self, point: OperatingPoint, share: float) -> bool:
        """Whether the choice may be cached: not if other processes used much of the processor meanwhile.

        The default point needs less of it, because it would be used without any measurement.
        """
        if len(self.request.lanes()) * len(self.request.batches()) == 1:
            return True  # there is nothing to choose
        is_default = point.lanes == self.request.default_point().lanes and point.batch <= 2
        return share >= (MIN_CPU_SHARE_DEFAULT if is_default else MIN_CPU_SHARE)

    def _compute_cpu_share(self, point: OperatingPoint) -> float:
        """The share of the processor that the lanes could use and got; 1 on a GPU."""
        if self.request.device != "cpu":
            return 1.0
        sample = _median_sample(self.samples[point])
        return sample.cpu_ms * sample.frames_per_s / 1000 / min(point.lanes, self.request.cores)

    def _make_row(self, point: OperatingPoint) -> MeasuredPoint:
        runs = self.samples.get(point)
        if not runs:
            return MeasuredPoint(point, note=self.notes.get(point, f"a batch of {self.failed} failed"))
        middle = _median_sample(runs)
        return MeasuredPoint(
            point,
            middle.frames_per_s,
            middle.batch_ms,
            middle.cpu_ms,
            len(runs),
            self.notes.get(point, ""),
        )
