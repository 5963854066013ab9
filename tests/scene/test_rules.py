"""The rules of zones and lines, and the mistakes that other counters make, one test each."""

import math
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from scene_paths import DOOR, SQUARE, Path, Place, SceneRun, camera_config, track_at

NEAR = 0.495
FAR = 0.45
"""Places before the line at 0.5: nearer than 2 % of the width, and further."""


def line_run(**keys: Any) -> SceneRun:
    return SceneRun(camera_config(lines={"door": {**DOOR, **keys}}))


def zone_run(**keys: Any) -> SceneRun:
    return SceneRun(camera_config(zones={"queue": {"polygon": SQUARE, **keys}}))


def along(*xs: float, y: float = 0.5) -> list[Place | None]:
    return [(x, y) for x in xs]


# --- lines --------------------------------------------------------------------------------------------------


def test_a_crossing_has_the_direction_of_a_person_who_stands_at_the_start() -> None:
    """The right half of the picture is on the left of a line that points down."""
    run = line_run()
    run.walk(along(0.4, 0.45, 0.55, 0.6))
    assert run.types == ["right-to-left"]
    run.walk(along(0.4))
    assert run.types == ["right-to-left", "left-to-right"]


def test_the_direction_turns_with_the_line() -> None:
    run = line_run(start=DOOR["end"], end=DOOR["start"])
    run.walk(along(0.4, 0.6))
    assert run.types == ["left-to-right"]


def test_a_path_that_passes_beside_the_segment_counts_nothing() -> None:
    """The infinite line is crossed; the segment from 0.2 to 0.8 is not."""
    run = line_run()
    run.walk(along(0.4, 0.45, 0.55, 0.6, y=0.9))
    assert run.types == []


def test_a_path_around_the_end_and_back_through_the_segment_counts_once() -> None:
    run = line_run()
    run.walk([(0.4, 0.9), (0.6, 0.9), (0.6, 0.5), (0.4, 0.5)])
    assert run.types == ["left-to-right"]


def test_a_foot_that_passes_the_end_of_a_segment_and_returns_around_it_counts_nothing() -> None:
    run = line_run(minSeconds=0.5)
    run.walk([(NEAR, 0.79), (0.505, 0.79), (0.505, 0.81), (NEAR, 0.81), *[(NEAR, 0.81)] * 10])
    assert run.types == []


def test_a_fast_object_that_jumps_over_the_line_between_two_pictures_counts() -> None:
    run = line_run()
    run.walk(along(0.05, 0.95), after_s=0.5)
    assert run.types == ["right-to-left"]


def test_an_object_that_is_not_seen_while_it_crosses_counts_once() -> None:
    run = line_run()
    run.walk([(0.3, 0.5), (0.4, 0.5), None, None, None, (0.6, 0.5), (0.7, 0.5)])
    assert run.types == ["right-to-left"]


def test_a_foot_that_jitters_on_the_line_counts_nothing() -> None:
    run = line_run()
    run.walk(along(FAR, *[NEAR, 0.505] * 50, NEAR, FAR))
    assert run.types == []


def test_a_foot_that_jitters_on_the_line_and_then_goes_on_counts_once() -> None:
    run = line_run()
    run.walk(along(FAR, *[NEAR, 0.505] * 50, 0.55))
    assert run.types == ["right-to-left"]


@pytest.mark.parametrize("fps", [2.5, 10, 30])
def test_a_foot_that_drifts_slowly_over_the_line_counts_nothing(fps: float) -> None:
    """The box of somebody who stands on the line: each side lasts longer than `minSeconds`."""
    run = line_run(minSeconds=0.3)
    drift = (0.5 + 0.003 * math.sin(number / fps) for number in range(round(60 * fps)))
    run.walk(along(FAR, *drift, FAR), after_s=1 / fps)
    assert run.types == []


def test_people_who_walk_along_a_line_count_nothing() -> None:
    """Their feet are on it, and on either side of it by 1 % of the width."""
    run = line_run()
    run.walk([(0.5 + 0.01 * (-1) ** n, 0.1 + n / 250) for n in range(200)])
    run.walk([(0.5, 0.1 + n / 250) for n in range(200)], track_id=2)
    assert run.types == []


def test_a_crossing_counts_after_min_seconds_on_the_other_side_though_it_is_near() -> None:
    run = line_run(minSeconds=0.3)
    run.walk(along(NEAR, 0.505, 0.505, 0.505))
    assert run.types == []
    run.walk(along(0.505))
    assert run.types == ["right-to-left"]
    run.walk(along(0.505, 0.55, 0.6))
    assert run.types == ["right-to-left"]


def test_a_crossing_counts_at_once_where_it_is_2_percent_of_the_width_away() -> None:
    """The picture of these tests is 4:3, so 2 % of its width are 2.7 % of its height."""
    flat = {"start": [0.2, 0.5], "end": [0.8, 0.5], "minSeconds": 10}
    run = line_run(**flat)
    run.walk([(0.5, 0.49), (0.5, 0.526)])
    assert run.types == []
    run.walk([(0.5, 0.527)])
    assert run.types == ["left-to-right"]


def test_without_min_seconds_the_first_position_behind_the_line_counts() -> None:
    run = line_run(minSeconds=0)
    run.walk(along(NEAR, 0.501, NEAR))
    assert run.types == ["right-to-left", "left-to-right"]


def test_an_identity_switch_on_the_line_counts_once() -> None:
    """The track ends just behind the line, and another one goes on just before it."""
    run = line_run()
    run.walk(along(0.4, FAR, 0.48, 0.505))
    run.picture([track_at(2, (NEAR, 0.5))], ended=[1])
    run.walk(along(0.51, 0.55, 0.6), track_id=2)
    assert run.types == ["right-to-left"]


def test_tracks_that_are_born_behind_a_line_count_nothing() -> None:
    run = line_run()
    for track_id in range(1, 20):
        run.walk(along(0.51, 0.52, 0.53), track_id=track_id)
    assert run.types == []


def test_only_the_classes_of_a_line_count() -> None:
    run = line_run(classes=["car"])
    for x in (0.4, 0.6):
        run.picture([track_at(1, (x, 0.5)), track_at(2, (x, 0.4), "car")])
    assert [event.label for event in run.events] == ["car"]


def test_the_anchor_may_be_the_middle_of_the_box() -> None:
    """The feet pass below the line, the middle passes it."""
    for anchor, count in (("center", 1), ("bottom-center", 0)):
        run = line_run(anchor=anchor)
        run.walk(along(0.4, 0.6, y=0.83))
        assert len(run.events) == count, anchor


# --- zones --------------------------------------------------------------------------------------------------


def test_who_enters_and_leaves_counts_once_each_with_the_time_inside() -> None:
    run = zone_run()
    run.walk(along(*[0.1] * 10, *[0.5] * 20, *[0.9] * 10))
    assert run.types == ["zone-entered", "zone-left"]
    assert run.events[1].dwell_s == pytest.approx(2.0)


def test_a_jittering_foot_enters_once() -> None:
    run = zone_run()
    run.walk(along(*[0.1] * 5, *[0.31, 0.29] * 20, *[0.35] * 10, *[0.31, 0.29] * 20, *[0.35] * 10))
    assert run.types == ["zone-entered"]


def test_who_only_brushes_a_zone_has_not_entered() -> None:
    run = zone_run(minSeconds=0.5)
    run.walk(along(*[0.1] * 5, *[0.31] * 5, *[0.1] * 20))
    assert run.types == []


def test_who_is_inside_when_the_track_is_confirmed_has_entered() -> None:
    run = zone_run()
    run.walk(along(0.5))
    assert run.types == ["zone-entered"]


def test_a_track_that_ends_inside_is_lost() -> None:
    run = zone_run()
    run.walk(along(*[0.5] * 5))
    run.picture(ended=[1])
    assert run.types == ["zone-entered", "zone-lost"]
    assert run.events[1].evidence["lastSequence"] == 5
    assert run.events[1].sequence == 6


def test_a_track_that_went_out_and_ends_unseen_after_min_seconds_has_left() -> None:
    run = zone_run(minSeconds=0.5)
    run.walk([*along(0.5, 0.5, 0.9), *[None] * 5])
    run.picture(ended=[1])
    assert run.types == ["zone-entered", "zone-left"]


def test_a_track_that_went_out_and_ends_before_min_seconds_is_lost() -> None:
    run = zone_run(minSeconds=0.5)
    run.walk(along(0.5, 0.5, 0.9))
    run.picture(ended=[1])
    assert run.types == ["zone-entered", "zone-lost"]
    assert run.events[1].evidence["path"][-1] == [2, 0.5, 0.5]


def test_the_border_of_a_zone_belongs_to_it() -> None:
    """Feet at the lower edge of the picture are in a zone that reaches to it."""
    run = zone_run(polygon=[[0, 0.5], [1, 0.5], [1, 1], [0, 1]])
    run.walk(along(0.5, y=1.0000001))
    assert run.types == ["zone-entered"]


def test_a_polygon_is_not_read_as_a_box() -> None:
    run = zone_run(polygon=[[0, 0], [0.2, 0], [0.2, 0.8], [1, 0.8], [1, 1], [0, 1]])
    run.walk(along(*[0.6] * 20, y=0.5))
    assert run.types == []


def test_a_long_visit_dwells_once_and_the_next_one_again() -> None:
    run = zone_run(dwellSeconds=3)
    run.walk(along(*[0.5] * 100, *[0.9] * 10, *[0.5] * 100))
    assert run.types == ["zone-entered", "zone-dwell", "zone-left", "zone-entered", "zone-dwell"]
    assert run.events[1].dwell_s == pytest.approx(3.0)


def test_a_short_visit_does_not_dwell() -> None:
    run = zone_run(dwellSeconds=3)
    run.walk(along(*[0.5] * 25, *[0.9] * 50))
    assert run.types == ["zone-entered", "zone-left"]


def test_who_jitters_outside_does_not_dwell_at_that_moment() -> None:
    run = zone_run(dwellSeconds=1)
    run.walk(along(*[0.5] * 9, *[0.29] * 3))
    assert run.types == ["zone-entered"]
    run.walk(along(0.5))
    assert run.types == ["zone-entered", "zone-dwell"]


def many(count: int, x: float = 0.5) -> list[Any]:
    return [track_at(number, (x, 0.5)) for number in range(1, count + 1)]


def test_a_zone_is_occupied_after_a_time_and_vacated_when_fewer_are_inside() -> None:
    run = zone_run(occupancy={"atLeast": 2, "forSeconds": 3}, minSeconds=0)
    for _ in range(30):
        run.picture(many(2))
    assert "zone-occupied" not in run.types
    for _ in range(5):
        run.picture(many(2))
    assert run.types[2:] == ["zone-occupied"]
    run.picture([*many(1), track_at(2, (0.9, 0.5))])
    assert run.types[2:] == ["zone-occupied", "zone-left", "zone-vacated"]
    occupied, vacated = run.events[2], run.events[4]
    assert occupied.document()["evidence"] == {"firstSequence": 1, "lastSequence": 31, "trackIds": [1, 2]}
    assert (occupied.count, vacated.count, occupied.label, vacated.track_id) == (2, 1, None, None)


def test_a_short_crowd_does_not_occupy_a_zone() -> None:
    run = zone_run(occupancy={"atLeast": 2, "forSeconds": 3}, minSeconds=0)
    for number in range(200):
        run.picture([*many(1), track_at(2, (0.5 if number % 20 < 10 else 0.9, 0.5))])
    assert run.counts()["zone-occupied"] == 0


def test_an_empty_shelf_is_reported_after_a_time_and_its_refill_at_once() -> None:
    run = zone_run(empty={"forSeconds": 10})
    for _ in range(100):
        run.picture()
    assert run.types == []
    for _ in range(50):
        run.picture()
    assert run.types == ["zone-empty"]
    run.walk(along(0.5))
    assert run.types == ["zone-empty", "zone-entered", "zone-filled"]
    assert run.events[0].document()["evidence"] == {"firstSequence": 1, "lastSequence": 101, "trackIds": []}


@pytest.mark.parametrize("is_tracking_off", [False, True])
def test_while_a_camera_is_offline_or_not_tracked_a_zone_is_not_known_to_be_empty(
    is_tracking_off: bool,
) -> None:
    run = zone_run(empty={"forSeconds": 10})
    run.picture()
    if is_tracking_off:
        run.scene.end_all()
    else:
        run.epoch += 1
    run.picture(after_s=3600)
    assert run.types == []
    for _ in range(101):
        run.picture()
    assert run.types == ["zone-empty"]


# --- time ---------------------------------------------------------------------------------------------------


def circle(period_s: float, begin: float, radius: float) -> Path:
    return lambda at_s: (
        0.5 + radius * math.cos(begin + 2 * math.pi * at_s / period_s),
        0.5 + radius * math.sin(begin + 2 * math.pi * at_s / period_s),
    )


@pytest.mark.parametrize("fps", [2, 5, 30])
def test_the_rate_of_the_pictures_does_not_change_the_counts(fps: float) -> None:
    """Twelve people walk in circles through a zone in a corner and over a line."""
    paths = {n: circle(9 + n, n, 0.15 + n / 60) for n in range(1, 13)}
    config = camera_config(
        zones={"corner": {"polygon": [[0.5, 0.5], [1, 0.5], [1, 1], [0.5, 1]], "dwellSeconds": 1.5}},
        lines={"door": {"start": [0.5, 0.5], "end": [0.5, 1]}},
    )
    run, reference = SceneRun(config), SceneRun(config)
    run.play(paths, fps, 90)
    reference.play(paths, 10, 90)
    assert sum(reference.counts().values()) > 250
    difference = Counter(run.counts())
    difference.subtract(reference.counts())
    # A decision in the last second of the run may come after its end.
    assert all(abs(count) <= 1 for count in difference.values()), difference


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_jump_of_the_clock_changes_nothing_but_the_time_in_the_documents(jump_s: float) -> None:
    """Only a schedule reads it."""
    run = zone_run(dwellSeconds=3, empty={"forSeconds": 10})
    run.walk(along(*[0.5] * 10))
    run.now += timedelta(seconds=jump_s)
    run.walk(along(*[0.5] * 10))
    assert run.types == ["zone-entered"]
    run.walk(along(*[0.5] * 11))
    assert run.types == ["zone-entered", "zone-dwell"]


def test_a_gap_between_pictures_neither_enters_nor_leaves() -> None:
    run = zone_run()
    run.walk(along(0.5, 0.5))
    run.walk(along(0.5), after_s=60)
    assert run.types == ["zone-entered"]


# --- schedules ----------------------------------------------------------------------------------------------


def test_who_is_inside_when_a_schedule_opens_has_entered_and_is_lost_when_it_closes() -> None:
    """The run begins at 10:00."""
    run = zone_run(schedule={"from": "10:01", "to": "10:02"}, occupancy={"atLeast": 1}, empty={})
    run.walk(along(*[0.5] * 150), after_s=1)
    assert run.types == ["zone-entered", "zone-occupied", "zone-lost", "zone-vacated"]
    assert [f"{event.at:%H:%M}" for event in run.events] == ["10:01", "10:01", "10:02", "10:02"]


def test_a_zone_that_was_empty_when_it_closed_is_filled_when_it_opens() -> None:
    """Each of the two types comes after the other one, whatever the schedule."""
    run = zone_run(schedule={"from": "10:01", "to": "10:00"}, empty={"forSeconds": 10})
    run.now = run.now.replace(hour=9, minute=59)
    for _ in range(30):
        run.picture(after_s=1)
    assert run.types == ["zone-empty"]
    for _ in range(40):
        run.picture(after_s=1)
    run.walk(along(*[0.5] * 100), after_s=1)
    assert run.types == ["zone-empty", "zone-entered", "zone-filled"]
