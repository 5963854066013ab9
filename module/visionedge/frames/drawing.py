"""Draws boxes and labels on a picture."""

import colorsys
import unicodedata

import cv2
import numpy as np

from visionedge.frames.types import FrameResult, Picture

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_GOLDEN_ANGLE = 0.381966
"""Share of the colour circle between the hues of two neighbouring classes."""

Colour = tuple[int, int, int]


def draw_detections(picture: Picture, result: FrameResult) -> Picture:
    """Return a copy of the picture with boxes, labels and scores in percent.

    `picture` is uint8 (h, w, 3) BGR, at any size.
    """
    canvas = np.ascontiguousarray(picture).copy()
    found, labels = result.detections, result.label_detections()
    # The highest scores are drawn last, on top of the others.
    for row in range(len(found) - 1, -1, -1):
        class_id = int(found.class_ids[row])
        left, top, right, bottom = _corners(found.boxes[row].tolist(), canvas)
        caption = f"{to_ascii(labels[row])} {round(100 * float(found.scores[row]))}%"
        _draw(canvas, (left, top, right, bottom), caption, class_colour(class_id))
    return canvas


def class_colour(class_id: int) -> Colour:
    """Return the BGR colour of a class: constant, bright, and different from neighbouring classes."""
    red, green, blue = colorsys.hls_to_rgb((class_id * _GOLDEN_ANGLE) % 1.0, 0.6, 0.85)
    return round(blue * 255), round(green * 255), round(red * 255)


def to_ascii(text: str) -> str:
    """Return the text in ASCII for OpenCV's fonts: without accents, other characters become '?'."""
    folded = unicodedata.normalize("NFKD", text)
    kept = (sign for sign in folded if not unicodedata.combining(sign))
    return "".join(sign if " " <= sign <= "~" else "?" for sign in kept)


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
    # A dark outline keeps the box visible on a background of the same colour.
    cv2.rectangle(canvas, (left, top), (right, bottom), (24, 24, 24), line_px + 2, cv2.LINE_AA)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, line_px, cv2.LINE_AA)
    scale = max(0.35, min(canvas.shape[:2]) / 1000)
    pen_px = max(1, round(scale * 1.6))
    (width, height), below = cv2.getTextSize(caption, _FONT, scale, pen_px)
    pad_px = max(2, height // 3)
    x, y = _caption_position(canvas, (left, top), (width + 2 * pad_px, height + below + 2 * pad_px))
    end = (x + width + 2 * pad_px, y + height + below + 2 * pad_px)
    cv2.rectangle(canvas, (x, y), end, colour, cv2.FILLED)
    at = (x + pad_px, y + pad_px + height)
    cv2.putText(canvas, caption, at, _FONT, scale, _text_colour(colour), pen_px, cv2.LINE_AA)


def _caption_position(canvas: Picture, corner: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return a position above the box, or inside if there is no space; always inside the picture."""
    left, top = corner
    y = top - size[1] if top >= size[1] else top
    return max(0, min(left, canvas.shape[1] - size[0])), max(0, min(y, canvas.shape[0] - size[1]))


def _text_colour(colour: Colour) -> Colour:
    """Return black or white, for contrast with `colour` (luma of BT.601)."""
    blue, green, red = colour
    return (16, 16, 16) if 0.114 * blue + 0.587 * green + 0.299 * red > 120 else (255, 255, 255)
