"""The drawn clips of docs/scenarios.md; what happens in each is written down beside its actors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import yaml

from drawn_clips import (
    BOTTLE,
    CAR,
    DEFECT,
    GOOD,
    HEIGHT_PX,
    PART,
    PERSON,
    SCRAP,
    TRUCK,
    WIDTH_PX,
    Actor,
    Background,
    write_clip,
)
from visionedge.frames.types import Picture

Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom, 0-1 of the picture."""


def rectangles(grey: int, *areas: Rectangle, filled: bool = True) -> Background:
    """A background of rectangles in a grey."""

    def draw(canvas: Picture) -> None:
        for left, top, right, bottom in areas:
            corner = (round(left * WIDTH_PX), round(top * HEIGHT_PX))
            opposite = (round(right * WIDTH_PX), round(bottom * HEIGHT_PX))
            cv2.rectangle(canvas, corner, opposite, (grey, grey, grey), cv2.FILLED if filled else 2)

    return draw


@dataclass(frozen=True)
class ScenarioClip:
    """A clip; `shown_s` is the moment of the picture in the docs."""

    seconds: float
    fps: float
    actors: Sequence[Actor]
    background: Background
    shown_s: float

    def write(self, path: Path) -> Path:
        """Write it to a file; returns `path`."""
        return write_clip(path, self.actors, self.seconds, self.fps, self.background)


BELT = rectangles(120, (0, 0.25, 1, 0.8))

CLIPS: Mapping[str, ScenarioClip] = {
    # Two parts come into the nest at the same moment, and leave it one after the other. One lies beside it.
    "part-detection": ScenarioClip(
        11,
        10,
        [
            Actor(PART, [(1, -0.05, 0.48), (4, 0.5, 0.48), (6, 0.5, 0.48), (8, 1.05, 0.48)]),
            Actor(PART, [(1, -0.05, 0.7), (4, 0.5, 0.7), (7, 0.5, 0.7), (9, 1.05, 0.7)]),
            Actor(PART, [(0, 0.15, 0.98), (12, 0.15, 0.98)]),
        ],
        rectangles(150, (0.35, 0.25, 0.65, 0.85)),
        5,
    ),
    # Two pairs of parts pass the line side by side, then one alone; the belt stops while a part lies on the
    # line, and jitters; this part goes back. A piece of a part (score 0.4) passes, too.
    "part-counting": ScenarioClip(
        11,
        10,
        [
            *(Actor(PART, [(0, 0.1, y), (4.5, 1.05, y)]) for y in (0.45, 0.7)),
            *(Actor(PART, [(1.5, -0.05, y), (7, 1.05, y)]) for y in (0.45, 0.7)),
            Actor(PART, [(3, -0.05, 0.45), (8.5, 1.05, 0.45)]),
            Actor(SCRAP, [(3.2, -0.05, 0.7), (8.7, 1.05, 0.7)]),
            Actor(
                PART,
                [
                    *((5 + step, -0.05 + 0.2 * step, 0.7) for step in (0, 2.7)),
                    *((7.8 + 0.2 * step, 0.5 + (0.01 if step % 2 else -0.01), 0.7) for step in range(5)),
                    *((8.8, 0.56, 0.7), (10, 0.3, 0.7), (11, 0.1, 0.7)),
                ],
            ),
        ],
        BELT,
        2.8,
    ),
    # Four good parts and two defects, two of them side by side.
    "defect-counting": ScenarioClip(
        9,
        10,
        [
            Actor(GOOD, [(0, 0.1, 0.45), (4.5, 1.05, 0.45)]),
            Actor(DEFECT, [(0, 0.1, 0.7), (4.5, 1.05, 0.7)]),
            *(Actor(GOOD, [(1 + d, -0.05, 0.45), (6 + d, 1.05, 0.45)]) for d in (0.3, 1.5, 2.8)),
            Actor(DEFECT, [(2, -0.05, 0.7), (7, 1.05, 0.7)]),
        ],
        BELT,
        2.2,
    ),
    # One walks into the zone, stays 2 s and goes back. One stands in the notch of the L, one passes outside.
    "danger-zone": ScenarioClip(
        9,
        10,
        [
            Actor(PERSON, [(0, 1.05, 0.55), (2, 0.8, 0.55), (7, 0.8, 0.55), (9, 1.05, 0.55)]),
            Actor(PERSON, [(1, -0.05, 0.85), (4, 0.5, 0.85), (6, 0.5, 0.85), (9, -0.05, 0.85)]),
            Actor(PERSON, [(0, 0.25, 0.3), (9, 0.25, 0.62)]),
        ],
        rectangles(110, (0.72, 0.72, 0.9, 0.9)),
        5,
    ),
    # The bottles on top are taken one by one, the last after 7 s, and put back after 24 s. Somebody passes
    # before the bottles below, which stay.
    "empty-shelf": ScenarioClip(
        27,
        5,
        [
            *(Actor(BOTTLE, [(0, x, 0.4), (gone_s, x, 0.4)]) for x, gone_s in ((0.3, 3), (0.5, 5), (0.7, 7))),
            *(Actor(BOTTLE, [(24, x, 0.4), (30, x, 0.4)]) for x in (0.3, 0.5, 0.7)),
            *(Actor(BOTTLE, [(0, x, 0.8), (30, x, 0.8)]) for x in (0.3, 0.5, 0.7)),
            Actor(PERSON, [(9, -0.05, 0.98), (16, 1.05, 0.98)]),
        ],
        rectangles(140, (0.15, 0.4, 0.85, 0.43), (0.15, 0.8, 0.85, 0.83)),
        21,
    ),
    # Three come in, at 1.7, 3.7 and 5.2 s, and go on; a fourth looks in at the door and does not enter.
    "customers": ScenarioClip(
        10,
        5,
        [
            *(
                Actor(PERSON, [(start_s, -0.05, 0.8), (start_s + 5, 1.05, 0.8)])
                for start_s in (0.3, 2.3, 3.8)
            ),
            Actor(PERSON, [(0, 0.1, 0.98), (3, 0.15, 0.98), (6, 0.15, 0.98), (9, -0.05, 0.98)]),
        ],
        rectangles(120, (0, 0.2, 0.03, 1)),
        4.4,
    ),
    # Five join, the fifth after about 7 s; the first is served after 15 s. One passes behind the queue.
    "crowded-queue": ScenarioClip(
        19,
        5,
        [
            Actor(PERSON, [(0, -0.05, 0.4), (8, 1.05, 0.4)]),
            *(
                Actor(
                    PERSON,
                    [
                        (number * 1.4, -0.05, 0.85),
                        (number * 1.4 + 5 * x, x, 0.85),
                        (served_s, x, 0.85),
                        (served_s + 5 * (1.05 - x), 1.05, 0.85),
                    ],
                )
                for number, (x, served_s) in enumerate(
                    ((0.82, 15), (0.66, 30), (0.5, 30), (0.34, 30), (0.18, 30))
                )
            ),
        ],
        rectangles(120, (0.92, 0.5, 1, 0.98)),
        13,
    ),
    # A car stands in place 1. Another one comes in, parks in place 2 for 14 s and leaves. A truck comes in,
    # finds nothing, turns and leaves.
    "car-park": ScenarioClip(
        32,
        5,
        [
            Actor(CAR, [(0, 0.4, 0.4), (40, 0.4, 0.4)]),
            Actor(
                CAR,
                [
                    *((0, -0.1, 0.9), (5, 0.62, 0.9), (7, 0.62, 0.4), (21, 0.62, 0.4)),
                    *((23, 0.62, 0.9), (28, -0.1, 0.9)),
                ],
            ),
            Actor(TRUCK, [(8, -0.1, 0.9), (14, 0.8, 0.9), (20, -0.12, 0.9)]),
        ],
        rectangles(235, *((x, 0.1, x + 0.2, 0.5) for x in (0.3, 0.52, 0.74)), filled=False),
        13,
    ),
}


def read_scenarios(text: str, *, drawn: bool = True) -> dict[str, dict[str, Any]]:
    """The configuration of each scenario of docs/scenarios.md, by the name of its picture.

    Those without a picture, by their titles, where `drawn` is false.
    """
    scenarios = {}
    for section in text.split("\n## ")[1:]:
        (block,) = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
        names = re.findall(r"\]\(scenarios/([a-z-]+)\.webp\)", section)
        if bool(names) is drawn:
            scenarios[names[0] if drawn else section.partition("\n")[0].lower()] = yaml.safe_load(block)
    return scenarios
