"""One connection and what is known of it; how it is made, listened to and ended, each within its deadline."""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from visionedge.iothub.deadlines import Losable, OverdueError, StuckError
from visionedge.iothub.identity import Identity
from visionedge.iothub.ladder import Deadlines
from visionedge.iothub.sdk import InputMessage, Link, LinkError, MethodCall, OpenLink

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
