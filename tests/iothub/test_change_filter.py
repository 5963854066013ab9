"""`telemetry.mode: changes`: which frames are worth sending, by time and not by the number of frames."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telemetry_harness import LABELS, PERSON_BOX, Box, TelemetryHarness
from visionedge.__main__ import main
from visionedge.frames.types import FrameResult
from visionedge.iothub.change_filter import ChangeFilter

INTERVALS_S = [1 / 30, 0.1, 0.5, 5.0]
"""Seconds between two frames: from a fast camera to one picture in 5 s."""

OTHER: Box = (0.6, 0.1, 0.8, 0.9)
Seen = Sequence[tuple[int, Box]]
"""Class ids and boxes of a frame."""


class FilterHarness:
    """A camera before a filter: what is sent, and when."""

    def __init__(self, **settings: float) -> None:
        self.harness = TelemetryHarness()
        self.changes = ChangeFilter(**settings)
        self.sent: list[tuple[float, FrameResult]] = []
        self.frames = 0

    def frame(self, seen: Seen = (), *, after_s: float = 0.0, epoch: int = 1, score: float = 0.87) -> bool:
        """Some time later a frame shows this; whether it is sent."""
        self.harness.advance_s(after_s)
        boxes, ids = [box for _, box in seen], [number for number, _ in seen]
        return self.observe(self.harness.result(boxes, ids=ids, epoch=epoch, score=score))

    def observe(self, result: FrameResult, *, after_s: float = 0.0) -> bool:
        """As `frame`, with a result; it is captured now."""
        now_ns = self.harness.advance_s(after_s)
        result = replace(result, frame=replace(result.frame, captured_ns=now_ns))
        self.frames += 1
        worth = self.changes.observe(result)
        if worth:
            self.changes.sent(result)
            self.sent.append((now_ns / 1e9, result))
        return worth

    def run(self, interval_s: float, seconds: float, scene: Callable[[float], Seen]) -> None:
        """Frames of a scene that is given by the time."""
        until_s = self.harness.now_ns / 1e9 + seconds
        while self.harness.now_ns / 1e9 < until_s - interval_s / 2:
            self.frame(scene(self.harness.now_ns / 1e9 + interval_s), after_s=interval_s)

    def when(self, count: int, since_s: float) -> float:
        """How long after a moment a frame was sent that shows so many boxes."""
        return next(at - since_s for at, sent in self.sent if at >= since_s and len(sent.detections) == count)


def walker(at_s: float, *, speed: float = 0.1) -> Box:
    """A person who walks to and fro through the picture."""
    left = abs((at_s * speed) % 1.6 - 0.8)
    return (left, 0.2, left + 0.15, 0.8)


# --- appear and leave -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_each_appearance_and_disappearance_is_sent_once_at_any_rate(interval_s: float) -> None:
    """After `changeSeconds`, and at most two frames; the rest are heartbeats."""
    play = FilterHarness()
    play.run(interval_s, 120, lambda at: [(0, PERSON_BOX)] if 20 <= at < 80 else [])
    assert play.when(1, 20) <= 1.0 + 2 * interval_s
    assert play.when(0, 80) <= 1.0 + 2 * interval_s
    assert len(play.sent) <= 5


@pytest.mark.parametrize("interval_s", INTERVALS_S)
@pytest.mark.parametrize("pattern", [(1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 0, 0, 0, 0, 0)])
def test_a_flickering_box_is_no_change_at_any_rate(
    interval_s: float, pattern: tuple[int, ...]
) -> None:
    """Ten minutes of it beside one that stays: heartbeats, and a frame after each that shows it by chance."""
    play = FilterHarness()
    for number in range(round(600 / interval_s)):
        weak = [(0, OTHER)] if pattern[number % len(pattern)] else []
        play.frame([(0, PERSON_BOX), *weak], after_s=interval_s)
    assert len(play.sent) <= 2 * (1 + 10)


@pytest.mark.parametrize("seed", range(4))
def test_a_score_near_the_threshold_sends_almost_nothing(seed: int) -> None:
    """A weak box that is seen in every second frame, by chance, of a camera with 10 frames a second."""
    play, chance = FilterHarness(), random.Random(seed)  # noqa: S311 - a scene, no secret
    for _ in range(6000):
        play.frame([(0, PERSON_BOX), (0, OTHER)] if chance.random() < 0.5 else [(0, PERSON_BOX)], after_s=0.1)
    assert len(play.sent) <= 0.01 * play.frames


@pytest.mark.parametrize("interval_s", [1 / 30, 0.1])
def test_a_box_with_dropouts_is_sent_as_appeared(interval_s: float) -> None:
    """Nine of ten frames show it: that is no flicker, and takes little longer than all ten would."""
    play, chance = FilterHarness(), random.Random(7)  # noqa: S311 - as above
    play.frame()
    play.run(interval_s, 10, lambda _at: [(0, PERSON_BOX)] if chance.random() < 0.9 else [])
    assert play.when(1, 0) <= 3


def test_a_briefly_hidden_person_is_not_sent_as_gone() -> None:
    """0.8 s behind a pillar, again and again."""
    play = FilterHarness()
    play.run(0.1, 50, lambda at: [] if at > 5 and at % 4 < 0.8 else [(0, PERSON_BOX)])
    assert len(play.sent) == 1


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_a_wavering_class_of_one_box_is_no_change(interval_s: float) -> None:
    """Person, car, person, car is one object. Heartbeats are sent, and frames that correct them."""
    play = FilterHarness()
    for number in range(round(300 / interval_s)):
        play.frame([(number % 2, PERSON_BOX)], after_s=interval_s)
    assert len(play.sent) <= 2 * (1 + 5)


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_a_lasting_change_of_class_is_a_change(interval_s: float) -> None:
    """What was taken for a car turns out to be a person."""
    play = FilterHarness(heartbeat_s=1000)
    play.run(interval_s, 60, lambda at: [(1 if at < 20 else 0, PERSON_BOX)])
    assert [sent.detections.class_ids.tolist() for _, sent in play.sent] == [[1], [0]]
    assert play.sent[-1][0] <= 21 + 2 * interval_s


def test_labels_are_compared_by_text_and_not_by_class_id() -> None:
    """Two classes of one name are one label, and another model may number them otherwise."""
    play = FilterHarness()
    play.run(0.1, 5, lambda at: [(0 if at < 3 else 2, PERSON_BOX)])
    for _ in range(30):
        result = replace(play.harness.result([PERSON_BOX], ids=[1]), labels=("x", LABELS[0]))
        play.harness.advance_s(0.1)
        assert not play.changes.observe(result)
    assert len(play.sent) == 1


def test_without_a_hold_time_each_appearance_counts_at_once() -> None:
    """`changeSeconds: 0`."""
    play = FilterHarness(change_s=0)
    sent = [play.frame(seen, after_s=0.1) for seen in ([], [(0, PERSON_BOX)], [(0, PERSON_BOX)], [(1, PERSON_BOX)], [], [])]
    assert sent == [True, True, False, True, True, False]


def test_a_longer_hold_time_delays_the_change() -> None:
    """`changeSeconds: 5`: who passes within four seconds is not sent."""
    play = FilterHarness(change_s=5)
    play.run(0.1, 40, lambda at: [(0, PERSON_BOX)] if 10 <= at < 14 or at >= 20 else [])
    assert 5 <= play.when(1, 20) <= 5.2
    assert len(play.sent) == 2


# --- movement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_a_walking_person_is_sent_at_most_once_per_change_seconds(interval_s: float) -> None:
    """And is seen at all by a slow camera, in each of whose pictures she is elsewhere."""
    play = FilterHarness()
    play.run(interval_s, 20, lambda _at: [])
    play.run(interval_s, 60, lambda at: [(0, walker(at))])
    assert play.when(1, 20) <= 1.0 + 2 * interval_s
    moments = [at for at, _ in play.sent]
    assert len(moments) <= min(play.frames, 62)
    assert len(moments) >= 60 / max(2.0, interval_s) / 2


def test_scores_order_and_small_movements_do_not_count_as_a_change() -> None:
    """Sorting by score shuffles the boxes of a scene; that is no movement either."""
    play = FilterHarness()
    near: Box = (0.14, 0.1, 0.34, 0.9)
    for number in range(50):
        seen = [(0, PERSON_BOX if number % 3 else near), (0, OTHER)]
        play.frame(seen if number % 2 else seen[::-1], after_s=0.1, score=0.4 + number / 100)
    assert len(play.sent) == 1


def test_small_steps_add_up() -> None:
    """Movement is compared with the frame that was sent: a slow drift is sent in the end."""
    play = FilterHarness()
    play.run(0.1, 20, lambda at: [(0, (0.1 + at / 100, 0.1, 0.3 + at / 100, 0.9))])
    assert len(play.sent) in (4, 5)


def test_each_camera_is_compared_only_with_itself() -> None:
    """A scene of one camera is new on another."""
    play = FilterHarness()
    play.frame([(0, PERSON_BOX)])
    assert play.changes.observe(play.harness.result([PERSON_BOX], camera="gate"))


# --- what the last frame showed ---------------------------------------------------------------------------


def test_a_flicker_that_was_sent_by_chance_is_corrected() -> None:
    """The first frame shows a ghost; one a second later shows that it is none."""
    play = FilterHarness()
    assert play.frame([(0, PERSON_BOX), (0, OTHER)])
    play.run(0.1, 30, lambda _at: [(0, PERSON_BOX)])
    assert len(play.sent) == 2
    assert play.when(1, 0) <= 1.2


def test_a_dropout_in_the_frame_that_was_sent_is_corrected() -> None:
    """Somebody comes while another is missed in that very frame."""
    play = FilterHarness()
    third: Box = (0.85, 0.1, 0.95, 0.4)
    play.run(0.1, 5, lambda _at: [(0, PERSON_BOX), (0, OTHER)])
    for _ in range(10):
        assert not play.frame([(0, PERSON_BOX), (0, OTHER), (0, third)], after_s=0.1)
    assert play.frame([(0, PERSON_BOX), (0, third)], after_s=0.1)
    play.run(0.1, 5, lambda _at: [(0, PERSON_BOX), (0, OTHER), (0, third)])
    assert [len(sent.detections) for _, sent in play.sent] == [2, 2, 3]


# --- gaps and reconnects ----------------------------------------------------------------------------------


def test_a_reconnect_to_the_same_scene_is_no_change() -> None:
    """The camera sends its own event about a new epoch."""
    play = FilterHarness()
    play.run(0.1, 5, lambda _at: [(0, PERSON_BOX)])
    play.frame([(0, PERSON_BOX)], after_s=20, epoch=2)
    for _ in range(50):
        play.frame([(0, PERSON_BOX)], after_s=0.1, epoch=2)
    assert len(play.sent) == 1


def test_hold_times_do_not_run_while_a_camera_is_away() -> None:
    """Two weak boxes, right before an outage and right after it, are two weak boxes."""
    play = FilterHarness()
    play.run(0.1, 5, lambda _at: [])
    assert not play.frame([(0, PERSON_BOX)], after_s=0.1)
    assert not play.frame([(0, PERSON_BOX)], after_s=20, epoch=2)
    assert not play.frame([], after_s=0.1, epoch=2)
    for _ in range(12):
        play.frame([(0, PERSON_BOX)], after_s=0.1, epoch=2)
    assert [len(sent.detections) for _, sent in play.sent] == [0, 1]


def test_an_object_that_left_during_an_outage_is_sent_as_gone_after_it() -> None:
    """Within `changeSeconds` of the first picture."""
    play = FilterHarness()
    play.run(0.1, 5, lambda _at: [(0, PERSON_BOX)])
    back_s = 25.0
    play.frame([], after_s=20, epoch=2)
    for _ in range(20):
        play.frame([], after_s=0.1, epoch=2)
    assert play.when(0, back_s) <= 1.2


def test_after_a_long_silence_the_first_frame_is_a_heartbeat() -> None:
    """Also where nothing was analysed in between, as behind a motion gate."""
    play = FilterHarness()
    play.frame([(0, PERSON_BOX)])
    assert not play.frame([(0, PERSON_BOX)], after_s=30)
    assert play.frame([(0, PERSON_BOX)], after_s=30)


# --- for any scene ----------------------------------------------------------------------------------------

BOXES = st.sampled_from([PERSON_BOX, OTHER, (0.3, 0.5, 0.5, 0.7), (0.35, 0.5, 0.55, 0.7)])
SCENES = st.lists(
    st.tuples(st.floats(0.03, 3.0), st.lists(st.tuples(st.integers(0, 1), BOXES), max_size=4)), max_size=60
)


@given(SCENES, st.sampled_from([0.0, 0.5, 1.0, 4.0]), st.sampled_from(INTERVALS_S))
@settings(max_examples=150, deadline=None)
def test_every_object_sent_as_present_is_later_sent_as_gone(
    scene: list[tuple[float, list[tuple[int, Box]]]], change_s: float, interval_s: float
) -> None:
    """However it flickered before: once all is empty, the last frame that is sent shows nothing."""
    play = FilterHarness(change_s=change_s)
    for after_s, seen in scene:
        play.frame(seen, after_s=after_s)
    play.run(interval_s, change_s + 3 * interval_s, lambda _at: [])
    assert len(play.sent[-1][1].detections) == 0
    assert len(play.changes) == 0


@given(
    st.lists(st.tuples(st.floats(0.02, 0.5), st.floats(-0.4, 0.4)), min_size=1, max_size=200),
    st.sampled_from([0.5, 1.0, 3.0]),
)
@settings(max_examples=100, deadline=None)
def test_movement_alone_sends_at_most_one_frame_per_change_seconds(
    steps: list[tuple[float, float]], change_s: float
) -> None:
    """For any path, rate and threshold: one object that every frame shows."""
    play, left = FilterHarness(change_s=change_s, move_threshold=0.001), 0.3
    for after_s, speed in steps:
        left = min(0.7, max(0.0, left + speed * after_s))
        play.frame([(0, (left, 0.1, left + 0.2, 0.9))], after_s=after_s)
    moments = [at for at, _ in play.sent]
    assert all(later - earlier > change_s - 1e-6 for earlier, later in pairwise(moments))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 5.0]), st.sampled_from(INTERVALS_S))
@settings(max_examples=15, deadline=None)
def test_memory_is_bounded_by_the_objects_in_the_frames(seed: int, change_s: float, interval_s: float) -> None:
    """Boxes anywhere in each frame: what is followed stays within a few frames' worth."""
    play, chance = FilterHarness(change_s=change_s), np.random.default_rng(seed)
    for _ in range(100):
        corner = chance.random((20, 2)) * 0.9
        size = 0.02 + chance.random((20, 2)) * 0.08
        boxes = np.hstack([corner, corner + size]).tolist()
        play.frame([(int(chance.integers(2)), tuple(box)) for box in boxes], after_s=interval_s)
        assert len(play.changes) <= 5 * 20


def test_a_removed_camera_is_forgotten() -> None:
    """An hour after its last frame, when another one comes."""
    play = FilterHarness()
    for number in range(100):
        play.harness.advance_s(61)
        play.changes.observe(play.harness.result([PERSON_BOX], camera=f"camera-{number}"))
    assert len(play.changes) <= 60


# --- the real clip ----------------------------------------------------------------------------------------

CLIP = Path(__file__).resolve().parents[2] / "media" / "demo.mp4"
CLIP_FPS = 10


def detections_of_clip(model: Path | None, capsys: pytest.CaptureFixture[str]) -> list[FrameResult]:
    """What a model sees in each picture of the shipped clip; None is the bundled model."""
    chosen = [] if model is None else ["--model", str(model)]
    assert main(["detect", str(CLIP), "--json", "--log-level", "error", *chosen]) == 0
    harness, numbers = TelemetryHarness(), dict[str, int]()
    found = []
    for line in capsys.readouterr().out.splitlines():
        rows = json.loads(line)["detections"]
        boxes = [row["box"] for row in rows]
        corners = [(b["left"], b["top"], b["left"] + b["width"], b["top"] + b["height"]) for b in boxes]
        ids = [numbers.setdefault(row["label"], len(numbers)) for row in rows]
        found.append(harness.result(corners, ids=ids))
    return [replace(result, labels=tuple(numbers)) for result in found]


def sent_share(clip: Sequence[FrameResult], interval_s: float, seconds: float) -> float:
    """The share of frames that a camera sends which loops these."""
    play, step = FilterHarness(), round(interval_s * CLIP_FPS)
    for number in range(round(seconds / interval_s)):
        play.observe(clip[number * step % len(clip)], after_s=interval_s)
    return len(play.sent) / play.frames


@pytest.mark.parametrize("shared_model", [None, "picodet_s_416_coco80.onnx"], ids=["bundled", "picodet"])
def test_the_shipped_clip_sends_at_most_15_percent_of_its_frames(
    shared_model: str | None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A street where always somebody walks, all pictures at its own rate, for two minutes.

    At two frames a second the same street costs about as much: one frame a second at most by movement.
    """
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path))
    model = request.getfixturevalue("shared_data") / "models" / shared_model if shared_model else None
    clip = detections_of_clip(model, capsys)
    assert len(clip) == 250
    assert 0.02 <= sent_share(clip, 1 / CLIP_FPS, 120) <= 0.15
    assert sent_share(clip, 0.5, 120) <= 5 * 0.15
