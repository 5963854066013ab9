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

from visionedge.engine.device.devices import Effective, Reason, Requested, Verdict, lost, wishes
from visionedge.engine.device.faults import Fault
from visionedge.engine.interface import NewsCode, Outlook, Stage

Policy = Literal["degrade", "hold", "exit"]
"""What happens without the device that was asked for: the CPU computes, nothing does, or the module ends."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the ladder waits, in seconds.

    The way back begins `first_s` after a loss, and waits twice as long after each vain try, `most_s` at most.
    Two change-overs lie `window_s` apart. When a device is lost again before it was well for `healthy_s`, the
    first wait is twice that of its last loss. Waits vary by the share `jitter`, so that modules that share a
    GPU do not ask in step. A process on the CPU that died is started again at once, then after 1, 2, 4 …
    `restart_s`, and at once again when it lived for `settled_s`.
    """

    first_s: float = 5.0
    most_s: float = 300.0
    window_s: float = 30.0
    healthy_s: float = 600.0
    jitter: float = 0.2
    restart_s: float = 30.0
    settled_s: float = 60.0


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Serve:
    """Open an engine that serves as soon as it is ready; `device` None: as the configuration asks."""

    device: Effective | None
    because: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine that serves: it is of no use any more."""

    words: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Find out in a process of its own whether a device is usable."""

    device: Effective


@dataclass(frozen=True, slots=True)
class Prepare:
    """Open a candidate on this device and nothing else, beside the engine that serves, and warm it up."""

    device: Effective


@dataclass(frozen=True, slots=True)
class Compare:
    """Hold the candidate against the CPU."""


@dataclass(frozen=True, slots=True)
class ChangeOver:
    """The candidate serves from now on; what the other one computes is finished there."""


@dataclass(frozen=True, slots=True)
class Dismiss:
    """End the candidate."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Something changed, and is told once; `ends`: the module ends because of it."""

    code: NewsCode
    words: str
    ends: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nothing can be done here: the engine ends for good."""

    verdict: Verdict | None = None


Step = Serve | Stop | Probe | Prepare | Compare | ChangeOver | Dismiss | Tell | GiveUp
Steps = list[Step]


class Ladder:
    """Decides, by what it is told. Each method is told at `now_s` and gives the steps to do; one thread.

    `serving` is the device that computes now, None while none does. `chance` gives numbers from 0 to 1.
    Without `waits` a first engine that `hold` would wait for is given up.
    """

    def __init__(
        self,
        requested: Requested,
        policy: Policy = "degrade",
        patience: Patience | None = None,
        chance: Callable[[], float] = random.random,
        *,
        waits: bool = True,
    ) -> None:
        self.serving: Effective | None = None
        self._requested = requested
        self._policy = policy
        self._patience = patience or Patience()
        self._chance = chance
        self._waits = waits
        self._over = False
        # The engine that serves: what is being opened, what would be opened again, and when.
        self._opening: Serve | None = None
        self._last = Serve(None)
        self._opened_once = self._second_try = False
        self._opened_s = 0.0
        self._pause_s = 0.0
        self._again_s: float | None = None
        # The way back.
        self._stage: Stage = "settled"
        self._untried: list[Effective] = []
        self._candidate: Effective = "cpu"
        self._first_s = self._wait_s = self._patience.first_s
        self._due_s = 0.0
        self._vain = 0
        self._reason: Verdict | None = None
        self._returned_s: float | None = None
        self._refusal_told = False

    def __repr__(self) -> str:
        return f"<Ladder serving={self.serving} {self._stage} vain={self._vain}>"

    def due_s(self) -> float | None:
        """When `tick` has something to do; None while only an answer is waited for."""
        times = [] if self._again_s is None else [self._again_s]
        times += [self._due_s] if self._stage == "waiting" else []
        return min(times, default=None)

    def outlook(self, now_s: float) -> Outlook:
        """Where the way back stands."""
        next_in_s = max(0.0, self._due_s - now_s) if self._stage == "waiting" else None
        return Outlook(self._stage, self._vain, self._reason, next_in_s)

    def begin(self) -> Steps:
        """The first step of all."""
        return self._serve(Serve(None))

    def tick(self, now_s: float) -> Steps:
        """Time went by."""
        if self._over:
            return []
        steps: Steps = []
        if self._again_s is not None and now_s >= self._again_s:
            self._again_s = None
            steps += self._serve(self._last)
        if self._stage == "waiting" and now_s >= self._due_s:
            self._untried = list(wishes(self._requested)[:-1])
            steps.append(self._probe_next())
        return steps

    def follow(self, policy: Policy) -> Steps:
        """Another policy counts from now on, also for a device that is lost already.

        `exit` counts from the next loss on: a change of the configuration does not end a module.
        """
        before, self._policy = self._policy, policy
        if self._over or policy == before or self._stage == "settled":
            return []
        verdict = self._reason or Verdict(Reason.ENGINE_DIED, "the device is lost")
        if policy == "degrade" and self.serving is None and self._opening is None and self._again_s is None:
            words = f"{verdict.reason}; the CPU takes over (inference.fallback: degrade)"
            return [Tell("device-lost", words), *self._serve(Serve("cpu", verdict))]
        # With `auto` the CPU may be all that there ever was.
        if policy == "hold" and self.serving == "cpu" and self._requested != "auto":
            self.serving = None
            words = f"{verdict.reason}; waiting for it (inference.fallback: hold)"
            return [Stop(words), Tell("device-held", words)]
        return []

    # --- the engine that serves -----------------------------------------------------------------------------

    def opened(self, device: Effective, verdict: Verdict, now_s: float) -> Steps:
        """The engine that was to serve is ready, on this device for this reason."""
        if self._over:
            return []
        self._opening, self.serving, self._opened_s = None, device, now_s
        again, self._opened_once = self._opened_once, True
        if device == "cpu":
            self._last = Serve("cpu", verdict)
            absent = verdict.code not in (Reason.OK, Reason.ASKED_CPU, Reason.NO_GPU_BUILD)
            if absent and self._requested != "cpu" and self._stage == "settled":
                self._seek(verdict, now_s)
        return [Tell("engine-back", "")] if again else []

    def refused(
        self, words: str, now_s: float, *, died: bool, killed: bool = False, code: Reason | None = None
    ) -> Steps:
        """The engine that was to serve could not be opened. `code`: a device was demanded and is to blame.

        `killed`: its process was ended from outside, which says nothing of the model or the device.
        """
        tried, self._opening = self._opening, None
        if self._over:
            return []
        if killed and not self._opened_once and not self._second_try and tried is not None:
            self._second_try = True
            return self._serve(tried)
        if self._opened_once:
            self._again_s = now_s + self._next_pause_s()
            return []
        if tried is None or tried.device is not None or self._requested == "cpu" or not (died or code):
            return self._give_up(None)
        verdict = Verdict(code or Reason.ENGINE_DIED, words)
        # `auto` asks for a device where there is one, so at the start there is none to wait for.
        policy = "degrade" if self._requested == "auto" else self._policy
        if policy == "hold" and self._waits:
            self._opened_once = True
            self._seek(verdict, now_s)
            return [Tell("device-held", f"{words}; waiting for it (inference.fallback: hold)")]
        return self._serve(Serve("cpu", verdict)) if policy == "degrade" else self._give_up(verdict)

    def fault(self, fault: Fault, words: str, now_s: float) -> Steps:
        """The engine that serves met a fault that neither a smaller batch nor the next one mends."""
        if self._over or self.serving in (None, "cpu"):
            return []
        return [Stop(words), *self._lose(fault, words, now_s)]

    def ended(self, fault: Fault, words: str, now_s: float) -> Steps:
        """The process of the engine that serves is gone, and nobody wanted that."""
        if self._over or self.serving is None:
            return []
        if self.serving != "cpu":
            return self._lose(fault, words, now_s)
        self.serving = None
        if now_s - self._opened_s >= self._patience.settled_s:
            self._pause_s = 0.0
        self._again_s = now_s + self._next_pause_s()
        return [Tell("engine-lost", f"{words}; another one is started"), *self.tick(now_s)]

    def _serve(self, step: Serve) -> Steps:
        self._opening = self._last = step
        return [step]

    def _next_pause_s(self) -> float:
        """Before an engine is opened again: none at first, then ever longer."""
        pause_s, self._pause_s = self._pause_s, min(self._patience.restart_s, 2 * self._pause_s or 1.0)
        return pause_s

    def _lose(self, fault: Fault, words: str, now_s: float) -> Steps:
        """The device is lost; soon after it returned, that costs it twice the patience of the last time."""
        device, self.serving = self.serving, None
        verdict = lost(fault, words)
        soon = self._returned_s is not None and now_s - self._returned_s < self._patience.healthy_s
        self._first_s = min(self._patience.most_s, 2 * self._first_s) if soon else self._patience.first_s
        what = f"{device} is lost: {verdict.reason}"
        if self._policy == "exit":
            words = f"{what}; ending with exit code 3 (inference.fallback: exit)"
            return [Tell("device-lost", words, ends=True), *self._give_up(verdict)]
        self._seek(verdict, now_s)
        if self._policy == "hold":
            return [Tell("device-lost", f"{what}; waiting for it (inference.fallback: hold)")]
        return [Tell("device-lost", f"{what}; the CPU takes over"), *self._serve(Serve("cpu", verdict))]

    def _give_up(self, verdict: Verdict | None) -> Steps:
        self._over, self._stage, self._again_s = True, "settled", None
        return [GiveUp(verdict)]

    # --- the way back ---------------------------------------------------------------------------------------

    def probed(self, device: Effective, verdict: Verdict, now_s: float) -> Steps:
        """What the probe of a device came to."""
        if self._over or self._stage != "probing":
            return []
        if verdict.code is Reason.OK:
            self._stage, self._candidate = "opening", device
            return [Prepare(device)]
        self._reason = verdict
        if self._untried:
            return [self._probe_next()]
        return self._wait_longer(verdict, now_s)

    def prepared(self, _now_s: float) -> Steps:
        """The candidate is open and warm."""
        if self._over or self._stage != "opening":
            return [Dismiss()]
        self._stage = "comparing"
        return [Compare()]

    def candidate_lost(self, verdict: Verdict, now_s: float) -> Steps:
        """The candidate could not be opened, or its process is gone."""
        if self._over or self._stage not in ("opening", "comparing"):
            return []
        steps = self._wait_longer(verdict, now_s)
        return steps + (self._refusal(verdict) if verdict.code is Reason.PARITY_REFUSED else [])

    def compared(self, refusal: str | None, words: str, now_s: float) -> Steps:
        """The candidate was held against the CPU: why it must not serve, or None; and what was seen."""
        if self._over or self._stage != "comparing":
            return []
        if refusal is not None:
            verdict = Verdict(Reason.PARITY_REFUSED, refusal)
            return [Dismiss(), *self._wait_longer(verdict, now_s), *self._refusal(verdict)]
        self.serving, self._returned_s, self._stage = self._candidate, now_s, "settled"
        self._opening = self._again_s = None
        self._opened_once = True
        self._vain, self._reason, self._pause_s = 0, None, 0.0
        return [ChangeOver(), Tell("device-back", f"{self._candidate} is back: {words}")]

    def _refusal(self, verdict: Verdict) -> Steps:
        """Told once until the device is back."""
        if self._refusal_told:
            return []
        self._refusal_told = True
        return [Tell("parity-refused", f"{self._candidate} stays out of use: {verdict.reason}")]

    def _seek(self, verdict: Verdict, now_s: float) -> None:
        """Begin to look for the device."""
        self._stage, self._reason, self._vain, self._refusal_told = "waiting", verdict, 0, False
        self._wait_s = self._first_s
        self._due_s = now_s + self._varied(self._wait_s)
        if self._returned_s is not None:
            self._due_s = max(self._due_s, self._returned_s + self._patience.window_s)

    def _probe_next(self) -> Step:
        self._stage = "probing"
        return Probe(self._untried.pop(0))

    def _wait_longer(self, verdict: Verdict, now_s: float) -> Steps:
        self._stage, self._reason, self._vain = "waiting", verdict, self._vain + 1
        self._wait_s = min(self._patience.most_s, 2 * self._wait_s)
        self._due_s = now_s + self._varied(self._wait_s)
        return []

    def _varied(self, wait_s: float) -> float:
        return wait_s * (1 + self._patience.jitter * (2 * self._chance() - 1))
