"""The measured choice of the engine: runtime, precision and options, beside onnxruntime in fp32.

The first candidate is the reference, which runs everywhere. Every other one has to pass a parity check and to
be clearly faster. All candidates run alone, in turns; the two fastest that pass the check then run again
beside the reference, on all lanes at once, because a lane alone mispredicts what lanes together can do. The
second measurement decides. The choice is cached by graphs, device, processor, cores and versions.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

from visionedge.engine.autotune import MIN_CPU_SHARE, MIN_CPU_SHARE_DEFAULT, ThroughputSample
from visionedge.engine.device.devices import Runtime
from visionedge.engine.device.faults import describe_error
from visionedge.engine.device.session import PLAIN
from visionedge.engine.plan import OperatingPoint, load_cached, read_cpu_flags, read_cpu_name, read_versions
from visionedge.runtime.files import DamagedStateFileError, read_json, write_atomically, write_json

log = logging.getLogger(__name__)

CHOICES_FOLDER = "engines"
_SCHEMA = "visionedge/engine-choice/1"
_MAX_CACHED_CHOICES = 32

TIME_BUDGET_S = 15.0
"""For the choice of the engine and its plan together, at the first start."""

PLAN_TIME_S = 5.0
"""The part of it that is kept for the plan: lanes and batch size."""

_TOGETHER_TIME_S = 2.5
_OPEN_LIMIT_S, _CHECK_LIMIT_S = 6.0, 4.0
_CHECK_TIME_S = 1.0
"""Kept for the parity checks while the candidates run alone."""

_RUN_LIMIT_S = 2.0
_RUN_LIMIT_FACTOR = 10
"""A candidate that needs longer for one step is excluded: it hangs, or is too slow. A run may take so many
times as long as a batch of the reference."""

_TRIAL_S = 0.08
_ROUNDS_ALONE = 4
_ROUNDS_TOGETHER = 9
_OVERRUN_S = 1.0
"""A step that is measured may end so much later than planned; `PLAN_TIME_S` has room for it."""

_MIN_ROUNDS_TOGETHER = 3
_MAX_TOGETHER = 3
_MIN_SPEEDUP_ALONE = 0.9
"""Slower alone than this, relative to the reference, a candidate is not measured again."""

MIN_SPEEDUP: Mapping[str, float] = {"fp32": 1.05}
MIN_SPEEDUP_REDUCED = 1.1
"""How much faster a candidate must be; more where it has a lower precision, which costs accuracy."""

_EQUAL_SHARE = 0.98
"""Candidates this near to the fastest count as equally fast; the first of the list is chosen."""


@dataclass(frozen=True, slots=True)
class EngineCandidate:
    """What may compute a model on a device. `options` are those of the device, by name."""

    runtime: Runtime
    precision: str
    options: str = PLAIN

    def __str__(self) -> str:
        options = "" if self.options == PLAIN else f" with {self.options}"
        return f"{self.runtime} {self.precision}{options}"


@dataclass(frozen=True, slots=True)
class CandidateFigures:
    """What was measured of a candidate; figures are None where nothing was measured.

    `ms`: a batch on one lane alone. `frames_per_s`: all lanes at once. `speedup`: relative to the reference,
    in the last measurement. `agreement`: the parity check, in a clause. `note`: why it is not used, or empty.
    """

    candidate: EngineCandidate
    ms: float | None = None
    frames_per_s: float | None = None
    speedup: float | None = None
    agreement: str = ""
    note: str = ""

    def document(self) -> dict[str, Any]:
        """As status, reports and the cache contain it."""
        return {
            **asdict(self.candidate),
            "ms": _round_or_none(self.ms),
            "framesPerSecond": _round_or_none(self.frames_per_s),
            "timesAsFast": _round_or_none(self.speedup),
            "agreement": self.agreement,
            "note": self.note,
        }

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "CandidateFigures":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: the document has another form.
        """
        return CandidateFigures(
            _parse_candidate(document),
            _float_or_none(document["ms"]),
            _float_or_none(document["framesPerSecond"]),
            _float_or_none(document["timesAsFast"]),
            str(document["agreement"]),
            str(document["note"]),
        )


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine in use and the reason in one line. `results` is empty if nothing was measured.

    `settled` False: other processes kept the machine busy. The choice is used now, and measured again at the
    next start.
    """

    candidate: EngineCandidate
    reason: str
    results: tuple[CandidateFigures, ...] = ()
    settled: bool = True

    @property
    def precision(self) -> str:
        """The precision in use."""
        return self.candidate.precision

    @property
    def ms(self) -> Mapping[str, float]:
        """The time of a batch on one lane alone in ms by precision, of the fastest candidate of each."""
        found: dict[str, float] = {}
        for result in self.results:
            if result.ms is not None:
                precision = result.candidate.precision
                found[precision] = min(result.ms, found.get(precision, result.ms))
        return found

    def document(self) -> dict[str, Any]:
        """As reports, the cache and the protocol contain it."""
        return {
            **asdict(self.candidate),
            "reason": self.reason,
            "candidates": [result.document() for result in self.results],
        }

    def precision_document(self) -> dict[str, Any]:
        """`engine.precision` of the status."""
        milliseconds = {name: round(value, 3) for name, value in self.ms.items()}
        return {"precision": self.precision, "reason": self.reason, "milliseconds": milliseconds}

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "EngineChoice":
        """The reverse of `document`.

        Raises:
            KeyError, TypeError, ValueError: the document has another form.
        """
        results = tuple(CandidateFigures.from_document(each) for each in document["candidates"])
        return EngineChoice(_parse_candidate(document), str(document["reason"]), results)


def _parse_candidate(document: Mapping[str, Any]) -> EngineCandidate:
    runtime = document["runtime"]
    if runtime not in ("onnxruntime", "openvino"):
        raise ValueError(f"{runtime!r} is not a runtime")
    return EngineCandidate(runtime, str(document["precision"]), str(document["options"]))


def _round_or_none(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CandidateAgreement:
    """What the parity check found, in a clause; and why the candidate must not be used here, or None."""

    message: str
    refusal: str | None = None


class CandidateTrials(Protocol):
    """How candidates are tried. Each method raises whatever the runtime raises."""

    def open(self, candidate: EngineCandidate) -> None:
        """Open a session; the reference is open already."""

    def measure(self, candidate: EngineCandidate, point: OperatingPoint, limit_s: float) -> ThroughputSample:
        """Compute batches on `point.lanes` threads for about `limit_s`."""

    def check(self, candidate: EngineCandidate) -> CandidateAgreement:
        """Compare its results with those of onnxruntime in fp32 on the CPU."""


T = TypeVar("T")


class StepRunner(Protocol):
    """Runs one step of a measurement, for a limited time."""

    def __call__(self, step: Callable[[], T], limit_s: float) -> T:
        """The result of the step; raises TimeoutError where it takes longer, else what the step raises."""


@dataclass(slots=True)
class Progress:
    """Logs a line for each second of a measurement. `doing` is what is measured now."""

    budget_s: float
    clock: Callable[[], float] = time.monotonic
    doing: str = ""
    _began_s: float = 0.0
    _seconds: int = 0

    def __post_init__(self) -> None:
        self._began_s = self.clock()

    @property
    def left_s(self) -> float:
        """The time that is left of the budget."""
        return self.budget_s - (self.clock() - self._began_s)

    def tick(self, doing: str | None = None) -> None:
        """Log what is measured now, if another second has passed."""
        self.doing = self.doing if doing is None else doing
        seconds = int(self.clock() - self._began_s)
        if seconds > self._seconds:
            self._seconds = seconds
            log.info("measuring, %d of at most %.0f s: %s", seconds, self.budget_s, self.doing)


def run_with_limit(step: Callable[[], T], limit_s: float, on_second: Callable[[], None]) -> T:
    """Run a step on another thread; a thread that hangs is left behind, because it cannot be ended.

    Raises:
        TimeoutError: the step takes longer than `limit_s`.
        Exception: what the step raises.
    """
    done, results, errors = threading.Event(), list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(step())
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that waits
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="engine-trial", daemon=True).start()
    left_s = limit_s
    while not done.wait(min(1.0, max(0.0, left_s))):
        left_s -= 1.0
        on_second()
        if left_s <= 0:
            raise TimeoutError(f"gave no answer within {limit_s:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


@dataclass(slots=True)
class CrashRecord:
    """Names the candidate that is tried, on the disk: one that ends the process is not tried again.

    A process that ends by itself has its candidate excluded at once (`record_crash`); one that was ended from
    outside, only after the second time. Without a folder nothing is recorded.
    """

    path: Path | None
    crashes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None:
            with suppress(OSError, ValueError, TypeError, AttributeError, DamagedStateFileError):
                self.crashes = {str(name): int(count) for name, count in read_json(self.path).items()}

    def is_excluded(self, candidate: EngineCandidate) -> bool:
        """Whether it has ended the process."""
        return self.crashes.get(str(candidate), 0) >= _CRASHES

    def begin(self, candidate: EngineCandidate) -> None:
        """This candidate is tried now."""
        name = str(candidate)
        self._write({**self.crashes, name: self.crashes.get(name, 0) + 1})

    def end(self) -> None:
        """The process survived it."""
        self._write(self.crashes)

    def clear(self) -> None:
        """The choice is made, and names what was excluded."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _write(self, crashes: Mapping[str, int]) -> None:
        if self.path is None:
            return
        with suppress(OSError):  # a full disk: without a record the measurement goes on
            if crashes:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, json.dumps(crashes).encode(), mode=0o600)
            else:
                self.path.unlink(missing_ok=True)


_CRASHES = 2
_TRYING_SUFFIX = ".trying"


def record_crash(data: Path | None) -> bool:
    """A process that opened an engine crashed: exclude the candidate that it tried; whether there was one."""
    found = [] if data is None else _list_files(data / CHOICES_FOLDER, f"*{_TRYING_SUFFIX}")
    for path in found:
        record = CrashRecord(path)
        for name in record.crashes:
            record.crashes[name] = _CRASHES
        record.end()
    return bool(found)


@dataclass(slots=True)
class _Entry:
    """A candidate in the measurement: its samples alone, and together with the fastest others."""

    result: CandidateFigures
    alone: list[ThroughputSample] = field(default_factory=list)
    together: list[ThroughputSample] = field(default_factory=list)

    def exclude(self, note: str) -> None:
        self.result = replace(self.result, note=note)

    @property
    def is_excluded(self) -> bool:
        return bool(self.result.note)


class _Comparison:
    """The candidates in order of preference; the first one is the reference, whose errors are raised."""

    def __init__(
        self,
        candidates: Sequence[EngineCandidate],
        trials: CandidateTrials,
        *,
        point: OperatingPoint,
        progress: Progress,
        runner: StepRunner,
        crashes: CrashRecord,
        computes_on_cpu: bool,
    ) -> None:
        self.entries = {candidate: _Entry(CandidateFigures(candidate)) for candidate in candidates}
        self._reference = candidates[0]
        self._trials = trials
        self._point = point
        self._progress = progress
        self._runner = runner
        self._crashes = crashes
        self._computes_on_cpu = computes_on_cpu

    # --- steps ----------------------------------------------------------------------------------------------

    def open(self, limit_s: float | None) -> None:
        """Open every candidate but the reference; without a limit, as building an engine takes minutes."""
        for candidate in list(self.entries)[1:]:
            entry = self.entries[candidate]
            if self._crashes.is_excluded(candidate):
                entry.exclude("ended the engine's process when it was tried")
            elif limit_s is not None and self._left_s() <= 0:
                entry.exclude("there was no time to try it")
            else:
                limit_s = None if limit_s is None else min(limit_s, self._left_s())
                self._try(candidate, "opening", partial(self._trials.open, candidate), limit_s)

    def measure_alone(self) -> None:
        """Run all in turns on one lane; each keeps its figures and its speed relative to the reference."""
        point = OperatingPoint(1, self._point.batch)
        for number in range(_ROUNDS_ALONE):
            running = [candidate for candidate, entry in self.entries.items() if not entry.is_excluded]
            # The reference runs once even if all others have failed: it shows how busy the machine is.
            if (number and len(running) < 2) or self._left_s() <= (_CHECK_TIME_S if number else 0):
                break
            for candidate in reversed(running) if number % 2 else running:
                sample = self._measure(candidate, point, "alone", self._left_s())
                if sample is not None:
                    self.entries[candidate].alone.append(sample)
        reference = self.entries[self._reference]
        for entry in self.entries.values():
            if entry.alone and not entry.is_excluded:
                ms, speedup = median(s.batch_ms for s in entry.alone), _speedup(entry.alone, reference.alone)
                entry.result = replace(entry.result, ms=ms, speedup=speedup)
                if speedup < _MIN_SPEEDUP_ALONE:
                    entry.exclude(f"{speedup:.2f} times as fast as {self._reference} alone")

    def select_fastest(self) -> None:
        """Keep the fastest that pass the parity check, and note why the others are not measured again."""
        places = _MAX_TOGETHER - 1
        others = [c for c, entry in self.entries.items() if c != self._reference and not entry.is_excluded]
        for candidate in [c for c in others if not self.entries[c].alone]:
            self.entries[candidate].exclude("there was no time to measure it")
            others.remove(candidate)
        for candidate in sorted(others, key=lambda c: -(self.entries[c].result.speedup or 0)):
            entry = self.entries[candidate]
            if places == 0:
                entry.exclude(f"others are faster alone ({entry.result.speedup:.2f} times as fast)")
            elif self._left_s() <= 0:
                entry.exclude("there was no time to check its results")
            elif self._passes(candidate):
                places -= 1

    def measure_together(self) -> None:
        """Run those that are left in turns on all lanes, as the engine will."""
        for number in range(_ROUNDS_TOGETHER):
            running = [candidate for candidate, entry in self.entries.items() if not entry.is_excluded]
            left_s = self._progress.left_s - PLAN_TIME_S
            if len(running) < 2 or left_s <= 0:
                break
            for candidate in reversed(running) if number % 2 else running:
                sample = self._measure(candidate, self._point, f"on {self._point}", left_s)
                if sample is not None:
                    self.entries[candidate].together.append(sample)
        reference = self.entries[self._reference]
        for entry in self.entries.values():
            if entry.together and not entry.is_excluded:
                frames_per_s = median(sample.frames_per_s for sample in entry.together)
                speedup = _speedup(entry.together, reference.together)
                entry.result = replace(entry.result, frames_per_s=frames_per_s, speedup=speedup)

    def decide(self) -> EngineChoice:
        """The fastest that is clearly faster than the reference; of equal ones the first."""
        reference, faster = self.entries[self._reference], list[tuple[EngineCandidate, float]]()
        for candidate, entry in self.entries.items():
            speedup = entry.result.speedup
            if candidate == self._reference or entry.is_excluded or speedup is None:
                continue
            if len(entry.together) < _MIN_ROUNDS_TOGETHER:
                entry.exclude("there was no time to measure it again")
            elif _is_clearly_faster(candidate, entry.together, reference.together):
                faster.append((candidate, speedup))
            else:
                entry.exclude(f"{speedup:.2f} times as fast as {self._reference}: no clear gain")
        best = max((speedup for _, speedup in faster), default=1.0)
        chosen = next((c for c, speedup in faster if speedup >= _EQUAL_SHARE * best), self._reference)
        for candidate, speedup in faster:
            if candidate != chosen:
                self.entries[candidate].exclude(f"{speedup:.2f} times as fast as {self._reference}")
        if chosen != self._reference:
            reference.exclude(f"{chosen} is {self.entries[chosen].result.speedup:.2f} times as fast")
        results = tuple(entry.result for entry in self.entries.values())
        share = self._compute_cpu_share()
        settled = share >= (MIN_CPU_SHARE_DEFAULT if chosen == self._reference else MIN_CPU_SHARE)
        busy = "" if settled else f"; other processes left only {share:.0%} of the processor"
        return EngineChoice(chosen, self._explain(chosen) + busy, results, settled)

    # --- helpers --------------------------------------------------------------------------------------------

    def _compute_cpu_share(self) -> float:
        """The share of the processor that the reference could use and got; 1 on a GPU, 0 if it did not run."""
        if not self._computes_on_cpu:
            return 1.0
        entry = self.entries[self._reference]
        runs = [(entry.alone, 1), (entry.together, self._point.lanes)]
        shares = [
            median(sample.cpu_ms * sample.frames_per_s for sample in samples) / 1000 / lanes
            for samples, lanes in runs
            if samples
        ]
        return min(shares, default=0.0)

    def _left_s(self) -> float:
        """The time before the fastest must be measured together."""
        return self._progress.left_s - PLAN_TIME_S - _TOGETHER_TIME_S

    def _try(
        self, candidate: EngineCandidate, doing: str, step: Callable[[], T], limit_s: float | None
    ) -> T | None:
        """The result of a step; None where the candidate failed, which is noted.

        An error of the reference is raised.
        """
        self._progress.tick(f"{doing} {candidate}")
        self._crashes.begin(candidate)
        try:
            return self._runner(step, float("inf") if limit_s is None else limit_s)
        except Exception as error:
            if candidate == self._reference:
                raise
            message = str(error) if isinstance(error, TimeoutError) else describe_error(error)
            log.warning("%s cannot be used: %s (%s)", candidate, message, doing)
            self.entries[candidate].exclude(f"{doing}: {message}")
            return None
        finally:
            self._crashes.end()

    def _measure(
        self, candidate: EngineCandidate, point: OperatingPoint, doing: str, left_s: float
    ) -> ThroughputSample | None:
        known = [sample.batch_ms for sample in self.entries[self._reference].alone]
        slow_s = _RUN_LIMIT_FACTOR * median(known) / 1000 if known else _CHECK_LIMIT_S
        limit_s = min(max(_RUN_LIMIT_S, slow_s), left_s + _OVERRUN_S)
        step = partial(self._trials.measure, candidate, point, _TRIAL_S)
        return self._try(candidate, f"running {doing}:", step, limit_s)

    def _passes(self, candidate: EngineCandidate) -> bool:
        limit_s = min(_CHECK_LIMIT_S, self._left_s() + _OVERRUN_S)
        agreement = self._try(candidate, "comparing", partial(self._trials.check, candidate), limit_s)
        if agreement is None:
            return False
        entry = self.entries[candidate]
        entry.result = replace(entry.result, agreement=agreement.message)
        if agreement.refusal is not None:
            entry.exclude(f"its results differ: {agreement.refusal}")
        return agreement.refusal is None

    def _explain(self, chosen: EngineCandidate) -> str:
        results = [entry.result for entry in self.entries.values()]
        figures = ", ".join(
            f"{result.candidate} {result.frames_per_s:.1f} frames/s"
            for result in results
            if result.frames_per_s is not None
        )
        result = self.entries[chosen].result
        if chosen != self._reference:
            return (
                f"{chosen} was measured {result.speedup:.2f} times as fast as {self._reference} here"
                f" ({figures}); {result.agreement}"
            )
        excluded = "; ".join(f"{r.candidate}: {r.note}" for r in results if r.candidate != chosen)
        return f"no other engine is clearly faster here ({figures or 'none was measured again'}); {excluded}"


def _speedup(ours: Sequence[ThroughputSample], theirs: Sequence[ThroughputSample]) -> float:
    """The median of the rounds' ratios: other load slows all of a round, and cancels out."""
    return median(a.frames_per_s / b.frames_per_s for a, b in zip(ours, theirs, strict=False))


def _is_clearly_faster(
    candidate: EngineCandidate, ours: Sequence[ThroughputSample], theirs: Sequence[ThroughputSample]
) -> bool:
    ratios = sorted(a.frames_per_s / b.frames_per_s for a, b in zip(ours, theirs, strict=False))
    wanted = MIN_SPEEDUP.get(candidate.precision, MIN_SPEEDUP_REDUCED)
    return median(ratios) >= wanted and ratios[len(ratios) // 4] > 1


def choose_engine(
    candidates: Sequence[EngineCandidate],
    trials: CandidateTrials,
    *,
    point: OperatingPoint,
    progress: Progress,
    runner: StepRunner | None = None,
    crashes: CrashRecord | None = None,
    limited: bool = True,
    computes_on_cpu: bool = True,
) -> EngineChoice:
    """Measure the candidates, the first of which is the reference, and choose.

    `point` is what the fastest run on. Without `limited`, opening may take any time: a device that builds
    its engines needs minutes.

    Raises what the reference raises.
    """

    def run(step: Callable[[], T], limit_s: float) -> T:
        return run_with_limit(step, limit_s, progress.tick)

    log.info(
        "measuring which of %d engines is the fastest on this machine: at most %.0f s, once",
        len(candidates),
        progress.budget_s,
    )
    comparison = _Comparison(
        candidates,
        trials,
        point=point,
        progress=progress,
        runner=runner or run,
        crashes=crashes or CrashRecord(None),
        computes_on_cpu=computes_on_cpu,
    )
    comparison.open(_OPEN_LIMIT_S if limited else None)
    comparison.measure_alone()
    comparison.select_fastest()
    comparison.measure_together()
    return comparison.decide()


# --- the cache ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChoiceKey:
    """Everything that a choice depends on: the candidates with hashes of their graphs, and the machine."""

    candidates: tuple[tuple[str, str], ...]
    device: str
    hardware: str
    cpu_flags: tuple[str, ...]
    versions: tuple[str, ...]
    cores: int
    point: OperatingPoint

    @staticmethod
    def of(
        graphs: Mapping[EngineCandidate, bytes], *, device: str, cores: int, point: OperatingPoint
    ) -> "ChoiceKey":
        """The key of these candidates on this machine, with the installed versions."""
        hashes = tuple((str(name), hashlib.sha256(graph).hexdigest()) for name, graph in graphs.items())
        return ChoiceKey(hashes, device, read_cpu_name(), read_cpu_flags(), read_versions(), cores, point)

    def name(self) -> str:
        """A hash of all fields, as a file name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def _list_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder; none if it is absent or this user may not read it."""
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []


class ChoiceCache:
    """Choices in the data folder, one file each. Never raises OSError: without one, it is measured again."""

    def __init__(self, data: Path) -> None:
        self.folder = data / CHOICES_FOLDER

    def is_empty(self) -> bool:
        """Whether no choice is cached at all; a key needs the graphs of all candidates, which takes time."""
        return not _list_files(self.folder, "*.json")

    def load(self, key: ChoiceKey) -> EngineChoice | None:
        """The choice that was measured for exactly this key, or None. A damaged file is set aside."""

        def parse(document: Any) -> EngineChoice:
            choice = EngineChoice.from_document(document["choice"])
            if document["schema"] != _SCHEMA or str(choice.candidate) not in dict(key.candidates):
                raise ValueError("it names another engine")
            return choice

        return load_cached(self._path(key), parse, "engines")

    def store(self, key: ChoiceKey, choice: EngineChoice) -> None:
        """Write a choice and delete the oldest files; an error of the disk is only logged."""
        path = self._path(key)
        try:
            write_json(path, {"schema": _SCHEMA, "choice": choice.document()})
            kept = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            for old in kept[:-_MAX_CACHED_CHOICES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: cannot be saved (%s); the next start measures again", path, error.strerror)

    def crash_record(self, key: ChoiceKey) -> CrashRecord:
        """The record of the candidates that ended the process."""
        return CrashRecord(self._path(key).with_suffix(_TRYING_SUFFIX))

    def _path(self, key: ChoiceKey) -> Path:
        return self.folder / f"{key.name()}.json"
