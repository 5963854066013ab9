"""The module twin in edgeHub: merge patches, versions, and the rules for reported properties."""

import json
from typing import Any

MAX_TWIN_BYTES = 32 * 1024
_MAX_DEPTH = 10
_MAX_KEY_BYTES = 1024
_MAX_TEXT_BYTES = 4096
_MAX_INTEGER = 4_503_599_627_370_495
_MIN_INTEGER = -4_503_599_627_370_496


class RefusedError(Exception):
    """edgeHub refuses the patch; the text says why."""


class Twin:
    """A module twin: two documents with versions, changed by merge patches."""

    def __init__(self) -> None:
        self.desired: dict[str, Any] = {}
        self.reported: dict[str, Any] = {}
        self.desired_version = 1
        self.reported_version = 1
        self.patches: list[dict[str, Any]] = []

    def document(self) -> bytes:
        """Both halves, as a GET returns them."""
        return json.dumps(
            {
                "desired": {**self.desired, "$version": self.desired_version},
                "reported": {**self.reported, "$version": self.reported_version},
            }
        ).encode()

    def report(self, payload: bytes) -> int:
        """Apply a patch to the reported half; returns its new version.

        Raises:
            RefusedError: the patch breaks a rule of edgeHub.
        """
        try:
            patch = json.loads(payload, parse_constant=_no_constant)
        except ValueError as error:
            raise RefusedError(f"not JSON: {error}") from None
        if not isinstance(patch, dict):
            raise RefusedError("the patch is not an object")
        check_reported(patch)
        whole = merged(self.reported, patch)
        if len(json.dumps(whole, separators=(",", ":")).encode()) > MAX_TWIN_BYTES:
            raise RefusedError(f"reported properties above {MAX_TWIN_BYTES} bytes")
        self.patches.append(patch)
        self.reported = whole
        self.reported_version += 1
        return self.reported_version

    def desire(self, patch: dict[str, Any]) -> bytes:
        """Apply a patch to the desired half; returns the body of the notification."""
        self.desired = merged(self.desired, patch)
        self.desired_version += 1
        return json.dumps({**patch, "$version": self.desired_version}).encode()


def merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`base` after the merge patch `patch`; null removes a key."""
    result = dict(base)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            below = result.get(key)
            result[key] = merged(below if isinstance(below, dict) else {}, value)
        else:
            result[key] = value
    return result


def check_reported(value: Any, depth: int = 0, *, in_array: bool = False) -> None:
    """Check a patch of reported properties by the rules of edgeHub.

    Raises:
        RefusedError: names the first rule that is broken.
    """
    if depth > _MAX_DEPTH:
        raise RefusedError(f"nested deeper than {_MAX_DEPTH}")
    match value:
        case dict():
            for key, item in value.items():
                _check_key(key)
                check_reported(item, depth + 1)
        case list():
            for item in value:
                check_reported(item, depth + 1, in_array=True)
        case None if in_array:
            raise RefusedError("null inside an array")
        case str() if len(value.encode()) > _MAX_TEXT_BYTES:
            raise RefusedError(f"a text above {_MAX_TEXT_BYTES} bytes")
        case int() if not isinstance(value, bool) and not _MIN_INTEGER <= value <= _MAX_INTEGER:
            raise RefusedError(f"the integer {value}")


def _check_key(key: str) -> None:
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise RefusedError(f"a key above {_MAX_KEY_BYTES} bytes")
    if any(letter in ".$# " or not letter.isprintable() for letter in key):
        raise RefusedError(f"the key '{key}'")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
