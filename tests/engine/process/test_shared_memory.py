"""Pictures in shared memory: a block is never reused while a view of it exists."""

import gc
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionedge.engine.process.shared_memory import FrameView, SharedFramePool, compute_block_count
from visionedge.frames.types import InputSpec, Picture

SPEC = InputSpec(20, 10)


@pytest.fixture
def frame_pool() -> Iterator[SharedFramePool]:
    made = SharedFramePool(SPEC, 4)
    yield made
    made.close()


def allocated(frame_pool: SharedFramePool) -> Picture:
    """A picture that there must be room for."""
    picture = frame_pool.allocate()
    assert picture is not None
    return picture


def test_a_picture_is_a_plain_array_of_the_models_size(frame_pool: SharedFramePool) -> None:
    picture = allocated(frame_pool)
    assert picture.shape == (10, 20, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert picture.flags.writeable


def test_written_data_is_visible_at_the_other_end(frame_pool: SharedFramePool) -> None:
    window = FrameView(frame_pool.fd, SPEC)
    pictures = [allocated(frame_pool) for _ in range(4)]
    for number, picture in enumerate(pictures):
        picture[:] = number
    for number, picture in enumerate(pictures):
        block = frame_pool.block_of(picture)
        assert block is not None
        assert (window.picture(block) == number).all()


def test_the_other_end_cannot_write(frame_pool: SharedFramePool) -> None:
    """Neither through its window nor by a mapping of its own, nor can it cut the memory short under us."""
    seen = FrameView(frame_pool.fd, SPEC).picture(0)
    with pytest.raises(ValueError, match="read-only"):
        seen[0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(frame_pool.fd, 0)
    with pytest.raises(PermissionError):
        os.pwrite(frame_pool.fd, b"x", 0)


@pytest.mark.parametrize("block", [-1, 4, 1 << 30])
def test_an_unknown_block_is_an_error(frame_pool: SharedFramePool, block: int) -> None:
    with pytest.raises(IndexError):
        FrameView(frame_pool.fd, SPEC).picture(block)


def test_without_a_free_block_none_is_returned_and_counted(frame_pool: SharedFramePool) -> None:
    held = [allocated(frame_pool) for _ in range(4)]
    assert frame_pool.allocate() is None
    assert frame_pool.allocate() is None
    assert (frame_pool.exhausted_count, frame_pool.free) == (2, 0)
    held.pop()
    assert allocated(frame_pool) is not None


def test_a_view_keeps_its_block(frame_pool: SharedFramePool) -> None:
    """With any kind of view: a slice of a slice, another shape, a bare buffer."""
    kept = [allocated(frame_pool)[2:][1:], allocated(frame_pool).reshape(-1), allocated(frame_pool).data]
    gc.collect()
    assert frame_pool.free == 1
    kept.clear()
    gc.collect()
    assert frame_pool.free == 4


def test_pictures_outlive_their_pool() -> None:
    frame_pool = SharedFramePool(SPEC, 1)
    picture = allocated(frame_pool)
    frame_pool.close()
    del frame_pool
    gc.collect()
    picture[:] = 7
    assert int(picture.sum()) == 7 * picture.size


def test_a_block_contains_only_whole_pictures(frame_pool: SharedFramePool) -> None:
    picture = allocated(frame_pool)
    assert frame_pool.block_of(picture) is not None
    assert frame_pool.block_of(picture.copy()) is None
    assert frame_pool.block_of(picture[:, ::-1]) is None
    assert frame_pool.block_of(picture[:5]) is None
    assert frame_pool.block_of(np.zeros((10, 20, 3), np.uint8)) is None
    other = SharedFramePool(SPEC, 4)
    assert frame_pool.block_of(allocated(other)) is None
    other.close()


@given(steps=st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=60))
@settings(deadline=None)
def test_held_pictures_are_always_different_blocks(steps: list[int | None]) -> None:
    """For any order of taking (None) and releasing (a number), no block is lost."""
    frame_pool = SharedFramePool(SPEC, 5)
    held: list[Picture] = []
    for step in steps:
        if step is None:
            picture = frame_pool.allocate()
            assert (picture is None) == (len(held) == 5)
            if picture is not None:
                held.append(picture)
            del picture
        elif held:
            held.pop(step % len(held))
        blocks = [frame_pool.block_of(picture) for picture in held]
        assert len(set(blocks)) == len(held)
        assert None not in blocks
        assert frame_pool.free == 5 - len(held)
    frame_pool.close()


def test_threads_never_see_each_others_pictures() -> None:
    """Eight threads write their own number, hold some pictures for a while, and later find only it."""
    frame_pool = SharedFramePool(SPEC, 12)
    wrong: list[int] = []
    exhausted_count: list[int] = []

    def camera(number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - of no secret
        held: list[Picture] = []
        for _ in range(2000):
            picture = frame_pool.allocate()
            if picture is None:
                exhausted_count.append(number)
            else:
                picture[:] = number
                held.append(picture)
            while len(held) > chance.randrange(3):
                checked = held.pop(0)
                if not (checked == number).all():
                    wrong.append(number)

    threads = [threading.Thread(target=camera, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert frame_pool.exhausted_count == len(exhausted_count)
    assert frame_pool.free == 12
    frame_pool.close()


def test_the_pool_has_blocks_for_every_camera() -> None:
    assert compute_block_count(0, 1) >= 32
    assert compute_block_count(50, 2) >= 50 * 4
    assert compute_block_count(1, 128) >= 2 * 128
