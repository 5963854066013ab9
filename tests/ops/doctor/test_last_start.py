"""What changed since the last good start."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from doctor_hosts import DATA, HostBuilder, linux
from doctor_scenarios import dda
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.engine.device.devices import DeviceState, EffectiveDevice, ReasonCode
from visionedge.engine.device.session import NodePlacement
from visionedge.ops.doctor.checks import CheckResult, CheckState
from visionedge.ops.doctor.facts import DoctorRequest, RunningEngine
from visionedge.ops.doctor.last_start import (
    LAST_START_FILE_NAME,
    LastGoodStart,
    StartHistory,
    gather_start_facts,
)
from visionedge.ops.doctor.report import examine

SECRET = "horse-battery-staple"
DOCUMENT = {
    "cameras": {"dock": {"uri": f"rtsp://me:{SECRET}@192.0.2.5/s"}},
    "http": {"token": f"{SECRET}-token"},
}


def device(effective: EffectiveDevice = "cpu", code: ReasonCode = ReasonCode.NO_GPU_BUILD) -> DeviceState:
    """A device that `auto` led to."""
    return DeviceState("auto", effective, code, "", datetime(2026, 11, 22, tzinfo=UTC))


def start(
    m: HostBuilder,
    document: dict[str, Any] | None = None,
    *,
    local: Config | None = None,
    engine: DeviceState | None = None,
) -> None:
    """A good start on a machine."""
    history = StartHistory(m.root / "data" / LAST_START_FILE_NAME, local)
    config = parse_config(document or {})
    history.log_changes(m.host(), config)
    history.keep(config, engine or device())


def check(m: HostBuilder, **request: Any) -> CheckResult | None:
    """The check of doctor on this machine."""
    found = examine(DoctorRequest("cpu", data=DATA, **request), m.host()).system_checks
    return next((each for each in found if each.name == "last-start"), None)


def running(m: HostBuilder, document: dict[str, Any] | None = None) -> CheckResult | None:
    """The check of doctor in the running module with this configuration."""
    engine = RunningEngine(device(), NodePlacement(1, ()))
    return check(m, config=parse_config(document or {}), running=engine)


@pytest.fixture
def machine(tmp_path: Path) -> HostBuilder:
    """A machine with the CPU package."""
    return linux(tmp_path).cpu_wheel()


def test_before_the_first_good_start_there_is_nothing_to_say(machine: HostBuilder) -> None:
    assert check(machine) is None


def test_a_start_like_the_last_one_changes_nothing(
    machine: HostBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    start(machine)
    start(machine)
    found = check(machine)
    assert found is not None
    assert found.state is CheckState.OK
    assert found.found.startswith("nothing changed since 20")
    assert "changed since" not in caplog.text


def test_the_log_and_doctor_name_what_changed(machine: HostBuilder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    start(dda(machine), DOCUMENT)
    machine.kernel("6.6.100-1.azl3").kernel_driver("580.82.07").cores = 2
    changed = {**DOCUMENT, "inference": {"confidence": 0.5}, "cameras": {"dock": {"uri": "demo:"}}}
    before = "6.6.96.2-2.azl3"
    wanted = (
        f"driver 550.144.03 → 580.82.07; kernel {before} → 6.6.100-1.azl3; cores 4 → 2;"
        " configuration: cameras, inference"
    )
    found = running(machine, changed)
    assert found is not None
    assert found.state is CheckState.INFO
    assert found.found.endswith(f": {wanted}")
    start(machine, changed)
    assert f"): {wanted}" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.packages.update({"nvidia-cudnn-cu12": "9.11.0"}), "cuDNN absent → 9.11.0"),
        (lambda m: m.file("/etc/os-release", 'PRETTY_NAME="Debian 13"\n'), "base absent → Debian 13"),
        (lambda m: m.file("/sys/fs/cgroup/memory.max", f"{1 << 30}\n"), "memory limit absent → 1024 MiB"),
        (lambda m: m.nvidia_nodes("nvidia0"), "GPU devices absent → /dev/nvidia0"),
        (
            lambda m: m.file("/usr/lib/wsl/drivers/nv_dispi.inf_amd64_0a1b/nvml.so"),
            "driver absent → nv_dispi.inf_amd64_0a1b",
        ),
    ],
)
def test_a_change_of_the_machine_is_named(machine: HostBuilder, change: Any, text: str) -> None:
    start(machine.memory())
    change(machine)
    found = check(machine)
    assert found is not None
    assert found.found.endswith(f": {text}")


def test_the_file_has_no_value_of_the_configuration_and_other_hashes_each_time(machine: HostBuilder) -> None:
    path = machine.root / "data" / LAST_START_FILE_NAME
    hashes = set()
    for _ in range(2):
        start(machine, DOCUMENT, local=parse_config(DOCUMENT))
        text = path.read_text()
        assert SECRET not in text
        assert "192.0.2.5" not in text
        hashes |= {json.loads(text)["sections"]["http"], json.loads(text)["local"]["cameras"]}
    assert len(hashes) == 4
    assert path.stat().st_mode & 0o077 == 0


def test_another_secret_is_a_change_of_its_section_only(machine: HostBuilder) -> None:
    start(machine, DOCUMENT)
    found = running(machine, {**DOCUMENT, "http": {"token": "another-token"}})
    assert found is not None
    assert found.found.endswith(": configuration: http")


def test_the_command_compares_the_local_configuration_where_no_argument_changed_it(
    machine: HostBuilder,
) -> None:
    """It does not know the desired properties, which the running module does."""
    local = parse_config({"telemetry": {"mode": "all"}})
    start(machine, DOCUMENT, local=local)
    same, other = check(machine, local=local), check(machine, local=parse_config({}))
    assert same is not None
    assert other is not None
    assert same.state is CheckState.OK
    assert other.found.endswith(": configuration: telemetry")
    start(machine, DOCUMENT, local=None)
    unknown = check(machine, local=parse_config({}))
    assert unknown is not None
    assert unknown.state is CheckState.OK


def test_a_start_that_misses_the_gpu_does_not_replace_the_one_that_had_it(machine: HostBuilder) -> None:
    """What made it disappear stays visible until it is back, or the CPU is requested."""
    lost = device("cpu", ReasonCode.LIBRARY_MISSING)
    start(dda(machine), engine=device("cuda", ReasonCode.OK))
    machine.file("/sys/module/nvidia/version", "")
    machine.file("/proc/driver/nvidia/version", "")
    start(machine, engine=lost)
    found = check(machine)
    assert found is not None
    assert "driver 550.144.03 → absent" in found.found
    start(machine, engine=replace(lost, requested="cpu", code=ReasonCode.CPU_REQUESTED))
    found = check(machine)
    assert found is not None
    assert found.state is CheckState.OK


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"schema": "visionedge/last-good-start/2"}', '{"schema": 1}'],
)
def test_a_file_that_cannot_be_used_is_ignored_and_replaced(machine: HostBuilder, content: str) -> None:
    machine.file(DATA / LAST_START_FILE_NAME, content)
    assert check(machine) is None
    start(machine)
    assert check(machine) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": 1},
        {"facts": []},
        {"facts": {"driver": 5}},
        {"facts": {"driver": "x" * 1000}},
        {"device": "\x1b[2J"},
        {"sections": None},
        {"local": [1]},
    ],
)
def test_a_file_with_wrong_values_is_ignored(machine: HostBuilder, wrong: dict[str, object]) -> None:
    """They would be printed."""
    facts = gather_start_facts(machine.host())
    kept = LastGoodStart("2026-11-20T08:00:00.000Z", "cpu", facts, "", {}, None).document()
    machine.file(DATA / LAST_START_FILE_NAME, json.dumps(kept))
    assert check(machine) is not None
    machine.file(DATA / LAST_START_FILE_NAME, json.dumps(kept | wrong))
    assert check(machine) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, machine: HostBuilder) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()
    history = StartHistory(blocked / LAST_START_FILE_NAME, None)
    history.log_changes(machine.host(), parse_config({}))
    history.keep(parse_config({}), device())
