"""What a manifest holds: the twins of its modules, whole ones and those of a layered deployment."""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, NoReturn

from visionedge.config.documents import describe_type
from visionedge.errors import ConfigError
from visionedge.runtime.redaction import redact

# A JSON document as places: every value with the path to it, so that whatever is wrong can say where.


MAX_DEPTH = 64
"""A twin has 10 levels, createOptions not many more: what is deeper was not written by hand or by a tool."""

MAX_TEXT_BYTES = 4096
"""What IoT Hub takes as one text of a twin."""

_MAX_KEY_CHARS = 128
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class JsonNode:
    """A value and where it stands.

    `path` is a JSONPath; lists are tuples and objects mappings of places. `twice` names keys of an object
    that were given more than once (the last one counts). `partial`: there may be more of it elsewhere.
    """

    path: str
    value: "bool | int | float | str | tuple[JsonNode, ...] | Mapping[str, JsonNode] | None"
    duplicate_keys: tuple[str, ...] = ()
    partial: bool = False

    @property
    def entries(self) -> "Mapping[str, JsonNode]":
        """The entries of an object; none of anything else."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def items(self) -> "tuple[JsonNode, ...]":
        """The items of a list; none of anything else."""
        return self.value if isinstance(self.value, tuple) else ()

    @property
    def text(self) -> str:
        """The value if it is a text; empty for anything else."""
        return self.value if isinstance(self.value, str) else ""

    def plain(self) -> Any:
        """The value without its places; a text that no twin can hold is cut, for those who look into each."""
        if isinstance(self.value, Mapping):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, str):
            return self.value[:MAX_TEXT_BYTES]
        return [item.plain() for item in self.value] if isinstance(self.value, tuple) else self.value

    def at(self, *keys: str) -> "JsonNode | None":
        """What stands below these keys, if anything does."""
        found: JsonNode | None = self
        for key in keys:
            found = None if found is None else found.entries.get(key)
        return found

    def walk(self) -> "Iterator[JsonNode]":
        """This place, and all below it."""
        yield self
        for item in (*self.entries.values(), *self.items):
            yield from item.walk()

    def with_overlay(self, keys: tuple[str, ...], item: "JsonNode") -> "JsonNode":
        """This object with `item` below these keys, as a layered deployment lays it over what is there."""
        if not keys:
            return item
        below = self.entries.get(keys[0], JsonNode(item.path, {}, partial=True))
        return replace(self, value={**self.entries, keys[0]: below.with_overlay(keys[1:], item)})


def child_path(path: str, key: str) -> str:
    """The path of a key."""
    if _PLAIN_KEY.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{json.dumps(key if len(key) <= _MAX_KEY_CHARS else key[:_MAX_KEY_CHARS] + '…')}]"


def parse_json(text: str, path: str = "$") -> JsonNode:
    """A JSON text as places, the first of them at `path`.

    Raises:
        json.JSONDecodeError: the text is no JSON; `NaN` and `Infinity` are none.
        ConfigError: it is nested deeper than `MAX_DEPTH`, or has a number that nothing can hold.
    """
    try:
        document = json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse)
    except RecursionError:
        raise ConfigError([f"is nested deeper than {MAX_DEPTH} levels"]) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ConfigError([str(error).partition(";")[0]]) from None
    return _to_node(document, path, 0)


class _Object(dict[str, Any]):
    """An object that remembers which keys it was given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen = set[str]()
        self.duplicate_keys = tuple(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number that JSON knows")


def _to_node(value: Any, path: str, depth: int) -> JsonNode:
    if depth > MAX_DEPTH:
        raise ConfigError([f"is nested deeper than {MAX_DEPTH} levels"])
    if isinstance(value, _Object):
        entries = {key: _to_node(item, child_path(path, key), depth + 1) for key, item in value.items()}
        return JsonNode(path, entries, tuple(dict.fromkeys(value.duplicate_keys)))
    if isinstance(value, list):
        return JsonNode(
            path, tuple(_to_node(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value))
        )
    return JsonNode(path, value)


# Placeholders, `${NAME}` or `$LIKE_THIS`: where they are, and what they become.


# Upper case and an underscore tell $CONTAINER_REGISTRY_ADDRESS from $upstream and from passwords.
_PLACEHOLDER = re.compile(r"\$\{(?P<braced>[^{}$]*)\}|^\$(?P<bare>[A-Z][A-Z0-9]*_\w+)(?=$|[/:])")


def has_placeholder(text: str) -> bool:
    """Whether a text has to be filled in before it means something."""
    return _PLACEHOLDER.search(text) is not None


def find_placeholders(text: str) -> list[str]:
    """The placeholders of a text, as they are written."""
    return [match[0] for match in _PLACEHOLDER.finditer(text)]


def fill_placeholders(value: Any, environ: Mapping[str, str], missing: set[str]) -> Any:
    """A JSON value with its placeholders filled from the environment; names that it lacks go to `missing`."""

    def known_entries(match: re.Match[str]) -> str:
        name = match["braced"] or match["bare"] or ""
        if name not in environ:
            missing.add(name)
        return environ.get(name, match[0])

    if isinstance(value, str):
        return _PLACEHOLDER.sub(known_entries, value)
    if isinstance(value, dict):
        return {key: fill_placeholders(item, environ, missing) for key, item in value.items()}
    return [fill_placeholders(item, environ, missing) for item in value] if isinstance(value, list) else value


# What lint found: one line each, and the readers that tell what has a wrong type.


Severity = Literal["error", "warning"]

_LONG_WORD = re.compile(r"\S{301,}")


@dataclass(frozen=True, slots=True)
class LintFinding:
    """One problem: where it is, what it is, and what to do about it. Secrets are masked, all is one line."""

    severity: Severity
    path: str
    problem: str
    remedy: str

    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self.path}: {self.problem}; {self.remedy}"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "severity": self.severity,
            "path": self.path,
            "problem": self.problem,
            "remedy": self.remedy,
        }


class LintFindings:
    """Gathers problems. Its readers give a value of the type that is wanted, or tell that it is another."""

    def __init__(self) -> None:
        self._found: dict[LintFinding, None] = {}

    def __repr__(self) -> str:
        return f"<Findings {len(self._found)}>"

    def all(self) -> tuple[LintFinding, ...]:
        """Errors first, otherwise in the order in which they were found; none of them twice."""
        return tuple(sorted(self._found, key=lambda finding: finding.severity))

    def error(self, where: JsonNode | str, problem: str, remedy: str) -> None:
        """What IoT Edge or the module will not take."""
        self._add("error", where, problem, remedy)

    def warning(self, where: JsonNode | str, problem: str, remedy: str) -> None:
        """What will be taken, and is hardly what was meant."""
        self._add("warning", where, problem, remedy)

    def _add(self, severity: Severity, where: JsonNode | str, problem: str, remedy: str) -> None:
        path = where.path if isinstance(where, JsonNode) else where
        self._found[LintFinding(severity, to_one_line(path), to_one_line(problem), to_one_line(remedy))] = (
            None
        )

    def required(self, parent: JsonNode, key: str, remedy: str) -> JsonNode | None:
        """What stands at a key; it is told when nothing does, unless the rest of `parent` is elsewhere."""
        found = parent.entries.get(key)
        if found is None and isinstance(parent.value, Mapping) and not parent.partial:
            self.error(child_path(parent.path, key), "is missing", remedy)
        return found

    def mapping(self, node: JsonNode | None) -> Mapping[str, JsonNode]:
        """The entries of what has to be an object."""
        if node is None:
            return {}
        if not isinstance(node.value, Mapping):
            self._wrong(node, "an object")
        for key in node.duplicate_keys:
            self.error(
                child_path(node.path, key), "is given twice, and the last one wins", "keep one of them"
            )
        return node.entries

    def items(self, node: JsonNode | None) -> tuple[JsonNode, ...]:
        """The items of what has to be a list."""
        if node is not None and not isinstance(node.value, tuple):
            self._wrong(node, "a list")
        return node.items if node is not None else ()

    def text(self, node: JsonNode | None) -> str | None:
        """What has to be a text."""
        if node is None or isinstance(node.value, str):
            return None if node is None else node.text
        self._wrong(node, "a text")
        return None

    def choice(self, node: JsonNode | None, choices: Collection[str]) -> str | None:
        """A text that has to be one of these."""
        text = self.text(node)
        if node is None or text is None or text in choices or has_placeholder(text):
            return text
        self.error(node, "is none of the values that IoT Edge knows", f"write {' or '.join(choices)}")
        return None

    def whole(self, node: JsonNode | None, minimum: int, maximum: int) -> int | None:
        """A whole number within bounds."""
        if node is None:
            return None
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(node, "a whole number")
            return None
        if not minimum <= value <= maximum:
            self.error(node, "is out of range", f"write {minimum} to {maximum}")
            return None
        return value

    def known_entries(
        self, node: JsonNode | None, keys: Collection[str], reader: str
    ) -> Mapping[str, JsonNode]:
        """The entries of an object of which `reader` knows these keys only."""
        entries = self.mapping(node)
        for key, item in entries.items():
            if key not in keys:
                close = difflib.get_close_matches(key[:64], keys, n=1)
                remedy = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(keys)}"
                self.warning(item, f"{reader} knows no such key", remedy)
        return entries

    def _wrong(self, node: JsonNode, wanted: str) -> None:
        kind = "an object" if isinstance(node.value, Mapping) else _kind(node.value)
        self.error(node, f"is {kind}", f"it has to be {wanted}")


def _kind(value: object) -> str:
    return "null" if value is None else describe_type(list(value) if isinstance(value, tuple) else value)


def to_one_line(text: str) -> str:
    """A text that breaks no line and no terminal, and holds no secret."""
    plain = "".join(c if c.isprintable() else " " for c in redact(text))
    return _LONG_WORD.sub(lambda word: f"{word[0][:120]}…{word[0][-40:]}", plain)


EDGE_AGENT = "$edgeAgent"
EDGE_HUB = "$edgeHub"

_DESIRED = "properties.desired"
_TEMPLATE_KEY = "$schema-template"
_TEMPLATE_NAME = ".template.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The desired properties of each module; those that a layered deployment gives in part are put together.

    `template`: what the tools of IoT Edge make a manifest of. `layered`: it goes over a deployment that is
    not here. `content` is where all the modules stand.
    """

    content: JsonNode
    twins: Mapping[str, JsonNode]
    template: bool
    layered: bool

    @property
    def kind(self) -> str:
        """In a word."""
        return "template" if self.template else "layered" if self.layered else "deployment"


def read_manifest(document: JsonNode, name: str, findings: LintFindings) -> Manifest:
    """The manifest in a document; `name` is that of its file."""
    top = findings.mapping(document)
    template = _TEMPLATE_KEY in top or PurePath(name).name.endswith(_TEMPLATE_NAME)
    outer = top.get("content")
    holder = document if outer is None or "modulesContent" in top else outer
    findings.mapping(holder)
    content = findings.required(holder, "modulesContent", "put all modules below it")
    if content is None:
        return Manifest(
            JsonNode(child_path(document.path, "modulesContent"), {}), {}, template, layered=False
        )
    twins = {key: _twin(key, item, findings) for key, item in findings.mapping(content).items()}
    return Manifest(content, twins, template, layered=_is_layered(twins))


def _is_layered(twins: Mapping[str, JsonNode]) -> bool:
    agent = twins.get(EDGE_AGENT)
    return any(twin.partial for twin in twins.values()) and (agent is None or agent.partial)


def _twin(module: str, node: JsonNode, findings: LintFindings) -> JsonNode:
    """The desired properties of a module, those of `properties.desired.KEY` laid over the whole ones."""
    entries = findings.mapping(node)
    whole = entries.get(_DESIRED)
    if whole is not None:
        findings.mapping(whole)
    dotted = {key: item for key, item in entries.items() if key.startswith(f"{_DESIRED}.")}
    for key, item in entries.items():
        if key != _DESIRED and key not in dotted:
            remedy = f"write {_DESIRED}, or {_DESIRED}.CREATE_OPTIONS in a layered deployment"
            findings.error(item, f"IoT Hub knows no such key of {module}", remedy)
    if whole is None and not dotted:
        findings.error(node, "has no desired properties", f"put them below {_DESIRED}")
    twin = whole or JsonNode(node.path, {}, partial=bool(dotted))
    for key, item in dotted.items():
        keys = tuple(key.removeprefix(f"{_DESIRED}.").split("."))
        if not all(keys):
            findings.error(item, "has an empty name between two dots", f"write {_DESIRED}.KEY")
            continue
        twin = twin.with_overlay(keys, item)
    return twin


# createOptions: what Docker is asked for a module, as an object, a text, or a text in pieces.


CREATE_OPTIONS = "createOptions"

MAX_PIECE_CHARACTERS = 512
"""Where the agent itself cuts, and many a tool."""

_PIECE = re.compile(r"createoptions(\d*)", re.IGNORECASE)


def is_create_options(key: str) -> bool:
    """Whether a key of a module's settings is one of its createOptions."""
    return _PIECE.fullmatch(key) is not None


def read_create_options(settings: JsonNode, *, template: bool, findings: LintFindings) -> JsonNode | None:
    """The createOptions of a module's settings as places; None where there are none that can be read."""
    pieces = {key.lower(): item for key, item in settings.entries.items() if is_create_options(key)}
    whole = pieces.get(CREATE_OPTIONS.lower())
    if whole is not None and isinstance(whole.value, Mapping):
        if not template:
            remedy = "write it as a text that holds the JSON; only templates have objects here"
            findings.error(whole, "is an object", remedy)
        return _check_option_types(whole, findings)
    if not pieces or not _are_pieces(pieces, findings):
        return None
    return _parsed(
        "".join(pieces[key].text for key in sorted(pieces)),
        child_path(settings.path, CREATE_OPTIONS),
        findings,
    )


def _are_pieces(pieces: dict[str, JsonNode], findings: LintFindings) -> bool:
    """Whether the pieces are texts that follow one another, as the agent wants them."""
    told = [findings.text(item) for item in pieces.values()]
    sound = None not in told
    names = [f"{CREATE_OPTIONS}{number:02d}" if number else CREATE_OPTIONS for number in range(len(pieces))]
    for key, item in pieces.items():
        if key not in (name.lower() for name in names) or len(pieces) > 100:
            remedy = (
                f"number the pieces without a gap: {CREATE_OPTIONS}, {CREATE_OPTIONS}01, "
                f"{CREATE_OPTIONS}02 … {CREATE_OPTIONS}99"
            )
            findings.error(item, "is not the next piece: the agent does not read it", remedy)
            sound = False
        if len(pieces) > 1 and len(item.text) > MAX_PIECE_CHARACTERS:
            remedy = f"cut after {MAX_PIECE_CHARACTERS} characters, as the agent and its tools do"
            findings.warning(item, f"is a piece of {len(item.text)} characters", remedy)
    return sound


def _parsed(text: str, path: str, findings: LintFindings) -> JsonNode | None:
    # The agent takes an empty text and the text null for no options.
    if not text.strip() or text.strip().lower() == "null":
        return None
    try:
        options = parse_json(text, path)
    except json.JSONDecodeError as error:
        remedy = "the text has to be JSON by itself, all quotes inside it escaped"
        findings.error(path, f"is no JSON at character {error.pos + 1}: {error.msg}", remedy)
        return None
    except ConfigError as error:
        findings.error(path, str(error), "write what Docker's API takes")
        return None
    return _check_option_types(options, findings)


def _check_option_types(options: JsonNode, findings: LintFindings) -> JsonNode:
    """The options, after a look at whether those that matter here have the types that Docker wants."""
    findings.mapping(options)
    findings.mapping(options.at("HostConfig"))
    for path in (("Env",), ("HostConfig", "Binds")):
        for item in findings.items(options.at(*path)):
            findings.text(item)
    for key in ("DeviceRequests", "Devices", "Mounts"):
        for item in findings.items(options.at("HostConfig", key)):
            findings.mapping(item)
    return options
