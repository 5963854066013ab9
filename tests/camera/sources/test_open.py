"""Every kind of URI opens, plays and ends; what cannot be opened is named with its remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clips import make_clip, make_picture, number_of
from visionedge.camera.sources.base import DecoderLibrary, FrameSource, SourceLimits
from visionedge.camera.sources.open import LoopedSource, open_source, open_video
from visionedge.config.addresses import CameraUri, parse_camera_uri
from visionedge.errors import SourceError, UnavailableError
from visionedge.runtime.installation import find_bundled_file


def _open(uri: str | Path, limits: SourceLimits | None = None) -> FrameSource:
    return open_source(parse_camera_uri(str(uri)), limits)


def _numbers(source: FrameSource, most: int = 1000) -> list[int]:
    found: list[int] = []
    while len(found) < most and (decoded := source.read()) is not None:
        found.append(number_of(decoded.picture()))
    return found


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip.mp4")


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("b.avi", "mjpeg"), ("c.mkv", "libx264")])
def test_a_video_gives_every_picture_once_and_ends(tmp_path: Path, name: str, codec: str) -> None:
    source = _open(make_clip(tmp_path / name, codec=codec))
    assert not source.live
    assert _numbers(source) == list(range(20))
    assert source.read() is None
    source.close()
    source.close()


@pytest.mark.parametrize("pictures", [1, 2, 3, 25, 37])
@pytest.mark.parametrize("library", ["pyav", "opencv"])
def test_a_video_with_b_pictures_gives_every_picture_once_and_ends(
    tmp_path: Path, library: DecoderLibrary, pictures: int
) -> None:
    """The decoder holds some of them back, and gives the last ones only when no packet is left."""
    options = {"bf": "3", "g": "12", "x264-params": "b-adapt=0"}
    clip = make_clip(tmp_path / "b.mp4", pictures=pictures, options=options)
    source = _open(clip, SourceLimits(library=library))
    seen = []
    while (decoded := source.read()) is not None:
        seen.append((number_of(decoded.picture()), decoded.position_s, decoded.source_frames))
    source.close()
    assert [number for number, _, _ in seen] == [n % 24 for n in range(pictures)]
    assert [at_s for _, at_s, _ in seen] == pytest.approx([n / 10 for n in range(pictures)])
    assert all(source_frames >= 1 for _, _, source_frames in seen)
    assert sum(source_frames for _, _, source_frames in seen) == pictures


def test_a_video_has_size_and_media_time(clip: Path) -> None:
    source = _open(clip)
    seen = [source.read() for _ in range(3)]
    assert [(d.width_px, d.height_px) for d in seen if d] == [(160, 120)] * 3
    assert [d.position_s for d in seen if d] == pytest.approx([0, 0.1, 0.2])
    source.close()


def test_a_kept_picture_does_not_change(clip: Path) -> None:
    """The decoder must not write into a picture that is still in use."""
    source = _open(clip)
    kept = [d.picture() for _ in range(12) if (d := source.read()) is not None]
    source.close()
    assert [number_of(p) for p in kept] == list(range(12))


def test_skipped_pictures_need_no_conversion(clip: Path) -> None:
    source = _open(clip)
    for _ in range(7):
        source.read()
    decoded = source.read()
    assert decoded is not None
    assert number_of(decoded.picture()) == 7
    source.close()


@pytest.mark.parametrize("name", ["clip one.mp4", "a:b.mp4", "50%d.mp4", "grün.mp4"])
def test_names_with_odd_characters_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_clip(tmp_path / name, pictures=2)
    monkeypatch.chdir(tmp_path)
    source = _open(name)
    assert _numbers(source) == [0, 1]
    source.close()


def test_a_damaged_video_gives_the_readable_pictures(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mkv", pictures=60)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    source = _open(cut)
    numbers = _numbers(source)
    assert 5 < len(numbers) < 60
    assert numbers[:5] == [0, 1, 2, 3, 4]
    source.close()


def test_a_video_truncated_before_its_index_is_refused(tmp_path: Path, clip: Path) -> None:
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:3000])
    with pytest.raises(SourceError, match=r"cut\.mp4: not a readable video or picture"):
        _open(cut)


@pytest.mark.parametrize(("name", "content"), [("t.mp4", b"hello\n"), ("e.avi", b""), ("n.mp4", bytes(9999))])
def test_a_file_that_is_not_a_video_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{name}: not a readable video or picture"):
        _numbers(_open(tmp_path / name))


def test_missing_and_unsuitable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.mp4: does not exist"):
        _open(tmp_path / "none.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(SourceError, match=r"pipe\.mp4: not a regular file"):
        _open(tmp_path / "pipe.mp4")
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source(CameraUri("file", str(tmp_path / ("x" * 300))))


def test_a_video_too_large_is_refused(clip: Path) -> None:
    source = _open(clip, SourceLimits(max_pixels=1000))
    with pytest.raises(SourceError, match=r"160 x 120 pixels, more than the limit of 0\.001 megapixels"):
        source.read()
    source.close()


def test_a_folder_plays_in_order_and_skips_broken_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 2, 10):
        make_picture(tmp_path / f"p{number}.png", number)
    (tmp_path / "p1.png").write_bytes(b"broken")
    (tmp_path / "p3.jpg").write_bytes(b"broken")
    source = _open(tmp_path)
    first = source.read()
    second = source.read()
    assert first is not None
    assert second is not None
    assert (first.position_s, second.position_s) == (0.0, 1.0)
    assert [number_of(first.picture()), number_of(second.picture()), *_numbers(source)] == [0, 2, 10]
    assert "p1.png: not a readable picture" in caplog.text
    assert "p3.jpg" not in caplog.text
    assert ": 2 pictures could not be read" in caplog.text
    source.close()


def test_a_folder_plays_at_the_requested_rate(tmp_path: Path) -> None:
    for number in range(3):
        make_picture(tmp_path / f"{number}.png", number)
    source = _open(tmp_path, SourceLimits(pictures_per_s=4))
    assert [d.position_s for _ in range(3) if (d := source.read())] == [0, 0.25, 0.5]
    source.close()


def test_a_folder_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no pictures in it \(bmp, jpeg, jpg"):
        _open(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(SourceError, match="none of the 1 pictures"):
        _open(tmp_path).read()


def test_a_file_uri_whose_path_is_a_folder_is_opened_as_a_folder(tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 4)
    source = open_source(CameraUri("file", str(tmp_path)))
    assert _numbers(source) == [4]
    source.close()


def test_one_picture_plays_once(tmp_path: Path) -> None:
    source = _open(make_picture(tmp_path / "a.webp", 4))
    assert _numbers(source) == [4]
    source.close()
    (tmp_path / "b.jpg").write_text("no picture")
    with pytest.raises(SourceError, match=r"b\.jpg: not a readable picture"):
        _open(tmp_path / "b.jpg")


def test_an_invalid_device_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"/dev/video99: does not exist; plug .* \(--device /dev/video99\)"):
        _open("v4l2:///dev/video99")
    (tmp_path / "video0").write_text("")
    with pytest.raises(SourceError, match="not a video device"):
        _open(f"v4l2://{tmp_path}/video0")
    with pytest.raises(SourceError, match="/dev/null: no video"):
        _open("v4l2:///dev/null")


def test_a_loop_continues_with_rising_media_time(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", pictures=4)
    source = LoopedSource(lambda: open_video(clip, SourceLimits()))
    seen = [d for _ in range(10) if (d := source.read())]
    assert [d.position_s for d in seen] == pytest.approx([n / 10 for n in range(10)])
    assert _numbers(source, 5) == [2, 3, 0, 1, 2]
    source.close()


@pytest.mark.parametrize("fps", [None, 5.0])
def test_a_looped_folder_keeps_its_rate(tmp_path: Path, fps: float | None) -> None:
    for number in range(2):
        make_picture(tmp_path / f"{number}.png", number)
    source = _open(tmp_path, SourceLimits(loop=True, pictures_per_s=fps))
    seen = [d for _ in range(5) if (d := source.read())]
    assert [d.position_s for d in seen] == pytest.approx([n / (fps or 1) for n in range(5)])
    assert [number_of(d.picture()) for d in seen] == [0, 1, 0, 1, 0]
    source.close()


def test_one_looped_picture_is_given_once_a_second(tmp_path: Path) -> None:
    source = _open(make_picture(tmp_path / "a.png", 3), SourceLimits(loop=True))
    assert [d.position_s for _ in range(3) if (d := source.read())] == pytest.approx([0, 1, 2])
    source.close()


def test_a_looped_video_is_read_on_over_its_end(tmp_path: Path) -> None:
    source = _open(make_clip(tmp_path / "c.mp4", pictures=4), SourceLimits(loop=True))
    assert _numbers(source, 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    source.close()


def test_a_loop_over_a_missing_file_is_reported_like_any_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.mp4: does not exist"):
        _open(tmp_path / "none.mp4", SourceLimits(loop=True))


class _EmptySource:
    """A source that ends before its first picture."""

    live = False
    decoder = "none"

    def read(self) -> None:
        return None

    def set_wanted_rate(self, pictures_per_s: float | None) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_loop_over_an_empty_source_ends_instead_of_spinning() -> None:
    assert LoopedSource(_EmptySource).read() is None


def test_demo_opens_the_bundled_clip() -> None:
    source = _open("demo:")
    decoded = source.read()
    assert decoded is not None
    assert decoded.picture().shape == (decoded.height_px, decoded.width_px, 3)
    assert not source.live
    source.close()


def test_bundled_files_are_found_and_a_missing_one_is_named() -> None:
    assert find_bundled_file("media/demo.mp4").is_file()
    with pytest.raises(UnavailableError, match=r"models/none\.onnx: bundled file is missing; install"):
        find_bundled_file("models/none.onnx")


_CHATTER = """
import sys
from visionedge.camera.sources.base import DecoderLibrary
from visionedge.camera.sources.open import open_source
from visionedge.camera.sources.base import SourceLimits
from visionedge.errors import SourceError
from visionedge.config.addresses import parse_camera_uri
for uri in sys.argv[1:]:
    try:
        open_source(parse_camera_uri(uri), SourceLimits(open_timeout_s=1)).read()
    except SourceError as error:
        print(error)
"""


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """This process's environment without what the camera itself sets."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENCV_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return environment


def test_no_library_prints_a_password(clean_environment: dict[str, str], tmp_path: Path) -> None:
    """FFmpeg and OpenCV name the whole address on stderr if they are let."""
    (tmp_path / "bad.mp4").write_bytes(bytes(5000))
    uris = [f"{s}://user:geheim@127.0.0.1:1/x?token=geheim" for s in ("rtsp", "rtsps", "http", "https")]
    done = subprocess.run(
        [sys.executable, "-c", _CHATTER, *uris, str(tmp_path / "bad.mp4")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=clean_environment,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 5
    assert "geheim" not in done.stdout
    assert "user" not in done.stdout
    assert "rtsp://***@127.0.0.1:1/x?token=***: connection refused by 127.0.0.1:1" in done.stdout


def test_ffmpeg_options_of_the_user_stay(clean_environment: dict[str, str]) -> None:
    code = (
        "import os, sys; from visionedge.camera.sources.opencv_setup import configure_opencv;"
        "configure_opencv();"
        "print(os.environ['OPENCV_FFMPEG_CAPTURE_OPTIONS'])"
    )

    def options(environment: dict[str, str]) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60, env=environment
        ).stdout.strip()

    assert "rtsp_transport;tcp" in options(clean_environment)
    own = {**clean_environment, "OPENCV_FFMPEG_CAPTURE_OPTIONS": "rtsp_transport;udp"}
    assert options(own) == "rtsp_transport;udp"
