"""Who gets how much of what the device carries: by priority, and evenly among equals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wish:
    """What a camera asks for, in frames per second, and how long it is to be kept: higher is longer."""

    asked_per_s: float
    priority: int = 0


def caps(wishes: Mapping[str, Wish], budget_per_s: float, least_per_s: float) -> dict[str, float]:
    """The frames per second that each camera may have at most; one that is not lowered is not in it.

    Every camera keeps `least_per_s` (or what it asks for, where that is less), even if that is more than the
    budget. What is left goes to the highest priority first; within one, those that ask for most are lowered
    first, to the same rate.
    """
    left_per_s = budget_per_s - sum(min(wish.asked_per_s, least_per_s) for wish in wishes.values())
    lowered: dict[str, float] = {}
    for priority in sorted({wish.priority for wish in wishes.values()}, reverse=True):
        asked = {name: wish.asked_per_s for name, wish in wishes.items() if wish.priority == priority}
        extra = [max(0.0, rate - least_per_s) for rate in asked.values()]
        if sum(extra) > left_per_s:
            cap = _rounded(least_per_s + _level(extra, max(0.0, left_per_s)))
            lowered |= dict.fromkeys(asked, max(cap, least_per_s))
        left_per_s = max(0.0, left_per_s - sum(extra))
    return lowered


def least(wishes: Mapping[str, Wish], least_per_s: float) -> float:
    """The frames per second of all cameras together when none can be lowered any further."""
    return sum(min(wish.asked_per_s, least_per_s) for wish in wishes.values())


def _level(amounts: list[float], total: float) -> float:
    """The level at which a total is used up when everyone takes the smaller of it and its own amount."""
    left = total
    for place, amount in enumerate(sorted(amounts)):
        sharers = len(amounts) - place
        if amount * sharers >= left:
            return left / sharers
        left -= amount
    return max(amounts, default=0.0)


def _rounded(rate: float) -> float:
    """Two digits, never more than it was: for people, and so that noise changes nothing."""
    if rate <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return float(f"{math.floor(rate / step + 1e-9) * step:.6g}")
