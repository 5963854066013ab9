"""How a GPU gets to this process: what to set on Windows, on the host, and in the deployment."""

from visionedge.ops.doctor.finding import Remedies, Remedy, one
from visionedge.ops.doctor.gather import Facts
from visionedge.ops.doctor.wheel import dotted
from visionedge.ops.manifest.gpu_options import BY_HAND_OPTIONS, GPU_OPTIONS, compact

NO_REQUIRE = '"env": {"NVIDIA_DISABLE_REQUIRE": {"value": "1"}}'
WANTED_MEMORY_MIB = 8192
WANTED_CORES = 4
GPU_NAME = "(Get-WmiObject win32_VideoController).caption"
RESTART_VM = ("Stop-EflowVm", "Start-EflowVm")

_DOCKER = "docker run --gpus all …"
_DOCKER_NO_REQUIRE = "docker run --gpus all -e NVIDIA_DISABLE_REQUIRE=1 …"
_DOCKER_BY_HAND = (
    "docker run --device /dev/dxg -v /usr/lib/wsl:/usr/lib/wsl:ro -e LD_LIBRARY_PATH=/usr/lib/wsl/lib …"
)
_MIB = 2**20


def in_vm(command: str) -> str:
    """A command for the VM of EFLOW, typed on Windows."""
    return f'Invoke-EflowVmCommand "{command}"'


def set_eflow_vm(passthrough: str, cores: int, memory_bytes: int, gpu: str = "NAME OF THE GPU") -> str:
    """The whole line: what is left out of it is set back. `-gpuCount` is valid with DDA only."""
    has_mib = -(-memory_bytes // _MIB // 1024) * 1024
    count = " -gpuCount 1" if passthrough == "DirectDeviceAssignment" else ""
    return (
        f"Set-EflowVM -cpuCount {max(cores, WANTED_CORES)} -memoryInMB {max(has_mib, WANTED_MEMORY_MIB)}"
        f' -gpuName "{gpu}" -gpuPassthroughType {passthrough}{count}'
    )


def give_gpu(facts: Facts) -> Remedies:
    """A host that has the GPU, and a container that does not see it."""
    place = facts.place
    if facts.environ.get("NVIDIA_VISIBLE_DEVICES", "all").lower() in ("", "none", "void"):
        return one("NVIDIA_VISIBLE_DEVICES hides every GPU from this container: set it to all")
    by_windows = place.offered == "dxg" or place.passthrough == "gpu-pv" or place.kernel == "wsl"
    if not by_windows:
        return _ask_for_gpu(facts)
    requests = (
        (
            *_ask_for_gpu(facts),
            *one(
                "an image that sets NVIDIA_REQUIRE_CUDA is refused under GPU-PV without this, too", NO_REQUIRE
            ),
        )
        if place.module
        else one("start the container with the GPU", _DOCKER_NO_REQUIRE)
    )
    return (*requests, *one("or, without the NVIDIA runtime, hand GPU-PV over by hand", _by_hand(facts)))


def _ask_for_gpu(facts: Facts, then: str = "") -> Remedies:
    if facts.place.module:
        say = f"{then}put this into the module's createOptions, beside what is there"
        return one(say, compact(GPU_OPTIONS))
    return one(f"{then}start the container with the GPU", _DOCKER)


def _by_hand(facts: Facts) -> str:
    return compact(BY_HAND_OPTIONS) if facts.place.module else _DOCKER_BY_HAND


def no_gpu(facts: Facts) -> Remedies:
    """Nothing of a GPU is to be seen, not even the host's."""
    place = facts.place
    match place.kernel:
        case "eflow":
            first = assign(facts)
        case "wsl":
            say = "install NVIDIA's driver on Windows (never one in Linux), then"
            first = one(say, "wsl --update", "wsl --shutdown")
        case "hyper-v":
            first = one(
                "assign the GPU to this VM on the Hyper-V host (DDA), then install NVIDIA's driver here"
            )
        case _ if place.container and not place.bus:
            first = one("if the host has an NVIDIA GPU (nvidia-smi tells it there), it has to be handed on")
        case _:
            return _none_at_all(facts)
    return (*first, *(_ask_for_gpu(facts, "then ") if place.container else ()))


def _none_at_all(facts: Facts) -> Remedies:
    """A GPU was demanded, and there is none."""
    least = dotted(min(facts.wheel.sass, default=60))
    where = "on the PCI bus of this machine" if facts.place.bus else "in this machine"
    say = f"{facts.request.device} was demanded: if there is no NVIDIA GPU {where}, ask for auto or cpu"
    return one(f"{say}. A GPU has to be of compute capability {least} or newer")


def assign(facts: Facts) -> Remedies:
    """Give the VM of EFLOW a GPU."""
    line = [
        set_eflow_vm(way, facts.cores, facts.memory.total_bytes)
        for way in ("DirectDeviceAssignment", "ParaVirtualization")
    ]
    return (
        Remedy("on Windows, in an elevated PowerShell, look up the name of the GPU", (GPU_NAME,)),
        Remedy(
            "and give it to the VM, which stops for it; whatever is left out is set back. T4, A2:", (line[0],)
        ),
        Remedy("GeForce, Quadro, RTX (never on Windows Server):", (line[1],)),
    )


def intel(facts: Facts) -> Remedies:
    """An Intel GPU: nothing here can use it."""
    without = "ask for auto or cpu" if facts.demanded else "the CPU computes, and nothing is wrong"
    first = one(f"CUDA needs an NVIDIA GPU: without one {without}")
    if facts.place.kernel != "eflow":
        return first
    return (*first, *one("is there one on this Windows machine as well?", GPU_NAME), *assign(facts)[1:])


def device_nodes(facts: Facts) -> Remedies:
    """A driver that made not all of its device nodes."""
    make = "sudo nvidia-modprobe -u -c=0"
    if facts.place.kernel == "eflow":
        say = "on Windows: see whether the driver in the VM works, and let it make its device nodes"
        return (
            *one(say, in_vm("sudo nvidia-smi"), in_vm(make)),
            *one("if that does not help, restart the VM", *RESTART_VM),
        )
    if facts.place.container:
        return (
            *one("on the host, let the driver make its device nodes, then start this container anew", make),
            *one("and ask for the GPU rather than bind device nodes:"),
            *_ask_for_gpu(facts),
        )
    return one("let the driver make its device nodes", make)


def permission(facts: Facts, error: str) -> Remedies:
    """A device node that this user may not open."""
    place = facts.place
    if place.container and error == "EPERM":
        forbidden = one("the container's device rules forbid it: do not bind the node, ask for the GPU")
        return (*forbidden, *give_gpu(facts))
    if place.container:
        group = '{"HostConfig":{"GroupAdd":["44"]}}' if place.module else "docker run --group-add 44 …"
        say = (
            "give this container's user the group of the device node: its number (ls -ln /dev) instead of 44"
        )
        return one(say, group)
    say = "give this user the group of the device node (ls -l /dev), then log in anew"
    return one(say, 'sudo usermod -aG video "$USER"')


def wsl_libraries(facts: Facts) -> Remedies:
    """GPU-PV's device without its libraries."""
    if facts.place.container:
        return give_gpu(facts)
    say = "install NVIDIA's driver on Windows, and on Windows 10 WSL as well, then restart"
    if facts.place.kernel == "eflow":
        return one(say, *RESTART_VM)
    return one(say, "wsl --update", "wsl --shutdown")


def old_toolkit(facts: Facts) -> Remedies:
    """A Windows driver from 555 on, whose new library the NVIDIA runtime does not know."""
    newer = "EFLOW to 1.5.7 or newer" if facts.place.kernel == "eflow" else "nvidia-container-toolkit"
    return (
        *one(f"update {newer}: its NVIDIA runtime does not map this library of newer Windows drivers"),
        *one("or hand GPU-PV over by hand", _by_hand(facts)),
    )
