"""The assignment of rows to columns, against all possible ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.scene.assignment import assign

_cost = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5]))
_costs = st.lists(st.dictionaries(st.integers(0, 5), _cost, max_size=6), max_size=6)


def least_sum(
    costs: list[dict[int, float]], unmatched_cost: float, taken: frozenset[int] = frozenset()
) -> float:
    """The sum of the cheapest assignment, by trying all."""
    if not costs:
        return 0.0
    first, *rest = costs
    sums = [unmatched_cost + least_sum(rest, unmatched_cost, taken)]
    for column, cost in first.items():
        if column not in taken:
            sums.append(cost + least_sum(rest, unmatched_cost, taken | {column}))
    return min(sums)


@given(_costs, st.floats(0, 1.5))
def test_no_other_assignment_is_cheaper(costs: list[dict[int, float]], unmatched_cost: float) -> None:
    columns = assign(costs, unmatched_cost)
    used = [column for column in columns if column is not None]
    assert len(set(used)) == len(used)
    total = sum(
        unmatched_cost if column is None else row[column] for row, column in zip(costs, columns, strict=True)
    )
    assert total == pytest.approx(least_sum(costs, unmatched_cost), abs=1e-9)


def test_a_later_row_moves_an_earlier_one_when_the_sum_falls() -> None:
    assert assign([{0: 0.1, 1: 0.2}, {0: 0.1, 1: 0.9}], 1.0) == [1, 0]


def test_a_pair_that_costs_more_than_none_is_not_made() -> None:
    assert assign([{0: 0.8}, {}], 0.5) == [None, None]


def test_without_rows_there_is_nothing_to_assign() -> None:
    assert assign([], 1.0) == []


def test_three_hundred_rows_that_want_the_same_columns_all_get_one() -> None:
    costs = [{(row + step) % 300: step / 8 for step in range(8)} for row in range(300)]
    assert sorted(column for column in assign(costs, 2.0) if column is not None) == list(range(300))
