"""Where each message of the spool is: fresh, being written, or in the window that the hub is served from.

    put ──▶ fresh ──▶ writing ──▶ (the file) ──▶ window ──▶ the hub
                 └──── without a file ──────────┘

Pure: no lock, no disk, no clock. A message reaches the window only when it is in the file (or when there is
none), so no number is ever sent that a restart could give to another message.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from visionedge.outbound.messages import EVENTS, Message
from visionedge.outbound.sqlite_store import Loss, Reason, Row, Work

# What goes into one transaction at most, so that none takes long.
_WORK_MESSAGES = 500
_WORK_BYTES = 4_000_000


@dataclass(slots=True)
class Entry:
    """A message; `key` is its row in the file, None while it has none."""

    message: Message
    key: int | None = None
    settled: bool = False


class Shelves:
    """The state of the spool, changed by whoever holds the spool's lock."""

    def __init__(self, memory_bytes: int, window: int = 512, window_bytes: int = 4_000_000) -> None:
        self._memory_bytes = memory_bytes
        self._window_limit = window
        self._window_bytes = window_bytes
        self._fresh: deque[Entry] = deque()
        self._writing: list[Entry] = []
        self._window: deque[Entry] = deque()
        self._handed: Entry | None = None
        self._work = Work()
        self._window_used = 0
        self._unwritten = 0
        self._settled: list[tuple[int, int]] = []
        self._losses: list[Loss] = []
        self._told: list[Loss] = []
        self._telling: dict[tuple[str, int], tuple[Loss, ...]] = {}
        self._withdrawn: list[Entry] = []
        self._spilled: dict[str, int] = {}
        self.dropped: Counter[str] = Counter()
        # Rows of the file above `loaded_to` are not in the window; `behind` = there may be such.
        self.loaded_to = 0
        self.behind = False
        self.committed: dict[str, int] = {}
        self._reached: dict[str, int] = {}

    def __repr__(self) -> str:
        return (
            f"<Shelves fresh={len(self._fresh)} writing={len(self._writing)} window={len(self._window)}"
            f" settled={len(self._settled)} behind={self.behind}>"
        )

    # --- the hub's side -------------------------------------------------------------------------------------

    def put(self, message: Message, tells: tuple[Loss, ...] = ()) -> None:
        """Take a message; what does not fit into memory is dropped, the oldest telemetry first."""
        self._fresh.append(Entry(message))
        if tells:
            self._telling[message.output, message.number] = tells
        self._unwritten += message.size_bytes
        while self._unwritten > self._memory_bytes and self._drop_least():
            pass

    def first(self) -> Message | None:
        """What the hub gets next."""
        self._handed = self._window[0] if self._window else None
        return self._handed.message if self._handed else None

    def settle(self, message: Message, dropped: Reason | None) -> None:
        """The hub has it, or never will."""
        if not self._window or self._window[0].message is not message:
            return
        entry = self._window.popleft()
        entry.settled = True
        self._handed = None
        self._window_used -= message.size_bytes
        if entry.key is None:
            self._unwritten -= message.size_bytes
        else:
            self._settled.append((entry.key, message.size_bytes))
        if dropped is not None:
            self._lose(message.output, message.number, dropped)
        else:
            self._told += self._telling.pop((message.output, message.number), ())

    # --- the disk's side ------------------------------------------------------------------------------------

    @property
    def unwritten(self) -> int:
        """How many messages are in no file."""
        bare = sum(entry.key is None for entry in self._window)
        return bare + sum(not self._sending(entry) for entry in (*self._writing, *self._fresh))

    @property
    def unwritten_bytes(self) -> int:
        """What these take of the memory."""
        return self._unwritten

    @property
    def pending_rows(self) -> int:
        """Rows that the hub has and the file does not yet know of."""
        return len(self._settled) + len(self._work.settled)

    @property
    def pending_bytes(self) -> int:
        """The bytes of these rows."""
        return sum(size for _, size in (*self._settled, *self._work.settled))

    @property
    def has_fresh(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._fresh)

    @property
    def has_traces(self) -> bool:
        """Whether something less urgent waits to be written: what was settled, lost or told."""
        return bool(self._settled or self._losses or self._told or self._spilled)

    @property
    def wants_more(self) -> bool:
        """Whether the window runs low while the file has more."""
        low = len(self._window) * 2 < self._window_limit and self._window_used * 2 < self._window_bytes
        return self.behind and low

    @property
    def room(self) -> tuple[int, int]:
        """How many messages and bytes the window takes at a time."""
        return self._window_limit, self._window_bytes

    def take_work(self, lived_s: float, spent: Mapping[str, int], most: int = _WORK_MESSAGES) -> Work:
        """What to write now; it stays on the shelf `writing` until `written`, `failed` or `rejected`."""
        left_bytes = _WORK_BYTES
        while self._fresh and len(self._writing) < most and left_bytes > 0:
            entry = self._fresh.popleft()
            if not entry.settled:
                left_bytes -= entry.message.size_bytes
                self._writing.append(entry)
        self._work = Work(
            append=[entry.message for entry in self._writing],
            settled=self._settled,
            losses=self._losses,
            told=self._told,
            numbers=self._spilled,
            lived_s=lived_s,
            spent=spent,
            promised=[loss for entry in self._writing for loss in self._tells(entry) if not loss.key],
        )
        self._settled, self._losses, self._told, self._spilled = [], [], [], {}
        return self._work

    def withdraw(self, going: Iterable[tuple[Row, Reason]]) -> list[tuple[Row, Reason]]:
        """Take rows that shall be dropped out of the window; without what the hub has, or has in hand."""
        keep = {key for key, _ in self._settled}
        if self._handed and self._handed.key is not None:
            keep.add(self._handed.key)
        leaving = [(row, reason) for row, reason in going if row.key not in keep]
        keys = {row.key for row, _ in leaving}
        self._withdrawn = [entry for entry in self._window if entry.key in keys]
        self._window = deque(entry for entry in self._window if entry.key not in keys)
        self._window_used = sum(entry.message.size_bytes for entry in self._window)
        return leaving

    def written(
        self, keys: Sequence[int], evicted: Iterable[tuple[Row, Reason]], losses: Iterable[Loss] = ()
    ) -> None:
        """The work is in the file, which knows `losses` now."""
        known = {(loss.output, loss.first, loss.reason): loss.key for loss in losses}
        for entry in self._writing:
            if tells := self._tells(entry):
                self._telling[entry.message.output, entry.message.number] = tuple(
                    replace(loss, key=loss.key or known.get((loss.output, loss.first, loss.reason), 0))
                    for loss in tells
                )
        for row, reason in evicted:
            self.dropped[reason] += 1
            self._untell(row.output, row.number)
        for entry, key in zip(self._writing, keys, strict=True):
            entry.key = key
            self.committed[entry.message.output] = entry.message.number
            if entry.settled:  # sent without a file, while it was being written
                self._settled.append((key, entry.message.size_bytes))
                continue
            self._unwritten -= entry.message.size_bytes
            if not self._sending(entry):
                self._shelve(entry, key)
        self._writing, self._work, self._withdrawn = [], Work(), []

    def failed(self) -> None:
        """The work is not in the file: all of it waits again, in its order."""
        self._fresh.extendleft(reversed(self._writing))
        self._settled[:0] = self._work.settled
        self._losses[:0] = self._work.losses
        self._told[:0] = self._work.told
        self._spilled = {**self._work.numbers, **self._spilled}
        # The hub has gone on meanwhile: what had to leave the window for want of room stays out of it.
        for entry in self._withdrawn:
            self._settled.append((entry.key or 0, entry.message.size_bytes))
            self._lose(entry.message.output, entry.message.number, "full")
        self._writing, self._work, self._withdrawn = [], Work(), []

    def rejected(self) -> str | None:
        """The only message of the work is one that the file cannot hold: it goes, the rest waits; its id.

        None when there was no message in the work: then something else is wrong.
        """
        if len(self._writing) != 1:
            return None
        [entry], self._writing = self._writing, []
        self.failed()
        if not entry.settled and not self._sending(entry):
            self._unwritten -= entry.message.size_bytes
            self._lose(entry.message.output, entry.message.number, "unwritable")
        return entry.message.message_id

    def loaded(self, rows: Sequence[tuple[int, Message | Row]]) -> None:
        """What the file had next; a row that makes no sense is a loss."""
        known = {entry.key for entry in self._window} | {key for key, _ in self._settled}
        for key, message in rows:
            self.loaded_to = key
            if key in known:
                continue
            if isinstance(message, Row):
                self._settled.append((key, message.bytes))
                self._lose(message.output, message.number, "unreadable")
                continue
            self._append(Entry(message, key))
        self.behind = bool(rows)

    def spill(self) -> None:
        """There is no file to write to: the fresh go straight to the hub, once the file's are through."""
        if self.behind:
            return
        for entry in self._fresh:
            if not entry.settled and not self._sending(entry):
                self._append(entry)
                self._spilled[entry.message.output] = entry.message.number
        self._fresh.clear()

    def reclaim(self) -> None:
        """There is a file again: what was to be sent without one becomes fresh, to be written first."""
        bare = [entry for entry in self._window if entry.key is None]
        # The one that the hub has in hand stays there, too.
        self._window = deque(e for e in self._window if e.key is not None or e is self._handed)
        self._window_used = sum(entry.message.size_bytes for entry in self._window)
        self._fresh.extendleft(reversed(bare))

    def opened(self, numbers: dict[str, int], first_numbers: dict[str, int]) -> None:
        """A file was opened that may hold messages."""
        self.loaded_to, self.behind = 0, True
        self.committed = dict(numbers)
        self._reached = {output: number - 1 for output, number in first_numbers.items()}

    def forget(self) -> None:
        """The file cannot be read: what only it had is lost, and no key means anything any more."""
        if self.behind:
            for output, last in self.committed.items():
                if (first := self._reached.get(output, last) + 1) <= last:
                    self._losses.append(Loss(output, first, last, "unreadable"))
                    self.dropped["unreadable"] += last - first + 1
        for entry in self._window:
            if entry.key is not None:
                entry.key = None
                self._unwritten += entry.message.size_bytes
        self.loaded_to, self.behind = 0, False
        self._settled.clear()
        self._told.clear()
        self._telling.clear()

    @property
    def telling(self) -> set[int]:
        """The keys of the losses that messages tell of which the hub does not have yet."""
        return {loss.key for losses in self._telling.values() for loss in losses}

    def take_losses(self) -> list[Loss]:
        """The losses that no file knows of, to be told by a message."""
        taken, self._losses = self._losses, []
        return taken

    def _tells(self, entry: Entry) -> tuple[Loss, ...]:
        return self._telling.get((entry.message.output, entry.message.number), ())

    def _sending(self, entry: Entry) -> bool:
        """Whether an entry is the first of the window, although it is on another shelf, too."""
        return bool(self._window) and self._window[0] is entry

    def _append(self, entry: Entry) -> None:
        self._window.append(entry)
        self._window_used += entry.message.size_bytes
        self._reached[entry.message.output] = entry.message.number

    def _shelve(self, entry: Entry, key: int) -> None:
        """Into the window if nothing older is only in the file, and if there is room."""
        full = len(self._window) >= self._window_limit or self._window_used >= self._window_bytes
        if self.behind or full:
            self.behind = True
            return
        self._append(entry)
        self.loaded_to = key

    def _drop_least(self) -> bool:
        """Drop the oldest telemetry of the memory, else its oldest event; False if nothing may go."""
        for telemetry in (True, False):
            for shelf in (self._window, self._fresh):
                for place, entry in enumerate(shelf):
                    free = entry.key is None and entry is not self._handed
                    if free and (entry.message.output != EVENTS) is telemetry:
                        self._discard(shelf, place)
                        return True
        return False

    def _discard(self, shelf: deque[Entry], place: int) -> None:
        message = shelf[place].message
        del shelf[place]
        self._unwritten -= message.size_bytes
        if shelf is self._window:
            self._window_used -= message.size_bytes
        self._lose(message.output, message.number, "full")

    def _untell(self, output: str, number: int) -> None:
        """A message is dropped: what it would have told is to be told by another."""
        losses = self._telling.pop((output, number), ())
        self._losses += [loss for loss in losses if not loss.key]

    def _lose(self, output: str, number: int, reason: Reason) -> None:
        self.dropped[reason] += 1
        self._untell(output, number)
        last = self._losses[-1] if self._losses else None
        if last and (last.output, last.last, last.reason) == (output, number - 1, reason):
            self._losses[-1] = Loss(output, last.first, number, reason)
        else:
            self._losses.append(Loss(output, number, number, reason))
