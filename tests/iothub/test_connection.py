"""What the hub client does beside sending messages, with a scripted link: twin, calls, inputs, tasks."""

import threading

from hub_client_harness import HubClientHarness, message, quick_deadlines
from visionedge.iothub.client import LinkTask, TaskOutcome
from visionedge.iothub.sdk import HubLink, InputMessage, MethodCall


class OutcomeRecorder:
    """The outcomes of tasks."""

    def __init__(self, harness: HubClientHarness) -> None:
        self._bench = harness
        self.got: list[TaskOutcome] = []

    def link_task(self, connection_number: int = 1, patch: str = "a") -> LinkTask:
        """A task that reports a property."""

        def do(link: HubLink) -> bool:
            return link.report({patch: 1})

        return LinkTask(
            "a report",
            connection_number,
            do,
            lambda outcome: self._bench.hub.update(lambda: self.got.append(outcome)),
        )

    def wait(self, *wanted: TaskOutcome) -> None:
        """Wait for these outcomes."""
        self._bench.hub.wait(lambda: self.got == list(wanted))


def test_subscriptions_come_before_the_twin_on_every_link(harness: HubClientHarness) -> None:
    """A patch between the two would be missed otherwise."""
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    assert len(harness.hub.link_listener) == 1
    harness.hub.on_lost("the connection was closed")
    harness.hub.wait(lambda: len(harness.twins) == 2)
    assert [number for _, number in harness.twins] == [1, 2]
    assert len(harness.hub.link_listener) == 2


def test_a_patch_triggers_a_read_of_the_whole_twin(harness: HubClientHarness) -> None:
    """At once, and not only once a minute; a patch during a read counts, too."""
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    held = harness.hub.hold["twin"] = threading.Event()
    harness.hub.link_listener[0].on_desired_changed()
    harness.hub.link_listener[0].on_desired_changed()
    held.set()
    harness.hub.wait(lambda: len(harness.twins) >= 2)


def test_calls_and_inputs_are_passed_on_with_their_connection_number(harness: HubClientHarness) -> None:
    """An answer goes over the connection of its call, ahead of the messages."""
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    harness.hub.link_listener[0].on_method_call(MethodCall("ping", None, "r1"))
    harness.hub.link_listener[0].on_message(InputMessage("frames", b"x", {}))
    (call,) = harness.calls
    assert (call.connection_number, call.request_id) == (1, "r1")
    assert harness.inputs == [InputMessage("frames", b"x", {})]

    def do(link: HubLink) -> bool:
        link.answer(call.request_id, 200, {"ok": True})
        return True

    held = harness.hub.hold["send"] = threading.Event()
    client.send(message(1))
    client.send(message(2))
    client.submit(LinkTask("an answer", call.connection_number, do))
    held.set()
    harness.hub.wait(lambda: len(harness.hub.arrived) == 2 and len(harness.hub.answers) == 1)
    assert harness.hub.answers == [("r1", 200, {"ok": True})]


def test_tasks_run_in_order_and_each_outcome_is_reported(harness: HubClientHarness) -> None:
    """A refusal costs no connection."""
    outcomes = OutcomeRecorder(harness)
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    client.submit(outcomes.link_task(patch="a"))
    outcomes.wait("taken")
    harness.hub.rejects_reports = True
    client.submit(outcomes.link_task(patch="b"))
    outcomes.wait("taken", "refused")
    assert harness.hub.reported == [{"a": 1}, {"b": 1}]
    assert client.status().rebuilds == 0


def test_a_task_is_lost_with_its_connection(harness: HubClientHarness) -> None:
    """Before there is a connection, with another number, when it breaks meanwhile, and after closing."""
    outcomes = OutcomeRecorder(harness)
    client = harness.client()
    client.submit(outcomes.link_task())
    assert outcomes.got == ["lost"]
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    client.submit(outcomes.link_task(connection_number=7))
    outcomes.wait("lost", "lost")

    held = harness.hub.hold["report"] = threading.Event()
    client.submit(outcomes.link_task(patch="a"))
    client.submit(outcomes.link_task(patch="b"))
    harness.hub.wait(lambda: "report" in harness.hub.entered)
    harness.hub.on_lost("the connection was reset")
    held.set()
    outcomes.wait("lost", "lost", "taken", "lost")
    assert harness.hub.reported == [{"a": 1}]

    client.close(5)
    client.submit(outcomes.link_task(connection_number=2))
    outcomes.wait("lost", "lost", "taken", "lost", "lost")


def test_tasks_beyond_the_limit_are_lost(harness: HubClientHarness) -> None:
    """The callers of the methods would not wait for so long."""
    outcomes = OutcomeRecorder(harness)
    client = harness.client()
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    held = harness.hub.hold["report"] = threading.Event()
    for _ in range(2_150):
        client.submit(outcomes.link_task())
    harness.hub.wait(lambda: 0 < outcomes.got.count("lost") <= 50)
    held.set()
    harness.hub.wait(lambda: len(outcomes.got) == 2_150)
    assert outcomes.got.count("taken") >= 2_100


def test_an_unanswered_subscription_counts_as_a_silent_hub_and_loses_no_message(harness: HubClientHarness) -> None:
    """As with the twin: another connection, messages first, and longer intervals."""
    harness.hub.hold["subscribe"] = threading.Event()
    client = harness.client(quick_deadlines(request_s=0.05, probe_s=0.02, max_hung_threads=1000))
    client.start()
    for number in range(3):
        client.send(message(number))
    harness.hub.wait(lambda: len(harness.hub.arrived) == 3)
    assert client.status().faults["silent"] >= 1
    assert harness.twins == []


def test_a_hanging_task_ends_its_connection_and_not_the_module(harness: HubClientHarness) -> None:
    """Its deadline is that of the client, not of the SDK."""
    outcomes = OutcomeRecorder(harness)
    client = harness.client(quick_deadlines(request_s=0.05))
    client.start()
    harness.hub.wait(lambda: len(harness.twins) == 1)
    harness.hub.hold["report"] = threading.Event()
    client.submit(outcomes.link_task())
    harness.hub.wait(lambda: outcomes.got == ["lost"] and len(harness.twins) >= 2)
    assert client.status().faults["overdue"] == 1
