"""Detections become tracks: the same number for the same object from picture to picture.

`Tracker` is made for cameras that do not move, and works on boxes alone. Each track has a Kalman filter of
its position (constant velocity in continuous time). The boxes of a picture are assigned to the predicted
boxes by their overlap. All limits are in seconds and in box sizes, so the rate of the pictures does not
matter. A confirmed track changes only when it is seen: lost pictures, and pictures in which it is hidden,
leave no trace.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import NamedTuple

from visionedge.frames.types import Detections, label_of
from visionedge.scene.assignment import assign

RelativeBox = tuple[float, float, float, float]
"""Left, top, width, height, 0-1 of the picture."""

_Place = tuple[float, float, float, float]
"""Centre, width, height, 0-1 of the picture."""
_PICTURE: _Place = (0.5, 0.5, 1.0, 1.0)

LOST_S = 2.5
"""A track ends when it was not seen for longer: a reconnect within 2 s, at 2 pictures/s, is not longer."""
PREDICTED_S = 0.2
"""So long the predicted box of a hidden track is as good as a seen one. Later it may have turned."""

BIRTH_SCORE = 0.65
"""The mean score from which a track begins: a sign that resembles a person stays at 0.5 for ever."""
_MOVED, _ABOVE = 1.25, 0.1
"""With a lower mean score, this much above `confidence`, an object must have moved so far, in sizes: a sign
does not move, but its box jitters."""
_BIRTH_S, _BIRTH_SHARE, _BIRTH_TIMES = 0.25, 0.7, 8
"""A track begins when it was seen for so long, in this share of the pictures, or this often with gaps."""
_SURE_SHARE, _KEEP_SHARE, _SCORE_MEMORY_S = 0.75, 0.45, 2.0
"""A confirmed track ends when its mean score over 2 s falls below `_KEEP_SHARE` of the birth score, or of its
own at birth if that was lower: its object left, and its boxes are those of something that resembles it. For
0.65 that is 0.29: somebody who stands and scores 0.35 keeps the track."""
_UNCONFIRMED_LOST_S = 0.5
"""An unconfirmed track may be hidden for so long, and for as long as it was seen before, up to `LOST_S`."""
_ACCELERATION = 1.0
"""Of objects, in sizes per second squared and root hertz; the size is the mean of width and height."""
_BOX_NOISE = 0.12
"""Standard deviation of a box's centre, in sizes."""
_FIRST_SPEED = 2.0
"""Standard deviation of the speed of an object seen once, in sizes per second: a person walks at 1 to 2."""
_SIZE_MEMORY_S = 0.7
_MARGIN = 0.3
"""Boxes are widened by this share on each side before they are compared, so that near ones overlap."""
_LEAST_OVERLAP, _LEAST_UNSURE_OVERLAP, _LEAST_WEAK_OVERLAP = 0.1, 0.6, 0.8
"""Intersection over union of the widened boxes: for detections from `_SURE_SHARE` of the birth score, for
those from `confidence`, and for weaker ones. The weaker a box, the nearer it must be."""
_MOST_REACH = 1.0
"""The largest uncertainty of a position, in sizes."""
_COVERED = 0.5
"""A box that lies so far inside a tracked one (or it in the box) is a second box of the same object."""
_GONE_S, _GONE_INSIDE = 0.3, 0.5
"""A track hidden for 0.3 s ends when less than half of its predicted box is in the picture: it has left."""
_MOST_CANDIDATES, _MOST_UNCONFIRMED = 8, 300
"""Bounds of the work in a picture with hundreds of boxes."""

_CONFUSED = dict.fromkeys(("car", "truck", "bus"), "vehicle")
"""Labels that models confuse from picture to picture; tracks continue across them."""


class Track(NamedTuple):
    """A confirmed track at one picture.

    `confidence` is the score of its newest detection. `box` is the smoothed box, or the predicted one while
    the track is hidden; parts may lie outside the picture. `detection` is the index of its detection in this
    picture, None while it is hidden, and `unseen_s` the time since its newest detection.
    """

    track_id: int
    label: str
    confidence: float
    box: RelativeBox
    detection: int | None
    unseen_s: float = 0.0


class TrackUpdate(NamedTuple):
    """The tracks after a picture: `tracks` all confirmed ones, hidden ones too; `ended` the ids that ended.

    `track_ids` and `track_labels` are parallel to the detections; None: no confirmed track. `renamed`: the
    detections whose own label is not that of their track.
    """

    tracks: tuple[Track, ...]
    ended: tuple[int, ...]
    track_ids: tuple[int | None, ...]
    track_labels: tuple[str | None, ...]
    renamed: tuple[int, ...]


@dataclass(slots=True)
class _Box:
    """A detection: its index, its centre and size (0-1), and `group`, the label up to confused ones."""

    index: int
    label: str
    group: str
    x: float
    y: float
    width: float
    height: float
    score: float


@dataclass(slots=True)
class _State:
    """An object as it was when last seen. Positions are of its centre; variances are in sizes.

    `score` is a mean over the last two seconds, `evidence` the sum of the scores of each label, `pictures`
    the number of pictures since it was first seen at `first_x`, `first_y`. A confirmed track ends below
    `least_score`.
    """

    group: str
    x: float
    y: float
    width: float
    height: float
    score: float
    confidence: float
    first_s: float
    seen_s: float
    first_x: float
    first_y: float
    speed_x: float = 0.0
    speed_y: float = 0.0
    variance: float = _BOX_NOISE**2
    covariance: float = 0.0
    speed_variance: float = _FIRST_SPEED**2
    times_seen: int = 1
    pictures: int = 1
    evidence: dict[str, float] = field(default_factory=dict)
    label: str = ""
    track_id: int | None = None
    detection: int | None = None
    detected_label: str = ""
    least_score: float = 0.0

    def predict(self, at_s: float) -> tuple[float, float]:
        """The centre at this time."""
        elapsed = at_s - self.seen_s
        return self.x + self.speed_x * elapsed, self.y + self.speed_y * elapsed

    def predict_variance(self, elapsed: float) -> float:
        """Of the position, so long after it was seen, in sizes squared."""
        noise = _ACCELERATION**2 * elapsed**3 / 3
        return self.variance + elapsed * (2 * self.covariance + elapsed * self.speed_variance) + noise

    def correct(self, box: _Box, at_s: float) -> None:
        """Take the detection as this object's: the Kalman filter's update, the same for both axes."""
        elapsed = at_s - self.seen_s
        variance, noise = self.predict_variance(elapsed), _ACCELERATION**2 * elapsed
        covariance = self.covariance + elapsed * self.speed_variance + noise * elapsed / 2
        total = variance + _BOX_NOISE**2
        gain, speed_gain = variance / total, covariance / total
        x, y = self.predict(at_s)
        off_x, off_y = box.x - x, box.y - y
        self.x, self.y = x + gain * off_x, y + gain * off_y
        self.speed_x += speed_gain * off_x
        self.speed_y += speed_gain * off_y
        self.variance, self.covariance = (1 - gain) * variance, (1 - gain) * covariance
        self.speed_variance += noise - speed_gain * covariance
        share = elapsed / (elapsed + _SIZE_MEMORY_S)
        self.width += share * (box.width - self.width)
        self.height += share * (box.height - self.height)
        self.seen_s, self.confidence = at_s, box.score
        self.detection, self.detected_label = box.index, box.label
        self._count(box, elapsed)

    def _count(self, box: _Box, elapsed: float) -> None:
        """Count the detection as evidence for the object and, before it is confirmed, for its label."""
        self.times_seen += 1
        share = max(1 / self.times_seen, elapsed / (elapsed + _SCORE_MEMORY_S))
        self.score += share * (box.score - self.score)
        if self.track_id is None:
            self.evidence[box.label] = self.evidence.get(box.label, 0.0) + box.score

    def has_moved(self) -> bool:
        """Whether it is no false detection that stays where it is for ever."""
        size = (self.width + self.height) / 2
        return math.hypot(self.x - self.first_x, self.y - self.first_y) > _MOVED * size

    def is_over(self, at_s: float) -> bool:
        """Whether it was not seen for too long, or has left the picture."""
        unseen_s, limit_s = _between(self.seen_s, at_s), LOST_S
        if self.track_id is None:
            limit_s = min(LOST_S, max(_UNCONFIRMED_LOST_S, self.seen_s - self.first_s))
        if unseen_s > limit_s:
            return True
        if unseen_s <= _GONE_S:
            return False
        place = (*self.predict(at_s), self.width, self.height)
        return _common_area(place, _PICTURE) < _GONE_INSIDE * self.width * self.height


class Tracker:
    """The tracks of one camera, for one thread.

    `confidence`: detections below it keep confirmed tracks for a while and begin none. `birth_score`: the
    mean score from which an object that has not moved has a track, at least `confidence`. `next_id` is the
    number of the next track; a caller that stores it and hands it in again never repeats a number.
    """

    def __init__(self, confidence: float = 0.3, birth_score: float = BIRTH_SCORE, next_id: int = 1) -> None:
        self.confidence = confidence
        self.birth_score = max(confidence, birth_score)
        self.next_id = next_id
        self._states: list[_State] = []
        self._clock_s = -math.inf
        self._turned_back_s = 0.0
        # The label and the group of each class id of the last model.
        self._labels: Sequence[str] = ()
        self._names: dict[int, tuple[str, str]] = {}

    def __repr__(self) -> str:
        confirmed = sum(state.track_id is not None for state in self._states)
        return f"<Tracker {confirmed} confirmed, {len(self._states) - confirmed} unconfirmed>"

    def update(self, detections: Detections, at_s: float, labels: Sequence[str]) -> TrackUpdate:
        """Follow the objects to the next picture.

        `at_s` is a monotonic time in seconds (when the picture was captured); if it is before the last one,
        the tracks go on as if no time had passed. `labels` names the class ids of this picture's model.

        Raises:
            ValueError: `at_s` is not finite.
        """
        now_s = self._advance(at_s)
        ended = self._end(now_s)
        sure, unsure, weak = self._read(detections, labels)
        hidden, free = _associate(self._states, sure, now_s, _LEAST_OVERLAP)
        hidden, free_unsure = _associate(hidden, unsure, now_s, _LEAST_UNSURE_OVERLAP)
        confirmed = [state for state in hidden if state.track_id is not None]
        _associate(confirmed, weak, now_s, _LEAST_WEAK_OVERLAP)
        self._begin([*free, *free_unsure], now_s)
        self._confirm(now_s)
        return self._summary(ended, len(detections), now_s)

    def _advance(self, at_s: float) -> float:
        """The time of the tracks, which never goes back."""
        if not math.isfinite(at_s):
            raise ValueError(f"at_s is {at_s}; a track needs a finite time")
        now_s = at_s + self._turned_back_s
        if now_s < self._clock_s:
            self._turned_back_s = self._clock_s - at_s
            now_s = self._clock_s
        self._clock_s = now_s
        return now_s

    def _end(self, now_s: float) -> tuple[int, ...]:
        """Drop the tracks that are over; the ids of the confirmed ones."""
        kept: list[_State] = []
        ended: list[int] = []
        for state in self._states:
            state.detection = None
            state.pictures += 1
            faded = state.track_id is not None and state.score < state.least_score
            if not faded and (now_s - state.seen_s < _GONE_S or not state.is_over(now_s)):
                kept.append(state)
            elif state.track_id is not None:
                ended.append(state.track_id)
        self._states = kept
        return tuple(ended)

    def _read(
        self, detections: Detections, labels: Sequence[str]
    ) -> tuple[list[_Box], list[_Box], list[_Box]]:
        """The sure, the unsure and the weak detections, without those that have no area."""
        sure_score = max(self.confidence, _SURE_SHARE * self.birth_score)
        sure: list[_Box] = []
        unsure: list[_Box] = []
        weak: list[_Box] = []
        if labels != self._labels:
            self._labels, self._names = labels, {}
        names = self._names
        corners, class_ids = detections.boxes.tolist(), detections.class_ids.tolist()
        for index, score in enumerate(detections.scores.tolist()):
            left, top, right, bottom = corners[index]
            width, height = right - left, bottom - top
            if width > 0 and height > 0:
                class_id = class_ids[index]
                if class_id not in names:
                    label = label_of(labels, class_id)
                    names[class_id] = label, _CONFUSED.get(label, label)
                label, group = names[class_id]
                x, y = (left + right) / 2, (top + bottom) / 2
                boxes = sure if score >= sure_score else unsure if score >= self.confidence else weak
                boxes.append(_Box(index, label, group, x, y, width, height, score))
        return sure, unsure, weak

    def _begin(self, free: Sequence[_Box], now_s: float) -> None:
        """Begin an unconfirmed track at each of the boxes without a track that does not lie inside one."""
        if not free:
            return
        seen = [state for state in self._states if state.detection is not None]
        for box in free:
            if _lies_in_one(box, seen):
                continue
            size, first = (box.width, box.height), (box.x, box.y)
            state = _State(box.group, *first, *size, box.score, box.score, now_s, now_s, *first)
            state.evidence[box.label] = box.score
            state.detection, state.detected_label = box.index, box.label
            self._states.append(state)
        unconfirmed = [state for state in self._states if state.track_id is None]
        if len(unconfirmed) > _MOST_UNCONFIRMED:
            unconfirmed.sort(key=lambda state: (state.seen_s, state.score))
            surplus = {id(state) for state in unconfirmed[:-_MOST_UNCONFIRMED]}
            self._states = [state for state in self._states if id(state) not in surplus]

    def _confirm(self, now_s: float) -> None:
        """Confirm the tracks that were seen long enough, well enough and apart from others."""
        for state in self._states:
            if state.track_id is not None or state.detection is None:
                continue
            is_weak = state.score < self.birth_score
            if is_weak and not (state.has_moved() and state.score >= self.confidence + _ABOVE):
                continue
            if _between(state.first_s, now_s) < _BIRTH_S or state.times_seen < min(
                _BIRTH_TIMES, _BIRTH_SHARE * state.pictures
            ):
                continue
            confirmed = [s for s in self._states if s.track_id is not None and s.detection is not None]
            if _lies_in_one(state, confirmed):
                continue
            state.label = max(state.evidence, key=lambda label: state.evidence[label])
            state.least_score = _KEEP_SHARE * min(state.score, self.birth_score)
            state.track_id = self.next_id
            self.next_id += 1

    def _summary(self, ended: tuple[int, ...], detections: int, now_s: float) -> TrackUpdate:
        tracks: list[Track] = []
        renamed: list[int] = []
        track_ids: list[int | None] = [None] * detections
        track_labels: list[str | None] = [None] * detections
        for state in self._states:
            track_id, label, detection = state.track_id, state.label, state.detection
            if track_id is None:
                continue
            if detection is None:
                (x, y), unseen_s = state.predict(now_s), _between(state.seen_s, now_s)
            else:
                x, y, unseen_s = state.x, state.y, 0.0
                track_ids[detection], track_labels[detection] = track_id, label
                if label != state.detected_label:
                    renamed.append(detection)
            width, height = state.width, state.height
            box = (x - width / 2, y - height / 2, width, height)
            tracks.append(Track(track_id, label, state.confidence, box, detection, unseen_s))
        return TrackUpdate(tuple(tracks), ended, tuple(track_ids), tuple(track_labels), tuple(renamed))


def _associate(
    states: Sequence[_State], boxes: Sequence[_Box], now_s: float, least_overlap: float
) -> tuple[Sequence[_State], Sequence[_Box]]:
    """Give each of the states its box; return the states and the boxes that are left."""
    if not boxes or not states:
        return states, boxes
    hidden: list[_State] = []
    free = dict(enumerate(boxes))
    costs = _find_costs(states, boxes, now_s, least_overlap)
    for state, number in zip(states, assign(costs, 1 - least_overlap), strict=True):
        if number is None:
            hidden.append(state)
        else:
            state.correct(free.pop(number), now_s)
    return hidden, [*free.values()]


def _find_costs(
    states: Sequence[_State], boxes: Sequence[_Box], now_s: float, least_overlap: float
) -> list[dict[int, float]]:
    """For each object, 1 minus the overlap of each box that may be its now, by the number of the box.

    Both boxes are widened by `_MARGIN` and by the standard deviation of the predicted position, so that a
    fast or long hidden object is found further away. This is one function, and looks only at the boxes that
    are near in x, because most of the tracker's time is spent here.
    """
    share = 0.5 + _MARGIN
    places = sorted((box.x, number, box.width * share) for number, box in enumerate(boxes))
    centres, most_half_width = [place[0] for place in places], max(place[2] for place in places)
    found: list[dict[int, float]] = []
    for state in states:
        (x, y), width, height = state.predict(now_s), state.width, state.height
        deviation = math.sqrt(state.predict_variance(now_s - state.seen_s))
        reach = (width + height) / 4 * min(_MOST_REACH, deviation)
        half_width, half_height = width * share + reach, height * share + reach
        furthest = half_width + reach + most_half_width
        near = places[bisect_left(centres, x - furthest) : bisect_right(centres, x + furthest)]
        costs: dict[int, float] = {}
        for box_x, number, own_half_width in near:
            box = boxes[number]
            box_half_width, box_half_height = own_half_width + reach, box.height * share + reach
            across = half_width + box_half_width - abs(x - box_x)
            down = half_height + box_half_height - abs(y - box.y)
            if across <= 0 or down <= 0 or box.group != state.group:
                continue
            common = min(across, 2 * half_width, 2 * box_half_width) * min(
                down, 2 * half_height, 2 * box_half_height
            )
            overlap = common / (4 * (half_width * half_height + box_half_width * box_half_height) - common)
            if overlap > least_overlap:
                costs[number] = 1 - overlap
        if len(costs) > _MOST_CANDIDATES:
            costs = dict(nsmallest(_MOST_CANDIDATES, costs.items(), key=lambda item: item[1]))
        found.append(costs)
    return found


def _between(start_s: float, end_s: float) -> float:
    """The time between, in whole microseconds, so that 0.3 - 0.1 is not above 0.2."""
    return round(end_s - start_s, 6)


def _common_area(one: _Place, other: _Place) -> float:
    x, y, width, height = one
    other_x, other_y, other_width, other_height = other
    across = min((width + other_width) / 2 - abs(x - other_x), width, other_width)
    down = min((height + other_height) / 2 - abs(y - other_y), height, other_height)
    return max(0.0, across) * max(0.0, down)


def _lies_in_one(box: _Box | _State, states: Iterable[_State]) -> bool:
    """Whether the box lies inside one of the tracked boxes, or that one in it: two boxes of one object."""
    x, y, width, height = box.x, box.y, box.width, box.height
    for state in states:
        if abs(x - state.x) >= (width + state.width) / 2 or box.group != state.group:
            continue  # most are elsewhere
        common = _common_area((x, y, width, height), (state.x, state.y, state.width, state.height))
        if common > _COVERED * min(width * height, state.width * state.height):
            return True
    return False
