"""The document of a manifest: JSON values with their paths and lines, placeholders, findings, and twins.

`parse_json` makes `JsonNode`s, so that every check can report the place; `read_manifest` returns the twin of
each module, and puts together the parts of a layered deployment.
"""

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, NoReturn

from visionedge.config.documents import describe_type
from visionedge.errors import ConfigError
from visionedge.runtime.redaction import redact

MAX_DEPTH = 64
"""A twin has at most 10 levels, createOptions a few more."""

MAX_TEXT_BYTES = 4096
"""The limit of IoT Hub for a string in a twin."""

_MAX_KEY_CHARS = 128
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class JsonNode:
    """A JSON value with its JSONPath; lists are tuples, and objects mappings, of nodes.

    `duplicate_keys`: keys of an object that occur more than once (the last one counts). `partial`: the base
    of a layered deployment may have more of this object. `line`: its line in the file, from 1; 0 if unknown.
    """

    path: str
    value: "bool | int | float | str | tuple[JsonNode, ...] | Mapping[str, JsonNode] | None"
    duplicate_keys: tuple[str, ...] = ()
    partial: bool = False
    line: int = 0

    @property
    def entries(self) -> "Mapping[str, JsonNode]":
        """The entries of an object; empty for another value."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def items(self) -> "tuple[JsonNode, ...]":
        """The items of a list; empty for another value."""
        return self.value if isinstance(self.value, tuple) else ()

    @property
    def text(self) -> str:
        """The value if it is a string, else empty."""
        return self.value if isinstance(self.value, str) else ""

    def plain(self) -> Any:
        """The plain value; strings are cut at the limit of a twin, because parsers look into them."""
        if isinstance(self.value, Mapping):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, str):
            return self.value[:MAX_TEXT_BYTES]
        return [item.plain() for item in self.value] if isinstance(self.value, tuple) else self.value

    def at(self, *keys: str) -> "JsonNode | None":
        """The node below these keys, if there is one."""
        found: JsonNode | None = self
        for key in keys:
            found = None if found is None else found.entries.get(key)
        return found

    def missing(self, key: str) -> "JsonNode":
        """The place of a key that is not there, for findings."""
        return JsonNode(child_path(self.path, key), None, line=self.line)

    def walk(self) -> "Iterator[JsonNode]":
        """This node and all nodes below it."""
        yield self
        for item in (*self.entries.values(), *self.items):
            yield from item.walk()

    def with_overlay(self, keys: tuple[str, ...], item: "JsonNode") -> "JsonNode":
        """This object with `item` below these keys, as a layered deployment merges it."""
        if not keys:
            return item
        below = self.entries.get(keys[0], JsonNode(item.path, {}, partial=True, line=item.line))
        return replace(self, value={**self.entries, keys[0]: below.with_overlay(keys[1:], item)})


def child_path(path: str, key: str) -> str:
    """The path of a key."""
    if _PLAIN_KEY.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{json.dumps(key if len(key) <= _MAX_KEY_CHARS else key[:_MAX_KEY_CHARS] + '…')}]"


def parse_json(text: str, path: str = "$", *, line: int = 0) -> JsonNode:
    """Parse a JSON text; `path` is the path of its root, `line` the line of all of it, 0: it starts a file.

    Raises:
        json.JSONDecodeError: the text is not JSON.
        ConfigError: it is nested deeper than `MAX_DEPTH`, or has a number that is too long, NaN or Infinity.
    """
    try:
        document = json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse)
    except RecursionError:
        raise ConfigError([f"is nested deeper than {MAX_DEPTH} levels"]) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ConfigError([str(error).partition(";")[0]]) from None
    return _to_node(document, path, 0, itertools.repeat(line) if line else _lines(text))


class _Object(dict[str, Any]):
    """An object that records its pairs, duplicate keys included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_VALUE = re.compile(rf"(?P<key>{_STRING}\s*:)|{_STRING}|[\[{{]|[^\s\[\]{{}},:\"]+")


def _lines(text: str) -> Iterator[int]:
    """The line of each value of a valid JSON text, in the order of the text; a container before its items."""
    line, counted = 1, 0
    for found in _VALUE.finditer(text):
        if found["key"] is None:
            line, counted = line + text.count("\n", counted, found.start()), found.start()
            yield line


def _to_node(value: Any, path: str, depth: int, lines: Iterator[int]) -> JsonNode:
    """The node of a value; `lines` gives the line of it and of all values below it."""
    if depth > MAX_DEPTH:
        raise ConfigError([f"is nested deeper than {MAX_DEPTH} levels"])
    line = next(lines)
    if isinstance(value, _Object):
        pairs = [(key, _to_node(item, child_path(path, key), depth + 1, lines)) for key, item in value.pairs]
        counts = Counter(key for key, _ in pairs)
        duplicates = tuple(key for key, count in counts.items() if count > 1)
        return JsonNode(path, dict(pairs), duplicates, line=line)
    if isinstance(value, list):
        items = (_to_node(item, f"{path}[{i}]", depth + 1, lines) for i, item in enumerate(value))
        return JsonNode(path, tuple(items), line=line)
    return JsonNode(path, value, line=line)


# --- placeholders -------------------------------------------------------------------------------------------


# Upper case and an underscore distinguish $CONTAINER_REGISTRY_ADDRESS from $upstream and from passwords.
_PLACEHOLDER = re.compile(r"\$\{(?P<braced>[^{}$]*)\}|^\$(?P<bare>[A-Z][A-Z0-9]*_\w+)(?=$|[/:])")


def has_placeholder(text: str) -> bool:
    """Whether a text has a placeholder, `${NAME}` or `$UPPER_CASE`."""
    return _PLACEHOLDER.search(text) is not None


def find_placeholders(text: str) -> list[str]:
    """The placeholders of a text, as written."""
    return [match[0] for match in _PLACEHOLDER.finditer(text)]


_ANGLE_PLACEHOLDER = re.compile(r"<[^<>/]*[A-Za-z][^<>/]*>")


def find_angle_placeholder(text: str) -> str:
    """The first `<name>` of a text, which stands for a value to be filled in; empty if there is none."""
    # `${MODULEDIR<FOLDER>}` is a placeholder of the tools.
    found = _ANGLE_PLACEHOLDER.search(_PLACEHOLDER.sub("", text))
    return found[0] if found else ""


def fill_placeholders(value: Any, environ: Mapping[str, str], missing: set[str]) -> Any:
    """A JSON value with placeholders replaced from the environment; unknown names are added to `missing`."""

    def replacement(match: re.Match[str]) -> str:
        name = match["braced"] or match["bare"] or ""
        if name not in environ:
            missing.add(name)
        return environ.get(name, match[0])

    if isinstance(value, str):
        return _PLACEHOLDER.sub(replacement, value)
    if isinstance(value, dict):
        return {key: fill_placeholders(item, environ, missing) for key, item in value.items()}
    return [fill_placeholders(item, environ, missing) for item in value] if isinstance(value, list) else value


# --- findings -----------------------------------------------------------------------------------------------


Severity = Literal["error", "warning", "note"]

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

_LONG_WORD = re.compile(r"\S{301,}")


@dataclass(frozen=True, slots=True)
class LintFinding:
    """One problem: its path, the problem, and the remedy; each one line, with secrets masked.

    `line_number`: the line in the file, from 1; 0 if unknown.
    """

    severity: Severity
    path: str
    problem: str
    remedy: str
    line_number: int = 0

    def line(self) -> str:
        """As a line of text."""
        return f"{self.severity}: {self.path}: {self.problem}; {self.remedy}"

    def document(self) -> dict[str, Any]:
        """As JSON; `line` is null if unknown."""
        return {
            "severity": self.severity,
            "path": self.path,
            "line": self.line_number or None,
            "problem": self.problem,
            "remedy": self.remedy,
        }


class LintFindings:
    """Collects problems. Its readers return a value of the wanted type, or report another type."""

    def __init__(self) -> None:
        self._found: dict[LintFinding, None] = {}

    def all(self) -> tuple[LintFinding, ...]:
        """Errors first, then warnings, then notes, in the order of discovery; without duplicates."""
        return tuple(sorted(self._found, key=lambda finding: _SEVERITIES.index(finding.severity)))

    def error(self, where: JsonNode | str, problem: str, remedy: str) -> None:
        """Report what IoT Edge or the module rejects."""
        self._add("error", where, problem, remedy)

    def warning(self, where: JsonNode | str, problem: str, remedy: str) -> None:
        """Report what is accepted, but probably not intended."""
        self._add("warning", where, problem, remedy)

    def note(self, where: JsonNode | str, problem: str, remedy: str) -> None:
        """Report what is right as it is, but may be better otherwise."""
        self._add("note", where, problem, remedy)

    def _add(self, severity: Severity, where: JsonNode | str, problem: str, remedy: str) -> None:
        path, line = (where.path, where.line) if isinstance(where, JsonNode) else (where, 0)
        finding = LintFinding(severity, to_one_line(path), to_one_line(problem), to_one_line(remedy), line)
        self._found[finding] = None

    def required(self, parent: JsonNode, key: str, remedy: str) -> JsonNode | None:
        """The node at a key; a missing one is reported, unless `parent` is partial."""
        found = parent.entries.get(key)
        if found is None and isinstance(parent.value, Mapping) and not parent.partial:
            self.error(parent.missing(key), "is missing", remedy)
        return found

    def mapping(self, node: JsonNode | None) -> Mapping[str, JsonNode]:
        """The entries of a node that must be an object."""
        if node is None:
            return {}
        if not isinstance(node.value, Mapping):
            self.wrong_type(node, "an object")
        for key in node.duplicate_keys:
            self.error(node.entries[key], "occurs twice, and the last one counts", "keep one of them")
        return node.entries

    def items(self, node: JsonNode | None) -> tuple[JsonNode, ...]:
        """The items of a node that must be a list."""
        if node is not None and not isinstance(node.value, tuple):
            self.wrong_type(node, "a list")
        return node.items if node is not None else ()

    def text(self, node: JsonNode | None) -> str | None:
        """The value of a node that must be a string."""
        if node is None or isinstance(node.value, str):
            return None if node is None else node.text
        self.wrong_type(node, "a string")
        return None

    def choice(self, node: JsonNode | None, choices: Collection[str]) -> str | None:
        """The value of a node that must be one of these strings."""
        text = self.text(node)
        if node is None or text is None or text in choices or has_placeholder(text):
            return text
        self.error(node, "is not a value that IoT Edge accepts", f"write {' or '.join(choices)}")
        return None

    def integer(self, node: JsonNode | None, minimum: int, maximum: int) -> int | None:
        """The value of a node that must be an integer within bounds."""
        if node is None:
            return None
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong_type(node, "a whole number")
            return None
        if not minimum <= value <= maximum:
            self.error(node, "is out of range", f"write {minimum} to {maximum}")
            return None
        return value

    def known_entries(
        self, node: JsonNode | None, keys: Collection[str], reader: str
    ) -> Mapping[str, JsonNode]:
        """The entries of an object of which `reader` accepts only these keys."""
        entries = self.mapping(node)
        for key, item in entries.items():
            if key not in keys:
                close = difflib.get_close_matches(key[:64], keys, n=1)
                remedy = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(keys)}"
                self.warning(item, f"is not a key of {reader}", remedy)
        return entries

    def wrong_type(self, node: JsonNode, wanted: str, example: str = "") -> None:
        """Report that a value has another type than the wanted one."""
        kind = "an object" if isinstance(node.value, Mapping) else _kind(node.value)
        self.error(node, f"is {kind}", f"it must be {wanted}{example and f'; {example}'}")


def _kind(value: object) -> str:
    return "null" if value is None else describe_type(list(value) if isinstance(value, tuple) else value)


def to_one_line(text: str) -> str:
    """A text without control characters and secrets, and with long words shortened."""
    plain = "".join(c if c.isprintable() else " " for c in redact(text))
    return _LONG_WORD.sub(lambda word: f"{word[0][:120]}…{word[0][-40:]}", plain)


# --- the manifest -------------------------------------------------------------------------------------------


EDGE_AGENT = "$edgeAgent"
EDGE_HUB = "$edgeHub"

_CONTENT_KEYS = ("modulesContent", "moduleContent")
"""The second one is the old name; `az` still accepts it."""

_DESIRED = "properties.desired"
_TEMPLATE_KEY = "$schema-template"
_TEMPLATE_NAME = ".template.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The desired properties of each module; the parts of a layered deployment are put together.

    `content`: the node of all modules. `template`: a template for the tools of IoT Edge. `layered`: it is
    merged with a base deployment, which is not known here.
    """

    content: JsonNode
    twins: Mapping[str, JsonNode]
    template: bool
    layered: bool

    def registries(self) -> tuple[JsonNode, ...]:
        """The addresses of the registries with credentials."""
        agent = self.twins.get(EDGE_AGENT)
        found = agent.at("runtime", "settings", "registryCredentials") if agent is not None else None
        addresses = [entry.at("address") for entry in found.entries.values()] if found is not None else []
        return tuple(address for address in addresses if address is not None)

    @property
    def kind(self) -> str:
        """The kind in one word."""
        return "template" if self.template else "layered" if self.layered else "deployment"


def read_manifest(document: JsonNode, name: str, findings: LintFindings) -> Manifest:
    """The manifest in a document; `name` is that of its file."""
    top = findings.mapping(document)
    template = _TEMPLATE_KEY in top or PurePath(name).name.endswith(_TEMPLATE_NAME)
    outer = top.get("content")
    holder = document if outer is None or any(key in top for key in _CONTENT_KEYS) else outer
    findings.mapping(holder)
    key = next((key for key in _CONTENT_KEYS if _has_modules(holder.at(key))), _CONTENT_KEYS[0])
    content = findings.required(holder, key, "put all modules into it")
    if content is None:
        return Manifest(replace(holder.missing(key), value={}), {}, template, layered=False)
    twins = {key: _twin(key, item, findings) for key, item in findings.mapping(content).items()}
    return Manifest(content, twins, template, layered=_is_layered(twins))


def _has_modules(content: JsonNode | None) -> bool:
    """Whether modules are in it; in a configuration of modules, `moduleContent` has desired properties."""
    return content is not None and not any(key.startswith(_DESIRED) for key in content.entries)


def _is_layered(twins: Mapping[str, JsonNode]) -> bool:
    agent = twins.get(EDGE_AGENT)
    return any(twin.partial for twin in twins.values()) and (agent is None or agent.partial)


def _twin(module: str, node: JsonNode, findings: LintFindings) -> JsonNode:
    """The desired properties of a module, with those of `properties.desired.KEY` merged into them."""
    entries = findings.mapping(node)
    whole = entries.get(_DESIRED)
    if whole is not None:
        findings.mapping(whole)
    dotted = {key: item for key, item in entries.items() if key.startswith(f"{_DESIRED}.")}
    for key, item in entries.items():
        if key != _DESIRED and key not in dotted:
            remedy = f"write {_DESIRED}, or {_DESIRED}.CREATE_OPTIONS in a layered deployment"
            findings.error(item, f"is not a key of {module} in IoT Hub", remedy)
    if whole is None and not dotted:
        findings.error(node, "has no desired properties", f"put them into {_DESIRED}")
    twin = whole or JsonNode(node.path, {}, partial=bool(dotted), line=node.line)
    for key, item in dotted.items():
        keys = tuple(key.removeprefix(f"{_DESIRED}.").split("."))
        if not all(keys):
            findings.error(item, "has an empty name between two dots", f"write {_DESIRED}.KEY")
            continue
        twin = twin.with_overlay(keys, item)
    return twin
