"""deploy/fleet: the real script rolls out, stops, goes back and sets cameras, over a stand-in for `az`."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import az_stand_in
from az_stand_in import make_device, matches, run_query, write_hub
from command_line import CommandLine
from repository_paths import REPOSITORY
from visionedge.config.documents import read_configuration
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.iothub.desired_properties import overlay_desired
from visionedge.ops.manifest.lint import lint_manifest

FOLDER = REPOSITORY / "deploy" / "fleet"
SCRIPT = FOLDER / "rollout.sh"
DOCS = (REPOSITORY / "docs" / "fleet.md").read_text(encoding="utf-8")
OLD, NEW = "0.1.0", "0.2.0"
QUICK = ("--hub", "hub", "--interval", "0", "--polls", "5", "--soak", "0")
SECRETS = {
    "CONTAINER_REGISTRY_ADDRESS": "registry.example.com",
    "CONTAINER_REGISTRY_USERNAME": "puller",
    "CONTAINER_REGISTRY_PASSWORD": "s3cret",
    "IOT_HUB_RESOURCE_ID": "/subscriptions/0/resourceGroups/r/providers/Microsoft.Devices/IotHubs/hub",
    "METRICS_ENDPOINT": "https://d.ingest.monitor.azure.com",
    "METRICS_RULE_ID": "dcr-0",
    "METRICS_TENANT_ID": "t",
    "METRICS_CLIENT_ID": "c",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@dataclass(frozen=True)
class Ended:
    """How the script ended."""

    code: int
    out: str
    err: str


class HubWithDevices:
    """Twenty devices: two in ring 0, six in ring 1, twelve in ring 2; and the script."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / "hub.json"
        self._bin = folder / "bin"
        self._bin.mkdir()
        self.program("python3", f'exec {sys.executable} "$@"')
        self.program("az", f'exec {sys.executable} -S -E {az_stand_in.__file__} "$@"')
        write_hub(
            self.path,
            {
                f"edge-{n:02}": make_device("0" if n < 2 else "1" if n < 8 else "2", delay=1)
                for n in range(20)
            },
        )

    def program(self, name: str, text: str | None) -> None:
        """Put a program on the PATH, or take it away."""
        path = self._bin / name
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def hub(self) -> Any:
        """The hub's file."""
        return json.loads(self.path.read_text())

    def change(self, change: Callable[[Any], object]) -> None:
        """Change the hub's file."""
        hub = self.hub
        change(hub)
        self.path.write_text(json.dumps(hub, indent=1))

    def behave(self, *devices: str, **behaviour: Any) -> None:
        """Let devices behave in another way."""

        def change(hub: Any) -> None:
            for device in devices:
                hub["devices"][device]["behaviour"].update(behaviour)

        self.change(change)

    def layer(self, version: str, device: str = "cuda") -> Path:
        """The layered deployment with the image of a version."""
        path = self._folder / f"layer-{version}-{device}.json"
        text = (FOLDER / "vision.layered.json").read_text()
        path.write_text(text.replace("0.2.0-gpu", f"{version}-gpu").replace('"cuda"', f'"{device}"'))
        return path

    def calls(self) -> list[list[str]]:
        """The command lines of `az` so far."""
        return [json.loads(line) for line in Path(f"{self.path}.calls").read_text().splitlines()]

    def __call__(self, *arguments: str | Path) -> Ended:
        """Run the script to its end."""
        environ = {
            "PATH": f"{self._bin}:/usr/bin:/bin",
            "HOME": str(self._folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
            az_stand_in.VARIABLE: str(self.path),
            **SECRETS,
        }
        done = subprocess.run(
            ["bash", str(SCRIPT), *map(str, arguments)],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ended(done.returncode, done.stdout, done.stderr)

    def roll(self, version: str, *more: str) -> Ended:
        """Roll a version out."""
        return self("roll", *QUICK, "--version", version, "--layer", self.layer(version), *more)

    def versions(self) -> dict[str, set[str]]:
        """The versions that the devices of each ring report."""
        found: dict[str, set[str]] = {}
        for device in self.hub["devices"].values():
            running = device["reported"].get("module", {}).get("version", "none")
            found.setdefault(device["tags"]["ring"], set()).add(running)
        return found


@pytest.fixture
def fleet(tmp_path: Path) -> HubWithDevices:
    """A fleet without any deployment."""
    return HubWithDevices(tmp_path)


@pytest.fixture(scope="module")
def _running_hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hub's file of a fleet that runs the old version, made by the script."""
    fleet = HubWithDevices(tmp_path_factory.mktemp("fleet"))
    assert fleet("base", "--hub", "hub").code == 0
    ended = fleet.roll(OLD)
    assert ended.code == 0, ended.err
    return fleet.path.read_text()


@pytest.fixture
def running(fleet: HubWithDevices, _running_hub: str) -> HubWithDevices:
    """A fleet whose devices all run the old version."""
    fleet.path.write_text(_running_hub)
    return fleet


def complaint(ended: Ended) -> str:
    """The only line on stderr."""
    (line,) = ended.err.splitlines()
    return line


# --- the roll-out -------------------------------------------------------------------------------------------


def test_the_script_takes_one_ring_after_the_other(running: HubWithDevices) -> None:
    """Each ring has its own deployment, above those of the version before, and waits for the ring before."""
    ended = running.roll(NEW)
    assert ended.code == 0, ended.err
    assert running.versions() == {"0": {NEW}, "1": {NEW}, "2": {NEW}}
    deployments = running.hub["deployments"]
    assert {f"vision-0-2-0-ring{n}" for n in range(3)} < deployments.keys()
    assert deployments["vision-base"]["priority"] == 1
    assert {d["priority"] for name, d in deployments.items() if "0-1-0" in name} == {10}
    assert {d["priority"] for name, d in deployments.items() if "0-2-0" in name} == {11}
    ends = [ended.out.index(f"ring {n}: {count} of {count} healthy") for n, count in enumerate((2, 6, 12))]
    begins = [ended.out.index(f"--deployment-id vision-0-2-0-ring{n}") for n in range(3)]
    assert sorted([*begins, *ends]) == [begins[0], ends[0], begins[1], ends[1], begins[2], ends[2]]


def test_a_ring_on_the_cpu_stops_the_roll_out_and_names_the_devices(running: HubWithDevices) -> None:
    """cuda was requested; the next ring keeps the version before."""
    running.behave("edge-03", "edge-05", effective="cpu")
    ended = running.roll(NEW)
    assert ended.code == 4
    assert running.versions() == {"0": {NEW}, "1": {NEW}, "2": {OLD}}
    assert ended.err.splitlines() == [
        "  edge-03 computes on cpu, cuda was requested (no-device)",
        "  edge-05 computes on cpu, cuda was requested (no-device)",
        "rollout: stopped in ring 1: 2 devices have a fault (at most 0 may)",
    ]
    assert f"rollout.sh rollback --hub hub --version {NEW}" in ended.out


def test_a_fault_in_one_poll_alone_does_not_stop_the_roll_out(running: HubWithDevices) -> None:
    """A device may need a moment; and a healthy ring is polled again before the next one."""
    running.behave("edge-00", effective="cpu", recovers=1)
    polls = len(module_queries(running))
    ended = running.roll(NEW, "--rings", "0", "--soak", "3")
    assert ended.code == 0, ended.err
    assert "ring 0: 1 of 2 healthy" in ended.out
    healthy = int(re.findall(r"ring 0: 2 of 2 healthy \(poll (\d+)\)", ended.out)[0])
    # One before the deployment, those until the ring is healthy, and three more.
    assert len(module_queries(running)) - polls == 1 + healthy + 3


def module_queries(fleet: HubWithDevices) -> list[list[str]]:
    """The polls of the module twins so far."""
    if not Path(f"{fleet.path}.calls").exists():
        return []
    return [call for call in fleet.calls() if call[1:3] == ["hub", "query"] and "devices.modules" in call[-4]]


def test_known_faults_can_be_tolerated(running: HubWithDevices) -> None:
    """And the share of healthy devices is lowered with them."""
    running.behave("edge-03", effective="cpu")
    assert running.roll(NEW, "--tolerate", "1", "--percent", "80").code == 0


def test_a_device_can_be_demanded_of_all(running: HubWithDevices) -> None:
    """With `device: auto` no device says that a GPU was requested."""
    running.behave("edge-00", effective="cpu")
    layer = running.layer(NEW, "auto")
    ended = running("roll", *QUICK, "--version", NEW, "--layer", layer, "--rings", "0", "--device", "cuda")
    assert ended.code == 4
    assert "edge-00 computes on cpu, not on cuda" in ended.err


def test_a_rejected_section_stops_the_roll_out(running: HubWithDevices) -> None:
    running.behave("edge-01", rejects=["telemetry"])
    ended = running.roll(NEW)
    assert ended.code == 4
    assert "  edge-01 rejects telemetry: telemetry.key: unknown key" in ended.err
    assert running.versions()["1"] == {OLD}


def test_a_section_that_waits_for_the_first_engine_is_no_fault(running: HubWithDevices) -> None:
    """The module reports it as rejected until the engine is there; the device is not healthy meanwhile."""
    twins = json.dumps(
        [
            {
                "deviceId": "a",
                "properties": {
                    "reported": {
                        "module": {"version": NEW},
                        "engine": {"requested": "cuda", "reasonCode": "warming-up"},
                        "config": {
                            "model": {"status": "rejected", "reasons": ["model: not in use yet: loading"]}
                        },
                    }
                },
            }
        ]
    )
    ring, before = running.path.with_name("ring"), running.path.with_name("before")
    ring.write_text("a\n")
    before.write_text("{}")
    judged = subprocess.run(
        [
            *(sys.executable, str(FOLDER / "twins.py"), "judge", "--version", NEW, "--percent", "100"),
            *("--tolerate", "0", "--ring-devices", str(ring), "--before", str(before)),
        ],
        input=twins,
        capture_output=True,
        text=True,
        check=True,
    )
    assert judged.stdout == "waiting 0 1\na has no engine yet\n"


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ({"dead": True}, f"edge-00 reports {OLD}"),
        ({"cameraStates": {"dock": "failed"}}, "edge-00 camera dock is failed and was live before"),
    ],
)
def test_too_few_healthy_devices_stop_the_roll_out(
    running: HubWithDevices, behaviour: dict[str, Any], line: str
) -> None:
    """A device that takes nothing, or loses its cameras, after a bounded number of polls."""
    running.behave("edge-00", **behaviour)
    ended = running.roll(NEW, "--rings", "0")
    assert ended.code == 4
    assert f"  {line}\n" in ended.err
    assert "stopped in ring 0: 1 of 2 devices are healthy after 5 polls; 100 % are needed" in ended.err
    again = running.roll(NEW, "--rings", "0", "--percent", "50")
    assert again.code == 0
    assert "deployment vision-0-2-0-ring0 exists already" in again.out


def test_a_disconnected_device_is_not_healthy(running: HubWithDevices) -> None:
    running.change(lambda hub: hub["devices"]["edge-00"].update(connectionState="Disconnected"))
    ended = running.roll(NEW, "--rings", "0")
    assert ended.code == 4
    assert "edge-00 is disconnected" in ended.err


def test_the_same_version_with_another_content_is_refused(running: HubWithDevices) -> None:
    """The content of a deployment cannot be changed in IoT Hub."""
    layer = running.layer(OLD)
    layer.write_text(layer.read_text().replace('"confidence": 0.4', '"confidence": 0.5'))
    ended = running("roll", *QUICK, "--version", OLD, "--layer", layer)
    assert ended.code == 2
    assert "deployment vision-0-1-0-ring0 exists with other content" in complaint(ended)


def test_roll_back_restores_the_deployments_and_what_runs(running: HubWithDevices) -> None:
    """After a stop: the hub's file is the one before, once the devices have taken it."""
    before = running.hub
    assert running.roll(NEW, "--rings", "0,1").code == 0
    assert running.hub != before
    ended = running("rollback", "--hub", "hub", "--version", NEW)
    assert ended.code == 0, ended.err
    assert "2 deployments are deleted" in ended.out
    for _ in range(3):
        assert running("status", "--hub", "hub", "--rings", "0").code == 0
    assert running.hub == before


def test_roll_back_does_not_take_the_module_away(running: HubWithDevices) -> None:
    """The only version is deleted by --force alone."""
    ended = running("rollback", "--hub", "hub", "--version", OLD)
    assert ended.code == 2
    assert "ring 0 has no other deployment of vision" in complaint(ended)
    assert running("rollback", "--hub", "hub", "--version", OLD, "--force").code == 0
    assert running.hub["deployments"].keys() == {"vision-base"}


def test_the_cameras_of_a_site_survive_a_new_version(running: HubWithDevices) -> None:
    """The layer sets sections beside them."""
    assert running.roll(NEW, "--rings", "0").code == 0
    desired = running.hub["devices"]["edge-00"]["desired"]
    assert desired["cameras"] == {"dock": {"uri": "rtsp://192.0.2.5/stream1"}}
    assert desired["inference"]["device"] == "cuda"
    assert parse_config(desired).inference.device == "cuda"


def test_a_layer_that_replaces_the_twin_is_refused(running: HubWithDevices) -> None:
    layer = json.loads(running.layer(NEW).read_text())
    layer["content"]["modulesContent"]["vision"] = {"properties.desired": {"log": {"level": "info"}}}
    running.layer(NEW).with_name("whole.json").write_text(json.dumps(layer))
    ended = running("roll", *QUICK, "--version", NEW, "--layer", running.layer(NEW).with_name("whole.json"))
    assert ended.code == 2
    assert "deletes the cameras of each device" in complaint(ended)


def test_a_layer_that_may_be_a_mistake_is_a_warning(running: HubWithDevices) -> None:
    """The image of another version, and cameras for all devices."""
    layer = running.layer("0.3.0")
    layer.write_text(layer.read_text().replace("properties.desired.http", "properties.desired.cameras"))
    ended = running("roll", *QUICK, "--version", NEW, "--layer", layer, "--dry-run")
    assert ended.code == 0
    first, second = ended.err.splitlines()
    assert "visionedge:0.3.0-gpu does not name the version 0.2.0" in first
    assert "sets cameras for all devices" in second


# --- what changes nothing -----------------------------------------------------------------------------------


def test_a_dry_run_changes_nothing_and_prints_every_command(running: HubWithDevices) -> None:
    """Those that read are run, so that it knows the rings and the priority."""
    text = running.path.read_text()
    ended = running.roll(NEW, "--dry-run")
    assert ended.code == 0, ended.err
    hub = json.loads(text)
    assert running.hub["deployments"] == hub["deployments"]
    assert running.versions() == {"0": {OLD}, "1": {OLD}, "2": {OLD}}
    printed = [line for line in ended.out.splitlines() if line.startswith("+ az ")]
    assert sum("edge deployment create" in line for line in printed) == 3
    made = [shlex.split(line) for line in printed if "create" in line]
    assert {words[words.index("--priority") + 1] for words in made} == {"11"}
    conditions = [words[words.index("--target-condition") + 1] for words in made]
    assert conditions == ["tags.ring='0'", "tags.ring='1'", "tags.ring='2'"], "a printed line can be pasted"
    assert sum("iot hub query" in line for line in printed) >= 6
    assert len(printed) == 3 + len(running.calls()), (
        "each call is printed, and those that would change something"
    )
    assert {" ".join(call[:4]) for call in running.calls()[-20:]} >= {"iot edge deployment list"}
    assert not [call for call in running.calls() if "0-2-0" in " ".join(call)]


@pytest.mark.parametrize(
    "command", [("base",), ("rollback", "--version", OLD, "--force"), ("tag", "edge-00", "2")]
)
def test_the_other_commands_have_a_dry_run_too(running: HubWithDevices, command: tuple[str, ...]) -> None:
    text = running.path.read_text()
    ended = running(*command, "--hub", "hub", "--dry-run")
    assert ended.code == 0, ended.err
    assert "+ az iot" in ended.out
    assert "s3cret" not in ended.out
    assert running.path.read_text() == text


def test_status_shows_what_an_operator_looks_for(running: HubWithDevices) -> None:
    """Who computes on the CPU, whose cameras are not live, what is rejected, what is disconnected."""
    running.behave("edge-00", effective="cpu", rejects=["http"], cameraStates={"dock": "failed"})
    assert running.roll(NEW, "--rings", "0").code == 4
    ended = running("status", "--hub", "hub", "--rings", "0", "--version", NEW)
    assert ended.code == 0, ended.err
    assert "vision-0-2-0-ring0: priority 11, for tags.ring='0'" in ended.out
    assert (
        "edge-00: 0.2.0; cuda -> cpu; 0 of 1 cameras live; not live: dock failed; rejected: http\n"
        in ended.out
    )
    assert "edge-01: 0.2.0; cuda -> cuda; 1 of 1 cameras live\n" in ended.out
    assert ended.out.endswith("newVersion: 2\nonCpu: 1\nrejected: 1\nnoEngine: 0\n")


# --- errors -------------------------------------------------------------------------------------------------


def test_without_az_the_error_is_one_line(fleet: HubWithDevices) -> None:
    fleet.program("az", None)
    ended = fleet.roll(NEW)
    assert ended.code == 3
    assert complaint(ended) == "rollout: az is missing: install the Azure CLI"


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("loggedIn", "rollout: nobody is logged in: run 'az login'"),
        ("extension", "rollout: the extension azure-iot of az is missing: az extension add --name azure-iot"),
    ],
)
def test_without_a_login_or_the_extension_the_error_is_one_line(
    fleet: HubWithDevices, key: str, line: str
) -> None:
    fleet.change(lambda hub: hub.update({key: False}))
    ended = fleet.roll(NEW)
    assert ended.code == 3
    assert complaint(ended) == line


def test_an_unknown_ring_is_one_line(running: HubWithDevices) -> None:
    """Before anything is changed."""
    ended = running.roll(NEW, "--rings", "0,9")
    assert ended.code == 2
    assert complaint(ended) == "rollout: ring 9 has no devices: no IoT Edge device has tags.ring = '9'"
    assert "vision-0-2-0-ring0" not in running.hub["deployments"]
    ended = running("tag", "edge-00", "9", "--hub", "hub")
    assert ended.code == 2
    assert complaint(ended) == "rollout: unknown ring 9: the rings are 0,1,2 (--rings)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a command"),
        (("fly", "--hub", "hub"), "unknown command fly"),
        (("roll",), "give --hub NAME"),
        (("roll", "--hub", "hub"), "give --version"),
        (("roll", "--hub", "hub", "--fast"), "unknown option --fast"),
        (("roll", "--hub"), "--hub needs a value"),
        (("roll", "--hub", "hub", "--percent", "all"), "--percent: 'all' must be a whole number"),
        (("roll", "--hub", "hub", "--version", "1' OR 1=1"), "a character that is not allowed"),
        (("roll", "--hub", "hub", "--version", NEW, "--layer", "gone.json"), "gone.json: cannot be read"),
        (("rollback", "--hub", "hub", "--version", "9.9"), "no deployment of vision with version 9.9"),
        (("cameras", "edge-00", "--hub", "hub"), "give DEVICE and FILE"),
    ],
)
def test_wrong_arguments_give_a_one_line_error(
    fleet: HubWithDevices, arguments: tuple[str, ...], words: str
) -> None:
    ended = fleet(*arguments)
    assert ended.code == 2
    assert words in complaint(ended)


def test_an_error_of_az_is_one_line_with_the_command(fleet: HubWithDevices) -> None:
    ended = fleet("tag", "nobody", "1", "--hub", "hub")
    assert ended.code == 1
    line = (
        "rollout: az iot hub device-twin update failed: ERROR: ErrorCode:DeviceNotFound;nobody not registered"
    )
    assert complaint(ended) == line


def test_help_has_every_command_option_and_exit_code(fleet: HubWithDevices) -> None:
    ended = fleet("--help")
    assert (ended.code, ended.err) == (0, "")
    script = SCRIPT.read_text()
    commands = set(re.findall(r"^run_(\w+)\(\)", script, re.MULTILINE))
    assert commands == {"base", "tag", "roll", "status", "rollback", "cameras"}
    assert all(f"\n  {command} " in ended.out for command in commands)
    options = set(re.findall(r"--[a-z-]+", script.partition("case $1 in")[2].partition("esac")[0]))
    assert {option for option in options if option not in ended.out} == {"--help"} - {"--help"}
    assert "Exit codes: 0 " in ended.out


# --- cameras ------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(running: HubWithDevices) -> HubWithDevices:
    """A fleet whose operator has `visionedge` at hand."""
    running.program("visionedge", f'exec {sys.executable} -m visionedge "$@"')
    return running


def test_the_cameras_of_a_device_become_those_of_a_file(checked: HubWithDevices, tmp_path: Path) -> None:
    """Cameras and keys that are not in the file are removed; no argument of az has an address."""
    file = tmp_path / "site.yaml"
    file.write_text("cameras:\n  gate: {uri: 'rtsp://192.0.2.7/a', fps: 2}\n")
    ended = checked("cameras", "edge-00", file, "--hub", "hub")
    assert ended.code == 0, ended.err
    assert checked.hub["devices"]["edge-00"]["desired"]["cameras"] == {
        "gate": {"uri": "rtsp://192.0.2.7/a", "fps": 2}
    }
    assert "192.0.2.7" not in ended.out
    assert not [call for call in checked.calls() if "192.0.2.7" in " ".join(call)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cameras: {dock: {uri: 'demo:', fsp: 5}}", "unknown key; did you mean 'fps'?"),
        ("{cameras: {dock: {uri: 'demo:'}}, log: {level: info}}", "must have the key 'cameras' and no other"),
    ],
)
def test_a_wrong_file_of_cameras_changes_nothing(
    checked: HubWithDevices, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    before = checked.hub
    ended = checked("cameras", "edge-00", file, "--hub", "hub")
    assert ended.code == 2
    assert words in ended.err
    assert checked.hub == before


def test_a_variable_in_a_twin_is_refused_because_nothing_replaces_it(
    running: HubWithDevices, tmp_path: Path
) -> None:
    """Before `config check`, which would advise to set the variable."""
    file = tmp_path / "site.json"
    file.write_text(json.dumps({"cameras": {"dock": {"uri": "rtsp://${USER}:${PASSWORD}@192.0.2.5/a"}}}))
    ended = running("cameras", "edge-00", file, "--hub", "hub")
    assert ended.code == 2
    assert "cameras.dock: has ${…}, which a twin does not replace" in ended.err
    desired = {"cameras": {"dock": {"uri": "rtsp://${USER}@192.0.2.5/a"}}}
    assert overlay_desired({}, desired) == desired, "desired properties are not filled from the environment"


def test_a_password_for_the_twin_is_a_warning_that_does_not_show_it(
    running: HubWithDevices, tmp_path: Path
) -> None:
    """And without `visionedge` the script says that it checked nothing."""
    file = tmp_path / "site.json"
    file.write_text(json.dumps({"cameras": {"dock": {"uri": "rtsp://me:t0psecret@192.0.2.5/a"}}}))
    ended = running("cameras", "edge-00", file, "--hub", "hub")
    assert ended.code == 0
    assert "the password of camera dock will be in the module twin" in ended.err
    assert "is not checked" in ended.err
    assert "t0psecret" not in ended.out + ended.err


def test_the_file_on_the_device_keeps_the_password_and_the_twin_changes_the_rest(tmp_path: Path) -> None:
    """As docs/fleet.md says: address from the file, fps from the twin; and a variable, where there is one."""
    section = DOCS.partition("`/etc/visionedge/vision.yaml`")[2]
    text = re.findall(r"(?:^ {8}.*\n)+", section, re.MULTILINE)[0]
    file = tmp_path / "vision.yaml"
    variants: list[tuple[str, dict[str, str]]] = [
        ("s3cret", {}),
        ("${DOCK_PASSWORD}", {"DOCK_PASSWORD": "s3cret"}),
    ]
    for password, environ in variants:
        file.write_text(re.sub(r"^ {8}", "", text, flags=re.MULTILINE).replace("s3cret", password))
        local = read_configuration(file, environ)
        made = parse_config(overlay_desired(local, {"cameras": {"dock": {"fps": 2}}}))
        assert made.cameras["dock"].uri == "rtsp://viewer:s3cret@192.0.2.5/stream1"
        assert made.cameras["dock"].fps == 2


def test_lint_finds_nothing_in_a_layer_with_the_file_of_the_device(visionedge: CommandLine) -> None:
    """With the bind and the variable of docs/fleet.md."""
    (bind,) = re.findall(r"`--bind (\S+)`", DOCS)
    (env,) = re.findall(r'^ +("env": .*)$', DOCS, re.MULTILINE)
    image = ("--image", "registry.example.com/visionedge:0.2.0-gpu", "--gpu", "dda")
    made = visionedge(
        *("manifest", "generate", "--layered", *image, "--bind", bind, "--config", FOLDER / "vision.yaml")
    )
    layer = json.loads(made.out)
    module = layer["content"]["modulesContent"]["$edgeAgent"]["properties.desired.modules.vision"]
    module.update(json.loads(f"{{{env}}}"))
    assert lint_manifest(json.dumps(layer).encode(), "layer.json").findings == ()


# --- the files, the stand-in and the page -------------------------------------------------------------------


def test_the_layer_is_what_generate_makes_of_the_settings(visionedge: CommandLine) -> None:
    """With the command of docs/fleet.md."""
    command = re.sub(r"\\\n\s*", " ", DOCS.partition("## Make the layer")[2]).splitlines()
    (line,) = [line.strip() for line in command if line.startswith("    visionedge manifest generate")]
    words = line.partition(" -o ")[0].split()[1:]
    words[words.index("--config") + 1] = str(FOLDER / "vision.yaml")
    outcome = visionedge(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out == (FOLDER / "vision.layered.json").read_text()


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process."""
    return CommandLine(capsys)


def test_lint_finds_nothing_in_the_layer() -> None:
    report = lint_manifest((FOLDER / "vision.layered.json").read_bytes(), "vision.layered.json")
    assert report.findings == ()
    assert list(report.modules) == ["vision"]


def test_lint_finds_no_error_in_the_filled_base(running: HubWithDevices) -> None:
    """That it has no visionedge is what a base is."""
    content = json.dumps(running.hub["deployments"]["vision-base"]["content"])
    assert "${" not in content
    assert "s3cret" in content
    report = lint_manifest(content.encode(), "base")
    assert [finding.severity for finding in report.findings] == ["note"]
    assert "none of the modules is recognised as visionedge" in report.findings[0].line()


def test_a_missing_value_of_the_base_is_named(fleet: HubWithDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SECRETS, "METRICS_RULE_ID")
    ended = fleet("base", "--hub", "hub")
    assert ended.code == 2
    assert complaint(ended).endswith("set these variables: METRICS_RULE_ID")
    assert "s3cret" not in ended.out + ended.err


def test_the_table_in_the_script_has_every_command_and_parameter_of_the_stand_in() -> None:
    """So what the tests answer is what the table has a source for."""
    rows = re.findall(
        r"^# \| +(az .*?|--.*?) +\|", SCRIPT.read_text().replace("|    --", "| --"), re.MULTILINE
    )
    table: dict[str, set[str]] = {}
    name = ""
    for row in rows:
        words = row.split()
        if words[0] == "az":
            name = " ".join(word for word in words[1:] if not word.startswith("--"))
            table[name] = set()
        table[name] |= {word for word in words if word.startswith("--")}
    wanted = {
        key: {option.rstrip("!") for option in options} for key, options in az_stand_in.COMMANDS.items()
    }
    assert table == wanted


@pytest.mark.parametrize(
    "arguments", [["iot", "edge", "deployment", "show"], ["iot", "hub", "query", "--fast"]]
)
def test_the_stand_in_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    with pytest.raises(az_stand_in.AzError, match=r"misspelled|unrecognized arguments: --fast"):
        az_stand_in.parse(arguments)


def test_a_comparison_with_what_is_not_there_never_holds() -> None:
    """As in IoT Hub: neither `=` nor `!=`."""
    row = {"tags": {"ring": "1"}}
    assert matches("tags.ring = '1' AND (tags.site = 'x' OR tags.ring != '2')", row)
    assert not matches("tags.site != 'x'", row)


def documented_queries() -> list[str]:
    """The queries of docs/fleet.md."""
    return re.findall(r"^\| .* \| `(SELECT .*)` \|$", DOCS, re.MULTILINE)


@pytest.mark.parametrize("text", documented_queries())
def test_every_query_of_the_page_finds_the_device_with_the_problem(text: str) -> None:
    """One device has all of them, the other none."""
    good, bad = make_device("0"), make_device("0", effective="cpu", rejects=["cameras"])
    for device in (good, bad):
        device["image"] = "registry.example.com/visionedge:0.2.0-gpu"
        device["desired"]["inference"] = {"device": "cuda"}
        device["reported"] = az_stand_in.report(device)
    bad["connectionState"] = "Disconnected"
    bad["reported"]["cameras"]["dock"] = "failed"
    bad["reported"]["module"]["version"] = "0.1.0"
    rows = run_query(text, {"devices": {"good": good, "bad": bad}})
    assert [row["deviceId"] for row in rows] == ["bad"]


def test_the_page_has_queries_for_every_section_of_the_configuration() -> None:
    """A query cannot look at all keys of an object; a new section belongs into the metric as well."""
    sections = {str(field.alias) for field in Config.model_fields.values()}
    source = (FOLDER / "twins.py").read_text()
    listed = set(re.findall(r'"(\w+)"', source.partition("SECTIONS = (")[2].partition(")")[0]))
    assert listed == sections
    assert len(documented_queries()) >= 5


def test_the_events_of_the_page_are_those_of_the_messages() -> None:
    """Each code of the table is in docs/messages.md."""
    table = DOCS.partition("## Events and what to do")[2].partition("\n## ")[0]
    codes = {
        code
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", row)
    }
    messages = (REPOSITORY / "docs" / "messages.md").read_text()
    assert len(codes) >= 20
    assert {code for code in codes if f"`{code}`" not in messages} == set()
