"""Resizes a decoded picture to the model's input size, in one step: letterbox or stretch."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames.antialias import resize_antialiased
from visionedge.frames.types import InputSpec, Picture, Placement, Resample

Plane = NDArray[np.uint8] | NDArray[np.uint16]
"""A picture or one plane of it."""


def fit_to_input(picture: Picture, spec: InputSpec, out: Picture | None = None) -> tuple[Picture, Placement]:
    """Resize a picture to the model's input size, and return it with its place in that input.

    Args:
        picture: uint8 (height, width, 3), BGR.
        spec: the model's input.
        out: uint8 (spec.height_px, spec.width_px, 3) to be overwritten; None: a new array.

    Returns:
        BGR of that shape (`out` itself if given), and the placement.

    Raises:
        ValueError: the picture or `out` has another shape or type.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
        raise ValueError(f"a picture must be uint8 (height, width, 3), not {picture.dtype} {picture.shape}")
    size_px = (picture.shape[1], picture.shape[0])
    return draw_to_input(size_px, spec, out, lambda window: _draw_resized(picture, window, spec.resample))


def draw_to_input(
    size_px: tuple[int, int], spec: InputSpec, out: Picture | None, draw: Callable[[Picture], None]
) -> tuple[Picture, Placement]:
    """Like `fit_to_input`, for a caller that draws the picture at its new size itself.

    Args:
        size_px: width and height of the source picture.
        spec: the model's input.
        out: as for `fit_to_input`.
        draw: fills its argument, uint8 (height, width, 3), with the whole picture.

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
    # Only the border is filled: for a wide picture a third of the bytes of the whole input.
    out[:top] = spec.pad
    out[bottom:] = spec.pad
    out[top:bottom, :left] = spec.pad
    out[top:bottom, right:] = spec.pad
    return out, placement


def _draw_resized(picture: Picture, window: Picture, resample: Resample) -> None:
    height, width = window.shape[:2]
    if picture.shape == window.shape:
        window[:] = picture
    elif resample == "antialias":
        window[:] = resize_antialiased(picture, width, height)
    else:
        resize_into(picture, window, cv2.INTER_LINEAR)


def resize_into(plane: Plane, out: Plane, interpolation: int) -> None:
    """Resize a picture or a plane with OpenCV to the size of `out`, which it fills."""
    size_px = (out.shape[1], out.shape[0])
    copy_if_separate(cv2.resize(plane, size_px, dst=out, interpolation=interpolation), out)


def copy_if_separate(result: object, out: Plane) -> None:
    """Copy a result of OpenCV into `out`, the `dst` of the call, if it is an array of its own.

    OpenCV writes through a view such as a letterbox window, but does not document it.
    """
    array = np.asarray(result, out.dtype)
    if array is not out and not np.shares_memory(array, out):
        out[:] = array
