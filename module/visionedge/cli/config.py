"""`visionedge config`: check a configuration file, and print the schema of configurations."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_group,
    add_json,
    add_line_numbers,
    print_report,
)
from visionedge.config.documents import Document, add_locations, read_configuration
from visionedge.config.load import parse_config
from visionedge.config.schema import Config, list_class_keys
from visionedge.errors import ConfigError, ModelError, UnavailableError
from visionedge.runtime.redaction import redact

SCHEMA = "visionedge/config-check/1"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `config`."""
    commands = add_group(
        subparsers,
        "config",
        "check a configuration file before it is deployed; print the schema of configurations",
        "  visionedge config check vision.yaml          every problem, with its line\n"
        "  visionedge config schema > vision.schema.json    for editors and pipelines",
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
    add_schema_command(commands, "config")


def add_schema_command(commands: Subparsers, group: str) -> None:
    """Add the command `schema` below the command `group`."""
    add_command(
        commands,
        "schema",
        _schema,
        "the JSON Schema of a configuration, the same for files and for desired properties",
        f"  visionedge {group} schema > vision.schema.json",
    )


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
    """The classes that the model does not have; none where its file is not on this machine."""
    from visionedge.model.model import find_bundled_model, load_model
    from visionedge.model.postprocess import find_unknown_classes

    keys = {} if config.inference.classes is None else {"inference.classes": config.inference.classes}
    for name, camera in config.cameras.items():
        keys |= list_class_keys(name, camera)
    if not keys or config.model.url is not None:
        return []
    with suppress(ModelError, UnavailableError):  # `run` reports a model that cannot be used
        model = load_model(Path(config.model.path) if config.model.path else find_bundled_model())
        return find_unknown_classes(model, keys)
    return []


def _make_document(path: Path, problems: Sequence[str]) -> Document:
    return {"schema": SCHEMA, "file": str(path), "problems": [redact(each) for each in problems]}


def _schema(_arguments: argparse.Namespace) -> int:
    from visionedge.config.schema import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    return 0
