"""The hub client with a scripted link: limits, order, errors, and calls that never return."""

import logging
import queue
import threading
from pathlib import Path

import pytest

from hub_client_harness import QUICK_DEADLINES, HubClientHarness, message, quick_deadlines
from visionedge.iothub.client import HubStatus
from visionedge.iothub.sdk import (
    LinkError,
    MessageRefusedError,
    describe_error,
)
from visionedge.outbound.sqlite_store import SpoolLimits
from visionedge.runtime.threads import ThreadGroup

# --- the client -------------------------------------------------------------------------------------------


def test_messages_are_sent_in_order_and_the_state_follows_the_connection(harness: HubClientHarness) -> None:
    """Messages sent before and after the start arrive in order; the states are recorded."""
    client = harness.client()
    client.send(message(1))
    client.start()
    client.send(message(2, "events"))
    client.send(message(3))
    harness.hub.wait(lambda: len(harness.hub.arrived) == 3)

    assert client.close(5)

    assert harness.hub.arrived == ["detections-1", "events-2", "detections-3"]
    assert harness.states == ["connecting", "connected", "closed"]
    assert client.status() == HubStatus("closed", False, 3, 0, 0, {}, None, 0, 0, 0, {})


def test_closing_sends_the_waiting_messages(harness: HubClientHarness) -> None:
    """A client that has hardly begun flushes before it ends."""
    client = harness.client()
    client.start()
    for number in range(50):
        client.send(message(number))

    assert client.close(5)

    assert len(harness.hub.arrived) == 50
    assert harness.hub.closed == harness.hub.opened == 1


def test_a_full_spool_drops_the_oldest_detections_and_keeps_events(harness: HubClientHarness) -> None:
    """Offline, waiting messages are bounded; drops are counted by reason."""
    client = harness.client(limits=SpoolLimits(limit_bytes=3 * message(1).size_bytes))
    for number in range(4):
        client.send(message(number))
    client.send(message(4, "events"))
    harness.wait_until_written()
    assert client.status().dropped == {"full": 2}

    client.start()
    harness.hub.wait(lambda: len(harness.hub.arrived) == 3)

    assert harness.hub.arrived == ["detections-2", "detections-3", "events-4"]


def test_a_message_is_sent_again_until_it_is_acknowledged(harness: HubClientHarness) -> None:
    """A failed send costs the link, not the message; order stays."""
    harness.hub.errors = [LinkError("build"), LinkError("connect"), LinkError("send")]
    client = harness.client()
    client.send(message(1))
    client.send(message(2))
    client.start()
    harness.hub.wait(lambda: len(harness.hub.arrived) == 2)

    assert harness.hub.arrived == ["detections-1", "detections-2"]
    assert client.status().rebuilds >= 2


def test_a_message_that_can_never_be_sent_is_dropped(harness: HubClientHarness) -> None:
    """One poisoned message must not stop all others; it is counted, the link stays."""
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: "connected" in harness.states)

    harness.hub.errors = [MessageRefusedError("256 KB")]
    client.send(message(1))
    client.send(message(2))
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-2"])

    assert client.status().dropped == {"refused": 1}
    assert client.status().rebuilds == 0


def test_a_lost_link_is_replaced_even_if_no_message_waits(harness: HubClientHarness) -> None:
    """The link says that it is lost; the next one is made and the old one closed."""
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: harness.states == ["connecting", "connected"])

    harness.hub.on_lost("the connection was closed")

    harness.hub.wait(lambda: harness.states[2:] == ["waiting", "connecting", "connected"])
    assert harness.hub.closed == 1
    assert client.status().last_error == "the connection was closed"


def test_a_token_that_cannot_be_renewed_keeps_its_connection(harness: HubClientHarness) -> None:
    """The old token is valid for a while: messages use the old link until the new one can be made."""
    client = harness.client(quick_deadlines(renew_s=0.05))
    client.start()
    harness.hub.wait(lambda: "connected" in harness.states)
    harness.hub.errors = [LinkError("the key store does not answer")]
    harness.hub.wait(lambda: harness.hub.opened == 2)
    client.send(message(1))
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])

    harness.hub.wait(lambda: harness.hub.opened >= 3)
    harness.hub.wait(lambda: harness.hub.closed >= 1)

    assert "waiting" not in harness.states
    assert client.status().last_error is None


def test_a_call_that_never_returns_loses_a_thread_and_no_message(harness: HubClientHarness) -> None:
    """After the deadline another thread sends the message over another link."""
    held = harness.hub.hold["send"] = threading.Event()
    client = harness.client(quick_deadlines(send_s=0.05))
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: harness.hub.closed == 1)
    del harness.hub.hold["send"]
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])

    status = client.status()
    assert status.abandoned >= 1
    assert status.hung >= 1
    held.set()


def test_too_many_lost_threads_are_reported_as_stuck_until_they_return(harness: HubClientHarness) -> None:
    """The client starts no more threads than its limit, and recovers when they return."""
    harness.hub.hold["build"] = threading.Event()
    client = harness.client(quick_deadlines(build_s=0.02))
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: "stuck" in harness.states)
    assert client.status().hung == QUICK_DEADLINES.max_hung_threads

    harness.hub.hold["build"].set()
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])

    assert client.status().hung == 0


@pytest.mark.parametrize("where", ["build", "connect", "send", "close"])
def test_close_keeps_its_deadline_in_every_hang_of_the_sdk(harness: HubClientHarness, where: str) -> None:
    """`close` returns, and says that the process must not wait for threads."""
    harness.hub.hold[where] = threading.Event()
    client = harness.client(quick_deadlines(disconnect_s=5))
    client.start()
    harness.hub.wait(lambda: harness.hub.opened == 1)
    client.send(message(1))

    done: list[bool] = []
    closer = threading.Thread(target=lambda: done.append(client.close(0.4)))
    closer.start()
    closer.join(2)

    assert done == [False]
    assert client.status().state == "closed"


def test_a_client_that_never_started_closes_at_once(harness: HubClientHarness) -> None:
    """Its messages stay in the spool."""
    client = harness.client()
    client.send(message(1))
    assert client.close(5)
    assert (client.status().queued, client.status().dropped) == (1, {})


def test_closing_tries_a_dead_hub_only_once(harness: HubClientHarness) -> None:
    """Messages stay in the spool, and closing does not wait for the whole deadline."""
    harness.hub.errors = [LinkError("refused")] * 100_000
    client = harness.client()
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: "waiting" in harness.states)
    opened = harness.hub.opened

    assert client.close(30)

    assert harness.hub.opened <= opened + 2
    assert (client.status().queued, client.status().dropped) == (1, {})


def test_the_same_failure_is_logged_once(harness: HubClientHarness, caplog: pytest.LogCaptureFixture) -> None:
    """An hour without a hub is one line, not thousands; another reason is another line."""
    caplog.set_level(logging.INFO, logger="visionedge.iothub")
    refused, unknown = LinkError("connection refused"), LinkError("no such host")
    harness.hub.errors = [*[refused] * 20, *[unknown] * 5]
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: "connected" in harness.states)

    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [line.split(": ")[1].split(";")[0] for line in lines] == ["connection refused", "no such host"]


def test_secrets_never_reach_the_status(harness: HubClientHarness) -> None:
    """Texts of the SDK are redacted like all others."""
    harness.hub.errors = [LinkError("bad SharedAccessSignature sr=x&sig=abcdef&se=1 for key=hunter2")]
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: "connected" in harness.states)

    assert "abcdef" not in str(client.status())
    assert "hunter2" not in str(client.status())


# --- faults ------------------------------------------------------------------------------------------------


def test_the_twin_is_read_at_once_and_then_regularly(harness: HubClientHarness) -> None:
    """The answer proves that the hub works, and is passed on."""
    client = harness.client(quick_deadlines(probe_s=0.05))
    client.start()
    harness.hub.wait(lambda: harness.hub.twin_requests >= 3)
    assert harness.twins[0] == ({"desired": {}, "reported": {}}, 1)
    assert client.status().faults == {}


def test_a_silent_twin_ends_the_connection_although_messages_are_accepted(harness: HubClientHarness) -> None:
    """A session that the hub has lost still acknowledges messages."""
    harness.hub.hold["twin"] = threading.Event()
    client = harness.client(quick_deadlines(request_s=0.05))
    client.start()
    harness.hub.wait(lambda: harness.hub.closed >= 1)
    harness.hub.hold.pop("twin").set()
    harness.hub.wait(lambda: harness.hub.twin_requests >= 1)
    client.send(message(1))
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])

    faults = client.status().faults
    assert faults["silent"] >= 1
    assert faults["overdue"] >= 1
    assert "reading the twin did not return" in str(client.status().last_error)


def test_a_hub_that_never_answers_the_twin_still_gets_its_messages(harness: HubClientHarness) -> None:
    """The twin is read at longer and longer intervals, because each attempt costs the connection."""
    harness.hub.hold["twin"] = threading.Event()
    client = harness.client(quick_deadlines(request_s=0.01, probe_s=0.02, max_hung_threads=1000))
    client.start()
    for number in range(5):
        client.send(message(number))
    harness.hub.wait(lambda: len(harness.hub.arrived) == 5)
    assert client.status().faults["silent"] >= 1


def test_a_message_that_ends_every_connection_is_dropped(harness: HubClientHarness) -> None:
    """A poison message must not block all others for ever; others that fail now and then are not lost."""
    harness.hub.errors = [LinkError("send")]
    client = harness.client(quick_deadlines(poison_tries=3, poison_pause_s=0.05))
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])

    harness.hub.poison_message_id = "detections-2"
    client.send(message(2))
    client.send(message(3))
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1", "detections-3"])

    assert client.status().dropped == {"refused": 1}
    assert client.status().faults["poison"] == 1


def test_a_hub_that_drops_connections_by_itself_blames_no_message(harness: HubClientHarness) -> None:
    """A connection that does not last without the message is no proof against it."""
    harness.hub.errors = [LinkError("reset")] * 4
    harness.hub.flapping = 6
    client = harness.client(quick_deadlines(poison_tries=2, poison_pause_s=30))
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: harness.hub.flapping == 0)
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])
    assert client.status().dropped == {}


def test_an_unreachable_hub_blames_no_message(harness: HubClientHarness) -> None:
    """Only connections that were lost while this message was sent count."""
    harness.hub.errors = [LinkError("refused")] * 30
    client = harness.client(quick_deadlines(poison_tries=2))
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])
    assert client.status().dropped == {}


def test_a_client_that_stays_stuck_requests_a_restart_of_the_process(harness: HubClientHarness) -> None:
    """If no thread returns for a while, `on_stuck` is called; threads that return prevent it."""
    harness.hub.hold["build"] = threading.Event()
    client = harness.client(quick_deadlines(build_s=0.01, stuck_s=0.05))
    client.start()
    harness.hub.wait(lambda: "on_stuck" in harness.states)
    assert client.status().state == "stuck"
    assert client.status().faults["stuck"] >= 1


def test_a_short_jam_does_not_end_the_module(harness: HubClientHarness) -> None:
    """Being stuck for a short time is no reason."""
    held = harness.hub.hold["build"] = threading.Event()
    client = harness.client(quick_deadlines(build_s=0.1, stuck_s=60))
    client.send(message(1))
    client.start()
    harness.hub.wait(lambda: "stuck" in harness.states)
    held.set()
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])
    assert "on_stuck" not in harness.states


def test_an_error_is_described_with_its_causes_in_one_line() -> None:
    """All texts of the chain of causes; repeated texts once."""
    error = RuntimeError("Could not connect\nto IoTHub")
    error.__cause__ = OSError(111, "Connection refused")
    error.__cause__.__cause__ = ValueError("Connection refused")
    assert describe_error(error) == "Could not connect to IoTHub: [Errno 111] Connection refused"
    assert describe_error(RuntimeError()) == "RuntimeError"


# --- unexpected errors --------------------------------------------------------------------------------------


def test_a_message_that_fails_in_an_unknown_way_is_dropped_alone(harness: HubClientHarness) -> None:
    """It is counted, the connection stays, and later messages arrive."""
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: "connected" in harness.states)
    harness.hub.errors = [TypeError("no such thing")]
    for number in (1, 2, 3):
        client.send(message(number))
    harness.hub.wait(lambda: len(harness.hub.arrived) == 2)
    assert harness.hub.arrived == ["detections-2", "detections-3"]
    assert dict(client.status().dropped) == {"refused": 1}
    assert harness.hub.opened == 1


def test_a_connection_that_fails_in_an_unknown_way_is_opened_again(harness: HubClientHarness) -> None:
    harness.hub.errors = [TypeError("no such thing")]
    client = harness.client()
    client.start()
    client.send(message(1))
    harness.hub.wait(lambda: harness.hub.arrived == ["detections-1"])
    assert harness.hub.opened == 2


def test_a_client_that_fails_repeatedly_ends_the_module(tmp_path: Path) -> None:
    """The error of its thread reaches the thread group."""
    deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
    harness = HubClientHarness(tmp_path)
    harness.thread_group = ThreadGroup(lambda name, _error: deaths.put(name))
    harness.hub.errors = [TypeError("no such thing")] * 9
    client = harness.client(quick_deadlines(max_unexpected_errors=3))
    client.start()
    assert deaths.get(timeout=10) == "hub:client"
    harness.close()
    assert harness.thread_group.join(5) == []
