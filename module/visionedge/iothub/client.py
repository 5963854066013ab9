"""The hub client: takes messages, holds them until the hub has acknowledged them, and survives the SDK.

One thread, `hub:client`, decides; it never calls the SDK itself but has `AbandonableCalls` do it, each call
with its own deadline. Whoever sends only appends to the backlog, or to the errands of the line that is there.
What is done about failures is told in `ladder`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk import (
    HubLink,
    InputMessage,
    LinkError,
    LinkFactory,
    MessageRefusedError,
    MethodCall,
    open_link,
)
from visionedge.iothub.sdk_calls import (
    AbandonableCalls,
    CallTimeoutError,
    Deadlines,
    FaultCounter,
    HubFault,
    HubState,
    HubStatus,
    StuckError,
)
from visionedge.outbound.memory_queue import MemoryQueue, MessageQueue
from visionedge.outbound.messages import Message
from visionedge.runtime.redaction import redact
from visionedge.runtime.retry import RetryPolicy
from visionedge.runtime.threads import ThreadGroup

# One connection and what is known of it; how it is made, listened to and ended, each within its deadline.


log = logging.getLogger(__name__)

_MAX_LINK_TASKS = 2_100
"""An answer for each direct method that may be called at once, nearly all of them short, and a few more."""

TaskOutcome = Literal["taken", "refused", "lost"]
"""What became of an errand: the hub has it, the hub will not have it, or the link was lost before."""


class HubListener(Protocol):
    """Who is told what comes from the hub; called from threads of the hub client or the SDK, never blocks."""

    def twin(self, twin: Mapping[str, Any] | None, connection: int) -> None:
        """The whole twin was read over the link of this number; None if the hub answered with an error."""

    def on_method_call(self, call: MethodCall) -> None:
        """A direct method is called; an errand answers it over the same link."""

    def on_message(self, message: InputMessage) -> None:
        """A message has come to an input."""


@dataclass(frozen=True, slots=True)
class LinkTask:
    """Something to do over one link, beside sending messages; tried once.

    `do` says whether the hub took it; `done` is told the outcome, from the thread `hub:client` or the one
    that gave the errand.
    """

    what: str
    connection: int
    do: Callable[[HubLink], bool]
    done: Callable[[TaskOutcome], None] = lambda _outcome: None


@dataclass(slots=True)
class HubConnection:
    """A connection; `renew_ns` and `probe_ns` say when its token and its liveness are due.

    Until `quarantine_until_ns` it has to show that it lasts without the message that is suspected. `lost` has
    the reason once it is lost, `stale` says that the twin has changed; both are set by threads of the SDK.
    """

    number: int
    link: HubLink
    wake: Callable[[], None]
    lost: str | None = None
    twin_changed: bool = False
    subscribed: bool = False
    renew_ns: int = 0
    probe_ns: int = 0
    quarantine_until_ns: int | None = None
    link_tasks: deque[LinkTask] = field(default_factory=deque)

    def mark_lost(self, reason: str) -> None:
        """The connection has ended; the first reason counts."""
        self.lost = self.lost or reason
        self.wake()

    def enqueue(self, link_task: LinkTask) -> bool:
        """Have an errand done over this line; False when it is another's, or too many wait."""
        if link_task.connection != self.number or len(self.link_tasks) >= _MAX_LINK_TASKS:
            return False
        self.link_tasks.append(link_task)
        return True


class ConnectionListener:
    """What is heard on one line."""

    def __init__(self, connection: HubConnection, listener: HubListener) -> None:
        self._connection = connection
        self._listener = listener

    def on_desired_changed(self) -> None:
        """Have the twin read again."""
        self._connection.twin_changed = True
        self._connection.wake()

    def on_method_call(self, call: MethodCall) -> None:
        """Hand on who has to answer, and over which line."""
        self._listener.on_method_call(replace(call, connection=self._connection.number))

    def on_message(self, message: InputMessage) -> None:
        """Hand on."""
        self._listener.on_message(message)


class HubConnector:
    """Makes connections, one after the other, and ends them; for the thread `hub:client` alone.

    Raises:
        LinkError, OverdueError, StuckError: from all but `end`.
    """

    def __init__(
        self,
        identity: Identity,
        link_factory: LinkFactory,
        calls: AbandonableCalls,
        deadlines: Deadlines,
        *,
        wake: Callable[[], None],
        listener: HubListener | None,
    ) -> None:
        self._identity = identity
        self._link_factory = link_factory
        self._calls = calls
        self._deadlines = deadlines
        self._wake = wake
        self._listener = listener
        self.built = 0

    def build(self) -> HubConnection:
        """Make a connection; it is not opened yet."""
        self.built += 1
        # The SDK may lose a link before this line is there.
        early: list[str] = []
        made: list[HubConnection] = []

        def lost(reason: str) -> None:
            early.append(reason)
            for connection in made:
                connection.mark_lost(reason)

        link = self._calls.call(
            "the workload API",
            lambda: self._link_factory(self._identity, lost),
            self._deadlines.build_s,
            late=lambda unwanted: unwanted.close(),
        )
        connection = HubConnection(self.built, link, self._wake)
        made.append(connection)
        if early:
            connection.mark_lost(early[0])
        return connection

    def open(self, connection: HubConnection) -> None:
        """Connect; what comes is heard from then on."""
        link_listener = None if self._listener is None else ConnectionListener(connection, self._listener)
        self._calls.call("connect", lambda: connection.link.connect(link_listener), self._deadlines.connect_s)

    def read_twin(self, connection: HubConnection) -> Mapping[str, Any] | None:
        """The twin; before the first time, subscribe to what the listener wants to hear."""
        if self._listener is not None and not connection.subscribed:
            self._calls.call("subscribing", connection.link.subscribe, self._deadlines.request_s)
            connection.subscribed = True
        connection.twin_changed = False
        return self._calls.call("the twin", connection.link.twin, self._deadlines.request_s)

    def do(self, connection: HubConnection, link_task: LinkTask) -> None:
        """Do an errand and tell what became of it."""
        outcome: TaskOutcome = "lost"
        try:
            taken = self._calls.call(
                link_task.what, lambda: link_task.do(connection.link), self._deadlines.request_s
            )
            outcome = "taken" if taken else "refused"
        except (LinkError, CallTimeoutError, StuckError):
            raise
        except Exception:  # it is this errand that cannot be done; the connection is well
            log.exception("%s failed", link_task.what)
            outcome = "refused"
        finally:
            link_task.done(outcome)

    def end(self, connection: HubConnection, final_deadline_ns: int | None) -> None:
        """End a connection for good: one that lingers would fight its successor for the client id."""
        if final_deadline_ns is not None:
            self._calls.set_final_deadline(final_deadline_ns)
        try:
            self._calls.call("disconnect", connection.link.close, self._deadlines.disconnect_s)
        except (LinkError, CallTimeoutError, StuckError) as error:
            log.debug("a connection did not end well: %s", error)


_MAX_CONSECUTIVE_ERRORS = 10
"""Unexpected errors in a row, with growing waits between them: about two minutes."""

ClientAction = Message | LinkTask | Literal["renew", "probe", "close"]


class HubClient:
    """Sends messages in order, each until it is acknowledged (so twice at times) or a full backlog drops it.

    `send`, `errand` and `status` never block and may be called from any thread. Called from the thread
    `hub:client`, outside of locks: `on_change` when `state` changes, and `on_stuck` when nothing helps but
    another process. Without a `listener` nothing is subscribed to, and the twin only proves the connection.
    """

    def __init__(
        self,
        identity: Identity,
        thread_group: ThreadGroup,
        *,
        deadlines: Deadlines | None = None,
        message_queue: MessageQueue | None = None,
        link_factory: LinkFactory = open_link,
        listener: HubListener | None = None,
        on_change: Callable[[HubStatus], None] = lambda _status: None,
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._thread_group = thread_group
        self._deadlines = deadlines or Deadlines()
        self._listener = listener
        self._on_change = on_change
        self._on_stuck = on_stuck
        # These belong to the thread `hub:client`.
        self._faults = FaultCounter()
        self._stuck_ns: int | None = None
        self._probe_s = self._deadlines.probe_s
        self._twin_silent = False
        self._suspect: tuple[str, int] = ("", 0)
        self._consecutive_errors = 0
        self._calls = AbandonableCalls(thread_group, "hub:call", limit=self._deadlines.max_hung_threads)
        self._hub_connector = HubConnector(
            identity, link_factory, self._calls, self._deadlines, wake=self._notify, listener=listener
        )
        # Guards all below; held for assignments only.
        self._wake = threading.Condition()
        self._message_queue: MessageQueue = MemoryQueue() if message_queue is None else message_queue
        self._message_queue.attach(self._notify)
        self._connection: HubConnection | None = None
        self._state: HubState = "starting"
        self._sent = 0
        self._failures = 0
        self._last_error: str | None = None
        self._connected_ns: int | None = None
        self._flush_until_ns: int | None = None
        self._close_until_ns = 0
        self._started = False
        self._finished = threading.Event()

    def __repr__(self) -> str:
        with self._wake:
            return f"<HubClient {self._state} sent={self._sent} {self._message_queue!r}>"

    def start(self) -> None:
        """Begin to connect and to send; once."""
        self._started = True
        self._thread_group.start("hub:client", self._run, vital=True, may_return=True)

    def send(self, message: Message) -> None:
        """Queue a message; when the backlog is full the oldest detections go first, counted."""
        with self._wake:
            self._message_queue.put(message)
            if self._state == "closed":
                self._message_queue.drop_unsaved()
            self._wake.notify_all()

    def link_task(self, link_task: LinkTask) -> None:
        """Have something done over the line that it names, before the messages; lost without that line."""
        with self._wake:
            closing = self._flush_until_ns is not None
            taken = self._connection is not None and not closing and self._connection.enqueue(link_task)
            self._wake.notify_all()
        if not taken:
            link_task.done("lost")

    @property
    def connected(self) -> bool:
        """Whether the hub takes messages right now."""
        with self._wake:
            return self._state == "connected"

    def status(self) -> HubStatus:
        """What the client does right now."""
        abandoned, hung = self._calls.abandoned, self._calls.hung()
        with self._wake:
            return HubStatus(
                state=self._state,
                connected=self._state == "connected",
                sent=self._sent,
                queued=len(self._message_queue),
                queued_bytes=self._message_queue.bytes,
                dropped=self._message_queue.dropped,
                last_error=self._last_error,
                rebuilds=max(0, self._hub_connector.built - 1),
                abandoned=abandoned,
                hung=hung,
                faults=self._faults.counts,
            )

    def close(self, deadline_s: float) -> bool:
        """Send what can be sent, take leave of the hub, and come back within the deadline. Blocks.

        True when no thread was left behind. False: the SDK holds threads that never end, and the interpreter
        would wait for them at its exit; leave with `os._exit`.
        """
        now_ns = time.monotonic_ns()
        with self._wake:
            share = 0.7 if len(self._message_queue) else 0.0
            self._flush_until_ns = now_ns + round(deadline_s * share * 1e9)
            # The last tenth is for this thread and the coordinator to come to their ends.
            self._close_until_ns = now_ns + round(deadline_s * 0.9 * 1e9)
            # With nothing to send, a call that is under way (the twin, say) may still come home.
            self._calls.set_final_deadline(now_ns + round(deadline_s * max(share, 0.3) * 1e9))
            self._wake.notify_all()
        ended = self._finished.wait(deadline_s) if self._started else True
        with self._wake:
            left = self._message_queue.drop_unsaved()
        if left:
            log.warning("closed with %d messages that the hub never took; they are lost", left)
        self._set_state("closed")
        return ended and self._calls.hung() == 0

    # --- on the thread hub:client -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._flushed(time.monotonic_ns()):
                try:
                    self._session()
                except (LinkError, CallTimeoutError, StuckError) as error:
                    self._failed(error)
                except Exception as error:  # noqa: BLE001 - counted, and raised when it does not end
                    self._unexpected(error)
                self._wait_before_retry()
        finally:
            self._calls.close()
            self._set_state("closed")
            self._finished.set()

    def _unexpected(self, error: Exception) -> None:
        """An error that no part of the SDK is known to raise: a new connection may do without it.

        Raises:
            Exception: it came so often, with no message sent between, that only a new process may help.
        """
        self._consecutive_errors += 1
        if self._consecutive_errors >= _MAX_CONSECUTIVE_ERRORS:
            raise error
        log.error("the hub client failed; connecting again", exc_info=error)
        self._failed(LinkError(f"{type(error).__name__}: {error}"))

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _session(self) -> None:
        """Connect and send until the connection is lost, or replaced before its token ends, or we close."""
        self._set_state("connecting")
        connection: HubConnection | None = self._hub_connector.build()
        while connection is not None:
            successor: HubConnection | None = None
            try:
                self._set_connection(connection)
                self._hub_connector.open(connection)
                self._set_state("connected")
                successor = self._serve(connection)
            finally:
                self._set_connection(None)
                self._hub_connector.end(connection, self._final_deadline_ns())
            connection = successor

    def _set_connection(self, connection: HubConnection | None) -> None:
        """Take errands for a line from now on, or for none; those that the one before still had are lost."""
        with self._wake:
            before, self._connection = self._connection, connection
        for link_task in before.link_tasks if before is not None else ():
            link_task.done("lost")

    def _serve(self, connection: HubConnection) -> HubConnection | None:
        """Send until the end; the successor if it is time to renew, None if we close."""
        log.info(
            "connected to %s as %s/%s",
            self._describe_endpoint(),
            self._identity.device,
            self._identity.module,
        )
        self._connected_ns = time.monotonic_ns()
        self._stuck_ns = None
        connection.renew_ns = self._connected_ns + _ns(self._deadlines.renew_s)
        if self._suspect[1] >= self._deadlines.poison_tries:
            connection.quarantine_until_ns = self._connected_ns + _ns(self._deadlines.poison_pause_s)
        # A twin that was silent before is asked later: messages come first.
        connection.probe_ns = self._connected_ns + _ns(self._probe_s if self._twin_silent else 0)
        while (step := self._next(connection)) != "close":
            if isinstance(step, Message):
                self._send(connection, step)
            elif isinstance(step, LinkTask):
                self._hub_connector.do(connection, step)
            elif step == "probe":
                self._probe(connection)
            elif (successor := self._renew(connection)) is not None:
                return successor
        return None

    def _renew(self, connection: HubConnection) -> HubConnection | None:
        try:
            return self._hub_connector.build()
        except (LinkError, CallTimeoutError, StuckError) as error:
            # The old token is still good for a while: the connection is kept, and we ask again soon.
            log.warning(
                "the token for %s could not be renewed yet: %s", self._describe_endpoint(), redact(str(error))
            )
            connection.renew_ns = time.monotonic_ns() + _ns(self._deadlines.max_wait_s)
            return None

    def _next(self, connection: HubConnection) -> ClientAction:
        """What to do next; waits until there is something."""
        with self._wake:
            while True:
                now_ns = time.monotonic_ns()
                message = self._message_queue.first()
                if connection.lost is not None:
                    raise self._lost(connection, now_ns)
                if self._flushed(now_ns):
                    return "close"
                if now_ns >= connection.renew_ns:
                    return "renew"
                # Closing leaves no time for questions and errands.
                if self._flush_until_ns is None:
                    if now_ns >= connection.probe_ns or connection.twin_changed:
                        return "probe"
                    if connection.link_tasks:
                        return connection.link_tasks.popleft()
                quarantine_until_ns = connection.quarantine_until_ns or 0
                if message is not None and now_ns >= quarantine_until_ns:
                    return message
                moments_ns = (
                    connection.renew_ns,
                    self._flush_until_ns or connection.probe_ns,
                    quarantine_until_ns,
                )
                self._wake.wait((min(at for at in moments_ns if at > now_ns) - now_ns) / 1e9)

    def _lost(self, connection: HubConnection, now_ns: int) -> LinkError:
        """The error of a connection that ended by itself; one that could not last clears the suspect."""
        if connection.quarantine_until_ns is not None and now_ns < connection.quarantine_until_ns:
            self._suspect = ("", 0)
        return LinkError(str(connection.lost))

    def _flushed(self, now_ns: int) -> bool:
        """Whether we close and all is sent, or its time is over."""
        with self._wake:
            if self._flush_until_ns is None:
                return False
            return len(self._message_queue) == 0 or now_ns >= self._flush_until_ns

    def _probe(self, connection: HubConnection) -> None:
        """Ask for the twin: an answer proves connection, session and subscriptions, which no PUBACK does."""
        try:
            twin = self._hub_connector.read_twin(connection)
        except CallTimeoutError:
            if self._closing():
                return  # it was us who had no time
            # Should it be the hub that knows no twin, the messages must not suffer from us asking.
            self._probe_s = min(self._probe_s * 2, 16 * self._deadlines.probe_s)
            self._twin_silent = True
            self._faults.record("silent")
            raise
        except LinkError:
            self._twin_silent = True
            raise
        self._twin_silent, self._probe_s = False, self._deadlines.probe_s
        # One that was refused is soon asked for again: it may be what a patch told of.
        wait_s = self._probe_s if twin is not None else min(self._probe_s, self._deadlines.max_wait_s)
        connection.probe_ns = time.monotonic_ns() + _ns(wait_s)
        if self._listener is not None:
            self._listener.twin(twin, connection.number)

    def _send(self, connection: HubConnection, message: Message) -> None:
        try:
            self._calls.call("send", partial(connection.link.send, message), self._deadlines.send_s)
        except MessageRefusedError as error:
            self._give_up(message, redact(str(error)))
        except LinkError as error:
            tries = self._suspect[1] + 1 if self._suspect[0] == message.message_id else 1
            self._suspect = (message.message_id, tries)
            if connection.quarantine_until_ns is None:
                raise
            self._faults.record("poison")
            self._give_up(message, f"it cost {tries} connections: {redact(str(error))}")
            raise
        except (CallTimeoutError, StuckError):
            raise
        except Exception as error:  # one message that cannot be sent must not hold up all others
            log.exception("sending message %s failed", message.message_id)
            self._give_up(message, f"{type(error).__name__}: {redact(str(error))}")
        else:
            self._suspect, self._consecutive_errors = ("", 0), 0
            self._settle(message)

    def _closing(self) -> bool:
        with self._wake:
            return self._flush_until_ns is not None

    def _give_up(self, message: Message, why: str) -> None:
        log.warning("message %s is given up: %s", message.message_id, why)
        self._suspect = ("", 0)
        self._settle(message, dropped="refused")

    def _settle(self, message: Message, *, dropped: str | None = None) -> None:
        with self._wake:
            self._message_queue.settle(message, dropped=dropped)
            self._sent += dropped is None
            self._failures = 0

    def _final_deadline_ns(self) -> int | None:
        """Until when taking leave may last, once we close."""
        with self._wake:
            return self._close_until_ns if self._flush_until_ns is not None else None

    def _failed(self, error: Exception) -> None:
        self._log_failure(error)
        with self._wake:
            if self._flush_until_ns is not None:
                # Once closing, one failed attempt is the last.
                self._flush_until_ns = 0
        self._record_fault(error)
        self._set_state("stuck" if isinstance(error, StuckError) else "waiting")

    def _record_fault(self, error: Exception) -> None:
        """The rung that an error means."""
        fault: HubFault = "rebuild"
        if isinstance(error, StuckError):
            fault = "stuck"
        elif isinstance(error, CallTimeoutError):
            fault = "overdue"
        self._faults.record(fault)
        now_ns = time.monotonic_ns()
        if fault == "stuck":
            self._stuck_ns = self._stuck_ns or now_ns
            if now_ns - self._stuck_ns >= _ns(self._deadlines.stuck_s):
                self._on_stuck()

    def _log_failure(self, error: Exception) -> None:
        """Remember and log an error; the same one again and again is logged once."""
        text = redact(str(error))
        began_ns, self._connected_ns = self._connected_ns, None
        with self._wake:
            if began_ns is not None and time.monotonic_ns() - began_ns > self._deadlines.max_wait_s * 1e9:
                self._failures = 0
            known = self._failures > 0 and text == self._last_error
            self._failures += 1
            self._last_error = text
            queued, closing = len(self._message_queue), self._flush_until_ns is not None
        level = logging.DEBUG if known or closing else logging.WARNING
        log.log(level, "no connection to %s: %s; %d messages wait", self._describe_endpoint(), text, queued)

    def _wait_before_retry(self) -> None:
        """Wait before the next attempt, longer each time, not in step with others; closing ends it."""
        with self._wake:
            policy = RetryPolicy(self._deadlines.first_wait_s, self._deadlines.max_wait_s, jitter=0.5)
            wait_s = policy.wait_s(self._failures)
            self._wake.wait_for(lambda: self._flush_until_ns is not None, wait_s)

    def _set_state(self, state: HubState) -> None:
        with self._wake:
            changed = self._state not in (state, "closed")
            if changed:
                self._state = state
        if changed:
            self._on_change(self.status())

    def _describe_endpoint(self) -> str:
        return f"IoT Hub through {self._identity.gateway}"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
