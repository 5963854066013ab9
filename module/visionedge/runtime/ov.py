"""The only file that imports OpenVINO: on demand, and without its telemetry."""

import contextlib
import importlib.metadata
import sys
from typing import Any

from visionedge.errors import UnavailableError
from visionedge.runtime.installation import describe_extra

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """Return the module openvino; cheap after the first call, which takes half a second.

    `import openvino` sends an event to Google Analytics through the package openvino-telemetry, and asks in a
    terminal for consent first. Without that package it uses a stub of its own that sends nothing; so the
    package is made impossible to import in this process.

    Raises:
        UnavailableError: it is not installed, or its native library cannot be loaded.
    """
    if _TELEMETRY not in sys.modules:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's own way to forbid an import
    try:
        import openvino
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(
            f"openvino cannot be imported ({reason}); install {describe_extra('openvino')}"
        ) from None
    return openvino


def installed_openvino() -> str:
    """Return name and version of the package openvino without importing it; "" if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"openvino {importlib.metadata.version('openvino')}"
    return ""
