"""Reported properties: makes the patches that bring the hub's copy to the state of the module.

A patch contains differences only, and null for removed keys. Changes between two patches are coalesced. Over
a new connection everything is reported again, because edgeHub may have lost earlier patches. Pure: the clock
is an argument.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from visionedge.config.documents import Document
from visionedge.config.load import merge
from visionedge.iothub.client import TaskOutcome
from visionedge.runtime.retry import Backoff, RetryPolicy

PATCH_BURST = 3
PATCH_INTERVAL_NS = 5_000_000_000
"""Three patches may go at once, then one every 5 s. IoT Hub allows 50 twin updates a second to all devices of
an S1 hub together, and rejects further ones."""

MAX_PATCH_BYTES = 28_000
"""The size limit of a patch; edgeHub accepts 32 KB."""

_REFUSED_POLICY = RetryPolicy(first_wait_s=10.0, max_wait_s=300.0)

_UNKNOWN = object()
"""A value that the hub may have lost. It is not equal to any value, so it is reported again."""


class PatchRateLimit:
    """A token bucket: `PATCH_BURST` patches at once, then one every `PATCH_INTERVAL_NS`."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._full_ns = clock()  # when all tokens are available again

    def available(self) -> bool:
        """Whether there is a token."""
        return self._clock() >= self._full_ns - (PATCH_BURST - 1) * PATCH_INTERVAL_NS

    def take(self) -> None:
        """Take a token."""
        self._full_ns = max(self._clock(), self._full_ns) + PATCH_INTERVAL_NS


class ReportedProperties:
    """Decides what to patch and when; does no I/O. For one thread, with at most one patch in flight.

    `patches` counts the patches so far.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._rate_limit = PatchRateLimit(clock)
        self._known: Document | None = None
        self._sending: Document | None = None
        self._retry_ns = clock()
        self._backoff = Backoff(_REFUSED_POLICY)
        self.patches = 0

    def __repr__(self) -> str:
        connected = self._known is not None
        return f"<ReportedProperties connected={connected} patches={self.patches} {self._backoff!r}>"

    def on_connected(self, reported: Mapping[str, Any]) -> None:
        """There is a new connection; `reported` is that half of the twin, empty if it could not be read."""
        self._known = _with_unknown_values(
            {key: value for key, value in reported.items() if not key.startswith("$")}
        )
        self._sending = None

    def lost(self) -> None:
        """There is no connection any more."""
        self._known = self._sending = None

    def due(self) -> bool:
        """Whether a patch may be sent now."""
        ready = self._known is not None and self._sending is None and self._clock() >= self._retry_ns
        return ready and self._rate_limit.available()

    def next_patch(self, wanted: Mapping[str, Any]) -> Document | None:
        """The patch to send now to bring the hub to `wanted`; None if no patch may or must be sent."""
        if not self.due() or self._known is None:
            return None
        patch = limit_patch_size(compute_merge_patch(self._known, wanted))
        if not patch:
            return None
        self._sending = patch
        self._rate_limit.take()
        self.patches += 1
        return patch

    def settle(self, outcome: TaskOutcome) -> None:
        """The outcome of the patch in flight. After a refusal the next one waits 10 s, then up to 300 s."""
        patch, self._sending = self._sending, None
        if patch is None or self._known is None:
            return
        if outcome == "taken":
            self._backoff.reset()
            self._known = merge(self._known, patch)
        elif outcome == "refused":
            self._retry_ns = self._clock() + round(self._backoff.next_wait_s() * 1e9)
        else:
            self.lost()


def compute_merge_patch(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> Document:
    """The JSON merge patch (RFC 7396) that changes `known` into `wanted`."""
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
    """The patch, or a part of at most `MAX_PATCH_BYTES`: deletions first, as the twin is limited, too."""
    if _size(patch) <= MAX_PATCH_BYTES:
        return patch
    return _take_entries_that_fit(_deletions(patch) or patch)


def _deletions(patch: Mapping[str, Any]) -> Document:
    found: Document = {}
    for key, value in patch.items():
        if value is None:
            found[key] = None
        elif isinstance(value, Mapping) and (inner := _deletions(value)):
            found[key] = inner
    return found


def _take_entries_that_fit(patch: Mapping[str, Any]) -> Document:
    """As many entries of the first and second level as fit."""
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
    """The same keys, with values that must be reported again."""
    return {
        key: _with_unknown_values(value) if isinstance(value, Mapping) else _UNKNOWN
        for key, value in known.items()
    }


def _size(patch: Any) -> int:
    return len(json.dumps(patch, separators=(",", ":")))
