"""`bench compare`: what is noise and what is not; machines that are not alike; a machine's fingerprint."""

import dataclasses
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from visionedge.__main__ import main
from visionedge.errors import ConfigError
from visionedge.ops.bench.compare import (
    combine_verdicts,
    compare_figure,
    compare_reports,
    compute_ratio_interval,
    format_report,
)
from visionedge.ops.bench.machine import read_hardware
from visionedge.ops.doctor.host import ProbeResult, this_host

MACHINE = {
    "cpu": "a CPU",
    "cpuFlags": ["avx2"],
    "cores": 2,
    "usableCores": 2,
    "kernel": "6.1",
    "python": "3.11",
}
QUIET = (100.0, 101.0, 99.0, 100.5, 99.5)


def report(speeds: Sequence[float], costs: Sequence[float] | None = None, **machine: Any) -> dict[str, Any]:
    pairs = itertools.zip_longest(speeds, costs or [10.0] * len(speeds))
    rounds = [
        {"framesPerSecond": speed, "cpuMsPerFrame": cost, "latencyMs": {"p95": 20.0}} for speed, cost in pairs
    ]
    return {
        "schema": "visionedge/bench-pipeline/1",
        "machine": MACHINE | machine,
        "load": {"source": "demo:", "cameras": 4, "rounds": len(speeds)},
        "model": "tiny",
        "pipeline": {"framesPerSecondAll": list(speeds), "rounds": rounds},
    }


def scaled(speeds: Sequence[float], factor: float) -> list[float]:
    return [speed * factor for speed in speeds]


def verdicts(document: Mapping[str, Any]) -> dict[str, str]:
    return {each["figure"]: each["verdict"] for each in document["figures"]}


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.8, "worse"), (1.25, "better"), (1.0, "same"), (0.99, "same")]
)
def test_a_change_beyond_noise_and_tolerance_is_reported(factor: float, verdict: str) -> None:
    document = compare_reports(report(QUIET), report(scaled(QUIET, factor)))
    assert verdicts(document)["frames/s"] == document["verdict"] == verdict


def test_the_same_change_under_large_noise_is_undecided() -> None:
    noisy = (60.0, 140.0, 100.0, 80.0, 120.0)
    assert compare_reports(report(noisy), report(scaled(noisy, 0.9)))["verdict"] == "undecided"


def test_less_processor_time_is_better_and_more_is_worse() -> None:
    cheap, dear = report(QUIET, [10.0, 10.1, 9.9, 10.0, 10.0]), report(QUIET, [13.0, 13.1, 12.9, 13.0, 13.0])
    assert verdicts(compare_reports(cheap, dear))["CPU ms per frame"] == "worse"
    assert verdicts(compare_reports(dear, cheap))["CPU ms per frame"] == "better"


def test_a_slow_machine_is_corrected_by_the_plain_loop_beside_it() -> None:
    before, after = report(QUIET), report(scaled(QUIET, 0.5))
    before["baseline"] = {"framesPerSecondAll": scaled(QUIET, 0.7)}
    after["baseline"] = {"framesPerSecondAll": scaled(QUIET, 0.35)}
    assert verdicts(compare_reports(before, after))["frames/s to the plain loop"] == "same"


def test_three_rounds_each_give_ninety_percent_confidence_and_two_give_none() -> None:
    assert compute_ratio_interval((1, 2, 3), (1, 2, 3)).confidence == 0.9
    with pytest.raises(ConfigError, match="3 rounds"):
        compare_reports(report(QUIET[:2]), report(QUIET[:2]))


def test_the_interval_contains_the_true_ratio_as_often_as_stated() -> None:
    dice = random.Random(1)  # noqa: S311 - noise, no secret
    held = 0
    for _ in range(400):
        before, after = ([dice.lognormvariate(mean, 0.2) for _ in range(5)] for mean in (0.0, 0.0))
        interval = compute_ratio_interval(before, after)
        assert interval.confidence == pytest.approx(0.968, abs=0.001)
        held += interval.low <= 1 <= interval.high
    assert 0.94 <= held / 400 <= 0.99


def test_a_single_worse_figure_makes_the_result_worse() -> None:
    assert combine_verdicts(["same", "better", "worse"]) == "worse"
    assert combine_verdicts(["same", "undecided", "better"]) == "undecided"
    assert combine_verdicts(["same", "better"]) == "better"
    finding = compare_figure("x", QUIET, scaled(QUIET, 0.98), higher_is_better=True, tolerance=0.03)
    assert finding.verdict != "worse"


@pytest.mark.parametrize(
    "other",
    [{"cpu": "another"}, {"cpuFlags": ["avx2", "avx512_vnni"]}, {"gpuDriver": "550.1"}, {"usableCores": 1}],
)
def test_different_machines_are_refused_unless_allowed(other: dict[str, Any]) -> None:
    before, after = report(QUIET), report(QUIET, **other)
    with pytest.raises(ConfigError, match=next(iter(other))):
        compare_reports(before, after)
    document = compare_reports(before, after, unlike=True)
    assert document["verdict"] == "same"
    assert "different: " + next(iter(other)) in format_report(document)


def test_another_load_is_refused_and_more_rounds_are_accepted() -> None:
    other = report(QUIET)
    other["load"] = other["load"] | {"cameras": 8}
    with pytest.raises(ConfigError, match="cameras: 4 before, 8 after"):
        compare_reports(report(QUIET), other)
    assert compare_reports(report(QUIET), report(QUIET * 2))["verdict"] == "same"


def test_other_versions_are_reported_and_accepted() -> None:
    document = compare_reports(report(QUIET), report(QUIET, python="3.13"))
    assert document["software"] == ["python: 3.11 before, 3.13 after"]


def test_the_command_exits_with_1_only_if_the_result_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast, slow, text = tmp_path / "fast.json", tmp_path / "slow.json", tmp_path / "text.json"
    fast.write_text(json.dumps(report(QUIET)))
    slow.write_text(json.dumps(report(scaled(QUIET, 0.7))))
    text.write_text("no report")
    assert main(["bench", "compare", str(fast), str(slow)]) == 1
    assert "worse: the change is larger than the noise" in capsys.readouterr().out
    assert main(["bench", "compare", str(slow), str(fast), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "better"
    assert main(["bench", "compare", str(fast), str(text)]) == 2
    assert main(["bench", "compare", str(fast), str(tmp_path / "none.json")]) == 2


def files(root: Path, texts: Mapping[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPUINFO = "processor : 0\nflags\t\t: fpu avx2 avx512_vnni fma ssse3\n"


def test_a_machine_without_a_gpu_is_reported_without_asking_a_driver(tmp_path: Path) -> None:
    def never(question: str, _arguments: dict[str, Any], _limit_s: float) -> ProbeResult:
        raise AssertionError(question)

    root = files(
        tmp_path,
        {
            "proc/cpuinfo": CPUINFO,
            "proc/meminfo": "MemTotal: 4194304 kB\n",
            "proc/sys/kernel/osrelease": "6.1.0\n",
        },
    )
    assert read_hardware(dataclasses.replace(this_host({}), root=root, probe=never)) == {
        "cpuFlags": ["avx2", "avx512_vnni", "fma"],
        "memoryMiB": 4096,
        "kernel": "6.1.0",
        "gpu": None,
        "gpuDriver": None,
        "passthrough": "none",
    }


def test_a_gpu_is_reported_with_its_driver_and_passthrough(tmp_path: Path) -> None:
    def driver(_question: str, _arguments: dict[str, Any], _limit_s: float) -> ProbeResult:
        return ProbeResult(
            {"devices": {"devices": [{"name": "Tesla T4"}]}, "management": {"driver": "550.54"}}
        )

    root = files(tmp_path, {"dev/nvidia0": "", "dev/nvidiactl": "", "proc/sys/kernel/osrelease": "6.1.0"})
    found = read_hardware(dataclasses.replace(this_host({}), root=root, probe=driver))
    assert (found["gpu"], found["gpuDriver"], found["passthrough"]) == ("Tesla T4", "550.54", "native")
