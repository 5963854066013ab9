"""The scene of one camera: tracks in, events and totals out. Used by one thread at a time; no I/O.

Time is an argument: durations are computed from the monotonic `at_s`, only schedules and documents use the
UTC time. Each change of a total is an event, so the totals can be computed from all events.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from visionedge.config.schema import CameraConfig, LineConfig, ZoneConfig
from visionedge.frames.types import format_utc
from visionedge.scene.events import (
    TOTALS_OF_LINES,
    TOTALS_OF_ZONES,
    RuleShape,
    SceneEvent,
    ScenePicture,
    make_box_document,
    make_event_id,
)
from visionedge.scene.rules import (
    KINDS,
    CountDecision,
    Decision,
    Held,
    LineRule,
    Moment,
    Position,
    RuleKind,
    Visit,
    ZoneRule,
    end_visit,
)
from visionedge.scene.schedule import Schedule
from visionedge.scene.spatial_analysis import (
    describe_loss,
    describe_picture,
    describe_track,
    describe_visit,
    make_first_count,
)
from visionedge.scene.trail import MAX_PATH_POINTS, ConfirmedTrack, TrackState

_KEPT_PATH_POINTS = 8
"""The most points of the path in the event of a visit that is stored each second in case of a kill."""

_RECONNECT_S = 2.0
"""After a longer time without a connection it is not known whether a zone was empty."""


@dataclass(frozen=True, slots=True)
class RuleStart:
    """A zone or line begins to count at 0, with this definition; `definition` None: it is removed.

    `keeps_totals`: the file could not be read before, so the totals that it has of this definition stay.
    """

    camera: str
    rule: str
    shape: RuleShape
    definition: str | None
    since: datetime
    keeps_totals: bool = False


@dataclass(frozen=True, slots=True)
class SceneChanges:
    """What happened, in this order: events, then zones and lines that begin anew.

    `visits`: for tracks that have entered, and now and then for all that are inside, the event that is due if
    the module stops now. `states`: all of a zone or line, for a new file.
    """

    events: tuple[SceneEvent, ...] = ()
    starts: tuple[RuleStart, ...] = ()
    visits: tuple[SceneEvent, ...] = ()
    states: tuple["RuleState", ...] = ()

    def __bool__(self) -> bool:
        return bool(self.events or self.starts or self.visits or self.states)


NO_CHANGES = SceneChanges()


@dataclass(frozen=True, slots=True)
class KeptRule:
    """What is kept of a zone or line over a restart; `visits` are the events of those who were inside."""

    shape: RuleShape
    definition: str
    since: datetime
    totals: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    conditions: frozenset[str] = frozenset()
    visits: tuple[SceneEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleState:
    """All of a zone or line of a camera."""

    camera: str
    rule: str
    kept: KeptRule


_NOTHING: Mapping[str, KeptRule] = MappingProxyType({})
_NO_ATTRIBUTES: Mapping[int, Mapping[str, str]] = MappingProxyType({})
_NO_ANSWERS: Mapping[str, str] = MappingProxyType({})


_Kinds = list[tuple[RuleKind, dict[int, Any]]]


class _CountingZone:
    """A zone with its totals, and the states of its rules by track.

    `sides`: of the tracks with which nothing happens as long as they stay there (`RuleKind.rests`).
    """

    def __init__(self, rule: ZoneRule, definition: str, since: datetime, conditions: Iterable[str]) -> None:
        self.definition, self.since = definition, since
        self.totals: dict[str, Counter[str]] = {total: Counter() for total in TOTALS_OF_ZONES}
        self.inside: dict[int, str] = {}
        self.sides: dict[int, bool] = {}
        self.is_open = True
        self.has_first_count = False
        self.states: dict[str, dict[int, Any]] = {name: {} for name in KINDS}
        self.held: dict[str, Held] = {name: Held(active=True) for name in conditions}
        self.visits: dict[int, Visit] = self.states["presence"]
        self.use(rule)

    def use(self, rule: ZoneRule) -> None:
        """Go on with other durations or another schedule."""
        self.rule = rule
        self.sides.clear()
        self.schedule = None if rule.config.schedule is None else Schedule(rule.config.schedule)
        self.on_path: _Kinds = self._kinds("zone-path")
        self.on_visit: _Kinds = self._kinds("visit")
        self.on_count = [
            (name, kind)
            for name, kind in KINDS.items()
            if kind.over == "zone-count" and kind.wanted(rule.config)
        ]

    def _kinds(self, over: str) -> _Kinds:
        return [
            (kind, self.states[name])
            for name, kind in KINDS.items()
            if kind.over == over and kind.wanted(self.rule.config)
        ]

    def step(self, track_id: int, before: Position | None, now: Position) -> list[Decision]:
        """What the rules decide about a track that was seen."""
        decisions = _step_path(self, track_id, before, now)
        for kind, states in self.on_visit:
            state = states.get(track_id, kind.initial)
            states[track_id], decision = kind.step(self.rule, state, self.visits[track_id], now)
            if decision is not None:
                decisions.append(decision)
            if not kind.rests(states[track_id]):
                self.sides.pop(track_id, None)
        return decisions

    def forget(self, track_id: int) -> None:
        self.sides.pop(track_id, None)
        for states in self.states.values():
            states.pop(track_id, None)

    def document(self) -> dict[str, Any]:
        return {
            "since": format_utc(self.since),
            "inside": dict(Counter(self.inside.values())),
            **{total: dict(by_label) for total, by_label in self.totals.items()},
        }


class _CountingLine:
    """A line with its totals, and the states of its rules by track; `sides` as those of a zone."""

    def __init__(self, rule: LineRule, definition: str, since: datetime) -> None:
        self.rule, self.definition, self.since = rule, definition, since
        self.is_open = True
        self.sides: dict[int, bool] = {}
        self.totals: dict[str, Counter[str]] = {total: Counter() for total in TOTALS_OF_LINES}
        self.on_path: _Kinds = [
            (kind, {}) for kind in KINDS.values() if kind.over == "line-path" and kind.wanted(rule.config)
        ]

    def step(self, track_id: int, before: Position | None, now: Position) -> list[Decision]:
        """What the rules decide about a track that was seen."""
        return _step_path(self, track_id, before, now)

    def forget(self, track_id: int) -> None:
        self.sides.pop(track_id, None)
        for _, states in self.on_path:
            states.pop(track_id, None)

    def document(self) -> dict[str, Any]:
        counts = {total: dict(by_label) for total, by_label in self.totals.items()}
        return {"since": format_utc(self.since), **counts}


_CountingRule = _CountingZone | _CountingLine


def _step_path(rule: _CountingRule, track_id: int, before: Position | None, now: Position) -> list[Decision]:
    """What the rules over a path decide, and whether the track rests on its side now."""
    decisions: list[Decision] = []
    rests = True
    for kind, states in rule.on_path:
        state = states.get(track_id, kind.initial)
        states[track_id], decision = kind.step(rule.rule, state, before, now)
        rests &= kind.rests(states[track_id])
        if decision is not None:
            decisions.append(decision)
    if rests:
        rule.sides[track_id] = rule.rule.find_side(now.x, now.y)
    else:
        rule.sides.pop(track_id, None)
    return decisions


class Scene:
    """Zones, lines and tracks of one camera. Call `configure` first.

    Args:
        camera: its name.
        kept: what the last run of the module has left, by the name of the zone or line; None: the file cannot
            be read. Then `adopt` adds it later.

    Attributes:
        keeps_context: events get the context that messages of Spatial Analysis need.
    """

    def __init__(self, camera: str, kept: Mapping[str, KeptRule] | None = _NOTHING) -> None:
        self.camera = camera
        self._kept = dict(kept or {})
        self._lacks_kept = kept is None
        self._begun: set[str] = set()
        self._adoptable: set[str] = set()
        self._zones: dict[str, _CountingZone] = {}
        self._lines: dict[str, _CountingLine] = {}
        self._tracks: dict[int, TrackState] = {}
        self._by_label: dict[str, tuple[list[_CountingRule], tuple[str, ...]]] = {}
        self._last: ScenePicture | None = None
        self._minute: datetime | None = None
        self._has_schedule = self._has_attributes = False
        self._aspect = 16 / 9
        self.keeps_context = False
        self._source_id = camera
        self._first_counts: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        inside = sum(len(zone.inside) for zone in self._zones.values())
        return f"<Scene {self.camera} tracks={len(self._tracks)} zones={len(self._zones)} inside={inside}>"

    # --- the configuration --------------------------------------------------------------------------------

    def configure(self, config: CameraConfig, now: datetime) -> SceneChanges:
        """Use the zones and lines of a configuration; `now` is the UTC time.

        One whose geometry, classes, attributes or anchor have changed begins at 0, one that is gone is
        removed: who is inside it is lost before. After a restart everybody who was inside is lost.
        """
        self._source_id = config.source_id or self.camera
        events, starts = self._lose_kept(), list[RuleStart]()
        wanted: dict[str, ZoneConfig | LineConfig] = {**config.zones, **config.lines}
        for name in [*self._zones, *self._lines]:
            definition = _define(wanted[name], config) if name in wanted else None
            current = self._zones.get(name) or self._lines[name]
            if definition != current.definition:
                events += self._remove(name)
                if definition is None:
                    shape: RuleShape = "zone" if isinstance(current, _CountingZone) else "line"
                    starts.append(RuleStart(self.camera, name, shape, None, now))
        starts += [
            RuleStart(self.camera, name, kept.shape, None, now)
            for name, kept in self._kept.items()
            if name not in wanted
        ]
        for name, zone in config.zones.items():
            starts += self._use_zone(name, zone, config, now)
        for name, line in config.lines.items():
            starts += self._use_line(name, line, config, now)
        self._kept.clear()
        self._by_label.clear()
        self._minute = None
        self._has_schedule = any(zone.schedule is not None for zone in self._zones.values())
        self._has_attributes = any(rule.rule.config.attributes for rule in self._rules)
        return SceneChanges(tuple(events), tuple(starts))

    def _lose_kept(self) -> list[SceneEvent]:
        """Who was inside when the last run of the module ended."""
        events = [
            describe_loss(event, kept.visits[number + 1 :])
            for kept in self._kept.values()
            for number, event in enumerate(kept.visits)
        ]
        for name, kept in self._kept.items():
            totals = {total: Counter(counts) for total, counts in kept.totals.items()}
            for event in kept.visits:
                totals.setdefault("lost", Counter())[str(event.label)] += 1
            self._kept[name] = replace(kept, totals=totals, visits=())
        return events

    def _remove(self, name: str) -> list[SceneEvent]:
        events: list[SceneEvent] = []
        self._adoptable.discard(name)
        if (zone := self._zones.pop(name, None)) is not None and self._last is not None:
            self._close(zone, self._last, events)
        self._lines.pop(name, None)
        return events

    def _use_zone(self, name: str, zone: ZoneConfig, config: CameraConfig, now: datetime) -> list[RuleStart]:
        rule, definition = ZoneRule.of(name, zone, config.classes), _define(zone, config)
        if name in self._zones:
            self._zones[name].use(rule)
            return []
        kept = self._kept.get(name)
        if kept is None or kept.definition != definition:
            self._zones[name] = _CountingZone(rule, definition, now, ())
            return [self._begin(name, "zone", definition, now)]
        self._zones[name] = _CountingZone(rule, definition, kept.since, kept.conditions)
        _restore(self._zones[name].totals, kept)
        return []

    def _use_line(self, name: str, line: LineConfig, config: CameraConfig, now: datetime) -> list[RuleStart]:
        rule, definition = LineRule.of(name, line, config.classes, self._aspect), _define(line, config)
        if name in self._lines:
            self._lines[name].rule = rule
            return []
        kept = self._kept.get(name)
        if kept is None or kept.definition != definition:
            self._lines[name] = _CountingLine(rule, definition, now)
            return [self._begin(name, "line", definition, now)]
        self._lines[name] = _CountingLine(rule, definition, kept.since)
        _restore(self._lines[name].totals, kept)
        return []

    def _begin(self, name: str, shape: RuleShape, definition: str, now: datetime) -> RuleStart:
        keeps_totals = self._lacks_kept and name not in self._begun
        self._begun.add(name)
        if keeps_totals:
            self._adoptable.add(name)
        return RuleStart(self.camera, name, shape, definition, now, keeps_totals)

    def adopt(self, name: str, kept: KeptRule) -> None:
        """Add what the file had of a zone or line that began without it; who was inside is lost already."""
        if name not in self._adoptable:
            return  # it was changed meanwhile
        self._adoptable.discard(name)
        found = self._zones.get(name) or self._lines[name]
        found.since = kept.since
        _restore(found.totals, kept)
        if isinstance(found, _CountingZone):
            for kind in kept.conditions:
                found.held[kind] = Held(active=True)

    # --- pictures -----------------------------------------------------------------------------------------

    def update(
        self,
        picture: ScenePicture,
        tracks: Iterable[ConfirmedTrack],
        ended: Iterable[int] = (),
        attributes: Mapping[int, Mapping[str, str]] = _NO_ATTRIBUTES,
    ) -> SceneChanges:
        """What a picture changes: its confirmed tracks, and the ids of those that have ended.

        `attributes`: what second models have answered about tracks, by track and by the name of the model.
        """
        events: list[SceneEvent] = []
        self._prepare(picture, events)
        if self.keeps_context:
            self._note_first_counts(picture)
            tracks = [*tracks]
            self._see(tracks)
        for track in tracks:
            if track.detection is not None:
                known = attributes.get(track.track_id, _NO_ANSWERS)
                self._advance(track, known, picture, events)
        for track_id in ended:
            self._end(track_id, picture, picture.at_s, events)
        self._count_inside(picture, events)
        self._last = picture
        return self._changes(events) if events else NO_CHANGES

    def end_all(self) -> SceneChanges:
        """All tracks have ended without a picture: the camera is offline for long, or is removed.

        The events belong to the last picture.
        """
        events: list[SceneEvent] = []
        if self._last is not None:
            for track_id in [*self._tracks]:
                self._end(track_id, self._last, None, events)
            self._count_inside(self._last, events)
            self._begin_conditions_anew()
        return self._changes(events)

    def open_visits(self) -> SceneChanges:
        """For everybody inside the event that is due if the module stops now; to be stored each second."""
        return SceneChanges(
            visits=tuple(
                self._lost_if_stopped(zone, track_id)
                for zone in self._zones.values()
                for track_id in zone.inside
            )
        )

    def take_first_counts(self) -> list[dict[str, Any]]:
        """With `keeps_context`: how many are inside zones that are new, once for each; not stored."""
        found, self._first_counts = self._first_counts, []
        return found

    def states(self) -> SceneChanges:
        """All of the zones and lines, for a file that replaces a damaged one."""
        return SceneChanges(states=tuple(RuleState(self.camera, *each) for each in self._keep()))

    def _keep(self) -> Iterator[tuple[str, KeptRule]]:
        visits = self.open_visits().visits
        for rule in self._rules:
            name, is_zone = rule.rule.name, isinstance(rule, _CountingZone)
            held = rule.held if isinstance(rule, _CountingZone) else {}
            yield (
                name,
                KeptRule(
                    "zone" if is_zone else "line",
                    rule.definition,
                    rule.since,
                    {total: dict(counts) for total, counts in rule.totals.items()},
                    frozenset(kind for kind, state in held.items() if state.active),
                    tuple(visit for visit in visits if visit.rule == name),
                ),
            )

    def document(self) -> dict[str, Any]:
        """The answer of `GET /api/v1/cameras/{name}/scene`."""
        rules = self._rules
        last_s = 0.0 if self._last is None else self._last.at_s
        return {
            "camera": self.camera,
            "since": format_utc(min(rule.since for rule in rules)) if rules else None,
            "tracks": [self._track_document(track, last_s) for track in self._tracks.values()],
            "zones": {name: zone.document() for name, zone in self._zones.items()},
            "lines": {name: line.document() for name, line in self._lines.items()},
        }

    def _track_document(self, track: TrackState, last_s: float) -> dict[str, Any]:
        return {
            "trackId": track.track_id,
            "label": track.label,
            "ageSeconds": round(last_s - track.started_s, 3),
            "box": make_box_document(track.box),
            "zones": [name for name, zone in self._zones.items() if track.track_id in zone.inside],
        }

    def _changes(self, events: list[SceneEvent]) -> SceneChanges:
        visits = tuple(
            self._lost_if_stopped(self._zones[event.rule], event.track_id)
            for event in events
            if event.type == "zone-entered"
            and event.track_id is not None
            and event.track_id in self._zones[event.rule].inside
        )
        return SceneChanges(tuple(events), visits=visits)

    def _prepare(self, picture: ScenePicture, events: list[SceneEvent]) -> None:
        """Follow the size of the picture, the schedules and the connection."""
        if picture.aspect != self._aspect:
            self._aspect = picture.aspect
            for line in self._lines.values():
                line.rule = replace(line.rule, aspect=picture.aspect)
        if self._minute is None or self._has_schedule:
            minute = picture.captured_at.replace(second=0, microsecond=0)
            if minute != self._minute:
                self._minute = minute
                self._follow_schedules(picture, events)
        last = self._last
        if last and picture.epoch != last.epoch and picture.at_s - last.at_s > _RECONNECT_S:
            self._begin_conditions_anew()

    def _begin_conditions_anew(self) -> None:
        """What was inside meanwhile is not known, so a condition must hold for its time again."""
        for zone in self._zones.values():
            zone.held = {name: held._replace(since=None) for name, held in zone.held.items()}

    def _follow_schedules(self, picture: ScenePicture, events: list[SceneEvent]) -> None:
        for zone in self._zones.values():
            is_open = zone.schedule is None or zone.schedule.is_open(picture.captured_at)
            if is_open != zone.is_open:
                zone.is_open = is_open
                self._by_label.clear()
                if not is_open:
                    self._close(zone, picture, events)

    def _rules_for(self, label: str) -> tuple[list[_CountingRule], tuple[str, ...]]:
        """The open zones and the lines that count a label, and the anchors that they use."""
        found = self._by_label.get(label)
        if found is None:
            rules = [rule for rule in self._rules if rule.is_open and _counts(rule.rule, label)]
            # With those that a closed zone will use when it opens: a path has no gap.
            anchors = {rule.rule.anchor for rule in self._rules} or {"bottom-center"}
            found = self._by_label[label] = (rules, tuple(anchors))
        return found

    @property
    def _rules(self) -> list[_CountingRule]:
        return [*self._zones.values(), *self._lines.values()]

    def _advance(
        self,
        track: ConfirmedTrack,
        attributes: Mapping[str, str],
        picture: ScenePicture,
        events: list[SceneEvent],
    ) -> None:
        """What the rules decide about a track that was seen."""
        state = self._tracks.get(track.track_id)
        if state is None:
            state = self._tracks[track.track_id] = TrackState(track, picture.at_s)
        rules, anchors = self._rules_for(state.label)
        if self._has_attributes:
            # Before the track moves: all evidence of a loss lies inside.
            unmatched = [rule for rule in rules if not _matches(rule.rule.config.attributes, attributes)]
            for rule in unmatched:
                self._withdraw(rule, track, state, picture, events)
            rules = [rule for rule in rules if rule not in unmatched]
        state.move(track, picture, anchors)
        for rule in rules:
            trail = state.trails[rule.rule.anchor]
            now = trail.now
            if rule.sides.get(state.track_id) is rule.rule.find_side(now.x, now.y):
                continue
            for decision in rule.step(state.track_id, trail.before, now):
                self._record(rule, self._track_event(rule, state, decision, picture), events)

    def _end(
        self, track_id: int, picture: ScenePicture, end_s: float | None, events: list[SceneEvent]
    ) -> None:
        state = self._tracks.get(track_id)
        if state is None:
            return
        for zone in self._zones.values():
            self._end_visit(zone, state, picture, end_s, events)
            zone.forget(track_id)
        for line in self._lines.values():
            line.forget(track_id)
        del self._tracks[track_id]

    def _withdraw(
        self,
        rule: _CountingRule,
        track: ConfirmedTrack,
        state: TrackState,
        picture: ScenePicture,
        events: list[SceneEvent],
    ) -> None:
        """A track takes no part in a zone or line whose attributes it has not: who was inside is lost.

        It has not left: its path does not pass the border, so its evidence would prove nothing.
        """
        if isinstance(rule, _CountingZone) and state.track_id in rule.inside:
            state.box, state.confidence = track.box, track.confidence
            self._end_visit(rule, state, picture, None, events)
        rule.forget(state.track_id)

    def _end_visit(
        self,
        zone: _CountingZone,
        state: TrackState,
        picture: ScenePicture,
        end_s: float | None,
        events: list[SceneEvent],
    ) -> None:
        last = state.trails[zone.rule.anchor].now
        decision = end_visit(zone.rule, zone.visits.get(state.track_id, Visit()), end_s, last)
        if decision is not None:
            self._record(zone, self._track_event(zone, state, decision, picture), events)

    def _close(self, zone: _CountingZone, picture: ScenePicture, events: list[SceneEvent]) -> None:
        """Who is inside is lost; the zone counts nothing until it opens."""
        for track_id in [*zone.inside]:
            self._end_visit(zone, self._tracks[track_id], picture, None, events)
        zone.sides.clear()
        for states in zone.states.values():
            states.clear()
        for name, kind in zone.on_count:
            if zone.held.get(name, kind.initial).active:
                self._step_count(zone, name, kind, picture, events)
        zone.held = {name: held._replace(since=None) for name, held in zone.held.items()}

    def _count_inside(self, picture: ScenePicture, events: list[SceneEvent]) -> None:
        for zone in self._zones.values():
            if zone.is_open:
                for name, kind in zone.on_count:
                    self._step_count(zone, name, kind, picture, events)

    def _step_count(
        self,
        zone: _CountingZone,
        name: str,
        kind: RuleKind,
        picture: ScenePicture,
        events: list[SceneEvent],
    ) -> None:
        held, moment = zone.held.get(name, kind.initial), Moment(picture.sequence, picture.at_s)
        zone.held[name], decision = kind.step(zone.rule, held, len(zone.inside), moment)
        if decision is not None:
            events.append(self._count_event(zone, decision, picture))

    # --- events -------------------------------------------------------------------------------------------

    def _record(self, rule: _CountingRule, event: SceneEvent, events: list[SceneEvent]) -> None:
        events.append(event)
        if event.total is None or event.track_id is None or event.label is None:
            return
        rule.totals[event.total][event.label] += 1
        if isinstance(rule, _CountingZone):
            if event.total == "entered":
                rule.inside[event.track_id] = event.label
            else:
                del rule.inside[event.track_id]
            if event.context is not None:
                inside = self._describe_inside(rule)
                events[-1] = replace(event, context={**event.context, "inside": inside})

    def _describe_inside(self, zone: _CountingZone) -> list[dict[str, Any]]:
        return [describe_track(self._tracks[track_id]) for track_id in zone.inside]

    def _see(self, tracks: Iterable[ConfirmedTrack]) -> None:
        """The boxes of this picture, before its first event describes others who are inside."""
        for track in tracks:
            state = self._tracks.get(track.track_id)
            if state is not None and track.detection is not None:
                state.box, state.confidence = track.box, track.confidence

    def _note_first_counts(self, picture: ScenePicture) -> None:
        for zone in self._zones.values():
            if not zone.has_first_count:
                zone.has_first_count = True
                context = describe_picture(self._source_id, picture)
                inside = self._describe_inside(zone)
                self._first_counts.append(make_first_count(self.camera, zone.rule, picture, context, inside))

    def _track_event(
        self,
        rule: _CountingRule,
        state: TrackState,
        decision: Decision,
        picture: ScenePicture,
        limit: int = MAX_PATH_POINTS,
    ) -> SceneEvent:
        trail = state.trails[rule.rule.anchor]
        # All evidence of a loss lies inside.
        last = decision.passed[-1] if decision.type == "zone-lost" else trail.now
        path = trail.select(decision.passed, last, limit)
        first = path[0].sequence
        evidence = {
            "firstSequence": first,
            "lastSequence": path[-1].sequence,
            "path": [[each.sequence, each.x, each.y] for each in path],
        }
        return SceneEvent(
            id=make_event_id(self.camera, rule.rule.name, decision.type, state.track_id, first),
            camera=self.camera,
            type=decision.type,
            shape="zone" if isinstance(rule, _CountingZone) else "line",
            rule=rule.rule.name,
            at=picture.captured_at,
            sequence=picture.sequence,
            epoch=picture.epoch,
            model=picture.model,
            device=picture.device,
            evidence=evidence,
            direction=decision.direction,
            label=state.label,
            track_id=state.track_id,
            dwell_s=decision.dwell_s,
            confidence=state.confidence,
            box=state.box,
            context=self._describe(rule, decision, picture) if self.keeps_context else None,
        )

    def _describe(self, rule: _CountingRule, decision: Decision, picture: ScenePicture) -> dict[str, Any]:
        """The context of an event; `_record` adds who is inside the zone afterwards."""
        context = describe_picture(self._source_id, picture)
        return context | describe_visit(rule.rule, decision) if isinstance(rule, _CountingZone) else context

    def _lost_if_stopped(self, zone: _CountingZone, track_id: int) -> SceneEvent:
        """The event of a track inside that is due if the module stops now."""
        state, picture = self._tracks[track_id], self._last
        last = state.trails[zone.rule.anchor].now
        decision = end_visit(zone.rule, zone.visits[track_id], None, last)
        if decision is None or picture is None:
            raise ValueError(f"track {track_id} is not inside '{zone.rule.name}'")
        return self._track_event(zone, state, decision, picture, _KEPT_PATH_POINTS)

    def _count_event(self, zone: _CountingZone, decision: CountDecision, picture: ScenePicture) -> SceneEvent:
        evidence = {
            "firstSequence": decision.since.sequence,
            "lastSequence": picture.sequence,
            "trackIds": sorted(zone.inside),
        }
        name, first = zone.rule.name, decision.since.sequence
        return SceneEvent(
            id=make_event_id(self.camera, name, decision.type, None, first),
            camera=self.camera,
            type=decision.type,
            shape="zone",
            rule=name,
            at=picture.captured_at,
            sequence=picture.sequence,
            epoch=picture.epoch,
            model=picture.model,
            device=picture.device,
            evidence=evidence,
            count=len(zone.inside),
        )


def _restore(totals: dict[str, Counter[str]], kept: KeptRule) -> None:
    for total, counts in kept.totals.items():
        totals.setdefault(total, Counter()).update(counts)


def _matches(wanted: Mapping[str, str] | None, attributes: Mapping[str, str]) -> bool:
    """Whether a track has all attributes that a zone or line asks for."""
    return wanted is None or all(attributes.get(name) == label for name, label in wanted.items())


def _counts(rule: ZoneRule | LineRule, label: str) -> bool:
    return rule.classes is None or label in rule.classes


def _define(rule: ZoneConfig | LineConfig, config: CameraConfig) -> str:
    """What a zone or line counts, as a text: another one begins at 0."""
    classes = config.classes if rule.classes is None else rule.classes
    geometry = [rule.polygon] if isinstance(rule, ZoneConfig) else [rule.start, rule.end]
    kind = "zone" if isinstance(rule, ZoneConfig) else "line"
    definition = [kind, geometry, None if classes is None else sorted(set(classes)), rule.anchor]
    # Without attributes it is the text of older versions, so that no total begins at 0 at an update.
    return json.dumps([*definition, *([rule.attributes] if rule.attributes else [])], sort_keys=True)
