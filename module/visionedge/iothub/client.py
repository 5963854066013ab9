"""The hub client: sends the messages of the spool, and survives an SDK that fails or hangs.

One thread, `hub:client`, decides. It never calls the SDK itself: `AbandonableCalls` does, each call with its
own deadline. Other threads only append to the spool, or submit tasks to the current connection. A connection
is never repaired; it is closed and a new one is made. What is done about failures, by the name of the fault:

overdue   a call did not return within its deadline: its thread is abandoned, and another one continues
silent    the hub did not answer the read of the twin, although it may still accept messages
rebuild   the connection is closed with its SDK client, and a new client is made on a new thread
poison    one message was being sent when several good connections were lost: it is dropped
stuck     so many threads hang that another one would hang, too: after a while the module ends with
          `EXIT_HUNG`, so that edgeAgent starts a new process
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
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
from visionedge.iothub.sdk_calls import AbandonableCalls, CallTimeoutError, StuckError
from visionedge.outbound.messages import Message
from visionedge.outbound.queue_state import QueuedMessage
from visionedge.outbound.spool import Spool
from visionedge.outbound.sqlite_store import MessageDropReason
from visionedge.runtime.redaction import redact
from visionedge.runtime.retry import RetryPolicy
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

_MAX_LINK_TASKS = 2_100
"""Enough for the answers to 2,000 direct methods that are called at once, nearly all of them short."""

HubFault = Literal["overdue", "silent", "rebuild", "poison", "stuck"]
HubState = Literal["starting", "connecting", "connected", "waiting", "stuck", "closed"]

TaskOutcome = Literal["taken", "refused", "lost"]
"""The outcome of a `LinkTask`: the hub accepted it, the hub refused it, or the connection was lost before."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Deadlines of calls into the SDK, and other times and counts of the hub client.

    A call that hangs costs at most the longest deadline plus `disconnect_s`. The SDK's own limits, where it
    has any, are 30 and 60 s.

    Attributes:
        build_s: making an SDK client, which calls the workload API.
        request_s: reading the twin, subscribing, and each `LinkTask`.
        probe_s: interval between two reads of the twin.
        renew_s: age at which a connection is replaced; well before its token expires (3600 s).
        first_wait_s, max_wait_s: wait before the next connection; doubles with each failure.
        stuck_s: how long the client stays stuck before it calls `on_stuck`.
        max_hung_threads: how many threads may hang before the client is stuck.
        poison_tries: how many connections may be lost in a row while the same message is sent.
        poison_pause_s: how long the next connection must last before that message is sent a last time.
        max_unexpected_errors: unexpected errors in a row after which the thread ends; about two minutes of
            retries.
    """

    build_s: float = 20.0
    connect_s: float = 20.0
    send_s: float = 20.0
    probe_s: float = 60.0
    request_s: float = 20.0
    disconnect_s: float = 5.0
    renew_s: float = 2700.0
    first_wait_s: float = 1.0
    max_wait_s: float = 15.0
    stuck_s: float = 60.0
    max_hung_threads: int = 6
    poison_tries: int = 10
    poison_pause_s: float = 5.0
    max_unexpected_errors: int = 10


@dataclass(frozen=True, slots=True)
class HubStatus:
    """The state of the client.

    `waiting` is the number of messages in the spool, `dropped` counts messages by reason, `faults` counts
    faults by name, `abandoned_calls` the calls that missed their deadline; `hung` is the number of their
    threads that have not returned. `last_error` has no secrets.
    """

    state: HubState
    connected: bool
    sent: int
    waiting: int
    dropped: Mapping[str, int]
    last_error: str | None
    rebuilds: int
    abandoned_calls: int
    hung: int
    faults: Mapping[str, int]


class HubListener(Protocol):
    """Receives what comes from the hub. Called from threads of the hub client and the SDK; must not block."""

    def twin(self, twin: Mapping[str, Any] | None, connection_number: int) -> None:
        """The whole twin was read over this connection; None if the hub answered with an error."""

    def on_method_call(self, call: MethodCall) -> None:
        """A direct method was called; a `LinkTask` over the same connection answers it."""

    def on_message(self, message: InputMessage) -> None:
        """A message arrived at an input."""


@dataclass(frozen=True, slots=True)
class LinkTask:
    """A task over one connection, beside sending messages; tried once.

    `do` returns whether the hub accepted it. `done` gets the outcome, on the thread `hub:client` or the one
    that submitted the task. `what` names the task in the log.
    """

    what: str
    connection_number: int
    do: Callable[[HubLink], bool]
    done: Callable[[TaskOutcome], None] = lambda _outcome: None


@dataclass(slots=True)
class HubConnection:
    """A connection and its state.

    `renew_ns` and `probe_ns` are the times at which its token must be renewed and its twin must be read.
    Until `quarantine_until_ns` it must last without sending the suspected message. `lost` (a reason) and
    `twin_changed` are set by threads of the SDK.
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
        """Queue a task; False if it names another connection, or too many tasks wait."""
        if link_task.connection_number != self.number or len(self.link_tasks) >= _MAX_LINK_TASKS:
            return False
        self.link_tasks.append(link_task)
        return True


class ConnectionListener:
    """The `LinkListener` of one connection: adds its number to calls."""

    def __init__(self, connection: HubConnection, listener: HubListener) -> None:
        self._connection = connection
        self._listener = listener

    def on_desired_changed(self) -> None:
        """Have the twin read again."""
        self._connection.twin_changed = True
        self._connection.wake()

    def on_method_call(self, call: MethodCall) -> None:
        """Pass on a call, with the number of the connection that must answer it."""
        self._listener.on_method_call(replace(call, connection_number=self._connection.number))

    def on_message(self, message: InputMessage) -> None:
        """Pass on a message."""
        self._listener.on_message(message)


class HubConnector:
    """Makes connections, one after the other, and closes them. For the thread `hub:client` only.

    Raises:
        LinkError, CallTimeoutError, StuckError: from all methods except `end`.
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
        """Make a connection, which is not opened yet."""
        self.built += 1
        # The SDK may report the loss of the link before `HubConnection` exists.
        early: list[str] = []
        made: list[HubConnection] = []

        def lost(reason: str) -> None:
            early.append(reason)
            for connection in made:
                connection.mark_lost(reason)

        link = self._calls.call(
            "asking the workload API",
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
        """Connect; the listener receives calls and messages from now on."""
        link_listener = None if self._listener is None else ConnectionListener(connection, self._listener)
        self._calls.call("connect", lambda: connection.link.connect(link_listener), self._deadlines.connect_s)

    def read_twin(self, connection: HubConnection) -> Mapping[str, Any] | None:
        """Read the twin. Before the first time, subscribe, so that no change after it is missed."""
        if self._listener is not None and not connection.subscribed:
            self._calls.call("subscribe", connection.link.subscribe, self._deadlines.request_s)
            connection.subscribed = True
        connection.twin_changed = False
        return self._calls.call("reading the twin", connection.link.twin, self._deadlines.request_s)

    def do(self, connection: HubConnection, link_task: LinkTask) -> None:
        """Do a task and report its outcome."""
        outcome: TaskOutcome = "lost"
        try:
            taken = self._calls.call(
                link_task.what, lambda: link_task.do(connection.link), self._deadlines.request_s
            )
            outcome = "taken" if taken else "refused"
        except (LinkError, CallTimeoutError, StuckError):
            raise
        except Exception:  # the task is at fault, the connection is good
            log.exception("%s failed", link_task.what)
            outcome = "refused"
        finally:
            link_task.done(outcome)

    def end(self, connection: HubConnection, final_deadline_ns: int | None) -> None:
        """Close a connection. If it stayed open, its successor with the same MQTT client id would end it."""
        if final_deadline_ns is not None:
            self._calls.set_final_deadline(final_deadline_ns)
        try:
            self._calls.call("disconnect", connection.link.close, self._deadlines.disconnect_s)
        except (LinkError, CallTimeoutError, StuckError) as error:
            log.debug("closing a connection failed: %s", error)


ClientAction = Message | LinkTask | Literal["renew", "probe", "close"]


class HubClient:
    """Sends the messages of a spool in order, each until the hub acknowledges it, so sometimes twice.

    `send`, `submit` and `status` never block and may be called from any thread. `on_stuck` is called from the
    thread `hub:client`, outside of locks, when only a new process can help. Without a `listener` the client
    subscribes to nothing, and reads the twin only to check the connection.
    """

    def __init__(
        self,
        identity: Identity,
        thread_group: ThreadGroup,
        spool: Spool,
        *,
        deadlines: Deadlines | None = None,
        link_factory: LinkFactory = open_link,
        listener: HubListener | None = None,
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._thread_group = thread_group
        self._deadlines = deadlines or Deadlines()
        self._listener = listener
        self._on_stuck = on_stuck
        # These belong to the thread `hub:client`.
        self._faults: Counter[str] = Counter()
        self._stuck_ns: int | None = None
        self._retry_policy = RetryPolicy(self._deadlines.first_wait_s, self._deadlines.max_wait_s, jitter=0.5)
        self._probe_policy = RetryPolicy(self._deadlines.probe_s, 16 * self._deadlines.probe_s)
        self._unanswered_reads = 0
        self._twin_silent = False
        self._suspect: tuple[str, int] = ("", 0)  # message id, connections lost while it was sent
        self._unexpected_errors = 0
        self._calls = AbandonableCalls(thread_group, "hub:call", limit=self._deadlines.max_hung_threads)
        self._hub_connector = HubConnector(
            identity, link_factory, self._calls, self._deadlines, wake=self._notify, listener=listener
        )
        # Guards all below; held for assignments only.
        self._wake = threading.Condition()
        self._spool = spool
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
        spool.attach(self._notify)

    def __repr__(self) -> str:
        with self._wake:
            return f"<HubClient {self._state} sent={self._sent} {self._spool!r}>"

    def start(self) -> None:
        """Start the thread `hub:client`; once."""
        self._started = True
        self._thread_group.start("hub:client", self._run, vital=True, may_return=True)

    def send(self, message: Message) -> QueuedMessage:
        """Queue a message; the result says when it is secured."""
        return self._spool.put(message)

    def submit(self, link_task: LinkTask) -> None:
        """Do a task over the connection that it names, before the messages; lost without that connection."""
        with self._wake:
            closing = self._flush_until_ns is not None
            queued = self._connection is not None and not closing and self._connection.enqueue(link_task)
            self._wake.notify_all()
        if not queued:
            link_task.done("lost")

    @property
    def connected(self) -> bool:
        """Whether the hub accepts messages now."""
        with self._wake:
            return self._state == "connected"

    def status(self) -> HubStatus:
        """The current state."""
        hung = self._calls.hung()
        with self._wake:
            return HubStatus(
                state=self._state,
                connected=self._state == "connected",
                sent=self._sent,
                waiting=len(self._spool),
                dropped=self._spool.dropped,
                last_error=self._last_error,
                rebuilds=max(0, self._hub_connector.built - 1),
                abandoned_calls=self._calls.abandoned,
                hung=hung,
                faults=MappingProxyType(dict(self._faults)),
            )

    def close(self, deadline_s: float) -> bool:
        """Send waiting messages, disconnect, and return within the deadline. Blocks.

        Messages that are not sent stay in the spool. False if threads of the SDK still hang: the interpreter
        would wait for them at its exit, so the process must end with `os._exit`.
        """
        now_ns = time.monotonic_ns()
        with self._wake:
            share = 0.7 if len(self._spool) else 0.0
            self._flush_until_ns = now_ns + round(deadline_s * share * 1e9)
            # The last tenth is left for `hub:client` and the caller to finish.
            self._close_until_ns = now_ns + round(deadline_s * 0.9 * 1e9)
            # Without messages, a call in progress (such as reading the twin) still gets 30 % of the time.
            self._calls.set_final_deadline(now_ns + round(deadline_s * max(share, 0.3) * 1e9))
            self._wake.notify_all()
        ended = self._finished.wait(deadline_s) if self._started else True
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
        """An error that the SDK is not known to raise: a new connection may work.

        Raises:
            Exception: too many errors in a row, with no message sent between. The thread ends, and so the
            module.
        """
        self._unexpected_errors += 1
        if self._unexpected_errors >= self._deadlines.max_unexpected_errors:
            raise error
        log.error("the hub client failed; making a new connection", exc_info=error)
        self._failed(LinkError(f"{type(error).__name__}: {error}"))

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _session(self) -> None:
        """Connect and send until a connection is lost or the client closes; renew connections in time."""
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
        """Accept tasks for this connection (or for none); waiting tasks of the previous one are lost."""
        with self._wake:
            before, self._connection = self._connection, connection
        for link_task in before.link_tasks if before is not None else ():
            link_task.done("lost")

    def _serve(self, connection: HubConnection) -> HubConnection | None:
        """Send until the token must be renewed (returns the successor) or the client closes (None)."""
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
        # If the twin was not answered before, messages go first and the twin is read later.
        wait_s = self._probe_policy.wait_s(1 + self._unanswered_reads) if self._twin_silent else 0.0
        connection.probe_ns = self._connected_ns + _ns(wait_s)
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
            # The old token is valid for some more minutes, so the connection is kept meanwhile.
            wait_s = self._deadlines.max_wait_s
            log.warning(
                "the token for %s cannot be renewed: %s; retrying in %g s",
                self._describe_endpoint(),
                redact(str(error)),
                wait_s,
            )
            connection.renew_ns = time.monotonic_ns() + _ns(wait_s)
            return None

    def _next(self, connection: HubConnection) -> ClientAction:
        """Wait for the next thing to do, and return it."""
        with self._wake:
            while True:
                now_ns = time.monotonic_ns()
                message = self._spool.peek()
                if connection.lost is not None:
                    raise self._lost(connection, now_ns)
                if self._flushed(now_ns):
                    return "close"
                if now_ns >= connection.renew_ns:
                    return "renew"
                # While closing there is no time for the twin and for tasks.
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
        """The error of a connection that ended; the end during quarantine clears the suspected message."""
        if connection.quarantine_until_ns is not None and now_ns < connection.quarantine_until_ns:
            self._suspect = ("", 0)
        return LinkError(str(connection.lost))

    def _flushed(self, now_ns: int) -> bool:
        """Whether the client closes, and all messages are sent or the time for sending is over."""
        with self._wake:
            if self._flush_until_ns is None:
                return False
            return len(self._spool) == 0 or now_ns >= self._flush_until_ns

    def _probe(self, connection: HubConnection) -> None:
        """Read the twin. The answer proves connection, session and subscriptions; a PUBACK does not."""
        try:
            twin = self._hub_connector.read_twin(connection)
        except CallTimeoutError:
            if self._closing():
                return  # the deadline was shortened by closing
            # If the hub never answers, each attempt costs the connection: read the twin less often.
            self._unanswered_reads += 1
            self._twin_silent = True
            self._faults["silent"] += 1
            raise
        except LinkError:
            self._twin_silent = True
            raise
        self._twin_silent, self._unanswered_reads = False, 0
        # After an error answer the twin is read again soon: the desired properties may have changed.
        wait_s = self._deadlines.probe_s
        if twin is None:
            wait_s = min(wait_s, self._deadlines.max_wait_s)
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
            self._faults["poison"] += 1
            self._give_up(message, f"{tries} connections were lost while it was sent: {redact(str(error))}")
            raise
        except (CallTimeoutError, StuckError):
            raise
        except Exception as error:  # one message that cannot be sent must not delay all others
            log.exception("sending message %s failed", message.message_id)
            self._give_up(message, f"{type(error).__name__}: {redact(str(error))}")
        else:
            self._suspect, self._unexpected_errors = ("", 0), 0
            self._settle(message)

    def _closing(self) -> bool:
        with self._wake:
            return self._flush_until_ns is not None

    def _give_up(self, message: Message, why: str) -> None:
        log.warning("message %s is dropped: %s", message.message_id, why)
        self._suspect = ("", 0)
        self._settle(message, dropped="refused")

    def _settle(self, message: Message, *, dropped: MessageDropReason | None = None) -> None:
        with self._wake:
            self._spool.settle(message, dropped=dropped)
            self._sent += dropped is None
            self._failures = 0

    def _final_deadline_ns(self) -> int | None:
        """When disconnecting must be finished; None unless the client closes."""
        with self._wake:
            return self._close_until_ns if self._flush_until_ns is not None else None

    def _failed(self, error: Exception) -> None:
        self._log_failure(error)
        with self._wake:
            if self._flush_until_ns is not None:
                # While closing, the first failure ends sending.
                self._flush_until_ns = 0
        self._record_fault(error)
        self._set_state("stuck" if isinstance(error, StuckError) else "waiting")

    def _record_fault(self, error: Exception) -> None:
        """Count the fault of an error; call `on_stuck` if the client was stuck for too long."""
        fault: HubFault = "rebuild"
        if isinstance(error, StuckError):
            fault = "stuck"
        elif isinstance(error, CallTimeoutError):
            fault = "overdue"
        self._faults[fault] += 1
        now_ns = time.monotonic_ns()
        if fault == "stuck":
            self._stuck_ns = self._stuck_ns or now_ns
            if now_ns - self._stuck_ns >= _ns(self._deadlines.stuck_s):
                self._on_stuck()

    def _log_failure(self, error: Exception) -> None:
        """Store and log an error; the same error in a row is logged once."""
        text = redact(str(error))
        began_ns, self._connected_ns = self._connected_ns, None
        with self._wake:
            if began_ns is not None and time.monotonic_ns() - began_ns > self._deadlines.max_wait_s * 1e9:
                self._failures = 0
            known = self._failures > 0 and text == self._last_error
            self._failures += 1
            self._last_error = text
            queued, closing = len(self._spool), self._flush_until_ns is not None
        log.log(
            logging.DEBUG if known or closing else logging.WARNING,
            "no connection to %s: %s; %d messages wait; retrying at least every %g s",
            self._describe_endpoint(),
            text,
            queued,
            self._deadlines.max_wait_s,
        )

    def _wait_before_retry(self) -> None:
        """Wait before the next attempt: longer each time, with jitter, until the client closes."""
        with self._wake:
            wait_s = self._retry_policy.wait_s(self._failures)
            self._wake.wait_for(lambda: self._flush_until_ns is not None, wait_s)

    def _set_state(self, state: HubState) -> None:
        with self._wake:
            if self._state != "closed":
                self._state = state

    def _describe_endpoint(self) -> str:
        return f"IoT Hub through {self._identity.gateway}"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
