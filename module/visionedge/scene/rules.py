"""The rules of zones and lines: each kind is one pure function over a track's path, or over a count of
tracks.

A function is called once a picture with the state that it returned last (`initial` at first) and returns the
next state and what it decided, or None. All durations are seconds of a monotonic clock, so the rate of the
pictures does not matter. `KINDS` is the table of all kinds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from visionedge.config.schema import LineConfig, ZoneConfig
from visionedge.frames.geometry import (
    Point,
    PolygonArea,
    cross_product,
    distance_to_segment,
    meets_segment,
)

FAR_WIDTHS = 0.02
"""A track that is so far behind a line, in widths of the picture, does not jitter on it."""

NEAR_SIZES = 0.08
"""A track that is nearer to a line, in sizes of its box, may stand on it: the anchor of a box that jitters
drifts from one side to the other, and stays there for longer than `minSeconds`."""

LEFT_TO_RIGHT = "left-to-right"
RIGHT_TO_LEFT = "right-to-left"


class Position(NamedTuple):
    """Where the anchor of a track was in a picture: 0-1 of the picture, at a monotonic time.

    `size`: the mean of width and height of its box, in widths of the picture.
    """

    sequence: int
    at_s: float
    x: float
    y: float
    size: float = 0.0


class Moment(NamedTuple):
    """A picture and its monotonic time."""

    sequence: int
    at_s: float


class Decision(NamedTuple):
    """An event of a track. Its evidence begins with `passed`: the positions that prove the event.

    `since`: the first position of a visit that ends.
    """

    type: str
    passed: tuple[Position, ...]
    direction: str | None = None
    dwell_s: float | None = None
    since: Position | None = None


class CountDecision(NamedTuple):
    """An event of a zone; its condition holds since `since`."""

    type: str
    since: Moment


@dataclass(frozen=True, slots=True)
class ZoneRule:
    """A zone as the rules use it; `classes` None: all labels."""

    name: str
    config: ZoneConfig
    classes: frozenset[str] | None
    anchor: str
    area: PolygonArea
    min_s: float

    @staticmethod
    def of(name: str, config: ZoneConfig, classes: tuple[str, ...] | None) -> "ZoneRule":
        """The zone of a camera that reports `classes`."""
        return ZoneRule(
            name,
            config,
            _labels(config.classes, classes),
            config.anchor,
            PolygonArea(config.polygon),
            config.min_seconds,
        )

    def find_side(self, x: float, y: float) -> bool:
        """Whether a point lies inside."""
        return self.area.contains(x, y)


@dataclass(frozen=True, slots=True)
class LineRule:
    """A line as the rules use it; `aspect`: width of the picture divided by its height."""

    name: str
    config: LineConfig
    classes: frozenset[str] | None
    anchor: str
    start: Point
    end: Point
    min_s: float
    aspect: float

    @staticmethod
    def of(name: str, config: LineConfig, classes: tuple[str, ...] | None, aspect: float) -> "LineRule":
        """The line of a camera that reports `classes`."""
        return LineRule(
            name,
            config,
            _labels(config.classes, classes),
            config.anchor,
            config.start,
            config.end,
            config.min_seconds,
            aspect,
        )

    def find_side(self, x: float, y: float) -> bool:
        """Whether a point lies on the left of the line."""
        return cross_product(self.start, self.end, x, y) < 0


def _labels(own: tuple[str, ...] | None, of_camera: tuple[str, ...] | None) -> frozenset[str] | None:
    wanted = of_camera if own is None else own
    return None if wanted is None else frozenset(wanted)


# --- zones --------------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """Whether a track counts as inside; None: not known yet, as the track or the zone has just begun.

    `since`: the first position of the visit. `change`: the last position before, and the first one after the
    border was passed, while that does not count yet.
    """

    inside: bool | None = None
    since: Position | None = None
    change: tuple[Position, Position] | None = None


def presence(
    zone: ZoneRule, visit: Visit, before: Position | None, now: Position
) -> tuple[Visit, Decision | None]:
    """Entered and left: a track counts when it was in, or out, for `minSeconds` without a break.

    Who is inside at first has entered.
    """
    inside = zone.find_side(now.x, now.y)
    if visit.inside is None or before is None:
        if inside:
            return Visit(True, now), Decision("zone-entered", (now,))
        return Visit(False), None
    if inside == visit.inside:
        return (visit if visit.change is None else Visit(inside, visit.since)), None
    change = visit.change or (before, now)
    if now.at_s - change[1].at_s < zone.min_s:
        return (visit if visit.change else Visit(visit.inside, visit.since, change)), None
    if inside:
        return Visit(True, change[1]), Decision("zone-entered", change)
    return Visit(False), Decision("zone-left", change, dwell_s=_duration(visit, change[1]), since=visit.since)


def end_visit(zone: ZoneRule, visit: Visit, end_s: float | None, last: Position) -> Decision | None:
    """What becomes of a visit when the track ends at `end_s`; None: the module stops, or the zone closes.

    A track that was last seen outside, and not inside again for `minSeconds`, has left. Any other one is
    lost.
    """
    if not visit.inside or visit.since is None:
        return None
    if visit.change is None:
        return Decision("zone-lost", (visit.since, last), dwell_s=_duration(visit, last), since=visit.since)
    if end_s is not None and end_s - visit.change[1].at_s >= zone.min_s:
        return Decision(
            "zone-left", visit.change, dwell_s=_duration(visit, visit.change[1]), since=visit.since
        )
    # The evidence ends inside: being outside does not count yet.
    return Decision(
        "zone-lost",
        (visit.since, visit.change[0]),
        dwell_s=_duration(visit, visit.change[0]),
        since=visit.since,
    )


def _duration(visit: Visit, end: Position) -> float:
    return 0.0 if visit.since is None else end.at_s - visit.since.at_s


def dwell(zone: ZoneRule, since: Position | None, visit: Visit, now: Position) -> tuple[Any, Decision | None]:
    """Inside for `dwellSeconds`, once a visit; the state is the first position of the last such visit."""
    if not visit.inside or visit.change is not None or visit.since is None or visit.since == since:
        return since, None
    duration_s = now.at_s - visit.since.at_s
    if duration_s < (zone.config.dwell_seconds or 0.0):
        return since, None
    return visit.since, Decision("zone-dwell", (visit.since,), dwell_s=duration_s)


# --- lines --------------------------------------------------------------------------------------------------


class Passage(NamedTuple):
    """A passage that does not count yet: the positions before and after the line, and where it came from."""

    before: Position
    after: Position
    from_left: bool


def crossing(
    line: LineRule, passage: Passage | None, before: Position | None, now: Position
) -> tuple[Passage | None, Decision | None]:
    """The path passes the segment, and stays on the other side for `minSeconds` or goes far behind the line.

    Who goes back before that, through the segment or around its end, has not crossed.
    """
    if before is None:
        return None, None
    was_left, is_left = line.find_side(before.x, before.y), line.find_side(now.x, now.y)
    if was_left != is_left:
        is_return = passage is not None
        passes = meets_segment(line.start, line.end, (before.x, before.y), (now.x, now.y))
        passage = Passage(before, now, was_left) if passes and not is_return else None
    if passage is None:
        return None, None
    distance = distance_to_segment(line.start, line.end, now.x, now.y, line.aspect)
    # Without `minSeconds` the first position behind the line counts.
    has_stayed = now.at_s - passage.after.at_s >= line.min_s and distance >= NEAR_SIZES * now.size
    has_stayed |= line.min_s == 0
    if not has_stayed and distance < FAR_WIDTHS:
        return passage, None
    direction = LEFT_TO_RIGHT if passage.from_left else RIGHT_TO_LEFT
    return None, Decision("line-crossed", (passage.before, passage.after), direction=direction)


# --- counts of a zone ---------------------------------------------------------------------------------------


class Held(NamedTuple):
    """Whether a condition of a zone is in force, and else since when it holds."""

    active: bool = False
    since: Moment | None = None


def occupancy(zone: ZoneRule, held: Held, count: int, now: Moment) -> tuple[Held, CountDecision | None]:
    """At least so many are inside for `forSeconds`; vacated as soon as there are fewer."""
    wanted = zone.config.occupancy
    if wanted is None:
        return held, None
    return _hold(held, count >= wanted.at_least, wanted.for_seconds, now, ("zone-occupied", "zone-vacated"))


def empty(zone: ZoneRule, held: Held, count: int, now: Moment) -> tuple[Held, CountDecision | None]:
    """Nothing is inside for `forSeconds`; filled as soon as something is."""
    wanted = zone.config.empty
    if wanted is None:
        return held, None
    return _hold(held, count == 0, wanted.for_seconds, now, ("zone-empty", "zone-filled"))


def _hold(
    held: Held, holds: bool, for_s: float, now: Moment, types: tuple[str, str]
) -> tuple[Held, CountDecision | None]:
    if held.active:
        return (held, None) if holds else (Held(), CountDecision(types[1], now))
    if not holds:
        return Held(), None
    since = held.since or now
    if now.at_s - since.at_s < for_s:
        return (held if held.since else Held(False, since)), None
    return Held(True), CountDecision(types[0], since)


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuleKind:
    """A kind of rule.

    Attributes:
        over: what `step` gets beside the zone or line and its state: `zone-path` and `line-path` the last two
            positions of a track, `visit` the visit of a track (after `presence`) and its position,
            `zone-count` the number of tracks inside and the moment.
        step: the pure function.
        wanted: whether a zone or line has this rule.
        initial: the first state.
        rests: whether a state, once `step` has returned it, stays as it is for as long as the track stays on
            its side (inside or outside of a zone, left or right of a line). Such tracks, which are most, are
            passed over.
    """

    over: Literal["zone-path", "visit", "line-path", "zone-count"]
    step: Callable[..., tuple[Any, Any]]
    wanted: Callable[[Any], bool] = lambda _config: True
    initial: Any = None
    rests: Callable[[Any], bool] = lambda _state: False


KINDS: Mapping[str, RuleKind] = {
    "presence": RuleKind("zone-path", presence, initial=Visit(), rests=lambda visit: visit.change is None),
    "dwell": RuleKind("visit", dwell, lambda zone: zone.dwell_seconds is not None),
    "crossing": RuleKind("line-path", crossing, rests=lambda passage: passage is None),
    "occupancy": RuleKind("zone-count", occupancy, lambda zone: zone.occupancy is not None, Held()),
    "empty": RuleKind("zone-count", empty, lambda zone: zone.empty is not None, Held()),
}
"""Every kind of rule, by the name of its state."""
