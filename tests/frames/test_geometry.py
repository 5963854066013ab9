"""Geometry: borders belong to a polygon, and a polygon that has not one area is named."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.frames.geometry import (
    Point,
    PolygonArea,
    cross_product,
    distance_to_segment,
    find_polygon_problem,
    meets_segment,
)

U_SHAPE: list[Point] = [(0, 0), (0.3, 0), (0.3, 0.6), (0.6, 0.6), (0.6, 0), (1, 0), (1, 1), (0, 1)]
COORDINATES = st.integers(0, 20).map(lambda n: n / 20)
POINTS = st.tuples(COORDINATES, COORDINATES)


@pytest.mark.parametrize(
    "point", [(0, 0), (0.3, 0.3), (0.45, 0.6), (1, 1), (0.5, 1), (0.15, 0.2), (0.9, 0.01)]
)
def test_points_inside_and_on_the_border_are_in_a_polygon(point: Point) -> None:
    assert PolygonArea(U_SHAPE).contains(*point)


@pytest.mark.parametrize("point", [(0.45, 0.3), (0.31, 0.59), (1.01, 0.5), (0.5, -0.1), (0.45, 0)])
def test_points_in_the_notch_of_a_polygon_are_outside(point: Point) -> None:
    """A polygon is not its box."""
    assert not PolygonArea(U_SHAPE).contains(*point)


@given(corners=st.lists(POINTS, min_size=3, max_size=8), point=POINTS)
def test_a_valid_polygon_contains_what_its_winding_number_says(corners: list[Point], point: Point) -> None:
    if find_polygon_problem(corners) is not None:
        return
    edges = list(pairwise((*corners, corners[0])))
    on_border = any(meets_segment(*edge, point, point) for edge in edges)
    angle = sum(
        math.atan2(
            (a[0] - point[0]) * (b[1] - point[1]) - (a[1] - point[1]) * (b[0] - point[0]),
            (a[0] - point[0]) * (b[0] - point[0]) + (a[1] - point[1]) * (b[1] - point[1]),
        )
        for a, b in edges
    )
    expected = on_border or abs(angle) > math.pi
    assert PolygonArea(corners).contains(*point) is expected
    assert PolygonArea(corners[::-1]).contains(*point) is expected


@given(a=POINTS, b=POINTS, c=POINTS, d=POINTS)
def test_segments_meet_whatever_the_order_of_their_ends(a: Point, b: Point, c: Point, d: Point) -> None:
    expected = meets_segment(a, b, c, d)
    assert meets_segment(b, a, c, d) is expected
    assert meets_segment(c, d, a, b) is expected
    assert meets_segment(a, b, b, c)


def test_a_segment_that_ends_before_another_one_does_not_meet_it() -> None:
    assert meets_segment((0.5, 0.2), (0.5, 0.8), (0.4, 0.5), (0.6, 0.5))
    assert meets_segment((0.5, 0.2), (0.5, 0.8), (0.4, 0.8), (0.6, 0.8))
    assert not meets_segment((0.5, 0.2), (0.5, 0.8), (0.4, 0.81), (0.6, 0.81))
    assert not meets_segment((0, 0), (0.4, 0.4), (0.5, 0.5), (1, 1))


def test_left_of_a_line_that_points_down_is_the_right_half_of_the_picture() -> None:
    assert cross_product((0.5, 0.2), (0.5, 0.8), 0.9, 0.5) < 0
    assert cross_product((0.5, 0.2), (0.5, 0.8), 0.1, 0.5) > 0


def test_distances_are_in_widths_of_the_picture() -> None:
    """0.1 of the height of a picture of 16:9 is 0.05625 of its width."""
    assert distance_to_segment((0, 0.5), (1, 0.5), 0.5, 0.6, 16 / 9) == pytest.approx(0.05625)
    assert distance_to_segment((0.5, 0.2), (0.5, 0.8), 0.52, 0.5, 16 / 9) == pytest.approx(0.02)
    assert distance_to_segment((0.5, 0.2), (0.5, 0.8), 0.5, 1, 1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("polygon", "problem"),
    [
        (
            [(0, 0), (1, 1), (1, 0), (0, 1)],
            "crosses or touches itself: the edge from point 1 to point 2 and the",
        ),
        ([(0, 0), (1, 0), (1, 1), (0.5, 0), (0, 1)], "crosses or touches itself"),
        ([(0, 0), (0.5, 0.5), (1, 1)], "runs back"),
        ([(0, 0), (1, 0), (0.5, 0), (0.5, 1)], "crosses or touches itself"),
        ([(0, 0), (0, 0), (1, 0), (1, 1)], "same point twice in a row: points 1 and 2"),
    ],
)
def test_a_polygon_without_one_area_is_named(polygon: list[Point], problem: str) -> None:
    assert problem in (find_polygon_problem(polygon) or "")


@given(st.integers(3, 64))
def test_a_regular_polygon_is_valid(corners: int) -> None:
    turns = [2 * math.pi * n / corners for n in range(corners)]
    assert find_polygon_problem([(0.5 + math.cos(a) / 2, 0.5 + math.sin(a) / 2) for a in turns]) is None
