"""Everything that goes wrong between module and hub, with the real SDK and the spool: nothing is lost."""

from pathlib import Path

import pytest

from edge_runtime.account import ReceivedMessage
from edge_runtime.contract import check_messages
from edge_runtime.fixtures import Drive, DrivenModule
from edge_runtime.runtime import EdgeRuntime
from visionedge.runtime.watchdog import EXIT_HUNG

BRIEF = {"send_s": 0.4, "request_s": 0.4, "connect_s": 2.0, "disconnect_s": 0.4, "build_s": 2.0}


def numbers(messages: list[ReceivedMessage], output: str = "detections") -> list[int]:
    """The `messageSequence` of each different message of an output, in the order of arrival."""
    once = {m.message_id: m.json()["messageSequence"] for m in messages if m.output == output}
    return list(once.values())


def arrived(count: int, output: str = "detections") -> "MessageCount":
    """A condition: the numbers 1 to `count` are there."""
    return MessageCount(count, output)


class MessageCount:
    def __init__(self, count: int, output: str) -> None:
        self._wanted = list(range(1, count + 1))
        self._output = output

    def __call__(self, messages: list[ReceivedMessage]) -> bool:
        return numbers(messages, self._output) == self._wanted


def send(module: DrivenModule, count: int = 1) -> None:
    """Frames of two cameras, each in a message of its own."""
    for index in range(count):
        module.do("frames", camera=("dock", "gate")[index % 2], count=1)


def test_a_kill_loses_nothing_that_was_on_disk(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """Without a hub, killed twice: every number arrives in order, and the third start continues the count."""
    edge_runtime.hub_down()
    for _ in range(2):
        module = drive(edge_runtime.environ, data=str(tmp_path))
        send(module, 5)
        waiting = module.do("settle")["spool"]["waiting"]
        assert waiting >= 5
        module.kill()
    module = drive(edge_runtime.environ, data=str(tmp_path))
    edge_runtime.hub_up()
    send(module, 2)

    messages = edge_runtime.wait_for(arrived(12))

    check_messages(messages)
    assert module.close()["clean"]


def test_a_kill_while_sending_repeats_messages_and_loses_none(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """Messages that the hub had not acknowledged are sent again with the same id and body."""
    edge_runtime.faults.swallow_pubacks = True
    module = drive(edge_runtime.environ, data=str(tmp_path))
    send(module, 3)
    edge_runtime.wait_for(lambda got: len(got) >= 1)
    module.kill()
    edge_runtime.faults.end()
    module = drive(edge_runtime.environ, data=str(tmp_path))

    messages = edge_runtime.wait_for(arrived(3))

    check_messages(messages)
    doubles = [m for m in messages if m.message_id == messages[0].message_id]
    assert len(doubles) >= 2
    assert len({m.body for m in doubles}) == 1
    assert module.close()["clean"]


def test_a_clean_shutdown_sends_nothing_twice(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """Acknowledged messages are deleted before the end; numbers continue after it."""
    for start in (1, 2):
        module = drive(edge_runtime.environ, data=str(tmp_path))
        send(module, 2)
        edge_runtime.wait_for(arrived(2 * start))
        assert module.close()["clean"]
    assert len(edge_runtime.messages) == 4


def test_the_messages_of_an_hour_without_a_hub_arrive_in_order(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """More messages than the memory holds, in their order."""
    edge_runtime.hub_down()
    module = drive(edge_runtime.environ, data=str(tmp_path))
    for _ in range(1500):
        module.do("event", code="tick")
    edge_runtime.hub_up()
    edge_runtime.wait_for(arrived(1500, "events"), 60)
    assert module.close()["clean"]


def reported_as_dropped(messages: list[ReceivedMessage]) -> list[int]:
    """The numbers of telemetry that the events name as dropped, each event once."""
    events = {m.message_id: m.json() for m in messages if m.properties.get("code") == "spool-dropped"}
    ranges = [r for event in events.values() for r in event["details"]["ranges"] if r["output"] != "events"]
    return [number for r in ranges for number in range(r["from"], r["to"] + 1)]


def test_a_bounded_spool_reports_the_dropped_messages(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """Events name each number that is missing, and no other; here over two starts of the module."""
    edge_runtime.hub_down()
    module = drive(edge_runtime.environ, data=str(tmp_path), limits={"limit_bytes": 8_000})
    send(module, 40)
    module.do("settle")
    edge_runtime.hub_up()
    module.wait_for_log("connected to IoT Hub")
    module.do("tick")
    edge_runtime.wait_for(lambda got: bool(reported_as_dropped(got)))
    edge_runtime.wait_for(lambda got: numbers(got)[-1:] == [40])
    missing = sorted(set(range(1, 41)) - set(numbers(edge_runtime.messages)))
    assert len(missing) > 20
    assert module.close()["spool"]["dropped"] == {"full": len(missing)}

    # The event used space too, and may have dropped a message: the next event reports it.
    module = drive(edge_runtime.environ, data=str(tmp_path))
    module.wait_for_log("connected to IoT Hub")
    module.do("tick")
    edge_runtime.wait_for(lambda got: sorted(reported_as_dropped(got)) == missing)
    assert module.close()["clean"]


@pytest.mark.parametrize(
    "fault", ["swallow", "swallow_pubacks", "swallow_connacks", "silent_twin", "swallow_subacks"]
)
def test_a_silent_connection_ends_at_the_deadline(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path, fault: str
) -> None:
    """A half-open connection, no PUBACK, no CONNACK, no SUBACK, a dumb twin: a new client finds the way."""
    module = drive(edge_runtime.environ, data=str(tmp_path), deadlines=BRIEF)
    send(module)
    edge_runtime.wait_for(arrived(1))
    setattr(edge_runtime.faults, fault, True)
    edge_runtime.cut()
    send(module)
    module.wait_for_log("did not return")
    edge_runtime.faults.end()
    send(module)

    check_messages(edge_runtime.wait_for(arrived(3)))
    status = module.close()
    assert status["hub"]["faults"]["overdue"] >= 1


def test_a_hub_that_hangs_and_resumes_gets_all_messages(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """Connected, accepting, silent."""
    module = drive(edge_runtime.environ, data=str(tmp_path), deadlines=BRIEF)
    send(module)
    edge_runtime.wait_for(arrived(1))
    edge_runtime.hang()
    send(module, 2)
    module.wait_for_log("did not return")
    edge_runtime.resume()
    check_messages(edge_runtime.wait_for(arrived(3)))


@pytest.mark.parametrize("fault", ["reset_publishes", "reset_pubacks"])
def test_a_reset_in_the_middle_of_a_message_loses_nothing(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path, fault: str
) -> None:
    """Whether the hub had it already or not."""
    module = drive(edge_runtime.environ, data=str(tmp_path))
    setattr(edge_runtime.faults, fault, 3)
    send(module, 4)
    messages = edge_runtime.wait_for(arrived(4))
    check_messages(messages)
    assert (len(messages) > 4) == (fault == "reset_pubacks")
    assert module.close()["hub"]["dropped"] == {}


def test_a_session_lost_by_the_hub_is_detected(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """Connected and with PUBACKs, but without twin and methods: the probe detects it."""
    module = drive(edge_runtime.environ, data=str(tmp_path), deadlines={**BRIEF, "probe_s": 0.2})
    module.wait_for_log("connected to IoT Hub")
    sessions = edge_runtime.broker.sessions
    edge_runtime.wait_until(lambda: any(session.subscriptions for session in sessions.values()))
    edge_runtime.lose_sessions()
    module.wait_for_log("the twin did not return")
    module.wait_for_log("connected to IoT Hub through", times=2)
    send(module)
    edge_runtime.wait_for(arrived(1))
    assert module.close()["hub"]["faults"]["silent"] >= 1


def test_a_twin_that_answers_with_an_error_counts_as_alive(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """An edgeHub without upstream and without a cached twin answers with an error, which is an answer."""
    edge_runtime.faults.twin_status = 500
    module = drive(edge_runtime.environ, data=str(tmp_path), deadlines={"probe_s": 0.05})
    for _ in range(5):
        send(module)
    edge_runtime.wait_for(arrived(5))
    status = module.close()
    assert status["hub"]["faults"] == {}
    assert edge_runtime.broker.connects == 1


@pytest.mark.parametrize("fault", ["fail_signing", "drop_signing", "wrong_signing", "fail_trust_bundle"])
def test_a_failing_workload_api_is_called_again(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path, fault: str
) -> None:
    """The SDK would give up after one failure, the module does not."""
    setattr(edge_runtime.faults, fault, True)
    module = drive(edge_runtime.environ, data=str(tmp_path))
    send(module)
    module.wait_for_log("no connection to IoT Hub")
    edge_runtime.faults.end()
    check_messages(edge_runtime.wait_for(arrived(1)))
    assert module.close()["clean"]


def test_a_workload_api_that_hangs_permanently_ends_the_module(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """The last level: a distinct exit code for edgeAgent; waiting messages are on disk for the next start."""
    edge_runtime.faults.hang_signing = True
    deadlines = {"build_s": 0.1, "max_hung_threads": 2, "stuck_s": 0.2}
    module = drive(edge_runtime.environ, data=str(tmp_path), deadlines=deadlines)
    send(module, 2)
    module.do("settle")

    assert module.wait(20) == EXIT_HUNG

    edge_runtime.faults.end()
    edge_runtime.resume()
    module = drive(edge_runtime.environ, data=str(tmp_path))
    check_messages(edge_runtime.wait_for(arrived(2)))
    assert module.close()["clean"]


def test_a_failing_disk_is_reported_to_the_cloud(
    edge_runtime: EdgeRuntime, drive: Drive, tmp_path: Path
) -> None:
    """The module continues in memory, and one event reports it."""
    (tmp_path / "data").write_text("no folder")
    module = drive(edge_runtime.environ, data=str(tmp_path / "data"))
    module.do("tick")
    send(module, 2)
    edge_runtime.wait_for(lambda got: any(m.properties.get("code") == "spool-memory" for m in got))
    edge_runtime.wait_for(arrived(2))
    status = module.close()
    assert status["spool"]["mode"] == "memory"
