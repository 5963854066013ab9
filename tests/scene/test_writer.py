"""The thread that stores scenes: an event leaves after it is stored, and a broken disk stops no event."""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from scene_paths import DOOR, SQUARE, START, SceneRun, camera_config
from visionedge.outbound.sqlite_store import open_database
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene import writer as writer_module
from visionedge.scene.totals import EventLimits, SceneStore
from visionedge.scene.writer import RETRY_S, SceneWriter

CONFIG = camera_config(zones={"queue": {"polygon": SQUARE}}, lines={"door": DOOR})


class WriterRun:
    """A scene and its writer, on a disk that can be made to fail; rounds of the thread are called by hand."""

    def __init__(self, path: Path, *, is_broken: bool = False, sequence: int = 0, **keys: Any) -> None:
        self.path = path
        self.now_s = 0.0
        self.is_broken = is_broken
        self.delivered: list[Mapping[str, Any]] = []
        self.check: Callable[[], None] = lambda: None
        self.writer = SceneWriter(
            path, EventLimits(), self.deliver, clock=lambda: self.now_s, now=self.now, connect=self.connect
        )
        config = camera_config(**keys) if keys else CONFIG
        self.run = SceneRun(config, self.writer.load("dock"))
        self.run.sequence = sequence

    def now(self) -> datetime:
        return START

    def connect(self, path: Path) -> sqlite3.Connection:
        if self.is_broken:
            raise sqlite3.OperationalError("disk I/O error")
        self.database = open_database(path)
        return self.database

    def deliver(self, documents: Sequence[Mapping[str, Any]]) -> None:
        self.check()
        self.delivered += documents

    def break_disk(self) -> None:
        self.is_broken = True
        self.database.execute("PRAGMA query_only=ON")

    def repair_disk(self) -> None:
        self.is_broken = False
        self.now_s += RETRY_S

    def put(self) -> None:
        """Hand over what the scene did, without a round of the thread."""
        for change in self.run.changes:
            self.writer.put(change)
        self.run.changes = []

    def walk(self, *xs: float, track_id: int = 1) -> None:
        self.run.walk([(x, 0.5) for x in xs], track_id)
        self.put()
        self.writer._write_waiting()

    def types(self) -> list[str]:
        return [document["type"] for document in self.delivered]

    def kill(self) -> None:
        if self.writer._store is not None:
            self.writer._store.close()

    def stored_totals(self) -> dict[str, Any]:
        """What the next start finds."""
        self.kill()
        store = SceneStore(self.path)
        found = {name: dict(kept.totals) for name, kept in store.load("dock").items()}
        store.close()
        return found


@pytest.fixture
def written(tmp_path: Path) -> Iterator[WriterRun]:
    run = WriterRun(tmp_path / "scene.db")
    yield run
    run.kill()


TWO = {"door": {"right-to-left": {"person": 2}}, "queue": {"entered": {"person": 2}}}


def test_an_event_is_delivered_after_it_and_its_totals_are_stored(written: WriterRun) -> None:
    found: list[Any] = []
    written.check = lambda: found.append(
        written.writer._store and written.writer._store.load("dock")["door"].totals
    )
    written.walk(0.4, 0.6)
    assert found == [{"right-to-left": {"person": 1}}]
    assert written.types() == ["zone-entered", "line-crossed"]
    assert written.writer.status().waiting == 0


def test_putting_changes_neither_stores_nor_delivers_them(written: WriterRun) -> None:
    written.run.walk([(0.4, 0.5)])
    written.put()
    assert written.delivered == []
    assert written.writer.status().waiting == 2


def test_a_broken_disk_delays_no_event_and_totals_are_stored_later(written: WriterRun) -> None:
    written.walk(0.4, 0.6)
    written.break_disk()
    written.walk(0.4, 0.6, track_id=2)
    assert written.types() == ["zone-entered", "line-crossed"] * 2
    state = written.writer.status()
    assert (state.mode, state.waiting) == ("memory", 2)
    assert state.reason == "attempt to write a readonly database"
    written.repair_disk()
    written.writer._write_waiting()
    assert written.writer.status().mode == "disk"
    assert written.types() == ["zone-entered", "line-crossed"] * 2
    assert written.stored_totals() == TWO


def test_a_file_that_opens_on_a_full_disk_is_not_said_to_be_used_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(WriterRun):
        is_full = False

        def connect(self, path: Path) -> sqlite3.Connection:
            database = super().connect(path)
            database.execute(f"PRAGMA query_only={self.is_full}")
            return database

    run = Full(tmp_path / "scene.db")
    run.walk(0.4, 0.6)
    run.is_full = True
    run.database.execute("PRAGMA query_only=ON")
    with caplog.at_level("INFO"):
        for track_id in (2, 3, 4):
            run.walk(0.4, 0.6, track_id=track_id)
            assert run.writer.status().mode == "memory"
            run.repair_disk()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        run.is_full = False
        run.writer._write_waiting()
    assert (run.writer.status().mode, run.writer.status().waiting) == ("disk", 0)
    assert "written to the disk again" in caplog.messages[-1]
    run.kill()


def test_a_disk_that_is_broken_at_the_start_is_tried_again(tmp_path: Path) -> None:
    class Broken(WriterRun):
        def connect(self, path: Path) -> sqlite3.Connection:
            if self.now_s < RETRY_S:
                raise sqlite3.OperationalError("unable to open database file")
            return super().connect(path)

    run = Broken(tmp_path / "scene.db")
    run.walk(0.4, 0.6)
    assert run.types() == ["zone-entered", "line-crossed"]
    run.now_s += RETRY_S
    run.walk(0.4, 0.6, track_id=2)
    assert run.types() == ["zone-entered", "line-crossed"] * 2
    assert run.stored_totals() == TWO


def count_with_a_disk_that_comes_later(path: Path, **keys: Any) -> WriterRun:
    """The last run has left one crossing and one inside; the next one counts the same without the disk."""
    last = WriterRun(path)
    last.walk(0.4, 0.6)
    last.writer.acknowledge([document["id"] for document in last.delivered])
    last.walk()
    last.kill()
    run = WriterRun(path, is_broken=True, sequence=100, **keys)
    run.walk(0.4, 0.6, track_id=2)
    assert run.run.scene.document()["lines"]["door"]["right-to-left"] == {"person": 1}
    run.repair_disk()
    run.walk(0.62, track_id=2)
    for start in run.writer.take_found_states():
        run.run.scene.adopt(start.rule, start.kept)
    assert run.writer.take_found_states() == []
    return run


def test_what_was_counted_without_the_disk_is_added_to_what_it_had(tmp_path: Path) -> None:
    run = count_with_a_disk_that_comes_later(tmp_path / "scene.db")
    document = run.run.scene.document()
    assert document["lines"]["door"]["right-to-left"] == {"person": 2}
    zone = document["zones"]["queue"]
    assert {name: zone[name] for name in ("inside", "entered", "left", "lost")} == {
        "inside": {"person": 1},
        "entered": {"person": 2},
        "left": {},
        "lost": {"person": 1},
    }
    assert zone["since"] == "2026-11-30T10:00:00.000Z"
    # The loss of who was inside at the end of the last run comes when its file is there.
    assert run.types() == ["zone-entered", "line-crossed", "zone-lost"]
    run.walk(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, track_id=2)
    totals = run.stored_totals()
    assert totals["door"] == {"right-to-left": {"person": 2}, "left-to-right": {"person": 1}}
    assert totals["queue"] == {name: {"person": n} for name, n in (("entered", 2), ("left", 1), ("lost", 1))}


def test_a_zone_that_was_edited_before_the_disk_came_begins_at_0(tmp_path: Path) -> None:
    wide = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]]}
    run = count_with_a_disk_that_comes_later(
        tmp_path / "scene.db", zones={"queue": wide}, lines={"door": DOOR}
    )
    assert run.run.scene.document()["zones"]["queue"]["entered"] == {"person": 1}
    assert run.types() == ["zone-entered", "line-crossed", "zone-lost"]
    assert run.stored_totals() == {
        "door": {"right-to-left": {"person": 2}},
        "queue": {"entered": {"person": 1}},
    }


def test_a_condition_that_was_in_force_in_the_last_run_ends_though_the_disk_came_later(
    tmp_path: Path,
) -> None:
    zones = {"queue": {"polygon": SQUARE, "occupancy": {"atLeast": 1}}}
    last = WriterRun(tmp_path / "scene.db", zones=zones)
    last.walk(0.4)
    last.writer.acknowledge([document["id"] for document in last.delivered])
    last.walk()
    last.kill()
    run = WriterRun(tmp_path / "scene.db", is_broken=True, sequence=100, zones=zones)
    run.walk(0.1)
    run.repair_disk()
    run.walk(0.1)
    for start in run.writer.take_found_states():
        run.run.scene.adopt(start.rule, start.kept)
    run.walk(0.1)
    assert last.types() + run.types() == ["zone-entered", "zone-occupied", "zone-lost", "zone-vacated"]
    run.kill()


def test_events_that_were_stored_and_not_delivered_at_a_kill_come_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "scene.db"
    first = WriterRun(path)

    def die() -> None:
        raise RuntimeError("killed")

    first.check = die
    with pytest.raises(RuntimeError):
        first.walk(0.4, 0.6)
    first.kill()
    second = WriterRun(path)
    second.walk()
    assert second.types() == ["zone-entered", "line-crossed", "zone-lost"]
    second.kill()


def test_events_that_were_not_acknowledged_come_again_after_a_kill(tmp_path: Path) -> None:
    first = WriterRun(tmp_path / "scene.db")
    first.walk(0.4, 0.6)
    first.writer.acknowledge([first.delivered[0]["id"]])
    first.walk()
    first.kill()
    second = WriterRun(tmp_path / "scene.db")
    second.walk()
    assert second.delivered[0] == first.delivered[1]
    assert second.types() == ["line-crossed", "zone-lost"]
    second.writer.acknowledge([document["id"] for document in second.delivered])
    second.walk()
    second.kill()
    third = WriterRun(tmp_path / "scene.db")
    third.walk()
    assert third.types() == []
    third.kill()


def test_only_so_many_events_are_delivered_before_others_are_acknowledged(
    written: WriterRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest waits in the file, in its order."""
    monkeypatch.setattr(writer_module, "MAX_UNACKNOWLEDGED", 3)
    for track_id in range(1, 6):
        written.walk(0.4, 0.6, track_id=track_id)
    assert len(written.delivered) == 3
    for count in range(3, 10):
        written.writer.acknowledge([written.delivered[count - 3]["id"]])
        written.walk()
        assert len(written.delivered) == count + 1
    written.kill()
    stored = SceneStore(written.path).events()
    assert [document["id"] for document in written.delivered] == [event["id"] for event in stored[::-1]]


def test_an_event_that_is_acknowledged_before_it_is_stored_is_not_delivered_again(written: WriterRun) -> None:
    """While the disk cannot be written."""
    written.walk(0.4)
    written.break_disk()
    written.walk(0.6)
    assert written.types() == ["zone-entered", "line-crossed"]
    written.writer.acknowledge([document["id"] for document in written.delivered])
    written.walk()
    written.repair_disk()
    written.walk()
    assert written.types() == ["zone-entered", "line-crossed"]
    assert written.writer.status().mode == "disk"
    written.kill()
    store = SceneStore(written.path)
    assert store.waiting(10) == []
    store.close()


def test_without_the_disk_too_only_so_many_events_are_delivered(
    written: WriterRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_UNACKNOWLEDGED", 3)
    written.break_disk()
    for track_id in range(1, 4):
        written.walk(0.4, 0.6, track_id=track_id)
    assert len(written.delivered) == 3
    written.writer.acknowledge([document["id"] for document in written.delivered])
    written.walk()
    assert written.types() == ["zone-entered", "line-crossed"] * 3


def test_a_flush_returns_when_the_thread_has_delivered_all_changes(tmp_path: Path) -> None:
    run = WriterRun(tmp_path / "scene.db")
    threads = ThreadGroup(lambda _name, _error: None)
    run.writer.start(threads)
    for track_id in range(20):
        run.run.walk([(0.4, 0.5), (0.6, 0.5)], track_id)
        run.put()
    assert run.writer.flush(20)
    assert len(run.delivered) == 40
    run.writer.acknowledge([document["id"] for document in run.delivered])
    run.writer.close()
    assert threads.join(20) == []
    store = SceneStore(run.path)
    assert store.waiting(100) == []
    store.close()


def test_after_too_many_changes_the_file_stays_as_it_was_and_events_go_on(
    written: WriterRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with a part of what happened would not be conserved."""
    monkeypatch.setattr(writer_module, "MAX_WAITING", 10)
    written.walk(0.4, 0.6)
    written.break_disk()
    for track_id in range(2, 30):
        written.walk(0.4, 0.6, track_id=track_id)
    written.repair_disk()
    written.walk(0.4, 0.6, track_id=30)
    assert written.types() == ["zone-entered", "line-crossed"] * 30
    assert written.writer.status().waiting == 0
    assert written.stored_totals() == {
        "door": {"right-to-left": {"person": 1}},
        "queue": {"entered": {"person": 1}},
    }


def test_a_file_that_is_damaged_while_the_module_runs_is_set_aside(
    written: WriterRun, caplog: pytest.LogCaptureFixture
) -> None:
    written.walk(0.4, 0.6)
    written.database.execute("DROP TABLE total")
    written.walk(0.4, 0.6, track_id=2)
    assert "scene.db cannot be used: no such table: total; it was set aside" in caplog.text
    assert written.types() == ["zone-entered", "line-crossed"] * 2
    written.walk(0.9, track_id=2)
    assert written.writer.status().mode == "disk"
    assert written.writer.status().lost == "no such table: total"
    assert written.path.with_name("scene.db.aside").exists()
    assert written.writer.take_replaced()
    assert not written.writer.take_replaced()
    written.writer.put(written.run.scene.states())
    written.walk(0.9, track_id=2)
    kept = written.writer.load("dock")
    assert kept is not None
    assert [event.track_id for event in kept["queue"].visits] == [1, 2]
    assert written.stored_totals() == TWO


def test_a_file_that_is_damaged_or_newer_at_the_start_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scene.db"
    path.write_bytes(b"x" * 10_000)
    WriterRun(path).kill()
    assert caplog.messages == [
        "scene: scene.db cannot be used: file is not a database; it was set aside, a new file begins with"
        " the totals of this run"
    ]
    database = open_database(path)
    database.execute("DROP TABLE visit")
    database.execute("PRAGMA user_version=7")
    database.close()
    run = WriterRun(path)
    run.kill()
    assert caplog.messages[1:] == [f"scene: {run.writer.status().newer}"]


def test_the_thread_writes_the_rest_and_ends(tmp_path: Path) -> None:
    run = WriterRun(tmp_path / "scene.db")
    threads = ThreadGroup(lambda _name, _error: None)
    run.writer.start(threads)
    run.run.walk([(0.4, 0.5), (0.6, 0.5)])
    run.put()
    run.writer.close()
    assert threads.join(20) == []
    assert run.types() == ["zone-entered", "line-crossed"]
    assert run.stored_totals()["door"] == {"right-to-left": {"person": 1}}


def test_another_bound_holds_from_the_next_transaction_on(written: WriterRun) -> None:
    written.walk(0.4, 0.6)
    written.writer.set_limits(EventLimits(limit_bytes=1000))
    written.walk(0.4, 0.6, track_id=2)
    assert [event["trackId"] for event in written.writer.events()] == [2]


def test_what_is_stored_can_be_asked_for(written: WriterRun) -> None:
    written.walk(0.4, 0.6)
    assert [event["type"] for event in written.writer.events(limit=5)] == ["line-crossed", "zone-entered"]
    assert len(written.writer.counts("dock", START, START.replace(hour=23), "day")) == 2
    assert written.writer.cameras() == ["dock"]


def test_numbers_of_tracks_cannot_be_reserved_without_the_disk_and_can_afterwards(
    tmp_path: Path,
) -> None:
    run = WriterRun(tmp_path / "scene.db")
    assert run.writer.reserve_track_ids("dock", 1_000)
    run.break_disk()
    assert not run.writer.reserve_track_ids("dock", 2_000)
    assert run.writer.last_track_id("dock") is None
    run.repair_disk()
    run.writer._write_waiting()
    assert run.writer.last_track_id("dock") == 1_000
    run.kill()
