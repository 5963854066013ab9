"""The cheapest assignment of rows to columns where most pairs are impossible: tracks and detections."""

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush


class _Solver:
    """Shortest augmenting paths (Jonker and Volgenant 1987) over the possible pairs alone.

    Each row also has a column of its own, numbered ``-1 - row``: it stands for "not assigned".
    """

    def __init__(self, costs: Sequence[Mapping[int, float]], unmatched_cost: float) -> None:
        self._edges = [(*row.items(), (-1 - number, unmatched_cost)) for number, row in enumerate(costs)]
        self._row_prices = [0.0] * len(costs)
        self._column_prices: dict[int, float] = {}
        self._rows: dict[int, int] = {}
        self.columns: list[int] = [-1 - number for number in range(len(costs))]

    def add(self, start: int) -> None:
        """Assign the row `start`; earlier rows change their columns where the sum of the costs falls."""
        came_from: dict[int, int] = {}
        distances: dict[int, float] = {}
        heap: list[tuple[float, int]] = []
        visited: set[int] = set()
        row, length = start, 0.0
        while True:
            base = length - self._row_prices[row]
            for column, cost in self._edges[row]:
                distance = base + cost - self._column_prices.get(column, 0.0)
                if column not in visited and distance < distances.get(column, float("inf")):
                    distances[column], came_from[column] = distance, row
                    heappush(heap, (distance, column))
            length, column = heappop(heap)
            while length > distances[column]:  # a shorter path to this column was found after this entry
                length, column = heappop(heap)
            if column not in self._rows:
                break
            visited.add(column)
            row = self._rows[column]
        self._row_prices[start] += length
        for other in visited:
            self._row_prices[self._rows[other]] += length - distances[other]
            self._column_prices[other] = self._column_prices.get(other, 0.0) - (length - distances[other])
        self._turn(start, column, came_from)

    def _turn(self, start: int, column: int, came_from: Mapping[int, int]) -> None:
        """Give each row on the path from `start` to the free `column` its next column."""
        while True:
            row = came_from[column]
            self._rows[column] = row
            column, self.columns[row] = self.columns[row], column
            if row == start:
                return


def assign(costs: Sequence[Mapping[int, float]], unmatched_cost: float) -> list[int | None]:
    """Return the column of each row, or None, so that the sum of the costs is the least.

    `costs[row]` maps the possible columns of a row (0, 1, …) to their costs. A row without a column costs
    `unmatched_cost`, so pairs that cost more are never made. Equal arguments give the same solution.
    """
    wanted = [_find_cheapest(row, unmatched_cost) for row in costs]
    if _are_different(wanted):  # mostly so, and then nothing is cheaper
        return wanted
    chosen = _give_to_one(costs, wanted, unmatched_cost)
    if _are_different(chosen):
        return chosen
    solver = _Solver(costs, unmatched_cost)
    for row in range(len(costs)):
        solver.add(row)
    return [column if column >= 0 else None for column in solver.columns]


def _are_different(columns: Sequence[int | None]) -> bool:
    taken = [column for column in columns if column is not None]
    return len(set(taken)) == len(taken)


def _give_to_one(
    costs: Sequence[Mapping[int, float]], wanted: Sequence[int | None], unmatched_cost: float
) -> list[int | None]:
    """Of the rows that want the same column the one gets it that loses most without it.

    The others get their second choice. If all columns differ then, nothing is cheaper: of these rows all but
    one have at best their second choice.
    """
    chosen = [*wanted]
    for column in dict.fromkeys(wanted):
        if column is None or wanted.count(column) == 1:
            continue
        rows = [number for number, its_column in enumerate(wanted) if its_column == column]
        losses: dict[int, float] = {}
        for number in rows:
            row = costs[number]
            second = chosen[number] = _find_cheapest(row, unmatched_cost, without=column)
            losses[number] = (unmatched_cost if second is None else row[second]) - row[column]
        chosen[max(rows, key=losses.__getitem__)] = column
    return chosen


def _find_cheapest(row: Mapping[int, float], unmatched_cost: float, without: int | None = None) -> int | None:
    """The column that the row alone would have, other than `without`."""
    cheapest, cost = None, unmatched_cost
    for column, its_cost in row.items():
        if its_cost < cost and column != without:
            cheapest, cost = column, its_cost
    return cheapest
