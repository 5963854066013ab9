"""What the hub client does when the SDK or the hub fails, rung by rung, and how long each may take.

overdue   a call did not return within its deadline: its thread is left behind, another one goes on
silent    no answer to the twin's round trip, although messages may still be taken
rebuild   the connection is thrown away with its client, and a new client is made on a new thread
poison    one message has cost too many connections that were well otherwise: it is given up
stuck     so many threads are lost that another would be, too: after a while the module ends with
          `EXIT_STUCK`, for edgeAgent to start it again in a process that is not poisoned
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

EXIT_STUCK = 75
"""The exit code of the last rung: the SDK hangs for good in this process (EX_TEMPFAIL: try again)."""

Rung = Literal["overdue", "silent", "rebuild", "poison", "stuck"]
State = Literal["starting", "connecting", "connected", "waiting", "stuck", "closed"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the calls into the SDK may take, and what else of the client is a matter of time or count.

    One hang costs at most the longest of them and the farewell; the SDK's own limits, where it has any, are
    30 and 60 s. `renew_s` is well before the end of a token (an hour), `probe_s` lies between two round trips
    of the twin.
    """

    build_s: float = 20.0
    connect_s: float = 20.0
    send_s: float = 20.0
    probe_s: float = 60.0
    answer_s: float = 20.0
    farewell_s: float = 5.0
    renew_s: float = 2700.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 15.0
    stuck_s: float = 60.0
    lost_threads: int = 6
    poison_tries: int = 10
    poison_pause_s: float = 5.0


@dataclass(frozen=True, slots=True)
class HubStatus:
    """What the client does; `dropped` by reason, `last_error` without secrets, `rungs` as counted so far.

    `abandoned` counts the calls that were given up, `out` those threads of them that have not come back.
    """

    state: State
    connected: bool
    sent: int
    queued: int
    queued_bytes: int
    dropped: Mapping[str, int]
    last_error: str | None
    rebuilds: int
    abandoned: int
    out: int
    rungs: Mapping[str, int]


class Ladder:
    """Counts the rungs. What led to each is logged by the client, once as long as it stays the same."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Ladder {dict(self._counts)}>"

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each rung was climbed since the start."""
        return MappingProxyType(dict(self._counts))

    def climb(self, rung: Rung) -> None:
        """Count a rung."""
        self._counts[rung] += 1
