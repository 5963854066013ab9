"""Where we are: container or not, IoT Edge or not, whose kernel, and which way a GPU comes in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from visionedge.errors import ConfigError
from visionedge.iothub.identity import Identity
from visionedge.ops.doctor.host import Host

Edge = Literal["no", "edge", "simulator", "half"]
Kernel = Literal["eflow", "wsl", "hyper-v", "linux"]
Passthrough = Literal["dda", "gpu-pv", "native", "intel", "none"]
Offer = Literal["driver", "dxg", "pci", "none"]

WSL_LIBRARIES = "/usr/lib/wsl/lib"
WSL_DRIVERS = "/usr/lib/wsl/drivers"
DXG = "/dev/dxg"

_IN_CONTAINER = re.compile(r"docker|containerd|kubepods|libpod|moby")
_AZURE_LINUX = re.compile(r"\.(cm|azl)\d|mariner|azure linux", re.IGNORECASE)
_NODE = re.compile(r"nvidia(\d+|ctl|-uvm)")
_VERSION = re.compile(r"\b(\d{3}(?:\.\d+){1,2})\b")
_NVIDIA, _INTEL = "0x10de", "0x8086"
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True, slots=True)
class Place:
    """The surroundings of this process.

    `passthrough`: DDA (the VM owns the whole GPU), GPU-PV (it is shared with Windows), native (no VM of
    Hyper-V), an Intel GPU (which is no CUDA device), or none. `offered` is what the machine has that this
    process does not see: an NVIDIA driver, a GPU-PV device, an NVIDIA card without a driver.
    `bus` tells whether the PCI bus could be looked at.
    """

    container: bool
    edge: Edge
    kernel: Kernel
    release: str
    passthrough: Passthrough
    offered: Offer
    bus: bool
    nodes: tuple[str, ...]
    kernel_driver: str
    wsl_libraries: tuple[str, ...]
    wsl_stores: Mapping[str, tuple[str, ...]]

    @property
    def hyper_v(self) -> bool:
        """Whether Windows is the host."""
        return self.kernel != "linux"

    @property
    def module(self) -> bool:
        """Whether a deployment manifest made this container."""
        return self.edge in ("edge", "half")


def look_around(host: Host) -> Place:
    """Read the place off a machine's files and environment; nothing is started."""
    edge = _edge(host)
    kernel = _kernel(host, edge)
    nodes = tuple(f"/dev/{name}" for name in host.names("/dev") if _NODE.fullmatch(name))
    vendors = _display_vendors(host)
    offered = _offered(host, vendors)
    stores = {name: host.names(f"{WSL_DRIVERS}/{name}") for name in host.names(WSL_DRIVERS)}
    libraries = host.names(WSL_LIBRARIES)
    passthrough: Passthrough = "intel" if offered == "none" and _INTEL in vendors else "none"
    if nodes:
        passthrough = "native" if kernel == "linux" else "dda"
    elif host.exists(DXG):
        passthrough = "intel" if _only_intel(libraries, stores) else "gpu-pv"
    return Place(
        container=_container(host),
        edge=edge,
        kernel=kernel,
        release=host.text("/proc/sys/kernel/osrelease").strip(),
        passthrough=passthrough,
        offered=offered,
        bus=bool(host.names("/sys/bus/pci/devices")),
        nodes=nodes,
        kernel_driver=_kernel_driver(host),
        wsl_libraries=libraries,
        wsl_stores=stores,
    )


def _container(host: Host) -> bool:
    marked = host.exists("/.dockerenv") or host.exists("/run/.containerenv")
    return marked or "container" in host.environ or bool(_IN_CONTAINER.search(host.text("/proc/1/cgroup")))


def _edge(host: Host) -> Edge:
    try:
        identity = Identity.from_environ(host.environ)
    except ConfigError:
        return "half"
    return "no" if identity is None else identity.carrier


def _kernel(host: Host, edge: Edge) -> Kernel:
    release = host.text("/proc/sys/kernel/osrelease").lower()
    if "wsl" in release:
        return "wsl"
    vendor, product = (
        host.text(f"/sys/class/dmi/id/{name}").strip() for name in ("sys_vendor", "product_name")
    )
    hyper_v = (vendor, product) == ("Microsoft Corporation", "Virtual Machine")
    hyper_v = hyper_v or bool(host.names("/sys/bus/vmbus/devices"))
    # Nothing inside says "EFLOW": its kernel is Azure Linux's (Mariner's before), on Hyper-V or in IoT Edge.
    microsofts = "microsoft" in release or _AZURE_LINUX.search(release + host.text("/proc/version"))
    if microsofts and (hyper_v or edge != "no"):
        return "eflow"
    return "hyper-v" if hyper_v else "linux"


def _kernel_driver(host: Host) -> str:
    """The version of NVIDIA's kernel module; empty without one (GPU-PV has none)."""
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


def _offered(host: Host, vendors: frozenset[str]) -> Offer:
    if _kernel_driver(host) or re.search(r"^\s*195 nvidia", host.text("/proc/devices"), re.MULTILINE):
        return "driver"
    if re.search(r"^\s*\d+ dxg$", host.text("/proc/misc"), re.MULTILINE):
        return "dxg"
    return "pci" if _NVIDIA in vendors else "none"


def _only_intel(libraries: tuple[str, ...], stores: Mapping[str, tuple[str, ...]]) -> bool:
    nvidia = any(name.startswith("libcuda.so") for name in libraries)
    nvidia = nvidia or any(name.lower().startswith("nv") for name in stores)
    return not nvidia and any(name.lower().startswith(("iig", "igfx", "igd")) for name in stores)
