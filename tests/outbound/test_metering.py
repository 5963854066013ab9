"""The cost of messages: blocks, the meter, documents that fill their blocks, and the estimate."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import CommandLine
from telemetry_harness import PERSON_BOX, TelemetryHarness, documents, scene_event
from visionedge.app import status
from visionedge.config.schema import TelemetryConfig
from visionedge.iothub.telemetry import Telemetry
from visionedge.outbound.messages import (
    MIN_FILL_RATIO,
    EncodedDocument,
    Event,
    Message,
    MessageSizeEstimator,
    Sender,
    build_batch_messages,
    build_event_message,
    build_scene_messages,
    count_frames_to_fill,
    encode_scene_event,
    envelope_bytes,
    parse_message,
)
from visionedge.outbound.metering import BLOCK_BYTES, UsageMeter, count_blocks

SENDER = Sender("press-7", "vision", "a1b2c3")
MINUTE_NS = 60_000_000_000


def frame(size: int, camera: str = "dock", labels: tuple[str, ...] = ("person",)) -> EncodedDocument:
    """A frame of so many bytes."""
    values = {"cameras": frozenset((camera,)), "labels": frozenset(labels)}
    return EncodedDocument(b'"' + b"x" * (size - 2) + b'"', values, 0.5)


# --- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(0, 1), (1, 1), (4096, 1), (4097, 2), (200_000, 49)])
def test_a_message_is_metered_in_blocks_of_4_kb(size: int, count: int) -> None:
    """Begun blocks count whole."""
    assert count_blocks(size) == count


def test_the_meter_projects_the_last_hour_to_a_day() -> None:
    """One block a second is 86,400 a day, a good fifth of an S1 unit; only the last hour counts."""
    now = [0]
    meter = UsageMeter(lambda: now[0])
    for _ in range(3600):
        now[0] += 1_000_000_000
        meter.count("detections", 4000)
    usage = meter.usage()
    assert usage.blocks_per_day == pytest.approx(86_400, rel=0.02)
    assert usage.shares["S1"] == pytest.approx(0.216, rel=0.02)
    assert usage.shares["S2"] == pytest.approx(0.0144, rel=0.02)
    assert (usage.messages, usage.blocks) == ({"detections": 3600}, {"detections": 3600})
    assert usage.fill_ratio == pytest.approx(4000 / 4096)

    now[0] += 61 * MINUTE_NS
    assert meter.usage().blocks_per_day == 0
    assert meter.usage().blocks == {"detections": 3600}


def test_the_first_seconds_give_a_moderate_projection() -> None:
    """Ten messages at the start are ten in a minute, not ten in a second."""
    meter = UsageMeter(lambda: 1)
    for _ in range(10):
        meter.count("events", 300)
    assert meter.usage().blocks_per_day == 14_400


# --- packing ----------------------------------------------------------------------------------------------

FRAMES = st.lists(
    st.builds(
        frame,
        st.integers(200, 9000),
        st.sampled_from(["dock", "gate", "yard-with-a-long-name"]),
        st.sampled_from([("person",), ("person", "car"), ()]),
    ),
    max_size=80,
)


@given(FRAMES)
@settings(max_examples=150, deadline=None)
def test_the_estimated_size_is_never_below_the_size_of_the_message(frames: list[EncodedDocument]) -> None:
    """And hardly more: a block that it calls full is not split in two by IoT Hub."""
    estimator = MessageSizeEstimator(envelope_bytes(SENDER, 7))
    for each in frames:
        estimator.add(each)
    if frames and estimator.fits:
        [message] = build_batch_messages(SENDER, 7, frames)
        assert message.size_bytes <= estimator.size_bytes <= message.size_bytes + 200


@given(FRAMES)
@settings(max_examples=150, deadline=None)
def test_frames_are_sent_only_when_their_blocks_are_well_used(frames: list[EncodedDocument]) -> None:
    """The unsent frames do not fill their blocks with any split."""
    envelope = envelope_bytes(SENDER, 7)
    count = count_frames_to_fill(frames, envelope)
    if count:
        [message] = build_batch_messages(SENDER, 7, frames[:count])
        assert message.size_bytes + 200 >= MIN_FILL_RATIO * BLOCK_BYTES * count_blocks(message.size_bytes)
    longer = MessageSizeEstimator(envelope)
    for sequence_number, each in enumerate(frames, 1):
        longer.add(each)
        assert sequence_number <= count or not longer.fits or not longer.is_well_filled


def test_a_message_of_the_maximum_size_is_sent_for_any_use_of_its_blocks() -> None:
    """The limit of 200 KB comes first."""
    frames = [frame(60_000) for _ in range(5)]
    assert 0 < count_frames_to_fill(frames, envelope_bytes(SENDER, 1)) <= 3


def test_after_the_interval_frames_wait_for_their_block_to_fill_but_not_for_ever() -> None:
    """`fillSeconds` later the last ones go, full or not."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=1, fillSeconds=4)
    telemetry.offer(harness.result([PERSON_BOX]))
    assert telemetry.due(harness.advance_s(4.9)) == []
    telemetry.offer(harness.result([PERSON_BOX]))
    [document] = documents(telemetry.due(harness.advance_s(0.1)))
    assert len(document["frames"]) == 2


def test_full_blocks_are_sent_at_the_end_of_the_interval_and_the_rest_waits() -> None:
    """Whole blocks now, the begun one with the next."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=1, fillSeconds=60)
    for _ in range(20):
        telemetry.offer(harness.result([PERSON_BOX] * 2))
        harness.advance_s(0.05)
    [message] = telemetry.due(harness.now_ns)
    assert 0 < telemetry.statistics().waiting < 20
    assert message.size_bytes >= MIN_FILL_RATIO * BLOCK_BYTES * count_blocks(message.size_bytes)
    assert telemetry.statistics().usage.blocks == {"detections": count_blocks(message.size_bytes)}


def test_in_a_steady_stream_hardly_any_block_is_wasted() -> None:
    """Four cameras at five frames a second, for two minutes."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=1, fillSeconds=4)
    for _ in range(600):
        for camera in ("dock", "gate", "hall", "yard"):
            telemetry.offer(harness.result([PERSON_BOX] * 3, camera=camera))
        telemetry.due(harness.advance_s(0.2))
    usage = telemetry.statistics().usage
    assert usage.fill_ratio > 0.9
    assert usage.messages["detections"] < 125


# --- the estimate -----------------------------------------------------------------------------------------


def recorded(seconds: float, interval_s: float, *, boxes: int = 3, events: int = 0, **policy: Any) -> bytes:
    """The file of `run --messages` for a camera, with `events` events an hour."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(**{"mode": "all", "intervalSeconds": 0.1, "maxPerDay": 10**9, **policy})
    made = [telemetry.event("engine", "ok", "computing"), telemetry.event("camera", "live", "camera dock")]
    for sequence_number in range(round(seconds / interval_s)):
        telemetry.offer(harness.result([PERSON_BOX] * boxes))
        made += telemetry.due(harness.advance_s(interval_s))
        if events and sequence_number % round(3600 / events / interval_s) == 0:
            made.append(telemetry.event("camera", "stale", "camera dock is stale"))
    return b"".join(message.body + b"\n" for message in made + telemetry.flush())


def count_again(text: bytes) -> tuple[int, int, int]:
    """Messages, blocks and frames of a file's detections, by the sizes that IoT Hub documents."""
    messages = blocks_counted = frames = 0
    for line in text.splitlines():
        document = json.loads(line)
        if document["schema"] != "visionedge/batch/1":
            continue
        rows = [row for frame in document["frames"] for row in frame["detections"]]
        properties = {
            "schema": document["schema"],
            "cameras": ",".join(sorted({frame["camera"] for frame in document["frames"]})),
            "labels": ",".join(sorted({row["label"] for row in rows})),
            "maxConfidence": f"{max([row['confidence'] for row in rows], default=0):g}",
        }
        size = len(line) + sum(len(name) + len(value) for name, value in properties.items())
        size += len("application/json" + "utf-8" + "detections")
        size += len(f"0123456789ab-detections-{document['messageSequence']}")
        messages += 1
        blocks_counted += (size + 4095) // 4096
        frames += len(document["frames"])
    return messages, blocks_counted, frames


def estimated(text: bytes, folder: Path, command_line: CommandLine, *arguments: str | Path) -> dict[str, Any]:
    """The document of the verb for a file of messages."""
    path = folder / "out.jsonl"
    path.write_bytes(text)
    outcome = command_line("manifest", "estimate", "--messages", path, "--json", *arguments)
    assert outcome.code == 0, outcome.err
    document: dict[str, Any] = json.loads(outcome.out)
    return document


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The verbs, with no configuration around."""
    for name in ("VISIONEDGE_CONFIG", "VISIONEDGE_HTTP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return CommandLine(capsys)


def test_the_estimate_scales_what_the_file_holds_to_a_day(tmp_path: Path, command_line: CommandLine) -> None:
    """A message a second is 86,400 a day, a good fifth of an S1 unit.

    Start and end happen once, so their events are no rate.
    """
    ended = build_event_message(
        Sender("press-7", "vision", "run"), 3, Event("camera", "stopped", "ended", TelemetryHarness().utc)
    )
    document = estimated(recorded(600, 1.0) + ended.body + b"\n", tmp_path, command_line)
    assert document["measuredSeconds"] == 599
    assert (document["messagesPerDay"], document["blocksPerDay"]) == (86_400, 86_400)
    assert document["measuredFrames"] == {"dock": 599}
    assert document["units"]["S1"] == {"share": 0.216, "units": 1}
    assert document["budgetLastsHours"] is None


@pytest.mark.parametrize(("boxes", "interval_s"), [(1, 1.0), (60, 0.5), (100, 7.0)])
def test_the_estimate_agrees_with_an_independent_count(
    tmp_path: Path, command_line: CommandLine, boxes: int, interval_s: float
) -> None:
    """By other code, from the same lines."""
    text = recorded(300, interval_s, boxes=boxes)
    document = estimated(text, tmp_path, command_line)
    messages, blocks_counted, frames = count_again(text)
    assert frames == messages == round(300 / interval_s)
    seconds = (messages - 1) * interval_s
    without_the_first = blocks_counted * (messages - 1) / messages
    assert document["blocksPerDay"] == pytest.approx(without_the_first * 86_400 / seconds, rel=0.001)


@given(st.lists(st.tuples(st.sampled_from(["dock", "yard-7"]), st.integers(0, 9)), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_size_of_a_message_follows_from_its_body(frames: list[tuple[str, int]]) -> None:
    """Nothing of a message is missing in the file but its id, whose length is known."""
    harness, labels = TelemetryHarness(), ("person", "größe, 50 %", "car")
    telemetry = Telemetry(TelemetryConfig(mode="all"), Sender("edge-ö", "vision", "a1b2c3a1b2c3"))
    for camera, boxes in frames:
        ids = [sequence_number % 3 for sequence_number in range(boxes)]
        telemetry.offer(harness.result([PERSON_BOX] * boxes, ids=ids, camera=camera, labels=labels))
    event = telemetry.event("camera", "live", "camera dock is live")
    for message in [*telemetry.flush(), event]:
        again = parse_message(message.body)
        assert again.size_bytes == message.size_bytes
        assert (again.output, again.sequence_number, again.frames) == (
            message.output,
            message.sequence_number,
            message.frames,
        )
        assert again.properties == message.properties


def test_the_size_of_a_scene_message_follows_from_its_body() -> None:
    telemetry = TelemetryHarness().telemetry()
    telemetry.offer_scene([scene_event(1, label="größe, 50 %"), scene_event(2, zone="Zone, 3")])
    [message] = telemetry.flush()
    again = parse_message(message.body)
    assert (again.output, again.sequence_number, again.properties) == ("scene", 1, message.properties)


def test_the_estimate_counts_scene_events_before_detections(
    tmp_path: Path, command_line: CommandLine
) -> None:
    """Of a day's budget they take their own blocks, and at least the tenth that is kept for them."""
    config = tmp_path / "vision.yaml"
    config.write_text("telemetry: {maxPerDay: 7200}\n")
    message = build_scene_messages(SENDER, 1, [encode_scene_event(scene_event())])[0].body
    lines = recorded(600, 1.0).splitlines(keepends=True)
    few = b"".join([*lines[:300], message + b"\n", *lines[300:]])
    document = estimated(few, tmp_path, command_line, "--config", config)
    assert document["measuredMessages"]["scene"] == 1
    assert document["budgetLastsHours"] == 1.8


@given(
    st.lists(st.tuples(st.floats(0.05, 3.0), st.integers(0, 40)), min_size=1, max_size=60),
    st.sampled_from(["all", "changes"]),
    st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_a_messages_file_has_the_counted_blocks_within_the_budget(
    frames: list[tuple[float, int]], mode: str, max_per_day: int
) -> None:
    """Frames, messages and blocks, counted again from the lines alone."""
    harness, sent = TelemetryHarness(), list[Message]()
    telemetry = Telemetry(
        TelemetryConfig.model_validate({"mode": mode, "maxPerDay": max_per_day}),
        Sender("press-7", "vision", "a1b2c3a1b2c3"),
        clock=lambda: harness.now_ns,
        utc=lambda: harness.utc,
    )
    for after_s, boxes in frames:
        telemetry.offer(harness.result([PERSON_BOX] * boxes))
        sent += telemetry.due(harness.advance_s(after_s))
    sent += telemetry.flush()
    messages, blocks_counted, published = count_again(b"\n".join(message.body for message in sent))
    counted = telemetry.statistics()
    assert (messages, published) == (counted.messages.get("detections", 0), counted.published)
    assert blocks_counted == counted.usage.blocks.get("detections", 0) <= max_per_day


def test_the_estimate_counts_events_beside_frames(tmp_path: Path, command_line: CommandLine) -> None:
    """A camera that is lost sixty times an hour costs 1,440 blocks a day more."""
    quiet = estimated(recorded(3600, 10.0), tmp_path, command_line)
    flaky = estimated(recorded(3600, 10.0, events=60), tmp_path, command_line)
    assert flaky["blocksPerDay"] - quiet["blocksPerDay"] == pytest.approx(1440, rel=0.03)


def test_the_estimate_shows_when_the_budget_is_spent(tmp_path: Path, command_line: CommandLine) -> None:
    """Only sent messages are billed; `--config` gives the limit."""
    config = tmp_path / "vision.yaml"
    config.write_text("telemetry: {maxPerDay: 7200}\n")
    document = estimated(recorded(600, 1.0), tmp_path, command_line, "--config", config)
    assert document["budgetLastsHours"] == 2.0
    assert document["billedBlocksPerDay"] == 7200


def test_several_runs_in_a_file_are_counted_separately(tmp_path: Path, command_line: CommandLine) -> None:
    """`--messages` appends: the night between two runs is no quiet scene."""
    next_day = recorded(60, 1.0).replace(b"2026-11-22T", b"2026-11-23T")
    document = estimated(recorded(60, 1.0) + next_day, tmp_path, command_line)
    assert document["measuredSeconds"] == 118
    assert document["blocksPerDay"] == 86_400


def test_a_run_counts_until_its_budget_was_spent(tmp_path: Path, command_line: CommandLine) -> None:
    """Frames dropped by the budget do not count as a quiet scene."""
    document = estimated(recorded(600, 1.0, maxPerDay=60), tmp_path, command_line)
    assert document["blocksPerDay"] == 86_400


def test_many_blocks_take_many_units_and_one_is_one_unit(tmp_path: Path, command_line: CommandLine) -> None:
    """Units are whole ones, in words that a person would write."""
    config = tmp_path / "vision.yaml"
    config.write_text("telemetry: {maxPerDay: 1000000000}\n")
    path = tmp_path / "out.jsonl"
    path.write_bytes(recorded(30, 0.1, boxes=60))
    outcome = command_line("manifest", "estimate", "--messages", path, "--config", config)
    assert "% of a unit's daily quota: 5 units\n" in outcome.out
    assert "% of a unit's daily quota: 1 unit\n" in outcome.out
    assert "(s)" not in outcome.out
    assert "note: measured for less than 10 minutes" in outcome.out


def test_a_truncated_last_line_is_ignored(tmp_path: Path, command_line: CommandLine) -> None:
    """The module may still be writing, or was killed."""
    document = estimated(recorded(60, 1.0) + b'{"schema": "visionedge/ba', tmp_path, command_line)
    assert document["measuredSeconds"] == 59


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "fewer than two messages with frames"),
        (b"hello\n", "line 1 is not a message"),
        (b"[]\n", "line 1 is not a message"),
        (b'{"schema": "visionedge/frame/1"}\n', "line 1 is not a message"),
        (b"\xff\xfe\n", "line 1 is not a message"),
        (b"[" * 100_000 + b"\n", "line 1 is not a message"),
        (b"x" * 300_000, "line 1 is not a message"),
        (recorded(1, 1.0), "fewer than two messages with frames"),
        (recorded(9, 1.0).replace(b'"capturedAt"', b'"taken"'), "line 3 is not a message"),
    ],
    ids=["empty", "text", "list", "frame", "binary", "deep", "long", "one frame", "no times"],
)
def test_a_file_in_another_format_is_refused_in_one_line(
    tmp_path: Path, command_line: CommandLine, text: bytes, reason: str
) -> None:
    """With its name and the number of the line."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(text)
    outcome = command_line("manifest", "estimate", "--messages", path)
    [line] = outcome.complaints
    assert (outcome.code, outcome.out) == (2, "")
    assert reason in line
    assert "out.jsonl" in line
    assert len(line) < 500


def test_a_missing_messages_file_is_refused(tmp_path: Path, command_line: CommandLine) -> None:
    """With the system's reason."""
    outcome = command_line("manifest", "estimate", "--messages", tmp_path / "none.jsonl")
    assert outcome.code == 2
    assert "No such file" in outcome.complaints[0]


def test_nothing_is_estimated_from_an_assumed_scene(command_line: CommandLine) -> None:
    """One line explains how to get real messages."""
    outcome = command_line("manifest", "estimate")
    [line] = outcome.complaints
    assert (outcome.code, outcome.out) == (2, "")
    assert "visionedge run" in line
    assert "--messages FILE" in line
    assert "--url" in line
    assert command_line("manifest", "estimate", "--messages", "x", "--url", "http://h/").code == 2


# --- the estimate of a running module ---------------------------------------------------------------------


class StatusServer:
    """Answers `/api/v1/status` as a module does, with a token."""

    def __init__(self, document: object, token: str = "") -> None:
        body, asked = json.dumps(document).encode(), list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                right = not token or self.headers.get("Authorization") == f"Bearer {token}"
                self.send_response(200 if right else 401)
                self.end_headers()
                self.wfile.write(body if right else b"{}")

            def log_message(self, *_: object) -> None:
                """Nothing on stderr."""

        self.asked = asked
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "StatusServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def status_of(seconds: int) -> dict[str, Any]:
    """The status of a module that sent a block a second and an event every ten seconds."""
    now = [0]
    meter = UsageMeter(lambda: now[0])
    for sequence_number in range(seconds):
        now[0] += 1_000_000_000
        meter.count("detections", 4000)
        if sequence_number % 10 == 0:
            meter.count("events", 300)
    return {"hub": {"state": "connected", "metering": status.build_metering(meter.usage()).dump()}}


def test_the_estimate_reads_the_counters_of_a_running_module(command_line: CommandLine) -> None:
    """Its last hour, by output, as its own status projects it."""
    with StatusServer(status_of(3600)) as module:
        outcome = command_line("manifest", "estimate", "--url", f"{module.url}/", "--json")
    document = json.loads(outcome.out)
    assert module.asked == ["/api/v1/status"]
    assert document["blocksPerDay"] == pytest.approx(86_400 + 8_640, rel=0.03)
    assert document["messagesPerDay"] == pytest.approx(86_400 + 8_640, rel=0.03)
    assert document["blockFill"] == pytest.approx((4000 + 30) / (4096 * 1.1), rel=0.01)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_the_token_comes_from_an_option_or_the_environment(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A missing token is reported; a token is never shown."""
    with StatusServer(status_of(600), token="hunter2-hunter2") as module:
        refused = command_line("manifest", "estimate", "--url", module.url)
        if by == "environment":
            monkeypatch.setenv("VISIONEDGE_HTTP_TOKEN", "hunter2-hunter2")
        option = ["--token", "hunter2-hunter2"] if by == "option" else []
        outcome = command_line("manifest", "estimate", "--url", module.url, *option)
    assert refused.code == 1
    assert "VISIONEDGE_HTTP_TOKEN" in refused.complaints[0]
    assert outcome.code == 0
    assert "hunter2" not in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"hub": {"state": "starting"}}, "counted no messages yet"),
        ({"hub": {"state": "local", "metering": {}}}, "start it with --messages FILE"),
        ({"hub": {"state": "connected", "metering": {"blocks": 3}}}, "its status has an unknown form"),
        ({}, "counted no messages yet"),
        ([], "not the status of a visionedge module"),
    ],
)
def test_a_module_without_messages_gives_no_estimate(
    command_line: CommandLine, document: object, reason: str
) -> None:
    """Nothing is reported as 0 because nothing was counted."""
    with StatusServer(document) as module:
        outcome = command_line("manifest", "estimate", "--url", module.url)
    [line] = outcome.complaints
    assert (outcome.code, outcome.out) == (1, "")
    assert reason in line


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("127.0.0.1:8080", 2),
        ("ftp://h/", 2),
        ("http://u:p@h/", 2),
        ("http://h:x/", 2),
        ("http://h/?token=x", 2),
        ("http://127.0.0.1:1", 1),
    ],
)
def test_an_unreachable_address_gives_a_one_line_error(
    command_line: CommandLine, url: str, code: int
) -> None:
    """Wrong ones are wrong arguments, silent ones failed work."""
    outcome = command_line("manifest", "estimate", "--url", url)
    assert outcome.code == code
    assert len(outcome.complaints) == 1


def test_a_token_that_is_invalid_in_a_header_is_refused_without_showing_it(command_line: CommandLine) -> None:
    """http.client would quote it."""
    outcome = command_line("manifest", "estimate", "--url", "http://127.0.0.1:1", "--token", "hunter2\nx")
    assert outcome.code == 2
    assert "hunter2" not in outcome.err
