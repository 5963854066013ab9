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
from typing import Literal

from visionedge.app.load_meter import LoadMeasurement, is_nearly
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.timing import Throttle
from visionedge.config.schema import CameraConfig
from visionedge.engine.device.devices import EffectiveDevice

DegradationLevel = Literal["variant", "gate", "fps"]
"""The faster variant of the model; a motion gate on cameras that have none; fewer frames per second."""

DEGRADATION_LEVELS: tuple[DegradationLevel, ...] = ("variant", "gate", "fps")

LoadState = Literal["over", "between", "fine"]
"""The device does not carry what is let in; it does; or it cannot be said."""

_DELIVERED_FACTOR = 0.9  # of what the device was seen to carry: it has to have some air
_MAX_BUDGET_FACTOR = 0.9  # of the budget before
_MIN_BUDGET_FACTOR = 0.25  # a short stall is no measure of a device
_RAISE_FACTOR = 2.0
_MAX_DOUBLINGS = 5
_SOON_IN_DELAYS = 3.0  # patiences
_SIMILAR_BUDGET, _EQUAL_BUDGET = 0.75, 0.95  # budgets beside one that was too much


@dataclass(frozen=True, slots=True)
class DegradationSettings:
    """The rungs in the order in which they are taken; how long to be overloaded, and how long to be fine."""

    levels: tuple[DegradationLevel, ...] = DEGRADATION_LEVELS
    after_s: float = 15.0
    back_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """What is seen, in frames per second where it is a rate.

    `demanded` is what the configuration asks for, `least` what is left of it when every camera is as low as
    it may be. `room`: the processor has time to spare. `available_levels`: rungs that would change something.
    """

    load: LoadState
    demanded: float
    delivered: float
    min_total_per_s: float = 0.0
    headroom: bool = True
    available_levels: frozenset[DegradationLevel] = frozenset(DEGRADATION_LEVELS)


@dataclass(frozen=True, slots=True)
class TakeLevel:
    """Take a rung; fps: let in so many frames per second of all cameras together."""

    level: DegradationLevel
    budget_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReturnLevel:
    """Give a rung back; fps with a budget: let in so many from now on, which is more than before."""

    level: DegradationLevel
    budget_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Still overloaded, and nothing is left to be taken."""


DegradationStep = TakeLevel | ReturnLevel | Exhausted


@dataclass(frozen=True, slots=True)
class ActiveLevel:
    """A rung that is taken: since when, and the frames per second that fps lets in."""

    since_s: float
    budget_per_s: float | None = None


@dataclass(slots=True)
class _LevelHistory:
    """What is remembered of a rung: how often in a row it had to be taken again soon after its return.

    `raised_to` is what was let in since `returned_s` (infinity: all), `failed_at` what was too much.
    """

    doublings: int = 0
    returned_s: float | None = None
    raised_to: float = math.inf
    failed_at: float = math.inf


class DegradationPolicy:
    """Decides, by what it is shown; one thread. `held` are the rungs that are taken, in their order.

    `exhausted`: still overloaded, or not fine for long enough since, and nothing is left to be taken.
    """

    def __init__(self) -> None:
        self.active: dict[DegradationLevel, ActiveLevel] = {}
        self.exhausted = False
        self._history: dict[DegradationLevel, _LevelHistory] = {}
        self._over_since_s: float | None = None
        self._fine_since_s: float | None = None

    def __repr__(self) -> str:
        return f"<Ladder {' '.join(self.active) or 'nothing taken'}{' at the end' if self.exhausted else ''}>"

    def decide(
        self, settings: DegradationSettings, snapshot: LoadSnapshot | None, now_s: float
    ) -> tuple[DegradationStep, ...]:
        """What to do now. Nothing where nothing is known (None): what was seen before counts no more."""
        if stray := [level for level in self.active if level not in settings.levels]:
            return tuple(self._return_level(level, now_s) for level in stray)
        if snapshot is None:
            self._reset_timers()
            return ()
        self._track_load(snapshot, now_s)
        over_since_s, fine_since_s = self._over_since_s, self._fine_since_s
        if snapshot.load == "over" and over_since_s is not None and now_s - over_since_s >= settings.after_s:
            return self._degrade(settings, snapshot, now_s)
        if snapshot.load == "fine" and fine_since_s is not None:
            return self._recover(settings, snapshot, now_s, now_s - fine_since_s)
        return ()

    def return_all(self, now_s: float) -> tuple[DegradationStep, ...]:
        """The ladder has no say any more: everything is returned, last rung first, and the past forgotten."""
        steps = tuple(self._return_level(level, now_s) for level in reversed(tuple(self.active)))
        self._history.clear()
        self.exhausted = False
        return steps

    def drop_level(self, level: DegradationLevel) -> None:
        """A rung could not be taken after all, or is gone by itself."""
        self.active.pop(level, None)
        self._reset_timers()

    def return_delay_s(
        self, settings: DegradationSettings, level: DegradationLevel, budget_per_s: float = math.inf
    ) -> float:
        """How long all has to be fine before the rung is returned, or raised to a budget."""
        history = self._history_of(level)
        doublings = history.doublings if budget_per_s >= _SIMILAR_BUDGET * history.failed_at else 0
        return max(settings.after_s, settings.back_after_s) * 2.0**doublings

    # --- steps ----------------------------------------------------------------------------------------------

    def _track_load(self, snapshot: LoadSnapshot, now_s: float) -> None:
        if snapshot.load == "over":
            self._fine_since_s = None
            self._over_since_s = now_s if self._over_since_s is None else self._over_since_s
        elif snapshot.load == "fine":
            self._over_since_s = None
            self._fine_since_s = now_s if self._fine_since_s is None else self._fine_since_s

    def _degrade(
        self, settings: DegradationSettings, snapshot: LoadSnapshot, now_s: float
    ) -> tuple[DegradationStep, ...]:
        for level in settings.levels:
            active = self.active.get(level)
            budget = _lower_budget(active, snapshot) if level == "fps" else None
            more = budget is not None if level == "fps" else active is None
            if more and level in snapshot.available_levels:
                self._record_retake(settings, level, now_s)
                self._activate_level(
                    settings, level, ActiveLevel(now_s if active is None else active.since_s, budget)
                )
                return (TakeLevel(level, budget),)
        told, self.exhausted = self.exhausted, True
        return () if told else (Exhausted(),)

    def _activate_level(
        self, settings: DegradationSettings, level: DegradationLevel, how: ActiveLevel
    ) -> None:
        active = {**self.active, level: how}
        self.active = {each: active[each] for each in settings.levels if each in active}
        self.exhausted = False
        self._reset_timers()

    def _recover(
        self, settings: DegradationSettings, snapshot: LoadSnapshot, now_s: float, fine_for_s: float
    ) -> tuple[DegradationStep, ...]:
        if fine_for_s >= settings.back_after_s:
            self.exhausted = False
        if not self.active:
            return ()
        level, active = list(self.active.items())[-1]
        binds = active.budget_per_s is None or active.budget_per_s < snapshot.demanded
        to = math.inf if active.budget_per_s is None else _RAISE_FACTOR * active.budget_per_s
        to = math.inf if to >= snapshot.demanded else to
        if fine_for_s < self.return_delay_s(settings, level, to) or (binds and not snapshot.headroom):
            return ()
        history = self._history_of(level)
        if history.returned_s is not None and history.raised_to >= _EQUAL_BUDGET * history.failed_at:
            history.doublings, history.failed_at = 0, math.inf  # what was too much is carried now
        if to == math.inf:
            return (self._return_level(level, now_s),)
        self.active[level] = ActiveLevel(active.since_s, to)
        history.returned_s, history.raised_to = now_s, to
        self._reset_timers()
        return (ReturnLevel(level, to),)

    def _return_level(self, level: DegradationLevel, now_s: float) -> ReturnLevel:
        del self.active[level]
        history = self._history_of(level)
        history.returned_s, history.raised_to = now_s, math.inf
        self._reset_timers()
        return ReturnLevel(level)

    def _record_retake(self, settings: DegradationSettings, level: DegradationLevel, now_s: float) -> None:
        """A rung is taken: soon after its return that costs it patience, later it makes up for all."""
        history = self._history_of(level)
        if history.returned_s is None:
            return
        again = now_s - history.returned_s <= _SOON_IN_DELAYS * self.return_delay_s(settings, level)
        history.doublings = min(_MAX_DOUBLINGS, history.doublings + 1) if again else 0
        history.failed_at, history.returned_s = history.raised_to, None

    def _history_of(self, level: DegradationLevel) -> _LevelHistory:
        return self._history.setdefault(level, _LevelHistory())

    def _reset_timers(self) -> None:
        """What was seen until now was seen under other circumstances."""
        self._over_since_s = self._fine_since_s = None


def _lower_budget(active: ActiveLevel | None, snapshot: LoadSnapshot) -> float | None:
    """The next lower budget of frames per second; None where there is none."""
    now = snapshot.demanded if active is None or active.budget_per_s is None else active.budget_per_s
    now = min(now, snapshot.demanded)
    carried = max(_DELIVERED_FACTOR * snapshot.delivered, _MIN_BUDGET_FACTOR * now)
    budget = max(snapshot.min_total_per_s, min(carried, _MAX_BUDGET_FACTOR * now))
    return budget if budget < now * 0.999 else None


def max_return_delay_s(settings: DegradationSettings) -> float:
    """The longest patience there is."""
    return max(settings.after_s, settings.back_after_s) * 2.0**_MAX_DOUBLINGS


# Who gets how much of what the device carries: by priority, and evenly among equals.


@dataclass(frozen=True, slots=True)
class RateRequest:
    """What a camera asks for, in frames per second, and how long it is to be kept: higher is longer."""

    asked_per_s: float
    priority: int = 0


def allocate_rates(
    requests: Mapping[str, RateRequest], budget_per_s: float, least_per_s: float
) -> dict[str, float]:
    """The frames per second that each camera may have at most; one that is not lowered is not in it.

    Every camera keeps `least_per_s` (or what it asks for, where that is less), even if that is more than the
    budget. What is left goes to the highest priority first; within one, those that ask for most are lowered
    first, to the same rate.
    """
    left_per_s = budget_per_s - sum(min(request.asked_per_s, least_per_s) for request in requests.values())
    lowered: dict[str, float] = {}
    for priority in sorted({request.priority for request in requests.values()}, reverse=True):
        asked = {
            name: request.asked_per_s for name, request in requests.items() if request.priority == priority
        }
        extra = [max(0.0, rate - least_per_s) for rate in asked.values()]
        if sum(extra) > left_per_s:
            cap = _round_down(least_per_s + _compute_fair_cap(extra, max(0.0, left_per_s)))
            lowered |= dict.fromkeys(asked, max(cap, least_per_s))
        left_per_s = max(0.0, left_per_s - sum(extra))
    return lowered


def sum_of_minimums(requests: Mapping[str, RateRequest], least_per_s: float) -> float:
    """The frames per second of all cameras together when none can be lowered any further."""
    return sum(min(request.asked_per_s, least_per_s) for request in requests.values())


def _compute_fair_cap(amounts: list[float], total: float) -> float:
    """The level at which a total is used up when everyone takes the smaller of it and its own amount."""
    left = total
    for place, amount in enumerate(sorted(amounts)):
        sharers = len(amounts) - place
        if amount * sharers >= left:
            return left / sharers
        left -= amount
    return max(amounts, default=0.0)


def _round_down(rate: float) -> float:
    """Two digits, never more than it was: for people, and so that noise changes nothing."""
    if rate <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return float(f"{math.floor(rate / step + 1e-9) * step:.6g}")


# From a reading of the load to what the overload ladder looks at. Pure.


_OVERLOADED_LOST_SHARE = 0.1
_FINE_LOST_SHARE = 0.05
_OVERLOADED_LOST_PER_S = 0.5
_FINE_LOST_PER_S = 0.25
_HEADROOM_SHARE = 0.85


def classify_load(seen: LoadMeasurement) -> LoadState:
    """Whether the device carries what is let in.

    One camera that its own thread cannot decode is no overload: others would be slowed for nothing.
    """
    behind = seen.is_saturated and not is_nearly(seen.offered, seen.admitted)
    if behind or seen.lost > max(_OVERLOADED_LOST_SHARE * seen.offered, _OVERLOADED_LOST_PER_S):
        return "over"
    return "fine" if seen.lost <= max(_FINE_LOST_SHARE * seen.offered, _FINE_LOST_PER_S) else "between"


def has_headroom(seen: LoadMeasurement) -> bool:
    """Whether more could be computed; of a GPU that is not known, so it has to be tried."""
    return seen.gpu or seen.used_cores < _HEADROOM_SHARE * seen.limit


def describe_rates(seen: LoadMeasurement) -> str:
    """``7.4 of 40.0 frames/s``."""
    return f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"


def describe_device(effective: EffectiveDevice) -> str:
    """The device that computes, for people."""
    return "the CPU" if effective == "cpu" else "the GPU"


# What cameras ask for, and how far each is throttled for what is given up.


_NEWEST_WEIGHT = 0.5  # part of a rate that the newest reading makes up
_SIMILAR_FPS = 0.08
_GATE = GateSettings()


class CameraDemand:
    """The frames per second that cameras are asked for, without the noise of single readings."""

    def __init__(self) -> None:
        self.per_s: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Asked {sum(self.per_s.values()):.1f} frames/s of {len(self.per_s)} cameras>"

    def update(self, seen: LoadMeasurement) -> None:
        """A newer reading is there."""
        before = self.per_s
        self.per_s = {
            name: _NEWEST_WEIGHT * camera.demanded + (1 - _NEWEST_WEIGHT) * before.get(name, camera.demanded)
            for name, camera in seen.cameras.items()
        }

    def requests(self, cameras: Mapping[str, CameraConfig]) -> dict[str, RateRequest]:
        """By name, what these cameras ask for; one that has not been seen yet asks for nothing."""
        return {
            name: RateRequest(self.per_s.get(name, 0.0), settings.priority)
            for name, settings in cameras.items()
        }


def find_gateable_cameras(cameras: Mapping[str, CameraConfig]) -> list[str]:
    """The cameras that a motion gate can be put on: one that is switched off was meant to be off."""
    return sorted(name for name, settings in cameras.items() if settings.gate is None)


def compute_fps_limits(
    active: Mapping[DegradationLevel, ActiveLevel],
    requests: Mapping[str, RateRequest],
    least_per_s: float,
    before: Mapping[str, float],
) -> Mapping[str, float]:
    """The frames per second of the cameras that are slowed.

    Those `before` stay as they are where what is asked for now would make hardly any difference.
    """
    budget = active["fps"].budget_per_s if "fps" in active else None
    if budget is None:
        return {}
    now = allocate_rates(requests, budget, least_per_s)
    if now.keys() == before.keys() and all(abs(now[n] - before[n]) <= _SIMILAR_FPS * before[n] for n in now):
        return before
    return now


def build_throttles(
    active: Mapping[DegradationLevel, ActiveLevel],
    cameras: Mapping[str, CameraConfig],
    slowed: Mapping[str, float],
) -> dict[str, Throttle]:
    """By name, what each camera is held to; one that is not throttled is not in it."""
    gates = frozenset(find_gateable_cameras(cameras) if "gate" in active else [])
    return {
        name: Throttle(slowed.get(name), _GATE if name in gates else None)
        for name in cameras
        if name in slowed or name in gates
    }


# What is given up at this moment, as status, metrics and events tell it, and the sentences for people.


StepDirection = Literal["taken", "returned"]

_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class TakenLevel:
    """A rung that is taken: since when, and what that means just now in a few words."""

    level: DegradationLevel
    since_utc: datetime
    words: str


@dataclass(frozen=True, slots=True)
class OverloadStatus:
    """How the promise stands. `may_act`: the ladder may act; `throttles` are those of cameras, by name.

    `steps` counts what was done since the start.
    """

    may_act: bool = False
    exhausted: bool = False
    taken_levels: tuple[TakenLevel, ...] = ()
    throttles: Mapping[str, Throttle] = field(default_factory=dict)
    steps: Mapping[tuple[DegradationLevel, StepDirection], int] = field(
        default_factory=lambda: {
            (level, way): 0 for level in DEGRADATION_LEVELS for way in ("taken", "returned")
        }
    )


def describe_overload(seen: LoadMeasurement, promise: OverloadStatus, device: str) -> str:
    """How the promise is kept while something is given up, in one sentence."""
    rates = describe_rates(seen)
    taken_levels = (
        join_with_and([each.words for each in promise.taken_levels]) or "nothing that may be given up"
    )
    if classify_load(seen) != "over":
        return f"{rates}: {device} carries them with {taken_levels}"
    return f"{rates}: too much for {device}{' even' if promise.exhausted else ''} with {taken_levels}"


def describe_fps_limits(limits: Mapping[str, float], asked: Mapping[str, float]) -> str:
    """The cameras that a limit slows, and to what."""
    rates = {name: limit for name, limit in limits.items() if limit < asked.get(name, 0.0)}
    if not rates:
        return "no camera slowed just now"
    low, high = min(rates.values()), max(rates.values())
    return f"{describe_cameras(rates)} at {f'{low:g} to {high:g}' if low < high else f'{low:g}'} fps"


def describe_cameras(names: Collection[str]) -> str:
    """Cameras by their names, or how many."""
    return join_with_and(sorted(names)) if len(names) <= _MAX_NAMED else f"{len(names)} cameras"


def join_with_and(parts: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
