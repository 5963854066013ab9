"""Draws on a picture: boxes with labels; or tracks, zones and lines."""

import colorsys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames.geometry import Point
from visionedge.frames.types import FrameResult, Picture

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_GOLDEN_ANGLE = 0.381966
"""Share of the colour circle between the hues of two neighbouring classes."""

_OUTLINE = (24, 24, 24)
"""Under a line of another colour, so that it is visible on a background of its colour."""
_ZONE_COLOUR, _LINE_COLOUR = (255, 190, 60), (0, 215, 255)
_ZONE_SHARE = 0.18
"""How opaque the area of a zone is."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class DrawnTrack:
    """A track: its box (left, top, width, height) and the newest points of its path, 0-1 of the picture.

    `attributes`: what second models say of it.
    """

    track_id: int
    label: str
    box: tuple[float, float, float, float]
    tail: tuple[Point, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DrawnRule:
    """A zone (3 points or more) or a line (2) with lines of text; thick while it is `active`."""

    points: tuple[Point, ...]
    captions: tuple[str, ...]
    active: bool = False


def draw_detections(picture: Picture, result: FrameResult) -> Picture:
    """Return a copy of the picture with boxes, labels, scores in percent, and attributes.

    `picture` is uint8 (h, w, 3) BGR, at any size.
    """
    canvas = np.ascontiguousarray(picture).copy()
    found, labels = result.detections, result.label_detections()
    attributes = result.attributes or ({},) * len(found)
    # The highest scores are drawn last, on top of the others.
    for row in range(len(found) - 1, -1, -1):
        class_id = int(found.class_ids[row])
        left, top, right, bottom = _corners(found.boxes[row].tolist(), canvas)
        name = f"{labels[row]} {round(100 * float(found.scores[row]))}%"
        caption = _add_attributes(name, attributes[row])
        _draw(canvas, (left, top, right, bottom), caption, class_colour(class_id))
    return canvas


def draw_scene(picture: Picture, rules: Sequence[DrawnRule], tracks: Iterable[DrawnTrack]) -> Picture:
    """Return a copy of the picture with zones and lines, and over them tracks with their tails.

    `picture` is uint8 (h, w, 3) BGR, at any size.
    """
    canvas = np.ascontiguousarray(picture).copy()
    for rule in rules:
        _draw_rule(canvas, rule)
    for track in tracks:
        colour = class_colour(track.track_id)
        _draw_path(canvas, _to_pixels(track.tail, canvas), colour, _line_px(canvas) + 1)
        left, top, width, height = track.box
        corners = _corners([left, top, left + width, top + height], canvas)
        caption = _add_attributes(f"{track.label} {track.track_id}", track.attributes)
        _draw(canvas, corners, caption, colour)
    for rule in rules:  # over the boxes: what is counted must be readable
        _draw_captions(canvas, rule)
    return canvas


def _draw_rule(canvas: Picture, rule: DrawnRule) -> None:
    points = _to_pixels(rule.points, canvas)
    line_px = _line_px(canvas) * (2 if rule.active else 1)
    if len(points) > 2:
        area = np.zeros(canvas.shape[:2], np.uint8)
        cv2.fillPoly(area, [points], 255)
        inside = area > 0
        tint = np.array(_ZONE_COLOUR, np.float32) * _ZONE_SHARE
        canvas[inside] = (canvas[inside] * (1 - _ZONE_SHARE) + tint).astype(np.uint8)
        _draw_path(canvas, np.vstack([points, points[:1]]), _ZONE_COLOUR, line_px)
        return
    _draw_path(canvas, points, _LINE_COLOUR, line_px)
    start, end = points.astype(np.float64)
    # An arrow from the left side to the right one: `left-to-right`, as seen from the start to the end.
    across = np.array([start[1] - end[1], end[0] - start[0]])
    middle, reach = (start + end) / 2, across / max(1.0, float(np.hypot(*across))) * 8 * _line_px(canvas)
    tail, tip = ([round(float(value)) for value in point] for point in (middle - reach, middle + reach))
    for colour, width_px in ((_OUTLINE, line_px + 2), (_LINE_COLOUR, line_px)):
        cv2.arrowedLine(canvas, tail, tip, colour, width_px, cv2.LINE_AA, tipLength=0.4)
        first = [round(float(value)) for value in start]
        cv2.circle(canvas, first, width_px + 2, colour, cv2.FILLED, cv2.LINE_AA)


def _draw_captions(canvas: Picture, rule: DrawnRule) -> None:
    """Draw the texts of a zone below or above it, where they hide least, those of a line from its end."""
    points, captions = _to_pixels(rule.points, canvas), [to_ascii(caption) for caption in rule.captions]
    height_px, space_px = sum(_caption_size(canvas, caption)[1] for caption in captions), canvas.shape[0]
    if len(points) > 2:
        colour, margin_px = _ZONE_COLOUR, 2 * _line_px(canvas)
        x, top, bottom = (
            int(value) for value in (points[:, 0].min(), points[:, 1].min(), points[:, 1].max())
        )
        y = bottom + margin_px
        if y + height_px > space_px and top - margin_px >= height_px:
            y = top - margin_px - height_px
    else:
        colour, (x, y) = _LINE_COLOUR, (int(value) for value in points[1])
    y = max(0, min(y, space_px - height_px))
    for caption in captions:
        y = _draw_caption(canvas, (x, y), caption, colour)


def _to_pixels(points: Iterable[Point], canvas: Picture) -> NDArray[np.int32]:
    """Return relative points in pixels, (n, 2)."""
    height, width = canvas.shape[:2]
    rows = [(round(x * (width - 1)), round(y * (height - 1))) for x, y in points]
    return np.array(rows, np.int32).reshape(-1, 2)


def _draw_path(canvas: Picture, points: NDArray[np.int32], colour: Colour, line_px: int) -> None:
    if len(points) > 1:
        cv2.polylines(
            canvas, [points], isClosed=False, color=_OUTLINE, thickness=line_px + 2, lineType=cv2.LINE_AA
        )
        cv2.polylines(canvas, [points], isClosed=False, color=colour, thickness=line_px, lineType=cv2.LINE_AA)


def class_colour(class_id: int) -> Colour:
    """Return the BGR colour of a class: constant, bright, and different from neighbouring classes."""
    red, green, blue = colorsys.hls_to_rgb((class_id * _GOLDEN_ANGLE) % 1.0, 0.6, 0.85)
    return round(blue * 255), round(green * 255), round(red * 255)


def to_ascii(text: str) -> str:
    """Return the text in ASCII for OpenCV's fonts: without accents, other characters become '?'."""
    folded = unicodedata.normalize("NFKD", text)
    kept = (sign for sign in folded if not unicodedata.combining(sign))
    return "".join(sign if " " <= sign <= "~" else "?" for sign in kept)


def _add_attributes(name: str, attributes: Mapping[str, str]) -> str:
    """Return ``person 12 helmet: no`` in ASCII."""
    return to_ascii(" ".join([name, *(f"{model}: {label}" for model, label in attributes.items())]))


def _corners(box: list[float], canvas: Picture) -> tuple[int, int, int, int]:
    """Return a relative box in pixels, moved inside so far that its line is visible at the border."""
    height, width = canvas.shape[:2]
    inset = _line_px(canvas) // 2
    last_x, last_y = max(inset, width - 1 - inset), max(inset, height - 1 - inset)
    left = min(max(round(box[0] * width), inset), last_x)
    top = min(max(round(box[1] * height), inset), last_y)
    right = min(max(round(box[2] * width), left), last_x)
    bottom = min(max(round(box[3] * height), top), last_y)
    return left, top, right, bottom


def _line_px(canvas: Picture) -> int:
    return max(1, round(int(min(canvas.shape[:2])) / 240))


def _draw(canvas: Picture, corners: tuple[int, int, int, int], caption: str, colour: Colour) -> None:
    left, top, right, bottom = corners
    line_px = _line_px(canvas)
    cv2.rectangle(canvas, (left, top), (right, bottom), _OUTLINE, line_px + 2, cv2.LINE_AA)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, line_px, cv2.LINE_AA)
    _draw_caption(canvas, (left, top), caption, colour, above=True)


def _draw_caption(
    canvas: Picture, corner: tuple[int, int], caption: str, colour: Colour, *, above: bool = False
) -> int:
    """Draw a text on a ground of this colour below the corner, or `above` it; return where it ends (y)."""
    size = width, height = _caption_size(canvas, caption)
    x, y = _caption_position(canvas, corner, size, above=above)
    cv2.rectangle(canvas, (x, y), (x + width, y + height), colour, cv2.FILLED)
    scale, pen_px = _font_size(canvas)
    (_, ascent), _ = cv2.getTextSize(caption, _FONT, scale, pen_px)
    at = (x + _padding_px(ascent), y + _padding_px(ascent) + ascent)
    cv2.putText(canvas, caption, at, _FONT, scale, _text_colour(colour), pen_px, cv2.LINE_AA)
    return y + height


def _font_size(canvas: Picture) -> tuple[float, int]:
    """Scale of the font, and width of its lines in pixels."""
    scale = max(0.35, min(canvas.shape[:2]) / 1000)
    return scale, max(1, round(scale * 1.6))


def _padding_px(ascent: int) -> int:
    return max(2, ascent // 3)


def _caption_size(canvas: Picture, caption: str) -> tuple[int, int]:
    """Width and height of a text with its ground."""
    (width, ascent), below = cv2.getTextSize(caption, _FONT, *_font_size(canvas))
    return width + 2 * _padding_px(ascent), ascent + below + 2 * _padding_px(ascent)


def _caption_position(
    canvas: Picture, corner: tuple[int, int], size: tuple[int, int], *, above: bool
) -> tuple[int, int]:
    """Return a position above the corner if there is space, or below; always inside the picture."""
    left, top = corner
    y = top - size[1] if above and top >= size[1] else top
    return max(0, min(left, canvas.shape[1] - size[0])), max(0, min(y, canvas.shape[0] - size[1]))


def _text_colour(colour: Colour) -> Colour:
    """Return black or white, for contrast with `colour` (luma of BT.601)."""
    blue, green, red = colour
    return (16, 16, 16) if 0.114 * blue + 0.587 * green + 0.299 * red > 120 else (255, 255, 255)
