"""Manifests for tests: a valid one, functions to change it, and faults with the expected finding."""

import json
from typing import Any

import pytest

from visionedge.ops.manifest.generate import ManifestRequest, generate_manifest
from visionedge.ops.manifest.lint import LintReport, lint_manifest
from visionedge.runtime.redaction import KnownSecrets

Manifest = dict[str, Any]
AGENT = ("modulesContent", "$edgeAgent", "properties.desired")
HUB = ("modulesContent", "$edgeHub", "properties.desired")
VISION = ("modulesContent", "vision", "properties.desired")
MODULE = (*AGENT, "modules", "vision")
HOST = (*MODULE, "settings", "createOptions", "HostConfig")
IN_AGENT = '$.modulesContent["$edgeAgent"]["properties.desired"]'
IN_HUB = '$.modulesContent["$edgeHub"]["properties.desired"]'
IN_VISION = '$.modulesContent.vision["properties.desired"]'
IN_MODULE = f"{IN_AGENT}.modules.vision"
IN_OPTIONS = f"{IN_MODULE}.settings.createOptions"
NOTHING = object()
"""In place of a value: the key is removed."""


@pytest.fixture(autouse=True)
def fresh_known_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake secrets of a test, many of them plain words, are masked only in that test."""
    monkeypatch.setattr("visionedge.runtime.redaction._known", KnownSecrets())


def valid_manifest(gpu: str = "none", **changes: Any) -> Manifest:
    """A valid manifest, its createOptions as objects so that tests can change them."""
    kind = "cpu" if gpu == "none" else "gpu"
    request = ManifestRequest(image=f"registry.example.com/visionedge:1.0-{kind}", gpu=gpu, **changes)  # type: ignore[arg-type]  # tests give names of Gpu
    manifest: Manifest = json.loads(generate_manifest(request, {}).text)
    agent = value_at(manifest, AGENT)
    for module in (*agent["systemModules"].values(), *agent["modules"].values()):
        module["settings"]["createOptions"] = json.loads(module["settings"]["createOptions"])
    return manifest


def value_at(document: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        document = document[key]
    return document


def change(manifest: Manifest, path: tuple[Any, ...], value: Any) -> Manifest:
    """The manifest with another value at a path."""
    holder = value_at(manifest, path[:-1])
    if value is NOTHING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return manifest


def lint(manifest: Any, name: str = "deployment.json", modules: tuple[str, ...] = ()) -> LintReport:
    """Lint a manifest, its createOptions as text again."""

    def serialised(value: Any) -> Any:
        if isinstance(value, list):
            return [serialised(item) for item in value]
        if not isinstance(value, dict):
            return value
        must_serialise = isinstance(value.get("createOptions"), dict) and not name.endswith(".template.json")
        options = {"createOptions": json.dumps(value["createOptions"])} if must_serialise else {}
        return {**{key: serialised(item) for key, item in value.items()}, **options}

    return lint_manifest(json.dumps(serialised(manifest)).encode(), name, modules)


def finding_places(report: LintReport) -> set[tuple[str, str]]:
    """The severity and path of each finding."""
    return {(finding.severity, finding.path) for finding in report.findings}


FAULTS: list[tuple[str, tuple[Any, ...], Any, str, str, str]] = [
    # name, changed path, new value; then severity, path and a word of the finding
    (
        "missing agent",
        ("modulesContent", "$edgeAgent"),
        NOTHING,
        "error",
        '$.modulesContent["$edgeAgent"]',
        "missing",
    ),
    (
        "missing hub",
        ("modulesContent", "$edgeHub"),
        NOTHING,
        "error",
        '$.modulesContent["$edgeHub"]',
        "missing",
    ),
    ("agent's schema", (*AGENT, "schemaVersion"), "1.2", "error", f"{IN_AGENT}.schemaVersion", "1.0 or 1.1"),
    ("a number", (*AGENT, "schemaVersion"), 1.1, "error", f"{IN_AGENT}.schemaVersion", "a number"),
    ("hub's schema", (*HUB, "schemaVersion"), "2.0", "error", f"{IN_HUB}.schemaVersion", "1.0 or 1.1"),
    ("no runtime", (*AGENT, "runtime"), NOTHING, "error", f"{IN_AGENT}.runtime", "missing"),
    (
        "no version of Docker",
        (*AGENT, "runtime", "settings"),
        {},
        "error",
        f"{IN_AGENT}.runtime.settings.minDockerVersion",
        "missing",
    ),
    (
        "a registry without password",
        (*AGENT, "runtime", "settings", "registryCredentials"),
        {"mine": {"address": "https://registry.example.com", "username": "me"}},
        "error",
        f"{IN_AGENT}.runtime.settings.registryCredentials.mine.password",
        "missing",
    ),
    (
        "edgeHub missing in systemModules",
        (*AGENT, "systemModules", "edgeHub"),
        NOTHING,
        "error",
        f"{IN_AGENT}.systemModules.edgeHub",
        "",
    ),
    (
        "a hub that loses connections",
        (*AGENT, "systemModules", "edgeHub", "settings", "image"),
        "mcr.microsoft.com/azureiotedge-hub:1.6.1",
        "error",
        f"{IN_AGENT}.systemModules.edgeHub.settings.image",
        "MQTT",
    ),
    (
        "a swapped image",
        (*AGENT, "systemModules", "edgeAgent", "settings", "image"),
        "mcr.microsoft.com/azureiotedge-hub:1.6.8",
        "error",
        f"{IN_AGENT}.systemModules.edgeAgent.settings.image",
        "azureiotedge-agent:1.6.8",
    ),
    (
        "an old agent",
        (*AGENT, "systemModules", "edgeAgent", "settings", "image"),
        "mcr.microsoft.com/azureiotedge-agent:1.4.27",
        "warning",
        f"{IN_AGENT}.systemModules.edgeAgent.settings.image",
        "support",
    ),
    (
        "a hub without a store",
        (*AGENT, "systemModules", "edgeHub", "env"),
        NOTHING,
        "warning",
        f"{IN_AGENT}.systemModules.edgeHub",
        "StorageFolder",
    ),
    (
        "a store without a volume",
        (*AGENT, "systemModules", "edgeHub", "settings", "createOptions"),
        {},
        "warning",
        f"{IN_AGENT}.systemModules.edgeHub.settings.createOptions",
        "Binds",
    ),
    (
        "a hub without MQTT",
        (*AGENT, "systemModules", "edgeHub", "env", "mqttSettings__enabled"),
        {"value": False},
        "error",
        f"{IN_AGENT}.systemModules.edgeHub.env.mqttSettings__enabled.value",
        "MQTT",
    ),
    (
        "an invalid boolean",
        (*AGENT, "systemModules", "edgeHub", "env", "OptimizeForPerformance"),
        {"value": "no"},
        "warning",
        f"{IN_AGENT}.systemModules.edgeHub.env.OptimizeForPerformance.value",
        '"true" or "false"',
    ),
    ("no type", (*MODULE, "type"), NOTHING, "error", f"{IN_MODULE}.type", "docker"),
    ("another type", (*MODULE, "type"), "podman", "error", f"{IN_MODULE}.type", "docker"),
    ("a status", (*MODULE, "status"), "started", "error", f"{IN_MODULE}.status", "running or stopped"),
    ("a policy", (*MODULE, "restartPolicy"), "yes", "error", f"{IN_MODULE}.restartPolicy", "always"),
    (
        "a policy without effect",
        (*MODULE, "restartPolicy"),
        "on-unhealthy",
        "warning",
        f"{IN_MODULE}.restartPolicy",
        "no effect",
    ),
    (
        "restart policy never",
        (*MODULE, "restartPolicy"),
        "never",
        "warning",
        f"{IN_MODULE}.restartPolicy",
        "75",
    ),
    ("an order", (*MODULE, "startupOrder"), -1, "error", f"{IN_MODULE}.startupOrder", "out of range"),
    (
        "a boolean for a number",
        (*MODULE, "startupOrder"),
        True,
        "error",
        f"{IN_MODULE}.startupOrder",
        "whole",
    ),
    (
        "a typing error",
        (*MODULE, "restartpolicy"),
        "always",
        "warning",
        f"{IN_MODULE}.restartpolicy",
        "restartPolicy",
    ),
    ("no image", (*MODULE, "settings", "image"), NOTHING, "error", f"{IN_MODULE}.settings.image", "missing"),
    (
        "an image with a blank",
        (*MODULE, "settings", "image"),
        "vision edge:1",
        "error",
        f"{IN_MODULE}.settings.image",
        "REGISTRY",
    ),
    ("a variable", (*MODULE, "env"), {"A B": {"value": "1"}}, "error", f'{IN_MODULE}.env["A B"]', "variable"),
    ("no value", (*MODULE, "env"), {"A": "1"}, "error", f"{IN_MODULE}.env.A", "an object"),
    (
        "a misspelt variable",
        (*MODULE, "env"),
        {"VISIONEDGE_TOKEN": {"value": "1"}},
        "warning",
        f"{IN_MODULE}.env.VISIONEDGE_TOKEN.value",
        "VISIONEDGE_HTTP_TOKEN",
    ),
    (
        "an unknown device",
        (*MODULE, "env"),
        {"VISIONEDGE_DEVICE": {"value": "npu"}},
        "error",
        f"{IN_MODULE}.env.VISIONEDGE_DEVICE.value",
        "inference.device",
    ),
    ("an unfilled placeholder", (*MODULE, "version"), "${TAG}", "error", f"{IN_MODULE}.version", "${TAG}"),
    (
        "options that are not JSON",
        (*MODULE, "settings", "createOptions"),
        "{'a'",
        "error",
        IN_OPTIONS,
        "not JSON",
    ),
    (
        "options that are a list",
        (*MODULE, "settings", "createOptions"),
        "[]",
        "error",
        IN_OPTIONS,
        "an object",
    ),
    ("no volume", (*HOST, "Binds"), [], "warning", IN_OPTIONS, "visionedge-data:/data"),
    (
        "a read-only volume",
        (*HOST, "Binds"),
        ["d:/data:ro"],
        "error",
        f"{IN_OPTIONS}.HostConfig.Binds[0]",
        "read-only",
    ),
    (
        "privileged",
        (*HOST, "Privileged"),
        True,
        "warning",
        f"{IN_OPTIONS}.HostConfig.Privileged",
        "CapDrop",
    ),
    (
        "a port without a listener",
        (*HOST, "PortBindings"),
        {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "80"}]},
        "warning",
        f'{IN_OPTIONS}.HostConfig.PortBindings["80/tcp"]',
        "8080/tcp",
    ),
    (
        "a separate network",
        (*MODULE, "settings", "createOptions", "NetworkingConfig"),
        {"EndpointsConfig": {"mine": {}}},
        "warning",
        f"{IN_OPTIONS}.NetworkingConfig",
        "network",
    ),
    (
        "a camera's rate",
        (*VISION, "cameras", "demo", "fps"),
        "5",
        "error",
        f"{IN_VISION}.cameras.demo.fps",
        "number",
    ),
    (
        "a camera's name",
        (*VISION, "cameras", "Dock"),
        {"uri": "demo:"},
        "error",
        f"{IN_VISION}.cameras.Dock",
        "a-z",
    ),
    ("a camera's URI", (*VISION, "cameras", "demo"), {}, "error", f"{IN_VISION}.cameras.demo.uri", "missing"),
    ("an unknown key", (*VISION, "inferense"), {}, "error", f"{IN_VISION}.inferense", "inference"),
    (
        "a key only for the local file",
        (*VISION, "model"),
        {"allowInsecure": True},
        "error",
        f"{IN_VISION}.model.allowInsecure",
        "local",
    ),
    ("no cameras", (*VISION, "cameras"), {}, "warning", f"{IN_VISION}.cameras", "no camera"),
    (
        "a camera device",
        (*VISION, "cameras", "usb"),
        {"uri": "v4l2:///dev/video0"},
        "warning",
        f"{IN_VISION}.cameras.usb.uri",
        '"Devices":[{"PathOnHost":"/dev/video0"',
    ),
    (
        "a file of the host",
        (*VISION, "cameras", "yard"),
        {"uri": "/srv/yard.mp4"},
        "warning",
        f"{IN_VISION}.cameras.yard.uri",
        "/srv/yard.mp4",
    ),
    (
        "a demanded GPU",
        (*VISION, "inference", "device"),
        "cuda",
        "warning",
        f"{IN_MODULE}.settings.image",
        "GPU image",
    ),
    (
        "HTTP only on the container's loopback",
        (*VISION, "http"),
        {"host": "127.0.0.1"},
        "warning",
        f'{IN_OPTIONS}.HostConfig.PortBindings["8080/tcp"]',
        "http.host",
    ),
    (
        "no store",
        (*HUB, "storeAndForwardConfiguration"),
        {},
        "error",
        f"{IN_HUB}.storeAndForwardConfiguration.timeToLiveSecs",
        "7200",
    ),
    (
        "messages not kept",
        (*HUB, "storeAndForwardConfiguration", "timeToLiveSecs"),
        0,
        "warning",
        f"{IN_HUB}.storeAndForwardConfiguration.timeToLiveSecs",
        "7200",
    ),
    ("no routes", (*HUB, "routes"), {}, "warning", f"{IN_HUB}.routes", "outputs/detections"),
    (
        "a twin without a module",
        ("modulesContent", "other"),
        {"properties.desired": {}},
        "warning",
        '$.modulesContent.other["properties.desired"]',
        "does not run",
    ),
    (
        "no desired properties",
        ("modulesContent", "vision"),
        {},
        "error",
        "$.modulesContent.vision",
        "properties.desired",
    ),
]
