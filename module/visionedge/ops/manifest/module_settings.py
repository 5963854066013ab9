"""Checks of the visionedge modules: configuration, variables, data folder, HTTP, cameras, and files."""

import ipaddress
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from visionedge.config.addresses import parse_camera_uri
from visionedge.config.documents import Document
from visionedge.config.load import find_local_only_problems, merge, parse_config, read_environment
from visionedge.errors import ConfigError
from visionedge.ops.manifest.agent import SYSTEM_MODULES, EdgeModule
from visionedge.ops.manifest.container import check_container, on_host_network
from visionedge.ops.manifest.document import (
    JsonNode,
    LintFindings,
    Manifest,
    find_angle_placeholder,
    has_placeholder,
)
from visionedge.ops.manifest.gpu_options import (
    check_gpu_options,
    create_options_node,
    read_devices,
    read_module_environment,
    read_mounts,
)
from visionedge.outbound.metering import S1, UNIT_BLOCKS_PER_DAY

IMAGE_PORT = 8080
DATA_FOLDER = "/data"
MODULE_ID = "vision"
"""The module id in the shipped manifests."""

BUILT_IMAGE_PREFIX = "${MODULEDIR<./module>"
"""The prefix of this project's image in a template: the folder of its module.json, relative to it."""

_BUILT_IMAGE_PREFIXES = (
    f"{BUILT_IMAGE_PREFIX}.",
    f"{BUILT_IMAGE_PREFIX}}}",
    "${MODULES.vision.",
    "${MODULES.vision}",
)

_PRODUCT = "visionedge"
_ANY = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
_LOOPBACK = ("127.", "localhost", "::1", "[::1]")
_VARIABLE_PREFIX = "VISIONEDGE_"
_LOG_LEVEL = f"{_VARIABLE_PREFIX}LOG_LEVEL"
_VARIABLES = frozenset(
    f"{_VARIABLE_PREFIX}{name}"
    for name in (
        "CONFIG",
        "CORE_DUMPS",
        "DATA",
        "MODEL",
        "DEVICE",
        "HTTP",
        "HTTP_TOKEN",
        "LOG_LEVEL",
        "REMOTE_TOKEN",
    )
)


def is_loopback(host: object) -> bool:
    """Whether an address is reachable only from its own machine or container."""
    return isinstance(host, str) and host.startswith(_LOOPBACK)


def find_visionedge_modules(modules: Mapping[str, EdgeModule], named: Sequence[str]) -> list[str]:
    """The modules that are visionedge: the named ones, else those with its module id or image."""
    if named:
        return [name for name in named if name in modules]
    others = {name: module for name, module in modules.items() if name not in SYSTEM_MODULES}
    return [
        name for name, module in others.items() if name == MODULE_ID or _is_visionedge_image(module.image)
    ]


def _is_visionedge_image(image: str) -> bool:
    first, _, rest = image.lower().partition("/")
    is_host = bool(rest) and any(c in first for c in ".:$")
    return _PRODUCT in (rest if is_host else image.lower()) or image.startswith(_BUILT_IMAGE_PREFIXES)


def check_visionedge_module(module: EdgeModule, manifest: Manifest, findings: LintFindings) -> None:
    """Check a module that is visionedge."""
    twin = manifest.twins.get(module.name)
    variables = read_module_environment(module)
    from_variables = _variables(variables, findings)
    check_configuration(module, manifest, findings)
    document = merge(from_variables, _document(twin))
    # In a layered deployment the twin of the device may have the cameras.
    if not (manifest.layered if twin is None else twin.partial):
        _check_cameras(module, twin, variables, findings)
    inference = document.get("inference")
    device = inference.get("device") if isinstance(inference, Mapping) else None
    check_gpu_options(module, device if isinstance(device, str) else None, findings)
    _data(module, variables, findings)
    others = twin.at("models") if twin is not None else None
    more_models = len(others.entries) if others is not None else 0
    check_container(module, manifest.registries(), findings, more_models=more_models)
    _http(module, document, findings)
    _holes(variables, twin, findings)
    _files(module, twin, variables, findings)
    if twin is not None:
        _local_addresses(module, twin, findings)
        _bad_addresses(twin, findings)
        _budget(twin, findings)


def _document(twin: JsonNode | None) -> Document:
    return twin.plain() if twin is not None and twin.entries else {}


def _variables(variables: Mapping[str, JsonNode], findings: LintFindings) -> Document:
    """The configuration from the variables, checked; variables with placeholders are ignored."""
    without_placeholders = {
        name: node.text for name, node in variables.items() if not has_placeholder(node.text)
    }
    for name, node in variables.items():
        if name.startswith(_VARIABLE_PREFIX) and name not in _VARIABLES:
            findings.warning(
                node, "is not a variable of visionedge", f"known: {', '.join(sorted(_VARIABLES))}"
            )
    found: Document = {}
    for name in sorted(_VARIABLES & without_placeholders.keys()):
        if name == _LOG_LEVEL and not without_placeholders[name]:
            findings.error(variables[name], "is empty, which ends the module", "write info, or remove it")
        try:
            document = read_environment({name: without_placeholders[name]})
            parse_config(document)
        except ConfigError as error:
            for problem in error.problems:
                findings.error(variables[name], problem, "see docs/configuration.md")
        else:
            found = merge(found, document)
    return found


def check_configuration(module: EdgeModule, manifest: Manifest, findings: LintFindings) -> None:
    """Check the desired properties of a module as a configuration, and report each problem at its path."""
    twin = manifest.twins.get(module.name)
    if twin is None or not twin.entries:
        return
    problems = find_local_only_problems(twin.plain())
    try:
        parse_config(twin.plain())
    except ConfigError as error:
        problems += error.problems
    # A missing key may be in the file on the device, or in the base deployment.
    elsewhere = twin.partial or f"{_VARIABLE_PREFIX}CONFIG" in read_module_environment(module)
    for problem in problems:
        where, reason = _locate_problem(twin, problem)
        may_be_elsewhere = has_placeholder(where.text) or (elsewhere and reason == "is missing")
        if not may_be_elsewhere:
            findings.error(where, reason, "see docs/configuration.md, or `visionedge config schema`")


def _locate_problem(twin: JsonNode, problem: str) -> tuple[JsonNode, str]:
    """The node of the key at the beginning of a problem, and the rest of the problem."""
    dotted, _, reason = problem.partition(": ")
    node = twin
    while dotted:
        key = max((k for k in node.entries if f"{dotted}.".startswith(f"{k}.")), key=len, default=None)
        item = None if key is None else node.entries[key]
        if key is None or item is None:
            return node.missing(dotted), reason
        node, dotted = item, dotted[len(key) + 1 :]
    return node, reason


def _check_cameras(
    module: EdgeModule, twin: JsonNode | None, variables: Mapping[str, JsonNode], findings: LintFindings
) -> None:
    cameras = twin.at("cameras") if twin is not None else None
    if (cameras is None or cameras.value in ({}, None)) and f"{_VARIABLE_PREFIX}CONFIG" not in variables:
        where: JsonNode | str = cameras or twin or module.node
        findings.warning(where, f"{module.name} has no camera", "add cameras to its desired properties")


def _data(module: EdgeModule, variables: Mapping[str, JsonNode], findings: LintFindings) -> None:
    given = variables.get(f"{_VARIABLE_PREFIX}DATA")
    folder = given.text.rstrip("/") if given is not None else DATA_FOLDER
    found = [
        m for m in read_mounts(module) if m.target and m.source and f"{folder}/".startswith(f"{m.target}/")
    ]
    if not found:
        what = f"no volume is mounted at {folder}: messages that wait for IoT Hub are lost with the container"
        remedy = f'add {{"HostConfig":{{"Binds":["{_PRODUCT}-data:{folder}"]}}}}'
        findings.warning(create_options_node(module), what, remedy)
    for mount in found:
        if mount.source.startswith("/") and not mount.read_only:
            what = "is a folder of the host, which user 10001 of the image must be able to write"
            findings.note(mount.node, what, f"run there: chown 10001:10001 {mount.source}")
        if mount.read_only:
            what = f"{folder} is read-only: messages wait in memory, and nothing is stored"
            findings.error(mount.node, what, "remove 'ro'")


def _http(module: EdgeModule, document: Document, findings: LintFindings) -> None:
    """Whether the published port leads to the module, and whether other machines need a token."""
    http = document.get("http")
    http = http if isinstance(http, Mapping) else {}
    host, port = http.get("host", "0.0.0.0"), http.get("port", IMAGE_PORT)  # noqa: S104 - the default of the images
    is_open = http.get("allowAnonymous") is True and not http.get("token")
    loopback = is_loopback(host)
    remedy = "remove http.allowAnonymous, so that a token is needed, or publish on 127.0.0.1 only"
    every_port = module.option("HostConfig", "PublishAllPorts")
    mode = module.option("HostConfig", "NetworkMode") if on_host_network(module) else None
    if every_port is not None and every_port.value is True:
        mode = mode or every_port
    if mode is not None and not loopback and is_open:
        findings.warning(mode, "other machines can use HTTP without a token", remedy)
    for inner, bindings in module.option_entries("HostConfig", "PortBindings").items():
        if loopback:
            what = f"reaches no server: http.host {host} is the loopback of the container"
            findings.warning(bindings, what, "remove http.host; the images listen on all addresses")
        elif inner.lower().removesuffix("/tcp") != str(port):
            findings.warning(bindings, f"reaches no server: HTTP is on port {port}", f'write "{port}/tcp"')
        elif is_open and any(_is_public(binding) for binding in bindings.items):
            findings.warning(bindings, "other machines can use HTTP without a token", remedy)


def _is_public(binding: JsonNode) -> bool:
    address = binding.at("HostIp")
    return address is None or not is_loopback(address.text)


def _files(
    module: EdgeModule, twin: JsonNode | None, variables: Mapping[str, JsonNode], findings: LintFindings
) -> None:
    """Devices and files of the configuration that are not passed to the container."""
    nodes = [device.target for device in read_devices(module)]
    targets = [mount.target for mount in read_mounts(module) if mount.target] + [DATA_FOLDER]
    for node, path in _used_files(module, twin, variables):
        if not path or has_placeholder(node.text) or find_angle_placeholder(path):
            continue
        if path.startswith("/dev/"):
            if path not in nodes and "/dev" not in targets:
                findings.warning(node, f"{path} is not passed to the module", _device(path))
        elif not path.startswith("/"):
            what = f"{path} is relative: in the container it is looked for in {DATA_FOLDER}"
            findings.warning(node, what, f"write its path in the container; {_BIND}")
        elif not any(f"{path}/".startswith(f"{target}/") for target in targets):
            what = f"{path} is in no folder that is bound into the module"
            findings.warning(node, what, _BIND)


def _used_files(
    module: EdgeModule, twin: JsonNode | None, variables: Mapping[str, JsonNode]
) -> Iterator[tuple[JsonNode, str]]:
    """Each place that names a file or device of the container, and its path."""
    for camera in _cameras(twin):
        uri, authorities = camera.at("uri"), camera.at("tls", "caFile")
        if uri is not None:
            yield uri, _path(uri.text)
        if authorities is not None:
            yield authorities, authorities.text
    certificate = twin.at("inference", "remote", "certificate") if twin is not None else None
    for node in (*(model.at("path") for model in _models(twin)), certificate):
        if node is not None:
            yield node, node.text
    for name in ("CONFIG", "MODEL"):
        variable = variables.get(f"{_VARIABLE_PREFIX}{name}")
        if variable is not None:
            yield variable, variable.text
    words = module.option_items("Cmd")
    for option, value in itertools.pairwise(words):
        if option.text in ("--config", "--model"):
            yield value, value.text


def _cameras(twin: JsonNode | None) -> Iterable[JsonNode]:
    cameras = twin.at("cameras") if twin is not None else None
    return cameras.entries.values() if cameras is not None else ()


def _models(twin: JsonNode | None) -> list[JsonNode]:
    """The section `model`, and those of `models`."""
    if twin is None:
        return []
    first, others = twin.at("model"), twin.at("models")
    return [*(() if first is None else (first,)), *(others.entries.values() if others is not None else ())]


def _remote_addresses(twin: JsonNode | None) -> list[JsonNode]:
    """The addresses of `inference.remote`: one, or a list of replicas."""
    node = twin.at("inference", "remote", "url") if twin is not None else None
    return [
        each for each in (node, *(node.items if node is not None else ())) if each is not None and each.text
    ]


def _holes(variables: Mapping[str, JsonNode], twin: JsonNode | None, findings: LintFindings) -> None:
    """`<names>` that are not filled in."""
    uris = [camera.at("uri") for camera in _cameras(twin)]
    models = [model.at("url") for model in _models(twin)]
    for node in (*variables.values(), *uris, *models, *_remote_addresses(twin)):
        if node is not None and find_angle_placeholder(node.text):
            findings.warning(node, "is still to be filled in", "replace <…>")


def _bad_addresses(twin: JsonNode, findings: LintFindings) -> None:
    """Hosts of cameras and servers that have the form of an IPv4 address and are none."""
    uris = [uri for camera in _cameras(twin) if (uri := camera.at("uri")) is not None]
    for node in (*uris, *_remote_addresses(twin)):
        host = _host(node.text)
        if re.fullmatch(r"[0-9.]+", host) and not _is_ipv4(host):
            findings.warning(
                node, f"{host[:40]} is no IP address", "write four numbers of 0 to 255, or a name"
            )


def _is_ipv4(text: str) -> bool:
    try:
        return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def _host(uri: str) -> str:
    try:
        return urlsplit(uri).hostname or ""
    except ValueError:
        return ""


def _local_addresses(module: EdgeModule, twin: JsonNode, findings: LintFindings) -> None:
    """Cameras and servers on the loopback, which is that of the container."""
    if on_host_network(module):
        return
    for camera in _cameras(twin):
        uri = camera.at("uri")
        if uri is not None and _is_local_stream(uri.text):
            what = "is an address of the container itself: no camera is there"
            findings.warning(uri, what, "write the camera's address, or the name of the module that has it")
    for url in _remote_addresses(twin):
        if _is_local(url.text):
            what = "is an address of the container itself: no other server is there"
            findings.warning(url, what, "write the server's address, or the name of its module")


def _is_local_stream(uri: str) -> bool:
    try:
        camera = parse_camera_uri(uri)
        host = urlsplit(camera.target).hostname if camera.kind in ("rtsp", "http") else None
    except (ConfigError, ValueError):
        return False
    return is_loopback(host) or host in _ANY


def _is_local(url: str) -> bool:
    host = _host(url)
    return is_loopback(host) or host in _ANY


def _budget(twin: JsonNode, findings: LintFindings) -> None:
    node = twin.at("telemetry", "maxPerDay")
    if node is None or isinstance(node.value, bool) or not isinstance(node.value, int | float):
        return
    quota = UNIT_BLOCKS_PER_DAY[S1]
    if node.value <= quota:
        return
    units = ", ".join(f"{-int(-node.value // each)} of {tier}" for tier, each in UNIT_BLOCKS_PER_DAY.items())
    what = f"lets the module send {node.value:,.0f} blocks of 4 KB a day; units of IoT Hub for it: {units}"
    remedy = f"write at most {quota} (a unit of {S1}), unless the hub has more; 'manifest estimate' counts"
    findings.warning(node, what, remedy)


_BIND = (
    'bind its folder, unless the image has it: {"HostConfig":{"Binds":["FOLDER:FOLDER:ro"]}}'
    " ('manifest generate --bind FOLDER:FOLDER:ro')"
)


def _device(path: str) -> str:
    device = f'{{"PathOnHost":"{path}","PathInContainer":"{path}","CgroupPermissions":"rw"}}'
    return f'add {{"HostConfig":{{"Devices":[{device}],"GroupAdd":["video"]}}}}'


def _path(uri: str) -> str:
    """The path of a camera's file or device; empty for another camera."""
    try:
        camera = parse_camera_uri(uri)
    except ConfigError:
        return ""
    return camera.target if camera.kind in ("v4l2", "file", "folder") else ""
