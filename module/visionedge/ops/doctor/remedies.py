"""What to do about a driver, a library or a session that does not work, in the words of the place."""

from visionedge.engine.device.devices import Reason
from visionedge.ops.doctor.finding import Remedies, one
from visionedge.ops.doctor.gather import Facts
from visionedge.ops.doctor.passthrough import RESTART_VM, give_gpu, in_vm, old_toolkit, wsl_libraries
from visionedge.ops.doctor.wheel import LEAST_DRIVER, LEAST_WINDOWS_DRIVER

CUDA_12 = "pip install 'onnxruntime-gpu[cuda,cudnn]==1.26.0'"
WHOLE_IDENTITY = one("let IoT Edge start this container, or take its variables away to run on your own")
FOREIGN_LIBCUDA = one("take it out of the image or the VM: GPU-PV brings its own, from the Windows driver")

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


def driver(facts: Facts) -> Remedies:
    """A card without a driver."""
    if facts.place.kernel == "eflow":
        return (
            *one("the driver comes with EFLOW's image: update EFLOW to 1.5.7 or newer, then", *RESTART_VM),
            *one("and look at what the driver in the VM says", in_vm("sudo nvidia-smi")),
        )
    where = "on the host" if facts.place.container else "here"
    least = LEAST_DRIVER[facts.wheel.cuda or 12]
    return one(f"install NVIDIA's driver {where}, {least} or newer, and see that Secure Boot lets it load")


def newer_driver(facts: Facts) -> Remedies:
    """A driver that is older than the CUDA of the wheel."""
    cuda = facts.wheel.cuda
    pin = _cuda_12(facts, "or stay with CUDA 12") if cuda > 12 else ()
    if facts.place.passthrough == "gpu-pv":
        least = LEAST_WINDOWS_DRIVER[cuda]
        say = f"update NVIDIA's driver on Windows to {least} or newer; nothing is installed in Linux"
        return (*one(say), *pin)
    if facts.place.kernel == "eflow":
        return (*one("the driver comes with EFLOW's image, and not alone: update EFLOW"), *pin)
    where = "on the host" if facts.place.container else "here"
    return (*one(f"update NVIDIA's driver {where} to {LEAST_DRIVER[cuda]} or newer"), *pin)


def _cuda_12(facts: Facts, say: str) -> Remedies:
    """onnxruntime 1.26, the last for CUDA 12, as this place gets it."""
    if facts.place.container:
        return one(f"{say}, which the GPU image has", _IMAGE)
    return one(say, CUDA_12)


def libcuda(facts: Facts) -> Remedies:
    """The driver's library is not there for us."""
    place = facts.place
    if place.passthrough == "gpu-pv":
        if any(name.startswith("libcuda.so") for name in place.wsl_libraries):
            return one(
                "it is in /usr/lib/wsl/lib: let the loader look there", "LD_LIBRARY_PATH=/usr/lib/wsl/lib"
            )
        return wsl_libraries(facts)
    if place.nodes and place.container:
        capabilities = facts.environ.get("NVIDIA_DRIVER_CAPABILITIES", "compute").split(",")
        if not {"compute", "all"} & set(capabilities):
            return one("NVIDIA_DRIVER_CAPABILITIES leaves compute out: set it to compute,utility")
        bare = one("bare device nodes are not enough: the driver's libraries come with a request for the GPU")
        return (*bare, *give_gpu(facts))
    return driver(facts)


def gpu_build(facts: Facts) -> Remedies:
    """An onnxruntime without CUDA."""
    if facts.place.module:
        return one("deploy the GPU image, which Dockerfile.gpu makes", _IMAGE)
    if facts.place.container:
        return one("use the GPU image", _IMAGE, "docker run --gpus all visionedge:gpu")
    return one(
        "install the GPU extra instead; never both", "pip uninstall -y onnxruntime", "pip install '.[gpu]'"
    )


def one_runtime(facts: Facts) -> Remedies:
    """Two packages in one folder, or one of which half is missing."""
    if facts.place.container:
        return one("make the image anew from one lock file: all of them own the same folder", _IMAGE)
    every = " ".join(sorted({facts.wheel.package, *facts.wheel.others}))
    say = "all of them own the same folder: remove them, then install one"
    return one(say, f"pip uninstall -y {every}", "pip install '.[gpu]'")


def libraries(facts: Facts, name: str) -> Remedies:
    """A CUDA library that is not there."""
    kind = name.partition(".so")[0]
    if kind not in _PACKAGES:
        return one("it belongs to TensorRT 10, which no extra brings: install that, or ask for cuda")
    if facts.place.container:
        return one("use the GPU image, which has them all", _IMAGE)
    cuda, package = facts.wheel.cuda, _PACKAGES[kind]
    # The packages of CUDA 13 lost their suffix, but for cuDNN's.
    suffix = f"-cu{cuda}" if cuda == 12 or kind == "libcudnn" else ""
    say = f"install all of them ({package}{suffix} has this one); the extra [cuda] alone lacks cuBLAS"
    return one(say, f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.wheel.version}'")


def older_cudnn(facts: Facts) -> Remedies:
    """A cuDNN that left this GPU behind."""
    if facts.place.container:
        return one("use the GPU image: its cuDNN 9.10 still has kernels for this GPU", _IMAGE)
    line = f"pip install 'nvidia-cudnn-cu{facts.wheel.cuda}<9.11'"
    return one("the last cuDNN with kernels for this GPU is 9.10", line)


def capability(facts: Facts, device: int) -> Remedies:
    """A GPU that the wheel has no kernels for (`device` is 75 for 7.5)."""
    if device < 60:
        return one("this GPU is too old for onnxruntime's packages: the CPU computes")
    if device < min(facts.wheel.sass):
        return _cuda_12(facts, "the last onnxruntime with kernels for it is 1.26")
    say = "it is newer than this onnxruntime: try a newer one, whose CUDA 13 needs driver 580 or newer"
    return one(say, "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'")


def gpu_memory(facts: Facts, code: int) -> Remedies:
    """No room on the GPU, or nobody may have a context there."""
    if code != 2:
        return session(facts, Reason.CUDA_ERROR)
    shared = (
        "; under GPU-PV Windows and its programs use it, too" if facts.place.passthrough == "gpu-pv" else ""
    )
    return one(f"see who fills the GPU (nvidia-smi), and let less run on it{shared}")


def restart(facts: Facts, why: str) -> Remedies:
    """Start over what carries the driver."""
    match facts.place.kernel:
        case "eflow":
            return one(
                f"{why}: restart the VM, from Windows (restarted from inside it stays off)", *RESTART_VM
            )
        case "wsl":
            return one(f"{why}: restart WSL", "wsl --shutdown")
        case _:
            machine = "the machine that carries this container" if facts.place.container else "the machine"
            return one(f"{why}: restart {machine}")


def hangs(facts: Facts) -> Remedies:
    """A driver that does not come back."""
    return restart(facts, "the driver hangs or crashes")


def cuda_init(facts: Facts, code: int) -> Remedies:
    """What to do when cuInit answers `code`."""
    paravirtual = facts.place.passthrough == "gpu-pv"
    match code:
        case 34:
            return one("take the folder of stubs out of LD_LIBRARY_PATH: the driver's own has to be found")
        case 100 | 101:
            return _no_device(facts)
        case 802:
            return one(
                "start NVIDIA's fabric manager on the host", "sudo systemctl start nvidia-fabricmanager"
            )
        case 803 | 804:
            return _mismatch(facts)
        case _:
            is_old = paravirtual and code == _NOT_FOUND
            return old_toolkit(facts) if is_old else restart(facts, "the driver does not work")


def _no_device(facts: Facts) -> Remedies:
    hidden = facts.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "none"):
        return one("CUDA_VISIBLE_DEVICES hides every device: take it away")
    if facts.place.passthrough == "gpu-pv":
        least = LEAST_WINDOWS_DRIVER[facts.wheel.cuda or 12]
        say = f"install NVIDIA's driver on Windows, {least} or newer; a GPU in TCC mode cannot be shared"
        return (*one(say), *restart(facts, "after that"))
    return restart(facts, "the driver has lost its device")


def _mismatch(facts: Facts) -> Remedies:
    if facts.place.container:
        return one(
            "start this container anew: libcuda must be that of the host's driver, none of the image's"
        )
    return restart(facts, "the driver was updated while it ran")


def session(facts: Facts, code: str) -> Remedies:
    """Everything before it was fine, and a session still does not start on the GPU."""
    match code:
        case Reason.LIBRARY_MISSING:
            say = "the loader does not find what is there: install the libraries as packages"
            return one(say, f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.wheel.version}'")
        case Reason.DRIVER_TOO_OLD:
            return newer_driver(facts)
        case Reason.DEVICE_UNSUPPORTED:
            return one("use a GPU that this onnxruntime was built for, or the CPU")
        case Reason.OUT_OF_MEMORY:
            return gpu_memory(facts, 2)
        case Reason.PROBE_TIMEOUT | Reason.PROBE_CRASHED:
            return hangs(facts)
        case _:
            say = "if that does not help, send what this writes to whoever helps you"
            return (*restart(facts, "CUDA fails"), *one(say, "visionedge doctor --bundle doctor.zip"))
