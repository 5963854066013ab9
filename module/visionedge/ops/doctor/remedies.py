"""What to do about each broken check, in the terms of the environment: EFLOW, WSL, container, or machine.

A function gets the facts, and returns instructions with the lines to type: on Windows, on the host, in the
deployment manifest, or here.
"""

from visionedge.engine.device.devices import ReasonCode
from visionedge.ops.doctor.checks import Remedies, remedy
from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.host import DXG
from visionedge.ops.doctor.wheel import MIN_DRIVER, MIN_WINDOWS_DRIVER, format_capability
from visionedge.ops.manifest.gpu_options import (
    BY_HAND_OPTIONS,
    GPU_OPTIONS,
    make_dri_options,
    to_compact_json,
)

CUDA_ERROR_NOT_FOUND = 500
"""cuInit: under GPU-PV the NVIDIA runtime is too old for the Windows driver."""

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
_DOCKER_DRI = "docker run --device /dev/dri --group-add $(stat -c %g /dev/dri/renderD128) …"
OPENVINO_IMAGE = "make image WITH_OPENVINO=1"
MIN_INTEL_WINDOWS_DRIVER = "30.0.100.9955"
"""The first with GPU-PV for Linux: WSL.md of intel/compute-runtime, read 2026-11-30."""
_MIB = 2**20
INSTALL_CUDA_12 = "pip install 'onnxruntime-gpu[cuda,cudnn]==1.26.0'"
PARTIAL_IDENTITY = remedy("let IoT Edge start this container, or unset its variables to run without IoT Edge")
FOREIGN_LIBCUDA = remedy("remove it from the image or the VM: GPU-PV uses the libcuda of the Windows driver")

_IMAGE = "make image VARIANT=gpu"
_PACKAGES = {
    "libcublasLt": "nvidia-cublas",
    "libcublas": "nvidia-cublas",
    "libcurand": "nvidia-curand",
    "libcufft": "nvidia-cufft",
    "libcudart": "nvidia-cuda-runtime",
    "libcudnn": "nvidia-cudnn",
}


# --- the GPU in this environment ----------------------------------------------------------------------------


def eflow_vm_command(command: str) -> str:
    """A command that runs in the VM of EFLOW, to be typed on Windows."""
    return f'Invoke-EflowVmCommand "{command}"'


def set_eflow_vm_command(
    passthrough: str, cores: int, memory_bytes: int, gpu: str = "NAME OF THE GPU"
) -> str:
    """The whole command, because it resets omitted options. `-gpuCount` is valid with DDA only."""
    has_mib = -(-memory_bytes // _MIB // 1024) * 1024
    count = " -gpuCount 1" if passthrough == "DirectDeviceAssignment" else ""
    return (
        f"Set-EflowVM -cpuCount {max(cores, MIN_CORES)} -memoryInMB {max(has_mib, MIN_MEMORY_MIB)}"
        f' -gpuName "{gpu}" -gpuPassthroughType {passthrough}{count}'
    )


def gpu_not_exposed(facts: HostFacts) -> Remedies:
    """The host has a GPU that is not passed to this container."""
    environment = facts.environment
    if facts.environ.get("NVIDIA_VISIBLE_DEVICES", "all").lower() in ("", "none", "void"):
        return remedy("NVIDIA_VISIBLE_DEVICES hides all GPUs from this container: set it to all")
    if environment.host_gpu != "dxg" and environment.passthrough != "gpu-pv" and environment.kernel != "wsl":
        return _request_gpu(facts)
    if environment.module:
        instruction = "and this, if the image sets NVIDIA_REQUIRE_CUDA: GPU-PV refuses such images otherwise"
        requests = _request_gpu(facts) + remedy(instruction, DISABLE_REQUIRE_ENV)
    else:
        requests = remedy("start the container with the GPU", _DOCKER_NO_REQUIRE)
    instruction = "or, without the NVIDIA runtime, pass the GPU-PV device and its libraries explicitly"
    return requests + remedy(instruction, _manual_gpu_pv(facts))


def _request_gpu(facts: HostFacts, then: str = "") -> Remedies:
    if facts.environment.module:
        instruction = f"{then}add this to the module's createOptions"
        return remedy(instruction, to_compact_json(GPU_OPTIONS))
    return remedy(f"{then}start the container with the GPU", _DOCKER)


def _manual_gpu_pv(facts: HostFacts) -> str:
    return to_compact_json(BY_HAND_OPTIONS) if facts.environment.module else _DOCKER_BY_HAND


def no_gpu(facts: HostFacts) -> Remedies:
    """There is no sign of a GPU, not even on the host."""
    environment = facts.environment
    match environment.kernel:
        case "eflow":
            first = assign_gpu_to_vm(facts)
        case "wsl":
            instruction = "install NVIDIA's driver on Windows (not in Linux), then"
            first = remedy(instruction, "wsl --update", "wsl --shutdown")
        case "hyper-v":
            first = remedy(
                "assign the GPU to this VM on the Hyper-V host (DDA), then install NVIDIA's driver here"
            )
        case _ if environment.container and not environment.pci_visible:
            first = remedy("if the host has an NVIDIA GPU (see nvidia-smi there), pass it to this container")
        case _:
            return _required_gpu_missing(facts)
    return first + (_request_gpu(facts, "then ") if environment.container else ())


def _required_gpu_missing(facts: HostFacts) -> Remedies:
    """A GPU was demanded, but there is none."""
    least = format_capability(min(facts.wheel.sass, default=60))
    where = "on the PCI bus of this machine" if facts.environment.pci_visible else "in this machine"
    instruction = (
        f"if there is no NVIDIA GPU {where}, set device to auto or cpu instead of {facts.request.device}"
    )
    return remedy(f"{instruction}. A GPU must have compute capability {least} or newer")


def assign_gpu_to_vm(facts: HostFacts) -> Remedies:
    """Assign a GPU to the VM of EFLOW."""
    line = [
        set_eflow_vm_command(passthrough, facts.cores, facts.memory.total_bytes)
        for passthrough in ("DirectDeviceAssignment", "ParaVirtualization")
    ]
    return (
        *remedy("on Windows, in an elevated PowerShell, look up the name of the GPU", GPU_NAME_COMMAND),
        *remedy("and assign it to the VM, which stops for this; omitted options are reset. T4, A2:", line[0]),
        *remedy("GeForce, Quadro, RTX (not on Windows Server):", line[1]),
    )


def intel_gpu(facts: HostFacts) -> Remedies:
    """An Intel GPU, which CUDA cannot use."""
    first = remedy(
        "CUDA needs an NVIDIA GPU; without one, set device to auto or cpu, or to openvino-gpu for this GPU"
    )
    if facts.environment.kernel != "eflow":
        return first
    return (
        *first,
        *remedy("check whether this Windows machine has an NVIDIA GPU too", GPU_NAME_COMMAND),
        *assign_gpu_to_vm(facts)[1:],
    )


def missing_device_nodes(facts: HostFacts) -> Remedies:
    """The driver did not create all of its device nodes."""
    make = "sudo nvidia-modprobe -u -c=0"
    if facts.environment.kernel == "eflow":
        instruction = "on Windows: check that the driver in the VM works, and create its device nodes"
        return (
            *remedy(instruction, eflow_vm_command("sudo nvidia-smi"), eflow_vm_command(make)),
            *remedy("if that does not help, restart the VM", *RESTART_VM_COMMANDS),
        )
    if facts.environment.container:
        return (
            *remedy("on the host, create the device nodes of the driver, then restart this container", make),
            *remedy("and request the GPU instead of binding device nodes:"),
            *_request_gpu(facts),
        )
    return remedy("create the device nodes of the driver", make)


def denied_device_node(facts: HostFacts, error: str) -> Remedies:
    """This user may not open a device node."""
    environment = facts.environment
    if environment.container and error == "EPERM":
        forbidden = remedy(
            "the device rules of the container forbid it: request the GPU instead of binding the node"
        )
        return forbidden + gpu_not_exposed(facts)
    if environment.container:
        group = '{"HostConfig":{"GroupAdd":["44"]}}' if environment.module else "docker run --group-add 44 …"
        instruction = (
            "add the group of the device node to this container (replace 44 by its number: ls -ln /dev)"
        )
        return remedy(instruction, group)
    instruction = "add this user to the group of the device node (ls -l /dev), then log in again"
    return remedy(instruction, 'sudo usermod -aG video "$USER"')


def wsl_libraries(facts: HostFacts) -> Remedies:
    """The device of GPU-PV without its libraries."""
    if facts.environment.container:
        return gpu_not_exposed(facts)
    instruction = "install NVIDIA's driver on Windows, and on Windows 10 also WSL, then restart"
    if facts.environment.kernel == "eflow":
        return remedy(instruction, *RESTART_VM_COMMANDS)
    return remedy(instruction, "wsl --update", "wsl --shutdown")


def old_container_toolkit(facts: HostFacts) -> Remedies:
    """A Windows driver from 555 on needs a library that an old NVIDIA runtime does not mount."""
    newer = "EFLOW to 1.5.7 or newer" if facts.environment.kernel == "eflow" else "nvidia-container-toolkit"
    return (
        *remedy(f"update {newer}: the NVIDIA runtime does not mount this library of newer Windows drivers"),
        *remedy("or pass the GPU-PV device and its libraries explicitly", _manual_gpu_pv(facts)),
    )


# --- an Intel GPU, by OpenVINO ------------------------------------------------------------------------------


def intel_not_exposed(facts: HostFacts) -> Remedies:
    """The host has an Intel GPU, or GPU-PV, but this container lacks it or its libraries."""
    environment = facts.environment
    if not environment.hyper_v:
        dri = to_compact_json(make_dri_options("992"))
        instruction = (
            "pass its render node to the container, with the group of the node (stat -c %g /dev/dri/render*)"
        )
        return remedy(instruction, dri if environment.module else _DOCKER_DRI)
    if environment.container:
        return remedy("pass the GPU-PV device and its libraries to the container", _manual_gpu_pv(facts))
    instruction = (
        f"on Windows, install Intel's graphics driver {MIN_INTEL_WINDOWS_DRIVER} or newer, then restart"
    )
    if environment.kernel == "eflow":
        return remedy(instruction, *RESTART_VM_COMMANDS)
    return remedy(instruction, "wsl --update", "wsl --shutdown")


def no_intel_gpu(facts: HostFacts) -> Remedies:
    """There is no sign of an Intel GPU."""
    other = "or set device to auto or cpu"
    if facts.environment.kernel == "eflow":
        line = set_eflow_vm_command("ParaVirtualization", facts.cores, facts.memory.total_bytes)
        return (
            *remedy("on Windows 10 or 11, look up the name of the GPU", GPU_NAME_COMMAND),
            *remedy(f"and assign it to the VM; omitted options are reset; {other}", line),
        )
    if facts.environment.container and not facts.environment.pci_visible:
        return remedy(
            f"if the host has an Intel GPU, pass it to this container, {other}"
        ) + intel_not_exposed(facts)
    return remedy(f"use a machine with an Intel GPU, {other}")


def missing_render_node(facts: HostFacts) -> Remedies:
    """The kernel has no driver for the Intel GPU."""
    where = "on the host" if facts.environment.container else "here"
    return remedy(f"load Intel's kernel driver {where} (i915, or xe for newer GPUs)", "sudo modprobe i915")


def denied_intel_node(facts: HostFacts, node: str, error: str) -> Remedies:
    """This user may not open the device of an Intel GPU."""
    environment = facts.environment
    if environment.container and error == "EPERM":
        return intel_not_exposed(facts)
    if node == DXG:
        instruction = "let every user open it (until the VM restarts)"
        command = f"sudo chmod 0666 {DXG}"
        return remedy(instruction, eflow_vm_command(command) if environment.kernel == "eflow" else command)
    if not environment.container:
        instruction = (
            f"add this user to the group of {node} (ls -l {node}; render or video), then log in again"
        )
        return remedy(instruction, 'sudo usermod -aG render "$USER"')
    group = '{"HostConfig":{"GroupAdd":["992"]}}' if environment.module else "docker run --group-add 992 …"
    return remedy(
        "add the group of the node to this container (replace 992 by what `stat -c %g` prints on the host)",
        group,
    )


def missing_openvino(facts: HostFacts) -> Remedies:
    """The package openvino is not installed, or broken."""
    if facts.environment.container:
        return remedy("use the CPU image with OpenVINO and Intel's OpenCL driver", OPENVINO_IMAGE)
    return remedy("install the extra openvino beside the extra cpu", "pip install '.[cpu,openvino]'")


def missing_opencl(facts: HostFacts) -> Remedies:
    """The OpenCL loader or Intel's OpenCL driver is missing; under GPU-PV it also belongs into Linux."""
    if facts.environment.container:
        return missing_openvino(facts)
    driver = remedy("install Intel's OpenCL driver", "sudo apt-get install intel-opencl-icd")
    return driver if facts.openvino else driver + missing_openvino(facts)


def gpu_not_listed(facts: HostFacts) -> Remedies:
    """OpenVINO lists no GPU, although Intel's OpenCL driver can be loaded."""
    newer = "the OpenCL driver may be older than the GPU (docs/gpu.md): install a newer intel-opencl-icd"
    if facts.environment.container:
        newer += ", for example with BASE_IMAGE of a newer Debian"
    if facts.environment.dxg and not facts.environment.intel_nodes:
        return remedy(f"{newer}, or update Intel's graphics driver on Windows")
    return remedy(newer)


def openvino_failed(facts: HostFacts, code: str) -> Remedies:
    """All earlier checks passed, but OpenVINO does not compute on the GPU."""
    if code in (ReasonCode.PROBE_TIMEOUT, ReasonCode.PROBE_CRASHED):
        return hanging_driver(facts)
    instruction = "if that does not help, send the file that this command writes to your support"
    return (
        *restart_system(facts, "OpenVINO fails on the GPU"),
        *remedy(instruction, "visionedge doctor --bundle doctor.zip"),
    )


# --- driver, libraries and session --------------------------------------------------------------------------


def missing_driver(facts: HostFacts) -> Remedies:
    """An NVIDIA card without a driver."""
    if facts.environment.kernel == "eflow":
        return (
            *remedy(
                "the driver is part of EFLOW's image: update EFLOW to 1.5.7 or newer, then",
                *RESTART_VM_COMMANDS,
            ),
            *remedy("and check the driver in the VM", eflow_vm_command("sudo nvidia-smi")),
        )
    where = "on the host" if facts.environment.container else "here"
    least = MIN_DRIVER[facts.wheel.cuda or 12]
    return remedy(
        f"install NVIDIA's driver {least} or newer {where}, and check that Secure Boot does not block it"
    )


def old_driver(facts: HostFacts) -> Remedies:
    """The driver is older than the CUDA version of the wheel needs."""
    cuda = facts.wheel.cuda
    pin = _use_cuda_12(facts, "or use CUDA 12") if cuda > 12 else ()
    if facts.environment.passthrough == "gpu-pv":
        least = MIN_WINDOWS_DRIVER[cuda]
        instruction = f"update NVIDIA's driver on Windows to {least} or newer; install nothing in Linux"
        return remedy(instruction) + pin
    if facts.environment.kernel == "eflow":
        return remedy("the driver is part of EFLOW's image and has no update of its own: update EFLOW") + pin
    where = "on the host" if facts.environment.container else "here"
    return remedy(f"update NVIDIA's driver {where} to {MIN_DRIVER[cuda]} or newer") + pin


def _use_cuda_12(facts: HostFacts, instruction: str) -> Remedies:
    """onnxruntime 1.26, the last version for CUDA 12."""
    if facts.environment.container:
        return remedy(f"{instruction} (the GPU image)", _IMAGE)
    return remedy(instruction, INSTALL_CUDA_12)


def missing_libcuda(facts: HostFacts) -> Remedies:
    """The driver's library is missing."""
    environment = facts.environment
    if environment.passthrough == "gpu-pv":
        if any(name.startswith("libcuda.so") for name in environment.wsl_libraries):
            return remedy(
                "it is in /usr/lib/wsl/lib: add that folder to the library path",
                "LD_LIBRARY_PATH=/usr/lib/wsl/lib",
            )
        return wsl_libraries(facts)
    if environment.nodes and environment.container:
        capabilities = facts.environ.get("NVIDIA_DRIVER_CAPABILITIES", "compute").split(",")
        if not {"compute", "all"} & set(capabilities):
            return remedy("NVIDIA_DRIVER_CAPABILITIES has no compute: set it to compute,utility")
        bare = remedy(
            "device nodes alone are not enough: only a request for the GPU mounts the driver's libraries"
        )
        return bare + gpu_not_exposed(facts)
    return missing_driver(facts)


def cpu_only_onnxruntime(facts: HostFacts) -> Remedies:
    """The installed onnxruntime has no CUDA."""
    if facts.environment.module:
        return remedy("deploy the GPU image (Dockerfile.gpu)", _IMAGE)
    if facts.environment.container:
        return remedy("use the GPU image", _IMAGE, "docker run --gpus all visionedge:gpu")
    return remedy(
        "install the GPU extra instead; never install both",
        "pip uninstall -y onnxruntime",
        "pip install '.[gpu]'",
    )


def conflicting_onnxruntimes(facts: HostFacts) -> Remedies:
    """Two packages in one folder, or a package with missing files."""
    if facts.environment.container:
        return remedy("build the image again from one lock file: these packages share one folder", _IMAGE)
    every = " ".join(sorted({facts.wheel.package, *facts.wheel.others}))
    instruction = "these packages share one folder: uninstall them, then install one"
    return remedy(instruction, f"pip uninstall -y {every}", "pip install '.[gpu]'")


def missing_cuda_library(facts: HostFacts, name: str) -> Remedies:
    """A CUDA library is missing."""
    kind = name.partition(".so")[0]
    if kind not in _PACKAGES:
        return remedy(
            "it belongs to TensorRT 10, which no extra includes: install TensorRT 10, or use device cuda"
        )
    if facts.environment.container:
        return remedy("use the GPU image, which has all of them", _IMAGE)
    cuda, package = facts.wheel.cuda, _PACKAGES[kind]
    # The packages of CUDA 13 have no suffix, except cuDNN's.
    suffix = f"-cu{cuda}" if cuda == 12 or kind == "libcudnn" else ""
    instruction = (
        f"install all of them (this one is in {package}{suffix}); the extra [cuda] alone has no cuBLAS"
    )
    return remedy(instruction, f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.wheel.version}'")


def unsupported_by_cudnn(facts: HostFacts) -> Remedies:
    """The installed cuDNN has no kernels for this GPU."""
    if facts.environment.container:
        return remedy("use the GPU image: its cuDNN 9.10 has kernels for this GPU", _IMAGE)
    line = f"pip install 'nvidia-cudnn-cu{facts.wheel.cuda}<9.11'"
    return remedy("the last cuDNN with kernels for this GPU is 9.10", line)


def unsupported_capability(facts: HostFacts, device: int) -> Remedies:
    """The wheel has no kernels for a GPU (`device` is 75 for capability 7.5)."""
    if device < 60:
        return remedy("this GPU is too old for onnxruntime's packages: the CPU computes")
    if device < min(facts.wheel.sass):
        return _use_cuda_12(facts, "the last onnxruntime with kernels for it is 1.26")
    instruction = (
        "the GPU is newer than this onnxruntime: try a newer one; its CUDA 13 needs driver 580 or newer"
    )
    return remedy(instruction, "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'")


def gpu_memory_unavailable(facts: HostFacts, code: int) -> Remedies:
    """The GPU has too little free memory, or refuses a context."""
    if code != 2:
        return session_failed(facts, ReasonCode.CUDA_ERROR)
    shared = (
        "; under GPU-PV, Windows programs use it too" if facts.environment.passthrough == "gpu-pv" else ""
    )
    return remedy(f"find the processes that use the GPU's memory (nvidia-smi) and stop some{shared}")


def restart_system(facts: HostFacts, why: str) -> Remedies:
    """Restart the system that runs the driver."""
    match facts.environment.kernel:
        case "eflow":
            return remedy(
                f"{why}: restart the VM from Windows (a restart from inside leaves it off)",
                *RESTART_VM_COMMANDS,
            )
        case "wsl":
            return remedy(f"{why}: restart WSL", "wsl --shutdown")
        case _:
            machine = "the host of this container" if facts.environment.container else "the machine"
            return remedy(f"{why}: restart {machine}")


def hanging_driver(facts: HostFacts) -> Remedies:
    """The driver hangs or crashes."""
    return restart_system(facts, "the driver hangs or crashes")


def cuda_init_failed(facts: HostFacts, code: int) -> Remedies:
    """cuInit returned `code`."""
    if code == CUDA_ERROR_NOT_FOUND and facts.environment.passthrough == "gpu-pv":
        return old_container_toolkit(facts)
    if code in (803, 804) and facts.environment.container:
        return remedy(
            "restart this container: libcuda must be that of the host's driver, not one of the image"
        )
    match code:
        case 34:
            return remedy(
                "remove the folder of stubs from LD_LIBRARY_PATH, so that the driver's own library is found"
            )
        case 100 | 101:
            return _no_device(facts)
        case 802:
            return remedy(
                "start NVIDIA's fabric manager on the host", "sudo systemctl start nvidia-fabricmanager"
            )
        case 803 | 804:
            why = "the driver was updated while it was loaded"
        case _:
            why = "the driver does not work"
    return restart_system(facts, why)


def _no_device(facts: HostFacts) -> Remedies:
    hidden = facts.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "none"):
        return remedy("CUDA_VISIBLE_DEVICES hides all devices: unset it")
    if facts.environment.passthrough == "gpu-pv":
        least = MIN_WINDOWS_DRIVER[facts.wheel.cuda or 12]
        instruction = (
            f"install NVIDIA's driver {least} or newer on Windows; a GPU in TCC mode cannot be shared"
        )
        return remedy(instruction) + restart_system(facts, "after that")
    return restart_system(facts, "the driver reports no device")


def session_failed(facts: HostFacts, code: str) -> Remedies:
    """All earlier checks passed, but a session does not start on the GPU."""
    match code:
        case ReasonCode.LIBRARY_MISSING:
            instruction = "the loader does not find the libraries: install them as packages"
            return remedy(instruction, f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.wheel.version}'")
        case ReasonCode.DRIVER_TOO_OLD:
            return old_driver(facts)
        case ReasonCode.DEVICE_UNSUPPORTED:
            return remedy("use a GPU that this onnxruntime supports, or the CPU")
        case ReasonCode.OUT_OF_MEMORY:
            return gpu_memory_unavailable(facts, 2)
        case ReasonCode.PROBE_TIMEOUT | ReasonCode.PROBE_CRASHED:
            return hanging_driver(facts)
        case _:
            instruction = "if that does not help, send the file that this command writes to your support"
            return (
                *restart_system(facts, "CUDA fails"),
                *remedy(instruction, "visionedge doctor --bundle doctor.zip"),
            )
