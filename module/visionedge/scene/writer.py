"""The thread `scene`: stores what scenes change, then lets their events leave the module.

`put` only appends to a queue, so the lane never waits for the disk. An event is delivered after the
transaction that stores it and the totals that it changes, and waits in the file until it is acknowledged.
While the disk cannot be written, events are delivered all the same, what they change waits in memory, and the
disk is tried again.
"""

import contextlib
import logging
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from visionedge.errors import VisionedgeError
from visionedge.frames.types import utc_now
from visionedge.outbound.sqlite_store import CorruptDatabaseError, DatabaseOpener, is_corrupt
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene.events import EventFilter, SceneEvent
from visionedge.scene.scene import KeptRule, RuleState, SceneChanges
from visionedge.scene.totals import (
    CountRow,
    EventLimits,
    SceneStore,
    open_scene_store,
    set_aside_store,
)

log = logging.getLogger(__name__)

RETRY_S = 10.0
"""A disk that failed is tried again after so long."""

MAX_WAITING = 20_000
"""The most changes that wait in memory for the disk."""

MAX_UNACKNOWLEDGED = 2_000
"""The most events that are delivered and not acknowledged; the others wait in the file."""

_PAUSE_S = 0.1
"""The thread pauses for so long after each transaction: changes of this time share the next one. A
transaction costs 0.7 ms of processor time and a write to the disk, however few changes it has."""

_BATCH = 100
"""So many events are delivered at a time; encoding them holds the loop for some 7 ms."""

Deliver = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes documents of events (`SceneEvent.stored_document`) that may leave the module, in their order.

Called by the thread `scene`."""


@dataclass(frozen=True, slots=True)
class SceneStorageStatus:
    """The state of the file: `mode` is `memory` for a `reason`; `waiting` changes are not on the disk yet.

    `lost`: why an older file was set aside. `newer`: the unused file of a newer version, and what to do.
    """

    mode: Literal["disk", "memory"]
    reason: str | None
    waiting: int
    lost: str | None
    newer: str | None


class SceneStorageError(VisionedgeError):
    """The file cannot be read now."""


class SceneWriter:
    """The one owner of the file. `put` and `status` return at once; the others block on the disk.

    The constructor opens the file and raises nothing. `deliver` gets each event at least once: after a kill
    those that were not acknowledged before come again, with their ids.
    """

    def __init__(
        self,
        path: Path,
        limits: EventLimits,
        deliver: Deliver,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
        connect: DatabaseOpener | None = None,
    ) -> None:
        self._path, self._limits, self._connect = path, limits, connect
        self._deliver, self._clock, self._now = deliver, clock, now
        # Guards the queue; held for assignments only.
        self._changed = threading.Condition()
        self._queue: list[SceneChanges] = []
        self._acknowledged: list[str] = []
        self._closing = self._is_busy = False
        self._pause_ended = threading.Event()
        # Guards the store; held while the disk works.
        self._disk = threading.Lock()
        self._store: SceneStore | None = None
        # With their ids; only the first one may have been tried.
        self._batches: deque[tuple[str, list[SceneChanges]]] = deque()
        # Ids: delivered and not acknowledged; acknowledged, which the file does not say yet.
        self._unacknowledged: set[str] = set()
        self._unmarked: set[str] = set()
        self._last_key = 0  # of the events that were delivered from this file
        self._reason: str | None = None
        self._lost: str | None = None
        self._newer: str | None = None
        self._has_given_up = False
        self._found_states: list[RuleState] = []
        self._is_replaced = False
        self._retry_at_s = 0.0
        self._open()

    def __repr__(self) -> str:
        state = self.status()
        return f"<SceneWriter {state.mode} waiting={state.waiting}>"

    def start(self, thread_group: ThreadGroup) -> threading.Thread:
        """Start the thread; once."""
        self._is_busy = True  # until it has delivered what a kill has left
        return thread_group.start("scene", self._run, vital=True, may_return=True)

    def load(self, camera: str) -> dict[str, KeptRule] | None:
        """What the last run has left of a camera; None: the disk cannot be used."""
        with self._disk:
            try:
                return None if self._store is None else self._store.load(camera)
            except sqlite3.Error as error:
                self._fail(error)
                return None

    def take_replaced(self) -> bool:
        """Whether a new file has replaced a damaged one since the last call: `Scene.states` must be put."""
        with self._changed:
            found, self._is_replaced = self._is_replaced, False
            return found

    def take_found_states(self) -> list[RuleState]:
        """What the file had of zones and lines that began before it could be read; each once."""
        with self._changed:
            found, self._found_states = self._found_states, []
            return found

    def last_track_id(self, camera: str) -> int | None:
        """As `SceneStore.last_track_id`; None without a file."""
        with self._disk:
            try:
                return None if self._store is None else self._store.last_track_id(camera)
            except sqlite3.Error as error:
                self._fail(error)
                return None

    def reserve_track_ids(self, camera: str, last_id: int) -> bool:
        """As `SceneStore.reserve_track_ids`; whether it is on the disk."""
        with self._disk:
            if self._store is None:
                return False
            try:
                self._store.reserve_track_ids(camera, last_id)
            except sqlite3.Error as error:
                self._fail(error)
                return False
            return True

    def cameras(self) -> list[str]:
        """The cameras of which something is left; empty without a file."""
        with self._disk:
            try:
                return [] if self._store is None else self._store.cameras()
            except sqlite3.Error as error:
                self._fail(error)
                return []

    def set_limits(self, limits: EventLimits) -> None:
        """Bound the log of events otherwise, from the next transaction on."""
        with self._disk:
            self._limits = limits
            if self._store is not None:
                self._store.limits = limits

    def put(self, changes: SceneChanges) -> None:
        """Append changes of a scene, from any thread."""
        if changes:
            with self._changed:
                self._queue.append(changes)
                self._changed.notify_all()

    def acknowledge(self, event_ids: Sequence[str]) -> None:
        """These events need not be delivered again, from any thread."""
        if event_ids:
            with self._changed:
                self._acknowledged += event_ids
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the thread has done what it can with all changes so far; False if it took longer."""
        with self._changed:
            self._pause_ended.set()
            return self._changed.wait_for(lambda: not self._queue and not self._is_busy, timeout_s)

    def events(
        self,
        wanted: EventFilter | None = None,
        *,
        before: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """As `SceneStore.events`, with the events that are not on the disk yet.

        Raises:
            SceneStorageError: the disk cannot be used.
            UnknownEventError: there is no event with the id `before` or `after`.
        """
        wanted = wanted or EventFilter()
        with self._read() as store:
            waiting = self._list_waiting()
            places = {event.id: place for place, event in enumerate(waiting)}
            if before is not None:
                waiting = waiting[: places.get(before, 0)]
            if after is not None:
                waiting = waiting[places.get(after, -1) + 1 :]
            newest = [event.document() for event in reversed(waiting) if wanted.matches(event)][:limit]
            if after in places:
                return newest
            before = None if before in places else before
            left = limit - len(newest)
            return newest + store.events(**asdict(wanted), before=before, after=after, limit=left)

    def _list_waiting(self) -> list[SceneEvent]:
        with self._changed:
            batches = [*(changes for _, changes in self._batches), self._queue]
            return [event for changes in batches for change in changes for event in change.events]

    def counts(
        self, camera: str, begin: datetime, end: datetime, by: Literal["hour", "day"], limit: int = -1
    ) -> list[CountRow]:
        """As `SceneStore.counts`.

        Raises:
            SceneStorageError: the disk cannot be used.
        """
        with self._read() as store:
            return store.counts(camera, begin, end, by, limit)

    @contextlib.contextmanager
    def _read(self) -> Iterator[SceneStore]:
        with self._disk:
            if self._store is None:
                raise SceneStorageError(f"scene.db cannot be used: {self._reason or 'the module stops'}")
            try:
                yield self._store
            except (sqlite3.Error, ValueError) as error:  # a document that is no JSON is damage, too
                if not isinstance(error, sqlite3.Error):
                    error = CorruptDatabaseError(f"a document is not valid ({type(error).__name__})")
                self._fail(error)
                raise SceneStorageError(f"scene.db cannot be read: {redact(str(error))[:200]}") from None

    def status(self) -> SceneStorageStatus:
        """The state of the file."""
        with self._changed:
            waiting = len(self._queue) + sum(len(changes) for _, changes in self._batches)
            mode: Literal["disk", "memory"] = "disk" if self._reason is None else "memory"
            return SceneStorageStatus(mode, self._reason, waiting, self._lost, self._newer)

    def close(self) -> None:
        """Have the thread write the rest and end."""
        with self._changed:
            self._closing = True
            self._pause_ended.set()
            self._changed.notify_all()

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_waiting()  # events that a kill has left
            while self._await_changes():
                self._write_waiting()
                self._pause_ended.wait(_PAUSE_S)
                self._pause_ended.clear()
        finally:
            self._write_waiting()
            with self._disk:
                if self._store is not None:
                    self._store.close()
                    self._store = None

    def _await_changes(self) -> bool:
        with self._changed:
            while not self._queue and not self._acknowledged and not self._closing:
                left_s = None if self._store is not None else self._retry_at_s - self._clock()
                if self._has_given_up:
                    left_s = None
                if left_s is not None and left_s <= 0:
                    break
                self._changed.wait(left_s)
            return not self._closing

    def _write_waiting(self) -> None:
        """Store what waits, and deliver its events."""
        with self._changed:
            self._is_busy = True
            if self._queue:
                self._batches.append((secrets.token_hex(8), self._queue))
                self._queue = []
            acknowledged, self._acknowledged = self._acknowledged, []
        self._unacknowledged.difference_update(acknowledged)
        self._unmarked.update(acknowledged)
        try:
            self._do_round()
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _do_round(self) -> None:
        with self._disk:
            if self._store is None and not self._has_given_up and self._clock() >= self._retry_at_s:
                self._open()
            while self._store is not None and self._batches and self._write(*self._batches[0]):
                with self._changed:
                    self._batches.popleft()
            self._hand_over()
            if self._store is not None:
                # Not when it was opened: a full disk lets a file be opened.
                self._set_reason(None)
            if self._store is None and sum(len(changes) for _, changes in self._batches) > MAX_WAITING:
                self._give_up()

    def _write(self, batch_id: str, changes: Sequence[SceneChanges]) -> bool:
        if self._store is None:
            return False
        try:
            found = self._store.write(changes, self._now(), batch_id)
        except sqlite3.Error as error:
            self._fail(error)
            return False
        with self._changed:
            self._found_states += found
        return True

    def _hand_over(self) -> None:
        """Deliver the next events that are stored; without the disk those that wait for it."""
        if self._store is None:
            self._deliver_unstored()
            return
        try:
            if self._unmarked:
                self._store.acknowledge(self._unmarked)
                self._unmarked.clear()
            is_more = True
            while is_more:
                limit = min(_BATCH, self._room())
                rows = self._store.waiting(limit, self._last_key)
                self._deliver_new([document for _, document in rows])
                self._last_key = rows[-1][0] if rows else self._last_key
                is_more = 0 < len(rows) == limit
        except sqlite3.Error as error:
            self._fail(error)

    def _room(self) -> int:
        """How many events may be delivered before others are acknowledged."""
        return max(0, MAX_UNACKNOWLEDGED - len(self._unacknowledged))

    def _deliver_unstored(self) -> None:
        waiting = (event for _, changes in self._batches for change in changes for event in change.events)
        new = [event for event in waiting if self._is_new(event.id)]
        room = self._room()
        self._deliver_new([event.stored_document() for event in new[:room]])
        if self._has_given_up and len(new) <= room:
            self._forget_waiting()

    def _deliver_new(self, documents: Sequence[Mapping[str, Any]]) -> None:
        if new := [document for document in documents if self._is_new(document["id"])]:
            self._deliver(new)
            self._unacknowledged.update(document["id"] for document in new)

    def _is_new(self, event_id: str) -> bool:
        """Whether an event was not delivered before, from another file or before it was stored."""
        return event_id not in self._unacknowledged and event_id not in self._unmarked

    def _give_up(self) -> None:
        """Stop storing: the file is consistent now, and would not be with a part of what followed."""
        what = "their events are lost" if self._has_given_up else "totals are not stored until the next start"
        log.error("scene: more than %d changes wait for the disk; %s", MAX_WAITING, what)
        self._has_given_up = True
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        with self._changed:
            self._batches.clear()
        self._unmarked.clear()

    def _open(self) -> None:
        opened = open_scene_store(self._path, self._limits, self._connect)
        if opened.lost is not None and opened.store is not None:
            self._warn_set_aside(opened.lost)
        if opened.newer is not None and opened.newer != self._newer:
            log.warning("scene: %s", opened.newer)
        with self._changed:
            self._store, self._last_key = opened.store, 0
            self._lost, self._newer = opened.lost or self._lost, opened.newer
            self._is_replaced |= opened.store is not None and opened.lost is not None
            self._retry_at_s = self._clock() + RETRY_S
        if opened.reason is not None:
            self._set_reason(opened.reason)

    def _fail(self, error: sqlite3.Error) -> None:
        """Close the file: it is opened again later, a new one if this one is damaged."""
        reason = redact(str(error))[:200]
        store = self._store
        if store is None:
            return
        with contextlib.suppress(sqlite3.Error):
            store.close()
        with self._changed:
            self._store = None
            self._retry_at_s = self._clock() + RETRY_S
            self._changed.notify_all()  # the thread may wait without a time limit
        if is_corrupt(error):
            with contextlib.suppress(OSError):
                set_aside_store(store.path)
                self._warn_set_aside(reason)
                self._lost, self._retry_at_s = reason, self._clock()
                self._is_replaced = True
        self._set_reason(reason)

    def _warn_set_aside(self, reason: str) -> None:
        log.warning(
            "scene: %s cannot be used: %s; it was set aside, a new file begins with the totals of this run",
            self._path.name,
            reason,
        )

    def _set_reason(self, reason: str | None) -> None:
        if reason != self._reason and reason is not None:
            log.warning(
                "scene: the disk cannot be used: %s; totals wait in memory, retrying every %.0f s",
                reason,
                RETRY_S,
            )
        elif reason != self._reason:
            log.info("scene: totals are written to the disk again")
        with self._changed:
            self._reason = reason
