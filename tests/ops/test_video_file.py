"""Videos that are written: their pictures, times and sizes, and what happens when that fails."""

from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from clips import number_of, numbered_picture
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError
from visionedge.frames.types import Picture
from visionedge.ops import video_file
from visionedge.ops.video_file import VideoFile


def read_video(path: Path) -> list[tuple[int, float, tuple[int, int]]]:
    """The number, the time and the size of each picture."""
    found = []
    with closing(open_source(CameraUri("file", str(path)))) as source:
        while (decoded := source.read()) is not None:
            size = decoded.picture().shape
            found.append((number_of(decoded.picture()), decoded.position_s or 0.0, (size[1], size[0])))
    return found


def write_video(
    path: Path, pictures: list[Picture], at_s: list[float]
) -> list[tuple[int, float, tuple[int, int]]]:
    with closing(VideoFile(path)) as video:
        for picture, position_s in zip(pictures, at_s, strict=True):
            video.add(picture, position_s)
    return read_video(path)


def test_pictures_keep_their_times_whatever_their_distances(tmp_path: Path) -> None:
    """Counted from the first one."""
    at_s = [2.0, 2.1, 2.2, 2.7, 3.7, 3.74]
    seen = write_video(tmp_path / "v.mp4", [numbered_picture(number) for number in range(6)], at_s)
    assert [number for number, _, _ in seen] == [*range(6)]
    assert [position_s for _, position_s, _ in seen] == pytest.approx([s - 2.0 for s in at_s], abs=1e-3)


@pytest.mark.parametrize(
    ("size", "written"), [((161, 121), (162, 122)), ((160, 120), (160, 120)), ((3, 3), (4, 4))]
)
def test_a_picture_of_an_odd_size_is_one_pixel_larger(
    tmp_path: Path, size: tuple[int, int], written: tuple[int, int]
) -> None:
    seen = write_video(tmp_path / "v.mp4", [numbered_picture(3, *size)] * 3, [0.0, 0.1, 0.2])
    assert [(number, shape) for number, _, shape in seen] == [(3, written)] * 3


def test_a_picture_of_another_size_is_resized_to_the_first(tmp_path: Path) -> None:
    """As when a camera changed its resolution in a recording."""
    pictures = [numbered_picture(1), numbered_picture(2, 320, 180), numbered_picture(3, 80, 60)]
    seen = write_video(tmp_path / "v.mp4", pictures, [0.0, 0.1, 0.2])
    assert [(number, shape) for number, _, shape in seen] == [(n, (160, 120)) for n in (1, 2, 3)]


def test_a_video_of_one_picture_is_complete(tmp_path: Path) -> None:
    assert [number for number, _, _ in write_video(tmp_path / "v.mp4", [numbered_picture(5)], [0.0])] == [5]


def test_a_video_without_a_picture_makes_no_file(tmp_path: Path) -> None:
    VideoFile(tmp_path / "v.mp4").close()
    assert not [*tmp_path.iterdir()]


def test_browsers_play_the_video(tmp_path: Path) -> None:
    """H.264 in planes of 4:2:0, with its index at the beginning of the file."""
    av = pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    write_video(path, [numbered_picture(number) for number in range(3)], [0.0, 0.1, 0.2])
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")


def test_without_pyav_opencv_writes_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a constant rate."""
    monkeypatch.setattr(video_file, "_has_h264", lambda: False)
    path = tmp_path / "v.mp4"
    seen = write_video(path, [numbered_picture(number) for number in range(4)], [0.0, 0.2, 0.4, 0.6])
    assert [number for number, _, _ in seen] == [*range(4)]
    written = cv2.VideoCapture(str(path))
    assert written.get(cv2.CAP_PROP_FPS) == 5
    written.release()


@pytest.mark.parametrize("has_h264", [True, False])
@pytest.mark.parametrize("name", ["taken.mp4", "missing/v.mp4"])
def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, has_h264: bool
) -> None:
    if has_h264:
        pytest.importorskip("av")
    monkeypatch.setattr(video_file, "_has_h264", lambda: has_h264)
    (tmp_path / "taken.mp4").mkdir()
    video = VideoFile(tmp_path / name)
    video.add(np.zeros((48, 64, 3), np.uint8), 0.0)
    with pytest.raises(SourceError, match=rf"{name} cannot be written"):
        video.add(np.zeros((48, 64, 3), np.uint8), 0.1)


def test_a_disk_that_is_full_is_named() -> None:
    pytest.importorskip("av")
    noise = np.random.default_rng(1).integers(0, 255, (200, 120, 160, 3), np.uint8)
    with pytest.raises(SourceError, match="/dev/full cannot be written: No space left on device"):
        write_video(Path("/dev/full"), [*noise], [number / 10 for number in range(200)])
