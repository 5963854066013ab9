"""The recovery policy: what is done when a device fails, and how the engine returns to it.

    lost ──▶ the CPU serves at once ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┐
      └────▶ wait ──▶ probe ──▶ a candidate opens, warms up ──▶ compare ──▶ switch over
              ▲         │                 │                        │
              └─────────┴── longer wait ──┴────────────────────────┘

The supervisor reports each event and carries out the steps that it gets back, in order. The policy is pure:
the time and random numbers are arguments. Every wait has a deadline after which the next attempt starts.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from visionedge.engine.device.devices import (
    DeviceVerdict,
    EffectiveDevice,
    ReasonCode,
    RequestedDevice,
    RequestedRuntime,
    Runtime,
    classify_device_loss,
    device_preference,
)
from visionedge.engine.device.faults import Fault
from visionedge.engine.interface import EngineEventCode, FallbackPolicy, RecoveryStage, RecoveryState
from visionedge.runtime.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class RecoveryTiming:
    """The waits of the policy, in seconds.

    After a loss the first attempt starts after `first_wait_s`; each failed attempt doubles the wait, up to
    `max_wait_s`. Two switches lie at least `min_interval_s` apart. If the device is lost again within
    `healthy_s` of its return, the first wait doubles. Waits are shortened by the share `jitter` at most, so
    that modules that share a GPU do not probe it at the same time. An engine on the CPU whose process died is
    started again at once, then after 1, 2, 4 … `max_restart_wait_s`, and at once again if it ran for
    `stable_s`.
    """

    first_wait_s: float = 5.0
    max_wait_s: float = 300.0
    min_interval_s: float = 30.0
    healthy_s: float = 600.0
    jitter: float = 0.2
    max_restart_wait_s: float = 30.0
    stable_s: float = 60.0


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The first event of all."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The time that `due_s` gave is reached."""


@dataclass(frozen=True, slots=True)
class FallbackChanged:
    """The configuration has another `inference.fallback`."""

    fallback: FallbackPolicy


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine that was started serves, on this device for this reason."""

    device: EffectiveDevice
    verdict: DeviceVerdict
    runtime: Runtime = "onnxruntime"


@dataclass(frozen=True, slots=True)
class EngineStartFailed:
    """The engine that was started could not be opened.

    `died`: its process ended. `killed`: by a signal from outside, which says nothing about model and device.
    `code`: a device was demanded, and this is why it cannot be used.
    """

    message: str
    died: bool
    killed: bool = False
    code: ReasonCode | None = None


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine that serves met a fault that neither a smaller batch nor the next batch repairs."""

    fault: Fault
    message: str


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The process of the engine that serves ended, and was not asked to."""

    fault: Fault
    message: str


@dataclass(frozen=True, slots=True)
class DeviceProbed:
    """The result of a probe."""

    device: EffectiveDevice
    verdict: DeviceVerdict


@dataclass(frozen=True, slots=True)
class CandidateReady:
    """The candidate is open and warmed up."""


@dataclass(frozen=True, slots=True)
class CandidateFailed:
    """The candidate could not be opened, or its process ended."""

    verdict: DeviceVerdict


@dataclass(frozen=True, slots=True)
class CandidateCompared:
    """The candidate was compared with the CPU: why it must not serve, or None; and the result in a clause."""

    refusal: str | None
    message: str


CandidateEvent = DeviceProbed | CandidateReady | CandidateFailed | CandidateCompared
RecoveryEvent = (
    Start
    | TimePassed
    | FallbackChanged
    | EngineReady
    | EngineStartFailed
    | EngineFailed
    | EngineExited
    | CandidateEvent
)


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Start an engine that serves as soon as it is ready; `device` None: as the configuration requests."""

    device: EffectiveDevice | None
    verdict: DeviceVerdict | None = None


@dataclass(frozen=True, slots=True)
class StopEngine:
    """Kill the engine that serves: it cannot be used any longer."""

    message: str


@dataclass(frozen=True, slots=True)
class ProbeDevice:
    """Find out in a separate process whether a device is usable."""

    device: EffectiveDevice


@dataclass(frozen=True, slots=True)
class StartCandidate:
    """Open and warm up a candidate on exactly this device, beside the engine that serves."""

    device: EffectiveDevice


@dataclass(frozen=True, slots=True)
class CompareCandidate:
    """Compare the candidate with the CPU."""


@dataclass(frozen=True, slots=True)
class SwitchToCandidate:
    """The candidate serves from now on; the engine before it finishes its batches and ends."""


@dataclass(frozen=True, slots=True)
class StopCandidate:
    """Kill the candidate."""


@dataclass(frozen=True, slots=True)
class PublishEvent:
    """Publish a change, once. `ends`: the module ends because of it."""

    code: EngineEventCode
    message: str
    ends: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No engine can be started: the module must end."""

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


_PERMANENT_REASONS = frozenset(
    {ReasonCode.OK, ReasonCode.CPU_REQUESTED, ReasonCode.NO_GPU_BUILD}
    | {ReasonCode.RUNTIME_MISSING, ReasonCode.RUNTIME_REFUSED}
)
"""For these the CPU computes, and no device is waited for."""


class RecoveryPolicy:
    """A state machine: `handle` takes an event and gives the steps to carry out. For one thread.

    `serving` is the device that computes now, None while none does. `random_fraction` gives numbers from 0 to
    1. Without `wait_for_device` a first engine for which `hold` would wait is given up. `runtime` is the
    requested one: if OpenVINO's process dies while it opens, or twice in a short time, onnxruntime computes.
    """

    def __init__(
        self,
        requested: RequestedDevice,
        fallback: FallbackPolicy = "degrade",
        timing: RecoveryTiming | None = None,
        random_fraction: Callable[[], float] = random.random,
        *,
        wait_for_device: bool = True,
        runtime: RequestedRuntime = "auto",
    ) -> None:
        self.serving: EffectiveDevice | None = None
        self._requested = requested
        self._fallback = fallback
        self._timing = timing or RecoveryTiming()
        self._random_fraction = random_fraction
        self._device_waits = RetryPolicy(
            self._timing.first_wait_s, self._timing.max_wait_s, self._timing.jitter
        )
        self._restart_waits = RetryPolicy(1.0, self._timing.max_restart_wait_s)
        self._waits = wait_for_device
        self._requested_runtime = runtime
        self._runtime: Runtime = "onnxruntime"
        self._gave_up = False
        # The engine that serves: what is being opened, what would be opened again, and when.
        self._opening: StartEngine | None = None
        self._last_start = StartEngine(None)
        self._opened_once = self._second_try = False
        self._opened_s = 0.0
        self._restarts = 0
        self._restart_at_s: float | None = None
        # The recovery of a lost device.
        self._stage: RecoveryStage = "settled"
        self._untried: list[EffectiveDevice] = []
        self._candidate: EffectiveDevice = "cpu"
        self._retry_at_s = 0.0
        self._quick_losses = self._failed_attempts = 0
        self._reason: DeviceVerdict | None = None
        self._recovered_s: float | None = None
        self._refusal_published = False

    def __repr__(self) -> str:
        return (
            f"<RecoveryPolicy serving={self.serving} {self._stage} failed_attempts={self._failed_attempts}>"
        )

    def due_s(self) -> float | None:
        """When `TimePassed` must be reported; None while only other events are expected."""
        times = [] if self._restart_at_s is None else [self._restart_at_s]
        times += [self._retry_at_s] if self._stage == "waiting" else []
        return min(times, default=None)

    def recovery_state(self) -> RecoveryState:
        """The recovery of a lost device, to be shown."""
        retry_at_s = self._retry_at_s if self._stage == "waiting" else None
        return RecoveryState(self._stage, self._failed_attempts, self._reason, retry_at_s)

    def handle(self, event: RecoveryEvent, now_s: float) -> Steps:
        """Take an event into account, and give the steps to carry out."""
        if self._gave_up:
            return []
        match event:
            case Start():
                steps = self._start_engine(StartEngine(None))
            case TimePassed():
                steps = self._on_time_passed(now_s)
            case FallbackChanged(fallback):
                steps = self._on_fallback_changed(fallback)
            case EngineReady(device, verdict, runtime):
                self._runtime = runtime
                steps = self._on_ready(device, verdict, now_s)
            case EngineStartFailed():
                if event.died and not event.killed and self._was_openvino(self._opening):
                    steps = self._leave_openvino(event.message)
                else:
                    steps = self._on_start_failed(event, now_s)
            case EngineFailed(fault, message):
                steps = self._on_failed(fault, message, now_s)
            case EngineExited(fault, message):
                steps = self._on_exited(fault, message, now_s)
            case _:
                steps = self._handle_candidate(event, now_s)
        return steps

    def _handle_candidate(self, event: CandidateEvent, now_s: float) -> Steps:
        match event:
            case DeviceProbed(device, verdict):
                return self._on_probed(device, verdict, now_s)
            case CandidateReady():
                return self._on_candidate_ready()
            case CandidateFailed(verdict):
                return self._on_candidate_failed(verdict, now_s)
            case CandidateCompared(refusal, message):
                return self._on_compared(refusal, message, now_s)

    def _on_time_passed(self, now_s: float) -> Steps:
        steps: Steps = []
        if self._restart_at_s is not None and now_s >= self._restart_at_s:
            self._restart_at_s = None
            steps += self._start_engine(self._last_start)
        if self._stage == "waiting" and now_s >= self._retry_at_s:
            self._untried = list(device_preference(self._requested)[:-1])
            steps.append(self._probe_next())
        return steps

    def _on_fallback_changed(self, fallback: FallbackPolicy) -> Steps:
        """Another fallback applies from now on, also to a device that is lost already.

        `exit` applies from the next loss on: a change of the configuration does not end a module.
        """
        before, self._fallback = self._fallback, fallback
        if fallback == before or self._stage == "settled":
            return []
        verdict = self._reason or DeviceVerdict(ReasonCode.ENGINE_DIED, "the device is lost")
        none_starts = self._opening is None and self._restart_at_s is None
        if fallback == "degrade" and self.serving is None and none_starts:
            message = f"{verdict.reason}; the CPU takes over (inference.fallback: degrade)"
            return [PublishEvent("device-lost", message), *self._start_engine(StartEngine("cpu", verdict))]
        # With `auto` the CPU may be the only device that there ever was.
        if fallback == "hold" and self.serving == "cpu" and self._requested != "auto":
            self.serving = None
            message = f"{verdict.reason}; waiting for it (inference.fallback: hold)"
            return [StopEngine(message), PublishEvent("device-held", message)]
        return []

    # --- the engine that serves -----------------------------------------------------------------------------

    def _on_ready(self, device: EffectiveDevice, verdict: DeviceVerdict, now_s: float) -> Steps:
        self._opening, self.serving, self._opened_s = None, device, now_s
        again, self._opened_once = self._opened_once, True
        if device == "cpu":
            self._last_start = StartEngine("cpu", verdict)
            absent = verdict.code not in _PERMANENT_REASONS
            if absent and self._requested != "cpu" and self._stage == "settled":
                self._start_recovery(verdict, now_s)
        return [PublishEvent("engine-back", "")] if again else []

    def _on_start_failed(self, event: EngineStartFailed, now_s: float) -> Steps:
        tried, self._opening = self._opening, None
        if event.killed and not self._opened_once and not self._second_try and tried is not None:
            self._second_try = True
            return self._start_engine(tried)
        if self._opened_once:
            self._restart_at_s = now_s + self._take_restart_wait_s()
            return []
        first = tried is not None and tried.device is None
        if not first or self._requested == "cpu" or not (event.died or event.code):
            return self._give_up(None)
        verdict = DeviceVerdict(event.code or ReasonCode.ENGINE_DIED, event.message)
        # `auto` requests a device only where there is one, so at the start there is none to wait for.
        fallback = "degrade" if self._requested == "auto" else self._fallback
        if fallback == "hold" and self._waits:
            self._opened_once = True
            self._start_recovery(verdict, now_s)
            message = f"{event.message}; waiting for it (inference.fallback: hold)"
            return [PublishEvent("device-held", message)]
        if fallback == "degrade":
            return self._start_engine(StartEngine("cpu", verdict))
        return self._give_up(verdict)

    def _on_failed(self, fault: Fault, message: str, now_s: float) -> Steps:
        if self.serving in (None, "cpu"):
            return []
        return [StopEngine(message), *self._lose_device(fault, message, now_s)]

    def _on_exited(self, fault: Fault, message: str, now_s: float) -> Steps:
        if self.serving is None:
            return []
        if self.serving != "cpu":
            return self._lose_device(fault, message, now_s)
        self.serving = None
        if now_s - self._opened_s >= self._timing.stable_s:
            self._restarts = 0
        if self._restarts and self._runtime == "openvino" and self._fallback == "degrade":
            return [
                PublishEvent("engine-lost", f"{message}; onnxruntime takes over"),
                *self._leave_openvino(message),
            ]
        wait_s = self._take_restart_wait_s()
        self._restart_at_s = now_s + wait_s
        restarting = f"restarting in {wait_s:g} s" if wait_s else "restarting"
        return [PublishEvent("engine-lost", f"{message}; {restarting}"), *self._on_time_passed(now_s)]

    def _was_openvino(self, tried: StartEngine | None) -> bool:
        """Whether this start was one of OpenVINO on the CPU, in whose place onnxruntime may compute."""
        if tried is None or self._requested_runtime != "openvino" or self._fallback != "degrade":
            return False
        if tried.verdict is not None and tried.verdict.code is ReasonCode.RUNTIME_REFUSED:
            return False
        return tried.device == "cpu" or (tried.device is None and self._requested == "cpu")

    def _leave_openvino(self, message: str) -> Steps:
        """Start the CPU with onnxruntime: with this reason code the engine does not open OpenVINO."""
        verdict = DeviceVerdict(ReasonCode.RUNTIME_REFUSED, f"OpenVINO failed: {message}")
        return self._start_engine(StartEngine("cpu", verdict))

    def _start_engine(self, step: StartEngine) -> Steps:
        self._opening = self._last_start = step
        return [step]

    def _take_restart_wait_s(self) -> float:
        """The wait before an engine is started again: none at first, then 1, 2, 4 … s."""
        wait_s = self._restart_waits.wait_s(self._restarts)
        self._restarts += 1
        return wait_s

    def _lose_device(self, fault: Fault, message: str, now_s: float) -> Steps:
        device, self.serving = self.serving, None
        verdict = classify_device_loss(fault, message)
        again = self._recovered_s is not None and now_s - self._recovered_s < self._timing.healthy_s
        self._quick_losses = self._quick_losses + 1 if again else 0
        what = f"{device} is lost: {verdict.reason}"
        if self._fallback == "exit":
            message = f"{what}; ending with exit code 3 (inference.fallback: exit)"
            return [PublishEvent("device-lost", message, ends=True), *self._give_up(verdict)]
        self._start_recovery(verdict, now_s)
        if self._fallback == "hold":
            return [PublishEvent("device-lost", f"{what}; waiting for it (inference.fallback: hold)")]
        return [
            PublishEvent("device-lost", f"{what}; the CPU takes over"),
            *self._start_engine(StartEngine("cpu", verdict)),
        ]

    def _give_up(self, verdict: DeviceVerdict | None) -> Steps:
        self._gave_up, self._stage, self._restart_at_s = True, "settled", None
        return [GiveUp(verdict)]

    # --- the recovery of a lost device ----------------------------------------------------------------------

    def _on_probed(self, device: EffectiveDevice, verdict: DeviceVerdict, now_s: float) -> Steps:
        if self._stage != "probing":
            return []
        if verdict.code is ReasonCode.OK:
            self._stage, self._candidate = "opening", device
            return [StartCandidate(device)]
        self._reason = verdict
        if self._untried:
            return [self._probe_next()]
        self._back_off(verdict, now_s)
        return []

    def _on_candidate_ready(self) -> Steps:
        if self._stage != "opening":
            return [StopCandidate()]
        self._stage = "comparing"
        return [CompareCandidate()]

    def _on_candidate_failed(self, verdict: DeviceVerdict, now_s: float) -> Steps:
        if self._stage not in ("opening", "comparing"):
            return []
        self._back_off(verdict, now_s)
        return self._publish_refusal(verdict) if verdict.code is ReasonCode.PARITY_REFUSED else []

    def _on_compared(self, refusal: str | None, message: str, now_s: float) -> Steps:
        if self._stage != "comparing":
            return []
        if refusal is not None:
            verdict = DeviceVerdict(ReasonCode.PARITY_REFUSED, refusal)
            self._back_off(verdict, now_s)
            return [StopCandidate(), *self._publish_refusal(verdict)]
        self.serving, self._recovered_s, self._stage = self._candidate, now_s, "settled"
        self._opening = self._restart_at_s = None
        self._opened_once = True
        self._failed_attempts, self._restarts, self._reason = 0, 0, None
        return [SwitchToCandidate(), PublishEvent("device-back", f"{self._candidate} is back: {message}")]

    def _publish_refusal(self, verdict: DeviceVerdict) -> Steps:
        """Published once until the device is back, however often the candidate is tried."""
        if self._refusal_published:
            return []
        self._refusal_published = True
        return [PublishEvent("parity-refused", f"{self._candidate} is not used: {verdict.reason}")]

    def _start_recovery(self, verdict: DeviceVerdict, now_s: float) -> None:
        self._stage, self._reason = "waiting", verdict
        self._failed_attempts, self._refusal_published = 0, False
        self._retry_at_s = now_s + self._device_wait_s()
        if self._recovered_s is not None:
            self._retry_at_s = max(self._retry_at_s, self._recovered_s + self._timing.min_interval_s)

    def _probe_next(self) -> Step:
        self._stage = "probing"
        return ProbeDevice(self._untried.pop(0))

    def _back_off(self, verdict: DeviceVerdict, now_s: float) -> None:
        self._stage, self._reason, self._failed_attempts = "waiting", verdict, self._failed_attempts + 1
        self._retry_at_s = now_s + self._device_wait_s()

    def _device_wait_s(self) -> float:
        losses = 1 + self._quick_losses + self._failed_attempts
        return self._device_waits.wait_s(losses, self._random_fraction)
