"""Scenarios for doctor: hosts with the expected first broken link and reason code."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doctor_hosts import DATA, HostBuilder, cuda_failure, linux, missing
from visionedge.ops.doctor.host import DiskSpace
from visionedge.ops.doctor.last_start import LAST_START_FILE_NAME, LastGoodStart, gather_start_facts

_GIB = 2**30
WSL_CUDA = "/usr/lib/wsl/drivers/nv_dispi.inf_amd64_1/libcuda.so.1.1"
NO_CUBLAS = "libcublasLt.so.12"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A host, the expected first broken link and reason code, and the request (`config` as a document)."""

    name: str
    build: Callable[[HostBuilder], object]
    broken: str | None
    code: str
    device: str = "auto"
    config: dict[str, Any] = field(default_factory=dict)

    def machine(self, root: Path) -> HostBuilder:
        """The host of this scenario."""
        made = linux(root)
        self.build(made)
        return made


def dda(m: HostBuilder) -> HostBuilder:
    """A module in EFLOW with a T4 by DDA, the GPU image and a working driver."""
    return m.eflow().module().nvidia_nodes().kernel_driver().driver().gpu_wheel().memory(15900, 12000)


def pv(m: HostBuilder) -> HostBuilder:
    """A module in EFLOW with an RTX by GPU-PV, the GPU image and a working driver on Windows."""
    return (
        m.eflow().module().dxg().driver("NVIDIA RTX A2000", 86, path=WSL_CUDA, version="573.42").gpu_wheel()
    )


def native(m: HostBuilder) -> HostBuilder:
    """A Linux machine with an RTX 3060 and the GPU extra."""
    return m.nvidia_nodes().kernel_driver().on_pci().driver("NVIDIA GeForce RTX 3060", 86).gpu_wheel()


def _driver_was_updated(m: HostBuilder) -> None:
    dda(m).session_works()
    kept = LastGoodStart(
        at="2026-11-20T08:00:00.000Z",
        device="cuda",
        facts=gather_start_facts(m.host()) | {"driver": "535.54.03", "cores": "2"},
        salt="",
        sections={},
        local=None,
    )
    m.file(DATA / LAST_START_FILE_NAME, json.dumps(kept.document()))


def _all_checks_fail(m: HostBuilder) -> None:
    m.eflow().module().cpu_wheel().memory(980, 120)
    m.network = {
        "resolve:gateway": {"error": "Name or service not known"},
        "date": {"date": "Sun, 22 Nov 2026 07:00:00 GMT"},
        "reach:dock": {"error": "Connection refused"},
        "reach:yard": {"reached": True},
    }
    m.denied = {"/data", "/var/run/iotedge/workload.sock"}
    m.synchronised = False
    m.free = DiskSpace(9 * _GIB, 2**26)


NO_GPU = [
    Scenario("cpu-laptop", lambda m: m.cpu_wheel(), None, "no-gpu-build"),
    Scenario("cpu-asked", lambda m: m.cpu_wheel(), None, "asked-cpu", device="cpu"),
    Scenario(
        "cuda-demanded-nothing-there", lambda m: m.cpu_wheel(), "passthrough", "no-gpu-build", device="cuda"
    ),
    Scenario(
        "gpu-extra-no-libraries",
        lambda m: m.gpu_wheel().without_libraries(NO_CUBLAS, "libcudnn.so.9"),
        None,
        "library-missing",
    ),
    Scenario(
        "gpu-extra-no-driver",
        lambda m: m.gpu_wheel().session_fails(cuda_failure(35, "insufficient")),
        None,
        "driver-missing",
    ),
    Scenario(
        "card-without-driver",
        lambda m: m.on_pci().gpu_wheel().session_fails(cuda_failure(35, "insufficient")),
        "passthrough",
        "driver-missing",
    ),
    Scenario("intel-laptop", lambda m: m.on_pci("0x8086").cpu_wheel(), None, "no-gpu-build"),
    Scenario(
        "cuda-demanded-no-card",
        lambda m: m.on_pci("0x8086").cpu_wheel(),
        "passthrough",
        "no-gpu-build",
        device="cuda",
    ),
    Scenario(
        "cuda-demanded-of-intel",
        lambda m: m.eflow().module().dxg("libdxcore.so", store="iigd_dch.inf_amd64_1").cpu_wheel(),
        "passthrough",
        "no-gpu-build",
        device="cuda",
    ),
    Scenario(
        "eflow-without-gpu",
        lambda m: m.eflow().module().gpu_wheel().session_fails(cuda_failure(35, "insufficient")),
        "passthrough",
        "driver-missing",
    ),
    Scenario("eflow-vm-itself-without-gpu", lambda m: m.eflow().cpu_wheel(), "passthrough", "no-gpu-build"),
    Scenario(
        "hyper-v-without-gpu",
        lambda m: m.eflow().kernel("6.8.0-51-generic").cpu_wheel(),
        "passthrough",
        "no-gpu-build",
    ),
    Scenario("wsl-without-gpu", lambda m: m.wsl().cpu_wheel(), "passthrough", "no-gpu-build"),
    Scenario(
        "container-on-a-host-without",
        lambda m: m.container().on_pci("0x1a03").cpu_wheel(),
        None,
        "no-gpu-build",
    ),
    Scenario("container-on-unknown-host", lambda m: m.container().cpu_wheel(), "passthrough", "no-gpu-build"),
]
NOT_PASSED_THROUGH = [
    Scenario(
        "docker-not-given",
        lambda m: (
            m.container().kernel_driver().on_pci().gpu_wheel().session_fails(cuda_failure(35, "insufficient"))
        ),
        "passthrough",
        "driver-missing",
    ),
    Scenario(
        "module-not-given-dda",
        lambda m: (
            m.eflow()
            .module()
            .kernel_driver()
            .on_pci()
            .gpu_wheel()
            .session_fails(cuda_failure(35, "insufficient"))
        ),
        "passthrough",
        "driver-missing",
    ),
    Scenario(
        "module-not-given-gpu-pv",
        lambda m: (
            m.eflow()
            .module()
            .file("/proc/misc", "126 dxg\n")
            .gpu_wheel()
            .session_fails(cuda_failure(35, "insufficient"))
        ),
        "passthrough",
        "driver-missing",
    ),
    Scenario(
        "docker-in-wsl-not-given",
        lambda m: (
            m.wsl()
            .container()
            .file("/proc/misc", "126 dxg\n")
            .gpu_wheel()
            .session_fails(cuda_failure(35, "insufficient"))
        ),
        "passthrough",
        "driver-missing",
    ),
]


def _works_without_uvm(m: HostBuilder) -> None:
    native(m).session_works()
    (m.root / "dev/nvidia-uvm").unlink()


WORKING = [
    Scenario("native-good", lambda m: native(m).session_works(), None, "ok"),
    Scenario("dda-good", lambda m: dda(m).session_works(), None, "ok", device="cuda"),
    Scenario("gpu-pv-good", lambda m: pv(m).session_works(), None, "ok"),
    Scenario(
        "wsl-good",
        lambda m: (
            m.wsl().dxg().driver("NVIDIA GeForce RTX 3070", 86, path=WSL_CUDA).gpu_wheel().session_works()
        ),
        None,
        "ok",
    ),
    Scenario(
        "nodes-on-the-cpu", lambda m: dda(m).session_works("NonMaxSuppression nms", "Loop post"), None, "ok"
    ),
    Scenario(
        "newer-by-ptx",
        lambda m: native(m).driver("NVIDIA GeForce RTX 5090", 120).session_works(),
        None,
        "ok",
    ),
    Scenario("session-works-without-uvm", _works_without_uvm, None, "ok"),
    Scenario(
        "tensorrt-falls-to-cuda",
        lambda m: (
            native(m)
            .session_works()
            .missing_libraries.update({"libnvinfer.so.10": missing("libnvinfer.so.10")})
        ),
        "libraries",
        "library-missing",
        device="tensorrt",
    ),
]


def _half_a_core(machine: HostBuilder) -> None:
    machine.container().on_pci("0x1a03").cpu_wheel().cpu_quota = 0.5


SYSTEM_CHECK_SCENARIOS = [
    Scenario("half-a-core", _half_a_core, None, "no-gpu-build"),
    Scenario("changed-since-the-last-start", _driver_was_updated, None, "ok"),
    Scenario(
        "half-an-identity",
        lambda m: m.container().cpu_wheel().environ.update({"IOTEDGE_MODULEID": "vision"}),
        "passthrough",
        "no-gpu-build",
    ),
    Scenario(
        "all-system-checks-fail",
        _all_checks_fail,
        "passthrough",
        "no-gpu-build",
        config={
            "cameras": {
                "dock": {"uri": "rtsp://admin:hunter2@192.0.2.5/stream1"},
                "yard": {"uri": "http://192.0.2.6:8081/video"},
                "gate": {"uri": "rtsp://192.0.2.7/live"},
                "desk": {"uri": "v4l2:///dev/video0"},
                "old": {"uri": "rtsp://192.0.2.8/", "enabled": False},
                "clip": {"uri": "demo:"},
            }
        },
    ),
]
