"""A picture comes to the model's size in one step, and everything on it can be found again."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_letterbox import reference_letterbox
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture

specs = st.builds(
    InputSpec,
    width_px=st.integers(8, 96),
    height_px=st.integers(8, 96),
    fit=st.sampled_from(["letterbox", "stretch"]),
    anchor=st.sampled_from(["center", "top-left"]),
    pad=st.integers(0, 255),
)
sides_px = st.integers(1, 160)


def _noise(width_px: int, height_px: int, seed: int = 7) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)


@settings(deadline=None, max_examples=150)
@given(width_px=sides_px, height_px=sides_px, spec=specs)
def test_the_letterbox_equals_a_slow_bilinear_reference(width_px: int, height_px: int, spec: InputSpec) -> None:
    picture = _noise(width_px, height_px)
    image, _ = fit_to_input(picture, spec)
    # OpenCV interpolates with 11-bit weights: one grey level, seldom two.
    assert np.abs(image.astype(int) - reference_letterbox(picture, spec).astype(int)).max() <= 2


@settings(deadline=None, max_examples=150)
@given(width_px=sides_px, height_px=sides_px, spec=specs)
def test_a_given_array_is_overwritten_completely(width_px: int, height_px: int, spec: InputSpec) -> None:
    """`out` is used in place, with any content before."""
    picture = _noise(width_px, height_px)
    fresh, placement = fit_to_input(picture, spec)
    out = np.full((spec.height_px, spec.width_px, 3), 77, np.uint8)
    image, same_placement = fit_to_input(picture, spec, out)
    assert image is out
    assert placement == same_placement == spec.place(width_px, height_px)
    np.testing.assert_array_equal(out, fresh)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), spec=specs)
def test_a_rectangle_is_mapped_back_within_a_pixel(data: st.DataObject, spec: InputSpec) -> None:
    """A white rectangle of the source, looked for in the input, maps back through the placement."""
    width_px = data.draw(st.integers(spec.width_px, 4 * spec.width_px), label="width")
    height_px = data.draw(st.integers(spec.height_px, 4 * spec.height_px), label="height")
    left = data.draw(st.integers(0, width_px // 2), label="left")
    top = data.draw(st.integers(0, height_px // 2), label="top")
    picture = np.zeros((height_px, width_px, 3), np.uint8)
    picture[top:, left:] = 255
    image, place = fit_to_input(
        picture, InputSpec(spec.width_px, spec.height_px, spec.fit, spec.anchor, pad=0)
    )
    shown = image[:, :, 0] >= 128
    if not shown.any():
        return  # the rectangle is thinner than a pixel of the input
    found_left = (np.flatnonzero(shown.any(axis=0))[0] - place.left_px) * width_px / place.width_px
    found_top = (np.flatnonzero(shown.any(axis=1))[0] - place.top_px) * height_px / place.height_px
    # One pixel of the input, in pixels of the source.
    assert abs(found_left - left) <= max(1.0, width_px / place.width_px)
    assert abs(found_top - top) <= max(1.0, height_px / place.height_px)


def test_a_picture_of_the_input_size_is_unchanged() -> None:
    picture = _noise(64, 48)
    image, _ = fit_to_input(picture, InputSpec(64, 48))
    np.testing.assert_array_equal(image, picture)
    assert not np.shares_memory(image, picture)


def test_the_letterbox_writes_into_a_slice_of_a_larger_array() -> None:
    """A batch of shared memory is filled in place, and its neighbours stay as they are."""
    batch = np.zeros((3, 48, 64, 3), np.uint8)
    picture = _noise(200, 100)
    image, _ = fit_to_input(picture, InputSpec(64, 48), batch[1])
    assert np.shares_memory(image, batch)
    np.testing.assert_array_equal(batch[1], fit_to_input(picture, InputSpec(64, 48))[0])
    assert not batch[0].any()
    assert not batch[2].any()


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_that_is_not_a_bgr_picture_is_refused(picture: Picture) -> None:
    with pytest.raises(ValueError, match="uint8"):
        fit_to_input(picture, InputSpec(8, 8))


def test_an_array_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="out must be"):
        fit_to_input(_noise(8, 8), InputSpec(8, 8), np.zeros((8, 9, 3), np.uint8))


def test_colours_keep_their_order() -> None:
    blue = np.zeros((10, 20, 3), np.uint8)
    blue[:, :, 0] = 200
    image, place = fit_to_input(blue, InputSpec(16, 16))
    inside = image[int(place.top_px) + 1, 8]
    assert inside.tolist() == cv2.resize(blue, (16, 8))[1, 8].tolist() == [200, 0, 0]
