"""Scenarios with an Intel GPU for OpenVINO, by GPU-PV and on bare Linux."""

from collections.abc import Callable

from doctor_hosts import HostBuilder, cuda_failure, missing
from doctor_scenarios import Scenario, native

_UHD = "Intel(R) UHD Graphics 770 (iGPU)"
_NODE = "/dev/dri/renderD128"
# The text of OpenVINO 2026.4.1 on a machine without a GPU, shortened.
_NO_DEVICES = "[GPU] Can't get PERFORMANCE_HINT property as no supported devices found"
_NO_DEVICES_CODE = "no-device"
# A text of OpenVINO for an error of OpenCL, not seen on a GPU.
_OUT_OF_RESOURCES = "[GPU] clFlush, error code: -5 CL_OUT_OF_RESOURCES"


def _demand(
    name: str,
    build: Callable[[HostBuilder], object],
    broken: str | None,
    code: str,
    device: str = "openvino-gpu",
) -> Scenario:
    return Scenario(name, build, broken, code, device)


def pv(m: HostBuilder) -> HostBuilder:
    """A module in EFLOW with an Intel GPU by GPU-PV, in the CPU image with OpenVINO."""
    return m.eflow().module().cpu_wheel().intel_dxg().opencl(level_zero=True).openvino(GPU=_UHD)


def bare(m: HostBuilder) -> HostBuilder:
    """A Linux machine with an Intel GPU, its OpenCL driver and OpenVINO."""
    return m.cpu_wheel().on_pci("0x8086").render_node().opencl().openvino(GPU=_UHD)


def _pv_module(m: HostBuilder) -> HostBuilder:
    return m.eflow().module().cpu_wheel()


def _docker(m: HostBuilder) -> HostBuilder:
    return m.container().cpu_wheel().on_pci("0x8086").opencl().openvino(GPU=_UHD)


def _refuse(m: HostBuilder, node: str, error: str) -> None:
    m.openvino_steps["devices"] = {"devices": {"CPU": "a CPU"}}
    m.openvino_fails(_NO_DEVICES).refused = {node: error}


def _package_is_broken(m: HostBuilder) -> None:
    bare(m).openvino_steps.pop("devices")
    m.openvino_steps["package"] = {"error": "libtbb.so.12: cannot open shared object file"}
    m.openvino_fails("libtbb.so.12: cannot open shared object file")


INTEL_GPU_PV = [
    _demand("intel-pv-good", pv, None, "ok"),
    _demand(
        "intel-pv-without-opencl",
        lambda m: _pv_module(m).intel_dxg().openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-pv-level-zero-only",
        lambda m: _pv_module(m).intel_dxg().level_zero().openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-pv-without-intels-opencl",
        lambda m: _pv_module(m).intel_dxg().opencl_loader_only("pocl").openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-pv-without-openvino", lambda m: _pv_module(m).intel_dxg().opencl(), "openvino", "no-gpu-build"
    ),
    _demand("intel-pv-bare-cpu-image", lambda m: _pv_module(m).intel_dxg(), "opencl", "no-gpu-build"),
    _demand(
        "intel-pv-libraries-not-mounted",
        lambda m: _pv_module(m).dxg("-").opencl().openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-wsl-dxcore-gone",
        lambda m: (
            m.wsl().cpu_wheel().intel_dxg("libd3d12.so").opencl().openvino().openvino_fails(_NO_DEVICES)
        ),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-pv-dxg-not-permitted",
        lambda m: _refuse(pv(m), "/dev/dxg", "EACCES"),
        "permissions",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-pv-dxg-forbidden",
        lambda m: _refuse(pv(m), "/dev/dxg", "EPERM"),
        "permissions",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-pv-not-given",
        lambda m: _pv_module(m).file("/proc/misc", "126 dxg\n"),
        "passthrough",
        "no-gpu-build",
    ),
    _demand("intel-pv-of-nvidia-only", lambda m: _pv_module(m).dxg(), "passthrough", "no-gpu-build"),
    _demand("intel-demanded-in-eflow-without-gpu", _pv_module, "passthrough", "no-gpu-build"),
    _demand(
        "intel-pv-not-listed",
        lambda m: pv(m).openvino().openvino_fails(_NO_DEVICES),
        "openvino-devices",
        _NO_DEVICES_CODE,
    ),
    _demand("intel-pv-auto", pv, None, "ok", device="auto"),
    _demand("intel-pv-not-wanted", pv, None, "asked-cpu", device="cpu"),
]

INTEL_LINUX = [
    _demand("intel-linux-good", bare, None, "ok"),
    _demand(
        "intel-linux-not-in-group",
        lambda m: _refuse(bare(m), _NODE, "EACCES"),
        "permissions",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-docker-not-in-group",
        lambda m: _refuse(_docker(m).render_node(), _NODE, "EACCES"),
        "permissions",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-docker-not-given",
        lambda m: _docker(m).render_node(here=False).openvino().openvino_fails(_NO_DEVICES),
        "passthrough",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-linux-without-kernel-driver",
        lambda m: m.cpu_wheel().on_pci("0x8086").openvino().openvino_fails(_NO_DEVICES),
        "passthrough",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-linux-without-icd",
        lambda m: bare(m).opencl_loader_only().openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-linux-driver-does-not-load",
        lambda m: bare(m).opencl(error=missing("libigdgmm.so.12")).openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-linux-driver-crashes",
        lambda m: bare(m).openvino_ends("died", "signal 11", after="loading"),
        "opencl",
        "probe-crashed",
    ),
    _demand(
        "intel-linux-without-openvino",
        lambda m: m.cpu_wheel().on_pci("0x8086").render_node().opencl(),
        "openvino",
        "no-gpu-build",
    ),
    _demand("intel-linux-openvino-is-broken", _package_is_broken, "openvino", "library-missing"),
    _demand(
        "intel-linux-not-listed",
        lambda m: bare(m).openvino().openvino_fails(_NO_DEVICES),
        "openvino-devices",
        _NO_DEVICES_CODE,
    ),
    _demand(
        "intel-linux-list-hangs",
        lambda m: bare(m).openvino_ends("late", "no answer within 30 s"),
        "openvino-devices",
        "probe-timeout",
    ),
    _demand(
        "intel-linux-list-crashes",
        lambda m: bare(m).openvino_ends("died", "signal 11"),
        "openvino-devices",
        "probe-crashed",
    ),
    _demand(
        "intel-linux-inference-fails",
        lambda m: bare(m).openvino_fails(_OUT_OF_RESOURCES),
        "session",
        "provider-refused",
    ),
    _demand(
        "intel-demanded-of-amd",
        lambda m: m.cpu_wheel().on_pci("0x1002").render_node("0x1002"),
        "passthrough",
        "no-gpu-build",
    ),
    _demand(
        "amd-laptop",
        lambda m: m.cpu_wheel().on_pci("0x1002").render_node("0x1002"),
        None,
        "no-gpu-build",
        "auto",
    ),
    _demand(
        "intel-linux-unused-without-openvino",
        lambda m: m.cpu_wheel().on_pci("0x8086").render_node(),
        None,
        "no-gpu-build",
        "auto",
    ),
    _demand("intel-linux-auto", bare, None, "ok", "auto"),
    _demand(
        "intel-linux-auto-without-icd",
        lambda m: bare(m).opencl_loader_only().openvino().openvino_fails(_NO_DEVICES),
        "opencl",
        _NO_DEVICES_CODE,
        "auto",
    ),
    _demand(
        "nvidia-beside-intel",
        lambda m: native(m).render_node(name="renderD129").session_works(),
        None,
        "ok",
        "auto",
    ),
    _demand(
        "nvidia-is-broken-beside-intel",
        lambda m: (
            native(m)
            .render_node(name="renderD129")
            .opencl()
            .openvino(GPU=_UHD)
            .session_fails(cuda_failure(100, "no CUDA-capable device"))
            .init_fails(100, "CUDA_ERROR_NO_DEVICE")
        ),
        "cuda-init",
        "ok",
        "auto",
    ),
    _demand(
        "nvidia-beside-intel-used",
        lambda m: native(m).render_node(name="renderD129").opencl().openvino(GPU=_UHD),
        None,
        "ok",
    ),
]
