"""The file of the scenes: what a kill leaves, what is deleted, and what other versions and damage do."""

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from scene_paths import DOOR, SQUARE, START, SceneRun, camera_config, track_at
from visionedge.outbound.sqlite_store import StoreFormat, open_database
from visionedge.scene import totals
from visionedge.scene.events import parse_event
from visionedge.scene.scene import SceneChanges
from visionedge.scene.totals import SCENE_FORMAT, EventLimits, SceneStore, open_scene_store

QUEUE = {"queue": {"polygon": SQUARE}}


class StoredRun:
    """A scene whose changes are written after each step, and that may be killed."""

    def __init__(self, path: Path, limits: EventLimits | None = None, **keys: Any) -> None:
        self.path, self.limits = path, limits
        self.config = camera_config(**{"zones": QUEUE, "lines": {"door": DOOR}, **keys})
        self.batch = 0
        self.store = SceneStore(path, limits)
        self.run = SceneRun(self.config, self.store.load("dock"))
        self.write()

    def write(self) -> None:
        changes, self.run.changes = self.run.changes, []
        self.batch += 1
        self.store.write(changes, self.run.now, f"{id(self)}-{self.batch}")

    def walk(self, *xs: float, track_id: int = 1) -> None:
        self.run.walk([(x, 0.5) for x in xs], track_id)
        self.write()

    def kill(self, **keys: Any) -> None:
        """The process is gone without a word, and another one starts."""
        self.store.close()
        self.config = camera_config(**{"zones": QUEUE, "lines": {"door": DOOR}, **keys})
        self.store = SceneStore(self.path, self.limits)
        self.run.changes, self.run.events = [], []
        self.run.restart(self.store.load("dock"), self.config)
        self.write()

    def zone(self) -> dict[str, Any]:
        zone: dict[str, Any] = self.run.scene.document()["zones"]["queue"]
        return zone


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scene.db"


@pytest.fixture
def stored(path: Path) -> Iterator[StoredRun]:
    run = StoredRun(path)
    yield run
    run.store.close()


def test_who_was_inside_at_a_kill_is_lost_at_the_next_start(stored: StoredRun) -> None:
    stored.walk(0.4, 0.45, 0.6)
    entered = stored.run.events[0]
    stored.kill()
    (lost,) = stored.run.events
    assert (lost.type, lost.track_id, lost.label) == ("zone-lost", 1, "person")
    assert lost.at == entered.at
    assert stored.zone() | {"since": None} == {
        "since": None,
        "inside": {},
        "entered": {"person": 1},
        "left": {},
        "lost": {"person": 1},
    }
    assert stored.run.scene.document()["lines"]["door"]["right-to-left"] == {"person": 1}
    stored.kill()
    assert stored.run.events == []
    assert stored.zone()["lost"] == {"person": 1}


def test_the_loss_at_a_start_has_the_last_stored_position(stored: StoredRun) -> None:
    stored.walk(0.4, 0.45)
    stored.walk(*[0.6] * 20)
    stored.run._take(stored.run.scene.open_visits())
    stored.write()
    stored.kill()
    (lost,) = stored.run.events
    assert lost.sequence == 22
    assert lost.evidence["path"][-1] == [22, 0.6, 0.5]
    assert len(lost.evidence["path"]) <= 8


def test_the_loss_at_a_start_has_the_id_of_the_same_loss_without_a_kill(path: Path) -> None:
    """So that both are one event for whoever receives them."""
    stored = StoredRun(path)
    stored.walk(0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    (due,) = stored.run.scene.open_visits().visits
    stored.run.picture(ended=[1])
    assert stored.run.events[-1].id == due.id
    stored.store.close()


def test_an_edited_zone_begins_at_0_with_another_since(stored: StoredRun) -> None:
    stored.walk(0.5, 0.5)
    since = stored.zone()["since"]
    stored.run.configure(camera_config(zones={"queue": {"polygon": SQUARE, "minSeconds": 2}}))
    assert stored.zone()["since"] == since
    assert stored.zone()["inside"] == {"person": 1}
    stored.run.configure(camera_config(zones={"queue": {"polygon": SQUARE, "anchor": "center"}}))
    assert stored.run.types == ["zone-entered", "zone-lost"]
    assert stored.zone()["since"] > since
    assert stored.zone()["entered"] == {}
    stored.write()
    assert stored.store.load("dock")["queue"].totals == {}
    stored.walk(0.5)
    assert stored.zone()["entered"] == {"person": 1}


def test_a_zone_that_was_edited_while_the_module_was_off_begins_at_0_too(stored: StoredRun) -> None:
    stored.walk(0.5, 0.5)
    stored.kill(zones={"queue": {"polygon": SQUARE, "classes": ["person"]}})
    assert stored.run.types == ["zone-lost"]
    assert stored.zone()["entered"] == stored.zone()["lost"] == {}
    assert stored.store.load("dock")["queue"].totals == {}


def test_a_zone_that_is_gone_loses_who_was_inside_and_its_totals(stored: StoredRun) -> None:
    stored.walk(0.5, 0.5)
    stored.kill(zones={})
    assert stored.run.types == ["zone-lost"]
    assert list(stored.store.load("dock")) == ["door"]
    stored.kill(zones={}, lines={})
    assert stored.store.cameras() == []


def test_what_was_occupied_at_a_kill_is_vacated_after_it(path: Path) -> None:
    zones = {"queue": {"polygon": SQUARE, "occupancy": {"atLeast": 1}, "empty": {"forSeconds": 0.05}}}
    stored = StoredRun(path, zones=zones)
    stored.walk(0.5, 0.5)
    assert stored.run.types == ["zone-entered", "zone-occupied"]
    stored.kill(zones=zones)
    for _ in range(3):
        stored.run.picture()
    stored.write()
    assert stored.run.types == ["zone-lost", "zone-vacated", "zone-empty"]
    stored.kill(zones=zones)
    for _ in range(3):
        stored.run.picture()
    assert stored.run.types == []
    stored.store.close()


def test_ended_tracks_leave_nothing_behind(stored: StoredRun) -> None:
    for track_id in range(1, 50):
        stored.walk(0.4, 0.6, track_id=track_id)
        stored.run.picture(ended=[track_id])
    scene = stored.run.scene
    assert not scene._tracks
    assert not any(states for zone in scene._zones.values() for states in zone.states.values())
    assert not any(states for line in scene._lines.values() for _, states in line.on_path)


# --- the log of events --------------------------------------------------------------------------------------


def test_events_wait_until_they_are_handed_over_over_a_kill(stored: StoredRun) -> None:
    stored.walk(0.4, 0.6)
    waiting = stored.store.waiting(10)
    assert [document["type"] for _, document in waiting] == ["zone-entered", "line-crossed"]
    stored.store.acknowledge([waiting[0][1]["id"]])
    stored.kill()
    assert [document["type"] for _, document in stored.store.waiting(10)] == ["line-crossed", "zone-lost"]


def test_events_are_found_by_each_of_their_properties_newest_first(stored: StoredRun) -> None:
    for track_id in range(1, 6):
        stored.walk(0.4, 0.6, track_id=track_id)
        stored.run.picture(ended=[track_id])
    stored.write()
    found = stored.store.events(event_type="line-crossed", limit=2)
    assert [event["trackId"] for event in found] == [5, 4]
    older = stored.store.events(event_type="line-crossed", before=found[-1]["id"])
    assert [event["trackId"] for event in older] == [3, 2, 1]
    assert len(stored.store.events(rule="queue", label="person", camera="dock")) == 10
    assert stored.store.events(camera="yard") == stored.store.events(label="car") == []
    event = stored.run.events[-1]
    assert parse_event(stored.store.events(limit=1)[0]).document() == event.document()


def test_the_log_is_bounded_by_its_bytes_and_totals_stay(path: Path) -> None:
    stored = StoredRun(path, EventLimits(limit_bytes=20_000))
    for track_id in range(1, 200):
        stored.walk(0.4, 0.6, track_id=track_id)
        stored.run.picture(ended=[track_id])
    stored.write()
    kept = stored.store.events(limit=1000)
    assert 10 < len(kept) < 40
    assert kept[0]["trackId"] == 199
    assert stored.store.dropped == 3 * 199 - len(kept)
    assert stored.zone()["lost"] == {"person": 199}
    assert stored.store.load("dock")["queue"].totals["lost"] == {"person": 199}
    stored.store.close()


def test_events_and_counts_are_deleted_after_their_days(path: Path) -> None:
    stored = StoredRun(path, EventLimits(days=2))
    stored.walk(0.4, 0.6)
    for days, events, counts in ((1.9, 2, 2), (2.1, 0, 2), (31.5, 0, 0)):
        stored.store.write([], START + timedelta(days=days), f"after {days}")
        assert len(stored.store.events()) == events
        found = stored.store.counts("dock", START - timedelta(days=1), START + timedelta(days=40))
        assert len(found) == counts, days
    assert stored.store.load("dock")["queue"].totals == {"entered": {"person": 1}}
    stored.store.close()


def test_counts_by_hour_and_by_day(stored: StoredRun) -> None:
    for hour in (0, 0, 1, 20):
        stored.run.now = START + timedelta(hours=hour)
        stored.walk(0.1, 0.9, 0.1)
    begin, end = START.replace(hour=0), START + timedelta(days=2)
    by_hour = stored.store.counts("dock", begin, end)
    assert [(row.start.hour, row.total, row.count) for row in by_hour] == [
        (10, "left-to-right", 2),
        (10, "right-to-left", 2),
        (11, "left-to-right", 1),
        (11, "right-to-left", 1),
        (6, "left-to-right", 1),
        (6, "right-to-left", 1),
    ]
    by_day = stored.store.counts("dock", begin, end, "day")
    assert [(row.start, row.total, row.count) for row in by_day if row.total == "left-to-right"] == [
        (datetime(2026, 11, 30, tzinfo=UTC), "left-to-right", 3),
        (datetime(2026, 12, 1, tzinfo=UTC), "left-to-right", 1),
    ]
    assert stored.store.counts("dock", begin, START.replace(hour=10)) == []
    assert len(stored.store.counts("dock", START + timedelta(hours=1), end)) == 4


def test_an_event_that_comes_again_in_another_batch_counts_once(stored: StoredRun) -> None:
    stored.walk(0.4, 0.6)
    before = repr(stored.store), stored.store.load("dock")
    stored.store.write([SceneChanges(tuple(stored.run.events))], stored.run.now, "again")
    assert repr(stored.store) == before[0]
    assert stored.store.load("dock")["door"] == before[1]["door"]
    assert stored.store.load("dock")["queue"].totals == before[1]["queue"].totals


def test_a_failed_write_changes_nothing(stored: StoredRun) -> None:
    stored.walk(0.4, 0.45)
    before = repr(stored.store), stored.store.load("dock")
    stored.run.walk([(0.6, 0.5)])
    stored.store._db.execute("PRAGMA query_only=ON")
    with pytest.raises(sqlite3.Error):
        stored.store.write(stored.run.changes, stored.run.now, "x")
    stored.store._db.execute("PRAGMA query_only=OFF")
    assert (repr(stored.store), stored.store.load("dock")) == before
    stored.write()
    assert stored.store.load("dock")["door"].totals == {"right-to-left": {"person": 1}}


# --- other versions, damage ---------------------------------------------------------------------------------


def upgraded(lowest: int) -> StoreFormat:
    """A made-up next format; `lowest`: the lowest version that can use its file."""
    upgrade = f"CREATE TABLE compatibility AS SELECT {lowest} AS min_reader; CREATE TABLE note(text TEXT)"
    return StoreFormat((upgrade,), SCENE_FORMAT.schema)


def make_next_version(path: Path, lowest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(totals, "SCENE_FORMAT", upgraded(lowest))
        stored = StoredRun(path)
        stored.walk(0.4, 0.6)
        stored.store.close()


def test_the_file_of_a_newer_version_is_used_where_that_version_lets_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_version(path, 1, monkeypatch)
    opened = open_scene_store(path)
    assert opened.store is not None
    assert opened.newer is None
    assert opened.store.load("dock")["door"].totals == {"right-to-left": {"person": 1}}
    opened.store.close()


def test_the_file_of_a_newer_version_stays_and_another_one_beside_it_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_version(path, 2, monkeypatch)
    content = path.read_bytes()
    opened = open_scene_store(path)
    assert opened.store is not None
    assert opened.newer == (
        "scene.db was written by a newer version of visionedge (format 2, this version reads up to 1): it"
        " stays as it is, and this version counts in scene.1.db; install the newer version again to use it"
    )
    assert opened.store.cameras() == []
    opened.store.close()
    assert path.read_bytes() == content
    assert path.with_name("scene.1.db").exists()


def count_with_the_older_version(path: Path, **keys: Any) -> StoredRun:
    """Beside the file of the newer version: one has entered and left over the line, another one is inside."""
    opened = open_scene_store(path)
    assert opened.store is not None
    opened.store.close()
    stored = StoredRun(opened.store.path, **keys)
    stored.run.sequence += 1_000
    stored.walk(0.4, 0.45, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, track_id=1_001)
    stored.walk(0.4, 0.4, track_id=1_002)
    stored.store.reserve_track_ids("dock", 1_002)
    stored.store.close()
    return stored


def test_the_newer_version_adds_what_an_older_one_has_counted_beside_its_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_version(path, 2, monkeypatch)  # one has crossed and is inside
    count_with_the_older_version(path)
    monkeypatch.setattr(totals, "SCENE_FORMAT", upgraded(2))
    for _ in range(2):
        opened = open_scene_store(path)
        assert opened.store is not None
        store = opened.store
        kept = store.load("dock")
        assert kept["door"].totals == {"right-to-left": {"person": 2}}
        assert kept["queue"].totals == {"entered": {"person": 3}, "left": {"person": 1}}
        assert [event.track_id for event in kept["queue"].visits] == [1, 1_002]
        assert len(store.events()) == 6
        assert store.events()[-1]["trackId"] == 1
        assert sum(row.count for row in store.counts("dock", START, START + timedelta(hours=1))) == 6
        assert store.last_track_id("dock") == 1_002
        store.close()
    assert not path.with_name("scene.1.db").exists()


def test_what_is_added_counts_once_though_the_other_file_cannot_be_deleted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_version(path, 2, monkeypatch)
    count_with_the_older_version(path)
    content = path.with_name("scene.1.db").read_bytes()
    monkeypatch.setattr(totals, "SCENE_FORMAT", upgraded(2))
    for number in range(3):
        path.with_name("scene.1.db").write_bytes(content)
        opened = open_scene_store(path)
        assert opened.store is not None
        opened.store.write([], START, str(number))
        assert opened.store.load("dock")["door"].totals == {"right-to-left": {"person": 2}}
        opened.store.close()


def test_a_zone_that_was_edited_under_the_older_version_has_its_totals_and_since(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_version(path, 2, monkeypatch)
    wide = {"polygon": [[0, 0], [0, 1], [1, 1], [1, 0]]}
    older = count_with_the_older_version(path, zones={"queue": wide})
    monkeypatch.setattr(totals, "SCENE_FORMAT", upgraded(2))
    opened = open_scene_store(path)
    assert opened.store is not None
    kept = opened.store.load("dock")["queue"]
    assert kept.totals == {"entered": {"person": 2}}
    assert kept.definition == older.run.scene._zones["queue"].definition
    assert [event.track_id for event in kept.visits] == [1_001, 1_002]
    # Who was inside the old zone is lost, before anything that the older version has seen.
    assert [(event["type"], event["trackId"]) for event in opened.store.events()[::-1]] == [
        ("zone-entered", 1),
        ("line-crossed", 1),
        ("zone-lost", 1),
        ("zone-entered", 1_001),
        ("line-crossed", 1_001),
        ("zone-entered", 1_002),
    ]
    opened.store.close()


def test_numbers_of_tracks_go_on_beside_a_newer_file_and_after_a_damaged_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_version(path, 2, monkeypatch)
    database = open_database(path)
    database.execute("INSERT INTO track VALUES ('dock', 5000)")
    database.close()
    opened = open_scene_store(path)
    assert opened.store is not None
    assert opened.store.last_track_id("dock") == 5_000
    opened.store._db.execute("DROP TABLE visit")
    opened.store.close()
    opened = open_scene_store(path)
    assert opened.store is not None
    assert (opened.lost, opened.store.last_track_id("dock")) == ("the schema was changed", 5_000)
    opened.store.close()


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE visit",
        "UPDATE total SET count = 'many'",
        "UPDATE rule SET since = 'yesterday'",
        "UPDATE visit SET document = '{}'",
        "UPDATE visit SET document = x'ff00'",
        "PRAGMA user_version=-3",
    ],
)
def test_a_damaged_file_is_set_aside_and_a_new_one_begins(path: Path, damage: str) -> None:
    stored = StoredRun(path)
    stored.walk(0.4, 0.6)
    stored.store._db.execute(damage)
    stored.store.close()
    opened = open_scene_store(path)
    assert opened.store is not None
    assert opened.lost
    assert opened.store.cameras() == []
    opened.store.close()
    assert path.with_name("scene.db.aside").exists()


def test_a_file_that_is_no_database_is_set_aside(path: Path) -> None:
    path.write_bytes(b"x" * 10_000)
    opened = open_scene_store(path)
    assert opened.store is not None
    assert opened.lost
    opened.store.close()


def test_a_file_that_another_process_uses_gives_a_reason(path: Path) -> None:
    database = open_database(path)
    database.execute("CREATE TABLE other(x)")
    opened = open_scene_store(path)
    assert opened.store is None
    assert opened.reason == "database is locked"
    database.close()


def test_visits_of_a_change_are_stored_only_while_they_last(stored: StoredRun) -> None:
    """The store of positions may come after the end of a visit."""
    stored.walk(0.5, 0.5)
    late = stored.run.scene.open_visits()
    stored.run.picture([track_at(2, (0.1, 0.1))], ended=[1])
    stored.write()
    stored.store.write([SceneChanges(visits=late.visits)], stored.run.now, "late")
    assert stored.store.load("dock")["queue"].visits == ()


def test_numbers_of_tracks_that_are_reserved_never_fall_and_stay_when_a_zone_goes(tmp_path: Path) -> None:
    store = SceneStore(tmp_path / "scene.db")
    assert store.last_track_id("dock") is None
    store.reserve_track_ids("dock", 2_000)
    store.reserve_track_ids("dock", 1_000)
    store.reserve_track_ids("gate", 7)
    store.close()
    store = SceneStore(tmp_path / "scene.db")
    assert (store.last_track_id("dock"), store.last_track_id("gate")) == (2_000, 7)
    store.close()


def test_the_folder_of_the_file_is_made_and_one_that_cannot_be_made_gives_a_reason(tmp_path: Path) -> None:
    opened = open_scene_store(tmp_path / "new" / "data" / "scene.db")
    assert opened.store is not None
    opened.store.close()
    (tmp_path / "file").touch()
    opened = open_scene_store(tmp_path / "file" / "data" / "scene.db")
    assert opened.store is None
    assert opened.reason is not None
    assert "Not a directory" in opened.reason
