"""Errors while frames are computed, classified by what has to be done about them.

onnxruntime and OpenVINO have no types for this: everything that a device or its libraries report is the text
of an exception, so the text is parsed here. `devices` does the same for the start of a device.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from visionedge.errors import VisionedgeError


class Fault(StrEnum):
    """What went wrong with a batch or with the engine's process. docs/gpu.md lists the same."""

    REFUSED = "refused"
    """The batch or the model is the cause; the device works, the next batch may succeed."""

    OUT_OF_MEMORY = "out-of-memory"
    """There was not enough memory for a batch of this size; a smaller one may fit."""

    STICKY = "sticky"
    """The device failed in a way that makes every later batch in this process fail."""

    GONE = "device-gone"
    """The device or its driver is not there any more."""

    INVALID_OUTPUT = "garbage"
    """The output of the device contains NaN or infinity."""

    HANG = "hang"
    """A batch did not end in time."""

    DIED = "died"
    """The engine's process died."""

    UNREACHABLE = "unreachable"
    """No replica of the remote device answers."""

    REPLICA_FAILED = "replica-failed"
    """A replica of the remote device did not compute a batch in time; another one may."""


FATAL_FAULTS = frozenset(
    {Fault.STICKY, Fault.GONE, Fault.INVALID_OUTPUT, Fault.HANG, Fault.DIED, Fault.UNREACHABLE}
)
"""After these a process on a device cannot be used any more."""

RETRIED_FAULTS = frozenset({Fault.UNREACHABLE, Fault.REPLICA_FAILED})
"""The pictures cannot be the cause: they are computed again, as long as they are fresh."""


class EngineError(VisionedgeError):
    """A batch could not be computed. `fault` is the kind of failure; None if the batch was never run."""

    def __init__(self, message: str, fault: Fault | None = None) -> None:
        super().__init__(message)
        self.fault = fault


class EngineUnavailableError(EngineError):
    """No engine computes now. Its supervisor has reported the reason already."""


@dataclass(frozen=True, slots=True)
class CudaFailure:
    """An error of NVIDIA's libraries, as ``CUDA failure 700: an illegal memory access was encountered``."""

    library: str
    number: int
    message: str

    def __str__(self) -> str:
        return f"{self.library} failure {self.number}: {self.message}"


_FAILURE = re.compile(
    r"\b(?P<library>CUDA|CUDNN_FE|CUDNN|CUBLAS|CUFFT|CURAND|CUSPARSE) failure (?P<number>\d+): "
    r"(?P<message>[^;\n]*)"
)
# Texts of onnxruntime's memory arena, of CUDA, cuBLAS, cuDNN, TensorRT, OpenCL, OpenVINO, and of C++.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|Failed to allocate memory|smaller than requested bytes|_ALLOC(?:ATION)?_FAIL(?:ED|URE)"
    r"|CL_OUT_OF_HOST_MEMORY|max alloc size|exceed_(?:allocatable|available)_mem_size"
    r"|bad_?alloc|MemoryError|Unable to allocate",
    re.IGNORECASE,
)
# Texts of a device without a number: older wrappers of CUDA, TensorRT, the provider's own error code.
_DEVICE_ERROR = re.compile(
    r"(?:CUDA|CUDNN|CUBLAS) error executing|\bEP_FAIL\b|TensorRT|Cuda Runtime"
    r"|CUDNN_(?:STATUS|BACKEND)|cudaError",
)
# OpenVINO on an Intel GPU reports the names of OpenCL's errors.
_OPENCL_ERROR = re.compile(r"\bCL_[A-Z_]{4,}\b|\[GPU\] .*error code: -\d+")
_OPENCL_GONE = re.compile(
    r"CL_DEVICE_NOT_(?:AVAILABLE|FOUND)|DEVICE_LOST|no supported devices found|is not registered in the Open"
)
# An argument or a kernel that this device does not support. CL_OUT_OF_RESOURCES is not among them: OpenVINO
# says that later calls may hang after it.
_OPENCL_REFUSED = re.compile(
    r"CL_INVALID_(?:ARG|BUFFER_SIZE|GLOBAL|IMAGE|VALUE|WORK)|CL_(?:BUILD|COMPILE|LINK)_PROGRAM_FAILURE"
)
_OUT_OF_MEMORY_NUMBER = 2
_GONE_NUMBERS = frozenset({3, 4, 35, 46, 100, 101, 802, 803, 804})
# An argument, a launch or a kernel that this device does not support: CUDA goes on after them.
_REFUSED_NUMBERS = frozenset({1, 9, 98, 209, 218, 222, 801})
_REFUSED_NAMES = re.compile(r"BAD_PARAM|NOT_SUPPORTED|INVALID_VALUE|ARCH_MISMATCH")


def find_cuda_failure(text: str) -> CudaFailure | None:
    """The first error of one of NVIDIA's libraries in a text, without the names of hosts and files."""
    found = _FAILURE.search(text)
    if found is None:
        return None
    return CudaFailure(found["library"], int(found["number"]), found["message"].strip())


def is_out_of_memory(text: str) -> bool:
    """Whether a text reports too little memory."""
    failure = find_cuda_failure(text)
    if failure is not None and failure.library == "CUDA":
        return failure.number == _OUT_OF_MEMORY_NUMBER  # the rest of the line may quote anything
    return _OUT_OF_MEMORY.search(text) is not None


def classify_fault(text: str, *, on_gpu: bool) -> Fault:
    """The kind of fault in an error text of a batch; on the CPU the device is never the cause."""
    if is_out_of_memory(text):
        return Fault.OUT_OF_MEMORY
    if not on_gpu:
        return Fault.REFUSED
    failure = find_cuda_failure(text)
    if failure is not None:
        return _classify_cuda_failure(failure)
    if _OPENCL_GONE.search(text):
        return Fault.GONE
    if _OPENCL_ERROR.search(text):
        return Fault.REFUSED if _OPENCL_REFUSED.search(text) else Fault.STICKY
    return Fault.STICKY if _DEVICE_ERROR.search(text) else Fault.REFUSED


def _classify_cuda_failure(failure: CudaFailure) -> Fault:
    """An error that is not known to be harmless counts as sticky: every later batch could fail."""
    if failure.library != "CUDA":
        return Fault.REFUSED if _REFUSED_NAMES.search(failure.message) else Fault.STICKY
    if failure.number in _GONE_NUMBERS:
        return Fault.GONE
    return Fault.REFUSED if failure.number in _REFUSED_NUMBERS else Fault.STICKY


def describe_error(error: BaseException, limit: int = 300) -> str:
    """The text of an exception of a runtime in one line, without its error codes and places in sources."""
    return _join_lines(str(error) or type(error).__name__, limit)


def shorten_error_text(text: str) -> str:
    """The same for a text; an error of NVIDIA's libraries without the names of hosts and files."""
    failure = find_cuda_failure(text)
    return _join_lines(text) if failure is None else str(failure)


# OpenVINO: "Exception from src/….cpp:117:" and "Check '…' failed at src/….hpp:56:", each on its own line.
_SOURCE_LINE = re.compile(r"^\s*(?:(?:Exception from|Check '.*' failed at) \S+:\d+:?\s*$)", re.MULTILINE)


def _join_lines(text: str, limit: int = 300) -> str:
    return " ".join(_SOURCE_LINE.sub("", text).split()).rsplit("[ONNXRuntimeError] : ", 1)[-1][:limit]
