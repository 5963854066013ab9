"""OpenVINO sends nothing: its package for that is never imported, and it is imported only if it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

from visionedge.errors import UnavailableError
from visionedge.runtime import ov

needs_openvino = pytest.mark.skipif(not ov.installed_openvino(), reason="the package openvino is not here")


def run_python(code: str, *folders: Path) -> str:
    """What a fresh interpreter prints, with `folders` in front of its path."""
    lines = ["import sys", *(f"sys.path.insert(0, {str(folder)!r})" for folder in folders), code]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


@pytest.fixture
def telemetry(tmp_path: Path) -> Path:
    """A folder with a package openvino_telemetry that prints that it is imported."""
    package = tmp_path / "openvino_telemetry"
    package.mkdir()
    (package / "__init__.py").write_text("print('telemetry')\nraise ImportError\n")
    return tmp_path


@needs_openvino
def test_openvino_is_imported_without_its_telemetry(telemetry: Path) -> None:
    """By itself it imports the package, which sends an event to Google Analytics for each process."""
    assert "telemetry" in run_python("import openvino", telemetry)
    code = "from visionedge.runtime.ov import import_openvino\nprint(import_openvino().__name__)"
    assert run_python(code, telemetry, Path(ov.__file__).parents[2]) == "openvino\n"


def test_the_engine_imports_no_openvino_before_it_is_used() -> None:
    code = (
        "import visionedge.engine.process.server, visionedge.engine.device.backend as backend\n"
        "backend.find_runtimes('cpu'), backend.find_precisions('cpu', 'openvino')\n"
        "print('openvino' in sys.modules)"
    )
    assert run_python(code, Path(ov.__file__).parents[2]) == "False\n"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match="install the extra 'openvino'"):
        ov.import_openvino()
