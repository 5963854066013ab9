"""The model sees the original colours for every pixel format: measured against a slow reference."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from colour_clips import MATRICES, RANGES, frame_of, scene, turn, write_clip
from reference_letterbox import reference_letterbox
from visionedge.camera.sources.base import DecodedPicture, DecoderLibrary, FrameSource, SourceLimits
from visionedge.camera.sources.open import open_source
from visionedge.camera.sources.opencv_setup import configure_opencv, limit_ffmpeg, reports_error
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.frames.types import InputSpec, Picture

SPEC = InputSpec(96, 96)
SLOT = np.full((96, 96, 3), 7, np.uint8)

FORMATS = [
    *("yuv420p", "yuv422p", "yuv444p", "yuv440p", "yuv411p"),
    *("yuv420p10le", "yuv422p10le", "yuv444p12le", "yuv420p16le"),
]
CASES = [
    *((pix_fmt, matrix) for pix_fmt in FORMATS for matrix in MATRICES),
    *(("gray", "bt601"), ("gray10le", "bt601")),  # grey has no matrix; this one makes the reference
]


def _open(path: Path, library: DecoderLibrary = "pyav") -> FrameSource:
    return open_source(parse_camera_uri(str(path)), SourceLimits(library=library, extra_codecs=("ffv1",)))


def _first(path: Path, library: DecoderLibrary = "pyav") -> DecodedPicture:
    source = _open(path, library)
    decoded = source.read()
    assert decoded is not None
    decoded.fit_to_input(SPEC)
    source.close()
    return decoded


def _error(picture: Picture, expected: Picture) -> float:
    return float(np.abs(picture.astype(int) - expected.astype(int)).mean())


def _itself(frame: Any) -> Any:
    return frame


def _grey(picture: Picture) -> Picture:
    luma = np.rint(picture @ np.array([0.114, 0.587, 0.299])).astype(np.uint8)
    return np.stack([luma] * 3, axis=2)


@pytest.mark.parametrize("span", list(RANGES))
@pytest.mark.parametrize(("pix_fmt", "matrix"), CASES)
def test_every_pixel_format_gives_the_original_colours(
    tmp_path: Path, pix_fmt: str, matrix: str, span: str
) -> None:
    """Straight to the model's size, and as a whole; the reference knows nothing of planes."""
    picture = scene(160, 90)
    clip = write_clip(tmp_path / "c.mkv", [frame_of(picture, pix_fmt, matrix, span)])
    if pix_fmt.startswith("gray"):
        picture = _grey(picture)
    decoded = _first(clip)
    image, placement = decoded.fit_to_input(SPEC, SLOT)
    assert image is SLOT
    assert placement == SPEC.place(160, 90)
    assert _error(image, reference_letterbox(picture, SPEC)) < 1
    assert _error(decoded.picture(), picture) < 1


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("size_px", [(640, 360), (638, 478), (1282, 722), (1000, 574)])
@pytest.mark.parametrize(("matrix", "span"), [("bt601", "limited"), ("bt601", "full"), ("bt709", "limited")])
def test_reduced_pictures_keep_their_colours(
    tmp_path: Path, pix_fmt: str, size_px: tuple[int, int], matrix: str, span: str
) -> None:
    """The colour planes may have half the resolution of the luma plane, as in most video; odd sizes too."""
    picture = scene(*size_px)
    clip = write_clip(tmp_path / "c.mkv", [frame_of(picture, pix_fmt, matrix, span)])
    assert _error(_first(clip).fit_to_input(SPEC)[0], reference_letterbox(picture, SPEC)) < 2


@pytest.mark.parametrize("pix_fmt", ["nv12", "p010le"])
def test_two_channel_planes_of_a_gpu_are_converted_correctly(pix_fmt: str) -> None:
    from visionedge.camera.sources.pyav import read_planes
    from visionedge.camera.sources.yuv import convert_full_size

    picture = scene(160, 90)
    planes = read_planes(frame_of(picture, pix_fmt, "bt709", "limited"))
    assert _error(convert_full_size(planes), picture) < 1


@pytest.mark.parametrize("span", list(RANGES))
def test_ycgco_gives_the_original_colours(span: str) -> None:
    """Its own formula, which FFmpeg's converter refuses."""
    from visionedge.camera.sources.pyav import read_planes
    from visionedge.camera.sources.yuv import convert_full_size

    picture = scene(160, 90)
    frame = frame_of(picture, "yuv444p", "bt601", span)
    blue, green, red = (picture[:, :, n] / 255.0 for n in range(3))
    parts = (green / 2 + (red + blue) / 4, green / 2 - (red + blue) / 4, (red - blue) / 2)
    scales = ((219, 16), (224, 128), (224, 128)) if span == "limited" else ((255, 0), (255, 128), (255, 128))
    for plane, part, (scale, zero) in zip(frame.planes, parts, scales, strict=True):
        rows = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        rows[:90, :160] = np.rint(part * scale + zero).clip(0, 255)
        plane.update(rows.tobytes())
    frame.colorspace = 8
    planes = read_planes(frame)
    assert _error(convert_full_size(planes), picture) < 1


@pytest.mark.parametrize("number", [0, 3, 11, 12, 13, 14, 15, 200])
def test_an_unknown_matrix_is_derived_from_the_primaries(number: int) -> None:
    """As near as can be, and never an error; FFmpeg's converter refuses most of them."""
    from visionedge.camera.sources.pyav import PyavPicture

    picture = scene(160, 90)
    # 0 and 3 are no matrices at all, and BT.601 to FFmpeg, too.
    kinds = [("bt601", 2), ("bt709", 1), ("bt2020", 9)] if number > 3 else [("bt601", 2)]
    for matrix, primaries in kinds:
        frame = frame_of(picture, "yuv420p", matrix, "limited")
        frame.colorspace, frame.color_primaries = number, primaries
        shown = PyavPicture(partial(_itself, frame), (160, 90), None, 1)
        assert _error(shown.picture(), picture) < 1
        assert _error(shown.fit_to_input(SPEC)[0], reference_letterbox(picture, SPEC)) < 1


@pytest.mark.parametrize("number", [8, 11, 12, 14])
def test_packed_colours_with_an_unknown_matrix_are_converted(number: int) -> None:
    from visionedge.camera.sources.pyav import PyavPicture

    picture = scene(160, 90)
    frame = frame_of(picture, "yuv422p", "bt601", "limited").reformat(format="yuyv422")
    frame.colorspace = number
    shown = PyavPicture(lambda: frame, (160, 90), None, 1)
    assert _error(shown.picture(), picture) < 2


@pytest.mark.parametrize("options", [{"flags": "+ildct"}, {"x264-params": "colormatrix=YCgCo"}])
def test_formats_that_opencv_cannot_convert_are_refused_and_never_give_uninitialised_memory(
    tmp_path: Path, options: dict[str, str]
) -> None:
    """OpenCV reports that the picture was retrieved, but has written none; PyAV gives the picture."""
    frames = [frame_of(scene(160, 96), "yuv420p", "bt601", "limited") for _ in range(3)]
    clip = write_clip(tmp_path / "c.mp4", frames, "libx264", {"crf": "1", **options})
    for _ in range(2):  # the second time the memory of the first could be had again
        with pytest.raises(SourceError, match=r"OpenCV cannot convert the pictures .* use 'decoder: pyav'"):
            _first(clip, "opencv")
    assert _first(clip, "pyav").picture().shape == (96, 160, 3)


def _raw_h264(folder: Path, *parts: tuple[int, dict[str, str]]) -> Path:
    """So many pictures with these options of x264, and so on, in one stream; all of them differ."""
    clip = folder / "c.h264"
    coded, count = b"", 0
    for pictures, options in parts:
        moved = [np.roll(scene(160, 96), 4 * (count + number), axis=1) for number in range(pictures)]
        frames = [frame_of(picture, "yuv420p", "bt601", "limited") for picture in moved]
        coded += write_clip(clip, frames, "libx264", {"crf": "1", **options}).read_bytes()
        count += pictures
    clip.write_bytes(coded)
    return clip


def _seen(source: FrameSource) -> int:
    """The number of pictures, each checked."""
    seen = 0
    try:
        while (decoded := source.read()) is not None:
            decoded.fit_to_input(SPEC)
            seen += 1
    except SourceError as error:
        error.add_note(f"seen: {seen}")
        raise
    finally:
        source.close()
    return seen


@pytest.mark.parametrize("options", [{"flags": "+ildct"}, {"x264-params": "colormatrix=YCgCo"}])
@pytest.mark.parametrize("before", [3, 25])
def test_a_stream_that_changes_to_an_unsupported_format_is_refused_then(
    tmp_path: Path, options: dict[str, str], before: int
) -> None:
    """OpenCV repeats the last good picture, and reports each as retrieved."""
    clip = _raw_h264(tmp_path, (before, {}), (25, options))
    with pytest.raises(
        SourceError, match=r"OpenCV cannot convert the pictures .* use 'decoder: pyav'"
    ) as found:
        _seen(_open(clip, "opencv"))
    assert int(found.value.__notes__[0].removeprefix("seen: ")) <= max(before, 8)
    assert _seen(_open(clip, "pyav")) == before + 25


def test_a_still_scene_is_not_mistaken_for_an_unsupported_format(tmp_path: Path) -> None:
    """Its pictures are equal to the last byte, too."""
    frames = [frame_of(scene(160, 96), "yuv420p", "bt601", "limited") for _ in range(40)]
    clip = write_clip(tmp_path / "c.mkv", frames)
    assert _seen(_open(clip, "opencv")) == 40


def _elsewhere(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def test_opencv_errors_are_captured_for_one_thread_and_one_action(tmp_path: Path) -> None:
    clip = _raw_h264(tmp_path, (3, {}), (25, {"flags": "+ildct"}))
    configure_opencv()
    limit_ffmpeg()
    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    found = []
    for _ in range(6):
        assert capture.grab()
        found.append(reports_error(capture.retrieve))
        assert not reports_error(lambda: _elsewhere(capture.retrieve))
    capture.release()
    assert found == [False] * 3 + [True] * 3


@pytest.mark.parametrize("pix_fmt", ["bgr0", "rgb48le", "gbrp10le"])
def test_formats_without_luma_and_chroma_are_converted_by_ffmpeg(tmp_path: Path, pix_fmt: str) -> None:
    av: Any = pytest.importorskip("av")
    picture = scene(160, 90)
    frame = av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(format=pix_fmt)
    decoded = _first(write_clip(tmp_path / "c.mkv", [frame]))
    assert _error(decoded.fit_to_input(SPEC)[0], reference_letterbox(picture, SPEC)) < 1
    assert _error(decoded.picture(), picture) < 1


@pytest.mark.parametrize("size_px", [(161, 91), (91, 161), (97, 75)])
def test_odd_sizes_are_converted_correctly(tmp_path: Path, size_px: tuple[int, int]) -> None:
    picture = scene(*size_px)
    clip = write_clip(tmp_path / "c.mkv", [frame_of(picture, "yuv420p", "bt601", "limited")])
    decoded = _first(clip)
    assert (decoded.width_px, decoded.height_px) == size_px
    # Chroma reaches up to a pixel over an odd edge.
    assert _error(decoded.fit_to_input(SPEC)[0], reference_letterbox(picture, SPEC)) < 2
    assert _error(decoded.picture(), picture) < 2


def test_unspecified_colours_are_bt601_with_both_decoders(tmp_path: Path) -> None:
    """As FFmpeg, OpenCV and all that is built on them have it, high definition included."""
    frame = frame_of(scene(1280, 720), "yuv420p", "bt601", "limited")
    frame.colorspace, frame.color_range = 2, 0
    clip = write_clip(tmp_path / "c.mp4", [frame], "libx264", {"crf": "1"})
    assert _error(_first(clip, "pyav").picture(), scene(1280, 720)) < 2
    assert _error(_first(clip, "opencv").picture(), scene(1280, 720)) < 2


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("library", ["pyav", "opencv"])
@pytest.mark.parametrize("size_px", [(160, 90), (640, 360)])
def test_a_rotated_picture_is_turned_upright(
    tmp_path: Path, library: DecoderLibrary, degrees: int, size_px: tuple[int, int]
) -> None:
    picture = scene(*size_px)
    frame = frame_of(picture, "yuv420p", "bt601", "limited")
    clip = turn(write_clip(tmp_path / "c.mp4", [frame], "libx264", {"crf": "1"}), degrees)
    upright = np.ascontiguousarray(np.rot90(picture, -degrees // 90))
    decoded = _first(clip, library)
    assert _error(decoded.picture(), upright) < 2
    assert _error(decoded.fit_to_input(SPEC)[0], reference_letterbox(upright, SPEC)) < 2
    assert (decoded.width_px, decoded.height_px) == (upright.shape[1], upright.shape[0])


def test_non_reference_pictures_are_nearly_those_of_a_plain_decoder(tmp_path: Path) -> None:
    """The edges of their blocks are not smoothed, which spreads nowhere; all others are the very same."""
    av: Any = pytest.importorskip("av")
    from visionedge.camera.sources.pyav import PyavDecoder

    pictures = [np.roll(scene(320, 180), 3 * shift, axis=1) for shift in range(24)]
    frames = [frame_of(picture, "yuv420p", "bt601", "limited") for picture in pictures]
    clip = write_clip(tmp_path / "c.mp4", frames, "libx264", {"bf": "2", "crf": "30", "b-pyramid": "none"})
    with av.open(str(clip)) as plain, av.open(str(clip)) as ours:
        decoder = PyavDecoder(ours.streams.video[0].codec_context, 1)
        given = [frame for packet in ours.demux(video=0) for frame in decoder.decode(packet)]
        wanted = list(plain.decode(video=0))
    assert len(given) == len(wanted) == 24
    differences: dict[bool, list[float]] = {True: [], False: []}
    for one, other in zip(given, wanted, strict=True):
        between = av.video.frame.PictureType(other.pict_type) is av.video.frame.PictureType.B
        bytes_of = (np.asarray(frame.to_ndarray(), np.uint8) for frame in (one, other))
        differences[between].append(_error(*bytes_of))
    assert max(differences[False]) == 0
    assert 0 < max(differences[True]) < 2


def test_a_change_of_size_in_mid_stream_is_followed(tmp_path: Path) -> None:
    """PyAV follows the change; OpenCV stretches pictures to the first size."""
    sizes_px = [(160, 90)] * 3 + [(96, 128)] * 3
    whole = b""
    for number, size_px in enumerate((sizes_px[0], sizes_px[-1])):
        frames = [frame_of(scene(*size_px), "yuv420p", "bt601", "limited") for _ in range(3)]
        part = write_clip(tmp_path / f"{number}.h264", frames, "libx264", {"bf": "0", "crf": "1"})
        whole += part.read_bytes()
    (tmp_path / "c.h264").write_bytes(whole)
    source = _open(tmp_path / "c.h264")
    for size_px in sizes_px:
        decoded = source.read()
        assert decoded is not None
        image, placement = decoded.fit_to_input(SPEC)
        assert placement == SPEC.place(*size_px)
        assert (decoded.width_px, decoded.height_px) == size_px
        assert _error(image, reference_letterbox(scene(*size_px), SPEC)) < 2
    assert source.read() is None
    source.close()


def test_a_kept_picture_is_available_long_after_its_frame(tmp_path: Path) -> None:
    """The full picture is made from the kept planes on request, and is still the same."""
    levels = [30, 90, 150, 210]
    frames = [frame_of(np.full((90, 160, 3), n, np.uint8), "yuv420p", "bt601", "full") for n in levels]
    source = _open(write_clip(tmp_path / "c.mp4", frames, "libx264", {"crf": "1", "bf": "0"}))
    kept = []
    while (decoded := source.read()) is not None:
        decoded.fit_to_input(SPEC)
        kept.append(decoded)
    source.close()
    assert [round(float(decoded.picture().mean()), -1) for decoded in kept] == levels
