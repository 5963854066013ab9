"""Clips whose colours are known exactly: made from a picture by the standards' own formulas, in float64."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visionedge.frames.types import Picture

# Kr and Kb of the standards, and FFmpeg's number for each.
MATRICES = {"bt601": (0.299, 0.114, 5), "bt709": (0.2126, 0.0722, 1), "bt2020": (0.2627, 0.0593, 9)}
RANGES = {"limited": 1, "full": 2}


def scene(width_px: int, height_px: int) -> Picture:
    """A picture with all hues, and edges that chroma at half the resolution can represent."""
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    across, down = columns / max(1, width_px - 1), rows / max(1, height_px - 1)
    blue = 40 + 190 * across
    green = 30 + 200 * down
    red = 128 + 100 * np.sin(6 * across + 4 * down)
    picture: Picture = np.rint(np.stack([blue, green, red], axis=2)).astype(np.uint8)
    return picture


def ycbcr(picture: Picture, matrix: str, full: bool, bits: int) -> tuple[NDArray[np.float64], ...]:
    """Y, Cb and Cr of a BGR picture, each at its full size, as numbers of so many bits."""
    kr, kb, _ = MATRICES[matrix]
    blue, green, red = (picture[:, :, n] / 255.0 for n in range(3))
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    to_blue, to_red = (blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))
    top, one = (1 << bits) - 1, 1 << (bits - 8)
    if full:
        return luma * top, 128 * one + to_blue * top, 128 * one + to_red * top
    return (16 + 219 * luma) * one, (128 + 224 * to_blue) * one, (128 + 224 * to_red) * one


def _shrunk(plane: NDArray[np.float64], height_px: int, width_px: int) -> NDArray[np.float64]:
    """The mean of the samples under each new one; at odd edges of the existing samples."""
    down, across = -(-plane.shape[0] // height_px), -(-plane.shape[1] // width_px)
    padded = np.pad(
        plane, ((0, height_px * down - plane.shape[0]), (0, width_px * across - plane.shape[1])), "edge"
    )
    return np.asarray(padded.reshape(height_px, down, width_px, across).mean(axis=(1, 3)))


def frame_of(picture: Picture, pix_fmt: str, matrix: str, span: str) -> Any:
    """A video frame that shows the picture."""
    av: Any = pytest.importorskip("av")
    height, width = picture.shape[:2]
    frame = av.VideoFrame(width, height, pix_fmt)
    frame.colorspace, frame.color_range = MATRICES[matrix][2], RANGES[span]
    bits = frame.format.components[0].bits
    parts = ycbcr(picture, matrix, span == "full", bits)
    two_planes = pix_fmt.startswith(("nv", "p0"))
    for number, plane in enumerate(frame.planes):
        wanted = parts[1:] if two_planes and number == 1 else (parts[number],)
        small = np.stack([_shrunk(part, plane.height, plane.width) for part in wanted], axis=2)
        shift = 16 - bits if pix_fmt.startswith("p0") else 0
        samples = np.rint(small).clip(0, (1 << bits) - 1).astype("<u2") << shift
        samples = samples.astype(np.uint8) if bits == 8 else samples
        rows = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        rows[: plane.height, : samples[0].nbytes] = samples.reshape(plane.height, -1).view(np.uint8)
        plane.update(rows.tobytes())
    return frame


def write_clip(
    path: Path, frames: list[Any], codec: str = "ffv1", options: dict[str, str] | None = None
) -> Path:
    """Frames of one size and format as a clip of 10 per second, tagged as they are; returns `path`."""
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.codec_context.colorspace = frames[0].colorspace
        stream.codec_context.color_range = frames[0].color_range
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, degrees: int) -> Path:
    """Say in an MP4 that its picture is to be shown turned clockwise, as telephones do; returns `path`."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix_at = at + 4 + 20 + 8 + 8  # version and flags, times and track, reserved, layer to volume
    one, rows = 1 << 16, {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = rows[degrees]
    struct.pack_into(">9i", data, matrix_at, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
