"""Scenarios with a broken link to the GPU, in the order of the links, and under GPU-PV."""

from doctor_hosts import HostBuilder, cuda_failure, missing
from doctor_scenarios import WSL_CUDA, Scenario, dda, native, pv
from visionedge.engine.device.devices import ProbeOutput

_NO_CUBLAS = "libcublasLt.so.12"


def _hidden(m: HostBuilder) -> None:
    m.container().kernel_driver().gpu_wheel().session_fails(cuda_failure(35, "insufficient"))
    m.environ["NVIDIA_VISIBLE_DEVICES"] = "void"


def _no_uvm(m: HostBuilder) -> None:
    m.eflow().module().nvidia_nodes("nvidia0", "nvidiactl").kernel_driver().driver().gpu_wheel()
    m.init_fails(999, "CUDA_ERROR_UNKNOWN").session_fails(cuda_failure(999, "unknown error"))


def _forbidden(m: HostBuilder) -> None:
    dda(m).init_fails(100, "CUDA_ERROR_NO_DEVICE").session_fails(cuda_failure(100, "no CUDA-capable device"))
    m.refused = dict.fromkeys(("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"), "EPERM")


def _no_group(m: HostBuilder) -> None:
    native(m).init_fails(100, "CUDA_ERROR_NO_DEVICE").session_fails(
        cuda_failure(100, "no CUDA-capable device")
    )
    m.refused = {"/dev/nvidia0": "EACCES"}


def _utility_only(m: HostBuilder) -> None:
    dda(m).session_fails(cuda_failure(35, "insufficient"))
    m.environ["NVIDIA_DRIVER_CAPABILITIES"] = "utility"
    m.driver_steps = {"library": {"error": missing("libcuda.so.1")}}


def _bare_nodes(m: HostBuilder) -> None:
    dda(m).session_fails(cuda_failure(35, "insufficient"))
    m.driver_steps = {"library": {"error": missing("libcuda.so.1")}}


def _hidden_device(m: HostBuilder) -> None:
    native(m).init_fails(100, "CUDA_ERROR_NO_DEVICE").session_fails(
        cuda_failure(100, "no CUDA-capable device")
    )
    m.environ["CUDA_VISIBLE_DEVICES"] = ""


def _no_memory(m: HostBuilder) -> None:
    dda(m).session_fails(cuda_failure(2, "out of memory"))
    m.driver_steps["memory"]["freeBytes"] = 200 * 2**20


def _no_context(m: HostBuilder) -> None:
    dda(m).session_fails(cuda_failure(46, "all CUDA-capable devices are busy or unavailable"))
    m.driver_steps["memory"] = {"code": 46}


def _both(m: HostBuilder) -> None:
    native(m)
    m.cpu_wheel().packages["onnxruntime-gpu"] = "1.26.0"


def _both_but_gpu_won(m: HostBuilder) -> None:
    native(m).session_works()
    m.packages["onnxruntime"] = "1.31.1"


def _hangs(m: HostBuilder) -> None:
    dda(m).driver_ends("late", "no answer within 10 s")
    m.session = ProbeOutput(None, "", "")


def _crashes(m: HostBuilder) -> None:
    native(m).driver_ends("died", "signal 11")
    m.session = ProbeOutput(-11, "", "")


def _old_cudnn_wanted(m: HostBuilder) -> None:
    native(m).driver("NVIDIA GeForce GTX 1080", 61).session_fails(cuda_failure(209, "no kernel image"))
    m.versions["libcudnn.so.9"] = 92800


def _cpu_package(m: HostBuilder) -> None:
    native(m).cpu_wheel()
    del m.packages["onnxruntime-gpu"]


def _old_toolkit(m: HostBuilder) -> None:
    pv(m).init_fails(500, "CUDA_ERROR_NOT_FOUND").session_fails(cuda_failure(500, "named symbol not found"))
    (m.root / "usr/lib/wsl/drivers/nv_dispi.inf_amd64_1/libnvdxgdmal.so.1").unlink()


def _no_provider(m: HostBuilder) -> None:
    dda(m).session_fails("it gave no reason")
    (m.root / "opt/visionedge/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so").unlink()


BROKEN = [
    Scenario("docker-hides-gpu", _hidden, "passthrough", "driver-missing"),
    Scenario("dda-without-uvm", _no_uvm, "passthrough", "cuda-error"),
    Scenario(
        "dda-driver-does-not-load",
        lambda m: m.eflow().on_pci().gpu_wheel().session_fails(cuda_failure(35, "x")),
        "passthrough",
        "driver-missing",
    ),
    Scenario("dda-nodes-forbidden", _forbidden, "permissions", "no-device"),
    Scenario("native-not-in-group", _no_group, "permissions", "no-device"),
    Scenario("dda-utility-only", _utility_only, "libcuda", "driver-missing"),
    Scenario("dda-bare-nodes", _bare_nodes, "libcuda", "driver-missing"),
    Scenario(
        "native-cpu-package",
        _cpu_package,
        "onnxruntime",
        "no-gpu-build",
    ),
    Scenario("both-packages-cpu-won", _both, "onnxruntime", "no-gpu-build"),
    Scenario("both-packages-gpu-won", _both_but_gpu_won, None, "ok"),
    Scenario(
        "dda-driver-older-than-cuda-13",
        lambda m: (
            dda(m)
            .driver(cuda=12020, version="535.161.08")
            .gpu_wheel("1.31.1", "13.0")
            .session_fails(cuda_failure(35, "x"))
        ),
        "driver-version",
        "driver-too-old",
    ),
    Scenario(
        "native-driver-older-than-cuda-12",
        lambda m: native(m).driver(cuda=11040, version="470.256.02").session_fails(cuda_failure(35, "x")),
        "driver-version",
        "driver-too-old",
    ),
    Scenario(
        "native-no-cudnn",
        lambda m: native(m).without_libraries("libcudnn.so.9"),
        "libraries",
        "library-missing",
    ),
    Scenario(
        "native-cuda-13-no-cufft",
        lambda m: (
            native(m)
            .driver(cuda=13000, version="580.95.05")
            .gpu_wheel("1.31.1", "13.0")
            .without_libraries("libcufft.so.12")
        ),
        "libraries",
        "library-missing",
    ),
    Scenario(
        "module-without-cublas",
        lambda m: dda(m).without_libraries(_NO_CUBLAS, "libcublas.so.12"),
        "libraries",
        "library-missing",
    ),
    Scenario(
        "dda-start-unknown-error",
        lambda m: (
            dda(m).init_fails(999, "CUDA_ERROR_UNKNOWN").session_fails(cuda_failure(999, "unknown error"))
        ),
        "cuda-init",
        "cuda-error",
    ),
    Scenario(
        "docker-driver-mismatch",
        lambda m: (
            native(m)
            .container()
            .init_fails(803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
            .session_fails(cuda_failure(803, "x"))
        ),
        "cuda-init",
        "driver-mismatch",
    ),
    Scenario("native-device-hidden", _hidden_device, "cuda-init", "no-device"),
    Scenario(
        "native-stub-found-first",
        lambda m: native(m).init_fails(34, "CUDA_ERROR_STUB_LIBRARY").session_fails(cuda_failure(34, "stub")),
        "cuda-init",
        "cuda-error",
    ),
    Scenario("dda-start-hangs", _hangs, "cuda-init", "probe-timeout"),
    Scenario("native-start-crashes", _crashes, "cuda-init", "probe-crashed"),
    Scenario(
        "pascal-on-cuda-13",
        lambda m: (
            native(m)
            .driver("NVIDIA GeForce GTX 1080", 61, cuda=13000, version="580.95.05")
            .gpu_wheel("1.31.1", "13.0")
            .session_fails(cuda_failure(209, "no kernel image"))
        ),
        "capability",
        "device-unsupported",
    ),
    Scenario(
        "maxwell",
        lambda m: (
            native(m).driver("NVIDIA GeForce GTX 970", 52).session_fails(cuda_failure(209, "no kernel image"))
        ),
        "capability",
        "device-unsupported",
    ),
    Scenario(
        "newer-than-the-package",
        lambda m: (
            native(m)
            .driver("NVIDIA B200", 100, cuda=13000, version="580.95.05")
            .gpu_wheel("1.31.1", "13.0")
            .session_fails(cuda_failure(209, "x"))
        ),
        "capability",
        "device-unsupported",
    ),
    Scenario("pascal-with-newest-cudnn", _old_cudnn_wanted, "cudnn", "device-unsupported"),
    Scenario("dda-memory-full", _no_memory, "gpu-memory", "out-of-memory"),
    Scenario("dda-no-context", _no_context, "gpu-memory", "cuda-error"),
    Scenario("provider-file-gone", _no_provider, "provider", "provider-refused"),
    Scenario(
        "session-fails",
        lambda m: dda(m).session_fails(cuda_failure(719, "unspecified launch failure")),
        "session",
        "cuda-error",
    ),
]
PARAVIRTUAL = [
    Scenario(
        "gpu-pv-no-libraries-in-module",
        lambda m: m.eflow().module().dxg("-").gpu_wheel().session_fails(cuda_failure(35, "x")),
        "passthrough",
        "driver-missing",
    ),
    Scenario(
        "gpu-pv-new-driver-old-toolkit",
        _old_toolkit,
        "passthrough",
        "cuda-error",
    ),
    Scenario(
        "gpu-pv-windows-driver-too-old",
        lambda m: (
            pv(m)
            .driver("NVIDIA GeForce RTX 3070", 86, cuda=11060, version="511.79", path=WSL_CUDA)
            .session_fails(cuda_failure(35, "x"))
        ),
        "driver-version",
        "driver-too-old",
    ),
    Scenario(
        "gpu-pv-no-device",
        lambda m: pv(m).init_fails(100, "CUDA_ERROR_NO_DEVICE").session_fails(cuda_failure(100, "no device")),
        "cuda-init",
        "no-device",
    ),
    Scenario(
        "gpu-pv-foreign-libcuda",
        lambda m: (
            pv(m)
            .driver("x", 86, path="/usr/lib/x86_64-linux-gnu/libcuda.so.535.1")
            .init_fails(100, "CUDA_ERROR_NO_DEVICE")
            .session_fails(cuda_failure(100, "x"))
        ),
        "libcuda",
        "no-device",
    ),
    Scenario(
        "gpu-pv-libcuda-not-on-path",
        lambda m: m.wsl().container().dxg().gpu_wheel().session_fails(cuda_failure(35, "x")),
        "libcuda",
        "driver-missing",
    ),
    Scenario(
        "gpu-pv-intel",
        lambda m: m.eflow().module().dxg("libdxcore.so", store="iigd_dch.inf_amd64_1").cpu_wheel(),
        None,
        "no-gpu-build",
    ),
    Scenario(
        "wsl-dxcore-gone",
        lambda m: (
            m.wsl()
            .dxg("libcuda.so.1")
            .driver(path=WSL_CUDA)
            .init_fails(500, "CUDA_ERROR_NOT_FOUND")
            .gpu_wheel()
            .session_fails(cuda_failure(500, "x"))
        ),
        "passthrough",
        "cuda-error",
    ),
]
