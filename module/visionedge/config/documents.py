"""Reads YAML and JSON files as plain values; an error is one line with the file and the line number.

A file may be broken or malicious. Its bytes, its depth, and its values with all aliases expanded are limited,
so that reading takes one second at most and little memory.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from visionedge.errors import ConfigError
from visionedge.runtime.files import read_regular_file
from visionedge.runtime.redaction import redact

Document = dict[str, Any]

MAX_BYTES = 2**20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Values in a document; an alias counts as all values of its anchor."""

EXTENSION_PREFIX = "x-"
"""Top-level keys of a configuration with this prefix are ignored."""

_VARIABLE = re.compile(r"\$\{([^{}$]*)\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_document(path: Path) -> Document:
    """The document in a file: JSON if the name ends with `.json`, else YAML.

    Raises:
        ConfigError: the file cannot be read or parsed, is too large or too deep, or is not a mapping.
    """
    document = _parse(read_text(path), path)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            [f"{path}: is {describe_type(document)}; it must be a mapping of keys such as 'cameras:'"]
        )
    return document


def read_configuration(path: Path, environ: Mapping[str, str]) -> Document:
    """The configuration document in a file, its ``${NAME}`` filled from the environment.

    Ignored keys are left out first, so that variables in them need not be set.

    Raises:
        ConfigError: as `read_document`, or a variable is missing; each problem has the file and the line.
    """
    document = without_extensions(read_document(path))
    try:
        return fill_variables(document, environ)
    except ConfigError as error:
        raise ConfigError(add_locations(error.problems, path)) from None


def without_extensions(document: Mapping[str, Any]) -> Document:
    """The document without its top-level keys that begin with ``x-``, which hold YAML anchors."""
    return {key: value for key, value in document.items() if not str(key).startswith(EXTENSION_PREFIX)}


def fill_variables(document: Document, environ: Mapping[str, str]) -> Document:
    """The document with each ``${NAME}`` in its texts replaced by the variable of the environment.

    Raises:
        ConfigError: variables are not set; one problem for each place, with the path of its key.
    """
    problems: list[str] = []
    filled: Document = _fill(document, "", environ, problems)
    if problems:
        raise ConfigError(problems)
    return filled


def _fill(value: Any, path: str, environ: Mapping[str, str], problems: list[str]) -> Any:
    def variable(match: re.Match[str]) -> str:
        name = match[1]
        if not _VARIABLE_NAME.fullmatch(name):
            problems.append(f"{path}: '${{…}}' must hold the name of an environment variable")
        elif name not in environ:
            problems.append(
                f"{path}: the environment variable {name} is not set; set it, or write the value here"
            )
        return environ.get(name, "")

    if isinstance(value, str):
        return _VARIABLE.sub(variable, value)
    if isinstance(value, dict):
        return {k: _fill(v, f"{path}.{k}" if path else k, environ, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(item, f"{path}.{n}", environ, problems) for n, item in enumerate(value)]
    return value


def add_locations(problems: Sequence[str], path: Path) -> list[str]:
    """Problems of a document (``cameras.dock.fps: …``) with the file and the line of their key.

    A problem with a key that is not in the file, such as one from the environment, is returned unchanged.
    """
    try:
        root = yaml.compose(read_text(path).replace("\t", " "), _BoundedLoader)
    except (ConfigError, _RefusedError, yaml.YAMLError, ValueError):
        return list(problems)
    return [f"{path}:{line}: {each}" if (line := _line_of(each, root)) else each for each in problems]


def _line_of(problem: str, root: yaml.Node | None) -> int | None:
    """The line of the deepest key in the file that is part of the path of a problem."""
    rest = problem.partition(": ")[0]
    line, node = None, root
    while node is not None and rest:
        found = next((each for each in _entries(node) if f"{rest}.".startswith(f"{each[2]}.")), None)
        if found is None:
            break
        key, node, name = found
        line, rest = key.start_mark.line + 1, rest[len(name) + 1 :]
    return line


def _entries(node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node, str]]:
    """The entries below a node: the node of the key, the node of the value, and the name in a path."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key, value, str(key.value)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield item, item, str(number)


def describe_type(value: object) -> str:
    """The type of a value, in the words of YAML."""
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "empty" if value is None else type(value).__name__)


def read_text(path: Path) -> str:
    """The text of a file of at most `MAX_BYTES`, without a byte order mark.

    Raises:
        ConfigError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_regular_file(path, max_bytes=MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from None


def parse_json(text: str, where: str) -> object:
    """The value of a JSON text, within the limits of files; `where` begins each problem.

    Raises:
        ConfigError: it is not JSON, has a key twice, or is too deep.
    """
    try:
        return _bounded_json(
            json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        )
    except json.JSONDecodeError as error:
        raise ConfigError([f"{where}:{error.lineno}: is not valid JSON: {error.msg}"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: {_TOO_DEEP}"]) from None
    except _RefusedError as error:
        raise ConfigError([f"{where}: {error}"]) from None
    except ValueError:  # a number of thousands of digits
        raise ConfigError([f"{where}: {_UNREADABLE}"]) from None


def _parse(text: str, path: Path) -> object:
    # YAML would read JSON, too, but the errors of `json` are clearer.
    if path.suffix.lower() == ".json":
        return parse_json(text, str(path))
    try:
        return yaml.load(text, _BoundedLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(
            [f"{path}{_yaml_location(error)}: is not valid YAML: {_yaml_reason(error)}"]
        ) from None
    except RecursionError:
        raise ConfigError([f"{path}: {_TOO_DEEP}"]) from None
    except _RefusedError as error:
        raise ConfigError([f"{path}{error.place}: {error}"]) from None
    except (ValueError, OverflowError):  # a number of thousands of digits, a date such as 2026-02-31
        raise ConfigError([f"{path}: {_UNREADABLE}"]) from None


class _RefusedError(Exception):
    """The file can be parsed, but must not be used.

    `mark` is PyYAML's position in the file; `place` is its line, as `:12`.
    """

    def __init__(self, reason: str, mark: Any = None) -> None:
        super().__init__(reason)
        self.place = "" if mark is None else f":{mark.line + 1}"


_UNREADABLE = "has a number or a date that cannot be read; quote it if it is a text"
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels"
_TOO_MANY = f"has more than {MAX_VALUES} values (an alias counts as all values of its anchor)"


def _unique_keys(pairs: list[tuple[str, Any]]) -> Document:
    """A JSON object; a key that is given twice is refused, because the second value would silently win."""
    document: Document = {}
    for key, value in pairs:
        if key in document:
            raise _RefusedError(f"key '{redact(key[:100])}' is given twice")
        document[key] = value
    return document


def _refuse_constant(constant: str) -> float:
    raise _RefusedError(f"{constant} is not a number in JSON")


def _bounded_json(value: object) -> object:
    """The value, if it is not nested too deep; its number of values is limited by the size of the file."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return value
        level = [inner for outer in level for inner in _children(outer)]
    raise _RefusedError(_TOO_DEEP)


def _children(value: object) -> Iterator[object]:
    return iter(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


class _BoundedLoader(yaml.SafeLoader):
    """A YAML loader with limits; keys are texts, and a key that is given twice is refused.

    A key is the text as it is written: ``off:`` is the name off, not a boolean.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Override of `yaml.composer.Composer`, which calls it recursively; checks depth and size."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]  # of PyYAML
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _RefusedError(_TOO_DEEP, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            raise _RefusedError("a value contains itself", event.start_mark)
        if node is not None and self._size(node) > MAX_VALUES:
            raise _RefusedError(_TOO_MANY, event.start_mark)
        return node

    def _size(self, node: yaml.Node) -> int:
        """The number of values of a node; those of the nodes below it are known, as they come first."""
        if id(node) not in self._sizes:
            below = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = (each for item in below for each in (item if isinstance(item, tuple) else (item,)))
            self._sizes[id(node)] = 1 + sum(self._sizes[id(each)] for each in inner)
        return self._sizes[id(node)]


def _construct_mapping(loader: _BoundedLoader, node: yaml.MappingNode) -> Document:
    _check_keys(node)
    # Puts the keys that `<<` merges first, so that the mapping's own keys win.
    loader.flatten_mapping(node)
    pairs: Iterator[tuple[yaml.Node, yaml.Node]] = iter(node.value)
    document: Document = {}
    for key_node, value_node in pairs:
        if not isinstance(key_node, yaml.ScalarNode):  # in a mapping that was merged
            raise _RefusedError("a key is not a text", key_node.start_mark)
        document[str(key_node.value)] = loader.construct_object(value_node, deep=True)
    return document


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse a mapping with keys that are not texts, or that are given twice."""
    written: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _RefusedError("a key is not a text", key_node.start_mark)
        key = str(key_node.value)
        if key in written:
            raise _RefusedError(f"key '{redact(key[:100])}' is given twice", key_node.start_mark)
        written.add(key)


_BoundedLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _yaml_location(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark is not None else ""


def _yaml_reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    # PyYAML quotes an unquoted value that begins with '*', '&' or '!' as the name of an alias or a tag.
    hidden = re.sub(r"(alias|anchor|tag) '[^']*'", r"\1 '***'", str(reason))
    return redact(hidden)
