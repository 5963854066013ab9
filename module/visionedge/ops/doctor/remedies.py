"""What to do about a driver, a library or a session that does not work, in the words of the place."""

from visionedge.engine.device.devices import ReasonCode
from visionedge.ops.doctor.facts import HostFacts
from visionedge.ops.doctor.host import Remedies, one_remedy
from visionedge.ops.doctor.passthrough import (
    RESTART_VM_COMMANDS,
    eflow_vm_command,
    gpu_not_exposed,
    old_container_toolkit,
    wsl_libraries,
)
from visionedge.ops.doctor.wheel import MIN_DRIVER, MIN_WINDOWS_DRIVER

INSTALL_CUDA_12 = "pip install 'onnxruntime-gpu[cuda,cudnn]==1.26.0'"
PARTIAL_IDENTITY = one_remedy(
    "let IoT Edge start this container, or take its variables away to run on your own"
)
FOREIGN_LIBCUDA = one_remedy(
    "take it out of the image or the VM: GPU-PV brings its own, from the Windows driver"
)

_IMAGE = "make image VARIANT=gpu"
_PACKAGES = {
    "libcublasLt": "nvidia-cublas",
    "libcublas": "nvidia-cublas",
    "libcurand": "nvidia-curand",
    "libcufft": "nvidia-cufft",
    "libcudart": "nvidia-cuda-runtime",
    "libcudnn": "nvidia-cudnn",
}
_NOT_FOUND = 500


def missing_driver(facts: HostFacts) -> Remedies:
    """A card without a driver."""
    if facts.environment.kernel == "eflow":
        return (
            *one_remedy(
                "the driver comes with EFLOW's image: update EFLOW to 1.5.7 or newer, then",
                *RESTART_VM_COMMANDS,
            ),
            *one_remedy("and look at what the driver in the VM says", eflow_vm_command("sudo nvidia-smi")),
        )
    where = "on the host" if facts.environment.container else "here"
    least = MIN_DRIVER[facts.wheel.cuda or 12]
    return one_remedy(
        f"install NVIDIA's driver {where}, {least} or newer, and see that Secure Boot lets it load"
    )


def old_driver(facts: HostFacts) -> Remedies:
    """A driver that is older than the CUDA of the wheel."""
    cuda = facts.wheel.cuda
    pin = _use_cuda_12(facts, "or stay with CUDA 12") if cuda > 12 else ()
    if facts.environment.passthrough == "gpu-pv":
        least = MIN_WINDOWS_DRIVER[cuda]
        instruction = f"update NVIDIA's driver on Windows to {least} or newer; nothing is installed in Linux"
        return (*one_remedy(instruction), *pin)
    if facts.environment.kernel == "eflow":
        return (*one_remedy("the driver comes with EFLOW's image, and not alone: update EFLOW"), *pin)
    where = "on the host" if facts.environment.container else "here"
    return (*one_remedy(f"update NVIDIA's driver {where} to {MIN_DRIVER[cuda]} or newer"), *pin)


def _use_cuda_12(facts: HostFacts, instruction: str) -> Remedies:
    """onnxruntime 1.26, the last for CUDA 12, as this place gets it."""
    if facts.environment.container:
        return one_remedy(f"{instruction}, which the GPU image has", _IMAGE)
    return one_remedy(instruction, INSTALL_CUDA_12)


def missing_libcuda(facts: HostFacts) -> Remedies:
    """The driver's library is not there for us."""
    environment = facts.environment
    if environment.passthrough == "gpu-pv":
        if any(name.startswith("libcuda.so") for name in environment.wsl_libraries):
            return one_remedy(
                "it is in /usr/lib/wsl/lib: let the loader look there", "LD_LIBRARY_PATH=/usr/lib/wsl/lib"
            )
        return wsl_libraries(facts)
    if environment.nodes and environment.container:
        capabilities = facts.environ.get("NVIDIA_DRIVER_CAPABILITIES", "compute").split(",")
        if not {"compute", "all"} & set(capabilities):
            return one_remedy("NVIDIA_DRIVER_CAPABILITIES leaves compute out: set it to compute,utility")
        bare = one_remedy(
            "bare device nodes are not enough: the driver's libraries come with a request for the GPU"
        )
        return (*bare, *gpu_not_exposed(facts))
    return missing_driver(facts)


def cpu_only_onnxruntime(facts: HostFacts) -> Remedies:
    """An onnxruntime without CUDA."""
    if facts.environment.module:
        return one_remedy("deploy the GPU image, which Dockerfile.gpu makes", _IMAGE)
    if facts.environment.container:
        return one_remedy("use the GPU image", _IMAGE, "docker run --gpus all visionedge:gpu")
    return one_remedy(
        "install the GPU extra instead; never both", "pip uninstall -y onnxruntime", "pip install '.[gpu]'"
    )


def conflicting_onnxruntimes(facts: HostFacts) -> Remedies:
    """Two packages in one folder, or one of which half is missing."""
    if facts.environment.container:
        return one_remedy("make the image anew from one lock file: all of them own the same folder", _IMAGE)
    every = " ".join(sorted({facts.wheel.package, *facts.wheel.others}))
    instruction = "all of them own the same folder: remove them, then install one"
    return one_remedy(instruction, f"pip uninstall -y {every}", "pip install '.[gpu]'")


def missing_cuda_library(facts: HostFacts, name: str) -> Remedies:
    """A CUDA library that is not there."""
    kind = name.partition(".so")[0]
    if kind not in _PACKAGES:
        return one_remedy("it belongs to TensorRT 10, which no extra brings: install that, or ask for cuda")
    if facts.environment.container:
        return one_remedy("use the GPU image, which has them all", _IMAGE)
    cuda, package = facts.wheel.cuda, _PACKAGES[kind]
    # The packages of CUDA 13 lost their suffix, but for cuDNN's.
    suffix = f"-cu{cuda}" if cuda == 12 or kind == "libcudnn" else ""
    instruction = f"install all of them ({package}{suffix} has this one); the extra [cuda] alone lacks cuBLAS"
    return one_remedy(instruction, f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.wheel.version}'")


def unsupported_by_cudnn(facts: HostFacts) -> Remedies:
    """A cuDNN that left this GPU behind."""
    if facts.environment.container:
        return one_remedy("use the GPU image: its cuDNN 9.10 still has kernels for this GPU", _IMAGE)
    line = f"pip install 'nvidia-cudnn-cu{facts.wheel.cuda}<9.11'"
    return one_remedy("the last cuDNN with kernels for this GPU is 9.10", line)


def unsupported_capability(facts: HostFacts, device: int) -> Remedies:
    """A GPU that the wheel has no kernels for (`device` is 75 for 7.5)."""
    if device < 60:
        return one_remedy("this GPU is too old for onnxruntime's packages: the CPU computes")
    if device < min(facts.wheel.sass):
        return _use_cuda_12(facts, "the last onnxruntime with kernels for it is 1.26")
    instruction = (
        "it is newer than this onnxruntime: try a newer one, whose CUDA 13 needs driver 580 or newer"
    )
    return one_remedy(instruction, "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'")


def gpu_memory_unavailable(facts: HostFacts, code: int) -> Remedies:
    """No room on the GPU, or nobody may have a context there."""
    if code != 2:
        return session_failed(facts, ReasonCode.CUDA_ERROR)
    shared = (
        "; under GPU-PV Windows and its programs use it, too"
        if facts.environment.passthrough == "gpu-pv"
        else ""
    )
    return one_remedy(f"see who fills the GPU (nvidia-smi), and let less run on it{shared}")


def restart_system(facts: HostFacts, why: str) -> Remedies:
    """Start over what carries the driver."""
    match facts.environment.kernel:
        case "eflow":
            return one_remedy(
                f"{why}: restart the VM, from Windows (restarted from inside it stays off)",
                *RESTART_VM_COMMANDS,
            )
        case "wsl":
            return one_remedy(f"{why}: restart WSL", "wsl --shutdown")
        case _:
            machine = (
                "the machine that carries this container" if facts.environment.container else "the machine"
            )
            return one_remedy(f"{why}: restart {machine}")


def hanging_driver(facts: HostFacts) -> Remedies:
    """A driver that does not come back."""
    return restart_system(facts, "the driver hangs or crashes")


def cuda_init_failed(facts: HostFacts, code: int) -> Remedies:
    """What to do when cuInit answers `code`."""
    paravirtual = facts.environment.passthrough == "gpu-pv"
    match code:
        case 34:
            return one_remedy(
                "take the folder of stubs out of LD_LIBRARY_PATH: the driver's own has to be found"
            )
        case 100 | 101:
            return _no_device(facts)
        case 802:
            return one_remedy(
                "start NVIDIA's fabric manager on the host", "sudo systemctl start nvidia-fabricmanager"
            )
        case 803 | 804:
            return _mismatch(facts)
        case _:
            is_old = paravirtual and code == _NOT_FOUND
            return (
                old_container_toolkit(facts) if is_old else restart_system(facts, "the driver does not work")
            )


def _no_device(facts: HostFacts) -> Remedies:
    hidden = facts.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "none"):
        return one_remedy("CUDA_VISIBLE_DEVICES hides every device: take it away")
    if facts.environment.passthrough == "gpu-pv":
        least = MIN_WINDOWS_DRIVER[facts.wheel.cuda or 12]
        instruction = (
            f"install NVIDIA's driver on Windows, {least} or newer; a GPU in TCC mode cannot be shared"
        )
        return (*one_remedy(instruction), *restart_system(facts, "after that"))
    return restart_system(facts, "the driver has lost its device")


def _mismatch(facts: HostFacts) -> Remedies:
    if facts.environment.container:
        return one_remedy(
            "start this container anew: libcuda must be that of the host's driver, none of the image's"
        )
    return restart_system(facts, "the driver was updated while it ran")


def session_failed(facts: HostFacts, code: str) -> Remedies:
    """Everything before it was fine, and a session still does not start on the GPU."""
    match code:
        case ReasonCode.LIBRARY_MISSING:
            instruction = "the loader does not find what is there: install the libraries as packages"
            return one_remedy(
                instruction, f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.wheel.version}'"
            )
        case ReasonCode.DRIVER_TOO_OLD:
            return old_driver(facts)
        case ReasonCode.DEVICE_UNSUPPORTED:
            return one_remedy("use a GPU that this onnxruntime was built for, or the CPU")
        case ReasonCode.OUT_OF_MEMORY:
            return gpu_memory_unavailable(facts, 2)
        case ReasonCode.PROBE_TIMEOUT | ReasonCode.PROBE_CRASHED:
            return hanging_driver(facts)
        case _:
            instruction = "if that does not help, send what this writes to whoever helps you"
            return (
                *restart_system(facts, "CUDA fails"),
                *one_remedy(instruction, "visionedge doctor --bundle doctor.zip"),
            )
