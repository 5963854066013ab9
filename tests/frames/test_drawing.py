"""Boxes and labels on pictures."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fake_backend import grey, result
from visionedge.frames.drawing import (
    DrawnRule,
    DrawnTrack,
    class_colour,
    draw_detections,
    draw_scene,
    to_ascii,
)
from visionedge.frames.types import Detections, FrameResult, Picture


def painted(before: Picture, after: Picture) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    return np.asarray((before != after).any(axis=2))


def labelled(text: str) -> FrameResult:
    made = result()
    return FrameResult(made.frame, made.detections, made.timing, made.device, made.model, (text,))


def test_the_box_is_drawn_at_its_place_on_a_copy_of_the_picture() -> None:
    picture = grey(640, 480)
    before = picture.copy()
    drawn = draw_detections(picture, result(picture=picture))
    assert np.array_equal(picture, before)
    changed = painted(before, drawn)
    for x, y in ((160, 240), (479, 240), (320, 359)):
        assert changed[y - 2 : y + 3, x - 2 : x + 3].any(), (x, y)
    assert not changed[200:300, 200:440].any(), "the inside is left free"
    assert not changed[400:, :].any()


def test_a_box_as_large_as_the_picture_is_visible_on_all_four_sides() -> None:
    picture = grey(320, 240)
    changed = painted(picture, draw_detections(picture, result(picture=picture, boxes=[[0, 0, 1, 1]])))
    for side in (changed[200, :6], changed[200, -6:], changed[-6:, 160]):
        assert side.any()
    assert changed[:, 160][:30].any()


def test_a_picture_without_detections_is_an_equal_copy() -> None:
    picture = grey()
    drawn = draw_detections(picture, result(picture=picture, boxes=[]))
    assert np.array_equal(drawn, picture)
    assert drawn is not picture


@pytest.mark.parametrize("size", [(8, 8), (33, 500), (3840, 2160)])
def test_lines_and_labels_fit_any_size_of_picture(size: tuple[int, int]) -> None:
    picture = grey(*size)
    drawn = draw_detections(picture, result(picture=picture, boxes=[[0.4, 0, 1, 0.6], [0, 0.5, 0.001, 1]]))
    assert drawn.shape == picture.shape
    assert painted(picture, drawn).any()


def test_line_width_grows_with_the_picture() -> None:
    def line_px(width_px: int, height_px: int) -> int:
        picture = grey(width_px, height_px)
        changed = painted(picture, draw_detections(picture, result(picture=picture)))
        return int(changed[height_px * 3 // 4 - 40 : height_px * 3 // 4 + 40, width_px // 2].sum())

    assert line_px(3840, 2160) > line_px(640, 480)


def test_a_read_only_picture_is_annotated_too() -> None:
    picture = grey(320, 240)
    picture.setflags(write=False)
    assert painted(picture, draw_detections(picture, result(picture=picture))).any()


def test_labels_in_other_scripts_do_not_break_the_drawing() -> None:
    assert to_ascii("Fußgänger") == "Fu?ganger"
    assert to_ascii("人") == "?"
    assert to_ascii("a\nb") == "a?b"
    picture = grey(320, 240)
    assert painted(picture, draw_detections(picture, labelled("人 und Ä"))).any()


def test_a_class_without_a_label_gets_its_number() -> None:
    made = result()
    found = Detections(made.detections.boxes, made.detections.scores, np.array([99], np.int32))
    unknown = FrameResult(made.frame, found, made.timing, "cpu", "nano", ("person",))
    assert painted(grey(), draw_detections(grey(), unknown)).any()


def test_colours_are_stable_and_differ_between_classes() -> None:
    colours = [class_colour(class_id) for class_id in range(80)]
    assert colours == [class_colour(class_id) for class_id in range(80)]
    assert len(set(colours)) == 80
    for one, other in pairwise(colours):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 100


RULES = {
    "a zone": [(0.2, 0.2), (0.2, 0.5), (0.8, 0.5), (0.8, 0.2)],
    "a zone at the lower border": [(0.2, 0.5), (0.2, 1.0), (0.8, 1.0), (0.8, 0.5)],
    "a zone as large as the picture": [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)],
    "a line that ends at the lower border": [(0.5, 0.2), (0.5, 1.0)],
}


@pytest.mark.parametrize("shape", RULES)
def test_two_captions_of_a_zone_or_line_do_not_cover_each_other(shape: str) -> None:
    """Together they need the space of both, wherever they are drawn."""
    picture = grey(640, 384)
    points = tuple(RULES[shape])
    bare = draw_scene(picture, [DrawnRule(points, ())], [])

    def grown(*captions: str) -> int:
        drawn = draw_scene(picture, [DrawnRule(points, captions)], [])
        return int(painted(bare, drawn).any(axis=1).sum())

    # The line of the zone or line is of the same colour as the captions, and may lie under them.
    assert grown("dock: 2 inside", "5 in") >= 1.9 * grown("dock: 2 inside")


def test_attributes_stand_beside_the_label() -> None:
    """Of detections and of tracks; a caption is longer with them."""
    picture = grey(400, 300)
    plain = result(picture=picture, boxes=[[0.1, 0.5, 0.3, 0.9]])
    answered = replace(plain, track_ids=(1,), attributes=({"helmet": "no"},))
    widths = [
        painted(picture, draw_detections(picture, each))[:140].any(axis=0).sum() for each in (plain, answered)
    ]
    assert widths[1] > widths[0] + 30
    box = (0.1, 0.5, 0.2, 0.4)
    tracks = [DrawnTrack(12, "person", box), DrawnTrack(12, "person", box, attributes={"helmet": "é"})]
    widths = [painted(picture, draw_scene(picture, [], [each]))[:140].any(axis=0).sum() for each in tracks]
    assert widths[1] > widths[0] + 30
