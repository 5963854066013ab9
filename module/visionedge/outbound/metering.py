"""What messages cost: IoT Hub meters blocks of 4 KB, and a unit of it takes so many of them a day."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

BLOCK_BYTES = 4_096
UNITS: Mapping[str, int] = MappingProxyType({"S1": 400_000, "S2": 6_000_000})
"""Metered messages (blocks) that one unit of a tier takes in a day."""

S1 = "S1"
MAX_PER_DAY = "maxPerDay"
DAY_S = 86_400
_SLICE_NS = 60_000_000_000
_SLICES = 60
_TRUSTED_S = 300.0
"""A projection from less time is not reported: starting alone makes many messages."""

_WELL_BELOW = 0.9


def blocks(size_bytes: int) -> int:
    """How many blocks a message of this size is metered as; the smallest counts as one."""
    return max(1, -(-size_bytes // BLOCK_BYTES))


@dataclass(frozen=True, slots=True)
class Bill:
    """Messages and blocks by output since the start, and what the last `span_s` would come to in a day.

    `per_day` has the projected blocks by output; `span_s` is an hour, or what there is of it.
    """

    messages: Mapping[str, int]
    blocks: Mapping[str, int]
    fill: float
    per_day: Mapping[str, float]
    span_s: float

    @property
    def blocks_per_day(self) -> float:
        """The projected blocks of all outputs."""
        return sum(self.per_day.values())

    @property
    def shares(self) -> Mapping[str, float]:
        """Which part of one unit's daily quota that is, by tier."""
        return {tier: self.blocks_per_day / quota for tier, quota in UNITS.items()}


class Meter:
    """Counts messages as IoT Hub meters them."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._messages: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        self._bytes = 0
        self._began_ns = clock()
        # (which minute, blocks by output in it) of the last hour.
        self._slices: deque[tuple[int, Counter[str]]] = deque(maxlen=_SLICES + 1)

    def __repr__(self) -> str:
        return f"<Meter messages={dict(self._messages)} blocks={dict(self._blocks)}>"

    def count(self, output: str, size_bytes: int) -> None:
        """A message was made."""
        metered = blocks(size_bytes)
        self._messages[output] += 1
        self._blocks[output] += metered
        self._bytes += size_bytes
        minute = self._clock() // _SLICE_NS
        if not self._slices or self._slices[-1][0] != minute:
            self._slices.append((minute, Counter()))
        self._slices[-1][1][output] += metered

    def project_anew(self) -> None:
        """Project the day from what is counted from now on; nothing was sent for a while, on purpose."""
        self._slices.clear()
        self._began_ns = self._clock()

    def bill(self) -> Bill:
        """The counts, and the day they would make."""
        total = self._blocks.total()
        span_s, recent = self._recent()
        return Bill(
            messages=MappingProxyType(dict(self._messages)),
            blocks=MappingProxyType(dict(self._blocks)),
            fill=self._bytes / (total * BLOCK_BYTES) if total else 0.0,
            per_day=MappingProxyType({output: n * DAY_S / span_s for output, n in recent.items()}),
            span_s=span_s,
        )

    def _recent(self) -> tuple[float, Counter[str]]:
        """The seconds that the projection is made from, and the blocks by output in them."""
        now_ns = self._clock()
        recent: Counter[str] = Counter()
        for minute, counted in self._slices:
            if minute > now_ns // _SLICE_NS - _SLICES:
                recent.update(counted)
        # The minute that is being counted is not over yet: time is from the first counted minute's begin.
        since_ns = max(self._began_ns, (now_ns // _SLICE_NS - _SLICES + 1) * _SLICE_NS)
        # A module that has just started says nothing wild: less than a minute counts as one.
        return max(60.0, (now_ns - since_ns) / 1e9), recent


class Forecast:
    """Whether the projected day passes a limit: `telemetry.maxPerDay`, or the quota of one S1 unit."""

    def __init__(self) -> None:
        self.exceeded: tuple[str, ...] = ()
        self._day: object = None

    def __repr__(self) -> str:
        return f"<Forecast exceeded={self.exceeded}>"

    def update(self, bill: Bill, limited: float, max_per_day: int, day: object) -> bool:
        """Judge a projection, of which `max_per_day` limits `limited` blocks; whether that is to be reported.

        It is when other limits are passed than before, and on each day on which one still is.
        """
        if bill.span_s < _TRUSTED_S:
            return False
        # No more than `maxPerDay` is sent, whatever is projected.
        billed = min(limited, max_per_day) + bill.blocks_per_day - limited
        values = {MAX_PER_DAY: (limited, max_per_day), S1: (billed, UNITS[S1])}
        exceeded = tuple(name for name, (value, limit) in values.items() if self._passes(name, value, limit))
        changed, self.exceeded = exceeded != self.exceeded, exceeded
        if not changed and (not exceeded or day == self._day):
            return False
        self._day = day
        return True

    def _passes(self, name: str, value: float, limit: int) -> bool:
        """A limit that was passed counts as passed until the projection is well below it."""
        return value > (limit * _WELL_BELOW if name in self.exceeded else limit)
