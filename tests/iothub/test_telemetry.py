"""Telemetry: which frames are sent, when, and how the others are counted."""

from hypothesis import given, settings
from hypothesis import strategies as st

from telemetry_harness import PERSON_BOX, TelemetryHarness, documents
from visionedge.outbound.messages import Message

# --- when -------------------------------------------------------------------------------------------------


def test_frames_wait_for_the_interval_and_are_sent_together() -> None:
    """Nothing before the interval is over; then one document with all frames in order; then nothing."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=1)
    telemetry.offer(harness.result([PERSON_BOX]))
    telemetry.offer(harness.result(camera="gate"))

    assert telemetry.due(harness.advance_s(0.99)) == []
    [document] = documents(telemetry.due(harness.advance_s(0.01)))

    assert [frame["camera"] for frame in document["frames"]] == ["dock", "gate"]
    assert telemetry.due(harness.advance_s(10)) == []


def test_frames_that_fill_a_message_do_not_wait() -> None:
    """A long interval must not make a mountain."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=86400)
    while not (messages := telemetry.due(harness.now_ns)):
        telemetry.offer(harness.result([PERSON_BOX] * 50))

    assert all(150_000 < message.size_bytes <= 200_000 for message in messages[:1])


def test_an_event_is_made_at_once_with_its_own_number() -> None:
    """Events do not wait for an interval; each output counts from 1."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=1)
    first = telemetry.event("camera", "camera-lost", "camera dock: gone", {"camera": "dock"})
    telemetry.offer(harness.result())
    second = telemetry.event("camera", "camera-back", "camera dock: back")
    [batch] = telemetry.due(harness.advance_s(1))

    assert [m.sequence_number for m in (first, second, batch)] == [1, 2, 1]
    assert telemetry.due(harness.now_ns) == []


def test_secrets_in_events_are_masked() -> None:
    """Also deep inside the details."""
    secret = "rtsp://user:hunter2@192.0.2.5/s"
    message = TelemetryHarness().telemetry().event("camera", "x", f"lost {secret}", {"a": [{"uri": secret}]})
    assert b"hunter2" not in message.body
    assert b"192.0.2.5" in message.body


def test_flush_does_not_wait() -> None:
    """At the end all frames are sent."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=3600)
    telemetry.offer(harness.result())
    assert len(telemetry.flush()) == 1
    assert telemetry.flush() == []


# --- what -------------------------------------------------------------------------------------------------


def test_mode_none_sends_events_only() -> None:
    """Frames are counted as muted."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="none")
    telemetry.offer(harness.result([PERSON_BOX]))
    assert telemetry.flush() == []
    assert telemetry.statistics().muted == 1


def test_a_heartbeat_is_sent_each_minute() -> None:
    """A frame of a quiet camera is sent every 60 s, so that silence means a failure."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="changes", intervalSeconds=0.1)
    published = 0
    for _ in range(125):
        telemetry.offer(harness.result([PERSON_BOX]))
        published += sum(m.frames for m in telemetry.due(harness.advance_s(1)))
    assert published == 3
    assert telemetry.statistics().unchanged == 122


# --- how many ---------------------------------------------------------------------------------------------


def test_a_spent_budget_stops_detections_and_one_event_reports_it() -> None:
    """Detections are sent again on the next UTC day; events are always sent."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=1, maxPerDay=2)
    outputs = []
    for _ in range(5):
        telemetry.offer(harness.result([PERSON_BOX]))
        outputs += [m.output for m in telemetry.due(harness.advance_s(1))]
    assert outputs == ["detections", "detections", "events"]
    assert telemetry.event("module", "x", "y").output == "events"
    assert telemetry.statistics().dropped == {"budget": 3}
    assert telemetry.statistics().left_today == 0

    harness.advance_s(12 * 3600)
    telemetry.offer(harness.result([PERSON_BOX]))
    [message] = telemetry.due(harness.advance_s(1))
    assert (message.output, message.sequence_number) == ("detections", 3)


def test_the_budget_event_names_the_setting_and_is_sent_once_a_day() -> None:
    """People learn which key to change."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", maxPerDay=0)
    telemetry.offer(harness.result())
    telemetry.offer(harness.result())
    [event] = documents(telemetry.flush())
    assert (event["kind"], event["code"]) == ("module", "telemetry-budget-spent")
    assert "telemetry.maxPerDay" in event["message"]

    harness.advance_s(86400)
    telemetry.offer(harness.result())
    assert len(telemetry.flush()) == 1


def test_a_change_that_the_budget_dropped_is_sent_the_next_day() -> None:
    """Frames are compared with the last frame that was sent."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="changes", maxPerDay=1)
    telemetry.offer(harness.result())
    telemetry.flush()
    for _ in range(3):
        harness.advance_s(0.5)
        telemetry.offer(harness.result([PERSON_BOX]))
    harness.advance_s(86_400)
    telemetry.offer(harness.result([PERSON_BOX]))
    assert [m.output for m in telemetry.flush()] == ["events", "detections"]


def test_a_frame_too_large_for_a_message_is_counted_and_reported_once() -> None:
    """Per camera one event, however many such frames come."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all")
    for _ in range(3):
        telemetry.offer(harness.result([PERSON_BOX], labels=("x" * 200_000,)))
    [event] = documents(telemetry.flush())
    assert event["code"] == "telemetry-frame-oversize"
    assert event["details"] == {"camera": "dock"}
    assert telemetry.statistics().dropped == {"oversize": 3}


def test_a_frame_with_nan_is_counted_and_reported() -> None:
    """It must not stop the loop, and must not be sent."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all")
    telemetry.offer(harness.result([PERSON_BOX], score=float("nan")))
    assert [m.output for m in telemetry.flush()] == ["events"]
    assert telemetry.statistics().dropped == {"invalid": 1}


def test_if_messages_are_not_taken_the_oldest_frames_are_dropped() -> None:
    """What waits is bounded by bytes."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode="all", intervalSeconds=86400)
    for _ in range(200):
        telemetry.offer(harness.result([PERSON_BOX] * 50))
    statistics = telemetry.statistics()
    assert statistics.dropped["pending"] > 0
    assert statistics.waiting + statistics.dropped["pending"] == 200
    assert sum(len(m.body) for m in telemetry.flush()) < 900_000


@given(
    st.sampled_from(["all", "changes", "none"]),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(["offer", "due", "flush"]), st.integers(0, 3)), max_size=60),
)
@settings(max_examples=80, deadline=None)
def test_every_offered_frame_is_accounted_for(
    mode: str, max_per_day: int, steps: list[tuple[str, int]]
) -> None:
    """Always: offered = published + unchanged + muted + waiting + dropped, and numbers without gaps."""
    harness = TelemetryHarness()
    telemetry = harness.telemetry(mode=mode, maxPerDay=max_per_day, intervalSeconds=1)
    messages: list[Message] = []
    for action, sequence_number in steps:
        harness.advance_s(sequence_number * 3600)
        if action == "offer":
            telemetry.offer(harness.result([PERSON_BOX] * sequence_number))
        elif action == "due":
            messages += telemetry.due(harness.now_ns)
        else:
            messages += telemetry.flush()
    counts = telemetry.statistics()
    assert counts.offered == sum(action == "offer" for action, _ in steps)
    assert counts.offered == (
        counts.published + counts.unchanged + counts.muted + counts.waiting + sum(counts.dropped.values())
    )
    assert counts.published == sum(m.frames for m in messages)
    for output in ("detections", "events"):
        numbers = [m.sequence_number for m in messages if m.output == output]
        assert numbers == list(range(1, len(numbers) + 1))
