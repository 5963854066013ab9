"""The twin of edgeAgent: the runtime, its own two modules and everybody else's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from visionedge.ops.manifest.document import (
    EDGE_AGENT,
    JsonNode,
    LintFindings,
    Manifest,
    child_path,
    has_placeholder,
    is_create_options,
    read_create_options,
)

SCHEMA_VERSIONS = ("1.0", "1.1")
MAX_MODULES = 50
MAX_STARTUP_ORDER = 4_294_967_295

_MODULE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ENV_NAME = re.compile(r"[^+#$\s.]+")
_IMAGE = re.compile(r"(?:[^/\s]*/)*[^/:\s]+(?::[^/:\s]+)?")
_UPSTREAM = re.compile(r"\$upstream:[1-9]", re.IGNORECASE)
_TAG = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_MODULE_KEYS = (
    *("type", "status", "restartPolicy", "settings", "env"),
    *("startupOrder", "imagePullPolicy", "version"),
)
SYSTEM_MODULES = {
    "edgeAgent": ("type", "settings"),
    "edgeHub": ("type", "status", "restartPolicy", "settings"),
}
_SYSTEM_KEYS = {
    "edgeAgent": ("type", "settings", "env", "imagePullPolicy", "version"),
    "edgeHub": _MODULE_KEYS,
}
_VALUES: Mapping[str, tuple[str, ...]] = {
    "type": ("docker",),
    "status": ("running", "stopped"),
    "restartPolicy": ("always", "on-failure", "on-unhealthy", "never"),
    "imagePullPolicy": ("on-create", "never"),
}
_RECOMMENDED_IMAGE = {
    name: f"mcr.microsoft.com/azureiotedge-{name[4:].lower()}:1.5" for name in SYSTEM_MODULES
}


@dataclass(frozen=True, slots=True)
class EdgeModule:
    """A module as edgeAgent sees it. `options` are its createOptions, `env` the values of its variables."""

    name: str
    node: JsonNode
    image: str = ""
    options: JsonNode | None = None
    env: Mapping[str, JsonNode] = field(default_factory=dict)

    def image_node(self) -> JsonNode:
        """Where its image stands, or the module where none does."""
        return self.node.at("settings", "image") or self.node


def read_agent(manifest: Manifest, findings: LintFindings) -> dict[str, EdgeModule]:
    """Judge what edgeAgent is told; all modules by name, `edgeAgent` and `edgeHub` among them."""
    if EDGE_AGENT not in manifest.twins:
        if not manifest.layered:
            findings.error(
                child_path(manifest.content.path, EDGE_AGENT), "is missing", "it says which modules run"
            )
        return {}
    desired = manifest.twins[EDGE_AGENT]
    parts = findings.known_entries(
        desired, ("schemaVersion", "runtime", "systemModules", "modules"), "edgeAgent"
    )
    findings.choice(findings.required(desired, "schemaVersion", 'write "1.1"'), SCHEMA_VERSIONS)
    _runtime(findings.required(desired, "runtime", 'write {"type": "docker", "settings": {…}}'), findings)
    found: dict[str, EdgeModule] = {}
    system = findings.required(desired, "systemModules", "edgeAgent and edgeHub belong there")
    if system is not None:
        found |= _system_modules(system, manifest.template, findings)
    modules = findings.required(desired, "modules", "write {} if there are none")
    others = findings.mapping(modules)
    if len(others) > MAX_MODULES and modules is not None:
        findings.error(modules, f"are {len(others)} modules", f"IoT Hub takes {MAX_MODULES} at most")
    for name, node in others.items():
        found[name] = _module(name, node, manifest.template, findings)
    _check_start_order(parts.get("schemaVersion"), found, findings)
    return found


def _check_start_order(
    version: JsonNode | None, modules: Mapping[str, EdgeModule], findings: LintFindings
) -> None:
    for module in modules.values():
        order = module.node.entries.get("startupOrder")
        if order is not None and version is not None and version.text == "1.0":
            findings.warning(order, "is not read under schemaVersion 1.0", 'write "schemaVersion": "1.1"')


def _runtime(runtime: JsonNode | None, findings: LintFindings) -> None:
    if runtime is None:
        return
    findings.known_entries(runtime, ("type", "settings"), "edgeAgent")
    findings.choice(findings.required(runtime, "type", "write docker"), _VALUES["type"])
    settings = findings.required(runtime, "settings", 'write {"minDockerVersion": "v1.25"}')
    if settings is None:
        return
    entries = findings.known_entries(
        settings, ("minDockerVersion", "loggingOptions", "registryCredentials"), "edgeAgent"
    )
    findings.text(findings.required(settings, "minDockerVersion", 'write "v1.25"'))
    findings.text(entries.get("loggingOptions"))
    for registry in findings.mapping(entries.get("registryCredentials")).values():
        findings.known_entries(registry, ("address", "username", "password"), "edgeAgent")
        for key in ("address", "username", "password"):
            text = findings.text(findings.required(registry, key, "without it nothing is pulled from there"))
            if key == "address" and text is not None and ("://" in text or re.search(r"\s", text)):
                findings.error(
                    registry.entries[key], "is no host name", "write it bare: registry.example.com"
                )


def _system_modules(system: JsonNode, template: bool, findings: LintFindings) -> dict[str, EdgeModule]:
    findings.known_entries(system, tuple(SYSTEM_MODULES), "edgeAgent")
    found = {}
    for name, required in SYSTEM_MODULES.items():
        node = findings.required(system, name, f'its image is "{_RECOMMENDED_IMAGE[name]}"')
        if node is not None:
            findings.known_entries(node, _SYSTEM_KEYS[name], f"edgeAgent, for {name},")
            found[name] = _read(name, node, required, template, findings)
    for name, module in found.items():
        _check_system_image(name, module, findings)
    tags = {name: match.groups()[:2] for name, module in found.items() if (match := _tag(module.image))}
    if len(set(tags.values())) > 1:
        where = found["edgeHub"].image_node()
        findings.warning(where, "is of another version than edgeAgent", "give both the same tag")
    return found


def _tag(image: str) -> re.Match[str] | None:
    return _TAG.match(image.rpartition("/")[2].partition(":")[2])


def _check_system_image(name: str, module: EdgeModule, findings: LintFindings) -> None:
    """Images that are known not to do what they should."""
    where, other = module.image_node(), {"edgeAgent": "hub", "edgeHub": "agent"}[name]
    if f"azureiotedge-{other}" in module.image:
        findings.error(where, f"is not the image of {name}", f"write {_RECOMMENDED_IMAGE[name]}")
    found = _tag(module.image)
    if found is None:
        return
    version = tuple(int(part) for part in found.groups() if part is not None)
    if name == "edgeHub" and version in ((1, 6, 0), (1, 6, 1)):
        what = "loses MQTT connections, over which visionedge speaks"
        findings.error(where, what, f"write {_RECOMMENDED_IMAGE[name]}, or a 1.6 after 1.6.1")
    elif name == "edgeHub" and version == (1, 6):
        what = "may be 1.6.1, which loses MQTT connections, over which visionedge speaks"
        findings.warning(where, what, f"write {_RECOMMENDED_IMAGE[name]}, or the tag of a 1.6 after 1.6.1")
    elif version[:2] < (1, 5):
        findings.warning(where, "is an IoT Edge that is out of support", f"write {_RECOMMENDED_IMAGE[name]}")


def _module(name: str, node: JsonNode, template: bool, findings: LintFindings) -> EdgeModule:
    if not _MODULE_ID.fullmatch(name):
        remedy = "write 1 to 128 letters, digits, '_' and '-'"
        findings.error(node, "is no name that a module can have", remedy)
    findings.known_entries(node, _MODULE_KEYS, "edgeAgent")
    module = _read(name, node, SYSTEM_MODULES["edgeHub"], template, findings)
    policy = node.entries.get("restartPolicy")
    if policy is not None and policy.text == "on-unhealthy":
        findings.warning(policy, "has no effect: the agent never asks for health", "write always")
    return module


def _read(
    name: str, node: JsonNode, required: tuple[str, ...], template: bool, findings: LintFindings
) -> EdgeModule:
    """A module; what is the same for those of the system and all others."""
    for key in required:
        remedy = f"write {_VALUES[key][0]}" if key in _VALUES else 'write {"image": …}'
        findings.required(node, key, remedy)
    for key, choices in _VALUES.items():
        findings.choice(node.entries.get(key), choices)
    findings.text(node.entries.get("version"))
    findings.whole(node.entries.get("startupOrder"), 0, MAX_STARTUP_ORDER)
    env = _environment(node.entries.get("env"), findings)
    settings = node.entries.get("settings")
    if settings is None:
        return EdgeModule(name, node, env=env)
    for key, item in findings.mapping(settings).items():
        if key not in ("image", "digest") and not is_create_options(key):
            findings.warning(item, "edgeAgent knows no such key", "known here: image, createOptions")
    options = read_create_options(settings, template=template, findings=findings)
    return EdgeModule(name, node, _image(settings, findings), options, env)


def _image(settings: JsonNode, findings: LintFindings) -> str:
    node = findings.required(settings, "image", "name what is to be run: registry.example.com/visionedge:1.0")
    image = findings.text(node)
    if node is None or image is None:
        return ""
    # What a placeholder becomes is not known, and $upstream is the parent of a nested device.
    if not has_placeholder(image) and not _IMAGE.fullmatch(_UPSTREAM.sub("parent:1", image.strip())):
        findings.error(node, "is no name of an image", "write REGISTRY/NAME:TAG")
    return image


def _environment(env: JsonNode | None, findings: LintFindings) -> dict[str, JsonNode]:
    values = {}
    for name, variable in findings.mapping(env).items():
        if not _ENV_NAME.fullmatch(name):
            findings.error(
                variable, "is no name of a variable", "write it without blanks, '.', '$', '#', '+'"
            )
        findings.known_entries(variable, ("value",), "edgeAgent")
        value = findings.required(variable, "value", 'write {"value": "…"}')
        if value is None:
            continue
        if isinstance(value.value, str | int | float):
            values[name] = value
        else:
            findings.error(value, "is no value of a variable", "write a text")
    return values
