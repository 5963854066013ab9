"""Devices: which one was requested, which one is used, and why.

The list of providers of onnxruntime was fixed when it was compiled, and a session drops a provider that
cannot start without an error. So the effective device is read from the session, and the reason from a probe:
a tiny session in a child process (`probe.py`) that may hang or crash. Only its native stderr holds the real
error.
"""

import contextlib
import ctypes
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Literal

from visionedge.engine.device.faults import Fault, find_cuda_failure, is_out_of_memory, shorten_error_text
from visionedge.runtime.child_process import start_child
from visionedge.runtime.ov import installed_openvino

RequestedDevice = Literal["auto", "cuda", "tensorrt", "openvino-gpu", "cpu", "remote"]
EffectiveDevice = Literal["cuda", "tensorrt", "openvino-gpu", "cpu", "remote"]

Runtime = Literal["onnxruntime", "openvino"]
"""The library that computes a graph. Only the CPU is served by both."""

RequestedRuntime = Literal["auto", "onnxruntime", "openvino"]

PROVIDERS: Mapping[str, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}

PROBE_TIMEOUT_S = 60.0
_KILL_TIMEOUT_S = 5.0


class ReasonCode(StrEnum):
    """Why the effective device is used. Documentation, metrics and messages list the same codes."""

    OK = "ok"
    CPU_REQUESTED = "asked-cpu"
    NO_GPU_BUILD = "no-gpu-build"
    LIBRARY_MISSING = "library-missing"
    DRIVER_MISSING = "driver-missing"
    DRIVER_TOO_OLD = "driver-too-old"
    DRIVER_MISMATCH = "driver-mismatch"
    NO_DEVICE = "no-device"
    DEVICE_UNSUPPORTED = "device-unsupported"
    OUT_OF_MEMORY = "out-of-memory"
    CUDA_ERROR = "cuda-error"
    PROVIDER_REFUSED = "provider-refused"
    PROBE_TIMEOUT = "probe-timeout"
    PROBE_CRASHED = "probe-crashed"
    DEVICE_FAILED = "device-failed"
    RUN_TIMEOUT = "run-timeout"
    ENGINE_DIED = "engine-died"
    INVALID_OUTPUT = "wrong-rows"
    PARITY_REFUSED = "parity-refused"
    RUNTIME_MISSING = "runtime-missing"
    RUNTIME_REFUSED = "runtime-refused"
    REMOTE_UNREACHABLE = "remote-unreachable"
    REMOTE_REFUSED = "remote-refused"
    REMOTE_MODEL = "remote-model"


_GPU_EXTRA = "(in a clone: VISIONEDGE_EXTRA=gpu make run), or use the GPU image"
_GIVE_GPU = "give the container the GPU (DeviceRequests, --gpus all)"
REMEDIES: Mapping[ReasonCode, str] = {
    ReasonCode.NO_GPU_BUILD: f"install the extra 'gpu' instead of 'cpu' {_GPU_EXTRA}",
    ReasonCode.LIBRARY_MISSING: f"install the extra 'gpu' with all its libraries {_GPU_EXTRA}",
    ReasonCode.DRIVER_MISSING: f"install the NVIDIA driver, and {_GIVE_GPU}",
    ReasonCode.DRIVER_TOO_OLD: "install a newer NVIDIA driver: CUDA 12 needs 525.60 or newer",
    ReasonCode.DRIVER_MISMATCH: "restart the container: its driver must be that of the host",
    ReasonCode.NO_DEVICE: f"{_GIVE_GPU} and check CUDA_VISIBLE_DEVICES",
    ReasonCode.DEVICE_UNSUPPORTED: "use a GPU that this onnxruntime was built for, or the CPU",
    ReasonCode.OUT_OF_MEMORY: "free memory on the GPU, or use the CPU",
    ReasonCode.CUDA_ERROR: "restart the machine or its driver, and see `visionedge doctor`",
    ReasonCode.PROVIDER_REFUSED: "see `visionedge doctor`",
    ReasonCode.PROBE_TIMEOUT: "the driver hangs: restart the machine, and see `visionedge doctor`",
    ReasonCode.PROBE_CRASHED: (
        "the driver or its libraries crash: reinstall them, and see `visionedge doctor`"
    ),
    ReasonCode.DEVICE_FAILED: "retried automatically; see `visionedge doctor` if it does not come back",
    ReasonCode.RUN_TIMEOUT: "retried automatically; restart the machine if it hangs again",
    ReasonCode.ENGINE_DIED: "retried automatically; see `visionedge doctor` if it dies again",
    ReasonCode.INVALID_OUTPUT: "retried automatically; check the GPU hardware if it happens again",
    ReasonCode.PARITY_REFUSED: "check the GPU hardware; or use it nevertheless: inference.parity: warn",
    ReasonCode.RUNTIME_MISSING: "install the extra 'openvino', or use inference.runtime: auto",
    ReasonCode.RUNTIME_REFUSED: "use inference.runtime: auto; onnxruntime computes this model",
    ReasonCode.REMOTE_UNREACHABLE: "check inference.remote.url, the server and the network between",
    ReasonCode.REMOTE_REFUSED: "check VISIONEDGE_REMOTE_TOKEN, the certificate, and the server's log",
    ReasonCode.REMOTE_MODEL: "serve the file that `visionedge model compile` writes of this model",
}

_GIVE_INTEL_GPU = "give the container the GPU (Devices: /dev/dri)"
_INTEL_REMEDIES: Mapping[ReasonCode, str] = {
    ReasonCode.NO_GPU_BUILD: "install the extra 'openvino'",
    ReasonCode.LIBRARY_MISSING: "install Intel's OpenCL driver (Debian: intel-opencl-icd)",
    ReasonCode.NO_DEVICE: f"{_GIVE_INTEL_GPU} and Intel's OpenCL driver (Debian: intel-opencl-icd)",
    ReasonCode.DEVICE_UNSUPPORTED: "use the CPU",
}


def find_remedy(device: str, code: ReasonCode) -> str:
    """What to do about a reason on a device."""
    intel = _INTEL_REMEDIES.get(code) if device == "openvino-gpu" else None
    return intel or REMEDIES[code]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The requested and the effective device, with the reason, as status, logs and twin show them."""

    requested: RequestedDevice
    effective: EffectiveDevice
    code: ReasonCode
    reason: str
    since_utc: datetime

    @property
    def degraded(self) -> bool:
        """Whether this is less than the requested device; `auto` requests a GPU if there is one."""
        fine = {ReasonCode.OK, ReasonCode.CPU_REQUESTED} | (
            {ReasonCode.NO_GPU_BUILD} if self.requested == "auto" else set()
        )
        return self.code not in fine

    def describe(self) -> str:
        """One line: ``requested auto, effective cpu: libcublasLt.so.12 is missing (library-missing)``."""
        line = f"requested {self.requested}, effective {self.effective}"
        return line if self.code is ReasonCode.OK else f"{line}: {self.reason} ({self.code})"


@dataclass(frozen=True, slots=True)
class DeviceVerdict:
    """Whether a device can be used: `code` OK, or why not, in one line."""

    code: ReasonCode
    reason: str


USABLE = DeviceVerdict(ReasonCode.OK, "usable")


@dataclass(frozen=True, slots=True)
class DeviceAssignment:
    """The one device to open, without a probe; and the reason why."""

    device: EffectiveDevice
    verdict: DeviceVerdict


def may_have_intel_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether OpenVINO is installed, and a GPU that it may list: a DRM render node, or the one of GPU-PV."""
    if not installed_openvino():
        return False
    return (devices / "dxg").exists() or any(devices.glob("dri/renderD*"))


def device_preference(
    requested: RequestedDevice, intel_gpu: Callable[[], bool] = may_have_intel_gpu
) -> tuple[EffectiveDevice, ...]:
    """The devices to try, best first. TensorRT builds its engines for minutes, so only if it is requested."""
    if requested == "tensorrt":
        return ("tensorrt", "cuda", "cpu")
    if requested in ("remote", "openvino-gpu"):
        return (requested, "cpu")
    if requested == "auto" and intel_gpu():
        return ("cuda", "openvino-gpu", "cpu")
    return ("cpu",) if requested == "cpu" else ("cuda", "cpu")


def get_effective_device(providers: list[str]) -> EffectiveDevice:
    """The device of a session by its `get_providers()`: the first provider computes."""
    for device in ("tensorrt", "cuda"):
        if providers and providers[0] == PROVIDERS[device]:
            return "tensorrt" if device == "tensorrt" else "cuda"
    return "cpu"


_LIBRARY = re.compile(r"(?P<library>lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
_CUDA_ERROR_CODES: Mapping[int, ReasonCode] = {
    35: ReasonCode.DRIVER_TOO_OLD,
    100: ReasonCode.NO_DEVICE,
    101: ReasonCode.NO_DEVICE,
    209: ReasonCode.DEVICE_UNSUPPORTED,
    803: ReasonCode.DRIVER_MISMATCH,
    804: ReasonCode.DRIVER_MISMATCH,
}


def classify_provider_error(text: str, *, driver_present: bool) -> DeviceVerdict:
    """The reason in the exception and the native stderr of a provider that failed."""
    if failure := find_cuda_failure(text):
        code = _CUDA_ERROR_CODES.get(failure.number, ReasonCode.CUDA_ERROR)
        if failure.library != "CUDA":
            code = ReasonCode.CUDA_ERROR  # other libraries have their own numbers
        # CUDA reports "insufficient" also if there is no driver at all.
        if code is ReasonCode.DRIVER_TOO_OLD and not driver_present:
            return DeviceVerdict(ReasonCode.DRIVER_MISSING, "libcuda.so.1, the NVIDIA driver, is missing")
        return DeviceVerdict(ReasonCode.OUT_OF_MEMORY if is_out_of_memory(text) else code, str(failure))
    if found := _LIBRARY.search(text):
        library = found["library"]
        if library.startswith("libcuda.so"):
            return DeviceVerdict(ReasonCode.DRIVER_MISSING, f"{library}, the NVIDIA driver, is missing")
        return DeviceVerdict(ReasonCode.LIBRARY_MISSING, f"{library} is missing")
    if "install TensorRT libraries" in text:
        return DeviceVerdict(ReasonCode.LIBRARY_MISSING, "the libraries of TensorRT are missing")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = lines[-1][:200] if lines else "it gave no reason"
    return DeviceVerdict(ReasonCode.PROVIDER_REFUSED, f"the provider refused: {message}")


def classify_openvino_error(text: str) -> DeviceVerdict:
    """The reason in the error of an Intel GPU that did not start; not seen on one, see openvino_session."""
    if found := _LIBRARY.search(text):
        return DeviceVerdict(ReasonCode.LIBRARY_MISSING, f"{found['library']} is missing")
    if "no supported devices found" in text:
        return DeviceVerdict(ReasonCode.NO_DEVICE, "OpenVINO lists no GPU")
    message = shorten_error_text(text) or "it gave no reason"
    if "is not registered" in text:
        return DeviceVerdict(ReasonCode.NO_DEVICE, f"OpenVINO lists no GPU: {message}")
    if is_out_of_memory(text):
        return DeviceVerdict(ReasonCode.OUT_OF_MEMORY, message)
    return DeviceVerdict(ReasonCode.PROVIDER_REFUSED, f"OpenVINO refused: {message}")


_FAULT_REASONS: Mapping[Fault, ReasonCode] = {
    Fault.OUT_OF_MEMORY: ReasonCode.OUT_OF_MEMORY,
    Fault.HANG: ReasonCode.RUN_TIMEOUT,
    Fault.DIED: ReasonCode.ENGINE_DIED,
    Fault.INVALID_OUTPUT: ReasonCode.INVALID_OUTPUT,
    Fault.UNREACHABLE: ReasonCode.REMOTE_UNREACHABLE,
}


def classify_device_loss(fault: Fault, message: str) -> DeviceVerdict:
    """The reason why a device that computed until now is lost, from the fault and its text."""
    if fault in _FAULT_REASONS:
        return DeviceVerdict(_FAULT_REASONS[fault], message)
    seen = classify_provider_error(message, driver_present=True)
    return (
        DeviceVerdict(ReasonCode.DEVICE_FAILED, message) if seen.code is ReasonCode.PROVIDER_REFUSED else seen
    )


@dataclass(frozen=True, slots=True)
class ProbeOutput:
    """The output of a probe; `exit_code` None: it did not end in time."""

    exit_code: int | None
    stdout: str
    stderr: str


ProbeRunner = Callable[[str, float], ProbeOutput]
"""Runs the probe of a provider, with a time limit in seconds."""


def run_probe(
    provider: str,
    timeout_s: float,
    started: Callable[[subprocess.Popen[str]], None] = lambda _process: None,
) -> ProbeOutput:
    """Run `probe.py` in a child process and kill it after `timeout_s`. `started` gets the process."""
    child = start_child("visionedge.engine.device.probe", provider, stderr=subprocess.PIPE, text=True)
    started(child)
    try:
        stdout, stderr = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        # A child that hangs inside the driver cannot be killed; it is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=_KILL_TIMEOUT_S)
        return ProbeOutput(None, "", "")
    return ProbeOutput(child.returncode, stdout, stderr)


def probe_device(
    device: EffectiveDevice,
    run: ProbeRunner = run_probe,
    timeout_s: float = PROBE_TIMEOUT_S,
    driver_present: Callable[[], bool] | None = None,
) -> DeviceVerdict:
    """Whether a session on this device starts and computes, and if not, why. Takes one or two seconds."""
    provider = PROVIDERS.get(device, device)
    output = run(provider, timeout_s)
    if output.exit_code is None:
        return DeviceVerdict(
            ReasonCode.PROBE_TIMEOUT, f"a first session did not start within {timeout_s:.0f} s"
        )
    if output.exit_code < 0:
        return DeviceVerdict(ReasonCode.PROBE_CRASHED, f"a first session died of signal {-output.exit_code}")
    try:
        document = json.loads(output.stdout.strip().splitlines()[-1])
        providers, error = list(document["providers"]), str(document["error"])
    except (ValueError, IndexError, KeyError, TypeError):
        return classify_start_error(device, output.stderr, lambda: True)
    if provider in providers and not error:
        return USABLE
    text = error if device == "openvino-gpu" else f"{output.stderr}\n{error}"
    return classify_start_error(device, text, driver_present or has_nvidia_driver)


def classify_start_error(
    device: EffectiveDevice, text: str, driver_present: Callable[[], bool] | None = None
) -> DeviceVerdict:
    """The reason in the error of a device that did not start."""
    if device == "openvino-gpu":
        return classify_openvino_error(text)
    return classify_provider_error(text, driver_present=(driver_present or has_nvidia_driver)())


def has_nvidia_driver() -> bool:
    """Whether the library of the NVIDIA driver can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
