"""Checks of $edgeAgent: runtime, registries, system modules and modules; and the images of templates.

`read_agent` returns all modules as `EdgeModule`, for the other checks.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionedge.ops.manifest.docker_api import is_create_options, read_create_options
from visionedge.ops.manifest.docker_values import check_docker_values
from visionedge.ops.manifest.document import (
    EDGE_AGENT,
    JsonNode,
    LintFindings,
    Manifest,
    find_angle_placeholder,
    has_placeholder,
)
from visionedge.ops.support_dates import IOT_EDGE_TAG, find_image_support
from visionedge.runtime.files import read_regular_file

SCHEMA_VERSIONS = ("1.0", "1.1")
MAX_MODULES = 50
MAX_STARTUP_ORDER = 4_294_967_295

_FOLDER_PLACEHOLDER = re.compile(r"\$\{MODULEDIR<(?P<folder>[^<>]*)>(?:\.(?P<platform>[^{}]+))?\}")
_NAME_PLACEHOLDER = re.compile(r"\$\{MODULES\.(?P<name>[^.{}]+)(?:\.(?P<platform>[^{}]+))?\}")
_MODULES = "modules"
_MAX_MODULE_FILE_BYTES = 2**20
_MODULE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ENV_NAME = re.compile(r"[^+#$\s.]+")
_IMAGE = re.compile(
    r"(?:(?P<host>[^/\s]*)/)?(?P<path>(?:[^/\s]*/)*[^/:@\s]+)"
    r"(?::(?P<tag>[^/:@\s]+))?(?:@sha256:(?P<digest>[^/\s]+))?"
)
# Placeholders of other tools in templates: `__NAME__` and `#NAME#`.
_FOREIGN_PLACEHOLDER = re.compile(r"__[A-Z]|#[^#]+#")
_TAG_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9A-Fa-f:]+\](?::\d{1,5})?")
# Of the lower-case letters; capitals have a finding of their own.
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UPSTREAM = re.compile(r"\$upstream:[1-9]", re.IGNORECASE)
_TAG = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_MOVING_TAG = "1.6"
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
    name: f"mcr.microsoft.com/azureiotedge-{name[4:].lower()}:{IOT_EDGE_TAG}" for name in SYSTEM_MODULES
}


@dataclass(frozen=True, slots=True)
class EdgeModule:
    """A module of edgeAgent. `options`: its createOptions; `env`: the values of its variables."""

    name: str
    node: JsonNode
    image: str = ""
    options: JsonNode | None = None
    env: Mapping[str, JsonNode] = field(default_factory=dict)

    def option(self, *keys: str) -> JsonNode | None:
        """The node below these keys of its createOptions, if there is one."""
        return self.options.at(*keys) if self.options is not None else None

    def option_entries(self, *keys: str) -> Mapping[str, JsonNode]:
        """The entries of an object in its createOptions; empty without it."""
        found = self.option(*keys)
        return found.entries if found is not None else {}

    def option_items(self, *keys: str) -> tuple[JsonNode, ...]:
        """The items of a list in its createOptions; empty without it."""
        found = self.option(*keys)
        return found.items if found is not None else ()

    def image_node(self) -> JsonNode:
        """The node of its image, or that of the module without an image."""
        return self.node.at("settings", "image") or self.node


def read_agent(manifest: Manifest, findings: LintFindings) -> dict[str, EdgeModule]:
    """Check the desired properties of edgeAgent; returns all modules by name, system modules included."""
    if EDGE_AGENT not in manifest.twins:
        if not manifest.layered:
            findings.error(manifest.content.missing(EDGE_AGENT), "is missing", "add it: it has the modules")
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
        findings.error(modules, f"are {len(others)} modules", f"the limit of IoT Hub is {MAX_MODULES}")
    for name, node in others.items():
        found[name] = _module(name, node, manifest.template, findings)
    check_support(found, findings)
    _check_start_order(parts.get("schemaVersion"), found, findings)
    return found


def _check_start_order(
    version: JsonNode | None, modules: Mapping[str, EdgeModule], findings: LintFindings
) -> None:
    for module in modules.values():
        order = module.node.entries.get("startupOrder")
        if order is not None and version is not None and version.text == "1.0":
            findings.warning(order, "is ignored under schemaVersion 1.0", 'write "schemaVersion": "1.1"')


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
            text = findings.text(
                findings.required(registry, key, "without it no image is pulled from this registry")
            )
            if key == "address" and text is not None and ("://" in text or re.search(r"\s", text)):
                findings.error(
                    registry.entries[key],
                    "is not a host name",
                    "write it without scheme: registry.example.com",
                )
            elif text is not None and not text.strip():
                findings.error(registry.entries[key], "is empty", "write it, or remove this registry")
            elif text is not None and find_angle_placeholder(text):
                findings.error(registry.entries[key], "is still to be filled in", "replace <…>")


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
        findings.warning(where, "has another version than edgeAgent", "use the same tag for both")
    return found


def _tag(image: str) -> re.Match[str] | None:
    return _TAG.match(image.rpartition("/")[2].partition(":")[2])


def _check_system_image(name: str, module: EdgeModule, findings: LintFindings) -> None:
    """Report swapped images."""
    other = {"edgeAgent": "hub", "edgeHub": "agent"}[name]
    if f"azureiotedge-{other}" in module.image:
        what, where = f"is not the image of {name}", module.image_node()
        findings.error(where, what, f"write {_RECOMMENDED_IMAGE[name]}")


def check_support(modules: Mapping[str, EdgeModule], findings: LintFindings) -> None:
    """Report images of Microsoft that are out of support or have a known fault."""
    for module in modules.values():
        where = module.image_node()
        if module.image.endswith(f"azureiotedge-hub:{_MOVING_TAG}"):
            what = "may be 1.6.1 on a device that pulled it before, which loses MQTT connections"
            findings.warning(where, what, f"write the tag {IOT_EDGE_TAG}")
        for entry in find_image_support(module.image):
            if entry.state == "faulty" and entry.product == "edgeHub":
                findings.error(where, entry.describe(), entry.remedy)
            elif entry.state == "ended" or (entry.state == "faulty" and not _sends_to_hub(module)):
                report = findings.note if entry.ended_lately else findings.warning
                report(where, entry.describe(), entry.remedy)


def _sends_to_hub(module: EdgeModule) -> bool:
    """Whether a metrics collector sends messages to IoT Hub, not to Azure Monitor."""
    target = module.env.get("UploadTarget")
    return target is not None and target.text.lower() == "iotmessage"


def _module(name: str, node: JsonNode, template: bool, findings: LintFindings) -> EdgeModule:
    if not _MODULE_ID.fullmatch(name) and not (template and has_placeholder(name)):
        remedy = "write 1 to 128 letters, digits, '_' and '-'"
        findings.error(node, "is not a valid module name", remedy)
    findings.known_entries(node, _MODULE_KEYS, "edgeAgent")
    module = _read(name, node, SYSTEM_MODULES["edgeHub"], template, findings)
    policy = node.entries.get("restartPolicy")
    if policy is not None and policy.text == "on-unhealthy":
        findings.warning(
            policy, "has no effect: edgeAgent does not check the health of modules", "write always"
        )
    return module


def _read(
    name: str, node: JsonNode, required: tuple[str, ...], template: bool, findings: LintFindings
) -> EdgeModule:
    """Read a module; these checks apply to system modules and others."""
    for key in required:
        remedy = f"write {_VALUES[key][0]}" if key in _VALUES else 'write {"image": …}'
        findings.required(node, key, remedy)
    for key, choices in _VALUES.items():
        findings.choice(node.entries.get(key), choices)
    findings.text(node.entries.get("version"))
    findings.integer(node.entries.get("startupOrder"), 0, MAX_STARTUP_ORDER)
    env = _environment(node.entries.get("env"), findings)
    settings = node.entries.get("settings")
    if settings is None:
        return EdgeModule(name, node, env=env)
    for key, item in findings.mapping(settings).items():
        if key not in ("image", "digest") and not is_create_options(key):
            findings.warning(item, "is not a key of edgeAgent", "known keys: image, createOptions")
    options = read_create_options(settings, template=template, findings=findings)
    check_docker_values(options, findings)
    return EdgeModule(name, node, _image(settings, template, findings), options, env)


def _image(settings: JsonNode, template: bool, findings: LintFindings) -> str:
    node = findings.required(
        settings, "image", "write the image, such as registry.example.com/visionedge:1.0"
    )
    image = findings.text(node)
    if node is None or image is None:
        return ""
    # The value of a placeholder is unknown, and $upstream is the parent of a nested device.
    may_be_filled = template and ("$" in image or _FOREIGN_PLACEHOLDER.search(image))
    if not has_placeholder(image) and not may_be_filled:
        _check_image_name(_UPSTREAM.sub("parent:1", image.strip()), node, findings)
    return image


def _check_image_name(image: str, node: JsonNode, findings: LintFindings) -> None:
    if hole := find_angle_placeholder(image):
        findings.error(node, f"has {hole}, which is still to be filled in", "write the image's own name")
        return
    found = _IMAGE.fullmatch(image)
    if found is None:
        findings.error(node, "is not a valid image name", "write REGISTRY/NAME:TAG")
    elif found["digest"] is not None and not _DIGEST.fullmatch(found["digest"]):
        findings.error(node, "has an invalid digest", "write @sha256: and 64 digits of 0-9 and a-f")
    elif found["tag"] is not None and not _TAG_NAME.fullmatch(found["tag"]):
        what = f"has the tag {found['tag'][:40]!r}, which Docker refuses"
        findings.error(node, what, "use letters, digits, '_', '.' and '-' in the tag")
    elif not _is_name(image, found):
        findings.error(node, "is not a valid image name", "write REGISTRY/NAME:TAG, without a scheme")
    elif (repository := _repository(found)) != repository.lower():
        what = "has capitals in its repository, which Docker refuses"
        findings.error(node, what, f"write {repository.lower()}")


def _is_name(image: str, found: re.Match[str]) -> bool:
    """Whether registry and repository are names as Docker reads them, apart from capitals."""
    repository = _repository(found)
    has_host = repository == found["path"] and found["host"] is not None
    return (
        "://" not in image
        and (not has_host or _HOST_NAME.fullmatch(found["host"]) is not None)
        and _REPOSITORY.fullmatch(repository.lower()) is not None
    )


def _repository(image: re.Match[str]) -> str:
    """The name in a registry. Docker takes the first part as a host if it can be no name."""
    host, path = image["host"], image["path"]
    if host is None or any(c in host for c in ".:") or host == "localhost" or host != host.lower():
        return path
    return f"{host}/{path}"


def _environment(env: JsonNode | None, findings: LintFindings) -> dict[str, JsonNode]:
    values = {}
    for name, variable in findings.mapping(env).items():
        if not _ENV_NAME.fullmatch(name):
            findings.error(
                variable, "is not a valid name of a variable", "use a name without spaces, '.', '$', '#', '+'"
            )
        findings.known_entries(variable, ("value",), "edgeAgent")
        value = findings.required(variable, "value", 'write {"value": "…"}')
        if value is None:
            continue
        if isinstance(value.value, str | int | float):
            values[name] = value
        else:
            findings.error(value, "is not a valid value of a variable", "write a string")
    return values


# --- the module.json of a template --------------------------------------------------------------------------


def check_module_files(modules: Mapping[str, EdgeModule], folder: Path, findings: LintFindings) -> None:
    """Check the images of a template that are built from a module.json; `folder` is that of the template.

    `${MODULEDIR<FOLDER>.PLATFORM}` is FOLDER/module.json, and `${MODULES.NAME.PLATFORM}` is
    modules/NAME/module.json. The tools of IoT Edge keep an unknown placeholder without an error, and the
    device then refuses the deployment.
    """
    for module in modules.values():
        if found := _FOLDER_PLACEHOLDER.fullmatch(module.image):
            _check_module_file(module, Path(found["folder"]), found["platform"], folder, findings)
        elif found := _NAME_PLACEHOLDER.fullmatch(module.image):
            _check_module_file(module, Path(_MODULES) / found["name"], found["platform"], folder, findings)


def _check_module_file(
    module: EdgeModule, inner: Path, platform: str | None, folder: Path, findings: LintFindings
) -> None:
    where, file = module.image_node(), folder / inner / "module.json"
    try:
        document = json.loads(read_regular_file(file, max_bytes=_MAX_MODULE_FILE_BYTES))
        platforms = document["image"]["tag"]["platforms"]
        known = dict(platforms)
    except OSError as error:
        what = f"needs {inner}/module.json, which cannot be read ({error.strerror}); the placeholder stays"
        findings.error(where, what, _suggest_placeholder(folder, platform))
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        what = f"needs {inner}/module.json, which is not JSON with image.tag.platforms"
        findings.error(where, what, "create it with the tools of IoT Edge")
        return
    # Without a platform, or with the suffix of a debug build, the tools use their default platform.
    if platform is None or platform == "debug":
        return
    if platform not in known:
        remedy = f"known platforms: {', '.join(map(str, known)) or 'none'}"
        findings.error(where, f"has the platform {platform}, which is not in {inner}/module.json", remedy)
    elif not _dockerfile(folder / inner, known[platform]).is_file():
        remedy = f"correct image.tag.platforms in {inner}/module.json"
        findings.error(where, f"is built from {_shown(known[platform])}, which does not exist", remedy)


def _dockerfile(folder: Path, entry: Any) -> Path:
    return folder / (entry if isinstance(entry, str) and "\0" not in entry else "")


def _shown(entry: Any) -> str:
    return entry if isinstance(entry, str) else "no file"


def _suggest_placeholder(folder: Path, platform: str | None) -> str:
    """A placeholder for a module.json in a folder beside the template."""
    near = sorted(file.parent.name for file in folder.glob("*/module.json"))
    if not near:
        return "write ${MODULEDIR<FOLDER>.PLATFORM} with the folder of a module.json, or an image name"
    return f"write ${{MODULEDIR<./{near[0]}>{f'.{platform}' if platform else ''}}}"
