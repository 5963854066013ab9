"""Still pictures: read what is one, refuse what is none, before it costs memory."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips import make_picture, number_of, numbered_picture
from visionedge.camera.sources.images import (
    decode_picture,
    list_pictures,
    natural_sort_key,
    read_picture,
    read_picture_size,
)
from visionedge.errors import SourceError
from visionedge.frames.types import Picture

SUFFIXES = [".jpg", ".png", ".webp", ".bmp", ".tif"]


def _encoded(suffix: str, width_px: int = 37, height_px: int = 21, number: int = 5) -> bytes:
    return cv2.imencode(suffix, numbered_picture(number, width_px, height_px))[1].tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_decoded_to_bgr(suffix: str) -> None:
    picture = decode_picture(_encoded(suffix))
    assert picture.shape == (21, 37, 3)
    assert picture.dtype == np.uint8
    assert number_of(picture) == 5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_size_is_known_without_decoding(suffix: str) -> None:
    assert read_picture_size(_encoded(suffix)) == (37, 21)


def _photograph() -> Picture:
    """Something in every part of it, so that nothing missing could look like the rest."""
    coarse = np.random.default_rng(4).integers(0, 256, (24, 32, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC), np.uint8)


@pytest.mark.parametrize("missing_bytes", [1, 2])
@pytest.mark.parametrize("restarts", [0, 5])
def test_a_jpeg_without_its_end_marker_is_the_same_picture(missing_bytes: int, restarts: int) -> None:
    options = [cv2.IMWRITE_JPEG_RST_INTERVAL, restarts]
    whole = cv2.imencode(".jpg", _photograph(), options)[1].tobytes()
    assert whole.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(decode_picture(whole[:-missing_bytes]), decode_picture(whole))


@pytest.mark.parametrize("missing_bytes", [3, 4, 8, 30, 64, 100, 2000])
def test_a_truncated_jpeg_is_refused_and_the_library_prints_nothing(
    missing_bytes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = cv2.imencode(".jpg", _photograph())[1].tobytes()
    with pytest.raises(SourceError, match="damaged picture"):
        decode_picture(whole[:-missing_bytes])
    assert capfd.readouterr().err == ""


def test_only_regular_picture_files_are_read(tmp_path: Path) -> None:
    """A pipe without a writer, and a device that never ends."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(SourceError, match=f"{name}: cannot be read: not a regular file"):
            read_picture(tmp_path / name)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(SourceError, match="empty file"):
        read_picture(tmp_path / "empty.jpg")


def test_the_sizes_of_lossless_and_transparent_webp_are_known() -> None:
    lossless = cv2.imencode(".webp", numbered_picture(1, 37, 21), [cv2.IMWRITE_WEBP_QUALITY, 101])[1]
    assert read_picture_size(lossless.tobytes()) == (37, 21)
    clear = np.zeros((21, 37, 4), np.uint8)
    clear[:, :20] = (10, 20, 30, 128)
    lossy = cv2.imencode(".webp", clear, [cv2.IMWRITE_WEBP_QUALITY, 50])[1].tobytes()
    assert read_picture_size(lossy) == (37, 21)
    assert decode_picture(lossy).shape == (21, 37, 3)


@pytest.mark.parametrize("make", [lambda p: p[:, :, 0], lambda p: np.dstack([p, p[:, :, :1]])])
def test_grey_and_transparent_pictures_become_bgr(make: object) -> None:
    assert callable(make)
    data = cv2.imencode(".png", make(numbered_picture(5)))[1].tobytes()
    assert decode_picture(data).shape == (120, 160, 3)


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(50), b"%PDF-1.7", bytes(1000)])
def test_a_file_that_is_not_a_picture_is_refused_with_the_remedy(data: bytes) -> None:
    with pytest.raises(SourceError, match="body: not a readable picture; supported are JPEG, PNG"):
        decode_picture(data, name="body")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.02, 0.5])
def test_a_truncated_picture_is_refused_or_has_its_full_size(
    suffix: str, kept: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Never a crash, never another error, and nothing of the library's on stderr."""
    data = cv2.imencode(suffix, np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8))[
        1
    ].tobytes()
    try:
        picture = decode_picture(data[: int(len(data) * kept)])
    except SourceError:
        picture = None
    assert picture is None or picture.shape == (90, 120, 3)
    assert capfd.readouterr().err == ""


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_headers_raise_only_picture_errors(data: st.DataObject) -> None:
    whole = bytearray(_encoded(data.draw(st.sampled_from(SUFFIXES))))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, min(60, len(whole) - 1)))] = data.draw(st.integers(0, 255))
    size = read_picture_size(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert size is None or len(size) == 2


def _huge_png() -> bytes:
    """A PNG of a few bytes whose header promises 60000 x 60000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_picture_that_exceeds_the_memory_limit_is_refused_by_its_header() -> None:
    with pytest.raises(SourceError, match="60000 x 60000 pixels, more than the limit of 100 megapixels"):
        decode_picture(_huge_png())


def test_the_limit_can_be_lower() -> None:
    with pytest.raises(SourceError, match="use a smaller picture"):
        decode_picture(_encoded(".jpg"), max_pixels=100)


def test_errors_of_files_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.jpg: does not exist"):
        read_picture(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(SourceError, match=r"text\.jpg: not a readable picture"):
        read_picture(tmp_path / "text.jpg")
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read_picture(tmp_path)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    """Telephones store pictures lying and say so in the EXIF data."""
    lying = cv2.imencode(".jpg", numbered_picture(3, 40, 20))[1].tobytes()
    # One IFD entry: orientation (0x0112), SHORT, count 1, value 6 = a quarter turn.
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    path = tmp_path / "turned.jpg"
    path.write_bytes(lying[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + lying[2:])
    assert read_picture(path).shape == (40, 20, 3)


def test_a_folder_is_read_in_natural_order_without_other_files(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.png", "IMG1.png", "b.jpg"):
        make_picture(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "below").mkdir()
    make_picture(tmp_path / "below" / "deep.png")
    assert [p.name for p in list_pictures(tmp_path)] == ["b.jpg", "IMG1.png", "img2.png", "img10.png"]


@given(st.lists(st.text(max_size=12), max_size=8))
def test_any_file_names_can_be_sorted(names: list[str]) -> None:
    in_order = sorted(names, key=natural_sort_key)
    names.reverse()
    assert sorted(names, key=natural_sort_key) == in_order


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere: does not exist"):
        list_pictures(tmp_path / "nowhere")
