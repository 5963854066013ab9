"""Documents in YAML or JSON files, as plain values; what is wrong with a file is one line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from visionedge.errors import ConfigError
from visionedge.uris import redact

Document = dict[str, Any]


def read_file(path: Path) -> Document:
    """The document in a YAML or JSON file (by its name; `.json` is JSON).

    Raises:
        ConfigError: it cannot be read or parsed, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from None
    try:
        # JSON is read as YAML too, but json tells its own errors better.
        json_file = path.suffix.lower() == ".json"
        document = json.loads(text) if json_file else yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}:{error.lineno}: is no JSON: {error.msg}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}{_yaml_place(error)}: is no YAML: {_yaml_reason(error)}"]) from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            [f"{path}: is {kind_of(document)}; it must be a mapping of keys such as 'cameras:'"]
        )
    return document


def kind_of(value: object) -> str:
    """What a value is, for people who write YAML."""
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "empty" if value is None else type(value).__name__)


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice: the second would silently win."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> Document:
    loader.flatten_mapping(node)
    pairs: Iterator[tuple[yaml.Node, yaml.Node]] = iter(node.value)
    document: Document = {}
    for key_node, value_node in pairs:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            # A name such as off, yes or 1: as it is written, whatever else YAML takes it for.
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key)
        if key in document:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice", key_node.start_mark
            )
        document[key] = loader.construct_object(value_node, deep=True)
    return document


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark is not None else ""


def _yaml_reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    # An unquoted value that begins with '*', '&' or '!' is quoted back as the name of an alias or a tag.
    hidden = re.sub(r"(alias|anchor|tag) '[^']*'", r"\1 '***'", str(reason))
    return redact(hidden)
