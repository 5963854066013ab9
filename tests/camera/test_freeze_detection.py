"""Black and frozen pictures are noticed by what they show."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from visionedge.camera.freeze_detection import FreezeDetector
from visionedge.camera.sources.base import DecoderLibrary, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.camera.timing import FrameSampler
from visionedge.config.addresses import CameraUri
from visionedge.frames.types import InputSpec, Picture

SIZE = (120, 160, 3)


def _noisy(level: float, number: int, sigma: float = 2.0) -> Picture:
    picture = np.random.default_rng(number).normal(level, sigma, SIZE)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _states(pictures: list[Picture], fps: int = 2, keys: int = 1) -> list[str]:
    """One look a picture; each `keys`-th one is a key picture (0: only the first)."""
    watch = FreezeDetector()
    states: list[str] = []
    for number, picture in enumerate(pictures):
        now_ns = 10**12 + round(number / fps * 1e9)
        key = number == 0 or (keys > 0 and number % keys == 0)
        watch.note(now_ns, key=key)
        states.append(watch.inspect(picture, now_ns, key=key))
    return states


def test_a_camera_with_a_still_scene_is_live() -> None:
    """Noise is enough: every real camera has some."""
    assert set(_states([_noisy(120, n) for n in range(60)])) == {"live"}


def test_identical_key_pictures_are_frozen_after_ten_seconds() -> None:
    states = _states([_noisy(120, 1)] * 30)
    assert states == ["live"] * 20 + ["frozen"] * 10


def test_without_new_key_pictures_a_camera_is_frozen_after_half_a_minute() -> None:
    """A codec that skips blocks sends the same picture for many seconds, from a camera that works."""
    states = _states([_noisy(120, 1)] * 80, keys=0)
    assert states == ["live"] * 60 + ["frozen"] * 20


def test_rare_key_pictures_are_frozen_after_three_usual_intervals() -> None:
    """One every 20 s, each with other noise; after the third one nothing changes and none comes."""
    pictures = [_noisy(120, n // 40) for n in range(120)] + [_noisy(120, 2)] * 100
    watch, states = FreezeDetector(), []
    for number, picture in enumerate(pictures):
        now_ns = 10**12 + number * 5 * 10**8
        watch.note(now_ns, key=number in (0, 40, 80))
        states.append(watch.inspect(picture, now_ns, key=number in (0, 40, 80)))
    # Looked at once a second, and still since the third key picture, 40 s in.
    assert states.index("frozen") == 80 + 120
    assert states[-1] == "frozen"


@pytest.mark.parametrize("size_px", [2, 8])
def test_any_small_movement_prevents_frozen(size_px: int) -> None:
    """A person far away, or a clock that the camera writes into its pictures."""
    still = _noisy(120, 1)
    pictures = [still.copy() for _ in range(90)]
    for number, picture in enumerate(pictures):
        picture[60 : 60 + size_px, number : number + size_px] = (60, 60, 90)
    assert set(_states(pictures)) == {"live"}


def test_the_first_different_picture_ends_frozen() -> None:
    states = _states([_noisy(120, 1)] * 30 + [_noisy(120, 2)] * 2)
    assert states[29:] == ["frozen", "live", "live"]


@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_black_pictures_are_black_after_three_seconds(sigma: float) -> None:
    """With or without noise; black and frozen at once is black."""
    states = _states([_noisy(2, n, sigma) for n in range(40)])
    assert states == ["live"] * 6 + ["black"] * 34


def test_night_is_not_black_and_a_dark_moment_is_ignored() -> None:
    assert set(_states([_noisy(30, n) for n in range(30)])) == {"live"}
    moment = [_noisy(120, n) for n in range(6)] + [_noisy(2, n) for n in range(4)]
    assert set(_states(moment + [_noisy(120, n) for n in range(6)])) == {"live"}


def test_a_slow_change_is_not_frozen() -> None:
    """Each picture equals the one before it, but not the one of ten seconds ago."""
    assert "frozen" not in _states([np.full(SIZE, 100 + n // 4, np.uint8) for n in range(60)])


def test_a_reused_slot_does_not_look_frozen() -> None:
    """The picture handed in is one that will be overwritten: what is compared must be a copy."""
    watch, slot = FreezeDetector(), np.empty(SIZE, np.uint8)
    states = []
    for number in range(30):
        slot[:] = _noisy(120, number)
        states.append(watch.inspect(slot, 10**12 + number * 10**9, key=True))
    assert set(states) == {"live"}


def _film(path: Path, noise: float, crf: int, key_every: int, *, walker: bool = False) -> Path:
    """40 s of a coarse scene with camera noise, 10 pictures per second, through x264."""
    av: Any = pytest.importorskip("av")
    rng = np.random.default_rng(7)
    coarse = rng.integers(40, 216, (9, 16, 3), np.uint8)
    scene = cv2.resize(coarse, (320, 180), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.options = {
            "crf": str(crf),
            "preset": "veryfast",
            "x264-params": "scenecut=0",
            "g": str(key_every),
        }
        for number in range(400):
            picture = scene + np.rint(rng.normal(0, noise, scene.shape)).astype(np.int16)
            if walker:  # far away: 4 x 10 px, half a pixel a picture
                picture[100:110, 40 + number // 2 : 44 + number // 2] = (60, 60, 90)
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="bgr24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("library", ["pyav", "opencv"])
@pytest.mark.parametrize("fps", [10.0, 4.0])
@pytest.mark.parametrize(
    ("film", "frozen"),
    [
        ((2.0, 28, 600, False), False),
        ((2.0, 36, 600, False), False),
        ((2.0, 36, 20, False), False),
        ((1.0, 45, 20, False), False),
        ((2.0, 36, 600, True), False),
        ((0.0, 30, 600, True), False),
        ((0.0, 30, 20, True), False),
        ((0.0, 30, 600, False), True),
        ((0.0, 30, 20, False), True),
    ],
)
def test_only_a_camera_that_repeats_its_picture_is_frozen_behind_a_codec(
    tmp_path: Path, library: DecoderLibrary, film: tuple[float, int, int, bool], fps: float, *, frozen: bool
) -> None:
    """At a low bit rate x264 skips every block of a quiet scene for seconds, until the next key picture.

    As a camera looks: not at each picture, but at each key picture.
    """
    noise, crf, key_every, walker = film
    clip = _film(tmp_path / "c.mp4", noise, crf, key_every, walker=walker)
    source = open_source(CameraUri("file", str(clip)), SourceLimits(library=library))
    watch, due, states = FreezeDetector(), FrameSampler(fps), set()
    while (decoded := source.read()) is not None:
        at_s = decoded.position_s or 0.0
        now_ns = round(at_s * 1e9)
        watched = watch.note(now_ns, key=decoded.key)
        if due.is_due(at_s) or watched:
            states.add(watch.inspect(decoded.fit_to_input(InputSpec(416, 416))[0], now_ns, key=decoded.key))
    source.close()
    assert ("frozen" in states) == frozen
