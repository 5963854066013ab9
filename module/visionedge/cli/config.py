"""`visionedge config`: check a configuration file, print the schema, translate that of Spatial Analysis."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import yaml

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_group,
    add_json,
    add_line_numbers,
    print_report,
)
from visionedge.config.documents import (
    MAX_BYTES,
    Document,
    add_locations,
    parse_json,
    read_configuration,
    read_text,
)
from visionedge.config.label_keys import list_label_keys
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.config.spatial_analysis import import_spatial_analysis
from visionedge.errors import ConfigError, ModelError, UnavailableError
from visionedge.runtime.redaction import redact

SCHEMA = "visionedge/config-check/1"
IMPORT_SCHEMA = "visionedge/config-import/1"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `config`."""
    commands = add_group(
        subparsers,
        "config",
        "check a configuration file before it is deployed; print the schema; translate Spatial Analysis",
        "  visionedge config check vision.yaml          every problem, with its line\n"
        "  visionedge config schema > vision.schema.json    for editors and pipelines\n"
        "  visionedge config import-spatial-analysis twin.json > vision.yaml",
    )
    check = add_command(
        commands,
        "check",
        _check,
        "read a file as `run` would, and report every problem with its line",
        "  visionedge config check vision.yaml\n"
        "  DOCK_PASSWORD=test visionedge config check vision.yaml --json     sets ${DOCK_PASSWORD}",
        notes="exit code 2 also means that the file has a problem; classes are checked if the model is here",
    )
    check.add_argument("file", metavar="FILE", help="a configuration, YAML or JSON")
    add_json(check)
    add_command(
        commands,
        "schema",
        _schema,
        "the JSON Schema of a configuration, the same for files and for desired properties",
        "  visionedge config schema > vision.schema.json",
    )
    _add_import(commands)


def _add_import(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "import-spatial-analysis",
        _import,
        "translate a configuration of Azure AI Vision Spatial Analysis; the YAML is printed",
        "  visionedge config import-spatial-analysis twin.json > vision.yaml\n"
        "  az iot hub module-twin show … | visionedge config import-spatial-analysis - > vision.yaml\n"
        "  visionedge config check vision.yaml",
        notes=(
            "each thing without a counterpart is a line on stderr, with its path. The messages are\n"
            "those of Spatial Analysis, too (telemetry.format); see docs/spatial-analysis.md"
        ),
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="JSON: a twin or a manifest with 'graphs', or a SPACEANALYTICS_CONFIG; '-' reads stdin",
    )
    parser.add_argument(
        "--hide-credentials",
        action="store_true",
        help="print ${NAME} for user names, passwords and queries of addresses; stderr says which variables"
        " to set (not for a twin, which has no ${NAME})",
    )
    add_json(parser)


def _check(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    try:
        checked = _read(path)
    except ConfigError as error:
        if not arguments.json:
            raise
        print_report(arguments, _make_document(path, error.problems), "")
        return ConfigError.exit_code
    cameras = ", ".join(checked.cameras) or "none"
    text = f"{path}: no problems found; cameras: {cameras}\n"
    print_report(arguments, _make_document(path, ()), text)
    return 0


def _read(path: Path) -> Config:
    """The configuration in a file.

    Raises:
        ConfigError: every problem, with its line.
    """
    with add_line_numbers(path, os.environ):
        checked = parse_config(read_configuration(path, os.environ))
    if unknown := _find_unknown_classes(checked):
        raise ConfigError(add_locations(unknown, path))
    return checked


def _find_unknown_classes(config: Config) -> list[str]:
    """The labels that the models do not have; none of a model whose file is not on this machine."""
    from visionedge.model.model import find_bundled_model, load_model
    from visionedge.model.postprocess import find_unknown_classes

    problems: list[str] = []
    for name, keys in list_label_keys(config).items():
        given = config.find_model(name)
        if not keys or given.url is not None:
            continue
        with suppress(ModelError, UnavailableError):  # `run` reports a model that cannot be used
            model = load_model(Path(given.path) if given.path else find_bundled_model())
            problems += find_unknown_classes(replace(model, name=name or model.name), keys)
    return problems


def _import(arguments: argparse.Namespace) -> int:
    try:
        imported = import_spatial_analysis(
            parse_json(_read_source(arguments.file), arguments.file),
            hide_credentials=arguments.hide_credentials,
        )
    except ConfigError as error:
        if not arguments.json:
            raise
        empty: Document = {"configuration": None, "ignored": [], "variables": {}}
        problems = [redact(each) for each in error.problems]
        head = {"schema": IMPORT_SCHEMA, "file": arguments.file, "problems": problems}
        print_report(arguments, head | empty, "")
        return ConfigError.exit_code
    for line in imported.ignored:
        print(f"visionedge: {line}", file=sys.stderr)
    for name, what in imported.variables.items():
        print(f"visionedge: set the environment variable {name}: {what}", file=sys.stderr)
    if imported.has_credentials:
        print(
            "visionedge: addresses of cameras have credentials: keep the output private, or"
            " use --hide-credentials",
            file=sys.stderr,
        )
    document: Document = {
        "schema": IMPORT_SCHEMA,
        "file": arguments.file,
        "problems": [],
        "configuration": imported.document,
        "ignored": list(imported.ignored),
        "variables": dict(imported.variables),
    }
    print_report(arguments, document, _format_yaml(imported.document))
    return 0


def _read_source(name: str) -> str:
    """The text of a file; of stdin if the name is ``-``."""
    if name != "-":
        return read_text(Path(name))
    try:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(["-: cannot be read: is not UTF-8 text"]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([f"-: cannot be read: larger than {MAX_BYTES / 2**20:.3g} MiB"])
    return text


def _format_yaml(document: Document) -> str:
    """A configuration as YAML, the points of a polygon in lines."""
    text: str = yaml.safe_dump(
        document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1_000_000
    )
    return text


def _make_document(path: Path, problems: Sequence[str]) -> Document:
    return {"schema": SCHEMA, "file": str(path), "problems": [redact(each) for each in problems]}


def _schema(_arguments: argparse.Namespace) -> int:
    from visionedge.config.json_schema import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    return 0
