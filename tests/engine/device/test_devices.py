"""Devices: the error of a provider becomes one reason, and the displayed device is the real one."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from visionedge.engine.device import devices
from visionedge.engine.device.devices import (
    PROVIDERS,
    REMEDIES,
    DeviceState,
    ProbeOutput,
    ReasonCode,
    classify_provider_error,
    device_preference,
    find_remedy,
    get_effective_device,
    may_have_intel_gpu,
    probe_device,
    run_probe,
)
from visionedge.engine.device.session import (
    KNOWN_OPTIONS,
    check_provider_options,
    find_options,
    list_provider_configs,
)
from visionedge.runtime.ov import installed_openvino

# What onnxruntime-gpu 1.26.0 really wrote, on machines without a GPU and with a scripted driver.
NO_CUBLAS = (
    "\x1b[1;31m2026-11-22 13:35:22.49 [E:onnxruntime:Default, provider_bridge_ort.cc:2369 "
    "TryGetProviderInfo_CUDA] [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/x/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open shared "
    "object file: No such file or directory\n\x1b[m\n"
    "[W:onnxruntime:Default] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 12.*."
)
NO_LIBCUDA = (
    "Failed to load library /x/libonnxruntime_providers_cuda.so with error: libcuda.so.1: cannot open shared "
    "object file: No such file or directory"
)


def cuda_failure(number: int, text: str) -> str:
    return (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:114 std::conditional_t<THRW, void, "
        f"onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, int) CUDA failure {number}: {text} ; "
        "GPU=-1 ; hostname=vm ; file=/onnxruntime_src/cuda_execution_provider.cc ; line=280 ; "
        "expr=cudaSetDevice(device_id_);"
    )


COMPLAINTS = [
    (NO_CUBLAS, ReasonCode.LIBRARY_MISSING, "libcublasLt.so.12 is missing"),
    (NO_LIBCUDA, ReasonCode.DRIVER_MISSING, "libcuda.so.1, the NVIDIA driver, is missing"),
    (
        "Please install TensorRT libraries as …",
        ReasonCode.LIBRARY_MISSING,
        "the libraries of TensorRT are missing",
    ),
    (
        "first\nsomething quite new\n",
        ReasonCode.PROVIDER_REFUSED,
        "the provider refused: something quite new",
    ),
    ("", ReasonCode.PROVIDER_REFUSED, "the provider refused: it gave no reason"),
]
CUDA_FAILURES = [
    (100, "no CUDA-capable device is detected", ReasonCode.NO_DEVICE),
    (35, "CUDA driver version is insufficient for CUDA runtime version", ReasonCode.DRIVER_TOO_OLD),
    (803, "system has unsupported display driver / cuda driver combination", ReasonCode.DRIVER_MISMATCH),
    (209, "no kernel image is available for execution on the device", ReasonCode.DEVICE_UNSUPPORTED),
    (2, "out of memory", ReasonCode.OUT_OF_MEMORY),
    (999, "unknown error", ReasonCode.CUDA_ERROR),
]


@pytest.mark.parametrize(("text", "code", "words"), COMPLAINTS)
def test_a_real_error_text_becomes_its_reason(text: str, code: ReasonCode, words: str) -> None:
    verdict = classify_provider_error(text, driver_present=True)
    assert (verdict.code, verdict.reason) == (code, words)


@pytest.mark.parametrize(("number", "text", "code"), CUDA_FAILURES)
def test_a_failure_of_cuda_becomes_its_reason(number: int, text: str, code: ReasonCode) -> None:
    """In its own words, without paths of a build machine or names of hosts."""
    verdict = classify_provider_error(cuda_failure(number, text), driver_present=True)
    assert (verdict.code, verdict.reason) == (code, f"CUDA failure {number}: {text}")


def test_an_insufficient_driver_without_any_driver_is_a_missing_driver() -> None:
    """CUDA reports the same error for an old driver and for a missing one."""
    text = cuda_failure(35, "CUDA driver version is insufficient for CUDA runtime version")
    assert classify_provider_error(text, driver_present=False).code is ReasonCode.DRIVER_MISSING


CUDA = PROVIDERS["cuda"]


def scripted(exit_code: int | None, stderr: str = "", **document: object) -> ProbeOutput:
    return ProbeOutput(exit_code, json.dumps(document) if document else "", stderr)


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (scripted(0, providers=[CUDA, "CPUExecutionProvider"], error=""), ReasonCode.OK),
        (scripted(0, NO_CUBLAS, providers=["CPUExecutionProvider"], error=""), ReasonCode.LIBRARY_MISSING),
        (scripted(0, providers=[], error=cuda_failure(100, "no device")), ReasonCode.NO_DEVICE),
        (scripted(0, providers=[CUDA], error=cuda_failure(209, "no kernel")), ReasonCode.DEVICE_UNSUPPORTED),
        (scripted(None), ReasonCode.PROBE_TIMEOUT),
        (scripted(-11), ReasonCode.PROBE_CRASHED),
        (scripted(1, "ImportError: libfoo.so.1: cannot open shared object file"), ReasonCode.LIBRARY_MISSING),
        (ProbeOutput(0, "no JSON", ""), ReasonCode.PROVIDER_REFUSED),
    ],
)
def test_the_output_of_a_probe_is_read(output: ProbeOutput, code: ReasonCode) -> None:
    """Also a session that comes up and then cannot compute, a child that hangs, and one that dies."""
    verdict = probe_device("cuda", run=lambda _provider, _timeout: output, driver_present=lambda: True)
    assert verdict.code is code


NO_INTEL_GPU = (
    "Exception from src/inference/src/cpp/core.cpp:117:\n"
    "Exception from src/inference/src/dev/plugin.cpp:112:\n"
    "Check '!m_device_map.empty()' failed at src/plugins/intel_gpu/src/plugin/plugin.cpp:559:\n"
    "[GPU] Can't get PERFORMANCE_HINT property as no supported devices found or an error happened.\n\n\n"
)
"""As OpenVINO 2026.4 raises it on a machine without a GPU."""


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        (scripted(0, providers=["openvino-gpu"], error=""), ReasonCode.OK, "usable"),
        (
            scripted(0, providers=[], error=NO_INTEL_GPU),
            ReasonCode.NO_DEVICE,
            "OpenVINO lists no GPU",
        ),
        (
            scripted(0, providers=[], error="libOpenCL.so.1: cannot open shared object file"),
            ReasonCode.LIBRARY_MISSING,
            "libOpenCL.so.1 is missing",
        ),
        (
            scripted(0, providers=[], error="[GPU] clCreateContext, error code: -6 CL_OUT_OF_HOST_MEMORY"),
            ReasonCode.OUT_OF_MEMORY,
            "[GPU] clCreateContext, error code: -6 CL_OUT_OF_HOST_MEMORY",
        ),
        (
            scripted(
                0, providers=[], error="Exception from src/a.cpp:1:\n[GPU] ProgramBuilder build failed!"
            ),
            ReasonCode.PROVIDER_REFUSED,
            "OpenVINO refused: [GPU] ProgramBuilder build failed!",
        ),
        (scripted(None), ReasonCode.PROBE_TIMEOUT, "a first session did not start within 60 s"),
        (scripted(-11), ReasonCode.PROBE_CRASHED, "a first session died of signal 11"),
        (
            scripted(1, "ImportError: libze.so.1: cannot open shared object file"),
            ReasonCode.LIBRARY_MISSING,
            "libze.so.1 is missing",
        ),
    ],
)
def test_a_probe_of_an_intel_gpu_has_its_own_reasons(
    output: ProbeOutput, code: ReasonCode, words: str
) -> None:
    """None of them names CUDA."""
    verdict = probe_device("openvino-gpu", run=lambda _provider, _timeout: output)
    assert (verdict.code, verdict.reason) == (code, words)


@pytest.mark.skipif(not installed_openvino(), reason="the package openvino is not here")
def test_a_real_probe_of_an_intel_gpu_gives_a_verdict() -> None:
    assert probe_device("openvino-gpu").code in (ReasonCode.OK, ReasonCode.NO_DEVICE)


def test_an_intel_gpu_is_tried_only_where_there_may_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "installed_openvino", lambda: "openvino 1")
    assert not may_have_intel_gpu(tmp_path)
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "renderD128").touch()
    assert may_have_intel_gpu(tmp_path)
    (tmp_path / "dri" / "renderD128").rename(tmp_path / "dxg")
    assert may_have_intel_gpu(tmp_path)
    monkeypatch.setattr(devices, "installed_openvino", lambda: "")
    assert not may_have_intel_gpu(tmp_path)
    assert device_preference("auto", lambda: True) == ("cuda", "openvino-gpu", "cpu")
    assert device_preference("cuda", lambda: True) == ("cuda", "cpu")
    assert device_preference("openvino-gpu", lambda: False) == ("openvino-gpu", "cpu")


def test_a_real_probe_of_the_cpu_succeeds() -> None:
    output = run_probe(PROVIDERS["cpu"], 60)
    assert output.exit_code == 0
    assert json.loads(output.stdout) == {"providers": ["CPUExecutionProvider"], "error": ""}


def test_a_probe_that_takes_too_long_is_killed() -> None:
    assert run_probe(PROVIDERS["cpu"], 0.001).exit_code is None


def state(requested: str, effective: str, code: ReasonCode, reason: str = "why") -> DeviceState:
    utc = datetime(2026, 11, 22, tzinfo=UTC)
    return DeviceState(requested, effective, code, reason, utc)  # type: ignore[arg-type]  # words of the closed lists


def test_one_line_has_requested_effective_and_reason() -> None:
    missing = state("auto", "cpu", ReasonCode.LIBRARY_MISSING, "libcublasLt.so.12 is missing")
    assert missing.describe() == (
        "requested auto, effective cpu: libcublasLt.so.12 is missing (library-missing)"
    )
    assert state("auto", "cuda", ReasonCode.OK).describe() == "requested auto, effective cuda"


@pytest.mark.parametrize(
    ("requested", "code", "degraded"),
    [
        ("auto", ReasonCode.OK, False),
        ("cpu", ReasonCode.CPU_REQUESTED, False),
        ("auto", ReasonCode.NO_GPU_BUILD, False),  # a CPU image on a CPU: nothing is missing
        ("cuda", ReasonCode.NO_GPU_BUILD, True),
        ("auto", ReasonCode.DRIVER_MISSING, True),
        ("cuda", ReasonCode.NO_DEVICE, True),
        ("openvino-gpu", ReasonCode.NO_GPU_BUILD, True),
        ("cpu", ReasonCode.RUNTIME_MISSING, True),
        ("cpu", ReasonCode.RUNTIME_REFUSED, True),
    ],
)
def test_a_lesser_device_than_requested_is_degraded(requested: str, code: ReasonCode, degraded: bool) -> None:
    assert state(requested, "cpu", code).degraded is degraded


def test_the_effective_device_is_the_first_provider_of_a_session() -> None:
    tensorrt, cuda, cpu = PROVIDERS["tensorrt"], PROVIDERS["cuda"], PROVIDERS["cpu"]
    assert get_effective_device([cuda, cpu]) == "cuda"
    assert get_effective_device([tensorrt, cuda, cpu]) == "tensorrt"
    assert get_effective_device([cpu]) == "cpu"


def test_tensorrt_is_tried_only_if_requested() -> None:
    assert [device_preference(r, lambda: False) for r in ("auto", "cuda", "cpu")] == [
        ("cuda", "cpu"),
        ("cuda", "cpu"),
        ("cpu",),
    ]
    assert device_preference("tensorrt") == ("tensorrt", "cuda", "cpu")


def test_every_passed_option_is_known_and_a_string() -> None:
    """A misspelt option raises only where CUDA really loads, so it is caught here."""
    for choice in (
        *(
            config
            for options in find_options("cuda", "onnxruntime")
            for config in list_provider_configs("cuda", b"", max_batch=8, data=None, options=options)
        ),
        *list_provider_configs("cpu", b"", max_batch=8, data=None),
    ):
        for device, options in choice.options.items():
            assert set(options) <= KNOWN_OPTIONS[PROVIDERS[device]]
            assert all(isinstance(value, str) for value in options.values())
    with pytest.raises(ValueError, match="arena_extend_stratgy"):
        check_provider_options(PROVIDERS["cuda"], {"arena_extend_stratgy": "kSameAsRequested"})


def test_every_reason_that_can_stop_a_demanded_device_has_a_remedy() -> None:
    assert set(REMEDIES) >= set(ReasonCode) - {ReasonCode.OK, ReasonCode.CPU_REQUESTED}
    for code in REMEDIES:
        words = find_remedy("openvino-gpu", code)
        assert code in (ReasonCode.DRIVER_MISSING, ReasonCode.DRIVER_TOO_OLD) or "NVIDIA" not in words
