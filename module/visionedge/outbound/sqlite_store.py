"""The file of the spool: an SQLite database with a write-ahead log. Blocking; used by one thread at a time.

A transaction is on the disk when `write` returns (`synchronous=FULL`), so it survives a kill and a power cut.
Keys rise in the order of writing; sequence numbers rise by one within an output.
"""

import functools
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from visionedge.outbound.messages import EVENTS, KEPT_OUTPUTS, MAX_BYTES, Message

log = logging.getLogger(__name__)

MessageDropReason = Literal["full", "old", "refused", "unreadable", "unwritable"]
"""Why a message was dropped: the spool was full, the message was too old, the SDK refuses it, the file could
not be read, or the file cannot store its content."""

DatabaseOpener = Callable[[Path], sqlite3.Connection]

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
    CREATE INDEX by_kind ON message(output = '{EVENTS}', key)
"""


@dataclass(frozen=True, slots=True)
class StoreFormat:
    """The form of a file: version 1 (`schema`), and the statements that make each version of the one before.

    Rules for an upgrade, so that other versions of the module can go on: the table `number` stays as it is;
    the table `compatibility(min_reader)` has the lowest version that can use the file. An upgrade that only
    adds tables, and columns with a default value, leaves that version as it was.
    """

    upgrades: tuple[str, ...] = ()
    schema: str = _SCHEMA

    @property
    def version(self) -> int:
        """The number in `PRAGMA user_version`."""
        return 1 + len(self.upgrades)

    def statements(self, version: int) -> Iterator[str]:
        """What makes a file of this format of a file of a version; 0: of an empty file."""
        for number, script in enumerate((self.schema, *self.upgrades)[version:], version + 1):
            yield from script.split(";")
            yield f"PRAGMA user_version={number}"

    def matches(self, database: sqlite3.Connection) -> bool:
        """Whether a file has exactly the tables of this format."""
        return _read_schema(database) == _expected_schema(self)

    def can_use(self, database: sqlite3.Connection) -> bool:
        """Whether the newer version that wrote a file lets this one use it."""
        found = database.execute("SELECT min_reader FROM compatibility").fetchone()
        return found is not None and isinstance(found[0], int) and found[0] <= self.version


FORMAT = StoreFormat()
"""The format of this version of the module."""

MAX_FORMAT = 1_000
"""A higher number is damage, not a newer version."""


_ABSORB = (
    """INSERT INTO main.message(output, number, bytes, born_s, frames, id, properties, body)
       SELECT output, number, bytes, :born_s, frames, id, properties, body FROM other.message
       WHERE id NOT IN (SELECT id FROM main.message) ORDER BY key""",
    """INSERT INTO main.number(output, last) SELECT output, last FROM other.number WHERE true
       ON CONFLICT(output) DO UPDATE SET last = max(last, excluded.last)""",
    """INSERT INTO main.loss(output, first, last, reason) SELECT output, first, last, reason FROM other.loss
       EXCEPT SELECT output, first, last, reason FROM main.loss""",
    """INSERT INTO main.spent(day, messages) SELECT day, messages FROM other.spent WHERE true
       ON CONFLICT(day) DO UPDATE SET messages = max(messages, excluded.messages)""",
)
"""Copies everything of another file; done twice, it gives the same as once."""

_MAX_INTEGER = (1 << 53) - 1
_MAX_OUTPUT_CHARACTERS = 256
_MAX_TEXT_BYTES = 16_384
_INVALID_TEXT = f"typeof({{0}}) != 'text' OR length(CAST({{0}} AS BLOB)) > {_MAX_TEXT_BYTES}"
_INVALID_COUNT = f"typeof({{0}}) != 'integer' OR {{0}} < 0 OR {{0}} > {_MAX_INTEGER}"
_REASONS = ", ".join(f"'{reason}'" for reason in get_args(MessageDropReason))
_INVALID_VALUES: Mapping[str, Mapping[str, str]] = {
    "message": {
        **dict.fromkeys(("key", "number", "born_s", "frames"), _INVALID_COUNT),
        **dict.fromkeys(("output", "id", "properties"), _INVALID_TEXT),
        "bytes": f"typeof({{0}}) != 'integer' OR {{0}} < 1 OR {{0}} > {2 * MAX_BYTES}",
        "body": f"typeof({{0}}) != 'blob' OR length({{0}}) > {MAX_BYTES}",
    },
    "number": {"output": _INVALID_TEXT, "last": _INVALID_COUNT},
    "loss": {
        **dict.fromkeys(("key", "first", "last"), _INVALID_COUNT),
        "output": _INVALID_TEXT,
        "reason": f"{{0}} IS NULL OR {{0}} NOT IN ({_REASONS})",
    },
    "spent": {"day": _INVALID_TEXT, "messages": _INVALID_COUNT},
    "owner": {"name": _INVALID_TEXT, "lived_s": _INVALID_COUNT},
    # The source of new keys; at the largest value SQLite reports a full disk at every write.
    "sqlite_sequence": {"seq": _INVALID_COUNT},
}
"""For each column an SQL condition that is true for values that this module never writes."""

_ENVIRONMENT_ERRORS = frozenset(
    {
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
        *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
    }
)
"""Errors that the disk or another process causes; any other error means that the file itself is damaged."""


class CorruptDatabaseError(sqlite3.DatabaseError):
    """The file can be read, but its content is not valid."""


class ForeignFileError(Exception):
    """The file belongs to another module."""


class NewerFileError(Exception):
    """The file belongs to a newer version of visionedge, and this one cannot use it."""

    def __init__(self, version: int, last_numbers: Mapping[str, int]) -> None:
        super().__init__(f"format {version}, this version reads up to {FORMAT.version}")
        self.last_numbers = last_numbers
        """The last sequence numbers in it, by output."""


@dataclass(frozen=True, slots=True)
class LostRange:
    """Sequence numbers `first` to `last` of an output, which the hub will never get.

    `key` is its row in the file; 0 until it is written.
    """

    output: str
    first: int
    last: int
    reason: MessageDropReason
    key: int = 0


@dataclass(frozen=True, slots=True)
class MessageRow:
    """A message in the file, without its body."""

    key: int
    output: str
    sequence_number: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """The size of the file, in bytes of messages, and the age of messages, in seconds that the module ran.

    Time without power does not count: many devices start with a wrong clock, which would make all messages
    look old.
    """

    limit_bytes: int = 256_000_000
    max_age_s: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Transaction:
    """The changes that one transaction makes.

    Attributes:
        append: messages to store.
        settled: rows to delete because their messages are acknowledged or refused: (key, bytes).
        evicted: rows to delete because of the limits.
        lost_ranges: new losses, to be reported to the cloud later.
        reported: losses whose report the hub has acknowledged.
        last_numbers: the last sequence number by output of messages that were sent without the disk.
        running_s: how long the module has run with this file, all starts together.
        spent: blocks spent of the day's budget, by UTC day.
        unsaved_reported: losses that are not in the file yet and that appended messages report. They are
            stored, so that another message can report them if that message is lost as well.
    """

    append: Sequence[Message] = ()
    settled: Sequence[tuple[int, int]] = ()
    evicted: Sequence[tuple[MessageRow, MessageDropReason]] = ()
    lost_ranges: Sequence[LostRange] = ()
    reported: Sequence[LostRange] = ()
    last_numbers: Mapping[str, int] = field(default_factory=dict)
    running_s: float = 0.0
    spent: Mapping[str, int] = field(default_factory=dict)
    unsaved_reported: Sequence[LostRange] = ()

    @property
    def growth_bytes(self) -> int:
        """By how much the messages in the file grow, before rows are evicted."""
        return sum(m.size_bytes for m in self.append) - sum(size for _, size in self.settled)


class MessageStore:
    """One file. A new file begins with `last_numbers`, the last sequence number by output.

    Raises:
        sqlite3.Error: the file cannot be opened. Every method may raise it, too, and then changes nothing.
        ForeignFileError: the file belongs to another module.
        NewerFileError: the file belongs to a newer version of visionedge. It was not changed.
    """

    def __init__(
        self,
        path: Path,
        owner: str,
        limits: SpoolLimits,
        connect: DatabaseOpener | None = None,
        last_numbers: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.limits = limits
        try:
            self._db = (connect or open_database)(path)
            try:
                # A text that is not UTF-8 must not prevent reading the valid rows beside it.
                self._db.text_factory = _decode_lenient
                self._prepare(owner, last_numbers)
            except BaseException:
                self._db.close()
                raise
        except (TypeError, ValueError, OverflowError) as error:
            # The text of an error may contain bytes of the file that Python cannot decode.
            raise CorruptDatabaseError(f"a value is not valid ({type(error).__name__})") from error

    def _prepare(self, owner: str, last_numbers: Mapping[str, int]) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= MAX_FORMAT:
            raise CorruptDatabaseError("its version is not valid")
        if version < FORMAT.version:
            with in_transaction(self._db):
                for statement in FORMAT.statements(version):
                    self._db.execute(statement)
                if version == 0:
                    self._db.execute("INSERT INTO owner(name, lived_s) VALUES (?, 0)", (owner,))
                    self._raise_numbers(last_numbers)
        try:
            if version > FORMAT.version:
                if not FORMAT.can_use(self._db):
                    raise CorruptDatabaseError("only newer versions can use it")
            elif not FORMAT.matches(self._db):
                raise CorruptDatabaseError("the schema was changed")
            self._check()
        except sqlite3.Error as error:
            if version > FORMAT.version and is_corrupt(error):
                raise NewerFileError(version, read_last_numbers(self._db)) from None
            raise
        self._load(owner)

    def _load(self, owner: str) -> None:
        """Read everything but the messages."""
        name, self.running_s = self._db.execute("SELECT name, lived_s FROM owner").fetchone()
        if name != owner:
            raise ForeignFileError("its messages belong to another module")
        self.owner = name
        self.last_numbers: dict[str, int] = dict(self._db.execute("SELECT output, last FROM number"))
        self.count, self.bytes = self._db.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM message"
        ).fetchone()
        self.spent: dict[str, int] = dict(self._db.execute("SELECT day, messages FROM spent"))
        self.first_numbers: dict[str, int] = dict(
            self._db.execute("SELECT output, min(number) FROM message GROUP BY output")
        )
        self.lost_ranges = self._read_losses()
        for text in (
            *self.last_numbers,
            *self.spent,
            *self.first_numbers,
            *(loss.output for loss in self.lost_ranges),
        ):
            text.encode("utf-8")

    def _check(self) -> None:
        """Check every value except the bodies, which are checked when they are loaded.

        Raises:
            CorruptDatabaseError: a value is not one that this module writes.
        """
        for table, columns in _INVALID_VALUES.items():
            for column, wrong in columns.items():
                # The names come from the table above, not from data.
                query = f"SELECT 1 FROM {table} WHERE {wrong.format(column)} LIMIT 1"  # noqa: S608
                if self._db.execute(query).fetchone() is not None:
                    raise CorruptDatabaseError(f"a value of {table}.{column} is not valid")
        if self._db.execute("SELECT count(*) FROM owner").fetchone() != (1,):
            raise CorruptDatabaseError("it does not have exactly one owner")

    @property
    def is_over_limit(self) -> bool:
        """Whether the messages in the file exceed the limit in bytes."""
        return bool(self.bytes > self.limits.limit_bytes)

    def write(self, transaction: Transaction) -> list[int]:
        """Make all changes or none; returns the keys of the appended messages."""
        with in_transaction(self._db):
            keys = self._append(transaction)
            self._write_spent(transaction)
            count, size = self._delete_settled(
                [*transaction.settled, *((row.key, row.bytes) for row, _ in transaction.evicted)]
            )
            self._change_losses(
                [*transaction.lost_ranges, *_merge_ranges(transaction.evicted)],
                transaction.reported,
                transaction.unsaved_reported,
            )
            self._db.execute("UPDATE owner SET lived_s = ?", (int(transaction.running_s),))
            lost_ranges = self._read_losses()
        self.spent = dict(transaction.spent)
        self.count = count + len(keys)
        self.bytes = size + sum(message.size_bytes for message in transaction.append)
        self.lost_ranges = lost_ranges
        return keys

    def select_evictions(self, transaction: Transaction) -> list[tuple[MessageRow, MessageDropReason]]:
        """The rows to drop: those that are too old, then the oldest telemetry, then the oldest of the others.

        Rows that the transaction settles are deleted anyway and are not a loss.
        """
        sent = {key for key, _ in transaction.settled}
        oldest_s = transaction.running_s - self.limits.max_age_s
        old = (row for row in self._older_than(oldest_s) if row.key not in sent)
        evicted: dict[int, tuple[MessageRow, MessageDropReason]] = {row.key: (row, "old") for row in old}
        excess = self.bytes + transaction.growth_bytes - self.limits.limit_bytes
        excess -= sum(row.bytes for row, _ in evicted.values())
        for telemetry in (True, False):
            if excess <= 0:
                break
            for row in self._rows(telemetry):
                if excess <= 0:
                    break
                if row.key not in evicted and row.key not in sent:
                    evicted[row.key] = (row, "full")
                    excess -= row.bytes
        return list(evicted.values())

    def load(self, after: int, limit: int, limit_bytes: int) -> list[tuple[int, Message | MessageRow]]:
        """The next messages after a key, each with its key: within the limits, but at least one.

        A row that is not valid is returned as a `MessageRow`, without its body.
        """
        found: list[tuple[int, Message | MessageRow]] = []
        for row in self._db.execute(
            "SELECT key, bytes, output, body, id, properties, number, frames FROM message"
            " WHERE key > ? ORDER BY key LIMIT ?",
            (after, limit),
        ):
            limit_bytes -= row[1]
            if found and limit_bytes < 0:
                break
            found.append((row[0], _message(row)))
        return found

    def shrink_log(self) -> None:
        """Write the write-ahead log into the file, and give up its space."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def absorb(self, path: Path) -> None:
        """Move the messages of another file into this one, behind its own, with their numbers and losses.

        The other file has a format of this version and is not open. A kill in between loses no message and
        repeats none that still waits. Raises nothing but sqlite3.Error.
        """
        self._db.execute("ATTACH DATABASE ? AS other", (str(path),))
        try:
            with in_transaction(self._db):
                for statement in _ABSORB:
                    self._db.execute(statement, {"born_s": int(self.running_s)})
            with in_transaction(self._db):
                self._db.execute("DELETE FROM other.message")
                self._db.execute("DELETE FROM other.loss")
        finally:
            self._db.execute("DETACH DATABASE other")
        self._load(self.owner)

    def raise_numbers(self, last_numbers: Mapping[str, int]) -> None:
        """Go on above these sequence numbers, by output, where they are higher than those in the file.

        In memory they count even if this raises an error.
        """
        for output, last in last_numbers.items():
            self.last_numbers[output] = max(last, self.last_numbers.get(output, 0))
        with in_transaction(self._db):
            self._raise_numbers(last_numbers)

    def _raise_numbers(self, last_numbers: Mapping[str, int]) -> None:
        self._db.executemany(
            "INSERT INTO number(output, last) VALUES (?, ?)"
            " ON CONFLICT(output) DO UPDATE SET last = max(last, excluded.last)",
            last_numbers.items(),
        )

    def close(self) -> None:
        """Close the file; the write-ahead log is written into it."""
        self._db.close()

    def _append(self, transaction: Transaction) -> list[int]:
        keys = []
        for message in transaction.append:
            cursor = self._db.execute(
                "INSERT INTO message(output, number, bytes, born_s, frames, id, properties, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    message.output,
                    message.sequence_number,
                    message.size_bytes,
                    int(transaction.running_s),
                    message.frames,
                    message.message_id,
                    json.dumps(dict(message.properties)),
                    message.body,
                ),
            )
            keys.append(int(cursor.lastrowid or 0))
        last = {
            **transaction.last_numbers,
            **{message.output: message.sequence_number for message in transaction.append},
        }
        self._raise_numbers(last)
        return keys

    def _write_spent(self, transaction: Transaction) -> None:
        """Store what was spent of the day's budget, so that a restart does not begin a new budget."""
        if transaction.spent != self.spent:
            self._db.execute("DELETE FROM spent")
            self._db.executemany("INSERT INTO spent(day, messages) VALUES (?, ?)", transaction.spent.items())

    def _delete_settled(self, settled: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Delete rows by (key, bytes); returns how many messages and bytes are left."""
        count, size = self.count, self.bytes
        for key, row_bytes in settled:
            if self._db.execute("DELETE FROM message WHERE key = ?", (key,)).rowcount:
                count, size = count - 1, size - row_bytes
        return count, size

    def _older_than(self, moment_s: float) -> Iterator[MessageRow]:
        """The rows older than a moment. Keys rise with time, so reading stops at the first younger row."""
        found = self._db.execute("SELECT key, output, number, bytes, born_s FROM message ORDER BY key")
        for *row, born_s in found:
            if born_s >= moment_s:
                return
            yield MessageRow(*row)

    def _rows(self, telemetry: bool) -> Iterator[MessageRow]:
        """The rows of telemetry or of the other outputs, oldest first."""
        columns = "SELECT key, output, number, bytes FROM message"
        # Literals, because SQLite does not use the index with a parameter. The index knows only `events`;
        # when the others are asked for, all telemetry is about to be dropped, so few rows are skipped.
        if telemetry:
            where = f"(output = '{EVENTS}') = 0 AND output NOT IN {KEPT_OUTPUTS}"
        else:
            where = f"output IN {KEPT_OUTPUTS}"
        found = self._db.execute(f"{columns} WHERE {where} ORDER BY key")
        return (MessageRow(*row) for row in found)

    def _change_losses(
        self,
        lost_ranges: Iterable[LostRange],
        reported: Iterable[LostRange],
        unsaved_reported: Iterable[LostRange],
    ) -> None:
        for loss in reported:
            # The range may have grown since it was reported: then only its reported part is removed.
            self._db.execute("DELETE FROM loss WHERE key = ? AND last <= ?", (loss.key, loss.last))
            self._db.execute("UPDATE loss SET first = ? WHERE key = ?", (loss.last + 1, loss.key))
        for loss in unsaved_reported:  # not joined to an earlier range, which no message reports yet
            self._insert_loss(loss)
        for loss in lost_ranges:
            joined = self._db.execute(
                "UPDATE loss SET last = ? WHERE output = ? AND reason = ? AND last = ?",
                (loss.last, loss.output, loss.reason, loss.first - 1),
            )
            if joined.rowcount == 0:
                self._insert_loss(loss)

    def _insert_loss(self, loss: LostRange) -> None:
        self._db.execute(
            "INSERT INTO loss(output, first, last, reason) VALUES (?, ?, ?, ?)",
            (loss.output, loss.first, loss.last, loss.reason),
        )

    def _read_losses(self) -> list[LostRange]:
        rows = self._db.execute("SELECT output, first, last, reason, key FROM loss ORDER BY key")
        return [LostRange(*row) for row in rows]


def _decode_lenient(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _message(row: Sequence[Any]) -> Message | MessageRow:
    """A row as a message; as a `MessageRow` if this module cannot have written it."""
    key, size, output, body, message_id, properties, sequence_number, frames = row
    try:
        known = json.loads(properties)
        body.decode("utf-8")
        message_id.encode("utf-8")
        properties.encode("utf-8")
        if message_id and all(isinstance(value, str) for value in known.values()):
            return Message(output, body, message_id, known, sequence_number, frames)
    except (ValueError, RecursionError, AttributeError):
        log.debug("spool: row %d is not valid", key)
    return MessageRow(key, output, sequence_number, size)


def _read_schema(database: sqlite3.Connection) -> list[tuple[object, ...]]:
    rows = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name")
    return [(*row, " ".join(str(sql).split())) for *row, sql in rows]


@functools.cache
def _expected_schema(store_format: StoreFormat) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(":memory:")) as database:
        for statement in store_format.statements(0):
            database.execute(statement)
        return _read_schema(database)


def open_database(path: Path) -> sqlite3.Connection:
    """Open a file for this process only: two modules on one spool would send every message twice.

    Raises:
        sqlite3.Error: the file cannot be opened, or another process uses it.
    """
    database = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA journal_size_limit=4194304")
        # With the largest transaction, a log that `disk_reserve.RESERVE_BYTES` can hold.
        database.execute("PRAGMA wal_autocheckpoint=256")
        database.execute("PRAGMA cache_size=-2048")
        # Some builds overwrite each deleted page: then deleting needs as much space and wear as writing.
        database.execute("PRAGMA secure_delete=FAST")
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def in_transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All statements of the block, or none of them."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def recover_last_numbers(path: Path, connect: DatabaseOpener | None = None) -> dict[str, int]:
    """The last sequence numbers in a damaged file, by output, as far as they can still be read."""
    try:
        with closing((connect or open_database)(path)) as database:
            return read_last_numbers(database)
    except (sqlite3.Error, ValueError):
        return {}


def read_last_numbers(database: sqlite3.Connection) -> dict[str, int]:
    """The last sequence numbers in an open file, by output; none if they cannot be read."""
    try:
        rows = database.execute("SELECT output, last FROM number").fetchall()
    except (sqlite3.Error, ValueError):
        return {}
    return {
        output: last
        for output, last in rows
        if isinstance(output, str)
        and len(output) <= _MAX_OUTPUT_CHARACTERS
        and isinstance(last, int)
        and 0 <= last <= _MAX_INTEGER
    }


def is_full(error: Exception) -> bool:
    """Whether an error means that the disk may be full."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def is_corrupt(error: Exception) -> bool:
    """Whether an error means that the file is damaged, so that trying again cannot help."""
    # The text of an error may contain bytes of a damaged schema, which Python cannot decode.
    if isinstance(error, CorruptDatabaseError | UnicodeDecodeError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    # A text that is not UTF-8 is found by Python's module, not by SQLite, so the error has no code.
    return "decode" in str(error) if code is None else code & 0xFF not in _ENVIRONMENT_ERRORS


def _merge_ranges(evicted: Iterable[tuple[MessageRow, MessageDropReason]]) -> list[LostRange]:
    """Join consecutive sequence numbers of one output and one reason into one range."""
    lost_ranges: dict[tuple[str, MessageDropReason], list[LostRange]] = {}
    for row, reason in evicted:
        known = lost_ranges.setdefault((row.output, reason), [])
        if known and known[-1].last == row.sequence_number - 1:
            known[-1] = LostRange(row.output, known[-1].first, row.sequence_number, reason)
        else:
            known.append(LostRange(row.output, row.sequence_number, row.sequence_number, reason))
    return [loss for group in lost_ranges.values() for loss in group]
