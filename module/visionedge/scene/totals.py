"""The file of the scenes: totals, who is inside, and the log of events, in one SQLite database. Blocking.

One transaction stores an event and the totals that it changes, so after a kill both are there or neither. An
event that is stored already changes nothing, so a try may be repeated. Used by one thread at a time, not by
the lane: the scene itself (`scene.py`) needs no file.
"""

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from visionedge.frames.types import format_utc
from visionedge.outbound.sqlite_store import (
    MAX_FORMAT,
    CorruptDatabaseError,
    DatabaseOpener,
    StoreFormat,
    in_transaction,
    is_corrupt,
    open_database,
)
from visionedge.runtime.files import is_special_file, set_aside
from visionedge.runtime.redaction import redact
from visionedge.runtime.state_file import list_versions, path_of_version
from visionedge.scene.events import SceneEvent, parse_event
from visionedge.scene.scene import KeptRule, RuleStart, RuleState, SceneChanges

log = logging.getLogger(__name__)

SCENE_FILE_NAME = "scene.db"

COUNT_DAYS = 31
"""Counts by the hour are kept for so long."""

_SCHEMA = """
    CREATE TABLE rule(
        camera TEXT NOT NULL, rule TEXT NOT NULL, shape TEXT NOT NULL, definition TEXT NOT NULL,
        since TEXT NOT NULL, PRIMARY KEY(camera, rule));
    CREATE TABLE total(
        camera TEXT NOT NULL, rule TEXT NOT NULL, total TEXT NOT NULL, label TEXT NOT NULL,
        count INTEGER NOT NULL, PRIMARY KEY(camera, rule, total, label));
    CREATE TABLE visit(
        camera TEXT NOT NULL, rule TEXT NOT NULL, track_id INTEGER NOT NULL, document TEXT NOT NULL,
        PRIMARY KEY(camera, rule, track_id));
    CREATE TABLE condition(
        camera TEXT NOT NULL, rule TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY(camera, rule, kind));
    CREATE TABLE hourly(
        camera TEXT NOT NULL, hour INTEGER NOT NULL, rule TEXT NOT NULL, shape TEXT NOT NULL,
        total TEXT NOT NULL, label TEXT NOT NULL, count INTEGER NOT NULL,
        PRIMARY KEY(camera, hour, rule, shape, total, label));
    CREATE TABLE event(
        key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, camera TEXT NOT NULL,
        type TEXT NOT NULL, rule TEXT NOT NULL, label TEXT, at_s INTEGER NOT NULL, bytes INTEGER NOT NULL,
        waits INTEGER NOT NULL, document TEXT NOT NULL, context TEXT);
    CREATE TABLE batch(id TEXT NOT NULL);
    CREATE TABLE track(camera TEXT PRIMARY KEY, last_id INTEGER NOT NULL);
    CREATE INDEX by_time ON event(at_s);
    CREATE INDEX by_waiting ON event(waits) WHERE waits
"""

SCENE_FORMAT = StoreFormat(schema=_SCHEMA)
"""The format of this version of the module; `StoreFormat` has the rules for upgrades."""

_ABSORB = (
    """INSERT INTO main.total SELECT * FROM other.total WHERE true
       ON CONFLICT DO UPDATE SET count = count + excluded.count""",
    "INSERT OR REPLACE INTO main.visit SELECT * FROM other.visit",
    """DELETE FROM main.condition WHERE EXISTS (SELECT 1 FROM other.rule
       WHERE rule.camera = condition.camera AND rule.rule = condition.rule)""",
    "INSERT INTO main.condition SELECT * FROM other.condition",
    """INSERT INTO main.hourly SELECT * FROM other.hourly WHERE true
       ON CONFLICT DO UPDATE SET count = count + excluded.count""",
    """INSERT OR IGNORE INTO main.event(id, camera, type, rule, label, at_s, bytes, waits, document, context)
       SELECT id, camera, type, rule, label, at_s, bytes, waits, document, context FROM other.event
       ORDER BY key""",
    """INSERT INTO main.track SELECT * FROM other.track WHERE true
       ON CONFLICT DO UPDATE SET last_id = max(last_id, excluded.last_id)""",
)
"""Adds what another file has counted later, once the rules are those of that file."""

_COMPANIONS = ("-wal", "-shm", "-journal")
_ROW_BYTES = 250
"""What an event takes beside its document: columns, indices, pages that are not full."""

_MAX_COUNT = (1 << 53) - 1
_MAX_REASON_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class EventLimits:
    """The bound of the event log: bytes of events, and days since they happened."""

    limit_bytes: int = 64_000_000
    days: float = 31.0


@dataclass(frozen=True, slots=True)
class CountRow:
    """How often a total of a zone or line grew in an hour or a day (UTC) that begins at `start`."""

    start: datetime
    rule: str
    shape: str
    total: str
    label: str
    count: int


class UnknownEventError(LookupError):
    """The log has no event with an id."""


class NewerSceneFileError(Exception):
    """The file belongs to a newer version of visionedge, and this one cannot use it."""

    def __init__(self, version: int) -> None:
        super().__init__(f"format {version}, this version reads up to {SCENE_FORMAT.version}")
        self.version = version


class SceneStore:
    """One file.

    Raises:
        sqlite3.Error: the file cannot be opened, or is damaged. Every method may raise it, and then changes
            nothing.
        NewerSceneFileError: it belongs to a newer version. It was not changed.

    Attributes:
        dropped: events that were deleted before they were acknowledged, since the file was opened.
    """

    def __init__(
        self, path: Path, limits: EventLimits | None = None, connect: DatabaseOpener | None = None
    ) -> None:
        self.path, self.limits = path, limits or EventLimits()
        self.dropped = 0
        self._evicted_at: datetime | None = None
        self._db = (connect or open_database)(path)
        try:
            self._prepare()
            for camera in self.cameras():
                self.load(camera)
            for (camera,) in self._db.execute("SELECT camera FROM track").fetchall():
                self.last_track_id(camera)
            (self._bytes,) = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM event").fetchone()
        except BaseException:
            self._db.close()
            raise

    def __repr__(self) -> str:
        return f"<SceneStore {self._bytes} bytes of events>"

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= MAX_FORMAT:
            raise CorruptDatabaseError("its version is not valid")
        if version > SCENE_FORMAT.version:
            try:
                is_usable = SCENE_FORMAT.can_use(self._db)
            except sqlite3.Error as error:
                if not is_corrupt(error):
                    raise
                is_usable = False
            if not is_usable:
                raise NewerSceneFileError(version)
            return
        with in_transaction(self._db):
            for statement in SCENE_FORMAT.statements(version):
                self._db.execute(statement)
        if not SCENE_FORMAT.matches(self._db):
            raise CorruptDatabaseError("the schema was changed")

    # --- totals -------------------------------------------------------------------------------------------

    def cameras(self) -> list[str]:
        """The cameras that have zones or lines in the file."""
        rows = self._db.execute("SELECT DISTINCT camera FROM rule UNION SELECT DISTINCT camera FROM visit")
        return [camera for (camera,) in rows]

    def load(self, camera: str) -> dict[str, KeptRule]:
        """What is kept of a camera, by zone or line; for `Scene(camera, kept)` at a start.

        Raises:
            CorruptDatabaseError: a value is not one that this module writes.
        """
        try:
            rows = self._select("SELECT rule, shape, definition, since FROM rule", camera)
            return {
                rule: KeptRule(
                    shape,
                    definition,
                    datetime.fromisoformat(since),
                    self._load_totals(camera, rule),
                    self._load_conditions(camera, rule),
                    self._load_visits(camera, rule),
                )
                for rule, shape, definition, since in rows
            }
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptDatabaseError(f"a value is not valid ({type(error).__name__})") from error

    def _load_totals(self, camera: str, rule: str) -> dict[str, dict[str, int]]:
        totals: dict[str, dict[str, int]] = {}
        for total, label, count in self._of(camera, rule, "SELECT total, label, count FROM total"):
            if not isinstance(count, int) or not 0 <= count <= _MAX_COUNT:
                raise CorruptDatabaseError("a total is not valid")
            totals.setdefault(total, {})[label] = count
        return totals

    def _load_conditions(self, camera: str, rule: str) -> frozenset[str]:
        return frozenset(kind for (kind,) in self._of(camera, rule, "SELECT kind FROM condition"))

    def _load_visits(self, camera: str, rule: str) -> tuple[SceneEvent, ...]:
        rows = self._of(camera, rule, "SELECT document FROM visit")
        return tuple(parse_event(json.loads(document)) for (document,) in rows if document)

    def _select(self, query: str, camera: str) -> list[Any]:
        return self._db.execute(f"{query} WHERE camera = ?", (camera,)).fetchall()

    def _of(self, camera: str, rule: str, query: str) -> list[Any]:
        return self._db.execute(f"{query} WHERE camera = ? AND rule = ?", (camera, rule)).fetchall()

    def write(self, changes: Iterable[SceneChanges], now: datetime, batch_id: str) -> list[RuleState]:
        """Store changes in their order, and delete what is too old or too much: all or nothing.

        After this the events may leave the module. Returns what the file had of zones and lines that
        began before it could be read.

        Args:
            changes: of any cameras.
            now: the UTC time, by which events and counts become old.
            batch_id: any text, another one for each batch; the last batch changes nothing when it is tried
                again, because an error does not always mean that it was not stored.
        """
        before = self._bytes, self.dropped
        try:
            with in_transaction(self._db):
                if not self._begin_batch(batch_id):
                    return []
                found = [state for change in changes for state in self._apply(change)]
                # Memory goes on with the conditions as they are after what it has decided meanwhile.
                found = [replace(each, kept=self._with_conditions(each)) for each in found]
                self._evict(now)
        except BaseException:
            self._bytes, self.dropped = before
            self._evicted_at = None
            raise
        return found

    def _begin_batch(self, batch_id: str) -> bool:
        """Note the batch as the last one; False: it was stored already."""
        statement = "UPDATE batch SET id = ?1 WHERE id != ?1 AND id NOT LIKE 'absorbed %'"
        if self._db.execute(statement, (batch_id,)).rowcount:
            return True
        if self._db.execute("SELECT 1 FROM batch WHERE id = ?", (batch_id,)).fetchone():
            return False
        self._db.execute("INSERT INTO batch(id) VALUES (?)", (batch_id,))
        return True

    def _apply(self, change: SceneChanges) -> Iterator[RuleState]:
        """Make one change; see `write` for the result."""
        for event in change.events:
            self._add_event(event)
        for start in change.starts:
            if start.keeps_totals and (kept := self._keep_rule(start)) is not None:
                yield RuleState(start.camera, start.rule, kept)
            else:
                self._start_rule(start)
        for state in change.states:
            self._restore_rule(state)
        for visit in change.visits:
            self._update_visit(visit)

    def _with_conditions(self, state: RuleState) -> KeptRule:
        return replace(state.kept, conditions=self._load_conditions(state.camera, state.rule))

    def _add_event(self, event: SceneEvent) -> None:
        document = json.dumps(event.document(), separators=(",", ":"))
        context = None if event.context is None else json.dumps(event.context, separators=(",", ":"))
        size = len(document) + len(context or "") + _ROW_BYTES
        added = self._db.execute(
            "INSERT OR IGNORE INTO event"
            "(id, camera, type, rule, label, at_s, bytes, waits, document, context)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 1, ?, ?)",
            (
                *(event.id, event.camera, event.type, event.rule, event.label),
                *(int(event.at.timestamp()), size, document, context),
            ),
        )
        if not added.rowcount:
            return  # stored by an earlier try
        self._bytes += size
        if event.total is not None and event.label is not None:
            self._add_to_totals(event, event.total, event.label)
        if event.condition is not None:
            kind, begins = event.condition
            self._db.execute(
                "INSERT OR IGNORE INTO condition(camera, rule, kind) VALUES (?, ?, ?)"
                if begins
                else "DELETE FROM condition WHERE camera = ? AND rule = ? AND kind = ?",
                (event.camera, event.rule, kind),
            )

    def _add_to_totals(self, event: SceneEvent, total: str, label: str) -> None:
        self._db.execute(
            "INSERT INTO total(camera, rule, total, label, count) VALUES (?, ?, ?, ?, 1)"
            " ON CONFLICT DO UPDATE SET count = count + 1",
            (event.camera, event.rule, total, label),
        )
        self._db.execute(
            "INSERT INTO hourly(camera, hour, rule, shape, total, label, count) VALUES (?, ?, ?, ?, ?, ?, 1)"
            " ON CONFLICT DO UPDATE SET count = count + 1",
            (event.camera, int(event.at.timestamp()) // 3600, event.rule, event.shape, total, label),
        )
        if total == "entered":
            self._db.execute(
                "INSERT OR REPLACE INTO visit(camera, rule, track_id, document) VALUES (?, ?, ?, '')",
                (event.camera, event.rule, event.track_id),
            )
        elif event.shape == "zone":
            self._db.execute(
                "DELETE FROM visit WHERE camera = ? AND rule = ? AND track_id = ?",
                (event.camera, event.rule, event.track_id),
            )

    def _update_visit(self, visit: SceneEvent) -> None:
        """Store what is due for who is inside; a visit that has ended meanwhile stays ended."""
        self._db.execute(
            "UPDATE visit SET document = ? WHERE camera = ? AND rule = ? AND track_id = ?",
            (json.dumps(visit.stored_document()), visit.camera, visit.rule, visit.track_id),
        )

    def _restore_rule(self, state: RuleState) -> None:
        """Replace all that the file has of a zone or line."""
        kept, where = state.kept, (state.camera, state.rule)
        self._start_rule(RuleStart(*where, kept.shape, kept.definition, kept.since))
        self._db.executemany(
            "INSERT INTO total(camera, rule, total, label, count) VALUES (?, ?, ?, ?, ?)",
            [
                (*where, total, label, count)
                for total, counts in kept.totals.items()
                for label, count in counts.items()
            ],
        )
        self._db.executemany("INSERT INTO condition VALUES (?, ?, ?)", [(*where, k) for k in kept.conditions])
        self._db.executemany(
            "INSERT INTO visit(camera, rule, track_id, document) VALUES (?, ?, ?, ?)",
            [(*where, visit.track_id, json.dumps(visit.stored_document())) for visit in kept.visits],
        )

    def _keep_rule(self, start: RuleStart) -> KeptRule | None:
        """Go on with what the file has of a zone or line; None: nothing. Who was inside is lost."""
        for event in self._load_visits(start.camera, start.rule):
            self._add_event(event)
        kept = self.load(start.camera).get(start.rule)
        return None if kept is None or kept.definition != start.definition else kept

    def _start_rule(self, start: RuleStart) -> None:
        where = (start.camera, start.rule)
        for table in ("rule", "total", "visit", "condition"):
            # The names come from the line above, not from data.
            self._db.execute(f"DELETE FROM {table} WHERE camera = ? AND rule = ?", where)  # noqa: S608
        if start.definition is not None:
            self._db.execute(
                "INSERT INTO rule(camera, rule, shape, definition, since) VALUES (?, ?, ?, ?, ?)",
                (*where, start.shape, start.definition, format_utc(start.since)),
            )

    def _evict(self, now: datetime) -> None:
        """Delete what is too old or too much: once in a minute, or when it is too much."""
        minute = now.replace(second=0, microsecond=0)
        if minute == self._evicted_at and self._bytes <= self.limits.limit_bytes:
            return
        self._evicted_at = minute
        oldest_s = int((now - timedelta(days=self.limits.days)).timestamp())
        self._delete(
            self._db.execute("SELECT key, bytes, waits FROM event WHERE at_s < ?", (oldest_s,)).fetchall()
        )
        excess, found = self._bytes - self.limits.limit_bytes, []
        if excess > 0:
            for row in self._db.execute("SELECT key, bytes, waits FROM event ORDER BY key"):
                if excess <= 0:
                    break
                found.append(row)
                excess -= row[1]
            self._delete(found)
        first_hour = int((now - timedelta(days=COUNT_DAYS)).timestamp()) // 3600
        self._db.execute("DELETE FROM hourly WHERE hour < ?", (first_hour,))

    def _delete(self, rows: Sequence[tuple[int, int, int]]) -> None:
        self._db.executemany("DELETE FROM event WHERE key = ?", [(key,) for key, _, _ in rows])
        self._bytes -= sum(size for _, size, _ in rows)
        self.dropped += sum(waits for _, _, waits in rows)

    def absorb(self, path: Path) -> None:
        """Add what another file counted after this one: totals, visits, events. The other file stays.

        It has the format of this version and is not open. A zone or line that has another definition there
        was edited later, so its totals are those of the other file. Done twice, it gives the same as once.
        """
        self._db.execute("ATTACH DATABASE ? AS other", (str(path),))
        try:
            with in_transaction(self._db):
                if (found := self._db.execute("SELECT id FROM other.batch").fetchone()) is None:
                    return  # nothing was ever written to it
                marker = f"absorbed {found[0]}"
                if self._db.execute("SELECT 1 FROM main.batch WHERE id = ?", (marker,)).fetchone():
                    return
                self._db.execute("INSERT INTO main.batch(id) VALUES (?)", (marker,))
                self._absorb_rules()
                for statement in _ABSORB:
                    self._db.execute(statement)
        finally:
            self._db.execute("DETACH DATABASE other")
        (self._bytes,) = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM event").fetchone()

    def _absorb_rules(self) -> None:
        """Take the other file's zones and lines; who is inside a zone that has changed is lost."""
        rows = self._db.execute("SELECT camera, rule, shape, definition, since FROM other.rule").fetchall()
        for camera, rule, shape, definition, since in rows:
            kept = self._of(camera, rule, "SELECT definition FROM main.rule")
            if kept == [(definition,)]:
                continue
            for event in self._load_visits(camera, rule):
                self._add_event(event)
            self._start_rule(RuleStart(camera, rule, shape, definition, datetime.fromisoformat(since)))

    # --- numbers of tracks --------------------------------------------------------------------------------

    def last_track_id(self, camera: str) -> int | None:
        """The highest number that is reserved for a track of a camera; None: none was.

        Raises:
            CorruptDatabaseError: the value is not one that this module writes.
        """
        rows = self._select("SELECT last_id FROM track", camera)
        if not rows:
            return None
        ((last_id,),) = rows
        if not isinstance(last_id, int) or not 0 <= last_id <= _MAX_COUNT:
            raise CorruptDatabaseError("a number of a track is not valid")
        return last_id

    def reserve_track_ids(self, camera: str, last_id: int) -> None:
        """Reserve all numbers up to this one: after a restart tracks begin above it."""
        self._db.execute(
            "INSERT INTO track(camera, last_id) VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET last_id = max(last_id, excluded.last_id)",
            (camera, last_id),
        )

    # --- events -------------------------------------------------------------------------------------------

    def waiting(self, limit: int, after: int = 0) -> list[tuple[int, dict[str, Any]]]:
        """The oldest events that were not acknowledged yet, each with its key: what a kill has left, too.

        They are as `SceneEvent.stored_document`. `after`: only those that were stored after the event with
        this key.
        """
        rows = self._db.execute(
            "SELECT key, document, context FROM event WHERE waits AND key > ? ORDER BY key LIMIT ?",
            (after, limit),
        ).fetchall()
        return [
            (key, json.loads(document) | ({"context": json.loads(context)} if context else {}))
            for key, document, context in rows
        ]

    def acknowledge(self, event_ids: Iterable[str]) -> None:
        """The spool or another durable queue has these events: they do not wait any more."""
        with in_transaction(self._db):
            self._db.executemany(
                "UPDATE event SET waits = 0 WHERE id = ?", [(event_id,) for event_id in event_ids]
            )

    def events(
        self,
        *,
        camera: str | None = None,
        event_type: str | None = None,
        rule: str | None = None,
        label: str | None = None,
        before: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """The newest events first; only those that were stored before or after the events with these ids.

        Raises:
            UnknownEventError: the log has no event with such an id.
        """
        given = {"camera": camera, "type": event_type, "rule": rule, "label": label}
        wanted = {column: value for column, value in given.items() if value is not None}
        conditions = [f"{column} = ?" for column in wanted]
        values: list[object] = [*wanted.values()]
        for event_id, side in ((before, "<"), (after, ">")):
            if event_id is not None:
                conditions.append(f"key {side} ?")
                values.append(self._find_event(event_id))
        # The names of the columns come from the dictionary above, not from data.
        where = " AND ".join(conditions) or "true"
        query = f"SELECT document FROM event WHERE {where} ORDER BY key DESC LIMIT ?"  # noqa: S608
        return [json.loads(document) for (document,) in self._db.execute(query, (*values, limit))]

    def _find_event(self, event_id: str) -> int:
        row = self._db.execute("SELECT key FROM event WHERE id = ?", (event_id,)).fetchone()
        if row is None:
            raise UnknownEventError(event_id)
        return int(row[0])

    def counts(
        self,
        camera: str,
        begin: datetime,
        end: datetime,
        by: Literal["hour", "day"] = "hour",
        limit: int = -1,
    ) -> list[CountRow]:
        """How often each total grew, from the hour of `begin` to before `end`; days are those of UTC.

        At most `limit` rows; -1: all.
        """
        hours = 1 if by == "hour" else 24
        rows = self._db.execute(
            "SELECT hour / ? * ?, rule, shape, total, label, sum(count) FROM hourly"
            " WHERE camera = ? AND hour >= ? AND hour * 3600 < ?"
            " GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5 LIMIT ?",
            (hours, hours, camera, int(begin.timestamp()) // 3600, end.timestamp(), limit),
        )
        return [CountRow(datetime.fromtimestamp(hour * 3600, UTC), *rest) for hour, *rest in rows]

    def close(self) -> None:
        """Close the file; the write-ahead log is written into it."""
        self._db.close()


@dataclass(frozen=True, slots=True)
class OpenedSceneStore:
    """The result of `open_scene_store`: without a store the scenes count in memory, for a `reason`.

    `lost`: why an old file was set aside. `newer`: the file of a newer version that stays unused, and what to
    do.
    """

    store: SceneStore | None
    reason: str | None = None
    lost: str | None = None
    newer: str | None = None


def set_aside_store(path: Path) -> None:
    """Rename a damaged file that is not open.

    Raises:
        OSError: it cannot be renamed.
    """
    set_aside(path, _COMPANIONS)


def open_scene_store(
    path: Path, limits: EventLimits | None = None, connect: DatabaseOpener | None = None
) -> OpenedSceneStore:
    """Open the file, or a new one if it is damaged, or another one beside that of a newer version.

    The folder is made. Raises nothing. Another error of the disk, or another process that uses the file,
    gives no store.
    """
    newer = lost = None
    original, last_ids = path, dict[str, int]()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return OpenedSceneStore(None, f"{path.parent}: {error.strerror or error}")
    for _ in range(3):  # a newer file, a damaged one beside it, and a new one
        try:
            if is_special_file(path):
                raise CorruptDatabaseError("is not a regular file")
            store = SceneStore(path, limits, connect)
            for camera, last_id in last_ids.items():
                store.reserve_track_ids(camera, last_id)
            _absorb_others(original, store, connect)
            return OpenedSceneStore(store, None, lost, newer)
        except NewerSceneFileError as error:
            last_ids |= _recover_last_track_ids(path, connect)
            own = path_of_version(path, SCENE_FORMAT.version)
            newer = (
                f"{path.name} was written by a newer version of visionedge ({error}): it stays as it is, and"
                f" this version counts in {own.name}; install the newer version again to use it"
            )
            path = own
        except sqlite3.Error as error:
            lost = redact(str(error))[:_MAX_REASON_CHARACTERS]
            if not is_corrupt(error):
                return OpenedSceneStore(None, lost, None, newer)
            last_ids |= _recover_last_track_ids(path, connect)
            try:
                set_aside_store(path)
            except OSError as failed:
                return OpenedSceneStore(
                    None, f"{lost}; renaming it failed: {failed.strerror or failed}", None, newer
                )
    return OpenedSceneStore(None, lost, None, newer)


def _absorb_others(original: Path, store: SceneStore, connect: DatabaseOpener | None) -> None:
    """Add what older versions have counted beside the file of this version, the earliest first."""
    for version in reversed(list_versions(original)):  # a version absorbs those of lower ones
        path = path_of_version(original, version)
        if version > SCENE_FORMAT.version or path == store.path:
            continue
        try:
            # Opened first, which checks it and brings it to the format of this version.
            SceneStore(path, connect=connect).close()
            store.absorb(path)
            for end in ("", *_COMPANIONS):
                path.with_name(path.name + end).unlink(missing_ok=True)
        except (sqlite3.Error, NewerSceneFileError, OSError) as error:
            log.warning(
                "%s: its totals cannot be added to %s: %s; the next start retries",
                path,
                store.path.name,
                redact(str(error)),
            )


def _recover_last_track_ids(path: Path, connect: DatabaseOpener | None) -> dict[str, int]:
    """The highest reserved number of each camera in a file that this version cannot use, if it is legible."""
    try:
        with closing((connect or open_database)(path)) as database:
            rows = database.execute("SELECT camera, last_id FROM track").fetchall()
    except (sqlite3.Error, ValueError):
        return {}
    return {
        camera: last_id
        for camera, last_id in rows
        if isinstance(camera, str) and isinstance(last_id, int) and 0 <= last_id <= _MAX_COUNT
    }
