"""What goes wrong while frames are computed, told apart by what has to be done about it.

onnxruntime has no types for this: everything a device or its libraries say comes as the text of an exception,
so the texts are read here. What is wrong at the start of a device is `devices.classify`'s business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What went wrong with a batch or with the engine's process. Closed: docs/gpu.md lists the same."""

    REFUSED = "refused"
    OUT_OF_MEMORY = "out-of-memory"
    STICKY = "sticky"
    GONE = "device-gone"
    INVALID_OUTPUT = "garbage"
    HANG = "hang"
    DIED = "died"


FAULT_DESCRIPTIONS: Mapping[Fault, str] = {
    Fault.REFUSED: "the batch or the model is to blame; the device is well, the next batch may do",
    Fault.OUT_OF_MEMORY: "there was not enough memory for a batch of this size; a smaller one may fit",
    Fault.STICKY: "the device failed in a way that spoils everything later in this process",
    Fault.GONE: "the device or its driver is not there any more",
    Fault.INVALID_OUTPUT: "the device gave rows that are no numbers (NaN or infinity)",
    Fault.HANG: "a batch did not end in time",
    Fault.DIED: "the engine's process died",
}

FATAL_FAULTS = frozenset({Fault.STICKY, Fault.GONE, Fault.INVALID_OUTPUT, Fault.HANG, Fault.DIED})
"""After these a process on a GPU is of no use any more."""


@dataclass(frozen=True, slots=True)
class CudaFailure:
    """What one of NVIDIA's libraries said: ``CUDA failure 700: an illegal memory access was encountered``."""

    library: str
    number: int
    message: str

    def __str__(self) -> str:
        return f"{self.library} failure {self.number}: {self.message}"


_FAILURE = re.compile(
    r"\b(?P<library>CUDA|CUDNN_FE|CUDNN|CUBLAS|CUFFT|CURAND|CUSPARSE) failure (?P<number>\d+): "
    r"(?P<words>[^;\n]*)"
)
# The arena's words, those of CUDA, cuBLAS, cuDNN and TensorRT, and C++'s own.
_NO_MEMORY = re.compile(
    r"out of memory|Failed to allocate memory|smaller than requested bytes|_ALLOC(?:ATION)?_FAILED"
    r"|bad_?alloc|MemoryError|Unable to allocate",
    re.IGNORECASE,
)
# A device's words without a number: older wrappers of CUDA, TensorRT's, the provider's own kind of error.
_DEVICE_ERROR = re.compile(
    r"(?:CUDA|CUDNN|CUBLAS) error executing|\bEP_FAIL\b|TensorRT|Cuda Runtime"
    r"|CUDNN_(?:STATUS|BACKEND)|cudaError",
)
_MEMORY_NUMBER = 2
_GONE_NUMBERS = frozenset({3, 4, 35, 46, 100, 101, 802, 803, 804})
# An argument, a launch or a kernel that this device does not take: CUDA goes on after them.
_REFUSED_NUMBERS = frozenset({1, 9, 98, 209, 218, 222, 801})
_REFUSED_NAMES = re.compile(r"BAD_PARAM|NOT_SUPPORTED|INVALID_VALUE|ARCH_MISMATCH")


def find_cuda_failure(text: str) -> CudaFailure | None:
    """The first failure of one of NVIDIA's libraries in a text, without the names of hosts and files."""
    found = _FAILURE.search(text)
    return (
        None if found is None else CudaFailure(found["library"], int(found["number"]), found["words"].strip())
    )


def is_out_of_memory(text: str) -> bool:
    """Whether a text complains of too little memory."""
    failure = find_cuda_failure(text)
    if failure is not None and failure.library == "CUDA":
        return failure.number == _MEMORY_NUMBER  # the rest of the line may quote anything
    return _NO_MEMORY.search(text) is not None


def classify_fault(text: str, *, on_gpu: bool) -> Fault:
    """The kind of fault in what onnxruntime raised for a batch; on the CPU no device can be to blame."""
    if is_out_of_memory(text):
        return Fault.OUT_OF_MEMORY
    if not on_gpu:
        return Fault.REFUSED
    failure = find_cuda_failure(text)
    if failure is not None:
        return _classify_cuda_failure(failure)
    return Fault.STICKY if _DEVICE_ERROR.search(text) else Fault.REFUSED


def _classify_cuda_failure(failure: CudaFailure) -> Fault:
    """Whatever is not known to be harmless spoils the process: going on with it would fail for ever."""
    if failure.library != "CUDA":
        return Fault.REFUSED if _REFUSED_NAMES.search(failure.message) else Fault.STICKY
    if failure.number in _GONE_NUMBERS:
        return Fault.GONE
    return Fault.REFUSED if failure.number in _REFUSED_NUMBERS else Fault.STICKY


def shorten_error_text(text: str, limit: int = 300) -> str:
    """The telling part of what onnxruntime raised, in one line, without its codes and hosts' names."""
    failure = find_cuda_failure(text)
    if failure is not None:
        return str(failure)
    line = " ".join(text.split())
    return line.rsplit("[ONNXRuntimeError] : ", 1)[-1][:limit]
