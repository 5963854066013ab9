"""The delivery, and calls that may never return."""

import json
import logging
import threading
from pathlib import Path
from typing import cast

import pytest

from edge_runtime.driver import result
from visionedge.config.schema import TelemetryConfig
from visionedge.iothub.client import HubClient
from visionedge.iothub.delivery import Delivery
from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk_calls import AbandonableCalls, CallTimeoutError, StuckError
from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool
from visionedge.outbound.sqlite_store import SpoolLimits
from visionedge.runtime.threads import ThreadGroup

IDENTITY = Identity(hub="hub", device="press-7", module="vision", gateway="gateway")


def message(sequence_number: int, output: str = "detections", size: int = 10) -> Message:
    """A message with a body of so many bytes."""
    return Message(output, b"x" * size, f"{output}-{sequence_number}", {}, sequence_number)


def test_a_call_gives_results_and_errors() -> None:
    """As if it had been called directly; all calls use one thread."""
    thread_group = ThreadGroup(lambda _name, _error: None)
    calls = AbandonableCalls(thread_group, "calls")
    names = {calls.call("name", lambda: threading.current_thread().name, 5) for _ in range(3)}
    with pytest.raises(ZeroDivisionError):
        calls.call("divide", lambda: 1 // 0, 5)
    calls.close()
    assert names == {"calls-1"}
    assert thread_group.join(5) == []


def test_an_abandoned_thread_ends_when_its_call_returns_and_is_not_counted() -> None:
    """Then calls work again."""
    thread_group = ThreadGroup(lambda _name, _error: None)
    calls = AbandonableCalls(thread_group, "calls", limit=1)
    held = threading.Event()
    with pytest.raises(CallTimeoutError, match="hold did not return"):
        calls.call("hold", held.wait, 0.01)
    with pytest.raises(StuckError):
        calls.call("more", lambda: None, 5)
    held.set()
    assert thread_group.join(5) == []
    assert calls.call("more", lambda: 42, 5) == 42
    assert (calls.abandoned, calls.hung()) == (1, 0)
    calls.close()
    assert thread_group.join(5) == []


def test_a_late_result_is_passed_to_its_handler() -> None:
    """A client that was made after its deadline must be closed, or its threads stay for ever."""
    thread_group = ThreadGroup(lambda _name, _error: None)
    calls = AbandonableCalls(thread_group, "calls")
    held = threading.Event()
    late: list[str] = []

    def slow() -> str:
        held.wait()
        return "a client"

    with pytest.raises(CallTimeoutError):
        calls.call("build", slow, 0.01, late=late.append)
    held.set()
    assert thread_group.join(5) == []
    assert late == ["a client"]


def test_outside_iot_edge_without_a_messages_file_nothing_is_collected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Locally, frames cost nothing and the log says once why nothing is sent."""
    caplog.set_level(logging.INFO, logger="visionedge.iothub")
    thread_group = ThreadGroup(lambda _name, _error: None)
    delivery = Delivery.build(TelemetryConfig(), None, None, thread_group, data=tmp_path)
    delivery.start()
    delivery.event("module", "started", "started")
    delivery.tick()
    delivery.flush()
    assert delivery.close(1)
    assert delivery.status().hub is None
    assert not delivery.status().inside_edge
    assert [r.getMessage() for r in caplog.records] == [
        "not inside IoT Edge: running locally, no message is sent"
    ]


def test_a_data_folder_gets_a_spool_that_continues_numbers_and_budget(tmp_path: Path) -> None:
    """A restart begins where the last one stopped, also with nothing left in the spool."""
    thread_group = ThreadGroup(lambda _name, _error: None)
    policy = TelemetryConfig.model_validate({"mode": "all", "maxPerDay": 5})
    for start in range(2):
        delivery = Delivery.build(policy, IDENTITY, None, thread_group, data=tmp_path)
        delivery._spool.start()  # type: ignore[union-attr]  # without the hub client
        for _ in range(3):
            delivery.event("module", "x", "x")
        delivery.offer(result("dock", start))
        delivery.flush()
        assert delivery.close(5)
        assert (tmp_path / "spool.db").exists()
        assert delivery.status().spool is not None
        assert delivery.status().telemetry.left_today == 4 - start
    spool = Spool(tmp_path / "spool.db", IDENTITY.owner, thread_group)
    assert dict(spool.last_numbers) == {"events": 6, "detections": 2}
    assert len(spool) == 8
    assert spool.close(5)
    assert thread_group.join(5) == []


class DrainedHub:
    """A hub client that is connected and lets the test take messages."""

    connected = True


def test_dropped_messages_become_one_event_with_their_ranges(tmp_path: Path) -> None:
    """The cloud learns which numbers it will never get; at most every ten seconds."""
    thread_group = ThreadGroup(lambda _name, _error: None)
    spool = Spool(tmp_path / "spool.db", "me", thread_group, limits=SpoolLimits(limit_bytes=3_000))
    now = [0]
    delivery = Delivery(
        TelemetryConfig.model_validate({"mode": "all"}),
        IDENTITY,
        hub=cast("HubClient", DrainedHub()),
        spool=spool,
        clock=lambda: now[0],
    )
    for sequence_number in range(1, 41):
        spool.put(message(sequence_number, size=200))
        spool._write_and_refill()
    now[0] += 1
    delivery.tick()
    spool._write_and_refill()
    event_messages = [m for m in taken(spool) if m.output == "events"]
    [event] = [json.loads(m.body) for m in event_messages]
    assert (event["kind"], event["code"]) == ("storage", "spool-dropped")
    [lost] = event["details"]["ranges"]
    assert lost["output"] == "detections"
    assert lost["from"] == 1
    assert event["details"]["messages"] == lost["to"]
    assert lost["reason"] == "full"
    spool.settle(spool.peek() or message(0), dropped="refused")
    delivery.tick()
    assert [m for m in taken(spool) if m.output == "events"] == [], "not yet again"
    assert spool.close(5)


def taken(spool: Spool) -> list[Message]:
    """All that a hub would get now."""
    got = []
    while (following := spool.peek()) is not None:
        got.append(following)
        spool.settle(following)
        spool._write_and_refill()
    return got


def test_changes_of_the_disk_state_become_events(tmp_path: Path) -> None:
    """A damaged file is reported to the cloud with the kind `storage`."""
    (tmp_path / "spool.db").write_bytes(b"no database at all" * 100)
    thread_group = ThreadGroup(lambda _name, _error: None)
    spool = Spool(tmp_path / "spool.db", "me", thread_group)
    delivery = Delivery(TelemetryConfig(), IDENTITY, spool=spool, hub=cast("HubClient", SpoolingHub(spool)))
    delivery.tick()
    spool._write_and_refill()
    [event] = [json.loads(m.body) for m in taken(spool)]
    assert (event["kind"], event["code"]) == ("storage", "spool-lost")
    assert spool.close(5)


class SpoolingHub:
    """A hub client that hands messages to a spool."""

    connected = False

    def __init__(self, spool: Spool) -> None:
        self.send = spool.put


def test_inside_iot_edge_a_messages_file_and_a_hub_client_are_made(tmp_path: Path) -> None:
    """The identity names the sender."""
    thread_group = ThreadGroup(lambda _name, _error: None)
    delivery = Delivery.build(
        TelemetryConfig(), IDENTITY, tmp_path / "messages.jsonl", thread_group, data=tmp_path
    )
    status = delivery.status()
    assert delivery.close(1)
    assert (status.device, status.module, status.inside_edge) == ("press-7", "vision", True)
    assert status.hub is not None
    assert status.messages_file is not None
