"""Manifests with one mistake each, as people make them, and valid ones that look unusual: what lint says."""

from pathlib import Path

import pytest

from manifests import fresh_known_secrets
from visionedge.cli.run import add_parser as add_run_parser
from visionedge.ops.manifest.container import COMMAND
from visionedge.ops.manifest.lint import lint_manifest

__all__ = ["fresh_known_secrets"]

FOLDER = Path(__file__).resolve().parents[2] / "data" / "manifests"

HOST = "createOptions.HostConfig"
SEEDS: dict[str, tuple[str, str, str]] = {
    # name of the file: severity, end of the path, words of the finding
    "another-module-memory-text": ("error", f"press.settings.{HOST}.Memory", "a whole number"),
    "budget-millions": ("warning", "maxPerDay", "13 of S1, 1 of S2"),
    "camera-localhost": ("warning", ".uri", "the container itself"),
    "camera-loopback": ("warning", ".uri", "the container itself"),
    "camera-loopback-v6": ("warning", ".uri", "the container itself"),
    "camera-placeholder": ("warning", ".uri", "still to be filled in"),
    "cap-drop-misspelt": ("warning", f"{HOST}.CapDorp", "did you mean 'CapDrop'?"),
    "cap-drop-text": ("error", f"{HOST}.CapDrop", "a list of strings"),
    "capabilities-flat": ("error", "DeviceRequests[0].Capabilities", '[["gpu"]]'),
    "capitals": ("error", "settings.image", "write visionedge"),
    "cmd-doctor": ("error", "createOptions.Cmd", "'doctor' is not the command run"),
    "cmd-start": ("error", "createOptions.Cmd", "'start' is not the command run"),
    "count-all": ("error", "DeviceRequests[0].Count", "write -1 for all"),
    "credentials-elsewhere": ("warning", "settings.image", "the credentials are for other.azurecr.io"),
    "credentials-placeholder": ("error", "mine.password", "still to be filled in"),
    "data-folder-of-the-host": ("note", f"{HOST}.Binds[0]", "chown 10001:10001 /srv/vision"),
    "device-request-misspelt": ("warning", f"{HOST}.DeviceRequest", "did you mean 'DeviceRequests'?"),
    "device-requests-at-top": ("warning", "createOptions.DeviceRequests", "belongs into HostConfig"),
    "digest-short": ("error", "settings.image", "64 digits"),
    "dns-text": ("error", f"{HOST}.Dns", "a list of strings"),
    "docker-socket": ("warning", f"{HOST}.Binds[1]", "control of Docker"),
    "docker-socket-mount": ("warning", f"{HOST}.Mounts[0]", "control of Docker"),
    "entrypoint-text": ("warning", "createOptions.Entrypoint", "reads only a list"),
    "env-in-host-config": ("warning", f"{HOST}.Env", "belongs beside HostConfig"),
    "exposed-ports-list": ("error", "createOptions.ExposedPorts", '{"8080/tcp": {}}'),
    "extra-hosts-object": ("error", f"{HOST}.ExtraHosts", "NAME:ADDRESS"),
    "foreign": ("note", ".modulesContent", "recognised as visionedge"),
    "gpu-memory-below-need": ("warning", f"{HOST}.Memory", "4096 MiB are recommended"),
    "healthcheck-text": ("error", "Healthcheck.Test", "a list of strings"),
    "host-port-misspelt": ("warning", "[0].HostPorts", "did you mean 'HostPort'?"),
    "init-missing": ("note", "settings.createOptions", '"Init":true'),
    "labels-list": ("error", "createOptions.Labels", "an object of strings"),
    "log-config-missing": ("warning", "settings.createOptions", '"max-size":"10m"'),
    "log-level-empty": ("error", "VISIONEDGE_LOG_LEVEL.value", "is empty"),
    "log-level-verbose": ("error", "VISIONEDGE_LOG_LEVEL.value", "'debug', 'info'"),
    "log-none": ("warning", "LogConfig.Type", "none to upload"),
    "log-size-without-limit": ("warning", "Config.max-size", "until the disk is full"),
    "log-without-size": ("warning", f"{HOST}.LogConfig", "until the disk is full"),
    "memory-below-need": ("warning", f"{HOST}.Memory", "512 MiB, and 768 MiB are recommended"),
    "memory-in-megabytes": ("error", f"{HOST}.Memory", "768 bytes"),
    "memory-text": ("error", f"{HOST}.Memory", "write bytes"),
    "memory-too-low-to-start": ("error", f"{HOST}.Memory", "128 MiB, with which the module does not start"),
    "nano-cpus-fraction": ("error", f"{HOST}.NanoCpus", "half a core"),
    "pids-low": ("warning", f"{HOST}.PidsLimit", "each thread counts"),
    "pids-too-low-to-start": ("error", f"{HOST}.PidsLimit", "does not start"),
    "placeholder-platform": ("error", "settings.image", "<platform>"),
    "port-bindings-at-top": ("warning", "createOptions.PortBindings", "belongs into HostConfig"),
    "port-bindings-object": ("error", 'PortBindings["8080/tcp"]', "a list"),
    "privileged-word": ("error", f"{HOST}.Privileged", "true or false"),
    "route-number": ("error", 'routes.alarm"]', "as_number(maxConfidence)"),
    "route-number-first": ("error", 'routes.alarm"]', "as_number(maxConfidence)"),
    "stop-timeout-text": ("error", "createOptions.StopTimeout", "a whole number"),
    "tag-latest": ("warning", "settings.image", "never updates it"),
    "tag-missing": ("warning", "settings.image", "no tag"),
    "tmpfs-list": ("error", f"{HOST}.Tmpfs", '{"/tmp": "size=64m"}'),
    "ulimits-object": ("error", f"{HOST}.Ulimits", "a list"),
    "user-root-group": ("warning", "createOptions.User", "user 10001"),
    "user-root-without-capabilities": ("warning", "createOptions.User", "user 10001"),
    "variable-placeholder": ("warning", "HTTPS_PROXY.value", "still to be filled in"),
}


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_one_mistake_gives_one_finding(name: str) -> None:
    """With its severity, its place in JSON and in the file, and a remedy."""
    severity, place, words = SEEDS[name]
    text = (FOLDER / f"{name}.json").read_text()
    (finding,) = lint_manifest(text.encode(), f"{name}.json").findings
    assert finding.severity == severity
    assert finding.path.endswith(place)
    assert words in finding.line()
    assert finding.remedy
    # createOptions are a string in one line.
    key = "createOptions" if "createOptions" in finding.path else finding.path.rpartition(".")[2].rstrip('"]')
    assert f'{key}"' in text.splitlines()[finding.line_number - 1]


VALID = sorted(path.name for path in FOLDER.glob("valid-*.json"))


@pytest.mark.parametrize("name", VALID)
def test_an_unusual_but_valid_manifest_has_no_finding(name: str) -> None:
    """As Docker, edgeAgent and the tools of IoT Edge read it."""
    report = lint_manifest((FOLDER / name).read_bytes(), name)
    assert report.findings == ()
    assert list(report.modules) == ["vision"]


def test_every_seed_is_in_the_table() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} - {name[:-5] for name in VALID} == SEEDS.keys()


def test_the_command_of_a_container_is_one_of_the_command_line() -> None:
    assert add_run_parser.__module__.endswith(f".{COMMAND}")
