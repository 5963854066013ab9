"""The spool: a damaged file that cannot be renamed, or that can no longer be read."""

import sqlite3

import pytest

from spool_harness import SpoolHarness, drain, message, run_round
from visionedge.outbound.spool import Spool


def filled(harness: SpoolHarness, count: int = 3) -> None:
    """Leave a file with `count` messages of a module that was killed."""
    spool = harness.spool()
    for sequence_number in range(1, count + 1):
        spool.put(message(sequence_number))
    run_round(spool)
    harness.crash()


def change(harness: SpoolHarness, statement: str) -> None:
    """Change the file while no module uses it."""
    with sqlite3.connect(harness.path) as database:
        database.executescript(statement)
    database.close()


def numbers(spool: Spool) -> list[int]:
    """The sequence numbers of the messages that the spool hands out."""
    return [each.sequence_number for each in drain(spool)]


def losses(spool: Spool) -> list[tuple[int, int, str]]:
    """The lost numbers and why they were lost."""
    return [(loss.first, loss.last, loss.reason) for loss in spool.take_lost_ranges()]


def test_a_file_that_cannot_be_renamed_means_memory(
    harness: SpoolHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages go on in memory; the file stays for a look at it."""
    filled(harness)
    change(harness, "DROP TABLE loss")

    def refuse(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("visionedge.outbound.spool.set_aside", refuse)
    spool = harness.spool()
    status = spool.status()
    assert status.mode == "memory"
    assert "renaming the file failed: Operation not permitted" in str(status.reason)
    spool.put(message(4))
    assert numbers(spool) == [4]
    assert harness.path.exists()


def test_messages_that_can_no_longer_be_read_back_are_reported_and_numbers_go_on(
    harness: SpoolHarness,
) -> None:
    """The disk fails while the spool reads what did not fit into its memory."""
    filled(harness, 5)
    again = harness.spool()
    harness.databases[-1].execute("PRAGMA writable_schema = ON")
    harness.databases[-1].execute("DROP TABLE message")
    run_round(again)
    assert [news.code for news in again.take_events()] == ["spool-lost"]
    run_round(again)
    assert losses(again) == [(1, 5, "unreadable")]
    again.put(message(6))
    assert numbers(again) == [6]
