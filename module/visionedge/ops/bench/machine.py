"""The machine that a benchmark ran on: reports of different machines must not be compared."""

import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from visionedge import __version__
from visionedge.engine.device.devices import DeviceState
from visionedge.engine.plan import read_cpu_name
from visionedge.frames.types import format_utc, utc_now
from visionedge.ops.doctor.host import Host, HostEnvironment, detect_environment, read_memory, this_host
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
    host = this_host(os.environ)
    return {
        "measuredAt": format_utc(utc_now()),
        "visionedge": __version__,
        "python": platform.python_version(),
        "cpu": read_cpu_name(),
        "cores": os.cpu_count(),
        "usableCores": usable_cores(),
        **read_hardware(host),
        "loadAverage": round(os.getloadavg()[0], 2),
        **({} if device is None else {"effectiveDevice": device.effective}),
        "packages": {name: host.packages[name] for name in _PACKAGES if name in host.packages},
    }


def read_hardware(host: Host) -> dict[str, Any]:
    """Processor flags, memory, kernel, GPU, its driver and its passthrough; None for what is not there.

    The driver is queried in a child process, and only if there are signs of a GPU.
    """
    environment = detect_environment(host)
    gpu, driver = _gpu(host, environment)
    return {
        "cpuFlags": _flags(host.text("/proc/cpuinfo")),
        "memoryMiB": read_memory(host).total_bytes // 2**20 or None,
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


def _gpu(host: Host, environment: HostEnvironment) -> tuple[str | None, str | None]:
    """The names of the usable GPUs, and the version of their driver."""
    if environment.passthrough in ("none", "intel") and environment.host_gpu == "none":
        return None, None
    answer = host.probe("driver", {"nodes": []}, _DRIVER_LIMIT_S)
    devices: list[Mapping[str, Any]] = answer.step("devices").get("devices", [])
    names = ", ".join(str(device["name"]) for device in devices)
    probed = answer.step("management").get("driver")
    return names or None, str(probed) if probed else environment.kernel_driver or None


def format_camera_count(number: int) -> str:
    """``1 camera``, ``2 cameras``."""
    return f"{number} camera{'' if number == 1 else 's'}"


# --- other processes ----------------------------------------------------------------------------------------

OTHER_PROCESSES_KEY = "otherProcessesShare"
"""Key of every bench report: the share of the cores that this process may use, 0 to 1, or null."""

MAX_IDLE_SHARE = 0.05
"""Up to this share, which a desktop or a monitoring agent needs, a machine counts as idle."""

TICK_S = 1 / os.sysconf("SC_CLK_TCK")

_IDLE_COLUMNS = (3, 4)
"""Columns of idle and iowait in a line of /proc/stat; guest time is part of user time already."""


def read_own_cpu_s() -> float:
    """The processor time in s of this process and of all its descendants that have ended."""
    return sum(os.times()[:4])


class OtherProcessesLoad:
    """The processor time that other processes used since this object was made.

    This process does not count, nor its descendants if they have ended before `share` is called. Time that a
    hypervisor takes away (steal) counts.

    Args:
        stat: Linux's /proc/stat.
        cores: numbers of the cores that count; None: those that this process may use.
        clock: monotonic seconds.
        own_s: see `read_own_cpu_s`.
    """

    def __init__(
        self,
        stat: Path = Path("/proc/stat"),
        cores: Collection[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        own_s: Callable[[], float] = read_own_cpu_s,
    ) -> None:
        self._stat, self._clock, self._own_s = stat, clock, own_s
        self._cores = os.sched_getaffinity(0) if cores is None else cores
        self._before = self._now()

    def share(self) -> float | None:
        """Return the share of the cores that others used, 0 to 1; None if /proc/stat cannot be read."""
        now = self._now()
        if self._before is None or now is None:
            return None
        took_s, others_s = (after - before for before, after in zip(self._before, now, strict=True))
        return round(min(1.0, max(0.0, others_s) / (max(took_s, 1e-9) * len(self._cores))), 3)

    def _now(self) -> tuple[float, float] | None:
        """The clock, and the busy time of the cores without our own; in seconds."""
        names = [f"cpu{core}" for core in self._cores]
        try:
            lines = map(str.split, self._stat.read_text(encoding="ascii").splitlines())
            columns = {words[0]: words[1:9] for words in lines if words}
            ticks = [int(w) for name in names for i, w in enumerate(columns[name]) if i not in _IDLE_COLUMNS]
        except (OSError, ValueError, KeyError):
            return None
        return self._clock(), sum(ticks) * TICK_S - self._own_s()


def describe_other_load(report: Mapping[str, Any]) -> str:
    """A line about the load of other processes during a measurement; empty if the machine was idle."""
    share = report.get(OTHER_PROCESSES_KEY)
    if share is None or share <= MAX_IDLE_SHARE:
        return ""
    return (
        f"Other processes used {share:.0%} of the processor during the measurement: on an otherwise idle"
        " machine the figures are better.\n"
    )
