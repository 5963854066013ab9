"""`visionedge manifest lint`: read a deployment manifest and tell every problem of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.errors import ConfigError
from visionedge.ops.manifest.agent import Module, read_agent
from visionedge.ops.manifest.document import Manifest, read_content
from visionedge.ops.manifest.findings import Finding, Findings, one_line
from visionedge.ops.manifest.gpu_options import passthrough
from visionedge.ops.manifest.hub import check_hub
from visionedge.ops.manifest.module_files import check_module_files
from visionedge.ops.manifest.module_settings import MODULE, check_configuration, check_vision, which
from visionedge.ops.manifest.place import Place, parse
from visionedge.ops.manifest.placeholders import has_placeholder
from visionedge.ops.manifest.routes import check_routes
from visionedge.ops.manifest.together import check_together
from visionedge.ops.manifest.twins import check_twins
from visionedge.runtime.redaction import keep_secret, secrets_in

SCHEMA = "visionedge/manifest-lint/1"

MAX_BYTES = 8_000_000
"""Five times what 50 modules with full twins take."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is wrong with a manifest; `modules` are those that are visionedge, and what GPU each is handed."""

    name: str
    kind: str
    modules: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "file": one_line(self.name),
            "kind": self.kind,
            "modules": [{"id": one_line(name), "handed": handed} for name, handed in self.modules.items()],
            "errors": self.errors,
            "warnings": len(self.findings) - self.errors,
            "findings": [finding.document() for finding in self.findings],
        }

    def words(self) -> str:
        """For people: a line for each finding, and how many there are."""
        warnings = len(self.findings) - self.errors
        told = f"{_count(self.errors, 'error')}, {_count(warnings, 'warning')}"
        summary = f"{self.name}: {told if self.findings else 'nothing is wrong'}"
        modules = [f"{name}: is handed {handed}" for name, handed in self.modules.items()]
        lines = [*(finding.line() for finding in self.findings), *map(one_line, [*modules, summary])]
        return "\n".join(lines) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def lint(data: bytes, name: str, modules: Sequence[str] = (), *, folder: Path | None = None) -> Report:
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
    document = _read(data, name)
    findings = Findings()
    manifest = read_content(document, name, findings)
    found = read_agent(manifest, findings)
    known = {**manifest.twins, **found}
    if missing := [module for module in modules if module not in known]:
        raise ConfigError(
            [f"{name}: there is no module {missing[0]}; there are {', '.join(sorted(known)) or 'none'}"]
        )
    ours = _judge(manifest, found, modules, findings)
    if manifest.template and folder is not None:
        check_module_files(found, folder, findings)
    handed = {module: passthrough(found[module]) for module in ours}
    return Report(name, manifest.kind, handed, findings.all())


def _judge(
    manifest: Manifest, found: Mapping[str, Module], named: Sequence[str], findings: Findings
) -> list[str]:
    """Judge all of a manifest; the modules that are visionedge."""
    ours = which(found, named)
    check_routes(manifest, found, ours, findings)
    check_twins(manifest, frozenset(found), findings)
    if "edgeHub" in found:
        check_hub(found["edgeHub"], findings)
    check_together(found, ours, findings)
    for name in ours:
        check_vision(found[name], manifest, findings)
    for name, twin in manifest.twins.items():
        # A layer may change the configuration of a module that another one runs.
        if name not in found and name in (*named, MODULE):
            check_configuration(Module(name, twin), manifest, findings)
    if not ours and found and not manifest.layered:
        remedy = "name it with --module NAME"
        findings.warning(manifest.content, "none of the modules is known to be visionedge", remedy)
    return ours


def _read(data: bytes, name: str) -> Place:
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{name}: is larger than {MAX_BYTES // 1_000_000} MB, and no manifest"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        hint = "; PowerShell's '>' writes UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError([f"{name}: is no UTF-8 text{hint}"]) from None
    try:
        document = parse(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{name}:{error.lineno}:{error.colno}: is no JSON: {error.msg}"]) from None
    except ConfigError as error:
        raise ConfigError([f"{name}: {error}"]) from None
    # From here on they are masked wherever they turn up; placeholders stand for them, and are none.
    keep_secret(secret for secret in secrets_in(document.plain()) if not has_placeholder(secret))
    return document
