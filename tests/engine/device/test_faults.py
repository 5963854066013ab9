"""An error of onnxruntime for a batch becomes one kind of fault, according to the reaction."""

import pytest

from visionedge.engine.device.devices import ReasonCode, classify_device_loss
from visionedge.engine.device.faults import (
    FATAL_FAULTS,
    Fault,
    classify_fault,
    find_cuda_failure,
    shorten_error_text,
)

PLACE = (
    "; GPU=0 ; hostname=secret-host ; file=/onnxruntime_src/core/providers/cuda/gpu_data_transfer.cc"
    " ; line=63 ; expr=cudaMemcpyAsync(dst_data, src_data, bytes, cudaMemcpyHostToDevice, stream); "
)


def raised(library: str, number: int, words: str) -> str:
    """As a run raises it: the node's name first, then the failure with its place."""
    return (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'Conv_0'"
        f" Status Message: {library} failure {number}: {words} {PLACE}"
    )


FAILURES = [
    ("CUDA", 2, "out of memory", Fault.OUT_OF_MEMORY),
    ("CUDA", 35, "CUDA driver version is insufficient for CUDA runtime version", Fault.GONE),
    ("CUDA", 46, "all CUDA-capable devices are busy or unavailable", Fault.GONE),
    ("CUDA", 100, "no CUDA-capable device is detected", Fault.GONE),
    ("CUDA", 700, "an illegal memory access was encountered", Fault.STICKY),
    ("CUDA", 702, "the launch timed out and was terminated", Fault.STICKY),
    ("CUDA", 716, "misaligned address", Fault.STICKY),
    ("CUDA", 719, "unspecified launch failure", Fault.STICKY),
    ("CUDA", 999, "unknown error", Fault.STICKY),
    ("CUDA", 214, "uncorrectable ECC error encountered", Fault.STICKY),
    ("CUDA", 1, "invalid argument", Fault.REFUSED),
    ("CUDA", 209, "no kernel image is available for execution on the device", Fault.REFUSED),
    ("CUDNN", 5000, "CUDNN_STATUS_EXECUTION_FAILED", Fault.STICKY),
    ("CUDNN", 8, "CUDNN_STATUS_EXECUTION_FAILED", Fault.STICKY),
    ("CUDNN", 4, "CUDNN_STATUS_INTERNAL_ERROR", Fault.STICKY),
    ("CUDNN", 2, "CUDNN_STATUS_ALLOC_FAILED", Fault.OUT_OF_MEMORY),
    ("CUDNN", 4002, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", Fault.OUT_OF_MEMORY),
    ("CUDNN", 2000, "CUDNN_STATUS_BAD_PARAM", Fault.REFUSED),
    ("CUDNN", 3000, "CUDNN_STATUS_NOT_SUPPORTED", Fault.REFUSED),
    ("CUDNN_FE", 11, "CUDNN_BACKEND_API_FAILED", Fault.STICKY),
    ("CUBLAS", 3, "CUBLAS_STATUS_ALLOC_FAILED", Fault.OUT_OF_MEMORY),
    ("CUBLAS", 13, "CUBLAS_STATUS_EXECUTION_FAILED", Fault.STICKY),
    ("CUBLAS", 7, "CUBLAS_STATUS_INVALID_VALUE", Fault.REFUSED),
    ("CUFFT", 5, "CUFFT_INTERNAL_ERROR", Fault.STICKY),
]
OPENVINO = [  # texts in OpenVINO's plugins (2026.4); those of a GPU were not seen on one
    (f"Exception from src/inference/src/cpp/infer_request.cpp:224:\n{text}\n", fault)
    for text, fault in (
        (
            "[GPU] CL_OUT_OF_RESOURCES exception.\n\tDue to a driver bug, any later call may hang.",
            Fault.STICKY,
        ),
        (
            "[GPU] clWaitForEvents, error code: -14 CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST",
            Fault.STICKY,
        ),
        ("[GPU] clFlush, error code: -36 CL_INVALID_COMMAND_QUEUE", Fault.STICKY),
        ("[GPU] clFlush, error code: -5", Fault.STICKY),
        ("[GPU] clCreateBuffer, error code: -4 CL_MEM_OBJECT_ALLOCATION_FAILURE", Fault.OUT_OF_MEMORY),
        ("[GPU] clCreateBuffer, error code: -6 CL_OUT_OF_HOST_MEMORY", Fault.OUT_OF_MEMORY),
        (
            "Check '!exceed_allocatable_mem_size' failed at src/plugins/intel_gpu/src/runtime/a.cpp:1:"
            "\n[GPU] Exceeded: requested 9 bytes, but max alloc size supported by device is 4 bytes",
            Fault.OUT_OF_MEMORY,
        ),
        ("[GPU] clEnqueue, error code: -2 CL_DEVICE_NOT_AVAILABLE", Fault.GONE),
        ("[GPU] Can't get FULL_DEVICE_NAME property as no supported devices found", Fault.GONE),
        ('Device with "GPU" name is not registered in the OpenVINO Runtime', Fault.GONE),
        ("[GPU] clBuildProgram, error code: -11 CL_BUILD_PROGRAM_FAILURE", Fault.REFUSED),
        ("[GPU] clSetKernelArg, error code: -51 CL_INVALID_ARG_SIZE", Fault.REFUSED),
        ("Shapes [?,3549,85] and [?,500,4] are not consistent", Fault.REFUSED),
    )
]
OTHERS = [
    ("[ONNXRuntimeError] : 1 : FAIL : TensorRT EP execution context enqueue failed.", Fault.STICKY),
    (
        "[ONNXRuntimeError] : 11 : EP_FAIL : Non-zero status code returned while running TRTKernel",
        Fault.STICKY,
    ),
    ("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access)", Fault.STICKY),
    ("CUDA error executing cudaMemcpy(dst_data, src_data, bytes, cudaMemcpyHostToDevice)", Fault.STICKY),
    ("CUDNN error executing cudnnConvolutionForward(s_.handle, &alpha)", Fault.STICKY),
    (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 AllocateRawInternal"
        " Failed to allocate memory for requested buffer of size 4294967296",
        Fault.OUT_OF_MEMORY,
    ),
    ("BFCArena: Available memory of 128 is smaller than requested bytes of 4096", Fault.OUT_OF_MEMORY),
    ("TensorRT: Requested amount of GPU memory (1073741824 bytes): out of memory", Fault.OUT_OF_MEMORY),
    ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input", Fault.REFUSED),
    *OPENVINO,
    (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node",
        Fault.REFUSED,
    ),
    ("", Fault.REFUSED),
]


@pytest.mark.parametrize(("library", "number", "words", "fault"), FAILURES)
def test_a_failure_of_an_nvidia_library_becomes_its_kind(
    library: str, number: int, words: str, fault: Fault
) -> None:
    """The message is one line without names of hosts and files."""
    text = raised(library, number, words)
    assert classify_fault(text, on_gpu=True) is fault
    assert shorten_error_text(text) == str(find_cuda_failure(text)) == f"{library} failure {number}: {words}"


@pytest.mark.parametrize(("text", "fault"), OTHERS)
def test_other_error_texts_become_their_kind(text: str, fault: Fault) -> None:
    assert classify_fault(text, on_gpu=True) is fault
    assert "ONNXRuntimeError" not in shorten_error_text(text)


def test_on_the_cpu_no_device_is_blamed() -> None:
    """With any error text the next batch may be computed; only memory can be short there too."""
    kinds = {
        classify_fault(raised(library, number, words), on_gpu=False) for library, number, words, _ in FAILURES
    }
    kinds |= {classify_fault(text, on_gpu=False) for text, _ in OTHERS}
    assert kinds == {Fault.REFUSED, Fault.OUT_OF_MEMORY}
    assert classify_fault("std::bad_alloc", on_gpu=False) is Fault.OUT_OF_MEMORY


def test_a_cuda_failure_is_classified_by_its_number_and_not_by_its_location() -> None:
    text = raised("CUDA", 700, "an illegal memory access was encountered") + "msg=out of memory"
    assert classify_fault(text, on_gpu=True) is Fault.STICKY


def test_the_kinds_that_end_the_use_of_a_process_are_known() -> None:
    assert set(Fault) - {Fault.REFUSED, Fault.OUT_OF_MEMORY, Fault.REPLICA_FAILED} == FATAL_FAULTS


@pytest.mark.parametrize(
    ("fault", "words", "code"),
    [
        (Fault.STICKY, "CUDA failure 700: an illegal memory access was encountered", ReasonCode.CUDA_ERROR),
        (Fault.GONE, "CUDA failure 100: no CUDA-capable device is detected", ReasonCode.NO_DEVICE),
        (Fault.GONE, "CUDA failure 35: CUDA driver version is insufficient", ReasonCode.DRIVER_TOO_OLD),
        (Fault.STICKY, "CUDNN failure 2000: CUDNN_STATUS_EXECUTION_FAILED", ReasonCode.CUDA_ERROR),
        (Fault.STICKY, "1 : FAIL : TensorRT EP execution context enqueue failed.", ReasonCode.DEVICE_FAILED),
        (Fault.REFUSED, "9 : NOT_IMPLEMENTED : no kernel", ReasonCode.DEVICE_FAILED),
        (Fault.OUT_OF_MEMORY, "CUDA failure 2: out of memory", ReasonCode.OUT_OF_MEMORY),
        (Fault.HANG, "gave no answer within 30 s", ReasonCode.RUN_TIMEOUT),
        (Fault.DIED, "died of signal 11 (SIGSEGV)", ReasonCode.ENGINE_DIED),
        (Fault.INVALID_OUTPUT, "3 of 300 rows are no numbers", ReasonCode.INVALID_OUTPUT),
    ],
)
def test_a_device_that_was_lost_gets_a_reason_code(fault: Fault, words: str, code: ReasonCode) -> None:
    """From the same list as a device that never started."""
    verdict = classify_device_loss(fault, words)
    assert (verdict.code, verdict.reason) == (code, words)
