"""The spool under another version of the module: no message is lost, no number comes twice.

The next version is made up (`next_version`): one whose file today's module can use, and one whose file it
cannot.
"""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from next_version import Kind, next_format
from spool_harness import SpoolHarness, drain, message, run_round
from visionedge.outbound import sqlite_store
from visionedge.outbound.sqlite_store import FORMAT, StoreFormat

KINDS: list[Kind] = ["additive", "incompatible"]
OLD, NEW = "today's", "the next"

Switch = Callable[[StoreFormat], None]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Makes this process that of a version with a format."""

    def become(store_format: StoreFormat) -> None:
        monkeypatch.setattr(sqlite_store, "FORMAT", store_format)

    return become


class Versions:
    """Runs of changing versions on one folder; each goes on with the numbers that it finds."""

    def __init__(self, harness: SpoolHarness, switch: Switch) -> None:
        self.harness = harness
        self.switch = switch
        self.numbers: list[int] = []
        self.codes: list[str] = []
        self.newer: str | None = None

    def run(self, store_format: StoreFormat, count: int = 2, *, send: bool = False) -> list[int]:
        """Put messages into the spool, and end by a kill; the numbers that went to the hub with `send`."""
        self.switch(store_format)
        spool = self.harness.spool()
        first = spool.last_numbers.get("detections", 0) + 1
        self.numbers += range(first, first + count)
        for number in range(first, first + count):
            spool.put(message(number))
        run_round(spool)
        assert spool.status().mode == "disk"
        sent = [each.sequence_number for each in drain(spool)] if send else []
        self.codes, self.newer = [news.code for news in spool.take_events()], spool.status().newer
        run_round(spool)
        self.harness.crash()
        return sent

    def files(self) -> set[str]:
        """The databases in the folder."""
        return {path.name for path in self.harness.path.parent.glob("*.db*") if path.suffix == ".db"}


@pytest.fixture
def versions(harness: SpoolHarness, switch: Switch) -> Iterator[Versions]:
    """Versions on the folder of a harness."""
    yield Versions(harness, switch)
    assert not list(harness.path.parent.glob("*.aside*"))


@pytest.mark.parametrize("kind", KINDS)
def test_old_new_old_new_sends_every_message_once_with_rising_numbers(versions: Versions, kind: Kind) -> None:
    new = next_format(kind)
    versions.run(FORMAT)
    versions.run(new)
    versions.run(FORMAT)
    assert (versions.newer is None) == (kind == "additive")
    versions.run(FORMAT)
    sent = versions.run(new, send=True)
    assert sent == versions.numbers == list(range(1, 11))
    assert versions.newer is None
    assert versions.codes == []
    assert versions.files() == {"spool.db"}


def test_the_old_module_sends_what_the_new_one_left_if_it_can_use_the_file(versions: Versions) -> None:
    versions.run(next_format("additive"))
    assert versions.run(FORMAT, send=True) == [1, 2, 3, 4]


def test_a_file_that_the_old_module_cannot_use_stays_and_is_reported_with_the_remedy(
    versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    new = next_format("incompatible")
    versions.run(new)
    assert versions.run(FORMAT, send=True) == [3, 4]
    assert versions.files() == {"spool.db", "spool.1.db"}
    assert versions.codes == ["spool-newer"]
    assert versions.newer == (
        "spool.db was written by a newer version of visionedge (format 2, this version reads up to 1): it"
        " stays as it is, and messages wait in spool.1.db; install the newer version again to send the"
        " messages in both"
    )
    assert versions.newer in caplog.text
    with sqlite3.connect(versions.harness.path) as database:
        assert database.execute("SELECT number FROM message ORDER BY key").fetchall() == [(1,), (2,)]
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
    database.close()
    assert versions.run(new, send=True) == [1, 2, 5, 6]


def test_two_steps_back_and_two_forward_lose_nothing(versions: Versions) -> None:
    """Three versions, none of which can use the file of the next."""
    new = next_format("incompatible")
    upgrade = "UPDATE compatibility SET min_reader = 3; CREATE TABLE more(text TEXT NOT NULL)"
    newest = StoreFormat((*new.upgrades, upgrade))
    for each in (FORMAT, new, newest, new, FORMAT):
        versions.run(each)
    assert versions.files() == {"spool.db", "spool.1.db", "spool.2.db"}
    versions.run(new)
    assert versions.files() == {"spool.db", "spool.2.db"}
    assert sorted(versions.run(newest, send=True)) == versions.numbers == list(range(1, 15))
    assert versions.files() == {"spool.db"}


def test_losses_and_the_budget_of_the_day_come_along(harness: SpoolHarness, switch: Switch) -> None:
    new = next_format("incompatible")
    switch(new)
    spool = harness.spool()
    spool.set_spent_source(lambda: {"2026-11-30": 3})
    spool.put(message(1))
    run_round(spool)
    harness.crash()
    switch(FORMAT)
    spool = harness.spool()
    spool.set_spent_source(lambda: {"2026-11-30": 7})
    spool.put(message(2))
    run_round(spool)
    first = spool.peek()
    assert first is not None
    spool.settle(first, dropped="refused")
    run_round(spool)
    harness.crash()
    switch(new)
    spool = harness.spool()
    assert dict(spool.spent) == {"2026-11-30": 7}
    assert [(loss.first, loss.last) for loss in spool.take_lost_ranges()] == [(2, 2)]
    assert [each.sequence_number for each in drain(spool)] == [1]


def test_a_kill_while_messages_are_moved_neither_loses_nor_repeats_any(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other file is still there after the copy was written."""
    new = next_format("incompatible")
    for each in (new, FORMAT):
        versions.run(each)
    versions.switch(new)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_kwargs: None)
        versions.harness.spool()
        versions.harness.crash()
    other = versions.harness.path.with_name("spool.1.db")
    assert other.exists()
    with sqlite3.connect(other) as database:  # as if the kill had come before the originals were deleted
        database.execute(
            "INSERT INTO message(output, number, bytes, born_s, frames, id, properties, body)"
            " VALUES ('detections', 3, 100, 0, 2, 'detections-3', '{\"schema\": \"s\"}', x'78')"
        )
    database.close()
    assert versions.run(new, send=True) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE loss",
        "DROP TABLE compatibility",
        "UPDATE compatibility SET min_reader = 2",
        "DELETE FROM compatibility",
        "ALTER TABLE message RENAME COLUMN born_s TO born",
        "UPDATE message SET bytes = 'x'",
    ],
)
def test_a_newer_file_that_breaks_the_rules_is_left_alone_too(versions: Versions, damage: str) -> None:
    versions.run(next_format("additive"))
    with sqlite3.connect(versions.harness.path) as database:
        database.execute(damage)
    database.close()
    assert versions.run(FORMAT, send=True) == [3, 4]
    assert versions.codes == ["spool-newer"]


def test_a_damaged_file_beside_a_newer_one_is_set_aside_and_the_newer_one_stays(
    harness: SpoolHarness, switch: Switch
) -> None:
    versions = Versions(harness, switch)
    new = next_format("incompatible")
    for each in (new, FORMAT):
        versions.run(each)
    beside = harness.path.with_name("spool.1.db")
    beside.write_bytes(b"x" * 10_000)
    assert versions.run(FORMAT, send=True) == [3, 4]  # 3 and 4 could not be read
    assert sorted(versions.codes) == ["spool-lost", "spool-newer"]
    assert beside.with_name("spool.1.db.aside").exists()
    assert versions.run(new, send=True)[:2] == [1, 2]
