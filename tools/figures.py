"""All figures of docs/performance.md, measured one benchmark after the other on an otherwise idle machine.

    make figures ARGS="--model mine.onnx --video vtest.avi --large yard-1080p.mp4"

Writes one JSON document with all reports, and prints a table of the wanted and the measured figures. It takes
about twelve minutes. Without --model only the bundled model is measured, without --large no memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Load:
    """A benchmark: its name in the document, and the arguments of `visionedge bench`, or a script."""

    name: str
    words: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """Its command line without the interpreter."""
        if self.words[0].endswith(".py"):
            return list(self.words)
        return ["-m", "visionedge", "bench", *self.words]


@dataclass(frozen=True)
class Figure:
    """The limit of a figure in a report, at least or at most. `read` gives None if the report lacks it."""

    what: str
    load: str
    read: Callable[[Report], float | None]
    least: float | None = None
    most: float | None = None

    def line(self, report: Report) -> dict[str, Any] | None:
        """The figure as it was measured."""
        seen = self.read(report)
        if seen is None:
            return None
        met = (self.least is None or seen >= self.least) and (self.most is None or seen <= self.most)
        wanted = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return {"load": self.load, "what": self.what, "wanted": wanted, "seen": seen, "met": met}


def loads(model: str | None, video: str | None, large: str | None) -> list[Load]:
    """The benchmarks, in order."""
    source = ("--source", video) if video else ()
    found = []
    for name, given in (("bundled", None), ("model", model)):
        if name == "bundled" or given:
            which = ("--model", given) if given else ()
            found.append(Load(f"engine, {name}", ("engine", "--rounds", "9", *which)))
            baseline = ("pipeline", "--cameras", "4", "--baseline", "--rounds", "5", *source, *which)
            found.append(Load(f"pipeline, {name}", baseline))
            if name == "model":  # the bundled one has no variant
                found.append(Load("pipeline, int8 to fp32", (*baseline, "--precision", "auto")))
    found.append(Load("scene", ("scene", "--rounds", "9")))
    found.append(Load("with a scene", ("pipeline", "--scene", "default", "--rounds", "9", *source)))
    found.append(Load("events", ("pipeline", "--events", *source)))
    overload = ("--cameras", "64", "--fps", "5", "--source", "synthetic:640x360@5", "--seconds", "60")
    found.append(Load("overload", ("pipeline", *overload, "--rounds", "1")))
    found.append(Load("decode", (str(Path(__file__).with_name("decode_cost.py")),)))
    if large:
        memory = ("--cameras", "16", "--fps", "30", "--rounds", "1", "--seconds", "20", "--source", large)
        found.append(Load("memory", ("pipeline", *memory)))
    found.append(
        Load("http", ("http", "--clients", "16", "--rate", "200", "--rounds", "5", "--seconds", "8"))
    )
    return found


def figures(load: str) -> list[Figure]:
    """The figures of a load and their limits."""
    kind = load.partition(",")[0]
    return [Figure(what, load, read, **limit) for what, read, limit in _WANTED.get(kind, [])]


def _at(*keys: str) -> Callable[[Report], float | None]:
    """A function that reads a nested number of a report."""

    def read(report: Report) -> float | None:
        value: Any = report
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else float(value)

    return read


def _least_bare(report: Report) -> float | None:
    return min((float(row["engineToBare"]) for row in report["bare"]), default=None)


def _least_bare_by_cpu(report: Report) -> float | None:
    return min((float(row["engineToBareByCpu"]) for row in report["bare"]), default=None)


def _int8_to_fp32(report: Report) -> float | None:
    found = [row for row in report.get("candidates", ()) if row["precision"] == "int8"]
    speedups = [float(row["timesAsFast"]) for row in found if "timesAsFast" in row]
    return max(speedups, default=None)


def _in_integers(report: Report) -> float | None:
    """The ratio to the plain loop (fp32), if the plan chose the int8 variant."""
    return float(report["ratio"]["framesPerSecond"]) if report["precision"] == "int8" else None


def _to_the_bound(report: Report) -> float | None:
    """The ratio of the latency's 99th percentile to two batches and a frame's interval."""
    ours = report["pipeline"]
    bound_ms = 2 * ours["stagesMs"]["infer"] + 1000 / report["load"]["fps"]
    return round(float(ours["latencyMs"]["p99"]) / float(bound_ms), 3)


def _age_to_the_bound(report: Report) -> float | None:
    """The ratio of the 99th percentile of the events' ages to a frame's interval and 60 ms."""
    events = report["events"]
    return round(float(events["latencyMs"]["p99"]) / float(events["boundMs"]), 3)


def _server_share(report: Report) -> float | None:
    """The share of the cores that the responses took in the module, in percent."""
    share = report["pipeline"]["serverShare"]
    return None if share is None else round(100 * float(share), 2)


Wanted = tuple[str, Callable[[Report], float | None], dict[str, float]]

_WANTED: Mapping[str, Sequence[Wanted]] = {
    "engine": [
        ("plan/best", _at("choice", "shareOfBest"), {"least": 0.95}),
        ("engine/bare session.run, the least", _least_bare, {"least": 0.97}),
        ("the same by processor time", _least_bare_by_cpu, {"least": 0.97}),
        ("compiled/original, time", _at("onePicture", "compiledToOriginal"), {"most": 1.08}),
        ("compiled/(numpy + original + numpy)", _at("onePicture", "compiledToPlain"), {"most": 0.9}),
        ("int8 to fp32 (1.7 meant for VNNI)", _int8_to_fp32, {"least": 1.7}),
    ],
    "pipeline": [
        ("frames/s to the plain loop", _at("ratio", "framesPerSecond"), {"least": 1.35}),
        ("the same with int8 chosen, the loop in fp32", _in_integers, {"least": 2.3}),
        ("frames/s to the ceiling", _at("ceiling", "alone", "speedToCeiling"), {"least": 0.85}),
        ("frames/s to bare threads at once", _at("ceiling", "atOnce", "toMeasured"), {"least": 0.85}),
        ("CPU of a frame to the bare parts", _at("ceiling", "alone", "cpuToBare"), {"most": 1.15}),
        ("the same, bare parts at once", _at("ceiling", "atOnce", "cpuToBare"), {"most": 1.15}),
        ("boxes that the plain loop finds too", _at("baselineAgreement", "matched"), {"least": 0.9}),
    ],
    "scene": [("thread time of a frame in the loop, ms", _at("loop", "meanMs"), {"most": 0.3})],
    "with a scene": [("frames/s to those without", _at("sceneRatio", "framesPerSecond"), {"least": 0.98})],
    "events": [("age p99 to an interval and 60 ms", _age_to_the_bound, {"most": 1.0})],
    "overload": [
        ("fairness (Jain)", _at("pipeline", "fairness"), {"least": 0.99}),
        ("latency p99 to two batches and an interval", _to_the_bound, {"most": 1.0}),
    ],
    "decode": [
        ("above decoding, to OpenCV's", _at("ratio", "aboveDecoding"), {"most": 0.45}),
        ("5 of 30 pictures/s, to decoding all", _at("ratio", "fps"), {"most": 0.65}),
        ("0.5 of 30 pictures/s", _at("ratio", "keyFps"), {"most": 0.15}),
        ("mean error, grey levels", _at("meanErrorGreyLevels", "most"), {"most": 2.0}),
    ],
    "memory": [("resident, MiB", _at("pipeline", "rssMiB"), {"most": 700.0})],
    "http": [
        ("the module's share of the cores, %", _server_share, {"most": 3.0}),
        ("latency p99, ms", _at("http", "latencyMs", "p99"), {"most": 20.0}),
    ],
}


def run(load: Load, folder: Path) -> Report:
    """Run a benchmark: its report, or ``{"error": reason}``."""
    path = folder / "report.json"
    path.unlink(missing_ok=True)
    shown = f"python {' '.join(load.command)}"
    print(f"--- {load.name}: {shown}", file=sys.stderr)
    command = [sys.executable, *load.command, "--json", str(path)]
    code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    if code != 0 or not path.exists():
        return {"error": f"{shown} ended with exit code {code}"}
    report: Report = json.loads(path.read_text(encoding="utf-8"))
    return report


def lines_of(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """The figures of all reports that have no error."""
    return [
        line
        for name, report in reports.items()
        if "error" not in report
        for figure in figures(name)
        if (line := figure.line(report)) is not None
    ]


def table(lines: Sequence[Mapping[str, Any]], reports: Mapping[str, Report]) -> str:
    """The figures as a Markdown table, followed by the errors."""
    rows = [
        f"| {each['load']} | {each['what']} | {each['wanted']} | {each['seen']:g} |"
        f" {'yes' if each['met'] else 'no'} |"
        for each in lines
    ]
    failed = [f"\n{name}: {report['error']}" for name, report in reports.items() if "error" in report]
    return (
        "\n".join(["| load | figure | wanted | seen | met |", "|---|---|---|---|---|", *rows, *failed]) + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", metavar="FILE", help="another model beside the bundled one")
    parser.add_argument(
        "--video", metavar="FILE", help="the video of the cameras (default: the bundled clip)"
    )
    parser.add_argument(
        "--large", metavar="FILE", help="a 1080p video of 25 s or more, for the memory of 16 cameras"
    )
    parser.add_argument(
        "--only", metavar="WORD", default="", help="only benchmarks with this word in their names"
    )
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--out", metavar="FILE", default="figures.json", help="(default: %(default)s)")
    given = parser.parse_args(arguments)
    wanted = [each for each in loads(given.model, given.video, given.large) if given.only in each.name]
    if given.list:
        print("\n".join(f"python {' '.join(load.command)}" for load in wanted))
        return 0
    if os.getloadavg()[0] > 0.5:
        print(f"load average {os.getloadavg()[0]:.1f}: this machine is busy", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        reports = {load.name: run(load, Path(folder)) for load in wanted}
    lines = lines_of(reports)
    document = {"schema": "visionedge/figures/1", "figures": lines, "reports": reports}
    Path(given.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(lines, reports), end="")
    return 1 if any("error" in report for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
