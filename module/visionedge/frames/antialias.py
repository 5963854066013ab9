"""Resizing with antialiasing, as some model families do it in training and inference.

A pixel of the smaller picture is the mean of all pixels that it covers, weighted by a triangle. OpenCV's
bilinear resizing samples four pixels only, in a tenth of the time. For D-FINE, DEIM and RT-DETR, whose tools
resize with Pillow or with antialiasing in PyTorch, OpenCV's result changes scores by up to 0.2.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resize_antialiased(picture: NDArray[np.uint8], width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Return the picture at another size.

    Args:
        picture: uint8 (height, width) or (height, width, 3), in any order of channels.
        width_px: width of the result.
        height_px: height of the result.

    Returns:
        uint8 (height_px, width_px), or with 3 channels.
    """
    whole = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(whole.resize((width_px, height_px), Image.Resampling.BILINEAR))
