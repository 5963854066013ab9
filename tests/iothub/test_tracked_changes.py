"""`telemetry.mode: changes` of a camera with tracking: tracks that appear, end or move, and nothing else."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scene_paths import camera_config
from telemetry_harness import TelemetryHarness
from track_scenes import LABELS, RATES, Seen, columns, jitter
from visionedge.config.load import parse_config
from visionedge.frames.types import FrameResult
from visionedge.iothub.change_filter import ChangeFilter
from visionedge.scene.camera_scene import CameraScene
from visionedge.scene.second_stage import CropAnswer

PERSON = Seen(0.3, 0.5)
LOST_S = 2.5
"""The tracker ends a track that was not seen for longer."""

CONFIRMED_S = 1.0
"""A track is confirmed by then, at two pictures a second too."""


class TrackedRun:
    """A camera with tracking before a filter, which records the frames that are sent with their times."""

    def __init__(self, **settings: Any) -> None:
        self.harness = TelemetryHarness()
        self.changes = ChangeFilter(**settings)
        self.sent: list[tuple[float, FrameResult]] = []
        self.frames = 0
        self.restart(1)

    def restart(self, first_track_id: int) -> None:
        """The module starts again: the tracks are new."""
        camera = parse_config({"cameras": {"dock": {"uri": "demo:", "tracking": "on"}}}).cameras["dock"]
        self.scene = CameraScene("dock", first_track_id, {})
        self.scene.configure(camera, self.harness.utc)
        self.scene.use_confidence(0.3)

    @property
    def at_s(self) -> float:
        return self.harness.now_ns / 1e9

    def frame(self, seen: Iterable[Seen] = (), *, after_s: float = 0.1, epoch: int = 1) -> bool:
        """Some time later a frame shows this; whether it is sent. Boxes below 0.3 are not reported."""
        self.harness.advance_s(after_s)
        found = columns(seen)
        reported = found.first(int((found.scores >= 0.3).sum()))
        result = replace(self.harness.result(epoch=epoch, labels=LABELS), detections=reported)
        tracked, _ = self.scene.update(replace(result, candidates=found))
        self.frames += 1
        worth = self.changes.observe(tracked)
        if worth:
            self.changes.sent(tracked)
            self.sent.append((self.at_s, tracked))
        return worth

    def run(
        self, seconds: float, scene: Callable[[float], Iterable[Seen]], rate: float = 10.0, **options: Any
    ) -> None:
        """Frames of a scene that is given by the time."""
        for _ in range(round(seconds * rate)):
            self.frame(scene(self.at_s + 1 / rate), after_s=1 / rate, **options)

    def shown(self) -> list[set[int]]:
        """The confirmed tracks in each frame that was sent."""
        return [{each for each in result.track_ids or () if each is not None} for _, result in self.sent]


@pytest.mark.parametrize("rate", RATES)
def test_a_track_is_sent_when_it_appeared_and_when_it_ended_at_any_rate(rate: float) -> None:
    run = TrackedRun(heartbeat_s=1000)
    run.run(60, lambda at: [PERSON] if 10 <= at < 40 else [], rate)
    assert run.shown() == [set(), {1}, set()]
    (_, appeared, ended) = (at for at, _ in run.sent)
    assert 11 <= appeared <= 10 + CONFIRMED_S + 1 + 2 / rate
    assert 40 - 1 / rate <= ended - LOST_S <= 40 + 2 / rate


@pytest.mark.parametrize("rate", RATES)
def test_an_object_that_stands_sends_nothing_whatever_its_boxes_do(rate: float) -> None:
    """Boxes jitter by 3 % of their size, which for the large one is half of `moveThreshold`."""
    run, chance = TrackedRun(heartbeat_s=1000), random.Random(3)  # noqa: S311 - a scene, no secret
    run.run(300, lambda _at: jitter([Seen(0.3, 0.5, 0.2, 0.6), Seen(0.8, 0.5)], chance, 0.03), rate)
    assert run.shown() == [set(), {1, 2}]


def test_boxes_without_a_confirmed_track_send_nothing() -> None:
    """A weak box that is there for ever, and boxes that flash at other places each time."""
    run, chance = TrackedRun(heartbeat_s=1000), random.Random(4)  # noqa: S311 - as above
    run.frame([PERSON])
    for _ in range(600):
        flash = Seen(chance.random(), chance.random(), score=0.9)
        weak = Seen(0.8, 0.5, score=0.45)
        run.frame([PERSON, weak, *([flash] if chance.random() < 0.2 else [])])
    assert run.shown() == [set(), {1}]


@pytest.mark.parametrize("hidden_s", [0.3, 1.0, 2.0])
def test_a_track_that_is_hidden_for_a_moment_has_not_ended(hidden_s: float) -> None:
    """Behind a pillar, again and again; the same when the camera reconnects meanwhile."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(40, lambda at: [] if at > 5 and at % 5 < hidden_s else [PERSON])
    run.frame([PERSON], after_s=hidden_s, epoch=2)
    run.run(5, lambda _at: [PERSON], epoch=2)
    assert run.shown() == [set(), {1}]


def test_a_track_that_only_weak_boxes_keep_has_not_ended() -> None:
    """Boxes below `confidence` are in no frame, but the track goes on."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(3, lambda _at: [PERSON])
    run.run(2, lambda at: [replace(PERSON, score=0.2 if round(at * 10) % 3 else 0.8)])
    run.run(5, lambda _at: [PERSON])
    assert run.shown() == [set(), {1}]


def test_a_frame_that_was_sent_while_a_track_was_hidden_is_corrected_once() -> None:
    """The heartbeat comes in that moment; the next frame that shows all tracks is sent."""
    run = TrackedRun(heartbeat_s=10)
    run.run(19, lambda at: [] if 11 <= at < 12.5 else [PERSON])
    assert run.shown() == [set(), {1}, set(), {1}]


def test_another_id_of_the_same_object_is_an_end_and_an_appearance() -> None:
    """A person who is hidden for 4 s has another track: the last frame sent shows that one alone."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(30, lambda at: [] if 10 <= at < 14 else [PERSON])
    assert run.shown() == [set(), {1}, set(), {2}]


def test_a_track_that_ends_as_another_begins_is_sent_as_both() -> None:
    """At most two frames; none shows a track that has ended."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(30, lambda at: [PERSON] if at < 10 else [Seen(0.8, 0.5)])
    assert run.shown() == [set(), {1}, {2}, {2}]


@pytest.mark.parametrize("rate", RATES)
def test_a_slow_movement_adds_up(rate: float) -> None:
    """One hundredth of the picture a second: a frame for each twentieth, compared with the last one sent."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(40, lambda at: [Seen(0.2 + at / 100, 0.5)], rate)
    assert 6 <= len(run.sent) - 1 <= 8
    assert run.shown() == [set(), *[{1}] * (len(run.sent) - 1)]


def test_a_fast_movement_is_sent_at_most_once_in_change_seconds() -> None:
    run = TrackedRun(heartbeat_s=1000, change_s=2)
    run.run(20, lambda at: [Seen(0.1 + abs(at * 0.1 % 1.6 - 0.8), 0.5)])
    moments = [at for at, _ in run.sent[1:]]
    assert 7 <= len(moments) <= 10
    assert all(later - earlier > 2 - 1e-6 for earlier, later in pairwise(moments))


def test_who_passes_within_change_seconds_is_not_sent() -> None:
    run = TrackedRun(heartbeat_s=1000, change_s=10)
    run.run(60, lambda at: [PERSON] if 20 <= at < 26 else [])
    assert len(run.sent) == 1


def test_without_a_hold_time_a_track_is_sent_when_it_is_confirmed_and_when_it_ends() -> None:
    """`changeSeconds: 0`."""
    run = TrackedRun(heartbeat_s=1000, change_s=0)
    run.run(20, lambda at: [PERSON] if 5 <= at < 10 else [])
    moments = {tuple(shown): at for (at, _), shown in zip(run.sent, run.shown(), strict=True)}
    assert moments[1,] <= 5.5
    assert moments[()] == pytest.approx(10 + LOST_S, abs=0.3)


def test_after_a_restart_the_first_frame_and_the_new_tracks_are_sent() -> None:
    """Also when only the tracks began anew, as after a change of the camera's address."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(5, lambda _at: [PERSON])
    run.restart(1_000)
    run.run(5, lambda _at: [PERSON])
    run.changes = ChangeFilter(heartbeat_s=1000)
    run.run(5, lambda _at: [PERSON])
    assert run.shown() == [set(), {1}, {1_000}, {1_000}]


def test_tracking_that_is_turned_on_or_off_sends_a_frame() -> None:
    """The frames have another schema."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(5, lambda _at: [PERSON])
    plain = run.harness.result([(0.2, 0.4, 0.4, 0.6)])
    assert run.changes.observe(plain)
    run.changes.sent(plain)
    assert not run.changes.observe(plain)
    assert run.frame([PERSON])


def test_a_track_that_ended_while_the_camera_was_away_is_sent_as_ended() -> None:
    """`changeSeconds` after the first picture."""
    run = TrackedRun(heartbeat_s=1000)
    run.run(5, lambda _at: [PERSON])
    run.frame([], after_s=20, epoch=2)
    run.run(2, lambda _at: [], epoch=2)
    assert run.shown() == [set(), {1}, set()]
    assert run.sent[-1][0] == pytest.approx(26, abs=0.2)


SPOTS = st.sets(st.sampled_from([0.15, 0.4, 0.65, 0.9]))


@given(
    st.lists(st.tuples(st.integers(1, 40), SPOTS), max_size=8),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.sampled_from(RATES),
)
@settings(max_examples=40, deadline=None)
def test_every_track_sent_is_later_sent_as_ended(
    scene: list[tuple[int, set[float]]], change_s: float, rate: float
) -> None:
    """For any coming and going: once nothing is there, the last frame sent is empty and nothing is kept."""
    run = TrackedRun(change_s=change_s, heartbeat_s=1000)
    for count, spots in scene:
        for _ in range(count):
            run.frame([Seen(spot, 0.5) for spot in sorted(spots)], after_s=1 / rate)
    run.run(LOST_S + change_s + 3 / rate + 1, lambda _at: [], rate)
    assert run.shown()[-1] == set()
    assert len(run.changes) == 0


def test_what_a_second_model_says_of_a_track_is_sent_when_it_is_known_and_when_it_changes() -> None:
    run = TrackedRun(heartbeat_s=1000)
    run.scene.configure(camera_config(then={"model": "helmet", "every": 1}), run.harness.utc)
    run.run(5, lambda _at: [PERSON])
    for label in ("no", "no", "yes"):
        run.scene.second_stage.take(CropAnswer(question, label) for question in run.scene.questions)
        run.run(5, lambda _at: [PERSON])
    assert [result.attributes for _, result in run.sent] == [
        ({},),
        ({},),
        ({"helmet": "no"},),
        ({"helmet": "yes"},),
    ]
    times = [at for at, _ in run.sent]
    assert all(after - before >= 1 for before, after in pairwise(times))
