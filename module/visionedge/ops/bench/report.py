"""What the reports of all loads share: the machine they were made on, and the file they go to."""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from visionedge import __version__
from visionedge.engine.device.devices import DeviceState
from visionedge.engine.plan import processor
from visionedge.errors import ConfigError, SourceError
from visionedge.frames.types import utc_now, utc_text
from visionedge.ops.bench.fingerprint import fingerprint
from visionedge.runtime.process_limits import usable_cores

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "opencv-python-headless", "av", "numpy")


def machine(device: DeviceState | None = None) -> dict[str, Any]:
    """What was measured on: figures of unlike machines must not be compared. `device` where one was used."""
    return {
        "measuredAt": utc_text(utc_now()),
        "visionedge": __version__,
        "python": platform.python_version(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "usableCores": usable_cores(),
        **fingerprint(),
        "loadAverage": round(os.getloadavg()[0], 2),
        **({} if device is None else {"effectiveDevice": device.effective}),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cameras_in_words(number: int) -> str:
    """1 camera, 2 cameras."""
    return f"{number} camera{'' if number == 1 else 's'}"


def read_report(path: Path) -> dict[str, Any]:
    """A report that was written by `write_json`.

    Raises:
        ConfigError: it cannot be read, or is no report.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    except ValueError:
        document = None
    if not isinstance(document, dict) or not str(document.get("schema", "")).startswith("visionedge/bench-"):
        raise ConfigError([f"{path} is no report of visionedge bench; make one with --json"])
    return document


def write_json(report: dict[str, Any], path: Path) -> None:
    """The report as a file, or on stdout for ``-``.

    Raises:
        SourceError: it cannot be written.
    """
    write_text(json.dumps(report, indent=2) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """A report as a file, or on stdout for ``-``.

    Raises:
        SourceError: it cannot be written.
    """
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
