"""Tiny videos made when a test needs them; each picture shows its number as a grey level."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from visionedge.frames.types import Picture

_STEPS = 24


def numbered_picture(number: int, width_px: int = 160, height_px: int = 120) -> Picture:
    """A plain grey picture; `number_of` reads the number back, modulo 24."""
    return np.full((height_px, width_px, 3), 20 + 9 * (number % _STEPS), np.uint8)


def number_of(picture: Picture) -> int:
    """The number that a picture shows, modulo 24, tolerant to compression."""
    return round((float(picture.mean()) - 20) / 9) % _STEPS


def make_clip(
    path: Path,
    *,
    pictures: int = 20,
    fps: int = 10,
    width_px: int = 160,
    height_px: int = 120,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    still: bool = False,
) -> Path:
    """Write a clip of numbered pictures (H.264 with a key picture every 10, or MJPEG); returns `path`.

    `still`: all pictures have the number 0.
    """
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = width_px, height_px
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "libx264":
            stream.options = options or {"profile": "baseline", "tune": "zerolatency", "g": "10"}
        for number in range(pictures):
            picture = numbered_picture(0 if still else number, width_px, height_px)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        container.mux(stream.encode())
    return path


def make_picture(path: Path, number: int = 0, width_px: int = 160, height_px: int = 120) -> Path:
    """Write one numbered picture in the format of the suffix; returns `path`."""
    assert cv2.imwrite(str(path), numbered_picture(number, width_px, height_px))
    return path
