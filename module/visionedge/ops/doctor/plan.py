"""Which passthrough EFLOW supports for a GPU on a Windows, as Microsoft's table of June 2025 has it.

NVIDIA T4 and A2 go by DDA, on Windows Server 2019 and 2022 and on Windows 10 and 11 Pro, Enterprise and IoT
Enterprise. GeForce, Quadro, RTX and Intel's integrated GPUs go by GPU-PV, on the same editions of Windows 10
and 11, but never on Server.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from visionedge.errors import ConfigError
from visionedge.ops.doctor.finding import Remedy, one
from visionedge.ops.doctor.passthrough import NO_REQUIRE, WANTED_CORES, WANTED_MEMORY_MIB
from visionedge.ops.doctor.wheel import LEAST_WINDOWS_DRIVER
from visionedge.ops.manifest.gpu_options import GPU_OPTIONS, compact

Document = dict[str, Any]
Family = Literal["datacenter", "graphics", "maxwell", "intel", "unknown"]
Way = Literal["DirectDeviceAssignment", "ParaVirtualization", "none"]

SCHEMA = "visionedge/doctor-plan/1"
EDITIONS = ("pro", "enterprise", "iot-enterprise", "server", "home")
DATA_DISK_GB = 20

_LEAST_WINDOWS_10 = (19044, 1620)
_WINDOWS_11 = 22000
_SERVERS = {17763: "Windows Server 2019", 20348: "Windows Server 2022"}
# What PowerShell would read as something else than a name.
_STRANGE = re.compile(r"[\"'`$;\x00-\x1f]")


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: whether GPU passthrough is supported, which one, why, and what to type on Windows."""

    windows: str
    gpu: str
    supported: bool
    cuda: bool
    passthrough: Way
    why: str
    steps: tuple[Remedy, ...]

    def document(self) -> Document:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "windows": self.windows,
            "gpu": self.gpu,
            "supported": self.supported,
            "cuda": self.cuda,
            "passthrough": self.passthrough,
            "why": self.why,
            "steps": [step.document() for step in self.steps],
        }

    def words(self) -> str:
        """For people."""
        answer = f"supported: {self.passthrough}" if self.supported else "not supported"
        lines = [f"{self.gpu} on {self.windows}: {answer}", f"  {self.why}", ""]
        for number, step in enumerate(self.steps, 1):
            lines += [f"{number}. {step.say}", *(f"     {line}" for line in step.lines)]
        return "\n".join(lines).rstrip() + "\n"


def make_plan(build: str | None, edition: str | None, gpu: str | None) -> Plan:
    """What to do on a Windows of this build ("19045" or "19044.1620") and edition, with this GPU.

    Raises:
        ConfigError: something is missing or makes no sense.
    """
    _check(build, edition, gpu)
    number, revision = _build(build)
    edition = _edition(edition)
    gpu = _gpu(gpu)
    windows, windows_fault = _windows(number, revision, edition)
    family = family_of(gpu)
    way, way_fault = _way(family, edition)
    fault = windows_fault or way_fault
    if fault:
        return Plan(windows, gpu, False, False, "none", fault, one(*_without(gpu)))
    why = _why(family, way)
    steps = _steps(family, way, gpu, is_windows_10=number < 20000)
    if number == _LEAST_WINDOWS_10[0] and revision is None:
        least = ".".join(map(str, _LEAST_WINDOWS_10))
        steps = (*one(f"see in winver that the build is {least} or newer, else update Windows"), *steps)
    return Plan(windows, gpu, True, family != "intel", way, why, steps)


def _check(build: str | None, edition: str | None, gpu: str | None) -> None:
    """Raise one error with everything that is wrong."""
    problems: list[str] = []
    for read, text in ((_build, build), (_edition, edition), (_gpu, gpu)):
        try:
            read(text)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def family_of(gpu: str) -> Family:
    """What a GPU is, by the name that Windows gives it; an RTX A2000 is no A2."""
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
    words = re.sub(r"[\s_]+", "-", (text or "").strip().lower())
    # "Windows 11 IoT Enterprise LTSC" and the like, as Windows says it.
    for edition in ("iot-enterprise", "enterprise", "server", "pro", "home"):
        if edition in words:
            return edition
    raise ConfigError([f"--edition: {_shown(text)}; write one of {', '.join(EDITIONS)}"])


def _gpu(text: str | None) -> str:
    name = (text or "").strip()
    if not name or _STRANGE.search(name):
        raise ConfigError([f"--gpu: {_shown(text)}; write its name as Windows gives it, such as NVIDIA A2"])
    return name


def _shown(text: str | None) -> str:
    return f"'{text}' makes no sense" if text else "is missing"


def _windows(number: int, revision: int | None, edition: str) -> tuple[str, str]:
    """The name of a Windows, and why EFLOW passes no GPU on there (empty: it does)."""
    if edition == "server":
        name = _SERVERS.get(number, "Windows Server")
        known = number in _SERVERS
        return f"{name} ({number})", "" if known else "the table knows Windows Server 2019 and 2022 only"
    name = "Windows 11" if number >= _WINDOWS_11 else "Windows 10"
    told = f"{name} {edition} ({number}{'' if revision is None else f'.{revision}'})"
    if edition == "home":
        return told, "EFLOW needs Pro, Enterprise, IoT Enterprise or Server"
    if number in _SERVERS and number > _LEAST_WINDOWS_10[0]:
        return told, f"build {number} is that of {_SERVERS[number]}, not of Windows 10"
    least = ".".join(map(str, _LEAST_WINDOWS_10))
    if (number, _LEAST_WINDOWS_10[1] if revision is None else revision) < _LEAST_WINDOWS_10:
        return told, f"GPU passthrough needs build {least} or newer: update Windows"
    return told, ""


def _way(family: Family, edition: str) -> tuple[Way, str]:
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
                "the table lists NVIDIA T4, A2, GeForce, Quadro and RTX, and Intel's integrated GPUs",
            )


def _why(family: Family, way: Way) -> str:
    if family == "intel":
        return "GPU-PV is supported, but an Intel GPU is no CUDA device: visionedge computes on the CPU"
    if way == "DirectDeviceAssignment":
        return "DDA: the GPU leaves Windows and belongs to the VM, which drives it with its own Linux driver"
    return "GPU-PV: the GPU is shared with Windows, whose NVIDIA driver serves the VM, too"


def _without(gpu: str) -> tuple[str, str]:
    say = f"deploy without {gpu}; visionedge computes on the CPU"
    return say, f"Deploy-Eflow -cpuCount {WANTED_CORES} -memoryInMB 4096 -vmDataSize {DATA_DISK_GB}"


def _steps(family: Family, way: Way, gpu: str, *, is_windows_10: bool) -> tuple[Remedy, ...]:
    line = (
        f"Deploy-Eflow -cpuCount {WANTED_CORES} -memoryInMB {WANTED_MEMORY_MIB} -vmDataSize {DATA_DISK_GB}"
        f' -gpuPassthroughType {way} -gpuCount 1 -gpuName "{gpu}"'
    )
    deploy = one("in an elevated PowerShell (EFLOW inside a VM gets no GPU)", line)
    if family == "intel":
        return deploy
    before = _before(way, is_windows_10=is_windows_10)
    options = one("the module's createOptions", compact(GPU_OPTIONS))
    if way == "ParaVirtualization":
        options += one("and its env, for images that set NVIDIA_REQUIRE_CUDA", NO_REQUIRE)
    check = one(
        "then look at the chain from inside",
        'Invoke-EflowVmCommand "sudo docker exec vision visionedge doctor"',
    )
    return (*before, *deploy, *options, *check)


def _before(way: Way, *, is_windows_10: bool) -> tuple[Remedy, ...]:
    if way == "DirectDeviceAssignment":
        mitigation = one("on Windows, install NVIDIA's device mitigation driver for a T4 (recommended)")
        return (*one("all cumulative updates of Windows must be installed"), *mitigation)
    least = LEAST_WINDOWS_DRIVER[12]
    driver = one(f"on Windows, NVIDIA's driver {least} or newer (CUDA 12); in the VM none is ever installed")
    wsl = one("Windows 10 also needs WSL, for its libraries", "wsl --install") if is_windows_10 else ()
    return (*driver, *wsl)
