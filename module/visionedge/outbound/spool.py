"""The spool: every message on disk until its PUBACK, over outages, kills and restarts.

`put`, `first` and `settle` only change the shelves, under one lock; a thread of its own, `spool`, does what
touches the disk, many messages in one transaction. When the disk does not take them it goes on in memory,
says so, and tries the disk again.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from visionedge.outbound.messages import Message
from visionedge.outbound.queue_state import Shelves
from visionedge.outbound.sqlite_store import (
    Bounds,
    Connect,
    ForeignFileError,
    Loss,
    Reason,
    Row,
    Store,
    broken,
    salvage_numbers,
)
from visionedge.runtime.files import is_odd, set_aside
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import Crew

# Which file the spool works with: the old one if it is sound and ours, else a new one, else none.


log = logging.getLogger(__name__)

_COMPANIONS = ("-wal", "-shm", "-journal")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the file is, whose messages it holds, and its bounds."""

    path: Path
    owner: str
    bounds: Bounds
    connect: Connect | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What came of opening: a store, or why there is none.

    `aside` says why an old file was put aside; `upto` are then the last numbers that could be read in it.
    """

    store: Store | None
    reason: str | None = None
    aside: str | None = None
    upto: Mapping[str, int] | None = None


def open_store(place: Place, numbers: Mapping[str, int]) -> Opened:
    """Open the file; one that is of no use is put aside and a new one begun, with `numbers`. Blocks."""
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        if any(is_odd(place.path.with_name(place.path.name + end)) for end in ("", *_COMPANIONS)):
            return _begin_anew(place, numbers, "it is no regular file")
        return Opened(_store(place, numbers))
    except ForeignFileError as error:
        return _begin_anew(place, numbers, str(error))
    except sqlite3.Error as error:
        if not broken(error):
            return Opened(None, str(error))
        known = {**numbers, **salvage_numbers(place.path, place.connect)}
        return _begin_anew(place, known, str(error))
    except OSError as error:
        return Opened(None, error.strerror or str(error))


def put_aside(path: Path) -> None:
    """Rename a file, its log included; the last few that were put aside are kept.

    Raises:
        OSError: it stays where it is.
    """
    set_aside(path, _COMPANIONS)


def _store(place: Place, numbers: Mapping[str, int]) -> Store:
    return Store(place.path, place.owner, place.bounds, place.connect, numbers)


def _begin_anew(place: Place, numbers: Mapping[str, int], why: str) -> Opened:
    try:
        put_aside(place.path)
        return Opened(_store(place, numbers), aside=why, upto=numbers)
    except (sqlite3.Error, ForeignFileError) as error:
        return Opened(None, f"{error}; and it was set aside: {why}", why, numbers)
    except OSError as error:
        return Opened(None, f"{why}; it cannot be moved: {error.strerror or error}")


FILE_NAME = "spool.db"

_LONGEST_REASON = 200
_NS = 1_000_000_000
_TRACES_NS = 200_000_000
_REPEAT_NS = 300 * _NS
_AGES_NS = 60 * _NS


@dataclass(frozen=True, slots=True)
class Tempo:
    """How much may wait in memory, and how often a disk that failed is tried again."""

    memory_bytes: int = 32_000_000
    retry_s: float = 10.0


Code = Literal["spool-memory", "spool-disk", "spool-lost"]


@dataclass(frozen=True, slots=True)
class News:
    """For the cloud: an event's code, text and details; `upTo` has the last numbers that a lost file knew."""

    code: Code
    text: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """Where messages wait: `mode` is `disk`, or `memory` for the `reason`; counts are of messages."""

    mode: Literal["disk", "memory"]
    reason: str | None
    waiting: int
    waiting_bytes: int
    dropped: Mapping[str, int]


class Spool:
    """A durable `backlog.Waiting`. All methods but `start` and `close` return at once, from any thread.

    The constructor opens the file and may block for some seconds; it raises nothing: without a usable file
    the spool begins in memory. For who counts on: `numbers` are the last of each output, `spent` what
    was spent of the budget, in blocks of telemetry by UTC day.
    """

    def __init__(
        self,
        path: Path,
        owner: str,
        crew: Crew,
        *,
        bounds: Bounds | None = None,
        tempo: Tempo | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        connect: Connect | None = None,
    ) -> None:
        self._place = Place(path, owner, bounds or Bounds(), connect)
        self._crew = crew
        self._tempo = tempo or Tempo()
        self._clock = clock
        self._spent: Callable[[], Mapping[str, int]] = lambda: self.spent
        self._wake_client: Callable[[], None] = lambda: None
        self._store: Store | None = None
        self._lived_before_s = 0.0
        self._opened_ns = clock()
        self._finished = threading.Event()
        # Guards all below; held for assignments only.
        self._changed = threading.Condition()
        self._shelves = Shelves(self._tempo.memory_bytes)
        self._reason: str | None = None
        self._retry_ns = 0
        self._traces_ns = 0
        self._ages_ns = clock() + _AGES_NS
        self._started = self._closing = self._one_by_one = False
        self._rows = (0, 0)
        self._losses: list[Loss] = []
        self._news: list[News] = []
        self._news_ns: dict[str, int] = {}
        self.numbers: Mapping[str, int] = {}
        self.spent: Mapping[str, int] = {}
        self._open()

    def __repr__(self) -> str:
        with self._changed:
            return f"<Spool {'memory' if self._reason else 'disk'} rows={self._rows} {self._shelves!r}>"

    def start(self) -> None:
        """Begin to write; once."""
        self._started = True
        self._crew.start("spool", self._run, vital=True, may_return=True)

    # --- for the hub client (`backlog.Waiting`) -------------------------------------------------------------

    def attach(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the thread `spool` when there may be something for the hub."""
        self._wake_client = wake

    def follow_spent(self, spent: Callable[[], Mapping[str, int]]) -> None:
        """Keep on disk what `spent` gives, with the messages; it is called from the thread `spool`."""
        self._spent = spent

    def put(self, message: Message, tells: tuple[Loss, ...] = ()) -> None:
        """Take a message; the losses that it tells are forgotten once the hub has it."""
        with self._changed:
            self._shelves.put(message, tells)
            self._changed.notify_all()

    def first(self) -> Message | None:
        """The oldest message that is on disk (or, without a disk, in memory)."""
        with self._changed:
            message = self._shelves.first()
            if self._shelves.wants_more:
                self._changed.notify_all()
            return message

    def settle(self, message: Message, *, dropped: str | None = None) -> None:
        """The hub has acknowledged it, or it can never be sent."""
        with self._changed:
            self._shelves.settle(message, cast("Reason | None", dropped))
            self._changed.notify_all()

    def abandon(self) -> int:
        """Nothing is lost yet: what waits is on disk, or will be written by `close`."""
        return 0

    def __len__(self) -> int:
        with self._changed:
            return self._waiting()

    @property
    def bytes(self) -> int:
        """The bytes of all that waits."""
        with self._changed:
            return self._waiting_bytes()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Messages that the hub will never get, by reason."""
        with self._changed:
            return MappingProxyType(dict(self._shelves.dropped))

    @property
    def unwritten(self) -> int:
        """How many messages are not on disk yet, or cannot be."""
        with self._changed:
            return self._shelves.unwritten

    # --- for the delivery -----------------------------------------------------------------------------------

    def bound(self, bounds: Bounds) -> None:
        """Hold so much from now on; what is too much goes in the next round."""
        with self._changed:
            self._place, self._ages_ns = replace(self._place, bounds=bounds), self._clock()
            self._changed.notify_all()

    def status(self) -> SpoolStatus:
        """Where messages wait right now."""
        with self._changed:
            return SpoolStatus(
                mode="memory" if self._reason else "disk",
                reason=self._reason,
                waiting=self._waiting(),
                waiting_bytes=self._waiting_bytes(),
                dropped=MappingProxyType(dict(self._shelves.dropped)),
            )

    def take_news(self) -> list[News]:
        """What happened to the disk since the last call."""
        with self._changed:
            news, self._news = self._news, []
            return news

    def take_losses(self) -> list[Loss]:
        """The ranges that no message tells of yet; to be handed back with the one that does."""
        with self._changed:
            if self._reason is not None:
                return self._shelves.take_losses()
            telling = self._shelves.telling
            return [loss for loss in self._losses if loss.key not in telling]

    def close(self, deadline_s: float) -> bool:
        """Write what waits and close the file; False when the disk did not take it in time. Blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self._started:
            self._shut()
            return True
        return self._finished.wait(deadline_s)

    # --- on the thread `spool` ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                self._round()
                self._wake_client()
            while self._round():
                pass
        finally:
            self._shut()
            self._finished.set()

    def _await_work(self) -> bool:
        """Wait until there is something to do; False when closing."""
        with self._changed:
            while not self._closing:
                now_ns = self._clock()
                due_ns = self._due_ns(now_ns)
                if due_ns <= now_ns:
                    return True
                self._changed.wait((due_ns - now_ns) / _NS)
            return False

    def _due_ns(self, now_ns: int) -> int:
        """When the next round is due, if nothing else happens until then."""
        if self._shelves.wants_more:
            return now_ns
        if self._reason is not None:
            return now_ns if self._shelves.has_fresh and not self._shelves.behind else self._retry_ns
        if self._shelves.has_fresh:
            return now_ns
        if not self._shelves.has_traces:
            return self._ages_ns
        # What was settled gathers for a moment: the less is written, the longer a flash disk lives.
        self._traces_ns = self._traces_ns or now_ns + _TRACES_NS
        return self._traces_ns

    def _round(self) -> bool:
        """To the disk what is to go there, from it what the hub needs next; whether to go on at once."""
        self._traces_ns = 0
        self._ages_ns = self._clock() + _AGES_NS
        if self._reason is None or self._closing or self._clock() >= self._retry_ns:
            while self._write():
                pass
        self._refill()
        with self._changed:
            if self._reason is not None:
                self._shelves.spill()
        return self._reason is None and self._shelves.has_fresh

    def _write(self) -> bool:
        """One transaction; whether another is due, as what was written is too much and may have to go."""
        if self._store is None:
            self._open()
        if (store := self._store) is None:
            return False
        with self._changed:
            if self._reason is not None:
                self._shelves.reclaim()
            most = (1,) if self._one_by_one else ()
            work = self._shelves.take_work(self._lived_s(), self._spent(), *most)
        store.bounds = self._place.bounds
        try:
            going = store.excess(work)
            with self._changed:
                going = self._shelves.withdraw(going)
            keys = store.write(replace(work, evicted=going))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            with self._changed:
                self._shelves.failed()
            if broken(error):
                self._replace(store, str(error))
            else:
                self._turn(str(error))
            return False
        except Exception as error:  # noqa: BLE001 - raised again where no message is to blame
            self._sort_out(error)
            return True
        with self._changed:
            self._one_by_one = self._one_by_one and self._shelves.has_fresh
            self._shelves.written(keys, going, store.losses)
            self._rows = (store.count, store.bytes)
            self._losses = store.losses
        self._turn(None)
        return store.over and bool(going or keys)

    def _sort_out(self, error: Exception) -> None:
        """A value cannot be written: find the message that has it, one by one, and let that one go.

        Raises:
            Exception: it was no message; the thread ends, and the module with it, to be started again.
        """
        with self._changed:
            if not self._one_by_one:
                self._one_by_one = True
                self._shelves.failed()
                return
            message_id = self._shelves.rejected()
        if message_id is None:
            raise error
        log.warning("message %s cannot be kept on disk and is dropped: %s", message_id, redact(str(error)))

    def _refill(self) -> None:
        with self._changed:
            if not self._shelves.wants_more or self._store is None:
                return
            after, room, store = self._shelves.loaded_to, self._shelves.room, self._store
        try:
            rows = store.load(after, *room)
        except (sqlite3.Error, ValueError) as error:
            # A file that cannot even be read is worth nothing.
            self._replace(store, f"it cannot be read: {error}")
            return
        if odd := [row for _, row in rows if isinstance(row, Row)]:
            log.warning("%d messages on disk cannot be read and are dropped", len(odd))
        with self._changed:
            self._shelves.loaded(rows)

    def _open(self) -> None:
        """Open the file, a new one if the old one is of no use; without any, go on in memory."""
        opened = open_store(self._place, self._shelves.committed)
        if opened.aside is not None:
            self._tell_lost(opened.aside, opened.upto or {})
        store = self._store = opened.store
        if store is None:
            self._turn(opened.reason)
            return
        self._lived_before_s, self._opened_ns = store.lived_s, self._clock()
        self.numbers, self.spent = MappingProxyType(store.numbers), MappingProxyType(store.spent)
        with self._changed:
            self._shelves.opened(store.numbers, store.first_numbers)
            self._rows, self._losses = (store.count, store.bytes), store.losses
            self._shelves.reclaim()

    def _replace(self, store: Store, why: str) -> None:
        """Put a file that turned out to be of no use aside and begin a new one."""
        store.close()
        self._store = None
        with self._changed:
            self._shelves.forget()
            self._rows = (0, 0)
        try:
            put_aside(self._place.path)
        except OSError as error:
            self._turn(f"{why}; it cannot be moved: {error.strerror or error}")
            return
        self._tell_lost(why, self._shelves.committed)
        self._open()

    def _tell_lost(self, why: str, upto: Mapping[str, int]) -> None:
        why = " ".join(why.split())[:_LONGEST_REASON]  # it may quote a damaged schema
        text = (
            f"{self._place.path.name} is of no use ({why}): it was set aside, what waited in it is not sent"
        )
        self._tell("spool-lost", text, {"upTo": dict(upto)} if upto else {})

    def _turn(self, reason: str | None) -> None:
        """Go on in memory for a reason, or on disk."""
        with self._changed:
            before, self._reason = self._reason, reason
            self._retry_ns = self._clock() + round(self._tempo.retry_s * _NS)
        if before is None and reason is not None:
            self._tell(
                "spool-memory",
                f"{self._place.path} cannot be written ({reason}): messages wait in memory and are lost at a"
                " restart; see that VISIONEDGE_DATA is writable and has room",
            )
        elif before is not None and reason is None:
            self._tell("spool-disk", "messages wait on disk again")

    def _tell(self, code: Code, text: str, details: Mapping[str, Any] = MappingProxyType({})) -> None:
        log.log(logging.INFO if code == "spool-disk" else logging.WARNING, "%s", redact(text))
        with self._changed:
            now_ns = self._clock()
            # A disk that is full now and then must not become a stream of events.
            if now_ns - self._news_ns.get(code, now_ns - _REPEAT_NS) >= _REPEAT_NS:
                self._news_ns[code] = now_ns
                self._news.append(News(code, redact(text), details))

    def _shut(self) -> None:
        if self._store is not None:
            try:
                self._store.close()
            except sqlite3.Error as error:
                log.debug("the spool did not close well: %s", error)
        with self._changed:
            waiting, lost = self._waiting(), self._shelves.unwritten
        if lost:
            self._shelves.dropped["closed"] += lost
            log.warning("closed with %d messages that are not on disk; they are lost", lost)
        if waiting > lost:
            log.info("%d messages wait on disk for the next start", waiting - lost)

    # --- under the lock -------------------------------------------------------------------------------------

    def _lived_s(self) -> float:
        """How long the module has run with this file, all its starts together."""
        return self._lived_before_s + (self._clock() - self._opened_ns) / _NS

    def _waiting(self) -> int:
        return self._rows[0] - self._shelves.pending_rows + self._shelves.unwritten

    def _waiting_bytes(self) -> int:
        return self._rows[1] - self._shelves.pending_bytes + self._shelves.unwritten_bytes
