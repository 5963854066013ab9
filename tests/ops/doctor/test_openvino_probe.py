"""The child that asks OpenVINO for its devices, with a scripted package openvino."""

from collections.abc import Callable
from pathlib import Path

import pytest

from visionedge.ops.doctor import probe_child
from visionedge.ops.doctor.host import ProbeResult, run_probe_child

Install = Callable[[str], None]

LISTING = """
class Core:
    available_devices = ["CPU", "GPU"]
    def get_property(self, device, name):
        assert name == "FULL_DEVICE_NAME"
        return {"GPU": "Scripted GPU"}[device]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make the text the source of the package openvino."""

    def write(text: str) -> None:
        (tmp_path / "openvino").mkdir()
        (tmp_path / "openvino/__init__.py").write_text(text)
        (tmp_path / "openvino_telemetry.py").write_text("raise SystemExit('reported')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def ask(limit_s: float = 10, *, installed: bool = True) -> ProbeResult:
    return run_probe_child(
        "openvino", {"nodes": ["/dev/null", "/dev/dri/none"], "installed": installed}, limit_s
    )


def test_nodes_libraries_and_devices_are_reported(install: Install) -> None:
    """A device whose name cannot be read is still listed."""
    install(LISTING)
    answer = ask()
    assert answer.ended == "fine"
    assert answer.step("open")["errors"] == {"/dev/null": None, "/dev/dri/none": "ENOENT"}
    assert {"level-zero", "opencl", "drivers"} <= set(answer.steps)
    assert answer.step("devices")["devices"] == {"CPU": "", "GPU": "Scripted GPU"}


def test_without_the_package_nothing_is_imported(install: Install) -> None:
    install("raise SystemExit('imported')")
    answer = ask(installed=False)
    assert answer.ended == "fine"
    assert "starting" not in answer.steps


def test_openvino_does_not_report_itself_to_its_publisher(install: Install) -> None:
    install(f"try:\n    import openvino_telemetry\nexcept ImportError:\n    pass\n{LISTING}")
    assert "devices" in ask().steps


def test_a_package_that_cannot_be_imported_gives_its_error(install: Install) -> None:
    install("import no_such_library")
    answer = ask()
    assert answer.ended == "fine"
    assert answer.step("package")["error"] == "No module named 'no_such_library'"


def test_a_hanging_driver_is_given_up(install: Install) -> None:
    install("import signal\nwhile True:\n    signal.pause()")
    answer = ask(limit_s=1)
    assert (answer.ended, answer.reason) == ("late", "no answer within 1 s")
    assert "devices" not in answer.steps


def test_a_crashing_driver_ends_only_the_child(install: Install) -> None:
    install("import os\nos.kill(os.getpid(), 11)")
    answer = ask()
    assert (answer.ended, answer.reason) == ("died", "signal 11")
    assert "starting" in answer.steps


def test_a_file_of_the_opencl_loader_names_its_driver_and_its_error(tmp_path: Path) -> None:
    for name, library in (("good", "libc.so.6"), ("bad", "libno-such-driver.so")):
        (tmp_path / f"{name}.icd").write_text(f"{library}\n")
    good = probe_child._opencl_driver(tmp_path / "good.icd")
    bad = probe_child._opencl_driver(tmp_path / "bad.icd")
    assert (good["library"], good["error"]) == ("libc.so.6", None)
    assert "cannot open shared object file" in str(bad["error"])
    assert probe_child._opencl_driver(tmp_path / "none.icd")["error"] == "No such file or directory"
