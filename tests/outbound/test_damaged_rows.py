"""The spool: a bad message or a bad value in the file costs the message or the file, never the module."""

import os
import sqlite3

import pytest

from spool_world import SpoolWorld, drain, message, turn
from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool


def filled(world: SpoolWorld, count: int = 3) -> None:
    """Leave a file with `count` messages of a module that was killed."""
    spool = world.spool()
    for sequence_number in range(1, count + 1):
        spool.put(message(sequence_number))
    turn(spool)
    world.crash()


def change(world: SpoolWorld, statement: str) -> None:
    """Change the file while no module uses it."""
    with sqlite3.connect(world.path) as database:
        database.executescript(statement)
    database.close()


def numbers(spool: Spool) -> list[int]:
    """The sequence numbers of the messages that the spool hands out."""
    return [each.sequence_number for each in drain(spool)]


def losses(spool: Spool) -> list[tuple[int, int, str]]:
    """The lost numbers and why they were lost."""
    return [(loss.first, loss.last, loss.reason) for loss in spool.take_lost_ranges()]


def test_a_message_that_cannot_be_stored_is_dropped_alone(world: SpoolWorld) -> None:
    """Its text has no UTF-8; the messages before and after it are stored, and its number is reported."""
    spool = world.spool()
    for sequence_number in (1, 2, 3):
        spool.put(message(sequence_number))
    spool.put(Message("detections", b"x", "detections-4", {"labels": "\ud800"}, 4, frames=1))
    spool.put(Message("detections", b"x", "\ud800", {}, 5, frames=1))
    spool.put(message(6))
    for _ in range(8):
        turn(spool)
    assert numbers(spool) == [1, 2, 3, 4, 6]
    turn(spool)
    assert losses(spool) == [(5, 5, "unwritable")]
    assert spool.status().mode == "disk"


@pytest.mark.parametrize("value", ["[1", '{"schema": 1}', "[]"])
def test_a_message_on_disk_that_is_not_valid_is_a_loss_and_the_others_come(
    world: SpoolWorld, value: str
) -> None:
    filled(world)
    with sqlite3.connect(world.path) as database:
        database.execute("UPDATE message SET properties = ? WHERE number = 2", (value,))
    database.close()
    again = world.spool()
    turn(again)
    assert numbers(again) == [1, 3]
    turn(again)
    assert losses(again) == [(2, 2, "unreadable")]
    assert again.dropped == {"unreadable": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE message SET frames = -1 WHERE number = 2",
        "UPDATE message SET body = 'text' WHERE number = 2",
        "INSERT INTO owner VALUES ('other', 0)",
        "CREATE TABLE more(key INTEGER)",
        "PRAGMA user_version = 99",
    ],
)
def test_a_file_with_values_that_no_module_writes_is_set_aside(world: SpoolWorld, statement: str) -> None:
    filled(world)
    change(world, statement)
    again = world.spool()
    assert again.status().mode == "disk"
    assert [news.code for news in again.take_events()] == ["spool-lost"]
    assert world.path.with_name("spool.db.aside").exists()
    again.put(message(4))
    assert numbers(again) == [4]


def test_a_pipe_in_the_place_of_the_file_is_set_aside(world: SpoolWorld) -> None:
    """To open it would wait for ever."""
    world.path.parent.mkdir()
    os.mkfifo(world.path)
    spool = world.spool()
    spool.put(message(1))
    assert numbers(spool) == [1]
    assert spool.status().mode == "disk"


def test_a_file_that_cannot_be_renamed_means_memory(
    world: SpoolWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages go on in memory; the file stays for a look at it."""
    filled(world)
    change(world, "PRAGMA user_version = 99")

    def refuse(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("visionedge.outbound.spool.set_aside", refuse)
    spool = world.spool()
    status = spool.status()
    assert status.mode == "memory"
    assert "renaming the file failed: Operation not permitted" in str(status.reason)
    spool.put(message(4))
    assert numbers(spool) == [4]
    assert world.path.exists()


def test_messages_that_can_no_longer_be_read_back_are_reported_and_numbers_go_on(world: SpoolWorld) -> None:
    """The disk fails while the spool reads what did not fit into its memory."""
    filled(world, 5)
    again = world.spool()
    world.databases[-1].execute("PRAGMA writable_schema = ON")
    world.databases[-1].execute("DROP TABLE message")
    turn(again)
    assert [news.code for news in again.take_events()] == ["spool-lost"]
    turn(again)
    assert losses(again) == [(1, 5, "unreadable")]
    again.put(message(6))
    assert numbers(again) == [6]
