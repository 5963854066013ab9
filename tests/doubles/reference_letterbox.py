"""Fitting a picture to an input, the slow way."""

import numpy as np

from visionedge.frames.types import InputSpec, Picture


def reference_letterbox(picture: Picture, spec: InputSpec) -> Picture:
    """The same, plainly: a padded canvas and bilinear interpolation pixel by pixel in float64."""
    place = spec.place(picture.shape[1], picture.shape[0])
    width, height = int(place.width_px), int(place.height_px)
    canvas = np.full((spec.height_px, spec.width_px, 3), spec.pad, np.float64)
    rows = np.clip((np.arange(height) + 0.5) * picture.shape[0] / height - 0.5, 0, picture.shape[0] - 1)
    columns = np.clip((np.arange(width) + 0.5) * picture.shape[1] / width - 0.5, 0, picture.shape[1] - 1)
    upper, left = rows.astype(int), columns.astype(int)
    lower = np.minimum(upper + 1, picture.shape[0] - 1)
    right = np.minimum(left + 1, picture.shape[1] - 1)
    down, across = (rows - upper)[:, None, None], (columns - left)[None, :, None]
    source = picture.astype(np.float64)
    top_row = source[upper][:, left] * (1 - across) + source[upper][:, right] * across
    low_row = source[lower][:, left] * (1 - across) + source[lower][:, right] * across
    top, begin = int(place.top_px), int(place.left_px)
    canvas[top : top + height, begin : begin + width] = top_row * (1 - down) + low_row * down
    return np.rint(canvas).astype(np.uint8)
