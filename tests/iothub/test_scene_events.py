"""Scene events on their way out: packed, within a day's budget, acknowledged when no kill can lose them."""

import json
import random
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from scene_paths import DOOR, SQUARE, START, SceneRun, camera_config
from spool_harness import SpoolHarness, drain, harness, message, run_round
from telemetry_harness import PERSON_BOX, TelemetryHarness, documents, scene_event
from visionedge.app.housekeeping import TICK_S
from visionedge.config.schema import TelemetryConfig
from visionedge.iothub.client import HubClient
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.identity import Identity
from visionedge.iothub.telemetry import SCENE_WAIT_S, ResumeState, Telemetry
from visionedge.outbound.messages import MAX_DOCUMENT_BYTES, Message, Sender
from visionedge.outbound.messages_file import MessagesFile
from visionedge.outbound.metering import count_blocks
from visionedge.outbound.queue_state import QueuedMessage
from visionedge.outbound.spool import Spool
from visionedge.outbound.sqlite_store import open_database
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene import writer as writer_module
from visionedge.scene.totals import EventLimits
from visionedge.scene.writer import SceneWriter

__all__ = ["harness"]  # the fixture

IDENTITY = Identity(hub="hub", device="press-7", module="vision", gateway="gateway")


def events_of(messages: Sequence[Message]) -> list[int]:
    """The sequence of each scene event in messages."""
    bodies = [document for document in documents(messages) if document["schema"] == "visionedge/scene/1"]
    return [event["sequence"] for document in bodies for event in document["events"]]


def codes_of(messages: Sequence[Message]) -> list[str]:
    return [document["code"] for document in documents(messages) if "code" in document]


# --- packing ----------------------------------------------------------------------------------------------


def test_an_event_waits_less_than_a_second_for_others_and_they_go_together() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry()
    telemetry.offer_scene([scene_event(1)])
    assert telemetry.due(clock.advance_s(0.3)) == []
    telemetry.offer_scene([scene_event(2), scene_event(3)])
    [sent] = telemetry.due(clock.advance_s(SCENE_WAIT_S - 0.3))
    assert events_of([sent]) == [1, 2, 3]
    assert SCENE_WAIT_S + 2 * TICK_S <= 1  # a tick of the service before and after
    assert telemetry.due(clock.advance_s(60)) == []


def test_a_full_message_goes_at_once_and_the_rest_waits_its_time() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry()
    telemetry.offer_scene([scene_event(n, size=MAX_DOCUMENT_BYTES // 4) for n in range(7)])
    assert events_of(telemetry.due(clock.now_ns)) == [0, 1, 2, 3, 4, 5]
    assert telemetry.due(clock.advance_s(0.1)) == []
    assert events_of(telemetry.due(clock.advance_s(SCENE_WAIT_S))) == [6]


@pytest.mark.parametrize("mode", ["none", "changes", "all"])
def test_scene_events_are_sent_in_every_mode_with_their_own_numbers(mode: str) -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode=mode)
    sent = []
    for number in range(3):
        telemetry.offer(clock.result([PERSON_BOX]))
        telemetry.offer_scene([scene_event(number)])
        sent += telemetry.due(clock.advance_s(1))
    scene = [each for each in sent if each.output == "scene"]
    assert [each.sequence_number for each in scene] == [1, 2, 3]
    assert [each.message_id for each in scene] == [f"run-scene-{n}" for n in (1, 2, 3)]
    assert (len(sent) > len(scene)) == (mode != "none")


def test_an_event_that_no_message_can_carry_is_reported_once_and_not_kept() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry()
    wrong = [scene_event(1, size=MAX_DOCUMENT_BYTES), scene_event(2, confidence=float("nan"))]
    telemetry.offer_scene([*wrong, scene_event(3)])
    sent = telemetry.due(clock.advance_s(1))
    assert (codes_of(sent), events_of(sent)) == (["scene-event-invalid"], [3])
    assert telemetry.take_refused() == [event["id"] for event in wrong]
    assert telemetry.take_refused() == []


# --- the budget of the day --------------------------------------------------------------------------------


def test_detections_leave_a_tenth_of_the_day_for_scene_events_which_use_all_of_it() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=20)
    telemetry.expect_scene(True)
    sent = []
    for number in range(30):
        telemetry.offer(clock.result([PERSON_BOX]))
        sent += telemetry.due(clock.advance_s(1))
        if number % 10 == 9:
            telemetry.offer_scene([scene_event(number)])
    assert [each.output for each in sent].count("detections") == 17  # one event came before the end
    sent += telemetry.due(clock.advance_s(1))
    assert events_of(sent) == [9, 19, 29]
    assert codes_of(sent) == ["telemetry-budget-spent"]
    assert telemetry.statistics().left_today == 0
    telemetry.offer(clock.result([PERSON_BOX]))
    telemetry.offer_scene([scene_event(30), scene_event(31)])
    assert codes_of(telemetry.due(clock.advance_s(1))) == ["scene-budget-spent"]
    telemetry.offer_scene([scene_event(32)])
    assert telemetry.due(clock.advance_s(1)) == []


def test_a_message_of_detections_that_does_not_fit_leaves_the_share_of_scene_events() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=10)
    telemetry.expect_scene(True)
    for _ in range(20):
        telemetry.offer(clock.result([PERSON_BOX] * 60))
        telemetry.due(clock.advance_s(1))
    assert telemetry.statistics().left_today == 1
    assert telemetry.statistics().dropped["budget"] > 0


def test_without_zones_and_lines_detections_may_use_the_whole_budget() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=20)
    for _ in range(30):
        telemetry.offer(clock.result([PERSON_BOX]))
        telemetry.due(clock.advance_s(1))
    assert telemetry.statistics().messages["detections"] == 20


def test_scene_events_without_a_budget_are_sent_on_the_next_day_in_their_order() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="none", maxPerDay=1)
    telemetry.offer_scene([scene_event(1)])
    assert events_of(telemetry.due(clock.advance_s(1))) == [1]
    telemetry.offer_scene([scene_event(2)])
    telemetry.due(clock.advance_s(1))
    telemetry.offer_scene([scene_event(3)])
    assert telemetry.due(clock.advance_s(3600)) == []
    assert telemetry.flush() == []
    [sent] = telemetry.due(clock.advance_s(12 * 3600))
    assert events_of([sent]) == [2, 3]
    assert sent.sequence_number == 2
    telemetry.offer_scene([scene_event(4)])
    assert codes_of(telemetry.due(clock.advance_s(1))) == ["scene-budget-spent"]  # once a day


def test_a_larger_budget_sends_what_waits_at_once() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(maxPerDay=0)
    telemetry.offer_scene([scene_event(1)])
    assert codes_of(telemetry.due(clock.advance_s(1))) == ["scene-budget-spent"]
    telemetry.apply(TelemetryConfig.model_validate({"maxPerDay": 1}))
    assert events_of(telemetry.due(clock.now_ns)) == [1]


def test_as_many_scene_events_are_sent_as_fit_into_the_budget() -> None:
    """A message that needs more blocks than are left is made smaller."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(maxPerDay=10)
    telemetry.offer_scene([scene_event(n, size=1_000) for n in range(100)])
    sent = telemetry.due(clock.advance_s(1))
    scene = [each for each in sent if each.output == "scene"]
    assert 8 <= sum(count_blocks(each.size_bytes) for each in scene) <= 10
    assert telemetry.statistics().usage.blocks["scene"] <= 10
    assert events_of(sent) == list(range(len(events_of(sent))))
    for _ in range(9):
        sent += telemetry.due(clock.advance_s(86_400))
    assert events_of(sent) == list(range(100))


def test_the_projected_day_has_detections_and_scene_events() -> None:
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=14_400)
    sent: list[Message] = []
    for _ in range(30 * 8):
        telemetry.offer(clock.result([PERSON_BOX]))
        telemetry.offer_scene([scene_event()])
        sent += telemetry.due(clock.advance_s(4))
    [event] = [each for each in documents(sent) if "code" in each]
    assert event["code"] == "telemetry-budget-at-risk"
    assert event["details"]["scenePerDay"] == pytest.approx(21_600, rel=0.05)
    assert event["details"]["detectionsPerDay"] == pytest.approx(21_600, rel=0.05)


# --- acknowledgement --------------------------------------------------------------------------------------


class SpoolingHub:
    """A hub client that hands messages to a spool."""

    connected = False

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def send(self, message: Message) -> QueuedMessage:
        return self._spool.put(message)

    def close(self, _deadline_s: float) -> bool:
        return True


class DeliveryRun:
    """A delivery with its own clock; the rounds of the spool are called by hand."""

    def __init__(self, spool: Spool | None, messages_file: MessagesFile | None = None, **policy: Any) -> None:
        self.now_ns = 0
        hub = None if spool is None else cast("HubClient", SpoolingHub(spool))
        self.delivery = Delivery(
            TelemetryConfig.model_validate(policy),
            IDENTITY,
            hub=hub,
            messages_file=messages_file,
            spool=spool,
            clock=lambda: self.now_ns,
        )

    def tick(self, after_s: float = 1) -> list[str]:
        """The events that are acknowledged now."""
        self.now_ns += round(after_s * 1e9)
        self.delivery.tick()
        return self.delivery.take_acknowledged()


def test_an_event_is_acknowledged_when_its_message_is_in_the_file_of_the_spool(harness: SpoolHarness) -> None:
    spool = harness.spool()
    run = DeliveryRun(spool)
    run.delivery.offer_scene([scene_event(1), scene_event(2)])
    assert run.tick(0.1) == []
    assert run.tick() == []  # in the spool's memory
    run_round(spool)
    assert run.tick() == [scene_event(1)["id"], scene_event(2)["id"]]
    assert run.tick() == []


def test_while_the_disk_fails_an_event_is_acknowledged_when_the_hub_has_it(harness: SpoolHarness) -> None:
    spool = harness.spool()
    harness.read_only(on=True)
    run = DeliveryRun(spool)
    run.delivery.offer_scene([scene_event(1)])
    run.tick()
    run_round(spool)
    assert spool.status().mode == "memory"
    assert run.tick() == []
    got = []
    while (following := spool.peek()) is not None:
        got.append(following.output)
        spool.settle(following)
    assert "scene" in got
    assert run.tick() == [scene_event(1)["id"]]


def test_a_disk_that_works_again_secures_the_events_that_wait_in_memory(harness: SpoolHarness) -> None:
    spool = harness.spool()
    harness.read_only(on=True)
    run = DeliveryRun(spool)
    run.delivery.offer_scene([scene_event(1)])
    run.tick()
    run_round(spool)
    harness.read_only(on=False)
    harness.now_ns += 11_000_000_000
    run_round(spool)
    assert run.tick() == [scene_event(1)["id"]]


def test_with_spool_and_messages_file_both_must_have_the_event(harness: SpoolHarness, tmp_path: Path) -> None:
    threads = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    file = MessagesFile(tmp_path / "messages.jsonl", threads)
    spool = harness.spool()
    run = DeliveryRun(spool, file)
    run.delivery.offer_scene([scene_event(1)])
    run.tick()
    run_round(spool)
    assert run.tick() == []
    file.start()
    assert file.close(20)
    assert threads.join(20) == []
    assert run.tick() == [scene_event(1)["id"]]
    [line] = (tmp_path / "messages.jsonl").read_text().splitlines()
    assert json.loads(line)["events"] == [scene_event(1)]


def test_an_event_that_the_messages_file_lost_is_written_again(tmp_path: Path) -> None:
    threads = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    file = MessagesFile(Path("/dev/full"), threads)
    run = DeliveryRun(None, file)
    run.delivery.offer_scene([scene_event(1)])
    run.tick()
    file._write(file._take())
    assert run.tick() == []
    file._file.close()
    file._file = (tmp_path / "messages.jsonl").open("ab", buffering=0)
    assert run.tick(10) == []
    file._write(file._take())
    assert run.tick() == [scene_event(1)["id"]]
    assert file.close(1)
    assert json.loads((tmp_path / "messages.jsonl").read_text())["events"] == [scene_event(1)]


def test_without_hub_and_file_events_are_acknowledged_at_once() -> None:
    run = DeliveryRun(None)
    run.delivery.offer_scene([scene_event(1)])
    assert run.delivery.take_acknowledged() == [scene_event(1)["id"]]
    assert run.tick() == []


def test_an_event_that_no_message_can_carry_is_acknowledged(harness: SpoolHarness) -> None:
    """It would come again at each start."""
    run = DeliveryRun(harness.spool())
    run.delivery.offer_scene([scene_event(1, size=MAX_DOCUMENT_BYTES)])
    assert run.delivery.take_acknowledged() == [scene_event(1)["id"]]


def test_without_a_budget_events_are_not_acknowledged(harness: SpoolHarness) -> None:
    """So they stay in scene.db, and a restart changes nothing."""
    spool = harness.spool()
    run = DeliveryRun(spool, maxPerDay=0)
    run.delivery.offer_scene([scene_event(1)])
    run.tick()
    run.delivery.flush()
    run_round(spool)
    assert run.tick() == []


def test_the_numbers_of_scene_messages_go_on_after_a_restart(harness: SpoolHarness) -> None:
    for start in range(2):
        spool = harness.spool()
        run = DeliveryRun(spool)
        run.delivery.offer_scene([scene_event(start)])
        run.delivery.event("module", "x", "x")
        run.delivery.flush()
        run_round(spool)
        assert spool.close(5)
    spool = harness.spool()
    assert dict(spool.last_numbers) == {"events": 2, "scene": 2}
    assert [m.sequence_number for m in drain(spool) if m.output == "scene"] == [1, 2]


def test_resuming_needs_no_spool_of_a_version_with_scene_events() -> None:
    """The file of an older version has no number for the output."""
    telemetry = Telemetry(TelemetryConfig(), Sender("d", "m", "r"), resume_state=ResumeState({"events": 5}))
    telemetry.offer_scene([scene_event(1)])
    assert [m.sequence_number for m in telemetry.flush()] == [1]


def test_a_full_spool_keeps_scene_events_longer_than_detections(harness: SpoolHarness) -> None:
    spool = harness.spool(limit_bytes=3 * message(1, "scene").size_bytes)
    for number in range(1, 4):
        spool.put(message(number, "scene"))
        spool.put(message(number))
    run_round(spool)
    assert spool.dropped == {"full": 3}
    assert [m.output for m in drain(spool)] == ["scene"] * 3
    for number in range(4, 10):
        spool.put(message(number, "events" if number % 2 else "scene"))
    run_round(spool)
    assert {loss.output for loss in spool.take_lost_ranges()} == {"detections", "scene", "events"}


def test_full_memory_keeps_scene_events_longer_than_detections(harness: SpoolHarness) -> None:
    spool = harness.spool(memory_bytes=4 * message(1).size_bytes)
    for number in range(1, 4):
        spool.put(message(number, "scene"))
    first = spool.put(message(1))
    spool.put(message(2))
    assert first.is_secured  # dropped, and reported as a loss
    assert [m.message_id for m in drain(spool)] == ["scene-1", "scene-2", "scene-3", "detections-2"]


# --- over kills -------------------------------------------------------------------------------------------

CONFIG = camera_config(zones={"queue": {"polygon": SQUARE}}, lines={"door": DOOR})


class Process:
    """Scene, writer, delivery and spool of one start of the module; a test calls the threads' rounds."""

    def __init__(self, folder: Path, first_track_id: int) -> None:
        self.spool_harness = SpoolHarness(folder)
        self.spool = self.spool_harness.spool()
        self.run = DeliveryRun(self.spool)
        self.writer = SceneWriter(
            folder / "scene.db",
            EventLimits(),
            self.deliver,
            clock=lambda: self.run.now_ns / 1e9,
            now=lambda: START,
            connect=self.connect,
        )
        self.scene = SceneRun(CONFIG, self.writer.load("dock"))
        self.scene.sequence = first_track_id * 100
        self.track_id = first_track_id
        self.sent: list[Mapping[str, Any]] = []

    def connect(self, path: Path) -> sqlite3.Connection:
        self.database = open_database(path)
        self.database.execute("PRAGMA synchronous=OFF")
        return self.database

    def deliver(self, documents: Sequence[Mapping[str, Any]]) -> None:
        self.run.delivery.offer_scene(documents)

    def walk(self) -> None:
        """Two events: somebody enters the zone and crosses the line."""
        self.track_id += 1
        self.scene.walk([(0.4, 0.5), (0.6, 0.5)], self.track_id)
        for change in self.scene.changes:
            self.writer.put(change)
        self.scene.changes = []

    def store(self) -> None:
        self.writer._write_waiting()

    def tick(self) -> None:
        self.writer.acknowledge(self.run.tick())

    def spool_round(self) -> None:
        run_round(self.spool)

    def send(self) -> None:
        """The hub takes a message."""
        if (following := self.spool.peek()) is not None:
            if following.output == "scene":
                self.sent += json.loads(following.body)["events"]
            self.spool.settle(following)

    def break_spool(self) -> None:
        self.spool_harness.read_only(on=True)

    def repair_spool(self) -> None:
        self.spool_harness.read_only(on=False)
        self.spool_harness.now_ns += 11_000_000_000

    def kill(self) -> None:
        self.database.close()
        self.spool_harness.crash()

    def stored(self) -> list[str]:
        """The ids of all events in the file."""
        return [event["id"] for event in self.writer.events(limit=10_000)]


@pytest.mark.parametrize("seed", range(12))
def test_over_kills_at_any_moment_every_stored_event_reaches_the_hub(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once, with its id, while the disk of the spool fails too; what waits is bounded."""
    monkeypatch.setattr(writer_module, "MAX_UNACKNOWLEDGED", 5)
    chance, received = random.Random(seed), list[Mapping[str, Any]]()  # noqa: S311 - a reproducible order
    process = Process(tmp_path, 0)
    steps = [*("walk", "store", "tick", "spool_round", "send") * 2, "kill", "break_spool", "repair_spool"]
    for _ in range(100):
        step = chance.choice(steps)
        getattr(process, step)()
        assert len(process.writer._unacknowledged) <= 5
        if step == "kill":
            received += process.sent
            process = Process(tmp_path, process.track_id + 1)
    process.repair_spool()
    for _ in range(60):
        for step in ("store", "tick", "spool_round", "send", "send", "send"):
            getattr(process, step)()
    received += process.sent
    stored = process.stored()
    process.kill()
    assert {event["id"] for event in received} == set(stored)
    assert len(stored) > 5


def test_events_that_are_acknowledged_do_not_come_again(tmp_path: Path) -> None:
    process = Process(tmp_path, 0)
    process.walk()
    for step in ("store", "tick", "spool_round", "tick", "store"):
        getattr(process, step)()
    process.kill()
    process = Process(tmp_path, 10)
    process.store()
    process.tick()
    process.spool_round()
    for _ in range(5):
        process.send()
    process.kill()
    ids = [event["id"] for event in process.sent]
    assert len(ids) == len(set(ids)) == 2
