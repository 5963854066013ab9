"""Another telemetry policy while the module runs, and answers to pictures of other modules."""

from typing import Any

import pytest

from spool_harness import SpoolHarness, drain, message, run_round, harness
from telemetry_harness import PERSON_BOX, Box, TelemetryHarness, documents
from visionedge.config.schema import TelemetryConfig
from visionedge.iothub.telemetry import Telemetry
from visionedge.outbound.messages import CORRELATION_ID, Message
from visionedge.outbound.metering import count_blocks
from visionedge.outbound.sqlite_store import SpoolLimits

__all__ = ["world"]  # the fixture


def policy(**settings: Any) -> TelemetryConfig:
    """A policy that does not wait for blocks."""
    return TelemetryConfig.model_validate({"fillSeconds": 0, **settings})


def test_a_new_interval_applies_to_waiting_frames() -> None:
    """Frames that would have waited for a day go now."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", intervalSeconds=86400)
    telemetry.offer(clock.result([PERSON_BOX]))
    assert telemetry.due(clock.advance_s(1)) == []
    telemetry.apply(policy(mode="all", intervalSeconds=1))
    assert len(telemetry.due(clock.now_ns)) == 1


def test_a_new_mode_keeps_waiting_frames_and_the_last_sent_frame() -> None:
    """Nothing is lost, nothing is sent twice, and the numbers continue."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="changes")
    telemetry.offer(clock.result([PERSON_BOX]))
    telemetry.apply(policy(mode="none"))
    telemetry.offer(clock.result([PERSON_BOX]))
    telemetry.apply(policy(mode="changes"))
    telemetry.offer(clock.result([PERSON_BOX]))
    first = documents(telemetry.due(clock.advance_s(1)))
    telemetry.apply(policy(mode="all"))
    telemetry.offer(clock.result([PERSON_BOX]))
    second = documents(telemetry.due(clock.advance_s(1)))
    assert [document["messageSequence"] for document in first + second] == [1, 2]
    counts = telemetry.statistics()
    assert (counts.offered, counts.published, counts.muted, counts.unchanged) == (4, 2, 1, 1)


def test_new_thresholds_are_compared_with_the_last_sent_frame() -> None:
    """A box that moved a little is news from now on, and one that holds for less is there."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="changes", moveThreshold=0.5)
    moved: Box = (0.15, 0.15, 0.35, 0.95)
    for box in (PERSON_BOX, PERSON_BOX, PERSON_BOX, moved):
        clock.advance_s(0.5)
        telemetry.offer(clock.result([box]))
    assert telemetry.statistics().waiting == 1
    telemetry.apply(policy(mode="changes", moveThreshold=0.01))
    telemetry.offer(clock.result([moved]))
    assert telemetry.statistics().waiting == 2
    telemetry.apply(policy(mode="changes", changeSeconds=0))
    telemetry.offer(clock.result([moved, (0.6, 0.1, 0.8, 0.9)]))
    assert telemetry.statistics().waiting == 3


def test_a_larger_budget_continues_the_day_and_its_exhaustion_is_reported_again() -> None:
    """What was spent today stays spent."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=1)
    spent = []
    for limit in (1, 3):
        telemetry.apply(policy(mode="all", maxPerDay=limit))
        for _ in range(3):
            telemetry.offer(clock.result([PERSON_BOX]))
            spent += documents(telemetry.due(clock.advance_s(1)))
    codes = [document["code"] for document in spent if "code" in document]
    assert codes == ["telemetry-budget-spent"] * 2
    assert sum("frames" in document for document in spent) == 3


def test_smaller_spool_limits_drop_the_oldest_messages(harness: SpoolHarness) -> None:
    """At once, counted as for a full one; larger ones keep more from now on."""
    spool = harness.spool(limit_bytes=100_000)
    for sequence_number in range(10):
        spool.put(message(sequence_number, size=1_000))
    run_round(spool)
    spool.set_limits(SpoolLimits(limit_bytes=5_500))
    run_round(spool)
    assert spool.dropped == {"full": 5}
    spool.set_limits(SpoolLimits(limit_bytes=100_000))
    for sequence_number in range(10, 20):
        spool.put(message(sequence_number, size=1_000))
    assert [got.sequence_number for got in drain(spool)] == list(range(5, 20))


def test_an_answer_is_sent_at_once_in_every_mode_with_the_next_number() -> None:
    """One frame in a document of its own, and the id of the question beside it."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="none")
    made = telemetry.answer(clock.result([PERSON_BOX], camera="frames"), "question-7")
    assert made is not None
    (document,) = documents([made])
    assert (document["messageSequence"], len(document["frames"])) == (1, 1)
    assert made.properties[CORRELATION_ID] == "question-7"
    other = telemetry.answer(clock.result(camera="frames"), "")
    assert other is not None
    assert CORRELATION_ID not in other.properties
    assert other.sequence_number == 2
    counts = telemetry.statistics()
    assert (counts.offered, counts.published, counts.messages) == (2, 2, {"detections": 2})


def test_an_answer_counts_for_the_budget_of_the_day() -> None:
    """Without a budget there is no answer; it is counted and reported like any other frame."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(maxPerDay=1)
    assert telemetry.answer(clock.result([PERSON_BOX]), "") is not None
    assert telemetry.answer(clock.result([PERSON_BOX]), "") is None
    assert telemetry.statistics().dropped == {"budget": 1}
    assert [document["code"] for document in documents(telemetry.due(clock.now_ns))] == [
        "telemetry-budget-spent"
    ]


# --- blocks that IoT Hub bills -----------------------------------------------------------------------------


def test_the_budget_counts_blocks_of_4_kb_not_messages() -> None:
    """Body and properties, begun blocks whole: exactly what the meter counts, never more than allowed."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=10)
    sent: list[Message] = []
    for _ in range(8):
        telemetry.offer(clock.result([PERSON_BOX] * 60))
        sent += [each for each in telemetry.due(clock.advance_s(1)) if each.frames]
    [size] = {count_blocks(message.size_bytes) for message in sent}
    assert size > 1
    assert len(sent) == 10 // size
    assert telemetry.statistics().usage.blocks["detections"] == len(sent) * size
    assert telemetry.statistics().left_today == 0


def test_a_message_that_needs_more_blocks_than_are_left_ends_the_day() -> None:
    """The first message that does not fit is dropped, counted and reported; smaller ones do not slip past."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=1)
    telemetry.offer(clock.result([PERSON_BOX] * 60))
    assert [each["code"] for each in documents(telemetry.due(clock.advance_s(1)))] == ["telemetry-budget-spent"]
    telemetry.offer(clock.result())
    assert telemetry.due(clock.advance_s(1)) == []
    assert telemetry.statistics().dropped == {"budget": 2}
    assert telemetry.statistics().offered == 2


def test_an_answer_uses_its_own_number_of_blocks() -> None:
    """An answer to a picture of another module is billed like any message."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(maxPerDay=3)
    made = telemetry.answer(clock.result([PERSON_BOX] * 60), "")
    assert made is not None
    assert telemetry.statistics().left_today == 3 - count_blocks(made.size_bytes) < 2
    assert telemetry.answer(clock.result([PERSON_BOX] * 60), "") is None


def test_a_restart_keeps_the_count_of_blocks(harness: SpoolHarness) -> None:
    """What the spool keeps of the day is what the budget is counted in."""
    clock, spool = TelemetryHarness(), harness.spool()
    telemetry = clock.telemetry(maxPerDay=10)
    spool.set_spent_source(telemetry.spent)
    made = telemetry.answer(clock.result([PERSON_BOX] * 60), "")
    assert made is not None
    spool.put(made)
    run_round(spool)
    spool.close(0)
    assert dict(harness.spool().spent) == {clock.utc.date().isoformat(): count_blocks(made.size_bytes)}


def rate(clock: TelemetryHarness, telemetry: Telemetry, per_minute: int, minutes: int) -> list[dict[str, Any]]:
    """The events that are made while so many messages of one block go out."""
    made = []
    for _ in range(minutes):
        for _ in range(per_minute):
            telemetry.offer(clock.result([PERSON_BOX]))
            made += telemetry.flush()
        made += telemetry.due(clock.advance_s(60))
    return [document for document in documents(made) if document["schema"] == "visionedge/event/1"]


def test_a_day_that_will_exceed_the_budget_is_reported_in_advance(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning in the log and one event, after some minutes; not again while nothing changes."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=14_400)
    assert rate(clock, telemetry, per_minute=20, minutes=4) == []
    [event] = rate(clock, telemetry, per_minute=20, minutes=200)
    assert (event["kind"], event["code"]) == ("module", "telemetry-budget-at-risk")
    assert event["details"]["exceeded"] == ["maxPerDay"]
    assert event["details"]["detectionsPerDay"] == pytest.approx(28_800, rel=0.05)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert ["telemetry.maxPerDay is 14,400" in record.getMessage() for record in warned] == [True]


def test_a_projection_that_falls_below_the_budget_is_reported_once() -> None:
    """And one that hovers about the limit is not reported again and again."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=14_400)
    assert len(rate(clock, telemetry, per_minute=11, minutes=60)) == 1
    for _ in range(10):
        assert rate(clock, telemetry, per_minute=9, minutes=20) == []
        assert rate(clock, telemetry, per_minute=11, minutes=20) == []
    [event] = rate(clock, telemetry, per_minute=1, minutes=120)
    assert event["code"] == "telemetry-budget-safe"
    assert event["details"]["exceeded"] == []


def test_the_warning_is_sent_once_a_day_while_its_cause_lasts() -> None:
    """Also on the days after the budget was spent, when nothing was sent for hours."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=1_440)
    events = rate(clock, telemetry, per_minute=2, minutes=3 * 1440)
    codes = [event["code"].removeprefix("telemetry-budget-") for event in events]
    days = [event["at"][:10] for event in events if event["code"].endswith("at-risk")]
    assert codes == ["at-risk", "at-risk", "spent", "at-risk", "spent", "at-risk"]
    assert days == ["2026-11-22", "2026-11-23", "2026-11-24", "2026-11-25"]


def test_a_day_beyond_one_iot_hub_unit_is_reported_if_the_budget_allows_more() -> None:
    """`maxPerDay` above what one S1 unit takes: 400,000 blocks."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=10**9)
    [event] = rate(clock, telemetry, per_minute=300, minutes=8)
    assert event["details"]["exceeded"] == ["S1"]
    assert "400,000" in event["message"]


def test_without_a_budget_nothing_is_projected() -> None:
    """`maxPerDay: 0` is a way to say: events only."""
    clock = TelemetryHarness()
    telemetry = clock.telemetry(mode="all", maxPerDay=0)
    assert [each["code"] for each in rate(clock, telemetry, per_minute=20, minutes=30)] == [
        "telemetry-budget-spent"
    ]
