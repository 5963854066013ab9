"""The hub client with a scripted connection and a real spool, for tests."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from visionedge.iothub.client import Deadlines, HubClient, HubState
from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk import (
    InputMessage,
    LinkError,
    LinkListener,
    MethodCall,
    OnLost,
)
from visionedge.outbound.messages import Message
from visionedge.outbound.spool import Spool
from visionedge.outbound.sqlite_store import SpoolLimits
from visionedge.runtime.threads import ThreadGroup

IDENTITY = Identity(hub="hub", device="press-7", module="vision", gateway="gateway")
QUICK_DEADLINES = Deadlines(
    build_s=5, connect_s=5, send_s=5, disconnect_s=1, first_wait_s=0.01, max_wait_s=0.02, max_hung_threads=2
)


def message(number: int, output: str = "detections", size: int = 10) -> Message:
    """A message with a body of `size` bytes."""
    return Message(output, b"x" * size, f"{output}-{number}", {}, number)


class ScriptedHub:
    """A script for links, and a record of their calls. A call hangs until its event in `hold` is set."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.arrived: list[str] = []
        self.opened = 0
        self.closed = 0
        self.twin_requests = 0
        self.poison_message_id = ""
        self.flapping = 0
        self.errors: list[Exception] = []
        self.hold: dict[str, threading.Event] = {}
        self.link_listener: list[LinkListener] = []
        self.reported: list[Mapping[str, Any]] = []
        self.answers: list[tuple[str, int, Any]] = []
        self.rejects_reports = False
        self.entered: list[str] = []
        self.on_lost: OnLost = lambda _reason: None

    def open(self, _identity: Identity, on_lost: OnLost) -> "ScriptedLink":
        """The link factory of a client."""
        self.on_lost = on_lost
        self.update(lambda: setattr(self, "opened", self.opened + 1))
        self.step("build")
        return ScriptedLink(self)

    def step(self, name: str) -> None:
        """Hang or raise, if the script says so."""
        self.update(lambda: self.entered.append(name))
        if name in self.hold:
            self.hold[name].wait()
        if name in ("build", "connect", "send") and self.errors:
            raise self.errors.pop(0)

    def update(self, change: Callable[[], object]) -> None:
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
    """A link that follows the script of its hub."""

    def __init__(self, hub: ScriptedHub) -> None:
        self._hub = hub

    def connect(self, link_listener: LinkListener | None) -> None:
        self._hub.step("connect")
        self._link_listener = link_listener

    def send(self, message: Message) -> None:
        if self._hub.flapping:
            raise LinkError("the connection was reset")
        self._hub.step("send")
        if message.message_id == self._hub.poison_message_id:
            raise LinkError("the connection was reset")
        self._hub.update(lambda: self._hub.arrived.append(message.message_id))

    def twin(self) -> Mapping[str, Any] | None:
        self._hub.step("twin")
        if self._hub.flapping:
            self._hub.update(lambda: setattr(self._hub, "flapping", self._hub.flapping - 1))
            self._hub.on_lost("the connection was reset")
        self._hub.update(lambda: setattr(self._hub, "asked", self._hub.twin_requests + 1))
        return {"desired": {}, "reported": {}}

    def subscribe(self) -> None:
        self._hub.step("subscribe")
        assert self._link_listener is not None
        link_listener = self._link_listener
        self._hub.update(lambda: self._hub.link_listener.append(link_listener))

    def report(self, patch: Mapping[str, Any]) -> bool:
        self._hub.step("report")
        self._hub.update(lambda: self._hub.reported.append(patch))
        return not self._hub.rejects_reports

    def answer(self, request_id: str, status: int, document: Any) -> None:
        self._hub.step("answer")
        self._hub.update(lambda: self._hub.answers.append((request_id, status, document)))

    def close(self) -> None:
        self._hub.step("close")
        self._hub.update(lambda: setattr(self._hub, "closed", self._hub.closed + 1))


class RecordedClient(HubClient):
    """A hub client that records its states; an empty text when it is woken."""

    def __init__(self, *args: Any, record: Callable[[str], None], **kwargs: Any) -> None:
        self._record = record
        super().__init__(*args, **kwargs)

    def _notify(self) -> None:
        super()._notify()
        self._record("")

    def _set_state(self, state: HubState) -> None:
        with self._wake:
            changed = self._state not in (state, "closed")
        super()._set_state(state)
        if changed:
            self._record(state)


class HubClientHarness:
    """A client with its hub, its spool (in `folder`) and its threads."""

    def __init__(self, folder: Path) -> None:
        self.hub = ScriptedHub()
        self.thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
        self.states: list[str] = []
        self.twins: list[tuple[Mapping[str, Any] | None, int]] = []
        self.calls: list[MethodCall] = []
        self.inputs: list[InputMessage] = []
        self.clients: list[HubClient] = []
        self.spools: list[Spool] = []
        self._folder = folder

    def twin(self, twin: Mapping[str, Any] | None, connection_number: int) -> None:
        """See `HubListener`."""
        self.hub.update(lambda: self.twins.append((twin, connection_number)))

    def on_method_call(self, call: MethodCall) -> None:
        """See `HubListener`."""
        self.hub.update(lambda: self.calls.append(call))

    def on_message(self, message: InputMessage) -> None:
        """See `HubListener`."""
        self.hub.update(lambda: self.inputs.append(message))

    def client(self, deadlines: Deadlines = QUICK_DEADLINES, limits: SpoolLimits | None = None) -> HubClient:
        """A client that is not started; its spool is."""
        spool = Spool(self._folder / "spool.db", "me", self.thread_group, limits=limits)
        spool.start()
        client = RecordedClient(
            IDENTITY,
            self.thread_group,
            spool,
            deadlines=deadlines,
            link_factory=self.hub.open,
            listener=self,
            on_stuck=lambda: self._record("on_stuck"),
            record=self._record,
        )
        self.clients.append(client)
        self.spools.append(spool)
        return client

    def close(self) -> None:
        """Release hanging calls, and close clients and spools."""
        self.hub.release()
        for client in self.clients:
            client.close(5)
        for spool in self.spools:
            assert spool.close(5)

    def wait_until_written(self) -> None:
        """Wait until the spools have written all messages."""
        self.hub.wait(lambda: not any(spool.unwritten for spool in self.spools))

    def _record(self, state: str) -> None:
        self.hub.update(lambda: self.states.append(state) if state else None)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[HubClientHarness]:
    """A bench whose threads all end."""
    harness = HubClientHarness(tmp_path)
    yield harness
    harness.close()
    assert harness.thread_group.join(5) == []


def quick_deadlines(**changes: float) -> Deadlines:
    """`QUICK_DEADLINES` with some deadlines changed."""
    values = {name: getattr(QUICK_DEADLINES, name) for name in Deadlines.__dataclass_fields__}
    return Deadlines(**{**values, **changes})
