"""Scene events and counts over HTTP: live, from the log, by hour and day, and all mistakes of a request."""

import asyncio
import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fake_backend import Client, FakeBackend, error_of, result, run_scenario, until
from scene_paths import DOOR, SQUARE, SceneRun, camera_config
from visionedge.outbound.sqlite_store import open_database
from visionedge.runtime.threads import ThreadGroup
from visionedge.scene import writer as writer_module
from visionedge.scene.events import EventFilter, SceneEvent
from visionedge.scene.scene import SceneChanges
from visionedge.scene.totals import EventLimits
from visionedge.scene.writer import SceneStorageError, SceneWriter
from visionedge.web.documents import SceneCountsDocument, SceneEventsDocument
from visionedge.web.latest_results import LatestResults

CONFIG = camera_config(zones={"queue": {"polygon": SQUARE}}, lines={"door": DOOR})


class LoggedModule:
    """A module with a camera, whose scene is written by a real writer; what it does is published."""

    def __init__(self, path: Path) -> None:
        self.backend = FakeBackend("dock", "yard")
        self.backend.rule_names = ["queue", "door"]
        self.databases: list[sqlite3.Connection] = []
        self.writer = SceneWriter(path, EventLimits(), lambda _: None, connect=self.connect)
        self.backend.scene_log = self.writer
        self.run = SceneRun(CONFIG)
        # In the last hour, as by default that is what counts are asked for.
        self.run.now = datetime.now(UTC) - timedelta(minutes=1)

    def connect(self, path: Path) -> sqlite3.Connection:
        self.databases.append(open_database(path))
        return self.databases[-1]

    def happen(self, *xs: float, track_id: int = 1, store: bool = True) -> list[SceneEvent]:
        """A walk through these places: its events are published, then stored."""
        self.run.walk([(x, 0.5) for x in xs], track_id)
        changes, self.run.changes = self.run.changes, []
        for change in changes:
            self.backend.latest_results.publish_events(change.events)
            self.writer.put(change)
        if store:
            self.store()
        return [event for change in changes for event in change.events]

    def store(self) -> None:
        """A round of the writer's thread."""
        self.writer._write_waiting()

    def close(self) -> None:
        if self.writer._store is not None:
            self.writer._store.close()


@pytest.fixture
def module(tmp_path: Path) -> Iterator[LoggedModule]:
    logged = LoggedModule(tmp_path / "scene.db")
    yield logged
    logged.close()


async def read_event(answer: aiohttp.ClientResponse) -> tuple[str, dict[str, Any]]:
    """Id and document of the next event of a stream."""
    event_id = ""
    while True:
        line = (await answer.content.readline()).decode()
        assert line, "the stream ended"
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ").strip()
        if line.startswith("data: "):
            return event_id, json.loads(line.removeprefix("data: "))


async def get(client: Client, path: str) -> Any:
    async with client.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


def types(document: Any) -> list[str]:
    return [event["type"] for event in document["events"]]


def test_events_and_counts_have_exactly_the_described_keys(module: LoggedModule) -> None:
    """They are built without their models, so this test compares the two; an unknown key is an extra."""
    count_a_day(module)

    async def scenario(client: Client) -> None:
        events = await get(client, "/api/v1/events")
        log = SceneEventsDocument.model_validate(events, strict=True)
        assert (log.dump(), len(log.events)) == (events, 6)
        counts = await get(client, "/api/v1/cameras/dock/counts?by=day")
        made = SceneCountsDocument.model_validate(counts, strict=True)
        assert (made.dump(), len(made.counts)) == (counts, 2)
        assert not any(row.model_extra for row in (*log.events, *made.counts))

    run_scenario(module.backend, scenario)


# --- live ---------------------------------------------------------------------------------------------------


def test_an_event_is_sent_when_it_happens_before_the_disk_has_it(module: LoggedModule) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/events/stream") as answer:
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            (entered,) = module.happen(0.4, store=False)
            assert await read_event(answer) == (entered.id, entered.document())
            assert module.writer.status().waiting > 0

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("camera=yard", {"camera": "yard"}),
        ("type=line-crossed", {"type": "line-crossed"}),
        ("rule=door", {"line": "door"}),
        ("label=dog", {"label": "dog"}),
        ("camera=dock&rule=queue&label=person", {"camera": "dock", "zone": "queue", "label": "person"}),
    ],
)
def test_a_stream_has_only_the_wanted_events(module: LoggedModule, query: str, wanted: Any) -> None:
    """Of every combination of cameras, rules and labels, those that match; in their order."""

    async def scenario(client: Client) -> None:
        async with client.get(f"/api/v1/events/stream?{query}") as answer:
            made = module.happen(0.4, 0.6)
            made += [replace(event, id=f"{event.id}-yard", camera="yard") for event in made]
            made += [replace(event, id=f"{event.id}-dog", label="dog") for event in made]
            module.backend.latest_results.publish_events(made[2:])
            matching = [event for event in made if wanted.items() <= event.document().items()]
            assert 0 < len(matching) < len(made)
            for event in matching:
                assert (await read_event(answer))[0] == event.id

    run_scenario(module.backend, scenario)


def test_a_slow_reader_of_events_loses_only_its_own_oldest(module: LoggedModule) -> None:
    async def scenario() -> None:
        results = LatestResults(buffer=1)
        (event,) = module.happen(0.4)
        async with (
            results.subscribe_events(EventFilter()) as slow,
            results.subscribe_events(EventFilter("dock")) as quick,
        ):
            for number in range(22):
                results.publish_events([replace(event, id=str(number))])
                assert (await anext(quick)).startswith(f"id: {number}\n".encode())
            kept = [(await anext(slow)).partition(b"\n")[0] for _ in range(16)]
            assert kept == [f"id: {number}".encode() for number in range(6, 22)]
            assert (slow.lost, quick.lost, results.statistics().lost) == (6, 0, 6)

    asyncio.run(scenario())


def test_a_stream_says_where_a_reader_has_lost_events(module: LoggedModule) -> None:
    """Also one that reads at once: a picture can bring more events than the stream holds."""
    (event,) = module.happen(0.4)

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/events/stream") as answer:
            await until(lambda: module.backend.latest_results.statistics().viewers == 1)
            await answer.content.readuntil(b"\n\n")
            for count in (1100, 3, 1025):
                burst = [replace(event, id=f"{count}-{number}") for number in range(count)]
                module.backend.latest_results.publish_events(burst)
                lost = max(0, count - 1024)
                if lost:
                    text = (await answer.content.readuntil(b"\n\n")).decode()
                    assert text == f": {lost} were lost here, as the reader was too slow\n\n"
                seen = [(await read_event(answer))[0] for _ in burst[lost:]]
                assert seen == [each.id for each in burst[lost:]]
                await answer.content.readuntil(b"\n")

    run_scenario(module.backend, scenario)


def test_a_stream_that_goes_on_after_too_many_events_says_so(
    module: LoggedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionedge.web.scene_log.MAX_EVENTS", 2)
    first, *others = [event for track in range(4) for event in module.happen(0.4, track_id=track)]

    async def scenario(client: Client) -> None:
        for last, comment in ((first, "the newest 2 missed"), (others[-2], ": scene events follow")):
            headers = {"Last-Event-ID": last.id}
            async with client.get("/api/v1/events/stream", headers=headers) as answer:
                assert comment in (await answer.content.readuntil(b"\n\n")).decode()
                assert (await read_event(answer))[0] == others[-1 if last is not first else -2].id

    run_scenario(module.backend, scenario)


def test_frames_and_events_come_in_one_stream_on_request(module: LoggedModule) -> None:
    """A browser has six connections to a host: its page needs only one for both."""

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/frames?events=1") as both, client.get("/api/v1/frames") as plain:
            (entered,) = module.happen(0.4)
            module.backend.latest_results.publish(result("dock", 5))
            lines = [(await both.content.readline()).decode().strip() for _ in range(7)]
            assert lines[3:6] == ["event: scene", f"id: {entered.id}", lines[5]]
            assert (await read_event(both))[1]["sequence"] == 5
            assert (await read_event(plain))[1]["schema"] == "visionedge/frame/1"

    run_scenario(module.backend, scenario)


def test_a_stream_goes_on_after_the_event_that_the_reader_had_last(module: LoggedModule) -> None:
    """Stored ones, those that wait for the disk, and those that come meanwhile: each once, in order."""
    first, second = module.happen(0.4, 0.6)
    (third,) = module.happen(0.4, track_id=2)

    async def scenario(client: Client) -> None:
        (waiting,) = module.happen(0.4, track_id=3, store=False)
        for last, missed in (
            (first, [second, third, waiting]),
            (third, [waiting]),
            (waiting, []),
        ):
            async with client.get("/api/v1/events/stream", headers={"Last-Event-ID": last.id}) as answer:
                seen = [(await read_event(answer))[0] for _ in missed]
                assert seen == [event.id for event in missed]
                module.backend.latest_results.publish_events([waiting, replace(first, id="live")])
                live = [(await read_event(answer))[0]]
                if waiting in missed:
                    assert live == ["live"], "what was sent does not come again"
        async with client.get(
            "/api/v1/events/stream?type=zone-left", headers={"Last-Event-ID": "x"}
        ) as answer:
            text = (await answer.content.readuntil(b"\n\n")).decode()
            assert "the log does not have the event of Last-Event-ID" in text

    run_scenario(module.backend, scenario)


def test_event_streams_end_with_their_camera_and_free_their_place(module: LoggedModule) -> None:
    results = module.backend.latest_results

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/events/stream?camera=yard") as answer:
            await until(lambda: results.statistics().viewers == 1)
            module.backend.remove("yard")
            await answer.content.read()
        await until(lambda: results.statistics().viewers == 0)

    run_scenario(module.backend, scenario)


# --- the log ------------------------------------------------------------------------------------------------


def test_the_log_gives_the_newest_first_by_filter_and_page(module: LoggedModule) -> None:
    module.happen(0.4, 0.6)
    module.happen(0.4, 0.6, track_id=2)

    async def scenario(client: Client) -> None:
        everything = await get(client, "/api/v1/events")
        assert types(everything) == ["line-crossed", "zone-entered"] * 2
        first = await get(client, "/api/v1/events?limit=1")
        before = first["events"][0]["id"]
        rest = await get(client, f"/api/v1/events?before={before}")
        assert first["events"] + rest["events"] == everything["events"]
        crossed = await get(client, "/api/v1/events?camera=dock&type=line-crossed&rule=door&label=person")
        assert [event["trackId"] for event in crossed["events"]] == [2, 1]
        assert await get(client, "/api/v1/events?camera=yard") == {"events": []}
        (waiting,) = module.happen(0.4, track_id=3, store=False)
        assert (await get(client, "/api/v1/events"))["events"][0]["id"] == waiting.id
        assert await get(client, f"/api/v1/events?before={waiting.id}") == everything

    run_scenario(module.backend, scenario)


def test_events_of_what_is_gone_can_be_asked_for_by_name(module: LoggedModule) -> None:
    """A camera or zone that left the configuration keeps its events until they are too old."""
    module.happen(0.4)
    module.backend.remove("dock")
    module.backend.rule_names = []

    async def scenario(client: Client) -> None:
        for query in ("camera=dock", "rule=queue", "camera=dock&rule=queue"):
            assert types(await get(client, f"/api/v1/events?{query}")) == ["zone-entered"]

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("camera=attic", "'camera': there is no camera 'attic'; there are: dock, yard"),
        ("camera=", "'camera': there is no camera ''; there are: dock, yard"),
        ("type=left", "'type': there is no type of event 'left'; there are: zone-entered, zone-left, "),
        ("rule=gate", "'rule': there is no zone or line 'gate'; there are: queue, door"),
        ("camera=dock&rule=gate", "'rule': there is no zone or line 'gate'; there are: queue, door"),
        ("label=" + "x" * 300, "'label' must have at most 256 characters"),
        ("zone=queue", "'zone' is not a parameter; there are: camera, type, rule, label"),
        ("camera=dock&camera=yard", "'camera' is given 2 times"),
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/events", "/api/v1/events/stream"])
def test_a_wrong_filter_is_a_400_that_names_it_and_what_exists(
    module: LoggedModule, path: str, query: str, message: str
) -> None:
    async def scenario(client: Client) -> None:
        async with client.get(f"{path}?{query}") as answer:
            status, code, text = await error_of(answer)
            assert (status, code) == (400, "bad_request")
            assert text.startswith(message)

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize(
    "query", ["before=unknown", "before=", "limit=0", "limit=1001", "limit=many", "limit="]
)
def test_a_wrong_page_is_a_400(module: LoggedModule, query: str) -> None:
    module.happen(0.4)

    async def scenario(client: Client) -> None:
        async with client.get(f"/api/v1/events?{query}") as answer:
            status, _, text = await error_of(answer)
            assert status == 400
            assert text.startswith(f"'{query.partition('=')[0]}'")

    run_scenario(module.backend, scenario)


PATHS = ("/api/v1/events", "/api/v1/cameras/dock/counts", "/api/v1/events?camera=attic")


def test_a_disk_that_fails_is_a_503_with_the_reason_and_marks_the_store(
    module: LoggedModule, caplog: pytest.LogCaptureFixture
) -> None:
    """No traceback; the events stay live."""
    module.happen(0.4)
    module.databases[0].close()

    async def scenario(client: Client) -> None:
        for path in PATHS:
            async with client.get(path) as answer:
                status, code, text = await error_of(answer)
                assert (status, code, answer.headers["Retry-After"]) == (503, "storage", "10")
                assert text.startswith("scene.db cannot be")
        async with client.get("/api/v1/events/stream", headers={"Last-Event-ID": "x"}) as answer:
            assert b"the log cannot be read now" in await answer.content.readuntil(b"\n\n")

    run_scenario(module.backend, scenario)
    assert module.writer.status().mode == "memory"
    assert not any(record.exc_info for record in caplog.records)


def test_a_log_that_is_damaged_is_a_503_and_set_aside(module: LoggedModule) -> None:
    module.happen(0.4)
    module.databases[0].execute("UPDATE event SET document = '{'")

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/events") as answer:
            assert (await error_of(answer))[:2] == (503, "storage")

    run_scenario(module.backend, scenario)
    assert module.writer.status().lost is not None


def test_the_thread_tries_a_disk_again_that_failed_for_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another event that would wake it."""
    monkeypatch.setattr(writer_module, "RETRY_S", 0.0)
    module = LoggedModule(tmp_path / "scene.db")
    threads = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    thread = module.writer.start(threads)
    with module.writer._disk:
        module.databases[0].close()
    with pytest.raises(SceneStorageError, match=r"scene\.db cannot be read"):
        module.writer.events()
    while module.writer.status().mode == "memory":
        thread.join(0.001)
        assert thread.is_alive()
    assert module.writer.events() == []
    module.writer.close()
    thread.join(5)
    assert threads.alive() == []


# --- counts -------------------------------------------------------------------------------------------------


def count_a_day(module: LoggedModule) -> datetime:
    """Two hours with a walk each, on a day in the past; the begin of the first."""
    begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=2)
    begin = begin.replace(hour=8)
    for hour in range(2):
        module.run.now = begin + timedelta(hours=hour, minutes=30)
        module.happen(0.4, 0.6, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, track_id=hour + 1)
    return begin


def test_counts_are_given_by_hour_and_by_day(module: LoggedModule) -> None:
    begin = count_a_day(module)
    day = begin.date().isoformat()

    async def scenario(client: Client) -> None:
        path = f"/api/v1/cameras/dock/counts?from={day}"
        by_hour = await get(client, path)
        start = {"start": f"{day}T08:00:00.000Z", "label": "person"}
        queue = {"zone": "queue", "entered": 1, "left": 1, "lost": 0}
        door = {"line": "door", "crossed": {"left-to-right": 0, "right-to-left": 1}}
        assert by_hour["counts"][:2] in (
            [{**start, **door}, {**start, **queue}],
            [{**start, **queue}, {**start, **door}],
        )
        assert [count["start"][11:13] for count in by_hour["counts"]] == ["08", "08", "09", "09"]
        by_day = await get(client, f"{path}&by=day")
        assert {count["start"] for count in by_day["counts"]} == {f"{day}T00:00:00.000Z"}
        assert [count.get("entered") for count in by_day["counts"] if "zone" in count] == [2]
        assert (by_day["camera"], by_day["by"], by_day["from"]) == ("dock", "day", f"{day}T00:00:00.000Z")
        second = await get(
            client, f"{path}T09:59:59%2B01:00&to={day}T09:00:00Z".replace(day + "T09:59", day + "T09:00")
        )
        assert {count["start"][11:13] for count in second["counts"]} == {"08"}
        assert (await get(client, f"{path}&to={day}"))["counts"] == [], "a date is the begin of its day"

    run_scenario(module.backend, scenario)


def test_by_default_counts_are_of_the_last_day_or_of_the_days_that_are_kept(module: LoggedModule) -> None:
    count_a_day(module)

    async def scenario(client: Client) -> None:
        assert (await get(client, "/api/v1/cameras/dock/counts"))["counts"] == []
        assert (await get(client, "/api/v1/cameras/dock/counts?by=day"))["counts"] != []
        assert (await get(client, "/api/v1/cameras/yard/counts?by=day"))["counts"] == []

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        ("*/*", "", "application/json"),
        ("text/csv", "", "text/csv"),
        ("text/csv;q=0.5, application/json", "", "application/json"),
        ("application/json;q=0.1, text/csv", "", "text/csv"),
        ("text/csv;q=0", "", "application/json"),
        ("text/csv;q=nan", "", "application/json"),
        ("", "&format=csv", "text/csv"),
        ("text/csv", "&format=json", "application/json"),
    ],
)
def test_counts_are_csv_on_request(module: LoggedModule, accept: str, query: str, kind: str) -> None:
    count_a_day(module)

    async def scenario(client: Client) -> None:
        path = f"/api/v1/cameras/dock/counts?by=day{query}"
        async with client.get(path, headers={"Accept": accept}) as answer:
            assert answer.content_type == kind
            if kind == "text/csv":
                rows = list(csv.DictReader(io.StringIO(await answer.text())))
                assert [(row["zone"], row["line"], row["entered"], row["right-to-left"]) for row in rows] == [
                    ("", "door", "", "2"),
                    ("queue", "", "2", ""),
                ]

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize("label", ["=cmd|'/c calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "\r=1", 'a"b,\nc'])
def test_no_text_of_a_csv_is_a_formula_or_breaks_its_cell(module: LoggedModule, label: str) -> None:
    (entered,) = module.happen(0.4)
    module.writer.put(SceneChanges((replace(entered, id="other", label=label),)))
    module.store()

    async def scenario(client: Client) -> None:
        async with client.get("/api/v1/cameras/dock/counts?format=csv") as answer:
            rows = list(csv.DictReader(io.StringIO(await answer.text(), newline="")))
        labels = {row["label"] for row in rows}
        assert labels == {"person", label if label[0] == "a" else f"'{label}"}
        assert {row["entered"] for row in rows} == {"1"}

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("from=yesterday", "from"),
        ("to=2026-02-30", "to"),
        ("from=2026-11-30T08:00:00", "from"),  # without an offset
        ("from=20261130", "from"),
        ("from=2026-W48-1", "from"),
        ("from=", "from"),
        ("to=0001-01-01T00:00:00%2B14:00", "to"),
        ("from=2026-11-30&to=2026-11-29", "from"),
        ("by=week", "by"),
        ("by=", "by"),
        ("format=xml", "format"),
        ("since=2026-11-30", "since"),
        ("from=2026-11-30&from=2026-11-29", "from"),
    ],
)
def test_a_wrong_period_is_a_400_that_names_it(module: LoggedModule, query: str, name: str) -> None:
    async def scenario(client: Client) -> None:
        async with client.get(f"/api/v1/cameras/dock/counts?{query}") as answer:
            status, _, text = await error_of(answer)
            assert (status, text.startswith(f"'{name}'")) == (400, True), text
        async with client.get(f"/api/v1/cameras/attic/counts?{query}") as answer:
            assert (await error_of(answer))[:2] == (404, "unknown_camera")

    run_scenario(module.backend, scenario)


@pytest.mark.parametrize(
    "query",
    [
        "from=0001-01-01&to=0001-01-01",
        "to=0001-01-02&by=day",
        "from=2026-11-30T08:00:00 01:00&to=9999-12-31T23:59:59Z",
        "from=2026-11-30t08:00:00.123456z&to=2027-01-01",
    ],
)
def test_unusual_periods_are_answered(module: LoggedModule, query: str) -> None:
    """Also an offset whose '+' was not encoded."""

    async def scenario(client: Client) -> None:
        assert "counts" in await get(client, f"/api/v1/cameras/dock/counts?{query}")

    run_scenario(module.backend, scenario)
