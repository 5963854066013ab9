"""Twin, methods, inputs and reported properties through the real SDK, with the double of the edge runtime."""

from collections.abc import Callable
from typing import Any

import pytest

from edge_runtime.fixtures import Drive, DrivenModule
from edge_runtime.runtime import EdgeRuntime
from wait_conditions import at_least

pytestmark = pytest.mark.system


def heard(module: DrivenModule, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask the module at each change until its listener meets the condition."""
    received = module.do("heard")
    for _ in range(60):
        if condition(received):
            return received
        received = module.do("heard", after=received["news"])
    raise AssertionError(f"never: {received}\n" + "\n".join(module.log))


def test_methods_patches_and_inputs_are_received(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """The whole twin is read at the start and after each patch; a method's answer finds its caller."""
    module = drive(edge_runtime.environ, listen=True)
    heard(module, lambda received: len(received["twins"]) == 1)
    edge_runtime.desire({"a": 1, "b": {"c": 2}})
    version = edge_runtime.desire({"a": None})
    received = heard(module, lambda received: received["desired"].get("$version") == version)
    assert received["desired"]["b"] == {"c": 2}
    assert "a" not in received["desired"]
    answer = edge_runtime.invoke("echo", {"x": ["ü", None]})
    assert (answer.status, answer.payload) == (200, {"name": "echo", "payload": {"x": ["ü", None]}})
    assert edge_runtime.invoke("echo").payload == {"name": "echo", "payload": None}
    edge_runtime.input("frames", b"hello", {"$.mid": "m1"})
    heard(module, lambda received: received["inputs"] == ["frames m1 hello"])
    closed = module.close()
    assert closed["clean"]
    assert edge_runtime.broker.refusals == []


def test_reported_properties_are_taken_or_refused(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """A refusal costs no connection."""
    module = drive(edge_runtime.environ, listen=True)
    heard(module, lambda received: len(received["twins"]) == 1)
    assert module.do("report", patch={"a": {"b": "ü"}}) == {"outcome": "taken"}
    assert module.do("report", patch={"a.b": 1}) == {"outcome": "refused"}
    assert module.do("report", patch={"a": {"b": None}}) == {"outcome": "taken"}
    assert edge_runtime.broker.twin.reported == {"a": {}}
    assert module.close()["hub"]["rebuilds"] == 0


def test_a_session_lost_by_the_hub_is_detected_and_everything_works_again(
    edge_runtime: EdgeRuntime, drive: Drive
) -> None:
    """Messages go on all the time; the twin's silence means another link, which subscribes anew."""
    module = drive(edge_runtime.environ, listen=True, deadlines={"probe_s": 0.5, "request_s": 1.0})
    heard(module, lambda received: len(received["twins"]) >= 1)
    edge_runtime.lose_sessions()
    assert edge_runtime.invoke("echo").status == 404
    heard(module, lambda received: received["twins"][-1] >= 2)
    assert edge_runtime.invoke("echo").status == 200
    version = edge_runtime.desire({"z": 1})
    heard(module, lambda received: received["desired"].get("$version") == version)
    assert module.do("status")["hub"]["faults"]["silent"] >= 1


def test_a_hub_that_confirms_no_subscription_still_gets_its_messages(
    edge_runtime: EdgeRuntime, drive: Drive
) -> None:
    """Longer and longer intervals; when it confirms subscriptions again, everything works."""
    edge_runtime.faults.swallow_subacks = True
    module = drive(edge_runtime.environ, listen=True, deadlines={"probe_s": 0.2, "request_s": 0.5})
    for _ in range(3):
        module.do("frames", camera="dock", count=1)
    edge_runtime.wait_for(at_least(3))
    assert module.do("heard")["twins"] == []
    edge_runtime.faults.end()
    heard(module, lambda received: len(received["twins"]) >= 1)
    assert edge_runtime.invoke("echo").status == 200


def test_desired_properties_and_inputs_of_an_absence_arrive_after_it(edge_runtime: EdgeRuntime, drive: Drive) -> None:
    """Patches are found in the twin, inputs wait, methods do not."""
    module = drive(edge_runtime.environ, listen=True)
    heard(module, lambda received: len(received["twins"]) == 1)
    edge_runtime.hub_down()
    module.wait_for_log("no connection")
    assert edge_runtime.invoke("echo").status == 404
    version = edge_runtime.desire({"late": True})
    edge_runtime.input("frames", b"waited", {"$.mid": "m2"})
    edge_runtime.hub_up()
    heard(module, lambda received: received["desired"].get("$version") == version)
    heard(module, lambda received: "frames m2 waited" in received["inputs"])
    assert module.close()["clean"]
