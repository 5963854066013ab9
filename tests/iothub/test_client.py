"""The hub client with a scripted link: limits, order, errors, and calls that never return."""

import logging
import queue
import threading
from pathlib import Path

import pytest

from client_bench import QUICK, Bench, message, quick
from visionedge.iothub.client import HubStatus
from visionedge.iothub.sdk import (
    LinkError,
    MessageRefusedError,
    describe_error,
)
from visionedge.outbound.sqlite_store import SpoolLimits
from visionedge.runtime.threads import ThreadGroup

# --- the client -------------------------------------------------------------------------------------------


def test_messages_go_in_order_and_states_follow_the_connection(bench: Bench) -> None:
    """Messages sent before and after the start arrive in order; the states are recorded."""
    client = bench.client()
    client.send(message(1))
    client.start()
    client.send(message(2, "events"))
    client.send(message(3))
    bench.hub.wait(lambda: len(bench.hub.arrived) == 3)

    assert client.close(5)

    assert bench.hub.arrived == ["detections-1", "events-2", "detections-3"]
    assert bench.states == ["connecting", "connected", "closed"]
    assert client.status() == HubStatus("closed", False, 3, 0, {}, None, 0, 0, 0, {})


def test_closing_sends_what_still_waits(bench: Bench) -> None:
    """A client that has hardly begun flushes before it ends."""
    client = bench.client()
    client.start()
    for number in range(50):
        client.send(message(number))

    assert client.close(5)

    assert len(bench.hub.arrived) == 50
    assert bench.hub.closed == bench.hub.opened == 1


def test_a_full_spool_drops_the_oldest_detections_and_keeps_events(bench: Bench) -> None:
    """Offline, waiting messages are bounded; drops are counted by reason."""
    client = bench.client(limits=SpoolLimits(limit_bytes=3 * message(1).size_bytes))
    for number in range(4):
        client.send(message(number))
    client.send(message(4, "events"))
    bench.wait_until_written()
    assert client.status().dropped == {"full": 2}

    client.start()
    bench.hub.wait(lambda: len(bench.hub.arrived) == 3)

    assert bench.hub.arrived == ["detections-2", "detections-3", "events-4"]


def test_a_message_is_sent_again_until_it_is_acknowledged(bench: Bench) -> None:
    """A failed send costs the link, not the message; order stays."""
    bench.hub.errors = [LinkError("build"), LinkError("connect"), LinkError("send")]
    client = bench.client()
    client.send(message(1))
    client.send(message(2))
    client.start()
    bench.hub.wait(lambda: len(bench.hub.arrived) == 2)

    assert bench.hub.arrived == ["detections-1", "detections-2"]
    assert client.status().rebuilds >= 2


def test_a_message_that_can_never_be_sent_is_given_up(bench: Bench) -> None:
    """One poisoned message must not stop all others; it is counted, the link stays."""
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: "connected" in bench.states)

    bench.hub.errors = [MessageRefusedError("256 KB")]
    client.send(message(1))
    client.send(message(2))
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-2"])

    assert client.status().dropped == {"refused": 1}
    assert client.status().rebuilds == 0


def test_a_lost_link_is_replaced_without_anything_to_send(bench: Bench) -> None:
    """The link says that it is lost; the next one is made and the old one closed."""
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: bench.states == ["connecting", "connected"])

    bench.hub.on_lost("the connection was closed")

    bench.hub.wait(lambda: bench.states[2:] == ["waiting", "connecting", "connected"])
    assert bench.hub.closed == 1
    assert client.status().last_error == "the connection was closed"


def test_a_token_that_cannot_be_renewed_keeps_its_connection(bench: Bench) -> None:
    """The old token is valid for a while: messages use the old link until the new one can be made."""
    client = bench.client(quick(renew_s=0.05))
    client.start()
    bench.hub.wait(lambda: "connected" in bench.states)
    bench.hub.errors = [LinkError("the key store does not answer")]
    bench.hub.wait(lambda: bench.hub.opened == 2)
    client.send(message(1))
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])

    bench.hub.wait(lambda: bench.hub.opened >= 3)
    bench.hub.wait(lambda: bench.hub.closed >= 1)

    assert "waiting" not in bench.states
    assert client.status().last_error is None


def test_a_call_that_never_returns_costs_a_thread_and_no_message(bench: Bench) -> None:
    """After the deadline another thread sends the message over another link."""
    held = bench.hub.hold["send"] = threading.Event()
    client = bench.client(quick(send_s=0.05))
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: bench.hub.closed == 1)
    del bench.hub.hold["send"]
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])

    status = client.status()
    assert status.abandoned_calls >= 1
    assert status.hung >= 1
    held.set()


def test_too_many_lost_threads_are_reported_as_stuck_and_end_with_them(bench: Bench) -> None:
    """The client starts no more threads than its limit, and recovers when they return."""
    bench.hub.hold["build"] = threading.Event()
    client = bench.client(quick(build_s=0.02))
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: "stuck" in bench.states)
    assert client.status().hung == QUICK.max_hung_threads

    bench.hub.hold["build"].set()
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])

    assert client.status().hung == 0


@pytest.mark.parametrize("where", ["build", "connect", "send", "close"])
def test_close_keeps_its_deadline_wherever_the_sdk_hangs(bench: Bench, where: str) -> None:
    """`close` returns, and says that the process must not wait for threads."""
    bench.hub.hold[where] = threading.Event()
    client = bench.client(quick(disconnect_s=5))
    client.start()
    bench.hub.wait(lambda: bench.hub.opened == 1)
    client.send(message(1))

    done: list[bool] = []
    closer = threading.Thread(target=lambda: done.append(client.close(0.4)))
    closer.start()
    closer.join(2)

    assert done == [False]
    assert client.status().state == "closed"


def test_a_client_that_never_started_closes_at_once(bench: Bench) -> None:
    """Its messages stay in the spool."""
    client = bench.client()
    client.send(message(1))
    assert client.close(5)
    assert (client.status().waiting, client.status().dropped) == (1, {})


def test_closing_tries_a_dead_hub_once_and_no_more(bench: Bench) -> None:
    """Messages stay in the spool, and closing does not wait for the whole deadline."""
    bench.hub.errors = [LinkError("refused")] * 100_000
    client = bench.client()
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: "waiting" in bench.states)
    opened = bench.hub.opened

    assert client.close(30)

    assert bench.hub.opened <= opened + 2
    assert (client.status().waiting, client.status().dropped) == (1, {})


def test_the_same_failure_is_logged_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """An hour without a hub is one line, not thousands; another reason is another line."""
    caplog.set_level(logging.INFO, logger="visionedge.iothub")
    refused, unknown = LinkError("connection refused"), LinkError("no such host")
    bench.hub.errors = [*[refused] * 20, *[unknown] * 5]
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: "connected" in bench.states)

    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [line.split(": ")[1].split(";")[0] for line in lines] == ["connection refused", "no such host"]


def test_secrets_never_reach_the_status(bench: Bench) -> None:
    """Texts of the SDK are redacted like all others."""
    bench.hub.errors = [LinkError("bad SharedAccessSignature sr=x&sig=abcdef&se=1 for key=hunter2")]
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: "connected" in bench.states)

    assert "abcdef" not in str(client.status())
    assert "hunter2" not in str(client.status())


# --- faults ------------------------------------------------------------------------------------------------


def test_the_twin_is_read_at_once_and_then_regularly(bench: Bench) -> None:
    """The answer proves that the hub works, and is passed on."""
    client = bench.client(quick(probe_s=0.05))
    client.start()
    bench.hub.wait(lambda: bench.hub.asked >= 3)
    assert bench.twins[0] == ({"desired": {}, "reported": {}}, 1)
    assert client.status().faults == {}


def test_a_silent_twin_costs_the_connection_although_messages_are_taken(bench: Bench) -> None:
    """A session that the hub has lost still acknowledges messages."""
    bench.hub.hold["twin"] = threading.Event()
    client = bench.client(quick(request_s=0.05))
    client.start()
    bench.hub.wait(lambda: bench.hub.closed >= 1)
    bench.hub.hold.pop("twin").set()
    bench.hub.wait(lambda: bench.hub.asked >= 1)
    client.send(message(1))
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])

    faults = client.status().faults
    assert faults["silent"] >= 1
    assert faults["overdue"] >= 1
    assert "reading the twin did not return" in str(client.status().last_error)


def test_a_hub_that_never_answers_the_twin_still_gets_its_messages(bench: Bench) -> None:
    """The twin is read at longer and longer intervals, because each attempt costs the connection."""
    bench.hub.hold["twin"] = threading.Event()
    client = bench.client(quick(request_s=0.01, probe_s=0.02, max_hung_threads=1000))
    client.start()
    for number in range(5):
        client.send(message(number))
    bench.hub.wait(lambda: len(bench.hub.arrived) == 5)
    assert client.status().faults["silent"] >= 1


def test_a_message_that_costs_every_connection_is_given_up(bench: Bench) -> None:
    """A poison message must not block all others for ever; others that fail now and then are not lost."""
    bench.hub.errors = [LinkError("send")]
    client = bench.client(quick(poison_tries=3, poison_pause_s=0.05))
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])

    bench.hub.poison = "detections-2"
    client.send(message(2))
    client.send(message(3))
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1", "detections-3"])

    assert client.status().dropped == {"refused": 1}
    assert client.status().faults["poison"] == 1


def test_a_hub_that_drops_connections_by_itself_poisons_nothing(bench: Bench) -> None:
    """A connection that does not last without the message is no proof against it."""
    bench.hub.errors = [LinkError("reset")] * 4
    bench.hub.flapping = 6
    client = bench.client(quick(poison_tries=2, poison_pause_s=30))
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: bench.hub.flapping == 0)
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])
    assert client.status().dropped == {}


def test_a_hub_that_is_away_poisons_nothing(bench: Bench) -> None:
    """Only connections that were lost while this message was sent count."""
    bench.hub.errors = [LinkError("refused")] * 30
    client = bench.client(quick(poison_tries=2))
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])
    assert client.status().dropped == {}


def test_a_client_that_stays_stuck_asks_for_another_process(bench: Bench) -> None:
    """If no thread returns for a while, `on_stuck` is called; threads that return prevent it."""
    bench.hub.hold["build"] = threading.Event()
    client = bench.client(quick(build_s=0.01, stuck_s=0.05))
    client.start()
    bench.hub.wait(lambda: "on_stuck" in bench.states)
    assert client.status().state == "stuck"
    assert client.status().faults["stuck"] >= 1


def test_a_short_jam_does_not_end_the_module(bench: Bench) -> None:
    """Being stuck for a short time is no reason."""
    held = bench.hub.hold["build"] = threading.Event()
    client = bench.client(quick(build_s=0.1, stuck_s=60))
    client.send(message(1))
    client.start()
    bench.hub.wait(lambda: "stuck" in bench.states)
    held.set()
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])
    assert "on_stuck" not in bench.states


def test_an_error_is_described_with_its_causes_in_one_line() -> None:
    """All texts of the chain of causes; repeated texts once."""
    error = RuntimeError("Could not connect\nto IoTHub")
    error.__cause__ = OSError(111, "Connection refused")
    error.__cause__.__cause__ = ValueError("Connection refused")
    assert describe_error(error) == "Could not connect to IoTHub: [Errno 111] Connection refused"
    assert describe_error(RuntimeError()) == "RuntimeError"


# --- unexpected errors --------------------------------------------------------------------------------------


def test_a_message_that_fails_in_an_unknown_way_is_dropped_alone(bench: Bench) -> None:
    """It is counted, the connection stays, and later messages arrive."""
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: "connected" in bench.states)
    bench.hub.errors = [TypeError("no such thing")]
    for number in (1, 2, 3):
        client.send(message(number))
    bench.hub.wait(lambda: len(bench.hub.arrived) == 2)
    assert bench.hub.arrived == ["detections-2", "detections-3"]
    assert dict(client.status().dropped) == {"refused": 1}
    assert bench.hub.opened == 1


def test_a_connection_that_fails_in_an_unknown_way_is_made_anew(bench: Bench) -> None:
    bench.hub.errors = [TypeError("no such thing")]
    client = bench.client()
    client.start()
    client.send(message(1))
    bench.hub.wait(lambda: bench.hub.arrived == ["detections-1"])
    assert bench.hub.opened == 2


def test_a_client_that_fails_again_and_again_ends_the_module(tmp_path: Path) -> None:
    """The error of its thread reaches the thread group."""
    deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
    bench = Bench(tmp_path)
    bench.thread_group = ThreadGroup(lambda name, _error: deaths.put(name))
    bench.hub.errors = [TypeError("no such thing")] * 9
    client = bench.client(quick(max_unexpected_errors=3))
    client.start()
    assert deaths.get(timeout=10) == "hub:client"
    bench.close()
    assert bench.thread_group.join(5) == []
