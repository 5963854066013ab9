"""`visionedge manifest lint`: read a deployment manifest and tell every problem of it."""

import ipaddress
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.config.documents import Document
from visionedge.errors import ConfigError
from visionedge.ops.manifest.agent import EdgeModule, read_agent
from visionedge.ops.manifest.document import (
    EDGE_AGENT,
    EDGE_HUB,
    MAX_TEXT_BYTES,
    JsonNode,
    LintFinding,
    LintFindings,
    Manifest,
    find_placeholders,
    has_placeholder,
    is_create_options,
    parse_json,
    read_manifest,
    to_one_line,
)
from visionedge.ops.manifest.gpu_options import (
    create_options_path,
    describe_gpu_access,
    read_module_environment,
    read_mounts,
    read_texts,
)
from visionedge.ops.manifest.module_settings import (
    DATA_FOLDER,
    MODULE_ID,
    check_configuration,
    check_visionedge_module,
    find_visionedge_modules,
)
from visionedge.ops.manifest.routes import check_routes
from visionedge.runtime.files import read_regular_file
from visionedge.runtime.redaction import find_secrets, register_secrets

# The container of edgeHub: where its store is, and which protocols it speaks.


_BOOLEAN_VARIABLES = ("OptimizeForPerformance", "UsePersistentStorage", "mqttSettings__enabled")


def check_hub(hub: EdgeModule, findings: LintFindings) -> None:
    """Judge what edgeHub needs so that messages reach it and outlive it."""
    variables = {
        n: node for n, node in read_module_environment(hub).items() if not has_placeholder(node.text)
    }
    for name in _BOOLEAN_VARIABLES:
        node = variables.get(name)
        if node is not None and node.text.lower() not in ("true", "false"):
            findings.warning(node, f"{name} is a truth value", 'write "true" or "false"')
    if _is_false(variables.get("mqttSettings__enabled")):
        where = variables["mqttSettings__enabled"]
        findings.error(where, "closes MQTT, over which visionedge speaks", "leave it out")
    if _is_false(variables.get("UsePersistentStorage")):
        where = variables["UsePersistentStorage"]
        findings.warning(
            where, "loses what edgeHub has acknowledged when it is started again", "leave it out"
        )
    elif "StorageFolder" in variables or "StorageFolder" not in read_module_environment(hub):
        _store(hub, variables.get("StorageFolder"), findings)


def _is_false(node: JsonNode | None) -> bool:
    return node is not None and node.text.lower() == "false"


def _store(hub: EdgeModule, folder: JsonNode | None, findings: LintFindings) -> None:
    """Its store is a volume, or goes with the container."""
    targets = [mount.target for mount in read_mounts(hub) if mount.target and mount.source]
    if folder is None:
        what = "edgeHub keeps its messages inside its container, and they go with it"
        remedy = (
            'write "env": {"StorageFolder": {"value": "/iotedge/storage"}}, and bind a volume to that folder'
        )
        findings.warning(hub.node, what, remedy)
    elif not any(f"{folder.text.rstrip('/')}/".startswith(f"{target}/") for target in targets):
        remedy = f'add {{"HostConfig":{{"Binds":["edgehub:{folder.text}"]}}}}'
        what = "nothing is bound to this folder: edgeHub's messages go with its container"
        findings.warning(create_options_path(hub), what, remedy)


# What modules cannot have twice: ports of the device, and a data folder.


_ANY = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


def check_conflicts(modules: Mapping[str, EdgeModule], ours: Sequence[str], findings: LintFindings) -> None:
    """Judge what the modules of a manifest share, and what of it they cannot."""
    taken: dict[str, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for binding, address, port in _published(module, findings):
            before = taken.setdefault(port, [])
            other = next((who for who, where in before if _overlaps(address, where)), None)
            if other is not None:
                what = f"publishes {port} of the device, as {other} does: only one of them can start"
                findings.error(binding, what, "give it a port of its own")
            before.append((name, address))
    _data_folders([modules[name] for name in ours], findings)


def _overlaps(one: str, other: str) -> bool:
    return one == other or one in _ANY or other in _ANY


def _published(module: EdgeModule, findings: LintFindings) -> Iterator[tuple[JsonNode, str, str]]:
    """The bindings of a module: their places, the addresses of the device, and ports as `8080/tcp`."""
    ports = module.options.at("HostConfig", "PortBindings") if module.options else None
    for inner, bindings in (ports.entries if ports else {}).items():
        protocol = inner.partition("/")[2] or "tcp"
        for binding in bindings.items:
            address, port = read_texts(binding, "HostIp", "HostPort")
            # Without a port Docker chooses one; of a range, too.
            if not port or "-" in port or has_placeholder(address) or has_placeholder(port):
                continue
            if not _is_address(address):
                findings.error(binding, "is published at no address", "write one, such as 127.0.0.1")
            elif not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
                findings.error(binding, "is published at no port", "write 1 to 65535")
            else:
                yield binding, address, f"{int(port)}/{protocol}"


def _is_address(text: str) -> bool:
    try:
        return not text or bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _data_folders(ours: Sequence[EdgeModule], findings: LintFindings) -> None:
    """Each module of ours keeps its spool and its models alone."""
    taken: dict[str, str] = {}
    for module in ours:
        for mount in read_mounts(module):
            if mount.target == DATA_FOLDER and mount.source:
                other = taken.setdefault(mount.source, module.name)
                if other != module.name:
                    what = f"is the data folder of {other} as well, and only one of them can have it"
                    findings.error(mount.node, what, f"write {module.name}-data:{DATA_FOLDER}")


# What is true of every twin: the limits of IoT Hub and edgeHub, placeholders, and secrets in templates.


MAX_TWIN_BYTES = 32_768
MAX_LEVELS = 10
MAX_KEY_BYTES = 1024
MAX_INTEGER = 2**52 - 1
_FORBIDDEN = frozenset(".$# ")
_NUMBER_BYTES = 8
_BOOLEAN_BYTES = 4


def check_twins(manifest: Manifest, names: frozenset[str], findings: LintFindings) -> None:
    """Judge the desired properties of each module as a twin; `names` are the modules that there are."""
    for module, twin in manifest.twins.items():
        if module not in names and module not in (EDGE_AGENT, EDGE_HUB) and not manifest.layered:
            remedy = "name a module that runs, or leave it out"
            findings.warning(twin, "are wished of a module that $edgeAgent does not run", remedy)
        size_bytes = _size(twin, 0, manifest.template, findings)
        if size_bytes > MAX_TWIN_BYTES:
            remedy = f"IoT Hub takes {MAX_TWIN_BYTES}; keep what is large elsewhere"
            findings.error(twin, f"are {size_bytes} bytes of keys and values", remedy)
    for node in manifest.content.walk():
        if not manifest.template and (placeholders := find_placeholders(node.text)):
            remedy = "fill it in, as the tools of IoT Edge and `visionedge manifest generate` do"
            findings.error(node, f"holds the placeholder {placeholders[0]}", remedy)
    if manifest.template:
        _secrets(manifest, findings)


def _size(node: JsonNode, level: int, template: bool, findings: LintFindings) -> int:
    """The bytes that IoT Hub counts, everything below a place judged on the way."""
    value = node.value
    if level > MAX_LEVELS:
        findings.error(node, f"lies deeper than {MAX_LEVELS} levels", "make the document flatter")
        return 0
    if isinstance(value, tuple):
        for item in node.items:
            if item.value is None:
                findings.error(item, "is null in a list, which no twin can hold", "leave it out")
        return sum(_size(item, level + 1, template, findings) for item in node.items)
    if node.entries:
        return sum(_entry(key, item, level + 1, template, findings) for key, item in node.entries.items())
    return _scalar(node, findings)


def _entry(key: str, item: JsonNode, level: int, template: bool, findings: LintFindings) -> int:
    key_bytes = len(key.encode(errors="surrogatepass"))
    if key_bytes > MAX_KEY_BYTES:
        findings.error(item, f"has a name of {key_bytes} bytes", f"a twin takes {MAX_KEY_BYTES}")
    if any(c in _FORBIDDEN or unicodedata.category(c) == "Cc" for c in key):
        findings.error(item, "has a name that no twin can hold", "write it without '.', '$', '#' and blanks")
    if template and is_create_options(key) and item.entries:
        return key_bytes + len(json.dumps(item.plain(), separators=(",", ":")))
    return key_bytes + _size(item, level, template, findings)


def _scalar(node: JsonNode, findings: LintFindings) -> int:
    value = node.value
    match value:
        case bool():
            return _BOOLEAN_BYTES
        case int():
            if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
                findings.error(node, "is a number beyond 52 bits", "no twin can hold it")
            return _NUMBER_BYTES
        case float():
            if not math.isfinite(value):
                findings.error(node, "is a number that nothing can hold", "write a smaller one")
            return _NUMBER_BYTES
        case str():
            size_bytes = len(value.encode(errors="surrogatepass"))
            if size_bytes > MAX_TEXT_BYTES:
                findings.error(node, f"is a text of {size_bytes} bytes", _shorter(node))
            return size_bytes
        case _:
            return 0


def _shorter(node: JsonNode) -> str:
    if is_create_options(node.path.rpartition(".")[2]):
        return "cut it into createOptions, createOptions01 … of 512 characters"
    return f"IoT Hub takes {MAX_TEXT_BYTES} in one"


def _secrets(manifest: Manifest, findings: LintFindings) -> None:
    for key, node in _texts(manifest.content):
        document: Document = {key: node.plain()}
        if any(not has_placeholder(secret) for secret in find_secrets(document)):
            remedy = "put ${NAME} in its place: templates are kept and shared, manifests are made of them"
            findings.warning(node, "is, or holds, a secret in plain text", remedy)


def _texts(node: JsonNode, key: str = "") -> Iterator[tuple[str, JsonNode]]:
    """The texts below a place, each with the key that it stands at."""
    if node.text:
        yield key, node
    for name, item in node.entries.items():
        yield from _texts(item, name)
    for item in node.items:
        yield from _texts(item, key)


# The module.json that a template's image placeholder stands for, looked up as the tools of IoT Edge do.
#
# `${MODULEDIR<FOLDER>.PLATFORM}` is the module.json in FOLDER, relative to the template's folder, and
# `${MODULES.NAME.PLATFORM}` is modules/NAME/module.json. Where there is none, the tools leave the placeholder
# in the manifest without an error, and the device refuses the deployment.


_FOLDER = re.compile(r"\$\{MODULEDIR<(?P<folder>[^<>]*)>(?:\.(?P<platform>[^{}]+))?\}")
_NAME = re.compile(r"\$\{MODULES\.(?P<name>[^.{}]+)(?:\.(?P<platform>[^{}]+))?\}")
_MODULES = "modules"
_MAX_MODULE_FILE_BYTES = 2**20


def check_module_files(modules: Mapping[str, EdgeModule], folder: Path, findings: LintFindings) -> None:
    """Judge the images of a template that are built from a module.json; `folder` is the template's."""
    for module in modules.values():
        if found := _FOLDER.fullmatch(module.image):
            _judge_module_file(module, Path(found["folder"]), found["platform"], folder, findings)
        elif found := _NAME.fullmatch(module.image):
            _judge_module_file(module, Path(_MODULES) / found["name"], found["platform"], folder, findings)


def _judge_module_file(
    module: EdgeModule, inner: Path, platform: str | None, folder: Path, findings: LintFindings
) -> None:
    where, file = module.image_node(), folder / inner / "module.json"
    try:
        document = json.loads(read_regular_file(file, max_bytes=_MAX_MODULE_FILE_BYTES))
        platforms = document["image"]["tag"]["platforms"]
        known = dict(platforms)
    except OSError as error:
        what = f"leads to {inner}/module.json, which cannot be read ({error.strerror}): it is never filled in"
        findings.error(where, what, _suggest_placeholder(folder, platform))
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        what = f"leads to {inner}/module.json, which is no JSON with image.tag.platforms"
        findings.error(where, what, "write it as the tools of IoT Edge make it")
        return
    # Without a platform, or with the suffix of a debug build, the tools take the one they are set to.
    if platform is None or platform == "debug":
        return
    if platform not in known:
        remedy = f"known there: {', '.join(map(str, known)) or 'none'}"
        findings.error(
            where, f"names the platform {platform}, which {inner}/module.json does not have", remedy
        )
    elif not _dockerfile(folder / inner, known[platform]).is_file():
        remedy = f"mend image.tag.platforms in {inner}/module.json"
        findings.error(where, f"is built from {_shown(known[platform])}, which is not there", remedy)


def _dockerfile(folder: Path, entry: Any) -> Path:
    return folder / (entry if isinstance(entry, str) and "\0" not in entry else "")


def _shown(entry: Any) -> str:
    return entry if isinstance(entry, str) else "no file"


def _suggest_placeholder(folder: Path, platform: str | None) -> str:
    """The placeholder that would do, where a module.json is near."""
    near = sorted(file.parent.name for file in folder.glob("*/module.json"))
    if not near:
        return (
            "write ${MODULEDIR<FOLDER>.PLATFORM} with the folder of the module.json, or the name of an image"
        )
    return f"write ${{MODULEDIR<./{near[0]}>{f'.{platform}' if platform else ''}}}"


SCHEMA = "visionedge/manifest-lint/1"

MAX_MANIFEST_BYTES = 8_000_000
"""Five times what 50 modules with full twins take."""


@dataclass(frozen=True, slots=True)
class LintReport:
    """What is wrong with a manifest; `modules` are those that are visionedge, and what GPU each is handed."""

    name: str
    kind: str
    modules: Mapping[str, str]
    findings: tuple[LintFinding, ...]

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "file": to_one_line(self.name),
            "kind": self.kind,
            "modules": [
                {"id": to_one_line(name), "gpuAccess": gpu_access}
                for name, gpu_access in self.modules.items()
            ],
            "errors": self.errors,
            "warnings": len(self.findings) - self.errors,
            "findings": [finding.document() for finding in self.findings],
        }

    def to_text(self) -> str:
        """For people: a line for each finding, and how many there are."""
        warnings = len(self.findings) - self.errors
        counts = f"{_count(self.errors, 'error')}, {_count(warnings, 'warning')}"
        summary = f"{self.name}: {counts if self.findings else 'nothing is wrong'}"
        modules = [f"{name}: is handed {gpu_access}" for name, gpu_access in self.modules.items()]
        lines = [*(finding.line() for finding in self.findings), *map(to_one_line, [*modules, summary])]
        return "\n".join(lines) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def lint_manifest(
    data: bytes, name: str, modules: Sequence[str] = (), *, folder: Path | None = None
) -> LintReport:
    """Judge the manifest in the bytes of a file.

    Args:
        data: the content of the file.
        name: that of the file; one in `.template.json` is a template.
        modules: which modules are visionedge; without any, those of that image or of the id `vision`.
        folder: where a template lies, to find the module.json that its placeholders stand for; None: they are
            not looked up.

    Raises:
        ConfigError: it is no JSON, or has none of the modules that were named; a line of its own.
    """
    document = _read_json(data, name)
    findings = LintFindings()
    manifest = read_manifest(document, name, findings)
    found = read_agent(manifest, findings)
    known = {**manifest.twins, **found}
    if missing := [module for module in modules if module not in known]:
        raise ConfigError(
            [f"{name}: there is no module {missing[0]}; there are {', '.join(sorted(known)) or 'none'}"]
        )
    ours = _run_checks(manifest, found, modules, findings)
    if manifest.template and folder is not None:
        check_module_files(found, folder, findings)
    gpu_access = {module: describe_gpu_access(found[module]) for module in ours}
    return LintReport(name, manifest.kind, gpu_access, findings.all())


def _run_checks(
    manifest: Manifest, found: Mapping[str, EdgeModule], named: Sequence[str], findings: LintFindings
) -> list[str]:
    """Judge all of a manifest; the modules that are visionedge."""
    ours = find_visionedge_modules(found, named)
    check_routes(manifest, found, ours, findings)
    check_twins(manifest, frozenset(found), findings)
    if "edgeHub" in found:
        check_hub(found["edgeHub"], findings)
    check_conflicts(found, ours, findings)
    for name in ours:
        check_visionedge_module(found[name], manifest, findings)
    for name, twin in manifest.twins.items():
        # A layer may change the configuration of a module that another one runs.
        if name not in found and name in (*named, MODULE_ID):
            check_configuration(EdgeModule(name, twin), manifest, findings)
    if not ours and found and not manifest.layered:
        remedy = "name it with --module NAME"
        findings.warning(manifest.content, "none of the modules is known to be visionedge", remedy)
    return ours


def _read_json(data: bytes, name: str) -> JsonNode:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError([f"{name}: is larger than {MAX_MANIFEST_BYTES // 1_000_000} MB, and no manifest"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        hint = "; PowerShell's '>' writes UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError([f"{name}: is no UTF-8 text{hint}"]) from None
    try:
        document = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{name}:{error.lineno}:{error.colno}: is no JSON: {error.msg}"]) from None
    except ConfigError as error:
        raise ConfigError([f"{name}: {error}"]) from None
    # From here on they are masked wherever they turn up; placeholders stand for them, and are none.
    register_secrets(secret for secret in find_secrets(document.plain()) if not has_placeholder(secret))
    return document
