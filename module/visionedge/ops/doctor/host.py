"""The machine that doctor examines: files, packages, and probes in child processes, which may hang or crash.

Doctor reads everything through a `Host`, so that a test can describe any machine. `detect_environment` finds
out from a host whether this is a container, whether it belongs to IoT Edge, and how a GPU reaches it.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from visionedge.engine.device.devices import ProbeRunner, run_probe
from visionedge.engine.device.remote import RemoteSettings, ServerExamination, examine_servers
from visionedge.errors import ConfigError
from visionedge.frames.types import utc_now
from visionedge.iothub.identity import Identity
from visionedge.runtime.child_process import start_child
from visionedge.runtime.process_limits import cpu_quota

Document = dict[str, Any]

_KILLED_WITHIN_S = 2.0
_KIB = 1024


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The output of a probe: one document for each step that it reached.

    `ended` is "late" after a timeout, "died" after a signal or an error; `reason` has the details.
    """

    steps: Mapping[str, Document]
    ended: Literal["fine", "late", "died"] = "fine"
    reason: str = ""

    def step(self, name: str) -> Document:
        """The document of a step; empty if the probe did not reach it."""
        return self.steps.get(name, {})


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """The size of a file system, in bytes."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class MemorySize:
    """Main memory in bytes; `total_bytes` is the container's limit if that is lower."""

    total_bytes: int
    available_bytes: int
    limited: bool


RunProbe = Callable[[str, Document, float], ProbeResult]
"""Runs a probe of `probe_child.py`: its name, its arguments, its time limit in s."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine. `root` is put before every path that is read; `site` is the folder of installed packages."""

    root: Path
    environ: Mapping[str, str]
    packages: Mapping[str, str]
    site: Path
    system: str
    cores: int
    uid: int
    probe: RunProbe
    session: ProbeRunner
    space: Callable[[Path], DiskSpace | None]
    access: Callable[[Path, int], bool]
    utc_now: Callable[[], datetime]
    cpu_quota: float | None = None
    servers: Callable[[RemoteSettings], tuple[ServerExamination, ...]] = examine_servers

    def at(self, path: str | Path) -> Path:
        """The path on this machine of an absolute path of the examined machine."""
        return self.root / str(path).lstrip("/")

    def exists(self, path: str | Path) -> bool:
        """Whether a path exists."""
        # os.path returns False for invalid names and unreadable folders; Path raises.
        return os.path.exists(self.at(path))  # noqa: PTH110 - see above

    def text(self, path: str | Path, limit_chars: int = 65536) -> str:
        """The text of a file; empty if it cannot be read."""
        try:
            with self.at(path).open(encoding="utf-8", errors="replace") as file:
                return file.read(limit_chars)
        except OSError:
            return ""

    def names(self, folder: str | Path) -> tuple[str, ...]:
        """The sorted names in a folder; empty if it cannot be read."""
        try:
            return tuple(sorted(os.listdir(self.at(folder))))  # noqa: PTH208 - names, not paths
        except OSError:
            return ()


def this_host(environ: Mapping[str, str]) -> Host:
    """The machine on which this process runs."""
    return Host(
        root=Path("/"),
        environ=environ,
        packages=_packages(),
        site=_site(),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cores=len(os.sched_getaffinity(0)),
        uid=os.geteuid(),
        probe=run_probe_child,
        session=run_probe,
        space=_space,
        access=os.access,
        utc_now=utc_now,
        cpu_quota=cpu_quota(),
    )


def run_probe_child(probe_name: str, arguments: Document, limit_s: float) -> ProbeResult:
    """Run a probe in a child process. `probe_child.py` uses the standard library only, so it starts fast."""
    # As a module, the child finds the same installed packages as this process.
    modules = {"placement": "visionedge.engine.placement", "openvino": "visionedge.ops.doctor.probe_child"}
    target = modules.get(probe_name) or Path(__file__).with_name("probe_child.py")
    child = start_child(target, probe_name, json.dumps(arguments), stderr=subprocess.PIPE, text=True)
    try:
        output, error_text = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        output = ""
        # A child that hangs in the driver cannot be killed: do not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = child.communicate(timeout=_KILLED_WITHIN_S)
        return ProbeResult(_steps(output), "late", f"no answer within {limit_s:g} s")
    if child.returncode < 0:
        return ProbeResult(_steps(output), "died", f"signal {-child.returncode}")
    if child.returncode:
        reason = error_text.strip().splitlines() or [f"exit code {child.returncode}"]
        return ProbeResult(_steps(output), "died", reason[-1][:300])
    return ProbeResult(_steps(output))


def _steps(output: str) -> dict[str, Document]:
    steps: dict[str, Document] = {}
    for line in output.splitlines():
        # Skip a line that a crash cut off, or that a library printed.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            document = json.loads(line)
            steps[str(document["step"])] = document
    return steps


def _packages() -> dict[str, str]:
    """The installed packages and their versions, by normalized name."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        # A broken package has no name.
        name = package.metadata["Name"] if package.metadata else None
        if name:
            found.setdefault(name.lower().replace("_", "-"), package.version)
    return found


def _site() -> Path:
    """The folder in which onnxruntime is installed, or would be."""
    for name in ("onnxruntime-gpu", "onnxruntime", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Path(str(importlib.metadata.distribution(name).locate_file("")))
    return Path(__file__).resolve().parents[3]


def _space(path: Path) -> DiskSpace | None:
    """The file system of a path, or of its nearest existing parent."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return DiskSpace(usage.total, usage.free)
    return None


def read_memory(host: Host) -> MemorySize:
    """The main memory of a machine; 0 bytes if it cannot be read."""
    kib = {}
    for line in host.text("/proc/meminfo").splitlines():
        fields = line.split()
        if len(fields) >= 2 and fields[1].isdigit():
            kib[fields[0].rstrip(":")] = int(fields[1])
    total, available = kib.get("MemTotal", 0) * _KIB, kib.get("MemAvailable", 0) * _KIB
    text = host.text("/sys/fs/cgroup/memory.max") or host.text("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    limit = int(text) if text.strip().isdigit() else total
    return MemorySize(min(total, limit), min(available, limit), limit < total)


IotEdge = Literal["no", "edge", "simulator", "half"]
Kernel = Literal["eflow", "wsl", "hyper-v", "linux"]
Passthrough = Literal["dda", "gpu-pv", "native", "intel", "none"]
HostGpu = Literal["driver", "dxg", "pci", "none"]

WSL_LIBRARIES = "/usr/lib/wsl/lib"
WSL_DRIVERS = "/usr/lib/wsl/drivers"
DXG = "/dev/dxg"
DRI = "/dev/dri"

_IN_CONTAINER = re.compile(r"docker|containerd|kubepods|libpod|moby")
_AZURE_LINUX = re.compile(r"\.(cm|azl)\d|mariner|azure linux", re.IGNORECASE)
_NODE = re.compile(r"nvidia(\d+|ctl|-uvm)")
_RENDER_NODE = re.compile(r"renderD\d+")
_VERSION = re.compile(r"\b(\d{3}(?:\.\d+){1,2})\b")
_NVIDIA, _INTEL = "0x10de", "0x8086"
# Folders of Intel's graphics driver in the driver store of Windows: iigd_dch.inf_amd64_… and older ones.
_INTEL_STORES = ("iig", "igfx", "igd")
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True, slots=True)
class HostEnvironment:
    """The environment of this process.

    `passthrough`: DDA (the VM owns the whole GPU), GPU-PV (shared with Windows), native (no Hyper-V VM),
    intel (for OpenVINO, no CUDA device), or none. `host_gpu`: what the host has but this process may not see:
    an NVIDIA driver, a GPU-PV device, or an NVIDIA card without a driver. `pci_visible`: the PCI bus can be
    read. `render_vendors`: the vendor ids of the GPUs of the host by the names of their render nodes
    (renderD128); `render_nodes`: those that this process sees in /dev/dri. `dxg`: /dev/dxg exists here.
    """

    container: bool
    edge: IotEdge
    kernel: Kernel
    release: str
    passthrough: Passthrough
    host_gpu: HostGpu
    pci_visible: bool
    nodes: tuple[str, ...]
    kernel_driver: str
    wsl_libraries: tuple[str, ...]
    wsl_stores: Mapping[str, tuple[str, ...]]
    render_vendors: Mapping[str, str]
    render_nodes: tuple[str, ...]
    intel_on_pci: bool
    dxg: bool

    @property
    def intel_names(self) -> tuple[str, ...]:
        """The render nodes of Intel GPUs on this host, without a folder."""
        return tuple(name for name, vendor in self.render_vendors.items() if vendor == _INTEL)

    @property
    def intel_nodes(self) -> tuple[str, ...]:
        """The render nodes of Intel GPUs that are visible here."""
        return tuple(f"{DRI}/{name}" for name in self.intel_names if name in self.render_nodes)

    @property
    def intel_stores(self) -> tuple[str, ...]:
        """Intel's graphics drivers of Windows, under GPU-PV."""
        return tuple(name for name in self.wsl_stores if _is_intel_store(name))

    @property
    def sees_intel(self) -> bool:
        """Whether this machine has an Intel GPU, usable or not."""
        return bool(self.intel_names or self.intel_on_pci or (self.dxg and self.intel_stores))

    @property
    def hyper_v(self) -> bool:
        """Whether Windows is the host."""
        return self.kernel != "linux"

    @property
    def module(self) -> bool:
        """Whether IoT Edge made this container from a deployment manifest."""
        return self.edge in ("edge", "half")


def detect_environment(host: Host) -> HostEnvironment:
    """Read the environment from a machine's files and variables; no process is started."""
    edge = _edge(host)
    kernel = _kernel(host, edge)
    nodes = tuple(f"/dev/{name}" for name in host.names("/dev") if _NODE.fullmatch(name))
    vendors = _display_vendors(host)
    host_gpu = _detect_host_gpu(host, vendors)
    stores = {name: host.names(f"{WSL_DRIVERS}/{name}") for name in host.names(WSL_DRIVERS)}
    libraries = host.names(WSL_LIBRARIES)
    render_vendors = _render_vendors(host)
    has_intel = _INTEL in {*vendors, *render_vendors.values()}
    passthrough: Passthrough = "intel" if host_gpu == "none" and has_intel else "none"
    if nodes:
        passthrough = "native" if kernel == "linux" else "dda"
    elif host.exists(DXG):
        passthrough = "intel" if _is_intel_only(libraries, stores) else "gpu-pv"
    return HostEnvironment(
        container=_container(host),
        edge=edge,
        kernel=kernel,
        release=host.text("/proc/sys/kernel/osrelease").strip(),
        passthrough=passthrough,
        host_gpu=host_gpu,
        pci_visible=bool(host.names("/sys/bus/pci/devices")),
        nodes=nodes,
        kernel_driver=_kernel_driver(host),
        wsl_libraries=libraries,
        wsl_stores=stores,
        render_vendors=render_vendors,
        render_nodes=tuple(name for name in host.names(DRI) if _RENDER_NODE.fullmatch(name)),
        intel_on_pci=_INTEL in vendors,
        dxg=host.exists(DXG),
    )


def _container(host: Host) -> bool:
    marked = host.exists("/.dockerenv") or host.exists("/run/.containerenv")
    return marked or "container" in host.environ or bool(_IN_CONTAINER.search(host.text("/proc/1/cgroup")))


def _edge(host: Host) -> IotEdge:
    try:
        identity = Identity.from_environ(host.environ)
    except ConfigError:
        return "half"
    return "no" if identity is None else identity.environment


def _kernel(host: Host, edge: IotEdge) -> Kernel:
    release = host.text("/proc/sys/kernel/osrelease").lower()
    if "wsl" in release:
        return "wsl"
    vendor, product = (
        host.text(f"/sys/class/dmi/id/{name}").strip() for name in ("sys_vendor", "product_name")
    )
    hyper_v = (vendor, product) == ("Microsoft Corporation", "Virtual Machine")
    hyper_v = hyper_v or bool(host.names("/sys/bus/vmbus/devices"))
    # EFLOW has no mark of its own: its kernel is Azure Linux (formerly Mariner), on Hyper-V or in IoT Edge.
    microsofts = "microsoft" in release or _AZURE_LINUX.search(release + host.text("/proc/version"))
    if microsofts and (hyper_v or edge != "no"):
        return "eflow"
    return "hyper-v" if hyper_v else "linux"


def _kernel_driver(host: Host) -> str:
    """The version of NVIDIA's kernel module; empty without one, as under GPU-PV."""
    text = host.text("/sys/module/nvidia/version") or host.text("/proc/driver/nvidia/version")
    found = _VERSION.search(text)
    return found[1] if found else ""


def _display_vendors(host: Host) -> frozenset[str]:
    folder = "/sys/bus/pci/devices"
    return frozenset(
        host.text(f"{folder}/{name}/vendor").strip()
        for name in host.names(folder)
        if host.text(f"{folder}/{name}/class").startswith(_DISPLAY_CLASS)
    )


def _render_vendors(host: Host) -> dict[str, str]:
    """The vendor ids of GPUs by the names of their render nodes; a container sees those of its host."""
    folder = "/sys/class/drm"
    names = [name for name in host.names(folder) if _RENDER_NODE.fullmatch(name)]
    return {name: host.text(f"{folder}/{name}/device/vendor").strip() for name in names}


def _detect_host_gpu(host: Host, vendors: frozenset[str]) -> HostGpu:
    if _kernel_driver(host) or re.search(r"^\s*195 nvidia", host.text("/proc/devices"), re.MULTILINE):
        return "driver"
    if re.search(r"^\s*\d+ dxg$", host.text("/proc/misc"), re.MULTILINE):
        return "dxg"
    return "pci" if _NVIDIA in vendors else "none"


def _is_intel_only(libraries: tuple[str, ...], stores: Mapping[str, tuple[str, ...]]) -> bool:
    nvidia = any(name.startswith("libcuda.so") for name in libraries)
    nvidia = nvidia or any(name.lower().startswith("nv") for name in stores)
    return not nvidia and any(map(_is_intel_store, stores))


def _is_intel_store(name: str) -> bool:
    return name.lower().startswith(_INTEL_STORES)
