"""Tracks: one number for one object, at any rate of pictures, through what cameras and models do."""

import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from track_scenes import LABELS, RATES, Seen, columns, follow, ids_of, jitter
from visionedge.scene.tracker import LOST_S, Track, Tracker

every_rate = pytest.mark.parametrize("rate", RATES)


def walk(at_s: float, speed: float = 0.1, start: float = 0.2, y: float = 0.5) -> Seen:
    return Seen(start + speed * at_s, y)


# --- birth --------------------------------------------------------------------------------------------------


@every_rate
def test_a_person_that_walks_by_is_one_track(rate: float) -> None:
    updates = list(follow(lambda at_s: [walk(at_s)], 5, rate))
    assert ids_of(updates) == [1]
    assert updates[-1].track_ids == (1,)
    assert updates[-1].tracks[0].detection == 0


@every_rate
def test_a_track_is_confirmed_within_a_second_and_not_by_one_picture(rate: float) -> None:
    updates = list(follow(lambda at_s: [walk(at_s)], 1, rate))
    assert updates[0].tracks == ()
    assert updates[0].track_ids == (None,)
    assert ids_of(updates) == [1]


@every_rate
def test_false_boxes_of_single_pictures_get_no_number(rate: float) -> None:
    numbers = random.Random(1)  # noqa: S311 - no secret

    def scene(at_s: float) -> Iterable[Seen]:
        return [walk(at_s, speed=0.01), Seen(numbers.uniform(0.5, 1), numbers.random(), 0.02, 0.04)]

    assert ids_of(follow(scene, 20, rate)) == [1]


@every_rate
def test_an_object_that_flickers_is_confirmed_later(rate: float) -> None:
    picture = iter(range(10_000))
    updates = list(follow(lambda _: [Seen(0.5, 0.5)] if next(picture) % 2 == 0 else [], 16, max(rate, 5)))
    assert ids_of(updates) == [1]


@every_rate
def test_detections_below_confidence_never_begin_a_track(rate: float) -> None:
    tracker = Tracker(confidence=0.7)
    assert ids_of(follow(lambda _: [Seen(0.5, 0.5, score=0.69)], 10, rate, tracker)) == []
    assert repr(tracker) == "<Tracker 0 confirmed, 0 unconfirmed>"


@every_rate
def test_detections_below_confidence_keep_a_track_for_a_while(rate: float) -> None:
    def scene(at_s: float) -> Iterable[Seen]:
        return [Seen(0.3 + 0.02 * at_s, 0.5, score=0.2 if 1 < at_s <= 2.5 or at_s > 5 else 0.8)]

    updates = list(follow(scene, 15, rate))
    assert ids_of(updates) == [1]
    assert updates[int(2.5 * rate)].track_ids == (1,)
    assert updates[int(6 * rate)].track_ids == (1,)
    assert sum((update.ended for update in updates), ()) == (1,)


def test_a_steady_box_with_a_middling_score_begins_no_track_unless_asked() -> None:
    """A sign that resembles a person, all day at 0.5."""
    numbers = random.Random(2)  # noqa: S311 - no secret

    def scene(_: float) -> list[Seen]:
        return jitter([Seen(0.5, 0.5, score=0.51)], numbers)

    assert ids_of(follow(scene, 300, 10)) == []
    assert ids_of(follow(scene, 5, 10, Tracker(birth_score=0.4))) == [1]


@every_rate
def test_an_object_with_a_middling_score_has_a_track_once_it_has_moved_by_more_than_its_size(
    rate: float,
) -> None:
    """Models whose scores are lower must count, too."""
    updates = list(follow(lambda at_s: [replace(walk(at_s, 0.04), score=0.45)], 6, rate))
    assert ids_of(updates) == [1]
    first = next(number for number, update in enumerate(updates) if update.tracks) / rate
    size = (walk(0).width + walk(0).height) / 2
    assert 1.25 * size < 0.04 * first < 1.7 * size
    assert updates[-1].track_ids == (1,)


def test_an_object_that_moves_with_scores_just_above_confidence_has_no_track() -> None:
    assert ids_of(follow(lambda at_s: [replace(walk(at_s, 0.04), score=0.35)], 10, 10)) == []


def test_a_false_detection_that_jitters_where_it_is_has_no_track() -> None:
    numbers = random.Random(3)  # noqa: S311 - no secret
    shaken = [
        [Seen(0.5 + numbers.gauss(0, 0.01), 0.5 + numbers.gauss(0, 0.025), score=0.6)] for _ in range(3000)
    ]
    assert ids_of(follow(lambda at_s: shaken[round(at_s * 10) % 3000], 299, 10)) == []


def test_the_birth_score_is_never_below_confidence() -> None:
    assert Tracker(confidence=0.9, birth_score=0.5).birth_score == 0.9


# --- life ---------------------------------------------------------------------------------------------------


@every_rate
def test_a_person_hidden_for_a_second_keeps_the_number(rate: float) -> None:
    def scene(at_s: float) -> Iterable[Seen]:
        return [] if 2 < at_s < 3 else [walk(at_s)]

    updates = list(follow(scene, 5, rate))
    assert ids_of(updates) == [1]
    assert updates[-1].track_ids == (1,)


@every_rate
def test_a_hidden_track_is_predicted_and_has_no_detection(rate: float) -> None:
    def scene(at_s: float) -> Iterable[Seen]:
        return [walk(at_s)] if at_s <= 3 else []

    track = list(follow(scene, 4, rate))[-1].tracks[0]
    assert track.detection is None
    assert track.unseen_s == pytest.approx(1)
    assert track.box[0] + track.box[2] / 2 == pytest.approx(walk(4).x, abs=0.02)


@every_rate
def test_a_lost_picture_a_stale_second_and_a_reconnect_leave_the_number(rate: float) -> None:
    """Nothing is said to the tracker while no picture comes."""
    tracker = Tracker()
    ids, at_s = [], 0.0
    for pause in (0, 1 / rate, 1.0, 2.0):
        at_s += pause
        for _ in range(int(3 * rate)):
            at_s += 1 / rate
            ids += ids_of([tracker.update(columns([walk(at_s, speed=0.02)]), at_s, LABELS)])
    assert set(ids) == {1}


@every_rate
def test_two_people_that_pass_each_other_keep_their_numbers(rate: float) -> None:
    """While one hides the other, the model sees one box."""

    def scene(at_s: float) -> Iterable[Seen]:
        one, other = walk(at_s), Seen(0.8 - 0.1 * at_s, 0.51)
        return [one] if abs(one.x - other.x) < 0.02 else [one, other]

    updates = list(follow(scene, 6, rate))
    assert sorted(ids_of(updates)) == [1, 2]
    first = {track.track_id: track.box[0] for track in updates[int(1 * rate)].tracks}
    last = {track.track_id: track.box[0] for track in updates[-1].tracks}
    assert [last[n] > first[n] for n in (1, 2)] == [first[n] < 0.5 for n in (1, 2)]


@every_rate
def test_a_person_that_stands_for_a_minute_is_one_track(rate: float) -> None:
    """Boxes jitter, and one in five is missing."""
    numbers = random.Random(3)  # noqa: S311 - no secret

    def scene(_: float) -> list[Seen]:
        return jitter([Seen(0.5, 0.5)], numbers) if numbers.random() < 0.8 else []

    updates = list(follow(scene, 60, rate))
    assert ids_of(updates) == [1]
    seen = [track for update in updates for track in update.tracks if track.detection is not None]
    assert all(abs(track.box[0] + track.box[2] / 2 - 0.5) < 0.2 * 0.05 for track in seen)


@every_rate
def test_a_person_that_stands_and_scores_little_more_than_confidence_keeps_the_number(rate: float) -> None:
    """Somebody walks in, stands for a minute, and walks on."""
    numbers = random.Random(4)  # noqa: S311 - no secret

    def scene(at_s: float) -> list[Seen]:
        seen = walk(min(at_s, 4) if at_s < 64 else at_s - 60)
        return jitter([replace(seen, score=0.35 if 6 <= at_s < 62 else 0.8)], numbers, 0.03)

    assert ids_of(follow(scene, 67, rate)) == [1]


@every_rate
def test_a_car_as_fast_as_its_length_in_half_a_second_is_one_track(rate: float) -> None:
    def scene(at_s: float) -> Iterable[Seen]:
        return [Seen(0.1 + 0.4 * at_s, 0.5, 0.2, 0.12, "car")]

    assert ids_of(follow(scene, 2, rate)) == [1]


@every_rate
def test_a_car_that_comes_closer_is_one_track(rate: float) -> None:
    """Its size doubles in a second and a half."""

    def scene(at_s: float) -> Iterable[Seen]:
        size = 0.05 * 2 ** (at_s / 1.5)
        return [Seen(0.5, 0.3 + 0.05 * at_s, size, size * 0.7, "car")]

    assert ids_of(follow(scene, 5, rate)) == [1]


@every_rate
def test_a_box_that_splits_stays_one_track(rate: float) -> None:
    """For a second, head and legs have boxes of their own beside the whole."""

    def scene(at_s: float) -> Iterable[Seen]:
        x = 0.3 + 0.05 * at_s
        upper, lower = Seen(x, 0.45, 0.045, 0.07, score=0.75), Seen(x, 0.54, 0.045, 0.07, score=0.7)
        return [Seen(x, 0.5), upper, lower] if 2 < at_s < 3 else [Seen(x, 0.5)]

    updates = list(follow(scene, 5, rate))
    assert ids_of(updates) == [1]
    assert updates[int(2.5 * rate)].track_ids.count(1) == 1


def test_a_foot_that_jitters_moves_the_track_less_than_the_box() -> None:
    numbers = random.Random(4)  # noqa: S311 - no secret
    boxes: list[float] = []

    def scene(_: float) -> list[Seen]:
        seen = jitter([Seen(0.5, 0.5)], numbers, 0.1)
        boxes.append(seen[0].y + seen[0].height / 2)
        return seen

    updates = list(follow(scene, 30, 10))
    feet = [track.box[1] + track.box[3] for update in updates for track in update.tracks]
    assert max(feet) - min(feet) < 0.75 * (max(boxes) - min(boxes))


# --- labels -------------------------------------------------------------------------------------------------


@every_rate
def test_the_label_is_the_one_with_the_larger_sum_of_scores_and_stays(rate: float) -> None:
    """A model that calls a lorry a car every other time, and a bus from then on."""
    picture = iter(range(10_000))

    def scene(at_s: float) -> Iterable[Seen]:
        label = "bus" if at_s > 2 else ("car" if next(picture) % 2 else "truck")
        score = 0.9 if label == "truck" else 0.75
        return [Seen(0.3 + 0.03 * at_s, 0.5, 0.2, 0.2, label, score)]

    updates = list(follow(scene, 5, rate))
    assert ids_of(updates) == [1]
    assert {track.label for update in updates for track in update.tracks} == {"truck"}


@every_rate
def test_a_second_box_of_a_confused_label_is_the_same_object(rate: float) -> None:
    def scene(_: float) -> Iterable[Seen]:
        return [Seen(0.5, 0.5, 0.2, 0.2, "car", 0.8), Seen(0.51, 0.5, 0.2, 0.2, "truck", 0.7)]

    updates = list(follow(scene, 5, rate))
    assert ids_of(updates) == [1]
    assert updates[-1].track_ids == (1, None)


@every_rate
def test_objects_of_labels_that_nothing_confuses_are_two_tracks_at_one_place(rate: float) -> None:
    def scene(_: float) -> Iterable[Seen]:
        return [Seen(0.5, 0.5, 0.2, 0.2, "car"), Seen(0.5, 0.5, 0.2, 0.2, "dog", 0.75)]

    updates = list(follow(scene, 5, rate))
    assert sorted(track.label for track in updates[-1].tracks) == ["car", "dog"]


def test_a_model_with_other_class_ids_continues_the_tracks_by_name() -> None:
    tracker = Tracker()
    list(follow(lambda _: [Seen(0.5, 0.5), Seen(0.8, 0.5, label="dog")], 2, 10, tracker))
    other = ("dog", "person")
    update = tracker.update(columns([Seen(0.5, 0.5), Seen(0.8, 0.5, label="dog")], other), 2.1, other)
    assert {(track.track_id, track.label) for track in update.tracks} == {(1, "person"), (2, "dog")}
    assert set(update.track_ids) == {1, 2}


def test_a_class_without_a_name_is_tracked_by_its_number() -> None:
    tracker = Tracker()
    bus = columns([Seen(0.5, 0.5, label="bus")])
    updates = [tracker.update(bus, picture / 10, ("person",)) for picture in range(10)]
    assert [track.label for track in updates[-1].tracks] == ["class-3"]


# --- end ----------------------------------------------------------------------------------------------------


@every_rate
def test_a_track_that_is_not_seen_any_more_ends_once(rate: float) -> None:
    updates = list(follow(lambda at_s: [Seen(0.5, 0.5)] if at_s < 2 else [], 8, rate))
    ended = [picture for picture, update in enumerate(updates) if update.ended]
    assert [updates[picture].ended for picture in ended] == [(1,)]
    assert ended[0] / rate == pytest.approx(2 + LOST_S, abs=2 / rate)
    assert all(update.tracks == () for update in updates[ended[0] :])


@every_rate
def test_who_enters_where_another_left_is_a_new_track(rate: float) -> None:
    """One leaves the picture on the right; 1.5 s later another one comes from there."""

    def scene(at_s: float) -> Iterable[Seen]:
        x = 0.7 + 0.15 * at_s if at_s < 2 else 1 - 0.15 * (at_s - 3.5)
        left, right = max(0.0, x - 0.05), min(1.0, x + 0.05)
        return [Seen((left + right) / 2, 0.5, right - left, 0.3)] if right - left > 0.03 else []

    assert ids_of(follow(scene, 6, rate)) == [1, 2]


def test_after_a_gap_of_minutes_all_tracks_are_new() -> None:
    tracker = Tracker()
    list(follow(lambda _: [Seen(0.5, 0.5)], 2, 10, tracker))
    update = tracker.update(columns([Seen(0.5, 0.5)]), 300.0, LABELS)
    assert (update.tracks, update.ended, update.track_ids) == ((), (1,), (None,))
    assert ids_of(follow(lambda _: [Seen(0.5, 0.5)], 2, 10, tracker, start_s=300.1)) == [2]


def test_a_time_that_goes_back_ends_no_track_and_lifetimes_go_on() -> None:
    tracker = Tracker()
    list(follow(lambda _: [Seen(0.5, 0.5)], 2, 10, tracker, start_s=1000.0))
    back = list(follow(lambda at_s: [Seen(0.5, 0.5)] if at_s < 1 else [], 8, 10, tracker, start_s=5.0))
    assert ids_of(back) == [1]
    assert [update.ended for update in back if update.ended] == [(1,)]


@pytest.mark.parametrize("at_s", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_no_number_is_refused_and_changes_nothing(at_s: float) -> None:
    tracker = Tracker()
    list(follow(lambda _: [Seen(0.5, 0.5)], 2, 10, tracker))
    with pytest.raises(ValueError, match="finite time"):
        tracker.update(columns([]), at_s, LABELS)
    assert tracker.update(columns([Seen(0.5, 0.5)]), 2.1, LABELS).track_ids == (1,)


def test_ids_go_on_where_the_caller_says() -> None:
    tracker = Tracker(next_id=41)
    assert ids_of(follow(lambda _: [Seen(0.3, 0.5), Seen(0.7, 0.5)], 1, 10, tracker)) == [41, 42]
    assert tracker.next_id == 43


def test_hundreds_of_false_boxes_leave_a_bounded_number_of_objects() -> None:
    numbers = random.Random(5)  # noqa: S311 - no secret
    tracker = Tracker()
    for picture in range(20):
        noise = [Seen(numbers.random(), numbers.random(), 0.01, 0.01) for _ in range(300)]
        tracker.update(columns(noise), picture / 30, LABELS)
    assert sum(state.track_id is None for state in tracker._states) <= 300


# --- properties ---------------------------------------------------------------------------------------------

_number = st.floats(0, 1, width=32)
_seen = st.builds(
    Seen, _number, _number, st.floats(0, 0.5), st.floats(0, 0.5), st.sampled_from(LABELS), _number
)
_jump = st.sampled_from([0.0, 1 / 30, 0.1, 0.5, 2.0, 100.0, -5.0])


@st.composite
def _pictures(draw: st.DrawFn) -> list[tuple[float, list[Seen]]]:
    """Pictures with their times: some objects that stay, others of one picture alone."""
    staying = draw(st.lists(_seen, max_size=4))
    at_s, pictures = 0.0, []
    for _ in range(draw(st.integers(1, 25))):
        at_s += draw(_jump)
        kept = [one for one in staying if draw(st.booleans())]
        pictures.append((at_s, kept + draw(st.lists(_seen, max_size=2))))
    return pictures


@given(_pictures())
def test_ids_never_return_labels_never_change_and_the_columns_agree(
    pictures: list[tuple[float, list[Seen]]],
) -> None:
    tracker, labels, ended = Tracker(birth_score=0.3), dict[int, str](), set[int]()
    for at_s, seen in pictures:
        before = set(labels) - ended
        update = tracker.update(columns(seen), at_s, LABELS)
        ended |= set(update.ended)
        alive = {track.track_id for track in update.tracks}
        assert not alive & ended
        assert before - ended <= alive
        assert all(number > max(labels, default=0) for number in alive - set(labels))
        for track in update.tracks:
            assert labels.setdefault(track.track_id, track.label) == track.label
            assert all(math.isfinite(value) for value in track.box)
            assert min(track.box[2:]) > 0
        pairs = {(track.detection, track.track_id) for track in update.tracks if track.detection is not None}
        assert pairs == {(i, number) for i, number in enumerate(update.track_ids) if number is not None}
        assert len(update.track_ids) == len(seen)


@given(_pictures(), st.data())
def test_pictures_without_a_detection_change_nothing_later_for_confirmed_tracks(
    pictures: list[tuple[float, list[Seen]]], data: st.DataObject
) -> None:
    """So a track does not depend on how the time between two of its detections is divided."""
    one, other = Tracker(birth_score=0.3), Tracker(birth_score=0.3)
    last_s, one_ended, other_ended = pictures[0][0], list[int](), list[int]()
    for at_s, seen in pictures:
        for share in sorted(data.draw(st.lists(_number, max_size=3))):
            if at_s > last_s and all(state.track_id is not None for state in other._states):
                between = other.update(columns([]), last_s + share * (at_s - last_s), LABELS)
                other_ended += between.ended
        last_s = at_s
        expected, update = one.update(columns(seen), at_s, LABELS), other.update(columns(seen), at_s, LABELS)
        one_ended += expected.ended
        other_ended += update.ended
        assert (update.tracks, update.track_ids) == (expected.tracks, expected.track_ids)
        assert sorted(one_ended) == sorted(other_ended)


def test_a_track_says_whether_it_was_seen() -> None:
    track = Track(1, "person", 0.9, (0.1, 0.2, 0.3, 0.4), None)
    assert (track.detection, track.unseen_s) == (None, 0.0)
