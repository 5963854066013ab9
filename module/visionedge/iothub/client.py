"""The hub client: takes messages, holds them until the hub has acknowledged them, and survives the SDK.

One thread, `hub:client`, decides; it never calls the SDK itself but has `Losable` do it, each call with its
own deadline. Whoever sends only appends to the backlog, or to the errands of the line that is there. What is
done about failures is told in `ladder`.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from visionedge.iothub.deadlines import (
    Deadlines,
    HubStatus,
    Ladder,
    Losable,
    OverdueError,
    Rung,
    State,
    StuckError,
)
from visionedge.iothub.identity import Identity
from visionedge.iothub.sdk import (
    InputMessage,
    Link,
    LinkError,
    MessageRefusedError,
    MethodCall,
    OpenLink,
    open_link,
)
from visionedge.outbound.memory_queue import Backlog, Waiting
from visionedge.outbound.messages import Message
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import Crew

# One connection and what is known of it; how it is made, listened to and ended, each within its deadline.


log = logging.getLogger(__name__)

_MOST_ERRANDS = 2_100
"""An answer for each direct method that may be called at once, nearly all of them short, and a few more."""

Outcome = Literal["taken", "refused", "lost"]
"""What became of an errand: the hub has it, the hub will not have it, or the link was lost before."""


class Listener(Protocol):
    """Who is told what comes from the hub; called from threads of the hub client or the SDK, never blocks."""

    def twin(self, twin: Mapping[str, Any] | None, line: int) -> None:
        """The whole twin was read over the link of this number; None if the hub answered with an error."""

    def called(self, call: MethodCall) -> None:
        """A direct method is called; an errand answers it over the same link."""

    def received(self, message: InputMessage) -> None:
        """A message has come to an input."""


@dataclass(frozen=True, slots=True)
class Errand:
    """Something to do over one link, beside sending messages; tried once.

    `do` says whether the hub took it; `done` is told the outcome, from the thread `hub:client` or the one
    that gave the errand.
    """

    what: str
    line: int
    do: Callable[[Link], bool]
    done: Callable[[Outcome], None] = lambda _outcome: None


@dataclass(slots=True)
class Line:
    """A connection; `renew_ns` and `probe_ns` say when its token and its liveness are due.

    Until `patient_ns` it has to show that it lasts without the message that is suspected. `lost` has the
    reason once it is lost, `stale` says that the twin has changed; both are set by threads of the SDK.
    """

    number: int
    link: Link
    wake: Callable[[], None]
    lost: str | None = None
    stale: bool = False
    listening: bool = False
    renew_ns: int = 0
    probe_ns: int = 0
    patient_ns: int | None = None
    errands: deque[Errand] = field(default_factory=deque)

    def lose(self, reason: str) -> None:
        """The connection has ended; the first reason counts."""
        self.lost = self.lost or reason
        self.wake()

    def take(self, errand: Errand) -> bool:
        """Have an errand done over this line; False when it is another's, or too many wait."""
        if errand.line != self.number or len(self.errands) >= _MOST_ERRANDS:
            return False
        self.errands.append(errand)
        return True


class LineEars:
    """What is heard on one line."""

    def __init__(self, line: Line, listener: Listener) -> None:
        self._line = line
        self._listener = listener

    def patched(self) -> None:
        """Have the twin read again."""
        self._line.stale = True
        self._line.wake()

    def called(self, call: MethodCall) -> None:
        """Hand on who has to answer, and over which line."""
        self._listener.called(replace(call, line=self._line.number))

    def received(self, message: InputMessage) -> None:
        """Hand on."""
        self._listener.received(message)


class Lines:
    """Makes connections, one after the other, and ends them; for the thread `hub:client` alone.

    Raises:
        LinkError, OverdueError, StuckError: from all but `end`.
    """

    def __init__(
        self,
        identity: Identity,
        connector: OpenLink,
        calls: Losable,
        deadlines: Deadlines,
        *,
        wake: Callable[[], None],
        listener: Listener | None,
    ) -> None:
        self._identity = identity
        self._connector = connector
        self._calls = calls
        self._deadlines = deadlines
        self._wake = wake
        self._listener = listener
        self.built = 0

    def build(self) -> Line:
        """Make a connection; it is not opened yet."""
        self.built += 1
        # The SDK may lose a link before this line is there.
        early: list[str] = []
        made: list[Line] = []

        def lost(reason: str) -> None:
            early.append(reason)
            for line in made:
                line.lose(reason)

        link = self._calls.call(
            "the workload API",
            lambda: self._connector(self._identity, lost),
            self._deadlines.build_s,
            late=lambda unwanted: unwanted.close(),
        )
        line = Line(self.built, link, self._wake)
        made.append(line)
        if early:
            line.lose(early[0])
        return line

    def open(self, line: Line) -> None:
        """Connect; what comes is heard from then on."""
        ears = None if self._listener is None else LineEars(line, self._listener)
        self._calls.call("connect", lambda: line.link.connect(ears), self._deadlines.connect_s)

    def ask(self, line: Line) -> Mapping[str, Any] | None:
        """The twin; before the first time, subscribe to what the listener wants to hear."""
        if self._listener is not None and not line.listening:
            self._calls.call("subscribing", line.link.listen, self._deadlines.answer_s)
            line.listening = True
        line.stale = False
        return self._calls.call("the twin", line.link.twin, self._deadlines.answer_s)

    def do(self, line: Line, errand: Errand) -> None:
        """Do an errand and tell what became of it."""
        outcome: Outcome = "lost"
        try:
            taken = self._calls.call(errand.what, lambda: errand.do(line.link), self._deadlines.answer_s)
            outcome = "taken" if taken else "refused"
        except (LinkError, OverdueError, StuckError):
            raise
        except Exception:  # it is this errand that cannot be done; the connection is well
            log.exception("%s failed", errand.what)
            outcome = "refused"
        finally:
            errand.done(outcome)

    def end(self, line: Line, cap_ns: int | None) -> None:
        """End a connection for good: one that lingers would fight its successor for the client id."""
        if cap_ns is not None:
            self._calls.cap(cap_ns)
        try:
            self._calls.call("disconnect", line.link.close, self._deadlines.farewell_s)
        except (LinkError, OverdueError, StuckError) as error:
            log.debug("a connection did not end well: %s", error)


_MOST_ACCIDENTS = 10
"""Unexpected errors in a row, with growing waits between them: about two minutes."""

Step = Message | Errand | Literal["renew", "probe", "close"]


class HubClient:
    """Sends messages in order, each until it is acknowledged (so twice at times) or a full backlog drops it.

    `send`, `errand` and `status` never block and may be called from any thread. Called from the thread
    `hub:client`, outside of locks: `on_change` when `state` changes, and `on_stuck` when nothing helps but
    another process. Without a `listener` nothing is subscribed to, and the twin only proves the connection.
    """

    def __init__(
        self,
        identity: Identity,
        crew: Crew,
        *,
        deadlines: Deadlines | None = None,
        backlog: Waiting | None = None,
        connector: OpenLink = open_link,
        listener: Listener | None = None,
        on_change: Callable[[HubStatus], None] = lambda _status: None,
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._crew = crew
        self._deadlines = deadlines or Deadlines()
        self._listener = listener
        self._on_change = on_change
        self._on_stuck = on_stuck
        # These belong to the thread `hub:client`.
        self._ladder = Ladder()
        self._stuck_ns: int | None = None
        self._probe_s = self._deadlines.probe_s
        self._silent = False
        self._suspect: tuple[str, int] = ("", 0)
        self._accidents = 0
        self._calls = Losable(crew, "hub:call", limit=self._deadlines.lost_threads)
        self._lines = Lines(
            identity, connector, self._calls, self._deadlines, wake=self._poke, listener=listener
        )
        # Guards all below; held for assignments only.
        self._wake = threading.Condition()
        self._backlog: Waiting = Backlog() if backlog is None else backlog
        self._backlog.attach(self._poke)
        self._line: Line | None = None
        self._state: State = "starting"
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
            return f"<HubClient {self._state} sent={self._sent} {self._backlog!r}>"

    def start(self) -> None:
        """Begin to connect and to send; once."""
        self._started = True
        self._crew.start("hub:client", self._run, vital=True, may_return=True)

    def send(self, message: Message) -> None:
        """Queue a message; when the backlog is full the oldest detections go first, counted."""
        with self._wake:
            self._backlog.put(message)
            if self._state == "closed":
                self._backlog.abandon()
            self._wake.notify_all()

    def errand(self, errand: Errand) -> None:
        """Have something done over the line that it names, before the messages; lost without that line."""
        with self._wake:
            closing = self._flush_until_ns is not None
            taken = self._line is not None and not closing and self._line.take(errand)
            self._wake.notify_all()
        if not taken:
            errand.done("lost")

    @property
    def connected(self) -> bool:
        """Whether the hub takes messages right now."""
        with self._wake:
            return self._state == "connected"

    def status(self) -> HubStatus:
        """What the client does right now."""
        abandoned, out = self._calls.abandoned, self._calls.out()
        with self._wake:
            return HubStatus(
                state=self._state,
                connected=self._state == "connected",
                sent=self._sent,
                queued=len(self._backlog),
                queued_bytes=self._backlog.bytes,
                dropped=self._backlog.dropped,
                last_error=self._last_error,
                rebuilds=max(0, self._lines.built - 1),
                abandoned=abandoned,
                out=out,
                rungs=self._ladder.counts,
            )

    def close(self, deadline_s: float) -> bool:
        """Send what can be sent, take leave of the hub, and come back within the deadline. Blocks.

        True when no thread was left behind. False: the SDK holds threads that never end, and the interpreter
        would wait for them at its exit; leave with `os._exit`.
        """
        now_ns = time.monotonic_ns()
        with self._wake:
            share = 0.7 if len(self._backlog) else 0.0
            self._flush_until_ns = now_ns + round(deadline_s * share * 1e9)
            # The last tenth is for this thread and the coordinator to come to their ends.
            self._close_until_ns = now_ns + round(deadline_s * 0.9 * 1e9)
            # With nothing to send, a call that is under way (the twin, say) may still come home.
            self._calls.cap(now_ns + round(deadline_s * max(share, 0.3) * 1e9))
            self._wake.notify_all()
        ended = self._finished.wait(deadline_s) if self._started else True
        with self._wake:
            left = self._backlog.abandon()
        if left:
            log.warning("closed with %d messages that the hub never took; they are lost", left)
        self._turn("closed")
        return ended and self._calls.out() == 0

    # --- on the thread hub:client -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._flushed(time.monotonic_ns()):
                try:
                    self._session()
                except (LinkError, OverdueError, StuckError) as error:
                    self._failed(error)
                except Exception as error:  # noqa: BLE001 - counted, and raised when it does not end
                    self._unexpected(error)
                self._pause()
        finally:
            self._calls.close()
            self._turn("closed")
            self._finished.set()

    def _unexpected(self, error: Exception) -> None:
        """An error that no part of the SDK is known to raise: a new connection may do without it.

        Raises:
            Exception: it came so often, with no message sent between, that only a new process may help.
        """
        self._accidents += 1
        if self._accidents >= _MOST_ACCIDENTS:
            raise error
        log.error("the hub client failed; connecting again", exc_info=error)
        self._failed(LinkError(f"{type(error).__name__}: {error}"))

    def _poke(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _session(self) -> None:
        """Connect and send until the connection is lost, or replaced before its token ends, or we close."""
        self._turn("connecting")
        line: Line | None = self._lines.build()
        while line is not None:
            successor: Line | None = None
            try:
                self._use(line)
                self._lines.open(line)
                self._turn("connected")
                successor = self._serve(line)
            finally:
                self._use(None)
                self._lines.end(line, self._cap_ns())
            line = successor

    def _use(self, line: Line | None) -> None:
        """Take errands for a line from now on, or for none; those that the one before still had are lost."""
        with self._wake:
            before, self._line = self._line, line
        for errand in before.errands if before is not None else ():
            errand.done("lost")

    def _serve(self, line: Line) -> Line | None:
        """Send until the end; the successor if it is time to renew, None if we close."""
        log.info("connected to %s as %s/%s", self._where(), self._identity.device, self._identity.module)
        self._connected_ns = time.monotonic_ns()
        self._stuck_ns = None
        line.renew_ns = self._connected_ns + _ns(self._deadlines.renew_s)
        if self._suspect[1] >= self._deadlines.poison_tries:
            line.patient_ns = self._connected_ns + _ns(self._deadlines.poison_pause_s)
        # A twin that was silent before is asked later: messages come first.
        line.probe_ns = self._connected_ns + _ns(self._probe_s if self._silent else 0)
        while (step := self._next(line)) != "close":
            if isinstance(step, Message):
                self._send(line, step)
            elif isinstance(step, Errand):
                self._lines.do(line, step)
            elif step == "probe":
                self._probe(line)
            elif (successor := self._renewed(line)) is not None:
                return successor
        return None

    def _renewed(self, line: Line) -> Line | None:
        try:
            return self._lines.build()
        except (LinkError, OverdueError, StuckError) as error:
            # The old token is still good for a while: the connection is kept, and we ask again soon.
            log.warning("the token for %s could not be renewed yet: %s", self._where(), redact(str(error)))
            line.renew_ns = time.monotonic_ns() + _ns(self._deadlines.longest_wait_s)
            return None

    def _next(self, line: Line) -> Step:
        """What to do next; waits until there is something."""
        with self._wake:
            while True:
                now_ns = time.monotonic_ns()
                message = self._backlog.first()
                if line.lost is not None:
                    raise self._lost(line, now_ns)
                if self._flushed(now_ns):
                    return "close"
                if now_ns >= line.renew_ns:
                    return "renew"
                # Closing leaves no time for questions and errands.
                if self._flush_until_ns is None:
                    if now_ns >= line.probe_ns or line.stale:
                        return "probe"
                    if line.errands:
                        return line.errands.popleft()
                patient_ns = line.patient_ns or 0
                if message is not None and now_ns >= patient_ns:
                    return message
                moments_ns = (line.renew_ns, self._flush_until_ns or line.probe_ns, patient_ns)
                self._wake.wait((min(at for at in moments_ns if at > now_ns) - now_ns) / 1e9)

    def _lost(self, line: Line, now_ns: int) -> LinkError:
        """The error of a connection that ended by itself; one that could not last clears the suspect."""
        if line.patient_ns is not None and now_ns < line.patient_ns:
            self._suspect = ("", 0)
        return LinkError(str(line.lost))

    def _flushed(self, now_ns: int) -> bool:
        """Whether we close and all is sent, or its time is over."""
        with self._wake:
            if self._flush_until_ns is None:
                return False
            return len(self._backlog) == 0 or now_ns >= self._flush_until_ns

    def _probe(self, line: Line) -> None:
        """Ask for the twin: an answer proves connection, session and subscriptions, which no PUBACK does."""
        try:
            twin = self._lines.ask(line)
        except OverdueError:
            if self._closing():
                return  # it was us who had no time
            # Should it be the hub that knows no twin, the messages must not suffer from us asking.
            self._probe_s = min(self._probe_s * 2, 16 * self._deadlines.probe_s)
            self._silent = True
            self._ladder.climb("silent")
            raise
        except LinkError:
            self._silent = True
            raise
        self._silent, self._probe_s = False, self._deadlines.probe_s
        # One that was refused is soon asked for again: it may be what a patch told of.
        wait_s = self._probe_s if twin is not None else min(self._probe_s, self._deadlines.longest_wait_s)
        line.probe_ns = time.monotonic_ns() + _ns(wait_s)
        if self._listener is not None:
            self._listener.twin(twin, line.number)

    def _send(self, line: Line, message: Message) -> None:
        try:
            self._calls.call("send", partial(line.link.send, message), self._deadlines.send_s)
        except MessageRefusedError as error:
            self._give_up(message, redact(str(error)))
        except LinkError as error:
            tries = self._suspect[1] + 1 if self._suspect[0] == message.message_id else 1
            self._suspect = (message.message_id, tries)
            if line.patient_ns is None:
                raise
            self._ladder.climb("poison")
            self._give_up(message, f"it cost {tries} connections: {redact(str(error))}")
            raise
        except (OverdueError, StuckError):
            raise
        except Exception as error:  # one message that cannot be sent must not hold up all others
            log.exception("sending message %s failed", message.message_id)
            self._give_up(message, f"{type(error).__name__}: {redact(str(error))}")
        else:
            self._suspect, self._accidents = ("", 0), 0
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
            self._backlog.settle(message, dropped=dropped)
            self._sent += dropped is None
            self._failures = 0

    def _cap_ns(self) -> int | None:
        """Until when taking leave may last, once we close."""
        with self._wake:
            return self._close_until_ns if self._flush_until_ns is not None else None

    def _failed(self, error: Exception) -> None:
        self._note(error)
        with self._wake:
            if self._flush_until_ns is not None:
                # Once closing, one failed attempt is the last.
                self._flush_until_ns = 0
        self._climb(error)
        self._turn("stuck" if isinstance(error, StuckError) else "waiting")

    def _climb(self, error: Exception) -> None:
        """The rung that an error means."""
        rung: Rung = "rebuild"
        if isinstance(error, StuckError):
            rung = "stuck"
        elif isinstance(error, OverdueError):
            rung = "overdue"
        self._ladder.climb(rung)
        now_ns = time.monotonic_ns()
        if rung == "stuck":
            self._stuck_ns = self._stuck_ns or now_ns
            if now_ns - self._stuck_ns >= _ns(self._deadlines.stuck_s):
                self._on_stuck()

    def _note(self, error: Exception) -> None:
        """Remember and log an error; the same one again and again is logged once."""
        text = redact(str(error))
        began_ns, self._connected_ns = self._connected_ns, None
        with self._wake:
            if began_ns is not None and time.monotonic_ns() - began_ns > self._deadlines.longest_wait_s * 1e9:
                self._failures = 0
            known = self._failures > 0 and text == self._last_error
            self._failures += 1
            self._last_error = text
            queued, closing = len(self._backlog), self._flush_until_ns is not None
        level = logging.DEBUG if known or closing else logging.WARNING
        log.log(level, "no connection to %s: %s; %d messages wait", self._where(), text, queued)

    def _pause(self) -> None:
        """Wait before the next attempt, longer each time, not in step with others; closing ends it."""
        with self._wake:
            longest_s = min(
                self._deadlines.longest_wait_s,
                self._deadlines.first_wait_s * 2.0 ** min(self._failures - 1, 16),
            )
            wait_s = longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
            self._wake.wait_for(lambda: self._flush_until_ns is not None, wait_s)

    def _turn(self, state: State) -> None:
        with self._wake:
            changed = self._state not in (state, "closed")
            if changed:
                self._state = state
        if changed:
            self._on_change(self.status())

    def _where(self) -> str:
        return f"IoT Hub through {self._identity.gateway}"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
