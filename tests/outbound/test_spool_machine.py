"""The spool as a state machine: in any order of events, every number arrives or is reported as lost."""

import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool, SpoolOptions
from visionedge.outbound.sqlite_store import LostRange, SpoolLimits, open_database
from visionedge.runtime.threads import ThreadGroup

OUTPUTS = st.sampled_from(["detections", "detections", "detections", "events", "scene"])
SIZE = 100


class SpoolMachine(RuleBasedStateMachine):
    """Messages are put, sent, refused, killed; the disk fails and recovers; the rest is bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now_ns = 0
        self.broken = False
        self.run = 0
        self.arrived: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
        self.lost: Counter[tuple[str, int]] = Counter()
        self.refused: set[str] = set()
        self.acknowledged: set[tuple[str, int]] = set()
        self.untold: dict[str, tuple[LostRange, ...]] = {}
        self.start()

    def connect(self, path: Path) -> sqlite3.Connection:
        self.database = open_database(path)
        self.database.execute("PRAGMA synchronous=OFF")
        return self.database

    def start(self) -> None:
        """A start of the module: numbers continue from the disk."""
        self.run += 1
        self.spool = Spool(
            Path(self.folder.name) / "spool.db",
            "me",
            ThreadGroup(lambda _name, _error: None),
            limits=SpoolLimits(limit_bytes=12 * SIZE * 2),
            spool_options=SpoolOptions(memory_bytes=20 * SIZE * 2, retry_s=10),
            clock=lambda: self.now_ns,
            connect=self.connect,
        )
        self.last_numbers = Counter(self.spool.last_numbers)

    def put_one(self, output: str, reports: tuple[LostRange, ...] = ()) -> None:
        self.last_numbers[output] += 1
        sequence_number = self.last_numbers[output]
        identity = f"{self.run}-{output}-{sequence_number}"
        if reports:
            self.untold[identity] = reports
        self.spool.put(Message(output, b"x" * SIZE, identity, {}, sequence_number), reports)

    @rule(output=OUTPUTS, count=st.integers(1, 8))
    def put(self, output: str, count: int) -> None:
        for _ in range(count):
            self.put_one(output)

    @rule()
    def turn(self) -> None:
        self.spool._write_and_refill()

    @rule(count=st.integers(1, 6), acknowledged=st.booleans())
    def send(self, count: int, acknowledged: bool) -> None:
        """The hub receives messages; if an acknowledgement is lost, the message is sent again."""
        for _ in range(count):
            message = self.spool.peek()
            if message is None:
                return
            self.receive(message)
            if acknowledged:
                self.spool.settle(message)
                self.acknowledged.add((message.output, message.sequence_number))

    def receive(self, message: Message) -> None:
        known = (message.sequence_number, message.message_id) in self.arrived[message.output]
        if not known and message.message_id not in self.refused:
            self.arrived[message.output].append((message.sequence_number, message.message_id))
        for loss in self.untold.pop(message.message_id, ()):
            for sequence_number in range(loss.first, loss.last + 1):
                self.lost[(loss.output, sequence_number)] += 1

    @rule()
    def refuse(self) -> None:
        """The SDK can never send the next message."""
        if (message := self.spool.peek()) is not None and message.output == "detections":
            self.spool.settle(message, dropped="refused")
            # A kill may bring it again, and late; the SDK refuses it then as well.
            self.refused.add(message.message_id)

    @rule()
    def report_losses(self) -> None:
        """Losses become an event, as the delivery does it."""
        if lost_ranges := tuple(self.spool.take_lost_ranges()):
            self.put_one("events", lost_ranges)

    @rule()
    def fail_disk(self) -> None:
        self.broken = True
        self.database.execute("PRAGMA query_only=ON")

    @rule()
    def repair_disk(self) -> None:
        self.broken = False
        self.database.execute("PRAGMA query_only=OFF")
        self.now_ns += 11_000_000_000

    @precondition(lambda self: not self.broken and self.spool.status().mode == "disk")
    @rule()
    def kill(self) -> None:
        """Without a disk a kill loses the messages in memory: this is documented."""
        self.database.close()
        self.start()
        # Messages without a commit wait again, and may be dropped with the rest.
        self.acknowledged.clear()

    @invariant()
    def numbers_are_unique(self) -> None:
        for output, seen in self.arrived.items():
            last_numbers = [sequence_number for sequence_number, _ in seen]
            assert len(set(last_numbers)) == len(last_numbers), f"{output}: a number was given twice: {seen}"

    @invariant()
    def acknowledged_messages_are_not_reported_as_lost(self) -> None:
        lost = {(s.output, n) for s in self.spool._losses for n in range(s.first, s.last + 1)}
        assert not lost & self.acknowledged

    @invariant()
    def outputs_stay_in_order(self) -> None:
        for output, seen in self.arrived.items():
            assert all(a[0] < b[0] for a, b in pairwise(seen)), f"{output}: {seen}"

    def teardown(self) -> None:
        """In the end everything arrives, or its loss does."""
        try:
            self.repair_disk()
            self.until(lambda: self.spool.peek() is None and not len(self.spool))
        finally:
            self.database.close()
            self.folder.cleanup()
        for output, last in self.last_numbers.items():
            there = {sequence_number for sequence_number, _ in self.arrived[output]}
            there |= {int(name.split("-")[2]) for name in self.refused if output in name}
            gone = {sequence_number for name, sequence_number in self.lost if name == output}
            assert there | gone >= set(range(1, last + 1)), f"{output}: {sorted(there)}, lost {sorted(gone)}"

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(300):
            self.turn()
            self.send(50, acknowledged=True)
            self.report_losses()
            self.now_ns += 11_000_000_000
            if done() and not self.spool._losses and not self.spool._queue.has_deferred_changes:
                return
        raise AssertionError(f"never done: {self.spool!r}")


SpoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSpool = SpoolMachine.TestCase
