"""The machine that a benchmark ran on: reports of different machines must not be compared."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from visionedge import __version__
from visionedge.engine.device.devices import DeviceState
from visionedge.engine.plan_cache import read_cpu_name
from visionedge.frames.types import format_utc, utc_now
from visionedge.ops.doctor.host import Host, HostEnvironment, detect_environment, this_host
from visionedge.runtime.process_limits import usable_cores

_FLAGS = frozenset(
    (
        *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "amx_int8", "amx_bf16"),
        *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
        *("asimd", "asimddp", "i8mm", "sve", "bf16"),
    )
)
"""The processor flags by which onnxruntime and the decoders choose their kernels, on x86 and on ARM."""

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "opencv-python-headless", "av", "numpy")
_DRIVER_LIMIT_S = 10.0


def describe_machine(device: DeviceState | None = None) -> dict[str, Any]:
    """The `machine` of a report; `device` is the device of the engine, if the benchmark opened one."""
    return {
        "measuredAt": format_utc(utc_now()),
        "visionedge": __version__,
        "python": platform.python_version(),
        "cpu": read_cpu_name(),
        "cores": os.cpu_count(),
        "usableCores": usable_cores(),
        **read_hardware(),
        "loadAverage": round(os.getloadavg()[0], 2),
        **({} if device is None else {"effectiveDevice": device.effective}),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def read_hardware(host: Host | None = None) -> dict[str, Any]:
    """Processor flags, memory, kernel, GPU, its driver and its passthrough; None for what is not there.

    The driver is queried in a child process, and only if there are signs of a GPU.
    """
    host = this_host(os.environ) if host is None else host
    environment = detect_environment(host)
    gpu, driver = _gpu(host, environment)
    return {
        "cpuFlags": _flags(host.text("/proc/cpuinfo")),
        "memoryMiB": _memory_mib(host.text("/proc/meminfo")),
        "kernel": environment.release or None,
        "gpu": gpu,
        "gpuDriver": driver,
        "passthrough": environment.passthrough,
    }


def _flags(cpuinfo: str) -> list[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(_FLAGS.intersection(value.split()))
    return []


def _memory_mib(meminfo: str) -> int | None:
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return None


def _gpu(host: Host, environment: HostEnvironment) -> tuple[str | None, str | None]:
    """The names of the usable GPUs, and the version of their driver."""
    if environment.passthrough in ("none", "intel") and environment.host_gpu == "none":
        return None, None
    answer = host.probe("driver", {"nodes": []}, _DRIVER_LIMIT_S)
    devices: list[Mapping[str, Any]] = answer.step("devices").get("devices", [])
    names = ", ".join(str(device["name"]) for device in devices)
    probed = answer.step("management").get("driver")
    return names or None, str(probed) if probed else environment.kernel_driver or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def format_camera_count(number: int) -> str:
    """``1 camera``, ``2 cameras``."""
    return f"{number} camera{'' if number == 1 else 's'}"
