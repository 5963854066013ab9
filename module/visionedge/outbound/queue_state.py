"""The state of the spool's queue: which messages are fresh, being written, or in the window for the hub.

    put ──▶ fresh ──▶ writing ──▶ (file) ──▶ window ──▶ hub
                 └──── without a file ──────┘

A message enters the window only when it is in the file, or when there is no file. So the hub never gets a
sequence number that a restart could give to another message. Pure: no lock, no disk, no clock.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from visionedge.outbound.messages import KEPT_OUTPUTS, Message
from visionedge.outbound.sqlite_store import LostRange, MessageDropReason, MessageRow, Transaction

# The limits of one transaction, so that none blocks the disk for long.
_MAX_TRANSACTION_MESSAGES = 500
_MAX_TRANSACTION_BYTES = 2_000_000


@dataclass(slots=True)
class QueuedMessage:
    """A message; `key` is its row in the file, None while it is not in the file.

    `settled`: the hub has it, or it was dropped, which is reported as a loss.
    """

    message: Message
    key: int | None = None
    settled: bool = False

    @property
    def is_secured(self) -> bool:
        """Whether a kill cannot lose the message any more. May be read by any thread."""
        return self.key is not None or self.settled


class QueueState:
    """The queue of the spool, changed only under the spool's lock.

    Args:
        memory_bytes: limit of the messages that are not in the file.
        window, window_bytes: how many messages and bytes are held ready for the hub.
    """

    def __init__(self, memory_bytes: int, window: int = 512, window_bytes: int = 4_000_000) -> None:
        self._memory_bytes = memory_bytes
        self._window_limit = window
        self._window_bytes = window_bytes
        self._fresh: deque[QueuedMessage] = deque()
        self._writing: list[QueuedMessage] = []
        self._window: deque[QueuedMessage] = deque()
        self._in_flight: QueuedMessage | None = None
        self._transaction = Transaction()
        self._window_used = 0
        self._unwritten = 0
        self._settled: list[tuple[int, int]] = []
        self._losses: list[LostRange] = []
        self._reported: list[LostRange] = []
        self._losses_by_report: dict[tuple[str, int], tuple[LostRange, ...]] = {}
        self._withdrawn: list[QueuedMessage] = []
        self._bypassed: dict[str, int] = {}
        self.dropped: Counter[str] = Counter()
        # Rows with a key above `last_loaded_key` are not in the window; `has_more_on_disk`: there may be such
        # rows.
        self.last_loaded_key = 0
        self.has_more_on_disk = False
        self.committed: dict[str, int] = {}
        self._reached: dict[str, int] = {}

    def __repr__(self) -> str:
        return (
            f"<QueueState fresh={len(self._fresh)} writing={len(self._writing)} window={len(self._window)}"
            f" settled={len(self._settled)} more_on_disk={self.has_more_on_disk}>"
        )

    # --- for the hub client ---------------------------------------------------------------------------------

    def put(self, message: Message, reports: tuple[LostRange, ...] = ()) -> QueuedMessage:
        """Append a message that reports the losses `reports`.

        If the memory limit is exceeded, the oldest telemetry is dropped, then the oldest other messages.
        """
        entry = QueuedMessage(message)
        self._fresh.append(entry)
        if reports:
            self._losses_by_report[message.output, message.sequence_number] = reports
        self._unwritten += message.size_bytes
        while self._unwritten > self._memory_bytes and self._drop_oldest():
            pass
        return entry

    def peek(self) -> Message | None:
        """The message to send next; it stays in the queue until `settle`, and is not dropped meanwhile."""
        self._in_flight = self._window[0] if self._window else None
        return self._in_flight.message if self._in_flight else None

    def settle(self, message: Message, dropped: MessageDropReason | None) -> None:
        """Remove the first message: the hub has acknowledged it, or it is dropped for a reason."""
        if not self._window or self._window[0].message is not message:
            return
        entry = self._window.popleft()
        entry.settled = True
        self._in_flight = None
        self._window_used -= message.size_bytes
        if entry.key is None:
            self._unwritten -= message.size_bytes
        else:
            self._settled.append((entry.key, message.size_bytes))
        if dropped is not None:
            self._record_loss(message.output, message.sequence_number, dropped)
        else:
            self._reported += self._losses_by_report.pop((message.output, message.sequence_number), ())

    # --- for the thread that writes -------------------------------------------------------------------------

    @property
    def unwritten(self) -> int:
        """The number of messages that are not in the file."""
        in_window = sum(entry.key is None for entry in self._window)
        return in_window + sum(not self._is_window_head(entry) for entry in (*self._writing, *self._fresh))

    @property
    def unwritten_bytes(self) -> int:
        """The bytes of the messages that are not in the file."""
        return self._unwritten

    @property
    def pending_rows(self) -> int:
        """The number of rows whose messages are settled and that are still in the file."""
        return len(self._settled) + len(self._transaction.settled)

    @property
    def pending_bytes(self) -> int:
        """The bytes of the rows counted by `pending_rows`."""
        return sum(size for _, size in (*self._settled, *self._transaction.settled))

    @property
    def has_fresh(self) -> bool:
        """Whether messages wait to be written."""
        return bool(self._fresh)

    @property
    def has_deferred_changes(self) -> bool:
        """Whether less urgent changes wait to be written: settled messages, losses, reported losses."""
        return bool(self._settled or self._losses or self._reported or self._bypassed)

    @property
    def needs_refill(self) -> bool:
        """Whether the window is less than half full while the file has more messages."""
        low = len(self._window) * 2 < self._window_limit and self._window_used * 2 < self._window_bytes
        return self.has_more_on_disk and low

    @property
    def load_limits(self) -> tuple[int, int]:
        """How many messages and bytes to load into the window at a time."""
        return self._window_limit, self._window_bytes

    def take_transaction(
        self, running_s: float, spent: Mapping[str, int], max_messages: int = _MAX_TRANSACTION_MESSAGES
    ) -> Transaction:
        """The changes to write now.

        Its messages stay in `writing` until `mark_written`, `mark_failed` or `drop_unwritable`.
        """
        left_bytes = _MAX_TRANSACTION_BYTES
        while self._fresh and len(self._writing) < max_messages and left_bytes > 0:
            entry = self._fresh.popleft()
            if not entry.settled:
                left_bytes -= entry.message.size_bytes
                self._writing.append(entry)
        self._transaction = Transaction(
            append=[entry.message for entry in self._writing],
            settled=self._settled,
            lost_ranges=self._losses,
            reported=self._reported,
            last_numbers=self._bypassed,
            running_s=running_s,
            spent=spent,
            unsaved_reported=[
                loss for entry in self._writing for loss in self._losses_reported_by(entry) if not loss.key
            ],
        )
        self._settled, self._losses, self._reported, self._bypassed = [], [], [], {}
        return self._transaction

    def withdraw(
        self, evicted: Iterable[tuple[MessageRow, MessageDropReason]]
    ) -> list[tuple[MessageRow, MessageDropReason]]:
        """Remove rows from the window; returns them without settled rows and the one that is being sent."""
        keep = {key for key, _ in self._settled}
        if self._in_flight and self._in_flight.key is not None:
            keep.add(self._in_flight.key)
        leaving = [(row, reason) for row, reason in evicted if row.key not in keep]
        keys = {row.key for row, _ in leaving}
        self._withdrawn = [entry for entry in self._window if entry.key in keys]
        self._window = deque(entry for entry in self._window if entry.key not in keys)
        self._window_used = sum(entry.message.size_bytes for entry in self._window)
        return leaving

    def mark_written(
        self,
        keys: Sequence[int],
        evicted: Iterable[tuple[MessageRow, MessageDropReason]],
        lost_ranges: Iterable[LostRange] = (),
    ) -> None:
        """The transaction is in the file; `lost_ranges` are all losses in the file, with their keys."""
        known = {(loss.output, loss.first, loss.reason): loss.key for loss in lost_ranges}
        for entry in self._writing:
            if reports := self._losses_reported_by(entry):
                self._losses_by_report[entry.message.output, entry.message.sequence_number] = tuple(
                    replace(loss, key=loss.key or known.get((loss.output, loss.first, loss.reason), 0))
                    for loss in reports
                )
        for row, reason in evicted:
            self.dropped[reason] += 1
            self._requeue_losses(row.output, row.sequence_number)
        for entry, key in zip(self._writing, keys, strict=True):
            entry.key = key
            self.committed[entry.message.output] = entry.message.sequence_number
            if entry.settled:  # sent without the file while it was being written
                self._settled.append((key, entry.message.size_bytes))
                continue
            self._unwritten -= entry.message.size_bytes
            if not self._is_window_head(entry):
                self._add_to_window(entry, key)
        self._writing, self._transaction, self._withdrawn = [], Transaction(), []

    @staticmethod
    def split_deletions(transaction: Transaction) -> Iterator[Transaction]:
        """The settled messages of a transaction and its reports, in parts that need little space."""
        first = replace(transaction, append=(), evicted=(), unsaved_reported=())
        for at in range(0, len(transaction.settled), _MAX_TRANSACTION_MESSAGES):
            part = transaction.settled[at : at + _MAX_TRANSACTION_MESSAGES]
            yield replace(first if at == 0 else _without_reports(first), settled=part)

    def mark_deleted(self, part: Transaction) -> None:
        """A part that `split_deletions` returned is in the file; the others stay in the transaction."""
        left = self._transaction.settled[len(part.settled) :]
        self._transaction = replace(_without_reports(self._transaction), settled=left)

    def mark_failed(self) -> None:
        """The transaction is not in the file: all its changes wait again, in their order."""
        self._fresh.extendleft(reversed(self._writing))
        self._settled[:0] = self._transaction.settled
        self._losses[:0] = self._transaction.lost_ranges
        self._reported[:0] = self._transaction.reported
        self._bypassed = {**self._transaction.last_numbers, **self._bypassed}
        # The hub has got later messages meanwhile, so messages withdrawn from the window do not return to it.
        for entry in self._withdrawn:
            self._settled.append((entry.key or 0, entry.message.size_bytes))
            self._record_loss(entry.message.output, entry.message.sequence_number, "full")
        self._writing, self._transaction, self._withdrawn = [], Transaction(), []

    def drop_unwritable(self) -> str | None:
        """Drop the only message of the transaction, which the file cannot store; returns its id.

        The other changes wait again. None if the transaction has no single message: then the error has
        another cause.
        """
        if len(self._writing) != 1:
            return None
        [entry], self._writing = self._writing, []
        self.mark_failed()
        if not entry.settled and not self._is_window_head(entry):
            entry.settled = True
            self._unwritten -= entry.message.size_bytes
            self._record_loss(entry.message.output, entry.message.sequence_number, "unwritable")
        return entry.message.message_id

    def add_loaded(self, rows: Sequence[tuple[int, Message | MessageRow]]) -> None:
        """Add the next rows of the file to the window; a row that is not valid is a loss."""
        known = {entry.key for entry in self._window} | {key for key, _ in self._settled}
        for key, message in rows:
            self.last_loaded_key = key
            if key in known:
                continue
            if isinstance(message, MessageRow):
                self._settled.append((key, message.bytes))
                self._record_loss(message.output, message.sequence_number, "unreadable")
                continue
            self._append(QueuedMessage(message, key))
        self.has_more_on_disk = bool(rows)

    def bypass_disk(self, *, overtake: bool = False) -> None:
        """There is no file: move fresh messages to the window, unless the file has older ones.

        `overtake`: move them before the older ones, because the file cannot even be read.
        """
        if self.has_more_on_disk and not overtake:
            return
        for entry in self._fresh:
            if not entry.settled and not self._is_window_head(entry):
                self._append(entry)
                self._bypassed[entry.message.output] = entry.message.sequence_number
        self._fresh.clear()

    def requeue_unsaved(self) -> None:
        """There is a file again: messages of the window that are not in it become fresh again."""
        unsaved = [entry for entry in self._window if entry.key is None]
        # The message that is being sent stays in the window, too.
        self._window = deque(e for e in self._window if e.key is not None or e is self._in_flight)
        self._window_used = sum(entry.message.size_bytes for entry in self._window)
        self._fresh.extendleft(reversed(unsaved))

    def opened(self, last_numbers: dict[str, int], first_numbers: dict[str, int]) -> None:
        """A file was opened; it may contain messages.

        `last_numbers` and `first_numbers` are sequence numbers by output: the last ever, and the first in the
        file.
        """
        self.last_loaded_key, self.has_more_on_disk = 0, True
        self.committed = dict(last_numbers)
        self._reached = {output: sequence_number - 1 for output, sequence_number in first_numbers.items()}

    def forget_file(self) -> None:
        """The file cannot be read: messages that were only in it are lost, and no key is valid any more."""
        if self.has_more_on_disk:
            for output, last in self.committed.items():
                if (first := self._reached.get(output, last) + 1) <= last:
                    self._losses.append(LostRange(output, first, last, "unreadable"))
                    self.dropped["unreadable"] += last - first + 1
        for entry in self._window:
            if entry.key is not None:
                entry.key = None
                self._unwritten += entry.message.size_bytes
        self.last_loaded_key, self.has_more_on_disk = 0, False
        self._settled.clear()
        self._reported.clear()
        self._losses_by_report.clear()

    @property
    def losses_being_reported(self) -> set[int]:
        """The keys of losses that are reported by messages which the hub does not have yet."""
        return {loss.key for lost_ranges in self._losses_by_report.values() for loss in lost_ranges}

    def take_lost_ranges(self) -> list[LostRange]:
        """The losses that are not in a file, to be reported by a message."""
        taken, self._losses = self._losses, []
        return taken

    def _losses_reported_by(self, entry: QueuedMessage) -> tuple[LostRange, ...]:
        return self._losses_by_report.get((entry.message.output, entry.message.sequence_number), ())

    def _is_window_head(self, entry: QueuedMessage) -> bool:
        """Whether an entry is the first of the window; it can be in `fresh` or `writing`, too."""
        return bool(self._window) and self._window[0] is entry

    def _append(self, entry: QueuedMessage) -> None:
        self._window.append(entry)
        self._window_used += entry.message.size_bytes
        self._reached[entry.message.output] = entry.message.sequence_number

    def _add_to_window(self, entry: QueuedMessage, key: int) -> None:
        """Add an entry to the window, unless the window is full or the file has older messages."""
        full = len(self._window) >= self._window_limit or self._window_used >= self._window_bytes
        if self.has_more_on_disk or full:
            self.has_more_on_disk = True
            return
        self._append(entry)
        self.last_loaded_key = key

    def _drop_oldest(self) -> bool:
        """Drop the oldest telemetry in memory, else the oldest other message; False if none may be."""
        for telemetry in (True, False):
            for queue in (self._window, self._fresh):
                for index, entry in enumerate(queue):
                    free = entry.key is None and entry is not self._in_flight
                    if free and (entry.message.output not in KEPT_OUTPUTS) is telemetry:
                        self._discard(queue, index)
                        return True
        return False

    def _discard(self, queue: deque[QueuedMessage], index: int) -> None:
        message = queue[index].message
        queue[index].settled = True
        del queue[index]
        self._unwritten -= message.size_bytes
        if queue is self._window:
            self._window_used -= message.size_bytes
        self._record_loss(message.output, message.sequence_number, "full")

    def _requeue_losses(self, output: str, sequence_number: int) -> None:
        """A message is dropped: another one must report the losses that it would have reported."""
        lost_ranges = self._losses_by_report.pop((output, sequence_number), ())
        self._losses += [loss for loss in lost_ranges if not loss.key]

    def _record_loss(self, output: str, sequence_number: int, reason: MessageDropReason) -> None:
        self.dropped[reason] += 1
        self._requeue_losses(output, sequence_number)
        last = self._losses[-1] if self._losses else None
        if last and (last.output, last.last, last.reason) == (output, sequence_number - 1, reason):
            self._losses[-1] = LostRange(output, last.first, sequence_number, reason)
        else:
            self._losses.append(LostRange(output, sequence_number, sequence_number, reason))


def _without_reports(transaction: Transaction) -> Transaction:
    return replace(transaction, lost_ranges=(), reported=(), last_numbers={})
