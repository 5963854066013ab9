"""What messages cost: IoT Hub meters blocks of 4 KB, and a unit of it takes so many of them a day."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

BLOCK_BYTES = 4_096
UNITS: Mapping[str, int] = MappingProxyType({"S1": 400_000, "S2": 6_000_000})
"""Metered messages (blocks) that one unit of a tier takes in a day."""

_DAY_S = 86_400
_SLICE_NS = 60_000_000_000
_SLICES = 60


def blocks(size_bytes: int) -> int:
    """How many blocks a message of this size is metered as; the smallest counts as one."""
    return max(1, -(-size_bytes // BLOCK_BYTES))


@dataclass(frozen=True, slots=True)
class Bill:
    """Messages and blocks by output since the start, and what the last hour would come to in a day.

    `shares` says which part of one unit's daily quota that is, by tier.
    """

    messages: Mapping[str, int]
    blocks: Mapping[str, int]
    fill: float
    blocks_per_day: float
    shares: Mapping[str, float]


class Meter:
    """Counts messages as IoT Hub meters them."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._messages: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        self._bytes = 0
        self._began_ns = clock()
        # (which minute, blocks in it) of the last hour.
        self._slices: deque[tuple[int, int]] = deque(maxlen=_SLICES + 1)

    def __repr__(self) -> str:
        return f"<Meter messages={dict(self._messages)} blocks={dict(self._blocks)}>"

    def count(self, output: str, size_bytes: int) -> None:
        """A message was made."""
        metered = blocks(size_bytes)
        self._messages[output] += 1
        self._blocks[output] += metered
        self._bytes += size_bytes
        minute = self._clock() // _SLICE_NS
        if self._slices and self._slices[-1][0] == minute:
            metered += self._slices.pop()[1]
        self._slices.append((minute, metered))

    def bill(self) -> Bill:
        """The counts, and the day they would make."""
        per_day = self._blocks_per_day()
        total = self._blocks.total()
        return Bill(
            messages=MappingProxyType(dict(self._messages)),
            blocks=MappingProxyType(dict(self._blocks)),
            fill=self._bytes / (total * BLOCK_BYTES) if total else 0.0,
            blocks_per_day=per_day,
            shares=MappingProxyType({tier: per_day / quota for tier, quota in UNITS.items()}),
        )

    def _blocks_per_day(self) -> float:
        now_ns = self._clock()
        recent = [count for minute, count in self._slices if minute > now_ns // _SLICE_NS - _SLICES]
        # The minute that is being counted is not over yet: time is from the first counted minute's begin.
        since_ns = max(self._began_ns, (now_ns // _SLICE_NS - _SLICES + 1) * _SLICE_NS)
        # A module that has just started says nothing wild: less than a minute counts as one.
        span_s = max(60.0, (now_ns - since_ns) / 1e9)
        return sum(recent) * _DAY_S / span_s
