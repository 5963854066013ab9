"""What EFLOW supports: editions of Windows, GPUs and their passthrough, virtual switches, sizes of its VM.

From Microsoft's pages (MicrosoftDocs/azure-docs, articles/iot-edge): gpu-acceleration.md (2025-06-05),
iot-edge-for-linux-on-windows-networking.md (2025-01-21), reference-iot-edge-for-linux-on-windows-functions.md
(2022-07-28), and includes/iot-edge-prerequisites-linux-on-windows.md for the versions of Windows.
"""

import re
from dataclasses import dataclass
from typing import Literal

from visionedge.errors import ConfigError

Edition = Literal["pro", "enterprise", "iot-enterprise", "server", "home", "education"]
GpuFamily = Literal["datacenter", "graphics", "blackwell", "maxwell", "intel", "intel-discrete", "unknown"]
PassthroughType = Literal["DirectDeviceAssignment", "ParaVirtualization", "none"]

EDITIONS = ("pro", "enterprise", "iot-enterprise", "server-2019", "server-2022", "home")
SERVER_BUILDS = {"2016": 14393, "2019": 17763, "2022": 20348, "2025": 26100}
_SERVERS = {build: f"Windows Server {year}" for year, build in SERVER_BUILDS.items()}
_SUPPORTED_SERVERS = (17763, 20348)

MIN_BUILD = 17763
MIN_GPU_BUILD = (19044, 1620)
"""The November 2021 update of Windows 10."""
WINDOWS_11 = 22000

MIN_MEMORY_MB = 1024
DISK_SIZES_GB = (21, 2000)
DATA_SIZES_GB = (2, 2000)

# Characters with a meaning in PowerShell.
_UNSAFE_NAME = re.compile(r"[\"'`$;\x00-\x1f\u2018-\u201f]")


@dataclass(frozen=True, slots=True)
class WindowsVersion:
    """A Windows by edition and build; `revision`: the number behind the build, None if unknown."""

    edition: Edition
    build: int
    revision: int | None = None

    @property
    def is_server(self) -> bool:
        """Whether it is a Windows Server: it has no Default Switch, and no GPU-PV."""
        return self.edition == "server"

    @property
    def is_windows_10(self) -> bool:
        """Whether it is Windows 10."""
        return not self.is_server and self.build < WINDOWS_11

    @property
    def name(self) -> str:
        """Its name with the build: ``Windows 10 pro (19044.1620)``."""
        if self.is_server:
            return f"{_SERVERS.get(self.build, 'Windows Server')} ({self.build})"
        revision = "" if self.revision is None else f".{self.revision}"
        return f"Windows {10 if self.is_windows_10 else 11} {self.edition} ({self.build}{revision})"

    def find_fault(self) -> str:
        """Why EFLOW does not run on it; empty if it does."""
        if self.edition in ("home", "education"):
            return "EFLOW needs Pro, Enterprise, IoT Enterprise or Server"
        if self.is_server and self.build not in _SUPPORTED_SERVERS:
            return "EFLOW supports Windows Server 2019 and 2022 only"
        if not self.is_server and self.build == SERVER_BUILDS["2022"]:
            return f"build {self.build} is Windows Server 2022, not Windows 10"
        if self.build < MIN_BUILD:
            return f"EFLOW needs build {MIN_BUILD} or newer: update Windows"
        return ""

    def find_gpu_fault(self, family: GpuFamily) -> str:
        """Why EFLOW cannot pass a GPU of this family through; empty if it can."""
        least = ".".join(map(str, MIN_GPU_BUILD))
        revision = MIN_GPU_BUILD[1] if self.revision is None else self.revision
        match family:
            case "graphics" | "blackwell" | "intel" if self.is_server:
                return "GPU-PV, which this GPU needs, is not supported on Windows Server"
            case "maxwell":
                return "CUDA under GPU-PV needs Pascal or newer (GeForce GTX 10, Quadro P)"
            case "intel-discrete":
                return "EFLOW passes Intel's integrated GPUs through, not its cards"
            case "unknown":
                return "EFLOW supports NVIDIA T4, A2, GeForce, Quadro and RTX, and Intel's integrated GPUs"
            case _ if not self.is_server and (self.build, revision) < MIN_GPU_BUILD:
                return f"GPU passthrough needs build {least} or newer: update Windows"
        return ""


def read_windows(build: str | None, edition: str | None) -> WindowsVersion:
    """Read an edition, also as Windows writes it, and a build: "19045", "19044.1620" or "10.0.22631.4317".

    The build of a server may be missing if its name has the year: ``server-2022``.

    Raises:
        ConfigError: one of them is missing or not valid, or they do not fit together.
    """
    problems: list[str] = []
    name = re.sub(r"[\s_]+", "-", (edition or "").strip().lower())
    names = ("education", "iot-enterprise", "enterprise", "server", "pro", "home")
    found = next((each for each in names if each in name), None)
    if re.search(r"\b(datacenter|standard)\b", name) and found is None:
        found = "server"
    if found is None:
        problems.append(f"--edition: {_shown(edition)}; write one of {', '.join(EDITIONS)}")
    year = next((year for year in SERVER_BUILDS if found == "server" and year in name), None)
    number = re.fullmatch(r"(?:10\.0\.)?(\d{5})(?:\.(\d{1,6}))?", build or "")
    if number is None and (build or year is None):
        hint = "write 19045 or 19044.1620, as winver shows it"
        problems.insert(0, f"--windows-build: {_shown(build)}; {hint}")
    elif number is not None and year is not None and int(number[1]) != SERVER_BUILDS[year]:
        problems.append(f"--windows-build: {build} is not Windows Server {year} ({SERVER_BUILDS[year]})")
    if problems:
        raise ConfigError(problems)
    if number is None:
        return WindowsVersion("server", SERVER_BUILDS[str(year)])
    return WindowsVersion(found, int(number[1]), int(number[2]) if number[2] else None)  # type: ignore[arg-type]


def read_gpu_name(text: str | None, option: str = "--gpu") -> str:
    """Read the name of a GPU as Windows shows it.

    Raises:
        ConfigError: it is missing, or has characters with a meaning in PowerShell.
    """
    name = (text or "").strip()
    if not name or _UNSAFE_NAME.search(name):
        raise ConfigError([f"{option}: {_shown(text)}; write its name in Windows, such as NVIDIA A2"])
    return name


def _shown(text: str | None) -> str:
    return f"'{show_in_one_line(text)}' is not valid" if text else "is missing"


def show_in_one_line(text: str) -> str:
    """A value as it can stand in an error: at most 80 characters, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:80])


def classify_gpu(gpu: str) -> GpuFamily:
    """The family of a GPU by its name in Windows; an RTX A2000 is not an A2."""

    def has(pattern: str) -> bool:
        return re.search(pattern, gpu, re.IGNORECASE) is not None

    if has(r"\b(tesla\s+)?t4\b|\ba2\b"):
        return "datacenter"
    if has(r"\bintel\b"):
        return "intel-discrete" if has(r"\b[ab]\d{3}m?\b|\b(flex|max)\b|data center") else "intel"
    if has(r"\bgtx\s*(7[5-9]\d|9\d\d)m?\b|\bquadro\s+[km]\d"):
        return "maxwell"
    if has(r"\brtx\s*50[5-9]0\b|\bblackwell\b"):
        return "blackwell"
    return "graphics" if has(r"\b(geforce|quadro|rtx)\b") else "unknown"


def choose_passthrough(family: GpuFamily) -> PassthroughType:
    """The passthrough of a supported GPU."""
    match family:
        case "datacenter":
            return "DirectDeviceAssignment"
        case "graphics" | "blackwell" | "intel":
            return "ParaVirtualization"
        case _:
            return "none"


def find_passthrough_fault(passthrough: PassthroughType, family: GpuFamily, *, server: bool) -> str:
    """Why this passthrough does not fit the GPU or the edition; empty if it does."""
    fits = choose_passthrough(family)
    if fits == "none":
        return WindowsVersion("pro", WINDOWS_11).find_gpu_fault(family)
    if passthrough != fits:
        return f"this GPU needs {'dda' if fits == 'DirectDeviceAssignment' else 'gpu-pv'}"
    if server and passthrough == "ParaVirtualization":
        return "GPU-PV is not supported on Windows Server"
    return ""
