"""onnxruntime, imported in this one place: quiet, without telemetry, and only when it is needed."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
from typing import Any

from visionedge.errors import UnavailableError
from visionedge.runtime.installation import describe_extra

# Its errors come back as exceptions; what it also writes to native stderr would only repeat them.
_FATAL_ONLY = 4

_GPU_WHEEL = "onnxruntime-gpu"


def import_onnxruntime(log_severity: int = _FATAL_ONLY) -> Any:
    """The onnxruntime module, set up for us; cheap after the first call.

    Raises:
        UnavailableError: it is not installed, or its native part cannot be loaded.
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


def load_cuda_libraries(onnxruntime: Any) -> None:
    """Load CUDA and cuDNN where they came as Python packages; the system's own need no help.

    A library that is missing shows when a session asks for it, so the complaints printed here are dropped.
    """
    if importlib.util.find_spec("nvidia") is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def installed_wheel() -> str:
    """Name and version of onnxruntime's package, which is not imported for that; "" where there is none."""
    for name in (_GPU_WHEEL, "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""


def is_gpu_wheel() -> bool:
    """Whether that package can compute on a GPU, if there should be one."""
    return installed_wheel().startswith(_GPU_WHEEL)
