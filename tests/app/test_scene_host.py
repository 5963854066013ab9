"""Scenes of the running module: tracks, events and totals of cameras, over changes, restarts and kills."""

import asyncio
import json
import re
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fake_backend import result as make_result
from spatial_analysis_schema import find_problems
from visionedge.app.metrics import Metrics, collect_samples
from visionedge.app.scene_host import SceneHost
from visionedge.app.state import AppState
from visionedge.app.status import build_status
from visionedge.config.load import parse_config
from visionedge.frames.types import Detections, FrameResult
from visionedge.iothub.delivery import Delivery
from visionedge.outbound.sqlite_store import open_database
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene.events import EventFilter
from visionedge.scene.spatial_analysis import build_insights
from visionedge.scene.totals import SceneStore, UnknownEventError
from visionedge.web.documents import SceneDocument

START = datetime(2026, 11, 30, 10, tzinfo=UTC)
DOOR = {"start": [0.5, 0.1], "end": [0.5, 0.95], "minSeconds": 0}
LEFT = {"polygon": [[0, 0], [0, 1], [0.4, 1], [0.4, 0]], "minSeconds": 0}
CAMERA = {"uri": "demo:", "lines": {"door": DOOR}, "zones": {"left": LEFT}}


class HostRun:
    """One process of the module: a host, its thread, and a clock that goes on over restarts."""

    sequence = 0
    at_s = 1_000.0

    def __init__(
        self, data: Path, *, camera: Any = CAMERA, telemetry: Any = None, models: Any = None, **cameras: Any
    ) -> None:
        self.data = data
        self.document: dict[str, Any] = {
            "cameras": {"dock": camera, **cameras},
            "telemetry": telemetry or {},
            "models": models or {},
        }
        self.delivered: list[Mapping[str, Any]] = []
        self.threads = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
        self.state = AppState.of(parse_config(self.document), data, {}, lambda: None)
        self.host = SceneHost(
            self.state.snapshot,
            data,
            self.threads,
            deliver=self.delivered.extend,
            clock=lambda: self.at_s,
            now=lambda: self.now,
        )

    @property
    def now(self) -> datetime:
        return START + timedelta(seconds=self.at_s)

    async def configure(self, **cameras: Any) -> None:
        document = {**self.document, "cameras": cameras or self.document["cameras"]}
        await self.host.configure(parse_config(document).cameras)

    def show(self, *xs: float, score: float = 0.9) -> FrameResult:
        """Pictures with a person whose feet are at these places; the last result."""
        return [self.show_one(x, score) for x in xs][-1]

    def show_one(self, x: float, score: float = 0.9, *, is_reported: bool = True) -> FrameResult:
        HostRun.sequence += 1
        HostRun.at_s += 0.1
        box = np.array([[x - 0.05, 0.3, x + 0.05, 0.7]], np.float32)
        found = Detections(box, np.array([score], np.float32), np.zeros(1, np.int32))
        plain = make_result("dock", self.sequence)
        frame = replace(plain.frame, captured_ns=round(self.at_s * 1e9), captured_utc=self.now)
        reported = found if is_reported else found.first(0)
        return self.host.update(replace(plain, frame=frame, detections=reported, candidates=found))

    def totals(self) -> dict[str, int]:
        scene = self.host.document("dock")
        counts = {**scene["zones"].get("left", {}), **scene["lines"].get("door", {})}
        return {name: sum(by_label.values()) for name, by_label in counts.items() if name != "since"}

    def close(self) -> None:
        assert self.host.flush(5)
        assert self.host.close(5)
        assert self.threads.alive() == []


def play(run: HostRun, scenario: Callable[[HostRun], Awaitable[None]]) -> None:
    """Configure, play and stop."""

    async def whole() -> None:
        await run.configure()
        try:
            await scenario(run)
        finally:
            run.close()

    asyncio.run(whole())


WALK = (0.2, 0.22, 0.25, 0.27, 0.3, 0.35, 0.45, 0.55, 0.6)


def stored_types(data: Path) -> list[str]:
    store = SceneStore(data / "scene.db")
    types = [event["type"] for event in store.events()]
    store.close()
    return types[::-1]


def test_who_walks_through_a_zone_over_a_line_is_counted_and_stored(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        first, last = run.show(0.2), run.show(*WALK)
        assert first.track_ids == (None,)
        assert last.track_ids is not None
        assert None not in last.track_ids
        zone = {"inside": 0, "entered": 1, "left": 1, "lost": 0}
        assert run.totals() == {**zone, "left-to-right": 0, "right-to-left": 1}
        for camera in ("dock", "of no configuration"):
            document = run.host.document(camera)
            assert SceneDocument.model_validate(document, strict=True).dump() == document

    play(HostRun(tmp_path), scenario)
    assert stored_types(tmp_path) == ["zone-entered", "zone-left", "line-crossed"]


def test_over_a_restart_totals_stay_who_was_inside_is_lost_and_numbers_do_not_repeat(tmp_path: Path) -> None:
    ids: list[Any] = []

    async def scenario(run: HostRun) -> None:
        ids.append(run.show(*WALK[:6]).track_ids)

    for inside in range(3):
        run = HostRun(tmp_path)
        play(run, scenario)
        zone = {"inside": 1, "entered": inside + 1, "left": 0, "lost": inside}
        assert run.totals() == {**zone, "left-to-right": 0, "right-to-left": 0}
    assert len({*ids}) == 3
    assert ids == sorted(ids)


def test_messages_of_spatial_analysis_are_complete_over_a_restart(tmp_path: Path) -> None:
    """The count at the start, and the exit of one who was inside at the stop; other formats see no more."""
    documents: list[Any] = []

    async def scenario(run: HostRun) -> None:
        run.show(*WALK[:6])

    for _ in range(2):
        run = HostRun(tmp_path, telemetry={"format": "spatial-analysis"})
        play(run, scenario)
        documents += [build_insights(json.loads(json.dumps(each))) for each in run.delivered]
    assert [find_problems(document) for document in documents] == [[]] * len(documents)
    # The first one comes again, as nothing acknowledged it: with its ids.
    events = {event["id"]: event for document in documents for event in document["events"]}
    told = [
        event["properties"].get("personCount", event["properties"].get("status")) for event in events.values()
    ]
    assert told[:3] == [0, "Enter", 1]
    assert sorted(map(str, told[3:])) == sorted(map(str, ["Exit", "Exit", 0, 0, "Enter", 1]))
    assert {document["sourceInfo"]["width"] for document in documents} == {64}
    assert stored_types(tmp_path) == ["zone-entered", "zone-lost", "zone-entered"]
    store = SceneStore(tmp_path / "scene.db")
    assert not any("context" in event for event in store.events())
    assert all("context" in document for _, document in store.waiting(10))
    store.close()


def test_events_are_delivered_again_at_the_next_start_until_they_are_acknowledged(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        run.show(*WALK)

    async def acknowledged(run: HostRun) -> None:
        assert run.host.flush(5)
        run.host.acknowledge([event["id"] for event in run.delivered])

    async def nothing(run: HostRun) -> None:
        assert run.host.flush(5)

    delivered = []
    for part in (scenario, acknowledged, nothing):
        run = HostRun(tmp_path)
        play(run, part)
        delivered.append([event["type"] for event in run.delivered])
    assert delivered == [["zone-entered", "zone-left", "line-crossed"]] * 2 + [[]]


def test_without_the_file_of_the_last_run_numbers_of_tracks_do_not_repeat(tmp_path: Path) -> None:
    ids: list[Any] = []

    async def scenario(run: HostRun) -> None:
        ids.append(run.show(*WALK).track_ids)

    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        play(HostRun(folder), scenario)
        HostRun.at_s += 2
    assert ids[0] < ids[1]


def test_a_disk_that_comes_after_the_start_gives_its_totals_then(tmp_path: Path) -> None:
    ids: list[Any] = []

    async def before(run: HostRun) -> None:
        ids.append(run.show(*WALK).track_ids)

    async def without_disk(run: HostRun) -> None:
        ids.append(run.show(*WALK).track_ids)
        assert run.totals()["entered"] == 1
        database.close()
        writer = run.host._writer
        assert writer is not None
        writer._retry_at_s = 0.0
        writer._write_waiting()
        run.host.tick()
        assert (run.totals()["entered"], run.totals()["right-to-left"]) == (2, 2)

    play(HostRun(tmp_path), before)
    database = open_database(tmp_path / "scene.db")
    database.execute("BEGIN IMMEDIATE")
    play(HostRun(tmp_path), without_disk)
    assert ids[0] < ids[1]
    store = SceneStore(tmp_path / "scene.db")
    assert store.load("dock")["left"].totals == {"entered": {"person": 2}, "left": {"person": 2}}
    store.close()


def test_a_file_that_replaces_a_damaged_one_gets_all_totals(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        run.show(*WALK)
        writer = run.host._writer
        assert writer is not None
        writer._write_waiting()
        with writer._disk:
            assert writer._store is not None
            writer._store._db.execute("DROP TABLE total")
        HostRun.at_s += 10
        run.show(*WALK)
        writer._write_waiting()  # fails
        writer._write_waiting()
        run.host.tick()

    run = HostRun(tmp_path)
    play(run, scenario)
    store = SceneStore(tmp_path / "scene.db")
    kept = store.load("dock")
    assert kept["left"].totals == {"entered": {"person": 2}, "left": {"person": 2}}
    assert kept["door"].totals == {"right-to-left": {"person": 2}}
    store.close()


def test_numbers_of_tracks_are_reserved_on_the_disk_ahead_of_their_use(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        tracker = run.host._scenes["dock"].tracker
        tracker.next_id += 700
        run.host.tick()
        assert run.host._reserving is not None
        await run.host._reserving
        assert run.host._writer is not None
        assert run.host._writer.last_track_id("dock") == tracker.next_id + 1_000
        HostRun.at_s += 2
        run.host.tick()
        assert run.host._reserving is None

    play(HostRun(tmp_path), scenario)


def test_without_tracking_a_result_passes_unchanged_and_there_is_no_file(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        plain = make_result("dock", 1)
        assert run.host.update(plain) is plain
        run.host.tick()

    play(HostRun(tmp_path, camera={**CAMERA, "tracking": "off"}), scenario)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tracking", ["on", "off"])
def test_what_a_mask_covers_is_no_detection(tmp_path: Path, tracking: str) -> None:
    async def scenario(run: HostRun) -> None:
        assert len(run.show(*WALK).detections) == 0
        shown = run.show(*(0.8,) * 8)
        assert len(shown.detections) == 1
        assert (shown.track_ids is None) == (tracking == "off")

    mask = [[0, 0], [0.65, 0], [0.65, 1], [0, 1]]
    play(HostRun(tmp_path, camera={"uri": "demo:", "masks": [mask], "tracking": tracking}), scenario)


def test_a_weak_detection_keeps_a_track_and_is_not_reported(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        (track_id,) = run.show(*(0.2,) * 8).track_ids or ()
        for _ in range(60):
            weak = run.show_one(0.2, 0.45, is_reported=False)
            assert (weak.track_ids, len(weak.detections)) == ((), 0)
        assert run.show(0.2).track_ids == (track_id,)

    play(HostRun(tmp_path, camera={**CAMERA, "confidence": 0.5}), scenario)


@pytest.mark.parametrize(("own", "is_tracked"), [({}, False), ({"confidence": 0.4}, True)])
def test_a_camera_with_its_own_confidence_begins_tracks_from_it(
    tmp_path: Path, own: dict[str, Any], is_tracked: bool
) -> None:
    async def scenario(run: HostRun) -> None:
        ids = run.show(*(0.2,) * 8, score=0.5).track_ids or ()
        assert (ids[0] is not None) == is_tracked

    play(HostRun(tmp_path, camera={**CAMERA, **own}), scenario)


@pytest.mark.parametrize(("confidence", "is_tracked"), [(None, True), (0.8, False)])
def test_the_confidence_of_a_camera_s_model_counts_for_its_tracks(
    tmp_path: Path, confidence: float | None, is_tracked: bool
) -> None:
    async def scenario(run: HostRun) -> None:
        ids = run.show(*(0.2,) * 8, score=0.7).track_ids or ()
        assert (ids[0] is not None) == is_tracked

    models = {"small": {"confidence": confidence}}
    play(HostRun(tmp_path, camera={**CAMERA, "model": "small"}, models=models), scenario)


def test_the_tracks_of_a_camera_that_is_offline_end(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        run.show(*WALK[:6])
        HostRun.at_s += 2
        run.host.tick()
        assert run.totals()["inside"] == 1
        HostRun.at_s += 4
        run.host.tick()
        assert (run.totals()["inside"], run.totals()["lost"]) == (0, 1)
        run.show(*WALK[:6])
        assert run.totals()["entered"] == 2

    play(HostRun(tmp_path), scenario)


def test_a_camera_that_is_removed_loses_who_is_inside_and_begins_at_0_when_it_returns(
    tmp_path: Path,
) -> None:
    async def scenario(run: HostRun) -> None:
        before = run.show(*WALK[:6]).track_ids
        await run.configure(gate={"uri": "demo:"})
        assert run.show(0.2).track_ids is None
        await run.configure(dock=CAMERA)
        assert set(run.totals().values()) == {0}
        HostRun.at_s += 10
        after = run.show(*WALK[:6]).track_ids
        assert before is not None
        assert after is not None
        assert before < after

    play(HostRun(tmp_path), scenario)
    assert stored_types(tmp_path) == ["zone-entered", "zone-lost", "zone-entered"]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_totals_stay_while_tracking_is_off_and_nothing_counts(tmp_path: Path, is_restarted: bool) -> None:
    off = {**CAMERA, "tracking": "off"}
    kept = {"inside": 0, "entered": 2, "left": 1, "lost": 1, "left-to-right": 0, "right-to-left": 1}

    async def count(run: HostRun) -> None:
        run.show(*WALK)
        HostRun.at_s += 10
        run.show(*WALK[:6])
        if not is_restarted:
            await show_nothing(run)
            await count_on(run)

    async def show_nothing(run: HostRun) -> None:
        await run.configure(dock=off)
        assert run.show(*WALK).track_ids is None
        run.host.tick()
        assert run.totals() == kept
        assert run.host.document("dock")["tracks"] == []

    async def count_on(run: HostRun) -> None:
        await run.configure(dock=CAMERA)
        assert run.totals() == kept
        HostRun.at_s += 10
        run.show(*WALK)
        assert run.totals() == {**kept, "entered": 3, "left": 2, "right-to-left": 2}

    play(HostRun(tmp_path), count)
    if is_restarted:
        for camera, scenario in ((off, show_nothing), (CAMERA, count_on)):
            play(HostRun(tmp_path, camera=camera), scenario)
    types = ["zone-entered", "zone-left", "line-crossed"]
    assert stored_types(tmp_path) == [*types, "zone-entered", "zone-lost", *types]


def test_a_zone_that_is_removed_or_edited_while_tracking_is_off_begins_at_0(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        run.show(*WALK)
        edited = {"polygon": [[0, 0], [0, 1], [0.3, 1]]}
        await run.configure(dock={"uri": "demo:", "tracking": "off", "zones": {"left": edited}})
        await run.configure(dock=CAMERA)
        assert set(run.totals().values()) == {0}

    play(HostRun(tmp_path), scenario)


def test_zones_of_a_camera_that_is_gone_at_a_start_end(tmp_path: Path) -> None:
    ids: list[Any] = []

    async def before(run: HostRun) -> None:
        ids.append(run.show(*WALK[:6]).track_ids)

    async def without(run: HostRun) -> None:
        assert run.show(0.2).track_ids is None

    async def returns(run: HostRun) -> None:
        await run.configure(dock=CAMERA)
        ids.append(run.show(*WALK[:6]).track_ids)

    play(HostRun(tmp_path), before)
    for scenario in (without, returns):
        other = HostRun(tmp_path)
        other.document = {"cameras": {"gate": CAMERA}}
        play(other, scenario)
        if scenario is without:
            assert stored_types(tmp_path) == ["zone-entered", "zone-lost"]
            store = SceneStore(tmp_path / "scene.db")
            assert store.load("dock") == {}
            store.close()
    assert ids[0] < ids[1]
    play(HostRun(tmp_path, camera={**CAMERA, "tracking": "on"}), before)
    assert ids[1] < ids[2]


def test_an_event_is_published_in_the_same_call_that_makes_it(tmp_path: Path) -> None:
    """No timer and no disk lie between the rule and a live viewer."""
    heard: list[str] = []

    async def scenario(run: HostRun) -> None:
        async with run.state.latest_results.subscribe_events(EventFilter("dock", rule="left")) as live:
            run.show(*WALK)
            run.state.latest_results.close()
            heard.extend([json.loads(each.partition(b"data: ")[2])["type"] async for each in live])

    play(HostRun(tmp_path), scenario)
    assert heard == ["zone-entered", "zone-left"]


def test_the_log_of_a_module_without_scenes_is_empty_and_makes_no_file(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        assert run.host.read_events(EventFilter(), before=None, after=None, limit=5) == []
        with pytest.raises(UnknownEventError):
            run.host.read_events(EventFilter(), before="x", after=None, limit=5)
        assert run.host.read_counts("dock", START, START, "day", 5) == []

    play(HostRun(tmp_path, camera={"uri": "demo:"}), scenario)
    assert not (tmp_path / "scene.db").exists()


# --- metrics, status, storage ------------------------------------------------------------------------------


def read_metrics(run: HostRun) -> dict[str, float]:
    """The samples of scenes, as Prometheus gets them."""
    text = Metrics(lambda: collect_samples(run.state.snapshot())).render().decode()
    lines = (line for line in text.splitlines() if re.match(r"visionedge_(zone|line|tracks|scene)", line))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_have_zones_lines_and_tracks_and_totals_go_on_after_a_restart(tmp_path: Path) -> None:
    """A series of a configured class is there from the start, so that its first increase is seen."""
    zone = 'camera="dock",label="person",zone="left"'
    line = 'camera="dock",direction="right-to-left",label="person",line="door"'

    async def scenario(run: HostRun) -> None:
        before = read_metrics(run)
        run.show(*WALK)
        after = read_metrics(run)
        assert after[f"visionedge_line_crossed_total{{{line}}}"] == 1 + before.get(
            f"visionedge_line_crossed_total{{{line}}}", 0
        )
        entered = after[f"visionedge_zone_entered_total{{{zone}}}"]
        assert entered == 1 + before[f"visionedge_zone_entered_total{{{zone}}}"]
        assert after[f"visionedge_zone_left_total{{{zone}}}"] == entered
        assert after[f"visionedge_zone_lost_total{{{zone}}}"] == 0
        assert after[f"visionedge_zone_inside{{{zone}}}"] == 0
        assert after['visionedge_tracks{camera="dock"}'] == 1
        assert after['visionedge_scene_events_total{camera="dock",type="line-crossed"}'] == 1
        assert 'visionedge_zone_inside{camera="dock",label="car",zone="left"}' not in after

    camera = {**CAMERA, "zones": {"left": {**LEFT, "classes": ["person"]}}}
    for _ in range(2):
        run = HostRun(tmp_path, camera=camera)
        run.state.set_scenes(run.host.statistics)
        play(run, scenario)


def test_the_series_of_what_is_removed_end(tmp_path: Path) -> None:
    async def scenario(run: HostRun) -> None:
        run.show(*WALK)
        assert len(read_metrics(run)) > 8
        await run.configure(dock={**CAMERA, "zones": {}})
        assert [name for name in read_metrics(run) if "zone" in name and "events" not in name] == []
        await run.configure(yard={"uri": "demo:"})
        assert read_metrics(run) == {}

    run = HostRun(tmp_path)
    run.state.set_scenes(run.host.statistics)
    play(run, scenario)


def test_five_hundred_zones_have_their_metrics_and_their_status(tmp_path: Path) -> None:
    zones = {f"zone {number}": LEFT for number in range(500)}

    async def scenario(run: HostRun) -> None:
        run.show(*WALK[:6])
        found = [name for name in read_metrics(run) if name.startswith("visionedge_zone_inside{")]
        assert len(found) == 500
        scenes = build_status(run.state.snapshot())["scenes"]
        assert sum(zone["inside"] for zone in scenes["cameras"]["dock"]["zones"].values()) == 500

    run = HostRun(tmp_path, camera={**CAMERA, "zones": zones})
    run.state.set_scenes(run.host.statistics)
    play(run, scenario)


class EventCollector:
    """Stands for the delivery: keeps the events for the cloud."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []

    def event(self, kind: str, code: str, _text: str, details: Any) -> None:
        self.seen.append((kind, code, details))


@pytest.mark.parametrize("camera", [{"uri": "demo:"}, CAMERA])
def test_a_data_folder_that_cannot_be_reached_stops_nothing(tmp_path: Path, camera: Any) -> None:
    """Its name is too long, an error that root meets, too, as other users do without permission."""
    run = HostRun(tmp_path / ("n" * 300), camera=camera)

    async def scenario(run: HostRun) -> None:
        run.show(0.2, *WALK)
        assert run.totals().get("entered", 0) == (1 if camera is CAMERA else 0)

    play(run, scenario)


def test_a_file_that_cannot_be_used_is_an_event_and_in_status(tmp_path: Path) -> None:
    """Once each: set aside at the start, in memory, on the disk again."""
    (tmp_path / "scene.db").write_bytes(b"this is no database " * 500)
    collector = EventCollector()

    async def scenario(run: HostRun) -> None:
        def tick() -> None:
            HostRun.at_s += 2
            run.host.tick()

        tick()
        tick()
        assert run.host._writer is not None
        with run.host._writer._disk:
            run.host._writer._fail(sqlite3.OperationalError("disk I/O error"))
        tick()
        tick()
        storage = build_status(replace(run.state.snapshot(), delivery=None))["scenes"]["storage"]
        assert (storage["mode"], storage["reason"]) == ("memory", "disk I/O error")
        run.host._writer._retry_at_s = 0.0
        run.host._writer._write_waiting()
        tick()
        state = replace(run.state.snapshot(), delivery=None)
        assert build_status(state)["scenes"]["storage"]["mode"] == "disk"

    run = HostRun(tmp_path)
    run.state.set_scenes(run.host.statistics)
    run.state.set_delivery(cast("Delivery", collector))
    play(run, scenario)
    assert [(kind, code) for kind, code, _ in collector.seen] == [
        ("storage", "state-lost"),
        ("storage", "scene-memory"),
        ("storage", "scene-disk"),
    ]
    assert {details["file"] for _, _, details in collector.seen} == {"scene.db"}


def test_a_file_of_a_newer_version_is_an_event_and_in_status(tmp_path: Path) -> None:
    store = SceneStore(tmp_path / "scene.db")
    store._db.execute("PRAGMA user_version=99")
    store.close()
    collector = EventCollector()

    async def scenario(run: HostRun) -> None:
        HostRun.at_s += 2
        run.host.tick()
        storage = run.host.statistics().storage
        assert storage is not None
        assert "newer version" in str(storage.newer)

    run = HostRun(tmp_path)
    run.state.set_scenes(run.host.statistics)
    run.state.set_delivery(cast("Delivery", collector))
    play(run, scenario)
    assert [code for _, code, _ in collector.seen] == ["state-newer"]
