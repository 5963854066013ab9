"""The scene of a camera: masks, reconnects, other models, and its document."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scene_paths import DOOR, SQUARE, PathTrack, SceneRun, camera_config, track_at
from visionedge.frames.geometry import PolygonArea
from visionedge.frames.types import Detections
from visionedge.scene.camera_scene import apply_masks
from visionedge.scene.rules import LineRule, Position, Visit, ZoneRule, crossing, presence

CONFIG = camera_config(zones={"queue": {"polygon": SQUARE}}, lines={"door": DOOR})


def test_tracks_live_through_a_reconnect_a_lost_picture_and_another_model() -> None:
    run = SceneRun(CONFIG)
    run.walk([(0.4, 0.5)] * 3)
    run.epoch += 1
    run.walk([None, (0.4, 0.5)], after_s=1.5)
    run.model = "another"
    run.walk([(0.6, 0.5)] * 3)
    assert run.types == ["zone-entered", "right-to-left"]
    crossed = run.events[1]
    assert (crossed.epoch, crossed.model, crossed.track_id) == (2, "another", 1)


def test_who_is_inside_when_a_camera_stays_offline_is_lost() -> None:
    """Without a picture: the loss belongs to the last one."""
    run = SceneRun(CONFIG)
    run.walk([(0.4, 0.5)] * 3)
    run._take(run.scene.end_all())
    assert run.types == ["zone-entered", "zone-lost"]
    assert run.events[1].sequence == 3
    assert not run.scene.end_all()
    run.epoch += 1
    run.walk([(0.4, 0.5)] * 3, track_id=2, after_s=60)
    assert run.types == ["zone-entered", "zone-lost", "zone-entered"]


def test_the_document_of_a_scene() -> None:
    run = SceneRun(CONFIG)
    run.picture([track_at(1, (0.4, 0.5)), track_at(2, (0.1, 0.5), "car")])
    run.picture([track_at(1, (0.4, 0.5)), track_at(2, (0.9, 0.5), "car")], after_s=1)
    assert run.scene.document() == {
        "camera": "dock",
        "since": "2026-11-30T10:00:00.000Z",
        "tracks": [
            {
                "trackId": 1,
                "label": "person",
                "ageSeconds": 1.0,
                "box": {"left": 0.38, "top": 0.4, "width": 0.04, "height": 0.1},
                "zones": ["queue"],
            },
            {
                "trackId": 2,
                "label": "car",
                "ageSeconds": 1.0,
                "box": {"left": 0.88, "top": 0.4, "width": 0.04, "height": 0.1},
                "zones": [],
            },
        ],
        "zones": {
            "queue": {
                "since": "2026-11-30T10:00:00.000Z",
                "inside": {"person": 1},
                "entered": {"person": 1},
                "left": {},
                "lost": {},
            }
        },
        "lines": {
            "door": {"since": "2026-11-30T10:00:00.000Z", "left-to-right": {}, "right-to-left": {"car": 1}}
        },
    }


def test_boxes_in_documents_are_clipped_to_the_picture() -> None:
    """Those of a tracker may lie partly outside."""
    run = SceneRun(camera_config(zones={"all": {"polygon": [[0, 0], [1, 0], [1, 1], [0, 1]]}}))
    run.picture([PathTrack(1, "person", (-0.1, 0.8, 0.3, 0.4))])
    expected = {"left": 0.0, "top": 0.8, "width": 0.2, "height": 0.2}
    assert run.events[0].document()["box"] == expected
    assert run.events[0].evidence["path"] == [[1, 0.05, 1.0]]
    assert run.scene.document()["tracks"][0]["box"] == expected


def test_a_scene_without_zones_has_tracks_and_no_events() -> None:
    run = SceneRun(camera_config())
    run.walk([(0.4, 0.5), (0.6, 0.5)])
    assert run.events == []
    assert run.scene.document()["since"] is None
    assert len(run.scene.document()["tracks"]) == 1


def test_the_path_of_a_long_visit_is_bounded_and_spans_all_of_it() -> None:
    run = SceneRun(CONFIG)
    run.walk([(0.3 + n / 50_000, 0.5) for n in range(10_000)])
    trails = [*run.scene._tracks[1].trails.values()]
    assert all(len(trail._sparse) <= 64 for trail in trails)
    run.picture(ended=[1])
    path = run.events[-1].evidence["path"]
    sequences = [sequence for sequence, _, _ in path]
    assert (len(path), sequences[0], sequences[-1]) == (64, 1, 10_000)
    assert max(after - before for before, after in pairwise(sequences)) < 700


def test_500_zones_of_one_camera_count() -> None:
    zones = {f"zone {n}": {"polygon": SQUARE, "dwellSeconds": 1} for n in range(500)}
    run = SceneRun(camera_config(zones=zones))
    run.walk([(0.5, 0.5)] * 20)
    assert run.counts() == {"zone-entered": 500, "zone-dwell": 500}


def test_ids_of_events_differ_by_camera_zone_type_and_track_and_not_by_run() -> None:
    runs = [SceneRun(CONFIG), SceneRun(CONFIG)]
    for run in runs:
        run.picture([track_at(1, (0.4, 0.5)), track_at(2, (0.5, 0.5))])
        run.picture([track_at(1, (0.9, 0.5))], ended=[2])
        run.walk([(0.9, 0.5)] * 10)
    first, second = ([event.id for event in run.events] for run in runs)
    assert first == second
    assert len(set(first)) == len(first) == 5
    assert all(len(event_id) == 32 for event_id in first)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.29, 0.31, 0.49, 0.51, 0.9]), st.floats(0.25, 0.85)), min_size=2
    ),
    st.sampled_from([0, 0.15, 0.5]),
)
def test_a_scene_decides_as_its_rules_do_on_every_picture(
    places: list[tuple[float, float]], min_s: float
) -> None:
    """It passes over tracks that rest on one side of a zone or line."""
    zones = {"queue": {"polygon": SQUARE, "minSeconds": min_s}}
    config = camera_config(zones=zones, lines={"door": {**DOOR, "minSeconds": min_s}})
    run = SceneRun(config)
    run.walk(places)
    zone = ZoneRule.of("queue", config.zones["queue"], None)
    line = LineRule.of("door", config.lines["door"], None, 4 / 3)
    visit, passage, before = Visit(), None, None
    expected: list[str | None] = []
    for number, (x, y) in enumerate(places):
        now = Position(number, number * 0.1, x, round(y, 6))
        visit, entry = presence(zone, visit, before, now)
        passage, crossed = crossing(line, passage, before, now)
        expected += [each.direction or each.type for each in (entry, crossed) if each]
        before = now
    assert run.types == expected


@pytest.mark.parametrize("masks", [[], [((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))]])
def test_a_mask_drops_detections_by_their_bottom_centre(masks: list[tuple[tuple[float, float], ...]]) -> None:
    detections = Detections(
        np.array([[0.4, 0.2, 0.7, 0.6], [0.2, 0.2, 0.7, 0.6], [0.5, 0.1, 0.5, 0.9]], np.float32),
        np.array([0.9, 0.8, 0.7], np.float32),
        np.array([0, 1, 2], np.int32),
    )
    areas = [PolygonArea(mask) for mask in masks]
    kept = apply_masks(detections, areas)
    assert kept.class_ids.tolist() == ([0] if masks else [0, 1, 2])
    assert kept.scores.dtype == np.float32
    assert len(apply_masks(apply_masks(kept, areas), areas)) == len(kept)
