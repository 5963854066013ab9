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
    DegradationStep,
    Exhausted,
    LoadSnapshot,
    LoadState,
    RateRequest,
    ReturnLevel,
    TakeLevel,
    allocate_rates,
    sum_of_minimums,
)
from visionedge.config.schema import OverloadConfig

POLICY = OverloadConfig()
OVER = LoadSnapshot("over", demanded=40, delivered=10, min_total_per_s=2)
FINE = replace(OVER, load="fine")


@dataclass
class Played:
    """A ladder that is shown a sight every five seconds, and what it did when."""

    degradation: DegradationPolicy = field(default_factory=DegradationPolicy)
    now_s: float = 0.0
    steps: list[tuple[float, DegradationStep]] = field(default_factory=list)

    def show(
        self, snapshot: LoadSnapshot | None, seconds: float, settings: OverloadConfig = POLICY
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


def test_rungs_are_taken_one_by_one_in_the_declared_order() -> None:
    assert Played().show(OVER, 60) == [TakeLevel("variant"), TakeLevel("gate"), TakeLevel("fps", 10.0)]
    order: tuple[DegradationLevel, ...] = ("fps", "gate")
    taken = Played().show(OVER, 65, OverloadConfig(levels=order))
    assert [step.level for step in taken if isinstance(step, TakeLevel)] == ["fps", "fps", "fps"]


def test_a_short_overload_changes_nothing() -> None:
    played = Played()
    for _ in range(20):
        assert played.show(OVER, 15) == []
        assert played.show(FINE, 5) == []


def test_what_would_change_nothing_is_left_out() -> None:
    bare = replace(OVER, available_levels=frozenset[DegradationLevel]({"fps"}))
    assert Played().show(bare, 20) == [TakeLevel("fps", 10.0)]


def test_the_budget_of_fps_is_what_was_delivered_less_a_tenth() -> None:
    bare = replace(OVER, delivered=20, available_levels=frozenset[DegradationLevel]({"fps"}))
    assert Played().show(bare, 20) == [TakeLevel("fps", 18.0)]


def test_one_short_stall_does_not_lower_a_camera_to_the_least() -> None:
    stalled = replace(OVER, delivered=0, available_levels=frozenset[DegradationLevel]({"fps"}))
    assert Played().show(stalled, 20) == [TakeLevel("fps", 10.0)]


def test_the_end_is_told_once_and_again_only_after_all_was_well() -> None:
    played = Played()
    only = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate"}))
    assert played.show(only, 200) == [TakeLevel("gate"), Exhausted()]
    assert played.degradation.exhausted
    played.show(replace(only, load="fine", available_levels=frozenset[DegradationLevel]()), 55)
    assert played.show(only, 200) == []
    played.show(replace(only, load="fine"), 65)
    assert not played.degradation.exhausted
    assert played.show(only, 200) == [TakeLevel("gate"), Exhausted()]


def test_rungs_come_back_in_reverse_order_and_fps_in_steps() -> None:
    played = Played()
    played.show(OVER, 60)
    assert played.show(FINE, 400) == [
        ReturnLevel("fps", 20.0),
        ReturnLevel("fps"),
        ReturnLevel("gate"),
        ReturnLevel("variant"),
    ]
    assert played.degradation.active == {}


def test_limits_that_hold_nobody_back_are_returned_even_from_a_busy_processor() -> None:
    played = Played()
    busy = replace(OVER, headroom=False, available_levels=frozenset[DegradationLevel]({"fps"}))
    played.show(busy, 20)
    assert played.show(replace(busy, load="fine"), 600) == []
    assert played.show(replace(busy, load="fine", demanded=8), 70) == [ReturnLevel("fps")]


def test_a_rung_that_is_needed_again_soon_is_kept_twice_as_long_each_time() -> None:
    played = Played()
    only = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate"}))
    kept_s = []
    for _ in range(7):
        played.show(only, 20)
        taken_s = played.now_s
        while played.degradation.active:
            played.show(replace(only, load="fine"), 5)
        kept_s.append(played.now_s - taken_s - 5)  # it was fine from the first look on
    assert kept_s == [60, 120, 240, 480, 960, 1920, 1920]


def test_a_rung_that_is_needed_again_much_later_is_returned_as_soon_as_the_first_time() -> None:
    played = Played()
    only = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate"}))
    for _ in range(3):
        played.show(only, 20)
        played.show(replace(only, load="fine"), 65)
        assert played.degradation.active == {}
        played.show(replace(only, load="fine"), 300)
    assert played.degradation.return_delay_s(POLICY, "gate") == 60


def test_nothing_is_concluded_from_before_a_time_of_which_nothing_is_known() -> None:
    played = Played()
    for _ in range(20):
        assert played.show(OVER, 15) == []
        assert played.show(None, 5) == []


def test_without_a_say_all_is_returned_at_once_and_the_past_forgotten() -> None:
    played = Played()
    played.show(OVER, 60)
    assert played.degradation.return_all(played.now_s) == (
        ReturnLevel("fps"),
        ReturnLevel("gate"),
        ReturnLevel("variant"),
    )
    assert played.degradation.return_all(played.now_s) == ()
    assert played.show(OVER, 10) == []
    assert played.degradation.return_delay_s(POLICY, "fps") == 60


def test_a_rung_that_is_no_longer_in_the_configuration_is_returned() -> None:
    played = Played()
    played.show(OVER, 60)
    assert played.show(OVER, 5, OverloadConfig(levels=("variant", "fps"))) == [ReturnLevel("gate")]


def test_what_could_not_be_taken_is_not_held() -> None:
    played = Played()
    assert played.show(OVER, 20) == [TakeLevel("variant")]
    played.degradation.drop_level("variant")
    without = replace(OVER, available_levels=frozenset[DegradationLevel]({"gate", "fps"}))
    assert played.show(without, 20) == [TakeLevel("gate")]
    assert list(played.degradation.active) == ["gate"]


# --- simulated loads ----------------------------------------------------------------------------------------


@dataclass
class World:
    """Cameras, a device and everything that changes about them at random, on a clock of its own."""

    seed: int
    now_s: float = 0.0

    def __post_init__(self) -> None:
        dice = self.dice = random.Random(self.seed)  # noqa: S311 - the same each time
        after_s, back_after_s = dice.choice([(5.0, 3.0), (5.0, 10.0), (15.0, 60.0), (30.0, 60.0)])
        levels = tuple(dice.sample(DEGRADATION_LEVELS, dice.randint(1, 3)))
        self.settings = OverloadConfig.model_validate(
            {"levels": levels, "afterSeconds": after_s, "backAfterSeconds": back_after_s}
        )
        self.degradation = DegradationPolicy()
        self.least_per_s = dice.choice([0.1, 0.5, 2.0])
        self.requests = {
            f"camera-{number}": RateRequest(dice.choice([1.0, 5.0, 10.0, 25.0]), dice.choice([0, 0, 1, 5]))
            for number in range(dice.randint(1, 12))
        }
        self.demanded = sum(wish.asked_per_s for wish in self.requests.values())
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
            passed_s = self.dice.uniform(0.3, 0.36) * self.settings.after_seconds
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
                min(wish.asked_per_s, limits.get(name, wish.asked_per_s))
                for name, wish in self.requests.items()
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


def told(world: World) -> Iterator[tuple[float, str]]:
    """When steps were taken and which way, each proven to be a change that nothing told before."""
    budgets: dict[DegradationLevel, float | None] = {}
    ended_s: float | None = None
    for at_s, step in world.steps:
        if isinstance(step, Exhausted):
            assert ended_s is None or at_s - ended_s >= world.settings.back_after_seconds
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
            ended_s = None if at_s in world.releases_s else ended_s
        yield at_s, way
    assert budgets == {level: active.budget_per_s for level, active in world.degradation.active.items()}


def prove_hysteresis(world: World) -> None:
    """Steps keep their distance, but where the ladder lost its say; the way up keeps its patience."""
    for (before_s, _), (at_s, way) in pairwise(told(world)):
        if at_s not in world.releases_s:
            least_s = (
                max(world.settings.after_seconds, world.settings.back_after_seconds) if way == "up" else 0.0
            )
            assert at_s - before_s >= max(world.settings.after_seconds, least_s)


@pytest.mark.parametrize("seed", range(200))
def test_a_load_that_changes_as_it_likes_never_makes_the_ladder_flap(seed: int) -> None:
    """It settles whenever the load does, and it comes back when the load goes."""
    world = World(seed)
    for _ in range(world.dice.randint(1, 5)):
        world.play(world.dice.uniform(2, 50) * world.settings.after_seconds)
        world.change()
        if world.dice.random() < 0.2:
            world.return_all()

    longest_s = 32 * max(world.settings.after_seconds, world.settings.back_after_seconds)
    world.play(4 * longest_s)
    before, over_s = len(world.steps), world.over_s
    world.play(2 * longest_s)
    # Now and then it is tried whether more can be carried, for each rung once in the longest patience.
    assert len(world.steps) - before <= 3 * 2 * len(world.settings.levels)
    tries_s = 3 * len(world.settings.levels) * 3 * world.settings.after_seconds
    assert world.degradation.exhausted or world.over_s - over_s <= tries_s

    world.capacity = 3 * world.demanded
    world.play((len(world.settings.levels) + 2) * longest_s)
    assert not world.degradation.active
    before = len(world.steps)
    world.play(longest_s)
    assert len(world.steps) == before
    prove_hysteresis(world)
