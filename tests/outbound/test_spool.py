"""The spool: messages on disk until their PUBACK, their order, and a failing disk."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spool_harness import SpoolHarness, drain, message, run_round
from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool
from visionedge.outbound.sqlite_store import LostRange
from visionedge.runtime.threads import ThreadGroup

SECOND_NS = 1_000_000_000


def acknowledge(spool: Spool, count: int) -> None:
    """The hub receives and acknowledges the next messages."""
    for _ in range(count):
        following = spool.peek()
        assert following is not None
        spool.settle(following)


def ids(messages: list[Message]) -> list[str]:
    """Their ids."""
    return [message.message_id for message in messages]


# --- at least once, in order ------------------------------------------------------------------------------


def test_a_message_is_handed_out_only_when_it_is_on_disk(harness: SpoolHarness) -> None:
    """Else a restart could give its number, which was already sent, to another message."""
    spool = harness.spool()
    spool.put(message(1))
    assert spool.peek() is None
    assert len(spool) == 1

    run_round(spool)

    first = spool.peek()
    assert first is not None
    assert first.message_id == "detections-1"


def test_unacknowledged_messages_are_sent_again_unchanged_after_a_kill(harness: SpoolHarness) -> None:
    """Body, id, properties and order stay; acknowledged messages are not sent again."""
    spool = harness.spool()
    before = [message(1), message(1, "events"), message(2), message(3)]
    for each in before:
        spool.put(each)
    run_round(spool)
    first = spool.peek()
    assert first is not None
    spool.settle(first)
    run_round(spool)
    harness.crash()

    again = harness.spool()

    assert dict(again.last_numbers) == {"detections": 3, "events": 1}
    assert drain(again) == before[1:]


def test_an_acknowledgement_that_was_not_written_means_a_duplicate(harness: SpoolHarness) -> None:
    """At least once: rather twice than never."""
    spool = harness.spool()
    spool.put(message(1))
    run_round(spool)
    first = spool.peek()
    assert first is not None
    spool.settle(first)
    harness.crash()
    assert ids(drain(harness.spool())) == ["detections-1"]


def test_numbers_of_messages_that_never_reached_the_disk_are_reused(harness: SpoolHarness) -> None:
    """They were not sent either: so there is no gap."""
    spool = harness.spool()
    spool.put(message(1))
    run_round(spool)
    spool.put(message(2))
    harness.crash()
    assert dict(harness.spool().last_numbers) == {"detections": 1}


def test_messages_beyond_the_memory_limit_are_read_back_in_order(harness: SpoolHarness) -> None:
    """Only a window of the messages on disk is in memory; the others follow in order."""
    spool = harness.spool()
    for sequence_number in range(1, 2001):
        spool.put(message(sequence_number))
        if sequence_number % 100 == 0:
            run_round(spool)
    assert spool.status().waiting == 2000
    assert ids(drain(spool)) == [f"detections-{sequence_number}" for sequence_number in range(1, 2001)]
    assert spool.status().waiting_bytes == 0


def test_large_messages_are_not_all_kept_in_memory(harness: SpoolHarness) -> None:
    """The window is bounded by bytes, too."""
    spool = harness.spool(memory_bytes=10_000_000)
    for sequence_number in range(1, 61):
        spool.put(message(sequence_number, size=190_000))
        run_round(spool)
    window = spool._queue._window
    assert sum(entry.message.size_bytes for entry in window) < 5_000_000
    assert len(drain(spool)) == 60


def test_the_spent_budget_of_the_day_is_saved_with_the_messages(harness: SpoolHarness) -> None:
    """A restart does not begin a new budget; counts of other dates are removed."""
    spool = harness.spool()
    spent = {"2026-11-22": 2}
    spool.set_spent_source(lambda: spent)
    spool.put(message(1))
    run_round(spool)
    harness.crash()
    again = harness.spool()
    assert dict(again.spent) == {"2026-11-22": 2}
    again.set_spent_source(lambda: {"2026-11-23": 1})
    again.put(message(2))
    run_round(again)
    harness.crash()
    assert dict(harness.spool().spent) == {"2026-11-23": 1}


def test_closing_writes_the_waiting_messages(harness: SpoolHarness) -> None:
    """The thread ends; no message is left behind."""
    spool = harness.spool()
    spool.start()
    for sequence_number in range(1, 1201):
        spool.put(message(sequence_number))
    assert spool.close(10)
    assert harness.thread_group.join(5) == []
    assert len(drain(harness.spool())) == 1200


# --- bounds -----------------------------------------------------------------------------------------------


def test_the_oldest_telemetry_is_dropped_first_and_events_last(harness: SpoolHarness) -> None:
    """The oldest messages are dropped and reported as ranges."""
    size = message(1).size_bytes
    spool = harness.spool(limit_bytes=6 * size)
    for each in (message(1, "events"), *(message(n) for n in range(1, 6))):
        spool.put(each)
    run_round(spool)
    for sequence_number in range(6, 9):
        spool.put(message(sequence_number))
    run_round(spool)

    lost_ranges = spool.take_lost_ranges()

    assert lost_ranges == [LostRange("detections", 1, 3, "full", key=1)]
    assert spool.dropped == {"full": 3}
    assert ids(drain(spool)) == ["events-1", *(f"detections-{n}" for n in range(4, 9))]


def test_events_are_dropped_if_nothing_else_is_left(harness: SpoolHarness) -> None:
    """The limit always holds."""
    size = message(1, "events").size_bytes
    spool = harness.spool(limit_bytes=3 * size)
    for sequence_number in range(1, 6):
        spool.put(message(sequence_number, "events"))
        run_round(spool)
    assert [(loss.first, loss.last) for loss in spool.take_lost_ranges()] == [(1, 2)]
    assert ids(drain(spool)) == ["events-3", "events-4", "events-5"]


def test_the_message_being_sent_is_not_dropped(harness: SpoolHarness) -> None:
    """It may have arrived, so it is not a certain loss."""
    spool = harness.spool(limit_bytes=2 * message(1).size_bytes)
    spool.put(message(1))
    run_round(spool)
    first = spool.peek()
    assert first is not None
    for sequence_number in (2, 3, 4):
        spool.put(message(sequence_number))
        run_round(spool)
    spool.settle(first)
    run_round(spool)
    assert [(loss.first, loss.last) for loss in spool.take_lost_ranges()] == [(2, 2)]


def test_a_message_that_the_hub_has_is_never_reported_as_lost(harness: SpoolHarness) -> None:
    """Acknowledged before the writing or during it: its row is still there when others have to go."""
    spool = harness.spool(limit_bytes=4 * message(1).size_bytes)
    for sequence_number in range(1, 5):
        spool.put(message(sequence_number))
    run_round(spool)
    acknowledge(spool, 1)
    for sequence_number in range(5, 9):
        spool.put(message(sequence_number))
    harness.meanwhile("SELECT", lambda: acknowledge(spool, 1))
    run_round(spool)
    assert [(loss.first, loss.last) for loss in spool.take_lost_ranges()] == [(3, 4)]
    assert spool.dropped == {"full": 2}
    assert [m.sequence_number for m in drain(spool)] == [5, 6, 7, 8]


def test_the_limit_holds_after_each_round_for_any_concurrent_messages(harness: SpoolHarness) -> None:
    """A burst faster than the disk: the excess is dropped at once, not with the next message."""
    size = message(40).size_bytes
    spool = harness.spool(limit_bytes=4 * size)
    last_numbers = iter(range(1, 100))

    def put_burst() -> None:
        for _ in range(10):
            spool.put(message(next(last_numbers)))

    put_burst()
    for _ in range(3):
        harness.meanwhile("COMMIT", put_burst)
    run_round(spool)
    run_round(spool)
    assert spool.status().waiting_bytes <= 4 * size
    [loss] = spool.take_lost_ranges()
    assert (loss.first, loss.last) == (1, 36)
    assert [m.sequence_number for m in drain(spool)] == [37, 38, 39, 40]


def test_messages_that_are_too_old_are_dropped_even_with_free_space(harness: SpoolHarness) -> None:
    """Age counts the time that the module ran: neither a wrong wall clock nor a holiday makes it old."""
    spool = harness.spool(max_age_s=3600)
    spool.put(message(1))
    run_round(spool)
    harness.now_ns += 3000 * SECOND_NS
    run_round(spool)
    harness.crash()
    harness.now_ns += 10_000_000 * SECOND_NS  # it was off
    again = harness.spool(max_age_s=3600)
    run_round(again)
    assert len(again) == 1

    harness.now_ns += 700 * SECOND_NS
    run_round(again)

    assert len(again) == 0
    assert again.peek() is None
    assert [(loss.first, loss.last, loss.reason) for loss in again.take_lost_ranges()] == [(1, 1, "old")]


def test_a_loss_is_reported_until_the_hub_has_the_message_that_reports_it(harness: SpoolHarness) -> None:
    """Also by the next start; a range that grew meanwhile is reported from its unreported part."""
    size = message(1).size_bytes
    spool = harness.spool(limit_bytes=3 * size)
    for sequence_number in range(1, 6):
        spool.put(message(sequence_number))
        run_round(spool)
    lost_ranges = spool.take_lost_ranges()
    assert [(loss.first, loss.last) for loss in lost_ranges] == [(1, 2)]
    spool.put(message(1, "events"), tuple(lost_ranges))
    run_round(spool)  # the loss grows to 3
    assert spool.take_lost_ranges() == [], "one is on its way"
    harness.crash()

    spool = harness.spool(limit_bytes=3 * size)
    lost_ranges = spool.take_lost_ranges()
    assert [(loss.first, loss.last) for loss in lost_ranges] == [(1, 3)]
    spool.put(message(2, "events"), tuple(lost_ranges))
    run_round(spool)  # and to 4
    assert drain(spool)[-1].message_id == "events-2"
    run_round(spool)

    assert [(loss.first, loss.last) for loss in spool.take_lost_ranges()] == [(4, 4)]


def test_a_message_that_the_sdk_refuses_is_counted_as_lost(harness: SpoolHarness) -> None:
    """Its number is reported like any other."""
    spool = harness.spool()
    for sequence_number in (1, 2):
        spool.put(message(sequence_number))
    run_round(spool)
    first = spool.peek()
    assert first is not None
    spool.settle(first, dropped="refused")
    run_round(spool)
    assert [(loss.first, loss.last, loss.reason) for loss in spool.take_lost_ranges()] == [(1, 1, "refused")]
    assert spool.dropped == {"refused": 1}


def test_memory_is_bounded_when_the_disk_is_slow(harness: SpoolHarness) -> None:
    """Unwritten messages are limited; the oldest telemetry is dropped, counted and reported."""
    spool = harness.spool(memory_bytes=1000)
    spool.put(message(1, "events"))
    for sequence_number in range(1, 21):
        spool.put(message(sequence_number))
    assert spool.status().waiting_bytes <= 1000
    run_round(spool)
    [loss] = spool.take_lost_ranges()
    assert (loss.output, loss.first) == ("detections", 1)
    assert ids(drain(spool)) == ["events-1", *(f"detections-{n}" for n in range(loss.last + 1, 21))]


def test_in_memory_the_message_being_sent_is_not_dropped_for_others(harness: SpoolHarness) -> None:
    """It may arrive at any moment; its acknowledgement removes only this message."""
    size = message(1).size_bytes
    spool = harness.spool(memory_bytes=2 * size)
    harness.read_only(on=True)
    for sequence_number in (1, 2, 3):
        spool.put(message(sequence_number))
        run_round(spool)
    first = spool.peek()
    assert first is not None
    assert first.sequence_number == 2
    spool.put(message(4, "events"))
    run_round(spool)
    assert spool.peek() is first

    spool.settle(first)

    left = spool.peek()
    assert left is not None
    assert (left.output, left.sequence_number) == ("events", 4)
    assert spool.dropped == {"full": 2}


def test_in_memory_a_message_larger_than_the_limit_is_dropped_alone(harness: SpoolHarness) -> None:
    """The message being sent stays, and nothing is dropped twice."""
    spool = harness.spool(memory_bytes=200)
    harness.read_only(on=True)
    spool.put(message(1, size=50))
    run_round(spool)
    assert spool.peek() is not None
    spool.put(message(2, size=500))
    run_round(spool)
    assert len(spool) == 1
    assert spool.bytes <= 200
    assert spool.dropped == {"full": 1}


# --- disks ------------------------------------------------------------------------------------------------


def test_a_failing_disk_switches_to_memory_and_back_with_events(harness: SpoolHarness) -> None:
    """Order stays, nothing is lost, and each change is reported once."""
    spool = harness.spool()
    spool.put(message(1))
    run_round(spool)
    harness.read_only(on=True)
    spool.put(message(2))
    run_round(spool)

    assert spool.status().mode == "memory"
    assert "readonly" in str(spool.status().reason)
    assert [news.code for news in spool.take_events()] == ["spool-memory"]
    first = spool.peek()
    assert first is not None
    assert first.sequence_number == 1
    spool.settle(first)
    second = spool.peek()
    assert second is not None
    assert second.sequence_number == 2, "it goes on in memory"

    harness.read_only(on=False)
    spool.put(message(3))
    run_round(spool)
    assert spool.status().mode == "memory", "not tried again yet"
    harness.now_ns += 10 * SECOND_NS
    run_round(spool)
    assert spool.status().mode == "disk"
    assert [news.code for news in spool.take_events()] == ["spool-disk"]

    harness.crash()
    assert [m.sequence_number for m in drain(harness.spool())] == [2, 3]


def test_a_full_disk_does_not_stop_the_spool(harness: SpoolHarness) -> None:
    """SQLite reports `full`: memory takes over, and messages on disk keep their place in the order."""
    spool = harness.spool(memory_bytes=10_000_000)
    for sequence_number in range(1, 601):
        spool.put(message(sequence_number, size=2000))
    for _ in range(3):
        run_round(spool)
    (pages,) = harness.databases[-1].execute("PRAGMA page_count").fetchone()
    harness.databases[-1].execute(f"PRAGMA max_page_count={pages}")
    for sequence_number in range(601, 651):
        spool.put(message(sequence_number, size=2000))
        run_round(spool)
    assert spool.status().mode == "memory"
    assert "full" in str(spool.status().reason)
    assert [m.sequence_number for m in drain(spool)] == list(range(1, 651))


def test_a_flapping_disk_does_not_flood_events(harness: SpoolHarness) -> None:
    """The same event comes at most once in five minutes; the status shows each change."""
    spool = harness.spool()
    for sequence_number in range(1, 11):
        harness.read_only(on=sequence_number % 2 == 1)
        harness.now_ns += 11 * SECOND_NS
        spool.put(message(sequence_number))
        run_round(spool)
    assert sorted(news.code for news in spool.take_events()) == ["spool-disk", "spool-memory"]


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT INTO message", "COMMIT"])
def test_a_disk_that_hangs_is_reported_after_ten_seconds_and_messages_pass_it(
    harness: SpoolHarness, statement: str
) -> None:
    """The messages that were being written come when the disk answers; none is lost, none comes twice."""
    spool = harness.spool()
    sent: list[int] = []
    reported: list[str] = []

    def look() -> None:
        reported.extend(event.code for event in spool.take_events())

    def hang() -> None:
        harness.now_ns += 9 * SECOND_NS
        look()
        assert (reported, spool.status().mode, spool.peek()) == ([], "disk", None)
        harness.now_ns += 2 * SECOND_NS
        spool.put(message(2))
        look()
        status = spool.status()
        assert (reported, status.mode, status.stalled_seconds) == (["storage-stalled"], "memory", 11)
        assert status.reason == "the disk has not answered for 11 s"
        spool.put(message(3))
        spool.put(message(4))
        for _ in range(2):
            following = spool.peek()
            assert following is not None
            sent.append(following.sequence_number)
            spool.settle(following)
        harness.now_ns += 60 * SECOND_NS
        look()

    spool.put(message(1))
    harness.meanwhile(statement, hang)
    run_round(spool)
    look()
    status = spool.status()
    assert (reported, status.mode, status.stalled_seconds) == (
        ["storage-stalled", "storage-back"],
        "disk",
        0,
    )
    assert sent == [2, 3]
    sent += [m.sequence_number for m in drain(spool)]
    assert sorted(sent) == [1, 2, 3, 4]
    assert len(spool) == 0
    assert spool.unwritten == 0
    harness.crash()
    assert drain(harness.spool()) == []


def test_messages_pass_a_hanging_disk_that_holds_older_ones(harness: SpoolHarness) -> None:
    spool = harness.spool()
    for number in range(1, 2001):
        spool.put(message(number))
    for _ in range(5):
        run_round(spool)
    sent: list[int] = []

    def hang() -> None:
        while (following := spool.peek()) is not None:
            sent.append(following.sequence_number)
            spool.settle(following)
        harness.now_ns += 11 * SECOND_NS
        assert [event.code for event in spool.take_events()] == ["storage-stalled"]
        spool.put(message(1, "events"))
        following = spool.peek()
        assert following is not None
        assert following.output == "events"
        spool.settle(following)

    spool.put(message(2001))
    harness.meanwhile("COMMIT", hang)
    run_round(spool)
    sent += [m.sequence_number for m in drain(spool)]
    assert sent == list(range(1, 2002))


def test_a_slow_disk_is_not_a_hanging_one(harness: SpoolHarness) -> None:
    """Each round is quick enough; together they are not."""
    spool = harness.spool()
    for number in range(1, 20):
        spool.put(message(number))
        harness.meanwhile("COMMIT", lambda: setattr(harness, "now_ns", harness.now_ns + 3 * SECOND_NS))
        run_round(spool)
        assert spool.take_events() == []


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_not_a_database_is_set_aside(harness: SpoolHarness, content: bytes) -> None:
    """The spool begins again on disk and reports it; an empty file is simply filled."""
    harness.path.parent.mkdir()
    harness.path.write_bytes(content)
    spool = harness.spool()
    spool.put(message(1))
    run_round(spool)
    assert spool.status().mode == "disk"
    assert [news.code for news in spool.take_events()] == (["spool-lost"] if content else [])
    assert harness.path.with_name("spool.db.aside").exists() == bool(content)
    assert ids(drain(spool)) == ["detections-1"]


def test_a_damaged_file_is_set_aside_at_the_start_and_numbers_continue(harness: SpoolHarness) -> None:
    """The event has the last numbers that may be lost, as far as they are readable."""
    spool = harness.spool(memory_bytes=10_000_000)
    for sequence_number in range(1, 1501):
        spool.put(message(sequence_number, size=1000))
    for _ in range(4):
        run_round(spool)
    harness.crash()
    damage(harness.path)

    again = harness.spool()

    [news] = again.take_events()
    assert (news.code, dict(news.details)) == ("spool-lost", {"upTo": {"detections": 1500}})
    assert dict(again.last_numbers) == {"detections": 1500}
    again.put(message(1501))
    assert [m.sequence_number for m in drain(again)] == [1501]


def test_a_file_that_is_damaged_in_use_is_replaced_and_its_numbers_are_reported(
    harness: SpoolHarness,
) -> None:
    """Messages that were only in it are reported as lost; messages in memory and the numbers continue."""
    spool = harness.spool(memory_bytes=10_000_000)
    for sequence_number in range(1, 3001):
        spool.put(message(sequence_number, size=2000))
    for _ in range(7):
        run_round(spool)
    harness.databases[-1].execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(harness.path)
    spool.put(message(3001))

    got = [m.sequence_number for m in drain(spool)]
    run_round(spool)

    lost_ranges = spool.take_lost_ranges()
    lost = [n for loss in lost_ranges for n in range(loss.first, loss.last + 1)]
    assert {loss.reason for loss in lost_ranges} == {"unreadable"}
    assert sorted([*got, *lost]) == list(range(1, 3002))
    assert spool.status().mode == "disk"
    assert "spool-lost" in [news.code for news in spool.take_events()]
    harness.crash()
    assert dict(harness.spool().last_numbers) == {"detections": 3001}


def damage(path: Path) -> None:
    """Overwrite the middle half of a file."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 4)
        file.write(b"\xaa" * (size // 2))


def test_a_folder_that_cannot_be_created_means_a_spool_in_memory(tmp_path: Path) -> None:
    """The module starts anyway and retries."""
    (tmp_path / "data").write_text("a file where the folder should be")
    harness = SpoolHarness(tmp_path)
    spool = harness.spool()
    spool.put(message(1))
    run_round(spool)
    assert spool.status().mode == "memory"
    assert ids(drain(spool)) == ["detections-1"]
    (tmp_path / "data").unlink()
    harness.now_ns += 11 * SECOND_NS
    spool.put(message(2))
    run_round(spool)
    assert spool.status().mode == "disk"
    harness.databases[-1].close()


def test_two_modules_never_share_a_spool(harness: SpoolHarness) -> None:
    """They would send everything twice: the second one works in memory until the first has ended."""
    first = harness.spool()
    first.put(message(1))
    run_round(first)
    second = harness.spool()
    second.put(message(7))
    run_round(second)
    assert second.status().mode == "memory"
    assert "locked" in str(second.status().reason)
    harness.databases[0].close()
    harness.now_ns += 11 * SECOND_NS
    run_round(second)
    assert second.status().mode == "disk"
    assert [m.sequence_number for m in drain(second)] == [1, 7]


def test_the_messages_of_another_module_are_set_aside(harness: SpoolHarness) -> None:
    """A data folder that came from another device must not send under this one's name."""
    spool = harness.spool(owner="hub/other/vision")
    spool.put(message(1))
    run_round(spool)
    harness.crash()
    mine = harness.spool(owner="hub/mine/vision")
    assert dict(mine.last_numbers) == {}
    assert len(mine) == 0
    assert [news.code for news in mine.take_events()] == ["spool-lost"]
    assert drain(mine) == []


# --- speed ------------------------------------------------------------------------------------------------


def test_two_thousand_messages_a_second_are_stored_and_read(tmp_path: Path) -> None:
    """Each is committed before it is sent, with at most half a millisecond of CPU."""
    thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    spool = Spool(tmp_path / "spool.db", "me", thread_group)
    ready = threading.Event()
    spool.attach(ready.set)
    spool.start()
    total, taken = 4000, 0
    body = json.dumps({"x": "y" * 1000}).encode()
    began_s = time.process_time()  # not of the clock: other work on this machine is no matter
    for sequence_number in range(1, total + 1):
        spool.put(Message("detections", body, f"d-{sequence_number}", {"schema": "s"}, sequence_number))
    while taken < total:
        following = spool.peek()
        if following is None:
            ready.wait(1)
            ready.clear()
            continue
        taken += 1
        assert following.sequence_number == taken
        spool.settle(following)
    took_s = time.process_time() - began_s
    assert spool.close(10)
    assert thread_group.join(5) == []
    assert total / took_s >= 2000


def wait_until(condition: Callable[[], bool], changed: threading.Event) -> None:
    """Wait for something that a callback announces."""
    for _ in range(100):
        if condition():
            return
        changed.wait(0.1)
        changed.clear()
    raise AssertionError("never")


def test_the_client_is_woken_when_its_message_is_on_disk(harness: SpoolHarness) -> None:
    """Without polling."""
    spool = harness.spool()
    woken = threading.Event()
    spool.attach(woken.set)
    spool.start()
    spool.put(message(1))
    wait_until(lambda: spool.peek() is not None, woken)
    assert spool.close(5)
    assert harness.thread_group.join(5) == []
