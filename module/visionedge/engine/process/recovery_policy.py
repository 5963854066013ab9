"""The recovery ladder: what is done when a device fails, and how it comes back.

    lost ──▶ the CPU serves at once ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┐
      └────▶ wait ──▶ probe ──▶ a candidate opens, warms up ──▶ compare ──▶ change over
              ▲         │                 │                        │
              └─────────┴─ ever longer ───┴────────────────────────┘

Whoever conducts the engine's processes (`conductor`) tells the ladder what happened, and does the steps it
gets back, in their order. It is pure: time and chance are given. Nothing is ever waited for without a time at
which it is tried again.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from visionedge.engine.device.devices import (
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    RequestedDevice,
    classify_device_loss,
    device_preference,
)
from visionedge.engine.device.faults import Fault
from visionedge.engine.interface import EngineEventCode, RecoveryStage, RecoveryState

FallbackPolicy = Literal["degrade", "hold", "exit"]
"""What happens without the device that was asked for: the CPU computes, nothing does, or the module ends."""


@dataclass(frozen=True, slots=True)
class RecoveryTiming:
    """How long the ladder waits, in seconds.

    The way back begins `first_wait_s` after a loss, and waits twice as long after each vain try, `max_wait_s`
    at most. Two change-overs lie `min_interval_s` apart. When a device is lost again before it was well for
    `healthy_s`, the first wait is twice that of its last loss. Waits vary by the share `jitter`, so that
    modules that share a GPU do not ask in step. A process on the CPU that died is started again at once, then
    after 1, 2, 4 … `max_restart_wait_s`, and at once again when it lived for `stable_s`.
    """

    first_wait_s: float = 5.0
    max_wait_s: float = 300.0
    min_interval_s: float = 30.0
    healthy_s: float = 600.0
    jitter: float = 0.2
    max_restart_wait_s: float = 30.0
    stable_s: float = 60.0


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Open an engine that serves as soon as it is ready; `device` None: as the configuration asks."""

    device: EffectiveDevice | None
    verdict: DeviceVerdict | None = None


@dataclass(frozen=True, slots=True)
class StopEngine:
    """End the engine that serves: it is of no use any more."""

    message: str


@dataclass(frozen=True, slots=True)
class ProbeDevice:
    """Find out in a process of its own whether a device is usable."""

    device: EffectiveDevice


@dataclass(frozen=True, slots=True)
class StartCandidate:
    """Open a candidate on this device and nothing else, beside the engine that serves, and warm it up."""

    device: EffectiveDevice


@dataclass(frozen=True, slots=True)
class CompareCandidate:
    """Hold the candidate against the CPU."""


@dataclass(frozen=True, slots=True)
class SwitchToCandidate:
    """The candidate serves from now on; what the other one computes is finished there."""


@dataclass(frozen=True, slots=True)
class StopCandidate:
    """End the candidate."""


@dataclass(frozen=True, slots=True)
class PublishEvent:
    """Something changed, and is told once; `ends`: the module ends because of it."""

    code: EngineEventCode
    message: str
    ends: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nothing can be done here: the engine ends for good."""

    verdict: DeviceVerdict | None = None


Step = (
    StartEngine
    | StopEngine
    | ProbeDevice
    | StartCandidate
    | CompareCandidate
    | SwitchToCandidate
    | StopCandidate
    | PublishEvent
    | GiveUp
)
Steps = list[Step]


class RecoveryPolicy:
    """Decides, by what it is told. Each method is told at `now_s` and gives the steps to do; one thread.

    `serving` is the device that computes now, None while none does. `chance` gives numbers from 0 to 1.
    Without `waits` a first engine that `hold` would wait for is given up.
    """

    def __init__(
        self,
        requested: RequestedDevice,
        fallback: FallbackPolicy = "degrade",
        timing: RecoveryTiming | None = None,
        chance: Callable[[], float] = random.random,
        *,
        wait_for_device: bool = True,
    ) -> None:
        self.serving: EffectiveDevice | None = None
        self._requested = requested
        self._fallback = fallback
        self._timing = timing or RecoveryTiming()
        self._chance = chance
        self._waits = wait_for_device
        self._gave_up = False
        # The engine that serves: what is being opened, what would be opened again, and when.
        self._opening: StartEngine | None = None
        self._last = StartEngine(None)
        self._opened_once = self._second_try = False
        self._opened_s = 0.0
        self._pause_s = 0.0
        self._restart_at_s: float | None = None
        # The way back.
        self._stage: RecoveryStage = "settled"
        self._untried: list[EffectiveDevice] = []
        self._candidate: EffectiveDevice = "cpu"
        self._first_wait_s = self._wait_s = self._timing.first_wait_s
        self._due_s = 0.0
        self._failed_attempts = 0
        self._reason: DeviceVerdict | None = None
        self._recovered_s: float | None = None
        self._refusal_published = False

    def __repr__(self) -> str:
        return f"<Ladder serving={self.serving} {self._stage} vain={self._failed_attempts}>"

    def due_s(self) -> float | None:
        """When `tick` has something to do; None while only an answer is waited for."""
        times = [] if self._restart_at_s is None else [self._restart_at_s]
        times += [self._due_s] if self._stage == "waiting" else []
        return min(times, default=None)

    def recovery_state(self, now_s: float) -> RecoveryState:
        """Where the way back stands."""
        retry_in_s = max(0.0, self._due_s - now_s) if self._stage == "waiting" else None
        return RecoveryState(self._stage, self._failed_attempts, self._reason, retry_in_s)

    def begin(self) -> Steps:
        """The first step of all."""
        return self._serve(StartEngine(None))

    def tick(self, now_s: float) -> Steps:
        """Time went by."""
        if self._gave_up:
            return []
        steps: Steps = []
        if self._restart_at_s is not None and now_s >= self._restart_at_s:
            self._restart_at_s = None
            steps += self._serve(self._last)
        if self._stage == "waiting" and now_s >= self._due_s:
            self._untried = list(device_preference(self._requested)[:-1])
            steps.append(self._probe_next())
        return steps

    def set_fallback(self, fallback: FallbackPolicy) -> Steps:
        """Another policy counts from now on, also for a device that is lost already.

        `exit` counts from the next loss on: a change of the configuration does not end a module.
        """
        before, self._fallback = self._fallback, fallback
        if self._gave_up or fallback == before or self._stage == "settled":
            return []
        verdict = self._reason or DeviceVerdict(ReasonCode.ENGINE_DIED, "the device is lost")
        if (
            fallback == "degrade"
            and self.serving is None
            and self._opening is None
            and self._restart_at_s is None
        ):
            message = f"{verdict.reason}; the CPU takes over (inference.fallback: degrade)"
            return [PublishEvent("device-lost", message), *self._serve(StartEngine("cpu", verdict))]
        # With `auto` the CPU may be all that there ever was.
        if fallback == "hold" and self.serving == "cpu" and self._requested != "auto":
            self.serving = None
            message = f"{verdict.reason}; waiting for it (inference.fallback: hold)"
            return [StopEngine(message), PublishEvent("device-held", message)]
        return []

    # --- the engine that serves -----------------------------------------------------------------------------

    def opened(self, device: EffectiveDevice, verdict: DeviceVerdict, now_s: float) -> Steps:
        """The engine that was to serve is ready, on this device for this reason."""
        if self._gave_up:
            return []
        self._opening, self.serving, self._opened_s = None, device, now_s
        again, self._opened_once = self._opened_once, True
        if device == "cpu":
            self._last = StartEngine("cpu", verdict)
            absent = verdict.code not in (ReasonCode.OK, ReasonCode.CPU_REQUESTED, ReasonCode.NO_GPU_BUILD)
            if absent and self._requested != "cpu" and self._stage == "settled":
                self._start_recovery(verdict, now_s)
        return [PublishEvent("engine-back", "")] if again else []

    def refused(
        self, message: str, now_s: float, *, died: bool, killed: bool = False, code: ReasonCode | None = None
    ) -> Steps:
        """The engine that was to serve could not be opened. `code`: a device was demanded and is to blame.

        `killed`: its process was ended from outside, which says nothing of the model or the device.
        """
        tried, self._opening = self._opening, None
        if self._gave_up:
            return []
        if killed and not self._opened_once and not self._second_try and tried is not None:
            self._second_try = True
            return self._serve(tried)
        if self._opened_once:
            self._restart_at_s = now_s + self._next_pause_s()
            return []
        if tried is None or tried.device is not None or self._requested == "cpu" or not (died or code):
            return self._give_up(None)
        verdict = DeviceVerdict(code or ReasonCode.ENGINE_DIED, message)
        # `auto` asks for a device where there is one, so at the start there is none to wait for.
        fallback = "degrade" if self._requested == "auto" else self._fallback
        if fallback == "hold" and self._waits:
            self._opened_once = True
            self._start_recovery(verdict, now_s)
            return [PublishEvent("device-held", f"{message}; waiting for it (inference.fallback: hold)")]
        return self._serve(StartEngine("cpu", verdict)) if fallback == "degrade" else self._give_up(verdict)

    def fault(self, fault: Fault, message: str, now_s: float) -> Steps:
        """The engine that serves met a fault that neither a smaller batch nor the next one mends."""
        if self._gave_up or self.serving in (None, "cpu"):
            return []
        return [StopEngine(message), *self._on_device_lost(fault, message, now_s)]

    def ended(self, fault: Fault, message: str, now_s: float) -> Steps:
        """The process of the engine that serves is gone, and nobody wanted that."""
        if self._gave_up or self.serving is None:
            return []
        if self.serving != "cpu":
            return self._on_device_lost(fault, message, now_s)
        self.serving = None
        if now_s - self._opened_s >= self._timing.stable_s:
            self._pause_s = 0.0
        self._restart_at_s = now_s + self._next_pause_s()
        return [PublishEvent("engine-lost", f"{message}; another one is started"), *self.tick(now_s)]

    def _serve(self, step: StartEngine) -> Steps:
        self._opening = self._last = step
        return [step]

    def _next_pause_s(self) -> float:
        """Before an engine is opened again: none at first, then ever longer."""
        pause_s, self._pause_s = self._pause_s, min(self._timing.max_restart_wait_s, 2 * self._pause_s or 1.0)
        return pause_s

    def _on_device_lost(self, fault: Fault, message: str, now_s: float) -> Steps:
        """The device is lost; soon after it returned, that costs it twice the patience of the last time."""
        device, self.serving = self.serving, None
        verdict = classify_device_loss(fault, message)
        soon = self._recovered_s is not None and now_s - self._recovered_s < self._timing.healthy_s
        self._first_wait_s = (
            min(self._timing.max_wait_s, 2 * self._first_wait_s) if soon else self._timing.first_wait_s
        )
        what = f"{device} is lost: {verdict.reason}"
        if self._fallback == "exit":
            message = f"{what}; ending with exit code 3 (inference.fallback: exit)"
            return [PublishEvent("device-lost", message, ends=True), *self._give_up(verdict)]
        self._start_recovery(verdict, now_s)
        if self._fallback == "hold":
            return [PublishEvent("device-lost", f"{what}; waiting for it (inference.fallback: hold)")]
        return [
            PublishEvent("device-lost", f"{what}; the CPU takes over"),
            *self._serve(StartEngine("cpu", verdict)),
        ]

    def _give_up(self, verdict: DeviceVerdict | None) -> Steps:
        self._gave_up, self._stage, self._restart_at_s = True, "settled", None
        return [GiveUp(verdict)]

    # --- the way back ---------------------------------------------------------------------------------------

    def probed(self, device: EffectiveDevice, verdict: DeviceVerdict, now_s: float) -> Steps:
        """What the probe of a device came to."""
        if self._gave_up or self._stage != "probing":
            return []
        if verdict.code is ReasonCode.OK:
            self._stage, self._candidate = "opening", device
            return [StartCandidate(device)]
        self._reason = verdict
        if self._untried:
            return [self._probe_next()]
        return self._back_off(verdict, now_s)

    def prepared(self, _now_s: float) -> Steps:
        """The candidate is open and warm."""
        if self._gave_up or self._stage != "opening":
            return [StopCandidate()]
        self._stage = "comparing"
        return [CompareCandidate()]

    def candidate_lost(self, verdict: DeviceVerdict, now_s: float) -> Steps:
        """The candidate could not be opened, or its process is gone."""
        if self._gave_up or self._stage not in ("opening", "comparing"):
            return []
        steps = self._back_off(verdict, now_s)
        return steps + (self._refusal(verdict) if verdict.code is ReasonCode.PARITY_REFUSED else [])

    def compared(self, refusal: str | None, message: str, now_s: float) -> Steps:
        """The candidate was held against the CPU: why it must not serve, or None; and what was seen."""
        if self._gave_up or self._stage != "comparing":
            return []
        if refusal is not None:
            verdict = DeviceVerdict(ReasonCode.PARITY_REFUSED, refusal)
            return [StopCandidate(), *self._back_off(verdict, now_s), *self._refusal(verdict)]
        self.serving, self._recovered_s, self._stage = self._candidate, now_s, "settled"
        self._opening = self._restart_at_s = None
        self._opened_once = True
        self._failed_attempts, self._reason, self._pause_s = 0, None, 0.0
        return [SwitchToCandidate(), PublishEvent("device-back", f"{self._candidate} is back: {message}")]

    def _refusal(self, verdict: DeviceVerdict) -> Steps:
        """Told once until the device is back."""
        if self._refusal_published:
            return []
        self._refusal_published = True
        return [PublishEvent("parity-refused", f"{self._candidate} stays out of use: {verdict.reason}")]

    def _start_recovery(self, verdict: DeviceVerdict, now_s: float) -> None:
        """Begin to look for the device."""
        self._stage, self._reason, self._failed_attempts, self._refusal_published = (
            "waiting",
            verdict,
            0,
            False,
        )
        self._wait_s = self._first_wait_s
        self._due_s = now_s + self._jittered(self._wait_s)
        if self._recovered_s is not None:
            self._due_s = max(self._due_s, self._recovered_s + self._timing.min_interval_s)

    def _probe_next(self) -> Step:
        self._stage = "probing"
        return ProbeDevice(self._untried.pop(0))

    def _back_off(self, verdict: DeviceVerdict, now_s: float) -> Steps:
        self._stage, self._reason, self._failed_attempts = "waiting", verdict, self._failed_attempts + 1
        self._wait_s = min(self._timing.max_wait_s, 2 * self._wait_s)
        self._due_s = now_s + self._jittered(self._wait_s)
        return []

    def _jittered(self, wait_s: float) -> float:
        return wait_s * (1 + self._timing.jitter * (2 * self._chance() - 1))
