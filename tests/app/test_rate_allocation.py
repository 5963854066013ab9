"""Who is lowered, and to what: by priority, evenly among equals, never below the least."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.app.overload_policy import RateRequest, allocate_rates, sum_of_minimums

WISHES = st.dictionaries(
    st.sampled_from([f"camera-{number}" for number in range(8)]),
    st.builds(RateRequest, st.floats(0, 60), st.integers(-2, 2)),
    max_size=8,
)
RATES = st.floats(0, 300)
LEAST = st.floats(0.01, 5)


def admitted(requests: dict[str, RateRequest], lowered: dict[str, float]) -> dict[str, float]:
    return {name: min(request.asked_per_s, lowered.get(name, 1e9)) for name, request in requests.items()}


def test_equal_cameras_get_the_same_rate_and_smaller_requests_are_kept() -> None:
    requests = {"dock": RateRequest(25), "gate": RateRequest(25), "yard": RateRequest(2)}
    assert allocate_rates(requests, 12, 0.5) == {"dock": 5, "gate": 5, "yard": 5}


def test_a_camera_of_a_higher_priority_is_lowered_last() -> None:
    requests = {"till": RateRequest(10, 5), "dock": RateRequest(10), "gate": RateRequest(10)}
    assert allocate_rates(requests, 13, 0.5) == {"dock": 1.5, "gate": 1.5}
    assert allocate_rates(requests, 5, 0.5) == {"till": 4, "dock": 0.5, "gate": 0.5}


def test_a_silent_camera_is_limited_like_its_equals_when_it_returns() -> None:
    assert allocate_rates({"dock": RateRequest(20), "gate": RateRequest(0)}, 8, 0.5) == {"dock": 8, "gate": 8}


def test_rates_are_rounded_down_to_two_digits() -> None:
    assert (
        allocate_rates({"a": RateRequest(25), "b": RateRequest(25), "c": RateRequest(25)}, 40, 0.5)["a"] == 13
    )
    assert (
        allocate_rates({"a": RateRequest(25), "b": RateRequest(25), "c": RateRequest(25)}, 4.0, 0.5)["a"]
        == 1.3
    )


@given(WISHES, RATES, LEAST)
def test_the_budget_is_kept_unless_the_minimum_rates_exceed_it(
    requests: dict[str, RateRequest], budget: float, least_per_s: float
) -> None:
    lowered = allocate_rates(requests, budget, least_per_s)
    total = sum(admitted(requests, lowered).values())
    assert total <= max(budget, sum_of_minimums(requests, least_per_s)) + 1e-6
    assert all(cap >= least_per_s for cap in lowered.values())


@given(WISHES, RATES, LEAST)
def test_little_of_the_budget_is_unused_while_a_camera_is_lowered(
    requests: dict[str, RateRequest], budget: float, least_per_s: float
) -> None:
    rates = admitted(requests, allocate_rates(requests, budget, least_per_s))
    if any(rate < requests[name].asked_per_s for name, rate in rates.items()):
        demanded = sum(request.asked_per_s for request in requests.values())
        assert sum(rates.values()) >= 0.89 * min(budget, demanded)


@given(WISHES, RATES, LEAST)
def test_no_camera_is_lowered_while_a_lower_priority_is_above_the_minimum(
    requests: dict[str, RateRequest], budget: float, least_per_s: float
) -> None:
    rates = admitted(requests, allocate_rates(requests, budget, least_per_s))
    for name, request in requests.items():
        if rates[name] < 0.89 * request.asked_per_s:
            below = [n for n, other in requests.items() if other.priority < request.priority]
            assert all(rates[n] <= max(least_per_s, 1e-9) + 1e-6 for n in below)


@given(WISHES, LEAST)
def test_with_enough_capacity_no_camera_is_lowered(requests: dict[str, RateRequest], least_per_s: float) -> None:
    total = sum(request.asked_per_s for request in requests.values())
    assert allocate_rates(requests, total * 1.001 + least_per_s * len(requests), least_per_s) == {}


def test_without_cameras_the_allocation_is_empty() -> None:
    assert allocate_rates({}, 10, 0.5) == {}
    assert sum_of_minimums({}, 0.5) == pytest.approx(0.0)
