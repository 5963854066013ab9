"""How many cameras until it is too much? Decided purely: doubling, then halving the gap."""

from collections.abc import Callable


def most_that_hold(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` of which `holds` says yes, 0 if not even 1; asks about 2 log2 times.

    `holds` is taken to say yes to everything below a yes. Near the edge, where it would say now this and now
    that, the answer is one of the numbers there.
    """
    good, bad = 0, 1
    while bad <= limit and holds(bad):
        good, bad = bad, bad * 2
    if good and bad > limit:
        if good == limit or holds(limit):
            return limit
        bad = limit
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
