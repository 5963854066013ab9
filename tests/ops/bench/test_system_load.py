"""How much of the processor other processes used while a benchmark ran."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from command_line import CommandLine
from tiny_models import TinyDetector
from visionedge.ops.bench.machine import OTHER_PROCESSES_KEY, OtherProcessesLoad, describe_other_load

TICKS = os.sysconf("SC_CLK_TCK")


class FakeProc:
    """A /proc of cores and processes whose times a test sets, in seconds, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder
        self.now_s = 100.0

    def cores(self, *busy_s: Mapping[str, float]) -> None:
        """Set the times of each core, by name; idle is what is left of the time that has passed."""
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for number, spent in enumerate(busy_s):
            names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
            ticks = [int(spent.get(name, 0) * TICKS) for name in names]
            lines.append(f"cpu{number} {' '.join(map(str, ticks))} 0 0")
        (self.proc / "stat").write_text("\n".join([*lines, "intr 1 2 3"]) + "\n")

    def process(self, number: int, parent: int, *, user: float = 0, children: float = 0) -> None:
        """Set a process whose name holds what a parser stumbles over."""
        fields = [str(parent), *["0"] * 9, *(str(int(s * TICKS)) for s in (user, 0, children, 0)), "0"]
        (self.proc / str(number)).mkdir(exist_ok=True)
        (self.proc / str(number) / "stat").write_text(f"{number} (a) b ( c) S {' '.join(fields)}\n")

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def machine(tmp_path: Path) -> FakeProc:
    made = FakeProc(tmp_path)
    made.cores({}, {})
    made.process(os.getpid(), 1)
    return made


def watch(machine: FakeProc, cores: tuple[int, ...] = (0, 1)) -> OtherProcessesLoad:
    return OtherProcessesLoad(machine.proc, cores, machine.clock)


def test_the_use_of_this_process_does_not_count_as_others(machine: FakeProc) -> None:
    """Nor what its children and theirs use, whether they live or have ended."""
    machine.process(7, os.getpid())
    watched = watch(machine)
    machine.now_s += 10
    machine.process(os.getpid(), 1, user=4, children=2)
    machine.process(7, os.getpid(), user=3)
    machine.process(8, 7, user=5)
    machine.cores({"user": 7, "idle": 3}, {"user": 6, "system": 1, "idle": 3})
    assert watched.share() == 0


def test_the_use_of_other_processes_is_a_share_of_the_cores(machine: FakeProc) -> None:
    """Time that a hypervisor takes away counts, waiting for a disk does not."""
    machine.process(9, 1)
    watched = watch(machine)
    machine.now_s += 10
    machine.process(os.getpid(), 1, user=5)
    machine.process(9, 1, user=3)
    machine.cores({"user": 5, "iowait": 5}, {"user": 3, "steal": 2, "idle": 5})
    assert watched.share() == 0.25


def test_only_the_cores_that_may_be_used_count(machine: FakeProc) -> None:
    """A process that keeps another core busy takes nothing away."""
    watched = watch(machine, cores=(1,))
    machine.now_s += 10
    machine.cores({"user": 10}, {"user": 1, "idle": 9})
    assert watched.share() == 0.1


def test_without_proc_the_load_is_unknown(tmp_path: Path) -> None:
    """No share is made up."""
    assert OtherProcessesLoad(tmp_path, (0,)).share() is None


def test_a_significant_share_is_reported() -> None:
    """An idle machine and an unknown share need no sentence."""
    assert "37% of the processor" in describe_other_load({OTHER_PROCESSES_KEY: 0.37})
    assert [describe_other_load({OTHER_PROCESSES_KEY: share}) for share in (None, 0.02)] == ["", ""]
    assert describe_other_load({}) == "", "a report of an older version"


@pytest.mark.parametrize("share", [0.6, 0.01])
def test_every_benchmark_reports_the_load_of_the_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """In the text; all benchmarks print it in the same function."""
    monkeypatch.setattr(OtherProcessesLoad, "share", lambda _: share)
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "data"))
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    outcome = CommandLine(capsys)(
        *("bench", "engine", "--model", model, "--lanes", "1", "--batch", "1", "--seconds", "0.01"),
        *("--rounds", "1"),
    )
    assert outcome.code == 0
    assert ("Other processes used 60% of the processor" in outcome.out) == (share > 0.5)


def test_the_share_is_in_the_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a number between 0 and 1, measured on this machine."""
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "data"))
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    outcome = CommandLine(capsys)(
        *("bench", "engine", "--model", model, "--lanes", "1", "--batch", "1", "--seconds", "0.01"),
        *("--rounds", "1", "--json", "-"),
    )
    assert outcome.code == 0
    assert 0 <= json.loads(outcome.out)[OTHER_PROCESSES_KEY] <= 1
