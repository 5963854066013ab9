"""The overload ladder: what is given up while the device cannot carry what is asked, and how it comes back.

    variant ──▶ gate ──▶ fps ──▶ lower fps …    overloaded for `after_s`: the next rung is taken
       ◀──────────◀────────◀────────◀           fine for the rung's patience: the last one is returned

Whoever keeps the promise (`keeper`) tells the ladder what is seen, and does the steps that it gets back. It
is pure: the time is given. Any two steps lie `after_s` apart, but when the ladder has no say any more: then
everything is returned at once.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from visionedge.app.load_meter import Reading, nearly
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.timing import Throttle
from visionedge.config.schema import CameraConfig
from visionedge.engine.device.devices import Effective
from visionedge.frames.types import utc_text

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


# Who gets how much of what the device carries: by priority, and evenly among equals.


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


# From a reading of the load to what the overload ladder looks at. Pure.


_TOO_MANY = 0.1
_FEW = 0.05
_SOME_PER_S = 0.5
_HARDLY_ANY_PER_S = 0.25
_SPARE = 0.85


def load_of(seen: Reading) -> Load:
    """Whether the device carries what is let in.

    One camera that its own thread cannot decode is no overload: others would be slowed for nothing.
    """
    behind = seen.full and not nearly(seen.offered, seen.let_in)
    if behind or seen.lost > max(_TOO_MANY * seen.offered, _SOME_PER_S):
        return "over"
    return "fine" if seen.lost <= max(_FEW * seen.offered, _HARDLY_ANY_PER_S) else "between"


def has_room(seen: Reading) -> bool:
    """Whether more could be computed; of a GPU that is not known, so it has to be tried."""
    return seen.gpu or seen.used_cores < _SPARE * seen.limit


def rates_in_words(seen: Reading) -> str:
    """``7.4 of 40.0 frames/s``."""
    return f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"


def device_in_words(effective: Effective) -> str:
    """The device that computes, for people."""
    return "the CPU" if effective == "cpu" else "the GPU"


# What cameras ask for, and how far each is throttled for what is given up.


_NEWEST = 0.5  # part of a rate that the newest reading makes up
_ALIKE_FPS = 0.08
_GATE = GateSettings()


class Asked:
    """The frames per second that cameras are asked for, without the noise of single readings."""

    def __init__(self) -> None:
        self.per_s: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Asked {sum(self.per_s.values()):.1f} frames/s of {len(self.per_s)} cameras>"

    def note(self, seen: Reading) -> None:
        """A newer reading is there."""
        before = self.per_s
        self.per_s = {
            name: _NEWEST * camera.demanded + (1 - _NEWEST) * before.get(name, camera.demanded)
            for name, camera in seen.cameras.items()
        }

    def wishes(self, cameras: Mapping[str, CameraConfig]) -> dict[str, Wish]:
        """By name, what these cameras ask for; one that has not been seen yet asks for nothing."""
        return {
            name: Wish(self.per_s.get(name, 0.0), settings.priority) for name, settings in cameras.items()
        }


def gated(cameras: Mapping[str, CameraConfig]) -> list[str]:
    """The cameras that a motion gate can be put on: one that is switched off was meant to be off."""
    return sorted(name for name, settings in cameras.items() if settings.gate is None)


def limits(
    held: Mapping[Rung, Held], wishes: Mapping[str, Wish], least_per_s: float, before: Mapping[str, float]
) -> Mapping[str, float]:
    """The frames per second of the cameras that are slowed.

    Those `before` stay as they are where what is asked for now would make hardly any difference.
    """
    budget = held["fps"].budget_per_s if "fps" in held else None
    if budget is None:
        return {}
    now = caps(wishes, budget, least_per_s)
    if now.keys() == before.keys() and all(abs(now[n] - before[n]) <= _ALIKE_FPS * before[n] for n in now):
        return before
    return now


def throttles(
    held: Mapping[Rung, Held], cameras: Mapping[str, CameraConfig], slowed: Mapping[str, float]
) -> dict[str, Throttle]:
    """By name, what each camera is held to; one that is not throttled is not in it."""
    gates = frozenset(gated(cameras) if "gate" in held else [])
    return {
        name: Throttle(slowed.get(name), _GATE if name in gates else None)
        for name in cameras
        if name in slowed or name in gates
    }


# What is given up at this moment, as status, metrics and events tell it, and the sentences for people.


Direction = Literal["taken", "returned"]

_NAMED_MOST = 3


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A rung that is taken: since when, and what that means just now in a few words."""

    rung: Rung
    since_utc: datetime
    words: str


@dataclass(frozen=True, slots=True)
class Promise:
    """How the promise stands. `has_say`: the ladder may act; `throttles` are those of cameras, by name.

    `steps` counts what was done since the start.
    """

    has_say: bool = False
    at_the_end: bool = False
    given_up: tuple[GivenUp, ...] = ()
    throttles: Mapping[str, Throttle] = field(default_factory=dict)
    steps: Mapping[tuple[Rung, Direction], int] = field(
        default_factory=lambda: {(rung, way): 0 for rung in RUNGS for way in ("taken", "returned")}
    )

    def document(self) -> dict[str, Any]:
        """The object `overload` of the status' `capacity`."""
        return {
            "active": self.has_say,
            "exhausted": self.at_the_end,
            "since": utc_text(min(each.since_utc for each in self.given_up)) if self.given_up else None,
            "rungs": [
                {"rung": each.rung, "since": utc_text(each.since_utc), "what": each.words}
                for each in self.given_up
            ],
        }


def sentence(seen: Reading, promise: Promise, device: str) -> str:
    """How the promise is kept while something is given up, in one sentence."""
    rates = rates_in_words(seen)
    given_up = joined([each.words for each in promise.given_up]) or "nothing that may be given up"
    if load_of(seen) != "over":
        return f"{rates}: {device} carries them with {given_up}"
    return f"{rates}: too much for {device}{' even' if promise.at_the_end else ''} with {given_up}"


def slowed_in_words(limits: Mapping[str, float], asked: Mapping[str, float]) -> str:
    """The cameras that a limit slows, and to what."""
    rates = {name: limit for name, limit in limits.items() if limit < asked.get(name, 0.0)}
    if not rates:
        return "no camera slowed just now"
    low, high = min(rates.values()), max(rates.values())
    return f"{cameras_in_words(rates)} at {f'{low:g} to {high:g}' if low < high else f'{low:g}'} fps"


def cameras_in_words(names: Collection[str]) -> str:
    """Cameras by their names, or how many."""
    return joined(sorted(names)) if len(names) <= _NAMED_MOST else f"{len(names)} cameras"


def joined(parts: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
