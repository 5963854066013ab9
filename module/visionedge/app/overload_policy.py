"""Decides how the load is reduced while the device is overloaded, and how that is taken back.

    variant ──▶ gate ──▶ fps ──▶ lower fps …    overloaded for `afterSeconds`: the next level is taken
       ◀──────────◀────────◀────────◀           fine for the level's return delay: the last one is returned

Everything here is pure; the time is an argument. `OverloadController` gives `DegradationPolicy` the measured
load and does the steps that it returns. Any two steps are at least `afterSeconds` apart, except when no level
may be taken any more: then all are returned at once.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from visionedge.app.load_meter import LoadMeasurement, is_nearly
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.timing import Throttle
from visionedge.config.schema import CameraConfig, OverloadConfig
from visionedge.engine.device.devices import EffectiveDevice
from visionedge.runtime.retry import RetryPolicy

DegradationLevel = Literal["variant", "gate", "fps"]
"""A faster variant of the model; a motion gate on cameras without one; fewer frames per second."""

DEGRADATION_LEVELS: tuple[DegradationLevel, ...] = ("variant", "gate", "fps")

LoadState = Literal["over", "between", "fine"]
"""over: frames are lost because the device is too slow; fine: they are not; between: neither is clear."""

_DELIVERED_FACTOR = 0.9  # of the delivered rate, so that the device has a reserve
_MAX_BUDGET_FACTOR = 0.9  # of the previous budget
_MIN_BUDGET_FACTOR = 0.25  # of the previous budget, as a short stall does not show the speed of a device
_RAISE_FACTOR = 2.0
_MAX_RETURN_DELAYS = 32  # return delays, after a level was taken again soon five times in a row
_SOON_IN_DELAYS = 3.0  # return delays
_SIMILAR_BUDGET, _EQUAL_BUDGET = 0.75, 0.95  # of a budget that was too much


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """The measured load; rates are in frames per second.

    `demanded`: the configured rates; `min_total_per_s`: the sum with every camera at its minimum.
    `headroom`: the CPU is not saturated. `available_levels`: levels that would change something.
    """

    load: LoadState
    demanded: float
    delivered: float
    min_total_per_s: float = 0.0
    headroom: bool = True
    available_levels: frozenset[DegradationLevel] = frozenset(DEGRADATION_LEVELS)


@dataclass(frozen=True, slots=True)
class TakeLevel:
    """Take a level; with fps, `budget_per_s` is the rate of all cameras together."""

    level: DegradationLevel
    budget_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReturnLevel:
    """Return a level; fps with a budget is only raised to that rate."""

    level: DegradationLevel
    budget_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Still overloaded, and no level is left to take."""


DegradationStep = TakeLevel | ReturnLevel | Exhausted


@dataclass(frozen=True, slots=True)
class ActiveLevel:
    """A level that is taken: since when, and the budget of fps in frames per second."""

    since_s: float
    budget_per_s: float | None = None


@dataclass(slots=True)
class _LevelHistory:
    """The past of a level.

    `doublings`: how often in a row it was taken again soon after its return, each doubles the return delay.
    `raised_to`: the rate admitted since `returned_s` (infinity: all); `failed_at`: the rate that failed.
    """

    doublings: int = 0
    returned_s: float | None = None
    raised_to: float = math.inf
    failed_at: float = math.inf


class DegradationPolicy:
    """Decides which levels are taken and returned; for one thread. `active` holds the taken ones in order.

    `exhausted`: no level is left to take, and the load has not been fine for long enough since.
    """

    def __init__(self) -> None:
        self.active: dict[DegradationLevel, ActiveLevel] = {}
        self.exhausted = False
        self._history: dict[DegradationLevel, _LevelHistory] = {}
        self._over_since_s: float | None = None
        self._fine_since_s: float | None = None

    def __repr__(self) -> str:
        levels = " ".join(self.active) or "no level"
        return f"<DegradationPolicy {levels}{' exhausted' if self.exhausted else ''}>"

    def decide(
        self, settings: OverloadConfig, snapshot: LoadSnapshot | None, now_s: float
    ) -> tuple[DegradationStep, ...]:
        """The steps to do now. An unknown load (None) gives none, and restarts the times before a step."""
        if stray := [level for level in self.active if level not in settings.levels]:
            return tuple(self._return_level(level, now_s) for level in stray)
        if snapshot is None:
            self._reset_timers()
            return ()
        self._track_load(snapshot, now_s)
        over_since_s, fine_since_s = self._over_since_s, self._fine_since_s
        if (
            snapshot.load == "over"
            and over_since_s is not None
            and now_s - over_since_s >= settings.after_seconds
        ):
            return self._degrade(settings, snapshot, now_s)
        if snapshot.load == "fine" and fine_since_s is not None:
            return self._recover(settings, snapshot, now_s, now_s - fine_since_s)
        return ()

    def return_all(self, now_s: float) -> tuple[DegradationStep, ...]:
        """Return all levels, the last one first, and forget the past; for when no level may be taken."""
        steps = tuple(self._return_level(level, now_s) for level in reversed(tuple(self.active)))
        self._history.clear()
        self.exhausted = False
        return steps

    def drop_level(self, level: DegradationLevel) -> None:
        """Remove a level that could not be taken, or that ended by itself."""
        self.active.pop(level, None)
        self._reset_timers()

    def return_delay_s(
        self, settings: OverloadConfig, level: DegradationLevel, budget_per_s: float = math.inf
    ) -> float:
        """The seconds without overload before a level is returned, or raised to a budget."""
        history = self._history_of(level)
        doublings = history.doublings if budget_per_s >= _SIMILAR_BUDGET * history.failed_at else 0
        first_s = max(settings.after_seconds, settings.back_after_seconds)
        return RetryPolicy(first_s, _MAX_RETURN_DELAYS * first_s).wait_s(1 + doublings)

    # --- steps ----------------------------------------------------------------------------------------------

    def _track_load(self, snapshot: LoadSnapshot, now_s: float) -> None:
        if snapshot.load == "over":
            self._fine_since_s = None
            self._over_since_s = now_s if self._over_since_s is None else self._over_since_s
        elif snapshot.load == "fine":
            self._over_since_s = None
            self._fine_since_s = now_s if self._fine_since_s is None else self._fine_since_s

    def _degrade(
        self, settings: OverloadConfig, snapshot: LoadSnapshot, now_s: float
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
        reported, self.exhausted = self.exhausted, True
        return () if reported else (Exhausted(),)

    def _activate_level(self, settings: OverloadConfig, level: DegradationLevel, how: ActiveLevel) -> None:
        active = {**self.active, level: how}
        self.active = {each: active[each] for each in settings.levels if each in active}
        self.exhausted = False
        self._reset_timers()

    def _recover(
        self, settings: OverloadConfig, snapshot: LoadSnapshot, now_s: float, fine_for_s: float
    ) -> tuple[DegradationStep, ...]:
        if fine_for_s >= settings.back_after_seconds:
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
            history.doublings, history.failed_at = 0, math.inf  # the rate that was too much is fine now
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

    def _record_retake(self, settings: OverloadConfig, level: DegradationLevel, now_s: float) -> None:
        """Note that a level is taken again: soon after its return its delay doubles, later it is reset."""
        history = self._history_of(level)
        if history.returned_s is None:
            return
        again = now_s - history.returned_s <= _SOON_IN_DELAYS * self.return_delay_s(settings, level)
        history.doublings = history.doublings + 1 if again else 0
        history.failed_at, history.returned_s = history.raised_to, None

    def _history_of(self, level: DegradationLevel) -> _LevelHistory:
        return self._history.setdefault(level, _LevelHistory())

    def _reset_timers(self) -> None:
        """Restart the times before a step, as the load was measured under other conditions."""
        self._over_since_s = self._fine_since_s = None


def _lower_budget(active: ActiveLevel | None, snapshot: LoadSnapshot) -> float | None:
    """The next lower budget in frames per second; None if it cannot be lowered."""
    now = snapshot.demanded if active is None or active.budget_per_s is None else active.budget_per_s
    now = min(now, snapshot.demanded)
    carried = max(_DELIVERED_FACTOR * snapshot.delivered, _MIN_BUDGET_FACTOR * now)
    budget = max(snapshot.min_total_per_s, min(carried, _MAX_BUDGET_FACTOR * now))
    return budget if budget < now * 0.999 else None


# --- rates: how a budget is shared by priority, and evenly within one --------------------------------------


@dataclass(frozen=True, slots=True)
class RateRequest:
    """The configured frames per second of a camera, and its priority: lower ones are slowed first."""

    asked_per_s: float
    priority: int = 0


def allocate_rates(
    requests: Mapping[str, RateRequest], budget_per_s: float, least_per_s: float
) -> dict[str, float]:
    """The highest frames per second of each camera; cameras that are not slowed are left out.

    Every camera keeps `least_per_s` (or its request, if that is less), even if that exceeds the budget. The
    rest goes to the highest priority first; within one priority, the highest requests are lowered first, to
    the same rate (max-min fairness).
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
    """The frames per second of all cameras together, each at its minimum."""
    return sum(min(request.asked_per_s, least_per_s) for request in requests.values())


def _compute_fair_cap(amounts: list[float], total: float) -> float:
    """The cap at which the sum of ``min(cap, amount)`` equals the total."""
    left = total
    for place, amount in enumerate(sorted(amounts)):
        sharers = len(amounts) - place
        if amount * sharers >= left:
            return left / sharers
        left -= amount
    return max(amounts, default=0.0)


def _round_down(rate: float) -> float:
    """Rounded down to two digits, for readable limits that do not change with noise."""
    if rate <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return float(f"{math.floor(rate / step + 1e-9) * step:.6g}")


# --- load: from a measurement to a `LoadState` --------------------------------------------------------------

_OVERLOADED_LOST_SHARE = 0.1
_FINE_LOST_SHARE = 0.05
_OVERLOADED_LOST_PER_S = 0.5
_FINE_LOST_PER_S = 0.25
_HEADROOM_SHARE = 0.85


def classify_load(seen: LoadMeasurement) -> LoadState:
    """Whether the device is overloaded by the admitted frames.

    A single camera that its thread cannot decode in time is not an overload: slowing others would not help.
    """
    behind = seen.is_saturated and not is_nearly(seen.offered, seen.admitted)
    if behind or seen.lost > max(_OVERLOADED_LOST_SHARE * seen.offered, _OVERLOADED_LOST_PER_S):
        return "over"
    return "fine" if seen.lost <= max(_FINE_LOST_SHARE * seen.offered, _FINE_LOST_PER_S) else "between"


def has_headroom(seen: LoadMeasurement) -> bool:
    """Whether the CPU has a reserve. The load of a GPU is unknown, so a higher rate has to be tried."""
    return seen.gpu or seen.used_cores < _HEADROOM_SHARE * seen.available_cores


def describe_rates(seen: LoadMeasurement) -> str:
    """``7.4 of 40.0 frames/s``."""
    return f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"


def describe_device(effective: EffectiveDevice) -> str:
    """The device in use, for messages."""
    return {"cpu": "the CPU", "remote": "the remote device"}.get(effective, "the GPU")


# --- cameras: their demand, and the throttle of each -------------------------------------------------------

_NEWEST_WEIGHT = 0.5  # of the newest measurement in the smoothed rate
_SIMILAR_FPS = 0.08
_GATE = GateSettings()


class CameraDemand:
    """The demanded frames per second by camera, smoothed over measurements."""

    def __init__(self) -> None:
        self.per_s: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<CameraDemand {sum(self.per_s.values()):.1f} frames/s of {len(self.per_s)} cameras>"

    def update(self, seen: LoadMeasurement) -> None:
        """Take a newer measurement into account."""
        before = self.per_s
        self.per_s = {
            name: _NEWEST_WEIGHT * camera.demanded + (1 - _NEWEST_WEIGHT) * before.get(name, camera.demanded)
            for name, camera in seen.cameras.items()
        }

    def requests(self, cameras: Mapping[str, CameraConfig]) -> dict[str, RateRequest]:
        """The requests of cameras by name; 0 for a camera that was not measured yet."""
        return {
            name: RateRequest(self.per_s.get(name, 0.0), settings.priority)
            for name, settings in cameras.items()
        }


def find_gateable_cameras(cameras: Mapping[str, CameraConfig]) -> list[str]:
    """The cameras without a gate in their configuration; a configured one that is off stays off."""
    return sorted(name for name, settings in cameras.items() if settings.gate is None)


def compute_fps_limits(
    active: Mapping[DegradationLevel, ActiveLevel],
    requests: Mapping[str, RateRequest],
    least_per_s: float,
    before: Mapping[str, float],
) -> Mapping[str, float]:
    """The frames per second of the cameras that are slowed.

    The limits in `before` are kept if the new ones differ by 8 % at most.
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
    """The throttle of each camera by name; cameras that are not throttled are left out."""
    gates = frozenset(find_gateable_cameras(cameras) if "gate" in active else [])
    return {
        name: Throttle(slowed.get(name), _GATE if name in gates else None)
        for name in cameras
        if name in slowed or name in gates
    }


# --- status: the levels in force, and the sentences about them ---------------------------------------------

StepDirection = Literal["taken", "returned"]

_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class TakenLevel:
    """A level that is taken: since when, and what it means now, in a few words."""

    level: DegradationLevel
    since_utc: datetime
    text: str


@dataclass(frozen=True, slots=True)
class OverloadStatus:
    """How the load is reduced now. `may_act`: levels may be taken; `throttles`: those of cameras, by name.

    `steps` counts the steps since the start.
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


def describe_overload(seen: LoadMeasurement, status: OverloadStatus, device: str) -> str:
    """The load and the levels in force, in one sentence."""
    rates = describe_rates(seen)
    levels = join_with_and([each.text for each in status.taken_levels]) or "no level that reduces the load"
    if classify_load(seen) != "over":
        return f"{rates}: {device} keeps up, with {levels}"
    return f"{rates}: too much for {device}{' even' if status.exhausted else ''} with {levels}"


def describe_fps_limits(limits: Mapping[str, float], asked: Mapping[str, float]) -> str:
    """The cameras that are slowed, and their rates."""
    rates = {name: limit for name, limit in limits.items() if limit < asked.get(name, 0.0)}
    if not rates:
        return "no camera slowed now"
    low, high = min(rates.values()), max(rates.values())
    return f"{describe_cameras(rates)} at {f'{low:g} to {high:g}' if low < high else f'{low:g}'} fps"


def describe_cameras(names: Collection[str]) -> str:
    """Up to three camera names, else their number."""
    return join_with_and(sorted(names)) if len(names) <= _MAX_NAMED else f"{len(names)} cameras"


def join_with_and(parts: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
