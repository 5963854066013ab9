"""The recovery policy, without any process: the steps it gives; and that it is never stuck."""

import itertools
from typing import cast

import pytest

from gpu_fault_simulation import ABSENT, GPU_STATES, LOST, LOST_TEXT, OK, GpuFaultSimulation
from visionedge.engine.device.devices import DeviceVerdict, ReasonCode, RequestedDevice, device_preference
from visionedge.engine.device.faults import Fault
from visionedge.engine.interface import FallbackPolicy
from visionedge.engine.process.recovery_policy import (
    CandidateCompared,
    CandidateReady,
    CompareCandidate,
    DeviceProbed,
    EngineExited,
    EngineFailed,
    EngineReady,
    EngineStartFailed,
    FallbackChanged,
    GiveUp,
    ProbeDevice,
    PublishEvent,
    RecoveryPolicy,
    RecoveryTiming,
    Start,
    StartCandidate,
    StartEngine,
    Step,
    StopCandidate,
    StopEngine,
    SwitchToCandidate,
    TimePassed,
)

PLAIN = RecoveryTiming(first_wait_s=5, max_wait_s=40, min_interval_s=30, healthy_s=100, jitter=0)


def on_the_gpu(policy: FallbackPolicy = "degrade", requested: RequestedDevice = "auto") -> RecoveryPolicy:
    recovery_policy = RecoveryPolicy(requested, policy, PLAIN)
    assert recovery_policy.handle(Start(), 0) == [StartEngine(None)]
    assert recovery_policy.handle(EngineReady("cuda", OK), 0) == []
    return recovery_policy


def events(steps: list[Step]) -> list[str]:
    return [step.code for step in steps if isinstance(step, PublishEvent)]


def return_device(recovery_policy: RecoveryPolicy, now_s: float) -> None:
    """Let the device return without a delay."""
    assert recovery_policy.handle(TimePassed(), now_s) == [ProbeDevice("cuda")]
    assert recovery_policy.handle(DeviceProbed("cuda", OK), now_s) == [StartCandidate("cuda")]
    assert recovery_policy.handle(CandidateReady(), now_s) == [CompareCandidate()]
    assert isinstance(recovery_policy.handle(CandidateCompared(None, "alike"), now_s)[0], SwitchToCandidate)


# --- one thing at a time ------------------------------------------------------------------------------------


def test_a_lost_device_is_reported_and_the_cpu_serves_at_once_with_the_reason() -> None:
    recovery_policy = on_the_gpu()
    stop, publish, serve = recovery_policy.handle(EngineFailed(Fault.STICKY, LOST_TEXT), 10)
    assert stop == StopEngine(LOST_TEXT)
    assert publish == PublishEvent("device-lost", f"cuda is lost: {LOST_TEXT}; the CPU takes over")
    assert serve == StartEngine("cpu", LOST)
    assert recovery_policy.handle(EngineReady("cpu", LOST), 12) == [PublishEvent("engine-back", "")]
    assert recovery_policy.recovery_state().reason == LOST


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.HANG, ReasonCode.RUN_TIMEOUT),
        (Fault.DIED, ReasonCode.ENGINE_DIED),
        (Fault.INVALID_OUTPUT, ReasonCode.INVALID_OUTPUT),
        (Fault.OUT_OF_MEMORY, ReasonCode.OUT_OF_MEMORY),
        (Fault.REFUSED, ReasonCode.DEVICE_FAILED),
    ],
)
def test_each_fault_has_its_reason_code_on_the_cpu(fault: Fault, code: ReasonCode) -> None:
    *_, serve = on_the_gpu().handle(EngineFailed(fault, "because"), 10)
    assert serve == StartEngine("cpu", DeviceVerdict(code, "because"))


def test_recovery_is_probe_candidate_comparison_and_one_switch() -> None:
    recovery_policy = on_the_gpu()
    recovery_policy.handle(EngineExited(Fault.DIED, LOST_TEXT), 10)
    recovery_policy.handle(EngineReady("cpu", LOST), 12)
    assert recovery_policy.due_s() == 15
    assert recovery_policy.handle(TimePassed(), 14.9) == []
    assert recovery_policy.handle(TimePassed(), 15) == [ProbeDevice("cuda")]
    assert recovery_policy.due_s() is None
    assert recovery_policy.handle(DeviceProbed("cuda", OK), 17) == [StartCandidate("cuda")]
    assert recovery_policy.handle(CandidateReady(), 25) == [CompareCandidate()]
    assert recovery_policy.serving == "cpu"
    over, publish = recovery_policy.handle(CandidateCompared(None, "12 rows are alike"), 26)
    assert (over, publish) == (
        SwitchToCandidate(),
        PublishEvent("device-back", "cuda is back: 12 rows are alike"),
    )
    assert (recovery_policy.serving, recovery_policy.due_s(), recovery_policy.recovery_state().stage) == (
        "cuda",
        None,
        "settled",
    )


def test_a_failed_attempt_doubles_the_wait_up_to_a_limit() -> None:
    recovery_policy = on_the_gpu()
    recovery_policy.handle(EngineFailed(Fault.GONE, LOST_TEXT), 0)
    waits, now_s = [], 0.0
    for _ in range(5):
        due_s = recovery_policy.due_s()
        assert due_s is not None
        waits.append(due_s - now_s)
        now_s = due_s
        assert recovery_policy.handle(TimePassed(), now_s) == [ProbeDevice("cuda")]
        assert recovery_policy.handle(DeviceProbed("cuda", ABSENT), now_s) == []
    assert waits == [5, 10, 20, 40, 40]
    assert (
        recovery_policy.recovery_state().failed_attempts,
        recovery_policy.recovery_state().reason,
    ) == (5, ABSENT)


def test_waits_have_jitter() -> None:
    chances = iter((0.0, 0.5, 1.0))
    for due_s in (5.0, 4.5, 4.0):
        recovery_policy = RecoveryPolicy(
            "auto", "degrade", RecoveryTiming(first_wait_s=5, jitter=0.2), chances.__next__
        )
        recovery_policy.handle(Start(), 0)
        recovery_policy.handle(EngineReady("cpu", ABSENT), 0)
        assert recovery_policy.due_s() == pytest.approx(due_s)


def test_switches_are_a_window_apart_and_a_flapping_device_waits_longer_each_time() -> None:
    """After a long time without a loss all is forgiven."""
    recovery_policy = on_the_gpu()
    starts = []
    now_s = 0.0
    for _ in range(4):
        recovery_policy.handle(EngineExited(Fault.DIED, LOST_TEXT), now_s)
        due_s = recovery_policy.due_s()
        assert due_s is not None
        starts.append(due_s - now_s)
        return_device(recovery_policy, due_s)
        now_s = due_s + 1
    assert starts == [5, 29, 29, 40]  # the window counts from the last change-over, a second before the loss
    recovery_policy.handle(EngineExited(Fault.DIED, LOST_TEXT), now_s + 100)
    assert recovery_policy.due_s() == now_s + 105


def test_a_candidate_that_disagrees_with_the_cpu_is_rejected_and_reported_once() -> None:
    recovery_policy = on_the_gpu()
    recovery_policy.handle(EngineFailed(Fault.STICKY, LOST_TEXT), 0)
    tellings = []
    for now_s in (5, 15):
        assert recovery_policy.handle(TimePassed(), now_s) == [ProbeDevice("cuda")]
        recovery_policy.handle(DeviceProbed("cuda", OK), now_s)
        recovery_policy.handle(CandidateReady(), now_s)
        steps = recovery_policy.handle(CandidateCompared("only 3 % of the rows agree", ""), now_s)
        assert steps[0] == StopCandidate()
        tellings += events(steps)
    assert tellings == ["parity-refused"]
    assert recovery_policy.recovery_state().reason == DeviceVerdict(
        ReasonCode.PARITY_REFUSED, "only 3 % of the rows agree"
    )


def test_a_device_that_was_absent_at_the_start_is_probed() -> None:
    """But not if the CPU was requested, nor if this build cannot use any device."""
    for code, looked_for in (
        (ReasonCode.DRIVER_MISSING, True),
        (ReasonCode.PROBE_TIMEOUT, True),
        (ReasonCode.NO_GPU_BUILD, False),
        (ReasonCode.CPU_REQUESTED, False),
    ):
        recovery_policy = RecoveryPolicy("auto", "degrade", PLAIN)
        recovery_policy.handle(Start(), 0)
        assert recovery_policy.handle(EngineReady("cpu", DeviceVerdict(code, "because")), 0) == []
        assert (recovery_policy.due_s() == 5) is looked_for


def test_tensorrt_is_probed_before_cuda() -> None:
    recovery_policy = RecoveryPolicy("tensorrt", "degrade", PLAIN)
    recovery_policy.handle(Start(), 0)
    recovery_policy.handle(EngineReady("cpu", ABSENT), 0)
    assert recovery_policy.handle(TimePassed(), 5) == [ProbeDevice("tensorrt")]
    assert recovery_policy.handle(DeviceProbed("tensorrt", ABSENT), 6) == [ProbeDevice("cuda")]
    assert recovery_policy.handle(DeviceProbed("cuda", OK), 7) == [StartCandidate("cuda")]


def test_on_the_cpu_a_dead_process_restarts_at_once_and_then_with_growing_waits() -> None:
    recovery_policy = RecoveryPolicy("cpu", "degrade", PLAIN)
    reason = DeviceVerdict(ReasonCode.CPU_REQUESTED, "the CPU was asked for")
    recovery_policy.handle(Start(), 0)
    recovery_policy.handle(EngineReady("cpu", reason), 0)
    assert recovery_policy.handle(EngineFailed(Fault.REFUSED, LOST_TEXT), 1) == [], "it is the model's fault"
    lost = PublishEvent("engine-lost", "died; restarting")
    assert recovery_policy.handle(EngineExited(Fault.DIED, "died"), 2) == [lost, StartEngine("cpu", reason)]
    assert recovery_policy.handle(EngineStartFailed("no memory", died=True), 3) == []
    assert recovery_policy.handle(TimePassed(), 3.9) == []
    assert recovery_policy.handle(TimePassed(), 4) == [StartEngine("cpu", reason)]
    assert recovery_policy.handle(EngineReady("cpu", reason), 5) == [PublishEvent("engine-back", "")]
    assert recovery_policy.handle(EngineExited(Fault.DIED, "died"), 6) == [
        PublishEvent("engine-lost", "died; restarting in 2 s")
    ]
    assert recovery_policy.due_s() == 8
    recovery_policy.handle(TimePassed(), 8)
    recovery_policy.handle(EngineReady("cpu", reason), 9)
    assert len(recovery_policy.handle(EngineExited(Fault.DIED, "died"), 100)) == 2, (
        "it lived long: at once again"
    )


def test_where_openvino_dies_twice_in_a_short_time_onnxruntime_computes() -> None:
    """A second time after long is another accident, and `hold` and `exit` forbid the exchange."""
    reason = DeviceVerdict(ReasonCode.CPU_REQUESTED, "the CPU was requested")
    for fallback, expected in (("degrade", "onnxruntime takes over"), ("exit", "restarting in 1 s")):
        policy = RecoveryPolicy("cpu", cast("FallbackPolicy", fallback), PLAIN, runtime="openvino")
        policy.handle(Start(), 0)
        policy.handle(EngineReady("cpu", reason, "openvino"), 0)
        lost, again = policy.handle(EngineExited(Fault.DIED, "signal 11"), 5)
        assert lost == PublishEvent("engine-lost", "signal 11; restarting")
        assert again == StartEngine("cpu", reason)
        policy.handle(EngineReady("cpu", reason, "openvino"), 6)
        lost, *then = policy.handle(EngineExited(Fault.DIED, "signal 11"), 8)
        assert lost == PublishEvent("engine-lost", f"signal 11; {expected}")
        left = DeviceVerdict(ReasonCode.RUNTIME_REFUSED, "OpenVINO failed: signal 11")
        assert then == ([StartEngine("cpu", left)] if fallback == "degrade" else [])


def test_where_openvino_dies_while_it_opens_onnxruntime_computes() -> None:
    policy = RecoveryPolicy("cpu", "degrade", PLAIN, runtime="openvino")
    policy.handle(Start(), 0)
    left = DeviceVerdict(ReasonCode.RUNTIME_REFUSED, "OpenVINO failed: signal 11")
    assert policy.handle(EngineStartFailed("signal 11", died=True), 1) == [StartEngine("cpu", left)]
    assert policy.handle(EngineStartFailed("signal 11", died=True), 2) == [GiveUp(None)]
    policy = RecoveryPolicy("auto", "degrade", PLAIN, runtime="openvino")
    policy.handle(Start(), 0)
    (first,) = policy.handle(EngineStartFailed("signal 11", died=True), 1)
    assert first == StartEngine("cpu", DeviceVerdict(ReasonCode.ENGINE_DIED, "signal 11"))
    assert policy.handle(EngineStartFailed("signal 11", died=True), 2) == [StartEngine("cpu", left)]


def test_a_pending_cpu_restart_is_cancelled_if_the_device_returns_first() -> None:
    recovery_policy = on_the_gpu()
    recovery_policy.handle(EngineFailed(Fault.STICKY, LOST_TEXT), 0)
    assert recovery_policy.handle(EngineStartFailed("no memory", died=True), 1) == []
    assert recovery_policy.handle(TimePassed(), 1) == [StartEngine("cpu", LOST)]
    assert recovery_policy.handle(EngineStartFailed("no memory", died=True), 4.5) == [], (
        "it is tried again at 5.5"
    )
    return_device(recovery_policy, 5)
    assert recovery_policy.due_s() is None
    assert recovery_policy.handle(TimePassed(), 100) == []


def test_hold_computes_nothing_on_the_cpu() -> None:
    recovery_policy = on_the_gpu("hold")
    stop, publish = recovery_policy.handle(EngineFailed(Fault.STICKY, LOST_TEXT), 10)
    assert stop == StopEngine(LOST_TEXT)
    assert isinstance(publish, PublishEvent)
    assert "waiting for it (inference.fallback: hold)" in publish.message
    return_device(recovery_policy, 15)
    assert recovery_policy.serving == "cuda"


def test_a_new_policy_applies_at_once_to_a_lost_device() -> None:
    """From hold to degrade the CPU takes over while the device is probed; and the other way."""
    recovery_policy = on_the_gpu("hold", "cuda")
    recovery_policy.handle(EngineExited(Fault.DIED, LOST_TEXT), 10)
    assert recovery_policy.serving is None
    steps = recovery_policy.handle(FallbackChanged("degrade"), 0)
    assert events(steps) == ["device-lost"]
    assert isinstance(steps[-1], StartEngine)
    assert steps[-1].device == "cpu"
    recovery_policy.handle(EngineReady("cpu", LOST), 12)
    assert recovery_policy.recovery_state().stage == "waiting"
    stop, publish = recovery_policy.handle(FallbackChanged("hold"), 0)
    assert isinstance(stop, StopEngine)
    assert isinstance(publish, PublishEvent)
    assert (publish.code, recovery_policy.serving) == ("device-held", None)
    return_device(recovery_policy, 15)


def test_a_new_policy_starts_a_first_engine_that_waits_for_its_device() -> None:
    recovery_policy = RecoveryPolicy("cuda", "hold", PLAIN)
    recovery_policy.handle(Start(), 0)
    assert events(
        recovery_policy.handle(EngineStartFailed(LOST_TEXT, died=False, code=ReasonCode.NO_DEVICE), 0)
    ) == ["device-held"]
    assert isinstance(recovery_policy.handle(FallbackChanged("degrade"), 0)[-1], StartEngine)
    assert recovery_policy.handle(FallbackChanged("degrade"), 0) == []


def test_a_new_policy_changes_nothing_while_the_device_computes() -> None:
    recovery_policy = on_the_gpu("degrade")
    assert recovery_policy.handle(FallbackChanged("exit"), 0) == []
    assert [
        step.ends
        for step in recovery_policy.handle(EngineExited(Fault.DIED, LOST_TEXT), 10)
        if isinstance(step, PublishEvent)
    ] == [True]


def test_a_killed_first_process_is_started_once_more() -> None:
    """A signal from outside is not blamed on the model: the same start is repeated once."""
    recovery_policy = RecoveryPolicy("cpu", "degrade", PLAIN)
    first = recovery_policy.handle(Start(), 0)
    assert recovery_policy.handle(EngineStartFailed(LOST_TEXT, died=True, killed=True), 0) == first
    assert isinstance(
        recovery_policy.handle(EngineStartFailed(LOST_TEXT, died=True, killed=True), 1)[0], GiveUp
    )
    other = RecoveryPolicy("cpu", "degrade", PLAIN)
    other.handle(Start(), 0)
    assert isinstance(other.handle(EngineStartFailed(LOST_TEXT, died=True), 0)[0], GiveUp)


def test_hold_waits_for_a_demanded_device_from_the_start() -> None:
    recovery_policy = RecoveryPolicy("cuda", "hold", PLAIN)
    recovery_policy.handle(Start(), 0)
    assert events(
        recovery_policy.handle(
            EngineStartFailed("libcuda.so.1 is missing", died=False, code=ReasonCode.DRIVER_MISSING), 0
        )
    ) == ["device-held"]
    return_device(recovery_policy, 5)
    assert recovery_policy.serving == "cuda"


def test_exit_ends_the_module_with_the_reason_when_a_device_is_lost() -> None:
    recovery_policy = on_the_gpu("exit")
    steps = recovery_policy.handle(EngineExited(Fault.HANG, "gave no answer"), 10)
    assert events(steps) == ["device-lost"]
    assert steps[-1] == GiveUp(DeviceVerdict(ReasonCode.RUN_TIMEOUT, "gave no answer"))
    assert recovery_policy.handle(TimePassed(), 1000) == []


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_first_process_that_a_device_kills_falls_back_to_the_cpu(requested: RequestedDevice) -> None:
    """And when that one dies too, it is the model's fault."""
    recovery_policy = RecoveryPolicy(requested, "degrade", PLAIN)
    recovery_policy.handle(Start(), 0)
    verdict = DeviceVerdict(ReasonCode.ENGINE_DIED, "died of signal 11")
    assert recovery_policy.handle(EngineStartFailed("died of signal 11", died=True), 1) == [
        StartEngine("cpu", verdict)
    ]
    assert recovery_policy.handle(EngineStartFailed("died of signal 11", died=True), 2) == [GiveUp(None)]


def test_a_model_that_cannot_be_opened_at_all_ends_the_attempts() -> None:
    """A model that is refused, with any device; a device that was demanded, with `exit`."""
    recovery_policy = RecoveryPolicy("auto", "degrade", PLAIN)
    recovery_policy.handle(Start(), 0)
    assert recovery_policy.handle(EngineStartFailed("gives no numbers", died=False), 1) == [GiveUp(None)]
    recovery_policy = RecoveryPolicy("cuda", "exit", PLAIN)
    recovery_policy.handle(Start(), 0)
    steps = recovery_policy.handle(EngineStartFailed("no device", died=False, code=ReasonCode.NO_DEVICE), 1)
    assert steps == [GiveUp(DeviceVerdict(ReasonCode.NO_DEVICE, "no device"))]


# --- 200 worlds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_random_faults_never_leave_the_policy_stuck_silent_or_hasty(seed: int) -> None:
    simulation = GpuFaultSimulation(seed)
    simulation.gpu = simulation.random.choice(GPU_STATES)
    simulation.schedule_gpu_states(3600)
    simulation.apply_steps(simulation.recovery_policy.handle(Start(), 0))
    simulation.run_until(3600)
    assert simulation.recovery_policy.serving is not None or simulation.policy == "hold" or simulation.main

    # Without faults it recovers, and then nothing is left to do.
    simulation.gpu, simulation.cpu_dies = "fine", False
    simulation.run_until(3600 + 3 * simulation.timing.max_wait_s)
    assert simulation.recovery_policy.serving in device_preference(simulation.requested)[:-1]
    assert simulation.recovery_policy.due_s() is None
    assert simulation.outage_since_s is None

    # Every change was reported once.
    assert simulation.events["device-lost"] == simulation.counts["gpu lost"]
    assert simulation.events["device-back"] == len(simulation.changes_s)
    assert simulation.events["engine-lost"] == simulation.counts["cpu lost"]
    assert simulation.events["engine-back"] == simulation.counts["opened again"]
    assert simulation.events["device-held"] == simulation.counts["held"]
    assert (simulation.events["parity-refused"] > 0) == (simulation.counts["refused"] > 0)
    assert simulation.events["parity-refused"] <= simulation.counts["refused"]

    gaps_s = [b - a for a, b in itertools.pairwise(simulation.changes_s)]
    assert all(gap_s >= simulation.timing.min_interval_s for gap_s in gaps_s)
    tries_s = [b - a for a, b in itertools.pairwise(simulation.attempts_s)]
    assert all(gap_s >= simulation.timing.first_wait_s * (1 - simulation.timing.jitter) for gap_s in tries_s)


def test_with_degrade_the_cpu_serves_once_it_can_be_opened() -> None:
    """With CPU children that live, nothing is dark for longer than one of them takes to open."""
    for seed in range(50):
        simulation = GpuFaultSimulation(seed)
        simulation.policy = "degrade"
        simulation.recovery_policy = RecoveryPolicy(
            simulation.requested, "degrade", simulation.timing, simulation.random.random
        )
        simulation.cpu_dies = False
        simulation.schedule_gpu_states(3600)
        simulation.apply_steps(simulation.recovery_policy.handle(Start(), 0))
        simulation.run_until(4000)
        assert max(simulation.outages_s) <= 2.0 + 1e-6, seed
