"""Placeholders, `${NAME}` or `$LIKE_THIS`: where they are, and what they become."""

import re
from collections.abc import Mapping
from typing import Any

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
