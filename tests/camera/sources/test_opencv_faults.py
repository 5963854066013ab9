"""OpenCV reports any end or fault only as "no picture"; the source reports which one it was."""

from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest

from clips import number_of, numbered_picture
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.camera.sources.opencv import OpencvSource
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import DamagedPictureError, SourceError
from visionedge.frames.types import Picture

LIMITS = SourceLimits(library="opencv")


class Capture:
    """A `VideoCapture` of so many pictures; those in `damaged` are grabbed and cannot be decoded."""

    def __init__(self, pictures: int = 10, *, claimed: int = 10, damaged: tuple[int, ...] = ()) -> None:
        self._pictures, self._claimed, self._damaged = pictures, claimed, damaged
        self._at = -1
        self.released = False

    def grab(self) -> bool:
        self._at += 1
        return self._at < self._pictures

    def retrieve(self) -> tuple[bool, Picture | None]:
        if self._at in self._damaged:
            return False, None
        return True, numbered_picture(self._at)

    def get(self, what: int) -> float:
        known = {
            cv2.CAP_PROP_FPS: 10.0,
            cv2.CAP_PROP_POS_MSEC: self._at * 100.0,
            cv2.CAP_PROP_FRAME_WIDTH: 160.0,
            cv2.CAP_PROP_FRAME_HEIGHT: 120.0,
            cv2.CAP_PROP_FRAME_COUNT: float(self._claimed),
        }
        return known.get(what, 0.0)

    def release(self) -> None:
        self.released = True


def source(
    capture: Capture, *, live: bool = False, remote: bool = False, limits: SourceLimits = LIMITS
) -> OpencvSource:
    return OpencvSource(cast("Any", capture), "dock", live=live, limits=limits, remote=remote)


def read_all(opened: OpencvSource) -> list[int]:
    """The numbers of all pictures."""
    numbers = []
    while (decoded := opened.read()) is not None:
        numbers.append(number_of(decoded.picture()))
    return numbers


def test_a_file_ends_after_its_last_picture() -> None:
    capture = Capture()
    opened = source(capture)
    assert read_all(opened) == list(range(10))
    opened.close()
    assert capture.released


@pytest.mark.parametrize(
    ("pictures", "live", "remote", "read_timeout_s", "reason"),
    [
        (0, False, False, 30, "not a readable video or picture"),
        (0, False, True, 30, "the answer cannot be decoded as video"),
        (5, False, True, 30, "ended early, after 5 pictures"),
        (5, True, True, 30, "the camera closed the connection"),
        (5, True, True, 0, "no picture for 0 s"),
    ],
)
def test_the_reason_why_there_are_no_more_pictures_is_reported(
    pictures: int, live: bool, remote: bool, read_timeout_s: float, reason: str
) -> None:
    limits = SourceLimits(library="opencv", read_timeout_s=read_timeout_s)
    opened = source(Capture(pictures), live=live, remote=remote, limits=limits)
    with pytest.raises(SourceError, match=f"dock: {reason}"):
        read_all(opened)


def test_a_remote_file_may_have_a_few_pictures_less_than_it_claims() -> None:
    assert len(read_all(source(Capture(10, claimed=11), remote=True))) == 10


@pytest.mark.parametrize("damaged", [0, 4])
def test_a_picture_that_cannot_be_decoded_is_an_error_of_this_picture_alone(damaged: int) -> None:
    opened = source(Capture(damaged=(damaged,)))
    numbers = []
    while (decoded := opened.read()) is not None:
        try:
            numbers.append(number_of(decoded.picture()))
        except DamagedPictureError:
            numbers.append(-1)
    assert numbers == [-1 if number == damaged else number for number in range(10)]


def test_pictures_above_the_limit_are_refused() -> None:
    opened = source(Capture(), limits=SourceLimits(library="opencv", max_pixels=1000))
    with pytest.raises(SourceError, match="dock: 160 x 120 pixels"):
        opened.read()


def test_a_stream_that_is_far_behind_is_given_up() -> None:
    """OpenCV cannot skip pictures without decoding them; a new connection begins with those of now."""

    class Standing(Capture):
        """The time of its pictures stands still while the clock runs on."""

        def get(self, what: int) -> float:
            return 0.0 if what == cv2.CAP_PROP_POS_MSEC else super().get(what)

    opened = source(Standing(10**6), live=True, limits=SourceLimits(library="opencv", late_s=0.0))
    with pytest.raises(SourceError, match="decoding is slower than the camera"):
        read_all(opened)


def test_an_interrupted_source_gives_no_picture() -> None:
    opened = source(Capture())
    assert opened.read() is not None
    opened.interrupt()
    assert opened.read() is None


def test_pictures_that_were_kept_stay_as_they_are() -> None:
    opened = source(Capture())
    kept = [decoded.picture() for decoded in iter(opened.read, None)]
    assert [number_of(np.asarray(picture)) for picture in kept] == list(range(10))


def test_a_file_that_is_no_video_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video at all" * 100)
    with pytest.raises(SourceError, match="not a readable video or picture"):
        open_source(parse_camera_uri(str(path)), LIMITS)


def test_a_device_that_is_no_camera_is_reported() -> None:
    with pytest.raises(SourceError, match="no video; another program may be using it"):
        open_source(parse_camera_uri("v4l2:///dev/null"), LIMITS)
