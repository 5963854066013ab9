"""Whether rows can be detections at all: the last check of a reading, on what the model really gives.

Shapes and nodes may leave a doubt; numbers that are no scores, no classes or no boxes of the picture end it.
"""

import numpy as np
from numpy.typing import NDArray

_LEAST_ROWS = 50  # fewer say nothing of all
_SLACK = 1e-3
_CORNER = 1 / 3
_MOST_SHARE = 0.5
_BEYOND = 1.2
_ALL = 0.98
_TOGETHER = 0.5


def doubt(rows: NDArray[np.float32], width_px: int, height_px: int) -> str:
    """What speaks against the rows of a picture, (K, 6), being detections in it; "" where nothing does.

    The picture should be noise, which a detector is unsure of everywhere.
    """
    scores, classes = rows[:, 4], rows[:, 5]
    if len(rows) and (scores.min() < -_SLACK or scores.max() > 1 + _SLACK):
        return f"its scores go from {scores.min():.3g} to {scores.max():.3g}, not from 0 to 1"
    if (np.abs(classes - np.round(classes)) > _SLACK).any() or classes.min(initial=0) < -_SLACK:
        return "its classes are no whole numbers"
    real = rows[scores > 0]
    return _doubt_of_boxes(real, width_px, height_px) if len(real) >= _LEAST_ROWS else ""


def _doubt_of_boxes(real: NDArray[np.float32], width_px: int, height_px: int) -> str:
    backwards = ((real[:, 2] < real[:, 0]) | (real[:, 3] < real[:, 1])).mean()
    if backwards > _MOST_SHARE:
        return f"{backwards:.0%} of its boxes end before they begin"
    if _were_corners(real, width_px, height_px):
        return (
            "nearly all its boxes are larger than their centre is far from the top left, and some reach far "
            "out of the picture, as if two corners were taken for a centre and a size"
        )
    right, bottom = real[:, [0, 2]].max(), real[:, [1, 3]].max()
    if right < width_px * _CORNER and bottom < height_px * _CORNER:
        return (
            f"all its boxes lie within {right:.3g} x {bottom:.3g} at the top left of {width_px} x "
            f"{height_px}, as if their unit were another than a pixel of its input"
        )
    return ""


def _were_corners(rows: NDArray[np.float32], width_px: int, height_px: int) -> bool:
    """Whether boxes look like a corner (x, y) with as size the other corner, which is always farther out.

    The two go together, wherever a box lies; a size does not care where its centre is.
    """
    left, top, right, bottom = rows[:, :4].astype(np.float64).T
    farther = ((right >= 3 * left) & (bottom >= 3 * top)).mean()
    beyond = right.max() > _BEYOND * width_px or bottom.max() > _BEYOND * height_px
    together = _together(left + right, right - left) and _together(top + bottom, bottom - top)
    return bool(farther >= _ALL and beyond and together)


def _together(centres: NDArray[np.float64], sizes: NDArray[np.float64]) -> bool:
    if not centres.std() or not sizes.std():
        return False
    return bool(np.corrcoef(centres, sizes)[0, 1] >= _TOGETHER)
