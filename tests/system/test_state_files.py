"""Damaged state files: each is set aside and reported, and the module starts and sends."""

import contextlib
import json
import os
import queue
import random
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from visionedge.camera.registry import MAX_CAMERA_NAMES, RETENTION_S, SequencePosition, SequenceStore
from visionedge.config.load import parse_config
from visionedge.engine.plan import (
    AutotuneResult,
    LatencyFit,
    MeasuredPoint,
    OperatingPoint,
    PlanCache,
    PlanKey,
)
from visionedge.iothub.desired_properties import ConfigurationSources, DesiredDocument, LastGoodFile
from visionedge.model.model_store import ModelStore
from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool, SpoolOptions
from visionedge.outbound.sqlite_store import LostRange, MessageStore
from visionedge.runtime.files import (
    MAX_SET_ASIDE_FILES,
    DamagedStateFileError,
    read_json,
    remove_partial_files,
    set_aside,
    write_json,
)
from visionedge.runtime.threads import ThreadGroup

OWNER = "hub/press-7/vision"
WRONG_VALUES = {
    "text": "'abc'",
    "text that is no UTF-8": "CAST(x'fffe00' AS TEXT)",
    "bytes": "x'00ff00'",
    "negative": "-1",
    "the largest integer": "9223372036854775807",
    "infinity": "9e999",
    "a fraction": "0.5",
    "empty text": "''",
}


def _message(sequence_number: int) -> Message:
    return Message(
        "detections",
        b'{"n":1}',
        f"run-detections-{sequence_number}",
        {"schema": "s"},
        sequence_number,
        frames=1,
    )


def _spool(path: Path) -> Spool:
    return Spool(
        path,
        OWNER,
        ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}")),
        spool_options=SpoolOptions(memory_bytes=1_000_000, retry_s=10),
    )


def _filled(path: Path) -> None:
    """A spool with something in every table."""
    spool = _spool(path)
    spool.set_spent_source(lambda: {"2026-11-22": 3})
    for sequence_number in range(1, 4):
        spool.put(_message(sequence_number))
    spool._write_and_refill()
    assert spool._store is not None
    first = spool.peek()
    assert first is not None
    spool.settle(first, dropped="refused")
    spool._write_and_refill()
    assert spool._store.lost_ranges == [LostRange("detections", 1, 1, "refused", 1)]
    spool._close_store()


def _columns() -> Iterator[tuple[str, str]]:
    database = sqlite3.connect(":memory:")
    from visionedge.outbound.sqlite_store import _SCHEMA

    for statement in _SCHEMA.split(";"):
        database.execute(statement)
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        for row in database.execute(f"PRAGMA table_info({table})").fetchall():
            yield table, row[1]
    database.close()


def _goes_on(path: Path) -> list[str]:
    """Start with this file, send a message through the disk; the codes of the events."""
    spool = _spool(path)
    spool.put(_message(1000))
    got: list[int] = []
    for _ in range(6):
        spool._write_and_refill()
        while (message := spool.peek()) is not None:
            got.append(message.sequence_number)
            spool.settle(message)
    assert got[-1] == 1000
    assert spool.status().mode == "disk"
    codes: list[str] = [news.code for news in spool.take_events()]
    assert all(0 <= sequence_number < 2**53 for sequence_number in spool.last_numbers.values())
    spool._close_store()
    return codes


@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize(("table", "column"), list(_columns()))
def test_a_wrong_value_in_any_column_blocks_no_message(
    tmp_path: Path, table: str, column: str, value: str
) -> None:
    """The file is set aside with an event, or the value is one that the module can live with."""
    path = tmp_path / "spool.db"
    _filled(path)
    # SQLite itself refuses some: a key is always an integer.
    with sqlite3.connect(path) as database, contextlib.suppress(sqlite3.Error):
        database.execute(f"UPDATE OR REPLACE {table} SET {column} = {WRONG_VALUES[value]}")  # noqa: S608 - ours
    database.close()

    codes = _goes_on(path)

    assert set(codes) <= {"spool-lost"}
    assert path.with_name("spool.db.aside").exists() == bool(codes)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE loss",
        "DROP INDEX by_kind",
        "ALTER TABLE message RENAME COLUMN born_s TO born",
        "DELETE FROM owner",
        "INSERT INTO owner VALUES ('hub/press-7/vision', 5)",
        "CREATE TRIGGER no BEFORE INSERT ON message BEGIN SELECT RAISE(ABORT, 'no'); END",
        "PRAGMA user_version = 0",
        "PRAGMA user_version = 2000",
        "PRAGMA user_version = -1",
    ],
)
def test_a_file_with_another_schema_is_set_aside_and_not_deleted(tmp_path: Path, statement: str) -> None:
    """Its content is still there under the other name."""
    path = tmp_path / "spool.db"
    _filled(path)
    with sqlite3.connect(path) as database:
        database.execute(statement)
    database.close()
    assert _goes_on(path) == ["spool-lost"]
    aside = sqlite3.connect(path.with_name("spool.db.aside"))
    assert aside.execute("SELECT count(*) FROM message").fetchone() == (2,)
    aside.close()


@pytest.mark.parametrize(
    "change",
    ["properties = '['", "properties = '{\"a\": 1}'", "body = x'ff00ff'", "id = CAST(x'ff' AS TEXT)"],
)
def test_an_invalid_message_on_disk_is_dropped_alone(tmp_path: Path, change: str) -> None:
    """The next message is sent, and the cloud gets the number of the lost one."""
    path = tmp_path / "spool.db"
    _filled(path)
    with sqlite3.connect(path) as database:
        database.execute(f"UPDATE message SET {change} WHERE number = 2")  # noqa: S608 - ours
    database.close()
    spool = _spool(path)
    got = []
    for _ in range(4):
        spool._write_and_refill()
        while (message := spool.peek()) is not None:
            got.append(message.sequence_number)
            spool.settle(message)
    assert got == [3]
    losses = [(loss.first, loss.last, loss.reason) for loss in spool.take_lost_ranges()]
    assert losses == [(1, 1, "refused"), (2, 2, "unreadable")]
    assert len(spool) == 0
    spool._close_store()


@pytest.mark.parametrize("seed", range(60))
def test_random_bytes_in_the_file_block_no_message(tmp_path: Path, seed: int) -> None:
    """For any overwritten bytes, new messages go through the disk again."""
    path = tmp_path / "spool.db"
    _filled(path)
    chance = random.Random(seed)  # noqa: S311 - the same damage in every run
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 8, 200))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    assert set(_goes_on(path)) <= {"spool-lost", "spool-newer"}  # the version is one of the bytes


def test_a_path_that_is_not_a_regular_file_is_set_aside_and_not_opened(tmp_path: Path) -> None:
    """A named pipe would block for ever."""
    for sequence_number, make in enumerate((os.mkfifo, os.mkdir)):
        path = tmp_path / str(sequence_number) / "spool.db"
        path.parent.mkdir()
        make(path)
        assert _goes_on(path) == ["spool-lost"]


def test_a_message_that_the_file_cannot_store_is_dropped_alone(tmp_path: Path) -> None:
    """It is counted and reported as a loss; the messages before and after it arrive."""
    spool = _spool(tmp_path / "spool.db")
    for sequence_number in (1, 2, 3, 4):
        spool.put(_message(sequence_number))
    spool.put(Message("detections", b"x", "\ud800", {"schema": "s"}, 5))
    spool.put(_message(6))
    got = []
    for _ in range(5):
        spool._write_and_refill()
        while (message := spool.peek()) is not None:
            got.append(message.sequence_number)
            spool.settle(message)
    assert got == [1, 2, 3, 4, 6]
    assert dict(spool.dropped) == {"unwritable": 1}
    assert [(loss.first, loss.last, loss.reason) for loss in spool.take_lost_ranges()] == [
        (5, 5, "unwritable")
    ]
    spool._close_store()


def test_a_failed_spool_thread_ends_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart is better than a module that is ready and never sends."""
    deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
    thread_group = ThreadGroup(lambda name, _error: deaths.put(name))
    spool = Spool(tmp_path / "spool.db", OWNER, thread_group)

    def fails(*_: object) -> list[int]:
        raise TypeError("no such thing")

    monkeypatch.setattr(MessageStore, "select_evictions", fails)
    spool.start()
    spool.set_limits(spool._settings.limits)  # wakes it with nothing to write
    assert deaths.get(timeout=10) == "spool"
    assert thread_group.join(5) == []


def test_a_closed_spool_does_not_count_as_a_dead_thread(tmp_path: Path) -> None:
    """Its thread is vital, but may end on request."""
    thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    spool = Spool(tmp_path / "spool.db", OWNER, thread_group)
    spool.start()
    assert spool.close(5)
    assert thread_group.join(5) == []


# --- small files ------------------------------------------------------------------------------------------

WRONG_FILES: list[bytes] = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b"7",
    b'"text"',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b'{"dock": "x"}',
    b'{"dock": 1e999}',
    b'{"dock": -1}',
    b'{"dock": NaN}',
    b'{"dock": true}',
    b'{"dock": 99999999999999999999999999}',
    b'{"dock": ' + b"9" * 5000 + b"}",
    b'{"dock": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"dock": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"schema": "visionedge/sequences/99999", "cameras": {}}',
    b'{"schema": "visionedge/sequences/2", "cameras": {"dock": {"next": "x", "epoch": 0, "usedAt": 0}}}',
    b'{"schema": "visionedge/sequences/2", "cameras": [1]}',
    b" " * 5_000_000,
]


@pytest.mark.parametrize("content", WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_damaged_file_of_numbers_is_set_aside(tmp_path: Path, content: bytes) -> None:
    """The clock alone protects the numbers then, and new ones are kept again."""
    path = tmp_path / "sequences.json"
    path.write_bytes(content)
    sequences = SequenceStore(path, lambda: 2.0)
    assert sequences.first("dock") == 2000
    assert sequences.file.lost is not None
    assert path.with_name("sequences.json.aside").read_bytes() == content
    sequences.remember({"dock": SequencePosition(2005, 3)})
    again = SequenceStore(path, lambda: 1.0)
    assert (again.first("dock") > 2005, again.last_epoch("dock"), again.file.lost) == (True, 3, None)


@pytest.mark.parametrize("content", WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_damaged_file_of_desired_properties_is_set_aside(tmp_path: Path, content: bytes) -> None:
    """The module starts with its local configuration."""
    path = tmp_path / "desired.json"
    path.write_bytes(content)
    kept = LastGoodFile(path, OWNER)
    config_sources = ConfigurationSources.read({}, kept)
    assert config_sources.start.desired is None
    assert config_sources.start.config == parse_config({})
    assert kept.file.lost is not None
    assert path.with_name("desired.json.aside").exists()


@pytest.mark.parametrize("version", ["1e999", "-1", "true", '"7"', "1.5", "null", "9" * 400])
def test_a_version_of_desired_properties_that_is_not_a_number_is_damage(tmp_path: Path, version: str) -> None:
    """It would be answered to the hub."""
    path = tmp_path / "desired.json"
    LastGoodFile(path, OWNER).keep(DesiredDocument(7, {}))
    path.write_text(path.read_text().replace('"version": 7', f'"version": {version}'))
    kept = LastGoodFile(path, OWNER)
    assert kept.read() is None
    assert kept.file.lost is not None


def test_a_named_pipe_instead_of_a_state_file_does_not_block(tmp_path: Path) -> None:
    """It is set aside as any other damage."""
    path = tmp_path / "sequences.json"
    os.mkfifo(path)
    assert SequenceStore(path, lambda: 2.0).file.lost == "it is not a regular file"


def test_a_few_damaged_files_are_kept_and_the_oldest_is_deleted(tmp_path: Path) -> None:
    """The folder does not fill up with them."""
    path = tmp_path / "sequences.json"
    for sequence_number in range(MAX_SET_ASIDE_FILES + 3):
        path.write_text(str(sequence_number))
        set_aside(path)
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert kept == {"sequences.json.aside": "5", "sequences.json.aside.1": "4", "sequences.json.aside.2": "3"}


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves no empty file; a partial file of a kill is deleted at the next start."""
    path = tmp_path / "sequences.json"
    write_json(path, {"a": 1})

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["sequences.json"]
    assert read_json(path) == {"a": 1}
    (tmp_path / ".left.json.0a1b2c3d.part").touch()
    remove_partial_files(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["sequences.json"]


def test_removed_cameras_are_kept_for_four_hundred_days_and_ten_thousand_names(tmp_path: Path) -> None:
    """The oldest go first, and never one that runs."""
    now_s = 1_700_000_000.0
    path = tmp_path / "sequences.json"
    sequences = SequenceStore(path, lambda: now_s)
    sequences.remember({"old": SequencePosition(5, 2)})
    now_s += RETENTION_S - 1
    sequences.remember({"dock": SequencePosition(7, 1)})
    assert SequenceStore(path, lambda: now_s).last_epoch("old") == 2
    now_s += 2
    sequences.remember({"dock": SequencePosition(8, 1)})
    assert SequenceStore(path, lambda: now_s).last_epoch("old") == 0
    for sequence_number in range(3):
        now_s += 10
        sequences.remember(
            {f"cam{sequence_number}-{i}": SequencePosition(1, 4) for i in range(MAX_CAMERA_NAMES // 2)}
        )
    again = SequenceStore(path, lambda: now_s)
    assert [again.last_epoch(f"cam{sequence_number}-0") for sequence_number in range(3)] == [0, 4, 4]


def test_numbers_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """An update of the module repeats no number."""
    path = tmp_path / "sequences.json"
    path.write_text('{"dock": 5000}')
    sequences = SequenceStore(path, lambda: 1.0)
    assert sequences.first("dock") > 5000
    assert sequences.file.lost is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"choice": {"lanes": 10**9, "batch": 1}},
        {"choice": {"lanes": 1, "batch": 10**9}, "buckets": [10**9]},
        {"choice": {"lanes": "1", "batch": 1}},
        {"spentSeconds": "x"},
        {"buckets": []},
        {"table": 7},
    ],
)
def test_a_saved_plan_that_no_machine_can_run_is_refused(wrong: dict[str, object]) -> None:
    """A damaged plan must not start a thousand million threads."""
    sound = {
        "choice": {"lanes": 1, "batch": 1},
        "buckets": [1],
        "reason": "",
        "spentSeconds": 1.0,
        "table": [],
        "fits": [],
    }
    AutotuneResult.from_document(sound)
    with pytest.raises((ValueError, TypeError, KeyError)):
        AutotuneResult.from_document(json.loads(json.dumps({**sound, **wrong})))


def test_a_document_that_is_too_deep_is_damage(tmp_path: Path) -> None:
    """A recursive walk over it would end the module."""
    path = tmp_path / "a.json"
    path.write_text("[" * 65 + "]" * 65)
    with pytest.raises(DamagedStateFileError, match="deeply"):
        read_json(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"schema": 1}',
        b"\xff",
        b'{"schema": "visionedge/plan/1", "key": {}, "measured": {"spentSeconds": 1e999}}',
    ],
)
def test_a_damaged_plan_is_set_aside_and_measured_again(tmp_path: Path, content: bytes) -> None:
    """For any number of damaged files, the folder keeps three of them."""
    for cores in range(1, 6):
        key = PlanKey("a" * 64, "cpu", "a processor", ("1",), cores, 8, None)
        path = tmp_path / f"{key.name()}.json"
        path.write_bytes(content)
        assert PlanCache(tmp_path).load(key) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "damaged.aside",
        "damaged.aside.1",
        "damaged.aside.2",
    ]


def test_any_damaged_number_in_a_saved_plan_is_detected(tmp_path: Path) -> None:
    """It is found out, or is one that does no harm; no error gets through."""
    key = PlanKey("a" * 64, "cpu", "a processor", ("1",), 2, 8, None)
    line = MeasuredPoint(OperatingPoint(1, 1), 10.0, 100.0, 90.0, 3)
    plans = PlanCache(tmp_path)
    plans.store(
        key, AutotuneResult((line,), (LatencyFit(1, 100.0, 0.0),), OperatingPoint(1, 1), (1,), "why", 1.0)
    )
    path = tmp_path / f"{key.name()}.json"
    text = path.read_text()
    spots = [found.span() for found in re.finditer(r"(?<=[ :\[])\d+(\.\d+)?(?=[,}\]])", text)]
    assert len(spots) > 10
    for start, end in spots:
        for wrong in ("1e999", "-1", "null", '"x"', "[]", "{}", "9" * 400, "true"):
            path.write_text(text[:start] + wrong + text[end:])
            plans.load(key)


def test_a_named_pipe_instead_of_a_stored_model_does_not_block(tmp_path: Path) -> None:
    """Neither for the model, nor for a partial download."""
    kept = ModelStore(tmp_path)
    for end in ("onnx", "part"):
        path = tmp_path / "models" / f"{'a' * 64}.{end}"
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
    assert kept.find("a" * 64) is None
    with kept.open_partial("a" * 64) as part:
        part.write(b"x")
    assert part.size_bytes == 1
