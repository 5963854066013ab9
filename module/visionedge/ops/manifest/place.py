"""A JSON document as places: every value with the path to it, so that whatever is wrong can say where."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from visionedge.errors import ConfigError

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
