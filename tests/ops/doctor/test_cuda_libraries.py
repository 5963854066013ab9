"""doctor and the reasons of the engine with the real CUDA 12 provider, against a scripted driver.

`make test-gpu-libs` installs what this takes (2.7 GB); it needs a C compiler and no GPU.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doctor_hosts import DATA, linux
from stub_driver import Script, script, stub_folder
from visionedge.config.load import parse_config
from visionedge.engine.device.devices import ReasonCode, probe_device, run_probe
from visionedge.ops.doctor.facts import DoctorRequest
from visionedge.ops.doctor.host import Host, ProbeResult, run_probe_child, this_host
from visionedge.ops.doctor.report import DoctorReport, examine

__all__ = ["script", "stub_folder"]

# A hyphen is no part of a Python name.
pytestmark = [
    getattr(pytest.mark, "cuda-libs"),
    pytest.mark.skipif(
        importlib.util.find_spec("nvidia") is None or "onnxruntime-gpu" not in this_host({}).packages,
        reason="onnxruntime-gpu and NVIDIA's libraries are not installed here; `make test-gpu-libs` does it",
    ),
]

VERSION = re.compile(r"lib\w+ \d+\.\d+")


def _ask(question: str, arguments: dict[str, Any], limit_s: float) -> ProbeResult:
    """The real children, but for the device nodes, which only the made-up root has."""
    return run_probe_child(question, arguments | ({"nodes": []} if question == "driver" else {}), limit_s)


@pytest.fixture
def with_a_gpu(tmp_path: Path) -> Host:
    """A machine with the files of a GPU, and everything else as it really is here."""
    here = this_host({})
    machine = linux(tmp_path / "root").nvidia_nodes().kernel_driver()
    below = machine.root / str(here.site).lstrip("/")
    below.parent.mkdir(parents=True)
    below.symlink_to(here.site)
    return replace(machine.host(), packages=here.packages, site=here.site, probe=_ask, session=run_probe)


Examine = Callable[[], DoctorReport]


@pytest.fixture
def report(with_a_gpu: Host) -> Examine:
    return lambda: examine(DoctorRequest("auto", parse_config({}), DATA), with_a_gpu)


def found(report: DoctorReport, name: str) -> str:
    """What was found of a link."""
    return next(finding.found for finding in report.chain if finding.name == name)


def test_every_library_is_loaded_and_its_version_read(report: Examine, script: Script) -> None:
    script(init=100)
    libraries = found(report(), "libraries")
    assert len(VERSION.findall(libraries)) == 6
    assert "libcudnn 9." in libraries


def test_without_a_driver_the_missing_driver_is_reported(report: Examine) -> None:
    """Though CUDA itself speaks of one that is too old."""
    doctor_report = report()
    assert doctor_report.code is ReasonCode.DRIVER_MISSING
    assert doctor_report.first_broken is not None
    assert (doctor_report.first_broken.name, doctor_report.first_broken.found) == ("libcuda", "libcuda.so.1 is missing")


@pytest.mark.parametrize(
    ("init", "code"),
    [
        (3, ReasonCode.CUDA_ERROR),
        (100, ReasonCode.NO_DEVICE),
        (101, ReasonCode.NO_DEVICE),
        (802, ReasonCode.CUDA_ERROR),
        (803, ReasonCode.DRIVER_MISMATCH),
        (804, ReasonCode.DRIVER_MISMATCH),
        (999, ReasonCode.CUDA_ERROR),
    ],
)
def test_a_driver_that_fails_to_start_is_named_by_chain_and_session(
    report: Examine, script: Script, init: int, code: ReasonCode
) -> None:
    """The genuine text of the provider becomes the reason, and the chain breaks at the same place."""
    script(init=init)
    doctor_report = report()
    assert doctor_report.code is code
    assert doctor_report.reason.startswith(f"CUDA failure {init}: ")
    assert doctor_report.first_broken is not None
    assert doctor_report.first_broken.name == "cuda-init"
    assert f"cuInit answers {init} " in doctor_report.first_broken.found


def test_a_driver_that_is_too_old_is_named_by_chain_and_session(report: Examine, script: Script) -> None:
    script(init=0, version=11000)
    doctor_report = report()
    assert doctor_report.code is ReasonCode.DRIVER_TOO_OLD
    assert doctor_report.first_broken is not None
    assert doctor_report.first_broken.name == "driver-version"


def test_a_driver_that_starts_and_cannot_compute_breaks_the_session(report: Examine, script: Script) -> None:
    """Nothing before it shows a fault, and still no GPU is claimed."""
    script(init=0)
    doctor_report = report()
    assert doctor_report.effective == "cpu"
    assert doctor_report.first_broken is not None
    assert doctor_report.first_broken.name == "session"


def test_a_crashing_driver_ends_only_the_probe(script: Script) -> None:
    script(does="crash")
    assert probe_device("cuda").code is ReasonCode.PROBE_CRASHED


def test_a_hanging_driver_ends_at_the_time_limit_of_the_probe(script: Script) -> None:
    script(does="hang")
    assert probe_device("cuda", timeout_s=3).code is ReasonCode.PROBE_TIMEOUT
