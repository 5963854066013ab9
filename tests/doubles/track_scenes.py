"""Detections for the tracker's tests: boxes of a few objects, and scenes drawn at any rate of pictures."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visionedge.frames.types import Detections
from visionedge.scene.tracker import Tracker, TrackUpdate

LABELS = ("person", "car", "truck", "bus", "dog")
RATES = (2, 5, 10, 30)
"""Pictures per second between which nothing may change."""


@dataclass(frozen=True)
class Seen:
    """One detection: its centre and size (0-1)."""

    x: float
    y: float
    width: float = 0.05
    height: float = 0.15
    label: str = "person"
    score: float = 0.8


def columns(seen: Iterable[Seen], labels: Sequence[str] = LABELS) -> Detections:
    """Detections by descending score, as the engine gives them."""
    rows = sorted(seen, key=lambda one: -one.score)
    boxes = [(s.x - s.width / 2, s.y - s.height / 2, s.x + s.width / 2, s.y + s.height / 2) for s in rows]
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([one.score for one in rows], np.float32),
        np.array([labels.index(one.label) for one in rows], np.int32),
    )


def follow(
    scene: Callable[[float], Iterable[Seen]],
    seconds: float,
    rate: float,
    tracker: Tracker | None = None,
    start_s: float = 0.0,
) -> Iterator[TrackUpdate]:
    """Run the scene (detections at a time) through the tracker."""
    tracker = tracker or Tracker()
    for picture in range(int(seconds * rate) + 1):
        at_s = picture / rate
        yield tracker.update(columns(scene(at_s)), start_s + at_s, LABELS)


def ids_of(updates: Iterable[TrackUpdate]) -> list[int]:
    """The ids of all confirmed tracks, in order of appearance."""
    return list(dict.fromkeys(track.track_id for update in updates for track in update.tracks))


def jitter(seen: Iterable[Seen], random_numbers: random.Random, share: float = 0.05) -> list[Seen]:
    """The boxes with noise of a share of their size on position and size."""
    return [
        Seen(
            one.x + random_numbers.gauss(0, share) * one.width,
            one.y + random_numbers.gauss(0, share) * one.height,
            one.width * (1 + random_numbers.gauss(0, share)),
            one.height * (1 + random_numbers.gauss(0, share)),
            one.label,
            min(1.0, max(0.0, one.score + random_numbers.gauss(0, share))),
        )
        for one in seen
    ]
