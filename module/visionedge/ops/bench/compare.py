"""`visionedge bench compare`: is the second of two reports worse, or is the difference noise?

A report holds one value of a figure per round. Each round of one report is compared to each round of the
other, and the interval of the ratio is that of the Mann-Whitney test: it assumes no distribution of the
noise, and with few rounds it is wide.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Any, Literal

from visionedge.errors import ConfigError
from visionedge.web.documents import JsonDocument

BenchReport = Mapping[str, Any]
ComparisonVerdict = Literal["worse", "better", "same", "undecided"]

SCHEMA = "visionedge/bench-compare/1"
MIN_ROUNDS = 3
_CONFIDENCE = 0.95
_HARDWARE = (
    *("cpu", "cpuFlags", "cores", "usableCores", "memoryMiB"),
    *("gpu", "gpuDriver", "passthrough", "effectiveDevice"),
)
_SOFTWARE = ("visionedge", "python", "kernel", "packages")


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """The ratio of two figures, its bounds, and the confidence in these, 0 to 1."""

    ratio: float
    low: float
    high: float
    confidence: float


class FigureComparison(JsonDocument):
    """One figure of both reports. `before` and `after` are medians; the ratio is after to before."""

    figure: str
    higher_is_better: bool
    before: float
    after: float
    ratio: float
    low: float
    high: float
    confidence: float
    verdict: ComparisonVerdict


def compare_reports(
    before: BenchReport, after: BenchReport, *, tolerance: float = 0.03, unlike: bool = False
) -> dict[str, Any]:
    """The verdict as a document; a relative change up to `tolerance` (0 to 1) counts as none.

    Raises:
        ConfigError: the reports are not of one kind, have too few rounds, or are of different machines or
            loads and `unlike` is not set.
    """
    _check_comparable_schemas(before, after)
    differences = _differences(before, after)
    if differences and not unlike:
        raise ConfigError(
            [f"the reports cannot be compared: {'; '.join(differences)}; use --unlike to compare them anyway"]
        )
    theirs, ours = collect_figures(before), collect_figures(after)
    findings = [
        compare_figure(
            name, theirs[name][1], ours[name][1], higher_is_better=theirs[name][0], tolerance=tolerance
        )
        for name in theirs
        if name in ours
    ]
    if not findings:
        raise ConfigError([f"the reports have no common figure with {MIN_ROUNDS} rounds; use more --rounds"])
    return {
        "schema": SCHEMA,
        "verdict": combine_verdicts(finding.verdict for finding in findings),
        "tolerance": tolerance,
        "unlike": differences,
        "software": _describe_changes(before["machine"], after["machine"], _SOFTWARE),
        "figures": [finding.dump() for finding in findings],
    }


def combine_verdicts(verdicts: Iterable[ComparisonVerdict]) -> ComparisonVerdict:
    """The verdict on the whole report: worse before undecided before better before same."""
    found = set(verdicts)
    order: tuple[ComparisonVerdict, ...] = ("worse", "undecided", "better", "same")
    return next((verdict for verdict in order if verdict in found), "undecided")


def compare_figure(
    figure: str, before: Sequence[float], after: Sequence[float], *, higher_is_better: bool, tolerance: float
) -> FigureComparison:
    """The verdict on one figure from its values per round.

    Worse or better: the ratio is beyond the tolerance and its whole interval is on one side of 1. The same:
    the whole interval is within the tolerance. Else undecided.
    """
    interval = compute_ratio_interval(before, after)
    good = interval if higher_is_better else _invert(interval)
    verdict: ComparisonVerdict = "undecided"
    if good.ratio < 1 - tolerance and good.high < 1:
        verdict = "worse"
    elif good.ratio > 1 + tolerance and good.low > 1:
        verdict = "better"
    elif good.low >= 1 - tolerance and good.high <= 1 / (1 - tolerance):
        verdict = "same"
    return FigureComparison(
        figure=figure,
        higher_is_better=higher_is_better,
        before=round(median(before), 3),
        after=round(median(after), 3),
        **{name: round(value, 4) for name, value in asdict(interval).items()},
        verdict=verdict,
    )


def _invert(interval: ConfidenceInterval) -> ConfidenceInterval:
    return ConfidenceInterval(1 / interval.ratio, 1 / interval.high, 1 / interval.low, interval.confidence)


def compute_ratio_interval(before: Sequence[float], after: Sequence[float]) -> ConfidenceInterval:
    """The ratio of `after` to `before` (all above 0): the median of all pairs, and its interval by ranks."""
    logs = sorted(math.log(b) - math.log(a) for a in before for b in after)
    cut, confidence = _cut(len(before), len(after))
    return ConfidenceInterval(
        math.exp(median(logs)), math.exp(logs[cut]), math.exp(logs[len(logs) - 1 - cut]), round(confidence, 4)
    )


def _cut(first: int, second: int) -> tuple[int, float]:
    """The number of pairs to leave out at each end, and the confidence of the remaining interval."""
    ways = math.comb(first + second, first)
    tail, cut = 0, 0
    for wins in range(first * second // 2):
        tail += _count_orderings(first, second, wins)
        if 2 * tail / ways > 1 - _CONFIDENCE:
            tail -= _count_orderings(first, second, wins)
            break
        cut = wins
    return cut, 1 - 2 * max(tail, 1) / ways


@cache
def _count_orderings(first: int, second: int, wins: int) -> int:
    """The number of orderings of both samples in which the first wins exactly `wins` pairs."""
    if wins < 0:
        return 0
    if first == 0 or second == 0:
        return int(wins == 0)
    return _count_orderings(first - 1, second, wins - second) + _count_orderings(first, second - 1, wins)


# --- the figures of a report --------------------------------------------------------------------------------


def collect_figures(report: BenchReport) -> dict[str, tuple[bool, list[float]]]:
    """By name, whether higher is better and the value of each round; only figures with enough rounds."""
    found: dict[str, tuple[bool, list[float]]] = {}
    if "pipeline" in report:
        found |= _pipeline_figures(report)
    for row in report.get("table", ()):
        # Only the plan's pair: among many pairs, one would look worse by chance.
        if all(row[name] == report["choice"][name] for name in ("lanes", "batch")):
            found["frames/s of the plan"] = (True, row["framesPerSecondAll"])
    if "loop" in report:
        found["frames/s of the scene"] = (True, report["loop"]["framesPerSecondAll"])
    if "events" in report:
        found["scene event p95 ms"] = (False, [each["p95"] or 0.0 for each in report["events"]["rounds"]])
    for row in report.get("batches", ()):
        found[f"remote to local, batch {row['batch']}"] = (False, row["remoteToLocalAll"])
    return {
        name: (more, values)
        for name, (more, values) in found.items()
        if len(values) >= MIN_ROUNDS and min(values) > 0
    }


def _pipeline_figures(report: BenchReport) -> dict[str, tuple[bool, list[float]]]:
    ours = report["pipeline"]
    if "http" in report:
        latencies = [each["p95"] for each in report["http"]["rounds"]]
        return {"frames/s with clients": (True, ours["withClients"]), "latency p95 ms": (False, latencies)}
    found = {"frames/s": (True, list(ours["framesPerSecondAll"]))}
    rounds = ours.get("rounds", [])
    if rounds:
        found["CPU ms per frame"] = (False, [each["cpuMsPerFrame"] for each in rounds])
        found["latency p95 ms"] = (False, [each["latencyMs"]["p95"] for each in rounds])
    if theirs := report.get("baseline"):
        # The ratio within a round: a slow hour of the machine slows both.
        pairs = zip(ours["framesPerSecondAll"], theirs["framesPerSecondAll"], strict=True)
        found["frames/s to the plain loop"] = (True, [a / b for a, b in pairs])
    return found


def _check_comparable_schemas(before: BenchReport, after: BenchReport) -> None:
    schemas = [str(report.get("schema")) for report in (before, after)]
    if schemas[0] != schemas[1] or not schemas[0].startswith("visionedge/bench-") or schemas[0] == SCHEMA:
        raise ConfigError(
            [f"the reports must be of one kind of benchmark; these are {schemas[0]} and {schemas[1]}"]
        )
    if not all(isinstance(report.get("machine"), Mapping) for report in (before, after)):
        raise ConfigError(["a report without `machine` cannot be compared"])


def _differences(before: BenchReport, after: BenchReport) -> list[str]:
    """The differences of machine and load that make a comparison meaningless."""
    found = _describe_changes(before["machine"], after["machine"], _HARDWARE)
    loads = [{**report.get("load", {}), "model": _model(report)} for report in (before, after)]
    # More rounds, or longer ones, are the same load.
    names = sorted({*loads[0], *loads[1]} - {"rounds", "seconds"})
    return found + _describe_changes(loads[0], loads[1], names)


def _model(report: BenchReport) -> object:
    model = report.get("model")
    return model.get("name") if isinstance(model, Mapping) else model


def _describe_changes(before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [
        f"{name}: {_shown(before.get(name))} before, {_shown(after.get(name))} after"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- text ---------------------------------------------------------------------------------------------------

_SENTENCES: Mapping[str, str] = {
    "worse": "worse: the change is larger than the noise",
    "better": "better: the change is larger than the noise",
    "same": "the same within {tolerance:.0%}",
    "undecided": "undecided: the noise is larger than the difference; use more --rounds",
}


def format_report(document: Mapping[str, Any]) -> str:
    """The verdict as text."""
    lines = [f"{'':<28} {'before':>10} {'after':>10}   ratio  (interval)"]
    lines += [
        f"{each['figure']:<28} {each['before']:10.2f} {each['after']:10.2f}  {each['ratio']:6.3f}"
        f"  ({each['low']:.3f} to {each['high']:.3f}, {each['confidence']:.0%} confidence)  {each['verdict']}"
        for each in document["figures"]
    ]
    lines += [f"different: {line}" for line in document["unlike"]]
    lines += [f"changed: {line}" for line in document["software"]]
    lines.append(_SENTENCES[document["verdict"]].format(tolerance=document["tolerance"]))
    return "\n".join(lines) + "\n"
