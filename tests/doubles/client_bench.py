"""The hub client over a scripted connection, for tests."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from visionedge.iothub.client import HubClient
from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk import (
    InputMessage,
    LinkError,
    LinkListener,
    MethodCall,
    OnLost,
)
from visionedge.iothub.sdk_calls import Deadlines
from visionedge.outbound.memory_queue import MemoryQueue
from visionedge.outbound.messages import Message
from visionedge.runtime.threads import ThreadGroup

IDENTITY = Identity(hub="hub", device="press-7", module="vision", gateway="gateway")
QUICK = Deadlines(
    build_s=5, connect_s=5, send_s=5, disconnect_s=1, first_wait_s=0.01, max_wait_s=0.02, max_hung_threads=2
)


def message(number: int, output: str = "detections", size: int = 10) -> Message:
    """A message with a body of so many bytes."""
    return Message(output, b"x" * size, f"{output}-{number}", {}, number)


class Hub:
    """What links are scripted with and what they did. `hold` makes a call hang until it is set."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.arrived: list[str] = []
        self.opened = 0
        self.closed = 0
        self.asked = 0
        self.poison = ""
        self.flapping = 0
        self.errors: list[Exception] = []
        self.hold: dict[str, threading.Event] = {}
        self.link_listener: list[LinkListener] = []
        self.reported: list[Mapping[str, Any]] = []
        self.answers: list[tuple[str, int, Any]] = []
        self.picky = False
        self.entered: list[str] = []
        self.on_lost: OnLost = lambda _reason: None

    def open(self, _identity: Identity, on_lost: OnLost) -> "ScriptedLink":
        """The connector to give to a client."""
        self.on_lost = on_lost
        self.note(lambda: setattr(self, "opened", self.opened + 1))
        self.step("build")
        return ScriptedLink(self)

    def step(self, name: str) -> None:
        """Hang or raise, if the script says so."""
        self.note(lambda: self.entered.append(name))
        if name in self.hold:
            self.hold[name].wait()
        if name in ("build", "connect", "send") and self.errors:
            raise self.errors.pop(0)

    def note(self, change: Callable[[], object]) -> None:
        """Change something that tests wait for."""
        with self.changed:
            change()
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so."""
        with self.changed:
            assert self.changed.wait_for(condition, 10), f"arrived: {self.arrived}, opened: {self.opened}"

    def release(self) -> None:
        """Let every hanging call return."""
        for event in self.hold.values():
            event.set()


class ScriptedLink:
    """A link that does as its hub says."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def connect(self, link_listener: LinkListener | None) -> None:
        self._hub.step("connect")
        self._ears = link_listener

    def send(self, message: Message) -> None:
        if self._hub.flapping:
            raise LinkError("the connection was reset")
        self._hub.step("send")
        if message.message_id == self._hub.poison:
            raise LinkError("the connection was reset")
        self._hub.note(lambda: self._hub.arrived.append(message.message_id))

    def twin(self) -> Mapping[str, Any] | None:
        self._hub.step("twin")
        if self._hub.flapping:
            self._hub.note(lambda: setattr(self._hub, "flapping", self._hub.flapping - 1))
            self._hub.on_lost("the connection was reset")
        self._hub.note(lambda: setattr(self._hub, "asked", self._hub.asked + 1))
        return {"desired": {}, "reported": {}}

    def subscribe(self) -> None:
        self._hub.step("listen")
        assert self._ears is not None
        link_listener = self._ears
        self._hub.note(lambda: self._hub.link_listener.append(link_listener))

    def report(self, patch: Mapping[str, Any]) -> bool:
        self._hub.step("report")
        self._hub.note(lambda: self._hub.reported.append(patch))
        return not self._hub.picky

    def answer(self, request_id: str, status: int, document: Any) -> None:
        self._hub.step("answer")
        self._hub.note(lambda: self._hub.answers.append((request_id, status, document)))

    def close(self) -> None:
        self._hub.step("close")
        self._hub.note(lambda: setattr(self._hub, "closed", self._hub.closed + 1))


class Bench:
    """A client, its hub and its crew."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
        self.states: list[str] = []
        self.twins: list[tuple[Mapping[str, Any] | None, int]] = []
        self.calls: list[MethodCall] = []
        self.inputs: list[InputMessage] = []
        self.clients: list[HubClient] = []

    def twin(self, twin: Mapping[str, Any] | None, connection: int) -> None:
        """See `Listener`."""
        self.hub.note(lambda: self.twins.append((twin, connection)))

    def on_method_call(self, call: MethodCall) -> None:
        """See `Listener`."""
        self.hub.note(lambda: self.calls.append(call))

    def on_message(self, message: InputMessage) -> None:
        """See `Listener`."""
        self.hub.note(lambda: self.inputs.append(message))

    def client(self, deadlines: Deadlines = QUICK, message_queue: MemoryQueue | None = None) -> HubClient:
        """A client that is not started yet."""
        client = HubClient(
            IDENTITY,
            self.thread_group,
            deadlines=deadlines,
            message_queue=message_queue,
            link_factory=self.hub.open,
            on_change=lambda status: self.hub.note(lambda: self.states.append(status.state)),
            listener=self,
            on_stuck=lambda: self.hub.note(lambda: self.states.append("on_stuck")),
        )
        self.clients.append(client)
        return client


def quick(**changes: float) -> Deadlines:
    """The quick deadlines with some changed."""
    values = {name: getattr(QUICK, name) for name in Deadlines.__dataclass_fields__}
    return Deadlines(**{**values, **changes})
