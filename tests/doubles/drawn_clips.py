"""Clips that are drawn, and a tiny ONNX detector that finds what is drawn in them.

An `Actor` is a figure of one colour that follows a path; the rest of a clip is grey. The detector compares
the colour of each place with that of each figure, sums over the outline of the figure (a convolution) and
takes the peaks. It finds every figure of which more than half is visible; its score tells how much.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tiny_graphs import Graph
from visionedge.frames.types import Picture

WIDTH_PX, HEIGHT_PX = 640, 384
_SHRINK = 4
"""Pixels of a clip for one pixel of the detector."""
_STEP = 2
"""Pixels of the detector from one place where it looks for a figure to the next."""
_ROWS = 12
"""The most figures of one label in a picture."""

Colour = tuple[int, int, int]
Shape = Sequence[tuple[int, int, int, int]]
"""Rectangles: left, top, right and bottom in pixels of the clip, from the top left corner of a figure."""


@dataclass(frozen=True)
class Figure:
    """What a label looks like: rectangles of one colour (blue, green, red)."""

    label: str
    colour: Colour
    shape: Shape

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height."""
        return max(right for _, _, right, _ in self.shape), max(bottom for *_, bottom in self.shape)

    def mask(self, shrink: int = 1) -> NDArray[np.float32]:
        """1 inside its outline, at so many pixels of the clip for one."""
        width, height = self.size_px
        mask = np.zeros((height // shrink, width // shrink), np.float32)
        for left, top, right, bottom in self.shape:
            mask[top // shrink : bottom // shrink, left // shrink : right // shrink] = 1
        return mask


PERSON = Figure("person", (190, 100, 50), [(12, 0, 28, 20), (0, 20, 40, 60), (8, 60, 32, 96)])
CAR = Figure("car", (50, 50, 200), [(16, 0, 72, 20), (0, 20, 96, 48)])
TRUCK = Figure("truck", (180, 60, 180), [(0, 0, 88, 60), (88, 20, 120, 60)])
BUS = Figure("bus", (130, 20, 90), [(0, 0, 144, 64)])
BOTTLE = Figure("bottle", (60, 150, 50), [(12, 0, 20, 20), (0, 20, 32, 72)])
PART = Figure("part", (210, 190, 40), [(0, 0, 56, 40)])
GOOD = Figure("ok", (90, 210, 110), [(0, 0, 56, 40)])
DEFECT = Figure("ng", (30, 140, 240), [(0, 0, 56, 40)])
SCRAP = replace(PART, shape=[(0, 0, 40, 40)])
"""A piece of a part: the detector gives it a score of about 0.4."""

FIGURES = (PERSON, CAR, TRUCK, BUS, BOTTLE, PART, GOOD, DEFECT)


@dataclass(frozen=True)
class Actor:
    """A figure with its feet (bottom centre) at these places: (seconds, x, y), x and y 0-1 of the picture.

    It moves evenly from one to the next, and is not there before the first and from the last one.
    """

    figure: Figure
    path: Sequence[tuple[float, float, float]]

    def place(self, at_s: float) -> tuple[float, float] | None:
        """Where its feet are; None: it is not there."""
        times, across, down = zip(*self.path, strict=True)
        if not times[0] <= at_s < times[-1]:
            return None
        return float(np.interp(at_s, times, across)), float(np.interp(at_s, times, down))

    def draw(self, canvas: Picture, at_s: float) -> None:
        """Draw it where it is then."""
        place = self.place(at_s)
        if place is None:
            return
        width, height = self.figure.size_px
        left, top = round(place[0] * WIDTH_PX - width / 2), round(place[1] * HEIGHT_PX - height)
        for x1, y1, x2, y2 in self.figure.shape:
            corner, opposite = (left + x1, top + y1), (left + x2 - 1, top + y2 - 1)
            cv2.rectangle(canvas, corner, opposite, self.figure.colour, cv2.FILLED)


Background = Callable[[Picture], None]
"""Draws the greys behind the actors."""


def write_clip(
    path: Path, actors: Iterable[Actor], seconds: float, fps: float = 10, background: Background | None = None
) -> Path:
    """Write a clip (MPEG-4); an actor hides those before it. Returns `path`."""
    plain: Picture = np.full((HEIGHT_PX, WIDTH_PX, 3), 196, np.uint8)
    if background is not None:
        background(plain)
    drawn = [*actors]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (WIDTH_PX, HEIGHT_PX))
    assert writer.isOpened()
    for number in range(round(seconds * fps)):
        canvas = plain.copy()
        for actor in drawn:
            actor.draw(canvas, number / fps)
        writer.write(canvas)
    writer.release()
    return path


# --- the detector -------------------------------------------------------------------------------------------


def write_detector(path: Path, figures: Sequence[Figure] = FIGURES) -> Path:
    """Write a detector of these figures; returns `path`.

    Its output is CenterNet's: peaks of a heat map as [N, n, 6], with corners, score and class.
    """
    graph = Graph()
    picture = graph.input("image", "float32", "N", 3, HEIGHT_PX // _SHRINK, WIDTH_PX // _SHRINK)
    found = [
        _find_peaks(graph, _resemblance(graph, picture, figure.colour), figure, number)
        for number, figure in enumerate(figures)
    ]
    graph.output(graph.add("Concat", *found, axis=1), "boxes", "float32", "N", _ROWS * len(found), 6)
    pixels = {"color": "bgr", "scale": 1 / 255, "mean": [0, 0, 0], "std": [1, 1, 1], "fit": "letterbox"}
    metadata = {
        "visionedge.head": "centernet",
        "visionedge.input": json.dumps(pixels),
        "names": json.dumps({str(number): figure.label for number, figure in enumerate(figures)}),
    }
    return graph.save(path, metadata)


def _resemblance(graph: Graph, picture: str, colour: Colour) -> str:
    """How near each pixel is to a colour: [N, 1, rows, columns], 0-1."""
    wanted = graph.constant(np.reshape(colour, (1, 3, 1, 1)) / 255)
    distances = graph.add("Abs", graph.add("Sub", picture, wanted))
    sum_of_channels = graph.add("Conv", distances, graph.constant(np.ones((1, 3, 1, 1))))
    near = graph.add("Add", graph.add("Mul", sum_of_channels, graph.constant(-4.0)), graph.constant(1.5))
    return graph.add("Clip", near, graph.constant(0.0), graph.constant(1.0))


def _find_peaks(graph: Graph, resemblance: str, figure: Figure, number: int) -> str:
    """The places where the figure fits best, as [N, n, 6]."""
    mask = figure.mask(_SHRINK)
    height, width = mask.shape
    columns, rows = WIDTH_PX // _SHRINK // _STEP, HEIGHT_PX // _SHRINK // _STEP
    kernel = graph.constant(mask[None, None] / mask.sum())
    pads = [height // 2, width // 2, (height - 1) // 2, (width - 1) // 2]
    covered = graph.add("Conv", resemblance, kernel, pads=pads, strides=[_STEP, _STEP])
    # A share of a half gives 0, all of it 0.95. The slope makes one of two equal neighbours the peak.
    slope = 1e-4 * (np.arange(columns)[None, :] / columns + np.arange(rows)[:, None] / rows)
    score = graph.add("Mul", graph.add("Sub", covered, graph.constant(0.5)), graph.constant(1.9))
    score = graph.add("Relu", graph.add("Sub", score, graph.constant(slope[None, None])))
    # As large as the figure (odd): two figures side by side are two peaks. One side after the other: faster.
    down, across = height // 2 // _STEP, width // 2 // _STEP
    highest = graph.add("MaxPool", score, kernel_shape=[2 * down + 1, 1], pads=[down, 0, down, 0])
    highest = graph.add("MaxPool", highest, kernel_shape=[1, 2 * across + 1], pads=[0, across, 0, across])
    is_peak = graph.add("Cast", graph.add("GreaterOrEqual", score, highest), to=1)
    peaks = graph.add("Reshape", graph.add("Mul", score, is_peak), graph.whole(0, columns * rows))
    scores = graph.add("TopK", peaks, graph.whole(_ROWS), outputs=2, axis=1)
    boxes = graph.add(
        "Gather", graph.constant(_boxes((columns, rows), (width, height))), f"{scores}.1", axis=0
    )
    scores = graph.add("Unsqueeze", scores, graph.whole(2))
    classes = graph.add("Add", graph.add("Mul", scores, graph.constant(0.0)), graph.constant(float(number)))
    return graph.add("Concat", boxes, scores, classes, axis=2)


def _boxes(size: tuple[int, int], figure_size: tuple[int, int]) -> NDArray[np.float32]:
    """The corners of a figure at each place, in pixels of the detector: (places, 4)."""
    (columns, rows), (width, height) = size, figure_size
    y, x = np.mgrid[0:rows, 0:columns].reshape(2, -1)
    left, top = _STEP * x - width // 2, _STEP * y - height // 2
    return np.stack([left, top, left + width, top + height], axis=1).astype(np.float32)
