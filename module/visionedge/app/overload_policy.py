"""The overload ladder: what is given up while the device cannot carry what is asked, and how it comes back.

    variant ──▶ gate ──▶ fps ──▶ lower fps …    overloaded for `after_s`: the next rung is taken
       ◀──────────◀────────◀────────◀           fine for the rung's patience: the last one is returned

Whoever keeps the promise (`keeper`) tells the ladder what is seen, and does the steps that it gets back. It
is pure: the time is given. Any two steps lie `after_s` apart, but when the ladder has no say any more: then
everything is returned at once.
"""

import math
from dataclasses import dataclass
from typing import Literal

Rung = Literal["variant", "gate", "fps"]
"""The faster variant of the model; a motion gate on cameras that have none; fewer frames per second."""

RUNGS: tuple[Rung, ...] = ("variant", "gate", "fps")

Load = Literal["over", "between", "fine"]
"""The device does not carry what is let in; it does; or it cannot be said."""

_BELOW_DELIVERED = 0.9  # of what the device was seen to carry: it has to have some air
_AT_MOST = 0.9  # of the budget before
_AT_LEAST = 0.25  # a short stall is no measure of a device
_RAISED_BY = 2.0
_MOST_DOUBLINGS = 5
_SOON = 3.0  # patiences
_ALIKE, _EQUAL = 0.75, 0.95  # budgets beside one that was too much


@dataclass(frozen=True, slots=True)
class Policy:
    """The rungs in the order in which they are taken; how long to be overloaded, and how long to be fine."""

    rungs: tuple[Rung, ...] = RUNGS
    after_s: float = 15.0
    back_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen, in frames per second where it is a rate.

    `demanded` is what the configuration asks for, `least` what is left of it when every camera is as low as
    it may be. `room`: the processor has time to spare. `within_reach`: rungs that would change something.
    """

    load: Load
    demanded: float
    delivered: float
    least: float = 0.0
    room: bool = True
    within_reach: frozenset[Rung] = frozenset(RUNGS)


@dataclass(frozen=True, slots=True)
class Take:
    """Take a rung; fps: let in so many frames per second of all cameras together."""

    rung: Rung
    budget_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Return:
    """Give a rung back; fps with a budget: let in so many from now on, which is more than before."""

    rung: Rung
    budget_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class AtTheEnd:
    """Still overloaded, and nothing is left to be taken."""


Step = Take | Return | AtTheEnd


@dataclass(frozen=True, slots=True)
class Held:
    """A rung that is taken: since when, and the frames per second that fps lets in."""

    since_s: float
    budget_per_s: float | None = None


@dataclass(slots=True)
class _Past:
    """What is remembered of a rung: how often in a row it had to be taken again soon after its return.

    `raised_to` is what was let in since `returned_s` (infinity: all), `failed_at` what was too much.
    """

    doublings: int = 0
    returned_s: float | None = None
    raised_to: float = math.inf
    failed_at: float = math.inf


class Ladder:
    """Decides, by what it is shown; one thread. `held` are the rungs that are taken, in their order.

    `at_the_end`: still overloaded, or not fine for long enough since, and nothing is left to be taken.
    """

    def __init__(self) -> None:
        self.held: dict[Rung, Held] = {}
        self.at_the_end = False
        self._past: dict[Rung, _Past] = {}
        self._over_since_s: float | None = None
        self._fine_since_s: float | None = None

    def __repr__(self) -> str:
        return f"<Ladder {' '.join(self.held) or 'nothing taken'}{' at the end' if self.at_the_end else ''}>"

    def look(self, policy: Policy, sight: Sight | None, now_s: float) -> tuple[Step, ...]:
        """What to do now. Nothing where nothing is known (None): what was seen before counts no more."""
        if stray := [rung for rung in self.held if rung not in policy.rungs]:
            return tuple(self._give_back(rung, now_s) for rung in stray)
        if sight is None:
            self._forget()
            return ()
        self._note(sight, now_s)
        over_since_s, fine_since_s = self._over_since_s, self._fine_since_s
        if sight.load == "over" and over_since_s is not None and now_s - over_since_s >= policy.after_s:
            return self._down(policy, sight, now_s)
        if sight.load == "fine" and fine_since_s is not None:
            return self._up(policy, sight, now_s, now_s - fine_since_s)
        return ()

    def release(self, now_s: float) -> tuple[Step, ...]:
        """The ladder has no say any more: everything is returned, last rung first, and the past forgotten."""
        steps = tuple(self._give_back(rung, now_s) for rung in reversed(tuple(self.held)))
        self._past.clear()
        self.at_the_end = False
        return steps

    def lapse(self, rung: Rung) -> None:
        """A rung could not be taken after all, or is gone by itself."""
        self.held.pop(rung, None)
        self._forget()

    def patience_s(self, policy: Policy, rung: Rung, budget_per_s: float = math.inf) -> float:
        """How long all has to be fine before the rung is returned, or raised to a budget."""
        past = self._past_of(rung)
        doublings = past.doublings if budget_per_s >= _ALIKE * past.failed_at else 0
        return max(policy.after_s, policy.back_after_s) * 2.0**doublings

    # --- steps ----------------------------------------------------------------------------------------------

    def _note(self, sight: Sight, now_s: float) -> None:
        if sight.load == "over":
            self._fine_since_s = None
            self._over_since_s = now_s if self._over_since_s is None else self._over_since_s
        elif sight.load == "fine":
            self._over_since_s = None
            self._fine_since_s = now_s if self._fine_since_s is None else self._fine_since_s

    def _down(self, policy: Policy, sight: Sight, now_s: float) -> tuple[Step, ...]:
        for rung in policy.rungs:
            held = self.held.get(rung)
            budget = _lowered(held, sight) if rung == "fps" else None
            more = budget is not None if rung == "fps" else held is None
            if more and rung in sight.within_reach:
                self._remember(policy, rung, now_s)
                self._hold(policy, rung, Held(now_s if held is None else held.since_s, budget))
                return (Take(rung, budget),)
        told, self.at_the_end = self.at_the_end, True
        return () if told else (AtTheEnd(),)

    def _hold(self, policy: Policy, rung: Rung, how: Held) -> None:
        held = {**self.held, rung: how}
        self.held = {each: held[each] for each in policy.rungs if each in held}
        self.at_the_end = False
        self._forget()

    def _up(self, policy: Policy, sight: Sight, now_s: float, fine_for_s: float) -> tuple[Step, ...]:
        if fine_for_s >= policy.back_after_s:
            self.at_the_end = False
        if not self.held:
            return ()
        rung, held = list(self.held.items())[-1]
        binds = held.budget_per_s is None or held.budget_per_s < sight.demanded
        to = math.inf if held.budget_per_s is None else _RAISED_BY * held.budget_per_s
        to = math.inf if to >= sight.demanded else to
        if fine_for_s < self.patience_s(policy, rung, to) or (binds and not sight.room):
            return ()
        past = self._past_of(rung)
        if past.returned_s is not None and past.raised_to >= _EQUAL * past.failed_at:
            past.doublings, past.failed_at = 0, math.inf  # what was too much is carried now
        if to == math.inf:
            return (self._give_back(rung, now_s),)
        self.held[rung] = Held(held.since_s, to)
        past.returned_s, past.raised_to = now_s, to
        self._forget()
        return (Return(rung, to),)

    def _give_back(self, rung: Rung, now_s: float) -> Return:
        del self.held[rung]
        past = self._past_of(rung)
        past.returned_s, past.raised_to = now_s, math.inf
        self._forget()
        return Return(rung)

    def _remember(self, policy: Policy, rung: Rung, now_s: float) -> None:
        """A rung is taken: soon after its return that costs it patience, later it makes up for all."""
        past = self._past_of(rung)
        if past.returned_s is None:
            return
        again = now_s - past.returned_s <= _SOON * self.patience_s(policy, rung)
        past.doublings = min(_MOST_DOUBLINGS, past.doublings + 1) if again else 0
        past.failed_at, past.returned_s = past.raised_to, None

    def _past_of(self, rung: Rung) -> _Past:
        return self._past.setdefault(rung, _Past())

    def _forget(self) -> None:
        """What was seen until now was seen under other circumstances."""
        self._over_since_s = self._fine_since_s = None


def _lowered(held: Held | None, sight: Sight) -> float | None:
    """The next lower budget of frames per second; None where there is none."""
    now = sight.demanded if held is None or held.budget_per_s is None else held.budget_per_s
    now = min(now, sight.demanded)
    carried = max(_BELOW_DELIVERED * sight.delivered, _AT_LEAST * now)
    budget = max(sight.least, min(carried, _AT_MOST * now))
    return budget if budget < now * 0.999 else None


def patience_most_s(policy: Policy) -> float:
    """The longest patience there is."""
    return max(policy.after_s, policy.back_after_s) * 2.0**_MOST_DOUBLINGS
