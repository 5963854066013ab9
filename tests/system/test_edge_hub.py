"""The hub client with the real SDK, in a child process, against the stand-in edge runtime."""

import socket
from pathlib import Path

import pytest

from edge_runtime.broker import PORT
from edge_runtime.contract import check_messages
from edge_runtime.fixtures import Drive
from edge_runtime.packets import NOT_AUTHORIZED
from edge_runtime.runtime import EdgeRuntime
from wait_conditions import at_least

SOON_S = 2.5
"""What a deadline of one second may take on a busy machine; without it the SDK takes a minute or for ever."""


def test_messages_arrive_in_the_documented_form(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """Batches and events keep the contract; SAS and trust came from the workload API; the end is clean."""
    module = drive(edge_runtime.environ)
    for _ in range(3):
        module.do("frames", camera="dock", count=2)
        module.do("frames", camera="gate", count=1)
    module.do("event", code="hello")
    edge_runtime.wait_for(at_least(1, "events"))

    closed = module.close()

    check_messages(edge_runtime.messages)
    assert len(edge_runtime.messages) == 7
    assert edge_runtime.broker.refusals == []
    assert edge_runtime.workload.requests == [
        "GET /trust-bundle",
        f"POST /modules/vision/genid/{edge_runtime.account.generation}/sign",
    ]
    assert closed["clean"]
    assert closed["left"] == []
    assert closed["hub"]["sent"] == 7
    assert closed["hub"]["state"] == "closed"


def test_the_messages_file_has_the_sent_bodies(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """`--messages FILE` gets each outgoing body as a line, byte for byte as it went to the hub."""
    file = tmp_path / "messages.jsonl"
    module = drive(edge_runtime.environ, file=str(file))
    module.do("frames", camera="dock", count=3)
    module.do("event", code="hello")
    edge_runtime.wait_for(at_least(1, "events"))

    assert module.close()["clean"]

    assert file.read_bytes().splitlines() == [message.body for message in edge_runtime.messages]


def test_a_hub_that_starts_later_gets_everything(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """What was sent before the hub was there waits, in order; the failure is logged once, not per attempt."""
    edge_runtime.hub_down()
    module = drive(edge_runtime.environ)
    for _ in range(3):
        module.do("frames", camera="dock", count=1)
    module.wait_for_log("no connection to IoT Hub")
    assert module.do("status")["hub"]["queued"] == 3

    edge_runtime.hub_up()

    check_messages(edge_runtime.wait_for(at_least(3)))
    assert sum("no connection" in line for line in module.log) == 1
    assert "refused" in "".join(module.log)
    assert module.close()["clean"]


def test_a_restart_of_the_hub_loses_no_message(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """Every message sent before, during and after a restart arrives, in order."""
    module = drive(edge_runtime.environ)
    module.do("frames", camera="dock", count=1)
    edge_runtime.wait_for(at_least(1))

    edge_runtime.hub_down()
    module.do("frames", camera="dock", count=1)
    module.wait_for_log("no connection")
    edge_runtime.hub_up()
    module.do("frames", camera="dock", count=1)

    check_messages(edge_runtime.wait_for(at_least(3)))
    status = module.close()
    assert status["hub"]["rebuilds"] >= 1
    assert status["hub"]["abandoned"] == 0
    assert status["clean"]


def test_a_reset_connection_is_detected_without_sending(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """An idle module connects again by itself."""
    module = drive(edge_runtime.environ)
    module.wait_for_log("connected to IoT Hub")

    edge_runtime.cut()

    module.wait_for_log("connected to IoT Hub through", times=2)
    assert edge_runtime.broker.connects == 2
    assert module.close()["clean"]


def test_a_missing_acknowledgement_times_out(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """The SDK would wait for ever; we leave its thread, build anew, and send the message again, same id."""
    edge_runtime.faults.swallow_pubacks = True
    module = drive(edge_runtime.environ, deadlines={"send_s": 0.3})
    module.do("frames", camera="dock", count=1)
    module.wait_for_log("send did not return")
    edge_runtime.wait_for(lambda messages: len(messages) >= 2)

    edge_runtime.faults.swallow_pubacks = False
    module.do("frames", camera="dock", count=1)

    messages = edge_runtime.wait_for(at_least(2))
    check_messages(messages)
    assert len(messages) > 2, "the first was sent more than once"
    status = module.close()
    assert status["hub"]["abandoned"] >= 1
    assert status["hub"]["hung"] == 0, "taking leave of the old connection set its thread free"
    assert status["clean"]


def test_closing_does_not_wait_for_a_hub_that_hangs(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """Without PUBACKs, `close` keeps its deadline and says how many messages wait on disk."""
    edge_runtime.faults.swallow_pubacks = True
    module = drive(edge_runtime.environ)
    module.do("frames", camera="dock", count=1)
    edge_runtime.wait_for(at_least(1))

    closed = module.close(deadline_s=1.0)

    assert closed["took_s"] < SOON_S
    assert closed["spool"]["waiting"] == 1
    assert any("1 messages wait on disk for the next start" in line for line in module.log)


def test_closing_does_not_wait_for_a_hub_without_connack(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """Without a CONNACK the SDK waits a minute; `close` keeps its deadline, and the process ends."""
    edge_runtime.faults.swallow_connacks = True
    module = drive(edge_runtime.environ)
    module.do("frames", camera="dock", count=1)
    edge_runtime.wait_for_attempts(1)

    closed = module.close(deadline_s=1.0)

    assert closed["took_s"] < SOON_S
    assert not closed["clean"]


def test_closing_does_not_wait_for_a_dead_tls_handshake(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """A peer that accepts and says nothing blocks the SDK's one pipeline thread; the process still ends."""
    edge_runtime.hub_down()
    with socket.create_server((edge_runtime.address, PORT)) as silent:
        module = drive(edge_runtime.environ)
        module.do("frames", camera="dock", count=1)
        connection, _ = silent.accept()
        with connection:
            closed = module.close(deadline_s=1.0)

    assert closed["took_s"] < SOON_S
    assert not closed["clean"]


def test_a_recovered_key_store_is_called_again(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """When signing fails at the start the module tries again, instead of giving up."""
    edge_runtime.faults.fail_signing = True
    module = drive(edge_runtime.environ)
    module.do("frames", camera="dock", count=1)
    module.wait_for_log("Unable to sign")

    edge_runtime.faults.fail_signing = False

    check_messages(edge_runtime.wait_for(at_least(1)))
    assert module.close()["clean"]


def test_a_refused_module_tries_again(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """The SDK gives up for good when it is not authorised; the module does not."""
    edge_runtime.faults.refuse_code = NOT_AUTHORIZED
    module = drive(edge_runtime.environ)
    module.do("frames", camera="dock", count=1)
    module.wait_for_log("Credentials invalid")

    edge_runtime.faults.refuse_code = None

    check_messages(edge_runtime.wait_for(at_least(1)))
    assert module.close()["clean"]


def test_the_connection_is_renewed_before_its_token_ends(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """A new connection with a new token replaces the old one, and no message falls between them."""
    module = drive(edge_runtime.environ, deadlines={"renew_s": 0.1})
    for _ in range(5):
        module.do("frames", camera="dock", count=1)
        connects = edge_runtime.broker.connects
        module.wait_for_log("connected to IoT Hub", times=connects + 1)

    status = module.close()

    check_messages(edge_runtime.messages)
    assert len(edge_runtime.messages) == 5
    assert status["hub"]["last_error"] is None
    assert status["hub"]["abandoned"] == 0
    assert status["clean"]


def test_the_simulator_counts_as_iot_edge(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """With the simulator's connection string and CA file there is no workload API, and messages arrive."""
    module = drive(edge_runtime.simulator_environ)
    module.do("frames", camera="dock", count=1)

    check_messages(edge_runtime.wait_for(at_least(1)))
    assert edge_runtime.workload.requests == []
    assert module.close()["clean"]


def test_outside_iot_edge_the_log_says_so_once_and_the_file_is_written(drive: Drive, tmp_path: Path) -> None:
    """No hub, no SDK: messages are written where asked, the device is the host."""
    file = tmp_path / "messages.jsonl"
    module = drive({}, file=str(file))
    module.do("frames", camera="dock", count=2)
    module.do("event", code="hello")

    closed = module.close()

    assert closed["clean"]
    assert closed["hub"] is None
    assert closed["threads"] == ["MainThread"]
    assert sum("not inside IoT Edge" in line for line in module.log) == 1
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    assert f'"device":"{socket.gethostname()}","module":"vision"' in lines[0]


@pytest.mark.parametrize("count", [1500])
def test_a_large_batch_stays_below_the_limit_of_the_hub(
    edge_runtime: EdgeRuntime, drive: Drive, count: int
) -> None:
    """Frames that fill several messages are split between frames and all arrive."""
    module = drive(edge_runtime.environ)
    module.do("frames", camera="dock", count=count)

    messages = edge_runtime.wait_for(at_least(3))

    module.close()
    check_messages(messages)
    assert sum(len(message.json()["frames"]) for message in edge_runtime.messages) == count
