"""A machine whose GPU fails in every way it can, without any process: time jumps from event to event."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from visionedge.engine.device.devices import DeviceVerdict, EffectiveDevice, ReasonCode, RequestedDevice
from visionedge.engine.device.faults import FATAL_FAULTS, Fault
from visionedge.engine.interface import FallbackPolicy
from visionedge.engine.process.recovery_policy import (
    CandidateCompared,
    CandidateFailed,
    CandidateReady,
    CompareCandidate,
    DeviceProbed,
    EngineExited,
    EngineFailed,
    EngineReady,
    EngineStartFailed,
    GiveUp,
    ProbeDevice,
    PublishEvent,
    RecoveryPolicy,
    RecoveryTiming,
    StartCandidate,
    StartEngine,
    Step,
    StopCandidate,
    StopEngine,
    SwitchToCandidate,
    TimePassed,
)

OK = DeviceVerdict(ReasonCode.OK, "usable")
ABSENT = DeviceVerdict(ReasonCode.NO_DEVICE, "CUDA failure 100: no CUDA-capable device is detected")
LOST = DeviceVerdict(ReasonCode.CUDA_ERROR, "CUDA failure 700: an illegal memory access was encountered")
LOST_TEXT = LOST.reason

GPU_STATES = ("fine", "absent", "hangs", "opens-not", "dies-opening", "lies", "shaky")


@dataclass
class GpuFaultSimulation:
    """A machine whose GPU fails in many ways, and whose CPU workers die; a supervisor for the policy.

    Answers come after a while, from a heap of what will happen; the clock jumps from one to the next.
    """

    seed: int
    now_s: float = 0.0
    gpu: str = "fine"
    cpu_dies: bool = True
    pending: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    main: int = 0
    candidate: int = 0
    changes_s: list[float] = field(default_factory=list)
    attempts_s: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    outages_s: list[float] = field(default_factory=list)
    outage_since_s: float | None = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - the world's, not a secret
        self.numbers = itertools.count(1)
        self.policy: FallbackPolicy = self.random.choice(("degrade", "degrade", "hold"))
        self.requested: RequestedDevice = self.random.choice(("auto", "cuda", "tensorrt"))
        self.timing = RecoveryTiming(jitter=0.2)
        self.recovery_policy = RecoveryPolicy(self.requested, self.policy, self.timing, self.random.random)

    # What the world does by itself.

    def run_until(self, until_s: float) -> None:
        """Let time go by; at each moment something is on its way, or nothing is missing."""
        while True:
            due_s = self.recovery_policy.due_s()
            next_s = min(
                [t for t, _, _ in self.pending[:1]] + ([due_s] if due_s is not None else []), default=None
            )
            if next_s is None:
                assert self.recovery_policy.serving is not None, f"stuck: {self.recovery_policy}"
            if next_s is None or next_s > until_s:
                self.now_s = until_s
                return
            self.now_s = max(self.now_s, next_s)
            if self.pending and self.pending[0][0] <= self.now_s:
                heapq.heappop(self.pending)[2]()
            else:
                steps = self.recovery_policy.handle(TimePassed(), self.now_s)
                assert steps, "what is due is something to do"
                self.apply_steps(steps)

    def schedule(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.pending, (self.now_s + seconds, next(self.numbers), action))

    def schedule_gpu_states(self, until_s: float) -> None:
        """The GPU's states, one after the other."""
        at_s = 0.0
        while (at_s := at_s + self.random.expovariate(1 / 120)) < until_s:
            state = self.random.choice(GPU_STATES)
            self.schedule(at_s, partial(self._set_gpu_state, state))

    def _set_gpu_state(self, state: str) -> None:
        self.gpu = state
        if self.recovery_policy.serving in ("cuda", "tensorrt") and state in (
            "absent",
            "hangs",
            "shaky",
            "opens-not",
        ):
            self._fail_gpu(self.main)

    def _fail_gpu(self, child: int) -> None:
        """The GPU that serves fails, in one way or another."""
        if child != self.main or self.recovery_policy.serving in (None, "cpu"):
            return
        self.counts["gpu lost"] += 1
        self._begin_outage()
        fault = self.random.choice(sorted({*FATAL_FAULTS, Fault.OUT_OF_MEMORY, Fault.REFUSED}))
        if fault in (Fault.HANG, Fault.DIED):
            self.main = 0
            self.apply_steps(self.recovery_policy.handle(EngineExited(fault, LOST_TEXT), self.now_s))
        else:
            steps = self.recovery_policy.handle(EngineFailed(fault, LOST_TEXT), self.now_s)
            assert steps[0] == StopEngine(LOST_TEXT)
            self.apply_steps(steps)

    def _begin_outage(self) -> None:
        if self.outage_since_s is None:
            self.outage_since_s = self.now_s

    def _end_outage(self) -> None:
        if self.outage_since_s is not None:
            self.outages_s.append(self.now_s - self.outage_since_s)
            self.outage_since_s = None

    # What the supervisor does.

    def apply_steps(self, steps: list[Step]) -> None:
        for step in steps:
            self._apply_step(step)

    def _apply_step(self, step: Step) -> None:
        match step:
            case StartEngine(device):
                assert self.main == 0, "one at a time"
                self.main = next(self.numbers)
                self.schedule(2.0, partial(self._engine_opened, self.main, device))
            case StopEngine():
                self.main = 0
            case ProbeDevice(device):
                self.attempts_s += [self.now_s] if device == self._preferred_device() else []
                self.schedule(60.0 if self.gpu == "hangs" else 2.0, partial(self._device_probed, device))
            case StartCandidate(device):
                assert self.candidate == 0, "one candidate at a time"
                self.candidate = next(self.numbers)
                self.schedule(8.0, partial(self._candidate_opened, self.candidate))
            case CompareCandidate():
                self.schedule(1.0, partial(self._candidate_compared, self.candidate))
            case StopCandidate():
                self.candidate = 0
            case SwitchToCandidate():
                assert self.candidate
                self.main, self.candidate = self.candidate, 0
                self.changes_s.append(self.now_s)
                self._end_outage()
                self._maybe_fail_later()
            case PublishEvent(code):
                self.events[code] += 1
            case GiveUp():
                raise AssertionError("nothing here is a reason to give up")

    def _preferred_device(self) -> EffectiveDevice:
        return "tensorrt" if self.requested == "tensorrt" else "cuda"

    def _maybe_fail_later(self) -> None:
        if self.gpu == "shaky":
            self.schedule(self.random.uniform(0.1, 20), partial(self._fail_gpu, self.main))

    def _engine_opened(self, child: int, device: EffectiveDevice | None) -> None:
        if child != self.main:
            return
        usable = self.gpu in ("fine", "lies", "shaky")
        if device is None and not usable and self.policy == "hold" and self.requested != "auto":
            self.main = 0
            self.counts["held"] += 1
            self.apply_steps(
                self.recovery_policy.handle(
                    EngineStartFailed("no device", died=False, code=ReasonCode.NO_DEVICE), self.now_s
                )
            )
            return
        if (
            self.recovery_policy.serving is None
            and self.counts["opened"]
            and self.random.random() < 0.2 * self.cpu_dies
        ):
            self.main = 0
            self.apply_steps(self.recovery_policy.handle(EngineStartFailed("no memory", died=True), self.now_s))
            return
        effective: EffectiveDevice = "cpu" if device == "cpu" or not usable else self._preferred_device()
        self.counts["opened"] += 1
        self.counts["opened again"] += self.counts["opened"] + self.counts["held"] > 1
        self._end_outage()
        self.apply_steps(self.recovery_policy.handle(EngineReady(effective, OK if effective != "cpu" else LOST), self.now_s))
        if effective == "cpu" and self.cpu_dies and self.random.random() < 0.2:
            self.schedule(self.random.uniform(1, 300), partial(self._cpu_worker_dies, child))
        elif effective != "cpu":
            self._maybe_fail_later()

    def _cpu_worker_dies(self, child: int) -> None:
        if child != self.main:
            return
        self.main = 0
        self.counts["cpu lost"] += 1
        self._begin_outage()
        self.apply_steps(self.recovery_policy.handle(EngineExited(Fault.DIED, "died"), self.now_s))

    def _device_probed(self, device: EffectiveDevice) -> None:
        verdict = ABSENT if self.gpu in ("absent", "hangs") else OK
        self.apply_steps(self.recovery_policy.handle(DeviceProbed(device, verdict), self.now_s))

    def _candidate_opened(self, child: int) -> None:
        if child != self.candidate:
            return
        if self.gpu in ("absent", "hangs", "opens-not", "dies-opening"):
            self.candidate = 0
            self.apply_steps(self.recovery_policy.handle(CandidateFailed(LOST), self.now_s))
        else:
            self.apply_steps(self.recovery_policy.handle(CandidateReady(), self.now_s))

    def _candidate_compared(self, child: int) -> None:
        if child == self.candidate:
            refusal = "only 3 % of the rows agree" if self.gpu == "lies" else None
            self.counts["refused"] += refusal is not None
            self.apply_steps(self.recovery_policy.handle(CandidateCompared(refusal, "alike"), self.now_s))
