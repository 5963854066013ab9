"""Reported properties: what the hub knows of the module, what it shall know, and the patches between them.

Patches hold differences only, and null for what is gone; at most one goes in five seconds. Over a new link
everything is told again: edgeHub may have lost what an old one told.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from visionedge.config.documents import Document
from visionedge.config.load import merge

MIN_PATCH_INTERVAL_NS = 5_000_000_000
MAX_PATCH_BYTES = 28_000
"""Below the 32 KB that edgeHub takes."""

_MAX_PATCH_INTERVAL_NS = 300_000_000_000

PatchOutcome = Literal["taken", "refused", "lost"]
"""What became of a patch: the hub has it, the hub will not have it, or the link was lost meanwhile."""


_UNKNOWN = object()
"""Stands for a value of which nobody knows whether the hub still has it: equal to none."""


class ReportedProperties:
    """Decides what to patch and when; does no I/O. For one thread, with one patch on its way at a time."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._known: Document | None = None
        self._sending: Document | None = None
        self._next_ns = clock()
        self._refusals = 0
        self.patches = 0

    def __repr__(self) -> str:
        return f"<Reported linked={self._known is not None} patches={self.patches} refusals={self._refusals}>"

    def on_connected(self, reported: Mapping[str, Any]) -> None:
        """There is a new link; `reported` is that half of the twin, or nothing where it could not be read."""
        self._known = _with_unknown_values(
            {key: value for key, value in reported.items() if not key.startswith("$")}
        )
        self._sending = None

    def lost(self) -> None:
        """There is no link any more."""
        self._known = self._sending = None

    def due(self) -> bool:
        """Whether a patch may go out now."""
        return self._known is not None and self._sending is None and self._clock() >= self._next_ns

    def next_patch(self, wanted: Mapping[str, Any]) -> Document | None:
        """The patch that brings the hub nearer to `wanted`, to be sent now; None when none may or must go."""
        if not self.due() or self._known is None:
            return None
        patch = limit_patch_size(compute_merge_patch(self._known, wanted))
        if not patch:
            return None
        self._sending = patch
        self._next_ns = self._clock() + MIN_PATCH_INTERVAL_NS
        self.patches += 1
        return patch

    def settle(self, outcome: PatchOutcome) -> None:
        """What became of the patch on its way; a refused one is tried again, ever more rarely."""
        patch, self._sending = self._sending, None
        if patch is None or self._known is None:
            return
        if outcome == "taken":
            self._refusals = 0
            self._known = merge(self._known, patch)
        elif outcome == "refused":
            self._refusals += 1
            self._next_ns = self._clock() + min(
                MIN_PATCH_INTERVAL_NS * 2 ** min(self._refusals, 16), _MAX_PATCH_INTERVAL_NS
            )
        else:
            self.lost()


def compute_merge_patch(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> Document:
    """The merge patch that makes `known` into `wanted`."""
    patch: Document = {key: None for key in known if key not in wanted}
    for key, value in wanted.items():
        below = known.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            inner = compute_merge_patch(below, value)
            if inner:
                patch[key] = inner
        elif key not in known or below != value:
            patch[key] = value
    return patch


def limit_patch_size(patch: Document) -> Document:
    """The patch, or a part of it that edgeHub takes: what goes away first, so that there is room."""
    if _size(patch) <= MAX_PATCH_BYTES:
        return patch
    gone = _deletions(patch)
    if gone:
        return _take_entries_that_fit(gone)
    return _take_entries_that_fit(patch)


def _deletions(patch: Mapping[str, Any]) -> Document:
    found: Document = {}
    for key, value in patch.items():
        if value is None:
            found[key] = None
        elif isinstance(value, Mapping) and (inner := _deletions(value)):
            found[key] = inner
    return found


def _take_entries_that_fit(patch: Mapping[str, Any]) -> Document:
    """As many entries, of the first level and of the second, as fit."""
    part: Document = {}
    left_bytes = MAX_PATCH_BYTES
    for key, value in patch.items():
        entries = value.items() if isinstance(value, Mapping) else ((None, value),)
        for inner, item in entries:
            size = _size({key: {str(inner): item}})
            if size > left_bytes:
                return part
            left_bytes -= size
            if inner is None:
                part[key] = item
            else:
                part.setdefault(key, {})[inner] = item
    return part


def _with_unknown_values(known: Mapping[str, Any]) -> Document:
    """The keys that the hub had, with values that have to be told again."""
    return {
        key: _with_unknown_values(value) if isinstance(value, Mapping) else _UNKNOWN
        for key, value in known.items()
    }


def _size(patch: Any) -> int:
    return len(json.dumps(patch, separators=(",", ":")))
