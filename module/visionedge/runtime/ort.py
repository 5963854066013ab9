"""The only file that imports onnxruntime: on demand, without telemetry, and without messages on stderr."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Mapping
from typing import Any

from visionedge.errors import UnavailableError
from visionedge.runtime.installation import describe_extra

# onnxruntime raises its errors as exceptions and also writes them to stderr, which would repeat them.
_FATAL_ONLY = 4

_GPU_WHEEL = "onnxruntime-gpu"


def import_onnxruntime(log_severity: int = _FATAL_ONLY) -> Any:
    """Return the configured onnxruntime module; cheap after the first call.

    Raises:
        UnavailableError: it is not installed, or its native library cannot be loaded.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read by the wheel while it is imported
    try:
        import onnxruntime
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(
            f"onnxruntime cannot be imported ({reason});"
            f" install {describe_extra('cpu')}, or 'gpu', never both"
        ) from None
    onnxruntime.set_default_logger_severity(log_severity)
    return onnxruntime


def make_session_options(threads: int = 0, settings: Mapping[str, str] | None = None) -> Any:
    """Return options of a session that logs nothing; `threads` 0: one thread per core.

    `settings` are onnxruntime's session configuration entries, by key.
    """
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _FATAL_ONLY
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    return options


def open_cpu_session(graph: bytes, options: Any = None) -> Any:
    """Open a graph on the CPU, with the default `make_session_options` if no options are given.

    Raises what onnxruntime raises.
    """
    options = make_session_options() if options is None else options
    return import_onnxruntime().InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def load_cuda_libraries(onnxruntime: Any) -> None:
    """Load CUDA and cuDNN from Python packages, if they are installed; system libraries need no such step.

    The messages about missing libraries are dropped: a session reports them when it needs them.
    """
    if importlib.util.find_spec("nvidia") is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def installed_wheel() -> str:
    """Return name and version of the onnxruntime package without importing it; "" if there is none."""
    for name in (_GPU_WHEEL, "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""


def is_gpu_wheel() -> bool:
    """Whether the installed package supports GPUs."""
    return installed_wheel().startswith(_GPU_WHEEL)
