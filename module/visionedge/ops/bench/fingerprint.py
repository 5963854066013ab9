"""The hardware that a report was made on, as far as figures depend on it."""

import os
from collections.abc import Mapping
from typing import Any

from visionedge.ops.doctor.host import Host, this_host
from visionedge.ops.doctor.place import Place, look_around

_FLAGS = frozenset(
    (
        *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "amx_int8", "amx_bf16"),
        *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
        *("asimd", "asimddp", "i8mm", "sve", "bf16"),
    )
)
"""What onnxruntime's kernels and the decoders choose their code by, on x86 and on ARM."""

_DRIVER_LIMIT_S = 10.0


def fingerprint(host: Host | None = None) -> dict[str, Any]:
    """Processor flags, memory, kernel, GPU, driver and its passthrough; None where there is none.

    The driver is asked in a child, and only where something points to a GPU.
    """
    host = this_host(os.environ) if host is None else host
    place = look_around(host)
    gpu, driver = _gpu(host, place)
    return {
        "cpuFlags": _flags(host.text("/proc/cpuinfo")),
        "memoryMiB": _memory_mib(host.text("/proc/meminfo")),
        "kernel": place.release or None,
        "gpu": gpu,
        "gpuDriver": driver,
        "passthrough": place.passthrough,
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


def _gpu(host: Host, place: Place) -> tuple[str | None, str | None]:
    """The names of the GPUs that can be used, and the version of their driver."""
    if place.passthrough in ("none", "intel") and place.offered == "none":
        return None, None
    answer = host.ask("driver", {"nodes": []}, _DRIVER_LIMIT_S)
    devices: list[Mapping[str, Any]] = answer.step("devices").get("devices", [])
    names = ", ".join(str(device["name"]) for device in devices)
    told = answer.step("management").get("driver")
    return names or None, str(told) if told else place.kernel_driver or None
