"""The spool: a queue that keeps every message on disk until its PUBACK, over outages, kills and restarts.

`put`, `peek` and `settle` only change the queue in memory, under one lock. The thread `spool` reads and
writes the disk, many messages in one transaction. When the disk cannot be written, the spool continues in
memory, reports that, and tries the disk again.
"""

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from visionedge.outbound import sqlite_store
from visionedge.outbound.disk_reserve import DiskReserve
from visionedge.outbound.messages import Message
from visionedge.outbound.queue_state import QueuedMessage, QueueState
from visionedge.outbound.sqlite_store import (
    DatabaseOpener,
    ForeignFileError,
    LostRange,
    MessageDropReason,
    MessageRow,
    MessageStore,
    NewerFileError,
    SpoolLimits,
    Transaction,
    is_corrupt,
    is_full,
    recover_last_numbers,
)
from visionedge.runtime.files import is_special_file, set_aside
from visionedge.runtime.redaction import redact
from visionedge.runtime.state_file import list_versions, path_of_version
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

SPOOL_FILE_NAME = "spool.db"

_RESERVE_FILE_NAME = "spool.reserve"
_COMPANIONS = ("-wal", "-shm", "-journal")
_MAX_REASON_CHARACTERS = 200
_NS = 1_000_000_000
_FLUSH_DELAY_NS = 200_000_000
_EVENT_INTERVAL_NS = 300 * _NS
_EXPIRY_INTERVAL_NS = 60 * _NS

_STALL_NS = 10 * _NS
"""A disk that takes longer for one round of the spool hangs; a slow flash disk takes a second."""

SpoolEventCode = Literal[
    "spool-memory", "spool-disk", "spool-lost", "spool-newer", "storage-stalled", "storage-back"
]


@dataclass(frozen=True, slots=True)
class SpoolOptions:
    """The limit of messages in memory, and the interval at which a disk that failed is tried again."""

    memory_bytes: int = 32_000_000
    retry_s: float = 10.0


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """The path of the file, the owner of its messages (`Identity.owner`), and its limits."""

    path: Path
    owner: str
    limits: SpoolLimits
    connect: DatabaseOpener | None = None


@dataclass(frozen=True, slots=True)
class SpoolEvent:
    """An event for the cloud. The detail `upTo` of `spool-lost` has the last numbers in the lost file."""

    code: SpoolEventCode
    text: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """The state of the spool: `mode` is `memory` for a `reason`; `waiting` and `dropped` count messages.

    `stalled_seconds`: for so long the disk has hung; 0 if it does not.
    `newer`: the file of a newer version of visionedge that lies there unused, and what to do; else None.
    """

    mode: Literal["disk", "memory"]
    reason: str | None
    waiting: int
    waiting_bytes: int
    dropped: Mapping[str, int]
    stalled_seconds: float = 0.0
    newer: str | None = None


class Spool:
    """A durable queue of messages. All methods except `start` and `close` return at once and are thread-safe.

    The constructor opens the file, which may block for some seconds. It raises nothing: without a usable file
    the spool begins in memory.

    Attributes:
        last_numbers: the last sequence number of each output in the file.
        spent: blocks of telemetry spent by UTC day, as the file has them.
    """

    def __init__(
        self,
        path: Path,
        owner: str,
        thread_group: ThreadGroup,
        *,
        limits: SpoolLimits | None = None,
        spool_options: SpoolOptions | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        connect: DatabaseOpener | None = None,
    ) -> None:
        self._settings = SpoolSettings(path, owner, limits or SpoolLimits(), connect)
        self._thread_group = thread_group
        self._options = spool_options or SpoolOptions()
        self._clock = clock
        self._spent: Callable[[], Mapping[str, int]] = lambda: self.spent
        self._wake_client: Callable[[], None] = lambda: None
        self._store: MessageStore | None = None
        self._reserve = DiskReserve(path.with_name(_RESERVE_FILE_NAME))
        self._path = path  # another one beside it if a newer version of visionedge owns it
        self._newer: str | None = None
        self._running_before_s = 0.0
        self._opened_ns = clock()
        self._finished = threading.Event()
        # Guards all below; held for assignments only.
        self._changed = threading.Condition()
        self._queue = QueueState(self._options.memory_bytes)
        self._reason: str | None = None
        self._retry_ns = 0
        self._flush_due_ns = 0
        self._expiry_due_ns = clock() + _EXPIRY_INTERVAL_NS
        self._started = self._closing = self._one_by_one = self._has_made_room = False
        self._busy_since_ns: int | None = None
        self._is_stalled = False
        self._rows = (0, 0)
        self._losses: list[LostRange] = []
        self._events: list[SpoolEvent] = []
        self._event_ns: dict[str, int] = {}
        self.last_numbers: Mapping[str, int] = {}
        self.spent: Mapping[str, int] = {}
        self._open()

    def __repr__(self) -> str:
        with self._changed:
            return f"<Spool {'memory' if self._reason else 'disk'} rows={self._rows} {self._queue!r}>"

    def start(self) -> None:
        """Start the thread that writes; once."""
        self._started = True
        self._thread_group.start("spool", self._run, vital=True, may_return=True)

    # --- for the hub client ---------------------------------------------------------------------------------

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when `peek` may have a new message: by the thread `spool`, outside of locks."""
        self._wake_client = wake

    def put(self, message: Message, reports: tuple[LostRange, ...] = ()) -> QueuedMessage:
        """Append a message; the result says when it is secured (`QueuedMessage.is_secured`).

        `reports`: the losses that it reports; they are removed when the hub has it.
        """
        with self._changed:
            entry = self._queue.put(message, reports)
            self._changed.notify_all()
            if not self._is_stalled:
                return entry
            self._queue.bypass_disk(overtake=True)
        self._wake_client()
        return entry

    def peek(self) -> Message | None:
        """The message to send next: the oldest one on disk, or in memory without a disk.

        It stays in the queue until `settle`.
        """
        with self._changed:
            message = self._queue.peek()
            if self._queue.needs_refill:
                self._changed.notify_all()
            return message

    def settle(self, message: Message, *, dropped: MessageDropReason | None = None) -> None:
        """Remove the first message: the hub has acknowledged it, or it is dropped for a reason."""
        with self._changed:
            self._queue.settle(message, dropped)
            self._changed.notify_all()

    def __len__(self) -> int:
        """The number of messages that wait, on disk and in memory."""
        with self._changed:
            return self._waiting()

    @property
    def bytes(self) -> int:
        """The bytes of all messages that wait."""
        with self._changed:
            return self._waiting_bytes()

    @property
    def dropped(self) -> Mapping[str, int]:
        """The number of messages that the hub will never get, by reason."""
        with self._changed:
            return MappingProxyType(dict(self._queue.dropped))

    @property
    def unwritten(self) -> int:
        """The number of messages that are not on disk."""
        with self._changed:
            return self._queue.unwritten

    # --- for the delivery -----------------------------------------------------------------------------------

    def set_spent_source(self, spent: Callable[[], Mapping[str, int]]) -> None:
        """Store the result of `spent` with the messages; it is called from the thread `spool`."""
        self._spent = spent

    def set_limits(self, limits: SpoolLimits) -> None:
        """Change the limits; messages that exceed them are dropped at the next write."""
        with self._changed:
            self._settings, self._expiry_due_ns = replace(self._settings, limits=limits), self._clock()
            self._changed.notify_all()

    def status(self) -> SpoolStatus:
        """The current state."""
        with self._changed:
            stalled_s = self._busy_s() if self._is_stalled else 0.0
            reason = _stall_reason(stalled_s) if self._is_stalled else self._reason
            return SpoolStatus(
                mode="memory" if reason else "disk",
                reason=reason,
                waiting=self._waiting(),
                waiting_bytes=self._waiting_bytes(),
                dropped=MappingProxyType(dict(self._queue.dropped)),
                stalled_seconds=round(stalled_s, 1),
                newer=self._newer,
            )

    def take_events(self) -> list[SpoolEvent]:
        """The events since the last call; to be called often, because it also detects a disk that hangs."""
        self._check_stall()
        with self._changed:
            events, self._events = self._events, []
            return events

    def take_lost_ranges(self) -> list[LostRange]:
        """The losses that no message reports yet. Pass them to `put` with the message that reports them."""
        with self._changed:
            if self._reason is not None:
                return self._queue.take_lost_ranges()
            losses_being_reported = self._queue.losses_being_reported
            return [loss for loss in self._losses if loss.key not in losses_being_reported]

    def close(self, deadline_s: float) -> bool:
        """Write all messages and close the file; False if the disk was too slow for the deadline. Blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self._started:
            self._close_store()
            return True
        return self._finished.wait(deadline_s)

    def _check_stall(self) -> None:
        """After 10 s in which the disk did not answer, report it, and let messages pass it."""
        with self._changed:
            stalled_s = self._busy_s()
            if self._is_stalled or stalled_s * _NS < _STALL_NS:
                return
            self._is_stalled = True
            self._queue.bypass_disk(overtake=True)
        self._report(
            "storage-stalled",
            f"{self._settings.path}: {_stall_reason(stalled_s)}; messages are sent from memory, and a restart"
            " loses them; check the disk and its driver",
        )
        self._wake_client()

    # --- on the thread `spool` ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                self._write_and_refill()
                self._wake_client()
            while self._write_and_refill():
                pass
        finally:
            self._close_store()
            self._finished.set()

    def _await_work(self) -> bool:
        """Wait until there is work; False when closing."""
        with self._changed:
            while not self._closing:
                now_ns = self._clock()
                due_ns = self._due_ns(now_ns)
                if due_ns <= now_ns:
                    return True
                self._changed.wait((due_ns - now_ns) / _NS)
            return False

    def _due_ns(self, now_ns: int) -> int:
        """The time of the next round if nothing changes before."""
        if self._queue.needs_refill:
            return now_ns
        if self._reason is not None:
            return now_ns if self._queue.has_fresh and not self._queue.has_more_on_disk else self._retry_ns
        if self._queue.has_fresh:
            return now_ns
        if not self._queue.has_deferred_changes:
            return self._expiry_due_ns
        # Settled messages are collected for 0.2 s: fewer writes wear out a flash disk less.
        self._flush_due_ns = self._flush_due_ns or now_ns + _FLUSH_DELAY_NS
        return self._flush_due_ns

    def _write_and_refill(self) -> bool:
        """Write waiting changes, load the next messages for the hub; returns whether to continue at once."""
        with self._changed:
            self._busy_since_ns = self._clock()
        try:
            return self._do_round()
        finally:
            self._finish_round()

    def _finish_round(self) -> None:
        with self._changed:
            took_s, was_stalled = self._busy_s(), self._is_stalled
            self._busy_since_ns, self._is_stalled = None, False
            if was_stalled and self._reason is None:  # write those that the hub does not have yet
                self._queue.requeue_unsaved()
        if was_stalled:
            self._report(
                "storage-back", f"{self._settings.path}: the disk answers again, after {took_s:.0f} s"
            )

    def _do_round(self) -> bool:
        self._flush_due_ns, self._has_made_room = 0, False
        self._expiry_due_ns = self._clock() + _EXPIRY_INTERVAL_NS
        if self._reason is None or self._closing or self._clock() >= self._retry_ns:
            while self._write():
                pass
        self._refill()
        with self._changed:
            if self._reason is not None:
                self._queue.bypass_disk()
        return self._reason is None and self._queue.has_fresh

    def _write(self) -> bool:
        """Write one transaction; returns whether another must follow because the file exceeds its limit."""
        if self._store is None:
            self._open()
        if (store := self._store) is None:
            return False
        with self._changed:
            if self._reason is not None:
                self._queue.requeue_unsaved()
            max_messages = (1,) if self._one_by_one else ()
            transaction = self._queue.take_transaction(self._running_s(), self._spent(), *max_messages)
        store.limits = self._settings.limits
        try:
            evicted = store.select_evictions(transaction)
            with self._changed:
                evicted = self._queue.withdraw(evicted)
            keys = store.write(replace(transaction, evicted=evicted))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            has_room = is_full(error) and self._make_room(store, transaction)
            with self._changed:
                self._queue.mark_failed()
            if has_room:
                return True
            if is_corrupt(error):
                self._replace(store, str(error))
            else:
                self._set_mode(str(error))
            return False
        except Exception as error:  # noqa: BLE001 - raised again unless one message causes it
            self._isolate_unwritable(error)
            return True
        with self._changed:
            self._one_by_one = self._one_by_one and self._queue.has_fresh
            self._queue.mark_written(keys, evicted, store.lost_ranges)
            self._rows = (store.count, store.bytes)
            self._losses = store.lost_ranges
        self._set_mode(None)
        self._reserve.hold()
        return store.is_over_limit and bool(evicted or keys)

    def _make_room(self, store: MessageStore, transaction: Transaction) -> bool:
        """The disk is full: delete the settled messages in the space of the reserve, and empty the log.

        New messages then take the place of the deleted ones, and the file need not grow. Returns whether to
        write again; once in a round.
        """
        if self._has_made_room:
            return False
        self._has_made_room = True
        released = self._reserve.release()
        try:
            store.shrink_log()
            for part in self._queue.split_deletions(transaction):
                store.write(part)
                with self._changed:
                    self._queue.mark_deleted(part)
                    self._rows, self._losses = (store.count, store.bytes), store.lost_ranges
                store.shrink_log()
        except sqlite3.Error as error:
            log.debug("spool: no room can be made: %s", error)
            return False
        finally:
            if released:
                self._reserve.hold(again=True)
        return True

    def _isolate_unwritable(self, error: Exception) -> None:
        """A value cannot be written: write the messages one by one, and drop the one that fails.

        Raises:
            Exception: no message causes the error. The thread ends, so the module ends and is started again.
        """
        with self._changed:
            if not self._one_by_one:
                self._one_by_one = True
                self._queue.mark_failed()
                return
            message_id = self._queue.drop_unwritable()
        if message_id is None:
            raise error
        log.warning("spool: message %s cannot be stored and is dropped: %s", message_id, redact(str(error)))

    def _refill(self) -> None:
        with self._changed:
            if not self._queue.needs_refill or self._store is None:
                return
            after, load_limits, store = self._queue.last_loaded_key, self._queue.load_limits, self._store
        try:
            rows = store.load(after, *load_limits)
        except (sqlite3.Error, ValueError) as error:
            # Unlike a failed write, this cannot be solved by waiting.
            self._replace(store, f"reading failed: {error}")
            return
        if invalid := [row for _, row in rows if isinstance(row, MessageRow)]:
            log.warning("spool: %d messages on disk cannot be read and are dropped", len(invalid))
        with self._changed:
            self._queue.add_loaded(rows)

    def _open(self) -> None:
        """Open the file, or a new one if it is not usable; without any, continue in memory."""
        opened = _open_store(self._settings, self._queue.committed)
        self._path = opened.path or self._path
        if opened.newer is not None and self._newer is None:
            self._report("spool-newer", opened.newer)
        self._newer = opened.newer
        if opened.set_aside_reason is not None:
            self._report_lost(opened.set_aside_reason, opened.last_known_numbers or {})
        store = self._store = opened.store
        if store is None:
            self._set_mode(opened.reason)
            return
        self._running_before_s, self._opened_ns = store.running_s, self._clock()
        self.last_numbers, self.spent = MappingProxyType(store.last_numbers), MappingProxyType(store.spent)
        with self._changed:
            self._queue.opened(store.last_numbers, store.first_numbers)
            self._rows, self._losses = (store.count, store.bytes), store.lost_ranges
            self._queue.requeue_unsaved()

    def _replace(self, store: MessageStore, why: str) -> None:
        """Set aside a damaged file and begin a new one."""
        store.close()
        self._store = None
        with self._changed:
            self._queue.forget_file()
            self._rows = (0, 0)
        try:
            set_aside(self._path, _COMPANIONS)
        except OSError as error:
            self._set_mode(f"{why}; renaming the file failed: {error.strerror or error}")
            return
        self._report_lost(why, self._queue.committed)
        self._open()

    def _report_lost(self, why: str, last_known_numbers: Mapping[str, int]) -> None:
        why = " ".join(why.split())[:_MAX_REASON_CHARACTERS]  # it may quote a damaged schema
        text = (
            f"{self._path.name} cannot be used: {why}; it was renamed to"
            f" {self._path.name}.aside, and the messages in it are not sent"
        )
        self._report("spool-lost", text, {"upTo": dict(last_known_numbers)} if last_known_numbers else {})

    def _set_mode(self, reason: str | None) -> None:
        """Continue in memory for a reason, or on disk for None."""
        with self._changed:
            before, self._reason = self._reason, reason
            self._retry_ns = self._clock() + round(self._options.retry_s * _NS)
        if before is None and reason is not None:
            self._report(
                "spool-memory",
                f"{self._path} cannot be written: {reason}; messages wait in memory, and a restart"
                f" loses them; retrying every {self._options.retry_s:g} s; check that VISIONEDGE_DATA is"
                " writable and has free space",
            )
        elif before is not None and reason is None:
            self._report("spool-disk", f"{self._path} is writable again; messages wait on disk")

    def _report(
        self, code: SpoolEventCode, text: str, details: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        good = code in {"spool-disk", "storage-back"}
        log.log(logging.INFO if good else logging.WARNING, "%s", redact(text))
        with self._changed:
            now_ns = self._clock()
            # At most one event of a code in five minutes: a disk can become full and free again all the time.
            if now_ns - self._event_ns.get(code, now_ns - _EVENT_INTERVAL_NS) >= _EVENT_INTERVAL_NS:
                self._event_ns[code] = now_ns
                self._events.append(SpoolEvent(code, redact(text), details))

    def _close_store(self) -> None:
        if self._store is not None:
            try:
                self._store.close()
            except sqlite3.Error as error:
                log.debug("spool: closing the file failed: %s", error)
        with self._changed:
            waiting, lost = self._waiting(), self._queue.unwritten
        if lost:
            self._queue.dropped["closed"] += lost
            log.warning("spool: closed with %d messages that are not on disk; they are lost", lost)
        if waiting > lost:
            log.info("spool: %d messages wait on disk for the next start", waiting - lost)

    # --- under the lock -------------------------------------------------------------------------------------

    def _running_s(self) -> float:
        """How long the module has run with this file, all starts together."""
        return self._running_before_s + (self._clock() - self._opened_ns) / _NS

    def _busy_s(self) -> float:
        """For how long the present round of the disk has taken; 0 without one."""
        return 0.0 if self._busy_since_ns is None else (self._clock() - self._busy_since_ns) / _NS

    def _waiting(self) -> int:
        return self._rows[0] - self._queue.pending_rows + self._queue.unwritten

    def _waiting_bytes(self) -> int:
        return self._rows[1] - self._queue.pending_bytes + self._queue.unwritten_bytes


@dataclass(frozen=True, slots=True)
class _StoreOpenResult:
    """A store, or the `reason` why there is none.

    If the old file was set aside, `set_aside_reason` says why, and `last_known_numbers` are the last sequence
    numbers that could be read in it. `path`: the file of the store. `newer`: as in `SpoolStatus`.
    """

    store: MessageStore | None
    reason: str | None = None
    set_aside_reason: str | None = None
    last_known_numbers: Mapping[str, int] | None = None
    path: Path | None = None
    newer: str | None = None


def _stall_reason(stalled_s: float) -> str:
    return f"the disk has not answered for {stalled_s:.0f} s"


def _open_store(settings: SpoolSettings, last_numbers: Mapping[str, int]) -> _StoreOpenResult:
    """Open the file of this version, and move messages of older versions beside it into it. Blocks."""
    try:
        opened = _open_file(settings, last_numbers)
    except NewerFileError as error:
        opened = _open_beside(settings, last_numbers, error)
    if opened.store is not None:
        _absorb_others(settings, opened.store, opened.path or settings.path)
    return opened


def _open_beside(
    settings: SpoolSettings, last_numbers: Mapping[str, int], newer: NewerFileError
) -> _StoreOpenResult:
    """Use another file, whose sequence numbers go on above those of the newer one, which stays as it is."""
    path = path_of_version(settings.path, sqlite_store.FORMAT.version)
    numbers = {**newer.last_numbers}
    others = [path_of_version(settings.path, version) for version in list_versions(settings.path)]
    known = [recover_last_numbers(other, settings.connect) for other in others if other != path]
    for output, last in chain.from_iterable(each.items() for each in (*known, last_numbers)):
        numbers[output] = max(last, numbers.get(output, 0))
    try:
        opened = _open_file(replace(settings, path=path), numbers)
    except NewerFileError as error:
        opened = _StoreOpenResult(None, str(error))
    if opened.store is not None:
        with contextlib.suppress(sqlite3.Error):  # the next write meets the same error
            opened.store.raise_numbers(numbers)
    text = (
        f"{settings.path.name} was written by a newer version of visionedge ({newer}): it stays as it is, and"
        f" messages wait in {path.name}; install the newer version again to send the messages in both"
    )
    return replace(opened, path=path, newer=text)


def _absorb_others(settings: SpoolSettings, store: MessageStore, used: Path) -> None:
    """Move the messages that older versions left beside the file into it; continue above their numbers."""
    for version in list_versions(settings.path):
        path = path_of_version(settings.path, version)
        if version > sqlite_store.FORMAT.version or path == used:
            continue
        try:
            store.raise_numbers(recover_last_numbers(path, settings.connect))
            # Opened first, which checks it and brings it to the format of this version.
            MessageStore(path, settings.owner, settings.limits, settings.connect).close()
            store.absorb(path)
            for end in ("", *_COMPANIONS):
                path.with_name(path.name + end).unlink(missing_ok=True)
        except (sqlite3.Error, ForeignFileError, NewerFileError, OSError) as error:
            log.warning(
                "%s: its messages cannot be moved to %s: %s; the next start retries", path, used.name, error
            )


def _open_file(settings: SpoolSettings, last_numbers: Mapping[str, int]) -> _StoreOpenResult:
    """Open a file. An unusable file is set aside, and a new one begins with `last_numbers`.

    Raises:
        NewerFileError: the file belongs to a newer version of visionedge.
    """
    path = settings.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if any(is_special_file(path.with_name(path.name + end)) for end in ("", *_COMPANIONS)):
            return _start_new_file(settings, last_numbers, "not a regular file")
        return _StoreOpenResult(_make_store(settings, last_numbers))
    except ForeignFileError as error:
        return _start_new_file(settings, last_numbers, str(error))
    except sqlite3.Error as error:
        if not is_corrupt(error):
            return _StoreOpenResult(None, str(error))
        known = {**last_numbers, **recover_last_numbers(path, settings.connect)}
        return _start_new_file(settings, known, str(error))
    except OSError as error:
        return _StoreOpenResult(None, error.strerror or str(error))


def _make_store(settings: SpoolSettings, last_numbers: Mapping[str, int]) -> MessageStore:
    return MessageStore(settings.path, settings.owner, settings.limits, settings.connect, last_numbers)


def _start_new_file(settings: SpoolSettings, last_numbers: Mapping[str, int], why: str) -> _StoreOpenResult:
    try:
        set_aside(settings.path, _COMPANIONS)
        return _StoreOpenResult(
            _make_store(settings, last_numbers), set_aside_reason=why, last_known_numbers=last_numbers
        )
    except (sqlite3.Error, ForeignFileError) as error:
        return _StoreOpenResult(None, f"{error}; the old file was set aside: {why}", why, last_numbers)
    except OSError as error:
        return _StoreOpenResult(None, f"{why}; renaming the file failed: {error.strerror or error}")
