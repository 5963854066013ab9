"""Conservation as a state machine: entered = left + lost + inside, in memory, on the disk and by the events.

Tracks walk, end, are not seen, get attributes and lose them; the camera reconnects or goes offline, models
and zones change, schedules open and close, tracking is off for a time, clocks jump, the module is killed,
starts without the disk, writes are repeated, a damaged file is replaced.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scene_paths import DOOR, HELMET, SQUARE, Place, SceneRun, camera_config, track_at
from visionedge.config.schema import CameraConfig
from visionedge.outbound.sqlite_store import open_database
from visionedge.scene.events import SceneEvent
from visionedge.scene.scene import SceneChanges
from visionedge.scene.totals import SceneStore

WIDE = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]
PLACES = st.tuples(st.sampled_from([0.05, 0.2, 0.45, 0.5, 0.52, 0.8]), st.sampled_from([0.2, 0.5, 0.9]))
MOVES = st.lists(st.tuples(*[st.none() | PLACES] * 3), min_size=1, max_size=5)
ZONES = st.fixed_dictionaries(
    {"polygon": st.sampled_from([SQUARE, WIDE])},
    optional={
        "minSeconds": st.sampled_from([0, 0.5, 2]),
        "classes": st.sampled_from([["person"], ["person", "car"]]),
        "anchor": st.sampled_from(["center", "bottom-center"]),
        "dwellSeconds": st.just(1),
        "occupancy": st.just({"atLeast": 2, "forSeconds": 0.5}),
        "empty": st.just({"forSeconds": 0.5}),
        "attributes": st.just({"helmet": "no"}),
        "schedule": st.sampled_from([{"from": "10:00", "to": "11:00"}, {"from": "22:00", "to": "10:30"}]),
    },
)
CAMERAS = st.fixed_dictionaries(
    {
        "zones": st.dictionaries(st.sampled_from(["a", "b"]), ZONES, min_size=1, max_size=2),
        "lines": st.sampled_from(
            [
                {},
                {"door": DOOR},
                {"door": {**DOOR, "end": [0.5, 0.9]}},
                {"door": {**DOOR, "attributes": {"helmet": "no"}}},
            ]
        ),
        "then": st.just(HELMET),
    }
)
Totals = dict[tuple[str, str, str], int]


def total_of(event: SceneEvent) -> tuple[str, str, str] | None:
    """Rule, total and label, from the document alone."""
    document = event.document()
    if event.type == "line-crossed":
        return document["line"], document["direction"], document["label"]
    if event.type in {"zone-entered", "zone-left", "zone-lost"}:
        return document["zone"], event.type.removeprefix("zone-"), document["label"]
    return None


class SceneMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.track_ids: list[int] = []
        self.labels: dict[int, str] = {}
        self.next_track = self.batch = 1
        self.stored: list[SceneEvent] = []
        self.tally: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.conditions: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.is_disk_away = False
        self.open_store()

    def open_store(self) -> None:
        def connect(path: Path) -> Any:
            self.database = open_database(path)
            self.database.execute("PRAGMA synchronous=OFF")
            return self.database

        self.store = SceneStore(Path(self.folder.name) / "scene.db", connect=connect)

    @initialize(keys=CAMERAS, moves=MOVES)
    def begin(self, keys: dict[str, Any], moves: list[tuple[Place | None, ...]]) -> None:
        self.config = camera_config(**keys)
        self.run = SceneRun(self.config)
        self.walk(moves, 0.5)

    def write(self) -> None:
        """Store what happened since the last time."""
        if self.is_disk_away:
            return
        changes, self.run.changes = self.run.changes, []
        if any(start.keeps_totals for change in changes for start in change.starts):
            # Those inside when the last run ended, of which a scene without the file knows nothing.
            wanted = {start.rule for change in changes for start in change.starts if start.keeps_totals}
            kept = self.store.load("dock")
            self.count(SceneChanges(tuple(e for name in wanted & kept.keys() for e in kept[name].visits)))
        found = self.store.write(changes, self.run.now, f"batch {self.batch}")
        self.batch += 1
        for start in found:
            self.run.scene.adopt(start.rule, start.kept)
        for change in changes:
            self.count(change, {start.rule for start in found})

    def count(self, change: SceneChanges, going_on: Collection[str] = ()) -> None:
        """The totals by the events alone, since each zone or line began; some go on without the file."""
        for event in change.events:
            self.stored.append(event)
            if (total := total_of(event)) is not None:
                self.tally[total] += 1
            elif event.type != "zone-dwell":
                types = self.conditions[(event.rule, event.condition[0] if event.condition else "")]
                if event.rule in going_on and types[-1:] == [event.type]:
                    continue  # a run without the file does not know that the condition was in force
                types.append(event.type)
        for start in change.starts:
            if start.keeps_totals and start.rule in going_on:
                continue
            for key in [key for key in self.tally if key[0] == start.rule]:
                del self.tally[key]
            for condition in [key for key in self.conditions if key[0] == start.rule]:
                del self.conditions[condition]

    # --- what may happen ----------------------------------------------------------------------------------

    def walk(self, moves: list[tuple[Place | None, ...]], after_s: float) -> None:
        """Three people, the last one in a car, go to places, or are not seen, for two pictures each."""
        while len(self.track_ids) < 3:
            self.track_ids.append(self.next_track)
            self.labels[self.next_track] = "person" if len(self.track_ids) < 3 else "car"
            self.next_track += 1
        for places in moves:
            tracks = [
                track_at(track_id, place, self.labels[track_id])
                for track_id, place in zip(self.track_ids, places, strict=True)
            ]
            for _ in range(2):
                self.run.picture(tracks, after_s=after_s)

    @rule(moves=MOVES, after_s=st.sampled_from([0.033, 0.3, 0.6, 2.5]))
    def pictures(self, moves: list[tuple[Place | None, ...]], after_s: float) -> None:
        self.walk(moves, after_s)

    @rule(moves=MOVES, ended=st.sets(st.integers(0, 2), min_size=1))
    def end_tracks(self, moves: list[tuple[Place | None, ...]], ended: set[int]) -> None:
        self.walk(moves, 0.5)
        gone = [self.track_ids[number] for number in ended]
        self.track_ids = [track_id for track_id in self.track_ids if track_id not in gone]
        self.run.picture(ended=gone)

    @rule(number=st.integers(0, 2), label=st.sampled_from(["yes", "no", None]))
    def answer(self, number: int, label: str | None) -> None:
        """A second model says something else of a track."""
        if number < len(self.track_ids):
            answers = {} if label is None else {"helmet": label}
            self.run.attributes[self.track_ids[number]] = answers

    @rule()
    def reconnect(self) -> None:
        self.run.epoch += 1

    @rule()
    def go_offline(self) -> None:
        """Longer than tracks live."""
        self.run._take(self.run.scene.end_all())
        self.track_ids = []
        self.run.at_s += 3600

    @rule()
    def change_model(self) -> None:
        self.run.model += "'"

    @rule(hours=st.sampled_from([-1, 0.25, 12]))
    def jump_clock(self, hours: float) -> None:
        self.run.now += timedelta(hours=hours)

    @rule(keys=CAMERAS)
    def edit(self, keys: dict[str, Any]) -> None:
        self.config = camera_config(**keys)
        self.run.configure(self.config)

    @rule(hours=st.sampled_from([0.01, 1]))
    def do_without_tracking(self, hours: float) -> None:
        """All tracks end; zones and lines stay."""
        self.run._take(self.run.scene.end_all())
        self.track_ids = []
        self.run.configure(self.config)
        self.run.at_s += 3600 * hours

    @rule()
    def replace_damaged_file(self) -> None:
        """The new file has everything but the events."""
        if self.is_disk_away:
            return
        self.store.close()
        Path(self.folder.name, "scene.db").unlink()
        self.open_store()
        document = self.run.scene.document()
        for key in [key for key in self.tally if key[0] not in {**document["zones"], **document["lines"]}]:
            del self.tally[key]
        self.run._take(self.run.scene.states())
        self.write()

    @rule()
    def store_visits(self) -> None:
        self.run._take(self.run.scene.open_visits())

    @rule()
    def write_now(self) -> None:
        self.write()

    @rule()
    def write_twice(self) -> None:
        """As if the first try was on the disk, and its answer was an error."""
        if self.is_disk_away or any(
            start.keeps_totals for change in self.run.changes for start in change.starts
        ):
            return
        self.store.write(self.run.changes, self.run.now, f"batch {self.batch}")
        self.write()

    @rule(
        config=st.none() | CAMERAS.map(lambda keys: camera_config(**keys)),
        written=st.booleans(),
        is_disk_away=st.booleans(),
    )
    def kill_and_start(self, config: CameraConfig | None, written: bool, is_disk_away: bool) -> None:
        """What was not written is gone; the configuration may be another one, and the disk come later."""
        if written:
            self.write()
        self.config = config or self.config
        self.store.close()
        self.open_store()
        self.track_ids, self.run.changes = [], []
        self.is_disk_away = is_disk_away
        self.run.restart(None if is_disk_away else self.store.load("dock"), self.config)

    @rule()
    def repair_disk(self) -> None:
        self.is_disk_away = False
        self.write()

    # --- what holds ---------------------------------------------------------------------------------------

    @invariant()
    def memory_is_conserved(self) -> None:
        for name, zone in self.run.scene.document()["zones"].items():
            labels = {label for total in ("entered", "left", "lost", "inside") for label in zone[total]}
            for label in labels:
                entered, left, lost, inside = (
                    zone[total].get(label, 0) for total in ("entered", "left", "lost", "inside")
                )
                assert entered == left + lost + inside, (name, label, zone)

    @invariant()
    def the_file_is_conserved_and_agrees_with_its_events(self) -> None:
        found: Totals = {}
        for name, kept in self.store.load("dock").items():
            inside = Counter(event.label for event in kept.visits)
            assert all(event.type == "zone-lost" for event in kept.visits)
            for total, counts in kept.totals.items():
                found |= {(name, total, label): count for label, count in counts.items()}
            if kept.shape == "zone":
                for label in {label for counts in kept.totals.values() for label in counts}:
                    of = {
                        total: kept.totals.get(total, {}).get(label, 0)
                        for total in ("entered", "left", "lost")
                    }
                    assert of["entered"] == of["left"] + of["lost"] + inside[label], (name, label)
        assert found == dict(self.tally)

    @invariant()
    def each_condition_begins_and_ends_in_turn(self) -> None:
        for types in self.conditions.values():
            assert types[::2] == types[:1] * len(types[::2]), types
            assert types[1::2] == types[1:2] * len(types[1::2]), types
            assert types[0] in {"zone-occupied", "zone-empty"}, types

    @invariant()
    def no_event_comes_twice(self) -> None:
        ids = Counter(event.id for event in self.stored)
        assert not [event_id for event_id, count in ids.items() if count > 1]

    @invariant()
    def evidence_is_bounded(self) -> None:
        for event in self.stored:
            assert len(event.evidence.get("path", ())) <= 64

    @invariant()
    def memory_and_file_agree_when_all_is_written(self) -> None:
        if self.run.changes:
            return
        document = self.run.scene.document()
        for name, kept in self.store.load("dock").items():
            for total, counts in kept.totals.items():
                if name not in {**document["zones"], **document["lines"]}:
                    continue  # not in the configuration of a run without the file: the next start removes it
                shown = document["zones" if kept.shape == "zone" else "lines"][name][total]
                assert {label: count for label, count in shown.items() if count} == counts

    def teardown(self) -> None:
        try:
            if hasattr(self, "run"):
                self.is_disk_away = False
                self.write()
                self.the_file_is_conserved_and_agrees_with_its_events()
                self.memory_and_file_agree_when_all_is_written()
        finally:
            self.store.close()
            self.folder.cleanup()


SceneMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestConservation = SceneMachine.TestCase
