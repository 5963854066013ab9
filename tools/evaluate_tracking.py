"""How well boxes become tracks, against a ground truth: MOTA, IDF1, switches, crossings of lines, as a table.

    python tools/evaluate_tracking.py boxes.jsonl PETS09-S2L1.gt.txt --libraries other/bin/python \\
        --line A=380,120,380,330 --line B=560,140,560,330 --line C=230,150,230,300

`boxes.jsonl` is made by `visionedge detect vtest.avi --confidence 0.1 --json`. The ground truth and
`--tracks` are MOTChallenge's text: frame (from 1), id, left, top, width, height in pixels, considered;
`visionedge scene CLIP --tracks FILE` writes it, too.
`--libraries` names an interpreter with numpy and the package `trackers` (it cannot be installed beside
opencv-python-headless); its trackers get the same boxes and the rate of the pictures, with their defaults.
`--steps 1,2,4` makes a row each for all pictures, every second and every fourth one. A crossing has no
hysteresis: the middle of the lower edge passes the segment. It is matched when the truth has one at this line
in this direction within 1 s.
"""

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visionedge.frames.types import Detections
from visionedge.model.postprocess import TRACKED_CONFIDENCE
from visionedge.scene.assignment import assign
from visionedge.scene.tracker import PREDICTED_S, Tracker

Box = tuple[float, float, float, float]
"""Left, top, width, height in pixels."""
Tracks = dict[int, dict[int, Box]]
"""The boxes of each frame (from 1) by id."""
Point = tuple[float, float]
"""x, y in pixels, y downwards."""
Line = tuple[Point, Point]
"""From its start to its end."""

LIBRARIES = ("SORTTracker", "ByteTrackTracker", "OCSORTTracker", "CBIoUTracker")
_SAME = 0.5
"""Intersection over union from which a box counts as the truth's."""


@dataclass
class Clip:
    """Recorded boxes: `pictures` is (left, top, width, height, score) in pixels of each picture."""

    width_px: int
    height_px: int
    fps: float
    pictures: list[list[tuple[float, float, float, float, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """MOTA and IDF1 as motmetrics and MOTChallenge define them, and what they are made of."""

    mota: float
    idf1: float
    switches: int
    false_boxes: int
    missed_boxes: int
    ids: int


def read_boxes(path: Path, label: str, fps: float) -> Clip:
    """The boxes of one label from frame objects (JSON Lines of `visionedge detect --json`)."""
    with path.open(encoding="utf-8") as lines:
        frames = [json.loads(line) for line in lines]
    clip = Clip(frames[0]["width"], frames[0]["height"], fps)
    for frame in frames:
        rows = [row for row in frame["detections"] if row["label"] == label]
        clip.pictures.append([(*_in_pixels(row["box"], clip), row["confidence"]) for row in rows])
    return clip


def _in_pixels(box: Mapping[str, float], clip: Clip) -> Box:
    width, height = clip.width_px, clip.height_px
    return box["left"] * width, box["top"] * height, box["width"] * width, box["height"] * height


def read_tracks(path: Path) -> Tracks:
    """Tracks in MOTChallenge's text; rows whose seventh column is 0 are left out."""
    tracks: Tracks = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        frame, number, left, top, width, height, considered, *_ = map(float, line.split(","))
        if considered:
            tracks[int(frame)][int(number)] = (left, top, width, height)
    return tracks


def track(clip: Clip, step: int, confidence: float) -> Tracks:
    """Our tracks of every `step`-th picture, of the boxes that the module would take; see `PREDICTED_S`."""
    tracker, tracks = Tracker(confidence), Tracks()
    for index in range(0, len(clip.pictures), step):
        boxes = _columns(clip, index, min(confidence, TRACKED_CONFIDENCE))
        update = tracker.update(boxes, index / clip.fps, ("object",))
        tracks[index + 1] = {
            one.track_id: _in_pixels(
                dict(zip(("left", "top", "width", "height"), one.box, strict=True)), clip
            )
            for one in update.tracks
            if one.unseen_s <= PREDICTED_S
        }
    return tracks


def _columns(clip: Clip, index: int, least_score: float) -> Detections:
    boxes = [box for box in clip.pictures[index] if box[4] >= least_score]
    rows = np.array(boxes, np.float32).reshape(-1, 5)
    scale = np.array([clip.width_px, clip.height_px] * 2, np.float32)
    corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1) / scale
    return Detections(corners.astype(np.float32), rows[:, 4], np.zeros(len(rows), np.int32))


def track_with_library(name: str, clip: Clip, step: int) -> Tracks:
    """The tracks of a tracker of the package `trackers`, with its defaults."""
    supervision: Any = importlib.import_module("supervision")
    tracker = getattr(importlib.import_module("trackers"), name)(frame_rate=clip.fps / step)
    tracks: Tracks = {}
    for index in range(0, len(clip.pictures), step):
        rows = np.array(clip.pictures[index], np.float32).reshape(-1, 5)
        corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
        boxes = supervision.Detections(corners, confidence=rows[:, 4], class_id=np.zeros(len(rows), int))
        seen = tracker.update(boxes)
        tracks[index + 1] = {
            int(number): (float(left), float(top), float(right - left), float(bottom - top))
            for (left, top, right, bottom), number in zip(seen.xyxy, seen.tracker_id, strict=True)
            if number >= 0
        }
    return tracks


# --- figures ------------------------------------------------------------------------------------------------


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    if across <= 0 or down <= 0:
        return 0.0
    return across * down / (one[2] * one[3] + other[2] * other[3] - across * down)


def score(truth: Tracks, tracks: Tracks, frames: Iterable[int]) -> Scores:
    """Compare tracks with the truth in these frames (CLEAR MOT and identity metrics at IoU 0.5)."""
    last: dict[int, int] = {}  # id of the truth → our id
    together: Counter[tuple[int, int]] = Counter()
    boxes = found = switches = reported = 0
    for frame in frames:
        real, ours = truth.get(frame, {}), tracks.get(frame, {})
        same = {
            (a, b): iou for a, one in real.items() for b, other in ours.items()
            if (iou := overlap(one, other)) >= _SAME
        }  # fmt: skip
        together.update(same.keys())
        matches = _match(real, ours, same, last)
        switches += sum(last.get(a, b) != b for a, b in matches.items())
        last |= matches
        boxes, reported, found = boxes + len(real), reported + len(ours), found + len(matches)
    wrong = (boxes - found) + (reported - found) + switches
    ids = {number for ours in tracks.values() for number in ours}
    identified = _count_identified(together)
    return Scores(
        1 - wrong / boxes,
        2 * identified / (boxes + reported),
        switches,
        reported - found,
        boxes - found,
        len(ids),
    )


def _match(
    real: Iterable[int], ours: Iterable[int], same: Mapping[tuple[int, int], float], last: Mapping[int, int]
) -> dict[int, int]:
    """Our id of each id of the truth: the one of the last frame where it still fits, else the nearest."""
    matches = {a: last[a] for a in real if a in last and (a, last[a]) in same}
    taken: set[int] = set()
    for a in list(matches):  # two ids of the truth may have had the same id of ours
        if matches[a] in taken:
            del matches[a]
        else:
            taken.add(matches[a])
    rest = [a for a in real if a not in matches]
    costs = [{b: 1 - same[a, b] for b in ours if b not in taken and (a, b) in same} for a in rest]
    # Not matching must cost more than any chain of changes saves.
    chosen = assign(costs, 10.0 * (len(rest) + 1))
    return matches | {a: b for a, b in zip(rest, chosen, strict=True) if b is not None}


def _count_identified(together: Mapping[tuple[int, int], int]) -> int:
    """The most boxes that agree when each id of the truth has one id of ours for the whole clip."""
    most = float(max(together.values(), default=0))
    real = sorted({a for a, _ in together})
    costs = [{b: most - n for (a, b), n in together.items() if a == one} for one in real]
    pairs = zip(real, assign(costs, most), strict=True)
    return sum(together[a, b] for a, b in pairs if b is not None)


@dataclass(frozen=True)
class Crossing:
    """A path passed a line; `left_to_right` is seen from its start to its end."""

    line: str
    left_to_right: bool
    frame: int


def find_crossings(tracks: Tracks, lines: Mapping[str, Line]) -> list[Crossing]:
    """Every crossing of a line by the middle of a box's lower edge."""
    paths: dict[int, list[tuple[int, Point]]] = defaultdict(list)
    for frame in sorted(tracks):
        for number, (left, top, width, height) in tracks[frame].items():
            paths[number].append((frame, (left + width / 2, top + height)))
    crossings = []
    for path in paths.values():
        for (_, start), (frame, end) in itertools.pairwise(path):
            for name, line in lines.items():
                before, after = (_is_left(line, point) for point in (start, end))
                one_end, other_end = (_is_left((start, end), point) for point in line)
                if before != after and one_end != other_end:
                    crossings.append(Crossing(name, before, frame))
    return crossings


def _is_left(line: Line, point: Point) -> bool:
    """Whether the point is on the left of the endless line, seen from its start to its end."""
    (x1, y1), (x2, y2) = line
    return (x2 - x1) * (point[1] - y1) - (y2 - y1) * (point[0] - x1) < 0


def count_crossings(crossings: Sequence[Crossing], lines: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Left to right and right to left, for each line."""
    seen = Counter((one.line, one.left_to_right) for one in crossings)
    return {name: (seen[name, True], seen[name, False]) for name in lines}


def count_differences(one: Mapping[str, tuple[int, int]], other: Mapping[str, tuple[int, int]]) -> int:
    """The sum over lines and directions."""
    return sum(abs(a - b) for name in one for a, b in zip(one[name], other[name], strict=True))


def count_matched(truth: Sequence[Crossing], ours: Sequence[Crossing], most_frames: float) -> int:
    """Crossings that the truth has, too, at most so many frames earlier or later."""
    costs = [
        {
            column: abs(one.frame - other.frame)
            for column, other in enumerate(ours)
            if (one.line, one.left_to_right) == (other.line, other.left_to_right)
            and abs(one.frame - other.frame) <= most_frames
        }
        for one in truth
    ]
    return sum(column is not None for column in assign(costs, (most_frames + 1) * (len(truth) + 1)))


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The truth of a clip, and the pictures that count."""

    clip: Clip
    truth: Tracks
    lines: dict[str, Line]

    def row(self, name: str, tracks: Tracks, step: int, full: Tracks) -> list[str]:
        """A row of the table; `full` are the same tracker's tracks of every picture."""
        figures = score(self.truth, tracks, range(1, len(self.clip.pictures) + 1, step))
        real, ours = find_crossings(self.truth, self.lines), find_crossings(tracks, self.lines)
        counts = count_crossings(ours, self.lines)
        all_counts = count_crossings(find_crossings(full, self.lines), self.lines)
        return [
            name,
            f"{self.clip.fps / step:g}",
            f"{figures.mota:.3f}",
            f"{figures.idf1:.3f}",
            *map(str, (figures.switches, figures.false_boxes, figures.missed_boxes, figures.ids)),
            *(f"{a}/{b}" for a, b in counts.values()),
            str(count_differences(counts, count_crossings(real, self.lines))),
            str(count_differences(counts, all_counts)),
            f"{count_matched(real, ours, self.clip.fps)} of {len(ours)}",
        ]

    def header(self) -> list[str]:
        """Its first row."""
        fixed = ["tracker", "pictures/s", "MOTA", "IDF1", "switches", "false", "missed", "ids"]
        return [*fixed, *self.lines, "differ", "from full rate", "matched"]


def _print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _parse_line(text: str) -> tuple[str, Line]:
    name, _, numbers = text.partition("=")
    try:
        x1, y1, x2, y2 = map(float, numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' must be NAME=X1,Y1,X2,Y2") from None
    return name, ((x1, y1), (x2, y2))


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("boxes", type=Path, metavar="BOXES", help="frame objects, one JSON per line")
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="ground truth, MOTChallenge's text")
    parser.add_argument("--label", default="person", help="the label that the truth has")
    parser.add_argument("--fps", type=float, default=10.0, help="pictures/s of the clip")
    parser.add_argument("--confidence", type=float, default=0.3, help="weaker boxes only keep tracks")
    parser.add_argument("--steps", default="1,2,4", help="use every Nth picture; a row for each N")
    parser.add_argument("--line", type=_parse_line, action="append", default=[], metavar="NAME=X1,Y1,X2,Y2")
    parser.add_argument("--tracks", type=Path, action="append", default=[], help="tracks made elsewhere")
    parser.add_argument("--libraries", metavar="PYTHON", help="interpreter that has the package trackers")
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)  # the child of --libraries
    return parser.parse_args(arguments)


def _write_tracks(tracks: Tracks) -> None:
    for frame, boxes in tracks.items():
        for number, box in boxes.items():
            print(frame, number, *(f"{value:.3f}" for value in box), 1, sep=",")


def _ask_library(options: argparse.Namespace, name: str, step: int) -> Tracks:
    """Run this file in the other interpreter, which has no visionedge but the path of ours."""
    command = [options.libraries, __file__, options.boxes, options.truth, "--library", name]
    command += ["--steps", str(step), "--fps", str(options.fps), "--label", options.label]
    paths = ":".join(path for path in sys.path if path.endswith("module"))
    done = subprocess.run(command, env={"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True)
    tracks: Tracks = defaultdict(dict)
    for line in done.stdout.splitlines():
        frame, number, *box = map(float, line.split(","))
        tracks[int(frame)][int(number)] = (box[0], box[1], box[2], box[3])
    return tracks


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = _parse_arguments(arguments)
    clip = read_boxes(options.boxes, options.label, options.fps)
    steps = [int(step) for step in options.steps.split(",")]
    if options.library:
        _write_tracks(track_with_library(options.library, clip, steps[0]))
        return 0
    evaluation = Evaluation(clip, read_tracks(options.truth), dict(options.line))
    header = evaluation.header()
    _print_row(header)
    _print_row(["---"] * len(header))
    _print_row(evaluation.row("truth", evaluation.truth, 1, evaluation.truth))
    full = track(clip, 1, options.confidence)
    for step in steps:
        _print_row(evaluation.row("visionedge", track(clip, step, options.confidence), step, full))
    for path in options.tracks:
        tracks = read_tracks(path)
        _print_row(evaluation.row(path.name, tracks, 1, tracks))
    for name in LIBRARIES if options.libraries else ():
        full = _ask_library(options, name, 1)
        for step in steps:
            tracks = full if step == 1 else _ask_library(options, name, step)
            _print_row(evaluation.row(name.removesuffix("Tracker"), tracks, step, full))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
