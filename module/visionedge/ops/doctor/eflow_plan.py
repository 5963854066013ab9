"""`doctor --plan`: the GPU passthrough that EFLOW supports on a Windows machine.

From Microsoft's table of June 2025: NVIDIA T4 and A2 use DDA, on Windows Server 2019 and 2022 and on Windows
10 and 11 Pro, Enterprise and IoT Enterprise. GeForce, Quadro, RTX and Intel's integrated GPUs use GPU-PV, on
the same editions of Windows 10 and 11, but not on Server.
"""

import re
from typing import Any, Literal

from pydantic import Field

from visionedge.errors import ConfigError
from visionedge.ops.doctor.checks import Remedies, remedy
from visionedge.ops.doctor.remedies import DISABLE_REQUIRE_ENV, MIN_CORES, MIN_MEMORY_MIB
from visionedge.ops.doctor.wheel import MIN_WINDOWS_DRIVER
from visionedge.ops.manifest.gpu_options import GPU_OPTIONS, to_compact_json
from visionedge.web.documents import JsonDocument

GpuFamily = Literal["datacenter", "graphics", "maxwell", "intel", "unknown"]
PassthroughType = Literal["DirectDeviceAssignment", "ParaVirtualization", "none"]

EDITIONS = ("pro", "enterprise", "iot-enterprise", "server", "home")
DATA_DISK_GB = 20

_MIN_WINDOWS_10 = (19044, 1620)
_MIN_BUILD = ".".join(map(str, _MIN_WINDOWS_10))
_WINDOWS_11 = 22000
_SERVERS = {17763: "Windows Server 2019", 20348: "Windows Server 2022"}
# Characters with a meaning in PowerShell.
_UNSAFE_GPU_NAME = re.compile(r"[\"'`$;\x00-\x1f]")


class EflowPlan(JsonDocument):
    """Whether GPU passthrough is supported, which one, why, and what to type on Windows."""

    schema_: Literal["visionedge/doctor-plan/1"] = Field(alias="schema")
    windows: str
    gpu: str
    supported: bool
    cuda: bool
    passthrough: PassthroughType
    why: str
    steps: Remedies

    def to_text(self) -> str:
        """As text."""
        answer = f"supported: {self.passthrough}" if self.supported else "not supported"
        lines = [f"{self.gpu} on {self.windows}: {answer}", f"  {self.why}", ""]
        for number, step in enumerate(self.steps, 1):
            lines += [f"{number}. {step.instruction}", *(f"     {line}" for line in step.lines)]
        return "\n".join(lines).rstrip() + "\n"


def make_eflow_plan(build: str | None, edition: str | None, gpu: str | None) -> EflowPlan:
    """The plan for a Windows build ("19045" or "19044.1620"), an edition and a GPU.

    Raises:
        ConfigError: one of them is missing or not valid.
    """
    problems: list[str] = []
    values: list[Any] = []
    for read, text in ((_build, build), (_edition, edition), (_gpu, gpu)):
        try:
            values.append(read(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    (number, revision), edition, gpu = values
    windows, fault = _windows(number, revision, edition)
    family = classify_gpu(gpu)
    passthrough, gpu_fault = _choose_passthrough(family, edition)
    fault = fault or gpu_fault
    if fault:
        passthrough = "none"
        line = f"Deploy-Eflow -cpuCount {MIN_CORES} -memoryInMB 4096 -vmDataSize {DATA_DISK_GB}"
        steps = remedy(f"deploy without {gpu}; visionedge computes on the CPU", line)
    else:
        steps = _steps(family, passthrough, gpu, number, revision)
    return EflowPlan(
        schema="visionedge/doctor-plan/1",
        windows=windows,
        gpu=gpu,
        supported=not fault,
        cuda=not fault and family != "intel",
        passthrough=passthrough,
        why=fault or _explain(family, passthrough),
        steps=steps,
    )


def classify_gpu(gpu: str) -> GpuFamily:
    """The family of a GPU by its name in Windows; an RTX A2000 is not an A2."""
    if re.search(r"\b(tesla\s+)?t4\b|\ba2\b", gpu, re.IGNORECASE):
        return "datacenter"
    if re.search(r"\bintel\b", gpu, re.IGNORECASE):
        return "intel"
    if re.search(r"\bgtx\s*(7[5-9]\d|9\d\d)m?\b|\bquadro\s+[km]\d", gpu, re.IGNORECASE):
        return "maxwell"
    return "graphics" if re.search(r"\b(geforce|quadro|rtx)\b", gpu, re.IGNORECASE) else "unknown"


def _build(text: str | None) -> tuple[int, int | None]:
    found = re.fullmatch(r"(?:10\.0\.)?(\d{5})(?:\.(\d{1,6}))?", text or "")
    if not found:
        raise ConfigError([f"--windows-build: {_shown(text)}; write 19045 or 19044.1620, as winver shows it"])
    return int(found[1]), int(found[2]) if found[2] else None


def _edition(text: str | None) -> str:
    name = re.sub(r"[\s_]+", "-", (text or "").strip().lower())
    # Accepts Windows' own names, such as "Windows 11 IoT Enterprise LTSC".
    for edition in ("iot-enterprise", "enterprise", "server", "pro", "home"):
        if edition in name:
            return edition
    raise ConfigError([f"--edition: {_shown(text)}; write one of {', '.join(EDITIONS)}"])


def _gpu(text: str | None) -> str:
    name = (text or "").strip()
    if not name or _UNSAFE_GPU_NAME.search(name):
        raise ConfigError([f"--gpu: {_shown(text)}; write its name in Windows, such as NVIDIA A2"])
    return name


def _shown(text: str | None) -> str:
    return f"'{text}' is not valid" if text else "is missing"


def _windows(number: int, revision: int | None, edition: str) -> tuple[str, str]:
    """The name of a Windows, and why EFLOW supports no GPU on it (empty if it does)."""
    if edition == "server":
        name = _SERVERS.get(number, "Windows Server")
        known = number in _SERVERS
        return (
            f"{name} ({number})",
            "" if known else "EFLOW supports GPUs on Windows Server 2019 and 2022 only",
        )
    name = "Windows 11" if number >= _WINDOWS_11 else "Windows 10"
    windows = f"{name} {edition} ({number}{'' if revision is None else f'.{revision}'})"
    if edition == "home":
        return windows, "EFLOW needs Pro, Enterprise, IoT Enterprise or Server"
    if number in _SERVERS and number > _MIN_WINDOWS_10[0]:
        return windows, f"build {number} is {_SERVERS[number]}, not Windows 10"
    if (number, _MIN_WINDOWS_10[1] if revision is None else revision) < _MIN_WINDOWS_10:
        return windows, f"GPU passthrough needs build {_MIN_BUILD} or newer: update Windows"
    return windows, ""


def _choose_passthrough(family: GpuFamily, edition: str) -> tuple[PassthroughType, str]:
    match family:
        case "datacenter":
            return "DirectDeviceAssignment", ""
        case "graphics" | "intel" if edition == "server":
            return "none", "GPU-PV, which this GPU needs, is not supported on Windows Server"
        case "graphics" | "intel":
            return "ParaVirtualization", ""
        case "maxwell":
            return "none", "CUDA under GPU-PV needs Pascal or newer (GeForce GTX 10, Quadro P)"
        case _:
            return (
                "none",
                "EFLOW supports NVIDIA T4, A2, GeForce, Quadro and RTX, and Intel's integrated GPUs",
            )


def _explain(family: GpuFamily, passthrough: PassthroughType) -> str:
    if family == "intel":
        return "GPU-PV is supported, but an Intel GPU is not a CUDA device: visionedge computes on the CPU"
    if passthrough == "DirectDeviceAssignment":
        return "DDA: the VM owns the GPU and uses its own Linux driver; Windows cannot use the GPU"
    return "GPU-PV: Windows and the VM share the GPU and the NVIDIA driver of Windows"


def _steps(
    family: GpuFamily, passthrough: PassthroughType, gpu: str, number: int, revision: int | None
) -> Remedies:
    line = (
        f"Deploy-Eflow -cpuCount {MIN_CORES} -memoryInMB {MIN_MEMORY_MIB} -vmDataSize {DATA_DISK_GB}"
        f' -gpuPassthroughType {passthrough} -gpuCount 1 -gpuName "{gpu}"'
    )
    steps: Remedies = ()
    if number == _MIN_WINDOWS_10[0] and revision is None:
        steps += remedy(f"check in winver that the build is {_MIN_BUILD} or newer, else update Windows")
    if passthrough == "DirectDeviceAssignment":
        steps += remedy("all cumulative updates of Windows must be installed")
        steps += remedy("on Windows, install NVIDIA's device mitigation driver for a T4 (recommended)")
    elif family != "intel":
        least = MIN_WINDOWS_DRIVER[12]
        steps += remedy(
            f"on Windows, install NVIDIA's driver {least} or newer (CUDA 12); install none in the VM"
        )
        if number < _WINDOWS_11:
            steps += remedy("Windows 10 also needs the libraries of WSL", "wsl --install")
    steps += remedy("in an elevated PowerShell (EFLOW inside a VM cannot use a GPU)", line)
    if family == "intel":
        return steps
    steps += remedy("the module's createOptions", to_compact_json(GPU_OPTIONS))
    if passthrough == "ParaVirtualization":
        steps += remedy("and its env, for images that set NVIDIA_REQUIRE_CUDA", DISABLE_REQUIRE_ENV)
    return steps + remedy(
        "then check the GPU from inside the module",
        'Invoke-EflowVmCommand "sudo docker exec vision visionedge doctor"',
    )
