"""How a GPU gets to this process: what to set on Windows, on the host, and in the deployment."""

from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.host import Remedies, Remedy, one_remedy
from visionedge.ops.doctor.wheel import format_capability
from visionedge.ops.manifest.gpu_options import BY_HAND_OPTIONS, GPU_OPTIONS, to_compact_json

DISABLE_REQUIRE_ENV = '"env": {"NVIDIA_DISABLE_REQUIRE": {"value": "1"}}'
MIN_MEMORY_MIB = 8192
MIN_CORES = 4
GPU_NAME_COMMAND = "(Get-WmiObject win32_VideoController).caption"
RESTART_VM_COMMANDS = ("Stop-EflowVm", "Start-EflowVm")

_DOCKER = "docker run --gpus all …"
_DOCKER_NO_REQUIRE = "docker run --gpus all -e NVIDIA_DISABLE_REQUIRE=1 …"
_DOCKER_BY_HAND = (
    "docker run --device /dev/dxg -v /usr/lib/wsl:/usr/lib/wsl:ro -e LD_LIBRARY_PATH=/usr/lib/wsl/lib …"
)
_MIB = 2**20


def eflow_vm_command(command: str) -> str:
    """A command for the VM of EFLOW, typed on Windows."""
    return f'Invoke-EflowVmCommand "{command}"'


def set_eflow_vm_command(
    passthrough: str, cores: int, memory_bytes: int, gpu: str = "NAME OF THE GPU"
) -> str:
    """The whole line: what is left out of it is set back. `-gpuCount` is valid with DDA only."""
    has_mib = -(-memory_bytes // _MIB // 1024) * 1024
    count = " -gpuCount 1" if passthrough == "DirectDeviceAssignment" else ""
    return (
        f"Set-EflowVM -cpuCount {max(cores, MIN_CORES)} -memoryInMB {max(has_mib, MIN_MEMORY_MIB)}"
        f' -gpuName "{gpu}" -gpuPassthroughType {passthrough}{count}'
    )


def gpu_not_exposed(facts: HostFacts) -> Remedies:
    """A host that has the GPU, and a container that does not see it."""
    environment = facts.environment
    if facts.environ.get("NVIDIA_VISIBLE_DEVICES", "all").lower() in ("", "none", "void"):
        return one_remedy("NVIDIA_VISIBLE_DEVICES hides every GPU from this container: set it to all")
    by_windows = (
        environment.host_gpu == "dxg" or environment.passthrough == "gpu-pv" or environment.kernel == "wsl"
    )
    if not by_windows:
        return _request_gpu(facts)
    requests = (
        (
            *_request_gpu(facts),
            *one_remedy(
                "an image that sets NVIDIA_REQUIRE_CUDA is refused under GPU-PV without this, too",
                DISABLE_REQUIRE_ENV,
            ),
        )
        if environment.module
        else one_remedy("start the container with the GPU", _DOCKER_NO_REQUIRE)
    )
    return (
        *requests,
        *one_remedy("or, without the NVIDIA runtime, hand GPU-PV over by hand", _manual_gpu_pv(facts)),
    )


def _request_gpu(facts: HostFacts, then: str = "") -> Remedies:
    if facts.environment.module:
        instruction = f"{then}put this into the module's createOptions, beside what is there"
        return one_remedy(instruction, to_compact_json(GPU_OPTIONS))
    return one_remedy(f"{then}start the container with the GPU", _DOCKER)


def _manual_gpu_pv(facts: HostFacts) -> str:
    return to_compact_json(BY_HAND_OPTIONS) if facts.environment.module else _DOCKER_BY_HAND


def no_gpu(facts: HostFacts) -> Remedies:
    """Nothing of a GPU is to be seen, not even the host's."""
    environment = facts.environment
    match environment.kernel:
        case "eflow":
            first = assign_gpu_to_vm(facts)
        case "wsl":
            instruction = "install NVIDIA's driver on Windows (never one in Linux), then"
            first = one_remedy(instruction, "wsl --update", "wsl --shutdown")
        case "hyper-v":
            first = one_remedy(
                "assign the GPU to this VM on the Hyper-V host (DDA), then install NVIDIA's driver here"
            )
        case _ if environment.container and not environment.pci_visible:
            first = one_remedy(
                "if the host has an NVIDIA GPU (nvidia-smi tells it there), it has to be handed on"
            )
        case _:
            return _required_gpu_missing(facts)
    return (*first, *(_request_gpu(facts, "then ") if environment.container else ()))


def _required_gpu_missing(facts: HostFacts) -> Remedies:
    """A GPU was demanded, and there is none."""
    least = format_capability(min(facts.wheel.sass, default=60))
    where = "on the PCI bus of this machine" if facts.environment.pci_visible else "in this machine"
    instruction = (
        f"{facts.request.device} was demanded: if there is no NVIDIA GPU {where}, ask for auto or cpu"
    )
    return one_remedy(f"{instruction}. A GPU has to be of compute capability {least} or newer")


def assign_gpu_to_vm(facts: HostFacts) -> Remedies:
    """Give the VM of EFLOW a GPU."""
    line = [
        set_eflow_vm_command(way, facts.cores, facts.memory.total_bytes)
        for way in ("DirectDeviceAssignment", "ParaVirtualization")
    ]
    return (
        Remedy("on Windows, in an elevated PowerShell, look up the name of the GPU", (GPU_NAME_COMMAND,)),
        Remedy(
            "and give it to the VM, which stops for it; whatever is left out is set back. T4, A2:", (line[0],)
        ),
        Remedy("GeForce, Quadro, RTX (never on Windows Server):", (line[1],)),
    )


def intel_gpu(facts: HostFacts) -> Remedies:
    """An Intel GPU: nothing here can use it."""
    without = "ask for auto or cpu" if facts.gpu_required else "the CPU computes, and nothing is wrong"
    first = one_remedy(f"CUDA needs an NVIDIA GPU: without one {without}")
    if facts.environment.kernel != "eflow":
        return first
    return (
        *first,
        *one_remedy("is there one on this Windows machine as well?", GPU_NAME_COMMAND),
        *assign_gpu_to_vm(facts)[1:],
    )


def missing_device_nodes(facts: HostFacts) -> Remedies:
    """A driver that made not all of its device nodes."""
    make = "sudo nvidia-modprobe -u -c=0"
    if facts.environment.kernel == "eflow":
        instruction = "on Windows: see whether the driver in the VM works, and let it make its device nodes"
        return (
            *one_remedy(instruction, eflow_vm_command("sudo nvidia-smi"), eflow_vm_command(make)),
            *one_remedy("if that does not help, restart the VM", *RESTART_VM_COMMANDS),
        )
    if facts.environment.container:
        return (
            *one_remedy(
                "on the host, let the driver make its device nodes, then start this container anew", make
            ),
            *one_remedy("and ask for the GPU rather than bind device nodes:"),
            *_request_gpu(facts),
        )
    return one_remedy("let the driver make its device nodes", make)


def denied_device_node(facts: HostFacts, error: str) -> Remedies:
    """A device node that this user may not open."""
    environment = facts.environment
    if environment.container and error == "EPERM":
        forbidden = one_remedy(
            "the container's device rules forbid it: do not bind the node, ask for the GPU"
        )
        return (*forbidden, *gpu_not_exposed(facts))
    if environment.container:
        group = '{"HostConfig":{"GroupAdd":["44"]}}' if environment.module else "docker run --group-add 44 …"
        instruction = (
            "give this container's user the group of the device node: its number (ls -ln /dev) instead of 44"
        )
        return one_remedy(instruction, group)
    instruction = "give this user the group of the device node (ls -l /dev), then log in anew"
    return one_remedy(instruction, 'sudo usermod -aG video "$USER"')


def wsl_libraries(facts: HostFacts) -> Remedies:
    """GPU-PV's device without its libraries."""
    if facts.environment.container:
        return gpu_not_exposed(facts)
    instruction = "install NVIDIA's driver on Windows, and on Windows 10 WSL as well, then restart"
    if facts.environment.kernel == "eflow":
        return one_remedy(instruction, *RESTART_VM_COMMANDS)
    return one_remedy(instruction, "wsl --update", "wsl --shutdown")


def old_container_toolkit(facts: HostFacts) -> Remedies:
    """A Windows driver from 555 on, whose new library the NVIDIA runtime does not know."""
    newer = "EFLOW to 1.5.7 or newer" if facts.environment.kernel == "eflow" else "nvidia-container-toolkit"
    return (
        *one_remedy(f"update {newer}: its NVIDIA runtime does not map this library of newer Windows drivers"),
        *one_remedy("or hand GPU-PV over by hand", _manual_gpu_pv(facts)),
    )
