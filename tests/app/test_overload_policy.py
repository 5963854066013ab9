"""The overload ladder, decided on made-up sights and played in 200 simulated loads."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from visionedge.app.overload_policy import (
    DEGRADATION_LEVELS,
    DegradationLevel,
    DegradationPolicy,
    DegradationSettings,
    DegradationStep,
    Exhausted,
    LoadSnapshot,
    LoadState,
    RateRequest,
    ReturnLevel,
    TakeLevel,
    allocate_rates,
    max_return_delay_s,
    sum_of_minimums,
)

POLICY = DegradationSettings(DEGRADATION_LEVELS, after_s=15, back_after_s=60)
OVER = LoadSnapshot("over", demanded=40, delivered=10, min_total_per_s=2)
FINE = replace(OVER, load="fine")


@dataclass
class PolicyHarness:
    """A ladder that is shown a sight every five seconds, and what it did when."""

    degradation: DegradationPolicy = field(default_factory=DegradationPolicy)
    now_s: float = 0.0
    steps: list[tuple[float, DegradationStep]] = field(default_factory=list)

    def show(
        self, snapshot: LoadSnapshot | None, seconds: float, settings: DegradationSettings = POLICY
    ) -> list[DegradationStep]:
        """Show a sight for so long; the steps of that time."""
        before = len(self.steps)
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += 5
            self.steps += [
                (self.now_s, step) for step in self.degradation.decide(settings, snapshot, self.now_s)
            ]
        return [step for _, step in self.steps[before:]]


def test_levels_start_one_by_one_in_the_declared_order() -> None:
    assert PolicyHarness().show(OVER, 60) == [TakeLevel("variant"), TakeLevel("gate"), TakeLevel("fps", 10.0)]
    order: tuple[DegradationLevel, ...] = ("fps", "gate")
    taken = PolicyHarness().show(OVER, 65, replace(POLICY, levels=order))
    assert [step.level for step in taken if isinstance(step, TakeLevel)] == ["fps", "fps", "fps"]


def test_a_short_overload_changes_nothing() -> None:
    harness = PolicyHarness()
    for _ in range(20):
        assert harness.show(OVER, 15) == []
        assert harness.show(FINE, 5) == []


def test_a_level_without_effect_is_skipped() -> None:
    bare = replace(OVER, available_levels=frozenset[DegradationLevel]({"fps"}))
    assert PolicyHarness().show(bare, 20) == [TakeLevel("fps", 10.0)]


def test_the_fps_budget_is_the_delivered_rate_minus_a_tenth() -> None:
    bare = replace(OVER, delivered=20, available_levels=frozenset[DegradationLevel]({"fps"}))
    assert PolicyHarness().show(bare, 20) == [TakeLevel("fps", 18.0)]


def test_one_short_stall_does_not_lower_a_camera_to_the_minimum() -> None:
    stalled = replace(OVER, delivered=0, available_levels=frozenset[DegradationLevel]({"fps"}))
    assert PolicyHarness().show(stalled, 20) == [TakeLevel("fps", 10.0)]


def test_the_exhaustion_is_reported_once_until_the_load_was_normal() -> None:
    harness = PolicyHarness()
    only = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate"}))
    assert harness.show(only, 200) == [TakeLevel("gate"), Exhausted()]
    assert harness.degradation.exhausted
    harness.show(replace(only, load="fine", available_levels=frozenset[DegradationLevel]()), 55)
    assert harness.show(only, 200) == []
    harness.show(replace(only, load="fine"), 65)
    assert not harness.degradation.exhausted
    assert harness.show(only, 200) == [TakeLevel("gate"), Exhausted()]


def test_levels_end_in_reverse_order_and_fps_in_steps() -> None:
    harness = PolicyHarness()
    harness.show(OVER, 60)
    assert harness.show(FINE, 400) == [
        ReturnLevel("fps", 20.0),
        ReturnLevel("fps"),
        ReturnLevel("gate"),
        ReturnLevel("variant"),
    ]
    assert harness.degradation.active == {}


def test_limits_without_effect_end_even_on_a_busy_processor() -> None:
    harness = PolicyHarness()
    busy = replace(OVER, headroom=False, available_levels=frozenset[DegradationLevel]({"fps"}))
    harness.show(busy, 20)
    assert harness.show(replace(busy, load="fine"), 600) == []
    assert harness.show(replace(busy, load="fine", demanded=8), 70) == [ReturnLevel("fps")]


def test_a_level_that_is_needed_again_soon_is_kept_twice_as_long_each_time() -> None:
    harness = PolicyHarness()
    only = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate"}))
    kept_s = []
    for _ in range(7):
        harness.show(only, 20)
        taken_s = harness.now_s
        while harness.degradation.active:
            harness.show(replace(only, load="fine"), 5)
        kept_s.append(harness.now_s - taken_s - 5)  # it was fine from the first look on
    assert kept_s == [60, 120, 240, 480, 960, 1920, 1920]


def test_a_level_that_is_needed_again_much_later_ends_as_early_as_the_first_time() -> None:
    harness = PolicyHarness()
    only = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate"}))
    for _ in range(3):
        harness.show(only, 20)
        harness.show(replace(only, load="fine"), 65)
        assert harness.degradation.active == {}
        harness.show(replace(only, load="fine"), 300)
    assert harness.degradation.return_delay_s(POLICY, "gate") == 60


def test_measurements_before_a_gap_are_discarded() -> None:
    harness = PolicyHarness()
    for _ in range(20):
        assert harness.show(OVER, 15) == []
        assert harness.show(None, 5) == []


def test_an_inactive_policy_ends_all_levels_and_forgets_the_past() -> None:
    harness = PolicyHarness()
    harness.show(OVER, 60)
    assert harness.degradation.return_all(harness.now_s) == (
        ReturnLevel("fps"),
        ReturnLevel("gate"),
        ReturnLevel("variant"),
    )
    assert harness.degradation.return_all(harness.now_s) == ()
    assert harness.show(OVER, 10) == []
    assert harness.degradation.return_delay_s(POLICY, "fps") == 60


def test_a_level_that_is_no_longer_configured_ends() -> None:
    harness = PolicyHarness()
    harness.show(OVER, 60)
    assert harness.show(OVER, 5, replace(POLICY, levels=("variant", "fps"))) == [ReturnLevel("gate")]


def test_a_level_that_could_not_start_is_not_active() -> None:
    harness = PolicyHarness()
    assert harness.show(OVER, 20) == [TakeLevel("variant")]
    harness.degradation.drop_level("variant")
    without = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate", "fps"}))
    assert harness.show(without, 20) == [TakeLevel("gate")]
    assert list(harness.degradation.active) == ["gate"]


# --- simulated loads ----------------------------------------------------------------------------------------


@dataclass
class RandomLoad:
    """Cameras, a device and everything that changes about them at random, on a clock of its own."""

    seed: int
    now_s: float = 0.0

    def __post_init__(self) -> None:
        dice = self.dice = random.Random(self.seed)  # noqa: S311 - the same each time
        after_s, back_after_s = dice.choice([(5.0, 3.0), (5.0, 10.0), (15.0, 60.0), (30.0, 60.0)])
        levels = tuple(dice.sample(DEGRADATION_LEVELS, dice.randint(1, 3)))
        self.settings = DegradationSettings(levels, after_s, back_after_s)
        self.degradation = DegradationPolicy()
        self.least_per_s = dice.choice([0.1, 0.5, 2.0])
        self.requests = {
            f"camera-{number}": RateRequest(dice.choice([1.0, 5.0, 10.0, 25.0]), dice.choice([0, 0, 1, 5]))
            for number in range(dice.randint(1, 12))
        }
        self.demanded = sum(request.asked_per_s for request in self.requests.values())
        self.gain = dice.uniform(1.0, 2.5)
        self.noise = dice.choice([0.0, 0.02, 0.05])
        self.knows_its_room = dice.random() < 0.7
        self.admitted: dict[float | None, float] = {None: self.demanded}
        self.steps: list[tuple[float, DegradationStep]] = []
        self.releases_s: list[float] = []
        self.over_s = 0.0
        self.change()

    def change(self) -> None:
        """Other circumstances: what the device carries, and how much moves."""
        self.capacity = self.demanded * self.dice.choice([0.02, 0.1, 0.3, 0.6, 0.9, 1.0, 1.2, 5.0])
        self.moving = self.dice.uniform(0.05, 1.0)

    def play(self, seconds: float) -> None:
        """Let it run in circumstances that stay as they are, three looks in the time of an overload."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            passed_s = self.dice.uniform(0.3, 0.36) * self.settings.after_s
            self.now_s += passed_s
            snapshot = self.snapshot()
            if snapshot.load == "over":
                self.over_s += passed_s
            self.keep(self.degradation.decide(self.settings, snapshot, self.now_s))

    def return_all(self) -> None:
        self.releases_s.append(self.now_s)
        self.keep(self.degradation.return_all(self.now_s))

    def keep(self, steps: tuple[DegradationStep, ...]) -> None:
        self.steps += [(self.now_s, step) for step in steps]

    def offered(self) -> float:
        """What cameras hand on, frames per second."""
        active = self.degradation.active
        budget = active["fps"].budget_per_s if "fps" in active else None
        if budget not in self.admitted:
            assert budget is not None
            limits = allocate_rates(self.requests, budget, self.least_per_s)
            rates = [
                min(request.asked_per_s, limits.get(name, request.asked_per_s))
                for name, request in self.requests.items()
            ]
            self.admitted[budget] = sum(rates)
        return self.admitted[budget] * (self.moving if "gate" in active else 1.0)

    def snapshot(self) -> LoadSnapshot:
        offered = self.offered()
        capacity = self.capacity * (self.gain if "variant" in self.degradation.active else 1.0)
        delivered = min(offered, capacity) * (1 - self.noise * self.dice.random())
        lost = offered - delivered
        load: LoadState = "between"
        if lost > max(0.1 * offered, 0.5):
            load = "over"
        elif lost <= max(0.05 * offered, 0.25):
            load = "fine"
        lowest = sum_of_minimums(self.requests, self.least_per_s)
        headroom = not self.knows_its_room or delivered < 0.85 * capacity
        return LoadSnapshot(load, self.demanded, delivered, lowest, headroom)


def level_changes(random_load: RandomLoad) -> Iterator[tuple[float, str]]:
    """When steps were taken and which way, each proven to be a change that nothing told before."""
    budgets: dict[DegradationLevel, float | None] = {}
    ended_s: float | None = None
    for at_s, step in random_load.steps:
        if isinstance(step, Exhausted):
            assert ended_s is None or at_s - ended_s >= random_load.settings.back_after_s
            ended_s = at_s
            continue
        before, way = budgets.get(step.level), "up"
        if isinstance(step, TakeLevel):
            way, ended_s = "down", None
            assert step.level not in budgets or (before or 0.0) > (step.budget_per_s or 0.0)
            budgets[step.level] = step.budget_per_s
        elif step.budget_per_s is not None:
            assert before is not None
            assert step.budget_per_s > before
            budgets[step.level] = step.budget_per_s
        else:
            del budgets[step.level]
            ended_s = None if at_s in random_load.releases_s else ended_s
        yield at_s, way
    assert budgets == {level: active.budget_per_s for level, active in random_load.degradation.active.items()}


def check_hysteresis(random_load: RandomLoad) -> None:
    """Steps keep their distance, but where the ladder lost its say; the way up keeps its patience."""
    for (before_s, _), (at_s, way) in pairwise(level_changes(random_load)):
        if at_s not in random_load.releases_s:
            least_s = max(random_load.settings.after_s, random_load.settings.back_after_s) if way == "up" else 0.0
            assert at_s - before_s >= max(random_load.settings.after_s, least_s)


@pytest.mark.parametrize("seed", range(200))
def test_a_random_load_never_makes_the_levels_flap(seed: int) -> None:
    """It settles whenever the load does, and it comes back when the load goes."""
    random_load = RandomLoad(seed)
    for _ in range(random_load.dice.randint(1, 5)):
        random_load.play(random_load.dice.uniform(2, 50) * random_load.settings.after_s)
        random_load.change()
        if random_load.dice.random() < 0.2:
            random_load.return_all()

    longest_s = max_return_delay_s(random_load.settings)
    random_load.play(4 * longest_s)
    before, over_s = len(random_load.steps), random_load.over_s
    random_load.play(2 * longest_s)
    # Now and then it is tried whether more can be carried, for each rung once in the longest patience.
    assert len(random_load.steps) - before <= 3 * 2 * len(random_load.settings.levels)
    tries_s = 3 * len(random_load.settings.levels) * 3 * random_load.settings.after_s
    assert random_load.degradation.exhausted or random_load.over_s - over_s <= tries_s

    random_load.capacity = 3 * random_load.demanded
    random_load.play((len(random_load.settings.levels) + 2) * longest_s)
    assert not random_load.degradation.active
    before = len(random_load.steps)
    random_load.play(longest_s)
    assert len(random_load.steps) == before
    check_hysteresis(random_load)
