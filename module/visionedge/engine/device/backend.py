"""Which runtimes and devices are installed, and how a session is opened; tests inject a device here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visionedge.engine.device.devices import PROVIDERS, DeviceVerdict, EffectiveDevice, Runtime, probe_device
from visionedge.engine.device.openvino_session import OpenVinoSession
from visionedge.engine.device.session import (
    PLAIN,
    DeviceSession,
    SessionOpener,
    find_options,
    open_ort_session,
)
from visionedge.engine.plan import CPUINFO, read_cpu_flags
from visionedge.errors import ModelError
from visionedge.runtime.ort import import_onnxruntime
from visionedge.runtime.ov import installed_openvino


def open_session(
    graph: bytes,
    device: EffectiveDevice,
    *,
    max_batch: int,
    data: Path | None = None,
    runtime: Runtime = "onnxruntime",
    precision: str = "fp32",
    options: str = PLAIN,
) -> DeviceSession:
    """Open a compiled graph on a device, in a runtime of `find_runtimes`, in one of `find_precisions`.

    The session may come up on a lesser device: look at its `device`. Raises what the runtime raises.
    """
    if runtime == "openvino" or device == "openvino-gpu":
        return OpenVinoSession(graph, device, precision=precision, data=data)
    if precision != "fp32":
        raise ModelError(f"onnxruntime computes a graph as it is, not in {precision}")
    return open_ort_session(graph, device, max_batch=max_batch, data=data, options=options)


def find_runtimes(device: EffectiveDevice) -> tuple[Runtime, ...]:
    """The installed runtimes that serve a device, the default one first."""
    if device == "openvino-gpu":
        return ("openvino",) if installed_openvino() else ()
    return ("onnxruntime", "openvino") if device == "cpu" and installed_openvino() else ("onnxruntime",)


_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last one is Arm's


def list_cpu_precisions(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """fp32, and bf16 where the CPU has instructions for it; OpenVINO emulates bf16 on others, slower."""
    return ("fp32", "bf16") if _BF16_FLAGS & set(read_cpu_flags(cpuinfo)) else ("fp32",)


def find_precisions(device: EffectiveDevice, runtime: Runtime) -> tuple[str, ...]:
    """What a runtime can compute a graph in on a device, where the graph leaves it open; fp32 first."""
    if runtime == "onnxruntime" or not installed_openvino():
        return ("fp32",)
    return ("fp32", "fp16") if device == "openvino-gpu" else list_cpu_precisions()


def has_provider(device: EffectiveDevice) -> bool:
    """Whether a runtime for a device is installed. True does not mean that the device can be used."""
    if device == "openvino-gpu":
        return bool(find_runtimes(device))
    return PROVIDERS[device] in import_onnxruntime().get_available_providers()


@dataclass(frozen=True, slots=True)
class DeviceBackend:
    """Whether a device is built in, whether it is usable, and how a session is opened on it.

    `find_runtimes` gives the installed runtimes of a device, `find_precisions` the precisions of a runtime,
    `find_options` the names of the options that may be faster than the plain ones.
    """

    has_provider: Callable[[EffectiveDevice], bool] = has_provider
    probe_device: Callable[[EffectiveDevice], DeviceVerdict] = probe_device
    open: SessionOpener = open_session
    find_runtimes: Callable[[EffectiveDevice], tuple[Runtime, ...]] = find_runtimes
    find_precisions: Callable[[EffectiveDevice, Runtime], tuple[str, ...]] = find_precisions
    find_options: Callable[[EffectiveDevice, Runtime], tuple[str, ...]] = find_options


DEVICE_BACKEND = DeviceBackend()
