"""A spool in a temporary folder under a scripted clock, for tests."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool, SpoolOptions
from visionedge.outbound.sqlite_store import SpoolLimits, open_database
from visionedge.runtime.threads import ThreadGroup


def message(sequence_number: int, output: str = "detections", size: int = 100) -> Message:
    """A message with a body of `size` bytes."""
    return Message(
        output, b"x" * size, f"{output}-{sequence_number}", {"schema": "s"}, sequence_number, frames=2
    )


class SpoolHarness:
    """A folder, a fake clock, and a disk that fails on command; tests run the rounds of a spool."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data" / "spool.db"
        self.now_ns = 0
        self.thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
        self.databases: list[sqlite3.Connection] = []
        self._actions: list[tuple[str, Callable[[], None]]] = []

    def connect(self, path: Path) -> sqlite3.Connection:
        """Open the real database and keep it, so that a test can make it fail."""
        database = open_database(path)
        database.execute("PRAGMA synchronous=OFF")
        self.databases.append(database)
        return database

    def spool(self, *, owner: str = "me", memory_bytes: int = 1_000_000, **limits: float) -> Spool:
        """A spool without its thread; `run_round` does one round."""
        return Spool(
            self.path,
            owner,
            self.thread_group,
            limits=SpoolLimits(**limits),  # type: ignore[arg-type]  # ints where ints are
            spool_options=SpoolOptions(memory_bytes=memory_bytes, retry_s=10),
            clock=lambda: self.now_ns,
            connect=self.connect,
        )

    def crash(self) -> None:
        """The state after `kill -9`: uncommitted data is lost."""
        for database in self.databases:
            database.close()

    def meanwhile(self, statement: str, happens: Callable[[], None]) -> None:
        """Call a function at the next disk statement that starts so; in the order of the calls."""
        self._actions.append((statement, happens))
        self.databases[-1].set_trace_callback(self._trace)

    def _trace(self, statement: str) -> None:
        if self._actions and statement.startswith(self._actions[0][0]):
            self._actions.pop(0)[1]()

    def read_only(self, *, on: bool) -> None:
        """Make the disk read-only, or writable again."""
        self.databases[-1].execute(f"PRAGMA query_only={'ON' if on else 'OFF'}")


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[SpoolHarness]:
    """A harness; closes open databases."""
    harness = SpoolHarness(tmp_path)
    yield harness
    for database in harness.databases:
        database.close()


def run_round(spool: Spool) -> None:
    """One round of the thread `spool`."""
    spool._write_and_refill()


def drain(spool: Spool) -> list[Message]:
    """Take all messages, as a connected hub does."""
    got: list[Message] = []
    for _ in range(10_000):
        run_round(spool)
        following = spool.peek()
        if following is None and not len(spool):
            return got
        while following is not None:
            got.append(following)
            spool.settle(following)
            following = spool.peek()
    raise AssertionError(f"never empty: {spool!r}")
