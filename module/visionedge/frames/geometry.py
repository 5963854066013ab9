"""Points, segments and polygons in a picture: which side, inside or not, and whether a polygon is valid.

Coordinates are relative to the picture, x to the right and y downwards, 0-1. One point at a time, in plain
Python: for a polygon of four points that is faster than an array operation.
"""

import itertools
from collections.abc import Sequence

Point = tuple[float, float]

_TOLERANCE = 1e-9
"""Points nearer to a border than about this lie on it."""


def cross_product(start: Point, end: Point, x: float, y: float) -> float:
    """Twice the area of the triangle start, end, (x, y): below 0 if the point is on the left of the line.

    Left as seen by a person who stands at `start` and looks to `end`, in a picture whose y points downwards.
    """
    return (end[0] - start[0]) * (y - start[1]) - (end[1] - start[1]) * (x - start[0])


class PolygonArea:
    """The area of a polygon, its border included."""

    __slots__ = ("_bottom", "_edges", "_left", "_right", "_top")

    def __init__(self, polygon: Sequence[Point]) -> None:
        self._edges = tuple((*a, *b) for a, b in itertools.pairwise((*polygon, polygon[0])))
        self._left, self._right = min(x for x, _ in polygon), max(x for x, _ in polygon)
        self._top, self._bottom = min(y for _, y in polygon), max(y for _, y in polygon)

    def contains(self, x: float, y: float) -> bool:
        """Whether a point lies inside or on the border."""
        if not (self._left <= x <= self._right and self._top <= y <= self._bottom):
            return False
        inside = False
        for x1, y1, x2, y2 in self._edges:
            if (y < y1 and y < y2) or (y > y1 and y > y2):
                continue  # an edge above or below the point
            cross = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)
            if -_TOLERANCE <= cross <= _TOLERANCE and _is_between((x1, y1), (x2, y2), (x, y)):
                return True
            # A ray from the point to the right meets the edge. One end counts, so that a corner counts once.
            if (y1 > y) != (y2 > y) and (cross > 0) == (y2 > y1):
                inside = not inside
        return inside


def _is_between(a: Point, b: Point, point: Point) -> bool:
    """Whether a point of the line through `a` and `b` lies between them."""
    return all(min(m, n) <= value <= max(m, n) for m, n, value in zip(a, b, point, strict=True))


def meets_segment(start: Point, end: Point, first: Point, second: Point) -> bool:
    """Whether two segments have a point in common, ends included."""
    a, b = cross_product(start, end, *first), cross_product(start, end, *second)
    if (a > 0 and b > 0) or (a < 0 and b < 0):
        return False
    c, d = cross_product(first, second, *start), cross_product(first, second, *end)
    if a and b and c and d:
        return (c > 0) != (d > 0)
    return (
        (a == 0 and _is_between(start, end, first))
        or (b == 0 and _is_between(start, end, second))
        or (c == 0 and _is_between(first, second, start))
        or (d == 0 and _is_between(first, second, end))
    )


def find_crossed_side(polygon: Sequence[Point], inside: Point, outside: Point) -> int:
    """The side of a polygon on which a path between two points leaves or enters it.

    Side 1 lies between the first two points. If a path meets several sides, the one next to `inside` counts.
    """
    sides = list(enumerate(itertools.pairwise((*polygon, polygon[0])), 1))
    met = []
    for number, (start, end) in sides:
        a, b = cross_product(start, end, *inside), cross_product(start, end, *outside)
        # If both are the same, the path runs along the side and leaves on the next one.
        if a != b and meets_segment(start, end, inside, outside):
            met.append((a / (a - b), number))
    if not met:  # `inside` lies on the border, up to the rounding of its coordinates
        met = [(distance_to_segment(*side, *inside, 1.0), number) for number, side in sides]
    return min(met)[1]


def distance_to_segment(start: Point, end: Point, x: float, y: float, aspect: float) -> float:
    """The distance of a point to a segment, in widths of the picture; `aspect`: width divided by height."""
    dx, dy = end[0] - start[0], (end[1] - start[1]) / aspect
    px, py = x - start[0], (y - start[1]) / aspect
    share = min(1.0, max(0.0, (px * dx + py * dy) / (dx * dx + dy * dy)))
    qx, qy = px - share * dx, py - share * dy
    return float((qx * qx + qy * qy) ** 0.5)


def find_polygon_problem(polygon: Sequence[Point]) -> str | None:
    """Why points are no polygon with one area, in one clause; None if they are."""
    count = len(polygon)
    edges = list(itertools.pairwise((*polygon, polygon[0])))
    for number, (start, end) in enumerate(edges, 1):
        if start == end:
            return f"has the same point twice in a row: points {number} and {number % count + 1}"
    for first, second in itertools.combinations(range(count), 2):
        if second - first == 1 or (first == 0 and second == count - 1):
            continue  # neighbours share a point
        if meets_segment(*edges[first], *edges[second]):
            return f"crosses or touches itself: {_name(first, count)} and {_name(second, count)}"
    if any(_folds_back(a, b) for a, b in itertools.pairwise((*edges, edges[0]))):
        return "has an edge that runs back on the edge before it"
    return None


def _name(edge: int, count: int) -> str:
    return f"the edge from point {edge + 1} to point {(edge + 1) % count + 1}"


def _folds_back(edge: tuple[Point, Point], following: tuple[Point, Point]) -> bool:
    (a, b), (_, c) = edge, following
    is_straight = abs(cross_product(a, b, *c)) <= _TOLERANCE
    return is_straight and (b[0] - a[0]) * (c[0] - b[0]) + (b[1] - a[1]) * (c[1] - b[1]) < 0
