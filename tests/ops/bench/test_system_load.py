"""How much of the processor other processes used while a benchmark ran."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from command_line import CommandLine
from tiny_models import TinyDetector
from visionedge.ops.bench.machine import (
    OTHER_PROCESSES_KEY,
    OtherProcessesLoad,
    describe_other_load,
    read_own_cpu_s,
)

TICKS = os.sysconf("SC_CLK_TCK")


class FakeProc:
    """The times of cores in a /proc/stat, in seconds, our own processor time, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.stat = folder / "stat"
        self.now_s = 100.0
        self.own_s = 0.0

    def cores(self, *busy_s: Mapping[str, float]) -> None:
        """Set the times of each core, by name."""
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for number, spent in enumerate(busy_s):
            names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
            ticks = [int(spent.get(name, 0) * TICKS) for name in names]
            lines.append(f"cpu{number} {' '.join(map(str, ticks))} 0 0")
        self.stat.write_text("\n".join([*lines, "", "intr 1 2 3"]) + "\n")

    def watch(self, cores: tuple[int, ...] = (0, 1)) -> OtherProcessesLoad:
        return OtherProcessesLoad(self.stat, cores, lambda: self.now_s, lambda: self.own_s)


@pytest.fixture
def machine(tmp_path: Path) -> FakeProc:
    made = FakeProc(tmp_path)
    made.cores({}, {})
    return made


def test_the_use_of_this_process_does_not_count_as_others(machine: FakeProc) -> None:
    watched = machine.watch()
    machine.now_s, machine.own_s = 110, 14
    machine.cores({"user": 7, "idle": 3}, {"user": 6, "system": 1, "idle": 3})
    assert watched.share() == 0


def test_what_a_child_has_used_is_our_own() -> None:
    """As soon as it has ended."""
    before = read_own_cpu_s()
    used_s = float(
        subprocess.run(
            [sys.executable, "-c", "import time\nwhile time.process_time() < 0.1: pass\nprint(0.1)"],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    assert read_own_cpu_s() - before >= used_s - 2 / TICKS


def test_the_use_of_other_processes_is_a_share_of_the_cores(machine: FakeProc) -> None:
    """Time that a hypervisor takes away counts, waiting for a disk does not."""
    watched = machine.watch()
    machine.now_s, machine.own_s = 110, 5
    machine.cores({"user": 5, "iowait": 5}, {"user": 3, "steal": 2, "idle": 5})
    assert watched.share() == 0.25


def test_only_the_cores_that_may_be_used_count(machine: FakeProc) -> None:
    """A process that keeps another core busy takes nothing away."""
    watched = machine.watch(cores=(1,))
    machine.now_s += 10
    machine.cores({"user": 10}, {"user": 1, "idle": 9})
    assert watched.share() == 0.1


def test_without_proc_the_load_is_unknown(tmp_path: Path) -> None:
    """No share is invented."""
    assert OtherProcessesLoad(tmp_path / "stat", (0,)).share() is None


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
