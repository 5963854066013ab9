"""Checks of a visionedge module's container: image, limits, rights, command, log, networks, and mounts."""

import re
from collections.abc import Iterable, Mapping

from visionedge.ops.manifest.agent import EdgeModule
from visionedge.ops.manifest.docker_values import read_number
from visionedge.ops.manifest.document import JsonNode, LintFindings, has_placeholder
from visionedge.ops.manifest.gpu_options import create_options_node, passes_gpu, read_mounts
from visionedge.runtime.memory_requirement import (
    MINIMUM_MIB,
    MINIMUM_PIDS,
    recommend_memory_mib,
)

COMMAND = "run"
"""The only command with which the module keeps running."""

COMMAND_OPTIONS = (
    *("-h", "--help", "--camera", "--config", "--device", "--duration"),
    *("--http", "--log-level", "--messages", "--model", "--runtime"),
)
"""The options of that command."""

IMAGE_USER = "10001"
STOP_TIME_S = 10
"""The longest time that a stop takes."""

_MIB = 2**20
_RECOMMENDED_PIDS = 64
_DOCKER_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock")
_PLACEHOLDER = re.compile(r"\$\{[^{}]*\}")
_ROOT = ("0", "root")
_STOP_SIGNALS = ("TERM", "INT", "15", "2")
_UNLIMITED_LOG_TYPES = ("json-file", "")
_LOG_SIZE = re.compile(r"0*[1-9]\d*(?:\.\d+)?\s*[kmgtp]?i?b?", re.IGNORECASE)
_LOG_OPTIONS = '{"LogConfig":{"Type":"json-file","Config":{"max-size":"10m","max-file":"3"}}}'
# Registries whose images anybody may pull.
_PUBLIC_REGISTRIES = ("docker.io", "mcr.microsoft.com", "ghcr.io", "nvcr.io", "quay.io", "public.ecr.aws")
_DOCKER_HUB = ("index.docker.io", "registry-1.docker.io", "hub.docker.com", "registry.hub.docker.com")


def check_container(
    module: EdgeModule, registries: Iterable[JsonNode], findings: LintFindings, *, more_models: int = 0
) -> None:
    """Check the container of a module that is visionedge.

    `registries` are the addresses with credentials, `more_models` is the number of `models`.
    """
    _check_tag(module, findings)
    _check_credentials(module, list(registries), findings)
    _check_memory(module, findings, more_models)
    _check_pids(module, findings)
    _check_user(module, findings)
    _check_command(module, findings)
    _check_stop(module, findings)
    _check_log(module, findings)
    _check_rights(module, findings)
    _check_networks(module, findings)
    if module.options is not None and module.option("HostConfig", "Init") is None:
        what = "has no Init: processes that 'docker exec' leaves behind stay as zombies"
        findings.note(create_options_node(module), what, 'add {"HostConfig":{"Init":true}}')


def on_host_network(module: EdgeModule) -> bool:
    """Whether the module uses the network of the device."""
    mode = module.option("HostConfig", "NetworkMode")
    return mode is not None and mode.text == "host"


# --- the image ----------------------------------------------------------------------------------------------


def _check_tag(module: EdgeModule, findings: LintFindings) -> None:
    image = module.image.strip()
    last = _PLACEHOLDER.sub("$", image).rpartition("/")[2]
    # The value of a placeholder may have the tag in it.
    if not image or "@" in image or "$" in last:
        return
    tag = last.partition(":")[2]
    if tag not in ("", "latest"):
        return
    what = "has the tag latest" if tag else "has no tag, which means latest"
    what += ": edgeAgent pulls it once, and never updates it"
    findings.warning(module.image_node(), what, "write the tag of a version, or NAME@sha256:…")


def _check_credentials(module: EdgeModule, registries: list[JsonNode], findings: LintFindings) -> None:
    """Whether the registry of the image is one of those with credentials, if there are any."""
    host = registry_host(module.image)
    known = [_plain_host(node.text) for node in registries if node.text]
    if not host or not known or host in _PUBLIC_REGISTRIES or host in known:
        return
    if "$" in host or any("$" in each or "<" in each for each in known):
        return
    what = f"is in {host}, and the credentials are for {', '.join(known[:5])}: without them the pull fails"
    remedy = f"add credentials for {host}, unless it needs none, or correct one of both"
    findings.warning(module.image_node(), what, remedy)


def registry_host(image: str) -> str:
    """The registry of an image, as Docker reads it; empty if a tool of IoT Edge builds the image."""
    if not image or image.startswith("${MODULE") or image.lower().startswith("$upstream"):
        return ""
    first, slash, _ = image.strip().partition("/")
    is_host = any(c in first for c in ".:$") or first == "localhost" or first != first.lower()
    return _plain_host(first) if slash and is_host else "docker.io"


def _plain_host(address: str) -> str:
    host = address.strip().partition("://")[2] or address.strip()
    host = host.partition("/")[0].lower()
    return "docker.io" if host in _DOCKER_HUB else host


# --- limits -------------------------------------------------------------------------------------------------


def _check_memory(module: EdgeModule, findings: LintFindings, more_models: int) -> None:
    node = module.option("HostConfig", "Memory")
    limit = read_number(node)
    if node is None or limit is None or limit <= 0:
        return
    needed = recommend_memory_mib(gpu=passes_gpu(module), more_models=more_models)
    remedy = f"write {needed * _MIB} ({needed} MiB) or more"
    if limit < MINIMUM_MIB * _MIB:
        what = f"is {_in_mib(limit)}, with which the module does not start; the number is in bytes"
        findings.error(node, what, remedy)
    elif limit < needed * _MIB:
        what = f"is {_in_mib(limit)}, and {needed} MiB are recommended: the module may be killed"
        findings.warning(node, what, remedy)


def _in_mib(size_bytes: int) -> str:
    return f"{size_bytes // _MIB} MiB" if size_bytes >= _MIB else f"{size_bytes} bytes"


def _check_pids(module: EdgeModule, findings: LintFindings) -> None:
    node = module.option("HostConfig", "PidsLimit")
    limit = read_number(node)
    if node is None or limit is None or limit <= 0:
        return
    remedy = f"write {_RECOMMENDED_PIDS} or more, and some per camera"
    if limit < MINIMUM_PIDS:
        findings.error(node, "is too low for the threads of the module, which then does not start", remedy)
    elif limit < _RECOMMENDED_PIDS:
        findings.warning(node, "may be too low: each thread counts, and each camera has some", remedy)


# --- user, command, log -------------------------------------------------------------------------------------


def _check_user(module: EdgeModule, findings: LintFindings) -> None:
    user = module.option("User")
    dropped = _names(module, "CapDrop")
    name = user.text.partition(":")[0] if user is not None else ""
    if user is not None and name not in ("", IMAGE_USER, *_ROOT) and not has_placeholder(user.text):
        what = f"is not user {IMAGE_USER} of the image: it must be able to write the data folder"
        findings.note(user, what, f"remove User, or give the folder at /data to user {name[:40]}")
    if user is None or user.text.partition(":")[0] not in _ROOT or not {"ALL", "DAC_OVERRIDE"} & dropped:
        return
    if {"ALL", "DAC_OVERRIDE"} & _names(module, "CapAdd"):
        return
    what = (
        "is root without capabilities, which cannot open a data folder of user 10001: "
        "messages wait in memory only, and nothing is stored"
    )
    findings.warning(user, what, "remove User: the image has 10001")


def _names(module: EdgeModule, key: str) -> set[str]:
    return {item.text.upper().removeprefix("CAP_") for item in module.option_items("HostConfig", key)}


def _check_command(module: EdgeModule, findings: LintFindings) -> None:
    """The entrypoint of the images is `visionedge`, their command `run`."""
    command, entrypoint = module.option("Cmd"), module.option("Entrypoint")
    if command is None or not command.items or (entrypoint is not None and entrypoint.items):
        return
    words = [item.text for item in command.items]
    if any(has_placeholder(word) for word in words):
        return
    if words[0] != COMMAND:
        what = f"does not start the module: '{words[0][:40]}' is not the command {COMMAND}"
        findings.error(command, what, f'write ["{COMMAND}"], or remove Cmd')
        return
    for item in command.items:
        option = item.text.partition("=")[0]
        if option.startswith("-") and option not in COMMAND_OPTIONS:
            remedy = f"known options: {', '.join(COMMAND_OPTIONS[2:])}"
            findings.error(item, f"is no option of {COMMAND}, so the module ends with exit code 2", remedy)


def _check_stop(module: EdgeModule, findings: LintFindings) -> None:
    """The module stops at SIGTERM or SIGINT, and takes up to `STOP_TIME_S`."""
    signal, time = module.option("StopSignal"), module.option("StopTimeout")
    if signal is not None and signal.text and signal.text.upper().removeprefix("SIG") not in _STOP_SIGNALS:
        findings.warning(
            signal, "does not let the module send what it has", "remove it: the default is right"
        )
    seconds = read_number(time)
    if time is not None and seconds is not None and 0 <= seconds < STOP_TIME_S:
        what = f"is less than the {STOP_TIME_S} s that a stop of the module may take: it is killed then"
        findings.warning(time, what, f"write {STOP_TIME_S} or more, or remove it")


def _check_log(module: EdgeModule, findings: LintFindings) -> None:
    node = module.option("HostConfig", "LogConfig")
    kind = node.at("Type") if node is not None else None
    if node is None or node.value is None:
        what = "has no LogConfig: unless Docker's daemon limits it, the log fills the disk"
        findings.warning(create_options_node(module), what, f'add {{"HostConfig":{_LOG_OPTIONS}}}')
    elif kind is not None and kind.text == "none":
        what = "keeps no log, so that edgeAgent has none to upload"
        findings.warning(kind, what, f"write {_LOG_OPTIONS}")
    elif (kind.text if kind is not None else "") in _UNLIMITED_LOG_TYPES:
        size = node.at("Config", "max-size")
        text = str(size.value).strip() if size is not None else ""
        if not has_placeholder(text) and not _LOG_SIZE.fullmatch(text):
            what = "limits no log: without a valid max-size it grows until the disk is full"
            findings.warning(size or node, what, f"write {_LOG_OPTIONS}")


# --- rights and networks ------------------------------------------------------------------------------------


def _check_rights(module: EdgeModule, findings: LintFindings) -> None:
    policy = module.node.entries.get("restartPolicy")
    if policy is not None and policy.text == "never":
        what = "the module ends with exit code 75 when it needs a restart"
        findings.warning(policy, what, "write always")
    privileged = module.option("HostConfig", "Privileged")
    if privileged is not None and privileged.value is True:
        findings.warning(
            privileged, "visionedge needs no privileges", 'remove it, and add "CapDrop": ["ALL"]'
        )
    for mount in read_mounts(module):
        if mount.source.rstrip("/") in _DOCKER_SOCKETS or (mount.source and _holds_socket(mount.source)):
            what = "gives the module control of Docker, and so root on the device; visionedge does not use it"
            findings.warning(mount.node, what, "remove it")


def _holds_socket(folder: str) -> bool:
    return folder.startswith("/") and any(
        path.startswith(f"{folder.rstrip('/')}/") for path in _DOCKER_SOCKETS
    )


def _check_networks(module: EdgeModule, findings: LintFindings) -> None:
    mode = module.option("HostConfig", "NetworkMode")
    if mode is not None and mode.text == "none":
        findings.warning(mode, "leaves the module without a network: no edgeHub, no cameras", "remove it")
    networks = module.option("NetworkingConfig")
    endpoints = networks.at("EndpointsConfig") if networks is not None else None
    entries: Mapping[str, JsonNode] = (endpoints or networks).entries if networks is not None else {}
    if networks is not None and entries and not on_host_network(module):
        what = "edgeAgent connects the module to edgeHub's network only if the options name no networks"
        findings.warning(networks, what, "remove it")
