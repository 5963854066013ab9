"""The set-up of `make run` and `make test`: the chosen extra, and when nothing is to do."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import gpu_present
import prepare
from repository_paths import REPOSITORY


@dataclass
class FakeCudaDriver:
    """A fake libcuda with given answers."""

    initialised: int = 0
    version: int = 12080
    capabilities: tuple[tuple[int, int], ...] = ((7, 5),)

    def cuInit(self, _flags: int) -> int:
        return self.initialised

    def cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = self.version

    def cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(self.capabilities)

    def cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        value._obj.value = self.capabilities[device.value][attribute - 75]


@pytest.mark.parametrize(
    ("driver", "usable", "reason"),
    [
        (FakeCudaDriver(), True, "1 NVIDIA device(s) found"),
        (FakeCudaDriver(capabilities=((5, 2), (8, 6))), True, "2 NVIDIA device(s) found"),
        (None, False, "no NVIDIA driver here"),
        (FakeCudaDriver(initialised=100), False, "cuInit answered 100"),
        (FakeCudaDriver(version=11040), False, "speaks CUDA 11.4"),
        (FakeCudaDriver(capabilities=()), False, "found: none"),
        (FakeCudaDriver(capabilities=((5, 2),)), False, "found: 5.2"),
    ],
)
def test_a_device_is_usable_if_driver_and_device_are_new_enough(
    driver: FakeCudaDriver | None, usable: bool, reason: str
) -> None:
    answer, said = gpu_present.judge(driver)
    assert answer is usable
    assert reason in said


def test_a_driver_that_does_not_answer_counts_as_missing() -> None:
    assert gpu_present.usable_device(time_limit_s=0.0)[0] is False


def test_the_named_extra_wins_and_a_wrong_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_EXTRA", "gpu")
    assert prepare.chosen_extra()[0] == "gpu"
    monkeypatch.setenv("VISIONEDGE_EXTRA", "both")
    with pytest.raises(prepare.SetupError, match="make it cpu or gpu"):
        prepare.chosen_extra()


def test_packages_of_only_the_other_extra_are_its_onnxruntime_and_libraries() -> None:
    cpu, gpu = prepare.locked_names("cpu"), prepare.locked_names("gpu")
    assert cpu - gpu == {"onnxruntime"}
    assert all(name == "onnxruntime-gpu" or name.startswith("nvidia-") for name in gpu - cpu)


def test_a_changed_lock_extra_or_kind_requires_a_new_set_up() -> None:
    digests = {
        prepare.digest(kind, extra, with_av=with_av, with_openvino=with_openvino)
        for kind in prepare.KINDS
        for extra in prepare.EXTRAS
        for with_av in (True, False)
        for with_openvino in (True, False)
    }
    assert len(digests) == 16


@dataclass
class FakeSetUp:
    """A set-up without pip; it records installed and removed packages."""

    installed: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)

    def install(self, what: str, *arguments: str | Path) -> None:
        self.steps.append(what)
        if "dev-" in what or prepare.AV_LOCK in arguments:
            self.installed.add("av")
        if prepare.OPENVINO_LOCK in arguments:
            assert "--no-deps" in arguments, "its telemetry stays away"
            self.installed.add("openvino")

    def pip(self, arguments: list[str]) -> None:
        self.steps.append(" ".join(arguments))
        self.installed -= set(arguments)


@pytest.fixture
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSetUp:
    noted = FakeSetUp()
    monkeypatch.setattr(prepare, "VENV", tmp_path)
    monkeypatch.setattr(prepare, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(prepare, "working", lambda: True)
    monkeypatch.setattr(prepare, "make_venv", lambda: None)
    monkeypatch.setattr(prepare, "installed_names", lambda: noted.installed)
    monkeypatch.setattr(prepare, "install", noted.install)
    monkeypatch.setattr(prepare, "run_pip", noted.pip)
    monkeypatch.setenv("VISIONEDGE_EXTRA", "cpu")
    monkeypatch.delenv("VISIONEDGE_WITH_AV", raising=False)
    monkeypatch.delenv("WITH_PYAV", raising=False)
    monkeypatch.delenv("VISIONEDGE_WITH_OPENVINO", raising=False)
    monkeypatch.delenv("WITH_OPENVINO", raising=False)
    return noted


@pytest.mark.parametrize("before", [[], ["dev"], ["run"]])
def test_run_installs_pyav_in_every_existing_environment(set_up: FakeSetUp, before: list[str]) -> None:
    """As the images do; the second time nothing is to be done."""
    for kind in before:
        prepare.prepare(kind)
    prepare.prepare("run")
    assert "av" in set_up.installed
    set_up.steps.clear()
    prepare.prepare("run")
    assert set_up.steps == []


@pytest.mark.parametrize("variable", ["VISIONEDGE_WITH_AV", "WITH_PYAV"])
def test_pyav_can_be_excluded_and_is_then_removed(
    set_up: FakeSetUp, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Its wheel carries GPL code. `make test` needs it again and gets it."""
    prepare.prepare("dev")
    monkeypatch.setenv(variable, "0")
    prepare.prepare("run")
    assert set_up.installed == {"openvino"}
    prepare.prepare("dev")
    assert set_up.installed == {"av", "openvino"}


def test_openvino_is_installed_for_the_tests_and_for_run_on_request(
    set_up: FakeSetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` leaves one alone that is there, and installs nothing twice."""
    prepare.prepare("run")
    assert "openvino" not in set_up.installed
    monkeypatch.setenv("VISIONEDGE_WITH_OPENVINO", "1")
    prepare.prepare("run")
    assert "openvino" in set_up.installed
    monkeypatch.delenv("VISIONEDGE_WITH_OPENVINO")
    prepare.prepare("dev")
    set_up.steps.clear()
    prepare.prepare("run")
    assert set_up.steps == []
    assert "openvino" in set_up.installed
    monkeypatch.setenv("VISIONEDGE_WITH_OPENVINO", "yes")
    with pytest.raises(prepare.SetupError, match="make it 1"):
        prepare.prepare("run")


def test_a_wrong_value_for_pyav_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_WITH_AV", "no")
    with pytest.raises(prepare.SetupError, match="make it 0"):
        prepare.av_is_wanted()


@pytest.mark.usefixtures("set_up")
def test_run_prints_the_path_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time, on stderr: docs call it `visionedge`."""
    monkeypatch.setattr(prepare, "VENV", prepare.ROOT / ".venv")
    assert prepare.main(["run"]) == 0
    output = capsys.readouterr()
    assert ".venv/bin/visionedge; `source .venv/bin/activate` makes it `visionedge`" in output.err
    assert output.out == ""


def test_installed_packages_are_read_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("onnxruntime_gpu-1.26.0.dist-info", "PySocks-1.7.1.dist-info", "nvidia"):
        (tmp_path / "lib" / "python3.11" / "site-packages" / folder).mkdir(parents=True)
    monkeypatch.setattr(prepare, "VENV", tmp_path)
    assert prepare.installed_names() == {"onnxruntime-gpu", "pysocks"}


def test_an_environment_without_its_interpreter_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "VENV", tmp_path)
    assert not prepare.working()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "gone")
    assert not prepare.working()
    (tmp_path / "bin" / "python").unlink()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert prepare.working()


def test_pip_gets_the_users_mirror_and_no_conflicting_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CERT", "/etc/ssl/own.pem")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = prepare.pip_environment()
    assert environment["PIP_CERT"] == "/etc/ssl/own.pem"
    assert not {"PIP_TARGET", "PYTHONPATH"} & environment.keys()


def test_only_large_downloads_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    prepare.show("  Downloading onnxruntime_gpu-1.26.0-cp311-cp311-manylinux_2_28_x86_64.whl (290.1 MB)\n")
    prepare.show("  Downloading yarl-1.25.1-cp311-cp311-manylinux_2_28_x86_64.whl (0.1 MB)\n")
    prepare.show("Collecting yarl==1.25.1\n")
    assert capsys.readouterr().err == "visionedge:   downloading onnxruntime-gpu, 290 MB\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("verb", ["run", "test"])
def test_a_python_that_is_too_old_gives_a_one_line_error_with_the_remedy(verb: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ended = subprocess.run(
        ["make", verb, "PYTHON=false"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    ours, *makes = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert ours.startswith("visionedge needs Python 3.11 or newer")
    assert all(line.startswith("make") for line in makes)
