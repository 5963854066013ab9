"""Another telemetry policy while the module runs, and answers to pictures of other modules."""

from typing import Any

from test_edge_spool import World as SpoolWorld
from test_edge_spool import drain, message, turn, world
from test_edge_telemetry import MAN, World, documents
from visionedge.config import TelemetryConfig
from visionedge.edge.messages import CORRELATION_ID
from visionedge.edge.store import Bounds

__all__ = ["world"]  # the fixture


def policy(**settings: Any) -> TelemetryConfig:
    """A policy that does not wait for blocks."""
    return TelemetryConfig.model_validate({"fillSeconds": 0, **settings})


def test_another_interval_counts_for_what_waits_already() -> None:
    """Frames that would have waited for a day go now."""
    clock = World()
    telemetry = clock.telemetry(mode="all", intervalSeconds=86400)
    telemetry.offer(clock.result([MAN]))
    assert telemetry.due(clock.pass_s(1)) == []
    telemetry.apply(policy(mode="all", intervalSeconds=1))
    assert len(telemetry.due(clock.now_ns)) == 1


def test_another_mode_keeps_what_waits_and_what_was_told() -> None:
    """Nothing is lost by it, nothing is told twice, and the numbers go on."""
    clock = World()
    telemetry = clock.telemetry(mode="changes")
    telemetry.offer(clock.result([MAN]))
    telemetry.apply(policy(mode="none"))
    telemetry.offer(clock.result([MAN]))
    telemetry.apply(policy(mode="changes"))
    telemetry.offer(clock.result([MAN]))
    first = documents(telemetry.due(clock.pass_s(1)))
    telemetry.apply(policy(mode="all"))
    telemetry.offer(clock.result([MAN]))
    second = documents(telemetry.due(clock.pass_s(1)))
    assert [document["messageSequence"] for document in first + second] == [1, 2]
    counts = telemetry.statistics()
    assert (counts.offered, counts.told, counts.muted, counts.unchanged) == (4, 2, 1, 1)


def test_other_thresholds_compare_with_the_frame_that_was_told() -> None:
    """A box that moved a little is news from now on."""
    clock = World()
    telemetry = clock.telemetry(mode="changes", moveThreshold=0.5)
    moved = tuple(edge + 0.05 for edge in MAN)
    telemetry.offer(clock.result([MAN]))
    telemetry.offer(clock.result([moved]))  # type: ignore[list-item]  # four edges as before
    telemetry.apply(policy(mode="changes", moveThreshold=0.01))
    telemetry.offer(clock.result([moved]))  # type: ignore[list-item]  # as above
    assert telemetry.statistics().waiting == 2


def test_a_larger_budget_opens_the_day_again_and_its_end_is_told_again() -> None:
    """What was spent today stays spent."""
    clock = World()
    telemetry = clock.telemetry(mode="all", maxPerDay=1)
    spent = []
    for limit in (1, 3):
        telemetry.apply(policy(mode="all", maxPerDay=limit))
        for _ in range(3):
            telemetry.offer(clock.result([MAN]))
            spent += documents(telemetry.due(clock.pass_s(1)))
    codes = [document["code"] for document in spent if "code" in document]
    assert codes == ["telemetry-budget-spent"] * 2
    assert sum("frames" in document for document in spent) == 3


def test_smaller_bounds_of_the_spool_let_the_oldest_go(world: SpoolWorld) -> None:
    """At once, counted as for a full one; larger ones keep more from now on."""
    spool = world.spool(limit_bytes=100_000)
    for number in range(10):
        spool.put(message(number, size=1_000))
    turn(spool)
    spool.bound(Bounds(limit_bytes=5_500))
    turn(spool)
    assert spool.dropped == {"full": 5}
    spool.bound(Bounds(limit_bytes=100_000))
    for number in range(10, 20):
        spool.put(message(number, size=1_000))
    assert [got.number for got in drain(spool)] == list(range(5, 20))


def test_an_answer_goes_at_once_whatever_the_mode_with_the_next_number() -> None:
    """One frame in a document of its own, and the id of the question beside it."""
    clock = World()
    telemetry = clock.telemetry(mode="none")
    made = telemetry.answer(clock.result([MAN], camera="frames"), "question-7")
    assert made is not None
    (document,) = documents([made])
    assert (document["messageSequence"], len(document["frames"])) == (1, 1)
    assert made.properties[CORRELATION_ID] == "question-7"
    other = telemetry.answer(clock.result(camera="frames"), "")
    assert other is not None
    assert CORRELATION_ID not in other.properties
    assert other.number == 2
    counts = telemetry.statistics()
    assert (counts.offered, counts.told, counts.messages) == (2, 2, {"detections": 2})


def test_an_answer_counts_for_the_budget_of_the_day() -> None:
    """When it is spent there is none, counted and told like any other frame."""
    clock = World()
    telemetry = clock.telemetry(maxPerDay=1)
    assert telemetry.answer(clock.result([MAN]), "") is not None
    assert telemetry.answer(clock.result([MAN]), "") is None
    assert telemetry.statistics().dropped == {"budget": 1}
    assert [document["code"] for document in documents(telemetry.due(clock.now_ns))] == [
        "telemetry-budget-spent"
    ]
