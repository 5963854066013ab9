"""Black and frozen pictures are noticed by what they show."""

import numpy as np
import pytest

from visionedge.capture.content import ContentWatch
from visionedge.frames import Picture

SIZE = (120, 160, 3)


def _noisy(level: float, number: int, sigma: float = 2.0) -> Picture:
    picture = np.random.default_rng(number).normal(level, sigma, SIZE)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _states(pictures: list[Picture], fps: int = 2, keys: int = 1) -> list[str]:
    """One look a picture; each `keys`-th one is a key picture (0: only the first)."""
    watch = ContentWatch()
    states: list[str] = []
    for number, picture in enumerate(pictures):
        now_ns = 10**12 + round(number / fps * 1e9)
        if number == 0 or (keys and number % keys == 0):
            watch.note_key(now_ns)
        states.append(watch.look(picture, now_ns))
    return states


def test_a_camera_that_sees_something_is_live_even_when_nothing_moves() -> None:
    """Noise is enough: every real camera has some."""
    assert set(_states([_noisy(120, n) for n in range(60)])) == {"live"}


def test_a_picture_that_does_not_change_at_all_over_key_pictures_is_frozen_after_ten_seconds() -> None:
    states = _states([_noisy(120, 1)] * 30)
    assert states == ["live"] * 20 + ["frozen"] * 10


def test_without_new_key_pictures_it_is_frozen_only_after_half_a_minute() -> None:
    """A codec that skips blocks sends the same picture for many seconds, from a camera that works."""
    states = _states([_noisy(120, 1)] * 80, keys=0)
    assert states == ["live"] * 60 + ["frozen"] * 20


def test_no_key_picture_for_three_times_the_usual_is_frozen_where_they_are_rare() -> None:
    """One every 20 s, each with other noise; after the third one nothing changes and none comes."""
    pictures = [_noisy(120, n // 40) for n in range(120)] + [_noisy(120, 2)] * 100
    watch, states = ContentWatch(), []
    for number, picture in enumerate(pictures):
        now_ns = 10**12 + number * 5 * 10**8
        if number in (0, 40, 80):
            watch.note_key(now_ns)
        states.append(watch.look(picture, now_ns))
    # Looked at once a second, and still since the third key picture, 40 s in.
    assert states.index("frozen") == 80 + 120
    assert states[-1] == "frozen"


@pytest.mark.parametrize("size_px", [2, 8])
def test_anything_that_moves_however_small_is_no_frozen_picture(size_px: int) -> None:
    """Somebody far away, or a clock that the camera writes into its pictures."""
    still = _noisy(120, 1)
    pictures = [still.copy() for _ in range(90)]
    for number, picture in enumerate(pictures):
        picture[60 : 60 + size_px, number : number + size_px] = (60, 60, 90)
    assert set(_states(pictures)) == {"live"}


def test_the_first_picture_that_differs_ends_it() -> None:
    states = _states([_noisy(120, 1)] * 30 + [_noisy(120, 2)] * 2)
    assert states[29:] == ["frozen", "live", "live"]


@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_a_black_picture_is_black_after_three_seconds(sigma: float) -> None:
    """With or without noise; black and frozen at once is black."""
    states = _states([_noisy(2, n, sigma) for n in range(40)])
    assert states == ["live"] * 6 + ["black"] * 34


def test_night_is_not_black_and_a_dark_moment_is_nothing() -> None:
    assert set(_states([_noisy(30, n) for n in range(30)])) == {"live"}
    moment = [_noisy(120, n) for n in range(6)] + [_noisy(2, n) for n in range(4)]
    assert set(_states(moment + [_noisy(120, n) for n in range(6)])) == {"live"}


def test_a_slow_change_is_no_frozen_picture() -> None:
    """Each picture equals the one before it, but not the one of ten seconds ago."""
    assert "frozen" not in _states([np.full(SIZE, 100 + n // 4, np.uint8) for n in range(60)])


def test_a_slot_that_is_written_again_does_not_look_frozen() -> None:
    """The picture handed in is one that will be overwritten: what is compared must be a copy."""
    watch, slot = ContentWatch(), np.empty(SIZE, np.uint8)
    states = []
    for number in range(30):
        slot[:] = _noisy(120, number)
        states.append(watch.look(slot, 10**12 + number * 10**9))
    assert set(states) == {"live"}
