"""Check visionedge on an NVIDIA GPU, in about ten minutes: one folder to read and to send.

    make gpu-check                                    # in a clone
    python tools/gpu_check.py --out gpu-check         # with the package and pytest installed; no network
    python tools/gpu_check.py --device cpu --quick    # whether the check itself runs; no GPU result

Each step runs in a process of its own with a time limit; one that fails does not stop the others. The folder
gets `report.md`, `summary.json` and the output of each step, without secrets and host names. Exit code 0:
everything holds, 1: something does not, 3: there is no usable GPU (the report names the first broken link).
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from visionedge.config.load import parse_config
from visionedge.engine.plan import OperatingPoint
from visionedge.errors import UnavailableError
from visionedge.frames.types import format_utc, utc_now
from visionedge.ops.bench.machine import describe_machine
from visionedge.ops.doctor.bundle import SecretScrubber

Document = Mapping[str, Any]

_ROOT = Path(__file__).resolve().parents[1]
_STEPS_SCRIPT = Path(__file__).with_name("gpu_check_steps.py")
_KILL_TIMEOUT_S = 5.0
_MAX_TEXT_CHARACTERS = 200_000

NOT_A_GPU_RESULT = "**Not a GPU result**: the steps ran on the CPU, to see whether the check itself works."

# --- verdicts -----------------------------------------------------------------------------------------------

State = Literal["holds", "fails", "timeout", "not run"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step gave: `findings` are sentences, `figures` its numbers."""

    state: State
    findings: tuple[str, ...] = ()
    figures: Document = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that ended: `exit_code` None after its time limit, its output, and the document it wrote."""

    exit_code: int | None
    text: str
    document: Document | None

    @property
    def last_line(self) -> str:
        """The last line of the output."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"


def judge_doctor(done: Finished, device: str) -> Verdict:
    """The chain to the GPU: whether the device is usable, and else the first broken link with its remedy."""
    if (report := done.document) is None:
        return Verdict("fails", (f"no report, exit code {done.exit_code}: {done.last_line}",))
    found = report["device"]
    findings = [f"requested {found['requested']}, effective {found['effective']}: {found['reason']}"]
    if device != "cpu":
        findings += describe_first_broken(report)
    figures = {
        "chain": report["chain"],
        "firstBroken": report["firstBroken"],
        "fulfilled": report["fulfilled"],
    }
    return Verdict("holds" if report["fulfilled"] else "fails", tuple(findings), figures)


def describe_first_broken(report: Document) -> list[str]:
    """The first broken link of a report of `doctor` and its remedies; empty if no link is broken."""
    for link in report["chain"]:
        if link["name"] == report["firstBroken"]:
            remedies = [remedy["instruction"] for remedy in link["remedies"]]
            return [
                f"first broken link: {link['title']}: {link['found']}",
                *(f"remedy: {each}" for each in remedies),
            ]
    return []


def judge_measurement(done: Finished, _device: str) -> Verdict:
    """A step of gpu_check_steps.py."""
    if done.exit_code != 0 or done.document is None:
        return Verdict("fails", (f"exit code {done.exit_code}: {done.last_line}",))
    problems, findings = tuple(done.document["problems"]), tuple(done.document["findings"])
    return Verdict("fails" if problems else "holds", problems + findings, done.document["figures"])


def judge_engine_bench(done: Finished, device: str) -> Verdict:
    """`bench engine`: it must have computed on the device."""
    if (wrong := _find_bench_problem(done, device)) is not None:
        return wrong
    report = done.document or {}
    rows = {(row["lanes"], row["batch"]): row for row in report["table"]}
    best = rows[report["best"]["lanes"], report["best"]["batch"]]
    bare = max((row["engineToBare"] for row in report["bare"]), default=None)
    figures = {
        "table": report["table"],
        "choice": report["choice"],
        "best": report["best"],
        "engineToBare": bare,
    }
    finding = (
        f"best {best['framesPerSecond']:.1f} frames/s ({OperatingPoint(best['lanes'], best['batch'])},"
        f" {best['batchMs']:.2f} ms a batch); the plan has {report['choice']['shareOfBest']:.0%} of it"
    )
    return Verdict("holds", (finding,), figures)


def judge_pipeline_bench(done: Finished, device: str) -> Verdict:
    """`bench pipeline --baseline`: it must have computed on the device."""
    if (wrong := _find_bench_problem(done, device)) is not None:
        return wrong
    report = done.document or {}
    ours, ratio = report["pipeline"], report["ratio"]["framesPerSecond"]
    figures = {
        key: ours[key] for key in ("framesPerSecond", "framesPerSecondAll", "cpuMsPerFrame", "latencyMs")
    }
    figures |= {"ratioToPlainLoop": ratio, "agreement": report["baselineAgreement"]}
    finding = (
        f"{ours['framesPerSecond']:.1f} frames/s, {ratio:.2f} x the plain loop on {device};"
        f" {ours['cpuMsPerFrame']:.2f} CPU ms a frame"
    )
    return Verdict("holds", (finding,), figures)


def _find_bench_problem(done: Finished, device: str) -> Verdict | None:
    if done.exit_code != 0 or done.document is None:
        return Verdict("fails", (f"exit code {done.exit_code}: {done.last_line}",))
    effective = done.document["machine"].get("effectiveDevice")
    if effective != device:
        return Verdict("fails", (f"computed on {effective}, not on {device}: {done.document['device']}",))
    return None


_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|deselected)\b")


def judge_tests(done: Finished, device: str) -> Verdict:
    """pytest's last line. On a GPU a skipped test is a failure: something said that there is no GPU."""
    counts = {word.rstrip("s"): int(number) for number, word in _COUNT.findall(done.last_line)}
    passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
    if done.exit_code != 0 or not passed + skipped:
        return Verdict("fails", (f"exit code {done.exit_code}: {done.last_line}",), counts)
    if device == "cpu" and not passed:
        return Verdict("not run", (f"skipped without a GPU: {skipped}",), counts)
    return Verdict("fails" if skipped else "holds", (done.last_line.strip("= "),), counts)


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its command, in which ``{out}`` is the document to write, its time limit, and its judge.

    `device` computes. Without ``{out}`` the document is what the command prints, if that is JSON.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit_s: float
    judge: Callable[[Finished, str], Verdict]
    device: str


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What to check: the device, another model than the bundled one, and whether only to see that it runs."""

    device: str
    model: str | None = None
    quick: bool = False


def list_steps(options: CheckOptions) -> list[Step]:
    """All steps in their order: what needs the GPU first."""
    device, python = options.device, sys.executable
    model = ("--model", options.model) if options.model else ()
    quick = ("--quick",) if options.quick else ()

    def measurement(name: str, title: str, limit_s: float) -> Step:
        words = (python, str(_STEPS_SCRIPT), name, "--device", device, *model, *quick)
        command = (*words, "--data", "{data}", "--out", "{out}")
        return Step(name, title, command, limit_s, judge_measurement, device)

    ve = (python, "-m", "visionedge")
    doctor = (*ve, "doctor", "--json", "--device", device)
    return [
        Step("doctor", "doctor: the chain to the GPU", doctor, 90, judge_doctor, device),
        measurement("session", "first session", 120),
        measurement("parity", "parity with the CPU, fp32 and fp16", 120),
        measurement("options", "options: CUDA graphs, search, TF32, NHWC", 180),
        *_list_benches(options, device),
        measurement("kill", "kill -9 of the engine's process", 240),
        measurement("memory", "out of memory", 180),
        Step("tests", "tests marked gpu", _pytest_command(python), 180, judge_tests, device),
        *(_list_benches(options, "cpu") if device != "cpu" else []),
    ]


def _list_benches(options: CheckOptions, device: str) -> list[Step]:
    ve = (sys.executable, "-m", "visionedge", "bench")
    model = ("--model", options.model) if options.model else ()
    rest = ("--device", device, *model, "--json", "{out}")
    rounds = ("--rounds", "1", "--seconds") if options.quick else ("--rounds", "3", "--seconds")
    engine = (*ve, "engine", *rounds, "0.1" if options.quick else "0.3", *rest)
    pipeline = (*ve, "pipeline", "--baseline", *rounds, "0.5" if options.quick else "4", *rest)
    name, title = f"engine-{device}", f"bench engine on {device}"
    steps = [Step(name, title, engine, 180, judge_engine_bench, device)]
    name, title = f"pipeline-{device}", f"bench pipeline on {device}"
    return [*steps, Step(name, title, pipeline, 120, judge_pipeline_bench, device)]


def _pytest_command(python: str) -> tuple[str, ...]:
    """Only files that have such tests: others need packages that a machine without a network lacks."""
    files = sorted(
        str(path.relative_to(_ROOT))
        for path in (_ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    )
    return (python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files)


# --- running ------------------------------------------------------------------------------------------------


def run_step(step: Step, work: Path) -> tuple[Verdict, Finished, float]:
    """Run a step in a process group that is killed at its limit: verdict, output, seconds. Never raises."""
    out, began_s = work / f"{step.name}.document.json", time.monotonic()
    places = {"{out}": str(out), "{data}": str(work / "data")}
    command = [places.get(word, word) for word in step.command]
    try:
        exit_code, text = _run_limited(command, step.limit_s, work)
    except OSError as error:
        return Verdict("fails", (f"cannot be started: {error.strerror}",)), Finished(None, "", None), 0.0
    done = Finished(exit_code, text, _read_document(out, text))
    seconds = round(time.monotonic() - began_s, 1)
    if exit_code is None:
        words = f"killed after its time limit of {step.limit_s:g} s; the last line was: {done.last_line}"
        return Verdict("timeout", (words,)), done, seconds
    try:
        return step.judge(done, step.device), done, seconds
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        words = f"its document is not understood ({type(error).__name__}: {error})"
        return Verdict("fails", (words,)), done, seconds


def _run_limited(command: Sequence[str], limit_s: float, work: Path) -> tuple[int | None, str]:
    """The exit code, None if the limit was reached, and stdout with stderr."""
    # A file, not a pipe: a process that hangs in a driver may hold a pipe open for ever.
    with (work / "output.txt").open("w+b") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=_make_environment(work),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            exit_code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_TIMEOUT_S)
        output.seek(0)
        return exit_code, output.read().decode(errors="replace")[-_MAX_TEXT_CHARACTERS:]


def _make_environment(work: Path) -> dict[str, str]:
    """The environment without settings of a module: those of the machine, a data folder of its own."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("VISIONEDGE_", "IOTEDGE_"))}
    folders = [str(_ROOT / "module"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"VISIONEDGE_DATA": str(work / "data"), "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return others | ours | {"PYTHONPATH": os.pathsep.join(folders)}


def _read_document(out: Path, text: str) -> Document | None:
    try:
        document = json.loads(out.read_text(encoding="utf-8") if out.exists() else text)
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


# --- the folder ---------------------------------------------------------------------------------------------


class ReportScrubber:
    """Masks secrets of the environment, host names, the user's folder and this checkout in texts."""

    def __init__(self, environ: Mapping[str, str], host: str, home: Path) -> None:
        self._secrets = SecretScrubber.of(parse_config({}), environ)
        self._masks = [(re.compile(r"hostname=[^\s;]+"), "hostname=***")]
        for text, mask in ((str(_ROOT), "."), (str(home), "~"), (tempfile.gettempdir(), "TMP")):
            if len(text) > 1:
                self._masks.append((re.compile(re.escape(text) + r"(?=[/\s\"':,)]|$)"), mask))
        if len(host) > 2 and host != "localhost":
            self._masks.append((re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w-])"), "***"))

    def __call__(self, text: str) -> str:
        """The text without them; line by line, so that a JSON document stays one."""
        for pattern, mask in self._masks:
            text = pattern.sub(mask, text)
        return self._secrets(text)


@dataclass(slots=True)
class Check:
    """The state of a check: verdicts by the name of the step, and where they are written."""

    options: CheckOptions
    steps: Sequence[Step]
    folder: Path
    scrub: ReportScrubber
    machine: Document
    began: str = field(default_factory=lambda: format_utc(utc_now()))
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def has_no_gpu(self) -> bool:
        """Whether the doctor says that the device cannot be used, and no first session says otherwise."""
        doctor, session = self.verdicts.get("doctor"), self.verdicts.get("session")
        unusable = doctor is not None and doctor.figures.get("fulfilled") is False
        return self.options.device != "cpu" and unusable and (session is None or session.state != "holds")

    @property
    def exit_code(self) -> int:
        """0: everything holds; 1: something does not; 3: no usable GPU."""
        if self.has_no_gpu:
            return UnavailableError.exit_code
        return int(any(verdict.state in ("fails", "timeout") for verdict in self.verdicts.values()))

    def run(self, work: Path) -> None:
        """Run all steps; without a usable GPU only the doctor and the first session."""
        for step in self.steps:
            if self.has_no_gpu and step.name != "session":
                self.verdicts[step.name] = Verdict("not run", ("there is no usable GPU",))
                continue
            print(f"{step.title} (at most {step.limit_s:g} s) …", file=sys.stderr)
            verdict, done, self.seconds[step.name] = run_step(step, work)
            self.verdicts[step.name] = verdict
            print(f"  {verdict.state}: {self.scrub('; '.join(verdict.findings))}", file=sys.stderr)
            if done.document is not None:
                self._write(f"{step.name}.json", json.dumps(done.document, indent=1))
            if done.text.strip() and not done.text.startswith("{"):  # else the document itself
                self._write(f"{step.name}.txt", done.text)
            self.write_summary()  # a check that is interrupted has a report, too
        self.write_summary()

    def write_summary(self) -> None:
        """Write `summary.json` and `report.md`."""
        self._write("summary.json", json.dumps(self.document(), indent=1))
        self._write("report.md", format_report(self.document()))

    def document(self) -> dict[str, Any]:
        """The summary."""
        return {
            "schema": "visionedge/gpu-check/1",
            "at": self.began,
            "device": self.options.device,
            "gpuResult": self.options.device != "cpu" and not self.has_no_gpu,
            "quick": self.options.quick,
            "exitCode": self.exit_code,
            "machine": dict(self.machine),
            "steps": [
                {
                    "name": step.name,
                    "title": step.title,
                    "state": self.verdicts[step.name].state,
                    "seconds": self.seconds.get(step.name),
                    "findings": list(self.verdicts[step.name].findings),
                    "figures": dict(self.verdicts[step.name].figures),
                }
                for step in self.steps
                if step.name in self.verdicts
            ],
        }

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(self.scrub(text).rstrip("\n") + "\n", encoding="utf-8")


# --- the readable report ------------------------------------------------------------------------------------

_MARKS = {"holds": "✓ holds", "fails": "✗ fails", "timeout": "✗ time limit", "not run": "not run"}


def format_report(summary: Document) -> str:
    """The summary as Markdown: verdicts, the chain to the GPU, options side by side."""
    machine, steps = summary["machine"], {step["name"]: step for step in summary["steps"]}
    parts = [
        f"# visionedge on {machine.get('gpu') or 'a machine without a GPU'}",
        _describe_result(summary),
        "",
    ]
    facts = (
        "visionedge",
        "python",
        "cpu",
        "usableCores",
        "memoryMiB",
        "kernel",
        "gpu",
        "gpuDriver",
        "passthrough",
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    parts += [f"- {name}: {machine.get(name)}" for name in facts]
    parts += [f"- packages: {packages}", f"- at: {summary['at']}", "", "## Verdicts", ""]
    parts += _table(
        ["step", "verdict", "s", "seen"],
        [
            [step["title"], _MARKS[step["state"]], step["seconds"], "<br>".join(step["findings"])]
            for step in summary["steps"]
        ],
    )
    chain = steps.get("doctor", {}).get("figures", {}).get("chain", [])
    if chain:
        rows = [[link["title"], link["state"], link["found"]] for link in chain]
        parts += ["", "## The chain to the GPU", "", *_table(["link", "state", "found"], rows)]
    parts += _format_options(steps.get("options", {}).get("figures", {}).get("batchMs", {}))
    parts += _format_timeline(steps.get("kill", {}).get("figures", {}).get("timeline", []))
    parts += ["", "The other files of this folder have everything; look through them before you send them."]
    return "\n".join(parts) + "\n"


def _describe_result(summary: Document) -> str:
    if summary["device"] == "cpu":
        return f"\n{NOT_A_GPU_RESULT}"
    states = [step["state"] for step in summary["steps"]]
    if summary["exitCode"] == UnavailableError.exit_code:
        return f"\n**No usable GPU** for {summary['device']}: the first broken link is named below."
    wrong = sum(state in ("fails", "timeout") for state in states)
    quick = " One short round each: figures say nothing." if summary["quick"] else ""
    return (
        f"\n{'Everything holds.' if not wrong else f'**{wrong} of {len(states)} steps do not hold.**'}{quick}"
    )


def _format_options(timed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The ms of a batch with each option set, and its speed in relation to the first one."""
    if not timed:
        return []
    names = list(dict.fromkeys(name for sets in timed.values() for name in sets))
    rows = [
        [name, *(f"{sets[name]['ms']:.2f} ({sets[name]['speedup']:.2f} x)" for sets in timed.values())]
        for name in names
    ]
    heads = ["options", *(f"batch {size}, ms" for size in timed)]
    return ["", "## Options", "", *_table(heads, rows)]


def _format_timeline(timeline: Sequence[Document]) -> list[str]:
    if not timeline:
        return []
    rows = [[each["seconds"], each["effective"], each["reasonCode"]] for each in timeline]
    return ["", "## After kill -9", "", *_table(["s", "device", "reason"], rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [
        ["" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        for row in rows
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(row)} |" for row in cells]


# --- the command --------------------------------------------------------------------------------------------


@contextmanager
def _open_work_folder() -> Iterator[Path]:
    """A temporary folder; meanwhile SIGTERM ends the running step as Ctrl+C does."""
    work, before = Path(tempfile.mkdtemp(prefix="visionedge-gpu-check-")), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield work
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(work, ignore_errors=True)  # what a killed step left may still be written to


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the head of this file for its exit codes."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="exit codes: 0 everything holds, 1 something does not, 2 bad arguments, 3 no usable GPU",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), metavar="FOLDER", help="(default: %(default)s)"
    )
    parser.add_argument("--model", metavar="FILE", help="another model than the bundled one")
    parser.add_argument(
        "--only", metavar="NAME", action="append", help="only this step, repeatable; see --list"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short rounds: to see that it runs, not how fast"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    given = parser.parse_args(arguments)
    options = CheckOptions(given.device, given.model and str(Path(given.model).resolve()), given.quick)
    steps = list_steps(options)
    if unknown := set(given.only or ()) - {step.name for step in steps}:
        parser.error(f"--only {min(unknown)}: is no step; --list prints them")
    steps = [step for step in steps if given.only is None or step.name in given.only]
    if given.list:
        print("\n".join(f"{step.name:<14} {step.limit_s:4.0f} s  {step.title}" for step in steps))
        return 0
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: cannot be made: {error.strerror}")
    scrub = ReportScrubber(os.environ, socket.gethostname(), Path.home())
    check = Check(options, steps, given.out, scrub, describe_machine())
    with _open_work_folder() as work:
        try:
            check.run(work)
        except KeyboardInterrupt:
            print(f"interrupted; {given.out} has what was done", file=sys.stderr)
            return 130
    print(f"{given.out / 'report.md'}: {_describe_result(check.document()).strip()}")
    return check.exit_code


if __name__ == "__main__":
    sys.exit(main())
