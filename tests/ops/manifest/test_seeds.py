"""Manifests with one mistake each, as people make them, and valid ones that look unusual: what lint says."""

import re
from pathlib import Path

import pytest

from manifests import fresh_known_secrets
from visionedge.__main__ import build_parser
from visionedge.cli.run import add_parser as add_run_parser
from visionedge.ops.manifest.container import COMMAND, COMMAND_OPTIONS
from visionedge.ops.manifest.lint import lint_manifest

__all__ = ["fresh_known_secrets"]

FOLDER = Path(__file__).resolve().parents[2] / "data" / "manifests"

HOST = "createOptions.HostConfig"
SEEDS: dict[str, tuple[str, str, str]] = {
    # name of the file: severity, end of the path, words of the finding
    "another-module-memory-text": ("error", f"press.settings.{HOST}.Memory", "a whole number"),
    "auto-remove": ("warning", f"{HOST}.AutoRemove", "its log each time"),
    "bind-mode": ("error", f"{HOST}.Binds[1]", "'readonly'"),
    "bind-relative-source": ("error", f"{HOST}.Binds[1]", "nor the name of a volume"),
    "bind-relative-target": ("error", f"{HOST}.Binds[1]", "relative path 'models'"),
    "bind-twice": ("error", f"{HOST}.Mounts[0]", "/data a second time"),
    "bind-whole-host": ("warning", f"{HOST}.Binds[1]", "control of Docker"),
    "budget-millions": ("warning", "maxPerDay", "13 of S1, 1 of S2"),
    "camera-authority-not-bound": ("warning", ".dock.tls.caFile", "/certs/ca.pem is in no folder"),
    "camera-localhost": ("warning", ".uri", "the container itself"),
    "camera-loopback": ("warning", ".uri", "the container itself"),
    "camera-loopback-v6": ("warning", ".uri", "the container itself"),
    "camera-no-address": ("warning", ".uri", "192.0.2.555 is no IP address"),
    "camera-placeholder": ("warning", ".uri", "still to be filled in"),
    "cap-add-unknown": ("error", f"{HOST}.CapAdd[0]", "no capability"),
    "cap-drop-misspelt": ("warning", f"{HOST}.CapDorp", "did you mean 'CapDrop'?"),
    "cap-drop-text": ("error", f"{HOST}.CapDrop", "a list of strings"),
    "cap-drop-unknown": ("error", f"{HOST}.CapDrop[1]", "no capability"),
    "capabilities-flat": ("error", "DeviceRequests[0].Capabilities", '[["gpu"]]'),
    "capitals": ("error", "settings.image", "write visionedge"),
    "cmd-config-not-bound": ("warning", "createOptions.Cmd[2]", "/config/vision.yaml is in no folder"),
    "cmd-doctor": ("error", "createOptions.Cmd", "'doctor' is not the command run"),
    "cmd-option-first": ("error", "createOptions.Cmd", "'--log-level' is not the command run"),
    "cmd-start": ("error", "createOptions.Cmd", "'start' is not the command run"),
    "cmd-unknown-option": ("error", "createOptions.Cmd[1]", "no option of run"),
    "cmd-with-program": ("error", "createOptions.Cmd", "'visionedge' is not the command run"),
    "config-not-bound": ("warning", ".env.VISIONEDGE_CONFIG.value", "/config/vision.yaml is in no folder"),
    "count-all": ("error", "DeviceRequests[0].Count", "write -1 for all"),
    "cpu-twice": ("error", f"{HOST}.NanoCpus", "keep NanoCpus alone"),
    "credentials-elsewhere": ("warning", "settings.image", "the credentials are for other.azurecr.io"),
    "credentials-empty": ("error", "mine.password", "is empty"),
    "credentials-placeholder": ("error", "mine.password", "still to be filled in"),
    "data-folder-of-the-host": ("note", f"{HOST}.Binds[0]", "chown 10001:10001 /srv/vision"),
    "device-request-misspelt": ("warning", f"{HOST}.DeviceRequest", "did you mean 'DeviceRequests'?"),
    "device-requests-at-top": ("warning", "createOptions.DeviceRequests", "belongs into HostConfig"),
    "digest-short": ("error", "settings.image", "64 digits"),
    "dns-name": ("error", f"{HOST}.Dns[0]", "no IP address"),
    "dns-text": ("error", f"{HOST}.Dns", "a list of strings"),
    "docker-socket": ("warning", f"{HOST}.Binds[1]", "control of Docker"),
    "docker-socket-mount": ("warning", f"{HOST}.Mounts[0]", "control of Docker"),
    "entrypoint-text": ("warning", "createOptions.Entrypoint", "reads only a list"),
    "env-in-host-config": ("warning", f"{HOST}.Env", "belongs beside HostConfig"),
    "env-spaces": ("warning", "createOptions.Env[0]", "'TZ ' is no NAME=VALUE"),
    "exposed-ports-list": ("error", "createOptions.ExposedPorts", '{"8080/tcp": {}}'),
    "extra-hosts-no-address": ("error", f"{HOST}.ExtraHosts[0]", "NAME:ADDRESS"),
    "extra-hosts-object": ("error", f"{HOST}.ExtraHosts", "NAME:ADDRESS"),
    "foreign": ("note", ".modulesContent", "recognised as visionedge"),
    "gpu-memory-below-need": ("warning", f"{HOST}.Memory", "4096 MiB are recommended"),
    "health-interval-seconds": ("error", "createOptions.Healthcheck.Interval", "write nanoseconds"),
    "health-without-kind": ("warning", "createOptions.Healthcheck.Test[0]", 'write "CMD"'),
    "healthcheck-text": ("error", "Healthcheck.Test", "a list of strings"),
    "host-port-misspelt": ("warning", "[0].HostPorts", "did you mean 'HostPort'?"),
    "http-udp": ("warning", 'PortBindings["8080/udp"]', 'write "8080/tcp"'),
    "image-scheme": ("error", ".settings.image", "without a scheme"),
    "image-tag-plus": ("error", ".settings.image", "'1.0+cpu'"),
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
    "model-not-bound": ("warning", ".env.VISIONEDGE_MODEL.value", "/models/best.onnx is in no folder"),
    "mount-relative-source": ("error", f"{HOST}.Mounts[0]", "as its Source"),
    "mount-type-unknown": ("error", f"{HOST}.Mounts[0]", "'folder'"),
    "mount-without-type": ("error", f"{HOST}.Mounts[0]", "has no Type"),
    "nano-cpus-fraction": ("error", f"{HOST}.NanoCpus", "half a core"),
    "nano-cpus-in-cores": ("warning", f"{HOST}.NanoCpus", "billionths of a core"),
    "network-none": ("warning", f"{HOST}.NetworkMode", "without a network"),
    "oom-kill-disable": ("warning", f"{HOST}.OomKillDisable", "hang when its memory"),
    "pids-low": ("warning", f"{HOST}.PidsLimit", "each thread counts"),
    "pids-too-low-to-start": ("error", f"{HOST}.PidsLimit", "does not start"),
    "placeholder-platform": ("error", "settings.image", "<platform>"),
    "port-bindings-at-top": ("warning", "createOptions.PortBindings", "belongs into HostConfig"),
    "port-bindings-object": ("error", 'PortBindings["8080/tcp"]', "a list"),
    "port-protocol": ("error", 'ExposedPorts["8080/http"]', "PORT/udp"),
    "port-taken-as-number": ("error", 'PortBindings["80/tcp"][0]', "as vision does"),
    "privileged-word": ("error", f"{HOST}.Privileged", "true or false"),
    "publish-all-ports-open": ("warning", f"{HOST}.PublishAllPorts", "HTTP without a token"),
    "remote-certificate-not-bound": ("warning", ".remote.certificate", "/certs/ca.pem is in no folder"),
    "remote-loopback": ("warning", ".remote.url", "the container itself"),
    "remote-placeholder": ("warning", ".remote.url", "still to be filled in"),
    "reservation-above-memory": ("error", f"{HOST}.MemoryReservation", "write at most 1073741824"),
    "route-number": ("error", 'routes.alarm"]', "as_number(maxConfidence)"),
    "route-number-first": ("error", 'routes.alarm"]', "as_number(maxConfidence)"),
    "route-text-without-quotes": ("warning", 'routes.dock"]', "write 'dock'"),
    "security-option": ("error", f"{HOST}.SecurityOpt[0]", "no option that Docker knows"),
    "stop-signal": ("warning", "createOptions.StopSignal", "does not let the module send"),
    "stop-timeout-short": ("warning", "createOptions.StopTimeout", "10 s that a stop"),
    "stop-timeout-text": ("error", "createOptions.StopTimeout", "a whole number"),
    "swap-below-memory": ("error", f"{HOST}.MemorySwap", "less than Memory"),
    "swap-without-memory": ("error", f"{HOST}.MemorySwap", "needs Memory"),
    "tag-latest": ("warning", "settings.image", "never updates it"),
    "tag-missing": ("warning", "settings.image", "no tag"),
    "tmpfs-list": ("error", f"{HOST}.Tmpfs", '{"/tmp": "size=64m"}'),
    "ulimits-object": ("error", f"{HOST}.Ulimits", "a list"),
    "user-other": ("note", "createOptions.User", "user 10001"),
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


def test_the_known_options_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_command([COMMAND, "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert {*re.findall(r"(?<=\[)--?[a-z-]+", usage), "--help"} == {*COMMAND_OPTIONS}
