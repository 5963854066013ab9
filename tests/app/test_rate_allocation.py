"""Who is lowered, and to what: by priority, evenly among equals, never below the least."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.app.overload_policy import Wish, caps, least

WISHES = st.dictionaries(
    st.sampled_from([f"camera-{number}" for number in range(8)]),
    st.builds(Wish, st.floats(0, 60), st.integers(-2, 2)),
    max_size=8,
)
RATES = st.floats(0, 300)
LEAST = st.floats(0.01, 5)


def let_in(wishes: dict[str, Wish], lowered: dict[str, float]) -> dict[str, float]:
    return {name: min(wish.asked_per_s, lowered.get(name, 1e9)) for name, wish in wishes.items()}


def test_equals_are_lowered_to_the_same_rate_and_who_asks_for_less_keeps_it() -> None:
    wishes = {"dock": Wish(25), "gate": Wish(25), "yard": Wish(2)}
    assert caps(wishes, 12, 0.5) == {"dock": 5, "gate": 5, "yard": 5}


def test_a_camera_of_a_higher_priority_is_lowered_last() -> None:
    wishes = {"till": Wish(10, 5), "dock": Wish(10), "gate": Wish(10)}
    assert caps(wishes, 13, 0.5) == {"dock": 1.5, "gate": 1.5}
    assert caps(wishes, 5, 0.5) == {"till": 4, "dock": 0.5, "gate": 0.5}


def test_a_camera_that_gives_nothing_just_now_is_held_like_its_equals_when_it_returns() -> None:
    assert caps({"dock": Wish(20), "gate": Wish(0)}, 8, 0.5) == {"dock": 8, "gate": 8}


def test_rates_are_rounded_down_to_two_digits() -> None:
    assert caps({"a": Wish(25), "b": Wish(25), "c": Wish(25)}, 40, 0.5)["a"] == 13
    assert caps({"a": Wish(25), "b": Wish(25), "c": Wish(25)}, 4.0, 0.5)["a"] == 1.3


@given(WISHES, RATES, LEAST)
def test_the_budget_is_kept_unless_the_least_of_all_is_more(
    wishes: dict[str, Wish], budget: float, least_per_s: float
) -> None:
    lowered = caps(wishes, budget, least_per_s)
    total = sum(let_in(wishes, lowered).values())
    assert total <= max(budget, least(wishes, least_per_s)) + 1e-6
    assert all(cap >= least_per_s for cap in lowered.values())


@given(WISHES, RATES, LEAST)
def test_little_of_the_budget_is_left_over_while_somebody_is_lowered(
    wishes: dict[str, Wish], budget: float, least_per_s: float
) -> None:
    rates = let_in(wishes, caps(wishes, budget, least_per_s))
    if any(rate < wishes[name].asked_per_s for name, rate in rates.items()):
        demanded = sum(wish.asked_per_s for wish in wishes.values())
        assert sum(rates.values()) >= 0.89 * min(budget, demanded)


@given(WISHES, RATES, LEAST)
def test_nobody_is_lowered_while_a_lower_priority_has_more_than_the_least(
    wishes: dict[str, Wish], budget: float, least_per_s: float
) -> None:
    rates = let_in(wishes, caps(wishes, budget, least_per_s))
    for name, wish in wishes.items():
        if rates[name] < 0.89 * wish.asked_per_s:
            below = [n for n, other in wishes.items() if other.priority < wish.priority]
            assert all(rates[n] <= max(least_per_s, 1e-9) + 1e-6 for n in below)


@given(WISHES, LEAST)
def test_with_enough_for_all_nobody_is_lowered(wishes: dict[str, Wish], least_per_s: float) -> None:
    total = sum(wish.asked_per_s for wish in wishes.values())
    assert caps(wishes, total * 1.001 + least_per_s * len(wishes), least_per_s) == {}


def test_without_cameras_there_is_nothing_to_share() -> None:
    assert caps({}, 10, 0.5) == {}
    assert least({}, 0.5) == pytest.approx(0.0)
