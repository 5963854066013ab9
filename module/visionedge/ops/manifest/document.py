"""What a manifest holds: the twins of its modules, whole ones and those of a layered deployment."""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, NoReturn

from visionedge.config.documents import kind_of
from visionedge.errors import ConfigError
from visionedge.runtime.redaction import redact

# A JSON document as places: every value with the path to it, so that whatever is wrong can say where.


MAX_DEPTH = 64
"""A twin has 10 levels, createOptions not many more: what is deeper was not written by hand or by a tool."""

MAX_TEXT_BYTES = 4096
"""What IoT Hub takes as one text of a twin."""

_LONGEST_KEY = 128
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Place:
    """A value and where it stands.

    `path` is a JSONPath; lists are tuples and objects mappings of places. `twice` names keys of an object
    that were given more than once (the last one counts). `partial`: there may be more of it elsewhere.
    """

    path: str
    value: "bool | int | float | str | tuple[Place, ...] | Mapping[str, Place] | None"
    twice: tuple[str, ...] = ()
    partial: bool = False

    @property
    def entries(self) -> "Mapping[str, Place]":
        """The entries of an object; none of anything else."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def items(self) -> "tuple[Place, ...]":
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

    def at(self, *keys: str) -> "Place | None":
        """What stands below these keys, if anything does."""
        found: Place | None = self
        for key in keys:
            found = None if found is None else found.entries.get(key)
        return found

    def walk(self) -> "Iterator[Place]":
        """This place, and all below it."""
        yield self
        for item in (*self.entries.values(), *self.items):
            yield from item.walk()

    def laid(self, keys: tuple[str, ...], item: "Place") -> "Place":
        """This object with `item` below these keys, as a layered deployment lays it over what is there."""
        if not keys:
            return item
        below = self.entries.get(keys[0], Place(item.path, {}, partial=True))
        return replace(self, value={**self.entries, keys[0]: below.laid(keys[1:], item)})


def below(path: str, key: str) -> str:
    """The path of a key."""
    if _PLAIN_KEY.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{json.dumps(key if len(key) <= _LONGEST_KEY else key[:_LONGEST_KEY] + '…')}]"


def parse(text: str, path: str = "$") -> Place:
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
    return _placed(document, path, 0)


class _Object(dict[str, Any]):
    """An object that remembers which keys it was given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen = set[str]()
        self.twice = tuple(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number that JSON knows")


def _placed(value: Any, path: str, depth: int) -> Place:
    if depth > MAX_DEPTH:
        raise ConfigError([f"is nested deeper than {MAX_DEPTH} levels"])
    if isinstance(value, _Object):
        entries = {key: _placed(item, below(path, key), depth + 1) for key, item in value.items()}
        return Place(path, entries, tuple(dict.fromkeys(value.twice)))
    if isinstance(value, list):
        return Place(path, tuple(_placed(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)))
    return Place(path, value)


# Placeholders, `${NAME}` or `$LIKE_THIS`: where they are, and what they become.


# Upper case and an underscore tell $CONTAINER_REGISTRY_ADDRESS from $upstream and from passwords.
_PLACEHOLDER = re.compile(r"\$\{(?P<braced>[^{}$]*)\}|^\$(?P<bare>[A-Z][A-Z0-9]*_\w+)(?=$|[/:])")


def has_placeholder(text: str) -> bool:
    """Whether a text has to be filled in before it means something."""
    return _PLACEHOLDER.search(text) is not None


def names_in(text: str) -> list[str]:
    """The placeholders of a text, as they are written."""
    return [match[0] for match in _PLACEHOLDER.finditer(text)]


def fill(value: Any, environ: Mapping[str, str], missing: set[str]) -> Any:
    """A JSON value with its placeholders filled from the environment; names that it lacks go to `missing`."""

    def known(match: re.Match[str]) -> str:
        name = match["braced"] or match["bare"] or ""
        if name not in environ:
            missing.add(name)
        return environ.get(name, match[0])

    if isinstance(value, str):
        return _PLACEHOLDER.sub(known, value)
    if isinstance(value, dict):
        return {key: fill(item, environ, missing) for key, item in value.items()}
    return [fill(item, environ, missing) for item in value] if isinstance(value, list) else value


# What lint found: one line each, and the readers that tell what has a wrong type.


Severity = Literal["error", "warning"]

_LONG_WORD = re.compile(r"\S{301,}")


@dataclass(frozen=True, slots=True)
class Finding:
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


class Findings:
    """Gathers problems. Its readers give a value of the type that is wanted, or tell that it is another."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def __repr__(self) -> str:
        return f"<Findings {len(self._found)}>"

    def all(self) -> tuple[Finding, ...]:
        """Errors first, otherwise in the order in which they were found; none of them twice."""
        return tuple(sorted(self._found, key=lambda finding: finding.severity))

    def error(self, where: Place | str, problem: str, remedy: str) -> None:
        """What IoT Edge or the module will not take."""
        self._add("error", where, problem, remedy)

    def warning(self, where: Place | str, problem: str, remedy: str) -> None:
        """What will be taken, and is hardly what was meant."""
        self._add("warning", where, problem, remedy)

    def _add(self, severity: Severity, where: Place | str, problem: str, remedy: str) -> None:
        path = where.path if isinstance(where, Place) else where
        self._found[Finding(severity, one_line(path), one_line(problem), one_line(remedy))] = None

    def needed(self, parent: Place, key: str, remedy: str) -> Place | None:
        """What stands at a key; it is told when nothing does, unless the rest of `parent` is elsewhere."""
        found = parent.entries.get(key)
        if found is None and isinstance(parent.value, Mapping) and not parent.partial:
            self.error(below(parent.path, key), "is missing", remedy)
        return found

    def mapping(self, place: Place | None) -> Mapping[str, Place]:
        """The entries of what has to be an object."""
        if place is None:
            return {}
        if not isinstance(place.value, Mapping):
            self._wrong(place, "an object")
        for key in place.twice:
            self.error(below(place.path, key), "is given twice, and the last one wins", "keep one of them")
        return place.entries

    def items(self, place: Place | None) -> tuple[Place, ...]:
        """The items of what has to be a list."""
        if place is not None and not isinstance(place.value, tuple):
            self._wrong(place, "a list")
        return place.items if place is not None else ()

    def text(self, place: Place | None) -> str | None:
        """What has to be a text."""
        if place is None or isinstance(place.value, str):
            return None if place is None else place.text
        self._wrong(place, "a text")
        return None

    def choice(self, place: Place | None, choices: Collection[str]) -> str | None:
        """A text that has to be one of these."""
        text = self.text(place)
        if place is None or text is None or text in choices or has_placeholder(text):
            return text
        self.error(place, "is none of the values that IoT Edge knows", f"write {' or '.join(choices)}")
        return None

    def whole(self, place: Place | None, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        if place is None:
            return None
        value = place.value
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(place, "a whole number")
            return None
        if not least <= value <= most:
            self.error(place, "is out of range", f"write {least} to {most}")
            return None
        return value

    def known(self, place: Place | None, keys: Collection[str], reader: str) -> Mapping[str, Place]:
        """The entries of an object of which `reader` knows these keys only."""
        entries = self.mapping(place)
        for key, item in entries.items():
            if key not in keys:
                close = difflib.get_close_matches(key[:64], keys, n=1)
                remedy = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(keys)}"
                self.warning(item, f"{reader} knows no such key", remedy)
        return entries

    def _wrong(self, place: Place, wanted: str) -> None:
        kind = "an object" if isinstance(place.value, Mapping) else _kind(place.value)
        self.error(place, f"is {kind}", f"it has to be {wanted}")


def _kind(value: object) -> str:
    return "null" if value is None else kind_of(list(value) if isinstance(value, tuple) else value)


def one_line(text: str) -> str:
    """A text that breaks no line and no terminal, and holds no secret."""
    plain = "".join(c if c.isprintable() else " " for c in redact(text))
    return _LONG_WORD.sub(lambda word: f"{word[0][:120]}…{word[0][-40:]}", plain)


AGENT = "$edgeAgent"
HUB = "$edgeHub"

_DESIRED = "properties.desired"
_TEMPLATE_KEY = "$schema-template"
_TEMPLATE_NAME = ".template.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The desired properties of each module; those that a layered deployment gives in part are put together.

    `template`: what the tools of IoT Edge make a manifest of. `layered`: it goes over a deployment that is
    not here. `content` is where all the modules stand.
    """

    content: Place
    twins: Mapping[str, Place]
    template: bool
    layered: bool

    @property
    def kind(self) -> str:
        """In a word."""
        return "template" if self.template else "layered" if self.layered else "deployment"


def read_content(document: Place, name: str, findings: Findings) -> Manifest:
    """The manifest in a document; `name` is that of its file."""
    top = findings.mapping(document)
    template = _TEMPLATE_KEY in top or PurePath(name).name.endswith(_TEMPLATE_NAME)
    outer = top.get("content")
    holder = document if outer is None or "modulesContent" in top else outer
    findings.mapping(holder)
    content = findings.needed(holder, "modulesContent", "put all modules below it")
    if content is None:
        return Manifest(Place(below(document.path, "modulesContent"), {}), {}, template, layered=False)
    twins = {key: _twin(key, item, findings) for key, item in findings.mapping(content).items()}
    return Manifest(content, twins, template, layered=_is_layered(twins))


def _is_layered(twins: Mapping[str, Place]) -> bool:
    agent = twins.get(AGENT)
    return any(twin.partial for twin in twins.values()) and (agent is None or agent.partial)


def _twin(module: str, place: Place, findings: Findings) -> Place:
    """The desired properties of a module, those of `properties.desired.KEY` laid over the whole ones."""
    entries = findings.mapping(place)
    whole = entries.get(_DESIRED)
    if whole is not None:
        findings.mapping(whole)
    dotted = {key: item for key, item in entries.items() if key.startswith(f"{_DESIRED}.")}
    for key, item in entries.items():
        if key != _DESIRED and key not in dotted:
            remedy = f"write {_DESIRED}, or {_DESIRED}.KEY in a layered deployment"
            findings.error(item, f"IoT Hub knows no such key of {module}", remedy)
    if whole is None and not dotted:
        findings.error(place, "has no desired properties", f"put them below {_DESIRED}")
    twin = whole or Place(place.path, {}, partial=bool(dotted))
    for key, item in dotted.items():
        keys = tuple(key.removeprefix(f"{_DESIRED}.").split("."))
        if not all(keys):
            findings.error(item, "has an empty name between two dots", f"write {_DESIRED}.KEY")
            continue
        twin = twin.laid(keys, item)
    return twin


# createOptions: what Docker is asked for a module, as an object, a text, or a text in pieces.


KEY = "createOptions"

MAX_PIECE_CHARACTERS = 512
"""Where the agent itself cuts, and many a tool."""

_PIECE = re.compile(r"createoptions(\d*)", re.IGNORECASE)


def is_options(key: str) -> bool:
    """Whether a key of a module's settings is one of its createOptions."""
    return _PIECE.fullmatch(key) is not None


def read_options(settings: Place, *, template: bool, findings: Findings) -> Place | None:
    """The createOptions of a module's settings as places; None where there are none that can be read."""
    pieces = {key.lower(): item for key, item in settings.entries.items() if is_options(key)}
    whole = pieces.get(KEY.lower())
    if whole is not None and isinstance(whole.value, Mapping):
        if not template:
            remedy = "write it as a text that holds the JSON; only templates have objects here"
            findings.error(whole, "is an object", remedy)
        return _shaped(whole, findings)
    if not pieces or not _are_pieces(pieces, findings):
        return None
    return _parsed("".join(pieces[key].text for key in sorted(pieces)), below(settings.path, KEY), findings)


def _are_pieces(pieces: dict[str, Place], findings: Findings) -> bool:
    """Whether the pieces are texts that follow one another, as the agent wants them."""
    told = [findings.text(item) for item in pieces.values()]
    sound = None not in told
    names = [f"{KEY}{number:02d}" if number else KEY for number in range(len(pieces))]
    for key, item in pieces.items():
        if key not in (name.lower() for name in names) or len(pieces) > 100:
            remedy = f"number the pieces without a gap: {KEY}, {KEY}01, {KEY}02 … {KEY}99"
            findings.error(item, "is not the next piece: the agent does not read it", remedy)
            sound = False
        if len(pieces) > 1 and len(item.text) > MAX_PIECE_CHARACTERS:
            remedy = f"cut after {MAX_PIECE_CHARACTERS} characters, as the agent and its tools do"
            findings.warning(item, f"is a piece of {len(item.text)} characters", remedy)
    return sound


def _parsed(text: str, path: str, findings: Findings) -> Place | None:
    # The agent takes an empty text and the text null for no options.
    if not text.strip() or text.strip().lower() == "null":
        return None
    try:
        options = parse(text, path)
    except json.JSONDecodeError as error:
        remedy = "the text has to be JSON by itself, all quotes inside it escaped"
        findings.error(path, f"is no JSON at character {error.pos + 1}: {error.msg}", remedy)
        return None
    except ConfigError as error:
        findings.error(path, str(error), "write what Docker's API takes")
        return None
    return _shaped(options, findings)


def _shaped(options: Place, findings: Findings) -> Place:
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
