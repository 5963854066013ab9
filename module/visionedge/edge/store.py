"""The spool's file: an SQLite database with a write-ahead log. Blocking; used by one thread at a time.

A commit is on the disk when `write` returns (`synchronous=FULL`), so what was committed outlives a kill and a
power cut. Keys rise in the order of writing; numbers rise by one within an output.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from visionedge.edge.billing import blocks
from visionedge.edge.messages import EVENTS, Message

Reason = Literal["full", "old", "refused", "unreadable"]
"""Why messages were dropped: no room, too old, the SDK can never send them, the file could not be read."""

Connect = Callable[[Path], sqlite3.Connection]

_VERSION = 1
_SCHEMA = f"""
    CREATE TABLE message(
        key INTEGER PRIMARY KEY AUTOINCREMENT, output TEXT NOT NULL, number INTEGER NOT NULL,
        bytes INTEGER NOT NULL, born_s INTEGER NOT NULL, frames INTEGER NOT NULL, id TEXT NOT NULL,
        properties TEXT NOT NULL, body BLOB NOT NULL);
    CREATE TABLE number(output TEXT PRIMARY KEY, last INTEGER NOT NULL);
    CREATE TABLE loss(
        key INTEGER PRIMARY KEY AUTOINCREMENT, output TEXT NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, reason TEXT NOT NULL);
    CREATE TABLE spent(day TEXT PRIMARY KEY, messages INTEGER NOT NULL);
    CREATE TABLE owner(name TEXT NOT NULL, lived_s INTEGER NOT NULL);
    CREATE INDEX by_kind ON message(output = '{EVENTS}', key);
    PRAGMA user_version={_VERSION}
"""


class DamagedFileError(sqlite3.DatabaseError):
    """The file can be read and makes no sense."""


class ForeignFileError(Exception):
    """The file belongs to another module, or to another version of this one."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Numbers `first` to `last` of an output that the hub will never get; `key` is 0 until it is written."""

    output: str
    first: int
    last: int
    reason: Reason
    key: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A message in the file, without its body."""

    key: int
    output: str
    number: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the file may hold, in bytes of messages, and for how long, in seconds that the module ran.

    Time without power does not count: a clock that is wrong until the network is there would make everything
    look old.
    """

    limit_bytes: int = 256_000_000
    max_age_s: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Work:
    """What one transaction shall do.

    `settled` has keys with their bytes, `numbers` the last that were sent while there was no disk, `day` is
    the UTC date.
    """

    append: Sequence[Message] = ()
    settled: Sequence[tuple[int, int]] = ()
    evicted: Sequence[tuple[Row, Reason]] = ()
    losses: Sequence[Loss] = ()
    told: Sequence[Loss] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    lived_s: float = 0.0
    day: str = ""

    @property
    def growth_bytes(self) -> int:
        """How much larger the file gets by it, before anything is evicted."""
        return sum(m.size_bytes for m in self.append) - sum(size for _, size in self.settled)


class Store:
    """One file; `numbers` are what a new one begins with.

    Raises:
        sqlite3.Error: it cannot be opened; every method may raise it, too, and leaves the file as it was.
        ForeignFileError: it is somebody else's.
    """

    def __init__(
        self,
        path: Path,
        owner: str,
        bounds: Bounds,
        connect: Connect | None = None,
        numbers: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.bounds = bounds
        self._db = (connect or open_database)(path)
        try:
            self._prepare(owner, numbers)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, owner: str, numbers: Mapping[str, int]) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO owner VALUES (?, 0)", (owner,))
                self._db.executemany("INSERT INTO number VALUES (?, ?)", numbers.items())
        elif version != _VERSION:
            raise ForeignFileError(f"it has version {version}, and this module knows {_VERSION}")
        row = self._db.execute("SELECT name, lived_s FROM owner").fetchone()
        if row is None:
            raise DamagedFileError("it names no owner")
        name, self.lived_s = row
        if name != owner:
            raise ForeignFileError(f"its messages are those of {name}")
        self.numbers: dict[str, int] = dict(self._db.execute("SELECT output, last FROM number"))
        self.count, self.bytes = self._db.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM message"
        ).fetchone()
        self.spent: dict[str, int] = dict(self._db.execute("SELECT day, messages FROM spent"))
        self.first_numbers: dict[str, int] = dict(
            self._db.execute("SELECT output, min(number) FROM message GROUP BY output")
        )
        self.losses = self._read_losses()

    @property
    def over(self) -> bool:
        """Whether it holds more than it may."""
        return bool(self.bytes > self.bounds.limit_bytes)

    def write(self, work: Work) -> list[int]:
        """Do it all or nothing; the keys of the appended messages."""
        with self._transaction():
            keys = self._append(work)
            self._spend(work)
            count, size = self._without([*work.settled, *((row.key, row.bytes) for row, _ in work.evicted)])
            self._change_losses([*work.losses, *_ranges(work.evicted)], work.told)
            self._db.execute("UPDATE owner SET lived_s = ?", (int(work.lived_s),))
            losses = self._read_losses()
        self.count = count + len(keys)
        self.bytes = size + sum(message.size_bytes for message in work.append)
        self.losses = losses
        return keys

    def excess(self, work: Work) -> list[tuple[Row, Reason]]:
        """What must go: the too old, then the oldest telemetry, then the oldest events, until all fits.

        What the work settles goes by itself, and is no loss.
        """
        sent = {key for key, _ in work.settled}
        oldest_s = work.lived_s - self.bounds.max_age_s
        old = (row for row in self._born_before(oldest_s) if row.key not in sent)
        going: dict[int, tuple[Row, Reason]] = {row.key: (row, "old") for row in old}
        excess = self.bytes + work.growth_bytes - self.bounds.limit_bytes
        excess -= sum(row.bytes for row, _ in going.values())
        for telemetry in (True, False):
            if excess <= 0:
                break
            for row in self._rows(telemetry):
                if excess <= 0:
                    break
                if row.key not in going and row.key not in sent:
                    going[row.key] = (row, "full")
                    excess -= row.bytes
        return list(going.values())

    def load(self, after: int, limit: int, limit_bytes: int) -> list[tuple[int, Message]]:
        """The next messages behind a key, with theirs: within the limits, yet one if there is one."""
        found: list[tuple[int, Message]] = []
        for row in self._db.execute(
            "SELECT key, bytes, output, body, id, properties, number, frames FROM message"
            " WHERE key > ? ORDER BY key LIMIT ?",
            (after, limit),
        ):
            key, size, output, body, message_id, properties, number, frames = row
            limit_bytes -= size
            if found and limit_bytes < 0:
                break
            try:
                known = json.loads(properties)
            except ValueError as error:
                raise DamagedFileError("the properties of a message are no JSON") from error
            found.append((key, Message(output, body, message_id, known, number, frames)))
        return found

    def close(self) -> None:
        """Close the file; the log goes into it."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _append(self, work: Work) -> list[int]:
        keys = []
        for message in work.append:
            cursor = self._db.execute(
                "INSERT INTO message(output, number, bytes, born_s, frames, id, properties, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    message.output,
                    message.number,
                    message.size_bytes,
                    int(work.lived_s),
                    message.frames,
                    message.message_id,
                    json.dumps(dict(message.properties)),
                    message.body,
                ),
            )
            keys.append(int(cursor.lastrowid or 0))
        last = {**work.numbers, **{message.output: message.number for message in work.append}}
        self._db.executemany(
            "INSERT INTO number VALUES (?, ?)"
            " ON CONFLICT(output) DO UPDATE SET last = max(last, excluded.last)",
            last.items(),
        )
        return keys

    def _spend(self, work: Work) -> None:
        """Count the day's blocks, so that a restart grants no second budget. The column's name is older."""
        if telemetry := sum(blocks(each.size_bytes) for each in work.append if each.output != EVENTS):
            self._db.execute("DELETE FROM spent WHERE day < ?", (work.day,))
            self._db.execute(
                "INSERT INTO spent VALUES (?, ?)"
                " ON CONFLICT(day) DO UPDATE SET messages = messages + excluded.messages",
                (work.day, telemetry),
            )

    def _without(self, settled: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Delete rows by (key, bytes); how many messages and bytes are left."""
        count, size = self.count, self.bytes
        for key, row_bytes in settled:
            if self._db.execute("DELETE FROM message WHERE key = ?", (key,)).rowcount:
                count, size = count - 1, size - row_bytes
        return count, size

    def _born_before(self, moment_s: float) -> Iterator[Row]:
        """The oldest rows: who was written first was born first, so it need not look at all."""
        found = self._db.execute("SELECT key, output, number, bytes, born_s FROM message ORDER BY key")
        for *row, born_s in found:
            if born_s >= moment_s:
                return
            yield Row(*row)

    def _rows(self, telemetry: bool) -> Iterator[Row]:
        """The rows of telemetry or of events, oldest first."""
        found = self._db.execute(
            # A literal, for the index knows no parameter.
            f"SELECT key, output, number, bytes FROM message WHERE (output = '{EVENTS}') = ? ORDER BY key",  # noqa: S608
            (not telemetry,),
        )
        return (Row(*row) for row in found)

    def _change_losses(self, losses: Iterable[Loss], told: Iterable[Loss]) -> None:
        for loss in told:
            # It may have grown since it was told: then only its head goes.
            self._db.execute("DELETE FROM loss WHERE key = ? AND last <= ?", (loss.key, loss.last))
            self._db.execute("UPDATE loss SET first = ? WHERE key = ?", (loss.last + 1, loss.key))
        for loss in losses:
            joined = self._db.execute(
                "UPDATE loss SET last = ? WHERE output = ? AND reason = ? AND last = ?",
                (loss.last, loss.output, loss.reason, loss.first - 1),
            )
            if joined.rowcount == 0:
                self._db.execute(
                    "INSERT INTO loss(output, first, last, reason) VALUES (?, ?, ?, ?)",
                    (loss.output, loss.first, loss.last, loss.reason),
                )

    def _read_losses(self) -> list[Loss]:
        rows = self._db.execute("SELECT output, first, last, reason, key FROM loss ORDER BY key")
        return [Loss(*row) for row in rows]


def open_database(path: Path) -> sqlite3.Connection:
    """Open a file for one process alone: two modules on one spool would send everything twice.

    Raises:
        sqlite3.Error: it cannot be opened, or another process has it.
    """
    database = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA journal_size_limit=4194304")
        database.execute("PRAGMA cache_size=-2048")
    except BaseException:
        database.close()
        raise
    return database


def salvage_numbers(path: Path, connect: Connect | None = None) -> dict[str, int]:
    """The last numbers in a damaged file, as far as they can still be read."""
    try:
        with closing((connect or open_database)(path)) as database:
            rows = database.execute("SELECT output, last FROM number").fetchall()
    except sqlite3.Error:
        return {}
    return {output: last for output, last in rows if isinstance(output, str) and isinstance(last, int)}


def broken(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is no sound database, now and for ever."""
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(error, DamagedFileError):
        return True
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _ranges(evicted: Iterable[tuple[Row, Reason]]) -> list[Loss]:
    """Neighbouring numbers of one output and one reason as one loss."""
    losses: dict[tuple[str, Reason], list[Loss]] = {}
    for row, reason in evicted:
        known = losses.setdefault((row.output, reason), [])
        if known and known[-1].last == row.number - 1:
            known[-1] = Loss(row.output, known[-1].first, row.number, reason)
        else:
            known.append(Loss(row.output, row.number, row.number, reason))
    return [loss for group in losses.values() for loss in group]
