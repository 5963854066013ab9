"""The recovery ladder, without any process: what it decides; and that it is never stuck, whatever fails."""

import itertools

import pytest

from failing_worlds import ABSENT, GPU_STATES, LOST, OK, WORDS, World
from visionedge.engine.device.devices import Reason, Requested, Verdict, wishes
from visionedge.engine.device.faults import Fault
from visionedge.engine.process.recovery_policy import (
    ChangeOver,
    Compare,
    Dismiss,
    GiveUp,
    Ladder,
    Patience,
    Policy,
    Prepare,
    Probe,
    Serve,
    Step,
    Stop,
    Tell,
)

PLAIN = Patience(first_s=5, most_s=40, window_s=30, healthy_s=100, jitter=0)


def on_the_gpu(policy: Policy = "degrade", requested: Requested = "auto") -> Ladder:
    ladder = Ladder(requested, policy, PLAIN)
    assert ladder.begin() == [Serve(None)]
    assert ladder.opened("cuda", OK, 0) == []
    return ladder


def told(steps: list[Step]) -> list[str]:
    return [step.code for step in steps if isinstance(step, Tell)]


def back(ladder: Ladder, now_s: float) -> None:
    """All the way back, in no time."""
    assert ladder.tick(now_s) == [Probe("cuda")]
    assert ladder.probed("cuda", OK, now_s) == [Prepare("cuda")]
    assert ladder.prepared(now_s) == [Compare()]
    assert isinstance(ladder.compared(None, "alike", now_s)[0], ChangeOver)


# --- one thing at a time ------------------------------------------------------------------------------------


def test_a_lost_device_is_told_and_the_cpu_serves_at_once_for_that_reason() -> None:
    ladder = on_the_gpu()
    stop, tell, serve = ladder.fault(Fault.STICKY, WORDS, 10)
    assert stop == Stop(WORDS)
    assert tell == Tell("device-lost", f"cuda is lost: {WORDS}; the CPU takes over")
    assert serve == Serve("cpu", LOST)
    assert ladder.opened("cpu", LOST, 12) == [Tell("engine-back", "")]
    assert ladder.outlook(12).reason == LOST


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.HANG, Reason.RUN_TIMEOUT),
        (Fault.DIED, Reason.ENGINE_DIED),
        (Fault.GARBAGE, Reason.WRONG_ROWS),
        (Fault.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (Fault.REFUSED, Reason.DEVICE_FAILED),
    ],
)
def test_each_fault_gives_the_cpu_its_reason_code(fault: Fault, code: Reason) -> None:
    *_, serve = on_the_gpu().fault(fault, "because", 10)
    assert serve == Serve("cpu", Verdict(code, "because"))


def test_the_way_back_is_probe_candidate_comparison_and_then_one_change_over() -> None:
    ladder = on_the_gpu()
    ladder.ended(Fault.DIED, WORDS, 10)
    ladder.opened("cpu", LOST, 12)
    assert ladder.due_s() == 15
    assert ladder.tick(14.9) == []
    assert ladder.tick(15) == [Probe("cuda")]
    assert ladder.due_s() is None
    assert ladder.probed("cuda", OK, 17) == [Prepare("cuda")]
    assert ladder.prepared(25) == [Compare()]
    assert ladder.serving == "cpu"
    over, tell = ladder.compared(None, "12 rows are alike", 26)
    assert (over, tell) == (ChangeOver(), Tell("device-back", "cuda is back: 12 rows are alike"))
    assert (ladder.serving, ladder.due_s(), ladder.outlook(26).stage) == ("cuda", None, "settled")


def test_a_vain_try_doubles_the_wait_up_to_a_limit() -> None:
    ladder = on_the_gpu()
    ladder.fault(Fault.GONE, WORDS, 0)
    waits, now_s = [], 0.0
    for _ in range(5):
        due_s = ladder.due_s()
        assert due_s is not None
        waits.append(due_s - now_s)
        now_s = due_s
        assert ladder.tick(now_s) == [Probe("cuda")]
        assert ladder.probed("cuda", ABSENT, now_s) == []
    assert waits == [5, 10, 20, 40, 40]
    assert (ladder.outlook(now_s).vain, ladder.outlook(now_s).reason) == (5, ABSENT)


def test_waits_vary_so_that_modules_do_not_ask_in_step() -> None:
    chances = iter((0.0, 0.5, 1.0))
    for due_s in (4.0, 5.0, 6.0):
        ladder = Ladder("auto", "degrade", Patience(first_s=5, jitter=0.2), chances.__next__)
        ladder.begin()
        ladder.opened("cpu", ABSENT, 0)
        assert ladder.due_s() == pytest.approx(due_s)


def test_change_overs_lie_a_window_apart_and_a_device_that_flaps_waits_ever_longer() -> None:
    """After a long time without a loss all is forgiven."""
    ladder = on_the_gpu()
    starts = []
    now_s = 0.0
    for _ in range(4):
        ladder.ended(Fault.DIED, WORDS, now_s)
        due_s = ladder.due_s()
        assert due_s is not None
        starts.append(due_s - now_s)
        back(ladder, due_s)
        now_s = due_s + 1
    assert starts == [5, 29, 29, 40]  # the window counts from the last change-over, a second before the loss
    ladder.ended(Fault.DIED, WORDS, now_s + 100)
    assert ladder.due_s() == now_s + 105


def test_a_candidate_that_answers_otherwise_than_the_cpu_stays_out_and_that_is_told_once() -> None:
    ladder = on_the_gpu()
    ladder.fault(Fault.STICKY, WORDS, 0)
    tellings = []
    for now_s in (5, 15):
        assert ladder.tick(now_s) == [Probe("cuda")]
        ladder.probed("cuda", OK, now_s)
        ladder.prepared(now_s)
        steps = ladder.compared("only 3 % of the rows agree", "", now_s)
        assert steps[0] == Dismiss()
        tellings += told(steps)
    assert tellings == ["parity-refused"]
    assert ladder.outlook(15).reason == Verdict(Reason.PARITY_REFUSED, "only 3 % of the rows agree")


def test_a_device_that_was_absent_at_the_start_is_looked_for() -> None:
    """But not where the CPU was asked for, nor where this build cannot use any."""
    for code, looked_for in (
        (Reason.DRIVER_MISSING, True),
        (Reason.PROBE_TIMEOUT, True),
        (Reason.NO_GPU_BUILD, False),
        (Reason.ASKED_CPU, False),
    ):
        ladder = Ladder("auto", "degrade", PLAIN)
        ladder.begin()
        assert ladder.opened("cpu", Verdict(code, "because"), 0) == []
        assert (ladder.due_s() == 5) is looked_for


def test_tensorrt_is_probed_before_cuda() -> None:
    ladder = Ladder("tensorrt", "degrade", PLAIN)
    ladder.begin()
    ladder.opened("cpu", ABSENT, 0)
    assert ladder.tick(5) == [Probe("tensorrt")]
    assert ladder.probed("tensorrt", ABSENT, 6) == [Probe("cuda")]
    assert ladder.probed("cuda", OK, 7) == [Prepare("cuda")]


def test_on_the_cpu_a_process_that_died_is_started_again_at_once_and_then_ever_later() -> None:
    ladder = Ladder("cpu", "degrade", PLAIN)
    reason = Verdict(Reason.ASKED_CPU, "the CPU was asked for")
    ladder.begin()
    ladder.opened("cpu", reason, 0)
    assert ladder.fault(Fault.REFUSED, WORDS, 1) == [], "it is the model's fault"
    lost = Tell("engine-lost", "died; another one is started")
    assert ladder.ended(Fault.DIED, "died", 2) == [lost, Serve("cpu", reason)]
    assert ladder.refused("no memory", 3, died=True) == []
    assert ladder.tick(3.9) == []
    assert ladder.tick(4) == [Serve("cpu", reason)]
    assert ladder.opened("cpu", reason, 5) == [Tell("engine-back", "")]
    assert ladder.ended(Fault.DIED, "died", 6) == [lost]
    assert ladder.due_s() == 8
    ladder.tick(8)
    ladder.opened("cpu", reason, 9)
    assert len(ladder.ended(Fault.DIED, "died", 100)) == 2, "it lived long: at once again"


def test_a_cpu_that_was_to_be_started_again_is_not_when_the_device_is_back_first() -> None:
    ladder = on_the_gpu()
    ladder.fault(Fault.STICKY, WORDS, 0)
    assert ladder.refused("no memory", 1, died=True) == []
    assert ladder.tick(1) == [Serve("cpu", LOST)]
    assert ladder.refused("no memory", 4.5, died=True) == [], "it is tried again at 5.5"
    back(ladder, 5)
    assert ladder.due_s() is None
    assert ladder.tick(100) == []


def test_hold_computes_nothing_on_the_cpu() -> None:
    ladder = on_the_gpu("hold")
    stop, tell = ladder.fault(Fault.STICKY, WORDS, 10)
    assert stop == Stop(WORDS)
    assert isinstance(tell, Tell)
    assert "waiting for it (inference.fallback: hold)" in tell.words
    back(ladder, 15)
    assert ladder.serving == "cuda"


def test_another_policy_counts_at_once_for_a_device_that_is_lost() -> None:
    """From hold to degrade the CPU takes over, and the device is looked for as before; and the other way."""
    ladder = on_the_gpu("hold", "cuda")
    ladder.ended(Fault.DIED, WORDS, 10)
    assert ladder.serving is None
    steps = ladder.follow("degrade")
    assert told(steps) == ["device-lost"]
    assert isinstance(steps[-1], Serve)
    assert steps[-1].device == "cpu"
    ladder.opened("cpu", LOST, 12)
    assert ladder.outlook(12).stage == "waiting"
    stop, tell = ladder.follow("hold")
    assert isinstance(stop, Stop)
    assert isinstance(tell, Tell)
    assert (tell.code, ladder.serving) == ("device-held", None)
    back(ladder, 15)


def test_another_policy_lets_a_first_engine_begin_that_waits_for_its_device() -> None:
    ladder = Ladder("cuda", "hold", PLAIN)
    ladder.begin()
    assert told(ladder.refused(WORDS, 0, died=False, code=Reason.NO_DEVICE)) == ["device-held"]
    assert isinstance(ladder.follow("degrade")[-1], Serve)
    assert ladder.follow("degrade") == []


def test_another_policy_changes_nothing_while_the_device_computes() -> None:
    ladder = on_the_gpu("degrade")
    assert ladder.follow("exit") == []
    assert [step.ends for step in ladder.ended(Fault.DIED, WORDS, 10) if isinstance(step, Tell)] == [True]


def test_a_first_process_that_was_killed_gets_one_more_try() -> None:
    """A signal from outside says nothing of the model: what it is opened for stays the same, once."""
    ladder = Ladder("cpu", "degrade", PLAIN)
    first = ladder.begin()
    assert ladder.refused(WORDS, 0, died=True, killed=True) == first
    assert isinstance(ladder.refused(WORDS, 1, died=True, killed=True)[0], GiveUp)
    other = Ladder("cpu", "degrade", PLAIN)
    other.begin()
    assert isinstance(other.refused(WORDS, 0, died=True)[0], GiveUp)


def test_hold_waits_for_a_demanded_device_from_the_start_on() -> None:
    ladder = Ladder("cuda", "hold", PLAIN)
    ladder.begin()
    assert told(ladder.refused("libcuda.so.1 is missing", 0, died=False, code=Reason.DRIVER_MISSING)) == [
        "device-held"
    ]
    back(ladder, 5)
    assert ladder.serving == "cuda"


def test_exit_ends_the_module_with_the_reason_when_a_device_is_lost() -> None:
    ladder = on_the_gpu("exit")
    steps = ladder.ended(Fault.HANG, "gave no answer", 10)
    assert told(steps) == ["device-lost"]
    assert steps[-1] == GiveUp(Verdict(Reason.RUN_TIMEOUT, "gave no answer"))
    assert ladder.tick(1000) == []


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_first_process_that_dies_over_a_device_leaves_the_cpu(requested: Requested) -> None:
    """And when that one dies too, it is the model's fault."""
    ladder = Ladder(requested, "degrade", PLAIN)
    ladder.begin()
    verdict = Verdict(Reason.ENGINE_DIED, "died of signal 11")
    assert ladder.refused("died of signal 11", 1, died=True) == [Serve("cpu", verdict)]
    assert ladder.refused("died of signal 11", 2, died=True) == [GiveUp(None)]


def test_what_cannot_be_opened_at_all_is_given_up() -> None:
    """A model that is refused, with any device; a device that was demanded, with `exit`."""
    ladder = Ladder("auto", "degrade", PLAIN)
    ladder.begin()
    assert ladder.refused("gives no numbers", 1, died=False) == [GiveUp(None)]
    ladder = Ladder("cuda", "exit", PLAIN)
    ladder.begin()
    steps = ladder.refused("no device", 1, died=False, code=Reason.NO_DEVICE)
    assert steps == [GiveUp(Verdict(Reason.NO_DEVICE, "no device"))]


# --- 200 worlds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_whatever_fails_it_is_never_stuck_never_silent_and_never_hasty(seed: int) -> None:
    world = World(seed)
    world.gpu = world.random.choice(GPU_STATES)
    world.weather(3600)
    world.do(world.ladder.begin())
    world.live(3600)
    assert world.ladder.serving is not None or world.policy == "hold" or world.main

    # Nothing fails any more: it comes back by itself, and then nothing is left to do.
    world.gpu, world.cpu_dies = "fine", False
    world.live(3600 + 3 * world.patience.most_s)
    assert world.ladder.serving in wishes(world.requested)[:-1]
    assert world.ladder.due_s() is None
    assert world.dark_since_s is None

    # Everything that changed was told, once.
    assert world.told["device-lost"] == world.happened["gpu lost"]
    assert world.told["device-back"] == len(world.changes_s)
    assert world.told["engine-lost"] == world.happened["cpu lost"]
    assert world.told["engine-back"] == world.happened["opened again"]
    assert world.told["device-held"] == world.happened["held"]
    assert (world.told["parity-refused"] > 0) == (world.happened["refused"] > 0)
    assert world.told["parity-refused"] <= world.happened["refused"]

    gaps_s = [b - a for a, b in itertools.pairwise(world.changes_s)]
    assert all(gap_s >= world.patience.window_s for gap_s in gaps_s)
    tries_s = [b - a for a, b in itertools.pairwise(world.attempts_s)]
    assert all(gap_s >= world.patience.first_s * (1 - world.patience.jitter) for gap_s in tries_s)


def test_with_degrade_the_cpu_serves_as_soon_as_it_can_be_opened() -> None:
    """With CPU children that live, nothing is dark for longer than one of them takes to open."""
    for seed in range(50):
        world = World(seed)
        world.policy = "degrade"
        world.ladder = Ladder(world.requested, "degrade", world.patience, world.random.random)
        world.cpu_dies = False
        world.weather(3600)
        world.do(world.ladder.begin())
        world.live(4000)
        assert max(world.dark_s) <= 2.0 + 1e-6, seed
