"""From a decoded picture to the model's input size, in one resize."""

from collections.abc import Callable

import cv2
import numpy as np

from visionedge.frames.antialias import resize_antialiased
from visionedge.frames.types import InputSpec, Picture, Placement, Resample


def fit_to_input(picture: Picture, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
    """The picture at the model's size, and where the whole of it lies in there.

    Args:
        picture: uint8 (height, width, 3), BGR.
        spec: the size and the way of fitting.
        out: uint8 (spec.height_px, spec.width_px, 3) to be overwritten; a new array when absent.

    Returns:
        BGR of that shape (`out` itself where it was given), and the placement.

    Raises:
        ValueError: the picture or `out` has another shape or type.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
        raise ValueError(f"a picture is uint8 (height, width, 3), not {picture.dtype} {picture.shape}")
    size_px = (picture.shape[1], picture.shape[0])
    return draw_to_input(size_px, spec, out, lambda window: _resize_into(picture, window, spec.resample))


def draw_to_input(
    size_px: tuple[int, int], spec: InputSpec, out: Picture | None, draw: Callable[[Picture], None]
) -> tuple[Picture, Placement]:
    """As `fit`, for whoever draws the picture at its new size himself.

    Args:
        size_px: width and height of the source picture.
        spec: the size and the way of fitting.
        out: as for `fit`.
        draw: fills the array it is given, uint8 (height, width, 3), with the whole picture.

    Raises:
        ValueError: `out` has another shape or type.
    """
    shape = (spec.height_px, spec.width_px, 3)
    out = np.empty(shape, np.uint8) if out is None else out
    if out.shape != shape or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 {shape}, not {out.dtype} {out.shape}")
    placement = spec.place(*size_px)
    left, top = int(placement.left_px), int(placement.top_px)
    right, bottom = left + int(placement.width_px), top + int(placement.height_px)
    draw(out[top:bottom, left:right])
    # Only the border is filled: for a wide picture that is a third of the bytes of filling all.
    out[:top] = spec.pad
    out[bottom:] = spec.pad
    out[top:bottom, :left] = spec.pad
    out[top:bottom, right:] = spec.pad
    return out, placement


def _resize_into(picture: Picture, window: Picture, resample: Resample) -> None:
    height, width = window.shape[:2]
    if picture.shape == window.shape:
        window[:] = picture
        return
    if resample == "antialias":
        window[:] = resize_antialiased(picture, width, height)
        return
    resized = cv2.resize(picture, (width, height), dst=window, interpolation=cv2.INTER_LINEAR)
    # OpenCV writes through a view of rows; should it ever answer with an array of its own, that one counts.
    if resized is not window and not np.shares_memory(resized, window):
        window[:] = resized
