"""`visionedge manifest lint`: reports every problem of a deployment manifest, with its place and remedy.

`lint_manifest` runs all checks: those of this file look at the whole manifest (limits of twins, placeholders,
secrets, conflicts between modules); `agent` checks $edgeAgent and the images, `docker_api` and
`docker_values` all createOptions, `routes` $edgeHub, `module_settings`, `container` and `gpu_options` the
modules that are visionedge.
"""

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
from visionedge.ops.manifest.agent import EdgeModule, check_module_files, read_agent
from visionedge.ops.manifest.docker_api import is_create_options
from visionedge.ops.manifest.document import (
    EDGE_AGENT,
    EDGE_HUB,
    MAX_TEXT_BYTES,
    JsonNode,
    LintFinding,
    LintFindings,
    Manifest,
    find_angle_placeholder,
    find_placeholders,
    has_placeholder,
    parse_json,
    read_manifest,
    to_one_line,
)
from visionedge.ops.manifest.gpu_options import describe_gpu_access, read_mounts, read_texts
from visionedge.ops.manifest.module_settings import (
    DATA_FOLDER,
    MODULE_ID,
    check_configuration,
    check_visionedge_module,
    find_visionedge_modules,
)
from visionedge.ops.manifest.routes import check_hub, check_routes
from visionedge.runtime.redaction import find_secrets, register_secrets

SCHEMA = "visionedge/manifest-lint/1"

MAX_MANIFEST_BYTES = 8_000_000
"""Five times what 50 modules with full twins take."""

MAX_TWIN_BYTES = 32_768
MAX_LEVELS = 10
MAX_KEY_BYTES = 1024
MAX_INTEGER = 2**52 - 1
_FORBIDDEN = frozenset(".$# ")
_KEY_VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})", re.ASCII)
_NUMBER_BYTES = 8
_BOOLEAN_BYTES = 4
_ANY = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


@dataclass(frozen=True, slots=True)
class LintReport:
    """The problems of a manifest; `modules`: the modules that are visionedge, and the GPU access of each."""

    name: str
    kind: str
    modules: Mapping[str, str]
    findings: tuple[LintFinding, ...]

    @property
    def errors(self) -> int:
        """The number of errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """The number of warnings."""
        return sum(finding.severity == "warning" for finding in self.findings)

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
            "warnings": self.warnings,
            "notes": len(self.findings) - self.errors - self.warnings,
            "findings": [finding.document() for finding in self.findings],
        }

    def to_text(self) -> str:
        """As text: a line for each finding, which begins as those of compilers do, and their number."""
        counts = f"{_count(self.errors, 'error')}, {_count(self.warnings, 'warning')}"
        summary = f"{self.name}: {counts if self.errors or self.warnings else 'no problems'}"
        modules = [f"{name}: has {gpu_access}" for name, gpu_access in self.modules.items()]
        lines = [f"{self._place(finding)}: {finding.line()}" for finding in self.findings]
        return "\n".join([*lines, *map(to_one_line, [*modules, summary])]) + "\n"

    def _place(self, finding: LintFinding) -> str:
        return to_one_line(f"{self.name}:{finding.line_number}" if finding.line_number else self.name)


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def report_unreadable(name: str, error: "UnreadableManifestError") -> LintReport:
    """The report of a file that cannot be read as JSON: one error."""
    remedy = "correct the file, or make the manifest again"
    return LintReport(name, "unknown", {}, (LintFinding("error", "$", error.problem, remedy, error.line),))


class UnreadableManifestError(ConfigError):
    """The file cannot be read, or is not JSON. `line`: where, from 1; 0 if unknown."""

    def __init__(self, name: str, problem: str, line: int = 0, column: int = 0) -> None:
        place = f"{name}:{line}:{column}" if line else name
        super().__init__([f"{place}: {problem}"])
        self.problem, self.line = to_one_line(problem), line


def lint_manifest(
    data: bytes, name: str, modules: Sequence[str] = (), *, folder: Path | None = None
) -> LintReport:
    """Check the manifest in the bytes of a file.

    Args:
        data: the content of the file.
        name: its name; a name that ends with `.template.json` is a template.
        modules: the modules that are visionedge; if empty, those with its image or with the id `vision`.
        folder: the folder of a template, to find the module.json files of its placeholders; None: no check.

    Raises:
        UnreadableManifestError: the file is not JSON.
        ConfigError: it has none of the named modules.
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
    """Run the checks; returns the modules that are visionedge."""
    ours = find_visionedge_modules(found, named)
    check_routes(manifest, found, ours, findings)
    check_twins(manifest, frozenset(found), findings)
    if "edgeHub" in found:
        check_hub(found["edgeHub"], findings)
    check_conflicts(found, ours, findings)
    for name in ours:
        check_visionedge_module(found[name], manifest, findings)
    for name, twin in manifest.twins.items():
        # A layered deployment may change the configuration of a module that the base deployment runs.
        if name not in found and name in (*named, MODULE_ID):
            check_configuration(EdgeModule(name, twin), manifest, findings)
    if not ours and found and not manifest.layered:
        remedy = "name one with --module NAME"
        findings.note(manifest.content, "none of the modules is recognised as visionedge", remedy)
    return ours


def _read_json(data: bytes, name: str) -> JsonNode:
    if len(data) > MAX_MANIFEST_BYTES:
        what = f"is larger than {MAX_MANIFEST_BYTES // 1_000_000} MB, the limit of a manifest"
        raise UnreadableManifestError(name, what)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        hint = "; PowerShell's '>' writes UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UnreadableManifestError(name, f"is not UTF-8 text{hint}") from None
    try:
        document = parse_json(text)
    except json.JSONDecodeError as error:
        what = f"is not JSON: {error.msg}"
        raise UnreadableManifestError(name, what, error.lineno, error.colno) from None
    except ConfigError as error:
        raise UnreadableManifestError(name, str(error)) from None
    # All later output masks these values. A placeholder is not a secret.
    secrets = find_secrets(document.plain()) | find_secrets(_variables(document))
    secrets -= {user.text for node in document.walk() if (user := _container_user(node)) is not None}
    register_secrets(secret for secret in secrets if not has_placeholder(secret))
    return document


def _variables(document: JsonNode) -> Document:
    """The variables of all modules by name, whose values stand below the key `value`."""
    nodes = (node.at("env") for node in document.walk())
    return {
        name: value.plain()
        for env in nodes
        if env
        for name, item in env.entries.items()
        if (value := item.at("value"))
    }


def _container_user(node: JsonNode) -> JsonNode | None:
    """The user in the createOptions of a module's settings: no secret, unlike other users."""
    options = node.at("createOptions")
    entries = options.entries.items() if options is not None else ()
    return next((item for key, item in entries if key.lower() == "user"), None)


# --- every twin ---------------------------------------------------------------------------------------------


def check_twins(manifest: Manifest, names: frozenset[str], findings: LintFindings) -> None:
    """Check the desired properties of each module as a twin; `names` are the modules of $edgeAgent."""
    for module, twin in manifest.twins.items():
        if module not in names and module not in (EDGE_AGENT, EDGE_HUB) and not manifest.layered:
            remedy = "use the name of a module that runs, or remove it"
            findings.warning(twin, "are for a module that $edgeAgent does not run", remedy)
        size_bytes = _size(twin, 0, manifest.template, findings)
        if size_bytes > MAX_TWIN_BYTES:
            remedy = f"the limit of IoT Hub is {MAX_TWIN_BYTES}; store large data elsewhere"
            findings.error(twin, f"are {size_bytes} bytes of keys and values", remedy)
    for node in manifest.content.walk():
        if not manifest.template and (placeholders := find_placeholders(node.text)):
            remedy = "replace it, as the tools of IoT Edge and `visionedge manifest generate` do"
            findings.error(node, f"has the placeholder {placeholders[0]}", remedy)
    if manifest.template:
        _secrets(manifest, findings)


def _size(node: JsonNode, level: int, template: bool, findings: LintFindings) -> int:
    """The bytes that IoT Hub counts; everything below the node is checked on the way."""
    value = node.value
    if level > MAX_LEVELS:
        findings.error(node, f"is nested deeper than {MAX_LEVELS} levels", "use fewer levels")
        return 0
    if isinstance(value, tuple):
        for item in node.items:
            if item.value is None:
                findings.error(item, "is null in a list, which a twin cannot store", "remove it")
        return sum(_size(item, level + 1, template, findings) for item in node.items)
    if node.entries:
        return sum(_entry(key, item, level + 1, template, findings) for key, item in node.entries.items())
    return _scalar(node, findings)


def _entry(key: str, item: JsonNode, level: int, template: bool, findings: LintFindings) -> int:
    key_bytes = len(key.encode(errors="surrogatepass"))
    if key_bytes > MAX_KEY_BYTES:
        findings.error(item, f"has a name of {key_bytes} bytes", f"the limit of a twin is {MAX_KEY_BYTES}")
    # The tools of IoT Edge expand variables in keys too, such as the name of a registry.
    plain = _KEY_VARIABLE.sub("", key) if template else key
    if any(c in _FORBIDDEN or unicodedata.category(c) == "Cc" for c in plain):
        findings.error(
            item, "has a name that a twin cannot store", "use a name without '.', '$', '#' and spaces"
        )
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
                findings.error(
                    node, "is a number beyond 52 bits, which a twin cannot store", "use a smaller number"
                )
            return _NUMBER_BYTES
        case float():
            if not math.isfinite(value):
                findings.error(node, "is an infinite number", "use a smaller number")
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
        return "split it into createOptions, createOptions01 … of 512 characters"
    return f"the limit of IoT Hub is {MAX_TEXT_BYTES}"


def _secrets(manifest: Manifest, findings: LintFindings) -> None:
    users = {user.path for node in manifest.content.walk() if (user := _container_user(node)) is not None}
    for key, node in _texts(manifest.content):
        secrets = () if node.path in users else find_secrets({key: node.plain()})
        if not all(map(_is_no_secret, secrets)):
            remedy = "replace it by ${NAME}: templates are stored and shared"
            findings.warning(node, "contains a secret in plain text", remedy)


def _is_no_secret(text: str) -> bool:
    """Whether a text at the place of a secret is none: a placeholder, a `<name>`, or yes or no."""
    is_placeholder = (
        has_placeholder(text) or _KEY_VARIABLE.fullmatch(text) or find_angle_placeholder(text) == text
    )
    return bool(is_placeholder) or text.lower() in ("true", "false", "yes", "no")


def _texts(node: JsonNode, key: str = "") -> Iterator[tuple[str, JsonNode]]:
    """The strings below a node, each with its key."""
    if node.text:
        yield key, node
    for name, item in node.entries.items():
        # The name of a variable stands above the key `value`.
        yield from _texts(item, key if name == "value" else name)
    for item in node.items:
        yield from _texts(item, key)


# --- conflicts between modules ------------------------------------------------------------------------------


def check_conflicts(modules: Mapping[str, EdgeModule], ours: Sequence[str], findings: LintFindings) -> None:
    """Check what two modules cannot share: ports of the device, and the data folder."""
    taken: dict[str, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for binding, address, port in _published(module, findings):
            before = taken.setdefault(port, [])
            other = next((who for who, where in before if _overlaps(address, where)), None)
            if other is not None:
                what = f"publishes port {port} of the device, as {other} does: only one of them can start"
                findings.error(binding, what, "use another port")
            before.append((name, address))
    _data_folders([modules[name] for name in ours], findings)


def _overlaps(one: str, other: str) -> bool:
    return one == other or one in _ANY or other in _ANY


def _published(module: EdgeModule, findings: LintFindings) -> Iterator[tuple[JsonNode, str, str]]:
    """The port bindings of a module: node, address of the device, and port as `8080/tcp`."""
    for inner, bindings in module.option_entries("HostConfig", "PortBindings").items():
        protocol = inner.partition("/")[2] or "tcp"
        for binding in bindings.items:
            address, port = read_texts(binding, "HostIp", "HostPort")
            # Docker chooses a free port if there is none or a range.
            if not port or "-" in port or has_placeholder(address) or has_placeholder(port):
                continue
            if not _is_address(address):
                findings.error(binding, "has an invalid address", "write an IP address, such as 127.0.0.1")
            elif not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
                findings.error(binding, "has an invalid port", "write 1 to 65535")
            else:
                yield binding, address, f"{int(port)}/{protocol}"


def _is_address(text: str) -> bool:
    try:
        return not text or bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _data_folders(ours: Sequence[EdgeModule], findings: LintFindings) -> None:
    """Each visionedge module needs its own data folder."""
    taken: dict[str, str] = {}
    for module in ours:
        for mount in read_mounts(module):
            if mount.target == DATA_FOLDER and mount.source:
                other = taken.setdefault(mount.source, module.name)
                if other != module.name:
                    what = f"is also the data folder of {other}; two modules cannot share it"
                    findings.error(mount.node, what, f"write {module.name}-data:{DATA_FOLDER}")
