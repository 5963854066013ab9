"""The motion gate: still pictures are held back under any light and noise, and a person passes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from visionedge.camera.motion_gate import GateSettings, MotionGate
from visionedge.camera.sources.open import DEMO_CLIP
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture
from visionedge.runtime.installation import find_bundled_file

SPEC = InputSpec(416, 312)
FPS = 5
HEARTBEAT_S = 10


def _street(path: Path, most: int = 1000) -> list[Picture]:
    """Every second picture of a clip, at the model's size."""
    capture = cv2.VideoCapture(str(path))
    pictures: list[Picture] = []
    while len(pictures) < most and capture.grab():
        pictures.append(fit_to_input(np.asarray(capture.retrieve()[1], np.uint8), SPEC)[0])
        capture.grab()
    capture.release()
    return pictures


@pytest.fixture(scope="module")
def street() -> list[Picture]:
    """People who walk through a street, five pictures per second."""
    return _street(find_bundled_file(DEMO_CLIP))


def _passed(
    pictures: Callable[[int], Picture], seconds: int, settings: GateSettings | None = None
) -> list[int]:
    """The numbers of the pictures that pass."""
    gate = MotionGate(settings or GateSettings(every_s=HEARTBEAT_S))
    return [n for n in range(seconds * FPS) if gate.passes(pictures(n), round((1000 + n / FPS) * 1e9))]


@cache
def _noise(sigma: float, number: int) -> NDArray[np.int16]:
    return np.random.default_rng(number).normal(0, sigma, (312, 416, 3)).astype(np.int16)


def _noisy(picture: Picture, sigma: float, number: int) -> Picture:
    # Made once and rolled: a fresh one for each picture would take most of the test's time.
    noise = np.roll(_noise(sigma, number % 5), 7919 * number, axis=0)
    return np.asarray(np.clip(picture + noise, 0, 255), np.uint8)


def _lit(picture: Picture, factor: float | NDArray[np.float64]) -> Picture:
    return np.asarray(np.clip(picture * factor, 0, 255), np.uint8)


def test_a_street_with_people_passes_the_gate(street: list[Picture]) -> None:
    assert len(_passed(lambda n: street[n], len(street) // FPS)) > 0.95 * len(street)


@pytest.mark.shared
def test_vtest_passes_the_gate(shared_data: Path) -> None:
    pictures = _street(shared_data / "videos" / "vtest.avi", most=300)
    assert len(_passed(lambda n: pictures[n], 60)) > 0.95 * 300


@pytest.mark.parametrize("sigma", [0, 4, 10, 20])
def test_a_still_scene_with_noise_gives_only_heartbeats(street: list[Picture], sigma: float) -> None:
    passed = _passed(lambda n: _noisy(street[0], sigma, n), 45)
    # The first picture opens the gate for two seconds; then one passes every 10 s.
    assert [n for n in passed if n >= 2 * FPS] == [59, 109, 159, 209]


@pytest.mark.parametrize("every_s", [1, 5])
def test_the_heartbeat_has_the_configured_interval(street: list[Picture], every_s: int) -> None:
    passed = _passed(lambda _: street[0], 30, GateSettings(every_s=every_s))
    assert np.diff(passed[2 * FPS :]).tolist() == [every_s * FPS] * (len(passed) - 2 * FPS - 1)


def _sunset(picture: Picture, second: float) -> Picture:
    return _lit(picture, max(0.3, 1 - second / 40))


def _cloud(picture: Picture, second: float) -> Picture:
    return _lit(picture, 0.6 if second > 20 else 1.0)


def _shade(picture: Picture, second: float) -> Picture:
    across = np.linspace(0, 1, picture.shape[1])[None, :, None]
    return _lit(picture, 1 - 0.4 * across * min(1.0, max(0.0, (second - 10) / 5)))


@pytest.mark.parametrize("change", [_sunset, _cloud, _shade])
def test_changing_light_does_not_open_the_gate(
    street: list[Picture], change: Callable[[Picture, float], Picture]
) -> None:
    passed = _passed(lambda n: _noisy(change(street[0], n / FPS), 4, n), 45)
    assert len([n for n in passed if n >= 2 * FPS]) <= 4


def _lamp(picture: Picture, number: int) -> Picture:
    lit = picture.copy()
    if number > 10 * FPS:
        lit[60:200, 150:300] = _lit(lit[60:200, 150:300], 1.5)
    return lit


def _flicker(picture: Picture, number: int) -> Picture:
    lit = picture.copy()
    lit[60:120, 150:220] = _lit(lit[60:120, 150:220], 1 + 0.4 * np.sin(1.7 * number))
    return lit


@pytest.mark.parametrize("change", [_lamp, _flicker])
def test_continuous_movement_stops_opening_the_gate_after_a_while(
    street: list[Picture], change: Callable[[Picture, int], Picture]
) -> None:
    """A lamp that is switched on, a screen that flickers."""
    passed = _passed(lambda n: _noisy(change(street[0], n), 4, n), 100)
    assert any(n % 50 for n in passed)  # it was seen
    assert len([n for n in passed if n >= 60 * FPS]) <= 4


def _walking(scene: Picture, person: Picture, step: int) -> Picture:
    """The scene with a person in it, two pixels further to the right each step."""
    picture = scene.copy()
    left = 4 + 2 * step
    height, width = person.shape[:2]
    if left + width < picture.shape[1]:
        picture[150 : 150 + height, left : left + width] = person
    return picture


@pytest.mark.parametrize("sensitivity", [0.3, 0.5, 0.8])
def test_a_person_who_enters_opens_the_gate_at_once_and_keeps_it_open(street: list[Picture], sensitivity: float) -> None:
    """On a noisy picture, 22 x 60 px of 416 x 312."""
    person = street[0][82:142, 146:168]
    enters = 30 * FPS

    def pictures(number: int) -> Picture:
        scene = street[0] if number < enters else _walking(street[0], person, number - enters)
        return _noisy(scene, 6, number)

    passed = _passed(pictures, 55, GateSettings(every_s=HEARTBEAT_S, sensitivity=sensitivity))
    inside = set(range(enters, enters + 100))
    assert min(n for n in passed if n >= enters) - enters <= 2
    assert len(inside & set(passed)) > 95


def test_another_scene_opens_the_gate_and_is_learnt(street: list[Picture]) -> None:
    """The camera was turned."""
    other = np.ascontiguousarray(street[0][::-1, ::-1])
    passed = _passed(lambda n: _noisy(street[0] if n < 100 else other, 4, n), 60)
    assert 100 in passed
    assert len([n for n in passed if n > 100 + 3 * FPS]) <= 4


def test_a_picture_of_another_size_resets_the_gate(street: list[Picture]) -> None:
    gate = MotionGate(GateSettings())
    assert gate.passes(street[0], 10**12)
    assert gate.passes(street[0][:100, :50], 10**12 + 1)
