"""What the hub client does beside sending messages, with a scripted link: twin, calls, inputs, tasks."""

import threading

from client_bench import Bench, message, quick
from visionedge.iothub.client import LinkTask, TaskOutcome
from visionedge.iothub.sdk import HubLink, InputMessage, MethodCall


class Outcomes:
    """The outcomes of tasks."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.got: list[TaskOutcome] = []

    def link_task(self, connection_number: int = 1, patch: str = "a") -> LinkTask:
        """A task that reports a property."""

        def do(link: HubLink) -> bool:
            return link.report({patch: 1})

        return LinkTask(
            "a report",
            connection_number,
            do,
            lambda outcome: self._bench.hub.note(lambda: self.got.append(outcome)),
        )

    def wait(self, *wanted: TaskOutcome) -> None:
        """Wait for these outcomes."""
        self._bench.hub.wait(lambda: self.got == list(wanted))


def test_subscriptions_come_before_the_twin_on_every_link(bench: Bench) -> None:
    """A patch between the two would be missed otherwise."""
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    assert len(bench.hub.link_listener) == 1
    bench.hub.on_lost("the connection was closed")
    bench.hub.wait(lambda: len(bench.twins) == 2)
    assert [number for _, number in bench.twins] == [1, 2]
    assert len(bench.hub.link_listener) == 2


def test_a_patch_triggers_a_read_of_the_whole_twin(bench: Bench) -> None:
    """At once, and not only once a minute; a patch during a read counts, too."""
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    held = bench.hub.hold["twin"] = threading.Event()
    bench.hub.link_listener[0].on_desired_changed()
    bench.hub.link_listener[0].on_desired_changed()
    held.set()
    bench.hub.wait(lambda: len(bench.twins) >= 2)


def test_calls_and_inputs_are_passed_on_with_their_connection_number(bench: Bench) -> None:
    """An answer goes over the connection of its call, ahead of the messages."""
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    bench.hub.link_listener[0].on_method_call(MethodCall("ping", None, "r1"))
    bench.hub.link_listener[0].on_message(InputMessage("frames", b"x", {}))
    (call,) = bench.calls
    assert (call.connection_number, call.request_id) == (1, "r1")
    assert bench.inputs == [InputMessage("frames", b"x", {})]

    def do(link: HubLink) -> bool:
        link.answer(call.request_id, 200, {"ok": True})
        return True

    held = bench.hub.hold["send"] = threading.Event()
    client.send(message(1))
    client.send(message(2))
    client.submit(LinkTask("an answer", call.connection_number, do))
    held.set()
    bench.hub.wait(lambda: len(bench.hub.arrived) == 2 and len(bench.hub.answers) == 1)
    assert bench.hub.answers == [("r1", 200, {"ok": True})]


def test_tasks_run_in_order_and_each_outcome_is_reported(bench: Bench) -> None:
    """A refusal costs no connection."""
    outcomes = Outcomes(bench)
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    client.submit(outcomes.link_task(patch="a"))
    outcomes.wait("taken")
    bench.hub.picky = True
    client.submit(outcomes.link_task(patch="b"))
    outcomes.wait("taken", "refused")
    assert bench.hub.reported == [{"a": 1}, {"b": 1}]
    assert client.status().rebuilds == 0


def test_a_task_is_lost_with_its_connection(bench: Bench) -> None:
    """Before there is a connection, with another number, when it breaks meanwhile, and after closing."""
    outcomes = Outcomes(bench)
    client = bench.client()
    client.submit(outcomes.link_task())
    assert outcomes.got == ["lost"]
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    client.submit(outcomes.link_task(connection_number=7))
    outcomes.wait("lost", "lost")

    held = bench.hub.hold["report"] = threading.Event()
    client.submit(outcomes.link_task(patch="a"))
    client.submit(outcomes.link_task(patch="b"))
    bench.hub.wait(lambda: "report" in bench.hub.entered)
    bench.hub.on_lost("the connection was reset")
    held.set()
    outcomes.wait("lost", "lost", "taken", "lost")
    assert bench.hub.reported == [{"a": 1}]

    client.close(5)
    client.submit(outcomes.link_task(connection_number=2))
    outcomes.wait("lost", "lost", "taken", "lost", "lost")


def test_tasks_beyond_the_limit_are_lost(bench: Bench) -> None:
    """The callers of the methods would not wait for so long."""
    outcomes = Outcomes(bench)
    client = bench.client()
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    held = bench.hub.hold["report"] = threading.Event()
    for _ in range(2_150):
        client.submit(outcomes.link_task())
    bench.hub.wait(lambda: 0 < outcomes.got.count("lost") <= 50)
    held.set()
    bench.hub.wait(lambda: len(outcomes.got) == 2_150)
    assert outcomes.got.count("taken") >= 2_100


def test_an_unanswered_subscription_counts_as_a_silent_hub_and_loses_no_message(bench: Bench) -> None:
    """As with the twin: another connection, messages first, and longer intervals."""
    bench.hub.hold["subscribe"] = threading.Event()
    client = bench.client(quick(request_s=0.05, probe_s=0.02, max_hung_threads=1000))
    client.start()
    for number in range(3):
        client.send(message(number))
    bench.hub.wait(lambda: len(bench.hub.arrived) == 3)
    assert client.status().faults["silent"] >= 1
    assert bench.twins == []


def test_a_hanging_task_ends_its_connection_and_not_the_module(bench: Bench) -> None:
    """Its deadline is that of the client, not of the SDK."""
    outcomes = Outcomes(bench)
    client = bench.client(quick(request_s=0.05))
    client.start()
    bench.hub.wait(lambda: len(bench.twins) == 1)
    bench.hub.hold["report"] = threading.Event()
    client.submit(outcomes.link_task())
    bench.hub.wait(lambda: outcomes.got == ["lost"] and len(bench.twins) >= 2)
    assert client.status().faults["overdue"] == 1
